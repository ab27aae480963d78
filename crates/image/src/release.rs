//! The `Release` index of a suite: which files it has, by SHA-256, and for how long it holds
//! (Debian wiki, DebianRepository/Format).

use std::collections::HashMap;

use crate::deb822;
use crate::http::Hash;

/// A file the index vouches for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Hash of its content.
    pub sha256: Hash,
    /// Its size in bytes.
    pub size: u64,
}

/// What this crate uses of a `Release` file. MD5 and SHA-1 sums in it are never looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release {
    /// `Suite`, such as `stable`.
    pub suite: String,
    /// `Codename`, such as `trixie`.
    pub codename: String,
    /// `Date`, in seconds since 1970.
    pub date: u64,
    /// `Valid-Until`, in seconds since 1970, if given.
    pub valid_until: Option<u64>,
    /// Whether files may be fetched by hash.
    pub by_hash: bool,
    /// The files, by path below `dists/<suite>/`.
    pub files: HashMap<String, Entry>,
}

impl Release {
    /// Parses the signed text.
    ///
    /// # Errors
    /// What is wrong, as a phrase for [`crate::Error::Malformed`].
    pub fn parse(text: &str) -> Result<Self, String> {
        let paragraphs = deb822::parse(text.as_bytes()).map_err(|e| e.to_string())?;
        let [p] = &paragraphs[..] else {
            return Err("it does not have exactly one paragraph".into());
        };
        let field = |name: &str| p.get(name).unwrap_or("").to_owned();
        let date = |name: &str| match p.get(name) {
            Some(v) => parse_date(v).map(Some).ok_or(format!("bad {name}")),
            None => Ok(None),
        };
        let mut files = HashMap::new();
        for line in p.get("SHA256").ok_or("it has no SHA256 list")?.lines() {
            let mut words = line.split_whitespace();
            let Some(hash) = words.next() else { continue };
            let entry =
                parse_hash(hash).zip(words.next().and_then(parse_size)).map(|(sha256, size)| Entry { sha256, size });
            match (entry, words.next(), words.next()) {
                (Some(entry), Some(path), None) => files.insert(path.to_owned(), entry),
                _ => return Err("bad line in its SHA256 list".into()),
            };
        }
        Ok(Self {
            suite: field("Suite"),
            codename: field("Codename"),
            date: date("Date")?.ok_or("it has no Date")?,
            valid_until: date("Valid-Until")?,
            by_hash: p.get("Acquire-By-Hash") == Some("yes"),
            files,
        })
    }
}

/// Digits only: `parse` alone would take a sign.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// 64 hexadecimal digits.
pub(crate) fn parse_hash(text: &str) -> Option<Hash> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = Hash::default();
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(hash)
}

/// Hexadecimal digits of some bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// `Sat, 12 Sep 2026 07:55:41 UTC` in seconds since 1970; years 1970 to 9999.
pub(crate) fn parse_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split_whitespace().collect();
    let [_weekday, day, month, year, time, zone] = &words[..] else {
        return None;
    };
    let mut clock = time.split(':').map(parse_size);
    let (h, m, s) = (clock.next()??, clock.next()??, clock.next()??);
    let (day, year) = (parse_size(day)?, parse_size(year)?);
    let month = MONTHS.iter().position(|n| n == month)? as u64 + 1;
    let in_range = (1..=31).contains(&day)
        && (1970..=9999).contains(&year)
        && h < 24
        && m < 60
        && s <= 60
        && clock.next().is_none()
        && ["UTC", "GMT", "+0000"].contains(zone);
    if !in_range {
        return None;
    }
    // Days from a civil date, counting years from March.
    let (y, mm) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let day_of_year = (153 * mm + 2) / 5 + day - 1;
    let days = (365 * y + y / 4 - y / 100 + y / 400 + day_of_year).checked_sub(719_468)?;
    Some(days * 86_400 + h * 3600 + m * 60 + s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn dates() {
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 UTC"), Some(0));
        assert_eq!(parse_date("Sat, 12 Sep 2026 07:55:41 UTC"), Some(1_789_199_741));
        assert_eq!(parse_date("Tue, 29 Feb 2000 23:59:59 UTC"), Some(951_868_799));
        for bad in [
            "",
            "Sat, 12 Sep 2026 07:55:41",
            "Sat, 12 Sep 2026 07:55:41 CET",
            "Sat, 32 Sep 2026 07:55:41 UTC",
            "Sat, 12 Foo 2026 07:55:41 UTC",
            "Sat, 12 Sep 2026 24:55:41 UTC",
            "Sat, 12 Sep +026 07:55:41 UTC",
        ] {
            assert_eq!(parse_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_release() {
        let h = "ab".repeat(32);
        let r = Release::parse(&format!(
            "Suite: stable\nCodename: trixie\nDate: Sat, 12 Sep 2026 07:55:41 UTC\n\
             Acquire-By-Hash: yes\nMD5Sum:\n 00 1 a\nSHA256:\n {h} 12 main/x\n"
        ))
        .unwrap();
        assert_eq!((r.suite.as_str(), r.codename.as_str(), r.by_hash), ("stable", "trixie", true));
        assert_eq!(r.files["main/x"], Entry { sha256: [0xab; 32], size: 12 });
        assert_eq!(r.valid_until, None);
    }

    #[test]
    fn malformed_is_an_error() {
        let d = "Date: Sat, 12 Sep 2026 07:55:41 UTC\n";
        let h = "ab".repeat(32);
        for text in [
            String::new(),
            d.to_owned(),
            "SHA256:\n".to_owned(),
            format!("{d}SHA256:\n {h} x y\n"),
            format!("{d}SHA256:\n {h} -1 y\n"),
            format!("{d}SHA256:\n {h} 1\n"),
            format!("{d}SHA256:\n {h} 1 a b\n"),
            format!("{d}SHA256:\n {} 1 a\n", &h[1..]),
            format!("{d}Valid-Until: soon\nSHA256:\n"),
            format!("{d}SHA256:\n\n{d}"),
        ] {
            assert!(Release::parse(&text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".{0,200}") {
            let _ = Release::parse(&text);
            let _ = parse_date(&text);
            let _ = parse_hash(&text);
        }

        #[test]
        fn dates_grow_by_a_day(day in 1u64..28, month in 0usize..12, year in 1970u64..2100) {
            let months = ["Jan","Feb","Mar","Apr","May","Jun","Jul","Aug","Sep","Oct","Nov","Dec"];
            let at = |d: u64| parse_date(&format!("Mon, {d} {} {year} 01:02:03 UTC", months[month])).unwrap();
            prop_assert_eq!(at(day + 1) - at(day), 86_400);
        }
    }
}
