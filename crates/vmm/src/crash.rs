//! The report of a guest that crashed: why, and its registers, in the form that Linux's own oops has.

use std::fmt::Write as _;

use cpu::{CpuState, Exit, SegmentIndex, gpr};

/// The report for vCPU `index`, which stopped with `exit` in `state`. `read_virtual` reads guest-virtual memory.
pub(crate) fn report(
    index: u32,
    exit: &Exit,
    state: &CpuState,
    read_virtual: &mut dyn FnMut(u64, &mut [u8]) -> bool,
) -> String {
    let mut text = match exit {
        Exit::TripleFault => format!("tightrope: the guest crashed: triple fault on vCPU {index}\n"),
        Exit::Stuck => format!(
            "tightrope: the guest can make no progress: vCPU {index} is halted with interrupts off and nothing can wake it\n"
        ),
        Exit::Internal(why) => format!("tightrope: the engine cannot run the guest further, on vCPU {index}: {why}\n"),
        Exit::Stopped | Exit::Debug => format!("tightrope: vCPU {index} was stopped\n"),
    };
    text.push_str(&registers(state));
    text.push_str(&code(state, read_virtual));
    text.push_str(&stack(state, read_virtual));
    text
}

/// Where vCPU `index` stands, in one line.
pub(crate) fn place(index: u32, state: &CpuState) -> String {
    let cs = state.segments[SegmentIndex::Cs as usize];
    format!(
        "vCPU {index}: RIP {:04x}:{:016x} RSP {:016x} CR3 {:x} [{}], CPL {}{}\n",
        cs.selector,
        state.rip,
        state.gpr[gpr::RSP],
        state.cr3,
        flags(state.rflags),
        state.cpl(),
        if state.wait_for_sipi {
            ", waits for its start"
        } else if state.halted {
            ", halted"
        } else {
            ""
        }
    )
}

/// All registers of `state`.
pub(crate) fn registers(state: &CpuState) -> String {
    let mut text = String::new();
    let segment = |index: SegmentIndex| state.segments[index as usize];
    let cs = segment(SegmentIndex::Cs);
    let g = |index: usize| state.gpr[index];
    let mode = if state.is_64bit_code() {
        "64-bit"
    } else if state.cr0 & cpu::cr0::PE == 0 {
        "real mode"
    } else if cs.big() {
        "32-bit"
    } else {
        "16-bit"
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "RIP: {:04x}:{:016x}  {mode}, CPL {}{}",
        cs.selector,
        state.rip,
        state.cpl(),
        if state.halted { ", halted" } else { "" }
    );
    let ss = segment(SegmentIndex::Ss);
    let _ = writeln!(
        text,
        "RSP: {:04x}:{:016x} EFLAGS: {:08x} [{}]",
        ss.selector,
        g(gpr::RSP),
        state.rflags,
        flags(state.rflags)
    );
    for row in [
        [("RAX", gpr::RAX), ("RBX", gpr::RBX), ("RCX", gpr::RCX)],
        [("RDX", gpr::RDX), ("RSI", gpr::RSI), ("RDI", gpr::RDI)],
        [("RBP", gpr::RBP), ("R08", gpr::R8), ("R09", gpr::R9)],
        [("R10", gpr::R10), ("R11", gpr::R11), ("R12", gpr::R12)],
        [("R13", gpr::R13), ("R14", gpr::R14), ("R15", gpr::R15)],
    ] {
        let cells: Vec<String> = row.iter().map(|&(name, index)| format!("{name}: {:016x}", g(index))).collect();
        let _ = writeln!(text, "{}", cells.join(" "));
    }
    for (name, index) in [
        ("ES", SegmentIndex::Es),
        ("CS", SegmentIndex::Cs),
        ("SS", SegmentIndex::Ss),
        ("DS", SegmentIndex::Ds),
        ("FS", SegmentIndex::Fs),
        ("GS", SegmentIndex::Gs),
    ] {
        text.push_str(&selector(name, &segment(index)));
    }
    text.push_str(&selector("LDT", &state.ldtr));
    text.push_str(&selector("TR", &state.tr));
    let _ = writeln!(
        text,
        "GDT: {:016x} limit {:04x}  IDT: {:016x} limit {:04x}",
        state.gdtr.base, state.gdtr.limit, state.idtr.base, state.idtr.limit
    );
    let _ = writeln!(text, "CR0: {:016x} CR2: {:016x} CR3: {:016x}", state.cr0, state.cr2, state.cr3);
    let _ =
        writeln!(text, "CR4: {:016x} EFER: {:016x} kernel GS: {:016x}", state.cr4, state.efer, state.kernel_gs_base);
    text
}

fn selector(name: &str, segment: &cpu::Segment) -> String {
    format!(
        "{:<4}{:04x} base {:016x} limit {:08x} attributes {:04x}\n",
        format!("{name}:"),
        segment.selector,
        segment.base,
        segment.limit,
        segment.attributes
    )
}

fn flags(rflags: u64) -> String {
    use cpu::rflags as f;
    let names: Vec<&str> = [
        (f::CF, "CF"),
        (f::PF, "PF"),
        (f::AF, "AF"),
        (f::ZF, "ZF"),
        (f::SF, "SF"),
        (f::TF, "TF"),
        (f::IF, "IF"),
        (f::DF, "DF"),
        (f::OF, "OF"),
        (f::NT, "NT"),
        (f::AC, "AC"),
    ]
    .iter()
    .filter(|(bit, _)| rflags & bit != 0)
    .map(|&(_, name)| name)
    .collect();
    names.join(" ")
}

/// The bytes around RIP, the one it points to in angle brackets.
fn code(state: &CpuState, read_virtual: &mut dyn FnMut(u64, &mut [u8]) -> bool) -> String {
    const BEFORE: u64 = 32;
    const AFTER: u64 = 16;
    let base = if state.is_64bit_code() { 0 } else { state.segments[SegmentIndex::Cs as usize].base };
    let rip = base.wrapping_add(state.rip);
    let mut text = String::from("Code:");
    for offset in 0..BEFORE + AFTER {
        let address = rip.wrapping_sub(BEFORE).wrapping_add(offset);
        let mut byte = [0];
        let shown = if read_virtual(address, &mut byte) { format!("{:02x}", byte[0]) } else { "??".to_string() };
        let _ = if address == rip { write!(text, " <{shown}>") } else { write!(text, " {shown}") };
    }
    text.push('\n');
    text
}

/// The top of the stack.
fn stack(state: &CpuState, read_virtual: &mut dyn FnMut(u64, &mut [u8]) -> bool) -> String {
    let base = if state.is_64bit_code() { 0 } else { state.segments[SegmentIndex::Ss as usize].base };
    let mut text = String::from("Stack:");
    for slot in 0..8_u64 {
        let mut word = [0; 8];
        if !read_virtual(base.wrapping_add(state.gpr[gpr::RSP]).wrapping_add(slot * 8), &mut word) {
            text.push_str(if slot == 0 { " (unmapped)" } else { "" });
            break;
        }
        let _ = write!(text, " {:016x}", u64::from_le_bytes(word));
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_shows_everything() {
        let mut state = CpuState::default();
        state.enter_long_mode(0x1000, 0x10, 0x18);
        state.rip = 0x0100_0000;
        state.rflags |= cpu::rflags::ZF | cpu::rflags::IF;
        state.gpr[gpr::R15] = 0xdead_beef;
        state.gpr[gpr::RSP] = 0x10;
        state.cr2 = 0x1234;
        let mut read = |address: u64, data: &mut [u8]| {
            data.fill(address as u8);
            (0x0100_0000..0x0100_0008).contains(&address)
        };
        let text = report(3, &Exit::TripleFault, &state, &mut read);
        for part in [
            "triple fault on vCPU 3",
            "RIP: 0010:0000000001000000  64-bit, CPL 0",
            "EFLAGS: 00000242 [ZF IF]",
            "R15: 00000000deadbeef",
            "CR2: 0000000000001234",
            "CR3: 0000000000001000",
            "?? <00> 01 02 03 04 05 06 07 ??",
            "Stack: (unmapped)",
            "CS: 0010 base 0000000000000000 limit ffffffff attributes a09b",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        state.halted = true;
        let line = place(2, &state);
        assert_eq!(line, "vCPU 2: RIP 0010:0000000001000000 RSP 0000000000000010 CR3 1000 [ZF IF], CPL 0, halted\n");
        assert!(report(0, &Exit::Internal("why".into()), &state, &mut read).contains("why"));
        assert!(report(0, &Exit::Stuck, &state, &mut read).contains("no progress"));
    }
}
