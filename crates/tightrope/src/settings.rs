//! The configuration file: `$XDG_CONFIG_HOME/tightrope/config.toml`. The command line and the environment come before it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use vmm::EngineChoice;

/// What the file may hold, as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    mirror: Option<String>,
    memory: Option<String>,
    engine: Option<String>,
}

/// What the file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Where to fetch Debian from.
    pub mirror: Option<String>,
    /// Guest memory in bytes.
    pub memory: Option<u64>,
    /// The engine.
    pub engine: Option<EngineChoice>,
}

impl Settings {
    /// Reads the user's file; a file that is not there says nothing.
    ///
    /// # Errors
    /// One line naming the file and the mistake in it.
    pub fn load() -> Result<Self> {
        match path() {
            Some(path) => Self::load_from(&path),
            None => Ok(Self::default()),
        }
    }

    fn load_from(path: &Path) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(anyhow!("configuration file {}: {error}", path.display())),
        };
        Self::parse(&text).with_context(|| format!("configuration file {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let file: File = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| 1 + text.get(..span.start).unwrap_or_default().matches('\n').count());
            let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            anyhow!("{place}{}", error.message().replace('\n', " "))
        })?;
        let memory = file.memory.map(|text| vmm::parse_memory(&text)).transpose();
        let engine = file.engine.map(|text| text.parse()).transpose();
        Ok(Self {
            mirror: file.mirror,
            memory: memory.map_err(|error| anyhow!("memory: {error}"))?,
            engine: engine.map_err(|error: String| anyhow!("engine: {error}"))?,
        })
    }
}

/// Where the file is (XDG Base Directory Specification).
fn path() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".config")))?;
    Some(base.join("tightrope/config.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_files() {
        assert_eq!(Settings::parse("").unwrap(), Settings::default());
        let all = Settings::parse("mirror = 'http://m'\nmemory = '1G'\nengine = 'interp'").unwrap();
        assert_eq!(all.mirror.as_deref(), Some("http://m"));
        assert_eq!((all.memory, all.engine), (Some(1 << 30), Some(EngineChoice::Interp)));
        assert_eq!(Settings::load_from(Path::new("/nowhere/config.toml")).unwrap(), Settings::default());
    }

    #[test]
    fn bad_files() {
        for (text, part) in [
            ("memory = '1Q'", "memory: '1Q'"),
            ("engine = 'x'", "no engine 'x'"),
            ("\n\ncolour = 1", "line 3: unknown field `colour`"),
            ("memory = 5", "line 1"),
            ("= =", "line 1"),
        ] {
            let error = format!("{:#}", Settings::parse(text).unwrap_err());
            assert!(error.contains(part) && !error.contains('\n'), "{error}");
        }
        let error = format!("{:#}", Settings::load_from(Path::new("/")).unwrap_err());
        assert!(error.contains("configuration file /"), "{error}");
    }
}
