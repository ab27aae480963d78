//! What a program's process has mapped, kept in step with the guest's page tables like a TLB: entries are made when they are needed, and
//! looked at again when the guest flushes.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use cpu::paging::{self, Access, Kind, PagingContext};
use memory::GuestRam;
use runner::guard::Telling;
use runner::{Change, Rights, WATCHED, scan};

use super::scans;
use super::tables::{PAGES, Page, REGION, Region};
use crate::tlb::{WROTE_BITS, wrote_bit};

/// Pages around a fault that are mapped with it, if they may be.
const AROUND: usize = 16;
/// Turns of writing and executing after which a page may be both: compilers put code beside data, and beside code that runs. What is written from then on
/// is looked at when the guest flushes the page, or the translator comes by.
const MIXED: u8 = 3;
/// Pages whose turns are counted.
const MAX_MIXED: usize = 1 << 14;
/// More mappings than this are too many for one process of the host, which may have 65,530: all are forgotten.
const MAX_MAPPINGS: usize = 30_000;
/// Bytes of the longest instruction.
const LONGEST: u64 = 15;

/// A page's entry: its number in guest-physical memory and its rights; 0: none.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const NONE: Self = Self(0);

    fn new(gpa: u64, rights: Rights) -> Self {
        Self((gpa & !0xfff) | (rights as u64 + 1))
    }

    fn gpa(self) -> u64 {
        self.0 & !0xfff
    }

    fn rights(self) -> Option<Rights> {
        [Rights::Read, Rights::Write, Rights::Execute, Rights::All]
            .into_iter()
            .find(|&rights| rights as u64 + 1 == self.0 & 0xfff)
    }
}

/// How a fault is to be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The page is mapped, once the changes are made.
    Mapped,
    /// The page must not be executed: it holds instructions that would tell of the host.
    Tells,
    /// It is the guest's own: somebody precise must do the instruction.
    Guests,
}

/// What a process has of a region.
struct Pages {
    entries: [Entry; PAGES],
    /// The size in bytes of the largest page that one of them was part of when it was mapped. INVLPG is for all of such a page, whatever the
    /// guest's tables say by then.
    size: u64,
}

/// The pages that a process has, or will have when [`Space::take_changes`] has been carried out.
#[derive(Default)]
pub struct Space {
    regions: BTreeMap<u64, Box<Pages>>,
    /// Was any of them part of a page larger than a region?
    huge: bool,
    /// Was any of them global?
    global: bool,
    changes: Vec<Change>,
    mappings: usize,
    /// Executable pages with instructions that would tell of the host, the last one at the end: the process stops there.
    watched: Vec<(u64, Rc<Telling>)>,
    watched_changed: bool,
    /// How often pages that may be written and executed have gone from one to the other, by guest-physical address.
    mixed: HashMap<u64, u8>,
    /// Writable pages by a hash of their guest-physical address: a bit each.
    wrote: Vec<u64>,
}

/// Guest memory as a space looks at it.
pub struct View<'a> {
    pub ram: &'a GuestRam,
    pub context: PagingContext,
}

impl View<'_> {
    /// What the program gets of a page, if it reads or writes it, or if it executes it; `mixed`: it does both by turns.
    fn rights(&self, page: Page, address: u64, fetch: bool, mixed: bool) -> Option<Rights> {
        if mixed && self.keeps(page, Rights::All) {
            return Some(Rights::All);
        }
        if fetch {
            return page.executable.then_some(Rights::Execute);
        }
        Some(if self.keeps(page, Rights::Write) {
            Rights::Write
        } else if page.executable && !page.writable && self.telling(page, address).stops.is_empty() {
            Rights::Execute
        } else {
            Rights::Read
        })
    }

    /// Instructions on the page that would tell of the host.
    fn telling(&self, page: Page, address: u64) -> Rc<Telling> {
        let mut bytes = [0; scan::BEFORE + 4096 + scan::BEYOND];
        let (before, rest) = bytes.split_at_mut(scan::BEFORE);
        let (own, after) = rest.split_at_mut(4096);
        let has_before = self.read((address & !0xfff).wrapping_sub(scan::BEFORE as u64), before);
        let has_after = self.read((address & !0xfff).wrapping_add(4096), after);
        // Without RAM there is nothing that tells, and nothing to be mapped.
        let _ = self.ram.read(page.gpa & !0xfff, own);
        let telling = scans::find(page.gpa >> 12, &bytes, has_before, has_after, page.writable && page.dirty);
        let entered_from = |distance: i64| {
            let mut other = [0; 4096];
            self.read((address & !0xfff).wrapping_add_signed(distance), &mut other)
                && telling.is_entered_from(&other, distance)
        };
        if telling.guards() && (entered_from(-4096) || entered_from(4096)) {
            return Rc::new(telling.unguarded());
        }
        telling
    }

    /// Reads what the program could execute, within a page.
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        paging::probe(self.ram, &self.context, address, Access::new(Kind::Fetch, true))
            .is_ok_and(|mapping| self.ram.read(mapping.gpa, bytes))
    }

    /// May the page still have these rights?
    fn keeps(&self, page: Page, rights: Rights) -> bool {
        match rights {
            Rights::Read => true,
            Rights::Write => page.writable && page.dirty && !self.ram.code_pages().test(page.gpa >> 12),
            Rights::Execute => page.executable,
            Rights::All => page.executable && self.keeps(page, Rights::Write),
        }
    }
}

impl Space {
    /// Forgets everything; the process is to be cleared.
    pub fn clear(&mut self) {
        self.regions.clear();
        self.huge = false;
        self.global = false;
        self.changes.clear();
        self.wrote.clear();
        self.mixed.clear();
        self.mappings = 0;
        self.watched_changed |= !self.watched.is_empty();
        self.watched.clear();
    }

    /// Where the process must stop, if that has changed.
    pub fn take_watched(&mut self) -> Option<Vec<u64>> {
        std::mem::take(&mut self.watched_changed)
            .then(|| self.watched.iter().flat_map(|(page, telling)| stops(*page, telling)).collect())
    }

    /// Does the program stop at `rip` in place of others on the page? It must not go on by itself before it is elsewhere.
    pub fn is_guard(&self, rip: u64) -> bool {
        self.guarding(rip).is_some_and(|(page, telling)| stops(*page, telling).any(|at| at == rip))
    }

    /// Must the program not go on by itself at `rip`, as it has passed a stop?
    #[inline]
    pub fn is_inside(&self, rip: u64) -> bool {
        self.guarding(rip).is_some_and(|(_, telling)| telling.inside(rip & 0xfff))
    }

    fn guarding(&self, rip: u64) -> Option<&(u64, Rc<Telling>)> {
        self.watched.iter().find(|(page, telling)| *page == rip & !0xfff && telling.guards())
    }

    /// Makes room for the page's instructions among those watched, by taking other pages away. Returns whether there can be any.
    fn watch(&mut self, page: u64, telling: Rc<Telling>) -> bool {
        if telling.stops.len() > WATCHED {
            return false;
        }
        self.watched.retain(|(other, _)| *other != page);
        while self.watched.iter().map(|(_, other)| other.stops.len()).sum::<usize>() + telling.stops.len() > WATCHED {
            let (other, _) = self.watched.remove(0);
            if let Some(pages) = self.regions.get_mut(&(other & !(REGION - 1))) {
                let entry = &mut pages.entries[(other >> 12) as usize % PAGES];
                if std::mem::replace(entry, Entry::NONE) != Entry::NONE {
                    self.unmap(other);
                }
            }
        }
        self.watched.push((page, telling));
        self.watched_changed = true;
        true
    }

    /// May it have pages that the guest has mapped globally, for all address spaces?
    pub fn has_global(&self) -> bool {
        self.global
    }

    /// Is there so much that it should be cleared?
    pub fn is_full(&self) -> bool {
        self.mappings > MAX_MAPPINGS
    }

    /// What must be done in the process for it to be as this says.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// The program reached for `address` in vain, at the instruction at `rip`; `fetch`: it seems to execute there.
    pub fn fault(&mut self, view: &View<'_>, address: u64, rip: u64, fetch: bool) -> Answer {
        let region = Region::new(view.ram, &view.context, address);
        let index = (address >> 12) as usize % PAGES;
        let Some(page) = region.page(index) else { return Answer::Guests };
        let often = self.mixed.get(&page.gpa).is_some_and(|&turns| turns >= MIXED);
        let telling = (often || fetch && page.executable).then(|| view.telling(page, address));
        let mixed = often && telling.as_ref().is_some_and(|telling| telling.stops.len() <= WATCHED);
        let Some(rights) = view.rights(page, address, fetch, mixed) else { return Answer::Guests };
        if view.ram.offset_in_file(page.gpa).is_none() {
            return Answer::Guests;
        }
        if executes(rights)
            && (fetch || mixed)
            && let Some(telling) = telling
        {
            // It must not begin where a stop has been passed already.
            let refused = fetch && telling.inside(address & 0xfff);
            if refused || !telling.stops.is_empty() && !self.watch(address & !0xfff, telling) {
                return Answer::Tells;
            }
        }
        let first = address & !(REGION - 1);
        let none = || Box::new(Pages { entries: [Entry::NONE; PAGES], size: 4096 });
        let Pages { entries, size } = &mut **self.regions.entry(first).or_insert_with(none);
        let before = entries[index].rights();
        if fetch && before == Some(Rights::Execute) && rights == Rights::Execute
            || !fetch && before.is_some() && !writes(rights)
        {
            // It had what it can have: reading is allowed everywhere, so it writes.
            return Answer::Guests;
        }
        let of_instruction = [rip, rip.wrapping_add(LONGEST - 1)].iter().any(|at| at & !0xfff == address & !0xfff);
        if !fetch && before == Some(Rights::Execute) && rights == Rights::Write && of_instruction {
            // The instruction writes a page that it is on itself, which the process cannot both execute and write. Once written, it is to be looked at again.
            entries[index] = Entry::NONE;
            self.unmap(address & !0xfff);
            turn(&mut self.mixed, page.gpa);
            return Answer::Guests;
        }
        if before == Some(rights) {
            return Answer::Guests;
        }
        if matches!((before, rights), (Some(Rights::Write), Rights::Execute) | (Some(Rights::Execute), Rights::Write)) {
            turn(&mut self.mixed, page.gpa);
        }
        *size = region.page_size().max(*size);
        self.huge |= *size > REGION;
        let around = if region.is_large() { PAGES } else { AROUND };
        let start = index & !(around - 1);
        for (at, entry) in entries.iter_mut().enumerate().skip(start).take(around) {
            let address = first + at as u64 * 4096;
            let (page, rights) = if at == index {
                (page, rights)
            } else if *entry != Entry::NONE {
                continue;
            } else {
                let Some(page) = region.page(at) else { continue };
                let Some(rights) = view.rights(page, address, fetch, false) else { continue };
                // Code that must be watched waits until it is needed.
                if fetch && !view.telling(page, address).stops.is_empty() {
                    continue;
                }
                (page, rights)
            };
            let Some(offset) = view.ram.offset_in_file(page.gpa) else { continue };
            *entry = Entry::new(page.gpa, rights);
            self.global |= page.global;
            if writes(rights) {
                note(&mut self.wrote, page.gpa);
            }
            if let Some(Change::Map { address: a, offset: o, length, rights: r }) = self.changes.last_mut()
                && (*a + *length, *o + *length, *r) == (address, offset, rights)
            {
                *length += 4096;
                continue;
            }
            self.mappings += 1;
            self.changes.push(Change::Map { address, offset, length: 4096, rights });
        }
        Answer::Mapped
    }

    /// The guest has flushed: takes away what is no longer right.
    pub fn look_again(&mut self, view: &View<'_>) {
        let mut regions = std::mem::take(&mut self.regions);
        regions.retain(|&first, pages| self.check_all(view, first, pages));
        self.regions = regions;
    }

    /// The same for the page of `address`, however large it was.
    pub fn look_at(&mut self, view: &View<'_>, address: u64) {
        const HUGE: u64 = 1 << 30;
        let first = address & !(HUGE - 1);
        if self.huge && self.regions.range(first..first + HUGE).any(|(_, pages)| pages.size > REGION) {
            self.look_again(view);
            return;
        }
        let first = address & !(REGION - 1);
        let Some(mut pages) = self.regions.remove(&first) else { return };
        let region = Region::new(view.ram, &view.context, address);
        let any = if region.is_large() || pages.size > 4096 {
            self.check_all(view, first, &mut pages)
        } else {
            let index = (address >> 12) as usize % PAGES;
            if pages.entries[index] != Entry::NONE {
                self.check(view, &region, first, index, &mut pages.entries[index]);
            }
            true
        };
        if any {
            self.regions.insert(first, pages);
        }
    }

    /// Takes away what is no longer right of a region. Returns whether anything is left.
    fn check_all(&mut self, view: &View<'_>, first: u64, pages: &mut Pages) -> bool {
        let region = Region::new(view.ram, &view.context, first);
        let mut any = false;
        for index in 0..PAGES {
            if pages.entries[index] != Entry::NONE {
                any |= self.check(view, &region, first, index, &mut pages.entries[index]);
            }
        }
        any
    }

    /// Takes an entry away if it is no longer right. Returns whether it is still there.
    fn check(&mut self, view: &View<'_>, region: &Region<'_>, first: u64, index: usize, entry: &mut Entry) -> bool {
        let good = entry.rights().is_some_and(|rights| {
            region.page(index).is_some_and(|page| {
                page.gpa == entry.gpa()
                    && view.keeps(page, rights)
                    // What has not been written is as it was.
                    && (!executes(rights) || !page.dirty || self.still_tells(view, page, first + index as u64 * 4096))
            })
        });
        if !good {
            *entry = Entry::NONE;
            self.unmap(first + index as u64 * 4096);
        }
        good
    }

    /// Does an executable page have no other instructions that would tell of the host than when it was mapped?
    fn still_tells(&self, view: &View<'_>, page: Page, at: u64) -> bool {
        let telling = view.telling(page, at);
        telling.stops.is_empty() || self.watched.iter().any(|(other, watched)| *other == at && *watched == telling)
    }

    fn unmap(&mut self, address: u64) {
        if let Some(Change::Unmap { address: a, length }) = self.changes.last_mut()
            && *a + *length == address
        {
            *length += 4096;
            return;
        }
        self.mappings += 1;
        self.changes.push(Change::Unmap { address, length: 4096 });
    }

    /// The page holds translated code now: the program must not write it.
    pub fn protect(&mut self, gpa: u64) {
        if !noted(&self.wrote, gpa) {
            return;
        }
        let written = [Entry::new(gpa, Rights::Write), Entry::new(gpa, Rights::All)];
        let mut regions = std::mem::take(&mut self.regions);
        for (&first, pages) in &mut regions {
            for (index, entry) in pages.entries.iter_mut().enumerate().filter(|(_, entry)| written.contains(entry)) {
                *entry = Entry::NONE;
                self.unmap(first + index as u64 * 4096);
            }
        }
        self.regions = regions;
    }
}

/// A page that may be written and executed goes from one to the other.
fn turn(mixed: &mut HashMap<u64, u8>, gpa: u64) {
    if mixed.len() >= MAX_MIXED {
        mixed.clear();
    }
    let turns = mixed.entry(gpa).or_default();
    *turns = turns.saturating_add(1);
}

fn executes(rights: Rights) -> bool {
    matches!(rights, Rights::Execute | Rights::All)
}

fn writes(rights: Rights) -> bool {
    matches!(rights, Rights::Write | Rights::All)
}

/// The addresses to stop at on `page`.
fn stops(page: u64, telling: &Telling) -> impl Iterator<Item = u64> {
    telling.stops.iter().map(move |&offset| page.wrapping_add_signed(offset))
}

fn note(bits: &mut Vec<u64>, gpa: u64) {
    bits.resize(WROTE_BITS / 64, 0);
    let (word, bit) = wrote_bit(gpa);
    bits[word] |= bit;
}

fn noted(bits: &[u64], gpa: u64) -> bool {
    let (word, bit) = wrote_bit(gpa);
    bits.get(word).is_some_and(|word| word & bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpu::paging::pte;
    use cpu::{cr0, efer};

    /// A large page is flushed as a whole by INVLPG at one address of it, also when the guest's tables have something else there by then.
    #[test]
    fn large_pages_are_flushed_as_a_whole() {
        const ALL: u64 = pte::P | pte::U | pte::W | pte::A | pte::D;
        const AT: u64 = 0x4020_0000;
        let ram = GuestRam::shareable(32 << 20).unwrap();
        let put = |gpa: u64, entry: u64| assert!(ram.write(gpa, &entry.to_le_bytes()));
        let context = PagingContext { cr0: cr0::PG, cr3: 0x1000, cr4: 0, efer: efer::LMA | efer::NXE };
        let view = View { ram: &ram, context };
        // The address of the large page's entry, the entry, and what comes after it.
        for (place, large) in [(0x3008, 0x60_0000), (0x2008, 0)] {
            for after in [0, 0x4000 | ALL, 0x80_0000 | ALL | pte::PS] {
                put(0x1000, 0x2000 | ALL);
                put(0x2008, 0x3000 | ALL);
                put(place, large | ALL | pte::PS);
                // The page that is flushed is still right then, if there is a table.
                put(0x4000 + 3 * 8, (large + 0x3000) | ALL);
                let mut space = Space::default();
                assert_eq!(space.fault(&view, AT + 0x5000, 0, false), Answer::Mapped);
                assert!(matches!(space.take_changes()[..], [Change::Map { address: AT, length: REGION, .. }]));
                put(0x2008, 0x3000 | ALL);
                put(0x3008, after);
                space.look_at(&view, AT + 0x3000);
                let mut gone = [false; PAGES];
                for change in space.take_changes() {
                    let Change::Unmap { address, length } = change else { panic!("{change:?}") };
                    let first = (address - AT) as usize / 4096;
                    gone[first..first + length as usize / 4096].fill(true);
                }
                let left = gone.iter().filter(|gone| !**gone).count();
                assert!(left <= 1 && gone[5], "{place:x}, {after:x}: {left} pages are left");
            }
        }
    }
}
