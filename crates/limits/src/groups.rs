//! Control groups of a VM's own, made by hand.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::Access;

use crate::{Error, Limits, Place, Version};

/// What our groups are called; the process and a number follow.
const PREFIX: &str = "tightrope-";

/// The host's control groups as the calling process sees them.
#[derive(Clone, Debug)]
pub struct Host {
    /// `/proc/self/cgroup`
    groups: String,
    /// `/proc/self/mountinfo`
    mounts: String,
}

impl Host {
    /// The real one.
    pub fn read() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self { groups: read("/proc/self/cgroup"), mounts: read("/proc/self/mountinfo") }
    }

    /// Another one: the texts of the two files.
    pub fn of(groups: &str, mounts: &str) -> Self {
        Self { groups: groups.to_owned(), mounts: mounts.to_owned() }
    }

    /// Where the calling process stands in the hierarchy that has this controller; version 2, if none of version 1 has it.
    pub(crate) fn place(&self, controller: &str) -> Option<Place> {
        self.place_in(Some(controller)).or_else(|| self.place_in(None))
    }

    /// In the hierarchy of version 1 that has `controller`, or in that of version 2.
    fn place_in(&self, controller: Option<&str>) -> Option<Place> {
        let path = self.groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let fits = match controller {
                Some(name) => controllers.split(',').any(|one| one == name),
                None => controllers.is_empty(),
            };
            fits.then_some(path)
        })?;
        self.mounts.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            let (kind, options) = (right.next()?, right.nth(1)?);
            let version = match (kind, controller) {
                ("cgroup", Some(name)) if options.split(',').any(|one| one == name) => Version::One,
                ("cgroup2", None) => Version::Two,
                _ => return None,
            };
            let mut left = left.split(' ').skip(3);
            let (root, mounted) = (left.next()?, PathBuf::from(unescape(left.next()?)));
            // A path outside of what is mounted (`/../x`, in a namespace) is out of reach.
            let below = Path::new(path).strip_prefix(unescape(root)).ok()?;
            let plain = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
            plain.then(|| Place { version, group: mounted.join(below), mounted })
        })
    }
}

/// Paths in this file have `\040` for a space, and the like.
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(u8::is_ascii);
        match code {
            Some(code) => {
                out.push(code.into());
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out + rest
}

/// The groups of one VM. Dropped, they are removed, unless somebody is in them; so the VM's own process, which is, leaves that to others.
#[derive(Debug)]
pub struct Groups {
    dirs: Vec<PathBuf>,
}

impl Groups {
    /// Makes groups with these limits. Nobody is in them yet.
    ///
    /// # Errors
    /// [`Error::NoGroup`]: the host has no control groups, or this user may make none.
    pub fn make(limits: &Limits, host: &Host) -> Result<Self, Error> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("{PREFIX}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut groups = Self { dirs: Vec::new() };
        let mut by_place: Vec<(Place, Vec<&'static str>)> = Vec::new();
        for controller in limits.controllers() {
            let no = |why: &str| Error::NoGroup(limits.option(controller), why.to_owned());
            let place = host.place(controller).ok_or_else(|| no("the host has none"))?;
            match by_place.iter_mut().find(|(other, _)| *other == place) {
                Some((_, controllers)) => controllers.push(controller),
                None => by_place.push((place, vec![controller])),
            }
        }
        for (place, controllers) in by_place {
            let option = limits.option(controllers.first().copied().unwrap_or_default());
            let no = |why: String| Error::NoGroup(option, why);
            let parent = place.parent(&controllers).map_err(no)?;
            sweep(&parent);
            let dir = parent.join(&name);
            let cannot = |path: &Path, error: io::Error| no(format!("{}: {}", path.display(), reason(&error)));
            fs::create_dir(&dir).map_err(|error| cannot(&dir, error))?;
            groups.dirs.push(dir.clone());
            for (file, text) in controllers.iter().flat_map(|name| limits.settings(name, place.version)) {
                let path = dir.join(file);
                fs::write(&path, text).map_err(|error| cannot(&path, error))?;
            }
        }
        Ok(groups)
    }

    /// Their directories: to be removed when the VM's processes have ended.
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Puts the calling process into them, with all its threads and the processes that it will start. It stays there to its end.
    ///
    /// # Errors
    /// [`Error::NoGroup`]
    pub fn join(self) -> Result<(), Error> {
        for dir in &self.dirs {
            let path = dir.join("cgroup.procs");
            fs::write(&path, std::process::id().to_string())
                .map_err(|error| Error::NoGroup("a limit", format!("{}: {}", path.display(), reason(&error))))?;
        }
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for dir in &self.dirs {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Removes groups of VMs of which everything was killed before anybody knew of them.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
            // One that has processes cannot be removed.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// An error of the system without its number.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

impl Place {
    /// The group below which one of our own can be made.
    fn parent(&self, controllers: &[&str]) -> Result<PathBuf, String> {
        if self.version == Version::One {
            return Ok(self.group.clone());
        }
        // A group that has processes can have no controllers below it, so the one that this process is in is rarely the one. Who is in
        // another's group may leave it only if both are below one where it may write `cgroup.procs`.
        let mut why = String::new();
        for parent in self.group.ancestors().take_while(|dir| dir.starts_with(&self.mounted)) {
            let procs = parent.join("cgroup.procs");
            let result = rustix::fs::access(&procs, Access::WRITE_OK)
                .map_err(|error| format!("{}: {}", procs.display(), reason(&error.into())))
                .and_then(|()| enable(parent, controllers));
            match result {
                Ok(()) => return Ok(parent.to_owned()),
                Err(error) if why.is_empty() => why = error,
                Err(_) => {}
            }
        }
        Err(why)
    }
}

/// Switches controllers on for the groups below `parent`.
fn enable(parent: &Path, controllers: &[&str]) -> Result<(), String> {
    let file = parent.join("cgroup.subtree_control");
    let cannot = |error: io::Error| format!("{}: {}", file.display(), reason(&error));
    let on = fs::read_to_string(&file).map_err(cannot)?;
    let missing: Vec<_> = controllers.iter().filter(|name| !on.split_whitespace().any(|one| one == **name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let there = fs::read_to_string(parent.join("cgroup.controllers")).map_err(cannot)?;
    if let Some(name) = missing.iter().find(|name| !there.split_whitespace().any(|one| one == ***name)) {
        return Err(format!("{} has no controller '{name}'", parent.display()));
    }
    let text = missing.iter().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ");
    fs::write(&file, text).map_err(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuLimit, CpuShare};

    const ALL: Limits = Limits { cpu_share: Some(CpuShare(200)), cpu_limit: Some(CpuLimit(50)), memory: Some(4096) };

    /// A hierarchy of version 2 that is one in name only.
    fn two(dir: &Path, own: &str) -> Host {
        let mounts = format!("30 23 0:26 / {} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n", dir.display());
        Host::of(&format!("0::{own}\n"), &mounts)
    }

    fn group(dir: &Path, controllers: &str, on: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("cgroup.controllers"), controllers).unwrap();
        fs::write(dir.join("cgroup.subtree_control"), on).unwrap();
        fs::write(dir.join("cgroup.procs"), "").unwrap();
    }

    fn empty(dir: &Path) {
        for file in fs::read_dir(dir).unwrap() {
            fs::remove_file(file.unwrap().path()).unwrap();
        }
    }

    #[test]
    fn places_are_found() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      35 31 0:32 /docker/ab /sys/fs/cgroup/me\\040mory rw - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw master:4 - cgroup2 cgroup2 rw\n";
        let host = Host::of("4:memory:/docker/ab/x\n1:cpu,cpuacct:/\n0::/u\n", mounts);
        let cpu = host.place("cpu").unwrap();
        assert_eq!((cpu.version, cpu.group.to_str()), (Version::One, Some("/sys/fs/cgroup/cpu,cpuacct/")));
        let memory = host.place("memory").unwrap();
        assert_eq!((memory.version, memory.group.to_str()), (Version::One, Some("/sys/fs/cgroup/me mory/x")));
        let other = host.place("pids").unwrap();
        assert_eq!((other.version, other.group.to_str()), (Version::Two, Some("/sys/fs/cgroup/unified/u")));
        let outside = Host::of("4:memory:/elsewhere\n", mounts);
        assert_eq!(outside.place("memory"), None);
        assert_eq!(Host::of("0::/../x\n", mounts).place("cpu"), None);
        assert_eq!(Host::of("", "nonsense - x\n\n").place("cpu"), None);
    }

    #[test]
    fn version_two_takes_the_nearest_group_that_can() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        group(root, "cpu memory pids", "cpu memory pids");
        group(&root.join("user"), "cpu memory", "memory");
        group(&root.join("user/shell"), "", "");
        let host = two(root, "/user/shell");
        let groups = Groups::make(&ALL, &host).unwrap();
        let [own] = groups.dirs() else { panic!("{groups:?}") };
        let own = own.clone();
        assert_eq!(own.parent(), Some(&*root.join("user")));
        assert_eq!(fs::read_to_string(root.join("user/cgroup.subtree_control")).unwrap(), "+cpu");
        let read = |file: &str| fs::read_to_string(own.join(file)).unwrap();
        assert_eq!(
            (read("cpu.weight"), read("cpu.max"), read("memory.max")),
            ("200".into(), "50000 100000".into(), "4096".into())
        );
        // Not joined, they go. (A real one is a directory that can be removed as it is.)
        empty(&own);
        drop(groups);
        assert!(!own.exists());
        let groups = Groups::make(&Limits { memory: Some(1), ..Limits::default() }, &host).unwrap();
        let own = groups.dirs()[0].clone();
        assert!(!own.join("cpu.max").exists());
        groups.join().unwrap();
        assert_eq!(fs::read_to_string(own.join("cgroup.procs")).unwrap(), std::process::id().to_string());
        assert!(own.exists());
        // One of a process that is no more goes with the next attempt (process numbers end at 4194304).
        let [left, used] = [5_000_000, 5_000_001].map(|process| root.join(format!("user/{PREFIX}{process}-0")));
        fs::create_dir(&left).unwrap();
        fs::create_dir_all(used.join("somebody")).unwrap();
        drop(Groups::make(&ALL, &host).unwrap());
        assert!(!left.exists() && used.exists() && own.exists());
    }

    #[test]
    fn what_is_not_allowed_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        group(root, "memory", "memory");
        group(&root.join("a"), "", "");
        let limits = Limits { cpu_limit: Some(CpuLimit(10)), ..Limits::default() };
        let fails = |host: &Host, limits: &Limits, parts: &[&str]| {
            let error = Groups::make(limits, host).unwrap_err().to_string();
            assert!(!error.contains('\n') && parts.iter().all(|part| error.contains(part)), "{error}");
        };
        fails(&two(root, "/a"), &limits, &["--cpu-limit", "no controller 'cpu'", "as root"]);
        fails(&Host::of("", ""), &ALL, &["--cpu-limit", "has none"]);
        fails(&Host::of("0::/\n", ""), &Limits { memory: Some(9), ..Limits::default() }, &["--memory-limit"]);
        // The kernel refuses (here: it is a directory).
        fs::remove_file(root.join("cgroup.subtree_control")).unwrap();
        fs::create_dir(root.join("cgroup.subtree_control")).unwrap();
        fails(&two(root, "/"), &ALL, &["cgroup.subtree_control"]);
        // Nothing is left behind by an attempt that failed half way.
        let mounts = format!(
            "1 1 0:1 / {0}/cpu rw - cgroup cgroup rw,cpu\n1 1 0:1 / {0}/none rw - cgroup cgroup rw,memory\n",
            root.display()
        );
        fs::create_dir(root.join("cpu")).unwrap();
        let host = Host::of("1:cpu:/\n2:memory:/\n", &mounts);
        let limits = Limits { memory: Some(1), ..Limits::default() };
        fails(&host, &limits, &["--memory-limit", "none"]);
        assert_eq!(fs::read_dir(root.join("cpu")).unwrap().count(), 0);
    }
}
