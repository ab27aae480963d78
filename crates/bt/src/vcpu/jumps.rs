//! Jumps that the dispatcher links, resolves or takes back.

use std::sync::atomic::Ordering;

use cpu::Vcpu;

use super::{BtVcpu, Next};
use crate::cache::{BlockId, Slot};
use crate::world::Cause;

/// So many slots are resolved together at most.
const MAX_FAMILY: usize = 128;

/// PAUSEs until a spinning vCPU lets others have its core: some microseconds.
pub(super) const PAUSES: u32 = 128;

impl BtVcpu {
    /// Lets a slot lead to `found`, and those that are known to lead to the same page to where they led before.
    pub(super) fn resolve(&mut self, number: u32, slot: Slot, found: BlockId, global: bool) {
        let block = self.block();
        let mut cache = self.shared.cache();
        let Some(host) = cache.entry(found, slot.kind) else { return };
        cache.note_slot(found, number);
        self.tlbs.fill_slot(block, (number, slot.thunk), slot.target.base, host, self.address(slot.target), global);
        let Some(key) = cache.block(found).map(|block| block.key).filter(|key| key.tail == 0) else { return };
        for &other in cache.family(number).iter().take(MAX_FAMILY) {
            if let Some(slot) = self.shared.sites.slots.get(other)
                && block.slots[other as usize].load(Ordering::Relaxed) == slot.thunk
                && let Some(host) = cache.known(other, key.page, key.mode).and_then(|id| cache.entry(id, slot.kind))
            {
                let target = self.address(slot.target);
                self.tlbs.fill_slot(block, (other, slot.thunk), slot.target.base, host, target, global);
            }
        }
    }

    /// The guest spins: lets others have the core, who may hold what it waits for.
    pub(super) fn spinning(&mut self) -> Next {
        self.block().pauses = PAUSES;
        self.shared.world.park(&self.handle);
        std::thread::yield_now();
        self.resume();
        Next::Events
    }

    /// Links a jump that must not be changed while others may run it.
    #[cold]
    pub(super) fn link_alone(&mut self, link: u32, block: BlockId) {
        let generation = self.generation;
        self.exclusive(Cause::Link, |vcpu| {
            if vcpu.generation == generation {
                vcpu.shared.cache().link(link, block, true);
            }
        });
    }

    /// Goes back to before an indirect jump or return to an address that is not canonical, of which exit site `argument` tells: it faults
    /// at the instruction, before it moves the stack pointer (Intel SDM Vol. 2, JMP, RET).
    pub(super) fn undo_jump(&mut self, argument: u32) -> bool {
        let Some(address) = self.shared.sites.exits.get(argument).map(|site| self.address(site.place)) else {
            return false;
        };
        let mut bytes = [0; 15];
        let length = (1..=bytes.len()).rev().find(|&n| self.read_virtual(address, &mut bytes[..n])).unwrap_or(0);
        let ins = iced_x86::Decoder::with_ip(64, &bytes[..length], address, iced_x86::DecoderOptions::NONE).decode();
        let state = &mut self.block().state;
        let moved = match ins.code() {
            iced_x86::Code::Retnq => -8_i64,
            iced_x86::Code::Retnq_imm16 => -8 - i64::from(ins.immediate16()),
            _ => 0,
        };
        state.gpr[4] = state.gpr[4].wrapping_add_signed(moved);
        state.rip = address;
        true
    }

    /// On at `address`, which has no block: a breakpoint, which [`Vcpu::run`] sees, or something for the interpreter.
    pub(super) fn without_block(&mut self, address: u64) -> Next {
        if self.breakpoints.contains(&address) { Next::Run } else { self.interpret(true) }
    }
}
