//! Builds the agent for guests: the package `agent-guest`, static and small, by a cargo of its own in a directory of its own.

use std::path::Path;
use std::process::Command;

fn main() {
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let root = Path::new(&variable("CARGO_MANIFEST_DIR")).join("../..");
    for path in ["crates/agent-guest/src", "crates/agent-guest/Cargo.toml", "crates/agent-protocol/src", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    let (target, out) = (variable("TARGET"), variable("OUT_DIR"));
    let directory = Path::new(&out).join("guest");
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .current_dir(&root)
        .args(["build", "--quiet", "--release", "--package", "agent-guest", "--bin", "tightrope-agent"])
        .args(["--target", &target, "--target-dir"])
        .arg(&directory);
    // Flags and wrappers (clippy, sanitizers) are meant for the outer build.
    for name in
        ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR"]
    {
        cargo.env_remove(name);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static\u{1f}-Crelocation-model=static");
    for (name, value) in [
        ("OPT_LEVEL", "s"),
        ("LTO", "true"),
        ("PANIC", "abort"),
        ("STRIP", "symbols"),
        ("DEBUG", "0"),
        ("CODEGEN_UNITS", "1"),
    ] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{name}"), value);
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the agent for guests could not be built: {status}");
    let program = directory.join(&target).join("release/tightrope-agent");
    println!("cargo::rustc-env=TIGHTROPE_AGENT={}", program.display());
}
