//! Programs of a few instructions.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::*;

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x50_0000;

/// A file in memory: the program's code on the first page, data behind it.
struct Memory {
    file: OwnedFd,
    bytes: *mut u8,
}

impl Memory {
    fn new(code: &[u8]) -> Self {
        // SAFETY: a file of our own, mapped for the rest of the test.
        unsafe {
            let file = OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0));
            assert_eq!(libc::ftruncate(file.as_raw_fd(), 1 << 20), 0);
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let bytes = libc::mmap(std::ptr::null_mut(), 1 << 20, rights, libc::MAP_SHARED, file.as_raw_fd(), 0);
            assert_ne!(bytes, libc::MAP_FAILED);
            std::ptr::copy_nonoverlapping(code.as_ptr(), bytes.cast(), code.len());
            Self { file, bytes: bytes.cast() }
        }
    }

    fn word(&self, offset: usize) -> u64 {
        // SAFETY: inside the mapping, and aligned.
        unsafe { self.bytes.add(offset).cast::<u64>().read_volatile() }
    }

    fn set_word(&self, offset: usize, value: u64) {
        // SAFETY: as above.
        unsafe { self.bytes.add(offset).cast::<u64>().write_volatile(value) }
    }
}

fn state() -> CpuState {
    let mut state = CpuState { rip: CODE, rflags: rflags::FIXED | rflags::IF, ..CpuState::default() };
    state.segments = Default::default();
    state.segments[1].selector = 0x33;
    state.segments[2].selector = 0x2b;
    state.gpr[3] = DATA;
    state
}

fn started(code: &[u8]) -> (Memory, Runner, CpuState) {
    let memory = Memory::new(code);
    let mut runner = Runner::start(memory.file.as_fd()).unwrap();
    let map = |address, offset, rights| Change::Map { address, offset, length: 4096, rights };
    assert!(runner.change(&[map(CODE, 0, Rights::Execute), map(DATA, 4096, Rights::Write)]).unwrap());
    let state = state();
    assert!(Runner::takes(&state));
    runner.load(&state).unwrap();
    (memory, runner, state)
}

#[test]
fn registers_go_in_and_come_out() {
    // add qword [rbx], rax; vpaddd ymm1, ymm0, ymm0; fld1; mov r9, fs:[0]; std; syscall
    let code = [
        0x48, 0x01, 0x03, 0xc5, 0xfd, 0xfe, 0xc8, 0xd9, 0xe8, 0x64, 0x4c, 0x8b, 0x0c, 0x25, 0, 0, 0, 0, 0xfd, 0x0f,
        0x05,
    ];
    let (memory, mut runner, mut state) = started(&code);
    memory.set_word(4096, 40);
    memory.set_word(4096 + 64, 77);
    state.gpr[0] = 2;
    state.gpr[1] = 0x1234;
    state.segments[4].base = DATA + 64;
    state.fp.bytes[FpState::XMM] = 3;
    state.fp.bytes[FpState::YMM_HIGH] = 4;
    runner.load(&state).unwrap();
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
    runner.store(&mut state).unwrap();
    assert_eq!(memory.word(4096), 42);
    assert_eq!((state.gpr[0], state.gpr[9], state.rip), (2, 77, CODE + code.len() as u64 - 2));
    assert_eq!(state.fp.bytes[FpState::XMM + 16], 6);
    assert_eq!(state.fp.bytes[FpState::YMM_HIGH + 16], 8);
    assert_eq!(state.fp.bytes[FpState::ST..FpState::ST + 10], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    assert_ne!(state.rflags & rflags::DF, 0);
}

#[test]
fn faults_have_their_address() {
    // mov rax, [rbx + 0x1000]; jmp
    let (_memory, mut runner, mut state) = started(&[0x48, 0x8b, 0x83, 0, 0x10, 0, 0, 0xeb, 0xfe]);
    assert_eq!(runner.run().unwrap(), Stop::Fault { address: DATA + 4096 });
    assert_eq!(runner.rip(), CODE);
    // Mapped, it goes on from there; and somebody calls.
    let more = Change::Map { address: DATA + 4096, offset: 8192, length: 4096, rights: Rights::Read };
    assert!(runner.change(&[more]).unwrap());
    let signaller = runner.signaller();
    signaller.set_inside(true);
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        signaller.call();
    });
    assert_eq!(runner.run().unwrap(), Stop::Called);
    runner.store(&mut state).unwrap();
    assert_eq!((state.rip, state.gpr[0]), (CODE + 7, 0));
    // Nothing is left of what is taken away.
    assert!(runner.change(&[Change::Unmap { address: CODE, length: 4096 }]).unwrap());
    assert_eq!(runner.run().unwrap(), Stop::Fault { address: CODE + 7 });
}

#[test]
fn what_is_not_for_programs_stops() {
    for (code, length) in [
        (&[0xf4][..], 0),                           // hlt
        (&[0x0f, 0x0b], 0),                         // ud2
        (&[0x48, 0x31, 0xc9, 0x48, 0xf7, 0xf1], 3), // xor rcx, rcx; div rcx
        (&[0xcd, 0x90], 0),                         // int 0x90
    ] {
        let (_memory, mut runner, _) = started(code);
        assert_eq!(runner.run().unwrap(), Stop::Instruction, "{code:x?}");
        assert_eq!(runner.rip(), CODE + length, "{code:x?}");
    }
}

#[test]
fn traps_stop_behind() {
    for code in [&[0xcc][..], &[0xcd, 3]] {
        let (_memory, mut runner, _) = started(code);
        assert_eq!(runner.run().unwrap(), Stop::Breakpoint, "{code:x?}");
        assert_eq!(runner.rip(), CODE + code.len() as u64, "{code:x?}");
    }
    let (_memory, mut runner, _) = started(&[0xf1, 0x90]);
    assert_eq!(runner.run().unwrap(), Stop::DebugTrap);
    assert!((CODE..=CODE + 1).contains(&runner.rip()));
}

/// CPUID, and what comes behind it.
#[test]
fn watched_instructions_stop() {
    // cpuid; inc rax; syscall
    let (_memory, mut runner, mut state) = started(&[0x0f, 0xa2, 0x48, 0xff, 0xc0, 0x0f, 0x05]);
    assert!(runner.watch(&[CODE + 0x100, CODE]));
    assert_eq!(runner.run().unwrap(), Stop::Instruction);
    runner.store(&mut state).unwrap();
    assert_eq!((state.rip, state.rflags & rflags::RF), (CODE, 0));
    state.rip += 2;
    state.gpr[0] = 41;
    runner.load(&state).unwrap();
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
    runner.store(&mut state).unwrap();
    assert_eq!((state.rip, state.gpr[0]), (CODE + 5, 42));
    assert!(runner.watch(&[]));
    state.rip = CODE;
    runner.load(&state).unwrap();
    assert_eq!(runner.run().unwrap(), Stop::SystemCall, "no longer");
}

/// A program that jumps to the stub, with a system call of its own in the registers or on the list, gets nothing done.
#[test]
fn the_stub_is_of_no_use_to_the_program() {
    // mov rax, STUB + 32; jmp rax
    let mut code = vec![0x48, 0xb8];
    code.extend_from_slice(&(STUB + 32).to_le_bytes());
    code.extend_from_slice(&[0xff, 0xe0]);
    let (_memory, mut runner, _) = started(&code);
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
    assert_eq!(runner.rip(), STUB + 32);
    // mov rax, STUB; mov [rax], al
    let mut code = vec![0x48, 0xb8];
    code.extend_from_slice(&STUB.to_le_bytes());
    code.extend_from_slice(&[0x88, 0x00]);
    let (_memory, mut runner, _) = started(&code);
    assert_eq!(runner.run().unwrap(), Stop::Fault { address: STUB });
}

/// The vsyscall page of the host's kernel, which does its calls without a system call.
#[test]
fn vsyscalls_are_not_the_hosts() {
    // mov rax, 0xffffffffff600400 (time); call rax
    let code = [0x48, 0xc7, 0xc0, 0x00, 0x04, 0x60, 0xff, 0x31, 0xff, 0xff, 0xd0];
    let (memory, mut runner, mut state) = started(&code);
    state.gpr[4] = DATA + 2048;
    runner.load(&state).unwrap();
    let stop = runner.run().unwrap();
    runner.store(&mut state).unwrap();
    // Refused by the filter, or not there at all: in either case before it, with the return address pushed.
    assert!(matches!(stop, Stop::Instruction | Stop::Fault { .. }), "{stop:?}");
    assert_eq!((state.rip, state.gpr[4]), (0xffff_ffff_ff60_0400, DATA + 2040));
    assert_eq!(memory.word(4096 + 2040), CODE + code.len() as u64);
}

#[test]
fn refused_changes_are_told() {
    let (_memory, mut runner, _) = started(&[0x0f, 0x05]);
    // Beyond programs' addresses.
    let change = Change::Map { address: END, offset: 0, length: 8192, rights: Rights::Read };
    assert!(!runner.change(&[change]).unwrap());
    assert_eq!(runner.run().unwrap(), Stop::SystemCall, "it goes on");
    // More than the list has room for.
    let many: Vec<_> = (0..300)
        .map(|n| Change::Map { address: 0x7000_0000 + n * 8192, offset: 0, length: 4096, rights: Rights::Read })
        .collect();
    assert!(runner.change(&many).unwrap());
    runner.clear().unwrap();
    assert_eq!(runner.run().unwrap(), Stop::Fault { address: CODE });
}

#[test]
fn a_process_that_is_killed_is_told_of() {
    let (_memory, mut runner, _) = started(&[0xeb, 0xfe]);
    let pid = runner.pid();
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        // SAFETY: our own child.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    });
    assert!(runner.run().unwrap_err().contains("ended by the host (signal 9)"));
}

#[test]
fn four_instructions_are_watched() {
    // Four times CPUID, and a system call.
    let (_memory, mut runner, mut state) = started(&[0x0f, 0xa2, 0x0f, 0xa2, 0x0f, 0xa2, 0x0f, 0xa2, 0x0f, 0x05]);
    for _ in 0..3 {
        assert!(runner.watch(&[CODE, CODE + 2, CODE + 4, CODE + 6]));
    }
    for n in 0..4 {
        assert_eq!(runner.run().unwrap(), Stop::Instruction);
        runner.store(&mut state).unwrap();
        assert_eq!(state.rip, CODE + 2 * n);
        state.rip += 2;
        runner.load(&state).unwrap();
    }
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
}
