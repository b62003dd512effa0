//! Which flushes a program waits for, counted at the backing store: no more than ext4 asks its device for, but for the log's.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Instant;

use crate::bytes;
use crate::faults::OnFaulty;
use crate::support::faulty::Op;
use crate::support::volume::TestVolume;

const TIMES: u64 = 10;

/// Makes a change and gives the file to sync.
type Change = fn(&Path, u64) -> File;

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn a_sync_flushes_the_log_or_the_file_and_nothing_twice() {
    let on = OnFaulty::new();
    let v = &on.v;
    for n in 0..TIMES {
        for kind in ["append", "overwrite", "rewrite", "punch"] {
            fs::write(v.at(format!("{kind}{n}")), bytes(20_000, n)).unwrap();
            fs::write(v.at(format!("{kind}{}", n + TIMES)), bytes(20_000, n)).unwrap();
        }
    }
    v.remount(&[]);
    // The log's own making is nobody's price.
    open(&v.at("overwrite0")).write_all_at(b"log", 0).unwrap();
    open(&v.at("overwrite0")).sync_all().unwrap();
    let log = rustix::fs::stat(v.backing().join("lethefs.log.0")).unwrap().st_ino;

    let new: Change = |root, n| {
        let mut file = File::create_new(root.join(format!("new{n}"))).unwrap();
        file.write_all(&bytes(8192, n)).unwrap();
        file
    };
    let append: Change = |root, n| {
        let mut file = File::options().append(true).open(root.join(format!("append{n}"))).unwrap();
        file.write_all(&bytes(5000, n)).unwrap();
        file
    };
    let overwrite: Change = |root, n| {
        let file = open(&root.join(format!("overwrite{n}")));
        file.write_all_at(&bytes(4096, n), 4096).unwrap();
        file
    };
    let rewrite: Change = |root, n| {
        let mut file = File::create(root.join(format!("rewrite{n}"))).unwrap();
        file.write_all(&bytes(6000, n)).unwrap();
        file
    };
    // The header that allows it, the hole, and that nothing before it counts any more.
    let punch: Change = |root, n| {
        let file = open(&root.join(format!("punch{n}")));
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, mode, 4096, 8192).unwrap();
        file
    };
    // Flushes of the file, and of the log at most: by fdatasync, by fsync.
    let table = [
        ("new", new, (1, 0), (1, 0)),
        ("append", append, (0, 1), (1, 1)),
        ("overwrite", overwrite, (0, 1), (1, 1)),
        ("rewrite", rewrite, (0, 1), (1, 1)),
        ("punch", punch, (1, 2), (1, 2)),
    ];
    for (name, change, by_data, by_all) in table {
        for (data_only, (of_file, of_log)) in [(true, by_data), (false, by_all)] {
            let (begun, mut in_log) = (Instant::now(), 0);
            for n in 0..TIMES {
                let file = change(&v.mnt(), if data_only { n } else { n + TIMES });
                let ino = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
                on.store.calls();
                if data_only {
                    file.sync_data().unwrap()
                } else {
                    file.sync_all().unwrap()
                }
                let flushes: Vec<u64> = on
                    .store
                    .calls()
                    .iter()
                    .filter(|c| matches!(c.op, Op::Fsync | Op::FsyncDir))
                    .map(|c| c.ino)
                    .collect();
                let here = flushes.iter().filter(|flushed| **flushed == ino).count();
                in_log += flushes.iter().filter(|flushed| **flushed == log).count() as u64;
                assert_eq!(here, of_file, "{name}, data only: {data_only}: {flushes:?}");
                assert!(flushes.iter().all(|flushed| [ino, log].contains(flushed)), "{name}: {flushes:?}");
            }
            // Each second the log is flushed for nobody in particular.
            let own = begun.elapsed().as_secs() + 1;
            eprintln!(
                "{name}, data only: {data_only}: {TIMES} syncs, {of_file} flushes of the file each, {in_log} of the log"
            );
            assert!(in_log <= TIMES * of_log + own, "{name}, data only: {data_only}: {in_log} flushes of the log");
        }
    }
    v.umount();
}

/// The switch for measuring: no log is made, and whoever mounts is told what that means. One that is there is not ignored.
#[test]
fn without_the_log_nothing_is_logged_and_it_is_said() {
    let v = TestVolume::mounted(&[]);
    let overwrite = |data: &[u8]| {
        let file = open(&v.at("file"));
        file.write_all_at(data, 100).unwrap();
        file.sync_all().unwrap();
    };
    fs::write(v.at("file"), bytes(20_000, 1)).unwrap();
    v.remount(&[]);
    overwrite(b"logged");
    assert!(v.backing().join("lethefs.log.0").exists());
    v.crash();
    let mounted = v.try_mount(&["-o", "unsafe_no_log"]);
    mounted.is(0).says("there is no intent log (unsafe_no_log): a crash can make files unreadable");
    let options = mounted.json()["options"].clone();
    assert!(options.as_array().unwrap().contains(&"unsafe_no_log".into()), "{options}");
    let mut expected = bytes(20_000, 1);
    expected[100..106].copy_from_slice(b"logged");
    assert!(fs::read(v.at("file")).unwrap() == expected, "replayed");
    overwrite(b"direct");
    assert!(!v.backing().join("lethefs.log.0").exists());
    v.remount(&[]);
    expected[100..106].copy_from_slice(b"direct");
    assert!(fs::read(v.at("file")).unwrap() == expected);
    v.umount();
}
