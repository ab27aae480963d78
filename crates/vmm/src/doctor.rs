//! What this host can do for virtual machines, and what would have to change: `tightrope doctor`.
//!
//! Nothing is changed; the only thing run is the probe of KVM.

use std::fmt::Write as _;

use serde::Serialize;

/// How it is with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// VMs run, but not as well as they could.
    Limited,
    /// VMs do not run because of this.
    Bad,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Short name, the same in each version.
    pub name: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to change, where something helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// All that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The engine that `--engine auto` takes here; `None`: no engine runs.
    pub engine: Option<&'static str>,
    /// The worst of all verdicts.
    pub verdict: Verdict,
    /// What KVM offers, where it works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvm: Option<kvm::Capabilities>,
    /// The things looked at.
    pub checks: Vec<Check>,
}

fn check(name: &'static str, verdict: Verdict, found: impl Into<String>, remedy: Option<&str>) -> Check {
    Check { name, verdict, found: found.into(), remedy: remedy.map(str::to_string) }
}

impl Report {
    /// Looks at this host. `more` are the caller's checks.
    pub fn new(more: Vec<Check>) -> Self {
        let (mut checks, capabilities) = kvm_check();
        let bt = bt_check();
        let engine = match (&capabilities, bt.verdict) {
            (Some(_), _) => Some("kvm"),
            (None, Verdict::Good) => Some("bt"),
            _ => None,
        };
        checks.extend([bt, direct_check(), cpu_check(), fsgsbase_check()]);
        checks.extend([memory_check(), overcommit_check(), mappings_check(), threads_check(), huge_pages_check()]);
        checks.extend([landlock_check(), seccomp_check(), namespaces_check()]);
        checks.extend(more);
        let worst = checks.iter().map(|check| check.verdict).max_by_key(|verdict| *verdict as u8);
        let verdict = if engine.is_none() { Verdict::Bad } else { worst.unwrap_or(Verdict::Good) };
        Self { engine, verdict, kvm: capabilities, checks }
    }

    /// Exit code: 0 when VMs run here, 1 when they do not.
    pub fn exit_code(&self) -> i32 {
        i32::from(self.verdict == Verdict::Bad)
    }

    /// For people: a line a check, with its remedy below.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            let mark = match check.verdict {
                Verdict::Good => "good   ",
                Verdict::Limited => "limited",
                Verdict::Bad => "BAD    ",
            };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{mark}  {:<13} {}", check.name, check.found);
            if let Some(remedy) = &check.remedy {
                let _ = writeln!(text, "{:24}to change it: {remedy}", "");
            }
        }
        let _ = match self.engine.filter(|_| self.verdict != Verdict::Bad) {
            Some(engine) => writeln!(text, "Virtual machines run here, by engine {engine}."),
            None => writeln!(text, "Virtual machines do not run here."),
        };
        text
    }

    /// For programs.
    pub fn json(&self) -> String {
        // Plain data always serialises.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

/// What a kernel from Linux 5.18 on has; without it VMs run all the same.
fn kvm_features(c: &kvm::Capabilities) -> Check {
    let all = [
        ("doorbells and interrupts by event counters", c.eventfds),
        ("rings of written pages", c.dirty_ring > 0),
        ("a filter of MSRs", c.msr_filter),
        ("a filter of paravirtual features", c.enforces_pv_features),
        ("an exact TSC offset", c.tsc_offset),
    ];
    let names =
        |there: bool| all.iter().filter(|(_, is)| *is == there).map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let scaling = if c.tsc_scaling { "; the TSC can be scaled" } else { "; the TSC cannot be scaled" };
    match names(false) {
        missing if missing.is_empty() => check("kvm features", Verdict::Good, names(true) + scaling, None),
        missing => {
            let found = format!("KVM lacks {missing}{scaling}");
            check("kvm features", Verdict::Limited, found, Some("a newer kernel (Linux 5.18 has all of it)"))
        }
    }
}

fn kvm_check() -> (Vec<Check>, Option<kvm::Capabilities>) {
    let host = match kvm::Host::open() {
        Ok(host) => host,
        // The message ends with its remedy.
        Err(why) => return (vec![without_kvm(&why)], None),
    };
    let found = kvm::probe::look(&host, false);
    match found.verdict {
        Ok(()) => {
            let c = host.capabilities();
            let took = found.took.map_or(0.0, |took| took.as_secs_f64() * 1000.0);
            let text = format!(
                "a 64-bit test guest ran in {took:.0} ms; up to {} vCPUs a VM (recommended: {}), {} pieces of memory",
                c.max_vcpus, c.recommended_vcpus, c.memory_slots
            );
            let features = kvm_features(c);
            (vec![check("kvm", Verdict::Good, text, None), features], Some(c.clone()))
        }
        Err(why) => (vec![without_kvm(&why)], None),
    }
}

fn without_kvm(why: &kvm::Unusable) -> Check {
    let text = why.to_string();
    match text.rsplit_once(": ") {
        Some((found, remedy)) => check("kvm", Verdict::Limited, found, Some(remedy)),
        None => check("kvm", Verdict::Limited, text, None),
    }
}

fn bt_check() -> Check {
    let missing: Vec<&str> = [
        ("AVX2", std::is_x86_feature_detected!("avx2")),
        ("XSAVE", std::is_x86_feature_detected!("xsave")),
        ("BMI2", std::is_x86_feature_detected!("bmi2")),
    ]
    .iter()
    .filter(|(_, there)| !there)
    .map(|(name, _)| *name)
    .collect();
    if missing.is_empty() {
        check("bt", Verdict::Good, "binary translation runs on this CPU", None)
    } else {
        let found = format!("the CPU has no {}", missing.join(", "));
        check("bt", Verdict::Limited, found, Some("use a machine with a CPU from 2015 or later, or --engine interp"))
    }
}

fn cpu_check() -> Check {
    let level = if std::is_x86_feature_detected!("avx512f") {
        "AVX-512 (not shown to guests)"
    } else if std::is_x86_feature_detected!("avx2") {
        "AVX2"
    } else if std::is_x86_feature_detected!("avx") {
        "AVX"
    } else {
        "SSE only"
    };
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let verdict = if std::is_x86_feature_detected!("avx2") { Verdict::Good } else { Verdict::Limited };
    check("cpu", verdict, format!("{cpus} CPUs for this process, {level}"), None)
}

fn fsgsbase_check() -> Check {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: no preconditions.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0 {
        check("fsgsbase", Verdict::Good, "segment bases are set without system calls", None)
    } else {
        let remedy = "a kernel from 5.9 on, started without nofsgsbase, on a CPU from 2013 on (2017 for AMD)";
        check("fsgsbase", Verdict::Limited, "segment bases need system calls: engine bt is slower", Some(remedy))
    }
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_string())
}

/// A line `name: value kB` of /proc/meminfo, in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The least limit of a control group that this process is in: in the file `two` of version 2, or the file `one` of version 1's hierarchy
/// `controller`. `groups` is `/proc/self/cgroup`.
fn cgroup_limit(groups: &str, controller: &str, two: &str, one: &str) -> Option<u64> {
    let files = groups.lines().filter_map(|line| {
        let (controllers, group) = line.split_once(':')?.1.split_once(':')?;
        let (hierarchy, file) = match controllers {
            "" => (String::new(), two),
            _ if controllers.split(',').any(|one| one == controller) => (format!("/{controller}"), one),
            _ => return None,
        };
        // Limits of outer groups count as well.
        let groups = std::path::Path::new(group).ancestors();
        Some(groups.map(move |group| format!("/sys/fs/cgroup{hierarchy}{}/{file}", group.display())))
    });
    // A file that has the word `max` has no limit.
    files.flatten().filter_map(|file| read(&file)?.parse().ok()).min()
}

/// The same for this process.
fn own_cgroup_limit(controller: &str, two: &str, one: &str) -> Option<u64> {
    cgroup_limit(&read("/proc/self/cgroup")?, controller, two, one)
}

fn memory_check() -> Check {
    let text = read("/proc/meminfo").unwrap_or_default();
    let available = meminfo(&text, "MemAvailable").unwrap_or_default();
    let (usable, limit) = match own_cgroup_limit("memory", "memory.max", "memory.limit_in_bytes") {
        Some(limit) if limit < available => (limit, ", limited by the control group"),
        _ => (available, ""),
    };
    let found = format!("{} MiB available{limit}", usable >> 20);
    if usable >= crate::DEFAULT_MEMORY + (256 << 20) {
        check("memory", Verdict::Good, found, None)
    } else {
        let remedy = "give guests less (--memory 256M), or free some";
        check("memory", Verdict::Limited, found, Some(remedy))
    }
}

fn limit(resource: libc::__rlimit_resource_t) -> Option<u64> {
    let mut value = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `value` is a valid place for the result.
    let known = unsafe { libc::getrlimit(resource, &mut value) } == 0;
    (known && value.rlim_cur != libc::RLIM_INFINITY).then_some(value.rlim_cur)
}

fn overcommit_check() -> Check {
    if let Some(bytes) = limit(libc::RLIMIT_AS) {
        let found = format!("this process may map {} MiB of addresses", bytes >> 20);
        let enough = bytes >= crate::DEFAULT_MEMORY + (2 << 30);
        let verdict = if enough { Verdict::Good } else { Verdict::Limited };
        return check("addresses", verdict, found, (!enough).then_some("raise it (ulimit -v unlimited)"));
    }
    match read("/proc/sys/vm/overcommit_memory").as_deref() {
        Some("2") => check(
            "addresses",
            Verdict::Limited,
            "the kernel promises no memory beyond what it has (vm.overcommit_memory=2)",
            Some("sysctl vm.overcommit_memory=0, or smaller guests"),
        ),
        _ => check("addresses", Verdict::Good, "guest memory is taken from the host as the guest touches it", None),
    }
}

fn mappings_check() -> Check {
    let count: u64 = read("/proc/sys/vm/max_map_count").and_then(|text| text.parse().ok()).unwrap_or_default();
    if count >= 65_530 {
        check("mappings", Verdict::Good, format!("{count} mappings a process"), None)
    } else {
        check(
            "mappings",
            Verdict::Limited,
            format!("{count} mappings a process"),
            Some("sysctl vm.max_map_count=65530"),
        )
    }
}

fn threads_check() -> Check {
    let processes = limit(libc::RLIMIT_NPROC);
    let pids = own_cgroup_limit("pids", "pids.max", "pids.max");
    match processes.into_iter().chain(pids).min() {
        Some(count) if count < 64 => check(
            "threads",
            Verdict::Limited,
            format!("{count} processes and threads"),
            Some("raise it (ulimit -u, pids.max of the control group)"),
        ),
        Some(count) => check("threads", Verdict::Good, format!("{count} processes and threads"), None),
        None => check("threads", Verdict::Good, "no limit", None),
    }
}

fn huge_pages_check() -> Check {
    let text = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = text.split(['[', ']']).nth(1).unwrap_or("none");
    match chosen {
        "always" | "madvise" => check("huge pages", Verdict::Good, format!("transparent huge pages: {chosen}"), None),
        _ => check(
            "huge pages",
            Verdict::Limited,
            format!("transparent huge pages: {chosen}"),
            Some("echo madvise >/sys/kernel/mm/transparent_hugepage/enabled"),
        ),
    }
}

/// Can guest programs run as they are (`docs/bt.md`, direct execution)?
fn direct_check() -> Check {
    let ram = memory::GuestRam::shareable(memory::layout::MIN_RAM).map_err(|error| error.to_string());
    let started = ram.and_then(|ram| {
        let file = ram.file().ok_or("guest memory is no file")?;
        runner::Runner::start(file).map(drop)
    });
    match started {
        Ok(()) => check("direct", Verdict::Good, "programs that compute run as they are on the CPU under bt", None),
        Err(why) => check(
            "direct",
            Verdict::Limited,
            format!("all programs are translated under bt: {why}"),
            Some("Linux 5.0 or later, and a container that allows seccomp(2) with a listener"),
        ),
    }
}

fn landlock_check() -> Check {
    const VERSION: u32 = 1;
    // SAFETY: asks for the version; no pointers are passed.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION) };
    if abi > 0 {
        check("landlock", Verdict::Good, format!("version {abi}: the monitor gives up all access to files"), None)
    } else {
        let remedy = "a kernel from 5.13 on with lsm=landlock,… on its command line";
        check("landlock", Verdict::Limited, "not there: the monitor is confined by seccomp alone", Some(remedy))
    }
}

fn seccomp_check() -> Check {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: asks whether there is this action, which is valid during the call; nothing is changed.
    let asked = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if asked == 0 {
        return check("seccomp", Verdict::Good, "the monitor gives up all system calls it does not need", None);
    }
    let why = std::io::Error::last_os_error();
    let remedy = "a kernel from 4.14 on with CONFIG_SECCOMP_FILTER, and a container that allows seccomp(2)";
    check(
        "seccomp",
        Verdict::Bad,
        format!("no filters can be set: {}", agent_protocol::without_numbers(&why.to_string())),
        Some(remedy),
    )
}

fn namespaces_check() -> Check {
    let most: u64 = read("/proc/sys/user/max_user_namespaces").and_then(|text| text.parse().ok()).unwrap_or_default();
    let forbidden = read("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0")
        || read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1");
    // SAFETY: no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    if most > 0 && (root || !forbidden) {
        check("namespaces", Verdict::Good, "user namespaces can be made", None)
    } else {
        // Nothing of a VM needs them so far.
        check("namespaces", Verdict::Good, "user namespaces cannot be made here; nothing needs them", None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host() {
        let extra = check("mine", Verdict::Limited, "found", Some("remedy"));
        let report = Report::new(vec![extra]);
        let text = report.text();
        assert!(text.contains("mine") && text.contains("to change it: remedy"), "{text}");
        assert_eq!(report.exit_code() == 0, report.engine.is_some() && report.verdict != Verdict::Bad);
        assert_ne!(report.verdict, Verdict::Good);
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["checks"].as_array().unwrap().len(), report.checks.len());
        for check in &report.checks {
            assert!(!check.found.is_empty() && !check.found.contains('\n'), "{check:?}");
        }
    }

    #[test]
    fn direct_is_what_a_vm_finds() {
        let ram = memory::GuestRam::shareable(256 << 20).unwrap();
        let started = runner::Runner::start(ram.file().unwrap());
        let check = direct_check();
        assert_eq!(check.verdict == Verdict::Good, started.is_ok(), "{}", check.found);
    }

    #[test]
    fn features_that_are_missing_are_named() {
        let mut c = kvm::Capabilities { eventfds: true, dirty_ring: 65536, msr_filter: true, ..Default::default() };
        let check = kvm_features(&c);
        assert_eq!(check.verdict, Verdict::Limited);
        assert!(
            check.found.contains("lacks a filter of paravirtual") && !check.found.contains("MSRs"),
            "{}",
            check.found
        );
        (c.enforces_pv_features, c.tsc_offset) = (true, true);
        assert_eq!(kvm_features(&c).verdict, Verdict::Good);
    }

    /// Whatever this host has: the hierarchy's root has no limit, and a group that does not exist none either.
    #[test]
    fn limits_of_control_groups() {
        for groups in ["0::/no-such/group", "4:cpu,memory:/no-such/group\n0::/", "nonsense", "1:cpu:/x"] {
            let limit = cgroup_limit(groups, "memory", "memory.max", "memory.limit_in_bytes");
            assert!(limit.is_none_or(|limit| limit > 1 << 20), "{groups}: {limit:?}");
        }
    }

    #[test]
    fn memory_lines() {
        let text = "MemTotal:       24 kB\nMemAvailable:   12 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(12 << 10));
        assert_eq!(meminfo(text, "Mem"), None);
    }

    #[test]
    fn remedies_are_told_apart() {
        let why = kvm::Unusable::Missing { remedy: "load it".into() };
        let check = without_kvm(&why);
        assert_eq!((check.found.as_str(), check.remedy.as_deref()), ("there is no /dev/kvm", Some("load it")));
    }
}
