//! Looking a file over: what its header says, and every block. And what a repair needs of it.
//!
//! A file that a crash left with records in the intent log is judged by what it will be once they are replayed.

use super::*;
use crate::volume::log::Record;
use crate::volume::replay;

/// Blocks looked at with one read.
pub const BLOCKS_AT_ONCE: u64 = 256;

/// What the header of a regular file is like, copy by copy.
pub struct Copies {
    /// The first static copy that opens.
    pub header: Option<Static>,
    /// The mutable header that counts.
    pub mutable: Option<Mutable>,
    /// Which static copies do not open, or belong to another object than the one that counts.
    pub bad_static: [bool; 2],
    /// A mutable copy does not open, or says something else than the one that counts.
    pub bad_mutable: bool,
    /// A genuine header, but of another type of object.
    pub other_type: bool,
    /// The first static copy that opens is another file's: a mount refuses the file (docs/FORMAT.md section 7).
    pub first_is_anothers: bool,
    /// There is no header but in the attribute of the file's birth.
    pub newborn: bool,
}

impl Copies {
    /// Reads all copies.
    ///
    /// # Errors
    /// The ring's; the backing filesystem's.
    pub fn read(volume: &Volume, fd: BorrowedFd<'_>) -> Result<Self, VolumeError> {
        let mut copies = Self {
            header: None,
            mutable: None,
            bad_static: [true; 2],
            bad_mutable: true,
            other_type: false,
            first_is_anothers: false,
            newborn: false,
        };
        match read_header(volume, fd) {
            Ok(Header { header, mutable, newborn: true }) => {
                (copies.header, copies.mutable, copies.newborn) = (Some(header), Some(mutable), true);
                (copies.bad_static, copies.bad_mutable) = ([false; 2], false);
                return Ok(copies);
            }
            Ok(_) | Err(VolumeError::Damaged(_)) => {}
            Err(error) => return Err(error),
        }
        let mut bytes = [0; HEADER_LEN];
        storage::read_at(fd, &mut bytes, 0)?;
        let Some(both) = bytes[MUTABLE_AT as usize..].first_chunk::<{ 2 * MUTABLE_LEN }>() else { return Ok(copies) };
        let mut opened = [None, None];
        for (n, opened) in opened.iter_mut().enumerate() {
            let Some(copy) = bytes[n * STATIC_LEN..].first_chunk() else { continue };
            match Static::open_as(volume.keys(), copy, ObjectType::Regular) {
                Ok(header) => *opened = Some(header),
                Err(VolumeError::Damaged(Damage::Type)) => copies.other_type = true,
                Err(VolumeError::Damaged(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // The file's own is the one that the mutable header is under: the other may be a genuine one of another file.
        for header in opened.iter().flatten() {
            match Mutable::open(volume.keys(), &header.dek, &volume.id(), both) {
                Ok(mutable) => {
                    (copies.header, copies.mutable) = (Some(header.clone()), Some(mutable));
                    break;
                }
                Err(VolumeError::Damaged(_)) => {}
                Err(error) => return Err(error),
            }
        }
        copies.header = copies.header.or_else(|| opened.iter().flatten().next().cloned());
        let Some(header) = &copies.header else { return Ok(copies) };
        let own = |copy: &Option<Static>| copy.as_ref().is_some_and(|copy| copy.dek.object() == header.dek.object());
        copies.bad_static = [!own(&opened[0]), !own(&opened[1])];
        copies.first_is_anothers = opened[0].is_some() && copies.bad_static[0];
        let mut agree = 0;
        for n in 0..2 {
            let mut alone = [0; 2 * MUTABLE_LEN];
            alone[..MUTABLE_LEN].copy_from_slice(&both[n * MUTABLE_LEN..][..MUTABLE_LEN]);
            let read = Mutable::open(volume.keys(), &header.dek, &volume.id(), &alone).ok();
            agree += u32::from(read.is_some() && read == copies.mutable);
        }
        copies.bad_mutable = agree < 2;
        Ok(copies)
    }
}

impl FileState {
    /// [`load`](Self::load), with what a log says of the file laid over it, as replaying will.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with(volume: &Volume, fd: BorrowedFd<'_>, records: &[Record]) -> Result<Self, VolumeError> {
        let Header { header, mutable, newborn } = read_header(volume, fd)?;
        let todo = replay::todo(records, &mutable);
        if todo.is_empty() {
            return Self::load(volume, fd);
        }
        let disk = format::plain_size(backing_len_of(fd)?).unwrap_or(0);
        let (mut now, mut size, mut overlay) = (mutable, disk, Overlay::new(disk));
        for record in todo {
            if !matches!(record.change, Change::Header(_)) && (now.sealed || now.opened != record.subject.opened) {
                now = Mutable { sealed: false, opened: record.subject.opened, ..now };
            }
            match &record.change {
                Change::Header(bytes) => {
                    let next = Mutable::open(volume.keys(), &header.dek, &volume.id(), bytes)?;
                    if next.counter > now.counter {
                        now = next;
                    }
                }
                Change::Blocks { first, sealed } => size = size.max(super::super::overlay::end(*first, sealed)),
                Change::Cut { size: cut, .. } => {
                    size = *cut;
                    now.floor = now.floor.min(size);
                }
                Change::Grow { size: grown } => size = size.max(*grown),
                Change::Settled { .. } => {}
            }
            overlay.push(record.sequence, record.change.clone());
        }
        if size < now.floor {
            return Err(VolumeError::Damaged(Damage::Truncated));
        }
        Ok(Self {
            header,
            mutable: now,
            size,
            flushed: now.floor,
            cuts: 0,
            unsealed: true,
            changes: 0,
            recovered: size > now.floor,
            mended: false,
            zeros: false,
            gaps: Gaps::unknown(),
            ino: storage::stat_fd(fd)?.st_ino,
            born: 0,
            newborn,
            opened: false,
            overlay,
            logged: 0,
            logged_in: 0,
            in_place: 0,
            in_place_flushed: 0,
            cut_in: None,
            leftovers: false,
        })
    }

    /// Looks at up to [`BLOCKS_AT_ONCE`] blocks from `first` on; calls `bad` with each that a read would refuse. Gives the
    /// block to go on with, or `None` at the end of the file.
    ///
    /// # Errors
    /// The ring's; the backing filesystem's.
    pub fn check_blocks(
        &self,
        volume: &Volume,
        fd: BorrowedFd<'_>,
        first: u64,
        mut bad: impl FnMut(u64, Damage),
    ) -> Result<Option<u64>, VolumeError> {
        let end = self.size.div_ceil(BLOCK).min(first.saturating_add(BLOCKS_AT_ONCE));
        // No larger than need be: most files are small, and wiping it takes its time.
        let mut plain = Zeroizing::new(vec![0; (end.saturating_sub(first) * BLOCK) as usize]);
        let mut at = first;
        while at < end {
            let wanted = ((end - at) * BLOCK) as usize;
            match self.read(volume, fd, at * BLOCK, &mut plain[..wanted]) {
                Ok(_) => break,
                Err(ReadError { error: VolumeError::Damaged(damage), block: Some(block) }) => {
                    bad(block, damage);
                    at = block.max(at) + 1;
                }
                Err(error) => return Err(error.error),
            }
        }
        Ok((end < self.size.div_ceil(BLOCK)).then_some(end))
    }
}

impl Copies {
    /// Writes those copies anew that do not open, from those that do.
    ///
    /// # Errors
    /// [`Damage::Header`] or [`Damage::MutableHeader`] where none does; the ring's; the backing filesystem's.
    pub fn write_anew(&self, volume: &Volume, fd: BorrowedFd<'_>) -> Result<(), VolumeError> {
        let header = self.header.as_ref().ok_or(VolumeError::Damaged(Damage::Header))?;
        let mutable = self.mutable.ok_or(VolumeError::Damaged(Damage::MutableHeader))?;
        keeping_times(fd, || {
            for n in (0..2).filter(|n| self.bad_static[*n]) {
                storage::write_at(fd, &header.bytes(), (n * STATIC_LEN) as u64).map_err(|(_, errno)| errno)?;
            }
            if self.bad_mutable {
                let next = Mutable { counter: mutable.counter + 1, ..mutable };
                let bytes = next.seal(volume.keys(), &header.dek, &volume.id())?;
                storage::write_at(fd, &bytes, MUTABLE_AT).map_err(|(_, errno)| errno)?;
            }
            Ok(())
        })
    }
}

impl FileState {
    /// A file of which what authenticates can be read, whatever its length should be. Zeros count where the header allows
    /// them; where there is none left to ask, anywhere.
    ///
    /// # Errors
    /// [`Damage::Header`] where there is no key.
    pub fn lenient(copies: Copies, size: u64, ino: u64) -> Result<Self, VolumeError> {
        let header = copies.header.ok_or(VolumeError::Damaged(Damage::Header))?;
        let nothing_known = Mutable { holes: true, ..Mutable::default() };
        let mutable = copies.mutable.unwrap_or(nothing_known);
        Ok(Self {
            header,
            mutable,
            size,
            flushed: 0,
            cuts: 0,
            unsealed: true,
            changes: 0,
            recovered: !mutable.sealed,
            mended: false,
            zeros: false,
            gaps: Gaps::unknown(),
            ino,
            born: 0,
            newborn: copies.newborn,
            opened: false,
            overlay: Overlay::new(size),
            logged: 0,
            logged_in: 0,
            in_place: 0,
            in_place_flushed: 0,
            cut_in: None,
            leftovers: false,
        })
    }
}
