//! Random sequences of system calls by several users, on a directory of ext4 and on the mount: every result, every errno and
//! every trace must be the same, but for what known.rs lists. Needs root, `/dev/fuse` and `fuse3`.
//!
//! - `LETHEFS_TEST_SEED` repeats a run that failed;
//! - `LETHEFS_DIFFERENTIAL_CASES` says how many sequences each test runs; without it they are the same few each time.
#![allow(clippy::unwrap_used, missing_docs)]

mod calls;
mod generate;
mod known;
mod regressions;
mod seen;
#[path = "../support/mod.rs"]
mod support;
mod world;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use proptest::collection::vec;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use rustix::fs::OFlags;
use rustix::time::ClockId;

use calls::Call;
use support::bytes;
use support::disk::Disk;
use support::volume::TestVolume;
use world::World;

/// One step of a sequence.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// By this user; with `true` it is compared which times it moves.
    Call(usize, Call, bool),
    /// The kernel drops what it has cached.
    DropCaches,
    /// Unmounted and mounted again. Nothing stays open.
    Remount,
}

/// The two sides lie on one ext4: a directory of it, and the volume whose backing directory is another.
struct Ground {
    v: TestVolume,
    disk: Disk,
    options: &'static str,
    /// Something panicked; it may not be mounted any more.
    broken: Cell<bool>,
    cases: Cell<usize>,
    calls: Cell<usize>,
    worked: Cell<usize>,
    tolerated: RefCell<BTreeMap<&'static str, usize>>,
}

impl Ground {
    fn new(acl: bool) -> Self {
        let v = TestVolume::new();
        let options = if acl { "allow_other,dev,acl" } else { "allow_other,dev" };
        let disk = Disk::with(&v, "ext4", 1 << 30, "nosuid");
        v.init_with(&v.file_uri());
        v.mount(&["-o", options]);
        Self {
            v,
            disk,
            options,
            broken: Cell::default(),
            cases: Cell::default(),
            calls: Cell::default(),
            worked: Cell::default(),
            tolerated: RefCell::default(),
        }
    }

    fn plain(&self) -> PathBuf {
        self.v.path("disk/plain")
    }

    fn end(self) {
        let Self { v, disk, .. } = self;
        v.umount();
        disk.unmount();
    }

    fn count(&self, known: usize) {
        *self.tolerated.borrow_mut().entry(known::DIFFERENCES[known].words).or_default() += 1;
    }

    /// Runs a sequence on both sides. Once that is no longer possible nothing fails any more: the sequence that brought it
    /// about is the one to be told of.
    fn compare(&self, steps: &[Step]) -> Result<(), String> {
        if self.broken.get() {
            return Ok(());
        }
        self.broken.set(true);
        let done = self.compare_once(steps);
        self.broken.set(false);
        done
    }

    fn compare_once(&self, steps: &[Step]) -> Result<(), String> {
        let name = format!("case{}", self.cases.replace(self.cases.get() + 1));
        let mut plain = World::new(self.plain().join(&name));
        let mut mounted = World::new(self.v.at(&name));
        let mut done = Ok(());
        for (number, step) in steps.iter().enumerate() {
            done = self
                .step(step, &mut plain, &mut mounted)
                .map_err(|what| format!("step {number} of {}: {step:?}: {what}", steps.len()));
            if done.is_err() {
                break;
            }
        }
        let done = done.and_then(|()| {
            same(&plain, &mounted).map_err(|what| format!("at the end: {what}"))?;
            self.remount(&mut plain, &mut mounted).map_err(|what| format!("at the end: {what}"))
        });
        plain.stop();
        mounted.stop();
        for root in [&plain.root, &mounted.root] {
            fs::remove_dir_all(root).unwrap();
        }
        done
    }

    fn step(&self, step: &Step, plain: &mut World, mounted: &mut World) -> Result<(), String> {
        match step {
            Step::Call(user, call, timed) => self.call(*user, call, *timed, plain, mounted),
            Step::DropCaches => {
                rustix::fs::sync();
                // Dentries and inodes; what is dirty or in use stays.
                fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
                same(plain, mounted)
            }
            Step::Remount => self.remount(plain, mounted),
        }
    }

    fn remount(&self, plain: &mut World, mounted: &mut World) -> Result<(), String> {
        let before = seen::times(&mounted.root);
        plain.stop();
        mounted.stop();
        self.v.remount(&["-o", self.options]);
        plain.start();
        mounted.start();
        let after = seen::times(&mounted.root);
        for (name, (_, [modified, _])) in &before {
            let now = after.get(name).ok_or_else(|| format!("/{} is gone", name.escape_ascii()))?.1[0];
            if now != *modified {
                return Err(format!("remounted: mtime of /{} is {now:?}, was {modified:?}", name.escape_ascii()));
            }
        }
        same(plain, mounted).map_err(|what| format!("remounted: {what}"))
    }

    fn call(&self, user: usize, call: &Call, timed: bool, plain: &World, mounted: &World) -> Result<(), String> {
        // Whatever depends on what the clock says between two calls does so each time.
        wait_for_a_tick();
        let before = timed.then(|| [plain, mounted].map(|world| seen::times(&world.root)));
        self.calls.set(self.calls.get() + 1);
        let got = mounted.run(user, call);
        if let Some(known) = known::refused(self.options.ends_with("acl"), call, &got) {
            self.count(known);
            return Ok(());
        }
        let expected = plain.run(user, call);
        self.worked.set(self.worked.get() + usize::from(expected.is_ok()));
        if expected != got {
            match known::differs(call, &expected, &got) {
                Some(known) => self.count(known),
                None => return Err(format!("gives {got:?} instead of {expected:?}")),
            }
            if let Call::Seek(slot, _) = call {
                let back = Call::Seek(*slot, rustix::fs::SeekFrom::Start(0));
                for world in [plain, mounted] {
                    world.run(user, &back).unwrap();
                }
            }
        }
        if let Some(before) = before {
            let [on_plain, mut on_mounted] = [(plain, &before[0]), (mounted, &before[1])]
                .map(|(world, before)| seen::moved(before, &seen::times(&world.root)));
            for (name, moved) in &mut on_mounted {
                let expected = on_plain.get(name).copied();
                if expected == Some([moved[0], false])
                    && moved[1]
                    && let Some(known) = known::moves(call, &mounted.root.join(OsStr::from_bytes(name)))
                {
                    self.count(known);
                    moved[1] = false;
                }
            }
            if let Some(what) = seen::differences(&on_plain, &on_mounted) {
                return Err(format!("[mtime, ctime] moved: {what}"));
            }
            same(plain, mounted)?;
        }
        Ok(())
    }

    fn told(&self) {
        println!("{} sequences, {} of {} calls worked", self.cases.get(), self.worked.get(), self.calls.get());
        for (words, count) in self.tolerated.borrow().iter() {
            println!("{count} times: {words}");
        }
    }
}

/// Until the clock that filesystems take times from has moved on: then what is stamped now can be told from what was.
fn wait_for_a_tick() {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    while rustix::time::clock_gettime(ClockId::RealtimeCoarse) <= now {
        std::thread::sleep(std::time::Duration::from_micros(500));
    }
}

fn same(plain: &World, mounted: &World) -> Result<(), String> {
    let descriptors = [plain, mounted].map(World::descriptors);
    if descriptors[0] != descriptors[1] {
        return Err(format!("descriptors are {:?} instead of {:?}", descriptors[1], descriptors[0]));
    }
    seen::differences(&seen::tree(&plain.root), &seen::tree(&mounted.root)).map_or(Ok(()), Err)
}

/// The sequence with this seed.
fn generated(seed: u64) -> Vec<Step> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &key);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    // Most calls with a descriptor need one.
    let open = |slot, path, flags| Step::Call(0, Call::Open(slot, calls::at(path), flags, 0), false);
    let mut steps = vec![open(0, "a", OFlags::RDWR), open(1, "b", OFlags::RDONLY), open(2, "d/c", OFlags::RDWR)];
    steps.extend(vec(generate::steps(), 1..150).new_tree(&mut runner).unwrap().current());
    steps
}

/// What is left of a sequence that fails once everything is left out without which it fails, too.
fn shortened(ground: &Ground, mut steps: Vec<Step>, mut what: String) -> (Vec<Step>, String) {
    let mut part = steps.len() / 2;
    while part > 0 {
        let mut at = 0;
        while at < steps.len() {
            let end = (at + part).min(steps.len());
            let fewer = [&steps[..at], &steps[end..]].concat();
            match ground.compare(&fewer) {
                Err(now) => (steps, what) = (fewer, now),
                Ok(()) => at = end,
            }
        }
        part /= 2;
    }
    (steps, what)
}

fn random_sequences(acl: bool, usual: u64) {
    let from_env = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let asked = from_env("LETHEFS_DIFFERENTIAL_CASES");
    let random = || std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), ());
    // The same few each time for every commit; new ones for whoever asks for many.
    let seed = from_env("LETHEFS_TEST_SEED").unwrap_or_else(|| if asked.is_some() { random() } else { 1 });
    println!("LETHEFS_TEST_SEED={seed}");
    let cases = asked.unwrap_or(usual);
    let ground = Ground::new(acl);
    for case in 0..cases {
        let steps = generated(seed.wrapping_add(case));
        if let Err(what) = ground.compare(&steps) {
            println!("LETHEFS_TEST_SEED={} fails ({what}); shortening", seed.wrapping_add(case));
            let (steps, what) = shortened(&ground, steps, what);
            panic!("LETHEFS_DIFFERENTIAL_CASES=1 LETHEFS_TEST_SEED={}: {what}\n{steps:?}", seed.wrapping_add(case));
        }
    }
    ground.told();
    assert!(ground.worked.get() > ground.calls.get() / 5, "the sequences test little but refusals");
    ground.end();
}

#[test]
fn the_mount_behaves_like_ext4() {
    random_sequences(false, 12);
}

#[test]
fn the_mount_behaves_like_ext4_with_access_control_lists() {
    random_sequences(true, 12);
}

#[test]
fn known_differences_are_documented() {
    let text = include_str!("../../docs/SEMANTICS.md");
    for known in known::DIFFERENCES {
        assert!(text.contains(known.words), "docs/SEMANTICS.md does not say: {}", known.words);
    }
}
