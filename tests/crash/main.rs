//! The worst moments, for real: the daemon killed with -9 under load, and a power cut: the backing filesystem (a loop ext4 or
//! xfs) shut down without a log flush while the daemon dies. Afterwards everything that was acknowledged must be there,
//! everything must be readable, and everything must be removable.
//!
//! `LETHEFS_CRASH_ROUNDS` says how often (scripts/test-long: 100), `LETHEFS_CRASH_SEED` repeats one run's workload.
#![allow(clippy::unwrap_used, missing_docs)]

mod disk;
#[path = "../support/mod.rs"]
mod support;
mod writers;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use support::volume::TestVolume;

/// How the end comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Kill,
    PowerCut,
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// All writers at once, until the end comes at a moment that nobody chose; then a mount, and the check.
fn rounds(v: &TestVolume, disk: Option<&disk::Disk>, end: End) {
    let rounds = number("LETHEFS_CRASH_ROUNDS", 4);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = number("LETHEFS_CRASH_SEED", now);
    eprintln!("LETHEFS_CRASH_SEED={seed}");
    let mut random = writers::Random::new(seed);
    let mut total = 0;
    for round in 0..rounds {
        v.mount(&[]);
        let mut writers = writers::all(&v.mnt(), seed.wrapping_add(round));
        let cut = AtomicBool::new(false);
        // From a hundredth of a second, where everything is new, to beyond what commits and sealing need.
        let span = Duration::from_millis(if round % 4 == 3 { 7000 } else { 10 + random.below(2500) });
        std::thread::scope(|scope| {
            for writer in &mut writers {
                let cut = &cut;
                scope.spawn(move || writer.run(cut));
            }
            // The moment is part of the experiment; nothing is waited for.
            std::thread::sleep(span);
            cut.store(true, Ordering::SeqCst);
            if let Some(disk) = disk.filter(|_| end == End::PowerCut) {
                disk.shut_down();
            }
            v.crash();
        });
        if let Some(disk) = disk.filter(|_| end == End::PowerCut) {
            disk.power_on();
        }
        v.mount(&[]);
        total += writers.iter().map(|writer| writer.syncs()).sum::<u64>();
        let acknowledged: u64 = writers.iter().map(|writer| writer.syncs()).sum();
        for writer in &writers {
            writer
                .check()
                .unwrap_or_else(|found| panic!("round {round} of {end:?}, seed {seed}: {found}\n{}", v.log()));
        }
        eprintln!("round {round}: {span:?}, {acknowledged} acknowledged");
        writers::read_all(&v.mnt()).unwrap_or_else(|found| panic!("round {round}, seed {seed}: {found}\n{}", v.log()));
        for entry in std::fs::read_dir(v.mnt()).unwrap() {
            std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
        }
        v.umount();
        let left: Vec<_> = std::fs::read_dir(v.backing())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !matches!(name.as_str(), "lethefs.volume" | "lethefs.volume.bak" | "lethefs.dir"))
            .collect();
        assert!(left.is_empty(), "left in the backing directory: {left:?}");
    }
    assert!(total > 50 * rounds, "only {total} times something was acknowledged");
}

#[test]
fn kill_9_under_load() {
    let v = TestVolume::init();
    rounds(&v, None, End::Kill);
}

#[test]
fn power_cut_on_ext4() {
    let v = TestVolume::new();
    let disk = disk::Disk::new(&v, "ext4");
    v.init_with(&v.file_uri());
    rounds(&v, Some(&disk), End::PowerCut);
}

#[test]
fn power_cut_on_xfs() {
    let v = TestVolume::new();
    let disk = disk::Disk::new(&v, "xfs");
    v.init_with(&v.file_uri());
    rounds(&v, Some(&disk), End::PowerCut);
}
