//! The guest: an engine over RAM with page tables, IDT, GDT and TSS of ours.

use std::sync::Arc;

use cpu::Nothing;
use cpu::{CpuState, Engine, Exit, Kick, Segment, SegmentIndex, TableRegister, Vcpu, cr0, cr4, efer, rflags};
use memory::GuestRam;

use crate::layout::{BACKING, DATA, EXIT, LAYOUTS, Memory, PAGE, Right, SLOT, SLOTS, STACK};
use crate::state::{Final, Start, Stop};

// Guest-physical addresses.
const PML4: u64 = 0x1000;
const SLOTS_AT: u64 = 0x40_0000;
const EXIT_AT: u64 = 0x30_0000;
const KERNEL_AT: u64 = 0x31_0000;
/// Linear address of the kernel's pages: GDT and TSS, IDT, handlers, stack.
pub const KERNEL: u64 = 0xffff_8000_0000_0000;
const TSS: u64 = KERNEL + 0x800;
const IDT: u64 = KERNEL + PAGE;
const HANDLERS: u64 = KERNEL + 2 * PAGE;
const STACK_TOP: u64 = KERNEL + 8 * PAGE;
pub const KERNEL_PAGES: u64 = 8;

/// Guest-physical address of a backing page: not in order, and not adjacent.
const fn backing_at(page: usize) -> u64 {
    0x100_0000 + ((page as u64 * 5) % BACKING as u64) * 3 * PAGE
}

struct Tables {
    ram: GuestRam,
    next: u64,
}

impl Tables {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 2;
    const USER: u64 = 4;
    const NX: u64 = 1 << 63;

    fn entry(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.ram.read(at, &mut bytes));
        u64::from_le_bytes(bytes)
    }

    fn map(&mut self, linear: u64, gpa: u64, flags: u64) {
        let mut table = PML4;
        for shift in [39, 30, 21] {
            let at = table + ((linear >> shift) & 511) * 8;
            let entry = self.entry(at);
            table = if entry & 1 == 0 {
                self.next += PAGE;
                assert!(self.ram.write(at, &(self.next | 7).to_le_bytes()));
                self.next
            } else {
                entry & 0xf_ffff_f000
            };
        }
        assert!(self.ram.write(table + ((linear >> 12) & 511) * 8, &(gpa | flags | Self::PRESENT).to_le_bytes()));
    }
}

/// One engine with its RAM and vCPU.
pub struct Guest {
    ram: GuestRam,
    vcpu: Box<dyn Vcpu>,
    template: CpuState,
    /// Flags nobody reads are exact at faults, too.
    pub precise_flags: bool,
    pub name: String,
}

impl Guest {
    /// A guest under the engine that `make` returns.
    pub fn new(name: &str, precise_flags: bool, make: impl FnOnce(GuestRam) -> Box<dyn Engine>) -> Self {
        Self::with_ram(name, precise_flags, GuestRam::new(64 << 20).unwrap(), make)
    }

    /// The same over `ram` of 64 MiB.
    pub fn with_ram(
        name: &str,
        precise_flags: bool,
        ram: GuestRam,
        make: impl FnOnce(GuestRam) -> Box<dyn Engine>,
    ) -> Self {
        let mut tables = Tables { ram: ram.clone(), next: PML4 };
        for layout in LAYOUTS {
            for page in 0..SLOTS * SLOT / PAGE {
                // In the first layout programs can write their code.
                let flags = if layout == LAYOUTS[0] { Tables::USER | Tables::WRITE } else { Tables::USER };
                tables.map(layout.code + page * PAGE, SLOTS_AT + page * PAGE, flags);
            }
            for (area, pages) in [(layout.data, &DATA[..]), (layout.stack, &STACK[..])] {
                for (i, &(backing, right)) in pages.iter().enumerate() {
                    let flags = match right {
                        Right::Write => Tables::WRITE,
                        Right::Read => 0,
                        Right::Absent => continue,
                    };
                    tables.map(area + i as u64 * PAGE, backing_at(backing), flags | Tables::USER | Tables::NX);
                }
            }
        }
        tables.map(EXIT, EXIT_AT, Tables::USER);
        for page in 0..KERNEL_PAGES {
            tables.map(KERNEL + page * PAGE, KERNEL_AT + page * PAGE, Tables::WRITE);
        }
        assert!(tables.next < EXIT_AT);
        assert!(ram.write(EXIT_AT, &[0xf4]));
        let kernel = |linear: u64| linear - KERNEL + KERNEL_AT;
        // GDT with Linux's selectors.
        for (selector, descriptor) in [
            (0x10, 0x00af_9b00_0000_ffff_u64),
            (0x18, 0x00cf_9300_0000_ffff),
            (0x28, 0x00cf_f300_0000_ffff),
            (0x30, 0x00af_fb00_0000_ffff),
            (0x40, 0x0000_8b00_0000_0067 | (TSS & 0xff_ffff) << 16 | (TSS >> 24 & 0xff) << 56),
            (0x48, TSS >> 32),
        ] {
            assert!(ram.write(kernel(KERNEL) + selector, &descriptor.to_le_bytes()));
        }
        for offset in [4, 0x24] {
            // RSP0 and IST1
            assert!(ram.write(kernel(TSS) + offset, &STACK_TOP.to_le_bytes()));
        }
        assert!(ram.write(kernel(TSS) + 0x66, &0x68_u16.to_le_bytes()));
        for vector in 0..256_u64 {
            let handler = HANDLERS + vector * 16;
            let rights = if vector == 3 || vector == 4 { 0xee00_u64 } else { 0x8e00 };
            let low = (handler & 0xffff) | 0x10 << 16 | (1 | rights) << 32 | (handler >> 16 & 0xffff) << 48;
            assert!(ram.write(kernel(IDT) + vector * 16, &low.to_le_bytes()));
            assert!(ram.write(kernel(IDT) + vector * 16 + 8, &(handler >> 32).to_le_bytes()));
            assert!(ram.write(kernel(handler), &[0xf4]));
        }
        let engine = make(ram.clone());
        let mut vcpu = engine.create_vcpu(Nothing::setup()).unwrap();
        vcpu.attach_thread();
        let mut template = CpuState {
            cr0: cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG,
            cr3: PML4,
            cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE,
            efer: efer::SCE | efer::LME | efer::LMA | efer::NXE,
            xcr0: 7,
            gdtr: TableRegister { base: KERNEL, limit: 0x4f },
            idtr: TableRegister { base: IDT, limit: 0xfff },
            tr: Segment { base: TSS, limit: 0x67, attributes: 0x8b, selector: 0x40 },
            ldtr: Segment::default(),
            ..CpuState::default()
        };
        template.segments = [Segment { base: 0, limit: u32::MAX, attributes: 0xc0f3, selector: 0 }; 6];
        Self { ram, vcpu, template, precise_flags, name: name.into() }
    }

    /// Makes a run that is under way return, from another thread.
    pub fn stop_handle(&self) -> Arc<dyn Kick> {
        self.vcpu.stop_handle()
    }

    /// The engine's counters.
    pub fn counters(&self) -> Vec<(String, u64)> {
        self.vcpu.counters()
    }

    /// Puts code into the slots at this offset.
    pub fn write_code(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= (SLOTS * SLOT) as usize);
        assert!(self.ram.write(SLOTS_AT + offset as u64, bytes));
    }

    /// Replaces the contents of the backing pages. They never hold code.
    pub fn write_memory(&mut self, memory: &Memory) {
        for (i, page) in memory.iter().enumerate() {
            let host = self.ram.host_page(backing_at(i)).unwrap();
            // SAFETY: a whole page of RAM, and the vCPU does not run.
            unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), host, PAGE as usize) }
        }
    }

    /// Do the backing pages hold exactly this?
    pub fn memory_equals(&self, memory: &Memory) -> bool {
        memory.iter().enumerate().all(|(i, page)| {
            let host = self.ram.host_page(backing_at(i)).unwrap();
            // SAFETY: a whole page of RAM, and the vCPU does not run.
            unsafe { std::slice::from_raw_parts(host, PAGE as usize) == page }
        })
    }

    /// The contents of the backing pages.
    pub fn read_memory(&self, memory: &mut Memory) {
        for (i, page) in memory.iter_mut().enumerate() {
            assert!(self.ram.read(backing_at(i), page));
        }
    }

    /// Runs from `start` until the end or an exception.
    pub fn run(&mut self, start: &Start, user: bool) -> Final {
        let mut state = self.template.clone();
        state.gpr = start.gpr;
        state.rip = start.rip;
        state.rflags = start.rflags;
        state.fp = start.fp.clone();
        let (code, stack) = if user { (0x33, 0x2b) } else { (0x10, 0x18) };
        let level = if user { 0x60 } else { 0 };
        state.segments[SegmentIndex::Cs as usize] =
            Segment { base: 0, limit: u32::MAX, attributes: 0xa09b | level, selector: code };
        state.segments[SegmentIndex::Ss as usize] =
            Segment { base: 0, limit: u32::MAX, attributes: 0xc093 | level, selector: stack };
        state.segments[SegmentIndex::Fs as usize].base = start.fs;
        state.segments[SegmentIndex::Gs as usize].base = start.gs;
        self.vcpu.set_state(&state);
        let exit = self.vcpu.run();
        let mut state = self.vcpu.state();
        let stop = match exit {
            Exit::Stuck if state.rip.wrapping_sub(HANDLERS) < PAGE => {
                let vector = ((state.rip - HANDLERS) / 16) as u8;
                self.unwind(&mut state, vector)
            }
            Exit::Stuck if state.rip == EXIT + 1 => {
                state.rip = EXIT;
                Stop::End
            }
            Exit::Stopped => Stop::Useless("does not end"),
            other => Stop::Stranded(format!("{other:?}")),
        };
        Final::from_state(stop, &state)
    }

    /// Undoes the delivery of an exception.
    fn unwind(&self, state: &mut CpuState, vector: u8) -> Stop {
        let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
        let mut frame = [0_u8; 48];
        let at = state.gpr[4].wrapping_sub(KERNEL).wrapping_add(KERNEL_AT);
        let start = if has_error { 0 } else { 8 };
        if !self.ram.read(at, &mut frame[start..]) {
            return Stop::Stranded(format!("exception {vector} with the stack pointer at {:#x}", state.gpr[4]));
        }
        let word = |i: usize| u64::from_le_bytes(frame[8 * i..8 * i + 8].try_into().unwrap());
        state.rip = word(1);
        state.rflags = word(3);
        state.gpr[4] = word(4);
        if vector == 13 && state.rip == EXIT && state.rflags & rflags::IF != 0 && word(2) == 0x33 {
            return Stop::End; // HLT at level 3
        }
        Stop::Fault { vector, error: word(0), cr2: if vector == 14 { state.cr2 } else { 0 } }
    }
}
