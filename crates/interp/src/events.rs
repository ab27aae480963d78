//! Delivery of exceptions and interrupts through a 64-bit IDT (SDM volume 3, 6.14), and far returns to where they came from.

use cpu::paging::is_canonical;
use cpu::{CpuState, Exception, Segment, SegmentIndex, rflags, vector};

use crate::interp::{Delivery, Interp};
use crate::mmu::is_user;

/// An exception while delivering a double fault: the CPU shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TripleFault;

/// What is being delivered: decides on privilege checks and the EXT bit of error codes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A fault or trap of the CPU, or ICEBP.
    Exception,
    /// External interrupt or NMI.
    External,
    /// INT n, INT3, INTO.
    Software,
}

/// The classes of SDM volume 3, table 6-4.
#[derive(PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
}

fn class(vector: u8) -> Class {
    match vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        _ => Class::Benign,
    }
}

/// Is the exception a fault, so that the saved RFLAGS has RF set (SDM volume 3, 17.3.1.1)?
pub(crate) fn is_fault(vector: u8) -> bool {
    !matches!(vector, vector::DB | vector::NMI | vector::BP | vector::OF | vector::DF | vector::MC)
}

impl Interp {
    /// Delivers `exception`, escalating to `#DF` as SDM volume 3, table 6-5 says.
    ///
    /// # Errors
    /// [`TripleFault`]: the guest is dead.
    pub fn deliver_exception(&mut self, state: &mut CpuState, exception: Exception) -> Result<(), TripleFault> {
        let fault = is_fault(exception.vector);
        self.deliver_first(state, exception, fault)
    }

    /// As [`Self::deliver_exception`]; `fault` decides about RF in the saved flags (an instruction breakpoint's `#DB` is a fault).
    pub(crate) fn deliver_first(
        &mut self,
        state: &mut CpuState,
        exception: Exception,
        fault: bool,
    ) -> Result<(), TripleFault> {
        let mut current = exception;
        let mut fault = fault;
        loop {
            if let Some(cr2) = current.cr2 {
                state.cr2 = cr2;
            }
            let saved = if fault { state.rflags | rflags::RF } else { state.rflags };
            self.count_exception(current.vector);
            let rip = state.rip;
            let Err(second) = self.inject(state, current.vector, current.error_code, Source::Exception, rip, saved)
            else {
                return Ok(());
            };
            current = Self::escalate(current.vector, second)?;
            fault = is_fault(current.vector);
        }
    }

    /// What becomes of `second`, raised while `first` was delivered.
    fn escalate(first: u8, second: Exception) -> Result<Exception, TripleFault> {
        if first == vector::DF {
            return Err(TripleFault);
        }
        let double = matches!(
            (class(first), class(second.vector)),
            (Class::Contributory | Class::PageFault, Class::Contributory) | (Class::PageFault, Class::PageFault)
        );
        Ok(if double { Exception { vector: vector::DF, error_code: Some(0), cr2: second.cr2 } } else { second })
    }

    /// Delivers a maskable external interrupt. The caller has checked RFLAGS.IF and the shadow. Wakes a halted vCPU.
    ///
    /// # Errors
    /// [`TripleFault`]: the guest's tables are broken beyond a double fault.
    pub fn deliver_interrupt(&mut self, state: &mut CpuState, vector: u8) -> Result<(), TripleFault> {
        state.halted = false;
        self.steal.look(&self.mmu.ram, self.model.tsc_khz, state);
        let (row, column) = (usize::from(vector / 32), usize::from(vector % 32));
        self.counters.interrupts[row][column] += 1;
        let (rip, flags) = (state.rip, state.rflags);
        match self.inject(state, vector, None, Source::External, rip, flags) {
            Ok(()) => Ok(()),
            Err(second) => self.deliver_exception(state, second),
        }
    }

    /// Delivers an NMI (vector 2) and blocks further ones until IRET. Wakes a halted vCPU.
    ///
    /// # Errors
    /// As for [`Self::deliver_interrupt`].
    pub fn deliver_nmi(&mut self, state: &mut CpuState) -> Result<(), TripleFault> {
        state.nmi_blocked = true;
        self.deliver_interrupt(state, vector::NMI)
    }

    /// One delivery through the IDT. On success the state is in the handler; on failure it is unchanged.
    pub(crate) fn inject(
        &mut self,
        state: &mut CpuState,
        vector: u8,
        error_code: Option<u32>,
        source: Source,
        return_rip: u64,
        saved_flags: u64,
    ) -> Result<(), Exception> {
        // Breakpoints look at what instructions access.
        let armed = std::mem::replace(&mut self.mmu.checks.armed, false);
        let result = self.inject_now(state, vector, error_code, source, return_rip, saved_flags);
        self.mmu.checks.armed = armed;
        result
    }

    fn inject_now(
        &mut self,
        state: &mut CpuState,
        vector: u8,
        error_code: Option<u32>,
        source: Source,
        return_rip: u64,
        saved_flags: u64,
    ) -> Result<(), Exception> {
        if let Some(observer) = &mut self.observer {
            let (external, software) = (source == Source::External, source == Source::Software);
            observer.delivery(state, &Delivery { vector, error_code, external, software });
        }
        let ext = u32::from(source != Source::Software);
        let idt_error = u32::from(vector) * 8 + 2 + ext;
        let offset = u64::from(vector) * 16;
        if offset + 15 > u64::from(state.idtr.limit) {
            return Err(Exception::gp(idt_error));
        }
        let mut gate = [0; 16];
        self.mmu.read_system(state, state.idtr.base.wrapping_add(offset), &mut gate)?;
        let gate = u128::from_le_bytes(gate);
        let attributes = (gate >> 40) as u8;
        let kind = attributes & 0x1f;
        if kind != 0x0e && kind != 0x0f {
            return Err(Exception::gp(idt_error));
        }
        let cpl = state.cpl();
        if source == Source::Software && (attributes >> 5) & 3 < cpl {
            return Err(Exception::gp(idt_error));
        }
        if attributes & 0x80 == 0 {
            return Err(Exception::with_code(vector::NP, idt_error));
        }
        let target = (gate as u64 & 0xffff) | ((gate >> 32) as u64 & 0xffff_0000) | ((gate >> 64) as u64) << 32;
        let selector = (gate >> 16) as u16;
        let ist = (gate >> 32) as u8 & 7;
        let selector_error = u32::from(selector & 0xfffc) + ext;

        if selector & 0xfffc == 0 {
            return Err(Exception::gp(ext));
        }
        let descriptor = self.read_descriptor(state, selector).map_err(|e| match e.vector {
            vector::GP => Exception::gp(selector_error),
            _ => e,
        })?;
        let code = descriptor.segment;
        if code.attributes & 0x18 != 0x18 || code.dpl() > cpl {
            return Err(Exception::gp(selector_error));
        }
        if !code.present() {
            return Err(Exception::with_code(vector::NP, selector_error));
        }
        if !code.long() || code.big() {
            return Err(Exception::gp(selector_error));
        }
        let conforming = code.attributes & 4 != 0;
        let new_cpl = if conforming { cpl } else { code.dpl() };
        let switch = new_cpl < cpl;

        let stack = if ist != 0 {
            self.tss_stack(state, 0x24 + u64::from(ist - 1) * 8, ext)?
        } else if switch {
            self.tss_stack(state, 4 + u64::from(new_cpl) * 8, ext)?
        } else {
            state.gpr[cpu::gpr::RSP]
        };
        if !is_canonical(target) {
            return Err(Exception::gp(ext));
        }
        let top = stack & !15;
        let mut frame = [0u8; 48];
        let mut words = [
            u64::from(error_code.unwrap_or(0)),
            return_rip,
            u64::from(state.segments[SegmentIndex::Cs as usize].selector),
            saved_flags,
            state.gpr[cpu::gpr::RSP],
            u64::from(state.segments[SegmentIndex::Ss as usize].selector),
        ];
        let count = if error_code.is_some() {
            6
        } else {
            words.rotate_left(1);
            5
        };
        for (bytes, word) in frame.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let new_rsp = top.wrapping_sub(count as u64 * 8);
        self.mark_accessed(state, &descriptor)?;
        self.mmu
            .write_bytes(state, new_rsp, frame.get(..count * 8).unwrap_or_default(), new_cpl == 3)
            .map_err(|e| if e.vector == vector::GP { Exception::with_code(vector::SS, ext) } else { e })?;
        if switch {
            state.segments[SegmentIndex::Ss as usize] = null_stack(new_cpl);
        }
        let cs = &mut state.segments[SegmentIndex::Cs as usize];
        *cs = code;
        cs.attributes |= 1;
        cs.selector = (selector & 0xfffc) | u16::from(new_cpl);
        state.gpr[cpu::gpr::RSP] = new_rsp;
        state.rip = target;
        let mut clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if kind == 0x0e {
            clear |= rflags::IF;
        }
        state.rflags = (state.rflags & !clear) | rflags::FIXED;
        state.interrupt_shadow = false;
        state.halted = false;
        Ok(())
    }

    /// A stack pointer out of the 64-bit TSS.
    fn tss_stack(&mut self, state: &CpuState, offset: u64, ext: u32) -> Result<u64, Exception> {
        if offset + 7 > u64::from(state.tr.limit) {
            return Err(Exception::with_code(vector::TS, u32::from(state.tr.selector & 0xfffc) + ext));
        }
        let mut bytes = [0; 8];
        self.mmu.read_system(state, state.tr.base.wrapping_add(offset), &mut bytes)?;
        let rsp = u64::from_le_bytes(bytes);
        if is_canonical(rsp) { Ok(rsp) } else { Err(Exception::with_code(vector::SS, ext)) }
    }

    /// Reads a descriptor from the GDT or LDT: 8 bytes, or 16 for a system descriptor. `#GP(selector)` beyond the limit.
    pub(crate) fn read_descriptor(&mut self, state: &CpuState, selector: u16) -> Result<Descriptor, Exception> {
        let error = Exception::gp(u32::from(selector & 0xfffc));
        let (base, limit) = if selector & 4 == 0 {
            (state.gdtr.base, u32::from(state.gdtr.limit))
        } else if state.ldtr.selector & 0xfffc == 0 || !state.ldtr.present() {
            return Err(error);
        } else {
            (state.ldtr.base, state.ldtr.limit)
        };
        let offset = u32::from(selector & 0xfff8);
        if offset + 7 > limit {
            return Err(error);
        }
        let address = base.wrapping_add(u64::from(offset));
        let mut low = [0; 8];
        self.mmu.read_system(state, address, &mut low)?;
        let low = u64::from_le_bytes(low);
        let mut segment = Segment {
            base: ((low >> 16) & 0xff_ffff) | ((low >> 32) & 0xff00_0000),
            limit: ((low & 0xffff) | ((low >> 32) & 0xf_0000)) as u32,
            attributes: ((low >> 40) & 0xf0ff) as u16,
            selector,
        };
        if segment.attributes & 0x8000 != 0 {
            segment.limit = segment.limit << 12 | 0xfff;
        }
        let mut high_valid = true;
        if segment.attributes & 0x10 == 0 {
            // A system descriptor: the base goes on in the next 8 bytes.
            if offset + 15 > limit {
                return Err(error);
            }
            let mut high = [0; 8];
            self.mmu.read_system(state, address.wrapping_add(8), &mut high)?;
            let high = u64::from_le_bytes(high);
            segment.base |= high << 32;
            high_valid = high & 0x1f00_0000_0000 == 0;
        }
        Ok(Descriptor { segment, address, high_valid })
    }

    /// Sets the accessed bit of a code or data descriptor in its table, if it is not set.
    pub(crate) fn mark_accessed(&mut self, state: &CpuState, descriptor: &Descriptor) -> Result<(), Exception> {
        if descriptor.segment.attributes & 0x11 == 0x10 {
            self.mmu.set_system_bits(state, descriptor.address.wrapping_add(5), 1)?;
        }
        Ok(())
    }

    /// Reads guest-virtual memory at the current privilege level. Crossing pages is fine; nothing is defined in `data` on failure.
    ///
    /// # Errors
    /// The exception the access raises: `#PF`, or `#GP(0)` for a non-canonical address.
    pub fn read_virtual(&mut self, state: &CpuState, address: u64, data: &mut [u8]) -> Result<(), Exception> {
        self.read_virtual_as(state, address, data, is_user(state))
    }

    /// Writes guest-virtual memory at the current privilege level, after all checks: on failure nothing is written.
    ///
    /// # Errors
    /// As for [`Self::read_virtual`].
    pub fn write_virtual(&mut self, state: &CpuState, address: u64, data: &[u8]) -> Result<(), Exception> {
        self.write_virtual_as(state, address, data, is_user(state))
    }

    /// As [`Self::read_virtual`], as user or supervisor. 1, 2, 4 and 8 bytes inside a page of RAM are read in one piece.
    ///
    /// # Errors
    /// As for [`Self::read_virtual`].
    pub fn read_virtual_as(
        &mut self,
        state: &CpuState,
        address: u64,
        data: &mut [u8],
        user: bool,
    ) -> Result<(), Exception> {
        if matches!(data.len(), 1 | 2 | 4 | 8) {
            let value = self.mmu.read(state, address, data.len(), user)?.to_le_bytes();
            data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
            return Ok(());
        }
        self.mmu.read_bytes(state, address, data, user)
    }

    /// As [`Self::write_virtual`], as user or supervisor. 1, 2, 4 and 8 bytes inside a page of RAM are written in one piece.
    ///
    /// # Errors
    /// As for [`Self::read_virtual`].
    pub fn write_virtual_as(
        &mut self,
        state: &CpuState,
        address: u64,
        data: &[u8],
        user: bool,
    ) -> Result<(), Exception> {
        if matches!(data.len(), 1 | 2 | 4 | 8) {
            let mut value = [0; 8];
            value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
            return self.mmu.write(state, address, data.len(), u64::from_le_bytes(value), user);
        }
        self.mmu.write_bytes(state, address, data, user)
    }

    /// A debugger's read: supervisor rights, no side effects; `false` where unmapped or not RAM.
    pub fn debug_read(&self, state: &CpuState, address: u64, data: &mut [u8]) -> bool {
        self.mmu.debug_read(state, address, data)
    }

    /// A debugger's write: also to read-only pages; `false` where unmapped or not RAM.
    pub fn debug_write(&self, state: &CpuState, address: u64, data: &[u8]) -> bool {
        self.mmu.debug_write(state, address, data)
    }
}

/// A descriptor as read from its table.
pub(crate) struct Descriptor {
    /// Base, limit in bytes, attributes; the selector it was read for.
    pub(crate) segment: Segment,
    /// Linear address of the descriptor.
    pub(crate) address: u64,
    /// For system descriptors: the type field of the upper half is zero, as it must be.
    pub(crate) high_valid: bool,
}

/// SS after a switch to a more privileged level in 64-bit mode: a null selector with the new CPL.
pub(crate) fn null_stack(cpl: u8) -> Segment {
    Segment { base: 0, limit: u32::MAX, attributes: 0xc093 | u16::from(cpl) << 5, selector: u16::from(cpl) }
}
