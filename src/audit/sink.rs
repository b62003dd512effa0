//! Appending: one chain from any number of threads and processes, and what to do when the last write was cut short.
//!
//! A record is one write(2) in append mode under flock(2), to the file that has the name at that moment. What stands at the end and is no
//! record is never taken away: a `recovered` record after it says how long it is and what its hash. A log that cannot be
//! written stops nobody: what was lost is counted, and recorded when it can be.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::event::{Event, Peer};
use super::record::{self, Head, MAX_LINE, decode, encode, genesis, sha256};
use crate::crypto::VolumeId;
use crate::crypto::ids::hex;

/// A file of this size is full: it gets a number, and the chain goes on in a new one. Some 15,000 records.
pub(super) const FULL: u64 = 8 << 20;
/// How long an append waits for others. A seal must not wait for a process that was stopped with the lock in its hand.
const PATIENCE: Duration = Duration::from_secs(2);
/// A complaint about an unwritable log goes to the program's log this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// Name of a volume's log in its directory.
pub fn file_name(volume: VolumeId) -> String {
    format!("{volume}.jsonl")
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a verb that promises the record first must look"]
pub enum Recorded {
    /// It has this number, and is on the medium if its event is [durable](Event::durable).
    As(u64),
    /// It is lost; a later record will say how many were.
    Lost,
}

/// One volume's audit log. Shared by `Arc`; any thread may record. No file stays open.
pub struct Sink {
    dir: PathBuf,
    volume: VolumeId,
    full: u64,
    state: Mutex<State>,
    /// Lost while another thread hung in the filesystem with the state in its hand.
    late: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Held, so that a mount over this directory does not take it away from the daemon that serves the mount.
    dir: Option<OwnedFd>,
    seen: Option<Seen>,
    lost: Option<Lost>,
    complained: Option<Instant>,
}

impl State {
    fn lose(&mut self, count: u64, why: &str) {
        let lost = self.lost.get_or_insert_with(|| Lost { count: 0, since: record::now(), why: why.to_owned() });
        lost.count += count;
    }
}

/// Where this process's last append ended. If the file still ends there, nobody else wrote.
struct Seen {
    inode: (u64, u64),
    end: u64,
    head: Head,
}

struct Lost {
    count: u64,
    since: String,
    why: String,
}

/// What stands at the end of a file.
struct Tail {
    head: Head,
    /// Bytes after the last record.
    rest: Vec<u8>,
}

impl Sink {
    /// The log of `volume` in `dir`, which is made (0700) if it is not there. Never fails: a log that cannot be opened is one that
    /// loses records.
    pub fn open(dir: &Path, volume: VolumeId) -> Self {
        Self::with_limit(dir, volume, FULL)
    }

    pub(super) fn with_limit(dir: &Path, volume: VolumeId, full: u64) -> Self {
        let state = State { dir: open_dir(dir).ok(), ..State::default() };
        Self { dir: dir.to_owned(), volume, full, state: Mutex::new(state), late: AtomicU64::new(0) }
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// The file that records go to.
    pub fn path(&self) -> PathBuf {
        self.dir.join(file_name(self.volume))
    }

    /// Records an event of this process's own doing.
    pub fn record(&self, event: Event) -> Recorded {
        self.append(None, &event)
    }

    /// Records an event that somebody asked for through a control socket.
    pub fn record_for(&self, peer: Peer, event: Event) -> Recorded {
        self.append(Some(peer), &event)
    }

    /// Events that are lost so far and not yet recorded as such.
    pub fn lost(&self) -> u64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.lost.as_ref().map_or(0, |lost| lost.count) + self.late.load(Ordering::Relaxed)
    }

    fn append(&self, peer: Option<Peer>, event: &Event) -> Recorded {
        let until = Instant::now() + PATIENCE;
        let state = patiently(until, || match self.state.try_lock() {
            Ok(state) => Ok(state),
            Err(TryLockError::Poisoned(state)) => Ok(state.into_inner()),
            Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
        });
        let Ok(mut state) = state else {
            self.late.fetch_add(1, Ordering::Relaxed);
            tracing::error!("the audit log hangs in the filesystem: an event was not recorded");
            return Recorded::Lost;
        };
        let late = self.late.swap(0, Ordering::Relaxed);
        if late > 0 {
            state.lose(late, "the filesystem hung");
        }
        match self.try_append(&mut state, peer, event, until) {
            Ok(seq) => Recorded::As(seq),
            Err(error) => self.failed(&mut state, &error),
        }
    }

    fn failed(&self, state: &mut State, error: &io::Error) -> Recorded {
        state.seen = None;
        state.lose(1, &error.to_string());
        if state.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            let lost = state.lost.as_ref().map_or(0, |lost| lost.count);
            state.complained = Some(Instant::now());
            tracing::error!(%error, path = %self.path().display(), lost, "the audit log cannot be written: events are lost");
        }
        Recorded::Lost
    }

    fn try_append(&self, state: &mut State, peer: Option<Peer>, event: &Event, until: Instant) -> io::Result<u64> {
        if state.dir.is_none() {
            // Not for what comes from a thread that serves the mount: the path might lead into that very mount.
            if !event.durable() {
                return Err(io::Error::other("its directory could not be opened"));
            }
            state.dir = Some(open_dir(&self.dir)?);
        }
        let Some(dir) = state.dir.as_ref() else { return Err(io::ErrorKind::NotFound.into()) };
        let name = file_name(self.volume);
        let (mut file, size, inode) = loop {
            let file = open_file(dir, &name)?;
            patiently(until, || {
                rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from)
            })?;
            let meta = file.metadata()?;
            let inode = (meta.dev(), meta.ino());
            // Somebody may have given it a number while we waited.
            match rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(there) if (there.st_dev, there.st_ino) == inode => {}
                Ok(_) | Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno.into()),
            }
            // A torn end is seen to first: nobody would write behind it any more.
            if meta.size() < self.full || !tail(&file, self.volume, genesis(self.volume))?.rest.is_empty() {
                break (file, meta.size(), inode);
            }
            let numbered = format!("{name}.{}", last_number(dir, &name)? + 1);
            rustix::fs::renameat_with(dir, &name, dir, &numbered, rustix::fs::RenameFlags::NOREPLACE)?;
        };

        let mut buffer = Vec::new();
        let mut push = |head: &mut Head, peer, event: &Event| {
            let (line, next) = encode(*head, self.volume, peer, event);
            buffer.extend_from_slice(&line);
            *head = next;
        };
        let mut head;
        let mut start = Vec::new();
        match &state.seen {
            Some(seen) if seen.inode == inode && seen.end == size => head = seen.head,
            _ if size == 0 => {
                let (before, from) = self.before(dir, &name)?;
                head = before;
                if let Some(from) = from {
                    push(&mut head, None, &Event::Continued { from });
                }
            }
            _ => {
                let tail = tail(&file, self.volume, genesis(self.volume))?;
                // Without a single record: what goes on here began in another file.
                head = if tail.head.seq == 0 { self.before(dir, &name)?.0 } else { tail.head };
                if !tail.rest.is_empty() {
                    let (begin, event) = recover(&mut head, tail.rest);
                    start = begin;
                    push(&mut head, None, &event);
                }
            }
        }
        if let Some(Lost { count, since, why }) = &state.lost {
            push(&mut head, None, &Event::Lost { count: *count, since: since.clone(), why: why.clone() });
        }
        push(&mut head, peer, event);
        start.append(&mut buffer);

        let written = loop {
            match file.write(&start) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => break done?,
            }
        };
        if written != start.len() {
            // What is there of it stays; the next append marks it.
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the record was written only in part"));
        }
        if event.durable() {
            file.sync_all()?;
            if size == 0 {
                rustix::fs::fsync(dir)?;
            }
        }
        state.lost = None;
        state.seen = Some(Seen { inode, end: size + start.len() as u64, head });
        Ok(head.seq)
    }

    /// What a new file goes on from, and the full file that holds it, if there is one.
    fn before(&self, dir: &OwnedFd, name: &str) -> io::Result<(Head, Option<String>)> {
        let start = genesis(self.volume);
        let number = last_number(dir, name)?;
        if number == 0 {
            return Ok((start, None));
        }
        let from = format!("{name}.{number}");
        let file = File::from(rustix::fs::openat(dir, &from, read_flags(), Mode::empty())?);
        Ok((tail(&file, self.volume, start)?.head, Some(from)))
    }
}

/// Ends what stands at the end of a file, so that a record can follow: the bytes to write first, and the event to record.
fn recover(head: &mut Head, mut rest: Vec<u8>) -> (Vec<u8>, Event) {
    let mut begin = Vec::new();
    if rest.last() != Some(&b'\n') {
        begin.push(b'\n');
        rest.push(b'\n');
    }
    let event = |kind, of: &[u8]| Event::Recovered { kind, bytes: of.len() as u64, sha256: hex(&sha256(of)) };
    // What lacked only its end counts: a record alone, or one that marks what stands before it.
    let at = rest[..rest.len() - 1].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    if let Some((record, next)) = decode(&rest[at..])
        && record.seq == head.seq + 1
        && record.prev == hex(&head.hash)
        && (at == 0 || record.event == "recovered")
    {
        *head = next;
        return (begin, event("completed", &rest[at..]));
    }
    // A write that was cut short never has a whole record's form.
    let damaged = rest.split_inclusive(|byte| *byte == b'\n').any(record::is_shaped);
    (begin, event(if damaged { "damaged" } else { "torn" }, &rest))
}

/// The last record of a file, and what comes after it. `start`: where the chain begins if there is none.
fn tail(mut file: &File, volume: VolumeId, start: Head) -> io::Result<Tail> {
    let size = file.metadata()?.size();
    let near = size.min(2 * MAX_LINE as u64);
    for length in [near, size] {
        let mut bytes = vec![0; length as usize];
        file.seek(SeekFrom::Start(size - length))?;
        file.read_exact(&mut bytes)?;
        let mut end = bytes.len();
        // The first line is looked at only where it is whole.
        let whole =
            if length == size { 0 } else { bytes.iter().position(|byte| *byte == b'\n').map_or(end, |at| at + 1) };
        while end > whole {
            let begin = bytes[..end - 1].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1).max(whole);
            if let Some((record, head)) = decode(&bytes[begin..end])
                && record.volume == volume
            {
                return Ok(Tail { head, rest: bytes.split_off(end) });
            }
            end = begin;
        }
        if length == size {
            return Ok(Tail { head: start, rest: bytes });
        }
    }
    Ok(Tail { head: start, rest: Vec::new() })
}

fn open_dir(dir: &Path) -> io::Result<OwnedFd> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let fd =
        rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = rustix::fs::fstat(&fd)?;
    let own = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
    if !own || stat.st_mode & 0o022 != 0 {
        let line = format!("{} must be a directory of yours or root's that nobody else can write", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, line));
    }
    Ok(fd)
}

fn read_flags() -> OFlags {
    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC
}

fn open_file(dir: impl AsFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?);
    let meta = file.metadata()?;
    let own = meta.uid() == 0 || meta.uid() == rustix::process::geteuid().as_raw();
    if !meta.is_file() || !own || meta.mode() & 0o022 != 0 {
        let line = format!("{name} must be a regular file of yours or root's that nobody else can write");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, line));
    }
    Ok(file)
}

/// The highest number that a full file has; 0 if there is none.
fn last_number(dir: impl AsFd, name: &str) -> io::Result<u64> {
    let mut last = 0;
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let number = entry.file_name().to_str().ok().and_then(|entry| super::verify::number_of(entry, name));
        last = last.max(number.unwrap_or(0));
    }
    Ok(last)
}

/// Tries again while it would block, until then.
fn patiently<T>(until: Instant, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "another process holds its lock"));
            }
            done => return done,
        }
    }
}
