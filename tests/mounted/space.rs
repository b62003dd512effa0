//! fallocate(2) and what follows from it: holes, zeroed ranges, reservations (docs/decisions/0012-punch.md). Their contents
//! and errors against the filesystem below: `differential.rs`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, chown};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::reader::verify;
use crate::support::disk::Disk;
use crate::support::volume::TestVolume;
use crate::{as_user, bytes};

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE;
const MIB: u64 = 1 << 20;

fn open(v: &TestVolume, name: &str) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(v.at(name)).unwrap()
}

/// As [`bytes`], with zeros in this range.
fn punched(len: usize, range: std::ops::Range<usize>) -> Vec<u8> {
    let mut data = bytes(len, 1);
    data[range].fill(0);
    data
}

#[test]
fn a_hole_gives_its_space_back_and_a_zeroed_range_keeps_it() {
    let v = TestVolume::mounted(&[]);
    for name in ["hole", "zeros"] {
        fs::write(v.at(name), bytes(1 << 20, 1)).unwrap();
    }
    v.remount(&[]);
    let (hole, zeros) = (open(&v, "hole"), open(&v, "zeros"));
    let before = hole.metadata().unwrap().blocks();
    fallocate(&hole, PUNCH, 100_000, 600_000).unwrap();
    fallocate(&zeros, ZERO, 100_000, 600_000).unwrap();
    let expected = punched(1 << 20, 100_000..700_000);
    let check = || {
        for name in ["hole", "zeros"] {
            assert!(fs::read(v.at(name)).unwrap() == expected, "{name}");
        }
    };
    check();
    hole.sync_all().unwrap();
    zeros.sync_all().unwrap();
    // 512 bytes each; at the edges a block of ours is written, and one of the backing filesystem's stays.
    let freed = before - hole.metadata().unwrap().blocks();
    assert!((590_000 / 512..=600_000 / 512).contains(&freed), "{freed} blocks of {before}");
    assert_eq!(zeros.metadata().unwrap().blocks(), before);
    check();
    drop((hole, zeros));
    v.remount(&[]);
    check();
    v.umount();
    verify(&v);
    v.cli(&["fsck", "backing"]).is(0);
}

/// What was acknowledged stays punched, whatever the log still has of what was there before.
#[test]
fn a_kill_brings_nothing_back_that_was_flushed_away() {
    let v = TestVolume::mounted(&[]);
    fs::write(v.at("file"), bytes(100_000, 1)).unwrap();
    v.remount(&[]);
    let file = open(&v, "file");
    file.write_all_at(&[7; 40_960], 8192).unwrap();
    file.sync_data().unwrap();
    fallocate(&file, PUNCH, 8192, 40_960).unwrap();
    file.sync_data().unwrap();
    // Not acknowledged: as it was, or zeros.
    fallocate(&file, PUNCH, 81_920, 4096).unwrap();
    drop(file);
    v.crash();
    v.mount(&[]);
    let read = fs::read(v.at("file")).unwrap();
    let expected = punched(100_000, 8192..49_152);
    assert!(
        read == expected
            || read == {
                let mut e = expected.clone();
                e[81_920..86_016].fill(0);
                e
            }
    );
    v.umount();
    verify(&v);
    v.cli(&["fsck", "backing"]).is(0);
}

/// The same on real filesystems whose power goes, with holes of every shape, acknowledged and not.
#[test]
fn a_power_cut_leaves_what_was_flushed_punched_and_the_rest_old_or_zeros() {
    for kind in ["ext4", "xfs"] {
        let v = TestVolume::new();
        let disk = Disk::with(&v, kind, 320 * MIB, "");
        v.init_with(&v.file_uri());
        v.mount(&[]);
        for round in 0..6_u64 {
            let name = format!("file{round}");
            fs::write(v.at(&name), bytes(1 << 20, 1)).unwrap();
            v.remount(&[]);
            let file = open(&v, &name);
            // Overwritten before, in the log; the first hole over it.
            file.write_all_at(&[7; 40_960], 90_000).unwrap();
            file.sync_data().unwrap();
            let (at, len) = (80_000 + round * 1111, 4096 << round);
            fallocate(&file, if round % 2 == 0 { PUNCH } else { ZERO }, at, len).unwrap();
            if round % 3 == 0 { file.sync_all() } else { file.sync_data() }.unwrap();
            // Put in place by another's flush perhaps, by nobody's of its own.
            fallocate(&file, PUNCH, 700_000, 100_000).unwrap();
            let other = open(&v, "other");
            other.write_all_at(b"x", 0).unwrap();
            other.sync_data().unwrap();
            drop((file, other));
            disk.shut_down();
            v.crash();
            disk.power_on();
            v.cli(&["fsck", "backing"]).is(0);
            v.mount(&[]);
            let read = fs::read(v.at(&name)).unwrap();
            let mut expected = bytes(1 << 20, 1);
            expected[90_000..130_960].fill(7);
            expected[at as usize..(at + len) as usize].fill(0);
            for (n, (block, old)) in read.chunks(4096).zip(expected.chunks(4096)).enumerate() {
                let from = (700_000_usize.max(n * 4096) - n * 4096).min(4096);
                let until = (800_000_usize.max(n * 4096) - n * 4096).min(4096);
                let mut zeroed = old.to_vec();
                zeroed[from.min(until)..until].fill(0);
                assert!(block == old || block == zeroed, "{kind}, round {round}: block {n}");
            }
            assert_eq!(read.len(), 1 << 20);
        }
        v.umount();
        verify(&v);
    }
}

/// A hole is known by the header: a file that had some and has none any more takes no planted one.
#[test]
fn zeros_planted_in_a_file_whose_holes_are_filled_are_no_holes() {
    let v = TestVolume::mounted(&[]);
    for name in ["filled", "never"] {
        fs::write(v.at(name), bytes(20_480, 1)).unwrap();
    }
    v.remount(&[]);
    let file = open(&v, "filled");
    fallocate(&file, PUNCH, 4096, 8192).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&bytes(8192, 2), 4096).unwrap();
    drop(file);
    let inodes = ["filled", "never"].map(|name| fs::metadata(v.at(name)).unwrap().ino());
    v.umount();
    for entry in fs::read_dir(v.backing()).unwrap().map(Result::unwrap) {
        if inodes.contains(&entry.metadata().unwrap().ino()) {
            let backing = File::options().write(true).open(entry.path()).unwrap();
            backing.write_all_at(&[0; 4124], 512 + 3 * 4124).unwrap();
        }
    }
    v.mount(&[]);
    for name in ["filled", "never"] {
        assert_eq!(fs::read(v.at(name)).unwrap_err().raw_os_error(), Some(libc::EIO), "{name}");
    }
    v.umount();
}

#[test]
fn what_is_not_offered_says_so_and_changes_nothing() {
    let v = TestVolume::mounted(&[]);
    fs::write(v.at("file"), bytes(20_480, 1)).unwrap();
    let file = open(&v, "file");
    let others = [
        FallocateFlags::COLLAPSE_RANGE,
        FallocateFlags::INSERT_RANGE,
        FallocateFlags::UNSHARE_RANGE,
        FallocateFlags::PUNCH_HOLE,
        PUNCH | ZERO,
    ];
    for mode in others {
        assert_eq!(fallocate(&file, mode, 4096, 4096), Err(Errno::OPNOTSUPP), "{mode:?}");
    }
    assert_eq!(fallocate(&file, PUNCH, 4096, 0), Err(Errno::INVAL));
    // Beyond what the filesystem below can hold, in whatever words it says so.
    let refused = fallocate(&file, FallocateFlags::empty(), 0, i64::MAX as u64 - 4096).unwrap_err();
    assert!([Errno::FBIG, Errno::NOSPC].contains(&refused), "{refused}");
    assert!(fs::read(v.at("file")).unwrap() == bytes(20_480, 1));
    drop(file);
    v.umount();
}

/// Linux takes these bits away from whoever may not keep them (file_remove_privs); the kernel leaves it to us.
#[test]
fn setuid_and_setgid_bits_do_not_survive_an_ordinary_users_fallocate() {
    let v = TestVolume::init();
    v.open_to_all();
    v.mount(&["-o", "allow_other"]);
    fs::set_permissions(v.mnt(), fs::Permissions::from_mode(0o755)).unwrap();
    for (n, mode) in [PUNCH, ZERO, FallocateFlags::empty(), FallocateFlags::KEEP_SIZE].into_iter().enumerate() {
        let path = v.at(format!("file{n}"));
        fs::write(&path, bytes(20_480, 1)).unwrap();
        chown(&path, Some(1000), Some(1000)).unwrap();
        let bits = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6775)).unwrap();
        fallocate(File::options().write(true).open(&path).unwrap(), mode, 4096, 4096).unwrap();
        assert_eq!(bits(), 0o6775, "root keeps them");
        as_user(1000, 1000, || fallocate(File::options().write(true).open(&path).unwrap(), mode, 4096, 4096)).unwrap();
        assert_eq!(bits(), 0o775, "{mode:?}");
    }
    v.umount();
}

/// What fallocate promised is there when everything else is taken.
#[test]
fn reserved_space_can_be_written_on_a_full_disk() {
    for kind in ["ext4", "xfs"] {
        let v = TestVolume::new();
        // xfs has no smaller ones.
        let disk = Disk::with(&v, kind, 320 * MIB, "");
        v.init_with(&v.file_uri());
        v.mount(&[]);
        fs::write(v.at("sealed"), bytes(10_000, 1)).unwrap();
        v.remount(&[]);
        // The log is made with the first change of a sealed file.
        open(&v, "sealed").write_all_at(b"x", 5).unwrap();
        let (grown, kept, more) = (open(&v, "grown"), open(&v, "kept"), open(&v, "more"));
        fallocate(&grown, FallocateFlags::empty(), 0, 4 * MIB).unwrap();
        fallocate(&kept, FallocateFlags::KEEP_SIZE, 0, 4 * MIB).unwrap();
        assert_eq!((grown.metadata().unwrap().len(), kept.metadata().unwrap().len()), (4 * MIB, 0));
        assert!(kept.metadata().unwrap().blocks() * 512 >= 4 * MIB);
        rustix::fs::syncfs(&grown).unwrap();
        disk.fill(0);
        let data = bytes(4 << 20, 3);
        for (name, file) in [("grown", &grown), ("kept", &kept)] {
            for (n, part) in data.chunks(65_536).enumerate() {
                let written = file.write_all_at(part, n as u64 * 65_536).and_then(|()| file.sync_data());
                written.unwrap_or_else(|error| panic!("{kind}: {name}, part {n}: {error}"));
            }
        }
        // And what nobody reserved is not.
        assert_eq!(fallocate(&more, FallocateFlags::empty(), 0, 4 * MIB), Err(Errno::NOSPC), "{kind}");
        drop((grown, kept, more));
        v.remount(&[]);
        for name in ["grown", "kept"] {
            assert!(fs::read(v.at(name)).unwrap() == data, "{kind}: {name}");
        }
        v.umount();
        disk.free();
    }
}

/// SEEK_DATA and SEEK_HOLE are the kernel's own, to whom all of a file is data: with its writeback cache what a program has
/// just written into a hole is not known to us yet, and a copy that trusts our answer would leave it out.
#[test]
fn nothing_that_was_written_is_taken_for_a_hole() {
    let v = TestVolume::mounted(&[]);
    let file = open(&v, "sparse");
    file.set_len(MIB).unwrap();
    file.sync_all().unwrap();
    // In the page cache only.
    file.write_all_at(b"data", 524_288).unwrap();
    let data = seek(&file, SeekFrom::Data(0)).unwrap();
    assert!(data <= 524_288, "data at {data}");
    let hole = seek(&file, SeekFrom::Hole(data)).unwrap();
    assert!(hole > 524_288, "a hole at {hole}");
    assert_eq!(seek(&file, SeekFrom::Data(MIB)), Err(Errno::NXIO));
    let copied = std::process::Command::new("cp").arg("--sparse=always").arg(v.at("sparse")).arg(v.at("copy")).status();
    assert!(copied.unwrap().success());
    assert_eq!(fs::read(v.at("copy")).unwrap(), fs::read(v.at("sparse")).unwrap());
    drop(file);
    v.umount();
}
