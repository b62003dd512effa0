//! For tests: keeps a record of every change that goes to the backing directory, so that a [medium](super::medium) can
//! say what a power cut leaves of it.
//!
//! A record is kept per thread. Objects go by numbers of the simulation's own: what a crash left is put into a new directory, and must be
//! the same files to those who look at numbers (the intent log does). While a simulation is on, nothing is really flushed.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use rustix::fs::{self as sys, RenameFlags};
use rustix::path::Arg;

use super::{Errno, Result};

/// Says which calls fail, by the call, the object's number and the offset.
pub(crate) type Rule = Box<dyn Fn(Call, u64, u64) -> Option<Errno>>;

/// Calls that a test can have fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Write,
    Reserve,
}

/// What was done. Objects by number; names in the backing directory.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write {
        ino: u64,
        offset: u64,
        bytes: Rc<[u8]>,
    },
    SetLen {
        ino: u64,
        len: u64,
    },
    Allocate {
        ino: u64,
        len: u64,
    },
    Create {
        dir: u64,
        name: CString,
        ino: u64,
    },
    Mkdir {
        dir: u64,
        name: CString,
        ino: u64,
    },
    Symlink {
        dir: u64,
        name: CString,
        ino: u64,
        target: Rc<[u8]>,
    },
    Link {
        dir: u64,
        name: CString,
        ino: u64,
    },
    Unlink {
        dir: u64,
        name: CString,
    },
    Rmdir {
        dir: u64,
        name: CString,
    },
    Rename {
        from: u64,
        name: CString,
        to: u64,
        new: CString,
        exchange: bool,
    },
    SetXattr {
        ino: u64,
        name: Vec<u8>,
        value: Rc<[u8]>,
    },
    RemoveXattr {
        ino: u64,
        name: Vec<u8>,
    },
    /// Mode, owner or times: nothing that is looked at afterwards, but it is a change of the object.
    Touch {
        ino: u64,
    },
    SyncData {
        ino: u64,
    },
    Sync {
        ino: u64,
    },
    SyncAll,
}

/// What takes the place of the real numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers {
    /// From those of the filesystem that the test runs on.
    pub(crate) of: HashMap<u64, u64>,
    /// What [`super::identity`] says.
    pub(crate) identity: u64,
    /// The next one to be given out.
    pub(crate) next: u64,
}

#[derive(Default)]
struct Simulation {
    numbers: Option<Numbers>,
    recording: bool,
    trace: Vec<Op>,
    rule: Option<Rule>,
}

thread_local! {
    static SIMULATION: RefCell<Simulation> = RefCell::default();
}

/// From now on, on this thread, objects go by these numbers.
pub(crate) fn simulate(numbers: Numbers) {
    SIMULATION.with_borrow_mut(|s| *s = Simulation { numbers: Some(numbers), ..Simulation::default() });
}

/// Ends that. Gives the numbers back, and the record.
pub(crate) fn end() -> (Numbers, Vec<Op>) {
    SIMULATION.with_borrow_mut(|s| {
        let ended = std::mem::take(s);
        (ended.numbers.unwrap_or_default(), ended.trace)
    })
}

/// Begins or ends recording.
pub(crate) fn record(on: bool) {
    SIMULATION.with_borrow_mut(|s| s.recording = on);
}

/// For other threads, which look on and change nothing.
pub(crate) fn numbers() -> Option<Numbers> {
    SIMULATION.with_borrow(|s| s.numbers.clone())
}

/// From now on, on this thread, this decides which calls fail. `None`: none does.
pub(crate) fn rule(rule: Option<Rule>) {
    SIMULATION.with_borrow_mut(|s| s.rule = rule);
}

/// What the rule says.
fn refused(call: Call, fd: BorrowedFd<'_>, offset: u64) -> Result<()> {
    if SIMULATION.with_borrow(|s| s.rule.is_none()) {
        return Ok(());
    }
    let ino = ino(fd);
    SIMULATION.with_borrow(|s| s.rule.as_ref().and_then(|rule| rule(call, ino, offset))).map_or(Ok(()), Err)
}

/// How many changes there are in the record.
pub(crate) fn position() -> usize {
    SIMULATION.with_borrow(|s| s.trace.len())
}

/// The record so far.
pub(crate) fn trace() -> Vec<Op> {
    SIMULATION.with_borrow(|s| s.trace.clone())
}

pub(super) fn number(ino: u64) -> u64 {
    SIMULATION.with_borrow(|s| s.numbers.as_ref().and_then(|numbers| numbers.of.get(&ino)).copied().unwrap_or(ino))
}

pub(super) fn identity() -> Option<u64> {
    SIMULATION.with_borrow(|s| s.numbers.as_ref().map(|numbers| numbers.identity))
}

fn simulated() -> bool {
    SIMULATION.with_borrow(|s| s.numbers.is_some())
}

fn note(op: impl FnOnce() -> Op) {
    if SIMULATION.with_borrow(|s| s.recording) {
        // Made before the borrow: it asks for numbers.
        let op = op();
        SIMULATION.with_borrow_mut(|s| s.trace.push(op));
    }
}

/// Gives a new object its number.
fn made(real: Result<sys::Stat>) -> Result<u64> {
    let real = real?.st_ino;
    SIMULATION.with_borrow_mut(|s| {
        let Some(numbers) = &mut s.numbers else { return Ok(real) };
        let ino = numbers.next;
        numbers.next += 1;
        // Whatever had the same real number before is gone.
        numbers.of.insert(real, ino);
        Ok(ino)
    })
}

fn ino(fd: BorrowedFd<'_>) -> u64 {
    sys::fstat(fd).map_or(0, |stat| number(stat.st_ino))
}

fn text(name: impl Arg) -> Result<CString> {
    Ok(name.into_c_str()?.into_owned())
}

fn is_exchange(flags: RenameFlags) -> bool {
    flags.contains(RenameFlags::EXCHANGE)
}

/// The calls of [`changes`](super::changes), recorded.
pub(crate) mod calls {
    #![allow(unreachable_pub, clippy::missing_errors_doc)]

    use std::ffi::OsStr;
    use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
    use std::os::unix::ffi::OsStrExt as _;

    use rustix::fs::{self as sys, AtFlags};
    use rustix::path::Arg;

    use super::super::{Errno, RenameFlags, Result, Timestamps, changes};
    use super::{Call, Op, ino, is_exchange, made, note, refused, simulated, text};

    /// Recorded.
    pub fn create_file(dir: BorrowedFd<'_>, name: impl Arg, mode: u32) -> Result<OwnedFd> {
        let name = text(name)?;
        let fd = changes::create_file(dir, &*name, mode)?;
        let new = made(sys::fstat(fd.as_fd()))?;
        note(|| Op::Create { dir: ino(dir), name, ino: new });
        Ok(fd)
    }

    /// Recorded.
    pub fn mkdir(dir: BorrowedFd<'_>, name: impl Arg, mode: u32) -> Result<()> {
        let name = text(name)?;
        changes::mkdir(dir, &*name, mode)?;
        let new = made(sys::statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW))?;
        note(|| Op::Mkdir { dir: ino(dir), name, ino: new });
        Ok(())
    }

    /// Recorded.
    pub fn symlink(dir: BorrowedFd<'_>, name: impl Arg, target: &[u8]) -> Result<()> {
        let name = text(name)?;
        changes::symlink(dir, &*name, target)?;
        let new = made(sys::statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW))?;
        note(|| Op::Symlink { dir: ino(dir), name, ino: new, target: target.into() });
        Ok(())
    }

    /// Recorded.
    pub fn link_held(held: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: impl Arg) -> Result<()> {
        let name = text(name)?;
        changes::link_held(held, dir, &*name)?;
        note(|| Op::Link { dir: ino(dir), name, ino: ino(held) });
        Ok(())
    }

    /// Recorded.
    pub fn link(dir: BorrowedFd<'_>, name: impl Arg, to_dir: BorrowedFd<'_>, to: impl Arg) -> Result<()> {
        let (name, to) = (text(name)?, text(to)?);
        changes::link(dir, &*name, to_dir, &*to)?;
        let linked = super::super::stat(to_dir, &*to)?.st_ino;
        note(|| Op::Link { dir: ino(to_dir), name: to, ino: linked });
        Ok(())
    }

    /// Recorded.
    pub fn unlink(dir: BorrowedFd<'_>, name: impl Arg) -> Result<()> {
        let name = text(name)?;
        changes::unlink(dir, &*name)?;
        note(|| Op::Unlink { dir: ino(dir), name });
        Ok(())
    }

    /// Recorded.
    pub fn rmdir(dir: BorrowedFd<'_>, name: impl Arg) -> Result<()> {
        let name = text(name)?;
        changes::rmdir(dir, &*name)?;
        note(|| Op::Rmdir { dir: ino(dir), name });
        Ok(())
    }

    /// Recorded.
    pub fn rename(
        from_dir: BorrowedFd<'_>,
        from: impl Arg,
        to_dir: BorrowedFd<'_>,
        to: impl Arg,
        flags: RenameFlags,
    ) -> Result<()> {
        let (name, new) = (text(from)?, text(to)?);
        changes::rename(from_dir, &*name, to_dir, &*new, flags)?;
        note(|| Op::Rename { from: ino(from_dir), name, to: ino(to_dir), new, exchange: is_exchange(flags) });
        Ok(())
    }

    /// Recorded.
    pub fn write_at(fd: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> std::result::Result<(), (usize, Errno)> {
        refused(Call::Write, fd, offset).map_err(|errno| (0, errno))?;
        let written = changes::write_at(fd, bytes, offset);
        let done = written.map_or_else(|(done, _)| done, |()| bytes.len());
        note(|| Op::Write { ino: ino(fd), offset, bytes: bytes[..done].into() });
        written
    }

    /// Recorded.
    pub fn set_len(fd: BorrowedFd<'_>, len: u64) -> Result<()> {
        changes::set_len(fd, len)?;
        note(|| Op::SetLen { ino: ino(fd), len });
        Ok(())
    }

    /// Recorded. A simulation has space for everything.
    pub fn allocate(fd: BorrowedFd<'_>, len: u64) -> Result<()> {
        if simulated() {
            if sys::fstat(fd)?.st_size < len as i64 {
                changes::set_len(fd, len)?;
            }
        } else {
            changes::allocate(fd, len)?;
        }
        note(|| Op::Allocate { ino: ino(fd), len });
        Ok(())
    }

    /// Changes nothing that could be seen.
    pub fn reserve(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
        refused(Call::Reserve, fd, offset)?;
        if simulated() { Ok(()) } else { changes::reserve(fd, offset, len) }
    }

    /// Changes nothing that could be seen.
    pub fn preallocate(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<()> {
        refused(Call::Reserve, fd, offset)?;
        if simulated() { Ok(()) } else { changes::preallocate(fd, offset, len) }
    }

    /// Recorded as a write: any of its sectors may be zeros already.
    pub fn zero(fd: BorrowedFd<'_>, offset: u64, len: u64, keeps_space: bool) -> Result<()> {
        refused(Call::Write, fd, offset)?;
        changes::zero(fd, offset, len, keeps_space)?;
        note(|| Op::Write { ino: ino(fd), offset, bytes: vec![0; len as usize].into() });
        Ok(())
    }

    /// Recorded.
    pub fn sync_data(fd: BorrowedFd<'_>) -> Result<()> {
        note(|| Op::SyncData { ino: ino(fd) });
        if simulated() { Ok(()) } else { changes::sync_data(fd) }
    }

    /// Recorded.
    pub fn sync_fd(fd: BorrowedFd<'_>) -> Result<()> {
        note(|| Op::Sync { ino: ino(fd) });
        if simulated() { Ok(()) } else { changes::sync_fd(fd) }
    }

    /// Recorded.
    pub fn sync_filesystem(fd: BorrowedFd<'_>) -> Result<()> {
        note(|| Op::SyncAll);
        if simulated() { Ok(()) } else { changes::sync_filesystem(fd) }
    }

    /// Recorded.
    pub fn chmod_held(held: BorrowedFd<'_>, mode: u32) -> Result<()> {
        changes::chmod_held(held, mode)?;
        note(|| Op::Touch { ino: ino(held) });
        Ok(())
    }

    /// Recorded.
    pub fn chmod_fd(fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
        changes::chmod_fd(fd, mode)?;
        note(|| Op::Touch { ino: ino(fd) });
        Ok(())
    }

    /// Recorded.
    pub fn chown_held(held: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        changes::chown_held(held, uid, gid)?;
        note(|| Op::Touch { ino: ino(held) });
        Ok(())
    }

    /// Recorded.
    pub fn set_times_held(held: BorrowedFd<'_>, times: &Timestamps) -> Result<()> {
        changes::set_times_held(held, times)?;
        note(|| Op::Touch { ino: ino(held) });
        Ok(())
    }

    /// Recorded.
    pub fn set_times_fd(fd: BorrowedFd<'_>, times: &Timestamps) -> Result<()> {
        changes::set_times_fd(fd, times)?;
        note(|| Op::Touch { ino: ino(fd) });
        Ok(())
    }

    /// Recorded.
    pub fn set_xattr(held: BorrowedFd<'_>, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        changes::set_xattr(held, name, value, flags)?;
        note(|| Op::SetXattr { ino: ino(held), name: name.as_bytes().to_vec(), value: value.into() });
        Ok(())
    }

    /// Recorded.
    pub fn set_xattr_fd(fd: BorrowedFd<'_>, name: &str, value: &[u8]) -> Result<()> {
        changes::set_xattr_fd(fd, name, value)?;
        note(|| Op::SetXattr { ino: ino(fd), name: name.as_bytes().to_vec(), value: value.into() });
        Ok(())
    }

    /// Recorded.
    pub fn remove_xattr_fd(fd: BorrowedFd<'_>, name: &str) -> Result<()> {
        changes::remove_xattr_fd(fd, name)?;
        note(|| Op::RemoveXattr { ino: ino(fd), name: name.as_bytes().to_vec() });
        Ok(())
    }

    /// Recorded.
    pub fn remove_xattr(held: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        changes::remove_xattr(held, name)?;
        note(|| Op::RemoveXattr { ino: ino(held), name: name.as_bytes().to_vec() });
        Ok(())
    }
}
