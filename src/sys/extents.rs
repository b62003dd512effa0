//! FIEMAP (Linux, Documentation/filesystems/fiemap.rst): which parts of a file have space, written or only reserved.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// `_IOWR('f', 11, struct fiemap)` of linux/fs.h.
const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b_u32 as libc::Ioctl;
const AT_ONCE: usize = 16;

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap`, with room for what it gives.
#[repr(C)]
#[derive(Default)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; AT_ONCE],
}

/// Whether all of a range has space.
///
/// # Errors
/// The system's: `EOPNOTSUPP` or `ENOTTY` where the filesystem cannot say.
pub fn is_mapped(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<bool> {
    let (mut at, end) = (offset, offset.saturating_add(len));
    while at < end {
        let mut map = Fiemap { start: at, length: end - at, count: AT_ONCE as u32, ..Fiemap::default() };
        // SAFETY: the argument is a `struct fiemap` followed by `count` extents, all of it initialized and ours; the kernel
        // writes no more than `count` of them, whatever bytes it writes are valid there, and it keeps no pointer.
        if unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let before = at;
        for extent in map.extents.iter().take(map.mapped as usize) {
            if extent.logical > at {
                return Ok(false);
            }
            at = at.max(extent.logical.saturating_add(extent.length));
        }
        if at == before {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn written_and_reserved_space_is_space_and_a_hole_is_none() {
        // In memory there are no extents; where the program was built there mostly are.
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(8 << 20).unwrap();
        let mapped = |at: u64, len: u64| is_mapped(file.as_fd(), at, len);
        assert!(!mapped(0, 4096).expect("the source directory is on a filesystem without extents"));
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 1 << 20, 1 << 20).unwrap();
        // Many extents: every other block of some is written.
        for n in (0..200).step_by(2) {
            std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], (1 << 20) + n * 4096).unwrap();
        }
        file.sync_all().unwrap();
        assert!(mapped(1 << 20, 1 << 20).unwrap());
        assert!(mapped((1 << 20) + 5000, 300_000).unwrap());
        assert!(!mapped((1 << 20) - 1, 10).unwrap());
        assert!(!mapped(2 << 20, 1).unwrap());
        assert!(!mapped(1 << 20, (1 << 20) + 1).unwrap());
    }
}
