//! What this crate reads of its host: files below a root directory and environment variables.
//!
//! Gathered in one value so that tests can describe a host instead of changing theirs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The host as this crate sees it.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
    env: BTreeMap<String, String>,
}

impl Default for Host {
    fn default() -> Self {
        Self::current()
    }
}

impl Host {
    /// The machine and environment this process runs in. Variables that are not UTF-8 are left out.
    pub fn current() -> Self {
        let env =
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
        Self { root: PathBuf::from("/"), env }
    }

    /// A host whose files lie below `root` and that has exactly these variables.
    pub fn at(root: impl Into<PathBuf>, env: &[(&str, &str)]) -> Self {
        Self { root: root.into(), env: env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect() }
    }

    /// A variable that is set and not empty.
    pub(crate) fn var(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// Where an absolute path of the host lies.
    pub(crate) fn path(&self, absolute: impl AsRef<Path>) -> PathBuf {
        let path = absolute.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The files in a directory whose name ends in one of `suffixes`, sorted as APT sorts them.
    pub(crate) fn files(&self, dir: &str, suffixes: &[&str]) -> Vec<PathBuf> {
        let mut list: Vec<PathBuf> = fs::read_dir(self.path(dir))
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .filter(|p| {
                let name = p.file_name().and_then(|n| n.to_str()).unwrap_or(".");
                !name.starts_with('.')
                    && suffixes.iter().any(|s| match *s {
                        "" => !name.contains('.'),
                        s => name.ends_with(s),
                    })
            })
            .collect();
        list.sort();
        list
    }

    /// `$XDG_CACHE_HOME/tightrope`, by default `~/.cache/tightrope`.
    ///
    /// # Errors
    /// [`Error::NoCacheDir`] if neither variable is an absolute path.
    pub fn cache_dir(&self) -> Result<PathBuf> {
        self.xdg("XDG_CACHE_HOME", ".cache").ok_or(Error::NoCacheDir)
    }

    /// `$XDG_DATA_HOME/tightrope`, by default `~/.local/share/tightrope`.
    ///
    /// # Errors
    /// [`Error::NoDataDir`] if neither variable is an absolute path.
    pub fn data_dir(&self) -> Result<PathBuf> {
        self.xdg("XDG_DATA_HOME", ".local/share").ok_or(Error::NoDataDir)
    }

    /// `$XDG_CONFIG_HOME/tightrope/config.toml`, by default below `~/.config`.
    pub fn config_file(&self) -> Option<PathBuf> {
        Some(self.xdg("XDG_CONFIG_HOME", ".config")?.join("config.toml"))
    }

    fn xdg(&self, variable: &str, below_home: &str) -> Option<PathBuf> {
        let absolute = |v: &&str| v.starts_with('/');
        let base = match self.var(variable).filter(absolute) {
            Some(dir) => PathBuf::from(dir),
            None => Path::new(self.var("HOME").filter(absolute)?).join(below_home),
        };
        Some(base.join("tightrope"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_follows_xdg() {
        let dir = |env: &[(&str, &str)]| Host::at("/", env).cache_dir().ok();
        let p = |s: &str| Some(PathBuf::from(s));
        assert_eq!(dir(&[("HOME", "/h")]), p("/h/.cache/tightrope"));
        assert_eq!(dir(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]), p("/c/tightrope"));
        assert_eq!(dir(&[("HOME", "/h"), ("XDG_CACHE_HOME", "rel")]), p("/h/.cache/tightrope"));
        assert_eq!(dir(&[("HOME", "")]), None);
    }
}
