//! Memory accesses of a block that share one check.
//!
//! Accesses through the same base register with small displacements nearly always touch the same page: saved registers, locals,
//! fields of one structure. The first access of such a group (its *leader*) checks the whole range that the group touches and leaves the
//! delta in the vCPU block; the others (*followers*) only load it. Registers are followed through copies, LEA, PUSH, POP
//! and additions of constants. When the range crosses a page, the leader goes to a translation of the same
//! code without groups ([`crate::analyze::Mode::plain`]).
//!
//! A delta is good until translated code is left: TLB entries change only there. So groups end at calls.

use iced_x86::{Mnemonic, OpKind, Register};

use crate::analyze::{Class, Insn};
use crate::block::MAX_GROUPS;

/// The part an access has in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Where the delta is kept.
    pub slot: u8,
    pub leader: bool,
    /// For the leader: start of the group's range, relative to its own access, in bytes (0 or negative).
    pub start: i32,
    /// For the leader: length of the range in bytes.
    pub span: u16,
}

/// Longest range of a group in bytes. Longer ones save more checks but cross a page more often.
const MAX_SPAN: i64 = 384;

/// Displacements beyond this take no part.
const FAR: i32 = 1 << 30;

/// What is known of a register: a value without a name, plus a constant.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Value {
    id: u32,
    offset: i64,
}

struct Active {
    id: u32,
    write: bool,
    min: i64,
    max: i64,
    leader: usize,
    leader_offset: i64,
    /// There are more accesses than the leader's.
    shared: bool,
}

struct Tracker {
    values: [Value; 16],
    next: u32,
}

impl Tracker {
    fn new() -> Self {
        let mut tracker = Self { values: [Value { id: 0, offset: 0 }; 16], next: 0 };
        tracker.forget_all();
        tracker
    }

    fn forget(&mut self, register: usize) {
        self.next += 1;
        self.values[register] = Value { id: self.next, offset: 0 };
    }

    fn forget_all(&mut self) {
        for register in 0..16 {
            self.forget(register);
        }
    }

    fn add(&mut self, register: usize, bytes: i64) {
        self.values[register].offset = self.values[register].offset.wrapping_add(bytes);
    }
}

fn full(register: Register) -> usize {
    register.full_register().number() & 15
}

const RSP: usize = 4;
const RBP: usize = 5;

/// The access that can take part in a group: base register, displacement, size, write.
fn access(insn: &Insn) -> Option<(usize, i64, i64, bool)> {
    let ins = &insn.ins;
    match insn.class {
        Class::Memory { write, size } => {
            let base = ins.memory_base();
            if !base.is_gpr64()
                || ins.memory_index() != Register::None
                || matches!(ins.memory_segment(), Register::FS | Register::GS)
                || (9..=11).contains(&full(base))
            {
                return None;
            }
            // Far displacements could wrap when the range is extended.
            let disp = ins.memory_displacement64() as i32;
            (-FAR..=FAR).contains(&disp).then_some((full(base), i64::from(disp), i64::from(size), write))
        }
        Class::Push | Class::Call => Some((RSP, -8, 8, true)),
        Class::CallIndirect if ins.op0_kind() == OpKind::Register => Some((RSP, -8, 8, true)),
        Class::Pop | Class::Ret => Some((RSP, 0, 8, false)),
        Class::Leave => Some((RBP, 0, 8, false)),
        _ => None,
    }
}

/// Follows the registers over one instruction.
fn track(tracker: &mut Tracker, insn: &Insn) {
    let ins = &insn.ins;
    match insn.class {
        Class::Push | Class::PushMemory | Class::Pushf => tracker.add(RSP, -8),
        Class::Pop => {
            tracker.add(RSP, 8);
            tracker.forget(full(ins.op0_register()));
        }
        Class::Popf => tracker.add(RSP, 8),
        Class::Leave => {
            tracker.values[RSP] = tracker.values[RBP];
            tracker.add(RSP, 8);
            tracker.forget(RBP);
        }
        Class::Lea => {
            let to = full(ins.op0_register());
            let base = ins.memory_base();
            if ins.op0_register().is_gpr64() && base.is_gpr64() && ins.memory_index() == Register::None {
                let value = tracker.values[full(base)];
                tracker.values[to] = value;
                tracker.add(to, i64::from(ins.memory_displacement64() as i32));
            } else {
                tracker.forget(to);
            }
        }
        Class::Plain if ins.op_count() > 0 && ins.op0_kind() == OpKind::Register && ins.op0_register().is_gpr64() => {
            let to = full(ins.op0_register());
            let immediate = (ins.op_count() == 2
                && matches!(ins.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64))
            .then(|| ins.immediate(1) as i64);
            match (ins.mnemonic(), immediate) {
                (Mnemonic::Add, Some(value)) => tracker.add(to, value),
                (Mnemonic::Sub, Some(value)) => tracker.add(to, value.wrapping_neg()),
                (Mnemonic::Inc, _) => tracker.add(to, 1),
                (Mnemonic::Dec, _) => tracker.add(to, -1),
                (Mnemonic::Mov, None) if ins.op1_kind() == OpKind::Register && ins.op1_register().is_gpr64() => {
                    tracker.values[to] = tracker.values[full(ins.op1_register())];
                }
                _ => forget_written(tracker, insn),
            }
        }
        Class::Plain | Class::Memory { .. } | Class::BitTest { .. } => forget_written(tracker, insn),
        Class::Jcc | Class::Jmp | Class::Skip | Class::Cli | Class::Sti | Class::Swapgs => {}
        _ => tracker.forget_all(),
    }
}

fn forget_written(tracker: &mut Tracker, insn: &Insn) {
    for register in 0..16 {
        if insn.written & (1 << register) != 0 {
            tracker.forget(register);
        }
    }
}

/// Finds the groups of a block.
pub fn assign(insns: &mut [Insn]) {
    let mut tracker = Tracker::new();
    // A group's slot is its place here. Those from `first` on still take accesses.
    let mut groups = [const { None::<Active> }; MAX_GROUPS];
    let (mut first, mut count) = (0, 0);
    for (i, insn) in insns.iter_mut().enumerate() {
        let ends = matches!(insn.class, Class::Call | Class::CallIndirect);
        if let Some((base, disp, size, write)) = access(insn) {
            let value = tracker.values[base];
            let start = value.offset.wrapping_add(disp);
            let end = start.wrapping_add(size);
            let fits = |group: &Active| {
                group.id == value.id
                    && (group.write || !write)
                    && group.max.max(end).wrapping_sub(group.min.min(start)) <= MAX_SPAN
            };
            let found = groups[first..count].iter().position(|group| group.as_ref().is_some_and(fits));
            if let Some((slot, group)) = found.and_then(|at| Some((first + at, groups[first + at].as_mut()?))) {
                group.min = group.min.min(start);
                group.max = group.max.max(end);
                group.shared = true;
                insn.group = Some(Group { slot: slot as u8, leader: false, start: 0, span: 0 });
            } else if count < MAX_GROUPS {
                groups[count] = Some(Active {
                    id: value.id,
                    write,
                    min: start,
                    max: end,
                    leader: i,
                    leader_offset: start,
                    shared: false,
                });
                count += 1;
            }
        }
        track(&mut tracker, insn);
        if ends {
            first = count;
            tracker.forget_all();
        }
    }
    for (slot, group) in groups.iter().flatten().enumerate().filter(|(_, group)| group.shared) {
        insns[group.leader].group = Some(Group {
            slot: slot as u8,
            leader: true,
            start: (group.min - group.leader_offset) as i32,
            span: (group.max - group.min) as u16,
        });
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;

    use super::*;
    use crate::analyze::{Analyzer, Mode};

    fn groups(build: impl FnOnce(&mut CodeAssembler)) -> Vec<Option<Group>> {
        let mut asm = CodeAssembler::new(64).unwrap();
        build(&mut asm);
        let mut page = asm.assemble(0x1000).unwrap();
        page.resize(4096, 0xf4);
        let insns = Analyzer::new(false).block(&page, 0x1000, 0, Mode::default(), usize::MAX);
        insns.iter().map(|i| i.group).collect()
    }

    #[test]
    fn a_prologue_is_one_group() {
        let found = groups(|a| {
            a.push(rbp).unwrap();
            a.mov(rbp, rsp).unwrap();
            a.push(rbx).unwrap();
            a.sub(rsp, 0x18).unwrap();
            a.mov(qword_ptr(rbp - 0x20), rdi).unwrap();
            a.mov(rax, qword_ptr(rsp)).unwrap();
        });
        let leader = found[0].unwrap();
        assert!(leader.leader);
        assert_eq!((leader.start, leader.span), (-0x20 + 8 - 8, 0x28));
        for follower in [2, 4, 5] {
            assert_eq!(found[follower].map(|g| (g.slot, g.leader)), Some((leader.slot, false)));
        }
    }

    #[test]
    fn a_changed_register_ends_it() {
        let found = groups(|a| {
            a.mov(rax, qword_ptr(rbx)).unwrap();
            a.xadd(rbx, rcx).unwrap();
            a.mov(rax, qword_ptr(rbx + 8)).unwrap();
            a.mul(rdi).unwrap();
            a.mov(rcx, qword_ptr(rdx)).unwrap();
            a.cmove(rdx, rsi).unwrap();
            a.mov(rcx, qword_ptr(rdx)).unwrap();
        });
        assert!(found.iter().all(Option::is_none));
    }

    #[test]
    fn far_displacements_and_writes_after_reads_stay_out() {
        let found = groups(|a| {
            a.mov(rax, qword_ptr(rbx - 0x7fff_fff0)).unwrap();
            a.mov(rax, qword_ptr(rbx - 0x7fff_ffe8)).unwrap();
            a.mov(rax, qword_ptr(rcx)).unwrap();
            a.mov(qword_ptr(rcx + 8), rax).unwrap();
        });
        assert!(found.iter().all(Option::is_none));
    }
}
