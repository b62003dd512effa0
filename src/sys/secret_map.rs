//! Memory for keys: memfd_secret(2) where the kernel has it, else locked anonymous memory left out of core dumps.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;

use zeroize::Zeroize;

/// A private mapping, zeroed at first, wiped and unmapped on drop.
pub struct SecretMap {
    start: NonNull<u8>,
    len: usize,
    protection: &'static str,
}

// SAFETY: the mapping is owned by this value alone, and is reached only through `&self` (shared, read-only) and `&mut self`.
unsafe impl Send for SecretMap {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for SecretMap {}

impl SecretMap {
    /// Maps at least `len` bytes.
    ///
    /// # Errors
    /// The system's, mostly `EAGAIN` or `ENOMEM` for a too small `RLIMIT_MEMLOCK`.
    pub fn new(len: usize) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let len = len.max(1).next_multiple_of(page);
        Self::secret_memory(len).or_else(|_| Self::locked_memory(len))
    }

    /// memfd_secret(2): pages leave the kernel's direct map; ptrace, /proc/PID/mem and the kernel itself cannot read them.
    fn secret_memory(len: usize) -> io::Result<Self> {
        // SAFETY: no pointers are passed; the result is checked.
        let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor for us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        rustix::fs::ftruncate(&fd, len as u64)?;
        let map = Self::map(len, libc::MAP_SHARED, fd.as_raw_fd(), "memfd_secret")?;
        map.dont_inherit();
        Ok(map)
    }

    fn locked_memory(len: usize) -> io::Result<Self> {
        let map = Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, "mlock")?;
        // SAFETY: the range is the mapping just made.
        let locked = unsafe { libc::mlock(map.start.as_ptr().cast(), len) };
        if locked != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; MADV_DONTDUMP only changes what a core dump holds.
        unsafe { libc::madvise(map.start.as_ptr().cast(), len, libc::MADV_DONTDUMP) };
        map.dont_inherit();
        Ok(map)
    }

    fn map(len: usize, flags: i32, fd: i32, protection: &'static str) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; nothing existing is touched.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let Some(start) = NonNull::new(start.cast()) else { return Err(io::ErrorKind::OutOfMemory.into()) };
        Ok(Self { start, len, protection })
    }

    /// A child of this process has no business with the keys.
    fn dont_inherit(&self) {
        // SAFETY: the range is our own mapping; MADV_DONTFORK only affects later forks.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_DONTFORK) };
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `start` is mapped readable for `len` bytes until drop; `&self` keeps writers out.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `bytes`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// `memfd_secret` or `mlock`.
    pub fn protection(&self) -> &'static str {
        self.protection
    }
}

impl Drop for SecretMap {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        // SAFETY: our own mapping, not used after this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
