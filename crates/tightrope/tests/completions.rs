//! What a shell is offered when a word is to be completed.

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{finish, tightrope};

/// A place with a VM, an image and a kept disk.
struct World {
    dir: tempfile::TempDir,
    _vm: registry::Own,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let vms = registry::Registry::at(dir.path().join("tightrope")).unwrap();
        let about = registry::About { name: Some("web-1".into()), image: "debian".into(), ..Default::default() };
        let image = dir.path().join("data/tightrope/images/abababababab");
        fs::create_dir_all(&image).unwrap();
        let manifest = r#"{"name":"debian:trixie+nginx","digest":"abababababab","created":0,"kernel":"6","disk_size":1,
            "initramfs":"x","packages":[]}"#;
        fs::write(image.join("manifest.json"), manifest).unwrap();
        fs::write(image.join("disk.raw"), "x").unwrap();
        let kept = dir.path().join("data/tightrope/layers/work");
        fs::create_dir_all(&kept).unwrap();
        fs::write(kept.join("layer.json"), r#"{"image":"debian:trixie","digest":"ab","created":0}"#).unwrap();
        fs::create_dir(dir.path().join("here")).unwrap();
        fs::write(dir.path().join("here/web-page"), "x").unwrap();
        Self { _vm: vms.add(about).unwrap(), dir }
    }

    fn set(&self, command: &mut Command) {
        command
            .env("XDG_RUNTIME_DIR", self.dir.path())
            .env("XDG_DATA_HOME", self.dir.path().join("data"))
            .current_dir(self.dir.path().join("here"));
    }

    /// What is offered for the last of these words, by the way that scripts ask.
    fn offers(&self, words: &[&str]) -> Vec<String> {
        let mut command = tightrope(&[&["--", "tightrope"], words].concat());
        self.set(&mut command);
        command.env("TIGHTROPE_COMPLETE", "bash").env("_CLAP_IFS", "\n");
        command.env("_CLAP_COMPLETE_INDEX", words.len().to_string());
        let done = finish(command, b"");
        assert_eq!((done.code(), done.err.as_str()), (Some(0), ""), "{done:?}");
        done.out.lines().map(str::to_owned).collect()
    }
}

#[test]
fn names_are_offered() {
    let world = World::new();
    let has = |words: &[&str], wanted: &[&str]| {
        let all = world.offers(words);
        assert!(wanted.iter().all(|one| all.iter().any(|other| other == one)), "{words:?}: {all:?}");
    };
    for command in ["exec", "stop", "logs", "attach"] {
        assert_eq!(world.offers(&[command, "w"]), ["web-1"], "{command}");
    }
    has(&["cp", "w"], &["web-1:", "web-page"]);
    has(&["cp", "web-page", "w"], &["web-1:"]);
    has(&["run", ""], &["debian:trixie+nginx", "busybox", "debian"]);
    assert_eq!(world.offers(&["pull", "debian:tr"]), ["debian:trixie+nginx"]);
    has(&["rm", ""], &["debian:trixie+nginx", "work"]);
    assert_eq!(world.offers(&["run", "debian", "--keep", ""]), ["work"]);
    assert_eq!(world.offers(&["run", "--engine", "k"]), ["kvm"]);
    assert_eq!(world.offers(&["att"]), ["attach"]);
    // Without a command it is `run`.
    assert_eq!(world.offers(&["--virtio-c"]), ["--virtio-console"]);
    assert!(!world.offers(&[""]).iter().any(|name| name == "vm-keeper"));
}

/// The script in bash itself, which takes words apart at colons.
#[test]
fn bash() {
    if Command::new("bash").arg("-c").arg("true").status().is_err() {
        return;
    }
    let world = World::new();
    let complete = |line: &str, words: &[&str]| {
        let program = env!("CARGO_BIN_EXE_tightrope");
        let script = format!(
            "source <({program} completions bash); COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); COMP_LINE='{line}'
             COMP_POINT=${{#COMP_LINE}}; _tightrope {program}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let mut command = Command::new("bash");
        command.args(["--norc", "-c", &script, "bash"]).args(words).stdin(Stdio::null());
        world.set(&mut command);
        let done = command.output().unwrap();
        assert!(done.stderr.is_empty(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(complete("tightrope exec ", &["tightrope", "exec", ""]).lines().next(), Some("web-1"));
    assert_eq!(complete("tightrope  run debian:trix", &["tightrope", "run", "debian", ":", "trix"]), "trixie+nginx");
    assert_eq!(complete("tightrope run debian:", &["tightrope", "run", "debian", ":"]).lines().count(), 3);
    assert_eq!(complete("tightrope --engine=k", &["tightrope", "--engine", "=", "k"]), "kvm");
    assert_eq!(complete("tightrope ru", &["tightrope", "ru"]), "run");
}

#[test]
fn scripts_for_all_shells() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let done = finish(tightrope(&["completions", shell]), b"");
        assert!(done.code() == Some(0) && done.out.contains("TIGHTROPE_COMPLETE"), "{done:?}");
    }
}
