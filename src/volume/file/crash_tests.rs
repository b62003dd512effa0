//! A file by way of the intent log, and the daemon's death at any moment: what is in the page cache stays, the memory goes.
//! A model says what must be there afterwards.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::volume::testing::directory;
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
        Self::with(true)
    }

    fn with(logged: bool) -> Self {
        let dir = directory();
        let mut volume = crate::volume::testing::volume(dir.path());
        if logged {
            volume.begin_log().unwrap();
        }
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
        if mark.applies {
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
        self.state.mend(&self.volume, self.fd.as_fd()).unwrap();
        self.commit();
        self.state.seal(&self.volume, self.fd.as_fd()).unwrap();
    }

    /// Everything that is logged goes to the medium, and in place.
    fn commit(&mut self) {
        if let Some(log) = self.volume.log() {
            let end = log.end();
            log.flush(end).unwrap();
            self.apply(end);
        }
    }

    /// Makes room in the log (fs/core.rs).
    fn checkpoint(&mut self) {
        let last = self.log().switch().unwrap();
        self.apply(last);
        self.log().retire().unwrap();
    }

    /// Everything in memory is gone; a new mount begins.
    fn die(&mut self) -> replay::Replayed {
        self.try_die().unwrap()
    }

    fn try_die(&mut self) -> Result<replay::Replayed, VolumeError> {
        let logged = self.volume.log().is_some();
        self.volume.end_of_log_for_tests();
        let done = replay::replay(&self.volume)?;
        if logged {
            self.volume.begin_log()?;
        }
        self.state = FileState::load(&self.volume, self.fd.as_fd())?;
        Ok(done)
    }

    fn contents(&self) -> Vec<u8> {
        self.try_contents().unwrap()
    }

    fn try_contents(&self) -> Result<Vec<u8>, String> {
        let mut out = vec![0; self.state.size() as usize + 10];
        let n = self.state.read(&self.volume, self.fd.as_fd(), 0, &mut out).map_err(|error| format!("{error:?}"))?;
        out.truncate(n);
        Ok(out)
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

/// So many cases where `PROPTEST_CASES` (scripts/test-long) does not say otherwise.
fn cases(usual: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    ProptestConfig { cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(100))]
    /// kill -9: whatever was written is in the page cache and stays; the memory of what is pending goes.
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
    let kept = directory();
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

/// The medium under a file and its log: what was flushed, and what may or may not have got there besides.
struct Medium {
    file: Vec<u8>,
    logs: [Vec<u8>; 2],
    flushed: u64,
    random: u64,
}

const SECTOR: usize = 512;

impl Medium {
    fn new(seed: u64) -> Self {
        Self { file: Vec::new(), logs: [Vec::new(), Vec::new()], flushed: 0, random: seed | 1 }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    fn read_log(f: &Fixture, n: usize) -> Vec<u8> {
        std::fs::read(f.dir.path().join(log::NAMES[n])).unwrap_or_default()
    }

    /// The log has been flushed, if more of it counts as flushed than before.
    fn look(&mut self, f: &Fixture) {
        let flushed = f.volume.log().map_or(0, log::Log::flushed);
        if flushed > self.flushed {
            self.flushed = flushed;
            self.logs = [Self::read_log(f, 0), Self::read_log(f, 1)];
        }
    }

    fn flush_file(&mut self, f: &Fixture) {
        self.file = std::fs::read(f.dir.path().join("f")).unwrap();
    }

    /// Any subset of the sectors that were not flushed, and any size that the file has had since.
    fn mix(&mut self, old: &[u8], new: &[u8]) -> Vec<u8> {
        let mode = self.below(4);
        let keeps = |medium: &mut Self| match mode {
            0 => false,
            1 => true,
            _ => medium.below(2) == 0,
        };
        let len = if keeps(self) { new.len() } else { old.len() };
        let mut mixed = Vec::with_capacity(len);
        for at in (0..len).step_by(SECTOR) {
            let from = if keeps(self) { new } else { old };
            let end = (at + SECTOR).min(len);
            let have = from.get(at..end.min(from.len())).unwrap_or(&[]);
            mixed.extend_from_slice(have);
            mixed.resize(end, 0);
        }
        mixed
    }

    /// The power goes and comes back.
    fn cut(&mut self, f: &mut Fixture) -> Result<(), String> {
        let now = std::fs::read(f.dir.path().join("f")).unwrap();
        let file = std::mem::take(&mut self.file);
        let left = self.mix(&file, &now);
        write_over(&f.dir.path().join("f"), &left);
        for n in 0..2 {
            let path = f.dir.path().join(log::NAMES[n]);
            if path.exists() {
                let old = std::mem::take(&mut self.logs[n]);
                let left = self.mix(&old, &Self::read_log(f, n));
                write_over(&path, &left);
            }
        }
        f.try_die().map_err(|error| format!("no mount any more: {error}"))?;
        self.logs = [Vec::new(), Vec::new()];
        self.flushed = f.volume.log().map_or(0, log::Log::flushed);
        // A replay flushes what it did, and everything else with it.
        self.flush_file(f);
        Ok(())
    }
}

/// Same file, other contents.
fn write_over(path: &Path, bytes: &[u8]) {
    std::fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, bytes))
        .unwrap();
}

/// As [`possible`], and blocks that were never acknowledged may also be zeros.
fn possible_after_a_cut(states: &[Vec<u8>], now: &[u8]) -> bool {
    let sizes = || states.iter().map(Vec::len);
    let (least, most) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
    (least..=most).contains(&now.len())
        && (0..now.len()).step_by(4096).all(|at| {
            let part = &now[at..(at + 4096).min(now.len())];
            let as_in = |state: &Vec<u8>| {
                let end = (at + part.len()).min(state.len());
                let held = state.get(at..end).unwrap_or(&[]);
                part[..held.len()] == *held && part[held.len()..].iter().all(|byte| *byte == 0)
            };
            let never = at >= least && part.iter().all(|byte| *byte == 0);
            states.iter().any(as_in) || never
        })
}

/// Runs a workload that ends in a power cut, after every step of it in turn.
fn cut_after_each_step(ops: &[Op], seed: u64, logged: bool) -> Result<(), String> {
    for end in 0..=ops.len() {
        let mut f = Fixture::with(logged);
        let mut medium = Medium::new(seed.wrapping_mul(end as u64 + 1));
        let mut states: Vec<Vec<u8>> = vec![Vec::new()];
        let cut = |f: &mut Fixture, medium: &mut Medium, states: &mut Vec<Vec<u8>>| {
            medium.cut(f)?;
            let now = f.try_contents()?;
            if !possible_after_a_cut(states, &now) {
                let lens: Vec<usize> = states.iter().map(Vec::len).collect();
                return Err(format!("{} bytes of {lens:?}", now.len()));
            }
            *states = vec![now];
            Ok(())
        };
        for op in &ops[..end] {
            if matches!(op, Op::Die) {
                cut(&mut f, &mut medium, &mut states)
                    .map_err(|found| format!("in between, of {end} steps: {found}"))?;
            } else {
                step(&mut f, &mut medium, &mut states, op);
            }
            medium.look(&f);
        }
        cut(&mut f, &mut medium, &mut states).map_err(|found| format!("after step {end}: {found}"))?;
        // And what is sealed after it reads the same.
        f.state.mend(&f.volume, f.fd.as_fd()).map_err(|error| format!("{error:?}"))?;
        f.commit();
        f.state.seal(&f.volume, f.fd.as_fd()).map_err(|error| error.to_string())?;
        f.state = FileState::load(&f.volume, f.fd.as_fd()).map_err(|error| error.to_string())?;
        if f.try_contents()? != states[0] {
            return Err(format!("after step {end}: sealed, it reads otherwise"));
        }
    }
    Ok(())
}

/// One step, with what it flushes.
fn step(f: &mut Fixture, medium: &mut Medium, states: &mut Vec<Vec<u8>>, op: &Op) {
    let mut model = states.last().unwrap().clone();
    match op {
        Op::Write(at, len, byte) => {
            let data: Vec<u8> = (0..*len).map(|n| byte.wrapping_add(n as u8)).collect();
            f.state.write(&f.volume, f.fd.as_fd(), *at, &data).unwrap();
            let to = *at as usize + len;
            if model.len() < to {
                model.resize(to, 0);
            }
            model[*at as usize..to].copy_from_slice(&data);
            states.push(model);
        }
        Op::Resize(size) => {
            f.state.resize(&f.volume, f.fd.as_fd(), *size).unwrap();
            model.resize(*size as usize, 0);
            states.push(model);
        }
        Op::Fsync => {
            let mark = f.state.flushing(&f.volume, f.fd.as_fd()).unwrap();
            if let Some(log) = f.volume.log() {
                log.flush(mark.log).unwrap();
            }
            medium.look(f);
            if mark.applies {
                f.apply(f.log().flushed());
            }
            if mark.in_place {
                medium.flush_file(f);
            }
            if let Some(record) = f.state.flushed(&f.volume, mark).unwrap() {
                f.log().flush(record).unwrap();
            }
            states.drain(..states.len() - 1);
        }
        Op::Flush if f.volume.log().is_some() => f.log().flush(f.log().end()).unwrap(),
        Op::Apply if f.volume.log().is_some() => f.apply(f.log().flushed()),
        Op::Seal => {
            if f.volume.log().is_some() {
                let last = f.log().end();
                f.log().flush(last).unwrap();
                f.apply(last);
            }
            medium.look(f);
            f.state.mend(&f.volume, f.fd.as_fd()).unwrap();
            f.commit();
            medium.look(f);
            medium.flush_file(f);
            f.state.seal(&f.volume, f.fd.as_fd()).unwrap();
            if let Some(log) = f.volume.log() {
                log.flush(log.end()).unwrap();
                medium.look(f);
            }
            states.drain(..states.len() - 1);
        }
        Op::Checkpoint if f.volume.log().is_some() => {
            let last = f.log().switch().unwrap();
            f.apply(last);
            medium.look(f);
            medium.flush_file(f);
            f.log().retire().unwrap();
            medium.logs = [Medium::read_log(f, 0), Medium::read_log(f, 1)];
            states.drain(..states.len() - 1);
        }
        Op::Flush | Op::Apply | Op::Checkpoint | Op::Die => {}
    }
}

proptest! {
    #![proptest_config(cases(64))]
    #[test]
    fn a_power_cut_loses_nothing_that_was_acknowledged(
        ops in prop::collection::vec(op(), 1..16),
        seed in any::<u64>(),
    ) {
        if let Err(found) = cut_after_each_step(&ops, seed, true) {
            prop_assert!(false, "{}", found);
        }
    }
}

/// The same cuts without the log: what the log is for. If this finds nothing, the test above could not fail either.
#[test]
fn without_the_log_the_same_cuts_lose_what_was_acknowledged() {
    use proptest::strategy::ValueTree as _;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let workloads = prop::collection::vec(op(), 1..16);
    let mut damaged = 0;
    for n in 0..60 {
        let ops = workloads.new_tree(&mut runner).unwrap().current();
        let found = std::panic::catch_unwind(|| cut_after_each_step(&ops, n + 1, false));
        damaged += usize::from(!matches!(found, Ok(Ok(()))));
    }
    assert!(damaged > 5, "{damaged} of 60 workloads");
}

/// Found by thinking, or by others: each of these once lost something, or would if its protection were taken out.
#[test]
fn cuts_that_were_thought_of() {
    use Op::{Apply, Checkpoint, Die, Flush, Fsync, Resize, Seal, Write};
    let workloads: [&[Op]; 8] = [
        // A replayed cut over what was written in place and flushed after it.
        &[Write(0, 9000, 1), Seal, Resize(0), Flush, Apply, Write(0, 8192, 7), Fsync],
        &[Write(0, 9000, 1), Resize(0), Flush, Apply, Write(0, 8192, 7), Fsync, Write(0, 10, 9), Fsync],
        // The same, sealed in between: the seal need not have got there.
        &[Write(0, 9000, 1), Resize(0), Flush, Apply, Write(0, 8192, 7), Seal, Fsync],
        &[Write(0, 9000, 1), Resize(0), Flush, Apply, Write(0, 8192, 7), Seal, Write(0, 100, 9), Fsync],
        // Replayed growth over what came after it.
        &[Write(0, 100, 1), Seal, Resize(49_152), Flush, Apply, Write(49_152, 8192, 7), Fsync],
        // A checkpoint between a cut and what comes after.
        &[Write(0, 9000, 1), Seal, Resize(4096), Checkpoint, Write(4096, 8192, 7), Fsync, Write(0, 10, 9), Flush],
        // A second unclean end before anything is sealed again.
        &[Write(0, 9000, 1), Fsync, Write(100, 9000, 2), Fsync, Die, Write(50, 9000, 3), Fsync, Die, Resize(10), Fsync],
        // Headers written one after the other and never flushed.
        &[Write(0, 4096, 1), Fsync, Write(4096, 4096, 2), Fsync, Fsync, Seal, Write(0, 10, 3), Fsync],
    ];
    for (n, ops) in workloads.iter().enumerate() {
        for seed in 1..60 {
            if let Err(found) = cut_after_each_step(ops, seed, true) {
                panic!("workload {n}, seed {seed}: {found}");
            }
        }
    }
}

/// A name may lead to another file by the time that its logged changes go in place.
#[test]
fn logged_changes_go_into_this_file_only() {
    let mut f = Fixture::new();
    f.state.write(&f.volume, f.fd.as_fd(), 0, &[1; 9000]).unwrap();
    f.seal();
    f.state = FileState::load(&f.volume, f.fd.as_fd()).unwrap();
    let other = storage::create_file(f.volume.root().as_fd(), "other", 0o600).unwrap();
    let mut state = FileState::create(&f.volume, other.as_fd()).unwrap();
    state.write(&f.volume, other.as_fd(), 0, &[2; 9000]).unwrap();
    let bytes = || std::fs::read(f.dir.path().join("other")).unwrap();
    let before = bytes();
    f.state.write(&f.volume, f.fd.as_fd(), 0, &[3; 5000]).unwrap();
    let end = f.log().end();
    f.log().flush(end).unwrap();
    assert_eq!(f.state.apply(other.as_fd(), end), Err(Errno::STALE));
    assert!(bytes() == before);
    // Nothing of it is lost.
    assert_eq!(f.state.apply(f.fd.as_fd(), end), Ok(true));
    let mut read = [0; 9000];
    f.state.read(&f.volume, f.fd.as_fd(), 0, &mut read).unwrap();
    assert!(read[..5000] == [3; 5000] && read[5000..] == [1; 4000]);
}
