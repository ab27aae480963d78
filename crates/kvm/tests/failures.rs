//! What is said when the kernel refuses something. The refusals are real: in a process of its own, a seccomp filter makes the one
//! request fail, or answer "no", before it reaches KVM; everything else goes through.
//!
//! Needs a `/dev/kvm` that opens (it need not run guests); without one it says so. `TIGHTROPE_TEST_ENGINE=kvm` makes that a failure.

use std::process::Command;

use cpu::cpuid::CpuidModel;
use cpu::{Engine, Nothing};
use kvm::{Host, KvmEngine, Options, Unusable};
use memory::GuestRam;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, TargetArch,
};

const CASE: &str = "TIGHTROPE_TEST_CASE";

/// Requests to KVM (the KVM API).
mod request {
    pub const GET_API_VERSION: u64 = 0xae00;
    pub const CREATE_VM: u64 = 0xae01;
    pub const CHECK_EXTENSION: u64 = 0xae03;
    pub const CREATE_VCPU: u64 = 0xae41;
    pub const RUN: u64 = 0xae80;
    pub const CREATE_IRQCHIP: u64 = 0xae60;
    pub const SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    pub const ENABLE_CAP: u64 = 0x4068_aea3;
    pub const GET_SUPPORTED_CPUID: u64 = 0xc008_ae05;
}

/// From now on `call` with these arguments (by index) fails with `errno` in this process; with 0 it answers 0.
fn fail(call: i64, arguments: &[(u8, u64)], errno: i32) {
    let conditions = arguments.iter().map(|&(index, value)| Condition::new(index, Len::Dword, Op::Eq, value).unwrap());
    let rules = match arguments {
        [] => vec![],
        _ => vec![Rule::new(conditions.collect()).unwrap()],
    };
    let action = SeccompAction::Errno(errno as u32);
    let filter = SeccompFilter::new([(call, rules)].into(), SeccompAction::Allow, action, TargetArch::x86_64).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

fn fail_request(request: u64, errno: i32) {
    fail(libc::SYS_ioctl, &[(1, request)], errno);
}

/// The host has no such capability, or the number 0 of it.
fn lacks(capability: u64) {
    fail(libc::SYS_ioctl, &[(1, request::CHECK_EXTENSION), (2, capability)], 0);
}

fn open() -> Result<Host, String> {
    Host::open().map_err(|why| why.to_string())
}

fn start(host: &Host, cpus: u32) -> Result<(), String> {
    let ram = GuestRam::new(64 << 20).map_err(|why| why.to_string())?;
    let engine = KvmEngine::new(host, ram, Options::new(CpuidModel::new(cpus, 1_000_000)))?;
    for index in 0..cpus {
        let setup = cpu::VcpuSetup { index, ..Nothing::setup() };
        engine.create_vcpu(setup)?;
    }
    Ok(())
}

/// A name, what is to be said, and how it comes to that.
type Case = (&'static str, &'static [&'static str], fn() -> Result<(), String>);

const CASES: [Case; 16] = [
    ("no permission", &["this user may not open it", "usermod -aG", "udev"], || {
        fail(libc::SYS_openat, &[], libc::EACCES);
        open().map(drop)
    }),
    ("no permission in a container", &["this user may not open it", "docker run --device /dev/kvm"], || {
        fail(libc::SYS_openat, &[], libc::EPERM);
        open().map(drop)
    }),
    ("no device", &["there is no /dev/kvm: "], || {
        fail(libc::SYS_openat, &[], libc::ENOENT);
        open().map(drop)
    }),
    ("no module behind the device", &["cannot be opened", "modprobe kvm_intel or kvm_amd"], || {
        fail(libc::SYS_openat, &[], libc::ENODEV);
        open().map(drop)
    }),
    ("another API", &["API version 12 (it says 0)", "Linux 5.10"], || {
        fail_request(request::GET_API_VERSION, 0);
        open().map(drop)
    }),
    ("no interrupt chips", &["KVM_CAP_IRQCHIP", "Linux 5.10"], || {
        lacks(0);
        open().map(drop)
    }),
    ("no immediate exit", &["KVM_CAP_IMMEDIATE_EXIT", "Linux 5.10"], || {
        lacks(136);
        open().map(drop)
    }),
    ("busy", &["another hypervisor holds the CPU's virtualization", "VirtualBox"], || {
        let host = open()?;
        fail_request(request::CREATE_VM, libc::EBUSY);
        start(&host, 1)
    }),
    ("module unloaded after the probe", &["makes no virtual machine", "modprobe"], || {
        let host = open()?;
        fail_request(request::CREATE_VM, libc::ENODEV);
        start(&host, 1)
    }),
    ("too many vCPUs", &["at most 4 vCPUs", "--cpus"], || {
        // KVM_CAP_NR_VCPUS, KVM_CAP_MAX_VCPUS: then it is four, says the KVM API.
        lacks(9);
        lacks(66);
        start(&open()?, 5)
    }),
    ("no memory", &["the guest's memory", "--memory"], || {
        let host = open()?;
        fail_request(request::SET_USER_MEMORY_REGION, libc::ENOMEM);
        start(&host, 1)
    }),
    ("chips taken away", &["interrupt chips", "could do it a moment ago"], || {
        let host = open()?;
        fail_request(request::CREATE_IRQCHIP, libc::ENOTTY);
        start(&host, 1)
    }),
    ("filter taken away", &["the filter of MSRs", "could do it a moment ago"], || {
        let host = open()?;
        fail_request(request::ENABLE_CAP, libc::EINVAL);
        start(&host, 1)
    }),
    ("no files left", &["a vCPU", "ulimit -n"], || {
        let host = open()?;
        fail_request(request::CREATE_VCPU, libc::EMFILE);
        start(&host, 1)
    }),
    ("forbidden by a policy", &["a vCPU", "security policy"], || {
        let host = open()?;
        fail_request(request::CREATE_VCPU, libc::EPERM);
        start(&host, 1)
    }),
    ("CPUID taken away", &["its CPUID", "could do it a moment ago"], || {
        let host = open()?;
        fail_request(request::GET_SUPPORTED_CPUID, libc::EINVAL);
        start(&host, 1)
    }),
];

/// What makes a monitor that has confined itself find that KVM does not do what it was found to do; the answer kept before is doubted.
fn unlearn(break_it: fn(), use_it: fn(&Host) -> Result<(), String>) -> String {
    let host = kvm::probe::usable().unwrap();
    assert_eq!(kvm::probe::look(&host, true).took, None, "the answer is kept");
    for call in [libc::SYS_unlink, libc::SYS_unlinkat, libc::SYS_rename, libc::SYS_ftruncate] {
        fail(call, &[], libc::EACCES);
    }
    break_it();
    let why = use_it(&host).unwrap_err();
    assert!(kvm::probe::look(&host, true).took.is_some(), "the answer is still believed after: {why}");
    why
}

/// Not a test by itself: each in a process of its own, which [`what_was_found_is_forgotten_when_it_proves_wrong`] starts.
#[test]
fn one_lesson() {
    let said = match std::env::var(CASE).as_deref() {
        Ok("lesson vm") => unlearn(|| fail_request(request::CREATE_IRQCHIP, libc::ENOTTY), |host| start(host, 1)),
        Ok("lesson vcpu") => unlearn(|| fail_request(request::CREATE_VCPU, libc::EINVAL), |host| start(host, 1)),
        Ok("lesson run") => unlearn(
            || (),
            |host| {
                let ram = GuestRam::new(64 << 20).unwrap();
                let engine = KvmEngine::new(host, ram, Options::new(CpuidModel::new(1, 1_000_000))).unwrap();
                let mut vcpu = engine.create_vcpu(Nothing::setup()).unwrap();
                fail_request(request::RUN, libc::EIO);
                match vcpu.run() {
                    cpu::Exit::Internal(why) => Err(why),
                    _ => Ok(()),
                }
            },
        ),
        _ => return,
    };
    println!("said: {said}");
}

#[test]
fn what_was_found_is_forgotten_when_it_proves_wrong() {
    if let Err(why) = kvm::probe::usable() {
        assert!(std::env::var("TIGHTROPE_TEST_ENGINE").as_deref() != Ok("kvm"), "{why}");
        eprintln!("NOT TESTED: {why}");
        return;
    }
    let cache = std::env::temp_dir().join(format!("kvm-lessons-{}", std::process::id()));
    for lesson in ["lesson vm", "lesson vcpu", "lesson run"] {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "one_lesson", "--nocapture", "--test-threads=1"]).env(CASE, lesson);
        let output = child.env("XDG_CACHE_HOME", &cache).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success() && text.contains("said: "), "{lesson}: {text}");
        println!("{lesson}: {}", text.lines().find(|line| line.contains("said: ")).unwrap_or_default());
    }
    std::fs::remove_dir_all(&cache).unwrap();
}

/// Not a test by itself: what [`each_is_one_clear_line`] runs in processes of their own.
#[test]
fn one_case() {
    let Ok(name) = std::env::var(CASE) else { return };
    let (_, _, run) = CASES.iter().find(|(known, ..)| *known == name).expect("a case");
    match run() {
        Ok(()) => println!("said: nothing"),
        Err(why) => println!("said: {why}"),
    }
}

#[test]
fn each_is_one_clear_line() {
    if let Err(why) = Host::open() {
        assert!(std::env::var("TIGHTROPE_TEST_ENGINE").as_deref() != Ok("kvm"), "{why}");
        eprintln!("NOT TESTED: {why}");
        return;
    }
    // Without a filter all of it works, where a VM can be made at all.
    let can_start = Host::open().is_ok_and(|host| start(&host, 1).is_ok());
    for (name, parts, _) in CASES {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "one_case", "--nocapture", "--test-threads=1"]).env(CASE, name);
        let output = child.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // Behind it comes the test's own "ok".
        let said = text.split_once("said: ").and_then(|(_, rest)| rest.split_once("\nok\n"));
        let (said, _) = said.unwrap_or_else(|| panic!("{name}: {text}"));
        println!("{name}: {said}");
        if !can_start
            && said.contains("makes no virtual machine")
            && !parts.iter().any(|part| part.contains("makes no"))
        {
            continue;
        }
        let found = parts.iter().filter(|part| said.contains(*part)).count();
        // Of the remedies for permission, either one fits.
        let wanted = if name == "no permission" { 2 } else { parts.len() };
        assert!(found >= wanted, "{name}: {said}");
        assert!(!said.contains('\n'), "{name}: {text}");
    }
}

/// On CPUs with no more than 40 address bits, as that of the nested tests.
#[test]
fn more_memory_than_guests_can_address() {
    let bits = std::arch::x86_64::__cpuid(0x8000_0008).eax & 0xff;
    if bits > 40 || kvm::probe::usable().is_err() {
        eprintln!("NOT TESTED: this CPU has {bits} address bits, or no KVM");
        return;
    }
    let ram = GuestRam::new(memory::layout::MAX_RAM).unwrap();
    let engine = KvmEngine::new(&Host::open().unwrap(), ram, Options::new(CpuidModel::new(1, 1_000_000)));
    let why = engine.err().unwrap();
    assert!(why.contains(&format!("{bits} address bits")) && why.contains("--memory") && !why.contains('\n'), "{why}");
}

#[test]
fn told_apart() {
    let error = Host::open_at(std::path::Path::new("/dev/null")).err().unwrap();
    assert!(matches!(error, Unusable::Open(_)), "{error}");
}
