//! Kernel modules: what one says about itself, and in which order to load them.
//!
//! Debian's packages carry no `modules.dep` (it is made on installation), so the dependencies are read
//! from the `.modinfo` section of the modules themselves, as depmod(8) does.

use std::collections::{BTreeMap, BTreeSet};

/// What this crate uses of a module's `.modinfo`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Info {
    /// Modules whose symbols it needs.
    pub depends: Vec<String>,
    /// Modules or aliases that should be there before it.
    pub softdeps: Vec<String>,
    /// Other names it is asked for by.
    pub aliases: Vec<String>,
}

/// A module name as the kernel writes it: `-` and `_` are the same.
pub fn normal_name(name: &str) -> String {
    name.replace('-', "_")
}

fn get<const N: usize>(data: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn slice(data: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let at = usize::try_from(at).ok()?;
    data.get(at..at.checked_add(usize::try_from(len).ok()?)?)
}

/// The `.modinfo` section of a 64-bit little-endian ELF file.
fn modinfo(elf: &[u8]) -> Option<&[u8]> {
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = u64::from_le_bytes(get(elf, 40)?);
    let entry_size = u64::from(u16::from_le_bytes(get(elf, 58)?));
    let count = u64::from(u16::from_le_bytes(get(elf, 60)?));
    let names_index = u64::from(u16::from_le_bytes(get(elf, 62)?));
    // Of a section header: name, offset, size.
    let section = |i: u64| {
        let at = table.checked_add(i.checked_mul(entry_size)?)?;
        Some((
            u64::from(u32::from_le_bytes(get(elf, at)?)),
            u64::from_le_bytes(get(elf, at.checked_add(24)?)?),
            u64::from_le_bytes(get(elf, at.checked_add(32)?)?),
        ))
    };
    let (_, at, len) = section(names_index)?;
    let names = slice(elf, at, len)?;
    (0..count).find_map(|i| {
        let (name, at, len) = section(i)?;
        names.get(usize::try_from(name).ok()?..)?.starts_with(b".modinfo\0").then(|| slice(elf, at, len))?
    })
}

impl Info {
    /// Reads a module; `None` if it is not a 64-bit ELF file with a `.modinfo` section.
    pub fn read(module: &[u8]) -> Option<Self> {
        let mut info = Self::default();
        for text in modinfo(module)?.split(|b| *b == 0) {
            let Some((key, value)) = std::str::from_utf8(text).ok().and_then(|t| t.split_once('=')) else {
                continue;
            };
            match key {
                "depends" => info.depends.extend(value.split(',').filter(|d| !d.is_empty()).map(normal_name)),
                "alias" => info.aliases.push(value.to_owned()),
                "softdep" => {
                    let mut pre = false;
                    for word in value.split_whitespace() {
                        match word {
                            "pre:" => pre = true,
                            "post:" => pre = false,
                            w if pre => info.softdeps.push(w.to_owned()),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Some(info)
    }
}

/// A set of modules and the order among them.
#[derive(Debug, Default)]
pub struct Selection {
    /// Content by normal name.
    pub modules: BTreeMap<String, (Vec<u8>, Info)>,
    builtin: BTreeSet<String>,
}

impl Selection {
    /// An empty selection on a kernel that has these modules built in.
    pub fn new(builtin: BTreeSet<String>) -> Self {
        Self { builtin, ..Self::default() }
    }

    /// Adds a module and all it needs. `load` gives a module's content by its normal name, and is asked
    /// with an alias too (for soft dependencies); `None` means there is no such module.
    ///
    /// # Errors
    /// The name of the module that is neither there nor built in.
    pub fn add(&mut self, name: &str, load: &mut dyn FnMut(&str) -> Option<Vec<u8>>) -> Result<(), String> {
        let mut todo = vec![normal_name(name)];
        while let Some(name) = todo.pop() {
            if self.builtin.contains(&name) || self.modules.contains_key(&name) {
                continue;
            }
            let data = load(&name).ok_or_else(|| name.clone())?;
            let info = Info::read(&data).ok_or_else(|| name.clone())?;
            todo.extend(info.depends.iter().cloned());
            self.modules.insert(name, (data, info));
        }
        Ok(())
    }

    /// Whether the kernel has it without a module.
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&normal_name(name))
    }

    /// All that must be loaded before a module, in that order.
    pub fn before(&self, name: &str) -> Vec<String> {
        let mut order = Vec::new();
        self.visit(name, &mut order, &mut BTreeSet::new());
        order.retain(|n| n != name);
        order
    }

    fn visit(&self, name: &str, order: &mut Vec<String>, seen: &mut BTreeSet<String>) {
        let Some((_, info)) = self.modules.get(name) else { return };
        if !seen.insert(name.to_owned()) {
            return;
        }
        for d in info.depends.iter().chain(self.softdeps(info)) {
            self.visit(d, order, seen);
        }
        order.push(name.to_owned());
    }

    /// The modules that provide what a module softly depends on.
    fn softdeps<'a>(&'a self, info: &'a Info) -> impl Iterator<Item = &'a String> {
        info.softdeps.iter().flat_map(|wanted| {
            self.modules.iter().filter_map(move |(name, (_, i))| {
                (*name == normal_name(wanted) || i.aliases.contains(wanted)).then_some(name)
            })
        })
    }

    /// `modules.dep`: a line a module, what it needs after it, the first to load last.
    pub fn modules_dep(&self) -> String {
        self.modules
            .keys()
            .map(|name| {
                let before = self.before(name).into_iter().rev();
                let list: String = before.map(|d| format!(" kernel/{d}.ko")).collect();
                format!("kernel/{name}.ko:{list}\n")
            })
            .collect()
    }

    /// `modules.alias`.
    pub fn modules_alias(&self) -> String {
        self.modules
            .iter()
            .flat_map(|(name, (_, info))| info.aliases.iter().map(move |a| format!("alias {a} {name}\n")))
            .collect()
    }
}

/// A module with the given `.modinfo` strings.
#[cfg(test)]
pub(crate) fn build(strings: &[&str]) -> Vec<u8> {
    let info: Vec<u8> = strings.iter().flat_map(|s| s.bytes().chain([0])).collect();
    let names = b"\0.modinfo\0.shstrtab\0";
    let mut elf = vec![0u8; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let info_at = elf.len() as u64;
    elf.extend(&info);
    let names_at = elf.len() as u64;
    elf.extend(names);
    let table = elf.len() as u64;
    elf[40..48].copy_from_slice(&table.to_le_bytes());
    elf[58..60].copy_from_slice(&64u16.to_le_bytes());
    elf[60..62].copy_from_slice(&3u16.to_le_bytes());
    elf[62..64].copy_from_slice(&2u16.to_le_bytes());
    for (name, at, len) in [(0u32, 0, 0), (1, info_at, info.len() as u64), (10, names_at, names.len() as u64)] {
        let mut h = [0u8; 64];
        h[..4].copy_from_slice(&name.to_le_bytes());
        h[24..32].copy_from_slice(&at.to_le_bytes());
        h[32..40].copy_from_slice(&len.to_le_bytes());
        elf.extend(h);
    }
    elf
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn modinfo_is_read() {
        let info = Info::read(&build(&[
            "alias=fs-ext4",
            "depends=jbd2,crc16",
            "softdep=pre: crypto-crc32c post: x",
            "alias=ext3",
            "license=GPL",
        ]))
        .unwrap();
        assert_eq!(info.depends, ["jbd2", "crc16"]);
        assert_eq!(info.softdeps, ["crypto-crc32c"]);
        assert_eq!(info.aliases, ["fs-ext4", "ext3"]);
        assert_eq!(Info::read(b"no elf"), None);
    }

    fn loader(name: &str) -> Option<Vec<u8>> {
        Some(match name {
            "virtio" => build(&["depends=virtio_ring"]),
            "virtio_ring" => build(&["depends="]),
            "virtio_blk" => build(&["depends=virtio,virtio-ring", "alias=virtio:d00000002v*"]),
            "generic" => build(&["depends=", "alias=crypto-x"]),
            "ext4" => build(&["depends=virtio", "softdep=pre: crypto-x"]),
            "a" => build(&["depends=b"]),
            "b" => build(&["depends=a"]),
            "broken" => build(&["depends=missing"]),
            _ => return None,
        })
    }

    #[test]
    fn order_follows_dependencies() {
        let mut s = Selection::new(["core".to_owned()].into());
        for m in ["virtio-blk", "core", "ext4", "generic"] {
            s.add(m, &mut loader).unwrap();
        }
        assert_eq!(s.before("virtio_blk"), ["virtio_ring", "virtio"]);
        assert_eq!(s.before("ext4"), ["virtio_ring", "virtio", "generic"]);
        let dep = s.modules_dep();
        assert!(dep.contains("kernel/virtio_blk.ko: kernel/virtio.ko kernel/virtio_ring.ko\n"), "{dep}");
        assert!(s.modules_alias().contains("alias virtio:d00000002v* virtio_blk\n"));
        assert_eq!(s.add("broken", &mut loader), Err("missing".into()));
    }

    #[test]
    fn a_cycle_ends() {
        let mut s = Selection::new(BTreeSet::new());
        s.add("a", &mut loader).unwrap();
        assert_eq!(s.before("a"), ["b"]);
    }

    proptest! {
        #[test]
        fn any_damage_is_survived(at in 0usize..400, value in any::<u8>(), cut in 0usize..400) {
            let mut m = build(&["depends=a,b", "alias=c"]);
            let i = at % m.len();
            m[i] = value;
            m.truncate(m.len() - cut.min(m.len()));
            let _ = Info::read(&m);
        }

        #[test]
        fn any_header_is_survived(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut m = b"\x7fELF\x02\x01".to_vec();
            m.extend(data);
            let _ = Info::read(&m);
        }
    }
}
