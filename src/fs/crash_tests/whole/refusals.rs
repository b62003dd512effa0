//! What the filesystem refuses, and with which errno.

use std::ffi::OsStr;

use super::Whole;
use crate::fs::attributes::Changes;
use crate::fs::core::Outcome;
use crate::fs::crash_tests::model::{Node, What};
use crate::fs::crash_tests::session::Do;
use crate::volume::storage::RenameFlags;

impl Whole<'_> {
    /// What a step must be refused with.
    pub(super) fn refusal(&self, step: &Do) -> Result<Option<i32>, String> {
        let is_dir = |node: Node| self.entries(node).is_some();
        let unless = |wrong: bool, errno: i32| wrong.then_some(errno);
        let paths: Vec<&String> = match step {
            Do::Create(path) | Do::Mkdir(path) | Do::Fifo(path) | Do::Socket(path) | Do::Device(path) => vec![path],
            Do::Symlink(path, _) | Do::Unlink(path) | Do::Rmdir(path) => vec![path],
            Do::Link(path, to) | Do::Rename(path, to) | Do::Exchange(path, to) | Do::RenameNew(path, to) => {
                vec![path, to]
            }
            Do::Write(path, ..) | Do::Resize(path, _) | Do::Allocate(path, ..) => vec![path],
            Do::SetXattr(path, _) | Do::RemoveXattr(path, _) | Do::Fsync(path) | Do::Fdatasync(path) => vec![path],
            _ => return Ok(None),
        };
        let (mut found, mut too_long) = (Vec::new(), false);
        for path in paths {
            let Some((_, name, node)) = self.target(path)? else { return Ok(None) };
            too_long |= name.len() > 255;
            found.push(node);
        }
        // By a name that is too long the kernel finds no object that it could ask about.
        let by_object = !matches!(
            step,
            Do::Create(_)
                | Do::Mkdir(_)
                | Do::Fifo(_)
                | Do::Socket(_)
                | Do::Device(_)
                | Do::Symlink(..)
                | Do::Unlink(_)
                | Do::Rmdir(_)
                | Do::Rename(..)
                | Do::Exchange(..)
                | Do::RenameNew(..)
        );
        if by_object && found[0].is_none() {
            return Ok(None);
        }
        if too_long && !(matches!(step, Do::Link(..)) && found[0].is_some_and(is_dir)) {
            return Ok(Some(libc::ENAMETOOLONG));
        }
        let (first, second) = (found[0], found.get(1).copied().flatten());
        Ok(match (step, first) {
            (Do::Symlink(_, len), None) => unless(*len > 4095, libc::ENAMETOOLONG),
            (Do::Create(_) | Do::Mkdir(_) | Do::Fifo(_) | Do::Socket(_) | Do::Device(_) | Do::Symlink(..), node) => {
                unless(node.is_some(), libc::EEXIST)
            }
            (Do::Unlink(_) | Do::Rmdir(_) | Do::Rename(..) | Do::Exchange(..) | Do::RenameNew(..), None) => {
                Some(libc::ENOENT)
            }
            // The kernel does not come to us without the object.
            (_, None) => None,
            (Do::Link(..), Some(node)) if is_dir(node) => Some(libc::EPERM),
            (Do::Link(..), Some(_)) => unless(second.is_some(), libc::EEXIST),
            (Do::Unlink(_), Some(node)) => unless(is_dir(node), libc::EISDIR),
            (Do::Rmdir(_), Some(node)) => match self.entries(node) {
                None => Some(libc::ENOTDIR),
                Some(0) => None,
                Some(_) => Some(libc::ENOTEMPTY),
            },
            (Do::RenameNew(..), Some(_)) => unless(second.is_some(), libc::EEXIST),
            (Do::Exchange(..), Some(_)) => unless(second.is_none(), libc::ENOENT),
            (Do::Rename(..), Some(node)) => match second {
                Some(over) if over == node => None,
                Some(over) => match (is_dir(node), self.entries(over)) {
                    (true, None) => Some(libc::ENOTDIR),
                    (false, Some(_)) => Some(libc::EISDIR),
                    (true, Some(below)) => unless(below > 0, libc::ENOTEMPTY),
                    (false, None) => None,
                },
                None => None,
            },
            (Do::Write(..) | Do::Resize(..) | Do::Allocate(..), Some(node)) => match self.what(node) {
                Some(What::Dir(_)) => Some(libc::EISDIR),
                Some(What::Special(..) | What::Symlink(_)) => Some(libc::EINVAL),
                _ => None,
            },
            (Do::SetXattr(..), Some(node)) => {
                unless(matches!(self.what(node), Some(What::Symlink(_))), libc::EOPNOTSUPP)
            }
            (Do::RemoveXattr(_, n), Some(node)) => match self.what(node) {
                Some(What::Symlink(_)) => Some(libc::EOPNOTSUPP),
                _ => {
                    let has = self.model().tree()[&node].xattrs.contains_key(format!("user.attribute{n}").as_bytes());
                    unless(!has, libc::ENODATA)
                }
            },
            (Do::Fsync(_) | Do::Fdatasync(_), Some(node)) => {
                unless(matches!(self.what(node), Some(What::Special(..) | What::Symlink(_))), libc::EINVAL)
            }
            _ => None,
        })
    }

    /// What the kernel would never ask of us: it looks at the way between two names itself.
    pub(super) fn is_knotted(step: &Do) -> bool {
        let (Do::Rename(path, to) | Do::Exchange(path, to) | Do::RenameNew(path, to)) = step else { return false };
        let inside = |outer: &str, inner: &str| outer.is_empty() || inner.starts_with(&format!("{outer}/"));
        inside(path, to) || inside(to, path)
    }

    /// The step as it is.
    pub(super) fn raw(&self, step: &Do) -> Result<Outcome<()>, String> {
        let fs = &self.session.fs;
        let caller = self.session.caller;
        let at = |path: &str| self.target(path).map(Option::unwrap);
        let node = |path: &str| self.session.existing(path).map(Option::unwrap);
        let node_of = |kind: u32, path: &str| {
            let (dir, name, _) = at(path)?;
            Ok::<_, String>(fs.mknod(caller, dir, &name, kind | 0o600, 0, 0).map(drop))
        };
        Ok(match step {
            Do::Create(path) => {
                let (dir, name, _) = at(path)?;
                fs.create(caller, dir, &name, 0o644, 0, true).map(drop)
            }
            Do::Mkdir(path) => {
                let (dir, name, _) = at(path)?;
                fs.mkdir(caller, dir, &name, 0o755, 0).map(drop)
            }
            Do::Fifo(path) => node_of(libc::S_IFIFO, path)?,
            Do::Socket(path) => node_of(libc::S_IFSOCK, path)?,
            Do::Device(path) => node_of(libc::S_IFBLK, path)?,
            Do::Symlink(path, len) => {
                let (dir, name, _) = at(path)?;
                fs.symlink(caller, dir, &name, &vec![b'x'; *len]).map(drop)
            }
            Do::Link(path, to) => {
                let (dir, name, _) = at(to)?;
                fs.link(node(path)?, dir, &name).map(drop)
            }
            Do::Unlink(path) => {
                let (dir, name, _) = at(path)?;
                fs.unlink(dir, &name)
            }
            Do::Rmdir(path) => {
                let (dir, name, _) = at(path)?;
                fs.rmdir(dir, &name)
            }
            Do::Rename(path, to) | Do::Exchange(path, to) | Do::RenameNew(path, to) => {
                let ((dir, name, _), (to_dir, to_name, _)) = (at(path)?, at(to)?);
                let flags = match step {
                    Do::Exchange(..) => RenameFlags::EXCHANGE,
                    Do::RenameNew(..) => RenameFlags::NOREPLACE,
                    _ => RenameFlags::empty(),
                };
                fs.rename(dir, &name, to_dir, &to_name, flags)
            }
            Do::Write(path, offset, _) => fs.write(node(path)?, *offset, b"x", false),
            Do::Resize(path, size) => {
                let changes = Changes { size: Some(*size), ..Changes::default() };
                fs.setattr(caller, node(path)?, changes).map(drop)
            }
            Do::Allocate(path, offset, len, mode) => fs.allocate(node(path)?, *offset, *len as u64, *mode, false),
            Do::SetXattr(path, n) => fs.setxattr(node(path)?, OsStr::new(&format!("user.attribute{n}")), b"x", 0),
            Do::RemoveXattr(path, n) => fs.removexattr(node(path)?, OsStr::new(&format!("user.attribute{n}"))),
            Do::Fsync(path) => fs.fsync(node(path)?, false),
            Do::Fdatasync(path) => fs.fsync(node(path)?, true),
            other => return Err(format!("{other:?} is never refused")),
        })
    }
}
