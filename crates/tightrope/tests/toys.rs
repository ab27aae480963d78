//! Tiny kernels of our own through the whole command: switching off, resets, crashes, console, counters, signals, gdb.

mod common;

use common::{Code, Kernel, Session, finish};
use rustix::process::Signal;

#[test]
fn power_off_is_exit_code_0() {
    let kernel = Kernel::new(Code::new().print("hello\r\n").power_off());
    let done = finish(kernel.run(&[]), b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(0), "hello\r\n"), "{}", done.err);
    assert_eq!(done.err.lines().count(), 1, "one line says which engine runs: {}", done.err);
    assert!(done.err.starts_with("tightrope: engine "), "{}", done.err);
}

#[test]
fn triple_fault_is_exit_code_3_with_registers() {
    let kernel = Kernel::new(Code::new().print("bye").raw(&[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8]).triple_fault());
    let done = finish(kernel.run(&[]), b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(3), "bye"), "{}", done.err);
    // Some CPUs keep no registers; then it says so.
    let exact: &[&str] =
        if done.err.contains("AMD-V keeps no registers") { &[] } else { &["RAX: 0807060504030201", "<0f> 0b"] };
    for part in [&["triple fault on vCPU 0", "CR3: ", "64-bit, CPL 0"], exact].concat() {
        assert!(done.err.contains(part), "{part} is missing in {}", done.err);
    }
}

/// A vector instruction on device memory, which KVM's emulator does not know: it says so, with what the CPU had. Translated code takes it.
#[test]
fn what_the_engine_cannot_run_is_exit_code_3_with_registers() {
    // mov rax, cr4; or eax, 0x200 (OSFXSR); mov cr4, rax; mov ebx, 0xfed00000; paddd xmm0, [rbx]
    let code = [0x0f, 0x20, 0xe0, 0x0d, 0, 2, 0, 0, 0x0f, 0x22, 0xe0, 0xbb, 0, 0, 0xd0, 0xfe, 0x66, 0x0f, 0xfe, 0x03];
    let kernel = Kernel::new(Code::new().print("go").raw(&code).print("on").power_off());
    let done = finish(kernel.run(&[]), b"");
    if common::engine() == "kvm" {
        assert_eq!((done.code(), done.out.as_str()), (Some(3), "go"), "{}", done.err);
        for part in ["KVM cannot emulate an instruction", "on vCPU 0", "RBX: 00000000fed00000", "<66> 0f fe 03"] {
            assert!(done.err.contains(part), "{part} is missing in {}", done.err);
        }
    } else {
        assert_eq!((done.code(), done.out.as_str()), (Some(0), "goon"), "{}", done.err);
    }
}

#[test]
fn halting_for_good_is_exit_code_3() {
    let kernel = Kernel::new(Code::new().raw(&[0xfa]).stop());
    let done = finish(kernel.run(&[]), b"");
    assert_eq!(done.code(), Some(3), "{}", done.err);
    assert!(done.err.contains("no progress") && done.err.contains("RIP: "), "{}", done.err);
}

#[test]
fn reset_boots_again_and_sigterm_ends() {
    let kernel = Kernel::new(Code::new().print("boot\r\n").reset());
    let mut session = Session::start(kernel.run(&[]));
    for _ in 0..5 {
        session.expect("boot\r\n");
    }
    session.signal(Signal::TERM);
    let done = session.finish();
    assert_eq!(done.code(), Some(128 + 15), "{}", done.err);
}

#[test]
fn signals_end_the_guest() {
    for (which, code) in [(Signal::INT, 130), (Signal::HUP, 129), (Signal::QUIT, 131)] {
        let kernel = Kernel::new(Code::new().print("up").spin());
        let mut session = Session::start(kernel.run(&[]));
        session.expect("up");
        session.signal(which);
        assert_eq!(session.finish().code(), Some(code));
    }
}

#[test]
fn piped_input_is_complete_and_in_order() {
    let kernel = Kernel::new(Code::new().echo());
    let text: String = (0..20_000).map(|i| char::from(b'a' + (i * 7 % 13) as u8)).collect();
    let done = finish(kernel.run(&[]), format!("{text}q").as_bytes());
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(done.out == format!("{text}q"), "{} bytes came back", done.out.len());
}

#[test]
fn the_end_of_input_does_not_end_the_guest() {
    let kernel = Kernel::new(Code::new().print("a").echo());
    let mut session = Session::start(kernel.run(&[]));
    session.expect("a");
    session.end_input();
    std::thread::sleep(std::time::Duration::from_millis(100));
    session.signal(Signal::USR1);
    session.signal(Signal::TERM);
    let done = session.finish();
    assert_eq!(done.code(), Some(143));
}

#[test]
fn output_is_complete_when_the_reader_goes_away_slowly() {
    let kernel = Kernel::new(Code::new().print(&"0123456789".repeat(300)).power_off());
    let done = finish(kernel.run(&[]), b"");
    assert_eq!(done.out, "0123456789".repeat(300));
}

#[test]
fn counters_as_table_and_json() {
    let kernel = Kernel::new(Code::new().print("x").power_off());
    let done = finish(kernel.run(&["--stats"]), b"");
    assert_eq!(done.code(), Some(0));
    assert!(done.err.contains("--- counters: engine "), "{}", done.err);
    let done = finish(kernel.run(&["--stats=json"]), b"");
    let line = done.err.lines().last().unwrap_or_default();
    let json: serde_json::Value = serde_json::from_str(line).expect(line);
    assert_eq!(json["engine"], common::engine());
    assert_eq!(counter(&done, "exits.serial.writes"), 1, "{line}");
}

/// A counter of `--stats=json`, which ends what the process wrote.
fn counter(done: &common::Finished, name: &str) -> u64 {
    let line = done.err.lines().last().unwrap_or_default();
    let json: serde_json::Value = serde_json::from_str(line).expect(line);
    json["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name} in {line}"))
}

#[test]
fn lockstep_compares_and_finds_nothing() {
    if common::engine() != "bt" {
        return;
    }
    let kernel = Kernel::new(Code::new().print("in step").echo());
    let done = finish(kernel.run(&["--lockstep", "--stats=json"]), b"marching q");
    assert_eq!((done.code(), done.out.as_str()), (Some(0), "in stepmarching q"), "{}", done.err);
    assert!(counter(&done, "lockstep.compared") > 10, "{}", done.err);
}

/// A line for each access of the guest to a device.
#[test]
fn trace_of_exits() {
    // mov ebx, 0xfec00000; mov eax, [rbx]; mov dword [rbx], 0x12; mov dx, 0x3fd; in al, dx; in al, 0x79
    let code =
        [0xbb, 0, 0, 0xc0, 0xfe, 0x8b, 0x03, 0xc7, 0x03, 0x12, 0, 0, 0, 0x66, 0xba, 0xfd, 0x03, 0xec, 0xe4, 0x79];
    let kernel = Kernel::new(Code::new().print("A").raw(&code).power_off());
    let file = kernel.dir.path().join("trace");
    let done = finish(kernel.run(&["--trace", &format!("exits:{}", file.display())]), b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(0), "A"), "{}", done.err);
    let text = std::fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let expected = [
        "exit write port 0x3f8 41 serial",
        "exit read memory 0xfec00000 00000000 ioapic",
        "exit write memory 0xfec00000 00000012 ioapic",
        "exit read port 0x3fd 60 serial",
        "exit read port 0x79 ff (no device)",
        "exit write port 0x604 3400 acpi",
    ];
    // Where the engine has the interrupt chips, no access to them comes out of it.
    let own_chips = common::engine() == "kvm";
    assert_eq!(lines, expected.into_iter().filter(|line| !own_chips || !line.ends_with("ioapic")).collect::<Vec<_>>());
}

/// Several kinds at once, in one file, or to standard error without one.
#[test]
fn trace_of_the_engine() {
    let kernel = Kernel::new(Code::new().print("A").power_off());
    let kinds = if common::engine() == "bt" { "int,exits,blocks,tlb" } else { "exits" };
    let has = |text: &str| {
        assert!(text.contains("exit write port 0x3f8 41 serial\n"), "{text}");
        if kinds != "exits" {
            assert!(text.contains("block translate 0x100000 gpa 0x100000 kernel,no-fpu,no-avx insns "), "{text}");
            assert!(text.contains("tlb cpu0 fill fetch kernel 0x100000 gpa 0x100000 size 0x"), "{text}");
        }
    };
    let file = kernel.dir.path().join("trace");
    let done = finish(kernel.run(&["--trace", &format!("{kinds}:{}", file.display())]), b"");
    assert_eq!(done.code(), Some(0), "{}", done.err);
    has(&std::fs::read_to_string(file).unwrap());
    assert!(!done.err.contains("exit write"), "{}", done.err);
    let done = finish(kernel.run(&["--trace", kinds]), b"");
    assert_eq!(done.code(), Some(0), "{}", done.err);
    has(&done.err);
}

#[test]
fn counters_on_sigusr1() {
    let kernel = Kernel::new(Code::new().print("up").echo());
    let mut session = Session::start(kernel.run(&[]));
    session.expect("up");
    session.signal(Signal::USR1);
    std::thread::sleep(std::time::Duration::from_millis(200));
    session.send(b"stillq");
    session.expect("stillq");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(done.err.contains("--- counters"), "{}", done.err);
}

#[test]
fn console_in_a_file_and_nowhere() {
    let kernel = Kernel::new(Code::new().print("to a file").power_off());
    let file = kernel.dir.path().join("console");
    let done = finish(kernel.run(&["--serial", &format!("file:{}", file.display())]), b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(0), ""));
    assert_eq!(std::fs::read_to_string(file).unwrap(), "to a file");
    let done = finish(kernel.run(&["--serial", "none"]), b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(0), ""));
}

#[test]
fn console_on_a_socket() {
    use std::io::{Read, Write};
    let kernel = Kernel::new(Code::new().echo());
    let path = kernel.dir.path().join("console");
    let session = Session::start(kernel.run(&["--serial", &format!("unix:{}", path.display())]));
    let mut stream = None;
    for _ in 0..500 {
        stream = std::os::unix::net::UnixStream::connect(&path).ok();
        if stream.is_some() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let mut stream = stream.expect("a socket");
    stream.write_all(b"ping q").unwrap();
    let mut back = [0; 6];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"ping q");
    assert_eq!(session.finish().code(), Some(0));
}

#[test]
fn gdb_from_the_first_instruction_to_the_end() {
    if std::process::Command::new("gdb").arg("--version").output().is_err() {
        eprintln!("gdb is not installed: skipped");
        return;
    }
    // 0x100000: nop, nop; mov eax, 0x12345678; 0x100007: mov ecx, 3; 1: nop; 0x10000d: dec ecx; jnz 1b; then the end.
    let code = [0x90, 0x90, 0xb8, 0x78, 0x56, 0x34, 0x12, 0xb9, 3, 0, 0, 0, 0x90, 0xff, 0xc9, 0x75, 0xfb];
    let kernel = Kernel::new(Code::new().raw(&code).power_off());
    let socket = kernel.dir.path().join("gdb");
    let session = Session::start(kernel.run(&["--gdb", &format!("unix:{}", socket.display())]));
    for _ in 0..500 {
        if socket.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let mut gdb = std::process::Command::new("timeout");
    gdb.args(["60", "gdb", "-nx", "-batch", "-ex", "set architecture i386:x86-64"]);
    gdb.args(["-ex", &format!("target remote {}", socket.display())]);
    for line in [
        "print/x $rip",
        "x/2i $rip",
        "stepi",
        "stepi",
        "print/x $rip",
        "break *0x100007",
        "continue",
        "print/x $eax",
        "delete",
        "break *0x10000d",
        "continue",
        "continue",
        "print $ecx + 70",
        "continue",
        "print $ecx + 70",
        "delete",
        "continue",
    ] {
        gdb.args(["-ex", line]);
    }
    let output = gdb.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{text}\n{}", done.err);
    for part in ["= 0x100000", "nop", "= 0x100002", "Breakpoint 1", "= 0x12345678", "= 72", "= 71", "exited normally"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}
