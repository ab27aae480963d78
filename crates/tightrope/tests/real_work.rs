//! Real work in guests, checked: docs/real-work.md says what was shown. All of it is long and needs a Debian mirror, so it runs only when
//! asked for: `cargo test -p tightrope --test real_work -- --ignored --nocapture --test-threads 1`, or one test by its name.
//! Images are made in the user's store and stay there.

mod common;

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Code, Kernel, Session, engine, finish, tightrope, wait};
use rustix::process::{Pid, Signal, kill_process_group};

/// Who has not answered by then does not: a busy machine takes minutes to install a large package.
const PATIENCE: Duration = Duration::from_secs(1800);

/// A Debian at its prompt.
struct Guest {
    session: Session,
    commands: u32,
}

impl Guest {
    /// Boots an image (made first if it is not there).
    fn boot(image: &str, args: &[&str]) -> Self {
        let mut command = tightrope(&["run", "--engine", &engine(), image]);
        command.args(args);
        command.args(std::env::var("TIGHTROPE_TEST_OPTIONS").unwrap_or_default().split_whitespace());
        if let Ok(mirror) = std::env::var("TIGHTROPE_MIRROR") {
            command.env("TIGHTROPE_MIRROR", mirror);
        }
        let mut session = Session::start(command);
        let started = Instant::now();
        session.expect_within("root@debian:~# ", PATIENCE);
        eprintln!("{image}: prompt after {:.1} s", started.elapsed().as_secs_f64());
        Self { session, commands: 0 }
    }

    /// Runs a command, which must succeed.
    fn run(&mut self, command: &str) {
        self.commands += 1;
        let started = Instant::now();
        // The sign of the end is not what was typed.
        let mark = format!("end-{}", self.commands);
        self.session.send(
            format!(
                "( {command} ) </dev/null && echo end\"-\"{} ok || echo end\"-\"{} failed\n",
                self.commands, self.commands
            )
            .as_bytes(),
        );
        self.session.expect_within(&format!("{mark} "), PATIENCE);
        let well = self.session.expect_one_of(&["ok", "failed"], PATIENCE) == 0;
        eprintln!("{:7.1} s  {command}", started.elapsed().as_secs_f64());
        assert!(well, "{command} failed: {}", self.session.seen());
    }

    /// Installs packages from the mirror, through the NAT.
    fn install(&mut self, packages: &str) {
        self.run("apt-get -q update >/tmp/log 2>&1 || { cat /tmp/log; false; }");
        self.run(&format!(
            "DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends {packages} >/tmp/log 2>&1 || {{ tail -50 /tmp/log; false; }}"
        ));
    }

    fn power_off(mut self) {
        self.session.send(b"poweroff\n");
        let done = self.session.finish();
        assert_eq!(done.code(), Some(0), "{}", done.err);
    }
}

/// A program of the host's that is ended with the test, and all that it started: it is the first of its process group.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Runs a program of the host's, which must succeed; returns what it prints.
fn host(program: &str, args: &[&str], dir: &Path) -> String {
    let done = Command::new(program).args(args).current_dir(dir).stdin(Stdio::null()).output();
    let done = done.unwrap_or_else(|e| panic!("{program}: {e}; it is needed on the host"));
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

const NO_FAILED_UNIT: &str = "systemctl is-system-running --wait && test -z \"$(systemctl --failed --no-legend)\"";

#[test]
#[ignore = "long, needs a mirror"]
fn systemd_boots_with_no_failed_unit() {
    for image in ["debian:12", "debian:13"] {
        let mut guest = Guest::boot(image, &[]);
        guest.run(NO_FAILED_UNIT);
        guest.run("test -z \"$(dpkg --audit)\" && apt-get -q check");
        guest.power_off();
    }
}

#[test]
#[ignore = "long, needs a mirror"]
fn servers_are_installed_and_serve() {
    let mut guest = Guest::boot("debian:13", &["--memory=2G"]);
    guest.install("nginx redis-server postgresql curl");
    guest.run("systemctl is-active nginx redis-server postgresql");
    guest.run("curl -sS http://localhost/ | grep -i 'welcome to nginx'");
    guest.run("test \"$(redis-cli set a 42)\" = OK && test \"$(redis-cli get a)\" = 42");
    let query = "create table t as select generate_series(1,1000) n; select sum(n) from t";
    guest.run(&format!("cd / && su postgres -c \"psql -Atc '{query}'\" | grep -x 500500"));
    guest.run("systemctl restart nginx redis-server postgresql && sleep 1 && test \"$(redis-cli get a)\" = 42");
    guest.run(NO_FAILED_UNIT);
    guest.power_off();
}

/// `tightrope run debian -- …`, where the agent is process 1: the network is there when the command starts, shared directories are below
/// `/tmp`, and what was kept is whole afterwards. The same directory below a `/tmp` that systemd looks after.
#[test]
#[ignore = "long, needs a mirror"]
fn commands_in_a_whole_system() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text"), "from the host\n").unwrap();
    let share = format!("{}:/tmp/y", dir.path().display());
    for image in ["debian:13", "debian:12"] {
        let keep = format!("kept-{}", std::process::id());
        let run = |script: &str| {
            let mut command = tightrope(&["run", "--engine", &engine(), image, "--keep", &keep, "--share", &share]);
            if let Ok(mirror) = std::env::var("TIGHTROPE_MIRROR") {
                command.env("TIGHTROPE_MIRROR", mirror);
            }
            command.args(["--", "sh", "-c", script]);
            let started = Instant::now();
            let done = command.output().unwrap();
            eprintln!("{image}: {:7.1} s  {script}", started.elapsed().as_secs_f64());
            let text = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
            assert!(done.status.success(), "{script}: {text}");
            text
        };
        run(
            "grep 'from the host' /tmp/y/text && apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends hello && hello",
        );
        // The disk was left in order: nothing to recover.
        let text = run("hello && dmesg | grep EXT4-fs");
        assert!(!text.contains("recovery"), "{text}");
        let mut guest = Guest::boot(image, &["--keep", &keep, "--share", &share]);
        guest.run(NO_FAILED_UNIT);
        guest.run("grep 'from the host' /tmp/y/text && echo more >/tmp/y/made && systemd-tmpfiles --clean --remove");
        guest.power_off();
        assert_eq!(fs::read_to_string(dir.path().join("made")).unwrap(), "more\n");
        assert_eq!(fs::read_to_string(dir.path().join("text")).unwrap(), "from the host\n");
        let done = tightrope(&["rm", &keep]).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }
}

/// Limits where systemd has the control groups, of version 2: a VM in a guest, as root and as a user in a session of its own.
#[test]
#[ignore = "long, needs a mirror"]
fn limits_under_systemd() {
    let kernel = Kernel::new(Code::new().print("up").spin());
    fs::set_permissions(kernel.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_tightrope")).parent().unwrap().display().to_string();
    let shares = [format!("{program}:/t:ro:exclusive"), format!("{}:/k:ro", kernel.dir.path().display())];
    let mut guest = Guest::boot("debian:13", &["--memory=2G", "--share", &shares[0], "--share", &shares[1]]);
    let run = "/t/tightrope run --detach --name x --net=none --kernel /k/kernel --memory=64M --cpu-limit=50% --cpu-share=20 --memory-limit=512M";
    let check = "g=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$p/cgroup) && test \"$(cat $g/cpu.max)\" = '50000 100000' && \
         test $(cat $g/cpu.weight) = 20 && test $(cat $g/memory.max) = 536870912 && /t/tightrope stop -f x && sleep 1 && test ! -e $g";
    let pid = "p=$(/t/tightrope ps --json | grep -o '\"pid\":[0-9]*' | cut -d: -f2)";
    guest.run("test -e /sys/fs/cgroup/cgroup.controllers");
    guest.run(&format!("{run} && {pid} && {check}"));
    guest.install("libpam-systemd dbus-user-session");
    guest.run("useradd -m ann && loginctl enable-linger ann && sleep 3 && ls /run/user/$(id -u ann)/systemd/private");
    let as_user = format!("{run} && {pid} && {check}");
    fs::write(kernel.dir.path().join("as-user"), as_user).unwrap();
    guest.run("chmod 755 /root && su ann -c 'XDG_RUNTIME_DIR=/run/user/$(id -u) sh /k/as-user'");
    // Without a session there is none to ask.
    guest.run("su ann -c 'mkdir -m 700 /tmp/r; XDG_RUNTIME_DIR=/tmp/r /t/tightrope run --net=none --kernel /k/kernel --cpu-limit=50%' 2>&1 | grep 'as root or in a systemd session'");
    guest.power_off();
}

#[test]
#[ignore = "long, needs a mirror"]
fn ssh_comes_in_and_git_goes_out() {
    let dir = tempfile::tempdir().unwrap();
    let (ssh_port, git_port) = (free_port(), free_port());
    let forward = format!("{ssh_port}:22");
    let mut guest = Guest::boot("debian:13+git+openssh-server", &["-p", &forward]);

    host("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", "key"], dir.path());
    let key = fs::read_to_string(dir.path().join("key.pub")).unwrap();
    guest.run(&format!("mkdir -p -m 700 .ssh && echo '{}' >.ssh/authorized_keys", key.trim()));
    guest.run("systemctl is-active ssh && ls /etc/ssh/ssh_host_ed25519_key");
    let port = ssh_port.to_string();
    let options = [
        "-i",
        "key",
        "-p",
        &port,
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=known",
        "-o",
        "BatchMode=yes",
    ];
    let ssh = |command: &str| host("ssh", &[&options[..], &["root@127.0.0.1", command]].concat(), dir.path());
    assert_eq!(ssh("hostname; whoami"), "debian\nroot");
    // A megabyte there and back, unharmed.
    let data: Vec<u8> = (0..1_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut child = Command::new("ssh")
        .args(options)
        .args(["root@127.0.0.1", "cat"])
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = data.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    assert!(child.wait_with_output().unwrap().stdout == data, "what came back is something else");
    writer.join().unwrap();

    let git = |args: &[&str]| host("git", args, dir.path());
    git(&["init", "-q", "-b", "main", "work"]);
    fs::write(dir.path().join("work/readme"), "from the host\n").unwrap();
    git(&["-C", "work", "add", "readme"]);
    let me = ["-c", "user.name=Host", "-c", "user.email=host@example.org"];
    git(&[&["-C", "work"], &me[..], &["commit", "-q", "-m", "first"]].concat());
    git(&["clone", "-q", "--bare", "work", "repo.git"]);
    let serve = ["daemon", "--export-all", "--enable=receive-pack", "--listen=127.0.0.1", "--reuseaddr"];
    let daemon = Command::new("git")
        .args(serve)
        .args([format!("--port={git_port}"), format!("--base-path={}", dir.path().display())])
        .process_group(0)
        .spawn()
        .unwrap();
    let _daemon = Daemon(daemon);
    let url = format!("git://host.tightrope.internal:{git_port}/repo.git");
    guest.run(&format!("git clone -q {url} repo && grep 'from the host' repo/readme"));
    guest.run(
        "cd repo && echo 'from the guest' >>readme && git -c user.name=Guest -c user.email=guest@example.org commit -qam second && git push -q",
    );
    assert_eq!(git(&["-C", "repo.git", "log", "-1", "--format=%s by %an"]), "second by Guest");
    assert_eq!(git(&["-C", "repo.git", "show", "main:readme"]), "from the host\nfrom the guest");
    guest.run(NO_FAILED_UNIT);
    guest.power_off();
}

#[test]
#[ignore = "long, needs a mirror"]
fn a_container_runs() {
    let mut guest = Guest::boot("debian:13", &["--memory=2G"]);
    guest.run("cat /proc/sys/kernel/modprobe && test -x $(cat /proc/sys/kernel/modprobe)");
    guest.install("podman crun");
    // No registry is needed: the image is one program.
    guest.run(
        "mkdir -p c/bin && cp /usr/bin/busybox c/bin/ && ln -s busybox c/bin/sh && tar -C c -c . | podman import - box",
    );
    guest.run("podman run --rm --network=none box /bin/busybox echo from-a-container | grep from-a-container");
    guest.run("test \"$(podman run --rm --network=none box /bin/sh -c 'busybox ps | busybox wc -l')\" -lt 6");
    guest.run("test \"$(podman run --rm --network=none --hostname inside box /bin/busybox hostname)\" = inside");
    guest.power_off();
}

/// A guest that has the host's compiler, the sources that cargo has fetched and this tree, all read-only; only the linker is its own.
fn builder(args: &[&str]) -> Guest {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tree = here.join("../..").canonicalize().unwrap();
    let rust = host("rustc", &["--print", "sysroot"], here);
    let cargo = std::env::var("CARGO_HOME").unwrap_or_else(|_| format!("{}/.cargo", std::env::var("HOME").unwrap()));
    let shares = [
        format!("{}:/src:ro", tree.display()),
        format!("{rust}:/rust:ro:exclusive"),
        format!("{cargo}:/cargo:ro:exclusive"),
    ];
    let mut args = args.to_vec();
    shares.iter().for_each(|share| args.extend(["--share", share]));
    let mut guest = Guest::boot("debian:13", &args);
    guest.install("gcc libc6-dev");
    guest.run("mkdir .cargo && ln -s /cargo/registry .cargo/registry");
    guest
}

const CARGO: &str = "cd /src && PATH=/rust/bin:$PATH CARGO_TARGET_DIR=/var/tmp/target CARGO_NET_OFFLINE=true cargo build --locked --color never";

#[test]
#[ignore = "long, needs a mirror"]
fn tightrope_is_built_from_a_shared_tree() {
    let mut guest = builder(&["--memory=3G"]);
    guest.run(&format!("{CARGO} -p memory 2>&1"));
    guest.run("test -s /var/tmp/target/debug/libmemory.rlib");
    guest.power_off();
}

/// The whole command, without optimization; then it runs a machine, inside the guest. What cargo says is seen as it comes.
#[test]
#[ignore = "an hour, needs a mirror"]
fn the_whole_of_tightrope_is_built_from_a_shared_tree() {
    let kernel = Kernel::new(Code::new().print("a machine in a machine").power_off());
    let mut guest = builder(&["--memory=4G", "--cpus=2", "--share", &format!("{}:/k:ro", kernel.dir.path().display())]);
    let quick =
        "--config profile.dev.opt-level=0 --config profile.dev.debug=false --config profile.dev.package.bt.opt-level=0";
    let (started, mut crates) = (Instant::now(), 0);
    guest
        .session
        .send(format!("({CARGO} {quick} -p tightrope) 2>&1 && echo built\"-\"well || echo built\"-\"ill\n").as_bytes());
    loop {
        let which = guest.session.expect_one_of(&["Compiling ", "built-well", "built-ill"], PATIENCE * 4);
        match which {
            0 => crates += 1,
            1 => break,
            _ => panic!("the build failed: {}", guest.session.seen()),
        }
        if crates % 20 == 0 {
            eprintln!("{:7.1} s  {crates} crates begun", started.elapsed().as_secs_f64());
        }
    }
    eprintln!("{:7.1} s  built, {crates} crates", started.elapsed().as_secs_f64());
    let built = "/var/tmp/target/debug/tightrope";
    guest.run(&format!(
        "{built} --version && {built} run --net=none --memory=64M --kernel /k/kernel | grep 'a machine in a machine'"
    ));
    guest.power_off();
}

#[test]
#[ignore = "long, needs a mirror"]
fn a_kernel_module_is_built_and_loaded() {
    let mut guest = Guest::boot("debian:13", &["--memory=2G"]);
    guest.install("linux-headers-cloud-amd64 gcc make");
    guest.run(r#"mkdir m && cd m && echo 'obj-m := hello.o' >Makefile && printf '%s\n' '#include <linux/module.h>' 'static int n = 6; module_param(n, int, 0444);' 'static int __init hello(void) { pr_info("hello from a module: %d\n", n * 7); return 0; }' 'static void __exit bye(void) { pr_info("bye\n"); }' 'module_init(hello); module_exit(bye); MODULE_LICENSE("GPL");' >hello.c"#);
    guest.run("make -s -C /lib/modules/$(uname -r)/build M=$HOME/m modules 2>&1");
    guest.run("insmod m/hello.ko n=9 && dmesg | grep 'hello from a module: 63' && lsmod | grep hello");
    guest.run("rmmod hello && dmesg | grep -w bye");
    guest.power_off();
}

#[test]
#[ignore = "long, needs a mirror"]
fn file_systems_are_made_filled_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let disks: Vec<String> = (0..3).map(|i| dir.path().join(format!("{i}.raw")).display().to_string()).collect();
    for disk in &disks {
        fs::File::create(disk).unwrap().set_len(1 << 30).unwrap();
    }
    let args: Vec<&str> = disks.iter().flat_map(|d| ["--disk", d]).collect();
    let mut guest = Guest::boot("debian:13", &args);
    guest.install("xfsprogs btrfs-progs");
    for (disk, make, check) in [
        ("vdb", "mkfs.ext4 -q -F", "e2fsck -fn"),
        ("vdc", "mkfs.xfs -q -f", "xfs_repair -n"),
        ("vdd", "mkfs.btrfs -q -f", "btrfs check -p"),
    ] {
        guest.run(&format!("{make} /dev/{disk} && mount /dev/{disk} /mnt"));
        guest.run("cp -a /usr/share /usr/bin /mnt/ && dd if=/dev/urandom of=/mnt/big bs=1M count=64 status=none");
        guest.run("cd /mnt && find . -type f | sort | xargs -d '\\n' sha256sum >/var/tmp/sums && rm -rf share/doc/[a-l]* && cp -a big big2");
        guest.run(&format!("umount /mnt && mount /dev/{disk} /mnt && cd /mnt && grep -v share/doc /var/tmp/sums | sha256sum -c --quiet && cmp big big2"));
        guest.run(&format!("umount /mnt && {check} /dev/{disk}"));
    }
    guest.power_off();
}

/// What a machine has besides: memory that comes and goes, named ports, a disk that grows, clocks, and a watchdog that systemd keeps.
#[test]
#[ignore = "long, needs a mirror"]
fn devices_in_a_whole_system() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (disk, name) = (path("disk.qcow2"), format!("devices-{}", std::process::id()));
    let tool = |args: &[&str]| {
        let done = finish(tightrope(args), b"");
        assert_eq!(done.code(), Some(0), "{args:?}: {done:?}");
        done.out
    };
    tool(&["disk", "create", &disk, "256M"]);
    let (log, chat) = (format!("log=file:{}", path("log")), format!("org.test.chat=unix:{}", path("chat")));
    let options = ["--name", &name, "--watchdog=reset", "--port", &log, "--port", &chat, "--disk", &disk];
    let mut guest = Guest::boot("debian:13", &options);

    // Free pages go back; the balloon takes and gives.
    let balloon = |size: &[&str], field: &str| {
        let all = tool(&[&["balloon", "--json", &name], size].concat());
        serde_json::from_str::<serde_json::Value>(&all).unwrap()[field].as_u64().unwrap_or_else(|| panic!("{all}"))
            >> 20
    };
    guest.run("lsmod | grep -w virtio_balloon && head -c 400M /dev/zero >/dev/shm/big");
    let full = balloon(&[], "resident");
    guest.run("rm /dev/shm/big");
    wait("free pages", || balloon(&[], "resident") + 200 < full);
    eprintln!("resident {full} MiB, then {} MiB", balloon(&[], "resident"));
    assert_eq!(balloon(&["400M"], "actual"), 624);
    guest
        .run("test $(awk '/^MemAvailable/ {print $2}' /proc/meminfo) -lt 400000 && systemctl is-system-running --wait");
    assert_eq!(balloon(&["1G"], "actual"), 0);
    guest.run("test $(awk '/^MemAvailable/ {print $2}' /proc/meminfo) -gt 600000");

    // Ports, which udev has named.
    guest.run("seq 20000 >/dev/virtio-ports/log");
    let whole: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    wait("what was written", || fs::read_to_string(path("log")).unwrap() == whole);
    let mut stream = std::os::unix::net::UnixStream::connect(path("chat")).unwrap();
    stream.write_all(whole.as_bytes()).unwrap();
    guest.run("head -n 20000 /dev/virtio-ports/org.test.chat | cmp - <(seq 20000)");

    // A file system grows with its disk, while it is used.
    guest.run("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && cp -a /usr/bin /mnt/ && sync");
    tool(&["disk", "resize", &disk, "2G"]);
    guest.run("until [ $(cat /sys/block/vdb/size) = 4194304 ]; do sleep 0.1; done; resize2fs /dev/vdb && test $(df --output=size /mnt | tail -1) -gt 1900000");
    guest.run("head -c 1000M /dev/zero >/mnt/big && diff -r --no-dereference /usr/bin /mnt/bin && umount /mnt && e2fsck -fn /dev/vdb");

    // The clock of the machine is the host's; that of the system is set right by the agent.
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    guest.run(&format!("test $(cat /sys/class/rtc/rtc0/since_epoch) -ge {}", now()));
    guest.run(&format!("date -s 2001-01-01 && until test $(date +%s) -ge {}; do sleep 1; done", now()));

    // systemd keeps the watchdog. When it is no more, the machine starts again.
    let keep = "mkdir -p /etc/systemd/system.conf.d && printf '[Manager]\\nRuntimeWatchdogSec=10\\n' >/etc/systemd/system.conf.d/w.conf";
    guest.run(&format!("modprobe i6300esb && {keep} && systemctl daemon-reexec && sleep 12 && grep -x active /sys/class/watchdog/watchdog0/state"));
    guest.session.send(b"kill -SEGV 1\n");
    let hung = Instant::now();
    guest.session.expect_within("automatic login", PATIENCE);
    guest.session.expect_within("root@debian:~# ", PATIENCE);
    eprintln!("prompt again after {:.1} s", hung.elapsed().as_secs_f64());
    guest.run("modprobe i6300esb && grep -x 32 /sys/class/watchdog/watchdog0/bootstatus");
    guest.run(NO_FAILED_UNIT);
    guest.power_off();
}

#[test]
#[ignore = "long, needs a mirror"]
fn three_guests_at_once_and_one_crashes() {
    // Memtest86+, which is no Linux: a kernel of its own out of a Debian package.
    let dir = tempfile::tempdir().unwrap();
    let debs = image::fetch_packages("bookworm", &["memtest86+"], &image::Options::default()).unwrap();
    image::unpack_deb(&debs[0], dir.path()).unwrap();
    let memtest = dir.path().join("boot/memtest86+x64.bin").display().to_string();
    let mut command = tightrope(&["run", "--engine", &engine(), "--kernel", &memtest, "--net=none", "--memory=64M"]);
    command.args(["--append", "console=ttyS0,115200"]);
    let mut third = Session::start(command);
    third.expect_within("Memtest86+", PATIENCE);
    eprintln!("Memtest86+ runs");

    let mut twelve = Guest::boot("debian:12", &[]);
    let mut thirteen = Guest::boot("debian:13", &[]);
    let work = "for i in $(seq 20); do head -c 4000000 /dev/zero | sha256sum; done | sort -u | wc -l | grep -x 1";
    twelve.run(work);
    thirteen.run(work);
    thirteen.run("echo 1 >/proc/sys/kernel/sysrq");
    thirteen.session.send(b"echo 1 >/proc/sys/kernel/panic; echo c >/proc/sysrq-trigger\n");
    thirteen.session.expect_within("sysrq triggered crash", PATIENCE);
    // The others go on.
    twelve.run(work);
    twelve.run(NO_FAILED_UNIT);
    third.expect_within("%", PATIENCE);
    twelve.power_off();
    drop((third.kill(), thirteen.session.kill()));
}
