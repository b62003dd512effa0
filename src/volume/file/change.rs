//! Changing contents and size: what goes in place at once, what goes into the log, and what is put back when it fails.

use super::*;

/// Makes sure that sealed blocks that are about to be logged will find their place.
pub(super) fn reserve(fd: BorrowedFd<'_>, first: u64, len: usize) -> Result<(), Errno> {
    let (at, len) = (format::block_offset(first), len as u64);
    // A full XFS refuses even for what is there.
    storage::reserve(fd, at, len).or_else(|errno| if storage::is_allocated(fd, at, len) { Ok(()) } else { Err(errno) })
}

impl FileState {
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
        self.be_born(volume, fd)?;
        self.cut_leftovers(fd)?;
        // Whole blocks between are holes; what the write's own first block holds before it is zeros, and written with it.
        let start = offset / BLOCK * BLOCK;
        if start > self.size {
            self.grow(volume, fd, start)?;
        }
        let in_place = volume.log().is_none()
            || (self.opened && self.overlay.is_empty() && self.size.is_multiple_of(BLOCK) && offset >= self.size);
        self.open_for_changes(volume, fd, end > self.size, false)?;
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
            let sealed = self.stored(fd, tail, (self.size % BLOCK) as usize)?;
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
            if !in_place {
                // What is promised by the log must find its place later. Only new blocks need one.
                if end > self.size || self.mutable.holes {
                    reserve(fd, range.first, total)?;
                }
                self.log(volume, Change::Blocks { first: range.first, sealed: sealed[..total].to_vec() })?;
                self.gaps.fill(range.first, range.end);
                self.size = new_size;
                return Ok(());
            }
            self.in_place += 1;
            if let Err((done, errno)) = storage::write_at(fd, &sealed[..total], format::block_offset(range.first)) {
                self.put_back(volume, fd, range, done, &kept);
                return Err(VolumeError::Backing(errno).into());
            }
            self.gaps.fill(range.first, range.end);
            self.size = new_size;
            self.overlay.set_disk(new_size);
            Ok(())
        })
    }

    /// The plaintext of one existing block into `plain` (zeros beyond the end of the file), its sealed bytes into `kept`.
    pub(super) fn fetch(
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
        let sealed = self.stored(fd, index, len)?;
        let mut aad = BlockAad::new(&volume.id(), &self.dek().object());
        volume.keys().with_keys(self.dek(), |keys| {
            self.open(&keys.cipher(DekLabel::Content), &mut aad, index, &sealed, &mut plain[..len])
        })??;
        kept.push(OldBlock { index, sealed });
        Ok(())
    }

    /// After a write that failed once `done` bytes were out: leaves no block half old, half new.
    fn put_back(&mut self, volume: &Volume, fd: BorrowedFd<'_>, range: BlockRange, done: usize, kept: &[OldBlock]) {
        let torn = range.first + done as u64 / SEALED_BLOCK;
        for old in kept.iter().filter(|old| old.index >= torn || self.size < (old.index + 1) * BLOCK) {
            if storage::write_at(fd, &old.sealed, format::block_offset(old.index)).is_err() {
                volume.report(Damage::Block, self.ino, Some(old.index), || crate::volume::events::Victim {
                    object: Some(self.dek().object()),
                    path: None,
                });
            }
        }
        let partly = done as u64 % SEALED_BLOCK;
        if partly > 0 && torn * BLOCK < self.size && !kept.iter().any(|old| old.index == torn) {
            // Space ran out inside the block: it was a hole, and a hole it must be again. (Allocated blocks are
            // overwritten without new space; where that fails the medium is broken, and the block reads as damaged.)
            let zeros = vec![0; partly as usize];
            let _ = storage::write_at(fd, &zeros, format::block_offset(torn));
        }
        self.leftovers = true;
        let _ = self.cut_leftovers(fd);
    }

    /// Cuts off what a failed write left behind the end of the backing file: it must not become part of the file when that
    /// grows, nor be there when the size is vouched for. Over a quota btrfs refuses even that.
    ///
    /// # Errors
    /// The backing filesystem's.
    pub(super) fn cut_leftovers(&mut self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        // Only writes in place leave any: the overlay is empty then, and stays so until they are gone.
        if self.leftovers {
            let len = format::backing_len(self.size);
            if backing_len_of(fd)? > len {
                storage::set_len(fd, len)?;
            }
            self.leftovers = false;
        }
        Ok(())
    }

    /// Changes the size.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn resize(&mut self, volume: &Volume, fd: BorrowedFd<'_>, size: u64) -> Result<(), ReadError> {
        if size > format::MAX_SIZE {
            return Err(VolumeError::TooLarge.into());
        }
        self.be_born(volume, fd)?;
        self.cut_leftovers(fd)?;
        match size.cmp(&self.size) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(volume, fd, size),
            std::cmp::Ordering::Less => self.shrink(volume, fd, size),
        }
    }

    /// Grows with zeros: the last block is filled up, whole blocks become holes.
    fn grow(&mut self, volume: &Volume, fd: BorrowedFd<'_>, size: u64) -> Result<(), ReadError> {
        let filled = self.size.next_multiple_of(BLOCK).min(size);
        // Before anything is done. In the log it would be refused for ever, with all that comes after it.
        storage::fits(fd, format::backing_len(size))?;
        self.open_for_changes(volume, fd, true, size > filled)?;
        self.touch();
        if !self.size.is_multiple_of(BLOCK) {
            let zeros = [0; BLOCK as usize];
            let len = (filled - self.size) as usize;
            self.write(volume, fd, self.size, &zeros[..len])?;
        }
        if size > self.size {
            self.gaps.add(self.size, size);
            if volume.log().is_none() || self.overlay.is_empty() {
                self.in_place += 1;
                storage::set_len(fd, format::backing_len(size))?;
                self.overlay.set_disk(size);
            } else {
                self.log(volume, Change::Grow { size })?;
            }
            self.size = size;
        }
        Ok(())
    }

    /// Cuts. A floor above the new size is lowered first (without a log: durably); then the last block is sealed anew at its new length.
    fn shrink(&mut self, volume: &Volume, fd: BorrowedFd<'_>, size: u64) -> Result<(), ReadError> {
        let mut plain = Zeroizing::new([0; BLOCK as usize]);
        let rest = (size % BLOCK) as usize;
        if rest > 0 {
            self.fetch(volume, fd, size / BLOCK, &mut plain, &mut Vec::new())?;
        }
        let mut sealed = Vec::new();
        if rest > 0 {
            let nonce = random::nonce().map_err(|_| VolumeError::Backing(Errno::IO))?;
            sealed.resize(rest + BLOCK_OVERHEAD as usize, 0);
            let mut aad = BlockAad::new(&volume.id(), &self.dek().object());
            volume.keys().with_keys(self.dek(), |keys| {
                let cipher = keys.cipher(DekLabel::Content);
                content::seal_block(&cipher, &mut aad, size / BLOCK, &nonce, &plain[..rest], &mut sealed);
            })?;
        }
        if self.mutable.floor > size || self.mutable.sealed || !self.opened {
            let floor = self.mutable.floor.min(size);
            let next = Mutable { size, floor, sealed: false, opened: self.opening(volume), ..self.mutable };
            // Logged in any case: replayed, the cut must find the lower floor.
            self.write_header_by(volume, fd, next, true)?;
            if volume.log().is_none() {
                storage::sync_data(fd)?;
            }
            self.opened = true;
        }
        self.touch();
        self.cuts += 1;
        self.flushed = self.flushed.min(size);
        if volume.log().is_some() {
            self.cut_in = Some(self.log(volume, Change::Cut { size, tail: sealed })?);
        } else {
            if rest > 0 {
                storage::write_at(fd, &sealed, format::block_offset(size / BLOCK)).map_err(|(_, errno)| errno)?;
            }
            storage::set_len(fd, format::backing_len(size))?;
            self.overlay.set_disk(size);
        }
        // The new last block, if it is short, is written.
        self.gaps.fill(size / BLOCK, u64::MAX);
        self.size = size;
        Ok(())
    }
}
