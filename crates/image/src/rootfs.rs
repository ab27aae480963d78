//! A Debian system as one tar: its base packages laid out as `dpkg --unpack` would leave them, and not one configured.
//!
//! This is how debootstrap and its relatives start a system, too. What is missing is what must run inside: the
//! maintainer scripts. So dpkg's own records are written as well: each package is `unpacked`, its configuration files
//! wait under `.dpkg-new`, its triggers are registered; `dpkg --configure -a` in a guest does the rest. It is
//! done on the host because that is the larger part of the work and needs nothing but copying.
//!
//! The top directories are merged into `/usr` here (`/bin` is a link to `/usr/bin`), as every Debian since 12 has them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{self, Read, Write};
use std::path::Path;

use crate::deb;
use crate::deb822;
use crate::error::{Error, Result};

/// Directories at the top that are links into `/usr`.
const MERGED: &[&str] = &["bin", "lib", "lib64", "sbin"];

/// Time of what is made here and comes from no package: 1 January 2026. A fixed one, for equal archives of equal packages.
const EPOCH: u64 = 1_767_225_600;

/// What the archive holds beside packages.
#[derive(Debug, Clone)]
pub(crate) struct Extra {
    /// Path without a leading slash.
    pub(crate) path: String,
    pub(crate) mode: u32,
    pub(crate) what: What,
}

/// Kinds of [`Extra`].
#[derive(Debug, Clone)]
pub(crate) enum What {
    File(Vec<u8>),
    Link(String),
}

/// Writes the archive.
pub(crate) struct Writer<W: Write> {
    tar: tar::Builder<W>,
    /// Where it goes, for messages.
    path: std::path::PathBuf,
    directories: HashSet<Vec<u8>>,
    /// dpkg's record of all packages.
    status: String,
    /// Who wants to hear of which file: lines of dpkg's `triggers/File`.
    file_triggers: String,
    /// Who wants to hear of which named trigger.
    named_triggers: BTreeMap<String, String>,
    /// Scripts that must run before the packages are configured.
    preinst: Vec<String>,
    names: BTreeSet<String>,
}

impl<W: Write> Writer<W> {
    /// An archive that goes to `to`, which is called `path` in messages.
    pub(crate) fn new(to: W, path: &Path) -> Result<Self> {
        let mut writer = Self {
            tar: tar::Builder::new(to),
            path: path.to_path_buf(),
            directories: HashSet::new(),
            status: String::new(),
            file_triggers: String::new(),
            named_triggers: BTreeMap::new(),
            preinst: Vec::new(),
            names: BTreeSet::new(),
        };
        for name in MERGED {
            writer.directory(&format!("usr/{name}"))?;
        }
        for name in MERGED {
            writer.extra(&Extra { path: (*name).into(), mode: 0o777, what: What::Link(format!("usr/{name}")) })?;
            writer.directories.insert(name.as_bytes().to_vec());
        }
        for name in ["dev", "proc", "sys", "run", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates"] {
            writer.directory(name)?;
        }
        Ok(writer)
    }

    /// A directory of root, and those it lies in, if they are not there.
    fn directory(&mut self, path: &str) -> Result<()> {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let part = path.get(..end).unwrap_or(path);
            if self.directories.insert(part.as_bytes().to_vec()) {
                let mut header = header(tar::EntryType::Directory, 0o755, 0);
                self.append(&mut header, format!("{part}/").as_bytes(), None, &mut io::empty())?;
            }
        }
        Ok(())
    }

    /// A file or link of root's.
    pub(crate) fn extra(&mut self, extra: &Extra) -> Result<()> {
        if let Some((parent, _)) = extra.path.rsplit_once('/') {
            self.directory(parent)?;
        }
        let path = &extra.path;
        match &extra.what {
            What::File(data) => {
                let mut header = header(tar::EntryType::Regular, extra.mode, data.len() as u64);
                self.append(&mut header, path.as_bytes(), None, &mut data.as_slice())
            }
            What::Link(to) => {
                let mut header = header(tar::EntryType::Symlink, 0o777, 0);
                self.append(&mut header, path.as_bytes(), Some(to.as_bytes()), &mut io::empty())
            }
        }
    }

    /// A whole file that lies on the host, such as a package to be installed later.
    pub(crate) fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        if let Some((parent, _)) = to.rsplit_once('/') {
            self.directory(parent)?;
        }
        let mut file = std::fs::File::open(from).map_err(|e| Error::io("read", from, e))?;
        let size = file.metadata().map_err(|e| Error::io("read", from, e))?.len();
        let mut header = header(tar::EntryType::Regular, 0o644, size);
        self.append(&mut header, to.as_bytes(), None, &mut file)
    }

    /// The files of a package whose path `wanted` accepts, without a record of dpkg's. The path has no `./` in front.
    pub(crate) fn files(&mut self, deb: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
        self.data(deb, &HashSet::new(), |path| wanted(&String::from_utf8_lossy(path))).map(drop)
    }

    /// A package, unpacked.
    pub(crate) fn package(&mut self, deb: &Path) -> Result<()> {
        let control = deb::control(deb)?;
        let text = |name: &str| control.get(name).map(|data| String::from_utf8_lossy(data).into_owned());
        let fields = text("control").ok_or_else(|| Error::deb(deb, "it has no control file"))?;
        let paragraphs = deb822::parse(fields.as_bytes()).map_err(|e| Error::deb(deb, e))?;
        let [paragraph] = &paragraphs[..] else {
            return Err(Error::deb(deb, "its control file has not exactly one paragraph"));
        };
        let field = |name: &str| paragraph.get(name).unwrap_or("").to_owned();
        let (name, arch) = (field("Package"), field("Architecture"));
        if !crate::repository::is_name(&name) || !["amd64", "all"].contains(&arch.as_str()) {
            return Err(Error::deb(deb, "its control file does not say which package it is"));
        }
        if !self.names.insert(name.clone()) {
            return Ok(());
        }
        // How dpkg tells packages apart of which one for each architecture may be installed.
        let full = if field("Multi-Arch") == "same" { format!("{name}:{arch}") } else { name.clone() };
        let conffiles = text("conffiles").unwrap_or_default();
        let conffiles: Vec<&str> = conffiles.lines().map(str::trim).filter(|l| l.starts_with('/')).collect();
        let waiting: HashSet<Vec<u8>> =
            conffiles.iter().map(|c| merged(c.trim_start_matches('/').as_bytes())).collect();
        let mut list = self.data(deb, &waiting, |_| true)?;
        if list.is_empty() {
            list = b"/.\n".to_vec();
        }

        self.status += &format!("Package: {name}\nStatus: install ok unpacked\n");
        for line in fields.lines() {
            let own =
                ["package:", "status:", "conffiles:"].iter().any(|own| line.to_ascii_lowercase().starts_with(own));
            if !own && !line.trim().is_empty() {
                self.status += &format!("{}\n", line.trim_end());
            }
        }
        if !conffiles.is_empty() {
            self.status += "Conffiles:\n";
            conffiles.iter().for_each(|c| self.status += &format!(" {c} newconffile\n"));
        }
        self.status += "\n";
        for line in text("triggers").unwrap_or_default().lines() {
            self.trigger(line, &full);
        }
        if text("preinst").is_some_and(|script| does_something(&script)) {
            self.preinst.push(full.clone());
        }
        let info = |suffix: &str| format!("var/lib/dpkg/info/{full}.{suffix}");
        self.extra(&Extra { path: info("list"), mode: 0o644, what: What::File(list) })?;
        for (suffix, data) in control.into_iter().filter(|(suffix, _)| suffix != "control") {
            let script = ["preinst", "postinst", "prerm", "postrm", "config"].contains(&suffix.as_str());
            let mode = if script { 0o755 } else { 0o644 };
            self.extra(&Extra { path: info(&suffix), mode, what: What::File(data) })?;
        }
        Ok(())
    }

    /// A line of a package's `triggers` (deb-triggers(5)).
    fn trigger(&mut self, line: &str, package: &str) {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let (Some(directive), Some(name)) = (words.next(), words.next()) else { return };
        let option = match directive {
            "interest" | "interest-await" => "",
            "interest-noawait" => "/noawait",
            _ => return,
        };
        if name.starts_with('/') {
            self.file_triggers += &format!("{name} {package}{option}\n");
        } else if !name.contains('/') && !name.starts_with('.') {
            *self.named_triggers.entry(name.to_owned()).or_default() += &format!("{package}{option}\n");
        }
    }

    /// The `data.tar` of a package, where `wanted`. `waiting` are configuration files, which are not put in place
    /// yet. Returns dpkg's list of all paths.
    fn data(&mut self, deb: &Path, waiting: &HashSet<Vec<u8>>, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let bad = |e: io::Error| Error::deb(deb, e);
        let mut list = Vec::new();
        let mut archive = deb::data(deb)?;
        for entry in archive.entries().map_err(bad)? {
            let mut entry = entry.map_err(bad)?;
            let raw = entry.path_bytes().into_owned();
            let shown = || String::from_utf8_lossy(&raw).into_owned();
            let path = relative(&raw).ok_or_else(|| Error::deb(deb, format!("unsafe path: {:?}", shown())))?;
            if !wanted(&path) {
                continue;
            }
            list.push(b'/');
            list.extend_from_slice(if path.is_empty() { b"." } else { &path });
            list.push(b'\n');
            let place = merged(&path);
            let kind = entry.header().entry_type();
            // The links at the top are there already, and the directory itself too.
            if place.is_empty() || MERGED.iter().any(|m| m.as_bytes() == place) {
                continue;
            }
            if kind.is_dir() && !self.directories.insert(place.clone()) {
                continue;
            }
            let from = entry.header();
            let size = if kind.is_file() { entry.size() } else { 0 };
            let mut header = header(kind, from.mode().map_err(bad)? & 0o7777, size);
            header.set_uid(from.uid().unwrap_or(0));
            header.set_gid(from.gid().unwrap_or(0));
            header.set_mtime(from.mtime().unwrap_or(EPOCH));
            let link = entry.link_name_bytes().map(std::borrow::Cow::into_owned);
            let link = match (kind.is_symlink(), kind.is_hard_link(), link) {
                (true, _, Some(to)) => Some(to),
                (_, true, Some(to)) => {
                    let to = relative(&to).ok_or_else(|| Error::deb(deb, format!("unsafe link: {:?}", shown())))?;
                    Some(merged(&to))
                }
                (false, false, _) => None,
                _ => return Err(Error::deb(deb, format!("a link to nothing: {:?}", shown()))),
            };
            if !(kind.is_file() || kind.is_dir() || link.is_some()) {
                return Err(Error::deb(deb, format!("neither file, directory nor link: {:?}", shown())));
            }
            let mut name = place.clone();
            if waiting.contains(&place) {
                name.extend_from_slice(b".dpkg-new");
            }
            if kind.is_dir() {
                name.push(b'/');
            }
            // A broken package ends too early, which must not look like a broken disk.
            let mut counted = Counted { inner: &mut entry, left: size, failed: None };
            let done = self.append(&mut header, &name, link.as_deref(), &mut counted);
            if let Some(error) = counted.failed {
                return Err(bad(error));
            }
            done?;
        }
        Ok(list)
    }

    fn append(
        &mut self,
        header: &mut tar::Header,
        path: &[u8],
        link: Option<&[u8]>,
        data: &mut dyn Read,
    ) -> Result<()> {
        use std::os::unix::ffi::OsStrExt;
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        let link = link.map(|l| Path::new(std::ffi::OsStr::from_bytes(l)));
        let done = match link {
            Some(to) => self.tar.append_link(header, path, to),
            None => self.tar.append_data(header, path, data),
        };
        done.map_err(|e| Error::io("write", &self.path, e))
    }

    /// The packages so far whose `preinst` is to be run before they are configured.
    pub(crate) fn preinst(&self) -> &[String] {
        &self.preinst
    }

    /// dpkg's records, and the end.
    pub(crate) fn finish(mut self) -> Result<W> {
        let file = |path: &str, text: String| Extra { path: path.into(), mode: 0o644, what: What::File(text.into()) };
        let status = std::mem::take(&mut self.status);
        self.extra(&file("var/lib/dpkg/status", status))?;
        self.extra(&file("var/lib/dpkg/available", String::new()))?;
        self.extra(&file("var/lib/dpkg/info/format", "1\n".into()))?;
        let triggers = std::mem::take(&mut self.file_triggers);
        self.extra(&file("var/lib/dpkg/triggers/File", triggers))?;
        for (name, packages) in std::mem::take(&mut self.named_triggers) {
            self.extra(&file(&format!("var/lib/dpkg/triggers/{name}"), packages))?;
        }
        self.tar.into_inner().map_err(|e| Error::io("write", &self.path, e))
    }
}

/// Reads the data of an entry, and knows whose fault it is if that fails.
struct Counted<'a, R> {
    inner: &'a mut R,
    left: u64,
    failed: Option<io::Error>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match self.inner.read(buffer) {
            Ok(0) if self.left > 0 && !buffer.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            other => other,
        };
        match read {
            Ok(n) => {
                self.left = self.left.saturating_sub(n as u64);
                Ok(n)
            }
            Err(e) => {
                self.failed = Some(e.kind().into());
                Err(e)
            }
        }
    }
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(EPOCH);
    header
}

/// The path without `./` in front and slashes at its end, empty for the top; `None` if it is absolute, has `..`, a NUL or a
/// line break (which dpkg's lists could not hold).
fn relative(path: &[u8]) -> Option<Vec<u8>> {
    if path.starts_with(b"/") || path.iter().any(|b| [0, b'\n'].contains(b)) {
        return None;
    }
    let parts: Vec<&[u8]> = path.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".").collect();
    (!parts.contains(&&b".."[..])).then(|| parts.join(&b'/'))
}

/// Where a path lies once the top directories are links into `/usr`.
fn merged(path: &[u8]) -> Vec<u8> {
    let top = path.split(|b| *b == b'/').next().unwrap_or_default();
    match top.len() < path.len() && MERGED.iter().any(|m| m.as_bytes() == top) {
        true => [b"usr/", path].concat(),
        false => path.to_vec(),
    }
}

/// Whether a `preinst` does anything when nothing was installed before: those that only call `dpkg-maintscript-helper` mend what
/// earlier versions left.
fn does_something(script: &str) -> bool {
    script.lines().map(str::trim).any(|line| {
        let idle = ["#", "set ", "dpkg-maintscript-helper ", "exit 0"];
        !line.is_empty() && !idle.iter().any(|i| line.starts_with(i))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ar;
    use crate::deb::tests::tar_of;
    use proptest::prelude::*;

    fn package(control: &[(&str, &[u8])], data: &[u8]) -> Vec<u8> {
        ar::build(&[("debian-binary", b"2.0\n"), ("control.tar", &tar_of(control)), ("data.tar", data)])
    }

    /// Everything in an archive: path, kind, mode, link, content.
    fn read(archive: &[u8]) -> BTreeMap<String, (tar::EntryType, u32, String, Vec<u8>)> {
        let mut all = BTreeMap::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
            let link = entry.link_name_bytes().map(|l| String::from_utf8(l.into_owned()).unwrap()).unwrap_or_default();
            let (kind, mode) = (entry.header().entry_type(), entry.header().mode().unwrap());
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            assert!(all.insert(path.clone(), (kind, mode, link, data)).is_none(), "{path} is there twice");
        }
        all
    }

    fn write(debs: &[Vec<u8>]) -> Result<(Vec<u8>, Vec<String>)> {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(Vec::new(), Path::new("archive"))?;
        for (i, deb) in debs.iter().enumerate() {
            let path = dir.path().join(format!("{i}.deb"));
            std::fs::write(&path, deb).unwrap();
            writer.package(&path)?;
        }
        let preinst = writer.preinst().to_vec();
        Ok((writer.finish()?, preinst))
    }

    #[test]
    fn packages_are_laid_out_as_dpkg_unpacks_them() {
        let mut data = tar::Builder::new(Vec::new());
        let mut put = |path: &str, kind, link: &str, content: &[u8]| {
            let mut h = header(kind, 0o4755, content.len() as u64);
            h.set_uid(7);
            match link {
                "" => data.append_data(&mut h, path, content).unwrap(),
                to => data.append_link(&mut h, path, to).unwrap(),
            }
        };
        put("./", tar::EntryType::Directory, "", b"");
        put("./bin/", tar::EntryType::Directory, "", b"");
        put("./bin/a", tar::EntryType::Regular, "", b"program");
        put("./usr/", tar::EntryType::Directory, "", b"");
        put("./usr/b", tar::EntryType::Link, "./bin/a", b"");
        put("./usr/c", tar::EntryType::Symlink, "../bin/a", b"");
        put("./etc/a.conf", tar::EntryType::Regular, "", b"x = 1");
        let data = data.into_inner().unwrap();
        let a = package(
            &[
                (
                    "./control",
                    b"Package: a\nVersion: 1\nArchitecture: amd64\nMulti-Arch: same\nDescription: x\n more\n",
                ),
                ("./conffiles", b"/etc/a.conf\nremove-on-upgrade /etc/old\n"),
                ("./postinst", b"#!/bin/sh\n"),
                ("./preinst", b"#!/bin/sh\nset -e\necho hello\n"),
                ("./triggers", b"interest-noawait /usr/lib/x\ninterest y\nactivate-noawait ldconfig\n# no\n"),
            ],
            &data,
        );
        let b = package(
            &[
                ("control", b"Package: b\nVersion: 2\nArchitecture: all\n"),
                ("preinst", b"#!/bin/sh\nset -e\n# only this\ndpkg-maintscript-helper rm_conffile /x 1 -- \"$@\"\n"),
            ],
            &tar_of(&[("./usr/bin/x", b"")]),
        );
        let (archive, preinst) = write(&[a.clone(), b, a]).unwrap();
        assert_eq!(preinst, ["a:amd64"]);
        let all = read(&archive);
        let text = |path: &str| String::from_utf8(all[path].3.clone()).unwrap();
        assert_eq!((all["bin"].0, all["bin"].2.as_str()), (tar::EntryType::Symlink, "usr/bin"));
        assert_eq!((all["usr/bin/a"].1, all["usr/bin/a"].3.as_slice()), (0o4755, &b"program"[..]));
        assert_eq!(all["usr/b"].2, "usr/bin/a");
        assert_eq!(all["usr/c"].2, "../bin/a");
        assert!(all.contains_key("etc/a.conf.dpkg-new") && !all.contains_key("etc/a.conf"));
        assert_eq!(
            text("var/lib/dpkg/status"),
            "Package: a\nStatus: install ok unpacked\nVersion: 1\nArchitecture: amd64\nMulti-Arch: same\n\
             Description: x\n more\nConffiles:\n /etc/a.conf newconffile\n\n\
             Package: b\nStatus: install ok unpacked\nVersion: 2\nArchitecture: all\n\n"
        );
        assert_eq!(text("var/lib/dpkg/info/a:amd64.list"), "/.\n/bin\n/bin/a\n/usr\n/usr/b\n/usr/c\n/etc/a.conf\n");
        assert_eq!(all["var/lib/dpkg/info/a:amd64.postinst"].1, 0o755);
        assert_eq!(text("var/lib/dpkg/triggers/File"), "/usr/lib/x a:amd64/noawait\n");
        assert_eq!(text("var/lib/dpkg/triggers/y"), "a:amd64\n");
    }

    #[test]
    fn broken_and_hostile_packages_are_refused() {
        let control: &[(&str, &[u8])] = &[("control", b"Package: a\nVersion: 1\nArchitecture: amd64\n")];
        let refused = |deb: Vec<u8>| {
            let error = write(&[deb]).unwrap_err();
            assert!(matches!(error, Error::Deb { .. }), "{error}");
        };
        for path in ["../x", "a/../../x", "/x", "a\nb"] {
            let mut h = header(tar::EntryType::Regular, 0o644, 0);
            h.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            h.set_cksum();
            let mut tar = tar::Builder::new(Vec::new());
            tar.append(&h, io::empty()).unwrap();
            refused(package(control, &tar.into_inner().unwrap()));
        }
        let mut device = tar::Builder::new(Vec::new());
        device.append_data(&mut header(tar::EntryType::Char, 0o644, 0), "dev/sda", io::empty()).unwrap();
        refused(package(control, &device.into_inner().unwrap()));
        let mut cut = tar_of(&[("x", &[1; 5000])]);
        cut.truncate(2000);
        refused(package(control, &cut));
        refused(package(&[], &tar_of(&[])));
        refused(package(&[("control", b"Package: ../x\nArchitecture: amd64\n")], &tar_of(&[])));
    }

    proptest! {
        #[test]
        fn paths_stay_inside(path in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Some(relative) = relative(&path) {
                prop_assert!(!relative.starts_with(b"/"));
                prop_assert!(!merged(&relative).split(|b| *b == b'/').any(|p| p == b".."));
            }
        }
    }
}
