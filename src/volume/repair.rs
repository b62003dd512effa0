//! What can be done about what a [`check`](mod@super::check) found. The volume is not mounted; the caller holds its lock.
//!
//! Nothing is destroyed that could still be read. In its place stays only what keys vouch for: a copy is written anew from
//! its twin, an object without a name gets a new one. What nobody can read, and the original of whatever is only saved in
//! part, goes to `lethefs.quarantine` as it is. Each step is one rename or one sector: cut off anywhere, a repair can be
//! run again.

mod salvage;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use super::check::{Fault, Finding};
use super::dir::{self, DirKeys};
use super::file::check::Copies;
use super::format::{self, DIR_HEADER, QUARANTINE, b64};
use super::storage::{self, Errno, FileType, RenameFlags};
use super::{Damage, Volume, VolumeError, link, log, names, node, replay, xattr};
use crate::crypto::ObjectId;

/// What became of a finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done: what.
    Done(String),
    /// Nothing can be done.
    Left,
    /// It failed: why.
    Failed(String),
}

/// In which order the findings about one object are seen to: who is taken away needs no name.
fn order(fault: Fault) -> u32 {
    match fault {
        Fault::HeaderCopy | Fault::Attribute => 0,
        Fault::Header | Fault::ObjectType | Fault::Planted | Fault::Link | Fault::LinkTail | Fault::LinkTailOrphan => 1,
        Fault::MutableHeader | Fault::Truncated | Fault::Extended => 2,
        Fault::RootHeader | Fault::DirectoryHeader => 3,
        Fault::Name | Fault::Sidecar | Fault::Displaced => 4,
        _ => 5,
    }
}

/// Puts away a damaged log, replays what is intact, and clears what interrupted operations left in the root. Before the
/// check whose findings are to be repaired.
///
/// # Errors
/// As [`replay::replay`]; the backing filesystem's.
pub fn settle_log(volume: &Volume) -> Result<replay::Replayed, VolumeError> {
    let root = volume.root().as_fd();
    if log::read(root, volume.keys())?.lost > 0 {
        let quarantine = Quarantine::open(volume)?;
        for name in log::NAMES {
            match storage::open_file(root, name, false) {
                // One with another name is somebody's own file: it is read as a log, and only its name here goes.
                Ok(file) if storage::stat_fd(file.as_fd())?.st_nlink > 1 => {}
                Ok(file) => quarantine.copy(file.as_fd(), name.as_bytes(), Fault::Log)?,
                Err(Errno::NOENT) => {}
                // Planted: out of the way with it, so that the next mount has room for its own.
                Err(Errno::LOOP | Errno::NXIO) => quarantine.take(root, name.as_bytes(), &[], Fault::Log).map(drop)?,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    replay::replay(volume)
}

/// Sees to each finding of a check. The outcomes are in the findings' order.
///
/// # Errors
/// The ring's being sealed; the quarantine's not being there to be used.
pub fn repair(volume: &Volume, findings: &[Finding]) -> Result<Vec<Outcome>, VolumeError> {
    let mut todo: Vec<usize> = (0..findings.len()).collect();
    // From the leaves up: what is done to a directory changes the paths below it.
    todo.sort_by_key(|n| {
        let finding = &findings[*n];
        (std::cmp::Reverse(finding.place.depth()), order(finding.fault))
    });
    let mut outcomes = vec![Outcome::Left; findings.len()];
    // Files of which the contents were saved: not once for each of their names.
    let mut saved = HashMap::new();
    for n in todo {
        outcomes[n] = match one(volume, &findings[n], &mut saved) {
            Ok(Some(done)) => Outcome::Done(done),
            Ok(None) => Outcome::Left,
            Err(error @ VolumeError::Keyring(_)) => return Err(error),
            Err(error) => Outcome::Failed(error.to_string()),
        };
    }
    storage::sync_filesystem(volume.root().as_fd())?;
    Ok(outcomes)
}

/// Opens a directory by its names from the root down.
fn open_place(volume: &Volume, names: &[Vec<u8>]) -> Result<OwnedFd, Errno> {
    let mut fd = storage::reopen(volume.root().as_fd(), false)?;
    for name in names {
        fd = storage::open_dir(fd.as_fd(), name.as_slice())?;
    }
    Ok(fd)
}

fn one(volume: &Volume, finding: &Finding, saved: &mut HashMap<u64, String>) -> Result<Option<String>, VolumeError> {
    if matches!(
        finding.fault,
        Fault::Block | Fault::OtherFilesystem | Fault::Unreadable | Fault::Duplicate | Fault::Foreign
    ) {
        return Ok(None);
    }
    let at = finding.place.names();
    let at = at.as_slice();
    let (parent, name) = match at.split_last() {
        Some((name, parents)) => (open_place(volume, parents)?, name.as_slice()),
        None => (open_place(volume, &[])?, b".".as_slice()),
    };
    let parent = parent.as_fd();
    match storage::stat(parent, name) {
        Ok(stat) if stat.st_ino == finding.ino || finding.ino == 0 => {}
        // An earlier repair of the same object has taken it away.
        Ok(_) | Err(Errno::NOENT) => return Ok(Some("settled with another finding".into())),
        Err(errno) => return Err(errno.into()),
    }
    match finding.fault {
        Fault::HeaderCopy => salvage::write_copies(volume, parent, name).map(Some),
        Fault::Attribute => attributes(volume, parent, name, at).map(Some),
        Fault::Header | Fault::ObjectType | Fault::Planted | Fault::Link | Fault::LinkTail | Fault::LinkTailOrphan => {
            Quarantine::open(volume)?.take(parent, name, at, finding.fault).map(Some)
        }
        Fault::MutableHeader | Fault::Truncated | Fault::Extended => {
            let keys = parent_keys(volume, parent)?;
            let done = match saved.get(&finding.ino) {
                Some(done) => done.clone(),
                None => salvage::save(volume, parent, &keys, name, finding.fault)?,
            };
            Quarantine::open(volume)?.take(parent, name, at, finding.fault)?;
            saved.insert(finding.ino, done.clone());
            Ok(Some(done))
        }
        Fault::RootHeader => {
            let keys = DirKeys::make(volume.keys(), volume.root_dir().id())?;
            new_header(volume, parent, &keys, &[])?;
            rename_all(volume, parent, &keys, at).map(Some)
        }
        Fault::DirectoryHeader => {
            let own = storage::open_dir(parent, name)?;
            let id = ObjectId::random().map_err(|_| Errno::IO)?;
            let keys = DirKeys::make(volume.keys(), id)?;
            new_header(volume, own.as_fd(), &keys, at)?;
            rename_all(volume, own.as_fd(), &keys, at).map(Some)
        }
        Fault::Name | Fault::Sidecar | Fault::Displaced => {
            let keys = parent_keys(volume, parent)?;
            rename(volume, parent, &keys, name, at).map(Some)
        }
        Fault::Leftover => {
            match storage::unlink(parent, name) {
                Err(Errno::ISDIR | Errno::PERM) => {
                    dir::discard(parent, std::str::from_utf8(name).map_err(|_| Errno::INVAL)?);
                }
                other => other?,
            }
            match storage::stat(parent, name) {
                Err(Errno::NOENT) => Ok(Some("removed".into())),
                _ => Err(Errno::NOTEMPTY.into()),
            }
        }
        Fault::SidecarOrphan => {
            storage::unlink(parent, name)?;
            Ok(Some("removed".into()))
        }
        // Seen to before, or beyond repair.
        Fault::VolumeFile
        | Fault::Log
        | Fault::Unclean
        | Fault::Block
        | Fault::OtherFilesystem
        | Fault::Unreadable
        | Fault::Duplicate
        | Fault::Foreign => Ok(None),
    }
}

/// The keys for names in a directory. Where its header is lost, too, that is seen to later, with all names in it: until
/// then any will do.
fn parent_keys(volume: &Volume, dir: BorrowedFd<'_>) -> Result<DirKeys, VolumeError> {
    match DirKeys::load(dir, volume.keys()) {
        Err(VolumeError::Damaged(_)) => {
            let id = ObjectId::random().map_err(|_| Errno::IO)?;
            DirKeys::make(volume.keys(), id)
        }
        other => other,
    }
}

/// Puts a header into a directory whose own is lost. What is there instead of it goes to the quarantine.
fn new_header(volume: &Volume, dir: BorrowedFd<'_>, keys: &DirKeys, at: &[Vec<u8>]) -> Result<(), VolumeError> {
    if storage::stat(dir, DIR_HEADER).is_ok() {
        let place = [at, &[DIR_HEADER.into()]].concat();
        Quarantine::open(volume)?.take(dir, DIR_HEADER.as_bytes(), &place, Fault::DirectoryHeader)?;
    }
    let temporary = format::temporary_name().map_err(|_| Errno::IO)?;
    storage::symlink(dir, &*temporary, keys.header_text().as_bytes())?;
    storage::rename(dir, &*temporary, dir, DIR_HEADER, RenameFlags::NOREPLACE)?;
    // Attributes were under the old one's key.
    attributes_of(volume, dir, keys.dek(), at)?;
    Ok(storage::sync_fd(dir)?)
}

/// Gives everything in a directory a new name whose own does not decrypt.
fn rename_all(volume: &Volume, dir: BorrowedFd<'_>, keys: &DirKeys, at: &[Vec<u8>]) -> Result<String, VolumeError> {
    let mut entries = Vec::new();
    storage::read_dir(dir, 0, |entry| {
        if names::is_entry(entry.name) {
            entries.push(entry.name.to_vec());
        }
        true
    })?;
    let mut renamed = 0;
    for name in entries {
        // Not one of ours, and not to be made one.
        if format::un_b64(name.strip_prefix(format::LONG_PREFIX.as_bytes()).unwrap_or(&name)).is_none() {
            continue;
        }
        match keys.plain_name(volume.keys(), dir, &name) {
            Ok(_) => {}
            Err(VolumeError::Damaged(_)) => {
                rename(volume, dir, keys, &name, &[at, std::slice::from_ref(&name)].concat())?;
                renamed += 1;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(format!("a new header; {renamed} entries have new names"))
}

/// The object behind an entry, if its header opens.
fn object(volume: &Volume, dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<ObjectId>, VolumeError> {
    let stat = storage::stat(dir, name)?;
    let found = match storage::file_type(&stat) {
        FileType::Directory => {
            let fd = storage::open_dir(dir, name)?;
            DirKeys::load(fd.as_fd(), volume.keys()).map(|keys| Some(keys.id()))
        }
        FileType::Symlink => Ok(link::object(volume, &storage::readlink(dir, name)?)),
        FileType::RegularFile if stat.st_size as u64 == format::NODE_RECORD => {
            let fd = storage::open_file(dir, name, false)?;
            node::read(volume, fd.as_fd()).map(|header| Some(header.dek.object()))
        }
        FileType::RegularFile => {
            let fd = storage::open_file(dir, name, false)?;
            Copies::read(volume, fd.as_fd()).map(|copies| copies.header.map(|header| header.dek.object()))
        }
        _ => Ok(None),
    };
    match found {
        Err(VolumeError::Damaged(_)) => Ok(None),
        other => other,
    }
}

/// Gives an entry a new name in its directory; in vain, where nothing of it could be read. Its old one is written down first:
/// under a header that comes back it would decrypt again.
fn rename(
    volume: &Volume,
    dir: BorrowedFd<'_>,
    keys: &DirKeys,
    name: &[u8],
    at: &[Vec<u8>],
) -> Result<String, VolumeError> {
    let id = object(volume, dir, name)?.map_or_else(ObjectId::random, Ok).map_err(|_| Errno::IO)?;
    let quarantine = Quarantine::open(volume)?;
    let new = place_anew(volume, dir, keys, name, id, |plain, backing| {
        let mut line = serde_json::json!({ "fault": "name", "was": path_text(at), "now": plain, "backing": backing });
        add_sidecar(&mut line, dir, name);
        quarantine.note(&line)
    })?;
    drop_sidecar(dir, name);
    Ok(format!("its name is {new} now"))
}

/// The name of a long entry's sidecar.
fn sidecar(name: &[u8]) -> Option<Vec<u8>> {
    let hash = name.strip_prefix(format::LONG_PREFIX.as_bytes())?;
    Some([format::LONG_NAME_PREFIX.as_bytes(), hash].concat())
}

/// The text of an entry's sidecar, which is the only place of a long name.
fn add_sidecar(line: &mut serde_json::Value, dir: BorrowedFd<'_>, name: &[u8]) {
    let text = sidecar(name).and_then(|sidecar| storage::readlink(dir, sidecar.as_slice()).ok());
    if let Some(text) = text {
        line["sidecar"] = String::from_utf8_lossy(&text).into();
    }
}

fn drop_sidecar(dir: BorrowedFd<'_>, name: &[u8]) {
    if let Some(sidecar) = sidecar(name) {
        let _ = storage::unlink(dir, sidecar.as_slice());
    }
}

/// Renames within a directory to the first name of that object that is free; `before` is told which, and its backing name.
/// Gives its plaintext.
fn place_anew(
    volume: &Volume,
    dir: BorrowedFd<'_>,
    keys: &DirKeys,
    from: &[u8],
    id: ObjectId,
    before: impl Fn(&str, &str) -> Result<(), VolumeError>,
) -> Result<String, VolumeError> {
    for n in 1.. {
        let plain = if n == 1 { format!("recovered-{id}") } else { format!("recovered-{id}-{n}") };
        let name = keys.name(volume.keys(), plain.as_bytes())?;
        if storage::stat(dir, name.as_str()).is_ok() {
            continue;
        }
        before(&plain, name.as_str())?;
        match storage::rename(dir, from, dir, name.as_str(), RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(plain),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Errno::EXIST.into())
}

/// Writes down and removes the attributes of an object that do not open.
fn attributes(volume: &Volume, dir: BorrowedFd<'_>, name: &[u8], at: &[Vec<u8>]) -> Result<String, VolumeError> {
    let stat = storage::stat(dir, name)?;
    match storage::file_type(&stat) {
        FileType::Directory => {
            let fd = storage::open_dir(dir, name)?;
            let keys = DirKeys::load(fd.as_fd(), volume.keys())?;
            attributes_of(volume, fd.as_fd(), keys.dek(), at)
        }
        FileType::RegularFile if stat.st_size as u64 == format::NODE_RECORD => {
            let fd = storage::open_file(dir, name, false)?;
            attributes_of(volume, fd.as_fd(), &node::read(volume, fd.as_fd())?.dek, at)
        }
        FileType::RegularFile => {
            let fd = storage::open_file(dir, name, false)?;
            let header = Copies::read(volume, fd.as_fd())?.header.ok_or(VolumeError::Damaged(Damage::Header))?;
            attributes_of(volume, fd.as_fd(), &header.dek, at)
        }
        _ => Err(Errno::OPNOTSUPP.into()),
    }
}

fn attributes_of(
    volume: &Volume,
    held: BorrowedFd<'_>,
    dek: &crate::keyring::Dek,
    at: &[Vec<u8>],
) -> Result<String, VolumeError> {
    let damaged = match xattr::damaged(volume, held, dek) {
        Err(VolumeError::Backing(Errno::OPNOTSUPP)) => Vec::new(),
        other => other?,
    };
    for name in &damaged {
        let name = OsStr::from_bytes(name);
        let value = storage::get_xattr(held, name)?;
        Quarantine::open(volume)?.note(&serde_json::json!({
            "fault": "attribute",
            "was": path_text(at),
            "name": name.to_string_lossy(),
            "value": b64(&value),
        }))?;
        storage::remove_xattr(held, name)?;
    }
    Ok(format!("{} written down and removed", damaged.len()))
}

/// A path of backing names. All of ours are ASCII; what is not is shown as such.
fn path_text(at: &[Vec<u8>]) -> String {
    at.iter().map(|name| name.escape_ascii().to_string()).collect::<Vec<_>>().join("/")
}

/// The directory for what was taken out of the tree: objects `N.fault`, and `index`, which says where each was: a line of
/// JSON each.
struct Quarantine(OwnedFd);

const INDEX: &str = "index";
/// So many objects in a quarantine: somebody may be making them as fast as we look.
const QUARANTINE_MAX: u32 = 10_000_000;

impl Quarantine {
    fn open(volume: &Volume) -> Result<Self, VolumeError> {
        let root = volume.root().as_fd();
        match storage::mkdir(root, QUARANTINE, 0o700) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(Self(storage::open_dir(root, QUARANTINE)?))
    }

    /// Appends a line to the index, durably: before what it is about is changed.
    fn note(&self, line: &serde_json::Value) -> Result<(), VolumeError> {
        let index = match storage::create_file(self.0.as_fd(), INDEX, 0o600) {
            Err(Errno::EXIST) => storage::open_file(self.0.as_fd(), INDEX, true)?,
            other => other?,
        };
        let stat = storage::stat_fd(index.as_fd())?;
        if stat.st_nlink != 1 {
            // Somebody's own file, made to look like ours: not to be written to.
            return Err(Errno::MLINK.into());
        }
        let end = stat.st_size as u64;
        storage::write_at(index.as_fd(), format!("{line}\n").as_bytes(), end).map_err(|(_, errno)| errno)?;
        Ok(storage::sync_fd(index.as_fd())?)
    }

    /// Takes the name of the first free place by `put`, having written `line` down with it.
    fn put(
        &self,
        at: &[Vec<u8>],
        fault: Fault,
        mut line: serde_json::Value,
        mut put: impl FnMut(&str) -> Result<(), Errno>,
    ) -> Result<String, VolumeError> {
        let word = serde_json::to_value(fault).ok().and_then(|word| word.as_str().map(str::to_owned));
        let word = word.unwrap_or_default();
        for n in 1..QUARANTINE_MAX {
            let name = format!("{n}.{word}");
            if storage::stat(self.0.as_fd(), &*name).is_ok() {
                continue;
            }
            line["fault"] = word.as_str().into();
            line["was"] = path_text(at).into();
            line["now"] = name.as_str().into();
            self.note(&line)?;
            match put(&name) {
                Ok(()) => return Ok(format!("moved to {QUARANTINE}/{name}")),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(Errno::EXIST.into())
    }

    /// Moves an entry here, whatever it is. If it has a sidecar, its text goes into the index.
    fn take(&self, dir: BorrowedFd<'_>, name: &[u8], at: &[Vec<u8>], fault: Fault) -> Result<String, VolumeError> {
        let own = self.0.as_fd();
        let mut line = serde_json::json!({});
        add_sidecar(&mut line, dir, name);
        let done = self.put(at, fault, line, |new| storage::rename(dir, name, own, new, RenameFlags::NOREPLACE))?;
        drop_sidecar(dir, name);
        Ok(done)
    }

    /// Copies the bytes of a log file here, as far as they can count.
    fn copy(&self, file: BorrowedFd<'_>, name: &[u8], fault: Fault) -> Result<(), VolumeError> {
        let own = self.0.as_fd();
        let write = |copy: BorrowedFd<'_>| {
            let mut chunk = vec![0; 1 << 20];
            for at in (0..log::LONGEST).step_by(chunk.len()) {
                let got = storage::read_at(file, &mut chunk, at)?;
                storage::write_at(copy, &chunk[..got], at).map_err(|(_, errno)| errno)?;
                if got < chunk.len() {
                    break;
                }
            }
            storage::sync_fd(copy)
        };
        self.put(&[name.to_vec()], fault, serde_json::json!({}), |new| {
            let copy = storage::create_file(own, new, 0o600)?;
            // Half a copy is of no use.
            write(copy.as_fd()).inspect_err(|_| {
                let _ = storage::unlink(own, new);
            })
        })
        .map(drop)
    }
}
