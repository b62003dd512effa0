//! A backing store that fails: the error reaches the program that asks, what was there stays, and the mount goes on.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use rustix::fs::{CWD, RenameFlags};

use crate::support::faulty::{Fate, Faulty, Op};
use crate::support::volume::{Output, TestVolume};
use crate::{bytes, errno, names};

/// A volume on a store that fails when told to.
pub(crate) struct OnFaulty {
    pub(crate) v: TestVolume,
    // Dropped after the volume: the daemon must be gone first.
    pub(crate) store: Faulty,
}

impl OnFaulty {
    pub(crate) fn new() -> Self {
        let v = TestVolume::new();
        for name in ["store", "backing"] {
            fs::create_dir(v.path(name)).unwrap();
        }
        let store = Faulty::mount(&v.path("store"), &v.backing());
        v.init_with(&v.file_uri());
        v.mount(&[]);
        Self { v, store }
    }

    /// The node id of a file or directory in the mount is its inode number in the store.
    fn ino(&self, name: &str) -> u64 {
        fs::metadata(self.v.at(name)).unwrap().ino()
    }
}

#[test]
fn an_error_that_the_sealer_heard_reaches_the_next_fsync() {
    let on = OnFaulty::new();
    let (v, store) = (&on.v, &on.store);
    let mut file = File::create(v.at("file")).unwrap();
    file.write_all(&bytes(10_000, 1)).unwrap();
    let ino = file.metadata().unwrap().ino();
    // Only the first: the kernel of a real disk, too, reports a lost write once.
    let mut left = 1;
    store.rule(move |call| {
        if call.op == Op::Fsync && call.ino == ino && left > 0 {
            left -= 1;
            return Fate::Fail(libc::EIO);
        }
        Fate::Pass
    });
    rustix::fs::syncfs(&file).unwrap();
    store.calls();
    // Nobody asks for it but the sealer, once the file is quiet.
    store.wait_for(|call| call.op == Op::Fsync && call.ino == ino);
    // Whether it has been told yet or not, it has by the time it tries again.
    store.calls();
    assert_eq!(errno(file.sync_all()), libc::EIO);
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(fs::read(v.at("file")).unwrap(), bytes(10_000, 1));
    v.remount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), bytes(10_000, 1));
    v.umount();
}

#[test]
fn a_rename_over_a_directory_that_fails_leaves_both() {
    let on = OnFaulty::new();
    let v = &on.v;
    for dir in ["from", "to", "into/deep"] {
        fs::create_dir_all(v.at(dir)).unwrap();
    }
    fs::write(v.at("from/file"), b"in it").unwrap();
    let (from, to) = (on.ino("from"), on.ino("to"));
    // The empty target is moved to a temporary name last: no space for that.
    on.store.rule(|call| match call.op {
        Op::Rename if call.name.to_string_lossy().starts_with("lethefs.tmp.") => Fate::Fail(libc::ENOSPC),
        _ => Fate::Pass,
    });
    assert_eq!(errno(fs::rename(v.at("from"), v.at("to"))), libc::ENOSPC);
    let check = || {
        assert_eq!(names(v.mnt()), [b"from".to_vec(), b"into".to_vec(), b"to".to_vec()]);
        assert_eq!((on.ino("from"), on.ino("to")), (from, to));
        assert_eq!((names(v.at("from")), names(v.at("to"))), (vec![b"file".to_vec()], vec![]));
        assert_eq!(fs::read(v.at("from/file")).unwrap(), b"in it");
        fs::write(v.at("to/new"), b"usable").unwrap();
        fs::remove_file(v.at("to/new")).unwrap();
    };
    check();
    v.remount(&[]);
    check();
    on.store.heal();
    fs::rename(v.at("from"), v.at("to")).unwrap();
    assert_eq!(fs::read(v.at("to/file")).unwrap(), b"in it");
    rustix::fs::renameat_with(CWD, v.at("to"), CWD, v.at("into/deep"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(v.at("into/deep/file")).unwrap(), b"in it");
    v.umount();
}

#[test]
fn a_second_copy_is_not_mounted_beside_the_first() {
    let v = TestVolume::mounted(&[]);
    fs::write(v.at("file"), b"one").unwrap();
    let copied = std::process::Command::new("cp").arg("-a").arg(v.backing()).arg(v.path("copy")).status().unwrap();
    assert!(copied.success());
    fs::create_dir(v.path("mnt2")).unwrap();
    let refused = v.cli(&["mount", "copy", "mnt2"]);
    refused.is(11).says("another copy of this volume is mounted at");
    assert_eq!(fs::read(v.at("file")).unwrap(), b"one");
    v.umount();
    Output::of(&mut v.lethefs(&["mount", "copy", "mnt2", "--json"])).is(0);
    assert!(v.cli(&["mount", "backing", "mnt"]).err.contains("another copy"));
    v.cli(&["umount", "mnt2"]).is(0);
}

/// Which files of the store were flushed since the last look, by inode number.
fn flushed(on: &OnFaulty) -> Vec<u64> {
    on.store
        .calls()
        .into_iter()
        .filter(|call| matches!(call.op, Op::Fsync | Op::FsyncDir))
        .map(|call| call.ino)
        .collect()
}

#[test]
fn nothing_waits_for_a_flush_but_what_asks_for_one() {
    let on = OnFaulty::new();
    let v = &on.v;
    let write = |name: &str, data: &[u8]| fs::write(v.at(name), data).unwrap();
    for name in ["sealed", "cut", "target"] {
        write(name, &bytes(20_000, 1));
    }
    v.remount(&[]);
    // Opens the log, which is flushed once for its name's sake.
    let file = File::options().read(true).write(true).open(v.at("sealed")).unwrap();
    file.write_all_at(&bytes(100, 2), 5000).unwrap();
    file.sync_data().unwrap();
    let log = fs::metadata(v.backing().join("lethefs.log.0")).unwrap().ino();
    let (sealed, cut) = (on.ino("sealed"), on.ino("cut"));

    // Making, appending, cutting, replacing: nobody waits. (The log's own flush each second is nobody's wait.)
    flushed(&on);
    write("new", &bytes(9000, 3));
    File::options().append(true).open(v.at("new")).unwrap().write_all(&bytes(100, 4)).unwrap();
    File::options().append(true).open(v.at("sealed")).unwrap().write_all(&bytes(100, 4)).unwrap();
    write("cut", &bytes(300, 5));
    fs::create_dir(v.at("dir")).unwrap();
    fs::rename(v.at("new"), v.at("target")).unwrap();
    rustix::fs::syncfs(&file).unwrap();
    let seen = flushed(&on);
    assert!(seen.iter().all(|ino| *ino == log), "{seen:?}, the log is {log}");

    // Overwriting and syncing: one flush, the log's.
    for n in 0..5 {
        file.write_all_at(&bytes(4096, n), 4096 * (n % 4)).unwrap();
        file.sync_data().unwrap();
    }
    let seen = flushed(&on);
    assert!(seen.len() >= 5 && seen.iter().all(|ino| *ino == log), "{seen:?}, the log is {log}");
    assert!(!seen.contains(&sealed) && !seen.contains(&cut));
    // A new file: its own, and only that.
    let mut new = File::create(v.at("another")).unwrap();
    new.write_all(&bytes(8192, 6)).unwrap();
    flushed(&on);
    new.sync_data().unwrap();
    let seen = flushed(&on);
    assert_eq!(seen.iter().filter(|ino| **ino != log).collect::<Vec<_>>(), [&on.ino("another")]);
    drop((file, new));
    v.umount();
}

#[test]
fn a_log_that_cannot_be_written_or_flushed() {
    for (op, errno_wanted) in [(Op::Write, libc::ENOSPC), (Op::Write, libc::EDQUOT), (Op::Fsync, libc::EIO)] {
        let on = OnFaulty::new();
        let v = &on.v;
        fs::write(v.at("file"), bytes(20_000, 1)).unwrap();
        fs::write(v.at("other"), bytes(5000, 2)).unwrap();
        v.remount(&[]);
        let file = File::options().read(true).write(true).open(v.at("file")).unwrap();
        file.write_all_at(b"durable", 100).unwrap();
        file.sync_data().unwrap();
        let mut durable = bytes(20_000, 1);
        durable[100..107].copy_from_slice(b"durable");
        // Both files: where one finds no space, the other is taken.
        let log = ["lethefs.log.0", "lethefs.log.1"].map(|name| fs::metadata(v.backing().join(name)).unwrap().ino());
        on.store.rule(
            move |call| {
                if call.op == op && log.contains(&call.ino) { Fate::Fail(errno_wanted) } else { Fate::Pass }
            },
        );
        file.write_all_at(b"refused", 8000).unwrap();
        assert_eq!(errno(file.sync_data()), errno_wanted, "{op:?}");
        // What was there is there; the mount goes on.
        assert_eq!(fs::read(v.at("other")).unwrap(), bytes(5000, 2));
        fs::write(v.at("new"), b"files need no log").unwrap();
        drop(file);
        on.store.heal();
        if op == Op::Write {
            // Space again.
            let file = File::options().write(true).open(v.at("file")).unwrap();
            file.write_all_at(b"granted", 8000).unwrap();
            file.sync_data().unwrap();
            durable[8000..8007].copy_from_slice(b"granted");
            drop(file);
            v.umount();
        } else {
            v.crash();
        }
        v.mount(&[]);
        let now = fs::read(v.at("file")).unwrap();
        let mut with = durable.clone();
        with[8000..8007].copy_from_slice(b"refused");
        assert!(now == durable || (op == Op::Fsync && now == with), "{op:?}");
        assert_eq!(fs::read(v.at("other")).unwrap(), bytes(5000, 2));
        v.umount();
    }
}

#[test]
fn short_writes_and_errors_of_the_store_come_out_right() {
    let on = OnFaulty::new();
    let v = &on.v;
    fs::write(v.at("file"), bytes(50_000, 1)).unwrap();
    v.remount(&[]);
    on.store.rule(|call| if call.op == Op::Write { Fate::Short(1 + call.len / 3) } else { Fate::Pass });
    let file = File::options().read(true).write(true).open(v.at("file")).unwrap();
    file.write_all_at(&bytes(30_000, 2), 1000).unwrap();
    file.set_len(40_001).unwrap();
    file.sync_all().unwrap();
    fs::write(v.at("new"), bytes(70_000, 3)).unwrap();
    on.store.heal();
    let mut expected = bytes(50_000, 1);
    expected[1000..31_000].copy_from_slice(&bytes(30_000, 2));
    expected.truncate(40_001);
    drop(file);
    v.remount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), expected);
    assert_eq!(fs::read(v.at("new")).unwrap(), bytes(70_000, 3));
    // In place fails for a while: the next fsync says so, nothing is lost, and it heals.
    let ino = on.ino("file");
    on.store.rule(move |call| if call.op == Op::Write && call.ino == ino { Fate::Fail(libc::EIO) } else { Fate::Pass });
    let file = File::options().read(true).write(true).open(v.at("file")).unwrap();
    file.write_all_at(b"logged", 0).unwrap();
    on.store.calls();
    rustix::fs::syncfs(&file).unwrap();
    on.store.wait_for(|call| call.op == Op::Write && call.ino == ino);
    expected[..6].copy_from_slice(b"logged");
    assert_eq!(fs::read(v.at("file")).unwrap(), expected);
    on.store.heal();
    drop(file);
    v.remount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), expected);
    v.umount();
}

#[test]
fn after_a_failed_flush_the_log_is_kept_and_replayed() {
    let on = OnFaulty::new();
    let v = &on.v;
    fs::write(v.at("file"), bytes(20_000, 1)).unwrap();
    v.remount(&[]);
    let ino = on.ino("file");
    let mut left = 1;
    on.store.rule(move |call| {
        if call.op == Op::Fsync && call.ino == ino && left > 0 {
            left -= 1;
            return Fate::Fail(libc::EIO);
        }
        Fate::Pass
    });
    let file = File::options().read(true).write(true).open(v.at("file")).unwrap();
    file.write_all_at(b"logged", 100).unwrap();
    file.sync_data().unwrap();
    drop(file);
    // The sealer's flush of the file: whatever was put in place may be lost with it, and nobody will be told again.
    on.store.wait_for(|call| call.op == Op::Fsync && call.ino == ino);
    v.cli(&["umount", "mnt"]).is(0);
    assert_ne!(v.daemon_exit(), Some(0), "not a clean end");
    assert!(v.backing().join("lethefs.log.0").exists());
    on.store.heal();
    v.mount(&[]);
    let mut expected = bytes(20_000, 1);
    expected[100..106].copy_from_slice(b"logged");
    assert_eq!(fs::read(v.at("file")).unwrap(), expected);
    v.umount();
    assert!(!v.backing().join("lethefs.log.0").exists());
}

/// A write fails half-way, and so does cutting off what it left: that must not become part of the file.
#[test]
fn what_a_failed_write_leaves_stays_outside() {
    for grow in [true, false] {
        let on = OnFaulty::new();
        let v = &on.v;
        let file = File::create_new(v.at("file")).unwrap();
        file.write_all_at(&bytes(8192, 1), 0).unwrap();
        file.sync_all().unwrap();
        let ino = on.ino("file");
        let mut short = true;
        on.store.rule(move |call| match call.op {
            Op::Write if call.ino == ino && call.offset > 8192 => {
                if std::mem::take(&mut short) {
                    Fate::Short(5000)
                } else {
                    Fate::Fail(libc::EDQUOT)
                }
            }
            Op::Truncate if call.ino == ino => Fate::Fail(libc::EDQUOT),
            _ => Fate::Pass,
        });
        file.write_all_at(&bytes(16_384, 2), 8192).unwrap();
        assert_eq!(errno(file.sync_all()), libc::EDQUOT);
        on.store.heal();
        let mut expected = bytes(8192, 1);
        if grow {
            // Over it, with a hole; the kernel believes that there is something, until it forgets.
            fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
            file.write_all_at(b"far", 100_000).unwrap();
            file.sync_all().unwrap();
            expected.resize(100_000, 0);
            expected.extend(b"far");
        }
        drop(file);
        v.remount(&[]);
        assert!(fs::read(v.at("file")).unwrap() == expected, "grown: {grow}");
        v.umount();
    }
}

/// An append that a kill -9 or a power cut tore in the middle of a block, at a border of a sector or a page.
#[test]
fn a_torn_append_reads_as_what_was_there_before_and_zeros() {
    let v = TestVolume::mounted(&[]);
    fs::create_dir(v.at("d")).unwrap();
    // Where sectors end: the block begins at 12,884.
    let cuts: Vec<u64> = (1..).map(|n| n * 512 - 12_884 % 512).take_while(|cut| *cut < 4124).collect();
    assert!(cuts.len() == 8 && cuts.iter().any(|cut| (12_884 + cut) % 4096 == 0));
    for cut in cuts.iter().copied() {
        let file = File::create(v.at(format!("d/{cut}"))).unwrap();
        file.write_all_at(&bytes(8192, cut), 0).unwrap();
        file.sync_all().unwrap();
        file.write_all_at(&bytes(8192, 2), 8192).unwrap();
        rustix::fs::syncfs(&file).unwrap();
    }
    let inos: Vec<u64> = cuts.iter().map(|cut| fs::metadata(v.at(format!("d/{cut}"))).unwrap().ino()).collect();
    v.crash();
    let dirs = fs::read_dir(v.backing()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let files: Vec<_> = dirs.flat_map(|dir| fs::read_dir(dir).unwrap()).map(|entry| entry.unwrap()).collect();
    for (cut, ino) in cuts.iter().zip(inos) {
        let path = files.iter().find(|file| file.metadata().unwrap().ino() == ino).unwrap().path();
        let file = File::options().write(true).open(path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 512 + 4 * 4124);
        file.set_len(512 + 3 * 4124 + cut).unwrap();
    }
    v.mount(&[]);
    for cut in cuts.iter().copied() {
        let now = fs::read(v.at(format!("d/{cut}"))).unwrap_or_else(|error| panic!("{cut}: {error}"));
        assert!(now.len() >= 12_288 && now.len() < 16_384, "{cut}: {}", now.len());
        assert!(now[..8192] == bytes(8192, cut) && now[8192..12_288] == bytes(8192, 2)[..4096]);
        assert!(now[12_288..].iter().all(|byte| *byte == 0), "{cut}");
    }
    v.umount();
}
