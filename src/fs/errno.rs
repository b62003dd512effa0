//! The one table from failures to what programs see. Exhaustive on purpose: a new failure must choose.

use crate::keyring::{KeyringError, SealReason};
use crate::volume::VolumeError;
use crate::volume::file::ReadError;
use crate::volume::storage::Errno;

/// What a request fails with: an errno between 1 and 511. (The kernel rejects a reply beyond, and the caller hangs.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed(i32);

impl Failed {
    /// The errno.
    pub fn errno(self) -> i32 {
        self.0
    }

    /// From a raw errno; what cannot be one becomes `EIO`.
    pub fn raw(errno: i32) -> Self {
        Self(if (1..512).contains(&errno) { errno } else { libc::EIO })
    }
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        Self::raw(errno.raw_os_error())
    }
}

impl From<VolumeError> for Failed {
    fn from(error: VolumeError) -> Self {
        Self(match error {
            VolumeError::Backing(errno) => return errno.into(),
            VolumeError::Damaged(_) => libc::EIO,
            VolumeError::Keyring(error) => return error.into(),
            VolumeError::NameTooLong => libc::ENAMETOOLONG,
            VolumeError::InvalidName => libc::EINVAL,
            VolumeError::AttributeTooLarge => libc::ERANGE,
            VolumeError::TooLarge => libc::EFBIG,
            VolumeError::CrossesDevices => libc::EXDEV,
        })
    }
}

impl From<KeyringError> for Failed {
    fn from(error: KeyringError) -> Self {
        Self(match error {
            KeyringError::Sealed(reason) => return reason.into(),
            KeyringError::NoSuchKek { .. } | KeyringError::Unauthentic | KeyringError::Random(_) => libc::EIO,
        })
    }
}

impl From<SealReason> for Failed {
    fn from(reason: SealReason) -> Self {
        Self(match reason {
            SealReason::Revoked | SealReason::Unmounted => libc::EKEYREVOKED,
            SealReason::Expired => libc::EKEYEXPIRED,
        })
    }
}

impl From<ReadError> for Failed {
    fn from(error: ReadError) -> Self {
        error.error.into()
    }
}
