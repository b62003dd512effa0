//! Checking a volume: everything in the backing tree held against its keys, in parallel, changing nothing.
//!
//! A check of a live mount is told by [`Live`] what is being changed meanwhile, and looks twice before it reports.
//! What to do about findings is [`repair`](super::repair).

mod fault;
mod object;
mod place;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use fault::{Fault, Finding};
pub use place::Place;

use super::dir::DirKeys;
use super::file::FileState;
use super::log::{self, Record};
use super::storage::{self, Errno, FileType};
use super::{Volume, VolumeError, format, names};
use crate::crypto::ObjectId;

/// A live mount, which may be changing the files that are looked at.
pub trait Live: Sync {
    /// Calls `look` with the state of the file with this backing inode number while nobody changes it. `false`: the mount
    /// has none, so that the backing file says all there is to say.
    fn with_file(&self, ino: u64, look: &mut dyn FnMut(&FileState)) -> bool;
}

/// How far a check is. For a thread that shows it.
#[derive(Default)]
pub struct Progress {
    /// Directories looked at.
    pub directories: AtomicU64,
    /// Regular files.
    pub files: AtomicU64,
    /// Symlinks.
    pub links: AtomicU64,
    /// FIFOs, sockets and devices.
    pub nodes: AtomicU64,
    /// Plaintext bytes of the blocks looked at.
    pub bytes: AtomicU64,
    /// Set by whoever does not want to know any more.
    pub stop: AtomicBool,
}

/// What to check, and how.
pub struct Request<'a> {
    /// The live mount, if there is one.
    pub live: Option<&'a dyn Live>,
    /// Threads.
    pub threads: usize,
    /// Where to count.
    pub progress: &'a Progress,
}

struct Check<'a> {
    volume: &'a Volume,
    request: &'a Request<'a>,
    found: &'a (dyn Fn(Finding) + Sync),
    /// What tells this backing root from a copy of it.
    root: u64,
    /// What the intent log says, by object.
    records: HashMap<ObjectId, Vec<Record>>,
    /// Backing inode numbers by object: two of one are copies.
    objects: Mutex<HashMap<ObjectId, u64>>,
    /// Files with several names, by backing inode number.
    linked: Mutex<HashMap<u64, Linked>>,
    /// Symlinks that have a tail.
    tails: Mutex<HashSet<ObjectId>>,
    failed: Mutex<Option<VolumeError>>,
}

/// A directory whose entries are being looked at.
struct Listed {
    place: Arc<Place>,
    fd: Arc<OwnedFd>,
    keys: Option<DirKeys>,
    names: Vec<Vec<u8>>,
}

/// Entries that one task looks at: many enough to be worth one.
const ENTRIES_AT_ONCE: usize = 16;

/// A file with several names: looked at under the first that comes, and what is wrong with it is said of all.
#[derive(Default)]
struct Linked {
    /// What was found, once it was looked at.
    found: Option<Vec<(Fault, Finding)>>,
    /// Names that came meanwhile.
    waiting: Vec<Waiting>,
}

struct Waiting {
    place: Arc<Place>,
    name: Vec<u8>,
    plain: Option<Vec<u8>>,
}

/// One entry of a directory that is being looked at.
struct Entry<'a> {
    dir: &'a Arc<OwnedFd>,
    place: &'a Arc<Place>,
    name: &'a [u8],
    plain: Option<Vec<u8>>,
    stat: storage::Stat,
}

/// Looks everything over, and calls `found` with each finding, from any thread.
///
/// # Errors
/// The ring's being sealed; the backing root's not being readable; no threads.
pub fn check(volume: &Volume, request: &Request<'_>, found: &(dyn Fn(Finding) + Sync)) -> Result<(), VolumeError> {
    let mut check = Check {
        volume,
        request,
        found,
        root: storage::identity(volume.root().as_fd())?,
        records: HashMap::new(),
        objects: Mutex::default(),
        linked: Mutex::default(),
        tails: Mutex::default(),
        failed: Mutex::default(),
    };
    if request.live.is_none() {
        let (records, findings) = read_log(volume)?;
        for record in records {
            check.records.entry(record.subject.object).or_default().push(record);
        }
        findings.into_iter().for_each(found);
    }
    // Our own: in a live mount the others are for its users.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(request.threads);
    #[cfg(test)]
    let pool = {
        let numbers = storage::recorder::numbers();
        pool.start_handler(move |_| numbers.iter().cloned().for_each(storage::recorder::simulate))
    };
    let pool = pool.build().map_err(|_| VolumeError::Backing(Errno::AGAIN))?;
    let root = Place::root();
    let fd = Arc::new(storage::reopen(volume.root().as_fd(), false)?);
    let shared = &check;
    pool.scope(|scope| shared.directory(scope, &root, &fd));
    check.tails(&root)?;
    match lock(&check.failed).take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// What a crash left in the intent log, and what there is to say about it.
///
/// # Errors
/// The ring's being sealed; the backing filesystem's.
pub fn read_log(volume: &Volume) -> Result<(Vec<Record>, Vec<Finding>), VolumeError> {
    let read = log::read(volume.root().as_fd(), volume.keys())?;
    let mut findings = Vec::new();
    let mut say = |fault, text| {
        findings.push(Finding { fault, place: Place::root().below(log::NAMES[0].as_bytes(), None), ..detail(text) });
    };
    if read.lost > 0 {
        say(Fault::Log, format!("{} of its records are lost", read.lost));
    }
    if read.any {
        say(Fault::Unclean, format!("{} records", read.records.len()));
    }
    Ok((read.records, findings))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names of ours in a backing root, beside what every directory has.
fn belongs_in_root(name: &[u8]) -> bool {
    let files = [format::VOLUME_FILE, format::VOLUME_FILE_COPY, format::ERASE_FILE, log::NAMES[0], log::NAMES[1]];
    files.iter().chain(&[format::OVERFLOW_DIR, format::QUARANTINE]).any(|known| known.as_bytes() == name)
}

impl<'a> Check<'a> {
    fn over(&self) -> bool {
        self.request.progress.stop.load(Ordering::Relaxed) || lock(&self.failed).is_some()
    }

    /// The keys are gone: there is nothing left to check with.
    fn fail(&self, error: VolumeError) {
        lock(&self.failed).get_or_insert(error);
    }

    fn report(&self, fault: Fault, place: &Arc<Place>, entry: Option<(&[u8], Option<&[u8]>)>, more: Finding) {
        let place = match entry {
            Some((name, plain)) => place.below(name, plain.map(<[u8]>::to_vec)),
            None => place.clone(),
        };
        (self.found)(Finding { fault, place, ..more });
    }

    fn report_entry(&self, fault: Fault, entry: &Entry<'_>, more: Finding) {
        let name = Some((entry.name, entry.plain.as_deref()));
        self.report(fault, entry.place, name, Finding { ino: entry.stat.st_ino, ..more });
    }

    /// Whether what was found wrong is still there: in a live mount it may be gone, or another object by now.
    fn still_there(&self, dir: BorrowedFd<'_>, name: &[u8], ino: u64) -> bool {
        self.request.live.is_none() || storage::stat(dir, name).is_ok_and(|stat| stat.st_ino == ino)
    }

    /// One directory: its header and attributes, what is in it, then what is below it.
    fn directory<'s>(&'s self, scope: &rayon::Scope<'s>, place: &Arc<Place>, fd: &Arc<OwnedFd>) {
        if self.over() {
            return;
        }
        self.request.progress.directories.fetch_add(1, Ordering::Relaxed);
        let ino = storage::stat_fd(fd.as_fd()).map_or(0, |stat| stat.st_ino);
        let is_root = place.depth() == 0;
        let keys = match DirKeys::load(fd.as_fd(), self.volume.keys()) {
            Ok(keys) if is_root && keys.id() != self.volume.root_dir().id() => None,
            Ok(keys) => Some(keys),
            Err(VolumeError::Damaged(_)) => None,
            Err(error @ VolumeError::Keyring(_)) => return self.fail(error),
            Err(error) => return self.report(Fault::Unreadable, place, None, because(ino, &error)),
        };
        let mut raw = Vec::new();
        let listed = storage::read_dir(fd.as_fd(), 0, |entry| {
            if entry.name != b"." && entry.name != b".." {
                raw.push((entry.name.to_vec(), entry.kind));
            }
            true
        });
        match listed {
            Ok(()) => {}
            Err(Errno::NOENT) if self.request.live.is_some() => return,
            Err(errno) => return self.report(Fault::Unreadable, place, None, because(ino, &errno.into())),
        }
        let entries: Vec<_> = raw.iter().filter(|(name, _)| names::is_entry(name)).collect();
        match &keys {
            Some(keys) => {
                self.seen(keys.id(), ino, place, None);
                self.attributes(fd.as_fd(), keys.dek(), place, None, ino);
            }
            None => {
                let fault = if is_root { Fault::RootHeader } else { Fault::DirectoryHeader };
                let text = format!("{} entries in it", entries.len());
                // A directory that is being removed loses its header first, and its name before that.
                let there = self.request.live.is_none() || is_root || self.reached(place, ino);
                if there {
                    self.report(fault, place, None, Finding { ino, ..detail(text) });
                }
            }
        }
        self.own_names(&raw, place, fd, is_root);
        // Tasks that wait for nothing: a worker that waits would take up others on top of its stack, without a bound.
        let names = entries.into_iter().map(|(name, _)| name.clone()).collect();
        let listed = Arc::new(Listed { place: place.clone(), fd: fd.clone(), keys, names });
        for start in (0..listed.names.len()).step_by(ENTRIES_AT_ONCE) {
            let listed = listed.clone();
            scope.spawn(move |scope| {
                let end = (start + ENTRIES_AT_ONCE).min(listed.names.len());
                for name in &listed.names[start..end] {
                    self.entry(scope, name, listed.keys.as_ref(), &listed.place, &listed.fd);
                }
            });
        }
    }

    /// Whether a directory is still to be reached by the names that led to it.
    fn reached(&self, place: &Arc<Place>, ino: u64) -> bool {
        let root = self.volume.root().as_fd();
        storage::open_dir_below(root, &place.names().join(&b'/'))
            .and_then(|fd| storage::stat_fd(fd.as_fd()))
            .is_ok_and(|stat| stat.st_ino == ino)
    }

    /// What begins with `lethefs.` and is no entry. A live mount makes and removes such things all the time.
    fn own_names(&self, raw: &[(Vec<u8>, FileType)], place: &Arc<Place>, fd: &Arc<OwnedFd>, is_root: bool) {
        if self.request.live.is_some() {
            return;
        }
        let all: HashSet<&[u8]> = raw.iter().map(|(name, _)| name.as_slice()).collect();
        for (name, _) in raw.iter().filter(|(name, _)| !names::is_entry(name)) {
            let name = name.as_slice();
            if name == format::DIR_HEADER.as_bytes() || (is_root && belongs_in_root(name)) {
                let planted = name == format::QUARANTINE.as_bytes()
                    && !storage::stat(fd.as_fd(), name)
                        .is_ok_and(|stat| storage::file_type(&stat) == FileType::Directory);
                if planted {
                    self.report(Fault::Planted, place, Some((name, None)), detail("move it away by hand".into()));
                }
                continue;
            }
            let stat = storage::stat(fd.as_fd(), name);
            let is = |kind| stat.is_ok_and(|stat| storage::file_type(&stat) == kind);
            let more = Finding { ino: stat.map_or(0, |stat| stat.st_ino), ..nothing() };
            let fault = if name.starts_with(format::TEMPORARY_PREFIX.as_bytes()) {
                let kept = is(FileType::Directory)
                    && !storage::open_dir(fd.as_fd(), name)
                        .is_ok_and(|fd| super::dir::is_empty(fd.as_fd()).unwrap_or(false));
                if kept { Fault::Displaced } else { Fault::Leftover }
            } else if let Some(hash) = name.strip_prefix(format::LONG_NAME_PREFIX.as_bytes()) {
                if all.contains([format::LONG_PREFIX.as_bytes(), hash].concat().as_slice()) {
                    continue;
                }
                // Anything else under such a name is not ours to remove.
                if is(FileType::Symlink) { Fault::SidecarOrphan } else { Fault::Foreign }
            } else {
                Fault::Foreign
            };
            self.report(fault, place, Some((name, None)), more);
        }
    }

    /// Tails of long symlinks without a symlink.
    fn tails(&self, root: &Arc<Place>) -> Result<(), VolumeError> {
        if self.request.live.is_some() || self.over() {
            return Ok(());
        }
        let overflow = match storage::open_dir(self.volume.root().as_fd(), format::OVERFLOW_DIR) {
            Err(Errno::NOENT) => return Ok(()),
            Err(errno @ (Errno::LOOP | Errno::NOTDIR)) => {
                let name = Some((format::OVERFLOW_DIR.as_bytes(), None));
                self.report(Fault::Planted, root, name, because(0, &errno.into()));
                return Ok(());
            }
            other => other?,
        };
        let place = root.below(format::OVERFLOW_DIR.as_bytes(), None);
        let known = lock(&self.tails);
        storage::read_dir(overflow.as_fd(), 0, |entry| {
            if entry.name == b"." || entry.name == b".." {
                return true;
            }
            let id = std::str::from_utf8(entry.name).ok().and_then(|name| name.split_once('.'));
            match id.and_then(|(id, _)| id.parse::<ObjectId>().ok()) {
                Some(id) if known.contains(&id) => {}
                found => {
                    let fault = if found.is_some() { Fault::LinkTailOrphan } else { Fault::Foreign };
                    let more = Finding { object: found, ino: entry.ino, ..nothing() };
                    self.report(fault, &place, Some((entry.name, None)), more);
                }
            }
            true
        })?;
        Ok(())
    }
}

/// A finding of which only the kind and the place are to be said.
pub fn nothing() -> Finding {
    Finding { fault: Fault::Foreign, place: Place::root(), object: None, ino: 0, blocks: Vec::new(), detail: None }
}

fn detail(text: String) -> Finding {
    Finding { detail: Some(text), ..nothing() }
}

fn because(ino: u64, error: &VolumeError) -> Finding {
    Finding { ino, ..detail(error.to_string()) }
}
