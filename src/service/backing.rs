//! A backing directory without its keys: opening, locking, small files, counting what an erase would take.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation};
use rustix::io::Errno;
use serde::Serialize;

use super::Error;
use crate::volume::format::{HEADER, LONG_NAME_PREFIX, LONG_PREFIX, NODE_RECORD, OWN_PREFIX, plain_size};
use crate::volume::{meta, storage};

/// Canonical path of an existing directory.
///
/// # Errors
/// [`Error::Usage`] if there is none, else the system's.
pub fn canonical(path: &Path, what: &str) -> Result<PathBuf, Error> {
    let path = fs::canonicalize(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Error::Usage(format!("there is no {what} {}: make it, or check the path", path.display()))
        }
        _ => Error::Io { what: format!("cannot reach the {what} {}", path.display()), source: error },
    })?;
    if !path.is_dir() {
        return Err(Error::Usage(format!("the {what} {} is not a directory", path.display())));
    }
    Ok(path)
}

/// Opens a backing directory.
///
/// # Errors
/// The system's.
pub fn open(path: &Path) -> Result<OwnedFd, Error> {
    meta::open_backing(path).map_err(Error::io(format!("cannot open the backing directory {}", path.display())))
}

/// Takes the exclusive lock of a volume. `false`: somebody else has it. It lasts until every copy of the descriptor is closed.
///
/// # Errors
/// A backing filesystem without locks on directories.
pub fn lock(backing: impl AsFd, path: &Path) -> Result<bool, Error> {
    match rustix::fs::flock(backing, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(Error::Io {
            what: format!(
                "the backing filesystem of {} cannot lock a directory, which keeps two mounts apart: use another one",
                path.display()
            ),
            source: errno.into(),
        }),
    }
}

/// Whether somebody has the lock of a volume. Asking takes it for an instant, which [`lock`]'s callers that wait get over.
///
/// # Errors
/// As [`open`] and [`lock`].
pub fn is_locked(path: &Path) -> Result<bool, Error> {
    // A descriptor of its own, closed at once: the lock lasts no longer than the question.
    let own = open(path)?;
    Ok(!lock(&own, path)?)
}

/// Reads a small regular file of the backing root. `None`: there is none.
///
/// # Errors
/// The system's; a symlink, another type, or more than `limit` bytes.
pub fn read_small(backing: impl AsFd, name: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match storage::open_file(backing.as_fd(), name, false) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP | Errno::NXIO) => return Err(io::Error::other(format!("{name} is not a regular file"))),
        Err(errno) => return Err(errno.into()),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("{name} is larger than {limit} bytes")));
    }
    Ok(Some(bytes))
}

/// What a volume holds, as far as it shows without keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Contents {
    /// Regular files.
    pub files: u64,
    /// Plaintext bytes in them.
    pub bytes: u64,
    /// Directories below the root.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// FIFOs, sockets and devices.
    pub nodes: u64,
    /// Entries that could not be looked at.
    pub unreadable: u64,
}

/// Counts a backing tree. Opens directories only, and follows nothing.
pub fn count(root: &Path) -> Contents {
    let mut contents = Contents::default();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        let Ok(entries) = fs::read_dir(&dir) else {
            contents.unreadable += 1;
            continue;
        };
        for entry in entries {
            let Ok(entry) = entry else {
                contents.unreadable += 1;
                continue;
            };
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(OWN_PREFIX) && !name.starts_with(LONG_PREFIX) || name.starts_with(LONG_NAME_PREFIX) {
                continue;
            }
            let Ok(meta) = entry.metadata() else {
                contents.unreadable += 1;
                continue;
            };
            if meta.is_dir() {
                contents.directories += 1;
                todo.push(entry.path());
            } else if meta.is_symlink() {
                contents.links += 1;
            } else if meta.is_file() && meta.len() == NODE_RECORD {
                contents.nodes += 1;
            } else if meta.is_file() {
                contents.files += 1;
                contents.bytes = contents.bytes.saturating_add(plain_size(meta.len().max(HEADER)).unwrap_or(0));
            }
        }
    }
    contents
}

/// Empties a backing directory that `init` began to fill: our own files at its top, nothing else.
pub(crate) fn remove_own_files(backing: impl AsFd) {
    let Ok(dir) = rustix::fs::Dir::read_from(&backing) else { return };
    for entry in dir.flatten() {
        let name = entry.file_name();
        if name.to_bytes().starts_with(OWN_PREFIX.as_bytes()) {
            let _ = rustix::fs::unlinkat(&backing, name, AtFlags::empty());
        }
    }
}

/// Whether a directory has no entries.
///
/// # Errors
/// The system's.
pub(crate) fn is_empty(path: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(path)?.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_counted_without_keys() {
        let dir = tempfile::tempdir().expect("directory");
        let write = |name: &str, len: usize| fs::write(dir.path().join(name), vec![0; len]).expect("written");
        write("lethefs.volume", 700);
        write("abc", 541);
        write("node", 128);
        write("lethefs.long.x", 4636);
        std::os::unix::fs::symlink("lethefs", dir.path().join("lethefs.name.x")).expect("link");
        std::os::unix::fs::symlink("t", dir.path().join("l")).expect("link");
        fs::create_dir(dir.path().join("d")).expect("directory");
        write("d/e", 0);
        let expected = Contents { files: 3, bytes: 4097, directories: 1, links: 1, nodes: 1, unreadable: 0 };
        assert_eq!(count(dir.path()), expected);
    }

    #[test]
    fn a_volume_is_locked_once() {
        let dir = tempfile::tempdir().expect("directory");
        let (first, second) = (open(dir.path()).expect("open"), open(dir.path()).expect("open"));
        assert!(lock(&first, dir.path()).expect("lock"));
        assert!(!lock(&second, dir.path()).expect("lock"));
        assert!(is_locked(dir.path()).expect("asked"));
        drop(first);
        assert!(!is_locked(dir.path()).expect("asked"));
        assert!(!is_locked(dir.path()).expect("asked again"));
        assert!(lock(&second, dir.path()).expect("lock"));
    }
}
