//! Shared directories, through the whole command: the default guest mounts them and works there.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use common::{PROMPT, Session, done, finish, power_off, run};

fn boot(args: &[&str]) -> Session {
    let mut session = Session::start(run(&[&["--net", "none"], args].concat()));
    session.expect(PROMPT);
    session
}

#[test]
fn the_guest_works_in_shared_directories() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, fixed) = (dir.path().join("tree"), dir.path().join("fixed"));
    fs::create_dir(&tree).unwrap();
    fs::create_dir(&fixed).unwrap();
    fs::write(dir.path().join("secret"), b"the host's").unwrap();
    fs::write(fixed.join("file"), b"fixed").unwrap();
    fs::write(tree.join("text"), b"from the host\n").unwrap();
    symlink("../secret", tree.join("up")).unwrap();
    fs::write(tree.join("numbers"), (0..200_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>()).unwrap();
    let script = "set -e
        mount | grep 'share0 on /tree type virtiofs (rw'
        mount | grep 'share1 on /fixed type virtiofs (ro'
        cd /tree; grep 'from the host' text
        echo from the guest >new; mkdir -p a/b/c; mv new a/b/c/; ln a/b/c/new hard; ln -s hard soft
        test $(stat -c %h soft hard | tr -d '\\n') = 12
        cp numbers copy; cmp numbers copy; truncate -s 1000 copy
        chown 1000:100 copy; chmod 4711 copy; test \"$(stat -c '%u %g %a' copy)\" = '1000 100 4711'
        for i in $(seq 300); do echo $i >a/$i; done; test $(ls a | wc -l) = 301; rm -r a
        exec 3<>hard; rm hard; echo more >&3; grep . /proc/self/fd/3
        cat up && exit 1
        mknod device c 1 3 && exit 1; mkfifo pipe
        touch /fixed/x && exit 1; mount -o remount,rw /fixed
        touch /fixed/x && exit 1; rm -f /fixed/file && exit 1; cat /fixed/file
        mkdir /tag; mount -t virtiofs by-tag /tag; cat /tag/file; umount /tag
        sync";
    fs::write(tree.join("script"), script).unwrap();
    let share = |path: &std::path::Path, rest: &str| format!("--share={}{rest}", path.display());
    let shares = [share(&tree, ":/tree"), share(&fixed, ":/fixed:ro"), share(&fixed, ":by-tag")];
    let mut session = boot(&shares.each_ref().map(String::as_str));
    done(&mut session, "sh /tree/script");
    // What the host changes shows soon.
    fs::write(tree.join("text"), b"changed on the host\n").unwrap();
    done(&mut session, "usleep 150000; grep 'changed on the host' /tree/text");
    // The guest starts anew: so does its view.
    session.send(b"reboot -f\n");
    session.expect("To leave:");
    session.expect(PROMPT);
    done(&mut session, "grep 'changed on the host' /tree/text");
    let finished = power_off(session);
    assert!(!finished.err.contains("server of the shared"), "{}", finished.err);
    let copy = fs::metadata(tree.join("copy")).unwrap();
    assert_eq!((copy.uid(), copy.mode() & 0o7777, copy.len()), (fs::metadata(&tree).unwrap().uid(), 0o711, 1000));
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"the host's");
    assert_eq!(fs::read_dir(&fixed).unwrap().count(), 1);
    assert!(!tree.join("a").exists() && !tree.join("device").exists());
}

/// Without a shell: the agent is process 1 then, and mounts a /tmp of its own.
#[test]
fn a_command_finds_shared_directories() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("inner");
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("text"), b"from the host\n").unwrap();
    let path = dir.path().display();
    let shares = [format!("--share={path}/inner:/tmp/a/inner"), format!("--share={path}:/tmp/a:ro")];
    let script =
        "cat /tmp/a/inner/text; touch /tmp/a/x 2>/dev/null || echo fixed; echo made >/tmp/a/inner/made; mktemp -u";
    let finished = finish(run(&["--net=none", &shares[0], &shares[1], "--", "sh", "-c", script]), b"");
    assert_eq!(finished.code(), Some(0), "{finished:?}");
    assert!(finished.out.starts_with("from the host\nfixed\n/tmp/tmp."), "{finished:?}");
    assert_eq!(fs::read(inner.join("made")).unwrap(), b"made\n");

    // It starts where its caller is, if the guest has that; else, and as another user, at home.
    let pwd = |share: &str, options: &[&str]| {
        let mut command = run(&[&["--net=none", share], options, &["--", "pwd"]].concat());
        command.current_dir(&inner);
        let finished = finish(command, b"");
        assert_eq!(finished.code(), Some(0), "{finished:?}");
        finished.out
    };
    assert_eq!(pwd("--share=.", &[]), format!("{}\n", inner.canonicalize().unwrap().display()));
    assert_eq!(pwd("--share=..:/src:ro", &[]), "/src/inner\n");
    assert_eq!(pwd("--share=.", &["--workdir=/"]), "/\n");
    assert_eq!(pwd("--share=.:tag", &[]), pwd("--share=.:/src", &["--user=0"]));
}

/// A directory that nobody else changes: the guest keeps what it knows, and all is there in the end.
#[test]
fn an_exclusive_directory() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("numbers"), (0..200_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>()).unwrap();
    let script = "set -e; cd /tree; cmp numbers numbers; cp numbers copy; cmp numbers copy
        (for i in $(seq 300); do echo line $i; done) >>text; echo more >>text; tail -n 1 text | grep -x more; test $(wc -l <text) = 301
        printf X | dd of=copy bs=1 seek=5000 conv=notrunc 2>/dev/null; test \"$(dd if=copy bs=1 skip=5000 count=1 2>/dev/null)\" = X
        mkdir -p a/b; for i in $(seq 200); do echo $i >a/b/$i; done; test $(ls a/b | wc -l) = 200; mv a/b/7 a/seven; rm a/b/8; ! cat a/b/8
        exec 3<>a/b/9; rm a/b/9; echo changed >&3; exec 4</proc/self/fd/3; read x <&4; test $x = changed
        truncate -s 10 numbers; test $(stat -c %s numbers) = 10; echo new >numbers; test $(cat numbers) = new
        rm -r a/b; test \"$(ls a)\" = seven; ln text hard; test $(stat -c %h text) = 2; chmod 600 text; sync";
    fs::write(tree.join("script"), script).unwrap();
    let share = format!("--share={}:/tree:exclusive", tree.display());
    let mut session = boot(&[&share]);
    // Nobody else may have it meanwhile.
    for (other, part) in
        [(":/tree", "shared exclusively with another VM"), (":/tree:exclusive", "shared with another VM")]
    {
        let finished = finish(run(&["--net=none", &format!("--share={}{other}", tree.display())]), b"");
        assert!(finished.code() == Some(1) && finished.err.contains(part), "{finished:?}");
    }
    done(&mut session, "sh /tree/script");
    power_off(session);
    assert_eq!(fs::read(tree.join("a/seven")).unwrap(), b"7\n");
    assert_eq!(fs::read(tree.join("numbers")).unwrap(), b"new\n");
    assert_eq!(fs::read(tree.join("copy")).unwrap()[5000], b'X');
    assert_eq!(fs::metadata(tree.join("hard")).unwrap().mode() & 0o777, 0o600);
    assert!(!tree.join("a/b").exists());
}

#[test]
fn a_directory_that_vanishes_and_a_server_that_dies() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let mut session =
        boot(&[&format!("--share={}:/tree", root.display()), &format!("--share={}:/two", dir.path().display())]);
    fs::remove_dir(&root).unwrap();
    done(&mut session, "usleep 200000; ls /two; ! cat /tree/x");
    // The servers are children of the monitor.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", session.id())).unwrap();
    let servers: Vec<_> = children
        .split_whitespace()
        .filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"share-server\0")))
        .collect();
    assert_eq!(servers.len(), 2, "{children}");
    for pid in &servers {
        let _ = std::process::Command::new("kill").args(["-9", pid]).status();
    }
    done(&mut session, "usleep 300000; ! ls /two && ! touch /two/x; echo on");
    let finished = power_off(session);
    let lines: Vec<_> = finished.err.lines().filter(|line| line.contains("shared directory")).collect();
    assert_eq!(lines.len(), 3, "{}", finished.err);
    assert!(lines.iter().any(|line| line.contains("has been removed")), "{lines:?}");
}

#[test]
fn what_cannot_be_shared_is_told_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (file, path) = (dir.path().join("file"), dir.path().display());
    fs::write(&file, b"x").unwrap();
    let closed = dir.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
    let tag = "x".repeat(37);
    let mut cases = vec![
        (vec![format!("{path}/none:/x")], "does not exist", 1),
        (vec![format!("{path}/file:/x")], "not a directory", 1),
        (vec![format!("{path}:t"), format!("{path}:t")], "two shared directories have the tag t", 1),
        (vec![format!("{path}:/t"), format!("{path}:/t")], "two shared directories are to be mounted at /t", 1),
        (vec![format!("{path}:rel/x")], "relative path", 2),
        (vec![format!("{path}:./x")], "relative path", 2),
        (vec![format!("{path}:/")], "no place to mount", 2),
        (vec![format!("{path}:/dev/shm/x")], "the guest's own /dev", 2),
        (vec![format!("{path}:/a b")], "without spaces", 2),
        (vec![format!("{path}:{tag}")], "no tag", 2),
        ((0..9).map(|number| format!("{path}:t{number}")).collect(), "too many", 1),
    ];
    if fs::read_dir(&closed).is_err() {
        cases.push((vec![format!("{path}/closed:/x")], "may not be read", 1));
    }
    for (shares, what, code) in cases {
        let args: Vec<_> = shares.iter().map(|share| format!("--share={share}")).collect();
        let finished = finish(run(&args.iter().map(String::as_str).collect::<Vec<_>>()), b"");
        assert_eq!(finished.code(), Some(code), "{shares:?}: {}", finished.err);
        let errors: Vec<_> = finished.err.lines().collect();
        assert!(errors.len() == 1 && errors[0].contains(what), "{shares:?}: {errors:?}");
        assert!(!errors[0].contains("os error"), "{errors:?}");
    }
    let _ = fs::set_permissions(&closed, fs::Permissions::from_mode(0o700));
}
