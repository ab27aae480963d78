//! `pull`, `images`, `rm`, `prune` and `run` of images: what is said when something is wrong. Needs no network.

mod common;

use std::fs;

use common::{finish, tightrope};

/// A user with an empty home.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// What the command prints, and its exit code; errors are checked to be one line.
    fn run(&self, args: &[&str]) -> (Option<i32>, String) {
        let mut command = tightrope(args);
        command.env("XDG_DATA_HOME", self.0.path().join("data")).env("XDG_CACHE_HOME", self.0.path().join("cache"));
        // No mirror answers there.
        command.env("TIGHTROPE_MIRROR", "http://127.0.0.1:1/debian");
        let done = finish(command, b"");
        if done.code() != Some(0) {
            assert_eq!(done.err.trim_end().lines().count(), 1, "{}", done.err);
            assert!(!done.err.contains("os error"), "{}", done.err);
        }
        (done.code(), done.out + &done.err)
    }

    /// An image that is none but looks like one.
    fn add_image(&self, suite: &str, digest: &str) {
        let dir = self.0.path().join("data/tightrope/images").join(&digest[..12]);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("disk.raw"), vec![1; 1 << 20]).unwrap();
        let manifest = format!(
            r#"{{"name":"debian:{suite}","digest":"{digest}","created":1767225600,"kernel":"6.12-cloud","disk_size":1048576,
            "initramfs":"x","packages":[{{"name":"apt","version":"3"}}]}}"#
        );
        fs::write(dir.join("manifest.json"), manifest).unwrap();
    }
}

#[test]
fn wrong_names_are_told_at_once() {
    let home = Home::new();
    for (args, part) in [
        (&["run", "debain"][..], "did you mean debian?"),
        (&["pull", "debain"], "did you mean debian?"),
        (&["run", "bookworm"], "did you mean debian:bookworm?"),
        (&["pull", "debian", "Vim"], "not a valid package name"),
        (&["pull", "debian:../x"], "not a valid suite"),
        (&["rm", "debian"], "no image 'debian'"),
        (&["run", "busybox", "--keep", "x"], "has no disk to --keep"),
    ] {
        let (code, text) = home.run(args);
        assert!(code == Some(1) && text.contains(part), "{args:?}: {text}");
    }
    assert_eq!(home.run(&["run", "--keep", "x"]).0, Some(2));
    // A mirror that does not answer is named; nothing is left.
    let (code, text) = home.run(&["pull", "debian"]);
    assert!(code == Some(1) && text.contains("127.0.0.1:1") && text.contains("--mirror"), "{text}");
    assert!(!home.0.path().join("data/tightrope/images").exists());
}

#[test]
fn images_are_listed_and_removed() {
    let home = Home::new();
    assert_eq!(home.run(&["images"]).1.lines().count(), 1);
    home.add_image("trixie", &"ab".repeat(32));
    home.add_image("bookworm", &"cd".repeat(32));
    let text = home.run(&["images"]).1;
    assert!(text.contains("debian:trixie") && text.contains("abababababab") && text.contains("2026-01-01"), "{text}");
    let all: serde_json::Value = serde_json::from_str(&home.run(&["images", "--json"]).1).unwrap();
    assert_eq!(all["images"][0]["name"], "debian:bookworm");
    assert_eq!(all["images"][1]["packages"][0]["version"], "3");
    let (code, text) = home.run(&["rm", "debian:13", "debian:tricksie"]);
    assert!(code == Some(1) && text.contains("tricksie"), "{text}");
    assert_eq!(home.run(&["images"]).1.lines().count(), 3, "nothing is removed if one name is wrong");

    // A disk that is kept holds its image.
    let kept = home.0.path().join("data/tightrope/layers/work");
    fs::create_dir_all(&kept).unwrap();
    let layer = format!(r#"{{"image":"debian:trixie","digest":"{}","created":0}}"#, "ab".repeat(32));
    fs::write(kept.join("layer.json"), layer).unwrap();
    assert!(home.run(&["images"]).1.contains("kept, of debian:trixie"));
    let (code, text) = home.run(&["rm", "debian"]);
    assert!(code == Some(1) && text.contains("tightrope rm work"), "{text}");
    assert_eq!(home.run(&["rm", "cdcd"]).0, Some(0));
    assert_eq!(home.run(&["rm", "debian", "work"]).0, Some(0));
    assert_eq!(home.run(&["images"]).1.lines().count(), 1);
    assert_eq!(home.run(&["prune"]), (Some(0), "freed 0 MiB\n".into()));
}
