//! A confused deputy: logs, files and trees that somebody put back or copied between a crash and the next mount. Replaying
//! must do no harm: every file reads as one of its own states, and `fsck` finds nothing before or after.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::support::volume::TestVolume;
use crate::world::{kinds, pattern};

const LOGS: [&str; 2] = ["lethefs.log.0", "lethefs.log.1"];

fn backing_of(v: &TestVolume, dir: &Path, ino: u64) -> PathBuf {
    let mut found = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let path = found.find(|path| fs::symlink_metadata(path).unwrap().ino() == ino);
    path.unwrap_or_else(|| panic!("no {ino} in {} of {}", dir.display(), v.backing().display()))
}

fn copy(v: &TestVolume, from: &Path, to: &Path) {
    assert!(v.command("cp").args(["-a", "--"]).args([from, to]).status().unwrap().success());
}

fn clean(v: &TestVolume) {
    let run = v.cli(&["fsck", "backing", "--json"]);
    run.is(0);
    let notes = kinds(&run.json(), "findings");
    assert!(notes.iter().all(|note| note == "unclean" || note == "duplicate"), "{}", run.out);
}

/// A file in a directory, sealed, then overwritten, appended to and flushed, and the daemon killed. Its backing path, its
/// contents before and after, and a copy of its backing file from before.
struct Crashed {
    v: TestVolume,
    backing: PathBuf,
    backup: PathBuf,
    before: Vec<u8>,
    after: Vec<u8>,
}

fn crashed() -> Crashed {
    let v = TestVolume::init();
    v.mount(&[]);
    fs::create_dir(v.at("dir")).unwrap();
    let before = pattern(30_000, 1);
    fs::write(v.at("dir/file"), &before).unwrap();
    fs::write(v.at("dir/other"), pattern(5000, 2)).unwrap();
    let (dir_ino, ino) = (fs::metadata(v.at("dir")).unwrap().ino(), fs::metadata(v.at("dir/file")).unwrap().ino());
    v.umount();
    let backing = backing_of(&v, &backing_of(&v, &v.backing(), dir_ino), ino);
    let backup = v.path("backup");
    copy(&v, &backing, &backup);
    v.mount(&[]);
    let file = OpenOptions::new().read(true).write(true).open(v.at("dir/file")).unwrap();
    let mut after = before.clone();
    for (at, len, seed) in [(5000, 9000, 3_u8), (30_000, 20_000, 4), (100, 10, 5)] {
        let data = pattern(len, seed);
        file.write_all_at(&data, at as u64).unwrap();
        after.resize(after.len().max(at + len), 0);
        after[at..at + len].copy_from_slice(&data);
        // Twice: the second raises the floor.
        file.sync_data().unwrap();
        file.sync_data().unwrap();
    }
    v.crash();
    Crashed { v, backing, backup, before, after }
}

#[test]
fn an_old_log_put_back_changes_nothing() {
    let Crashed { v, after, .. } = crashed();
    for name in LOGS {
        copy(&v, &v.backing().join(name), &v.path(name));
    }
    v.mount(&[]);
    assert!(fs::read(v.at("dir/file")).unwrap() == after, "not what it was");
    let newer = pattern(20_000, 9);
    fs::write(v.at("dir/file"), &newer).unwrap();
    v.umount();
    for _ in 0..2 {
        for name in LOGS {
            copy(&v, &v.path(name), &v.backing().join(name));
        }
        clean(&v);
        let run = v.try_mount(&[]);
        run.is(0).says("they were left as they are");
        assert!(fs::read(v.at("dir/file")).unwrap() == newer, "not what it was");
        // In the middle of a later opening, too.
        let file = OpenOptions::new().write(true).open(v.at("dir/file")).unwrap();
        file.write_all_at(&newer[..100], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        v.umount();
        clean(&v);
    }
}

#[test]
fn a_file_restored_from_a_backup_before_the_mount_is_the_backup() {
    // As a new file under the old name, as tar and rsync do.
    let Crashed { v, backing, backup, before, .. } = crashed();
    let number = fs::metadata(&backing).unwrap().ino();
    fs::remove_file(&backing).unwrap();
    // Its inode number is free again, and the backup may well get it: ext4 gives it out at once.
    let spare = |n: u32| backing.with_file_name(format!("spare.{n}"));
    let got = (0..100).find(|n| {
        copy(&v, &backup, &spare(*n));
        fs::metadata(spare(*n)).unwrap().ino() == number
    });
    fs::rename(spare(got.unwrap_or(0)), &backing).unwrap();
    (0..100).for_each(|n| drop(fs::remove_file(spare(n))));
    eprintln!("the same inode number: {}", got.is_some());
    clean(&v);
    v.mount(&[]);
    assert!(fs::read(v.at("dir/file")).unwrap() == before, "not what it was");
    assert!(fs::read(v.at("dir/other")).unwrap() == pattern(5000, 2), "not what it was");
    v.umount();
    clean(&v);

    // Into the same file: just as it was when the log was begun, so the log goes on from there.
    let Crashed { v, backing, backup, before, after } = crashed();
    let bytes = fs::read(&backup).unwrap();
    let file = OpenOptions::new().write(true).open(&backing).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    drop(file);
    clean(&v);
    v.mount(&[]);
    let now = fs::read(v.at("dir/file")).unwrap();
    for (at, byte) in now.iter().enumerate() {
        let old = before.get(at).copied().unwrap_or(0);
        assert!(*byte == old || after.get(at) == Some(byte), "byte {at} is {byte}");
    }
    assert!(now.len() >= before.len());
    v.umount();
    clean(&v);
}

#[test]
fn of_a_copied_subtree_only_the_original_is_replayed() {
    let Crashed { v, backing, before, after, .. } = crashed();
    let dir = backing.parent().unwrap();
    let twin = v.backing().join("twin");
    copy(&v, dir, &twin);
    clean_but_for_the_copy(&v);
    v.mount(&[]);
    assert!(fs::read(v.at("dir/file")).unwrap() == after, "not what it was");
    v.umount();
    // The copy was not touched: in its own place it reads as one of the states before.
    fs::remove_dir_all(dir).unwrap();
    fs::rename(&twin, dir).unwrap();
    clean(&v);
    v.mount(&[]);
    let now = fs::read(v.at("dir/file")).unwrap();
    for (at, byte) in now.iter().enumerate() {
        let old = before.get(at).copied().unwrap_or(0);
        assert!(*byte == old || after.get(at) == Some(byte), "byte {at} is {byte}");
    }
    v.umount();
    clean(&v);
}

/// The copy's own name does not decrypt, and its objects are there twice: that is all.
fn clean_but_for_the_copy(v: &TestVolume) {
    let run = v.cli(&["fsck", "backing", "--json"]);
    run.is_code(21);
    assert_eq!(kinds(&run.json(), "findings"), ["duplicate", "name", "unclean"], "{}", run.out);
}

/// The whole volume, moved between the crash and the mount: all numbers are others, and the log still finds its file.
#[test]
fn a_volume_moved_as_a_whole_is_replayed() {
    let Crashed { v, after, .. } = crashed();
    let moved = v.path("moved");
    copy(&v, &v.backing(), &moved);
    fs::remove_dir_all(v.backing()).unwrap();
    fs::rename(&moved, v.backing()).unwrap();
    clean(&v);
    v.mount(&[]);
    assert!(fs::read(v.at("dir/file")).unwrap() == after, "not what it was");
    v.umount();
    clean(&v);
}

/// So deep that no path reaches it: what was flushed there is replayed like anything else.
#[test]
fn a_file_deeper_than_any_path_is_replayed() {
    use rustix::fs::{Mode, OFlags, mkdirat, open, openat};
    let v = TestVolume::init();
    v.mount(&[]);
    let rwx = Mode::RWXU;
    let descend = |make: bool| {
        let mut at = open(v.mnt(), OFlags::DIRECTORY, rwx).unwrap();
        for n in 0..400 {
            let name = format!("level {n}");
            if make {
                mkdirat(&at, &name, rwx).unwrap();
            }
            at = openat(&at, &name, OFlags::DIRECTORY, rwx).unwrap();
        }
        at
    };
    let dir = descend(true);
    let file = openat(&dir, "file", OFlags::CREATE | OFlags::RDWR, rwx).unwrap();
    rustix::io::pwrite(&file, &pattern(9000, 1), 0).unwrap();
    drop((file, dir));
    v.remount(&[]);
    let dir = descend(false);
    let file = openat(&dir, "file", OFlags::RDWR, rwx).unwrap();
    rustix::io::pwrite(&file, &pattern(4096, 2), 0).unwrap();
    rustix::fs::fdatasync(&file).unwrap();
    v.crash();
    drop((file, dir));
    clean(&v);
    v.try_mount(&[]).is(0);
    let file = openat(descend(false), "file", OFlags::RDONLY, rwx).unwrap();
    let mut now = vec![0; 4096];
    rustix::io::pread(&file, &mut now[..], 0).unwrap();
    assert!(now == pattern(4096, 2), "what was flushed is lost");
    drop(file);
    v.umount();
    clean(&v);
}

/// A check judges a file as the next mount will: what a replay would not do to it excuses nothing.
#[test]
fn the_log_excuses_only_the_file_that_it_is_about() {
    let Crashed { v, backing, backup, .. } = crashed();
    // Restored as another file, and damaged in a block that the log holds for the one that was there.
    copy(&v, &backup, &backing.with_file_name("restored"));
    fs::rename(backing.with_file_name("restored"), &backing).unwrap();
    let file = OpenOptions::new().write(true).open(&backing).unwrap();
    file.write_all_at(b"damage", 512 + 4124 * 2 + 100).unwrap();
    let run = v.cli(&["fsck", "backing", "--json"]);
    run.is_code(21);
    assert_eq!(kinds(&run.json(), "findings"), ["block", "unclean"], "{}", run.out);
    v.mount(&[]);
    assert!(fs::read(v.at("dir/file")).is_err());
    v.umount();
}
