//! Programs of a few instructions.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use cpu::FpState;

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
            let memory = Self { file, bytes: bytes.cast() };
            memory.put(0, code);
            memory
        }
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= 1 << 20);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.bytes.add(offset), bytes.len()) };
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

fn fault(address: u64, access: Access) -> Stop {
    Stop::Fault { address, access: Some(access) }
}

fn started(code: &[u8]) -> (Memory, Runner, CpuState) {
    let memory = Memory::new(code);
    let mut runner = Runner::start(memory.file.as_fd()).unwrap();
    let map = |address, offset, rights| Change::Map { address, offset, length: 4096, rights };
    runner.change(&[map(CODE, 0, Rights::Execute), map(DATA, 4096, Rights::Write)]).unwrap();
    let state = state();
    assert!(Runner::takes(&state));
    runner.load(&state);
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
    runner.load(&state);
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
    runner.store(&mut state);
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
    assert_eq!(runner.run().unwrap(), fault(DATA + 4096, Access::Read));
    assert_eq!(runner.rip(), CODE);
    // Mapped, it goes on from there; and somebody calls.
    let more = Change::Map { address: DATA + 4096, offset: 8192, length: 4096, rights: Rights::Read };
    runner.change(&[more]).unwrap();
    let signaller = runner.signaller();
    signaller.set_inside(true);
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        signaller.call();
    });
    assert_eq!(runner.run().unwrap(), Stop::Called);
    runner.store(&mut state);
    assert_eq!((state.rip, state.gpr[0]), (CODE + 7, 0));
    // Nothing is left of what is taken away.
    runner.change(&[Change::Unmap { address: CODE, length: 4096 }]).unwrap();
    assert_eq!(runner.run().unwrap(), fault(CODE + 7, Access::Fetch));
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
    assert!(runner.watch(&[CODE + 0x100, CODE]).unwrap());
    assert_eq!(runner.run().unwrap(), Stop::Instruction);
    runner.store(&mut state);
    assert_eq!((state.rip, state.rflags & rflags::RF), (CODE, 0));
    state.rip += 2;
    state.gpr[0] = 41;
    runner.load(&state);
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
    runner.store(&mut state);
    assert_eq!((state.rip, state.gpr[0]), (CODE + 5, 42));
    assert!(runner.watch(&[]).unwrap());
    state.rip = CODE;
    runner.load(&state);
    assert_eq!(runner.run().unwrap(), Stop::SystemCall, "no longer");
}

/// mov rax, `address`; jmp rax
fn jump(address: u64) -> Vec<u8> {
    [&[0x48, 0xb8], &address.to_le_bytes()[..], &[0xff, 0xe0]].concat()
}

/// Each place in the stub's code from where a system call can be made.
fn calls(stub: &stub::Stub) -> Vec<u64> {
    let mut bytes = [0; 512];
    stub.read(0, &mut bytes);
    let bytes: Vec<u8> = bytes.iter().flat_map(|word| word.to_le_bytes()).collect();
    (0..bytes.len() - 1).filter(|&at| bytes[at..at + 2] == [0x0f, 0x05]).map(|at| STUB + at as u64).collect()
}

/// A program that jumps to the stub, with a system call of its own in the registers, gets nothing done.
#[test]
fn the_stub_is_of_no_use_to_the_program() {
    let places = calls(&stub::Stub::new().unwrap());
    assert_eq!(places.len(), 3);
    for place in places {
        let (_memory, mut runner, mut state) = started(&jump(place));
        // mmap(0x600000, 4096, PROT_READ | PROT_WRITE, …); RAX is the jump's.
        state.gpr[7] = 0x60_0000;
        state.gpr[6] = 4096;
        state.gpr[2] = 3;
        state.gpr[10] = birth::MAP_FLAGS;
        state.gpr[8] = 3;
        runner.load(&state);
        assert_eq!(runner.run().unwrap(), Stop::Lost, "{place:#x}");
    }
    // mov rax, STUB; mov [rax], al
    let mut code = jump(STUB);
    code.truncate(10);
    code.extend_from_slice(&[0x88, 0x00]);
    let (_memory, mut runner, _) = started(&code);
    assert_eq!(runner.run().unwrap(), fault(STUB, Access::Write));
}

/// Code that puts `value` at `address`: mov rax, value; mov rcx, address; mov [rcx], rax
fn put(address: u64, value: u64) -> Vec<u8> {
    let bytes = [value, address].map(u64::to_le_bytes);
    [&[0x48, 0xb8], &bytes[0][..], &[0x48, 0xb9], &bytes[1][..], &[0x48, 0x89, 0x01]].concat()
}

/// mov eax, number; then jump to `place`
fn call_from(number: i64, place: u64) -> Vec<u8> {
    let number = (number as u32).to_le_bytes();
    let [a, b, c, d, e, f, g, h] = place.to_le_bytes();
    [&[0xb8], &number[..], &[0x49, 0xbb, a, b, c, d, e, f, g, h, 0x41, 0xff, 0xe3]].concat()
}

/// A program that says it has stopped, with registers that cannot be.
#[test]
fn false_stops_are_found_out() {
    let notify = stub::Stub::new().unwrap().places.notified - 2;
    let words = STUB + stub::WORDS_PAGE;
    for context in [0, u64::MAX, STUB, STUB + 8, STUB + STUB_SIZE - 64, DATA, words + 3] {
        let code = [put(words + 8, context), put(words + 56, 1), call_from(stub::NOTIFY, notify)].concat();
        let (_memory, mut runner, _) = started(&code);
        assert_eq!(runner.run().unwrap(), Stop::Lost, "{context:#x}");
        assert_eq!(runner.run().unwrap(), Stop::Lost);
        assert!(runner.change(&[Change::Unmap { address: CODE, length: 4096 }]).is_ok());
    }
    // Without the word that says that the stop is a new one.
    let (_memory, mut runner, _) = started(&call_from(stub::NOTIFY, notify));
    assert_eq!(runner.run().unwrap(), Stop::Lost);
    // A base that the CPU does not take, with the registers of the last stop.
    let context = {
        let (_memory, runner, _) = started(&[0x0f, 0x05]);
        runner.frame.address()
    };
    let code = [put(words + 8, context), put(words + 16, 1 << 63), put(words + 56, 1), call_from(stub::NOTIFY, notify)]
        .concat();
    let (_memory, mut runner, _) = started(&code);
    assert_eq!(runner.run().unwrap(), Stop::Lost);
}

/// A program that says it has stopped, in a way that could be, has: and goes on as it is told.
#[test]
fn a_stop_of_the_programs_own_making_is_one() {
    let notify = stub::Stub::new().unwrap().places.notified - 2;
    let (memory, mut runner, mut state) = started(&[]);
    let context = runner.frame.address();
    let words = STUB + stub::WORDS_PAGE;
    let code =
        [put(words + 8, context), put(words, libc::SIGILL as u64), put(words + 56, 1), call_from(stub::NOTIFY, notify)]
            .concat();
    memory.put(0, &code);
    // inc qword [rbx]; jmp
    let counts = [0x48, 0xff, 0x03, 0xeb, 0xfb];
    memory.put(512, &counts);
    assert_eq!(runner.run().unwrap(), Stop::Instruction);
    // It does nothing while it is stopped.
    let before = memory.word(4096);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(memory.word(4096), before);
    state.rip = CODE + 512;
    runner.load(&state);
    let signaller = runner.signaller();
    signaller.set_inside(true);
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        signaller.call();
    });
    assert_eq!(runner.run().unwrap(), Stop::Called);
    assert!(memory.word(4096) > before + 1000);
}

/// A program that gives itself registers by rt_sigreturn, with all signals blocked, and computes on.
#[test]
fn a_program_that_does_not_hear_is_ended() {
    let give = stub::Stub::new().unwrap().places.returned - 2;
    let (memory, mut runner, _) = started(&[]);
    let context = runner.frame.address();
    // The frame of the last stop is there: its mask, its RIP.
    let code = [
        put(context + 37 * 8, u64::MAX),
        put(context + 21 * 8, CODE + 512),
        [&[0x48, 0xbc], &context.to_le_bytes()[..]].concat(),
        call_from(libc::SYS_rt_sigreturn, give),
    ]
    .concat();
    memory.put(0, &code);
    // jmp
    memory.put(512, &[0xeb, 0xfe]);
    let signaller = runner.signaller();
    signaller.set_inside(true);
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        signaller.call();
    });
    let start = std::time::Instant::now();
    assert_eq!(runner.run().unwrap(), Stop::Lost);
    assert!(start.elapsed() > std::time::Duration::from_millis(900), "{:?}", start.elapsed());
}

/// A program that ends itself: a frame that the kernel does not take, a fault with its signal blocked.
#[test]
fn a_program_can_lose_itself_only() {
    let give = stub::Stub::new().unwrap().places.returned - 2;
    // mov rsp, 0x1234; rt_sigreturn
    let code = [&[0x48, 0xc7, 0xc4, 0x34, 0x12, 0, 0][..], &call_from(libc::SYS_rt_sigreturn, give)].concat();
    let (_memory, mut runner, _) = started(&code);
    // Whatever the kernel makes of it.
    assert!(matches!(runner.run().unwrap(), Stop::Lost | Stop::Fault { .. } | Stop::Instruction));
}

/// A program that comes in between while its memory is changed: single steps, and a call while its signals are not blocked.
#[test]
fn nobody_sees_the_secret() {
    let notify = stub::Stub::new().unwrap().places.notified - 2;
    let words = STUB + stub::WORDS_PAGE;
    let (memory, mut runner, mut state) = started(&[]);
    let context = runner.frame.address();
    // push 0x302 (TF); popfq; then a stop of its own making, whose answer is the list.
    let code = [
        put(words + 8, context),
        put(words, libc::SIGILL as u64),
        vec![0x68, 0x02, 0x03, 0, 0, 0x9d],
        call_from(stub::NOTIFY, notify),
    ]
    .concat();
    memory.put(0, &code);
    state.gpr[4] = DATA + 2048;
    runner.load(&state);
    let map = Change::Map { address: 0x70_0000, offset: 8192, length: 4096, rights: Rights::Read };
    for _ in 0..100 {
        runner.change(&[map]).unwrap();
        match runner.run().unwrap() {
            Stop::Lost => return,
            // Its single steps before it gets there.
            Stop::DebugTrap => assert!(runner.rip() < CODE + 4096),
            other => panic!("{other:?}"),
        }
    }
    panic!("it goes on");
}

/// Nothing is left of the list when the program goes on.
#[test]
fn the_list_is_empty_afterwards() {
    let (_memory, mut runner, _) = started(&[0x0f, 0x05]);
    let bad = Change::Map { address: END, offset: 0, length: 8192, rights: Rights::Read };
    let good = Change::Map { address: 0x70_0000, offset: 8192, length: 4096, rights: Rights::Read };
    for changes in [vec![good; 5], vec![good, bad, good, good], vec![bad]] {
        let refused = changes.contains(&bad);
        runner.change(&changes).unwrap();
        assert_eq!(runner.run().unwrap() == Stop::Refused, refused);
        let mut list = [0; 512];
        runner.process.stub.read(stub::LIST_PAGE, &mut list);
        let secrets = list.chunks_exact(7).flat_map(|entry| [entry[0], entry[4], entry[5]]);
        assert!(secrets.eq(std::iter::repeat_n(0, 3 * 73)), "{list:x?}");
    }
}

#[test]
fn flags_and_selectors_do_not_stay() {
    // push 0x247202 (ID, AC, NT); popfq; mov eax, 0x2b; mov es, eax; syscall; then: pushfq; pop rcx; mov edx, es; syscall
    let code = [
        0x68, 0x02, 0x42, 0x24, 0x00, 0x9d, 0xb8, 0x2b, 0, 0, 0, 0x8e, 0xc0, 0x0f, 0x05, 0x9c, 0x59, 0x8c, 0xc2, 0x0f,
        0x05,
    ];
    let (_memory, mut runner, mut state) = started(&code);
    state.gpr[4] = DATA + 2048;
    runner.load(&state);
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
    assert_eq!(runner.selectors(), [0x2b, 0x33, 0x2b, 0, 0, 0]);
    let mut told = state.clone();
    runner.store(&mut told);
    assert_eq!(told.rflags & (rflags::ID | rflags::NT | rflags::AC), rflags::ID | rflags::NT | rflags::AC);
    state.rip = told.rip + 2;
    runner.load(&state);
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
    runner.store(&mut told);
    assert_eq!(told.gpr[1] & (rflags::ID | rflags::NT | rflags::AC), 0);
    assert_eq!((told.gpr[2], runner.selectors()), (0, [0, 0x33, 0x2b, 0, 0, 0]));
}

/// What a switch costs; run with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn switches() {
    // syscall; jmp
    let (_memory, mut runner, mut state) = started(&[0x0f, 0x05, 0xeb, 0xfc]);
    // SAFETY: binds this thread and the process's to one core.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(1, &mut set);
        for thread in [0, runner.pid()] {
            libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &raw const set);
        }
    }
    let mut told = state.clone();
    let start_state = state.clone();
    let measure = |runner: &mut Runner, told: &mut CpuState, what: &str, change: bool| {
        let start = std::time::Instant::now();
        for _ in 0..20_000 {
            if change {
                let map = Change::Map { address: 0x70_0000, offset: 8192, length: 4096, rights: Rights::Read };
                runner.change(&[map]).unwrap();
            }
            runner.load(&start_state);
            assert_eq!(runner.run().unwrap(), Stop::SystemCall);
            runner.store(told);
        }
        println!("{what}: {:.2} µs", start.elapsed().as_secs_f64() * 1e6 / 20_000.0);
    };
    measure(&mut runner, &mut told, "a system call", false);
    let start = std::time::Instant::now();
    for _ in 0..20_000 {
        state.rip = CODE;
        runner.load(&state);
        runner.store(&mut told);
    }
    println!("registers: {:.2} µs", start.elapsed().as_secs_f64() * 1e6 / 20_000.0);
    let start = std::time::Instant::now();
    for _ in 0..20_000 {
        runner.follow().unwrap();
    }
    println!("there and back: {:.2} µs", start.elapsed().as_secs_f64() * 1e6 / 20_000.0);
    measure(&mut runner, &mut told, "with a change", true);
}

/// The vsyscall page of the host's kernel, which does its calls without a system call.
#[test]
fn vsyscalls_are_not_the_hosts() {
    // mov rax, 0xffffffffff600400 (time); call rax
    let code = [0x48, 0xc7, 0xc0, 0x00, 0x04, 0x60, 0xff, 0x31, 0xff, 0xff, 0xd0];
    let (memory, mut runner, mut state) = started(&code);
    state.gpr[4] = DATA + 2048;
    runner.load(&state);
    let stop = runner.run().unwrap();
    runner.store(&mut state);
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
    runner.change(&[change]).unwrap();
    assert_eq!(runner.run().unwrap(), Stop::Refused);
    assert_eq!(runner.run().unwrap(), Stop::SystemCall, "it goes on");
    // More than the list has room for.
    let many: Vec<_> = (0..300)
        .map(|n| Change::Map { address: 0x7000_0000 + n * 8192, offset: 0, length: 4096, rights: Rights::Read })
        .collect();
    runner.change(&many).unwrap();
    assert!(runner.follow().unwrap());
    // A refusal is told, wherever it comes.
    let all = [&[change][..], &many].concat();
    runner.change(&all).unwrap();
    assert_eq!(runner.run().unwrap(), Stop::Refused);
    assert_eq!(runner.run().unwrap(), Stop::SystemCall, "it goes on");
    runner.clear().unwrap();
    assert_eq!(runner.run().unwrap(), fault(CODE, Access::Fetch));
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
        assert!(runner.watch(&[CODE, CODE + 2, CODE + 4, CODE + 6]).unwrap());
    }
    for n in 0..4 {
        assert_eq!(runner.run().unwrap(), Stop::Instruction);
        runner.store(&mut state);
        assert_eq!(state.rip, CODE + 2 * n);
        state.rip += 2;
        runner.load(&state);
    }
    assert_eq!(runner.run().unwrap(), Stop::SystemCall);
}

/// A host that stops the process at any time, as a shell, a freezer or a suspension does, changes nothing: no stop is told twice.
#[test]
fn a_process_that_is_stopped_and_goes_on() {
    // inc qword [rbx]; syscall; jmp
    let (memory, mut runner, mut state) = started(&[0x48, 0xff, 0x03, 0x0f, 0x05, 0xeb, 0xf9]);
    let pid = runner.pid();
    // SAFETY: our own child.
    let signal = move |signal| assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    let interrupt = move || {
        signal(libc::SIGSTOP);
        while !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") T ") {
            // The other thread may have let it go on.
            signal(libc::SIGSTOP);
        }
        signal(libc::SIGCONT);
    };
    let (quit, quits) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        use std::sync::mpsc::RecvTimeoutError::Timeout;
        while quits.recv_timeout(std::time::Duration::from_millis(3)) == Err(Timeout) {
            signal(libc::SIGSTOP);
            signal(libc::SIGCONT);
        }
    });
    for n in 1..=600 {
        assert_eq!(runner.run().unwrap(), Stop::SystemCall);
        runner.store(&mut state);
        assert_eq!((memory.word(4096), state.rip), (n, CODE + 3));
        match n % 3 {
            0 if n < 300 => interrupt(),
            1 if n % 50 == 1 => assert!(runner.watch(&[CODE + 0x800]).unwrap()),
            _ => {}
        }
        state.rip += 2;
        runner.load(&state);
    }
    drop(quit);
    other.join().unwrap();
}
