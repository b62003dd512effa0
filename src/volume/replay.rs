//! After an unclean end: does what the intent log says and the files do not show yet (docs/FORMAT.md section 12).
//!
//! Everything here can be done again, and again after a crash in the middle of it. A record touches only a file that is in
//! the state that the record was written about: not one that was put back from a backup, not a copy, not one that was
//! sealed afterwards.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use zeroize::Zeroizing;

use super::content::{self, BlockAad};
use super::events::Victim;
use super::file::{BIRTH_LEN, Header, keeping_times, read_header, write_header_anew};
use super::format::{self, BLOCK, BLOCK_OVERHEAD, SEALED_BLOCK};
use super::header::{self, MUTABLE_AT, Mutable, STATIC_LEN, Static};
use super::log::{self, Change, Record, Subject};
use super::storage::{self, Errno, FileType};
use super::{Damage, Volume, VolumeError, dir, names};
use crate::crypto::ObjectId;
use crate::crypto::kdf::DekLabel;
use crate::keyring::KeyringError;

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// There was a log: the last end was not a clean one.
    pub unclean: bool,
    /// Files that were changed.
    pub files: u64,
    /// Records that had something to say about them.
    pub records: u64,
    /// Files in the log that are not there, or not in the state that it is about: removed, put back, sealed since.
    pub passed_over: u64,
    /// Records lost to damage of the log.
    pub lost: u64,
}

/// Replays the log, if there is one, and removes it.
///
/// # Errors
/// The ring's; the backing filesystem's, a full disk among them. The log is still there then.
pub fn replay(volume: &Volume) -> Result<Replayed, VolumeError> {
    let root = volume.root().as_fd();
    let found = log::read(root, volume.keys())?;
    let mut done = Replayed { unclean: found.any, lost: found.lost, ..Replayed::default() };
    if !found.any {
        return Ok(done);
    }
    if found.lost > 0 {
        volume.report(Damage::Log, 0, None, Victim::default);
    }
    // A daemon that was killed has left records that no flush covers. What they say is done in place below, and a power cut
    // in the middle of that would leave half of it and nothing to mend it with.
    storage::sync_filesystem(root)?;
    let mut by_object: HashMap<ObjectId, Vec<Record>> = HashMap::new();
    for record in found.records {
        by_object.entry(record.subject.object).or_default().push(record);
    }
    let places = find(volume, &by_object)?;
    for (object, records) in &by_object {
        let Some(place) = places.get(object) else {
            done.passed_over += 1;
            continue;
        };
        let file = match place.open(volume) {
            Ok(file) => file,
            Err(errno @ (Errno::ACCESS | Errno::PERM)) => {
                tracing::warn!(%errno, backing_ino = place.ino, "a file is passed over by the replay");
                done.passed_over += 1;
                continue;
            }
            Err(errno) => return Err(errno.into()),
        };
        match apply(volume, file.as_fd(), *object, records) {
            Ok(0) => done.passed_over += 1,
            Ok(n) => (done.files, done.records) = (done.files + 1, done.records + n),
            // Its own damage; the log cannot help.
            Err(VolumeError::Damaged(damage)) => {
                volume.report(damage, place.ino, None, || Victim { object: Some(*object), path: Some(place.path()) });
                done.passed_over += 1;
            }
            Err(error) => return Err(error),
        }
    }
    // What does not open under keys that were wiped meanwhile is not lost.
    if let Some(reason) = volume.keys().sealed() {
        return Err(KeyringError::Sealed(reason).into());
    }
    // Also what the files hold without a record: from here on it is on the medium.
    storage::sync_filesystem(root)?;
    log::remove(root)?;
    storage::sync_fd(root)?;
    Ok(done)
}

/// Where a file was found: names, not descriptors, of which a process may not have so many.
struct Place {
    directory: Vec<u8>,
    name: Vec<u8>,
    ino: u64,
}

impl Place {
    /// Below the backing root, for events.
    fn path(&self) -> String {
        let directory =
            if self.directory.is_empty() { String::new() } else { format!("{}/", self.directory.escape_ascii()) };
        format!("{directory}{}", self.name.escape_ascii())
    }

    fn open(&self, volume: &Volume) -> Result<OwnedFd, Errno> {
        let directory = storage::open_dir_below(volume.root().as_fd(), &self.directory)?;
        storage::open_own_file(directory.as_fd(), self.name.as_slice(), true)
    }
}

/// The files that records are about, wherever they are now. On the way, what interrupted operations left is removed.
fn find(volume: &Volume, wanted: &HashMap<ObjectId, Vec<Record>>) -> Result<HashMap<ObjectId, Place>, VolumeError> {
    let root = storage::identity(volume.root().as_fd())?;
    let subjects: HashMap<ObjectId, Subject> =
        wanted.iter().filter_map(|(id, records)| Some((*id, records.last()?.subject))).collect();
    // Where the log was written, a file with another number is a copy or was put back. If the volume
    // was moved as a whole, every number is another one: then the headers tell, as long as they tell files apart.
    let moved = subjects.values().any(|subject| subject.root != root);
    walk(volume, &subjects, moved)
}

fn walk(
    volume: &Volume,
    subjects: &HashMap<ObjectId, Subject>,
    moved: bool,
) -> Result<HashMap<ObjectId, Place>, VolumeError> {
    let numbers: HashSet<u64> = subjects.values().map(|subject| subject.ino).collect();
    let mut found: HashMap<ObjectId, Place> = HashMap::new();
    let mut twice = HashSet::new();
    let mut directories: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(path) = directories.pop() {
        let directory = match storage::open_dir_below(volume.root().as_fd(), &path) {
            Ok(directory) => directory,
            // Closed for ever (chattr), or not there any more: its files are passed over.
            Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::NOENT | Errno::XDEV | Errno::LOOP)) => {
                tracing::warn!(%errno, "a directory is passed over by the replay");
                continue;
            }
            Err(errno) => return Err(errno.into()),
        };
        let (mut files, mut below) = (Vec::new(), Vec::new());
        let mut leftovers = false;
        storage::read_dir(directory.as_fd(), 0, |entry| {
            leftovers |= entry.name.starts_with(format::TEMPORARY_PREFIX.as_bytes());
            if !names::is_entry(entry.name) {
                return true;
            }
            let kind = match entry.kind {
                FileType::Unknown => {
                    storage::stat(directory.as_fd(), entry.name).map_or(FileType::Unknown, |s| storage::file_type(&s))
                }
                known => known,
            };
            match kind {
                FileType::Directory => below.push(entry.name.to_vec()),
                FileType::RegularFile if moved || numbers.contains(&entry.ino) => files.push(entry.name.to_vec()),
                _ => {}
            }
            true
        })?;
        if leftovers {
            dir::clean(directory.as_fd());
        }
        for name in files {
            let file = match storage::open_own_file(directory.as_fd(), name.as_slice(), false) {
                Ok(file) => file,
                // Not a file of ours, or closed for ever.
                Err(Errno::LOOP | Errno::NXIO | Errno::ACCESS | Errno::PERM | Errno::NOENT) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let ino = storage::stat_fd(file.as_fd())?.st_ino;
            let Some(id) = claimed(file.as_fd())?.into_iter().find(|id| subjects.contains_key(id)) else { continue };
            if !moved && !subjects.get(&id).map_or(Ok(false), |subject| is_it(subject, file.as_fd()))? {
                continue;
            }
            // Two names of one file are one file.
            if found.get(&id).is_some_and(|other| other.ino != ino) {
                twice.insert(id);
            }
            found.insert(id, Place { directory: path.clone(), name, ino });
        }
        let join = |name: Vec<u8>| if path.is_empty() { name } else { [path.as_slice(), b"/", &name].concat() };
        directories.extend(below.into_iter().map(join));
    }
    found.retain(|id, _| !twice.contains(id));
    Ok(found)
}

/// Whether records about this subject are about this very file, in the volume that they were written in.
fn is_it(subject: &Subject, file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // A number is given out again: what was removed and put back from a backup may have it, and is another file.
    let (ino, born) = (storage::stat_fd(file)?.st_ino, storage::born(file)?);
    Ok(subject.ino == ino && (subject.born == born || subject.born == 0 || born == 0))
}

/// Whether a replay in a volume whose root has this identity would use these records of a file's object on this file.
pub(super) fn meant_for(records: &[Record], root: u64, file: BorrowedFd<'_>) -> Result<bool, Errno> {
    match records.last() {
        None => Ok(false),
        Some(last) => Ok(last.subject.root != root || is_it(&last.subject, file)?),
    }
}

/// The objects that a file's static headers claim to be of.
fn claimed(file: BorrowedFd<'_>) -> Result<Vec<ObjectId>, Errno> {
    let mut head = [0; 2 * STATIC_LEN];
    storage::read_at(file, &mut head, 0)?;
    let mut copies = vec![];
    if content::is_zero(&head) {
        let birth = storage::get_xattr_fd::<BIRTH_LEN>(file, format::BIRTH);
        copies.extend(birth.and_then(|birth| birth.first_chunk().copied()));
    } else {
        copies.extend(head[..STATIC_LEN].first_chunk().copied());
        copies.extend(head[STATIC_LEN..].first_chunk().copied());
    }
    Ok(copies.iter().filter_map(header::claimed_id).collect())
}

/// Whether records about this state of a file are about what is there.
fn concerns(subject: &Subject, header: &Mutable) -> bool {
    // Opened for changes, and not sealed since.
    let opened = !header.sealed && header.opened == subject.opened;
    // The header that opened it is only in the log; or the seal before that never reached the medium.
    let sealed_then = header.counter == subject.opened && subject.opened > 0;
    let seal_lost = !header.sealed && (subject.low..subject.opened).contains(&header.counter);
    opened || sealed_then || seal_lost
}

/// The records, in order, that are about a file with this header, and not settled.
pub(super) fn todo<'a>(records: &'a [Record], header: &Mutable) -> Vec<&'a Record> {
    let void = records
        .iter()
        .filter_map(|record| match record.change {
            Change::Settled { until } => Some(until),
            _ => None,
        })
        .max();
    records
        .iter()
        .filter(|record| concerns(&record.subject, header) && void.is_none_or(|until| record.sequence > until))
        .filter(|record| !matches!(record.change, Change::Settled { .. }))
        .collect()
}

/// Does what the records say, in order. How many there were to do.
fn apply(volume: &Volume, fd: BorrowedFd<'_>, object: ObjectId, records: &[Record]) -> Result<u64, VolumeError> {
    let Header { header, mutable: at_first, newborn } = read_header(volume, fd)?;
    // It was found by what it claims. A cut has nothing in it that only this file's key could have made.
    if header.dek.object() != object {
        return Ok(0);
    }
    let todo = todo(records, &at_first);
    if todo.is_empty() {
        return Ok(0);
    }
    keeping_times(fd, || {
        if newborn {
            write_header_anew(volume, fd, &header, at_first)?;
        }
        let mut now = at_first;
        for record in &todo {
            // With a header that opens the file anew, the records before it are no more about this file. Should the replay
            // itself be cut short, nobody will do again what they say: it must be on the medium by then.
            if now.opened != record.subject.opened {
                storage::sync_data(fd)?;
            }
            // Whatever is done next, the header must allow it: the record that opened the file may be lost.
            if !matches!(record.change, Change::Header(_)) && (now.sealed || now.opened != record.subject.opened) {
                let next = Mutable { sealed: false, opened: record.subject.opened, ..now };
                now =
                    write_header(volume, fd, &header, Mutable { counter: next.counter.max(next.opened) + 1, ..next })?;
            }
            match &record.change {
                Change::Header(bytes) => {
                    let next = Mutable::open(volume.keys(), &header.dek, &volume.id(), bytes)?;
                    // A later one may have been written in place since.
                    if next.counter > now.counter {
                        storage::write_at(fd, bytes, MUTABLE_AT).map_err(|(_, errno)| errno)?;
                        now = next;
                    }
                }
                Change::Blocks { first, sealed } => write_blocks(volume, fd, &header, *first, sealed)?,
                Change::Cut { size, tail } => {
                    if now.floor > *size {
                        let next = Mutable { counter: now.counter + 1, floor: *size, size: *size, ..now };
                        now = write_header(volume, fd, &header, next)?;
                    }
                    storage::set_len(fd, format::backing_len(*size))?;
                    if !tail.is_empty() {
                        write_blocks(volume, fd, &header, size / BLOCK, tail)?;
                    }
                }
                Change::Grow { size } => {
                    let len = format::backing_len(*size);
                    if storage::stat_fd(fd)?.st_size < len as i64 {
                        storage::set_len(fd, len)?;
                    }
                }
                Change::Settled { .. } => {}
            }
        }
        Ok(todo.len() as u64)
    })
}

fn write_header(volume: &Volume, fd: BorrowedFd<'_>, header: &Static, next: Mutable) -> Result<Mutable, VolumeError> {
    let bytes = next.seal(volume.keys(), &header.dek, &volume.id())?;
    storage::write_at(fd, &bytes, MUTABLE_AT).map_err(|(_, errno)| errno)?;
    Ok(next)
}

/// Writes blocks that are the file's own.
fn write_blocks(
    volume: &Volume,
    fd: BorrowedFd<'_>,
    header: &Static,
    first: u64,
    sealed: &[u8],
) -> Result<(), VolumeError> {
    let mut aad = BlockAad::new(&volume.id(), &header.dek.object());
    let mut plain = Zeroizing::new([0; BLOCK as usize]);
    let genuine = volume.keys().with_keys(&header.dek, |keys| {
        let cipher = keys.cipher(DekLabel::Content);
        sealed.chunks(SEALED_BLOCK as usize).zip(first..).all(|(block, index)| {
            let len = block.len().saturating_sub(BLOCK_OVERHEAD as usize);
            len > 0 && content::open_block(&cipher, &mut aad, index, block, &mut plain[..len]).is_ok()
        })
    })?;
    if !genuine {
        return Err(VolumeError::Damaged(Damage::Log));
    }
    Ok(storage::write_at(fd, sealed, format::block_offset(first)).map_err(|(_, errno)| errno)?)
}

#[cfg(test)]
mod tests;
