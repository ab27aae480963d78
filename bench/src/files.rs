//! The bench's own files inside the guest's user land, embedded in the command so that it works from anywhere.
//!
//! Everything lands under `/opt/bench`, but for the two pieces that make systemd log root in on the serial console.

/// One file: where it goes (from the root of the user land), its mode, its contents.
pub struct File {
    /// Path without the leading slash.
    pub path: &'static str,
    /// Permission bits.
    pub mode: u32,
    /// Contents.
    pub text: &'static str,
}

macro_rules! files {
    ($($mode:literal $path:literal = $source:literal;)*) => {
        &[$(File { path: $path, mode: $mode, text: include_str!(concat!("../", $source)) }),*]
    };
}

/// All files, in no particular order.
pub const FILES: &[File] = files! {
    0o755 "opt/bench/agent" = "guest/agent";
    0o755 "opt/bench/init" = "guest/init";
    0o644 "root/.profile" = "guest/profile";
    0o644 "etc/systemd/system/serial-getty@.service.d/bench.conf" = "guest/getty.conf";
    0o644 "opt/bench/sh/loop.sh" = "guest/sh/loop.sh";
    0o644 "opt/bench/sh/pystart.sh" = "guest/sh/pystart.sh";
    0o644 "opt/bench/sh/spawn.sh" = "guest/sh/spawn.sh";
    0o644 "opt/bench/sh/git.sh" = "guest/sh/git.sh";
    0o644 "opt/bench/sh/make.sh" = "guest/sh/make.sh";
    0o644 "opt/bench/sh/pi.bc" = "guest/sh/pi.bc";
    0o644 "opt/bench/sh/rows.sql" = "guest/sh/rows.sql";
    0o644 "opt/bench/sh/log.awk" = "guest/sh/log.awk";
    0o644 "opt/bench/sh/text.sed" = "guest/sh/text.sed";
    0o644 "opt/bench/sh/words.pl" = "guest/sh/words.pl";
    0o644 "opt/bench/py/mixed.py" = "guest/py/mixed.py";
    0o644 "opt/bench/verify/arith.c" = "guest/verify/arith.c";
    0o644 "opt/bench/verify/awk.sh" = "guest/verify/awk.sh";
    0o644 "opt/bench/verify/bc.sh" = "guest/verify/bc.sh";
    0o644 "opt/bench/verify/bzip2.sh" = "guest/verify/bzip2.sh";
    0o644 "opt/bench/verify/debug.c" = "guest/verify/debug.c";
    0o644 "opt/bench/verify/debug.sh" = "guest/verify/debug.sh";
    0o644 "opt/bench/verify/file.sh" = "guest/verify/file.sh";
    0o644 "opt/bench/verify/gcc.sh" = "guest/verify/gcc.sh";
    0o644 "opt/bench/verify/git.sh" = "guest/verify/git.sh";
    0o644 "opt/bench/verify/gzip.sh" = "guest/verify/gzip.sh";
    0o644 "opt/bench/verify/openssl.sh" = "guest/verify/openssl.sh";
    0o644 "opt/bench/verify/perl.sh" = "guest/verify/perl.sh";
    0o644 "opt/bench/verify/python.sh" = "guest/verify/python.sh";
    0o644 "opt/bench/verify/shell.sh" = "guest/verify/shell.sh";
    0o644 "opt/bench/verify/sort.sh" = "guest/verify/sort.sh";
    0o644 "opt/bench/verify/sqlite.sh" = "guest/verify/sqlite.sh";
    0o644 "opt/bench/verify/text.sh" = "guest/verify/text.sh";
    0o644 "opt/bench/verify/xz.sh" = "guest/verify/xz.sh";
    0o644 "opt/bench/verify/zstd.sh" = "guest/verify/zstd.sh";
    0o644 "opt/bench/large/Mixed.java" = "guest/large/Mixed.java";
    0o644 "opt/bench/large/apt-prepare.sh" = "guest/large/apt-prepare.sh";
    0o644 "opt/bench/large/apt.sh" = "guest/large/apt.sh";
    0o644 "opt/bench/large/build.sh" = "guest/large/build.sh";
    0o644 "opt/bench/large/cc-prepare.sh" = "guest/large/cc-prepare.sh";
    0o644 "opt/bench/large/cc.sh" = "guest/large/cc.sh";
    0o644 "opt/bench/large/git.sh" = "guest/large/git.sh";
    0o644 "opt/bench/large/goroutines.go" = "guest/large/goroutines.go";
    0o644 "opt/bench/large/history.py" = "guest/large/history.py";
    0o644 "opt/bench/large/mixed.js" = "guest/large/mixed.js";
    0o644 "opt/bench/large/mixed.lua" = "guest/large/mixed.lua";
    0o644 "opt/bench/large/nginx.sh" = "guest/large/nginx.sh";
    0o644 "opt/bench/large/redis.sh" = "guest/large/redis.sh";
    0o644 "opt/bench/large/suite.py" = "guest/large/suite.py";
    0o644 "opt/bench/large/video.py" = "guest/large/video.py";
    0o644 "opt/bench/src/Makefile" = "workloads/Makefile";
    0o644 "opt/bench/src/work.h" = "workloads/work.h";
    0o644 "opt/bench/src/work.c" = "workloads/work.c";
    0o644 "opt/bench/src/kernel.c" = "workloads/kernel.c";
    0o644 "opt/bench/src/compute.c" = "workloads/compute.c";
    0o644 "opt/bench/src/run.c" = "workloads/run.c";
    0o644 "opt/bench/src/generate.c" = "workloads/generate.c";
    0o644 "opt/bench/src/crypto.c" = "workloads/crypto.c";
    0o644 "opt/bench/src/nothing.c" = "workloads/nothing.c";
    0o644 "opt/bench/src/sample.c" = "workloads/sample.c";
};

/// The names of the correctness suite's cases, in the order in which they run.
pub fn verify_cases() -> Vec<&'static str> {
    let mut names: Vec<_> =
        FILES.iter().filter_map(|f| f.path.strip_prefix("opt/bench/verify/")?.strip_suffix(".sh")).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(dir: &str, into: &mut Vec<String>) {
        let base = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
        for entry in std::fs::read_dir(base).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{dir}/{}", entry.file_name().to_string_lossy());
            if entry.file_type().unwrap().is_dir() {
                sources(&name, into);
            } else {
                into.push(std::fs::read_to_string(entry.path()).unwrap());
            }
        }
    }

    #[test]
    fn no_source_file_is_left_out() {
        let mut found = Vec::new();
        sources("guest", &mut found);
        sources("workloads", &mut found);
        for text in &found {
            let embedded = FILES.iter().any(|f| f.text == text) || text == crate::rows::TABLE;
            assert!(embedded, "not embedded: {}", text.lines().take(3).collect::<Vec<_>>().join(" / "));
        }
        assert_eq!(found.len(), FILES.len() + 1);
    }

    #[test]
    fn cases_are_named_after_their_files() {
        assert!(verify_cases().contains(&"openssl"));
        assert!(!verify_cases().contains(&"arith.c"));
    }
}
