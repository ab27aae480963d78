//! Directories of the host that the guest sees: what the user asks for, and the opening of them. Each is served by a process of its own
//! (`share::server`).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use share::Access;
use share::channel::Client;
use share::sandbox::Confinement;
use virtio::fs::MAX_TAG;

use crate::config::SandboxMode;
use crate::error::Error;

/// Most shared directories of one guest.
pub const MAX_SHARES: usize = 8;

/// `--share HOST[:GUEST][:ro][:exclusive]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareConfig {
    /// The directory.
    pub host: PathBuf,
    /// Where the guest finds it.
    pub guest: GuestPlace,
    /// May the guest not change it?
    pub read_only: bool,
    /// Does nobody but the guest change it while it is shared?
    pub exclusive: bool,
}

/// Where a guest finds a shared directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestPlace {
    /// Mounted there, an absolute path, by guests whose initramfs knows the word `tightrope.share=` of the kernel command line.
    Mounted(String),
    /// By this tag: the guest's user mounts it.
    Tag(String),
}

impl FromStr for ShareConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut rest, mut read_only, mut exclusive) = (text, false, false);
        loop {
            rest = match rest.rsplit_once(':') {
                Some((rest, "ro")) => {
                    read_only = true;
                    rest
                }
                Some((rest, "rw")) => rest,
                Some((rest, "exclusive")) => {
                    exclusive = true;
                    rest
                }
                _ => break,
            };
        }
        let (host, guest) = match rest.rsplit_once(':') {
            Some((host, guest)) => (host, guest.to_owned()),
            None => {
                let same = std::path::absolute(rest).map_err(|error| format!("'{rest}' is no directory: {error}"))?;
                // `.` and `..` at the end, too, are gone in the real path; what does not exist is told when it is opened.
                let same = std::fs::canonicalize(&same).unwrap_or(same);
                (rest, same.to_str().ok_or("the directory's name is not Unicode: add :GUEST")?.to_owned())
            }
        };
        if host.is_empty() {
            return Err(format!(
                "'{text}' shares no directory: write HOST:GUEST, for example .:/src or /data:/data:ro"
            ));
        }
        let guest = GuestPlace::parse(&guest)?;
        Ok(Self { host: host.into(), guest, read_only, exclusive })
    }
}

impl ShareConfig {
    /// Where the guest finds `dir`, a real path on the host, if that is in this directory and the guest mounts it.
    fn finds(&self, dir: &Path) -> Option<(usize, PathBuf)> {
        let GuestPlace::Mounted(place) = &self.guest else { return None };
        let host = self.host.canonicalize().ok()?;
        Some((host.as_os_str().len(), Path::new(place).join(dir.strip_prefix(&host).ok()?)))
    }
}

/// Where a guest with these shared directories finds `dir`, a real path on the host: in the nearest one that it mounts by itself.
pub fn place_of(shares: &[ShareConfig], dir: &Path) -> Option<PathBuf> {
    shares.iter().filter_map(|share| share.finds(dir)).max().map(|(_, place)| place.components().collect())
}

impl GuestPlace {
    fn parse(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_graphic() && !"\"\\:,=".contains(c);
        if !text.chars().all(plain) {
            return Err(format!(
                "'{text}' cannot be told to the guest's kernel: choose a place of letters, digits and signs without spaces"
            ));
        }
        if text.starts_with('/') {
            let path = Path::new(text);
            if path.parent().is_none() || path.components().any(|part| part.as_os_str() == "..") {
                return Err(format!("'{text}' is no place to mount a directory: choose one like /src"));
            }
            let systems = ["/proc", "/sys", "/dev", "/run"];
            // (Below /run there is room.)
            if let Some(own) =
                systems.iter().find(|own| path.starts_with(own) && (**own != "/run" || path == Path::new("/run")))
            {
                return Err(format!("'{text}' is in the guest's own {own}: choose a place like /src"));
            }
            if text.len() > 200 {
                return Err(format!("'{text}' is too long a path: 200 letters are possible"));
            }
            return Ok(Self::Mounted(text.to_owned()));
        }
        if text.contains('/') || text.starts_with('.') {
            return Err(format!(
                "'{text}' is a relative path: write an absolute one (/{}), or a tag without '/'",
                text.trim_start_matches("./")
            ));
        }
        if text.is_empty() || text.len() > MAX_TAG {
            return Err(format!("'{text}' is no tag of a shared directory: it has 1 to {MAX_TAG} letters"));
        }
        Ok(Self::Tag(text.to_owned()))
    }
}

/// The tags of all shared directories, in their order: given, or made.
///
/// # Errors
/// One line for the user: too many, or two at the same place.
pub fn tags(shares: &[ShareConfig]) -> Result<Vec<String>, Error> {
    if shares.len() > MAX_SHARES {
        return Err(Error::Input(format!("too many shared directories: {MAX_SHARES} are possible")));
    }
    for (number, share) in shares.iter().enumerate() {
        if shares.iter().take(number).any(|other| other.guest == share.guest) {
            return Err(Error::Input(match &share.guest {
                GuestPlace::Tag(tag) => format!("two shared directories have the tag {tag}: choose another for one"),
                GuestPlace::Mounted(path) => {
                    format!("two shared directories are to be mounted at {path}: choose another place for one")
                }
            }));
        }
    }
    let taken = |tag: &String| shares.iter().any(|share| share.guest == GuestPlace::Tag(tag.clone()));
    let mut free = (0..).map(|number| format!("share{number}")).filter(|tag| !taken(tag));
    Ok(shares
        .iter()
        .map(|share| match &share.guest {
            GuestPlace::Tag(tag) => tag.clone(),
            GuestPlace::Mounted(_) => free.next().unwrap_or_default(),
        })
        .collect())
}

/// What the kernel command line tells the guest's initramfs to mount: `tightrope.share=TAG:DIR[:ro]`, a word each.
///
/// # Errors
/// As [`tags`].
pub fn words(shares: &[ShareConfig]) -> Result<Vec<String>, Error> {
    let mut places: Vec<_> = shares
        .iter()
        .zip(tags(shares)?)
        .filter_map(|(share, tag)| match &share.guest {
            GuestPlace::Mounted(path) => Some((path, tag, if share.read_only { ":ro" } else { "" })),
            GuestPlace::Tag(_) => None,
        })
        .collect();
    // One inside another is mounted after it.
    places.sort();
    Ok(places.into_iter().map(|(path, tag, option)| format!("tightrope.share={tag}:{path}{option}")).collect())
}

/// A shared directory whose server runs.
pub(crate) struct Share {
    pub tag: String,
    /// As the user named it.
    pub name: String,
    pub channel: Client,
    pub socket: OwnedFd,
}

/// Opens the directories and starts their servers: by `server`, a program and its argument. To be called before the process confines itself.
pub(crate) fn open(
    shares: &[ShareConfig],
    server: Option<&(PathBuf, String)>,
    sandbox: SandboxMode,
    errors: impl Fn() -> Stdio,
) -> Result<Vec<Share>, Error> {
    let tags = tags(shares)?;
    let roots = shares.iter().map(open_root).collect::<Result<Vec<_>, _>>()?;
    let mut open = Vec::new();
    for ((share, tag), root) in shares.iter().zip(tags).zip(roots) {
        let cannot = |why: String| Error::Host(format!("cannot start the server of a shared directory ({why})"));
        let (program, argument) = server.ok_or_else(|| cannot("no program for it is known".into()))?;
        let confinement = if sandbox == SandboxMode::Off { Confinement::Off } else { Confinement::On };
        let access = if share.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let channel = Client::new().map_err(|error| cannot(error.to_string()))?;
        let (socket, _) = share::server::start(
            program,
            argument,
            (access, share.exclusive),
            confinement,
            root.as_fd(),
            &channel,
            errors(),
        )
        .map_err(|error| cannot(error.to_string()))?;
        open.push(Share { tag, name: share.host.display().to_string(), channel, socket });
    }
    Ok(open)
}

fn open_root(share: &ShareConfig) -> Result<OwnedFd, Error> {
    let what = "shared directory";
    let path = &share.host;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(OsStr::from_bytes(path.as_os_str().as_bytes()), flags, Mode::empty());
    let root = root.map_err(|error| {
        let error = io::Error::from(error);
        let problem = match error.kind() {
            io::ErrorKind::NotFound => "does not exist: check the name, or make it".to_string(),
            io::ErrorKind::NotADirectory => "is not a directory: name the one it is in".to_string(),
            io::ErrorKind::PermissionDenied => "may not be read by this user: check its permissions".to_string(),
            _ => error.to_string(),
        };
        Error::file(what, path, problem)
    })?;
    // Held by the server, to its end. File systems without such locks cannot tell.
    let alone = share.exclusive && !share.read_only;
    let lock = if alone { FlockOperation::NonBlockingLockExclusive } else { FlockOperation::NonBlockingLockShared };
    match flock(&root, lock) {
        Err(Errno::WOULDBLOCK) if alone => {
            let problem = "is shared with another VM: stop that first, or leave :exclusive out".to_string();
            Err(Error::file(what, path, problem))
        }
        Err(Errno::WOULDBLOCK) => {
            let problem = "is shared exclusively with another VM: stop that first".to_string();
            Err(Error::file(what, path, problem))
        }
        _ => Ok(root),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(text: &str) -> ShareConfig {
        text.parse().unwrap()
    }

    #[test]
    fn texts() {
        let mounted = |path: &str| GuestPlace::Mounted(path.into());
        assert_eq!(
            share("a:/b"),
            ShareConfig { host: "a".into(), guest: mounted("/b"), read_only: false, exclusive: false }
        );
        assert_eq!(
            share("/a:b:/c:ro"),
            ShareConfig { host: "/a:b".into(), guest: mounted("/c"), read_only: true, exclusive: false }
        );
        for text in ["a:/b:ro:exclusive", "a:/b:exclusive:ro"] {
            assert_eq!(
                share(text),
                ShareConfig { host: "a".into(), guest: mounted("/b"), read_only: true, exclusive: true }
            );
        }
        assert_eq!(share("/usr:exclusive").guest, mounted("/usr"));
        assert_eq!(share("a:tag:rw").guest, GuestPlace::Tag("tag".into()));
        assert_eq!(
            share("/usr/.:ro"),
            ShareConfig { host: "/usr/.".into(), guest: mounted("/usr"), read_only: true, exclusive: false }
        );
        for bad in [
            "",
            ":",
            ":/a",
            "a:",
            "a:b/c",
            "a:./b",
            "a:../b",
            "a:..",
            "a:/",
            "a:/b/../c",
            "a:/b c",
            "a:/b\"",
            "a:/b\n",
            "a:/ä",
            "a:/dev/shm/x",
            "a:/run/",
            "/proc/self",
        ] {
            assert!(bad.parse::<ShareConfig>().is_err(), "{bad}");
        }
        assert!(format!("a:{}", "x".repeat(37)).parse::<ShareConfig>().is_err());
        assert!(format!("a:/{}", "x".repeat(200)).parse::<ShareConfig>().is_err());
        assert!("/:ro".parse::<ShareConfig>().is_err(), "the root has no place of its own name");
    }

    #[test]
    fn places() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(real.join("a/b/c")).unwrap();
        let at = |name: &str, guest: &str| share(&format!("{}:{guest}", dir.path().join(name).display()));
        let shares = [at("a", "/x"), at("a/b", "/y"), at("", "tag"), at("none", "/none")];
        let place = |name: &str| place_of(&shares, &real.join(name)).map(|path| path.display().to_string());
        assert_eq!(place("a").as_deref(), Some("/x"));
        assert_eq!(place("a/other").as_deref(), Some("/x/other"));
        assert_eq!(place("a/b").as_deref(), Some("/y"));
        assert_eq!(place("a/b/c").as_deref(), Some("/y/c"));
        assert_eq!(place("ab"), None);
    }

    #[test]
    fn tags_and_words() {
        let shares = [share("a:/a"), share("b:share0"), share("c:/c:ro")];
        assert_eq!(tags(&shares).unwrap(), ["share1", "share0", "share2"]);
        assert_eq!(words(&shares).unwrap(), ["tightrope.share=share1:/a", "tightrope.share=share2:/c:ro"]);
        let nested = [share("a:/x/y"), share("b:/x")];
        assert_eq!(words(&nested).unwrap(), ["tightrope.share=share1:/x", "tightrope.share=share0:/x/y"]);
        for twice in [["a:t", "b:t"], ["a:/t", "b:/t"]] {
            let error = tags(&twice.map(share)).unwrap_err().to_string();
            assert!(error.contains("two shared directories") && error.contains('t'), "{error}");
        }
        let many: Vec<_> = (0..9).map(|number| share(&format!("a:t{number}"))).collect();
        assert!(tags(&many).is_err());
    }
}
