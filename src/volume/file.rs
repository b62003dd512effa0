//! A regular file: reading, writing, resizing, and what its header promises (docs/FORMAT.md section 7).
//!
//! A [`FileState`] is what is known of one open file; the caller keeps it under one lock per file (shared to read,
//! exclusive for the rest) and passes the backing descriptor in. Reading cannot give wrong bytes: what the header's floor
//! and seal do not vouch for is [`VolumeError::Damaged`].
//!
//! The order of writes is the crash story: see "Order of writes" in the format's document. New blocks behind the end of a
//! file that this mount has opened for changes go in place at once. Everything else goes into the intent log, and stays in
//! memory ([`overlay`](super::overlay)) until its record is on the medium. Without a log everything goes in place at once,
//! and a crash can cost a block.

mod change;
pub mod check;
mod durable;
mod gaps;
pub mod space;

use std::cell::RefCell;
use std::os::fd::BorrowedFd;

use gaps::Gaps;
use zeroize::Zeroizing;

use super::content::{self, BlockAad, BlockRange};
use super::format::{self, BLOCK, BLOCK_OVERHEAD, SEALED_BLOCK};
use super::header::{HEADER_LEN, MUTABLE_AT, MUTABLE_LEN, Mutable, ObjectType, STATIC_LEN, Static};
use super::log::{Change, Subject};
use super::overlay::{Holds, Overlay};
use super::storage::{self, Errno, Timestamps};
use super::{Damage, Volume, VolumeError};
use crate::crypto::kdf::DekLabel;
use crate::crypto::{NONCE_LEN, ObjectId, random};
use crate::keyring::Dek;

/// So many blocks that a crash left as zeros are written anew; more than that become holes.
const FILLED: u64 = 4096;

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
    /// Of a recovered file: the blocks above the floor are in order, but for zeros if there are `zeros`.
    mended: bool,
    zeros: bool,
    /// Where zeros are holes.
    gaps: Gaps,
    /// Backing inode number and time of birth, for the log.
    ino: u64,
    born: u64,
    /// The header is only in the attribute of the file's birth, and has to be written before anything else is.
    newborn: bool,
    /// This mount has opened the file for changes: its header is unsealed, here or in the overlay.
    opened: bool,
    /// What is logged and not yet in place.
    overlay: Overlay,
    /// The last record of this file.
    logged: u64,
    /// Generation of the log that it is in.
    logged_in: u64,
    /// Writes in place so far, and how many of them a flush has covered.
    in_place: u64,
    in_place_flushed: u64,
    /// Generation of the log with the last record that, replayed, would undo what was done in place after it: one that
    /// cuts, or any before a hole was punched.
    cut_in: Option<u64>,
    /// A write failed, and what it left behind the end of the backing file could not be cut off yet.
    leftovers: bool,
}

/// What an fsync has to flush, and where it began; see [`FileState::flushed`].
#[derive(Clone, Copy)]
pub struct FlushMark {
    /// The log, up to this record.
    pub log: u64,
    /// The file itself: not all of its contents are in the log.
    pub in_place: bool,
    /// What is pending must be [applied](FileState::apply) before that.
    pub applies: bool,
    /// After that, earlier records must be made void.
    settles: bool,
    size: u64,
    cuts: u64,
    writes: u64,
    /// The file itself held everything.
    whole: bool,
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
        let bytes = header_bytes(volume, &header, mutable)?;
        storage::write_at(fd, &bytes, 0).map_err(|(_, errno)| errno)?;
        let birth: [u8; BIRTH_LEN] = birth_of(&bytes);
        // Where it cannot be, a power cut before the first flush makes the file unreadable.
        let _ = storage::set_xattr_fd(fd, format::BIRTH, &birth);
        Ok(Self {
            header,
            mutable,
            size: 0,
            flushed: 0,
            cuts: 0,
            unsealed: true,
            changes: 0,
            recovered: false,
            mended: false,
            zeros: false,
            gaps: Gaps::none(),
            ino: storage::stat_fd(fd)?.st_ino,
            born: storage::born(fd)?,
            newborn: false,
            opened: true,
            overlay: Overlay::new(0),
            logged: 0,
            logged_in: 0,
            in_place: 1,
            in_place_flushed: 0,
            cut_in: None,
            leftovers: false,
        })
    }

    /// Reads and authenticates the header, and holds it against the backing length.
    ///
    /// # Errors
    /// Any [`Damage`] of a header, [`Damage::Truncated`], [`Damage::Extended`]; the ring's; the backing filesystem's.
    pub fn load(volume: &Volume, fd: BorrowedFd<'_>) -> Result<Self, VolumeError> {
        let Header { header, mutable, newborn } = read_header(volume, fd)?;
        let size = format::plain_size(backing_len_of(fd)?).unwrap_or(0);
        if size < mutable.floor || (mutable.sealed && size < mutable.size) {
            return Err(VolumeError::Damaged(Damage::Truncated));
        }
        if mutable.sealed && size > mutable.size {
            return Err(VolumeError::Damaged(Damage::Extended));
        }
        let recovered = !mutable.sealed && size > mutable.floor;
        // A daemon that was killed may have left what no flush covers.
        let in_place = u64::from(!mutable.sealed);
        Ok(Self {
            header,
            mutable,
            size,
            flushed: mutable.floor,
            cuts: 0,
            unsealed: !mutable.sealed,
            changes: 0,
            recovered,
            mended: false,
            zeros: false,
            gaps: if recovered || mutable.holes { Gaps::unknown() } else { Gaps::none() },
            ino: storage::stat_fd(fd)?.st_ino,
            born: storage::born(fd)?,
            newborn,
            opened: false,
            overlay: Overlay::new(size),
            logged: 0,
            logged_in: 0,
            in_place,
            in_place_flushed: 0,
            cut_in: None,
            leftovers: false,
        })
    }

    /// The key claim, for extended attributes.
    pub fn dek(&self) -> &Dek {
        &self.header.dek
    }

    /// The same header, wrapped anew.
    pub(super) fn set_header(&mut self, header: Static) {
        self.header = header;
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
            let mut got = storage::read_at(fd, &mut sealed[..wanted], format::block_offset(range.first))?;
            if !self.overlay.is_empty() {
                sealed[got..wanted].fill(0);
                got = wanted;
                for index in range.first..range.end {
                    let at = ((index - range.first) * SEALED_BLOCK) as usize;
                    let stored = &mut sealed[at.min(wanted)..(at + SEALED_BLOCK as usize).min(wanted)];
                    self.lay_over(index, stored);
                }
            }
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

    /// Puts what is pending for a block over what the backing file holds of it.
    fn lay_over(&self, index: u64, stored: &mut [u8]) {
        match self.overlay.holds(index) {
            Holds::Disk => {}
            Holds::Nothing => stored.fill(0),
            Holds::Pending(bytes) => {
                let len = bytes.len().min(stored.len());
                stored[..len].copy_from_slice(&bytes[..len]);
            }
        }
    }

    /// The sealed bytes of a block of which `len` bytes of plaintext count. Fewer than that: the backing file ends there.
    fn stored(&self, fd: BorrowedFd<'_>, index: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let mut sealed = vec![0; len + BLOCK_OVERHEAD as usize];
        let got = storage::read_at(fd, &mut sealed, format::block_offset(index))?;
        if self.overlay.is_empty() {
            sealed.truncate(got);
        } else {
            self.lay_over(index, &mut sealed);
        }
        Ok(sealed)
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
        let opened = if complete {
            content::open_block(cipher, aad, index, stored, plain).map_err(|_| Damage::Block)
        } else {
            Err(Damage::Truncated)
        };
        match opened {
            // Never flushed and cut off by a crash: it might as well not be there at all.
            Err(_) if above_floor && torn(index, stored, complete) => {
                plain.fill(0);
                Ok(())
            }
            other => other.map_err(|damage| ReadError::damaged(damage, index)),
        }
    }

    /// Whether an unclean end or a failed write left something for [`mend`](Self::mend) to do.
    pub fn recovered(&self) -> bool {
        self.recovered || self.newborn || self.leftovers
    }

    /// Before a file that an unclean end left unsealed is flushed and sealed: blocks above the floor that a crash tore
    /// become the zeros that they read as, sealed like any others: by way of the log. If they are very many, they become holes.
    ///
    /// # Errors
    /// [`Damage`] above the floor that no crash explains; the file cannot be sealed then.
    pub fn mend(&mut self, volume: &Volume, fd: BorrowedFd<'_>) -> Result<(), ReadError> {
        // Before the flush that the seal needs: with the seal the attribute of its birth goes.
        self.be_born(volume, fd)?;
        self.cut_leftovers(fd)?;
        if !self.recovered || self.mended || !self.overlay.is_empty() {
            return Ok(());
        }
        let mut plain = Zeroizing::new([0; BLOCK as usize]);
        let mut aad = BlockAad::new(&volume.id(), &self.dek().object());
        let (mut filled, mut zeros) = (0, false);
        for index in self.mutable.floor.div_ceil(BLOCK)..self.size.div_ceil(BLOCK) {
            let len = (self.size - index * BLOCK).min(BLOCK) as usize;
            let stored = self.stored(fd, index, len)?;
            let complete = stored.len() == len + BLOCK_OVERHEAD as usize;
            let zero = complete && content::is_zero(&stored);
            if zero && self.mutable.holes {
                continue;
            }
            let nonce = random::nonce().map_err(|_| VolumeError::Backing(Errno::IO))?;
            let mut sealed = vec![0; len + BLOCK_OVERHEAD as usize];
            let genuine = volume.keys().with_keys(self.dek(), |keys| {
                let cipher = keys.cipher(DekLabel::Content);
                if complete && content::open_block(&cipher, &mut aad, index, &stored, &mut plain[..len]).is_ok() {
                    return Ok(true);
                }
                self.open(&cipher, &mut aad, index, &stored, &mut plain[..len])?;
                if filled < FILLED {
                    content::seal_block(&cipher, &mut aad, index, &nonce, &plain[..len], &mut sealed);
                }
                Ok::<_, ReadError>(false)
            })??;
            if genuine {
                continue;
            }
            zeros |= filled == FILLED;
            filled = (filled + 1).min(FILLED);
            if volume.log().is_some() && !zeros {
                // In place, a crash in the middle of this could leave half of it over half of what was there.
                self.open_for_changes(volume, fd, false, false)?;
                change::reserve(fd, index, sealed.len())?;
                self.touch();
                self.log(volume, Change::Blocks { first: index, sealed })?;
            } else if !(zeros && zero) {
                self.touch();
                self.in_place += 1;
                storage::write_at(fd, &sealed, format::block_offset(index)).map_err(|(_, errno)| errno)?;
            }
        }
        if zeros && !self.mutable.holes {
            self.check_for_zeros_below_floor(fd)?;
        }
        (self.mended, self.zeros) = (true, zeros);
        Ok(())
    }

    /// Before zeros are called holes in a file that had none: those that are there already must not become holes with them.
    fn check_for_zeros_below_floor(&self, fd: BorrowedFd<'_>) -> Result<(), ReadError> {
        for index in 0..self.mutable.floor.div_ceil(BLOCK) {
            let len = (self.size - index * BLOCK).min(BLOCK) as usize;
            if content::is_zero(&self.stored(fd, index, len)?) {
                return Err(ReadError::damaged(Damage::Block, index));
            }
        }
        Ok(())
    }
}

/// Whether a crash explains what is stored of a block that does not open: the end is missing, or what lies in one sector of
/// the backing file was never written. (Whoever can write there could as well make all of it zeros.)
fn torn(index: u64, stored: &[u8], complete: bool) -> bool {
    const SECTOR: usize = 512;
    let first = SECTOR - format::block_offset(index) as usize % SECTOR;
    let (head, rest) = stored.split_at(first.min(stored.len()));
    // The size follows from the backing length: where growth got no further than to the end of a page or sector, what is there
    // of the block looks like a short one.
    let ends = format::block_offset(index) + stored.len() as u64;
    let cut_short = (stored.len() as u64) < SEALED_BLOCK && ends.is_multiple_of(SECTOR as u64);
    !complete || cut_short || content::is_zero(head) || rest.chunks(SECTOR).any(content::is_zero)
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
    let mutable = read_header(volume, fd)?.mutable;
    if mutable.floor > 0 { Err(VolumeError::Damaged(Damage::Truncated)) } else { Ok(()) }
}

/// What a regular file's header says.
pub(super) struct Header {
    pub(super) header: Static,
    pub(super) mutable: Mutable,
    /// There is none: a power cut came before the first flush, and only the attribute of its birth is left.
    pub(super) newborn: bool,
}

/// Which object a file is, if its static header opens: also where nothing else does.
pub fn identify(volume: &Volume, fd: BorrowedFd<'_>) -> Option<ObjectId> {
    let (bytes, _) = header_of(fd).ok()?;
    Some(read_static(volume, &bytes).ok()?.dek.object())
}

/// Reads and authenticates a header.
pub(super) fn read_header(volume: &Volume, fd: BorrowedFd<'_>) -> Result<Header, VolumeError> {
    let (bytes, newborn) = header_of(fd)?;
    let header = read_static(volume, &bytes)?;
    let Some(mutable) = bytes[MUTABLE_AT as usize..].first_chunk() else {
        return Err(VolumeError::Damaged(Damage::Header));
    };
    let mutable = Mutable::open(volume.keys(), &header.dek, &volume.id(), mutable)?;
    Ok(Header { header, mutable, newborn })
}

/// The bytes of a header, and whether only the attribute of the file's birth still has them.
fn header_of(fd: BorrowedFd<'_>) -> Result<([u8; HEADER_LEN], bool), VolumeError> {
    let mut bytes = [0; HEADER_LEN];
    let mut got = storage::read_at(fd, &mut bytes, 0)?;
    let mut newborn = false;
    if content::is_zero(&bytes)
        && let Some(birth) = storage::get_xattr_fd::<BIRTH_LEN>(fd, format::BIRTH)
    {
        bytes[..STATIC_LEN].copy_from_slice(&birth[..STATIC_LEN]);
        bytes[MUTABLE_AT as usize..][..2 * MUTABLE_LEN].copy_from_slice(&birth[STATIC_LEN..]);
        (newborn, got) = (true, HEADER_LEN);
    }
    if got == HEADER_LEN { Ok((bytes, newborn)) } else { Err(VolumeError::Damaged(Damage::Header)) }
}

/// The first copy of the static header that opens.
fn read_static(volume: &Volume, bytes: &[u8; HEADER_LEN]) -> Result<Static, VolumeError> {
    let (Some(a), Some(b)) = (bytes.first_chunk(), bytes[STATIC_LEN..].first_chunk()) else {
        return Err(VolumeError::Damaged(Damage::Header));
    };
    let open = |copy| Static::open_as(volume.keys(), copy, ObjectType::Regular);
    match open(a) {
        Err(VolumeError::Damaged(damage)) => open(b).map_err(|error| match error {
            VolumeError::Damaged(_) => VolumeError::Damaged(damage),
            other => other,
        }),
        other => other,
    }
}

/// Bytes of the birth attribute: a static header, and both copies of the first mutable one. The latter is what nobody can
/// make who did not see it before the file was sealed.
pub(super) const BIRTH_LEN: usize = STATIC_LEN + 2 * MUTABLE_LEN;

fn birth_of(header: &[u8; HEADER_LEN]) -> [u8; BIRTH_LEN] {
    let mut birth = [0; BIRTH_LEN];
    birth[..STATIC_LEN].copy_from_slice(&header[..STATIC_LEN]);
    birth[STATIC_LEN..].copy_from_slice(&header[MUTABLE_AT as usize..][..2 * MUTABLE_LEN]);
    birth
}

fn header_bytes(volume: &Volume, header: &Static, mutable: Mutable) -> Result<[u8; HEADER_LEN], VolumeError> {
    let mut bytes = [0; HEADER_LEN];
    bytes[..STATIC_LEN].copy_from_slice(&header.bytes());
    bytes[STATIC_LEN..2 * STATIC_LEN].copy_from_slice(&header.bytes());
    let at = MUTABLE_AT as usize;
    bytes[at..at + 2 * MUTABLE_LEN].copy_from_slice(&mutable.seal(volume.keys(), &header.dek, &volume.id())?);
    Ok(bytes)
}

/// Writes all of a header, where only the birth attribute has it.
pub(super) fn write_header_anew(
    volume: &Volume,
    fd: BorrowedFd<'_>,
    header: &Static,
    mutable: Mutable,
) -> Result<(), VolumeError> {
    let bytes = header_bytes(volume, header, mutable)?;
    Ok(storage::write_at(fd, &bytes, 0).map_err(|(_, errno)| errno)?)
}

/// Runs `write` and puts the backing file's times back: what is written is ours, not the program's.
pub(super) fn keeping_times<T>(
    fd: BorrowedFd<'_>,
    write: impl FnOnce() -> Result<T, VolumeError>,
) -> Result<T, VolumeError> {
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

fn grow(buffer: &mut Vec<u8>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;
