//! The system calls that change something in the backing directory, or bring it to the medium.

use std::ffi::OsStr;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{self as sys, AtFlags, Mode, OFlags};
use rustix::path::Arg;

use super::{Errno, RenameFlags, Result, Timestamps, proc_path};

/// Makes a regular file; fails if there is anything under that name.
pub fn create_file(dir: BorrowedFd<'_>, name: impl Arg, mode: u32) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    sys::openat(dir, name, flags, Mode::from_raw_mode(mode))
}

/// Makes a directory.
pub fn mkdir(dir: BorrowedFd<'_>, name: impl Arg, mode: u32) -> Result<()> {
    sys::mkdirat(dir, name, Mode::from_raw_mode(mode))
}

/// Makes a symlink with this target.
pub fn symlink(dir: BorrowedFd<'_>, name: impl Arg, target: &[u8]) -> Result<()> {
    sys::symlinkat(target, dir, name)
}

/// A hard link to what `held` holds.
pub fn link_held(held: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: impl Arg) -> Result<()> {
    sys::linkat(sys::CWD, proc_path(held), dir, name, AtFlags::SYMLINK_FOLLOW)
}

/// A hard link.
pub fn link(dir: BorrowedFd<'_>, name: impl Arg, to_dir: BorrowedFd<'_>, to: impl Arg) -> Result<()> {
    sys::linkat(dir, name, to_dir, to, AtFlags::empty())
}

/// Removes an entry that is no directory.
pub fn unlink(dir: BorrowedFd<'_>, name: impl Arg) -> Result<()> {
    sys::unlinkat(dir, name, AtFlags::empty())
}

/// Removes an empty directory.
pub fn rmdir(dir: BorrowedFd<'_>, name: impl Arg) -> Result<()> {
    sys::unlinkat(dir, name, AtFlags::REMOVEDIR)
}

/// renameat2(2).
pub fn rename(
    from_dir: BorrowedFd<'_>,
    from: impl Arg,
    to_dir: BorrowedFd<'_>,
    to: impl Arg,
    flags: RenameFlags,
) -> Result<()> {
    if flags.is_empty() {
        return sys::renameat(from_dir, from, to_dir, to);
    }
    sys::renameat_with(from_dir, from, to_dir, to, flags)
}

/// Writes all of `bytes`. On failure says how many bytes went out before.
pub fn write_at(fd: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> std::result::Result<(), (usize, Errno)> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(fd, &bytes[done..], offset + done as u64) {
            // POSIX allows it only for a full device; asking again would go on for ever.
            Ok(0) => return Err((done, Errno::NOSPC)),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err((done, errno)),
        }
    }
    Ok(())
}

/// ftruncate(2).
pub fn set_len(fd: BorrowedFd<'_>, len: u64) -> Result<()> {
    sys::ftruncate(fd, len)
}

/// Makes a file at least so long, with space for all of it.
pub fn allocate(fd: BorrowedFd<'_>, len: u64) -> Result<()> {
    sys::fallocate(fd, sys::FallocateFlags::empty(), 0, len)
}

/// Makes sure that there is space for this range, without changing the size. Filesystems that cannot say so are believed.
pub fn reserve(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
    match sys::fallocate(fd, sys::FallocateFlags::KEEP_SIZE, offset, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
        other => other,
    }
}

/// The same for a program that asked for it: where the filesystem cannot, that is [`Errno::OPNOTSUPP`].
pub fn preallocate(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
    sys::fallocate(fd, sys::FallocateFlags::KEEP_SIZE, offset, len)
}

/// Makes a range zeros that lies within the file: without its space, or with it if `keeps_space`.
pub fn zero(fd: BorrowedFd<'_>, offset: u64, len: u64, keeps_space: bool) -> Result<()> {
    let how = if keeps_space { sys::FallocateFlags::ZERO_RANGE } else { sys::FallocateFlags::PUNCH_HOLE };
    match sys::fallocate(fd, how | sys::FallocateFlags::KEEP_SIZE, offset, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        other => return other,
    }
    let zeros = [0; 64 << 10];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(zeros.len() as u64);
        write_at(fd, &zeros[..n as usize], offset + done).map_err(|(_, errno)| errno)?;
        done += n;
    }
    Ok(())
}

/// fdatasync(2): contents and the size.
pub fn sync_data(fd: BorrowedFd<'_>) -> Result<()> {
    sys::fdatasync(fd)
}

/// fsync(2).
pub fn sync_fd(fd: BorrowedFd<'_>) -> Result<()> {
    sys::fsync(fd)
}

/// syncfs(2): all of the backing filesystem.
pub fn sync_filesystem(fd: BorrowedFd<'_>) -> Result<()> {
    sys::syncfs(fd)
}

/// Changes the mode of an entry that is no symlink. (Linux has no fchmodat without following; the descriptor holds it.)
pub fn chmod_held(held: BorrowedFd<'_>, mode: u32) -> Result<()> {
    sys::chmod(proc_path(held), Mode::from_raw_mode(mode & 0o7777))
}

/// Changes the mode of an open object.
pub fn chmod_fd(fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
    sys::fchmod(fd, Mode::from_raw_mode(mode & 0o7777))
}

/// Changes owner and group of what `held` holds, a symlink too.
pub fn chown_held(held: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    let (uid, gid) = (uid.map(rustix::fs::Uid::from_raw), gid.map(rustix::fs::Gid::from_raw));
    sys::chownat(held, "", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)
}

/// Sets times of what `held` holds, a symlink too.
pub fn set_times_held(held: BorrowedFd<'_>, times: &Timestamps) -> Result<()> {
    // AT_EMPTY_PATH for utimensat came with Linux 5.8; the kernels that have memfd_secret have it.
    sys::utimensat(held, "", times, AtFlags::EMPTY_PATH)
}

/// Sets times of an open object.
pub fn set_times_fd(fd: BorrowedFd<'_>, times: &Timestamps) -> Result<()> {
    sys::futimens(fd, times)
}

/// setxattr(2).
pub fn set_xattr(held: BorrowedFd<'_>, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
    sys::setxattr(proc_path(held), name, value, sys::XattrFlags::from_bits_retain(flags as u32))
}

/// fsetxattr(2).
pub fn set_xattr_fd(fd: BorrowedFd<'_>, name: &str, value: &[u8]) -> Result<()> {
    sys::fsetxattr(fd, name, value, sys::XattrFlags::empty())
}

/// fremovexattr(2).
pub fn remove_xattr_fd(fd: BorrowedFd<'_>, name: &str) -> Result<()> {
    sys::fremovexattr(fd, name)
}

/// removexattr(2).
pub fn remove_xattr(held: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    sys::removexattr(proc_path(held), name)
}
