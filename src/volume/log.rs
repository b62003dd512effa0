//! The intent log: what is about to happen to files, before it happens (docs/FORMAT.md section 12).
//!
//! Two files take turns. Records are written to the active one at once, so that they survive the daemon, and reach the
//! medium together ([`Log::flush`], group commit: whoever comes while a flush is under way waits for the next one, which is
//! then everybody's). When the active file is full, the caller makes everything before durable in its own place and
//! [`Log::retire`]s the other. A mount that changes nothing makes no log.
//!
//! Reading a log after a crash is [`read`]; what to do with it is [`replay`](super::replay).

mod record;

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

pub use record::{Change, Record, Subject};
use sha2::{Digest as _, Sha256};

use super::storage::{self, Errno};
use super::{VolumeError, format};
use crate::crypto::random;
use crate::keyring::Keyring;

/// The two files.
pub const NAMES: [&str; 2] = ["lethefs.log.0", "lethefs.log.1"];
/// When a file is full, in bytes. Bounds memory, too: what is logged and not yet in its place is kept there.
pub const FULL: u64 = 32 << 20;
/// What is beyond in a file was not written by us, in bytes.
pub const LONGEST: u64 = 2 * FULL;
/// Bytes that a file has from the beginning: more than the largest record.
const RESERVED: u64 = 5 << 18;
/// Bytes before the first record.
const HEADER: usize = 512;
const MAGIC: &[u8; 8] = b"LETHELOG";

struct Inner {
    /// Made with the first record.
    files: Option<[Arc<OwnedFd>; 2]>,
    active: usize,
    generation: u64,
    /// The other file's generation, while its records may still be needed.
    other: Option<u64>,
    /// Where the next record goes.
    at: u64,
    /// The record being made.
    buffer: Vec<u8>,
    next: u64,
    flushing: bool,
    /// There was no space for a record behind those that are there.
    short: bool,
    /// A flush failed: what is on the medium is not known any more.
    failed: Option<Errno>,
}

/// The log of a mounted volume.
pub struct Log {
    directory: Arc<OwnedFd>,
    inner: Mutex<Inner>,
    flushed_more: Condvar,
    flushed: AtomicU64,
    flushes: AtomicU64,
    kept: AtomicBool,
    scope: u32,
    version: u32,
    root: u64,
    full: u64,
}

impl Log {
    /// A log for the volume in this directory. Whatever an older one held must have been dealt with.
    ///
    /// # Errors
    /// The backing filesystem's.
    pub fn new(root: &Arc<OwnedFd>, keys: &Keyring) -> Result<Self, VolumeError> {
        Self::with_limit(root, keys, FULL)
    }

    /// With files that are full at `full` bytes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_limit(root: &Arc<OwnedFd>, keys: &Keyring, full: u64) -> Result<Self, VolumeError> {
        let (scope, version) = keys.current();
        // Rises over all mounts, as long as the clock does; within a mount it always does.
        let next = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
        let inner = Inner {
            files: None,
            active: 0,
            generation: next,
            other: None,
            at: HEADER as u64,
            buffer: Vec::new(),
            next: next + 1,
            flushing: false,
            short: false,
            failed: None,
        };
        Ok(Self {
            directory: root.clone(),
            inner: Mutex::new(inner),
            flushed_more: Condvar::new(),
            flushed: AtomicU64::new(next),
            flushes: AtomicU64::new(0),
            kept: AtomicBool::new(false),
            scope,
            version,
            root: storage::identity(root.as_fd())?,
            full,
        })
    }

    /// Makes both files anew.
    fn create(&self, generation: u64) -> Result<[Arc<OwnedFd>; 2], Errno> {
        let root = self.directory.as_fd();
        remove(root)?;
        let make = |name: &str, header: [u8; HEADER]| {
            let file = storage::create_file(root, name, 0o600)?;
            // So that a full disk leaves room for small changes. Where it cannot be, there is none.
            let _ = storage::allocate(file.as_fd(), RESERVED);
            storage::write_at(file.as_fd(), &header, 0).map_err(|(_, errno)| errno)?;
            Ok(Arc::new(file))
        };
        let made = make(NAMES[0], header(self.scope, self.version, generation, 0))
            .and_then(|first| Ok([first, make(NAMES[1], header(self.scope, self.version, 0, generation))?]));
        // Their names must be on the medium before anybody relies on what is in them.
        let made = made.and_then(|files| storage::sync_fd(root).map(|()| files));
        made.inspect_err(|_| {
            let _ = remove(root);
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume's backing root, for [`Subject`].
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Appends a record; it is on the medium once a [`flush`](Self::flush) of its sequence number returns.
    /// Gives that, and the generation it is in.
    ///
    /// # Errors
    /// The ring's; the backing filesystem's, a full disk among them: nothing was logged then.
    pub fn append(&self, keys: &Keyring, subject: &Subject, change: &Change) -> Result<(u64, u64), VolumeError> {
        let nonce = random::nonce().map_err(|_| Errno::IO)?;
        let mut inner = self.lock();
        if let Some(errno) = inner.failed {
            return Err(errno.into());
        }
        let sequence = inner.next;
        let generation = inner.generation;
        if inner.files.is_none() {
            inner.files = Some(self.create(generation)?);
        }
        let Some(file) = inner.files.as_ref().map(|files| files[inner.active].clone()) else {
            unreachable!("just made")
        };
        let numbers = (sequence, generation, self.flushed.load(Ordering::SeqCst));
        let Inner { buffer, at, next, .. } = &mut *inner;
        buffer.clear();
        keys.with_log_key(self.scope, self.version, |cipher| {
            record::encode(cipher, &nonce, numbers, subject, change, buffer);
        })?;
        // A record that fails is overwritten by the next one.
        if let Err((_, errno)) = storage::write_at(file.as_fd(), buffer, *at) {
            inner.short |= matches!(errno, Errno::NOSPC | Errno::DQUOT) && inner.at > HEADER as u64;
            return Err(errno.into());
        }
        *at += buffer.len() as u64;
        *next += 1;
        Ok((sequence, generation))
    }

    /// The last sequence number given out.
    pub fn end(&self) -> u64 {
        self.lock().next - 1
    }

    /// Everything up to this is on the medium.
    pub fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::SeqCst)
    }

    /// Flushes of the medium so far, for counting.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Returns when every record up to `sequence` is on the medium: one flush for all who wait.
    ///
    /// # Errors
    /// The backing filesystem's. The log is then of no more use.
    pub fn flush(&self, sequence: u64) -> Result<(), Errno> {
        let mut inner = self.lock();
        loop {
            if self.flushed() >= sequence {
                return Ok(());
            }
            if let Some(errno) = inner.failed {
                return Err(errno);
            }
            if inner.flushing {
                inner = self.flushed_more.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let target = inner.next - 1;
            let Some(file) = inner.files.as_ref().map(|files| files[inner.active].clone()) else {
                return Ok(());
            };
            inner.flushing = true;
            // Without the lock: others append meanwhile, for the next flush. A switch waits for `flushing`.
            drop(inner);
            let done = storage::sync_data(file.as_fd());
            self.flushes.fetch_add(1, Ordering::Relaxed);
            inner = self.lock();
            inner.flushing = false;
            match done {
                Ok(()) => {
                    self.flushed.fetch_max(target, Ordering::SeqCst);
                }
                Err(errno) => inner.failed = Some(errno),
            }
            self.flushed_more.notify_all();
        }
    }

    /// A flush of the backing filesystem failed, so what was put in place may be lost, and the kernel says so only once: from
    /// now on no record is given up, and the next mount replays them all.
    pub fn keep(&self) {
        self.kept.store(true, Ordering::SeqCst);
    }

    /// Whether there are records that must stay.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::SeqCst) && self.lock().files.is_some()
    }

    /// Whether it is time to [`switch`](Self::switch).
    pub fn is_full(&self) -> bool {
        let inner = self.lock();
        inner.at >= self.full
    }

    /// Whether a [`switch`](Self::switch) gives room that the backing filesystem does not: the active file could not grow, and
    /// the other has what it had from the beginning.
    pub fn is_short(&self) -> bool {
        self.lock().short
    }

    /// The generation of the active file.
    pub fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// The oldest generation whose records may still be replayed.
    pub fn oldest(&self) -> u64 {
        let inner = self.lock();
        inner.other.unwrap_or(inner.generation)
    }

    /// Makes the other file the active one, and gives the last sequence number of this one. All of it is on the medium then.
    ///
    /// # Errors
    /// The backing filesystem's; [`Errno::BUSY`] while the other file has not been retired.
    pub fn switch(&self) -> Result<u64, Errno> {
        let mut inner = self.lock();
        while inner.flushing {
            inner = self.flushed_more.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(errno) = inner.failed {
            return Err(errno);
        }
        if inner.other.is_some() {
            return Err(Errno::BUSY);
        }
        // With the lock held: nothing may be appended behind what this file's last flush covers.
        let last = inner.next - 1;
        let Some(files) = inner.files.clone() else { return Ok(last) };
        let flushed = storage::sync_data(files[inner.active].as_fd());
        self.flushes.fetch_add(1, Ordering::Relaxed);
        if let Err(errno) = flushed {
            inner.failed = Some(errno);
            self.flushed_more.notify_all();
            return Err(errno);
        }
        self.flushed.fetch_max(last, Ordering::SeqCst);
        let generation = last + 1;
        let next = 1 - inner.active;
        let header = header(self.scope, self.version, generation, 0);
        if let Err((_, errno)) = storage::write_at(files[next].as_fd(), &header, 0) {
            // No space, say: this file stays the active one, and it can be tried again.
            self.flushed_more.notify_all();
            return Err(errno);
        }
        inner.other = Some(inner.generation);
        inner.active = next;
        inner.generation = generation;
        inner.next = generation + 1;
        inner.at = HEADER as u64;
        inner.short = false;
        self.flushed_more.notify_all();
        Ok(last)
    }

    /// The records of the file that is not active are all in their places, durably: none of them counts any more.
    ///
    /// # Errors
    /// The backing filesystem's; [`Errno::IO`] after [`keep`](Self::keep).
    pub fn retire(&self) -> Result<(), Errno> {
        if self.kept.load(Ordering::SeqCst) {
            return Err(Errno::IO);
        }
        let (files, active, generation) = {
            let inner = self.lock();
            (inner.files.clone(), inner.active, inner.generation)
        };
        let Some(file) = files.as_ref().map(|files| &files[1 - active]) else { return Ok(()) };
        storage::write_at(file.as_fd(), &header(self.scope, self.version, 0, generation), 0).map_err(|(_, e)| e)?;
        storage::sync_data(file.as_fd())?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.lock().other = None;
        Ok(())
    }
}

/// Removes the log of a volume that needs none any more.
///
/// # Errors
/// The backing filesystem's.
pub fn remove(root: BorrowedFd<'_>) -> Result<(), Errno> {
    for name in NAMES {
        match storage::unlink(root, name) {
            Ok(()) | Err(Errno::NOENT) => {}
            // Said before anybody looks whether there is one.
            Err(Errno::ROFS) if storage::stat(root, name).is_err_and(|errno| errno == Errno::NOENT) => {}
            // A directory that somebody planted: out of the way, and there to be looked at.
            Err(Errno::ISDIR | Errno::PERM) => {
                let aside = format::temporary_name().map_err(|_| Errno::IO)?;
                storage::rename(root, name, root, &*aside, storage::RenameFlags::empty())?;
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// A log file's header. Not authenticated: a record speaks for itself. Records of a generation below `void` do not count.
fn header(scope: u32, version: u32, generation: u64, void: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&format::FORMAT.to_le_bytes());
    bytes[12..16].copy_from_slice(&scope.to_le_bytes());
    bytes[16..20].copy_from_slice(&version.to_le_bytes());
    bytes[24..32].copy_from_slice(&generation.to_le_bytes());
    bytes[32..40].copy_from_slice(&void.to_le_bytes());
    let check = check(&bytes);
    bytes[40..56].copy_from_slice(&check);
    bytes
}

/// Against damage, not against an attacker, who can as well remove the log.
fn check(header: &[u8]) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(&header[..40]).into();
    digest.first_chunk().copied().unwrap_or_default()
}

/// What a crash left.
#[derive(Debug, Default)]
pub struct Found {
    /// A log file is there at all.
    pub any: bool,
    /// Authentic records that count, in order. After a gap in what was never flushed there are none.
    pub records: Vec<Record>,
    /// Records that were on the medium once and do not open, or are not there.
    pub lost: u64,
}

/// Reads both files.
///
/// # Errors
/// The ring's being sealed; the backing filesystem's.
pub fn read(root: BorrowedFd<'_>, keys: &Keyring) -> Result<Found, VolumeError> {
    let mut found = Found::default();
    let mut first = None;
    for name in NAMES {
        let file = match storage::open_file(root, name, false) {
            Err(Errno::NOENT) => continue,
            // Not a file of ours: somebody put it there.
            Err(Errno::LOOP | Errno::NXIO | Errno::ACCESS | Errno::PERM) => {
                found.any = true;
                found.lost += 1;
                continue;
            }
            other => other?,
        };
        found.any = true;
        let len = storage::stat_fd(file.as_fd())?.st_size as u64;
        // Bounded: what is beyond was not written by us.
        let mut bytes = vec![0; len.min(LONGEST) as usize];
        let got = storage::read_at(file.as_fd(), &mut bytes, 0)?;
        bytes.truncate(got);
        let whole = |header: &&[u8]| header[..8] == *MAGIC && header[40..56] == check(header);
        let (generation, void, version) = match bytes.get(..HEADER).filter(whole) {
            Some(header) => {
                let number = |at: usize| header[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
                let word = |at: usize| header[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
                (number(24), number(32), Some((word(12), word(16))))
            }
            // Damaged: the records may be whole.
            None => (0, 0, None),
        };
        let held = keys.held();
        if version.is_some_and(|version| !held.contains(&version)) && void == 0 {
            // All that we can say of them is that they are there.
            found.lost += 1;
        }
        if void == 0 && generation > 0 {
            first = Some(first.map_or(generation, |known: u64| known.min(generation)));
        }
        for (scope, version) in held {
            let records = keys.with_log_key(scope, version, |cipher| scan(cipher, &bytes));
            let records = match records {
                Err(crate::keyring::KeyringError::NoSuchKek { .. }) => continue,
                other => other?,
            };
            // Leftovers of an earlier filling of the same file count as little as retired ones.
            let least = void.max(generation);
            found.records.extend(records.into_iter().filter(|record| record.generation >= least));
        }
    }
    found.records.sort_by_key(|record| record.sequence);
    found.records.dedup_by_key(|record| record.sequence);
    let flushed = found.records.iter().map(|record| record.flushed).max().unwrap_or(0);
    // A generation number is a sequence number without a record.
    let mut expected =
        first.or(found.records.first().map(|record| record.generation)).map_or(1, |start| start.saturating_add(1));
    let mut whole = found.records.len();
    let mut lost = 0;
    for (n, record) in found.records.iter().enumerate() {
        if record.generation.saturating_add(1) == record.sequence {
            // The first of its filling: the number before it is the generation's own.
            expected += u64::from(expected == record.generation);
        }
        if record.sequence > expected && record.sequence > 0 {
            if expected <= flushed {
                lost += record.sequence.min(flushed.saturating_add(1)).saturating_sub(expected);
            }
            if record.sequence - 1 > flushed {
                // Something before it is missing that was never flushed: as if this one had not been written either.
                whole = n;
                break;
            }
        }
        expected = record.sequence.saturating_add(1);
    }
    found.lost += lost;
    found.records.truncate(whole);
    Ok(found)
}

/// All authentic records. Heads that lead nowhere may cost only so much: somebody may have planted a file full of them.
fn scan(cipher: &crate::crypto::aead::Cipher, bytes: &[u8]) -> Vec<Record> {
    let (mut records, mut at, mut patience) = (Vec::new(), HEADER, 16 * FULL);
    while at < bytes.len() && patience > 0 {
        match record::decode(cipher, &bytes[at..]) {
            Some((record, len)) => {
                records.push(record);
                at += len;
            }
            None => {
                patience = patience.saturating_sub(record::claimed_len(&bytes[at..]) as u64);
                at += record::ALIGN;
            }
        }
    }
    records
}

#[cfg(test)]
mod tests;
