//! `tightrope doctor`: what this host can do. The host's part is [`vmm::doctor`]'s; here is what fetching images needs.

use std::io::Write;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::Result;
use vmm::doctor::{Check, Report, Verdict};

use crate::settings::Settings;

/// How long the mirror may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Prints the report; returns the exit code.
///
/// # Errors
/// The configuration file is wrong, or standard output is closed.
pub fn run(json: bool) -> Result<i32> {
    let settings = Settings::load()?;
    let report = Report::new(vec![image_check(), network_check(&settings)]);
    let text = if json { report.json() + "\n" } else { report.text() };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(report.exit_code())
}

fn check(name: &'static str, verdict: Verdict, found: String, remedy: Option<&str>) -> Check {
    Check { name, verdict, found, remedy: remedy.map(str::to_string) }
}

/// Is the default image there already?
fn image_check() -> Check {
    let options = image::Options { offline: true, progress: image::Progress::Quiet, ..image::Options::default() };
    match image::default_image(image::DEFAULT_SUITE, image::Flavour::default(), &options) {
        Ok(image) => check("image", Verdict::Good, format!("Debian's Linux {} is there", image.kernel_version), None),
        Err(_) => check("image", Verdict::Good, "Debian will be fetched at the first run".into(), None),
    }
}

/// Can packages be fetched? A proxy is taken at its word.
fn network_check(settings: &Settings) -> Check {
    let host = image::Host::current();
    let mirror = match image::mirror::Mirror::discover(&host, settings.mirror.as_deref()) {
        Ok(mirror) => mirror,
        Err(error) => return check("network", Verdict::Limited, error.to_string(), None),
    };
    let proxies = image::proxy::Proxies::read(&host);
    if let Ok(Some(_)) = proxies.for_url(&mirror.base) {
        return check("network", Verdict::Good, "packages come through the proxy that is set".into(), None);
    }
    let Some(address) = address(&mirror.base) else {
        return check("network", Verdict::Limited, format!("{} is no address of a mirror", mirror.base), None);
    };
    // Name servers that do not answer take longer than anybody waits.
    let (to, answer) = std::sync::mpsc::channel();
    let name = address.clone();
    let asking = std::thread::Builder::new().spawn(move || {
        let reached = name.to_socket_addrs().and_then(|mut all| {
            let first = all.next().ok_or_else(|| std::io::Error::other("the name has no address"))?;
            TcpStream::connect_timeout(&first, PATIENCE).map(|_| ())
        });
        let _ = to.send(reached);
    });
    if let Err(error) = asking {
        let why = format!("not asked: the host gives no thread: {}", agent::without_numbers(&error.to_string()));
        return check(
            "network",
            Verdict::Limited,
            why,
            Some("raise the limit of threads (ulimit -u, pids.max of the control group)"),
        );
    }
    let remedy = Some("give the host a network, set http_proxy, or name another mirror with --mirror URL");
    match answer.recv_timeout(2 * PATIENCE) {
        Ok(Ok(())) => check("network", Verdict::Good, "the Debian mirror can be reached".into(), None),
        Ok(Err(error)) => {
            let why = agent::without_numbers(&error.to_string());
            check("network", Verdict::Limited, format!("{address} cannot be reached: {why}"), remedy)
        }
        Err(_) => check("network", Verdict::Limited, format!("{address} does not answer"), remedy),
    }
}

/// `name:port` of a URL.
fn address(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split('/').next()?;
    let authority = authority.rsplit('@').next()?;
    let bracketed = authority.starts_with('[');
    let has_port = authority.rsplit_once(':').is_some_and(|(name, _)| !bracketed || name.ends_with(']'));
    let port = if scheme == "https" { 443 } else { 80 };
    Some(if has_port { authority.to_string() } else { format!("{authority}:{port}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (url, expected) in [
            ("http://deb.example/debian", "deb.example:80"),
            ("https://deb.example", "deb.example:443"),
            ("http://u:p@deb.example:8080/x", "deb.example:8080"),
            ("http://[::1]/x", "[::1]:80"),
            ("http://[::1]:81/x", "[::1]:81"),
        ] {
            assert_eq!(address(url).as_deref(), Some(expected));
        }
        assert_eq!(address("nonsense"), None);
    }
}
