//! Space without contents: holes punched, ranges zeroed, room reserved (docs/decisions/0012-punch.md).
//!
//! A hole in the middle of a file needs no record of its own. The header that allows it, with the floor at or before the
//! first block and *holes* set, goes into the log; once that is on the medium the blocks become zeros in place, and a
//! crash in the middle leaves each of them old, zeros, or torn above the floor, which reads as zeros.

use super::*;

/// What a range is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Zeros that take no space.
    Hole,
    /// Zeros for which there is space.
    Zeros,
    /// What it is, with space for what is written there later.
    Reserved,
}

impl FileState {
    /// fallocate(2). `keep_size`: what lies behind the end does not become part of the file.
    ///
    /// # Errors
    /// [`VolumeError::TooLarge`]; [`Damage`] where part of a damaged block would have to be kept; the ring's; the backing
    /// filesystem's: [`Errno::OPNOTSUPP`] where it cannot reserve. Part of it may be done then.
    pub fn allocate(
        &mut self,
        volume: &Volume,
        fd: BorrowedFd<'_>,
        space: Space,
        keep_size: bool,
        (offset, len): (u64, u64),
    ) -> Result<(), ReadError> {
        let end = offset.checked_add(len).filter(|end| *end <= format::MAX_SIZE).ok_or(VolumeError::TooLarge)?;
        self.be_born(volume, fd)?;
        self.cut_leftovers(fd)?;
        if space != Space::Hole {
            // Whole blocks: a part of one is written with all of it.
            let range = BlockRange::covering(offset, len);
            storage::preallocate(fd, format::block_offset(range.first), range.sealed_len() as u64)?;
        }
        if space != Space::Reserved {
            self.zero(volume, fd, offset, end.min(self.size), space == Space::Zeros)?;
        }
        if !keep_size && end > self.size { self.resize(volume, fd, end) } else { Ok(()) }
    }

    /// Makes a range within the file zeros: whole blocks in place, what is left at its edges as any write.
    fn zero(
        &mut self,
        volume: &Volume,
        fd: BorrowedFd<'_>,
        offset: u64,
        end: u64,
        keeps_space: bool,
    ) -> Result<(), ReadError> {
        if offset >= end {
            return Ok(());
        }
        let first = offset.div_ceil(BLOCK);
        // A short last block is a whole one.
        let last = if end == self.size { end.div_ceil(BLOCK) } else { end / BLOCK };
        if first > last {
            return self.zero_part(volume, fd, offset, end);
        }
        self.zero_part(volume, fd, offset, (first * BLOCK).min(end))?;
        self.zero_part(volume, fd, (last * BLOCK).max(offset), end)?;
        if first < last { self.zero_blocks(volume, fd, first, last, keeps_space) } else { Ok(()) }
    }

    /// Zeros within one block.
    fn zero_part(&mut self, volume: &Volume, fd: BorrowedFd<'_>, from: u64, to: u64) -> Result<(), ReadError> {
        if from >= to {
            return Ok(());
        }
        let len = (to - from) as usize;
        let mut now = Zeroizing::new([0; BLOCK as usize]);
        self.read(volume, fd, from, &mut now[..len])?;
        // What is a hole stays one.
        if now.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            self.write(volume, fd, from, &[0; BLOCK as usize][..len])
        }
    }

    /// Makes blocks zeros in place, once a header that allows it is on the medium.
    fn zero_blocks(
        &mut self,
        volume: &Volume,
        fd: BorrowedFd<'_>,
        first: u64,
        end: u64,
        keeps_space: bool,
    ) -> Result<(), ReadError> {
        let start = first * BLOCK;
        let lowers = self.mutable.floor > start || self.mutable.sealed || !self.opened;
        if lowers || !self.mutable.holes {
            let next = Mutable {
                size: self.size,
                floor: self.mutable.floor.min(start),
                sealed: false,
                holes: true,
                opened: self.opening(volume),
                ..self.mutable
            };
            // A header that only adds *holes* may get lost: above the floor zeros are zeros in any case.
            self.write_header_by(volume, fd, next, lowers)?;
            if lowers && volume.log().is_none() {
                storage::sync_data(fd)?;
            }
            self.opened = true;
        }
        self.touch();
        // A flush under way vouches for nothing of this; the next one has to cover it.
        self.cuts += 1;
        self.flushed = self.flushed.min(start);
        self.in_place += 1;
        self.gaps.punch(first, end);
        if volume.log().is_none() {
            return Ok(zero_in_place(fd, first, end, keeps_space)?);
        }
        if self.logged > 0 {
            // Replayed, older records would bring back what was there.
            self.cut_in = Some(self.logged_in);
        }
        self.overlay.push_zeros(self.logged, first, end, keeps_space);
        Ok(())
    }

    /// Whether so much is pending that it should go in place before more is asked for.
    pub fn is_crowded(&self) -> bool {
        self.overlay.zeros() >= MOST_PENDING
    }
}

/// So many ranges of zeros may be pending: a read looks at each.
const MOST_PENDING: usize = 256;

/// The stored bytes of blocks become zeros. The file's length stays.
pub(in crate::volume) fn zero_in_place(
    fd: BorrowedFd<'_>,
    first: u64,
    end: u64,
    keeps_space: bool,
) -> Result<(), Errno> {
    let at = format::block_offset(first);
    let len = format::block_offset(end).min(backing_len_of(fd)?).saturating_sub(at);
    if len == 0 { Ok(()) } else { storage::zero(fd, at, len, keeps_space) }
}
