//! Files: second copies of headers, and saving what authenticates of a file that a mount refuses as a whole.

use std::os::fd::{AsFd as _, BorrowedFd};

use zeroize::Zeroizing;

use crate::volume::check::Fault;
use crate::volume::dir::DirKeys;
use crate::volume::file::FileState;
use crate::volume::file::check::{BLOCKS_AT_ONCE, Copies};
use crate::volume::format::{self, BLOCK};
use crate::volume::storage::{self, Errno, Timestamps};
use crate::volume::{Damage, Volume, VolumeError, xattr};

/// Writes the copies of a header anew that do not open.
pub(super) fn write_copies(volume: &Volume, dir: BorrowedFd<'_>, name: &[u8]) -> Result<String, VolumeError> {
    let fd = storage::open_file(dir, name, true)?;
    let copies = Copies::read(volume, fd.as_fd())?;
    copies.write_anew(volume, fd.as_fd())?;
    storage::sync_data(fd.as_fd())?;
    Ok("written anew".into())
}

/// Copies what authenticates of a file to a new object in the same directory, under a new name. Says what it is called and
/// what could not be saved.
pub(super) fn save(
    volume: &Volume,
    dir: BorrowedFd<'_>,
    keys: &DirKeys,
    name: &[u8],
    fault: Fault,
) -> Result<String, VolumeError> {
    let fd = storage::open_file(dir, name, false)?;
    let copies = Copies::read(volume, fd.as_fd())?;
    let old_header = copies.header.as_ref().ok_or(VolumeError::Damaged(Damage::Header))?;
    let old_dek = old_header.dek.clone();
    let sealed_size = copies.mutable.filter(|mutable| mutable.sealed).map(|mutable| mutable.size);
    let disk = format::plain_size(storage::stat_fd(fd.as_fd())?.st_size as u64).unwrap_or(0);
    let size = match (fault, sealed_size) {
        (Fault::Extended, Some(sealed)) => sealed,
        _ => disk,
    };
    let old = FileState::lenient(copies, size, storage::stat_fd(fd.as_fd())?.st_ino)?;

    let temporary = format::temporary_name().map_err(|_| Errno::IO)?;
    let stat = storage::stat_fd(fd.as_fd())?;
    let new_fd = storage::create_file(dir, &*temporary, 0o600)?;
    let saved = copy(volume, fd.as_fd(), &old, new_fd.as_fd()).and_then(|lost| {
        let new = new_fd.as_fd();
        dress(volume, fd.as_fd(), &old_dek, new)?;
        storage::chown_held(new, Some(stat.st_uid), Some(stat.st_gid))?;
        open_as_far(fd.as_fd(), new, stat.st_mode)?;
        let time = |sec, nsec: u64| rustix::fs::Timespec { tv_sec: sec, tv_nsec: nsec as _ };
        storage::set_times_fd(
            new,
            &Timestamps {
                last_access: time(stat.st_atime, stat.st_atime_nsec),
                last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
            },
        )?;
        // The original goes only once this is on the medium.
        storage::sync_fd(new)?;
        let called = super::place_anew(volume, dir, keys, temporary.as_bytes(), old_dek.object(), |_, _| Ok(()))?;
        storage::sync_fd(dir)?;
        Ok((called, lost))
    });
    match saved {
        Ok((called, 0)) => Ok(format!("what was there, {size} bytes, is in {called} now")),
        Ok((called, lost)) => {
            Ok(format!("what was there, {size} bytes, is in {called} now; {lost} blocks in it are zeros"))
        }
        Err(error) => {
            let _ = storage::unlink(dir, &*temporary);
            Err(error)
        }
    }
}

/// Rights like the original's, which an access list may narrow: the mode's group bits are its mask then. What is not the whole
/// program any more runs as nobody else.
fn open_as_far(old: BorrowedFd<'_>, new: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    let acl = std::ffi::OsStr::new("system.posix_acl_access");
    match storage::get_xattr(old, acl) {
        Ok(list) => storage::set_xattr(new, acl, &list, 0)?,
        Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
        Err(errno) => return Err(errno),
    }
    storage::chmod_fd(new, mode & 0o777)
}

/// Reads block by block what can be read, and writes it into a new file. How many blocks could not be.
fn copy(volume: &Volume, from: BorrowedFd<'_>, old: &FileState, to: BorrowedFd<'_>) -> Result<u64, VolumeError> {
    let mut new = FileState::create(volume, to)?;
    let mut plain = Zeroizing::new(vec![0; (BLOCKS_AT_ONCE * BLOCK) as usize]);
    let (mut first, mut lost) = (Some(0), 0);
    while let Some(at) = first {
        let mut bad = Vec::new();
        first = old.check_blocks(volume, from, at, |block, _| bad.push(block))?;
        let end = first.unwrap_or(old.size().div_ceil(BLOCK));
        lost += bad.len() as u64;
        for block in at..end {
            let len = (old.size() - block * BLOCK).min(BLOCK) as usize;
            let part = &mut plain[((block - at) * BLOCK) as usize..][..len];
            if bad.contains(&block) {
                part.fill(0);
            } else {
                old.read(volume, from, block * BLOCK, part).map_err(|error| error.error)?;
            }
        }
        let len = ((end * BLOCK).min(old.size()) - at * BLOCK) as usize;
        // A hole stays one.
        if plain[..len].iter().any(|byte| *byte != 0) {
            new.write(volume, to, at * BLOCK, &plain[..len]).map_err(|error| error.error)?;
        }
    }
    new.resize(volume, to, old.size()).map_err(|error| error.error)?;
    storage::sync_data(to)?;
    new.seal(volume, to)?;
    Ok(lost)
}

/// Attributes that open, under the new object's key.
fn dress(
    volume: &Volume,
    from: BorrowedFd<'_>,
    old: &crate::keyring::Dek,
    to: BorrowedFd<'_>,
) -> Result<(), VolumeError> {
    let header = Copies::read(volume, to)?.header.ok_or(VolumeError::Damaged(Damage::Header))?;
    let names = match xattr::list(volume, from, old, |_| {}) {
        Err(VolumeError::Backing(Errno::OPNOTSUPP)) => return Ok(()),
        other => other?,
    };
    for name in names {
        let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&name);
        match xattr::get(volume, from, old, name) {
            Ok(value) => xattr::set(volume, to, &header.dek, name, &value, 0)?,
            Err(VolumeError::Damaged(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
