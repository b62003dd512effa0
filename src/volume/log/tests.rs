//! The log's two files: what is read back, and what damage costs.

use super::*;
use crate::crypto::ObjectId;
use crate::volume::Volume;

struct Fixture {
    dir: tempfile::TempDir,
    volume: Volume,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let volume = crate::volume::testing::volume(dir.path());
    Fixture { dir, volume }
}

impl Fixture {
    fn log(&self, full: u64) -> Log {
        Log::with_limit(self.volume.root(), self.volume.keys(), full).unwrap()
    }

    fn read(&self) -> Found {
        read(self.volume.root().as_fd(), self.volume.keys()).unwrap()
    }

    fn append(&self, log: &Log, n: u64) -> u64 {
        let subject = Subject { object: ObjectId([n as u8; 16]), ino: n, born: 0, root: log.root(), low: 0, opened: 0 };
        log.append(self.volume.keys(), &subject, &Change::Grow { size: n }).unwrap().0
    }
}

fn sizes(found: &Found) -> Vec<u64> {
    found
        .records
        .iter()
        .map(|record| match record.change {
            Change::Grow { size } => size,
            _ => panic!("{record:?}"),
        })
        .collect()
}

#[test]
fn what_is_appended_is_read_over_switches() {
    let f = fixture();
    assert!(!f.read().any);
    let log = f.log(FULL);
    assert!(!f.read().any, "nothing was logged yet");
    for n in 0..5 {
        f.append(&log, n);
    }
    log.flush(log.end()).unwrap();
    let flushes = log.flushes();
    log.flush(log.end()).unwrap();
    assert_eq!(log.flushes(), flushes, "nothing to flush");
    log.switch().unwrap();
    assert_eq!(log.switch(), Err(Errno::BUSY));
    f.append(&log, 5);
    log.flush(log.end()).unwrap();
    assert_eq!(sizes(&f.read()), [0, 1, 2, 3, 4, 5]);
    assert_eq!(f.read().lost, 0);
    log.retire().unwrap();
    assert_eq!(sizes(&f.read()), [5]);
    log.switch().unwrap();
    f.append(&log, 6);
    log.flush(log.end()).unwrap();
    // The file's earlier records lie behind the new one and do not count.
    assert_eq!((sizes(&f.read()), f.read().lost), (vec![5, 6], 0));
    remove(f.volume.root().as_fd()).unwrap();
    assert!(!f.read().any);
}

/// Each record damaged in turn: the others are still read, and the loss is counted if it had been flushed.
#[test]
fn a_damaged_record_is_counted_and_the_others_are_read() {
    let f = fixture();
    let log = f.log(FULL);
    for n in 0..4 {
        f.append(&log, n);
    }
    log.flush(log.end()).unwrap();
    f.append(&log, 4); // says that the four were flushed
    log.flush(log.end()).unwrap();
    let path = f.dir.path().join(NAMES[0]);
    let whole = std::fs::read(&path).unwrap();
    for n in 0..4_usize {
        let mut damaged = whole.clone();
        damaged[HEADER + 512 * n + 60] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        let found = f.read();
        let expected: Vec<u64> = (0..5).filter(|m| *m != n as u64).collect();
        assert_eq!((sizes(&found), found.lost), (expected, 1), "record {n}");
    }
    // The file's own header gone: the records speak for themselves.
    let mut damaged = whole.clone();
    damaged[..HEADER].fill(0);
    std::fs::write(&path, &damaged).unwrap();
    assert_eq!(sizes(&f.read()), [0, 1, 2, 3, 4]);
    // Cut off in the middle of what was flushed, and of what was not.
    std::fs::write(&path, &whole[..HEADER + 512 * 2 + 100]).unwrap();
    assert_eq!(sizes(&f.read()), [0, 1]);
}

/// What was never flushed counts up to the first gap: what comes after may build on what is missing.
#[test]
fn after_a_gap_in_what_was_not_flushed_nothing_counts() {
    let f = fixture();
    let log = f.log(FULL);
    for n in 0..2 {
        f.append(&log, n);
    }
    log.flush(log.end()).unwrap();
    for n in 2..6 {
        f.append(&log, n);
    }
    log.flush(log.end()).unwrap();
    let path = f.dir.path().join(NAMES[0]);
    let mut damaged = std::fs::read(&path).unwrap();
    damaged[HEADER + 512 * 3 + 60] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    assert_eq!((sizes(&f.read()), f.read().lost), (vec![0, 1, 2], 0));
}

/// Everybody who logged while a flush was under way waits for the next one, and that one is enough for all of them.
#[test]
fn flushes_are_shared() {
    let f = fixture();
    let log = f.log(FULL);
    f.append(&log, 0);
    log.flush(log.end()).unwrap();
    let before = log.flushes();
    // A flush that began before any of the records below, and takes its time.
    log.lock().flushing = true;
    let logged = std::sync::Barrier::new(9);
    std::thread::scope(|scope| {
        for n in 1..9 {
            let (f, log, logged) = (&f, &log, &logged);
            scope.spawn(move || {
                let sequence = f.append(log, n);
                logged.wait();
                log.flush(sequence).unwrap();
                assert!(log.flushed() >= sequence);
            });
        }
        logged.wait();
        assert_eq!(log.flushes(), before, "nobody flushes beside it");
        log.lock().flushing = false;
        log.flushed_more.notify_all();
    });
    assert_eq!(log.flushes(), before + 1);
}

/// Many threads, each waiting for its own record.
#[test]
fn many_wait_for_their_own_records() {
    let f = fixture();
    let log = f.log(FULL);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (f, log) = (&f, &log);
            scope.spawn(move || {
                for n in 0..50 {
                    let sequence = f.append(log, thread * 100 + n);
                    log.flush(sequence).unwrap();
                    assert!(log.flushed() >= sequence);
                }
            });
        }
    });
    let found = f.read();
    assert_eq!((found.records.len(), found.lost), (400, 0));
}

/// What somebody may put in a log's place: nothing of it hangs, panics or lasts.
#[test]
fn planted_logs() {
    let f = fixture();
    let path = f.dir.path().join(NAMES[0]);
    let mut greatest = vec![0; HEADER + 512];
    greatest[..HEADER].copy_from_slice(&header(0, 1, u64::MAX, 0));
    let mut heads = vec![0; 8 << 20];
    for at in (HEADER..heads.len()).step_by(512) {
        heads[at..at + 8].copy_from_slice(b"LETHEREC");
        heads[at + 144..at + 148].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    }
    for bytes in [Vec::new(), vec![0xff; 100], greatest, header(7, 9, 1, 0).to_vec(), heads] {
        std::fs::write(&path, &bytes).unwrap();
        assert!(f.read().records.is_empty());
    }
    remove(f.volume.root().as_fd()).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert_eq!((f.read().any, f.read().lost), (true, 1));
    remove(f.volume.root().as_fd()).unwrap();
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("in it"), b"").unwrap();
    assert_eq!(f.read().lost, 1);
    remove(f.volume.root().as_fd()).unwrap();
    assert!(!f.read().any);
    f.log(FULL);
}
