//! Files the guest knows of: each has a number that is never used again, and a descriptor that holds it on the host.
//!
//! A number lives as long as the guest's count of lookups (FUSE: LOOKUP and all that answers with an entry count up, FORGET down). When
//! descriptors become scarce, those of files that were not used of late are closed; they are opened again by their directory and name, and
//! must prove to be the same file then, or the guest is told ESTALE and looks the name up anew.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use crate::abi::ROOT_ID;
use crate::host;
use crate::owner::{Identity, Owner};
use crate::request::Result;

/// What tells files of the host apart, also when an inode number is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    device: (u32, u32),
    inode: u64,
    born: (i64, u32),
}

impl Key {
    pub(crate) fn of(stat: &Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            born: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
        }
    }
}

/// When a file changed last, by which what is known of it is found to be out of date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    changed: (i64, u32),
    modified: (i64, u32),
    size: u64,
}

/// A file's time stamp does not show two changes within a tick of the host's clock (at most 10 ms): what was learned within this time of
/// a change does not count as known.
const TICKS_MS: i64 = 40;

impl Stamp {
    fn of(stat: &Statx) -> Self {
        Self {
            changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            size: stat.stx_size,
        }
    }

    /// The stamp, if a later change is sure to show in it.
    fn settled(stat: &Statx) -> Option<Self> {
        let stamp = Self::of(stat);
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let age = now
            .tv_sec
            .saturating_sub(stamp.changed.0)
            .saturating_mul(1000)
            .saturating_add((now.tv_nsec - i64::from(stamp.changed.1)) / 1_000_000);
        (age > TICKS_MS).then_some(stamp)
    }
}

/// Where a file was last seen.
#[derive(Default)]
struct Place {
    fd: Option<Arc<OwnedFd>>,
    /// Not for directories, which keep their descriptor: so this leads to no cycle.
    name: Option<(Arc<Inode>, CString)>,
}

/// Of one file.
#[derive(Default)]
struct Files {
    read: Option<Arc<OwnedFd>>,
    /// Reads, too.
    write: Option<Arc<OwnedFd>>,
}

/// A file the guest knows of.
pub(crate) struct Inode {
    pub(crate) id: u64,
    key: Key,
    pub(crate) kind: FileType,
    place: Mutex<Place>,
    /// Opened, where files are not opened by requests.
    files: Mutex<Files>,
    /// The sweep passes it by once.
    used: AtomicBool,
    /// The attribute as it was at a time.
    owner: Mutex<Option<(Stamp, Option<Owner>)>>,
    /// As it was when the guest opened it last: what the guest has read since is not older.
    opened: Mutex<Option<Stamp>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inode {
    /// The descriptor that holds it.
    ///
    /// # Errors
    /// ESTALE when it is no longer where it was, ENFILE.
    pub(crate) fn fd(&self, table: &Inodes) -> Result<Arc<OwnedFd>> {
        self.used.store(true, Ordering::Relaxed);
        let mut place = lock(&self.place);
        if let Some(fd) = &place.fd {
            return Ok(fd.clone());
        }
        let (dir, name) = place.name.as_ref().ok_or(Errno::STALE)?;
        let fd = match host::hold_below(dir.fd(table)?.as_fd(), name) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::XDEV) => return Err(Errno::STALE),
            other => Arc::new(other?),
        };
        if Key::of(&host::stat(&*fd)?) != self.key {
            return Err(Errno::STALE);
        }
        place.fd = Some(fd.clone());
        drop(place);
        table.open.fetch_add(1, Ordering::Relaxed);
        table.make_room();
        Ok(fd)
    }

    /// A descriptor for its content, which `open` opens the first time.
    ///
    /// # Errors
    /// As [`Self::fd`], and those of `open`.
    pub(crate) fn file(
        &self,
        table: &Inodes,
        write: bool,
        open: impl FnOnce(&OwnedFd) -> Result<OwnedFd>,
    ) -> Result<Arc<OwnedFd>> {
        self.used.store(true, Ordering::Relaxed);
        let mut files = lock(&self.files);
        if let Some(fd) = files.write.as_ref().or(files.read.as_ref().filter(|_| !write)) {
            return Ok(fd.clone());
        }
        let fd = Arc::new(open(&*self.fd(table)?)?);
        *if write { &mut files.write } else { &mut files.read } = Some(fd.clone());
        drop(files);
        table.open.fetch_add(1, Ordering::Relaxed);
        table.make_room();
        Ok(fd)
    }

    /// How many descriptors it has.
    fn descriptors(&self) -> usize {
        let files = lock(&self.files);
        [lock(&self.place).fd.is_some(), files.read.is_some(), files.write.is_some()]
            .into_iter()
            .filter(|one| *one)
            .count()
    }

    /// Is it a regular file or a directory, which alone have attributes of the user's?
    pub(crate) fn has_attributes(&self) -> bool {
        matches!(self.kind, FileType::RegularFile | FileType::Directory)
    }

    /// Its owner, when it is as `stat` says; `read` reads the attribute.
    pub(crate) fn owner(&self, stat: &Statx, identity: Identity, read: impl FnOnce() -> Option<Owner>) -> Owner {
        let host = Owner::of_host(stat, identity);
        if !self.has_attributes() {
            return host;
        }
        let mut known = lock(&self.owner);
        let stamp = Stamp::of(stat);
        let attribute = match *known {
            Some((then, attribute)) if then == stamp => attribute,
            _ => {
                let attribute = read();
                *known = Stamp::settled(stat).map(|stamp| (stamp, attribute));
                attribute
            }
        };
        attribute.unwrap_or(host)
    }

    /// The guest opens it: is what it has in its page cache still the file's content?
    pub(crate) fn reopened(&self, stat: &Statx) -> bool {
        let now = Stamp::settled(stat);
        let before = std::mem::replace(&mut *lock(&self.opened), now);
        now.is_some() && before == now
    }
}

struct Entry {
    inode: Arc<Inode>,
    lookups: u64,
}

#[derive(Default)]
struct Table {
    by_id: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    last: u64,
}

/// Most files a guest may know of at a time.
const MAX_INODES: usize = 1 << 20;

/// All of them.
pub(crate) struct Inodes {
    table: RwLock<Table>,
    /// Descriptors in use.
    open: AtomicUsize,
    /// From how many on some are closed.
    limit: usize,
    sweeping: Mutex<()>,
}

impl Inodes {
    /// With the root `fd`. At `limit` descriptors of files some are closed.
    pub(crate) fn new(root: OwnedFd, limit: usize) -> Result<Self> {
        let stat = host::stat(&root)?;
        let inodes = Self {
            table: RwLock::default(),
            open: AtomicUsize::new(0),
            limit: limit.max(4),
            sweeping: Mutex::default(),
        };
        inodes.insert(Arc::new(root), &stat, None)?;
        Ok(inodes)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file the guest calls `id`.
    ///
    /// # Errors
    /// ESTALE
    pub(crate) fn get(&self, id: u64) -> Result<Arc<Inode>> {
        self.read().by_id.get(&id).map(|entry| entry.inode.clone()).ok_or(Errno::STALE)
    }

    /// Counts one lookup of the file that `fd` holds and `stat` describes, found as `name`.
    ///
    /// # Errors
    /// ENFILE when there are too many.
    pub(crate) fn insert(
        &self,
        fd: Arc<OwnedFd>,
        stat: &Statx,
        name: Option<(&Arc<Inode>, &CStr)>,
    ) -> Result<Arc<Inode>> {
        let key = Key::of(stat);
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let name = name.filter(|_| kind != FileType::Directory).map(|(dir, name)| (dir.clone(), name.to_owned()));
        let mut table = self.write();
        let Table { by_id, by_key, last } = &mut *table;
        if let Some(entry) = by_key.get(&key).and_then(|id| by_id.get_mut(id)) {
            entry.lookups = entry.lookups.saturating_add(1);
            let inode = entry.inode.clone();
            drop(table);
            let mut place = lock(&inode.place);
            if name.is_some() {
                place.name = name;
            }
            if place.fd.is_none() {
                place.fd = Some(fd);
                self.open.fetch_add(1, Ordering::Relaxed);
            }
            drop(place);
            return Ok(inode);
        }
        if by_id.len() >= MAX_INODES {
            return Err(Errno::NFILE);
        }
        // The first is the root.
        *last = last.checked_add(ROOT_ID).ok_or(Errno::NFILE)?;
        let inode = Arc::new(Inode {
            id: *last,
            key,
            kind,
            place: Mutex::new(Place { fd: Some(fd), name }),
            files: Mutex::default(),
            used: AtomicBool::new(false),
            owner: Mutex::default(),
            opened: Mutex::default(),
        });
        by_id.insert(*last, Entry { inode: inode.clone(), lookups: 1 });
        by_key.insert(key, *last);
        drop(table);
        self.open.fetch_add(1, Ordering::Relaxed);
        self.make_room();
        Ok(inode)
    }

    /// The file that `stat` describes and `fd` holds, if the guest knows of it, is not to be looked for by its name any more.
    pub(crate) fn keep_hold(&self, stat: &Statx, fd: OwnedFd) {
        let table = self.read();
        let found = table.by_key.get(&Key::of(stat)).and_then(|id| table.by_id.get(id));
        let Some(inode) = found.map(|entry| entry.inode.clone()) else { return };
        drop(table);
        let mut place = lock(&inode.place);
        place.name = None;
        if place.fd.is_none() {
            place.fd = Some(Arc::new(fd));
            self.open.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts `lookups` of `id` down; forgets it when none is left. The root stays.
    pub(crate) fn forget(&self, id: u64, lookups: u64) {
        if id == ROOT_ID {
            return;
        }
        let mut table = self.write();
        let Some(entry) = table.by_id.get_mut(&id) else { return };
        entry.lookups = entry.lookups.saturating_sub(lookups);
        if entry.lookups > 0 {
            return;
        }
        let gone = table.by_id.remove(&id);
        if let Some(entry) = &gone {
            table.by_key.remove(&entry.inode.key);
        }
        drop(table);
        self.count_closed(gone);
    }

    /// Forgets all but the root.
    pub(crate) fn clear(&self) {
        let mut table = self.write();
        let gone: Vec<_> = table.by_id.extract_if(|id, _| *id != ROOT_ID).map(|(_, entry)| entry).collect();
        table.by_key.retain(|_, id| *id == ROOT_ID);
        drop(table);
        self.count_closed(gone);
    }

    fn count_closed(&self, gone: impl IntoIterator<Item = Entry>) {
        // An open file may hold its inode still; its descriptor counts no more, which errs by little.
        let closed: usize = gone.into_iter().map(|entry| entry.inode.descriptors()).sum();
        self.open.fetch_sub(closed.min(self.open.load(Ordering::Relaxed)), Ordering::Relaxed);
    }

    /// How many the guest knows of.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.read().by_id.len()
    }

    /// How many descriptors are open.
    #[cfg(test)]
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Closes descriptors of files that were not used since it was last called, if there are too many.
    fn make_room(&self) {
        if self.open.load(Ordering::Relaxed) < self.limit {
            return;
        }
        let Ok(_one) = self.sweeping.try_lock() else { return };
        let mut left = self.limit / 4 + 1;
        let mut closed = Vec::new();
        // The second time also what was used.
        for _ in 0..2 {
            let table = self.read();
            for entry in table.by_id.values() {
                if left == 0 {
                    break;
                }
                let inode = &entry.inode;
                if inode.used.swap(false, Ordering::Relaxed) {
                    continue;
                }
                let Ok(mut files) = inode.files.try_lock() else { continue };
                let before = closed.len();
                closed.extend(files.read.take().into_iter().chain(files.write.take()));
                if let Ok(mut place) = inode.place.try_lock()
                    && place.name.is_some()
                {
                    closed.extend(place.fd.take());
                }
                left = left.saturating_sub(closed.len() - before);
            }
        }
        self.open.fetch_sub(closed.len(), Ordering::Relaxed);
    }
}
