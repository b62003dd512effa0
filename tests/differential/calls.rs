//! The calls of a sequence, and what each of them is on Linux.

use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    self as sys, Access, AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Timespec,
    Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::seen::{digest, shown};

/// Descriptors that a sequence can hold.
pub(crate) const SLOTS: usize = 4;
/// The most that one read takes in.
const READ: usize = 200_000;

/// What a call gave: an errno, or whatever a program can tell.
pub(crate) type Seen = Result<String, i32>;

/// A path of any bytes.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Name(pub(crate) Vec<u8>);

pub(crate) fn p(path: &str) -> Name {
    Name(path.as_bytes().to_vec())
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            0..=400 => write!(f, "p(\"{}\")", self.0.escape_ascii()),
            len => write!(f, "{len} bytes"),
        }
    }
}

/// A path, from the working directory of whoever asks or from a descriptor.
#[derive(Clone, Debug)]
pub(crate) struct At(pub(crate) Option<usize>, pub(crate) Name);

/// A path from the working directory.
pub(crate) fn at(path: &str) -> At {
    At(None, p(path))
}

#[derive(Clone, Debug)]
pub(crate) enum On {
    Slot(usize),
    /// Relative to the working directory; `true`: a symlink at its end is followed.
    Path(Name, bool),
}

/// A system call, or a few that belong together.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Open(usize, At, OFlags, u32),
    Close(usize),
    Dup(usize, usize),
    Read(usize, usize),
    Pread(usize, u64, usize),
    Write(usize, usize),
    Pwrite(usize, u64, usize),
    Seek(usize, SeekFrom),
    Ftruncate(usize, u64),
    /// truncate(2).
    Truncate(Name, u64),
    Allocate(usize, FallocateFlags, u64, u64),
    Copy(usize, Option<u64>, usize, Option<u64>, usize),
    Sync(usize, bool),
    Fstat(usize),
    Fchmod(usize, u32),
    Fchown(usize, Option<u32>, Option<u32>),
    /// The whole of a file, by a descriptor of its own.
    ReadFile(At),
    Mkdir(At, u32),
    Rmdir(At),
    Unlink(At),
    Link(At, At, AtFlags),
    Symlink(Name, At),
    /// With a buffer of so many bytes.
    Readlink(At, usize),
    Rename(At, At, RenameFlags),
    Mknod(At, FileType, u32, u64),
    Chmod(At, u32),
    Chown(At, Option<u32>, Option<u32>, bool),
    /// By a path, or of a descriptor; `true`: a symlink is followed.
    Times(At, [(i64, i64); 2], bool),
    Ftimes(usize, [(i64, i64); 2]),
    Stat(At, bool),
    Access(At, u32, bool),
    List(At),
    SetXattr(On, Name, Name, u32),
    GetXattr(On, Name),
    /// With a buffer of so many bytes.
    ListXattr(On, usize),
    RemoveXattr(On, Name),
    Statfs(At),
    Chdir(Name),
    Fchdir(usize),
    Umask(u32),
}

/// Descriptors of one side.
#[derive(Default)]
pub(crate) struct Table([Option<OwnedFd>; SLOTS]);

impl Table {
    fn get(&self, slot: usize) -> Result<BorrowedFd<'_>, Errno> {
        self.0[slot].as_ref().map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    fn dir(&self, at: &At) -> Result<BorrowedFd<'_>, Errno> {
        at.0.map_or(Ok(CWD), |slot| self.get(slot))
    }

    /// What can be told of each descriptor without moving it.
    pub(crate) fn look(&self) -> Vec<String> {
        let one = |fd: &OwnedFd| {
            let mut data = vec![0; READ];
            let stat = sys::fstat(fd).map(|stat| shown(&stat));
            // A pipe would be read empty, and a directory is looked at by its name.
            let regular = stat.is_ok() && sys::fstat(fd).is_ok_and(|s| FileType::from_raw_mode(s.st_mode).is_file());
            let read = regular.then(|| rustix::io::pread(fd, &mut data[..], 0).map(|n| digest(&data[..n])));
            format!("{stat:?} {read:?} {:?}", sys::tell(fd))
        };
        self.0.iter().map(|slot| slot.as_ref().map_or_else(String::new, one)).collect()
    }
}

fn some(text: impl fmt::Debug) -> Result<String, Errno> {
    Ok(format!("{text:?}"))
}

fn ids(uid: Option<u32>, gid: Option<u32>) -> (Option<Uid>, Option<Gid>) {
    (uid.map(Uid::from_raw), gid.map(Gid::from_raw))
}

fn timestamps(times: [(i64, i64); 2]) -> Timestamps {
    let [last_access, last_modification] = times.map(|(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec });
    Timestamps { last_access, last_modification }
}

/// Those times of a stat that somebody set; the others are the clock's.
fn set_times(stat: &sys::Stat) -> Vec<(i64, u64)> {
    let times = [(stat.st_atime, stat.st_atime_nsec), (stat.st_mtime, stat.st_mtime_nsec)];
    times.into_iter().filter(|(seconds, _)| crate::seen::is_set(*seconds)).collect()
}

fn is_dir(fd: BorrowedFd<'_>) -> bool {
    sys::fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_dir())
}

fn nofollow(follow: bool) -> AtFlags {
    if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW }
}

/// Runs a call with the credentials and the working directory of this thread.
pub(crate) fn run(call: &Call, table: &mut Table) -> Seen {
    try_run(call, table).map_err(Errno::raw_os_error)
}

fn try_run(call: &Call, table: &mut Table) -> Result<String, Errno> {
    match call {
        Call::Open(slot, path, flags, mode) => {
            // A FIFO must not make us wait.
            let flags = *flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let fd = sys::openat(table.dir(path)?, &path.1.0[..], flags, Mode::from_raw_mode(*mode))?;
            let seen = shown(&sys::fstat(&fd)?);
            table.0[*slot] = Some(fd);
            some(seen)
        }
        Call::Close(slot) => some(table.0[*slot].take().is_some()),
        Call::Dup(from, to) => {
            let fd = rustix::io::fcntl_dupfd_cloexec(table.get(*from)?, 3)?;
            table.0[*to] = Some(fd);
            some(())
        }
        Call::Read(slot, len) => {
            let mut data = vec![0; *len];
            let n = rustix::io::read(table.get(*slot)?, &mut data[..])?;
            some(digest(&data[..n]))
        }
        Call::Pread(slot, offset, len) => {
            let mut data = vec![0; *len];
            let n = rustix::io::pread(table.get(*slot)?, &mut data[..], *offset)?;
            some(digest(&data[..n]))
        }
        Call::Write(slot, len) => {
            let fd = table.get(*slot)?;
            let n = rustix::io::write(fd, &crate::bytes(*len, 7))?;
            some((n, sys::tell(fd)))
        }
        Call::Pwrite(slot, offset, len) => {
            some(rustix::io::pwrite(table.get(*slot)?, &crate::bytes(*len, offset + 1), *offset)?)
        }
        // Positions in directories are of each filesystem's own.
        Call::Seek(slot, _) if is_dir(table.get(*slot)?) => some(()),
        Call::Seek(slot, to) => some(sys::seek(table.get(*slot)?, *to)?),
        Call::Ftruncate(slot, len) => some(sys::ftruncate(table.get(*slot)?, *len)?),
        Call::Truncate(path, len) => {
            let len = i64::try_from(*len).unwrap_or(i64::MAX);
            nix::unistd::truncate(&path.0[..], len).map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
            some(())
        }
        Call::Allocate(slot, mode, offset, len) => some(sys::fallocate(table.get(*slot)?, *mode, *offset, *len)?),
        Call::Copy(from, from_at, to, to_at, len) => {
            let (mut from_at, mut to_at) = (*from_at, *to_at);
            let (from, to) = (table.get(*from)?, table.get(*to)?);
            let n = sys::copy_file_range(from, from_at.as_mut(), to, to_at.as_mut(), *len)?;
            some((n, from_at, to_at, sys::tell(from), sys::tell(to)))
        }
        Call::Sync(slot, true) => some(sys::fdatasync(table.get(*slot)?)?),
        Call::Sync(slot, false) => some(sys::fsync(table.get(*slot)?)?),
        Call::Fstat(slot) => some(shown(&sys::fstat(table.get(*slot)?)?)),
        Call::Fchmod(slot, mode) => some(sys::fchmod(table.get(*slot)?, Mode::from_raw_mode(*mode))?),
        Call::Fchown(slot, uid, gid) => {
            let (uid, gid) = ids(*uid, *gid);
            some(sys::fchown(table.get(*slot)?, uid, gid)?)
        }
        Call::ReadFile(path) => {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let fd = sys::openat(table.dir(path)?, &path.1.0[..], flags, Mode::empty())?;
            let mut data = vec![0; READ];
            let n = rustix::io::read(&fd, &mut data[..])?;
            some(digest(&data[..n]))
        }
        Call::Mkdir(path, mode) => some(sys::mkdirat(table.dir(path)?, &path.1.0[..], Mode::from_raw_mode(*mode))?),
        Call::Rmdir(path) => some(sys::unlinkat(table.dir(path)?, &path.1.0[..], AtFlags::REMOVEDIR)?),
        Call::Unlink(path) => some(sys::unlinkat(table.dir(path)?, &path.1.0[..], AtFlags::empty())?),
        Call::Link(old, new, flags) => {
            some(sys::linkat(table.dir(old)?, &old.1.0[..], table.dir(new)?, &new.1.0[..], *flags)?)
        }
        Call::Symlink(target, path) => some(sys::symlinkat(&target.0[..], table.dir(path)?, &path.1.0[..])?),
        Call::Readlink(path, len) => {
            let mut target = vec![MaybeUninit::uninit(); *len];
            let (target, _) = sys::readlinkat_raw(table.dir(path)?, &path.1.0[..], &mut target[..])?;
            some(digest(target))
        }
        Call::Rename(old, new, flags) => {
            some(sys::renameat_with(table.dir(old)?, &old.1.0[..], table.dir(new)?, &new.1.0[..], *flags)?)
        }
        Call::Mknod(path, kind, mode, device) => {
            some(sys::mknodat(table.dir(path)?, &path.1.0[..], *kind, Mode::from_raw_mode(*mode), *device)?)
        }
        Call::Chmod(path, mode) => {
            let mode = Mode::from_raw_mode(*mode);
            some(sys::chmodat(table.dir(path)?, &path.1.0[..], mode, AtFlags::empty())?)
        }
        Call::Chown(path, uid, gid, follow) => {
            let (uid, gid) = ids(*uid, *gid);
            some(sys::chownat(table.dir(path)?, &path.1.0[..], uid, gid, nofollow(*follow))?)
        }
        Call::Times(path, times, follow) => {
            let dir = table.dir(path)?;
            sys::utimensat(dir, &path.1.0[..], &timestamps(*times), nofollow(*follow))?;
            some(sys::statat(dir, &path.1.0[..], nofollow(*follow)).map(|stat| set_times(&stat)))
        }
        Call::Ftimes(slot, times) => {
            let fd = table.get(*slot)?;
            sys::futimens(fd, &timestamps(*times))?;
            some(set_times(&sys::fstat(fd)?))
        }
        Call::Stat(path, follow) => some(shown(&sys::statat(table.dir(path)?, &path.1.0[..], nofollow(*follow))?)),
        Call::Access(path, rights, effective) => {
            let flags = if *effective { AtFlags::EACCESS } else { AtFlags::empty() };
            some(sys::accessat(table.dir(path)?, &path.1.0[..], Access::from_bits_retain(*rights), flags)?)
        }
        Call::List(path) => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = sys::openat(table.dir(path)?, &path.1.0[..], flags, Mode::empty())?;
            let mut names = Vec::new();
            let mut space = Vec::with_capacity(8192);
            let mut entries = sys::RawDir::new(fd, space.spare_capacity_mut());
            while let Some(entry) = entries.next() {
                let entry = entry?;
                names.push(format!("{:?} {:?}", entry.file_name(), entry.file_type()));
            }
            names.sort();
            some(names)
        }
        Call::SetXattr(on, name, value, flags) => {
            let flags = XattrFlags::from_bits_retain(*flags);
            match on {
                On::Slot(slot) => sys::fsetxattr(table.get(*slot)?, &name.0[..], &value.0, flags)?,
                On::Path(path, true) => sys::setxattr(&path.0[..], &name.0[..], &value.0, flags)?,
                On::Path(path, false) => sys::lsetxattr(&path.0[..], &name.0[..], &value.0, flags)?,
            }
            some(())
        }
        Call::GetXattr(on, name) => {
            let mut value = vec![0; 70_000];
            let n = match on {
                On::Slot(slot) => sys::fgetxattr(table.get(*slot)?, &name.0[..], &mut value[..])?,
                On::Path(path, true) => sys::getxattr(&path.0[..], &name.0[..], &mut value[..])?,
                On::Path(path, false) => sys::lgetxattr(&path.0[..], &name.0[..], &mut value[..])?,
            };
            some(digest(&value[..n]))
        }
        Call::ListXattr(on, len) => {
            let mut list = vec![0; *len];
            let n = match on {
                On::Slot(slot) => sys::flistxattr(table.get(*slot)?, &mut list[..])?,
                On::Path(path, true) => sys::listxattr(&path.0[..], &mut list[..])?,
                On::Path(path, false) => sys::llistxattr(&path.0[..], &mut list[..])?,
            };
            // With no space it says how much is needed.
            let mut names: Vec<_> =
                list[..n.min(*len)].split(|b| *b == 0).map(|name| name.escape_ascii().to_string()).collect();
            names.sort();
            some((n, names))
        }
        Call::RemoveXattr(on, name) => {
            match on {
                On::Slot(slot) => sys::fremovexattr(table.get(*slot)?, &name.0[..])?,
                On::Path(path, true) => sys::removexattr(&path.0[..], &name.0[..])?,
                On::Path(path, false) => sys::lremovexattr(&path.0[..], &name.0[..])?,
            }
            some(())
        }
        Call::Statfs(path) => {
            let fd = sys::openat(table.dir(path)?, &path.1.0[..], OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            let fs = sys::fstatvfs(&fd)?;
            let sane =
                fs.f_bavail <= fs.f_bfree && fs.f_bfree <= fs.f_blocks && fs.f_ffree <= fs.f_files && fs.f_bfree > 0;
            some((fs.f_namemax, fs.f_bsize, fs.f_frsize, sane))
        }
        Call::Chdir(path) => some(rustix::process::chdir(&path.0[..])?),
        Call::Fchdir(slot) => some(rustix::process::fchdir(table.get(*slot)?)?),
        Call::Umask(mask) => some(rustix::process::umask(Mode::from_raw_mode(*mask)).bits()),
    }
}
