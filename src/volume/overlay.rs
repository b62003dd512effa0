//! Changes of one file that are in the intent log and not yet in the file: until their record is on the medium they must
//! not be, or a crash could leave half of them there and nothing to mend it with.
//!
//! All of it is ciphertext: an overlay can be [applied](Overlay::apply) without a key.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::file::space::zero_in_place;
use super::format::{self, BLOCK, BLOCK_OVERHEAD, SEALED_BLOCK};
use super::header::{MUTABLE_AT, MUTABLE_LEN};
use super::log::Change;
use super::storage::{self, Errno};

enum Op {
    Header([u8; 2 * MUTABLE_LEN]),
    Blocks { first: u64, sealed: Arc<Vec<u8>> },
    Cut { size: u64, tail: Arc<Vec<u8>> },
    Grow { size: u64 },
    Zeros { first: u64, end: u64, keeps_space: bool },
}

/// Where a pending block is: the change it belongs to, and its place in it.
struct Pending {
    sealed: Arc<Vec<u8>>,
    at: usize,
    len: usize,
    sequence: u64,
}

/// The pending changes of one file, in order.
pub(super) struct Overlay {
    ops: VecDeque<(u64, Op)>,
    blocks: HashMap<u64, Pending>,
    /// The sizes of the pending [`Op::Cut`]s.
    cuts: VecDeque<u64>,
    /// The blocks of the pending [`Op::Zeros`].
    zeros: VecDeque<Range<u64>>,
    /// Plaintext size of the backing file as it is.
    disk: u64,
}

/// What the file would hold at a block once everything is applied.
pub(super) enum Holds<'a> {
    /// These sealed bytes, pending.
    Pending(&'a [u8]),
    /// Nothing: a pending change makes it zeros, or leaves less of the backing file.
    Nothing,
    /// What the backing file holds.
    Disk,
}

impl Overlay {
    /// Over a backing file with this plaintext size.
    pub(super) fn new(disk: u64) -> Self {
        Self { ops: VecDeque::new(), blocks: HashMap::new(), cuts: VecDeque::new(), zeros: VecDeque::new(), disk }
    }

    /// Whether the backing file is what the file is.
    pub(super) fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// The last pending record.
    pub(super) fn last(&self) -> Option<u64> {
        self.ops.back().map(|(sequence, _)| *sequence)
    }

    /// Something was changed in place. Only while empty.
    pub(super) fn set_disk(&mut self, size: u64) {
        self.disk = size;
    }

    /// Takes a change in, whose record has this number.
    pub(super) fn push(&mut self, sequence: u64, change: Change) {
        match change {
            Change::Header(bytes) => self.ops.push_back((sequence, Op::Header(bytes))),
            Change::Blocks { first, sealed } => {
                let sealed = Arc::new(sealed);
                for (n, start) in (0..sealed.len()).step_by(SEALED_BLOCK as usize).enumerate() {
                    let len = (sealed.len() - start).min(SEALED_BLOCK as usize);
                    self.blocks.insert(first + n as u64, Pending { sealed: sealed.clone(), at: start, len, sequence });
                }
                self.ops.push_back((sequence, Op::Blocks { first, sealed }));
            }
            Change::Cut { size, tail } => {
                let tail = Arc::new(tail);
                self.blocks.retain(|index, _| index * BLOCK < size);
                if !tail.is_empty() {
                    let len = tail.len();
                    self.blocks.insert(size / BLOCK, Pending { sealed: tail.clone(), at: 0, len, sequence });
                }
                self.cuts.push_back(size);
                self.ops.push_back((sequence, Op::Cut { size, tail }));
            }
            Change::Grow { size } => self.ops.push_back((sequence, Op::Grow { size })),
            Change::Settled { .. } => {}
        }
    }

    /// Takes blocks in that become zeros in place, once the record with this number is on the medium. None says so itself.
    pub(super) fn push_zeros(&mut self, sequence: u64, first: u64, end: u64, keeps_space: bool) {
        self.blocks.retain(|index, _| !(first..end).contains(index));
        self.zeros.push_back(first..end);
        self.ops.push_back((sequence, Op::Zeros { first, end, keeps_space }));
    }

    /// How many ranges of zeros are pending.
    pub(super) fn zeros(&self) -> usize {
        self.zeros.len()
    }

    /// What the file holds at a block.
    pub(super) fn holds(&self, index: u64) -> Holds<'_> {
        if let Some(pending) = self.blocks.get(&index) {
            return Holds::Pending(&pending.sealed[pending.at..pending.at + pending.len]);
        }
        if self.ops.is_empty() {
            return Holds::Disk;
        }
        let left = self.cuts.iter().copied().fold(self.disk, u64::min);
        if index * BLOCK >= left || self.zeros.iter().any(|range| range.contains(&index)) {
            Holds::Nothing
        } else {
            Holds::Disk
        }
    }

    /// Does every change whose record is on the medium, in order. Those after a failure stay.
    ///
    /// # Errors
    /// The backing filesystem's.
    pub(super) fn apply(&mut self, fd: BorrowedFd<'_>, flushed: u64) -> Result<(), Errno> {
        while let Some((sequence, op)) = self.ops.front() {
            if *sequence > flushed {
                break;
            }
            let touched = match op {
                Op::Header(bytes) => {
                    write(fd, bytes, MUTABLE_AT)?;
                    0..0
                }
                Op::Blocks { first, sealed } => {
                    write(fd, sealed, format::block_offset(*first))?;
                    self.disk = self.disk.max(end(*first, sealed));
                    *first..*first + (sealed.len() as u64).div_ceil(SEALED_BLOCK)
                }
                Op::Cut { size, tail } => {
                    storage::set_len(fd, format::backing_len(*size))?;
                    if !tail.is_empty() {
                        write(fd, tail, format::block_offset(size / BLOCK))?;
                    }
                    self.disk = *size;
                    self.cuts.pop_front();
                    size / BLOCK..size / BLOCK + 1
                }
                Op::Grow { size } => {
                    if self.disk < *size {
                        storage::set_len(fd, format::backing_len(*size))?;
                        self.disk = *size;
                    }
                    0..0
                }
                Op::Zeros { first, end, keeps_space } => {
                    // What is written there next has its space reserved, and must find it.
                    let written = || self.blocks.keys().any(|index| (*first..*end).contains(index));
                    zero_in_place(fd, *first, *end, *keeps_space || written())?;
                    self.zeros.pop_front();
                    0..0
                }
            };
            for index in touched {
                if self.blocks.get(&index).is_some_and(|pending| pending.sequence == *sequence) {
                    self.blocks.remove(&index);
                }
            }
            self.ops.pop_front();
        }
        Ok(())
    }
}

fn write(fd: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<(), Errno> {
    storage::write_at(fd, bytes, offset).map_err(|(_, errno)| errno)
}

/// Plaintext offset of the end of sealed blocks.
pub(super) fn end(first: u64, sealed: &[u8]) -> u64 {
    let last = sealed.len() as u64 % SEALED_BLOCK;
    first * BLOCK + sealed.len() as u64 / SEALED_BLOCK * BLOCK + last.saturating_sub(BLOCK_OVERHEAD)
}
