//! The worst moments, for real: the daemon killed with -9 under load, and a power cut: the backing filesystem (a loop ext4 or
//! xfs) shut down without a log flush while the daemon dies. Afterwards everything that was acknowledged must be there,
//! everything must be readable, and everything must be removable.
//!
//! `LETHEFS_CRASH_ROUNDS` says how often (scripts/test-long: 100), `LETHEFS_CRASH_SEED` repeats one run's workload,
//! `LETHEFS_CRASH_AGAINST=gocryptfs` does the same to that program and only counts.
#![allow(clippy::unwrap_used, missing_docs)]

mod gocryptfs;
#[path = "../support/mod.rs"]
mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gocryptfs::Gocryptfs;
use support::disk::Disk;
use support::volume::TestVolume;
use support::writers::{self, Harm, Random, Worker};

/// Bytes of a disk that no round fills, of which only what is written is taken: what a full one does is another test
/// (tests/mounted/full.rs), and a replay may have to wait for space then (docs/SEMANTICS.md).
const ROOMY: u64 = 4 << 30;

/// How the end comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Kill,
    PowerCut,
}

/// Whose end.
enum Subject<'a> {
    Lethefs(&'a TestVolume),
    Gocryptfs(Gocryptfs<'a>),
}

impl Subject<'_> {
    fn mount(&mut self) {
        match self {
            Self::Lethefs(v) => drop(v.mount(&[])),
            Self::Gocryptfs(other) => other.mount(),
        }
    }

    fn crash(&mut self) {
        match self {
            Self::Lethefs(v) => v.crash(),
            Self::Gocryptfs(other) => other.crash(),
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What is asked of the backing directory after each round, beside what programs see through the mount: fsck calls it clean,
/// and once it was emptied and unmounted nothing is left in it.
fn check_backing(v: &TestVolume, when: When) {
    let run = v.cli(&["fsck", "backing", "--json"]);
    assert_eq!(run.code, Some(0), "{when:?}: {}{}", run.out, run.err);
    if when == When::Unmounted {
        let entries = std::fs::read_dir(v.backing()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["lethefs.dir", "lethefs.volume", "lethefs.volume.bak"]);
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    /// Right after the end, with nothing mounted.
    Crashed,
    /// Mounted again, emptied and unmounted.
    Unmounted,
}

/// What became of one writer's work, over all rounds.
#[derive(Default)]
struct Tally {
    acknowledged: u64,
    damaged: u64,
    unreadable: u64,
    lost: u64,
    undeletable: u64,
}

impl Tally {
    fn count(&mut self, worker: &Worker, harms: &[Harm]) {
        let has = |wanted: fn(&Harm) -> bool| u64::from(harms.iter().any(wanted));
        self.acknowledged += worker.writer.syncs();
        self.damaged += u64::from(!harms.is_empty());
        self.unreadable += has(|harm| matches!(harm, Harm::Unreadable(_)));
        self.lost += has(|harm| matches!(harm, Harm::Lost(_)));
        self.undeletable += has(|harm| matches!(harm, Harm::Undeletable(_)));
    }
}

/// All writers at once, until the end comes at a moment that nobody chose; then a mount, and the check.
fn rounds(v: &TestVolume, disk: Option<&Disk>, end: End) {
    let rounds = number("LETHEFS_CRASH_ROUNDS", 4);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = number("LETHEFS_CRASH_SEED", now);
    let mut subject = match std::env::var("LETHEFS_CRASH_AGAINST").as_deref() {
        Ok("gocryptfs") => Subject::Gocryptfs(Gocryptfs::new(v)),
        Ok(other) => panic!("LETHEFS_CRASH_AGAINST={other}: only gocryptfs is known"),
        Err(_) => Subject::Lethefs(v),
    };
    if let Subject::Lethefs(v) = &subject {
        v.init_with(&v.file_uri());
    }
    eprintln!("LETHEFS_CRASH_SEED={seed}");
    let mut random = Random::new(seed);
    let mut tallies: Vec<(&'static str, Tally)> = Vec::new();
    for round in 0..rounds {
        subject.mount();
        let mut workers = writers::all(&v.mnt(), seed.wrapping_add(round));
        if let Subject::Gocryptfs(_) = subject {
            // Or every writer would show the same: a directory that was made just before the cut.
            workers.iter().for_each(|worker| std::fs::create_dir(&worker.place).unwrap());
            rustix::fs::syncfs(std::fs::File::open(v.backing()).unwrap()).unwrap();
        }
        let cut = AtomicBool::new(false);
        // From a hundredth of a second, where everything is new, to beyond what commits and sealing need.
        let span = Duration::from_millis(if round % 4 == 3 { 7000 } else { 10 + random.below(2500) });
        std::thread::scope(|scope| {
            for worker in &mut workers {
                let cut = &cut;
                scope.spawn(move || worker.run(cut));
            }
            // The moment is part of the experiment; nothing is waited for.
            std::thread::sleep(span);
            cut.store(true, Ordering::SeqCst);
            if let Some(disk) = disk.filter(|_| end == End::PowerCut) {
                disk.shut_down();
            }
            subject.crash();
        });
        if let Some(disk) = disk.filter(|_| end == End::PowerCut) {
            disk.power_on();
        }
        if let Subject::Lethefs(v) = &subject {
            check_backing(v, When::Crashed);
        }
        if let Subject::Lethefs(v) = &subject {
            let space = rustix::fs::statvfs(v.backing()).unwrap();
            eprintln!("round {round}: {} MiB free in the backing filesystem", (space.f_bavail * space.f_frsize) >> 20);
        }
        subject.mount();
        let found: Vec<Vec<Harm>> = workers
            .iter()
            .map(|worker| [worker.check(), worker.remove()].into_iter().filter_map(Result::err).collect())
            .collect();
        let acknowledged: u64 = workers.iter().map(|worker| worker.writer.syncs()).sum();
        let harms: Vec<&Harm> = found.iter().flatten().collect();
        eprintln!("round {round}: {span:?}, {acknowledged} acknowledged, harm: {harms:?}");
        tallies.resize_with(workers.len(), Default::default);
        for ((worker, harms), (name, tally)) in workers.iter().zip(&found).zip(&mut tallies) {
            *name = worker.name;
            tally.count(worker, harms);
        }
        match &mut subject {
            Subject::Lethefs(v) => {
                assert!(harms.is_empty(), "round {round} of {end:?}, seed {seed}: {harms:?}\n{}", v.log());
                v.umount();
                check_backing(v, When::Unmounted);
            }
            Subject::Gocryptfs(other) => other.start_over(),
        }
    }
    let of = disk.map_or("", |disk| disk.kind());
    eprintln!("{end:?} {of}, {rounds} rounds; acknowledged, rounds with damage (unreadable, lost, undeletable):");
    for (name, tally) in &tallies {
        let Tally { acknowledged, damaged, unreadable, lost, undeletable } = tally;
        eprintln!("  {name:16} {acknowledged:8} {damaged:4} ({unreadable}, {lost}, {undeletable})");
    }
    let total: u64 = tallies.iter().map(|(_, tally)| tally.acknowledged).sum();
    assert!(total > 50 * rounds, "only {total} times something was acknowledged");
}

#[test]
fn kill_9_under_load() {
    rounds(&TestVolume::new(), None, End::Kill);
}

#[test]
fn power_cut_on_ext4() {
    let v = TestVolume::new();
    let disk = Disk::with(&v, "ext4", ROOMY, "");
    rounds(&v, Some(&disk), End::PowerCut);
}

#[test]
fn power_cut_on_xfs() {
    let v = TestVolume::new();
    let disk = Disk::with(&v, "xfs", ROOMY, "");
    rounds(&v, Some(&disk), End::PowerCut);
}
