//! A program: instructions with symbolic jump targets, any of which may be dropped.

use iced_x86::{Encoder, Instruction};

use crate::layout::{EXIT, LAYOUTS, Layout};

/// One instruction.
#[derive(Clone)]
pub struct Item {
    pub ins: Instruction,
    /// Prefix bytes put before the encoding, redundant or not.
    pub prefixes: Vec<u8>,
    /// The item that a branch or an address in the code leads to; the number of items means the end of the program.
    pub target: Option<usize>,
    /// Added to the target's address.
    pub addend: u64,
    /// How often it surely runs if nothing faults.
    pub weight: u32,
    pub alive: bool,
}

impl Item {
    pub fn new(ins: Instruction) -> Self {
        Self { ins, prefixes: Vec::new(), target: None, addend: 0, weight: 1, alive: true }
    }

    pub fn to(ins: Instruction, target: usize) -> Self {
        Self { target: Some(target), ..Self::new(ins) }
    }
}

/// A list of instructions that ends by a jump to [`EXIT`].
#[derive(Clone, Default)]
pub struct Program {
    pub items: Vec<Item>,
    /// No branches: a fault's place tells how much ran.
    pub straight: bool,
}

/// A program at its place.
pub struct Placed {
    pub bytes: Vec<u8>,
    /// Offset of each item, and of the end.
    pub offsets: Vec<usize>,
}

impl Program {
    /// Encodes the program for linear address `at`. `None` if something cannot be encoded.
    pub fn place(&self, layout: Layout, at: u64, encoder: &mut Encoder) -> Option<Placed> {
        let mut offsets: Vec<usize> = vec![0; self.items.len() + 1];
        let mut bytes = Vec::with_capacity(self.items.len() * 8);
        for pass in 0..6 {
            bytes.clear();
            let mut moved = false;
            for (i, item) in self.items.iter().enumerate() {
                moved |= offsets[i] != bytes.len();
                offsets[i] = bytes.len();
                if !item.alive {
                    continue;
                }
                bytes.extend_from_slice(&item.prefixes);
                let mut ins = item.ins;
                let ip = at + bytes.len() as u64;
                if let Some(target) = item.target {
                    // In the first passes distances are not known yet.
                    let address = if pass == 0 { ip } else { at + offsets[target] as u64 + item.addend };
                    if ins.is_ip_rel_memory_operand() {
                        ins.set_memory_displacement64(address);
                    } else {
                        ins.set_near_branch64(address);
                    }
                } else if ins.is_ip_rel_memory_operand() {
                    let narrow = ins.memory_base() == iced_x86::Register::EIP;
                    if narrow {
                        ins.set_memory_displacement64(u64::from(ins.memory_displacement64() as u32));
                    }
                }
                encoder.set_buffer(std::mem::take(&mut bytes));
                let result = encoder.encode(&ins, ip);
                bytes = encoder.take_buffer();
                result.ok()?;
            }
            let end = self.items.len();
            moved |= offsets[end] != bytes.len();
            offsets[end] = bytes.len();
            if pass > 0 && !moved {
                let here = at + bytes.len() as u64;
                if layout == LAYOUTS[0] {
                    bytes.extend_from_slice(&[0xff, 0x25, 0, 0, 0, 0]); // jmp [rip]
                    bytes.extend_from_slice(&EXIT.to_le_bytes());
                } else {
                    bytes.push(0xe9);
                    bytes.extend_from_slice(&(EXIT.wrapping_sub(here + 5) as i32).to_le_bytes());
                }
                return Some(Placed { bytes, offsets });
            }
        }
        None
    }

    /// How many instructions surely ran, when the program stopped at `offset` (or at its end).
    pub fn executed(&self, placed: &Placed, stopped_at: Option<usize>) -> u64 {
        match stopped_at {
            None => self.items.iter().filter(|i| i.alive).map(|i| u64::from(i.weight)).sum(),
            Some(offset) if self.straight => {
                self.items.iter().zip(&placed.offsets).filter(|(i, o)| i.alive && **o <= offset).count() as u64
            }
            Some(_) => 1,
        }
    }
}
