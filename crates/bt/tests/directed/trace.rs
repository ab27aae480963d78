//! `--trace int,blocks,tlb`: every event of a small guest leaves its line, in the form that `docs/debugging-a-guest.md` gives.

use std::io::Write;
use std::sync::{Arc, Mutex};

use bt::{BtEngine, Options, Trace};
use cpu::cpuid::CpuidModel;
use cpu::{cr4, vector};
use iced_x86::code_asm::*;
use memory::GuestRam;

use crate::guest::{
    CODE, DATA, GLOBAL, Guest, Kind, PRESENT, RAISE, STACK, STOP, USER, USER_CODE, USER_DATA, USER_STACK, WRITE,
};

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn take(&self) -> Vec<String> {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap());
        String::from_utf8(bytes).unwrap().lines().map(str::to_string).collect()
    }
}

/// A guest whose trace goes to the lines.
fn traced(choose: impl FnOnce(&mut Trace)) -> (Guest, Lines) {
    let lines = Lines::default();
    let mut trace = Trace::new(Arc::new(Mutex::new(lines.clone())));
    choose(&mut trace);
    let ram = GuestRam::new(64 << 20).unwrap();
    let mut options = Options::new(Arc::new(CpuidModel::new(1, 1_000_000)));
    options.code_cache = 16 << 20;
    options.trace = Some(trace);
    let engine = BtEngine::new(ram.clone(), options).unwrap();
    let guest = Guest::with_engine(Kind::Bt, ram, &engine);
    lines.take();
    (guest, lines)
}

/// Does a line have the form? `H` stands for a hexadecimal number with `0x`, `N` for a decimal one, other words for themselves.
fn has_form(line: &str, form: &str) -> bool {
    let decimal = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    let hexadecimal = |word: &str| {
        let digits = word.strip_prefix("0x").unwrap_or_default();
        !digits.is_empty() && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let (words, forms): (Vec<&str>, Vec<&str>) = (line.split(' ').collect(), form.split(' ').collect());
    words.len() == forms.len()
        && words.iter().zip(forms).all(|(word, form)| match form {
            "H" => hexadecimal(word),
            "N" => decimal(word),
            "N+N" => word.split_once('+').is_some_and(|(a, b)| decimal(a) && decimal(b)),
            _ => *word == form,
        })
}

/// The forms of the documentation.
fn known(line: &str) -> bool {
    let mut forms = Vec::new();
    for kind in ["external", "software"] {
        forms.push(format!("int cpu0 vector H {kind} rip H cpl N rsp H"));
    }
    for name in ["#DE", "#BP", "#UD"] {
        forms.push(format!("int cpu0 vector H {name} rip H cpl N rsp H"));
    }
    forms.push("int cpu0 vector H #GP code H rip H cpl N rsp H".into());
    forms.push("int cpu0 vector H #PF code H cr2 H rip H cpl N rsp H".into());
    for mode in ["user", "kernel"] {
        forms.push(format!("block translate H gpa H {mode} insns N bytes N host N+N"));
        forms.push(format!("block drop gpa H {mode}"));
        for kind in ["read", "write", "fetch"] {
            forms.push(format!("tlb cpu0 fill {kind} {mode} H gpa H size H"));
            forms.push(format!("tlb cpu0 fill {kind} {mode} H gpa H size H global"));
        }
    }
    for flush in ["block flush all", "tlb cpu0 flush all", "tlb cpu0 flush non-global", "tlb cpu0 flush page H"] {
        forms.push(flush.into());
    }
    forms.extend(["tlb cpu0 switch H to H", "tlb cpu0 switch H to H kept"].map(String::from));
    forms.iter().any(|form| has_form(line, form))
}

/// These lines are there in this order, and all lines have a known form.
fn expect(lines: &[String], wanted: &[String]) {
    for line in lines {
        assert!(known(line), "of no known form: {line}");
    }
    let mut rest = lines.iter();
    for line in wanted {
        assert!(rest.any(|other| other == line), "missing, or not in order: {line}\nin\n{}", lines.join("\n"));
    }
}

#[test]
fn interrupts() {
    let (mut guest, lines) = traced(|trace| trace.interrupts = true);
    // Handlers that go on; those of faults skip the instruction, which is RDX bytes long.
    guest.code(CODE + 0x1000, |a| a.iretq());
    guest.code(CODE + 0x1100, |a| {
        a.add(qword_ptr(rsp), rdx)?;
        a.iretq()
    });
    guest.code(CODE + 0x1200, |a| {
        a.add(qword_ptr(rsp + 8), rdx)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    for (vector, handler) in [(0x80, 0x1000), (3, 0x1000), (0x41, 0x1000), (0, 0x1100), (14, 0x1200), (13, 0x1200)] {
        guest.gate(vector, CODE + handler, if vector == 3 || vector == 0x80 { 0xee } else { 0x8e });
    }
    guest.map(DATA + 0x3000, 0);
    let mut at = Vec::new();
    let mut code = CODE;
    let steps: [fn(&mut CodeAssembler) -> crate::guest::Built; 7] = [
        |a| a.int(0x80),
        |a| a.int3(),
        |a| {
            a.xor(ecx, ecx)?;
            a.mov(edx, 2)
        },
        |a| a.div(ecx),
        |a| a.mov(edx, 8),
        |a| a.mov(rcx, qword_ptr(DATA as u32 as i32 + 0x3008)),
        |a| {
            a.mov(eax, 0x41)?;
            a.out(RAISE, al)?;
            a.sti()?;
            a.nop()
        },
    ];
    for step in steps {
        at.push(code);
        code = guest.code(code, step);
    }
    guest.code(code, |a| {
        a.cli()?;
        a.out(STOP, al)?;
        a.nop()
    });
    guest.stop();
    let kernel = |vector: u8, what: &str, rip: u64| {
        format!("int cpu0 vector {vector:#04x} {what} rip {rip:#x} cpl 0 rsp {STACK:#x}")
    };
    let seen = lines.take();
    // The interrupt comes behind the NOP after STI.
    let wanted = [
        kernel(0x80, "software", at[0]),
        kernel(3, "software", at[1]),
        kernel(0, "#DE", at[3]),
        kernel(14, "#PF code 0x0 cr2 0x403008", at[5]),
        kernel(0x41, "external", code),
    ];
    expect(&seen, &wanted);
    assert_eq!(seen.len(), wanted.len(), "{seen:#?}");

    // A program's fault: its stack, and the user bit.
    guest.code(USER_CODE, |a| a.mov(byte_ptr(DATA as u32 as i32), al));
    guest.enter_user(USER_CODE);
    guest.gate(vector::PF, CODE + 0x1f00, 0x8e);
    guest.code(CODE + 0x1f00, |a| a.out(STOP, al));
    guest.stop();
    let fault = format!("int cpu0 vector 0x0e #PF code 0x7 cr2 0x400000 rip {USER_CODE:#x} cpl 3 rsp {USER_STACK:#x}");
    assert_eq!(lines.take(), [fault]);
}

#[test]
fn blocks() {
    let (mut guest, lines) = traced(|trace| trace.blocks = true);
    let end = guest.code(CODE, |a| {
        a.mov(eax, 1)?;
        a.add(eax, eax)?;
        a.out(STOP, al)
    });
    guest.code(end, |a| {
        a.mov(byte_ptr(CODE as u32 as i32 + 1), 7)?;
        a.jmp(CODE)
    });
    guest.stop();
    let first = lines.take();
    // OUT, of two bytes, is the interpreter's, but is of the block.
    let head = format!("block translate {CODE:#x} gpa {CODE:#x} kernel insns ");
    assert!(known(&first[0]) && first[0].starts_with(&head), "{first:?}");
    // On, over its own first instruction: dropped, and made anew.
    assert_eq!(guest.stop().gpr[0], 14);
    let seen = lines.take();
    expect(&seen, &[format!("block drop gpa {CODE:#x} kernel")]);
    let drop = seen.iter().position(|line| line.starts_with("block drop")).unwrap();
    assert!(seen[drop + 1..].iter().any(|line| line.starts_with(&head)), "{seen:#?}");

    // A program's page: its translation is good at whatever address it is mapped.
    guest.code(USER_CODE + 0x40, |a| {
        a.inc(eax)?;
        a.inc(ecx)?;
        a.int3()
    });
    guest.gate(vector::BP, CODE + 0x1f00, 0xee);
    guest.code(CODE + 0x1f00, |a| a.out(STOP, al));
    guest.map(USER_DATA, USER_CODE | PRESENT | USER);
    guest.enter_user(USER_CODE + 0x40);
    let once = guest.stop().gpr[0];
    guest.enter_user(USER_DATA + 0x40);
    assert_eq!(guest.stop().gpr[0], once + 1);
    let seen = lines.take();
    let head =
        format!("block translate {:#x} gpa {:#x} user insns 3 bytes 5 host ", USER_CODE + 0x40, USER_CODE + 0x40);
    let programs: Vec<_> = seen.iter().filter(|line| line.contains(" user ")).collect();
    assert!(matches!(programs[..], [line] if line.starts_with(&head) && known(line)), "{programs:#?}");

    guest.vcpu.set_breakpoints(&[CODE + 0x500]);
    assert_eq!(lines.take(), ["block flush all"]);
}

#[test]
fn translation_lookaside_buffers() {
    let (mut guest, lines) = traced(|trace| trace.tlb = true);
    guest.map(DATA + 0x2000, 0x5_5000 | PRESENT | WRITE | GLOBAL);
    guest.code(CODE, |a| {
        a.mov(ebx, DATA as u32)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.mov(qword_ptr(rbx + 0x1010), rax)?;
        a.mov(rcx, qword_ptr(rbx + 0x2020))?;
        // Found in the TLB: no line.
        a.mov(rcx, qword_ptr(rbx + 0x2028))?;
        a.invlpg(byte_ptr(rbx + 0x123))?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(rcx, qword_ptr(rbx + 8))?;
        a.mov(rcx, qword_ptr(rbx + 0x2020))?;
        a.mov(rax, cr4)?;
        a.xor(rax, cr4::PGE as i32)?;
        a.mov(cr4, rax)?;
        a.mov(rcx, qword_ptr(rbx + 0x2020))?;
        a.out(STOP, al)
    });
    guest.stop();
    let fill = |kind: &str, page: u64, gpa: u64, rest: &str| {
        format!("tlb cpu0 fill {kind} {page:#x} gpa {gpa:#x} size 0x1000{rest}")
    };
    let seen = lines.take();
    let global = fill("read kernel", DATA + 0x2000, 0x5_5000, " global");
    expect(
        &seen,
        &[
            fill("fetch kernel", CODE, CODE, ""),
            fill("read kernel", DATA, DATA, ""),
            fill("write kernel", DATA + 0x1000, DATA + 0x1000, ""),
            global.clone(),
            format!("tlb cpu0 flush page {:#x}", DATA + 0x123),
            "tlb cpu0 flush non-global".into(),
            fill("read kernel", DATA, DATA, ""),
            "tlb cpu0 flush all".into(),
            fill("read kernel", DATA + 0x2000, 0x5_5000, ""),
        ],
    );
    assert_eq!(seen.iter().filter(|line| **line == global).count(), 1, "global pages stay: {seen:#?}");

    guest.code(USER_CODE, |a| {
        a.mov(ebx, USER_DATA as u32)?;
        a.mov(byte_ptr(rbx), al)?;
        a.int3()
    });
    guest.gate(vector::BP, CODE + 0x1f00, 0xee);
    guest.code(CODE + 0x1f00, |a| a.out(STOP, al));
    guest.enter_user(USER_CODE);
    guest.stop();
    expect(
        &lines.take(),
        &[fill("fetch user", USER_CODE, USER_CODE, ""), fill("write user", USER_DATA, USER_DATA, "")],
    );
}

/// Kinds that were not asked for leave no line.
#[test]
fn nothing_else() {
    let (mut guest, lines) = traced(|_| ());
    guest.code(CODE, |a| {
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(rax, qword_ptr(DATA as u32 as i32))?;
        a.ud2()
    });
    assert_eq!(guest.trap().vector, vector::UD);
    assert!(lines.take().is_empty());
}
