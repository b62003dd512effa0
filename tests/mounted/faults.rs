//! A backing store that fails: the error reaches the program that asks, what was there stays, and the mount goes on.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;

use rustix::fs::{CWD, RenameFlags};

use crate::support::faulty::{Fate, Faulty, Op};
use crate::support::volume::{Output, TestVolume};
use crate::{bytes, errno, names};

/// A volume on a store that fails when told to.
struct OnFaulty {
    v: TestVolume,
    // Dropped after the volume: the daemon must be gone first.
    store: Faulty,
}

impl OnFaulty {
    fn new() -> Self {
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
