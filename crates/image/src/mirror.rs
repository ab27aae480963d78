//! Which Debian mirror to ask, and which keys may sign for it.
//!
//! In this order: what the caller names (`--mirror`), `TIGHTROPE_MIRROR`, `mirror = "…"` in
//! `config.toml`, the host's APT sources. A mirror of one Debian release has all the others, so the
//! suites that a host's sources list do not limit what can be fetched.

use std::fs;
use std::path::PathBuf;

use crate::apt::{self, Source};
use crate::error::{Error, Result, redact};
use crate::host::Host;

/// Keyrings of Debian's archive, in the places Debian and its relatives install them.
const KEYRINGS: &[&str] =
    &["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// Suites and code names that only Debian's archive has.
const CODE_NAMES: &[&str] = &["buster", "bullseye", "bookworm", "trixie", "forky", "duke", "sid", "experimental"];

/// Suite names that third-party archives use too.
const COMMON_NAMES: &[&str] = &["stable", "oldstable", "oldoldstable", "testing", "unstable"];

/// Where packages come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Base URL; `dists/` and `pool/` lie below it. No slash at the end.
    pub base: String,
    /// Base URL of the security archive, if the host uses one.
    pub security: Option<String>,
    /// Files with keys that may sign, those that exist.
    pub keyrings: Vec<PathBuf>,
    /// Further keys, ASCII-armoured.
    pub inline_keys: Vec<String>,
    /// Who named this mirror, for messages.
    pub named_by: String,
    /// Every keyring path that was considered, for messages.
    pub keyrings_considered: Vec<PathBuf>,
}

/// The user's `config.toml`, as far as this crate reads it.
#[derive(Debug, Default, serde::Deserialize)]
struct ConfigFile {
    mirror: Option<String>,
    keyring: Option<PathBuf>,
}

impl Mirror {
    /// Finds the mirror to use.
    ///
    /// # Errors
    /// [`Error::NoMirror`] if nothing names one, [`Error::BadUrl`] if what is named cannot be used,
    /// [`Error::Config`] for an unreadable `config.toml`.
    pub fn discover(host: &Host, explicit: Option<&str>) -> Result<Self> {
        let config = read_config(host)?;
        let sources = apt::sources(host);
        let debian = debian_sources(&sources);

        let named = explicit
            .map(|url| (url, "--mirror"))
            .or_else(|| Some((host.var("TIGHTROPE_MIRROR")?, "TIGHTROPE_MIRROR")))
            .or_else(|| Some((config.mirror.as_deref()?, "config.toml")));
        let (base, named_by) = match named {
            Some((url, by)) => (check_url("mirror", url)?, by.to_owned()),
            None => {
                let (uri, source) = debian.first().ok_or_else(|| no_mirror(&sources))?;
                (check_url("mirror", uri)?, source.file.display().to_string())
            }
        };
        // The host's security archive belongs to the host's mirror; with a mirror named by hand the
        // user may be on a network that does not reach it.
        let security = match named {
            Some(_) => None,
            None => security_uri(&sources),
        };

        let mut considered: Vec<PathBuf> = Vec::new();
        let own = host.var("TIGHTROPE_KEYRING").map(PathBuf::from).or(config.keyring);
        match own {
            // Named by hand: that and nothing else.
            Some(path) => considered.push(path),
            None => {
                let from_sources = debian.iter().flat_map(|(_, s)| &s.keyrings);
                let known = KEYRINGS.iter().map(|p| host.path(p));
                for path in known.chain(from_sources.map(|p| host.path(p))) {
                    if !considered.contains(&path) {
                        considered.push(path);
                    }
                }
                considered.extend(
                    host.files("/etc/apt/trusted.gpg.d", &[".gpg", ".asc"])
                        .into_iter()
                        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("debian-archive"))),
                );
            }
        }
        let keyrings = considered.iter().filter(|p| p.exists()).cloned().collect();
        let inline_keys = debian.iter().filter_map(|(_, s)| s.inline_key.clone()).collect();
        Ok(Self { base, security, keyrings, inline_keys, named_by, keyrings_considered: considered })
    }
}

fn read_config(host: &Host) -> Result<ConfigFile> {
    let Some(path) = host.config_file() else {
        return Ok(ConfigFile::default());
    };
    let bad = |reason: String| Error::Config { path: path.clone(), reason };
    match fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text).map_err(|e| bad(e.message().replace('\n', " "))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(ConfigFile::default()),
        Err(e) => Err(bad(e.to_string())),
    }
}

/// Checks that `url` is one this crate can fetch from and strips trailing slashes.
pub(crate) fn check_url(what: &'static str, url: &str) -> Result<String> {
    let bad = |reason| Error::BadUrl { what, value: redact(url), reason };
    let rest = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"))
        .ok_or_else(|| bad("not http:// or https://"))?;
    if rest.is_empty() || rest.starts_with(['/', ':']) {
        return Err(bad("it has no host name"));
    }
    if !rest.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(bad("it has blanks or characters that are not ASCII"));
    }
    Ok(url.trim_end_matches('/').to_owned())
}

fn is_http(uri: &str) -> bool {
    uri.starts_with("http://") || uri.starts_with("https://")
}

fn is_security(uri: &str, source: &Source) -> bool {
    uri.contains("debian-security")
        || uri.contains("security.debian.org")
        || source.suites.iter().all(|s| s.ends_with("-security") || s.ends_with("/updates"))
}

/// The code name or suite at the front of `trixie-updates`, `trixie-backports`…
fn stem(suite: &str) -> &str {
    suite.split(['-', '/']).next().unwrap_or(suite)
}

/// URIs of Debian's main archive among the host's sources, the surest first.
fn debian_sources(sources: &[Source]) -> Vec<(&str, &Source)> {
    let mut found: Vec<(u8, &str, &Source)> = Vec::new();
    for source in sources {
        if !source.components.iter().any(|c| c == "main") {
            continue;
        }
        let code_name = source.suites.iter().any(|s| CODE_NAMES.contains(&stem(s)));
        let common = source.suites.iter().any(|s| COMMON_NAMES.contains(&stem(s)));
        let debian_keys = source.keyrings.iter().any(|k| k.to_string_lossy().contains("debian-archive"));
        for uri in &source.uris {
            if !is_http(uri) || is_security(uri, source) {
                continue;
            }
            let path = uri.trim_end_matches('/');
            let score = u8::from(path.ends_with("/debian") || path.contains("debian.org"))
                + u8::from(code_name)
                + 2 * u8::from(debian_keys);
            // `stable main` alone says nothing: many third-party archives have it.
            if (code_name && score > 1) || (common && score > 0) || debian_keys {
                found.push((score, uri, source));
            }
        }
    }
    found.sort_by_key(|(score, ..)| std::cmp::Reverse(*score));
    found.into_iter().map(|(_, uri, source)| (uri, source)).collect()
}

fn security_uri(sources: &[Source]) -> Option<String> {
    sources
        .iter()
        .flat_map(|s| s.uris.iter().map(move |u| (u, s)))
        .find(|(u, s)| {
            is_http(u)
                && is_security(u, s)
                && s.components.iter().any(|c| c == "main" || c == "updates/main")
                && s.suites.iter().any(|n| CODE_NAMES.contains(&stem(n)) || COMMON_NAMES.contains(&stem(n)))
        })
        .and_then(|(u, _)| check_url("security mirror", u).ok())
}

fn no_mirror(sources: &[Source]) -> Error {
    let ubuntu = sources.iter().flat_map(|s| &s.uris).any(|u| u.contains("ubuntu"));
    let looked = if ubuntu {
        "this host's APT sources are Ubuntu's, which has no such kernels"
    } else if sources.is_empty() {
        "this host has no APT sources"
    } else {
        "none of this host's APT sources is Debian's main archive over http or https"
    };
    Error::NoMirror { looked: looked.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)], env: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::at(dir.path(), env);
        (dir, host)
    }

    const SOURCES: &str = "Types: deb\nURIs: https://dl.example/x\nSuites: stable\nComponents: main\n\n\
        Types: deb\nURIs: http://m.example/debian/\nSuites: bookworm bookworm-updates\nComponents: main\n\
        Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
        Types: deb\nURIs: http://m.example/debian-security/\nSuites: bookworm-security\nComponents: main\n";

    #[test]
    fn from_the_hosts_sources() {
        let (_d, h) = host(
            &[
                ("etc/apt/sources.list.d/debian.sources", SOURCES),
                ("usr/share/keyrings/debian-archive-keyring.gpg", ""),
            ],
            &[],
        );
        let m = Mirror::discover(&h, None).unwrap();
        assert_eq!(m.base, "http://m.example/debian");
        assert_eq!(m.security.as_deref(), Some("http://m.example/debian-security"));
        assert_eq!(m.keyrings.len(), 1);
        assert!(m.named_by.ends_with("debian.sources"));
    }

    #[test]
    fn who_names_a_mirror_wins_in_order() {
        let files = [
            ("etc/apt/sources.list.d/debian.sources", SOURCES),
            ("cfg/tightrope/config.toml", "mirror = \"http://config/debian\"\n"),
        ];
        let (d, _) = host(&files, &[]);
        let cfg = d.path().join("cfg");
        let cfg = cfg.to_str().unwrap();
        let h = |env: &[(&str, &str)]| Host::at(d.path(), env);
        let base = |h: &Host, e| Mirror::discover(h, e).unwrap().base;
        let with = h(&[("XDG_CONFIG_HOME", cfg), ("TIGHTROPE_MIRROR", "http://env/debian")]);
        assert_eq!(base(&with, Some("http://flag/debian/")), "http://flag/debian");
        assert_eq!(base(&with, None), "http://env/debian");
        assert_eq!(base(&h(&[("XDG_CONFIG_HOME", cfg)]), None), "http://config/debian");
        assert_eq!(base(&h(&[]), None), "http://m.example/debian");
    }

    #[test]
    fn none_is_an_error_with_the_remedy() {
        let message = |list: &str| {
            let (_d, h) = host(&[("etc/apt/sources.list", list)], &[]);
            Mirror::discover(&h, None).unwrap_err().to_string()
        };
        assert!(message("").contains("--mirror"));
        let ubuntu = message("deb http://archive.ubuntu.com/ubuntu noble main\n");
        assert!(ubuntu.contains("Ubuntu") && ubuntu.contains("--mirror"), "{ubuntu}");
        assert!(message("deb https://dl.example/x stable main\n").contains("--mirror"));
        assert!(message("deb cdrom:[Debian]/ bookworm main\n").contains("--mirror"));
    }

    #[test]
    fn unusable_urls_are_refused() {
        let (_d, h) = host(&[], &[]);
        for url in ["ftp://x/debian", "x", "http://", "http:///d", "http://a b/"] {
            let e = Mirror::discover(&h, Some(url)).unwrap_err();
            assert!(matches!(e, Error::BadUrl { .. }), "{url}: {e}");
        }
    }

    #[test]
    fn a_broken_config_file_is_named() {
        let (d, _) = host(&[("c/tightrope/config.toml", "mirror = [\n")], &[]);
        let c = d.path().join("c");
        let h = Host::at(d.path(), &[("XDG_CONFIG_HOME", c.to_str().unwrap())]);
        let e = Mirror::discover(&h, None).unwrap_err().to_string();
        assert!(e.contains("config.toml") && !e.contains('\n'), "{e}");
    }
}
