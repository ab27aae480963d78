//! Names of images, as a user writes them: `debian`, `debian:12`, `debian:bookworm+nginx+git`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::guest::DEFAULT_SUITE;
use crate::names::{did_you_mean, nearest};
use crate::repository::is_name;

/// What a whole Debian system is called.
pub const DEBIAN: &str = "debian";

/// What the small built-in system is called: Debian's kernel and a BusyBox shell.
pub const BUSYBOX: &str = "busybox";

/// Other names of suites.
const ALIASES: &[(&str, &str)] = &[
    ("11", "bullseye"),
    ("12", "bookworm"),
    ("13", "trixie"),
    ("14", "forky"),
    ("stable", DEFAULT_SUITE),
    ("oldstable", "bookworm"),
    ("testing", "forky"),
    ("unstable", "sid"),
];

/// The most packages that may be named.
const MOST_PACKAGES: usize = 200;

/// Which image: a suite of Debian, and what is installed besides the base system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    suite: String,
    packages: Vec<String>,
}

impl Reference {
    /// The code name of the suite.
    pub fn suite(&self) -> &str {
        &self.suite
    }

    /// The packages that were named, sorted, none twice.
    pub fn packages(&self) -> &[String] {
        &self.packages
    }

    /// The same with further packages.
    ///
    /// # Errors
    /// [`Error::BadName`] if one of them cannot be the name of a package.
    pub fn with<'a>(mut self, more: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        for name in more {
            if !is_name(name) {
                return Err(Error::BadName { what: "package name", value: name.to_owned() });
            }
            self.packages.push(name.to_owned());
        }
        self.packages.sort();
        self.packages.dedup();
        if self.packages.len() > MOST_PACKAGES {
            let value = format!("{} packages", self.packages.len());
            return Err(Error::BadName { what: "list of packages (at most 200)", value });
        }
        Ok(self)
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        // Package names have `+`, too (`g++`), but none starts with it or with a sign.
        let (system, packages) = text.split_once('+').map_or((text, None), |(s, p)| (s, Some(p)));
        let (name, suite) = system.split_once(':').unwrap_or((system, DEFAULT_SUITE));
        if name != DEBIAN {
            return Err(no_image(text, name));
        }
        let suite = ALIASES.iter().find(|(alias, _)| *alias == suite).map_or(suite, |(_, name)| name);
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if suite.is_empty() || !suite.bytes().all(plain) {
            return Err(Error::BadName { what: "suite", value: suite.to_owned() });
        }
        let mut names: Vec<String> = Vec::new();
        for part in packages.into_iter().flat_map(|p| p.split('+')) {
            match names.last_mut() {
                Some(last) if !part.starts_with(|c: char| c.is_ascii_alphanumeric()) => {
                    last.push('+');
                    last.push_str(part);
                }
                _ => names.push(part.to_owned()),
            }
        }
        let reference = Self { suite: suite.to_owned(), packages: Vec::new() };
        reference.with(names.iter().map(String::as_str))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{DEBIAN}:{}", self.suite)?;
        self.packages.iter().try_for_each(|p| write!(f, "+{p}"))
    }
}

/// There is no image called `text`, of which `name` is the part before suite and packages.
fn no_image(text: &str, name: &str) -> Error {
    let near = nearest(name, [DEBIAN, BUSYBOX].into_iter());
    let hint = match known_suite(name) {
        Some(suite) => format!(" (did you mean {DEBIAN}:{suite}?)"),
        None => did_you_mean(&near),
    };
    Error::NoImage { name: text.to_owned(), hint }
}

/// The code name behind a name or number of a suite, if it is a known one.
fn known_suite(name: &str) -> Option<&str> {
    let known = || ALIASES.iter().map(|(_, suite)| *suite);
    known().find(|s| *s == name).or_else(|| ALIASES.iter().find(|(alias, _)| *alias == name).map(|(_, s)| *s))
}

/// Suites with nearly this name, as the end of a sentence; empty if it is the right name of one.
pub(crate) fn suite_hint(suite: &str) -> String {
    if known_suite(suite).is_some() {
        return String::new();
    }
    did_you_mean(&nearest(suite, ALIASES.iter().flat_map(|(a, b)| [*a, *b])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> String {
        text.parse::<Reference>().map_or_else(|e| e.to_string(), |r| r.to_string())
    }

    #[test]
    fn names_have_one_form() {
        for (given, becomes) in [
            ("debian", "debian:trixie"),
            ("debian:13", "debian:trixie"),
            ("debian:stable", "debian:trixie"),
            ("debian:12+nginx+git+nginx", "debian:bookworm+git+nginx"),
            ("debian+g++", "debian:trixie+g++"),
            ("debian+g+++vim+libstdc++-14-dev", "debian:trixie+g+++libstdc++-14-dev+vim"),
            ("debian:forky", "debian:forky"),
        ] {
            assert_eq!(parse(given), becomes);
            assert_eq!(parse(becomes), becomes);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert!(parse("debain").contains("did you mean debian?"));
        assert!(parse("busybx").contains("did you mean busybox?"));
        assert!(parse("bookworm").contains("did you mean debian:bookworm?"));
        assert!(parse("fedora").contains("no image") && !parse("fedora").contains("mean"));
        for bad in ["debian:", "debian:../x", "debian:a b", "debian+", "debian+Vim", "debian+a/b", "debian:12:13"] {
            assert!(parse(bad).contains("not a valid"), "{bad}: {}", parse(bad));
        }
        assert_eq!(suite_hint("bookwrm"), " (did you mean bookworm?)");
        assert_eq!(suite_hint("bookworm"), "");
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "debian[:+a-z0-9.+-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
