//! A file by way of the intent log, and the daemon's death at any moment: what is in the page cache stays, the memory goes.
//! A model says what must be there afterwards.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::volume::{log, replay};

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(entry.path()).unwrap(), to).unwrap();
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

struct Fixture {
    volume: Volume,
    dir: tempfile::TempDir,
    fd: OwnedFd,
    state: FileState,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut volume = crate::volume::testing::volume(dir.path());
        volume.begin_log().unwrap();
        let fd = storage::create_file(volume.root().as_fd(), "f", 0o600).unwrap();
        let state = FileState::create(&volume, fd.as_fd()).unwrap();
        Self { volume, dir, fd, state }
    }

    fn log(&self) -> &log::Log {
        self.volume.log().unwrap()
    }

    /// What an fsync does (fs/data.rs).
    fn fsync(&mut self) {
        let Self { volume, fd, state, .. } = self;
        let log = volume.log().unwrap();
        let mark = state.flushing(volume, fd.as_fd()).unwrap();
        log.flush(mark.log).unwrap();
        if mark.settles {
            state.apply(fd.as_fd(), log.flushed()).unwrap();
        }
        if let Some(record) = state.flushed(volume, mark).unwrap() {
            log.flush(record).unwrap();
        }
    }

    fn apply(&mut self, upto: u64) {
        self.state.apply(self.fd.as_fd(), upto).unwrap();
    }

    /// What the sealer does (fs/core.rs).
    fn seal(&mut self) {
        let end = self.log().end();
        self.log().flush(end).unwrap();
        self.apply(end);
        self.state.seal(&self.volume, self.fd.as_fd()).unwrap();
    }

    /// Makes room in the log (fs/core.rs).
    fn checkpoint(&mut self) {
        let last = self.log().switch().unwrap();
        self.apply(last);
        self.log().retire().unwrap();
    }

    /// Everything in memory is gone; a new mount begins.
    fn die(&mut self) -> replay::Replayed {
        self.volume.end_of_log_for_tests();
        let done = replay::replay(&self.volume).unwrap();
        self.volume.begin_log().unwrap();
        self.state = FileState::load(&self.volume, self.fd.as_fd()).unwrap();
        done
    }

    fn contents(&self) -> Vec<u8> {
        let mut out = vec![0; self.state.size() as usize + 10];
        let n = self.state.read(&self.volume, self.fd.as_fd(), 0, &mut out).unwrap();
        out.truncate(n);
        out
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, usize, u8),
    Resize(u64),
    Fsync,
    Apply,
    Flush,
    Seal,
    Checkpoint,
    Die,
}

fn op() -> impl Strategy<Value = Op> {
    let near = prop_oneof![0..20_000_u64, Just(0), Just(4096), Just(8192), Just(12_288)];
    prop_oneof![
        5 => (near.clone(), 1..9000_usize, 1..=255_u8).prop_map(|(at, len, byte)| Op::Write(at, len, byte)),
        2 => near.prop_map(Op::Resize),
        2 => Just(Op::Fsync),
        1 => Just(Op::Flush),
        2 => Just(Op::Apply),
        1 => Just(Op::Seal),
        1 => Just(Op::Checkpoint),
        2 => Just(Op::Die),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    /// kill -9: whatever was written out by the kernel is there again, synced or not. Records still in the log's buffer are
    /// not: after a death the file is as it was at some moment since the last one that counts as synced.
    #[test]
    fn a_death_leaves_a_state_between_the_last_fsync_and_the_end(ops in prop::collection::vec(op(), 1..40)) {
        let mut f = Fixture::new();
        let mut states: Vec<Vec<u8>> = vec![Vec::new()];
        for op in ops {
            let mut model = states.last().unwrap().clone();
            match op {
                Op::Write(at, len, byte) => {
                    let data: Vec<u8> = (0..len).map(|n| byte.wrapping_add(n as u8)).collect();
                    f.state.write(&f.volume, f.fd.as_fd(), at, &data).unwrap();
                    let end = at as usize + len;
                    if model.len() < end {
                        model.resize(end, 0);
                    }
                    model[at as usize..end].copy_from_slice(&data);
                    states.push(model);
                }
                Op::Resize(size) => {
                    f.state.resize(&f.volume, f.fd.as_fd(), size).unwrap();
                    model.resize(size as usize, 0);
                    states.push(model);
                }
                Op::Fsync => {
                    f.fsync();
                    states.drain(..states.len() - 1);
                }
                Op::Flush => f.log().flush(f.log().end()).unwrap(),
                Op::Apply => f.apply(f.log().flushed()),
                Op::Seal => {
                    f.seal();
                    states.drain(..states.len() - 1);
                }
                Op::Checkpoint => {
                    f.checkpoint();
                    states.drain(..states.len() - 1);
                }
                Op::Die => {
                    f.die();
                    let now = f.contents();
                    prop_assert!(
                        possible(&states, &now),
                        "{} bytes, and none of {:?}", now.len(), states.iter().map(Vec::len).collect::<Vec<_>>()
                    );
                    states = vec![now];
                    continue;
                }
            }
            prop_assert_eq!(&f.contents(), states.last().unwrap());
        }
        f.die();
        prop_assert!(possible(&states, &f.contents()));
    }
}

/// Each block is what it was in one of the states, the size between theirs. (What went in place at once and what was logged
/// may be there one without the other.)
fn possible(states: &[Vec<u8>], now: &[u8]) -> bool {
    let sizes = || states.iter().map(Vec::len);
    let size = (sizes().min().unwrap_or(0)..=sizes().max().unwrap_or(0)).contains(&now.len());
    let block = |at: usize| {
        let part = &now[at..(at + 4096).min(now.len())];
        let as_in = |state: &Vec<u8>| {
            let end = (at + part.len()).min(state.len());
            let held = state.get(at..end).unwrap_or(&[]);
            part[..held.len()] == *held && part[held.len()..].iter().all(|byte| *byte == 0)
        };
        states.iter().any(as_in)
    };
    size && (0..now.len()).step_by(4096).all(block)
}

/// Replaying is the same done once or again, and after a crash in the middle of it.
#[test]
fn a_replay_can_be_repeated_from_any_point() {
    let mut f = Fixture::new();
    let old: Vec<u8> = (0..20_000).map(|n| (n % 251) as u8 + 1).collect();
    f.state.write(&f.volume, f.fd.as_fd(), 0, &old).unwrap();
    f.seal();
    f.state.write(&f.volume, f.fd.as_fd(), 5000, &[0xaa; 9000]).unwrap();
    f.state.resize(&f.volume, f.fd.as_fd(), 10_001).unwrap();
    f.state.write(&f.volume, f.fd.as_fd(), 12_000, &[0xbb; 3000]).unwrap();
    f.fsync();
    let expected = f.contents();
    let kept = tempfile::tempdir().unwrap();
    copy(f.dir.path(), kept.path());
    // The log of the moment of the crash, put back after a replay: done again, it says the same.
    assert_eq!(f.die().files, 1);
    assert_eq!(f.contents(), expected);
    for name in log::NAMES {
        std::fs::copy(kept.path().join(name), f.dir.path().join(name)).unwrap();
    }
    f.die();
    assert_eq!(f.contents(), expected);
    // Put back after the file was sealed: about a state that is no more.
    f.state.write(&f.volume, f.fd.as_fd(), 0, b"newer").unwrap();
    f.seal();
    let newer = f.contents();
    for name in log::NAMES {
        std::fs::copy(kept.path().join(name), f.dir.path().join(name)).unwrap();
    }
    assert_eq!(f.die().files, 0);
    assert_eq!(f.contents(), newer);
}

/// A file that was put back from a backup has another number; one that was moved with its whole volume is still the one.
#[test]
fn a_file_put_back_is_left_alone() {
    let mut f = Fixture::new();
    f.state.write(&f.volume, f.fd.as_fd(), 0, &[1; 9000]).unwrap();
    f.seal();
    let backup = std::fs::read(f.dir.path().join("f")).unwrap();
    f.state.write(&f.volume, f.fd.as_fd(), 100, &[2; 5000]).unwrap();
    f.fsync();
    std::fs::write(f.dir.path().join("g"), &backup).unwrap();
    std::fs::rename(f.dir.path().join("g"), f.dir.path().join("f")).unwrap();
    f.fd = storage::open_file(f.volume.root().as_fd(), "f", true).unwrap();
    let done = f.die();
    assert_eq!((done.files, done.passed_over), (0, 1));
    assert_eq!(f.contents(), [1; 9000]);
}
