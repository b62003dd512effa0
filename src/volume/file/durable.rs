//! What a file's header promises, and what makes it true: the intent log, flushes, the seal.

use super::*;

/// How many headers written one after the other may all be lost to a power cut: each flush of the file brings the last one
/// to the medium, and between two flushes there are no more than a few.
const UNFLUSHED_HEADERS: u64 = 16;

impl FileState {
    /// Before a change: the header must no longer promise what is about to end. Without a log only growth ends anything.
    pub(super) fn open_for_changes(
        &mut self,
        volume: &Volume,
        fd: BorrowedFd<'_>,
        grows: bool,
        holes: bool,
    ) -> Result<(), ReadError> {
        let logged = volume.log().is_some();
        let unseals = if logged { !self.opened } else { grows && self.mutable.sealed };
        if unseals || (holes && !self.mutable.holes) {
            let holes = holes || self.mutable.holes;
            let next = Mutable { sealed: false, holes, opened: self.opening(volume), ..self.mutable };
            self.write_header(volume, fd, next)?;
            if unseals && !logged {
                // Durably: a power cut that kept the growth but not the header would make the whole file unreadable.
                storage::sync_data(fd)?;
            }
        }
        self.opened = true;
        Ok(())
    }

    /// What the next header says of the header before the changes.
    pub(super) fn opening(&self, volume: &Volume) -> u64 {
        if self.opened || volume.log().is_none() { self.mutable.opened } else { self.mutable.counter }
    }

    /// Logs a change, which is done once its record is on the medium. Gives the log's generation.
    pub(super) fn log(&mut self, volume: &Volume, change: Change) -> Result<u64, VolumeError> {
        let Some(log) = volume.log() else { unreachable!("the caller asked") };
        let subject = Subject {
            object: self.dek().object(),
            ino: self.ino,
            born: self.born,
            root: log.root(),
            low: self.mutable.opened.saturating_sub(UNFLUSHED_HEADERS),
            opened: self.mutable.opened,
        };
        let (sequence, generation) = log.append(volume.keys(), &subject, &change)?;
        self.overlay.push(sequence, change);
        (self.logged, self.logged_in) = (sequence, generation);
        Ok(generation)
    }

    /// Does what was logged and is on the medium by now. Says whether all of it is done.
    ///
    /// # Errors
    /// The backing filesystem's; [`Errno::STALE`] if this is another file. What could not be done stays pending, and readable.
    pub fn apply(&mut self, fd: BorrowedFd<'_>, flushed: u64) -> Result<bool, Errno> {
        if !self.overlay.is_empty() {
            // Reached by its name, which somebody may have given to another file meanwhile.
            if storage::stat_fd(fd)?.st_ino != self.ino {
                return Err(Errno::STALE);
            }
            keeping_times(fd, || Ok(self.overlay.apply(fd, flushed)?)).map_err(|error| match error {
                VolumeError::Backing(errno) => errno,
                _ => Errno::IO,
            })?;
        }
        Ok(self.overlay.is_empty())
    }

    /// The last record that is pending.
    pub fn pending(&self) -> Option<u64> {
        self.overlay.last()
    }

    /// Before anything is written: a header that is only in the attribute of the file's birth comes first.
    pub(in crate::volume) fn be_born(&mut self, volume: &Volume, fd: BorrowedFd<'_>) -> Result<(), VolumeError> {
        if self.newborn {
            write_header_anew(volume, fd, &self.header, self.mutable)?;
            self.newborn = false;
            self.in_place += 1;
        }
        Ok(())
    }

    pub(super) fn touch(&mut self) {
        self.unsealed = true;
        self.changes += 1;
    }

    pub(super) fn write_header(
        &mut self,
        volume: &Volume,
        fd: BorrowedFd<'_>,
        next: Mutable,
    ) -> Result<(), VolumeError> {
        self.write_header_by(volume, fd, next, false)
    }

    pub(super) fn write_header_by(
        &mut self,
        volume: &Volume,
        fd: BorrowedFd<'_>,
        next: Mutable,
        logged: bool,
    ) -> Result<(), VolumeError> {
        self.be_born(volume, fd)?;
        let next = Mutable { counter: self.mutable.counter + 1, ..next };
        let bytes = next.seal(volume.keys(), self.dek(), &volume.id())?;
        // One sector, written as a whole: in place where nothing it depends on is pending.
        if volume.log().is_none() || (self.opened && self.overlay.is_empty() && !logged) {
            storage::write_at(fd, &bytes, MUTABLE_AT).map_err(|(_, errno)| errno)?;
            self.mutable = next;
            return Ok(());
        }
        let before = std::mem::replace(&mut self.mutable, next);
        self.log(volume, Change::Header(bytes)).inspect_err(|_| self.mutable = before)?;
        Ok(())
    }

    /// Begins an fsync: raises the floor to what an *earlier* flush covered, and says what to flush.
    /// Then the caller flushes, without this lock, and calls [`flushed`](Self::flushed).
    ///
    /// # Errors
    /// The ring's or the backing filesystem's.
    pub fn flushing(&mut self, volume: &Volume, fd: BorrowedFd<'_>) -> Result<FlushMark, VolumeError> {
        let whole = self.overlay.is_empty();
        // Of a recovered file a floor would vouch for what nobody has looked at: it is mended and sealed once it is quiet.
        if self.flushed > self.mutable.floor && whole && self.opened && !self.recovered {
            let floor = self.flushed;
            let next = Mutable { size: self.size, floor, sealed: false, ..self.mutable };
            keeping_times(fd, || self.write_header(volume, fd, next))?;
        }
        let in_place = self.in_place > self.in_place_flushed || volume.log().is_none();
        // Replayed, such a record would undo what is about to be flushed in place.
        let cut = self.cut_in.is_some_and(|generation| volume.log().is_some_and(|log| generation >= log.oldest()));
        Ok(FlushMark {
            log: self.logged,
            in_place,
            applies: in_place && (cut || self.overlay.zeros() > 0),
            settles: in_place && cut,
            size: self.size,
            cuts: self.cuts,
            writes: self.in_place,
            whole,
        })
    }

    /// A flush that began at `mark` has completed. Gives a record that has to be on the medium, too, before anything is
    /// promised.
    ///
    /// # Errors
    /// The ring's; an earlier failure of the log.
    pub fn flushed(&mut self, volume: &Volume, mark: FlushMark) -> Result<Option<u64>, VolumeError> {
        if mark.cuts == self.cuts && mark.whole && mark.in_place {
            self.flushed = self.flushed.max(mark.size);
        }
        let mut settled = None;
        if mark.settles {
            self.log(volume, Change::Settled { until: mark.log })?;
            settled = Some(self.logged);
            if mark.cuts == self.cuts {
                self.cut_in = None;
            }
        }
        // Last: if the record could not be made, the next fsync has to try again.
        if mark.in_place {
            self.in_place_flushed = self.in_place_flushed.max(mark.writes);
        }
        Ok(settled)
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
        if !self.overlay.is_empty() || self.newborn || (self.recovered && !self.mended) {
            return Err(Errno::BUSY.into());
        }
        if self.leftovers {
            // To be cut off, and that flushed, before the size is vouched for.
            return Err(Errno::BUSY.into());
        }
        if self.cut_in.is_some() && volume.log().is_some() {
            // Replayed, the cut would take what was flushed after it, should this header not get there. Whoever asks for a
            // flush next waits for this record.
            let until = self.logged;
            self.log(volume, Change::Settled { until })?;
            self.cut_in = None;
        }
        // In place: everything that it promises has been flushed.
        self.opened = true;
        let size = self.size;
        let holes = (self.mutable.holes && !self.gaps.is_none()) || self.zeros;
        let next = Mutable { size, floor: size, sealed: true, holes, ..self.mutable };
        keeping_times(fd, || self.write_header(volume, fd, next))?;
        // Of no more use; and no way back to an empty file for whoever zeroes the header.
        let _ = storage::remove_xattr_fd(fd, format::BIRTH);
        self.flushed = size;
        self.unsealed = false;
        self.opened = false;
        self.in_place_flushed = self.in_place;
        (self.recovered, self.mended, self.zeros) = (false, false, false);
        Ok(())
    }
}
