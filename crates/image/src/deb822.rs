//! Debian's control format (deb822): paragraphs of `Field: value` with continuation lines.
//!
//! Used for `Release` and `Packages` indexes (from the network, so bounded), `*.sources` files of
//! APT, and nothing else. The format is deb822(5); comment lines start with `#`.

use std::io::{self, BufRead, Read};

/// The longest paragraph accepted, in bytes: `Release` is one paragraph and has some 200 KiB.
const MAX_PARAGRAPH: usize = 8 << 20;

/// One paragraph: its fields in order. Names compare without regard to case.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Paragraph {
    fields: Vec<(String, String)>,
}

impl Paragraph {
    /// The value of a field: the text after the colon, trimmed; continuation lines follow, each after
    /// a newline and without its first blank.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// The words of a field, none if it is absent.
    pub fn words(&self, name: &str) -> Vec<String> {
        self.get(name).unwrap_or("").split_whitespace().map(str::to_owned).collect()
    }
}

/// Reads paragraphs one after the other, holding only one in memory.
pub struct Reader<R> {
    input: R,
    keep: Option<&'static [&'static str]>,
    line: Vec<u8>,
}

fn bad(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}

impl<R: BufRead> Reader<R> {
    /// Reads all fields.
    pub fn new(input: R) -> Self {
        Self { input, keep: None, line: Vec::new() }
    }

    /// Reads only the fields named.
    pub fn keeping(input: R, keep: &'static [&'static str]) -> Self {
        Self { keep: Some(keep), ..Self::new(input) }
    }

    /// The next paragraph, `None` at the end of input.
    ///
    /// # Errors
    /// What the input fails with, and `InvalidData` for what is not deb822.
    pub fn next_paragraph(&mut self) -> io::Result<Option<Paragraph>> {
        let mut paragraph = Paragraph::default();
        let mut seen = false;
        let mut skipping = false;
        let mut total = 0usize;
        loop {
            self.line.clear();
            let room = MAX_PARAGRAPH.saturating_sub(total).saturating_add(1);
            let n = (&mut self.input).take(room as u64).read_until(b'\n', &mut self.line)?;
            total = total.saturating_add(n);
            if total > MAX_PARAGRAPH {
                return Err(bad("a paragraph is too long"));
            }
            if n == 0 {
                return Ok(seen.then_some(paragraph));
            }
            let line = std::str::from_utf8(&self.line).map_err(|_| bad("not UTF-8"))?;
            let line = line.strip_suffix('\n').unwrap_or(line);
            let line = line.strip_suffix('\r').unwrap_or(line);
            if line.starts_with('#') {
                continue;
            }
            if line.trim().is_empty() {
                if seen {
                    return Ok(Some(paragraph));
                }
                continue;
            }
            if let Some(rest) = line.strip_prefix([' ', '\t']) {
                if !seen {
                    return Err(bad("a continuation line without a field"));
                }
                if !skipping && let Some((_, value)) = paragraph.fields.last_mut() {
                    value.push('\n');
                    value.push_str(rest.trim_end());
                }
                continue;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| bad("a line without a colon"))?;
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(bad("a field name with blanks or control characters"));
            }
            seen = true;
            skipping = self.keep.is_some_and(|keep| !keep.iter().any(|k| k.eq_ignore_ascii_case(name)));
            if !skipping {
                if paragraph.get(name).is_some() {
                    return Err(bad("a field given twice"));
                }
                paragraph.fields.push((name.to_owned(), value.trim().to_owned()));
            }
        }
    }
}

/// All paragraphs of a text.
///
/// # Errors
/// `InvalidData` for what is not deb822.
pub fn parse(text: &[u8]) -> io::Result<Vec<Paragraph>> {
    let mut reader = Reader::new(text);
    let mut all = Vec::new();
    while let Some(p) = reader.next_paragraph()? {
        all.push(p);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paragraphs_fields_and_continuations() {
        let p = parse(b"# c\nA: 1\nB: x\n y\n# in between\n\tz\n\n\nC:\n d\n").unwrap();
        assert_eq!(p.len(), 2);
        assert_eq!(p[0].get("a"), Some("1"));
        assert_eq!(p[0].get("B"), Some("x\ny\nz"));
        assert_eq!(p[1].words("c"), ["d"]);
        assert_eq!(p[1].get("A"), None);
    }

    #[test]
    fn malformed_is_an_error() {
        for text in [&b"no colon\n"[..], b" x\n", b"A: 1\nA: 2\n", b"A B: 1\n", b": 1\n", b"A: \xff\n"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn keeping_skips_continuations_of_the_rest() {
        let mut r = Reader::keeping(&b"A: 1\n 2\nB: 3\n 4\n"[..], &["B"]);
        let p = r.next_paragraph().unwrap().unwrap();
        assert_eq!(p.get("A"), None);
        assert_eq!(p.get("B"), Some("3\n4"));
    }

    #[test]
    fn a_paragraph_has_a_bound() {
        let long = vec![b'a'; MAX_PARAGRAPH + 2];
        assert!(parse(&long).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&data);
        }

        #[test]
        fn what_is_written_is_read(values in proptest::collection::vec("[a-z0-9]{1,8}", 1..8)) {
            let text: String = values.iter().enumerate()
                .map(|(i, v)| format!("F{i}: {v}\n {v}\n")).collect();
            let p = parse(text.as_bytes()).unwrap();
            for (i, v) in values.iter().enumerate() {
                let expected = format!("{v}\n{v}");
                prop_assert_eq!(p[0].get(&format!("f{i}")), Some(expected.as_str()));
            }
        }
    }
}
