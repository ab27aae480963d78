//! `--cpu-share`, `--cpu-limit`, `--memory-limit`: control groups of the VM's own, while it lives and no longer. Hosts that let this user
//! make none are left out (what is said there is tested in the crate `limits`, as is version 2 on a hierarchy in name only).

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Code, Kernel, finish, left_out, run, runtime_dir, tightrope, wait};
use rustix::process::{Pid, Signal, kill_process};

/// A VM in the background, and the control groups that it has.
struct Vm {
    id: String,
    pid: i32,
    groups: Vec<PathBuf>,
}

impl Vm {
    /// `None`: limits cannot be had here.
    fn start(options: &[&str]) -> Option<(Self, Kernel)> {
        let limits = limits::Limits { memory: Some(1 << 40), cpu_limit: "100%".parse().ok(), ..Default::default() };
        if let Err(why) = limits::Groups::make(&limits, &limits::Host::read()) {
            left_out(&why.to_string());
            return None;
        }
        let kernel = Kernel::new(Code::new().print("up").spin());
        let mut command = run(&["--detach", "--net=none", "--kernel", &kernel.path]);
        command.args(options);
        let done = finish(command, b"");
        assert_eq!(done.code(), Some(0), "{done:?}");
        let id = done.out.trim().to_owned();
        let about = fs::read(runtime_dir().join("tightrope").join(&id).join("about.json")).unwrap();
        let about: registry::About = serde_json::from_slice(&about).unwrap();
        Some((Self { id, pid: about.pid as i32, groups: about.cgroups }, kernel))
    }

    fn setting(&self, one: &str, two: &str) -> String {
        let read = |file: &str| self.groups.iter().find_map(|dir| fs::read_to_string(dir.join(file)).ok());
        read(two).or_else(|| read(one)).unwrap().trim().to_owned()
    }

    fn kill(&self) {
        kill_process(Pid::from_raw(self.pid).unwrap(), Signal::KILL).unwrap();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = tightrope(&["stop", "--force", &self.id]).stderr(Stdio::null()).status();
    }
}

/// CPU time of a process so far.
fn cpu_time(pid: i32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

#[test]
fn limits_hold_and_leave_nothing() {
    let Some((vm, _kernel)) = Vm::start(&["--cpu-limit=10%", "--cpu-share=50", "--memory-limit=1G"]) else { return };
    assert!(!vm.groups.is_empty());
    let all = format!("{} {}", vm.setting("cpu.cfs_quota_us", "cpu.max"), vm.setting("cpu.shares", "cpu.weight"));
    assert!(["10000 512", "10000 100000 50"].contains(&all.as_str()), "{all}");
    assert_eq!(vm.setting("memory.limit_in_bytes", "memory.max"), (1u64 << 30).to_string());
    // The guest spins. (Its start is over, and the limit counts whole tenths of a second.)
    let (start, before) = (Instant::now(), cpu_time(vm.pid));
    std::thread::sleep(Duration::from_secs(2));
    let (time, used) = (start.elapsed(), cpu_time(vm.pid) - before);
    assert!(used < time / 5, "{used:?} of {time:?}");
    // All of the VM is in there but the keeper, which is to remove them.
    let inside = vm.setting("cgroup.procs", "cgroup.procs");
    assert!(inside.lines().any(|pid| pid == vm.pid.to_string()), "{inside}");
    vm.kill();
    wait("the groups' end", || vm.groups.iter().all(|dir| !dir.exists()));
}

/// Everything of a VM is killed at once: who comes next cleans up.
#[test]
fn what_nobody_could_remove_is_removed_by_ps() {
    let Some((vm, _kernel)) = Vm::start(&["--cpu-limit=100%"]) else { return };
    let children = |pid: i32| fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let is_keeper =
        |pid: &&str| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"vm-keeper\0"));
    let keeper: i32 = children(vm.pid).split_whitespace().find(is_keeper).unwrap().parse().unwrap();
    kill_process(Pid::from_raw(keeper).unwrap(), Signal::KILL).unwrap();
    vm.kill();
    wait("its end", || !finish(tightrope(&["ps"]), b"").out.contains(&vm.id));
    wait("the groups' end", || {
        finish(tightrope(&["ps"]), b"");
        vm.groups.iter().all(|dir| !dir.exists())
    });
}

#[test]
fn limits_that_cannot_be_are_told_in_one_line() {
    for (options, code, part) in [
        (&["--memory=512M", "--memory-limit=256M"][..], 1, "less than the guest's memory"),
        (&["--cpu-limit=2"], 2, "percentage"),
        (&["--cpu-share=many"], 2, "1 to 10000"),
    ] {
        let kernel = Kernel::new(Code::new().power_off());
        let done = finish(kernel.run(&[&["--net=none"], options].concat()), b"");
        let allowed = !done.err.contains("needs a control group");
        assert!(done.code() == Some(code) && done.err.lines().count() == 1, "{done:?}");
        assert!(!allowed || done.err.contains(part), "{done:?}");
    }
}
