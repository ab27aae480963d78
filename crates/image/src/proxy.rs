//! Which proxy, if any, a URL is fetched through.
//!
//! In this order: APT's setting for that very host, the environment (`http_proxy`, `https_proxy`,
//! `all_proxy`, `no_proxy`), APT's general setting. `DIRECT` means none.

use crate::apt::Conf;
use crate::error::{Error, Result, redact};
use crate::host::Host;

/// The proxy settings of a host.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    apt: Conf,
    http: Option<String>,
    https: Option<String>,
    none: Vec<String>,
}

impl Proxies {
    /// Gathers the settings.
    pub fn read(host: &Host) -> Self {
        // As curl does, the upper-case HTTP_PROXY is not read: a CGI request can set it.
        let all = host.var("all_proxy").or_else(|| host.var("ALL_PROXY"));
        let http = host.var("http_proxy").or(all);
        let https = host.var("https_proxy").or_else(|| host.var("HTTPS_PROXY")).or(all);
        let none = host.var("no_proxy").or_else(|| host.var("NO_PROXY"));
        Self {
            apt: Conf::read(host),
            http: http.map(str::to_owned),
            https: https.map(str::to_owned),
            none: none
                .unwrap_or("")
                .split([',', ' '])
                .map(|s| s.trim().to_ascii_lowercase())
                .filter(|s| !s.is_empty())
                .collect(),
        }
    }

    /// The proxy for a URL, as a URL; `None` to connect directly.
    ///
    /// # Errors
    /// [`Error::BadUrl`] for a proxy that is not spoken to by HTTP (SOCKS, for instance).
    pub fn for_url(&self, url: &str) -> Result<Option<String>> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let authority = rest.split('/').next().unwrap_or("");
        let host_port = authority.rsplit('@').next().unwrap_or("");
        let host = match host_port.strip_prefix('[') {
            Some(v6) => v6.split(']').next().unwrap_or(""),
            None => host_port.split(':').next().unwrap_or(""),
        }
        .to_ascii_lowercase();

        let for_host = self.apt.get(&format!("acquire::{scheme}::proxy::{host}"));
        let chosen = if let Some(value) = for_host {
            value
        } else if self.is_excepted(&host, host_port) {
            return Ok(None);
        } else {
            let env = if scheme == "https" { &self.https } else { &self.http };
            let apt =
                || self.apt.get(&format!("acquire::{scheme}::proxy")).or_else(|| self.apt.get("acquire::http::proxy"));
            match env.as_deref().or_else(apt) {
                Some(value) => value,
                None => return Ok(None),
            }
        };
        if chosen.eq_ignore_ascii_case("direct") {
            return Ok(None);
        }
        let url = match chosen.contains("://") {
            true => chosen.to_owned(),
            false => format!("http://{chosen}"),
        };
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(Error::BadUrl {
                what: "proxy",
                value: redact(&url),
                reason: "only HTTP proxies are supported",
            });
        }
        Ok(Some(url))
    }

    fn is_excepted(&self, host: &str, host_port: &str) -> bool {
        self.none.iter().any(|rule| {
            let suffix = rule.trim_start_matches('*').trim_start_matches('.');
            rule == "*"
                || rule == host_port
                || host == suffix
                || (!suffix.is_empty() && host.strip_suffix(suffix).is_some_and(|front| front.ends_with('.')))
        })
    }

    /// Whether the administrator told APT not to check `Valid-Until`.
    pub(crate) fn check_valid_until_off(&self) -> bool {
        self.apt.is_off("Acquire::Check-Valid-Until")
    }

    /// Whether the administrator told APT not to check dates at all.
    pub(crate) fn check_date_off(&self) -> bool {
        self.apt.is_off("Acquire::Check-Date")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(conf: &str, env: &[(&str, &str)]) -> Proxies {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("etc/apt")).unwrap();
        std::fs::write(dir.path().join("etc/apt/apt.conf"), conf).unwrap();
        Proxies::read(&Host::at(dir.path(), env))
    }

    #[test]
    fn environment_apt_and_exceptions() {
        let p = proxies("Acquire::http::Proxy \"http://apt:1\"; Acquire::http::Proxy::own.example \"DIRECT\";", &[]);
        let url = |p: &Proxies, u: &str| p.for_url(u).unwrap();
        assert_eq!(url(&p, "http://m/d").as_deref(), Some("http://apt:1"));
        assert_eq!(url(&p, "http://own.example/d"), None);

        let p = proxies(
            "Acquire::http::Proxy \"http://apt:1\";",
            &[
                ("http_proxy", "envp:3128"),
                ("https_proxy", "http://s:1"),
                ("no_proxy", "localhost, .corp.example,h:8080"),
            ],
        );
        assert_eq!(url(&p, "http://m/d").as_deref(), Some("http://envp:3128"));
        assert_eq!(url(&p, "https://m/d").as_deref(), Some("http://s:1"));
        assert_eq!(url(&p, "http://localhost:80/d"), None);
        assert_eq!(url(&p, "http://a.corp.example/d"), None);
        assert_eq!(url(&p, "http://h:8080/d"), None);
        assert!(url(&p, "http://notcorp.example/d").is_some());
        assert!(url(&p, "http://h/d").is_some());
        assert_eq!(url(&proxies("", &[]), "http://m/d"), None);
    }

    #[test]
    fn socks_is_refused_by_name() {
        let p = proxies("", &[("all_proxy", "socks5://u:secret@x:1080")]);
        let e = p.for_url("http://m/").unwrap_err().to_string();
        assert!(e.contains("socks5://x:1080") && !e.contains("secret"), "{e}");
    }
}
