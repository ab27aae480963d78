//! The host's own APT configuration: package sources (sources.list(5)) and settings (apt.conf(5)).
//!
//! Read, never written, and only what says where Debian packages come from and how to get there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::deb822::{self, Paragraph};
use crate::host::Host;

/// One entry of the package sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Base URIs, `mirror+file:` lists already replaced by what they list.
    pub uris: Vec<String>,
    /// Suites or code names.
    pub suites: Vec<String>,
    /// Components, such as `main`.
    pub components: Vec<String>,
    /// Keyring files that may sign this source.
    pub keyrings: Vec<PathBuf>,
    /// A key written into the entry itself, ASCII-armoured.
    pub inline_key: Option<String>,
    /// The file the entry stands in.
    pub file: PathBuf,
}

/// All enabled binary-package sources for amd64, in APT's order. Unreadable or malformed files are
/// left out: APT complains about those, and others may do.
pub fn sources(host: &Host) -> Vec<Source> {
    let mut files = vec![host.path("/etc/apt/sources.list")];
    files.extend(host.files("/etc/apt/sources.list.d", &[".list", ".sources"]));
    let mut all = Vec::new();
    for file in files {
        let Ok(text) = fs::read(&file) else { continue };
        if file.extension().is_some_and(|e| e == "sources") {
            let paragraphs = deb822::parse(&text).unwrap_or_default();
            all.extend(paragraphs.iter().filter_map(|p| deb822_source(p, &file)));
        } else {
            let text = String::from_utf8_lossy(&text);
            all.extend(text.lines().filter_map(|l| list_source(l, &file)));
        }
    }
    for source in &mut all {
        source.uris =
            std::mem::take(&mut source.uris).into_iter().flat_map(|uri| expand_mirror_list(host, uri)).collect();
    }
    all
}

/// A line of the old format: `deb [option=value …] URI suite component…`.
fn list_source(line: &str, file: &Path) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let mut rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let mut keyrings = Vec::new();
    if let Some(after) = rest.strip_prefix('[') {
        let (options, after) = after.split_once(']')?;
        rest = after;
        for option in options.split_whitespace() {
            let (name, value) = option.split_once('=')?;
            match name.trim_end_matches(['+', '-']) {
                "arch" if !value.split(',').any(|a| a == "amd64") => return None,
                "signed-by" => keyrings.extend(key_paths(value)),
                _ => {}
            }
        }
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        keyrings,
        inline_key: None,
        file: file.to_path_buf(),
    })
}

/// A paragraph of the new format.
fn deb822_source(p: &Paragraph, file: &Path) -> Option<Source> {
    let no = |v: &str| ["no", "false", "0", "off"].contains(&v.to_ascii_lowercase().as_str());
    if !p.words("Types").iter().any(|t| t == "deb") || p.get("Enabled").is_some_and(no) {
        return None;
    }
    let archs = p.words("Architectures");
    if !archs.is_empty() && !archs.iter().any(|a| a == "amd64") {
        return None;
    }
    let signed_by = p.get("Signed-By").unwrap_or("").trim();
    let inline = signed_by.starts_with("-----BEGIN PGP PUBLIC KEY BLOCK-----");
    // In a folded field an empty line is written as a dot.
    let unfold = |key: &str| {
        key.lines().map(|l| if l.trim() == "." { "" } else { l }).fold(String::new(), |all, l| all + l + "\n")
    };
    Some(Source {
        uris: p.words("URIs"),
        suites: p.words("Suites"),
        components: p.words("Components"),
        keyrings: if inline { Vec::new() } else { key_paths(signed_by).collect() },
        inline_key: inline.then(|| unfold(signed_by)),
        file: file.to_path_buf(),
    })
}

/// The absolute paths in a `signed-by`; fingerprints are left out.
fn key_paths(value: &str) -> impl Iterator<Item = PathBuf> {
    value.split([',', ' ', '\t', '\n']).filter(|v| v.starts_with('/')).map(PathBuf::from)
}

/// APT's `mirror` method with a local list, as Debian's own cloud images use it.
fn expand_mirror_list(host: &Host, uri: String) -> Vec<String> {
    let path = ["mirror+file://", "mirror:file://", "mirror+file:"].iter().find_map(|prefix| uri.strip_prefix(prefix));
    let Some(path) = path else { return vec![uri] };
    fs::read_to_string(host.path(path))
        .unwrap_or_default()
        .lines()
        .filter_map(|l| l.split('#').next()?.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// APT's settings: lower-case `a::b::c` names, last value wins.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Conf(BTreeMap<String, String>);

impl Conf {
    /// Reads `/etc/apt/apt.conf.d/*`, then `/etc/apt/apt.conf`.
    pub fn read(host: &Host) -> Self {
        let mut files = host.files("/etc/apt/apt.conf.d", &["", ".conf"]);
        files.push(host.path("/etc/apt/apt.conf"));
        let mut conf = Self::default();
        for file in files {
            if let Ok(text) = fs::read(&file) {
                conf.parse(&String::from_utf8_lossy(&text));
            }
        }
        conf
    }

    /// A setting that is there and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(&name.to_ascii_lowercase()).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// Whether a boolean setting is explicitly off.
    pub fn is_off(&self, name: &str) -> bool {
        self.get(name).is_some_and(|v| {
            ["no", "false", "without", "off", "disable", "0"].contains(&v.to_ascii_lowercase().as_str())
        })
    }

    /// Adds the settings of one file. Unclosed scopes and stray words are passed over, as the file
    /// is the administrator's, not ours.
    fn parse(&mut self, text: &str) {
        let mut scopes: Vec<String> = Vec::new();
        let mut words: Vec<String> = Vec::new();
        let full = |scopes: &[String], name: &str| {
            let mut parts = scopes.to_vec();
            parts.push(name.to_ascii_lowercase());
            parts.retain(|p| !p.is_empty());
            parts.join("::")
        };
        for token in tokens(text) {
            match token {
                Token::Word(w) => words.push(w),
                Token::Open => {
                    scopes.push(words.drain(..).next().unwrap_or_default().to_ascii_lowercase());
                }
                Token::End | Token::Close => {
                    // A name ending in `::` adds to a list; no list matters here.
                    if let [name, value] = &words[..]
                        && !name.ends_with("::")
                        && !name.starts_with('#')
                    {
                        self.0.insert(full(&scopes, name), value.clone());
                    }
                    words.clear();
                    if token == Token::Close {
                        scopes.pop();
                    }
                }
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Open,
    Close,
    End,
}

/// Splits apt.conf syntax: words, quoted strings, `{`, `}`, `;`, and `//`, `#`, `/* */` comments.
fn tokens(text: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut chars = text.chars().peekable();
    let mut word = String::new();
    let flush = |word: &mut String, out: &mut Vec<Token>| {
        if !word.is_empty() {
            out.push(Token::Word(std::mem::take(word)));
        }
    };
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                flush(&mut word, &mut out);
                out.push(Token::Word(chars.by_ref().take_while(|c| *c != '"').collect()));
            }
            '#' if word.is_empty() => while chars.next_if(|c| *c != '\n').is_some() {},
            '/' if chars.peek() == Some(&'/') && word.is_empty() => while chars.next_if(|c| *c != '\n').is_some() {},
            '/' if chars.peek() == Some(&'*') => {
                let mut last = ' ';
                chars.next();
                for c in chars.by_ref() {
                    if last == '*' && c == '/' {
                        break;
                    }
                    last = c;
                }
            }
            '{' | '}' | ';' => {
                flush(&mut word, &mut out);
                out.push(match c {
                    '{' => Token::Open,
                    '}' => Token::Close,
                    _ => Token::End,
                });
            }
            c if c.is_whitespace() => flush(&mut word, &mut out),
            c => word.push(c),
        }
    }
    flush(&mut word, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::at(dir.path(), &[]);
        (dir, host)
    }

    #[test]
    fn both_formats_are_read() {
        let (_d, host) = host(&[
            (
                "etc/apt/sources.list",
                "# deb http://no/ x main\n\
                 deb [arch=amd64,i386 signed-by=/k.gpg] http://a/debian bookworm main contrib # c\n\
                 deb-src http://a/debian bookworm main\n\
                 deb [arch=arm64] http://arm/debian bookworm main\n",
            ),
            (
                "etc/apt/sources.list.d/debian.sources",
                "Types: deb deb-src\n# c\nURIs: http://b/debian\nSuites: trixie trixie-updates\n\
                 Components: main\nSigned-By: /k1.gpg\n\nTypes: deb\nEnabled: no\nURIs: http://off/\n\
                 Suites: x\n\nTypes: deb\nURIs: mirror+file:///etc/apt/mirrors/d.list\nSuites: sid\n\
                 Components: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n",
            ),
            ("etc/apt/sources.list.d/old.list.disabled", "deb http://disabled/ x main"),
            ("etc/apt/mirrors/d.list", "http://m1/debian\tpriority:1\n# x\nhttp://m2/debian\n"),
        ]);
        let s = sources(&host);
        assert_eq!(s.len(), 3);
        assert_eq!(s[0].uris, ["http://a/debian"]);
        assert_eq!(s[0].components, ["main", "contrib"]);
        assert_eq!(s[0].keyrings, [Path::new("/k.gpg")]);
        assert_eq!(s[1].suites, ["trixie", "trixie-updates"]);
        assert_eq!(s[1].keyrings, [Path::new("/k1.gpg")]);
        assert_eq!(s[2].uris, ["http://m1/debian", "http://m2/debian"]);
        assert_eq!(s[2].inline_key.as_deref(), Some("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nabc\n"));
    }

    #[test]
    fn malformed_sources_are_passed_over() {
        let (_d, host) = host(&[
            ("etc/apt/sources.list", "deb\ndeb [x http://a b c\ndeb http://only-uri\n\u{0}\n"),
            ("etc/apt/sources.list.d/x.sources", "Types deb\nURIs: x\n"),
        ]);
        assert_eq!(sources(&host), []);
    }

    #[test]
    fn settings_nested_flat_and_commented() {
        let (_d, host) = host(&[
            (
                "etc/apt/apt.conf.d/10a",
                "Acquire::http::Proxy \"http://p:1\"; // c\n# Acquire::http::Proxy \"no\";\n\
                 Acquire { Check-Valid-Until \"false\"; https { Proxy \"DIRECT\"; }; /* x; */ };\n\
                 APT::List:: \"a\";",
            ),
            ("etc/apt/apt.conf.d/10a.save", "Acquire::http::Proxy \"http://saved:1\";"),
            ("etc/apt/apt.conf", "acquire::HTTP::proxy \"http://q:2\";"),
        ]);
        let conf = Conf::read(&host);
        assert_eq!(conf.get("Acquire::http::Proxy"), Some("http://q:2"));
        assert_eq!(conf.get("Acquire::https::Proxy"), Some("DIRECT"));
        assert!(conf.is_off("Acquire::Check-Valid-Until"));
        assert!(!conf.is_off("Acquire::Check-Date"));
        assert_eq!(conf.get("APT::List"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".{0,200}") {
            Conf::default().parse(&text);
            let _ = list_source(&text, Path::new("x"));
        }
    }
}
