//! Wrapping DEKs anew, under the KEK version that the ring wraps with now: object by object, or all of a volume. Contents, names
//! and attributes stay as they are, since the DEKs do.
//!
//! At no instant is there only one place that has a DEK and may be torn. A file's static header stands twice: one copy is
//! written, flushed, then the other ([`HalfDone`]). A directory's header and a symlink are replaced by a rename. A node record is
//! one write within one sector (docs/FORMAT.md section 11). Cut short anywhere, the old and the new version together open
//! everything, and doing it again finishes it; done and flushed, the new version does alone.
//!
//! What else the old version is needed for: the records of an intent log that was begun under it (unmount, or empty it), and
//! the volume file's MAC.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::fs::Timespec;
use rustix::path::Arg;

use super::dir::DirKeys;
use super::file::{BIRTH_LEN, FileState, Header, keeping_times, read_header, write_header_anew};
use super::format::{self, b64, un_b64};
use super::header::{ObjectType, STATIC_LEN, Static};
use super::storage::{self, Errno, FileType, RenameFlags, Timestamps};
use super::{Damage, Volume, VolumeError, names, node};

/// A file of which one copy of the static header is written. When that has been flushed, the other may be.
#[must_use = "one copy is still wrapped under the old version"]
pub struct HalfDone {
    header: Static,
    second: u64,
}

impl HalfDone {
    /// Writes the other copy. The caller has flushed the file, or the backing filesystem, since this was made, and does it again
    /// before the old KEK version is given up.
    ///
    /// # Errors
    /// The backing filesystem's: the file opens as before, with both versions.
    pub fn finish(self, fd: BorrowedFd<'_>) -> Result<(), VolumeError> {
        // A third copy, of no more use: the header is on the medium.
        match storage::remove_xattr_fd(fd, format::BIRTH) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
        keeping_times(fd, || Ok(storage::write_at(fd, &self.header.bytes(), self.second).map_err(|(_, errno)| errno)?))
    }
}

fn is_current(volume: &Volume, header: &Static) -> bool {
    header.dek.kek() == volume.keys().current()
}

/// Begins with a regular file, open for writing, that no [`FileState`] is held of. `None`: there is nothing to do.
///
/// # Errors
/// [`Damage`] of the header; the ring's; the backing filesystem's.
pub fn begin(volume: &Volume, fd: BorrowedFd<'_>) -> Result<Option<HalfDone>, VolumeError> {
    let Header { header, mutable, newborn } = read_header(volume, fd)?;
    if newborn {
        keeping_times(fd, || write_header_anew(volume, fd, &header, mutable))?;
    }
    let mut both = [0; 2 * STATIC_LEN];
    storage::read_at(fd, &mut both, 0)?;
    let mut copies = Vec::with_capacity(2);
    for bytes in both.chunks_exact(STATIC_LEN) {
        let Some(bytes) = bytes.first_chunk() else { unreachable!("chunks are exact") };
        copies.push(match Static::open_as(volume.keys(), bytes, ObjectType::Regular) {
            Ok(copy) => Some(copy).filter(|copy| copy.dek.object() == header.dek.object()),
            Err(VolumeError::Damaged(_)) => None,
            Err(error) => return Err(error),
        });
    }
    let done = |copy: &Option<Static>| copy.as_ref().is_some_and(|copy| is_current(volume, copy));
    let birth = storage::get_xattr_fd::<BIRTH_LEN>(fd, format::BIRTH).is_some();
    if copies.iter().all(done) && !birth {
        return Ok(None);
    }
    // Cut short before, one copy is done already: both must say the same.
    let next = match copies.iter().find(|copy| done(copy)) {
        Some(Some(copy)) => copy.clone(),
        _ => header.rewrap(volume.keys())?,
    };
    // Not over the only one that opens, or the first one that does: that comes last.
    let first = usize::from(copies[0].is_some());
    if !done(&copies[first]) {
        let at = (first * STATIC_LEN) as u64;
        keeping_times(fd, || Ok(storage::write_at(fd, &next.bytes(), at).map_err(|(_, errno)| errno)?))?;
    }
    Ok(Some(HalfDone { header: next, second: ((1 - first) * STATIC_LEN) as u64 }))
}

impl FileState {
    /// [`begin`] for the file of this state, which the caller holds exclusively.
    ///
    /// # Errors
    /// As there.
    pub fn rewrap(&mut self, volume: &Volume, fd: BorrowedFd<'_>) -> Result<Option<HalfDone>, VolumeError> {
        self.be_born(volume, fd)?;
        let half = begin(volume, fd)?;
        if let Some(half) = &half {
            self.set_header(half.header.clone());
        }
        Ok(half)
    }
}

/// A regular file from beginning to end, with both flushes. Says whether there was anything to do.
///
/// # Errors
/// As [`begin`].
pub fn file(volume: &Volume, fd: BorrowedFd<'_>) -> Result<bool, VolumeError> {
    let Some(half) = begin(volume, fd)? else { return Ok(false) };
    storage::sync_data(fd)?;
    half.finish(fd)?;
    storage::sync_data(fd)?;
    Ok(true)
}

/// An open directory, the root too. The caller flushes. Says whether there was anything to do; [`DirKeys`] that were loaded before
/// are still those of the old header.
///
/// # Errors
/// [`Damage::Header`]; the ring's; the backing filesystem's.
pub fn directory(volume: &Volume, dir: BorrowedFd<'_>) -> Result<bool, VolumeError> {
    let keys = DirKeys::load(dir, volume.keys())?;
    if keys.dek().kek() == volume.keys().current() {
        return Ok(false);
    }
    let text = keys.rewrap(volume.keys())?.header_text();
    replace(dir, format::DIR_HEADER, |temporary| storage::symlink(dir, temporary, text.as_bytes()))?;
    Ok(true)
}

/// A node record, open for writing. The caller flushes. Says whether there was anything to do.
///
/// # Errors
/// As [`node::read`].
pub fn node_record(volume: &Volume, fd: BorrowedFd<'_>) -> Result<bool, VolumeError> {
    let header = node::read(volume, fd)?;
    if is_current(volume, &header) {
        return Ok(false);
    }
    let next = header.rewrap(volume.keys())?;
    keeping_times(fd, || Ok(storage::write_at(fd, &next.bytes(), 0).map_err(|(_, errno)| errno)?))?;
    Ok(true)
}

/// A symlink. The caller flushes. Says whether there was anything to do; then the entry is another backing object now, of the
/// same object id. `twin` holds what another name of the same symlink has become: the two stay one.
///
/// # Errors
/// [`Damage::Link`] or [`Damage::Header`]; the ring's; the backing filesystem's.
pub fn link(
    volume: &Volume,
    dir: BorrowedFd<'_>,
    name: impl Arg + Copy,
    twin: Option<BorrowedFd<'_>>,
) -> Result<bool, VolumeError> {
    /// So many characters are 129 bytes: the header and one more.
    const HEAD: usize = 172;
    const DAMAGED: VolumeError = VolumeError::Damaged(Damage::Link);
    let held = storage::open_path(dir, name)?;
    let stat = storage::stat_fd(held.as_fd())?;
    let text = storage::readlink_held(held.as_fd())?;
    let (head, rest) = text.split_at_checked(HEAD).ok_or(DAMAGED)?;
    let mut head = un_b64(head).ok_or(DAMAGED)?;
    let bytes = head.first_chunk_mut().ok_or(DAMAGED)?;
    let header = Static::open_as(volume.keys(), bytes, ObjectType::Symlink)?;
    if is_current(volume, &header) {
        return Ok(false);
    }
    *bytes = header.rewrap(volume.keys())?.bytes();
    let next = [b64(&head).as_bytes(), rest].concat();
    replace(dir, name, |temporary| {
        if let Some(twin) = twin {
            return storage::link_held(twin, dir, temporary);
        }
        storage::symlink(dir, temporary, &next)?;
        let made = storage::open_path(dir, temporary)?;
        let own = storage::stat_fd(made.as_fd())?;
        if (own.st_uid, own.st_gid) != (stat.st_uid, stat.st_gid) {
            storage::chown_held(made.as_fd(), Some(stat.st_uid), Some(stat.st_gid))?;
        }
        let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
        let times = Timestamps {
            last_access: time(stat.st_atime, stat.st_atime_nsec as _),
            last_modification: time(stat.st_mtime, stat.st_mtime_nsec as _),
        };
        storage::set_times_held(made.as_fd(), &times)
    })?;
    Ok(true)
}

/// Puts what `make` makes under a temporary name in the place of an entry. The directory's times stay.
fn replace(
    dir: BorrowedFd<'_>,
    name: impl Arg + Copy,
    make: impl Fn(&str) -> Result<(), Errno>,
) -> Result<(), VolumeError> {
    let temporary = format::temporary_name().map_err(|_| Errno::IO)?;
    let once = || {
        make(&temporary).and_then(|()| storage::rename(dir, &*temporary, dir, name, RenameFlags::empty())).inspect_err(
            |_| {
                let _ = storage::unlink(dir, &*temporary);
            },
        )
    };
    keeping_times(dir, || match once() {
        // An ordinary user's own directory that its mode closes to him.
        Err(Errno::ACCESS) => Ok(storage::lend(dir, 0o700, once)?),
        other => Ok(other?),
    })
}

/// What [`all`] did.
#[derive(Debug, Default)]
pub struct Totals {
    /// Objects that are wrapped under the current version now.
    pub anew: u64,
    /// Objects that were already.
    pub already: u64,
    /// Objects that could not be, by backing path: they still need the old version, or open with none.
    pub failed: Vec<(String, VolumeError)>,
}

/// Files that are begun before one flush covers them all.
const BATCH: usize = 64;

/// Everything in a volume that nobody has mounted, what a repair put aside included; flushed when this returns. The log must have
/// been [replayed](super::replay::replay).
///
/// # Errors
/// The ring's; a flush's. What fails with one object is in the totals.
pub fn all(volume: &Volume) -> Result<Totals, VolumeError> {
    let mut walk = Walk { volume, totals: Totals::default(), begun: Vec::new(), links: HashMap::new() };
    let mut todo = vec![Vec::new()];
    if storage::stat(volume.root().as_fd(), format::QUARANTINE).is_ok() {
        todo.push(format::QUARANTINE.as_bytes().to_vec());
    }
    while let Some(path) = todo.pop() {
        match storage::open_dir_below(volume.root().as_fd(), &path) {
            Ok(dir) => walk.directory(&path, dir.as_fd(), &mut todo)?,
            Err(errno) => walk.note(&path, Err(errno.into()))?,
        }
    }
    walk.flush()?;
    storage::sync_filesystem(volume.root().as_fd())?;
    Ok(walk.totals)
}

struct Walk<'a> {
    volume: &'a Volume,
    totals: Totals,
    begun: Vec<(Vec<u8>, OwnedFd, HalfDone)>,
    /// What symlinks with several names have become: directory and name, by the number they had.
    links: HashMap<u64, (Vec<u8>, Vec<u8>)>,
}

impl Walk<'_> {
    fn note(&mut self, path: &[u8], done: Result<bool, VolumeError>) -> Result<(), VolumeError> {
        match done {
            Ok(true) => self.totals.anew += 1,
            Ok(false) => self.totals.already += 1,
            Err(error @ VolumeError::Keyring(_)) => return Err(error),
            Err(error) => self.totals.failed.push((path.escape_ascii().to_string(), error)),
        }
        Ok(())
    }

    fn directory(&mut self, path: &[u8], dir: BorrowedFd<'_>, todo: &mut Vec<Vec<u8>>) -> Result<(), VolumeError> {
        let aside = path == format::QUARANTINE.as_bytes();
        if !aside {
            self.note(path, directory(self.volume, dir))?;
        }
        let mut entries = Vec::new();
        storage::read_dir(dir, 0, |entry| {
            // What was put aside has names of its own.
            if names::is_entry(entry.name) || (aside && entry.name.first() != Some(&b'.')) {
                entries.push(entry.name.to_vec());
            }
            true
        })?;
        for name in entries {
            let below = if path.is_empty() { name.clone() } else { [path, b"/", &name].concat() };
            let Ok(stat) = storage::stat(dir, name.as_slice()) else { continue };
            let done = match storage::file_type(&stat) {
                FileType::Directory => {
                    todo.push(below);
                    continue;
                }
                FileType::Symlink => self.link(path, dir, &name, &stat),
                FileType::RegularFile if stat.st_size as u64 == format::NODE_RECORD => {
                    storage::open_own_file(dir, name.as_slice(), true)
                        .map_err(VolumeError::from)
                        .and_then(|fd| node_record(self.volume, fd.as_fd()))
                }
                FileType::RegularFile => match self.begin(&below, dir, &name) {
                    Ok(true) => {
                        if self.begun.len() >= BATCH {
                            // Should it fail, nothing that was begun is gone on with.
                            self.flush()?;
                        }
                        continue;
                    }
                    other => other,
                },
                // Planted.
                _ => continue,
            };
            self.note(&below, done)?;
        }
        Ok(())
    }

    /// `true`: it is counted with its batch.
    fn begin(&mut self, path: &[u8], dir: BorrowedFd<'_>, name: &[u8]) -> Result<bool, VolumeError> {
        let fd = storage::open_own_file(dir, name, true)?;
        let Some(half) = begin(self.volume, fd.as_fd())? else { return Ok(false) };
        self.begun.push((path.to_vec(), fd, half));
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), VolumeError> {
        if self.begun.is_empty() {
            return Ok(());
        }
        storage::sync_filesystem(self.volume.root().as_fd())?;
        for (path, fd, half) in std::mem::take(&mut self.begun) {
            let done = half.finish(fd.as_fd()).map(|()| true);
            self.note(&path, done)?;
        }
        Ok(())
    }

    fn link(
        &mut self,
        path: &[u8],
        dir: BorrowedFd<'_>,
        name: &[u8],
        stat: &storage::Stat,
    ) -> Result<bool, VolumeError> {
        let twin = match self.links.get(&stat.st_ino) {
            Some((directory, name)) => {
                let directory = storage::open_dir_below(self.volume.root().as_fd(), directory)?;
                Some(storage::open_path(directory.as_fd(), name.as_slice())?)
            }
            None => None,
        };
        let done = link(self.volume, dir, name, twin.as_ref().map(OwnedFd::as_fd))?;
        if done && twin.is_none() && stat.st_nlink > 1 {
            self.links.insert(stat.st_ino, (path.to_vec(), name.to_vec()));
        }
        Ok(done)
    }
}
