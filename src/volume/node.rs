//! Node records: FIFOs, sockets and devices as regular backing files of 128 bytes (docs/FORMAT.md section 7), so that what an
//! attacker plants is never one.

use std::os::fd::BorrowedFd;

use super::format::temporary_name;
use super::header::{ObjectType, STATIC_LEN, Static};
use super::storage::{self, Errno};
use super::{Damage, Volume, VolumeError};
use crate::crypto::ObjectId;

/// Makes a record under a temporary name, with what the directory's default ACL leaves of `mode`; `finish` sets the owner and
/// the other mode bits. Returns the name, ready to be renamed.
///
/// # Errors
/// The ring's or the backing filesystem's; what was made is removed again.
pub fn build(
    volume: &Volume,
    dir: BorrowedFd<'_>,
    object_type: ObjectType,
    device: u64,
    mode: u32,
    finish: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
) -> Result<String, VolumeError> {
    let id = ObjectId::random().map_err(|_| Errno::IO)?;
    let header = Static::make(volume.keys(), id, object_type, device)?;
    let temporary = temporary_name().map_err(|_| Errno::IO)?;
    let fd = storage::create_file(dir, &*temporary, mode & 0o777)?;
    let fd = storage::fd(&fd);
    let made = storage::write_at(fd, &header.bytes(), 0)
        .map_err(|(_, errno)| errno)
        .and_then(|()| finish(fd))
        // Renamed before its bytes are on disk it could come back empty, and then be nothing at all.
        .and_then(|()| storage::sync_fd(fd));
    if let Err(errno) = made {
        let _ = storage::unlink(dir, &*temporary);
        return Err(errno.into());
    }
    Ok(temporary)
}

/// What a record of an open backing file says.
///
/// # Errors
/// [`Damage::Header`] or [`Damage::Type`], the ring's, the backing filesystem's.
pub fn read(volume: &Volume, fd: BorrowedFd<'_>) -> Result<Static, VolumeError> {
    let mut bytes = [0; STATIC_LEN];
    if storage::read_at(fd, &mut bytes, 0)? != STATIC_LEN {
        return Err(VolumeError::Damaged(Damage::Header));
    }
    let header = Static::open(volume.keys(), &bytes)?;
    match header.object_type {
        ObjectType::Fifo | ObjectType::Socket | ObjectType::CharDevice | ObjectType::BlockDevice => Ok(header),
        ObjectType::Regular | ObjectType::Directory | ObjectType::Symlink => Err(VolumeError::Damaged(Damage::Type)),
    }
}
