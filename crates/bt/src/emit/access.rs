//! Checked access to guest memory.
//!
//! Each check site predicts the entry of the software TLB: the one that it used last, whose host address is in the vCPU
//! block ([`crate::block::Site`]). So the address is not on the way to the delta, and the look-up costs one load. What a prediction leads to
//! is compared like any other entry, so flushes need not know of sites. A site whose predictions fail often
//! searches the entry by the address instead: its load of the prediction becomes a call.

use iced_x86::{Instruction, Register};

use super::{Access, Emitter, Flags, LinkKind, Number, Part, Target, Unsupported};
use super::{host, number, spilled};
use crate::analyze::Insn;
use crate::asm::{Asm, Mem, R9, R10, R11, RCX, RDI, RSI, RSP, Reg, cc};
use crate::block::{MAX_GROUPS, MAX_SITES, OWN_SITES, off, tlb_index};
use crate::stubs::{Check, Failed};

/// An address computed by [`Emitter::address`].
#[derive(Clone, Copy)]
pub(super) enum Address {
    /// A register and a displacement: usable again after the check.
    Simple(Reg, i32),
    /// A constant that fits a displacement.
    Small(i32),
    /// Another constant.
    Constant(u64),
    /// Must be computed into R11; the steps are repeatable.
    Computed,
    /// The same by a single LEA.
    Sum,
}

/// Length of the load of a prediction.
pub const LOAD: usize = 9;

/// Where the delta of a group is kept.
fn delta(slot: u8) -> Mem {
    Mem::base(RSP, -0x18 - 8 * i32::from(slot))
}

const _: () = assert!(0x18 + 8 * MAX_GROUPS <= 128);

/// What a check site does when its prediction fails.
struct Miss {
    /// For the stub, see [`crate::stubs::Failed`]. None: the site searches.
    site: Option<Failed>,
    access: Access,
    write: bool,
}

impl Emitter<'_> {
    /// Classifies the address of the memory operand.
    pub(super) fn address(&self, ins: &Instruction, lea: bool) -> Address {
        let segment = !lea && matches!(ins.memory_segment(), Register::FS | Register::GS);
        let base = ins.memory_base();
        let index = ins.memory_index();
        if segment {
            return Address::Computed;
        }
        if ins.is_ip_rel_memory_operand() || (base == Register::None && index == Register::None) {
            let address = ins.memory_displacement64();
            if ins.is_ip_rel_memory_operand() && self.context.base != 0 {
                return Address::Computed;
            }
            return match i32::try_from(address as i64) {
                Ok(small) => Address::Small(small),
                Err(_) => Address::Constant(address),
            };
        }
        let lent = |register: Register| register != Register::None && spilled(number(register));
        if index == Register::None && base.is_gpr64() && !lent(base) {
            return Address::Simple(host(number(base)), ins.memory_displacement64() as i32);
        }
        if lent(base) || lent(index) { Address::Computed } else { Address::Sum }
    }

    /// Computes the address of the memory operand into R11, using R10. Touches flags only for FS and GS. `code_base`: number of the block's base.
    pub(super) fn compute(asm: &mut Asm, ins: &Instruction, lea: bool, code_base: u32) {
        let base = ins.memory_base();
        let index = ins.memory_index();
        let narrow = base.is_gpr32() || index.is_gpr32() || base == Register::EIP;
        if ins.is_ip_rel_memory_operand() || (base == Register::None && index == Register::None) {
            let from = if ins.is_ip_rel_memory_operand() { code_base } else { 0 };
            move_place(asm, R11, ins.memory_displacement64(), from);
            if ins.memory_base() == Register::EIP {
                asm.mov32(R11, R11);
            }
        } else {
            let index = if index == Register::None {
                None
            } else {
                let n = number(index);
                let reg = if spilled(n) {
                    asm.load(R10, Mem::gs(off::gpr(n as usize)));
                    R10
                } else {
                    host(n)
                };
                Some((reg, ins.memory_index_scale() as u8))
            };
            let base = if base == Register::None {
                None
            } else {
                let n = number(base);
                Some(if spilled(n) {
                    asm.load(R11, Mem::gs(off::gpr(n as usize)));
                    R11
                } else {
                    host(n)
                })
            };
            let mem = Mem { base, index, disp: ins.memory_displacement64() as i32, gs: false, addr32: false };
            asm.rm(!narrow, &[0x8d], R11, mem);
        }
        if !lea {
            match ins.memory_segment() {
                Register::FS => asm.add_mem(R11, Mem::gs(off::segment_base(4))),
                Register::GS => asm.add_mem(R11, Mem::gs(off::segment_base(5))),
                _ => {}
            }
        }
    }

    /// Checks an access of `size` bytes at the address; afterwards the returned operand reaches it, R10 holds the
    /// delta and R11 may hold the address. `compute` puts the address into R11. Flags have been moved away if live.
    pub(super) fn check(
        &mut self,
        insn: &Insn,
        address: Address,
        size: u16,
        write: bool,
        compute: &dyn Fn(&mut Asm),
    ) -> Result<Mem, Unsupported> {
        if let (Some(group), Address::Simple(base, disp)) = (insn.group, address) {
            return Ok(self.check_group(insn, group, base, disp, write));
        }
        if self.context.compact
            && let Some(operand) = self.check_by_call(insn, address, size, write, compute)
        {
            return Ok(operand);
        }
        self.flags_to_block(insn.live_before);
        self.note_flags(insn);
        match address {
            Address::Small(value) => self.check_small(insn, value, size, write),
            Address::Constant(value) => Ok(self.check_constant(insn, value, size, write)),
            Address::Simple(base, disp) => {
                let compute = move |asm: &mut Asm| address_of(asm, base, disp);
                let miss = self.probe(insn, size, write, &compute);
                self.hot.load(R10, self.tlb_entry(&miss, 8));
                self.probe_miss(&miss, &compute);
                Ok(Mem::sum(base, R10, disp))
            }
            Address::Sum => {
                let miss = self.probe(insn, size, write, compute);
                compute(&mut self.hot);
                self.hot.load(R10, self.tlb_entry(&miss, 8));
                self.probe_miss(&miss, compute);
                Ok(Mem::sum(R11, R10, 0))
            }
            Address::Computed => {
                let miss = self.probe(insn, size, write, compute);
                self.hot.xor_mem(R11, self.tlb_entry(&miss, 0));
                self.hot.load(R10, self.tlb_entry(&miss, 8));
                self.probe_miss(&miss, compute);
                Ok(Mem::sum(R11, R10, 0))
            }
        }
    }

    /// Number of the software TLB for reads or writes.
    fn table(&self, write: bool) -> usize {
        usize::from(self.context.mode.user) * 2 + usize::from(write)
    }

    /// The short form: a stub looks the address up. `None`: there is none for this size.
    fn check_by_call(
        &mut self,
        insn: &Insn,
        address: Address,
        size: u16,
        write: bool,
        compute: &dyn Fn(&mut Asm),
    ) -> Option<Mem> {
        let stubs = self.context.stubs;
        stubs.check(self.table(write), size, Check::default())?;
        if matches!(address, Address::Computed) {
            // The computation may clobber them.
            self.flags_to_block(insn.live_before);
        }
        let operand = match address {
            Address::Simple(base, disp) => {
                address_of(&mut self.hot, base, disp);
                Mem::sum(base, R10, disp)
            }
            Address::Small(value) => {
                self.hot.mov_imm(R11, value as i64 as u64);
                Mem::sum(R11, R10, 0)
            }
            Address::Constant(value) => {
                self.hot.mov_imm(R11, value);
                Mem::sum(R11, R10, 0)
            }
            Address::Computed | Address::Sum => {
                compute(&mut self.hot);
                Mem::sum(R11, R10, 0)
            }
        };
        let save = self.flags_by_stub(insn.live_before);
        let keep = operand.base == Some(R11);
        let stub = stubs.check(self.table(write), size, Check { save, keep })?;
        self.call_check(insn, stub, size, write);
        self.hot.touch(R10);
        Some(operand)
    }

    /// Will the next check stub save the flags?
    fn flags_by_stub(&mut self, live: u32) -> bool {
        let save = self.flags == Flags::Host && live != 0;
        if self.flags == Flags::Host {
            self.flags = if save { Flags::Block } else { Flags::Dead };
        }
        save
    }

    /// Calls a check stub with the address in R11.
    fn call_check(&mut self, insn: &Insn, stub: usize, size: u16, write: bool) {
        let at = self.hot.call();
        self.fix(Part::Hot, at, Target::Fixed(stub));
        self.note_flags(insn);
        self.out.calls.push((self.hot.len(), self.out.accesses.len()));
        let access = self.access(insn, size, write);
        self.out.accesses.push(access);
    }

    /// Notes where the flags are from here on. An empty entry's tag is an address that is not canonical; a program that uses just that one is
    /// let through, and the access faults on the host.
    pub(super) fn note_flags(&mut self, insn: &Insn) {
        if self.out.meta.last().is_some_and(|m| m.flags_saved != (self.flags == Flags::Block)) {
            self.meta(insn, [0xff; 3]);
        }
    }

    fn access(&self, insn: &Insn, size: u16, write: bool) -> Access {
        Access {
            offset: insn.offset,
            size,
            write,
            flags_saved: self.flags == Flags::Block,
            own_faults: crate::analyze::uses_fpu(&insn.ins) || insn.ins.mnemonic() == iced_x86::Mnemonic::Cmpxchg16b,
            fpu: crate::analyze::uses_fpu(&insn.ins),
            ahead: 0,
            site: None,
        }
    }

    /// The number of the next check site.
    fn site_number(&mut self, insn: &Insn, write: bool) -> u32 {
        let base = self.context.base;
        if base != 0 && insn.ins.is_ip_rel_memory_operand() {
            let page = (insn.ins.memory_displacement64() >> 12) as u32;
            let hash = base.wrapping_mul(0x9e37_79b1).wrapping_add(page).wrapping_mul(0x85eb_ca6b) >> 16;
            return OWN_SITES as u32 + hash % (MAX_SITES - OWN_SITES) as u32;
        }
        let write = usize::from(write);
        let number = self.context.first_sites[write].wrapping_add(self.sites[write]) % OWN_SITES as u32;
        self.sites[write] += 1;
        number
    }

    /// The field at `offset` of the entry of the software TLB that a probe has led R10 to.
    fn tlb_entry(&self, miss: &Miss, offset: i32) -> Mem {
        match miss.site {
            Some(_) => Mem::base(R10, offset),
            None => Mem::gs_base(R10, off::tlb(self.context.mode.user, miss.write) + offset),
        }
    }

    /// The hot part of a check by prediction, or by search; falls through with R10 leading to the entry. The jump to the cold part is not bound
    /// yet: it leads to the cold part's present end.
    fn probe(&mut self, insn: &Insn, size: u16, write: bool, compute: &dyn Fn(&mut Asm)) -> Miss {
        let mut access = self.access(insn, size, write);
        compute(&mut self.hot);
        let mut site = None;
        if self.context.searching.contains(&searching(self.context.gpa, insn.offset, write)) {
            self.hot.tlb_offset();
            self.hot.xor_mem(R11, Mem::gs_base(R10, off::tlb(self.context.mode.user, write)));
        } else {
            let number = (self.table(write) * MAX_SITES) as u32 + self.site_number(insn, write);
            let at = self.hot.len();
            self.hot.load(R10, Mem::gs(off::site(number)));
            debug_assert_eq!(self.hot.len() - at, LOAD);
            self.hot.xor_mem(R11, Mem::base(R10, 0));
            access.site = Some((number as u16, at as u32));
            site = Some(Failed { site: number, size, group: false });
        }
        self.hot.cmp_imm(R11, 4096 - i32::from(size));
        let slow = self.hot.jcc(cc::A);
        self.fix(Part::Hot, slow, Target::Own(Part::Cold, self.cold.len()));
        Miss { site, access, write }
    }

    /// The cold part of a check: the stub tries the entry that belongs to the address, then the monitor. Comes back with the delta in R10 and
    /// the address in R11.
    fn probe_miss(&mut self, miss: &Miss, compute: &dyn Fn(&mut Asm)) {
        let back = self.hot.len();
        compute(&mut self.cold);
        match miss.site {
            Some(site) => self.failed(site, miss.access),
            None => self.ask(miss.access),
        }
        self.back(back);
    }

    /// Calls the stub for a wrong prediction: the address is in R11.
    fn failed(&mut self, site: Failed, access: Access) {
        self.cold.raw(&[0x41, 0xba]); // mov r10d, imm32
        self.cold.i32(site.pack());
        let at = self.cold.call();
        self.fix(Part::Cold, at, Target::Fixed(self.context.stubs.failed));
        self.cold.raw(&[0x0f, 0x1f, 0x80, 0, 0, 0, 0]); // nop [rax + imm32], which the stub reads
        self.out.numbers.push((self.cold.len() - 4, Number::Access(self.out.accesses.len())));
        self.out.accesses.push(access);
    }

    /// Calls the slow path for the address in R11.
    fn ask(&mut self, access: Access) {
        self.cold_number(Number::Access(self.out.accesses.len()));
        self.out.accesses.push(access);
        let at = self.cold.call();
        self.fix(Part::Cold, at, Target::Fixed(self.context.stubs.slow_access));
    }

    /// From the cold part to `position` of the hot one.
    fn back(&mut self, position: usize) {
        let at = self.cold.jmp();
        self.fix(Part::Cold, at, Target::Own(Part::Hot, position));
    }

    /// A constant address of 32 bits.
    fn check_small(&mut self, insn: &Insn, value: i32, size: u16, write: bool) -> Result<Mem, Unsupported> {
        if (value & 0xfff) > 4096 - i32::from(size) {
            return Err(Unsupported);
        }
        let entry = off::tlb(self.context.mode.user, write) + 16 * tlb_index(value as i64 as u64) as i32;
        self.hot.rm(true, &[0x81], 7, Mem::gs(entry)); // cmp qword, imm32
        self.hot.i32(value & !0xfff);
        let slow = self.hot.jcc(cc::NE);
        self.fix(Part::Hot, slow, Target::Own(Part::Cold, self.cold.len()));
        self.hot.load(R10, Mem::gs(entry + 8));
        let back = self.hot.len();
        self.cold.mov_imm(R11, value as i64 as u64);
        let access = self.access(insn, size, write);
        self.ask(access);
        self.back(back);
        Ok(Mem::base(R10, value))
    }

    /// A constant address.
    fn check_constant(&mut self, insn: &Insn, value: u64, size: u16, write: bool) -> Mem {
        let entry = off::tlb(self.context.mode.user, write) + 16 * tlb_index(value) as i32;
        self.hot.mov_imm(R11, value);
        self.hot.load(R10, Mem::gs(entry));
        self.hot.rr(true, &[0x31], R11, R10); // xor r10, r11
        self.hot.cmp_imm(R10, 4096 - i32::from(size));
        let slow = self.hot.jcc(cc::A);
        self.fix(Part::Hot, slow, Target::Own(Part::Cold, self.cold.len()));
        self.hot.load(R10, Mem::gs(entry + 8));
        let back = self.hot.len();
        let access = self.access(insn, size, write);
        self.ask(access);
        self.back(back);
        Mem::sum(R11, R10, 0)
    }

    /// An access of a group, see [`crate::groups`].
    fn check_group(&mut self, insn: &Insn, group: crate::groups::Group, base: Reg, disp: i32, write: bool) -> Mem {
        let operand = Mem::sum(base, R10, disp);
        if !group.leader {
            if self.delta_at_hand != Some(group.slot) || self.hot.touched(R10) {
                self.hot.load(R10, delta(group.slot));
                self.at_hand(group.slot);
            }
            return operand;
        }
        let first = disp.wrapping_add(group.start);
        let range = move |asm: &mut Asm| address_of(asm, base, first);
        let ahead = group.start.unsigned_abs() as u16;
        let stubs = self.context.stubs;
        if self.context.compact && stubs.check_group(self.table(write), group.span, false).is_some() {
            range(&mut self.hot);
            let save = self.flags_by_stub(insn.live_before);
            if let Some(stub) = stubs.check_group(self.table(write), group.span, save) {
                self.call_check(insn, stub, group.span, write);
            }
            if let Some(access) = self.out.accesses.last_mut() {
                access.ahead = ahead;
            }
            let crosses = self.hot.jcc(cc::B);
            self.fix(Part::Hot, crosses, Target::Own(Part::Cold, self.cold.len()));
            self.hot.store(delta(group.slot), R10);
            self.at_hand(group.slot);
            self.without_groups(insn);
            return operand;
        }
        self.flags_to_block(insn.live_before);
        self.note_flags(insn);
        let mut miss = self.probe(insn, group.span, write, &range);
        miss.access.ahead = ahead;
        self.hot.load(R10, self.tlb_entry(&miss, 8));
        let back = self.hot.len();
        self.hot.store(delta(group.slot), R10);
        self.at_hand(group.slot);
        // A wrong prediction, a miss, or a range across a page?
        range(&mut self.cold);
        let crosses = match miss.site {
            Some(site) => {
                self.failed(Failed { group: true, ..site }, miss.access);
                self.cold.jcc(cc::B)
            }
            None => {
                self.cold.mov32(R10, R11);
                self.cold.and32_imm(R10, 0xfff);
                self.cold.cmp_imm(R10, 4096 - i32::from(group.span));
                let crosses = self.cold.jcc(cc::A);
                self.ask(miss.access);
                crosses
            }
        };
        self.back(back);
        self.cold.patch32(crosses);
        self.without_groups(insn);
        operand
    }

    /// In the cold part: on at the instruction, in the translation without groups.
    fn without_groups(&mut self, insn: &Insn) {
        if self.flags == Flags::Block {
            self.cold.restore_flags(off::FLAGS, R10);
        }
        let at = self.cold.jmp();
        self.link_kind(Part::Cold, at, insn.ins.ip(), LinkKind::Plain);
    }

    /// R10 holds the delta of the group from here on, until something else is put there.
    fn at_hand(&mut self, slot: u8) {
        self.delta_at_hand = Some(slot);
        self.hot.untouch();
    }

    /// `mov reg, address` in the hot part, for an address relative to the block's base.
    pub(super) fn move_address(&mut self, reg: Reg, value: u64) {
        move_place(&mut self.hot, reg, value, self.context.base);
    }

    pub(super) fn check_operand(&mut self, insn: &Insn, size: u16, write: bool) -> Result<Mem, Unsupported> {
        let (ins, base) = (insn.ins, self.context.base);
        let address = self.address(&ins, false);
        self.check(insn, address, size, write, &move |asm| Self::compute(asm, &ins, false, base))
    }

    pub(super) fn check_stack(&mut self, insn: &Insn, disp: i32, write: bool) -> Result<Mem, Unsupported> {
        self.check(insn, Address::Simple(R9, disp), 8, write, &|_| {})
    }

    /// MOVS and STOS whose operands lie within a page each run right here; a stub does longer runs page by page; single elements across pages go
    /// to the interpreter.
    pub(super) fn string(&mut self, insn: &Insn, movs: bool, rep: bool, size: u8) {
        self.flags_to_block(insn.live_before);
        let step = self.cold_step(insn);
        // Jumps to where the operands are not in a page each.
        let mut beyond = Vec::new();
        let mut done = None;
        if rep {
            self.hot.rr(true, &[0x85], RCX, RCX); // test
            done = Some(self.hot.jcc(cc::E));
            self.hot.cmp_imm(RCX, 4096 / i32::from(size));
            beyond.push(self.hot.jcc(cc::A));
        }
        let read = self.out.accesses.len();
        if movs {
            beyond.push(self.string_operand(insn, RSI, false, rep, size));
            self.hot.store(Mem::gs(off::SCRATCH), R10);
        }
        let write = self.out.accesses.len();
        beyond.push(self.string_operand(insn, RDI, true, rep, size));
        if movs {
            self.hot.add_mem(RSI, Mem::gs(off::SCRATCH));
        }
        self.hot.rr(true, &[0x01], R10, RDI); // add rdi, r10
        let start = usize::from(insn.offset);
        if let Some(bytes) = self.context.bytes.get(start..start + insn.ins.len()) {
            self.hot.raw(bytes);
        }
        self.hot.rr(true, &[0x29], R10, RDI); // sub rdi, r10
        if movs {
            self.hot.rm(true, &[0x2b], RSI, Mem::gs(off::SCRATCH)); // sub rsi, mem
        }
        if let Some(at) = done {
            self.hot.patch32(at);
        }
        let mut elsewhere = step;
        if rep {
            elsewhere = Target::Own(Part::Cold, self.cold.len());
            for (way, target) in [(off::STRING_DONE, Target::Own(Part::Hot, self.hot.len())), (off::STRING_STEP, step)]
            {
                self.cold.raw(&[0x4c, 0x8d, 0x15, 0, 0, 0, 0]); // lea r10, [rip + disp32]
                self.fix(Part::Cold, self.cold.len() - 4, target);
                self.cold.store(Mem::gs(way), R10);
            }
            for (place, access) in [(off::STRING_READ, read), (off::STRING_WRITE, write)] {
                self.cold.store32_imm(Mem::gs(place), 0);
                self.out.numbers.push((self.cold.len() - 4, Number::Access(access)));
            }
            let stubs = &self.context.stubs.strings[usize::from(self.context.mode.user)][usize::from(movs)];
            let stub = stubs[size.trailing_zeros() as usize & 3];
            let at = self.cold.jmp();
            self.fix(Part::Cold, at, Target::Fixed(stub));
        }
        for at in beyond {
            self.fix(Part::Hot, at, elsewhere);
        }
    }

    /// Checks the operand at `pointer`; R10 holds its delta afterwards. Returns the jump to be taken where it goes beyond its page.
    fn string_operand(&mut self, insn: &Insn, pointer: Reg, write: bool, rep: bool, size: u8) -> usize {
        let table = off::tlb(self.context.mode.user, write);
        self.hot.mov(R11, pointer);
        self.hot.tlb_offset();
        self.hot.xor_mem(R11, Mem::gs_base(R10, table));
        self.hot.cmp_imm(R11, 4095);
        let slow = self.hot.jcc(cc::A);
        self.fix(Part::Hot, slow, Target::Own(Part::Cold, self.cold.len()));
        self.hot.load(R10, Mem::gs_base(R10, table + 8));
        let back = self.hot.len();
        // Does it end in the page?
        if rep {
            self.hot.lea(R11, Mem { base: Some(R11), index: Some((RCX, size)), disp: 0, gs: false, addr32: false });
            self.hot.cmp_imm(R11, 4096);
        } else {
            self.hot.cmp_imm(R11, 4096 - i32::from(size));
        }
        let beyond = self.hot.jcc(cc::A);
        self.cold.mov(R11, pointer);
        // Where the first element does not fit into the page, the interpreter judges what comes first.
        let access = self.access(insn, u16::from(size), write);
        self.ask(access);
        self.cold.and32_imm(R11, 0xfff);
        self.back(back);
        beyond
    }
}

/// What [`super::Context::searching`] holds of an access: of the instruction at `offset` in the page at guest-physical address `gpa`.
pub fn searching(gpa: u64, offset: u16, write: bool) -> u64 {
    (gpa + u64::from(offset)) << 1 | u64::from(write)
}

/// `mov reg, address`, where the address is relative to the base of number `base`. Leaves the flags.
fn move_place(asm: &mut Asm, reg: Reg, address: u64, base: u32) {
    if base == 0 {
        asm.mov_imm(reg, address);
        return;
    }
    asm.load(reg, Mem::gs(off::base(base)));
    let distance = address as i64;
    // A displacement that counts from the end of an instruction reaches further than one that counts from the page's start.
    let first = distance.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
    asm.lea(reg, Mem::base(reg, first));
    if distance != i64::from(first) {
        asm.lea(reg, Mem::base(reg, (distance - i64::from(first)) as i32));
    }
}

/// The address `[base + disp]` into R11.
fn address_of(asm: &mut Asm, base: Reg, disp: i32) {
    if disp == 0 {
        asm.mov(R11, base);
    } else {
        asm.lea(R11, Mem::base(base, disp));
    }
}
