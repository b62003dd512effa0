//! A further descriptor of a FUSE connection.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// _IOR(229, 0, uint32_t) (include/uapi/linux/fuse.h).
const FUSE_DEV_IOC_CLONE: libc::Ioctl = 0x8004_e500;

/// Opens `/dev/fuse` anew, without waiting in reads, on the connection of `device`. What is read from it is answered on it.
///
/// # Errors
/// The system's: `/dev/fuse` is out of reach, or the connection has ended.
pub fn another(device: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let new = rustix::fs::open("/dev/fuse", flags, Mode::empty())?;
    let number: u32 = device.as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32 through the pointer, which is valid for the call; both descriptors are open.
    match unsafe { libc::ioctl(new.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const number) } {
        0 => Ok(new),
        _ => Err(io::Error::last_os_error()),
    }
}
