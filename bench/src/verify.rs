//! The correctness suite: ordinary programs on fixed input, on the host and in a guest; every byte of output must be equal.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::disk::{Disk, Scratch};
use crate::session::{self, Boot, Engine, Setup, Task};

/// What a case printed: its text as it came over the console, and the checksum made where it ran.
#[derive(Debug, Default, PartialEq)]
pub struct Printed {
    /// Output and exit status.
    pub text: Vec<u8>,
    /// SHA-256 in hexadecimal.
    pub sum: Option<String>,
}

/// Lines of difference shown for a case.
const SHOWN: usize = 12;

/// Runs the cases on the host.
///
/// # Errors
/// The chroot does not work.
pub fn native(setup: &Setup, disk: &Disk, cases: &[String]) -> Result<BTreeMap<String, Printed>> {
    let (printed, trouble) = collect(&Engine::Native(None), setup, Boot::Direct, disk, cases)?;
    match trouble {
        None => Ok(printed),
        Some(t) => anyhow::bail!("the suite does not work on the host itself: {t}"),
    }
}

/// Runs the cases everywhere and prints what differs. True when nothing does.
///
/// # Errors
/// An engine cannot be started, or the suite does not work on the host.
pub fn run(disk: &Disk, setup: &Setup, engines: &[Engine], cases: &[String], systemd: bool) -> Result<bool> {
    eprintln!("bench: the suite on the host");
    let expected = native(setup, disk, cases)?;
    let mut good = true;
    for (name, p) in &expected {
        let last = String::from_utf8_lossy(&p.text).lines().last().unwrap_or_default().to_owned();
        if last != "exit status 0" {
            println!("WRONG  {name} fails on the host itself: {last}");
            good = false;
        }
    }
    for engine in engines {
        eprintln!("bench: the suite under {engine}");
        let boot = if systemd { Boot::Systemd } else { Boot::Direct };
        let (printed, trouble) = collect(engine, setup, boot, disk, cases)?;
        let mut same = 0;
        for (name, want) in &expected {
            match printed.get(name) {
                Some(got) if got == want => same += 1,
                Some(got) => {
                    good = false;
                    println!("WRONG  {name} under {engine}:");
                    print!("{}", difference(&want.text, &got.text));
                }
                None => {
                    good = false;
                    println!("WRONG  {name} under {engine}: no output");
                }
            }
        }
        println!("{engine}: {same} of {} cases give the same output as the host, byte by byte", expected.len());
        if let Some(t) = trouble {
            good = false;
            println!("WRONG  {engine}: {t}");
        }
    }
    Ok(good)
}

fn collect(
    engine: &Engine,
    setup: &Setup,
    boot: Boot,
    disk: &Disk,
    cases: &[String],
) -> Result<(BTreeMap<String, Printed>, Option<String>)> {
    let mut printed: BTreeMap<String, Printed> = BTreeMap::new();
    let scratch = if boot == Boot::Systemd { Some(Scratch::new(disk)?) } else { None };
    let image = scratch.as_ref().map_or(&disk.image, |s| &s.path);
    let task = Task::Verify(cases.to_vec());
    let out = session::run(engine, setup, boot, image, &task, |mark, line, _| {
        if mark == "@=" {
            let (name, data) = line.split_once(' ').unwrap_or((line, ""));
            // A damaged line shows as a difference of the text or of the sum.
            printed.entry(name.to_owned()).or_default().text.extend(base64(data));
        } else if let Some(name) = line.strip_prefix("start verify=") {
            eprintln!("bench:   {name}");
        } else if let Some((name, sum)) = line.strip_prefix("verify=").and_then(|l| l.split_once(" sum=")) {
            printed.entry(name.to_owned()).or_default().sum = Some(sum.to_owned());
        }
        Ok(())
    })
    .with_context(|| format!("{engine}"))?;
    printed.retain(|_, p| p.sum.is_some());
    Ok((printed, out.trouble))
}

/// Decodes base64 with padding, up to the first character that is not part of it.
fn base64(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut n) = (0u32, 0);
    for b in text.bytes() {
        let v = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => break,
        };
        bits = bits << 6 | u32::from(v);
        n += 6;
        if n >= 8 {
            n -= 8;
            out.push((bits >> n & 0xff) as u8);
        }
    }
    out
}

/// The lines in which two outputs differ, by position: outputs of the same program rarely shift.
fn difference(want: &[u8], got: &[u8]) -> String {
    let (want, got) = (String::from_utf8_lossy(want), String::from_utf8_lossy(got));
    if want == got {
        return "    the text is the same, its checksum is not\n".to_owned();
    }
    let (w, g): (Vec<&str>, Vec<&str>) = (want.lines().collect(), got.lines().collect());
    let mut out = String::new();
    let mut shown = 0;
    for i in 0..w.len().max(g.len()) {
        let (a, b) = (w.get(i), g.get(i));
        if a == b {
            continue;
        }
        if shown == SHOWN {
            out.push_str("    …\n");
            break;
        }
        shown += 1;
        let line = |l: Option<&&str>| l.map_or("(nothing)".to_owned(), |l| l.chars().take(200).collect());
        out.push_str(&format!("    line {}: host  {}\n             guest {}\n", i + 1, line(a), line(b)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_all_lengths() {
        assert_eq!(base64("TWFu"), b"Man");
        assert_eq!(base64("TWE="), b"Ma");
        assert_eq!(base64("TQ=="), b"M");
        assert_eq!(base64("+/8A"), [0xfb, 0xff, 0x00]);
        assert_eq!(base64(""), b"");
    }

    #[test]
    fn differences_are_shown_by_line() {
        let d = difference(b"a\nb\nc\n", b"a\nx\n");
        assert!(d.contains("line 2: host  b") && d.contains("guest x") && d.contains("guest (nothing)"));
        assert!(difference(b"a", b"a").contains("checksum"));
        let many = |c: &str| c.repeat(40);
        assert!(difference(many("a\n").as_bytes(), many("b\n").as_bytes()).ends_with("…\n"));
    }
}
