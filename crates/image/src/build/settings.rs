//! The files of a system that come from no package: its name, its network, where its packages come from, who may log in.

use crate::error::{Result, redact};
use crate::mirror::Mirror;
use crate::proxy::Proxies;
use crate::rootfs::{Extra, What};

/// How a guest calls its host (docs/threat-model.md).
const HOST: &str = "host.tightrope.internal";

/// Network by DHCP, whatever the card is called. A guest waits for nothing.
const NETWORK: &str = "[Match]\nType=ether\n\n[Network]\nDHCP=yes\n\n[DHCPv4]\nUseDomains=yes\n";

/// A console that is logged in as root, as on a developer's machine: who has the console has the VM. Root has no password, so nobody
/// comes in by another way.
const AUTOLOGIN: &str = "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noissue --keep-baud 115200,57600,38400,9600 - $TERM\n";

/// Keys of the SSH server are made where it first runs: two machines from one image must not share them.
const SSH_KEYS: &str = "[Unit]\nDescription=Make the SSH host keys\nBefore=ssh.service ssh.socket\n\
    ConditionPathExists=/usr/sbin/sshd\nConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key\n\n\
    [Service]\nType=oneshot\nExecStart=/usr/bin/ssh-keygen -A\n\n[Install]\nWantedBy=multi-user.target\n";

/// The files, for a system of this suite.
pub(super) fn files(suite: &str, mirror: &Mirror, proxies: &Proxies) -> Result<Vec<Extra>> {
    let mut all = Vec::new();
    let mut put = |path: &str, text: String| {
        all.push(Extra { path: path.to_owned(), mode: 0o644, what: What::File(text.into_bytes()) });
    };
    put("etc/hostname", "debian\n".into());
    put("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost ip6-localhost ip6-loopback\n".into());
    put("etc/fstab", "/dev/vda / ext4 errors=remount-ro 0 0\n".into());
    put("etc/default/locale", "LANG=C.UTF-8\n".into());
    put("etc/timezone", "Etc/UTC\n".into());
    put("etc/systemd/network/80-ethernet.network", NETWORK.into());
    for unit in ["serial-getty@", "getty@", "console-getty"] {
        put(&format!("etc/systemd/system/{unit}.service.d/autologin.conf"), AUTOLOGIN.into());
    }
    put("etc/systemd/system/tightrope-ssh-keys.service", SSH_KEYS.into());
    put("etc/apt/sources.list.d/debian.sources", sources(suite, mirror));
    if let Some(proxy) = proxies.for_url(&mirror.base)? {
        put(
            "etc/apt/apt.conf.d/80tightrope-proxy",
            format!("Acquire::http::Proxy \"{}\";\n", as_seen_by_guests(&proxy)),
        );
    }
    all.push(Extra {
        path: "etc/localtime".into(),
        mode: 0o777,
        what: What::Link("/usr/share/zoneinfo/Etc/UTC".into()),
    });
    Ok(all)
}

/// APT's sources: the mirror that the image came from.
fn sources(suite: &str, mirror: &Mirror) -> String {
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let source = |uri: &str, suites: &str| {
        let uri = as_seen_by_guests(uri);
        format!("Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\nSigned-By: {keys}\n")
    };
    if suite == "sid" {
        return source(&mirror.base, suite);
    }
    let mut text = source(&mirror.base, &format!("{suite} {suite}-updates"));
    if let Some(security) = &mirror.security {
        text += "\n";
        text += &source(security, &format!("{suite}-security"));
    }
    text
}

/// A URL for a guest: a server on the host's loopback interface is somewhere else for it, and it is given no password.
fn as_seen_by_guests(url: &str) -> String {
    let url = redact(url);
    let Some((scheme, rest)) = url.split_once("://") else { return url };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (name, port) = match authority.strip_prefix('[').and_then(|v6| v6.split_once(']')) {
        Some((v6, port)) => (v6, port),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    match name == "localhost" || name == "::1" || name.starts_with("127.") {
        true => format!("{scheme}://{HOST}{port}{path}"),
        false => url,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;

    #[test]
    fn the_host_s_own_servers_are_renamed() {
        for (given, becomes) in [
            ("http://127.0.0.1:3142/debian", "http://host.tightrope.internal:3142/debian"),
            ("http://localhost/debian", "http://host.tightrope.internal/debian"),
            ("http://[::1]:8/x", "http://host.tightrope.internal:8/x"),
            ("https://u:p@m.example/debian", "https://m.example/debian"),
            ("http://127host.example/", "http://127host.example/"),
        ] {
            assert_eq!(as_seen_by_guests(given), becomes);
        }
    }

    #[test]
    fn sources_and_proxies() {
        let mirror = Mirror {
            base: "http://localhost:1/debian".into(),
            security: Some("http://s.example/debian-security".into()),
            keyrings: Vec::new(),
            inline_keys: Vec::new(),
            named_by: String::new(),
            keyrings_considered: Vec::new(),
        };
        let host = Host::at("/nonexistent", &[("http_proxy", "http://127.0.0.1:8080")]);
        let files = files("bookworm", &mirror, &Proxies::read(&host)).unwrap();
        let text = |path: &str| match &files.iter().find(|f| f.path == path).unwrap().what {
            What::File(data) => String::from_utf8(data.clone()).unwrap(),
            What::Link(to) => to.clone(),
        };
        let sources = text("etc/apt/sources.list.d/debian.sources");
        assert!(sources.contains("URIs: http://host.tightrope.internal:1/debian\nSuites: bookworm bookworm-updates\n"));
        assert!(sources.contains("URIs: http://s.example/debian-security\nSuites: bookworm-security\n"));
        assert!(text("etc/apt/apt.conf.d/80tightrope-proxy").contains("\"http://host.tightrope.internal:8080\""));
    }
}
