//! Where a page of code must be stopped at, so that none of its instructions that tell of the host ([`scan`]) is executed. They are more than the CPU can
//! watch in a function that asks for many leaves of CPUID; but it asks for the first one first. Who stops there, and goes on by itself only when
//! it is not [inside](Telling::inside) any more, has met all others.
//!
//! For that the flow of control within the page is followed: from its start, from behind calls, from landing pads and from wherever nothing in the page leads to. A page whose flow is not
//! known (jumps by registers close to such an instruction, jumps into its middle from its neighbours) is not guarded like that. Where the function goes on in other pages, the program must not go
//! on by itself there either: until it returns. Who jumps into the middle of a function from elsewhere meets what he asked for.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};

use crate::{WATCHED, scan};

const SIZE: usize = 4096;

/// How a page is kept from telling of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Telling {
    /// Offsets of the instructions to stop before; they may be somewhat below 0. None: there is nothing that tells.
    pub stops: Vec<i64>,
    /// There are more, which these guard.
    inside: Option<Box<Inside>>,
}

/// What stops guard.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Inside {
    /// A bit for each offset where the program must not go on by itself.
    bits: [u64; SIZE / 64],
    /// All instructions that tell.
    found: Vec<i64>,
}

impl Telling {
    /// Looks for what tells on a page; the rest is as for [`scan::find`]. More than [`WATCHED`] stops: the page must not be executed.
    pub fn find(page: &[u8; SIZE], before: &[u8], after: &[u8], written: bool) -> Self {
        let found = scan::find(page, before, after, written);
        if found.len() > WATCHED
            && let Some(guarded) = guard(page, &found, WATCHED)
        {
            return guarded;
        }
        Self { stops: found, inside: None }
    }

    /// Do the stops guard other instructions?
    pub fn guards(&self) -> bool {
        self.inside.is_some()
    }

    /// Could what starts at this offset of the page come to an instruction that tells, and to no stop before it?
    pub fn inside(&self, offset: u64) -> bool {
        let word = self.inside.as_ref().and_then(|inside| inside.bits.get((offset / 64) as usize));
        word.is_some_and(|word| word >> (offset % 64) & 1 != 0)
    }

    /// The same if nothing were guarded.
    #[must_use]
    pub fn unguarded(&self) -> Self {
        Self { stops: self.inside.as_ref().map_or(&self.stops, |inside| &inside.found).clone(), inside: None }
    }

    /// Does `other`, a page at this distance in bytes (a positive one is behind it), jump to where the program must not go on by itself?
    pub fn is_entered_from(&self, other: &[u8; SIZE], distance: i64) -> bool {
        let mut decoder = Decoder::with_ip(64, other, 0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        std::iter::from_fn(|| {
            decoder.can_decode().then(|| {
                decoder.decode_out(&mut instruction);
                let target = instruction.near_branch_target() as i64 + distance;
                instruction.op0_kind() == OpKind::NearBranch64 && self.inside(target as u64)
            })
        })
        .any(|entered| entered)
    }
}

/// What an instruction leads to.
#[derive(Clone, Default)]
struct Node {
    /// There is an instruction.
    starts: bool,
    /// Of this page.
    next: Vec<usize>,
    /// It also leads to where nobody knows.
    unknown: bool,
    /// It can be come to from somewhere else.
    entry: bool,
}

/// The page's instructions, one after the other.
fn nodes(page: &[u8; SIZE]) -> Vec<Node> {
    let mut nodes = vec![Node::default(); SIZE];
    let mut decoder = Decoder::with_ip(64, page, 0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut behind_call = true;
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut instruction);
        let mut node = Node {
            starts: true,
            entry: behind_call || at == 0 || instruction.mnemonic() == Mnemonic::Endbr64,
            ..Node::default()
        };
        let (mut targets, mut goes_on) = (None, true);
        behind_call = false;
        match instruction.flow_control() {
            _ if instruction.is_invalid() => (behind_call, goes_on) = (true, false),
            FlowControl::UnconditionalBranch => (targets, goes_on) = (Some(instruction.near_branch_target()), false),
            FlowControl::ConditionalBranch => targets = Some(instruction.near_branch_target()),
            FlowControl::Return => goes_on = false,
            FlowControl::IndirectBranch => (node.unknown, goes_on) = (true, false),

            FlowControl::XbeginXabortXend => node.unknown = true,
            FlowControl::Call | FlowControl::IndirectCall | FlowControl::Exception | FlowControl::Interrupt => {
                (behind_call, goes_on) = (true, false)
            }
            FlowControl::Next => {}
        }
        if targets.is_some() && !matches!(instruction.op0_kind(), OpKind::NearBranch64) {
            // A far jump.
            (targets, node.unknown) = (None, true);
        }
        let next = decoder.position();
        for target in targets.into_iter().chain(goes_on.then_some(next as u64)) {
            match usize::try_from(target) {
                Ok(target) if target < SIZE => node.next.push(target),
                // Out of the page.
                _ => {}
            }
        }
        nodes[at] = node;
    }
    let mut led_to = vec![false; SIZE];
    for target in nodes.iter().flat_map(|node| &node.next) {
        led_to[*target] = true;
    }
    for (at, node) in nodes.iter_mut().enumerate() {
        node.entry |= node.starts && !led_to[at];
    }
    nodes
}

/// All that `from` and what it leads to lead to, themselves included; what `ends` says leads no further.
fn closure<'a>(
    from: impl IntoIterator<Item = usize>,
    next: impl Fn(usize) -> &'a [usize],
    ends: impl Fn(usize) -> bool,
) -> Vec<bool> {
    let mut seen = vec![false; SIZE];
    let mut left: Vec<usize> = from.into_iter().collect();
    while let Some(at) = left.pop() {
        if !std::mem::replace(&mut seen[at], true) && !ends(at) {
            left.extend(next(at));
        }
    }
    seen
}

/// Guards the page with `most` stops or fewer. `found`: offsets of the instructions that tell.
fn guard(page: &[u8; SIZE], found: &[i64], most: usize) -> Option<Telling> {
    let nodes = nodes(page);
    let tells: Vec<usize> =
        found.iter().map(|&at| usize::try_from(at).ok().filter(|&at| at < SIZE)).collect::<Option<_>>()?;
    if !tells.iter().all(|&at| nodes[at].starts) {
        return None;
    }
    let mut back = vec![Vec::new(); SIZE];
    for (at, node) in nodes.iter().enumerate() {
        for &target in &node.next {
            back[target].push(at);
        }
    }
    let (next, back) = (|at: usize| &nodes[at].next[..], |at: usize| &back[at][..]);
    // Each stop is one that can be come to without any of the others.
    let entries = || (0..SIZE).filter(|&at| nodes[at].entry);
    let mut stops: Vec<usize> = Vec::new();
    loop {
        let reached = closure(entries(), next, |at| stops.contains(&at));
        match tells.iter().find(|&&at| reached[at] && !stops.contains(&at)) {
            None => break,
            Some(_) if stops.len() == most => return None,
            Some(&at) => stops.push(at),
        }
    }
    stops.sort_unstable();
    // What the program comes to by itself around them must be known. Behind a stop it does not go on by itself.
    let before = closure(tells.iter().copied(), back, |_| false);
    let behind = closure(stops.iter().copied(), next, |_| false);
    let by_itself = closure(entries().filter(|&at| before[at] || behind[at]), next, |at| stops.contains(&at));
    let unknown = |at: usize, node: &Node| by_itself[at] && node.unknown || (before[at] || behind[at]) && !node.starts;
    if nodes.iter().enumerate().any(|(at, node)| unknown(at, node)) {
        return None;
    }
    // Back from those that are no stops, to those that are.
    let inside = closure(tells.iter().copied().filter(|at| !stops.contains(at)), back, |at| stops.contains(&at));
    let mut bits = [0; SIZE / 64];
    for (at, _) in inside.iter().enumerate().filter(|&(at, &inside)| inside && !stops.contains(&at)) {
        bits[at / 64] |= 1 << (at % 64);
    }
    Some(Telling {
        stops: stops.into_iter().map(|at| at as i64).collect(),
        inside: Some(Box::new(Inside { bits, found: found.to_vec() })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    type Built = Result<(), iced_x86::IcedError>;
    use iced_x86::code_asm::*;

    fn page(build: impl FnOnce(&mut CodeAssembler) -> Built) -> [u8; SIZE] {
        let mut a = CodeAssembler::new(64).unwrap();
        build(&mut a).unwrap();
        let bytes = a.assemble(0).unwrap();
        let mut page = [0xcc; SIZE];
        page[..bytes.len()].copy_from_slice(&bytes);
        page
    }

    fn cpuids(page: &[u8; SIZE]) -> Vec<i64> {
        (0..SIZE as i64 - 1).filter(|&at| page[at as usize..][..2] == [0x0f, 0xa2]).collect()
    }

    /// A leaf at a time, each if the one before says so, as libraries do; another function before it and one behind it.
    fn function(a: &mut CodeAssembler, leaves: u32, middle: impl Fn(&mut CodeAssembler) -> Built) -> Built {
        a.add(rax, 1)?;
        a.ret()?;
        let mut end = a.create_label();
        a.push(rbx)?;
        for leaf in 0..leaves {
            a.mov(eax, leaf)?;
            a.cpuid()?;
            a.cmp(ebx, 0x1234)?;
            a.jb(end)?;
            middle(a)?;
        }
        a.set_label(&mut end)?;
        a.pop(rbx)?;
        a.ret()?;
        a.sub(rax, 1)?;
        a.ret()
    }

    #[test]
    fn the_first_of_many_guards_the_others() {
        let page = page(|a| function(a, 11, |_| Ok(())));
        let tells = cpuids(&page);
        assert_eq!(tells.len(), 11);
        let guarded = guard(&page, &tells, 4).unwrap();
        assert_eq!(guarded.stops, tells[..1]);
        // Before the first nothing is inside; behind it all is, until the last.
        for at in 0..SIZE as u64 {
            let at_instruction = nodes(&page)[at as usize].starts;
            let inside = at_instruction && at > tells[0] as u64 && at <= tells[10] as u64;
            assert_eq!(guarded.inside(at), inside, "{at}");
        }
        assert!(!guarded.inside(5000));
    }

    /// Behind a call anybody may come back: a stop for each.
    #[test]
    fn calls_come_back() {
        let page = page(|a| function(a, 3, |a| a.call(rax)));
        let tells = cpuids(&page);
        assert_eq!(guard(&page, &tells, 4).unwrap().stops, tells);
        assert_eq!(guard(&page, &tells, 2), None);
    }

    #[test]
    fn what_is_not_known_is_not_guarded() {
        // A jump to where a register says, before; one behind a stop may lead where it likes.
        let jumps = |a: &mut CodeAssembler, first: bool| {
            let (mut skip, mut again) = (a.create_label(), a.create_label());
            if first {
                a.jz(skip)?;
                a.jmp(rax)?;
                a.set_label(&mut skip)?;
                a.nop()?;
            }
            a.set_label(&mut again)?;
            a.cpuid()?;
            a.jz(again)?;
            a.cpuid()?;
            a.jmp(rax)
        };
        let (before, behind) = (page(|a| jumps(a, true)), page(|a| jumps(a, false)));
        assert_eq!(guard(&before, &cpuids(&before), 4).map(|telling| telling.stops.len()), None);
        assert_eq!(guard(&behind, &cpuids(&behind), 4).map(|telling| telling.stops.len()), Some(1));
        // Not an instruction, or not of this page.
        let known = page(|a| function(a, 6, |_| Ok(())));
        let mut tells = cpuids(&known);
        assert!(guard(&known, &tells, 4).is_some());
        tells[2] -= 1;
        assert_eq!(guard(&known, &tells, 4), None);
        assert_eq!(guard(&known, &[-1], 4), None);
    }

    /// A function that goes on in another page is one whose middle must not be jumped to from there.
    #[test]
    fn functions_in_several_pages() {
        let out = page(|a| function(a, 6, |a| a.jne(0x2000)));
        let tells = cpuids(&out);
        let guarded = guard(&out, &tells, 4).unwrap();
        assert_eq!(guarded.stops, tells[..1]);
        let back = |to: u64| {
            let mut other = [0x90; SIZE];
            let mut a = CodeAssembler::new(64).unwrap();
            a.jne(to).unwrap();
            let bytes = a.assemble(0x1200).unwrap();
            other[0x200..0x200 + bytes.len()].copy_from_slice(&bytes);
            other
        };
        assert!(guarded.is_entered_from(&back(tells[3] as u64), 4096));
        assert!(!guarded.is_entered_from(&back(tells[0] as u64), 4096), "it stops there");
        assert!(!guarded.is_entered_from(&back(tells[3] as u64), -4096));
        assert!(!guarded.is_entered_from(&[0x90; SIZE], 4096));
        assert_eq!(guarded.unguarded().stops, tells);
    }

    /// Whatever the page holds: from its entries no walk meets what tells before it meets a stop, nor gets inside.
    #[test]
    fn every_walk_meets_a_stop_first() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let mut some = 0;
        for _ in 0..200 {
            let mut page = [0x90; SIZE];
            for _ in 0..12 {
                let at = random(SIZE as u64 - 8) as usize;
                let what: &[u8] = match random(6) {
                    0 => &[0xc3],
                    1 => &[0x74, 0x20],
                    2 => &[0x75, 0xe0],
                    3 => &[0xeb, 0x40],
                    _ => &[0x0f, 0xa2],
                };
                page[at..at + what.len()].copy_from_slice(what);
            }
            page[SIZE - 1] = 0xc3;
            let tells = scan::find(&page, &[], &[], false);
            let Some(guarded) = guard(&page, &tells, 4) else { continue };
            some += 1;
            let nodes = nodes(&page);
            for entry in (0..SIZE).filter(|&at| nodes[at].entry) {
                for _ in 0..20 {
                    let mut at = entry;
                    for _ in 0..SIZE {
                        if guarded.stops.contains(&(at as i64)) {
                            break;
                        }
                        assert!(!tells.contains(&(at as i64)) && !guarded.inside(at as u64));
                        let Some(next) = nodes[at].next.len().checked_sub(1) else { break };
                        at = nodes[at].next[random(next as u64 + 1) as usize];
                    }
                }
            }
        }
        assert!(some > 20, "{some}");
    }
}
