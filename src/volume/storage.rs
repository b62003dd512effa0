//! Every system call on the backing directory, by descriptor and cipher name. Never follows a symlink, never opens anything
//! but a regular file or a directory, never leaves the backing filesystem.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

pub use rustix::fs::{FileType, RenameFlags, Stat, Timestamps};
pub use rustix::io::Errno;

use rustix::fs::{self as sys, AtFlags, Mode, OFlags};
use rustix::path::Arg;

// Unit tests have the same calls, which keep a record of what they did.
#[cfg_attr(test, allow(unreachable_pub))]
mod changes;
#[cfg(not(test))]
pub use changes::*;
#[cfg(test)]
pub(crate) mod medium;
#[cfg(test)]
pub(crate) mod recorder;
#[cfg(test)]
pub use recorder::calls::*;

type Result<T> = std::result::Result<T, Errno>;

/// `stat` of an entry, not following it.
pub fn stat(dir: BorrowedFd<'_>, name: impl Arg) -> Result<Stat> {
    sys::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map(numbered)
}

/// `stat` of an open object.
pub fn stat_fd(fd: BorrowedFd<'_>) -> Result<Stat> {
    sys::fstat(fd).map(numbered)
}

/// With the number that the object goes by.
fn numbered(mut stat: Stat) -> Stat {
    stat.st_ino = number(stat.st_ino);
    stat
}

/// The number that an object goes by: its inode number. (In a simulation, the one of what it is a copy of.)
#[cfg(not(test))]
fn number(ino: u64) -> u64 {
    ino
}
#[cfg(test)]
use recorder::number;

/// A number that tells this very directory from a copy of it: its inode number and when it was made.
pub fn identity(dir: BorrowedFd<'_>) -> Result<u64> {
    #[cfg(test)]
    if let Some(simulated) = recorder::identity() {
        return Ok(simulated);
    }
    Ok(sys::fstat(dir)?.st_ino.rotate_left(40) ^ birth_time(dir)?)
}

/// When an object was made, as a number: tells a file from another one that got its inode number later. 0 where the filesystem
/// does not keep it.
pub fn born(fd: BorrowedFd<'_>) -> Result<u64> {
    #[cfg(test)]
    if recorder::identity().is_some() {
        return Ok(stat_fd(fd)?.st_ino.rotate_left(20));
    }
    birth_time(fd)
}

fn birth_time(fd: BorrowedFd<'_>) -> Result<u64> {
    let stat = sys::statx(fd, "", AtFlags::EMPTY_PATH, sys::StatxFlags::BTIME)?;
    // Where a filesystem does not keep it, all is zero.
    Ok((stat.stx_btime.tv_sec as u64).rotate_left(30) ^ u64::from(stat.stx_btime.tv_nsec))
}

/// The type of an object.
pub fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Opens a subdirectory.
pub fn open_dir(dir: BorrowedFd<'_>, name: impl Arg) -> Result<OwnedFd> {
    sys::openat(dir, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a regular file for reading, and for writing if `write`. What is not one is not opened: [`Errno::LOOP`] for a
/// symlink, else [`Errno::NXIO`].
pub fn open_file(dir: BorrowedFd<'_>, name: impl Arg, write: bool) -> Result<OwnedFd> {
    // Held before it is opened: opening a planted device or FIFO would already do something.
    let held = open_path(dir, name)?;
    match file_type(&sys::fstat(&held)?) {
        FileType::RegularFile => {}
        FileType::Symlink => return Err(Errno::LOOP),
        _ => return Err(Errno::NXIO),
    }
    let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
    sys::open(proc_path(held.as_fd()), access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a directory any number of levels below another, following no symlink on the way.
pub fn open_dir_below(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = sys::ResolveFlags::NO_SYMLINKS | sys::ResolveFlags::BENEATH | sys::ResolveFlags::NO_XDEV;
    // A tree may be deeper than a path is long (PATH_MAX, 4,096 bytes): in stretches then.
    const STRETCH: usize = 2048;
    let (mut path, mut stretch) = (path, None::<OwnedFd>);
    while path.len() > STRETCH {
        let at = path[..STRETCH].iter().rposition(|byte| *byte == b'/').ok_or(Errno::NAMETOOLONG)?;
        stretch = Some(open_dir_below(stretch.as_ref().map_or(root, AsFd::as_fd), &path[..at])?);
        path = &path[at + 1..];
    }
    let root = stretch.as_ref().map_or(root, AsFd::as_fd);
    let path = if path.is_empty() { b"." } else { path };
    match sys::openat2(root, path, flags, Mode::empty(), resolve) {
        Err(Errno::ACCESS) => {
            let held = sys::openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
            lend(held.as_fd(), 0o700, || reopen(held.as_fd(), false))
        }
        other => other,
    }
}

/// [`open_file`] of an ordinary user's own file that its mode closes to him.
pub fn open_own_file(dir: BorrowedFd<'_>, name: impl Arg + Copy, write: bool) -> Result<OwnedFd> {
    match open_file(dir, name, write) {
        Err(Errno::ACCESS) => {
            let held = open_path(dir, name)?;
            lend(held.as_fd(), 0o600, || reopen(held.as_fd(), write))
        }
        other => other,
    }
}

/// Runs `f` while the owner has these rights to what `held` holds.
pub fn lend<T>(held: BorrowedFd<'_>, rights: u32, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let mode = sys::fstat(held)?.st_mode;
    chmod_held(held, mode | rights)?;
    let result = f();
    chmod_held(held, mode)?;
    result
}

/// A descriptor that only holds an object: it survives the entry's removal.
pub fn open_path(dir: BorrowedFd<'_>, name: impl Arg) -> Result<OwnedFd> {
    sys::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Opens what an [`open_path`] descriptor holds, which the caller knows to be a regular file or a directory.
pub fn reopen(held: BorrowedFd<'_>, write: bool) -> Result<OwnedFd> {
    let kind = file_type(&sys::fstat(held)?);
    let access = match kind {
        FileType::RegularFile if write => OFlags::RDWR,
        FileType::RegularFile | FileType::Directory => OFlags::RDONLY,
        _ => return Err(Errno::NXIO),
    };
    sys::open(proc_path(held), access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
}

/// The magic link by which path-only calls reach an open object.
pub fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The target of a symlink.
pub fn readlink(dir: BorrowedFd<'_>, name: impl Arg) -> Result<Vec<u8>> {
    Ok(sys::readlinkat(dir, name, Vec::with_capacity(1100))?.into_bytes())
}

/// The target of the symlink that an [`open_path`] descriptor holds.
pub fn readlink_held(held: BorrowedFd<'_>) -> Result<Vec<u8>> {
    Ok(sys::readlinkat(held, "", Vec::with_capacity(1100))?.into_bytes())
}

/// Reads until `buffer` is full or the file ends.
pub fn read_at(fd: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(fd, &mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// Whether the filesystem allows a file of this length. Nobody uses a descriptor's position, which this sets.
///
/// # Errors
/// [`Errno::FBIG`] where it does not.
pub fn fits(fd: BorrowedFd<'_>, len: u64) -> Result<()> {
    match sys::seek(fd, sys::SeekFrom::Start(len)) {
        // Beyond the largest file (vfs_setpos).
        Err(Errno::INVAL | Errno::OVERFLOW) => Err(Errno::FBIG),
        other => other.map(drop),
    }
}

/// Whether all of this range is there, so that overwriting it needs no space: written, or reserved where the filesystem can
/// tell (its holes are all that the others can).
pub fn is_allocated(fd: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
    if let Ok(mapped) = crate::sys::extents::is_mapped(fd, offset, len) {
        return mapped;
    }
    sys::seek(fd, sys::SeekFrom::Hole(offset)).is_ok_and(|hole| hole >= offset + len)
}

/// statvfs(2) of the backing filesystem.
pub fn filesystem(fd: BorrowedFd<'_>) -> Result<sys::StatVfs> {
    sys::fstatvfs(fd)
}

/// One raw directory entry.
pub struct RawEntry<'a> {
    /// Backing name.
    pub name: &'a [u8],
    /// Backing inode number.
    pub ino: u64,
    /// Position after it.
    pub next: u64,
    /// Its type, if the filesystem says.
    pub kind: FileType,
}

/// Calls `each` for the entries of a directory from position `from` on, until it says `false` or they end.
///
/// Each reading has a descriptor of its own: what was read before must not matter. (On ext4 it does. A descriptor whose
/// first reading began at the end gives an empty listing from then on, without an error; Linux 6.18, fs/ext4/dir.c.)
pub fn read_dir(dir: BorrowedFd<'_>, from: u64, mut each: impl FnMut(RawEntry<'_>) -> bool) -> Result<()> {
    let own = reopen(dir, false)?;
    if from != 0 {
        sys::seek(&own, sys::SeekFrom::Start(from))?;
    }
    let mut buffer = [MaybeUninit::<u8>::uninit(); 32 << 10];
    let mut entries = sys::RawDir::new(&own, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let more = each(RawEntry {
            name: entry.file_name().to_bytes(),
            ino: number(entry.ino()),
            next: entry.next_entry_cookie(),
            kind: entry.file_type(),
        });
        if !more {
            break;
        }
    }
    Ok(())
}

/// Attribute calls go through the magic link: they work on what an [`open_path`] descriptor holds.
pub fn get_xattr(held: BorrowedFd<'_>, name: &OsStr) -> Result<Vec<u8>> {
    let path = proc_path(held);
    let mut value = Vec::with_capacity(256);
    loop {
        match sys::getxattr(&path, name, rustix::buffer::spare_capacity(&mut value)) {
            Err(Errno::RANGE) => {
                let mut nothing: [u8; 0] = [];
                let len = sys::getxattr(&path, name, &mut nothing)?;
                value = Vec::with_capacity(len.max(value.capacity() * 2));
            }
            other => return other.map(|_| value),
        }
    }
}

/// fgetxattr(2) of a short value; `None` where there is none, or none of just this length.
pub fn get_xattr_fd<const N: usize>(fd: BorrowedFd<'_>, name: &str) -> Option<[u8; N]> {
    let mut value = [0; N];
    (sys::fgetxattr(fd, name, &mut value[..]).ok()? == N).then_some(value)
}

/// The names of all attributes.
pub fn list_xattr(held: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>> {
    let path = proc_path(held);
    let mut list: Vec<u8> = Vec::with_capacity(1024);
    loop {
        match sys::listxattr(&path, rustix::buffer::spare_capacity(&mut list)) {
            Err(Errno::RANGE) => list = Vec::with_capacity(list.capacity() * 4),
            Err(errno) => return Err(errno),
            Ok(_) => break,
        }
    }
    Ok(list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
}

/// Borrows any descriptor.
pub fn fd(fd: &impl AsFd) -> BorrowedFd<'_> {
    fd.as_fd()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ext4 (Linux 6.18, fs/ext4/dir.c) gives an empty listing on a descriptor whose first reading began at the end, which is how
    /// a listing goes on after the descriptor cache let go of its directory.
    #[test]
    fn a_listing_is_whole_whatever_was_read_before() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..200 {
            std::fs::write(dir.path().join(format!("an entry with a name of some length, {n}")), b"").unwrap();
        }
        let list = |fd: &OwnedFd, from| {
            let (mut names, mut positions) = (Vec::new(), Vec::new());
            read_dir(fd.as_fd(), from, |entry| {
                names.push(entry.name.to_vec());
                positions.push(entry.next);
                true
            })
            .unwrap();
            (names, positions)
        };
        let open = || open_dir(sys::CWD, dir.path()).unwrap();
        let (all, positions) = list(&open(), 0);
        assert_eq!(all.len(), 202);
        // From every position on a fresh descriptor, and then from the beginning on that one.
        for (n, position) in positions.iter().enumerate() {
            let fd = open();
            assert_eq!(list(&fd, *position).0, all[n + 1..]);
            assert_eq!(list(&fd, 0).0, all, "after a reading from position {n}");
        }
    }
}
