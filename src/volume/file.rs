//! A regular file: reading, writing, resizing, and what its header promises (docs/FORMAT.md section 7).
//!
//! A [`FileState`] is what is known of one open file; the caller keeps it under one lock per file (shared to read,
//! exclusive for the rest) and passes the backing descriptor in. Reading cannot give wrong bytes: what the header's floor
//! and seal do not vouch for is [`VolumeError::Damaged`].
//!
//! The order of writes is the crash story: see "Order of writes" in the format's document. Overwrites go in place; the
//! intent log that will make them atomic is not here yet.

use std::cell::RefCell;
use std::os::fd::BorrowedFd;

use zeroize::Zeroizing;

use super::content::{self, BlockAad, BlockRange};
use super::format::{self, BLOCK, BLOCK_OVERHEAD, SEALED_BLOCK};
use super::header::{HEADER_LEN, MUTABLE_AT, MUTABLE_LEN, Mutable, ObjectType, STATIC_LEN, Static};
use super::storage::{self, Errno, Timestamps};
use super::{Damage, Volume, VolumeError};
use crate::crypto::kdf::DekLabel;
use crate::crypto::{NONCE_LEN, ObjectId, random};
use crate::keyring::Dek;

thread_local! {
    /// Ciphertext of one request. Grows to the largest request (1 MiB and its overhead) and stays.
    static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What is known of an open regular file.
pub struct FileState {
    header: Static,
    mutable: Mutable,
    size: u64,
    /// Bytes that a completed flush has covered: what the next fsync may raise the floor to.
    flushed: u64,
    /// Rises when the file shrinks, so that a flush that overlapped a cut vouches for nothing.
    cuts: u64,
    /// Blocks or size changed since the header was last sealed.
    unsealed: bool,
    /// Rises with every change of contents or size.
    changes: u64,
    /// Left unsealed by an unclean end: blocks above the floor may be zeros that no program wrote. Raising the floor over
    /// them must not turn what reads as zeros into an error.
    recovered: bool,
}

/// Where a flush began; see [`FileState::flushed`].
#[derive(Clone, Copy)]
pub struct FlushMark {
    size: u64,
    cuts: u64,
}

/// The sealed bytes of one block of the file as it was, to put back if a write fails half-way.
struct OldBlock {
    index: u64,
    sealed: Vec<u8>,
}

impl FileState {
    /// Writes the header of a new, empty backing file.
    ///
    /// # Errors
    /// The ring's or the backing filesystem's.
    pub fn create(volume: &Volume, fd: BorrowedFd<'_>) -> Result<Self, VolumeError> {
        let id = ObjectId::random().map_err(|_| Errno::IO)?;
        let header = Static::make(volume.keys(), id, ObjectType::Regular, 0)?;
        let mutable = Mutable { counter: 1, ..Mutable::default() };
        let mut bytes = [0; HEADER_LEN];
        bytes[..STATIC_LEN].copy_from_slice(&header.bytes());
        bytes[STATIC_LEN..2 * STATIC_LEN].copy_from_slice(&header.bytes());
        let at = MUTABLE_AT as usize;
        bytes[at..at + 2 * MUTABLE_LEN].copy_from_slice(&mutable.seal(volume.keys(), &header.dek, &volume.id())?);
        storage::write_at(fd, &bytes, 0).map_err(|(_, errno)| errno)?;
        Ok(Self { header, mutable, size: 0, flushed: 0, cuts: 0, unsealed: true, changes: 0, recovered: false })
    }

    /// Reads and authenticates the header, and holds it against the backing length.
    ///
    /// # Errors
    /// Any [`Damage`] of a header, [`Damage::Truncated`], [`Damage::Extended`]; the ring's; the backing filesystem's.
    pub fn load(volume: &Volume, fd: BorrowedFd<'_>) -> Result<Self, VolumeError> {
        let size = backing_size(fd)?;
        let (header, mutable) = read_header(volume, fd)?;
        if size < mutable.floor || (mutable.sealed && size < mutable.size) {
            return Err(VolumeError::Damaged(Damage::Truncated));
        }
        if mutable.sealed && size > mutable.size {
            return Err(VolumeError::Damaged(Damage::Extended));
        }
        let recovered = !mutable.sealed && size > mutable.floor;
        Ok(Self {
            header,
            mutable,
            size,
            flushed: mutable.floor,
            cuts: 0,
            unsealed: !mutable.sealed,
            changes: 0,
            recovered,
        })
    }

    /// The key claim, for extended attributes.
    pub fn dek(&self) -> &Dek {
        &self.header.dek
    }

    /// Plaintext size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether there is something for [`seal`](Self::seal) to do.
    pub fn unsealed(&self) -> bool {
        self.unsealed
    }

    /// Rises with every change: equal before and after a flush, that flush covered everything.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Reads up to `out.len()` bytes at `offset`; fewer only at the end of the file.
    ///
    /// # Errors
    /// [`Damage::Block`] or [`Damage::Truncated`] for anything that is not authentic; the ring's; the backing filesystem's.
    /// `out` then holds nothing of use.
    pub fn read(&self, volume: &Volume, fd: BorrowedFd<'_>, offset: u64, out: &mut [u8]) -> Result<usize, ReadError> {
        if offset >= self.size || out.is_empty() {
            return Ok(0);
        }
        let len = (self.size - offset).min(out.len() as u64) as usize;
        let out = &mut out[..len];
        let range = BlockRange::covering(offset, len as u64);
        SEALED.with_borrow_mut(|sealed| {
            grow(sealed, range.sealed_len());
            let wanted = (format::backing_len(self.size) - format::block_offset(range.first))
                .min(range.sealed_len() as u64) as usize;
            let got = storage::read_at(fd, &mut sealed[..wanted], format::block_offset(range.first))?;
            let sealed = &sealed[..got];
            let mut aad = BlockAad::new(&volume.id(), &self.dek().object());
            volume.keys().with_keys(self.dek(), |keys| {
                let cipher = keys.cipher(DekLabel::Content);
                let mut edge = Zeroizing::new([0; BLOCK as usize]);
                let mut done = 0;
                for index in range.first..range.end {
                    let block_len = (self.size - index * BLOCK).min(BLOCK) as usize;
                    let at = ((index - range.first) * SEALED_BLOCK) as usize;
                    let stored = sealed.get(at..(at + block_len + BLOCK_OVERHEAD as usize).min(got)).unwrap_or(&[]);
                    let skip = offset.saturating_sub(index * BLOCK) as usize;
                    let take = (block_len - skip).min(len - done);
                    let part = &mut out[done..done + take];
                    if take == block_len {
                        self.open(&cipher, &mut aad, index, stored, part)?;
                    } else {
                        self.open(&cipher, &mut aad, index, stored, &mut edge[..block_len])?;
                        part.copy_from_slice(&edge[skip..skip + take]);
                    }
                    done += take;
                }
                Ok(done)
            })?
        })
    }

    /// One block: authentic, or zeros where zeros may be.
    fn open(
        &self,
        cipher: &crate::crypto::aead::Cipher,
        aad: &mut BlockAad,
        index: u64,
        stored: &[u8],
        plain: &mut [u8],
    ) -> Result<(), ReadError> {
        // Only a crash leaves blocks unwritten: what this mount wrote is all there, whatever the header promises so far.
        let above_floor = self.recovered && index * BLOCK >= self.mutable.floor;
        let complete = stored.len() == plain.len() + BLOCK_OVERHEAD as usize;
        // A genuine nonce of zeros has a chance of 2^-96; so the common block is not scanned.
        let nonce_is_zero = stored.iter().take(NONCE_LEN).all(|byte| *byte == 0);
        if nonce_is_zero && content::is_zero(stored) && (above_floor || (complete && self.mutable.holes)) {
            plain.fill(0);
            return Ok(());
        }
        if !complete {
            return Err(ReadError::damaged(Damage::Truncated, index));
        }
        content::open_block(cipher, aad, index, stored, plain).map_err(|_| ReadError::damaged(Damage::Block, index))
    }

    /// Writes `data` at `offset`, growing the file if need be.
    ///
    /// # Errors
    /// [`VolumeError::TooLarge`]; [`Damage`] where part of a damaged block would have to be kept; the ring's; the backing
    /// filesystem's. What was in the file before is then still there, as far as the backing filesystem lets it be put back.
    pub fn write(&mut self, volume: &Volume, fd: BorrowedFd<'_>, offset: u64, data: &[u8]) -> Result<(), ReadError> {
        if data.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= format::MAX_SIZE);
        let end = end.ok_or(VolumeError::TooLarge)?;
        if offset > self.size {
            self.grow(volume, fd, offset)?;
        }
        if end > self.size {
            self.unseal(volume, fd, false)?;
        }
        self.touch();
        let range = BlockRange::covering(offset, data.len() as u64);
        let new_size = end.max(self.size);

        // Blocks of which only a part is written: what they hold now.
        let mut kept = Vec::new();
        let mut first = Zeroizing::new([0; BLOCK as usize]);
        let mut last = Zeroizing::new([0; BLOCK as usize]);
        let head = (offset - range.start()) as usize;
        if head > 0 || (range.end - range.first == 1 && end < self.size) {
            self.fetch(volume, fd, range.first, &mut first, &mut kept)?;
        }
        if range.end - range.first > 1 && end < self.size && !end.is_multiple_of(BLOCK) {
            self.fetch(volume, fd, range.end - 1, &mut last, &mut kept)?;
        }

        // A short last block that is overwritten whole and grows: nothing of it is kept, but it must come back if the write
        // fails.
        let tail = self.size / BLOCK;
        if end > self.size
            && !self.size.is_multiple_of(BLOCK)
            && (range.first..range.end).contains(&tail)
            && !kept.iter().any(|old| old.index == tail)
        {
            let mut sealed = vec![0; (self.size % BLOCK + BLOCK_OVERHEAD) as usize];
            let got = storage::read_at(fd, &mut sealed, format::block_offset(tail))?;
            sealed.truncate(got);
            kept.push(OldBlock { index: tail, sealed });
        }

        SEALED.with_borrow_mut(|sealed| {
            grow(sealed, range.sealed_len());
            let mut aad = BlockAad::new(&volume.id(), &self.dek().object());
            let mut nonces = Vec::with_capacity((range.end - range.first) as usize);
            for _ in range.first..range.end {
                nonces.push(random::nonce().map_err(|_| VolumeError::Backing(Errno::IO))?);
            }
            let total = volume.keys().with_keys(self.dek(), |keys| {
                let cipher = keys.cipher(DekLabel::Content);
                let mut at = 0;
                for (index, nonce) in (range.first..range.end).zip(&nonces) {
                    let block = index * BLOCK;
                    let len = (new_size - block).min(BLOCK) as usize;
                    let from = offset.saturating_sub(block) as usize;
                    let until = (end - block).min(BLOCK) as usize;
                    let source = (block + from as u64 - offset) as usize;
                    let part = &data[source..source + (until - from)];
                    let stored = &mut sealed[at..at + len + BLOCK_OVERHEAD as usize];
                    if part.len() == len {
                        content::seal_block(&cipher, &mut aad, index, nonce, part, stored);
                    } else {
                        let edge = if index == range.first { &mut first } else { &mut last };
                        edge[from..until].copy_from_slice(part);
                        content::seal_block(&cipher, &mut aad, index, nonce, &edge[..len], stored);
                    }
                    at += stored.len();
                }
                at
            })?;
            if let Err((done, errno)) = storage::write_at(fd, &sealed[..total], format::block_offset(range.first)) {
                self.put_back(volume, fd, range, done, &kept);
                return Err(VolumeError::Backing(errno).into());
            }
            self.size = new_size;
            Ok(())
        })
    }

    /// The plaintext of one existing block into `plain` (zeros beyond the end of the file), its sealed bytes into `kept`.
    fn fetch(
        &self,
        volume: &Volume,
        fd: BorrowedFd<'_>,
        index: u64,
        plain: &mut [u8; BLOCK as usize],
        kept: &mut Vec<OldBlock>,
    ) -> Result<(), ReadError> {
        let start = index * BLOCK;
        if start >= self.size {
            return Ok(());
        }
        let len = (self.size - start).min(BLOCK) as usize;
        let mut sealed = vec![0; len + BLOCK_OVERHEAD as usize];
        let got = storage::read_at(fd, &mut sealed, format::block_offset(index))?;
        sealed.truncate(got);
        let mut aad = BlockAad::new(&volume.id(), &self.dek().object());
        volume.keys().with_keys(self.dek(), |keys| {
            self.open(&keys.cipher(DekLabel::Content), &mut aad, index, &sealed, &mut plain[..len])
        })??;
        kept.push(OldBlock { index, sealed });
        Ok(())
    }

    /// After a write that failed once `done` bytes were out: leaves no block half old, half new.
    fn put_back(&self, volume: &Volume, fd: BorrowedFd<'_>, range: BlockRange, done: usize, kept: &[OldBlock]) {
        let torn = range.first + done as u64 / SEALED_BLOCK;
        let old_len = format::backing_len(self.size);
        for old in kept.iter().filter(|old| old.index >= torn || self.size < (old.index + 1) * BLOCK) {
            if storage::write_at(fd, &old.sealed, format::block_offset(old.index)).is_err() {
                volume.report(Damage::Block, Some(self.dek().object()), 0, Some(old.index));
            }
        }
        let partly = done as u64 % SEALED_BLOCK;
        if partly > 0 && torn * BLOCK < self.size && !kept.iter().any(|old| old.index == torn) {
            // Space ran out inside the block: it was a hole, and a hole it must be again. (Allocated blocks are
            // overwritten without new space; where that fails the medium is broken, and the block reads as damaged.)
            let zeros = vec![0; partly as usize];
            let _ = storage::write_at(fd, &zeros, format::block_offset(torn));
        }
        if backing_len_of(fd).is_ok_and(|len| len > old_len) {
            let _ = storage::set_len(fd, old_len);
        }
    }

    /// Changes the size.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn resize(&mut self, volume: &Volume, fd: BorrowedFd<'_>, size: u64) -> Result<(), ReadError> {
        if size > format::MAX_SIZE {
            return Err(VolumeError::TooLarge.into());
        }
        match size.cmp(&self.size) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(volume, fd, size),
            std::cmp::Ordering::Less => self.shrink(volume, fd, size),
        }
    }

    /// Grows with zeros: the last block is filled up, whole blocks become holes.
    fn grow(&mut self, volume: &Volume, fd: BorrowedFd<'_>, size: u64) -> Result<(), ReadError> {
        let filled = self.size.next_multiple_of(BLOCK).min(size);
        self.unseal(volume, fd, size > filled)?;
        self.touch();
        if !self.size.is_multiple_of(BLOCK) {
            let zeros = [0; BLOCK as usize];
            let len = (filled - self.size) as usize;
            self.write(volume, fd, self.size, &zeros[..len])?;
        }
        if size > self.size {
            storage::set_len(fd, format::backing_len(size))?;
            self.size = size;
        }
        Ok(())
    }

    /// Cuts. A floor above the new size is lowered durably first; then the last block is sealed anew at its new length.
    fn shrink(&mut self, volume: &Volume, fd: BorrowedFd<'_>, size: u64) -> Result<(), ReadError> {
        let mut plain = Zeroizing::new([0; BLOCK as usize]);
        let rest = (size % BLOCK) as usize;
        if rest > 0 {
            self.fetch(volume, fd, size / BLOCK, &mut plain, &mut Vec::new())?;
        }
        if self.mutable.floor > size || self.mutable.sealed {
            let floor = self.mutable.floor.min(size);
            self.write_header(volume, fd, Mutable { size, floor, sealed: false, ..self.mutable })?;
            storage::sync_data(fd)?;
        }
        self.touch();
        self.cuts += 1;
        self.flushed = self.flushed.min(size);
        if rest > 0 {
            let nonce = random::nonce().map_err(|_| VolumeError::Backing(Errno::IO))?;
            let mut sealed = vec![0; rest + BLOCK_OVERHEAD as usize];
            let mut aad = BlockAad::new(&volume.id(), &self.dek().object());
            volume.keys().with_keys(self.dek(), |keys| {
                let cipher = keys.cipher(DekLabel::Content);
                content::seal_block(&cipher, &mut aad, size / BLOCK, &nonce, &plain[..rest], &mut sealed);
            })?;
            storage::write_at(fd, &sealed, format::block_offset(size / BLOCK)).map_err(|(_, errno)| errno)?;
        }
        storage::set_len(fd, format::backing_len(size))?;
        self.size = size;
        Ok(())
    }

    /// Before the file grows: the header must no longer promise its size, and must admit holes if there will be some.
    fn unseal(&mut self, volume: &Volume, fd: BorrowedFd<'_>, holes: bool) -> Result<(), ReadError> {
        if self.mutable.sealed || (holes && !self.mutable.holes) {
            let was_sealed = self.mutable.sealed;
            let holes = holes || self.mutable.holes;
            self.write_header(volume, fd, Mutable { sealed: false, holes, ..self.mutable })?;
            if was_sealed {
                // Durably: a power cut that kept the growth but not the header would make the whole file unreadable.
                storage::sync_data(fd)?;
            }
        }
        Ok(())
    }

    fn touch(&mut self) {
        self.unsealed = true;
        self.changes += 1;
    }

    fn write_header(&mut self, volume: &Volume, fd: BorrowedFd<'_>, next: Mutable) -> Result<(), VolumeError> {
        let holes = next.holes || (self.recovered && next.floor > self.mutable.floor);
        let next = Mutable { counter: self.mutable.counter + 1, holes, ..next };
        let bytes = next.seal(volume.keys(), self.dek(), &volume.id())?;
        storage::write_at(fd, &bytes, MUTABLE_AT).map_err(|(_, errno)| errno)?;
        self.mutable = next;
        Ok(())
    }

    /// Begins an fsync: raises the floor to what an *earlier* flush covered, and marks what this one will cover.
    /// Then the caller flushes, without this lock, and calls [`flushed`](Self::flushed).
    ///
    /// # Errors
    /// The ring's or the backing filesystem's.
    pub fn flushing(&mut self, volume: &Volume, fd: BorrowedFd<'_>) -> Result<FlushMark, VolumeError> {
        if self.flushed > self.mutable.floor {
            let floor = self.flushed;
            let next = Mutable { size: self.size, floor, sealed: false, ..self.mutable };
            keeping_times(fd, || self.write_header(volume, fd, next))?;
        }
        Ok(FlushMark { size: self.size, cuts: self.cuts })
    }

    /// A flush that began at `mark` has completed.
    pub fn flushed(&mut self, mark: FlushMark) {
        if mark.cuts == self.cuts {
            self.flushed = self.flushed.max(mark.size);
        }
    }

    /// Seals the header: floor = size. Only after a flush that covered everything written so far; writing the header does
    /// not change the backing file's times.
    ///
    /// # Errors
    /// The ring's or the backing filesystem's; the file is then still unsealed, and as good as before.
    pub fn seal(&mut self, volume: &Volume, fd: BorrowedFd<'_>) -> Result<(), VolumeError> {
        if !self.unsealed {
            return Ok(());
        }
        let size = self.size;
        let next = Mutable { size, floor: size, sealed: true, ..self.mutable };
        keeping_times(fd, || self.write_header(volume, fd, next))?;
        self.flushed = size;
        self.unsealed = false;
        Ok(())
    }
}

/// A failure and, for damage, the block it was found in.
#[derive(Debug)]
pub struct ReadError {
    /// What failed.
    pub error: VolumeError,
    /// Index of the block.
    pub block: Option<u64>,
}

impl ReadError {
    fn damaged(damage: Damage, block: u64) -> Self {
        Self { error: VolumeError::Damaged(damage), block: Some(block) }
    }
}

impl<E: Into<VolumeError>> From<E> for ReadError {
    fn from(error: E) -> Self {
        Self { error: error.into(), block: None }
    }
}

/// Size, floor and seal of a file that looks empty, which its length alone cannot vouch for (docs/FORMAT.md section 7).
///
/// # Errors
/// As [`FileState::load`].
pub fn check_empty(volume: &Volume, fd: BorrowedFd<'_>) -> Result<(), VolumeError> {
    let (_, mutable) = read_header(volume, fd)?;
    if mutable.floor > 0 { Err(VolumeError::Damaged(Damage::Truncated)) } else { Ok(()) }
}

fn read_header(volume: &Volume, fd: BorrowedFd<'_>) -> Result<(Static, Mutable), VolumeError> {
    let mut bytes = [0; HEADER_LEN];
    if storage::read_at(fd, &mut bytes, 0)? != HEADER_LEN {
        return Err(VolumeError::Damaged(Damage::Header));
    }
    let (Some(a), Some(b)) = (bytes.first_chunk(), bytes[STATIC_LEN..].first_chunk()) else {
        return Err(VolumeError::Damaged(Damage::Header));
    };
    let open = |copy| Static::open_as(volume.keys(), copy, ObjectType::Regular);
    let header = match open(a) {
        Err(VolumeError::Damaged(damage)) => open(b).map_err(|error| match error {
            VolumeError::Damaged(_) => VolumeError::Damaged(damage),
            other => other,
        })?,
        other => other?,
    };
    let Some(mutable) = bytes[MUTABLE_AT as usize..].first_chunk() else {
        return Err(VolumeError::Damaged(Damage::Header));
    };
    let mutable = Mutable::open(volume.keys(), &header.dek, &volume.id(), mutable)?;
    Ok((header, mutable))
}

/// Runs `write` and puts the backing file's times back: what is written is ours, not the program's.
fn keeping_times<T>(fd: BorrowedFd<'_>, write: impl FnOnce() -> Result<T, VolumeError>) -> Result<T, VolumeError> {
    let before = storage::stat_fd(fd)?;
    let written = write()?;
    let _ = storage::set_times_fd(
        fd,
        &Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: before.st_atime, tv_nsec: before.st_atime_nsec as _ },
            last_modification: rustix::fs::Timespec { tv_sec: before.st_mtime, tv_nsec: before.st_mtime_nsec as _ },
        },
    );
    Ok(written)
}

fn backing_len_of(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(storage::stat_fd(fd)?.st_size as u64)
}

fn backing_size(fd: BorrowedFd<'_>) -> Result<u64, VolumeError> {
    format::plain_size(backing_len_of(fd)?).ok_or(VolumeError::Damaged(Damage::Header))
}

fn grow(buffer: &mut Vec<u8>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
}

#[cfg(test)]
mod tests;
