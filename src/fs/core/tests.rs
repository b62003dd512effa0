//! The sealer: what it seals, what it leaves, and what keeps it from which file.

use super::super::attributes::{Changes, SetTime};
use super::super::inode::ROOT;
use super::*;
use crate::volume::storage::recorder;
use crate::volume::testing::{self, Vault};
use crate::volume::{log, replay};

#[test]
fn what_is_written_during_the_sealers_flush_is_not_sealed_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let fs = Filesystem::new(testing::volume(dir.path()), 64, false);
    let made = fs.create(fs.owner, ROOT, b"file", 0o600, 0, true).unwrap();
    let inode = fs.inode(made.ino).unwrap();
    fs.write(made.ino, 0, b"before", false).unwrap();
    let before = fs.file(&inode).unwrap().0.as_ref().unwrap().changes();
    // The flush; and then somebody writes.
    fs.write(made.ino, 100_000, b"meanwhile", false).unwrap();
    assert_eq!(fs.seal_file(inode.clone(), before, true).unwrap_err().errno(), libc::EBUSY);
    assert!(fs.file(&inode).unwrap().0.as_ref().unwrap().unsealed());
    assert_eq!(fs.unsealed(), 1, "nobody would come by again");
    assert_eq!(fs.seal_all(), 0);
    assert!(!fs.file(&inode).unwrap().0.as_ref().unwrap().unsealed());
    assert_eq!(fs.unsealed(), 0);
}

/// The kernel sends what was written and the time of it side by side, and each may be the first to be done.
#[test]
fn a_write_that_comes_late_does_not_move_the_time_that_the_kernel_set() {
    let dir = tempfile::tempdir().unwrap();
    let fs = Filesystem::new(testing::volume(dir.path()), 64, false);
    fs.kernel_keeps_times.store(true, Ordering::Relaxed);
    let ino = fs.create(fs.owner, ROOT, b"file", 0o600, 0, true).unwrap().ino;
    let then = std::time::SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 5);
    let changes = Changes { mtime: Some(SetTime::To(then)), ..Changes::default() };
    fs.setattr(fs.owner, ino, changes).unwrap();
    let times = || {
        let inode = fs.inode(ino).unwrap();
        let own = storage::stat_fd(fs.open(&inode).unwrap().fd.as_fd()).unwrap();
        [fs.getattr(ino).unwrap().stat, own].map(|stat| (stat.st_mtime, stat.st_mtime_nsec))
    };
    for round in 0..2 {
        fs.write(ino, round * 10_000, b"late", false).unwrap();
        assert_eq!(times()[0], (1_000_000_000, 5));
        assert_eq!(fs.seal_all(), 0);
        assert_eq!(times(), [(1_000_000_000, 5); 2], "what the next mount finds");
    }
}

/// A file whose logged changes find no way into their place keeps no other file from being sealed.
#[test]
fn one_file_that_cannot_be_put_in_place_leaves_the_others_sealed() {
    let dir = testing::directory();
    let mut volume = testing::volume(dir.path());
    volume.begin_log().unwrap();
    let fs = Filesystem::new(volume, 64, false);
    let made: Vec<u64> = [b"bad".as_slice(), b"one", b"two"]
        .iter()
        .map(|name| fs.create(fs.owner, ROOT, name, 0o600, 0, true).unwrap().ino)
        .collect();
    for round in 0..2_u8 {
        for ino in &made {
            fs.write(*ino, 0, &[b'a' + round; 9000], false).unwrap();
        }
        if round == 0 {
            assert_eq!(fs.seal_all(), 0);
        }
    }
    let bad = made[0];
    recorder::rule(Some(Box::new(move |call, ino, _| {
        (call == recorder::Call::Write && ino == bad).then_some(Errno::NOSPC)
    })));
    let left = fs.seal_all();
    let sealed: Vec<bool> =
        made.iter().map(|ino| !fs.file(&fs.inode(*ino).unwrap()).unwrap().0.as_ref().unwrap().unsealed()).collect();
    assert_eq!((left, sealed), (1, vec![false, true, true]));
    assert!(fs.end_log().is_err(), "the log has what the bad file lacks");
    recorder::rule(None);
    assert_eq!(fs.seal_all(), 0);
    fs.end_log().unwrap();
    let mut bytes = [0; 9000];
    assert_eq!(fs.read(bad, 0, &mut bytes).unwrap(), 9000);
    assert!(bytes.iter().all(|byte| *byte == b'b'));
}

/// A file of `blocks` blocks, of which a crash left holes in the place of all but the first: mounted again and looked at.
fn torn(vault: &Vault, dir: &std::path::Path, blocks: u64) -> (Filesystem, Arc<Inode>) {
    let mount = || {
        let mut volume = vault.open(dir).unwrap();
        replay::replay(&volume).unwrap();
        volume.begin_log().unwrap();
        Filesystem::new(volume, 64, false)
    };
    vault.create(dir);
    let fs = mount();
    let ino = fs.create(fs.owner, ROOT, b"file", 0o600, 0, true).unwrap().ino;
    fs.write(ino, 0, &vec![b'x'; (blocks * format::BLOCK) as usize], false).unwrap();
    let fd = fs.open(&fs.inode(ino).unwrap()).unwrap().fd;
    storage::set_len(fd.as_fd(), format::backing_len(format::BLOCK)).unwrap();
    storage::set_len(fd.as_fd(), format::backing_len(blocks * format::BLOCK)).unwrap();
    let Filesystem { volume, .. } = fs;
    vault.close(volume);
    let fs = mount();
    let ino = fs.lookup(ROOT, b"file").unwrap().unwrap().ino;
    let inode = fs.inode(ino).unwrap();
    assert!(fs.file(&inode).unwrap().0.as_ref().unwrap().recovered());
    (fs, inode)
}

fn is_mended(fs: &Filesystem, inode: &Arc<Inode>, blocks: u64) {
    let (state, open) = fs.file(inode).unwrap();
    assert!(!state.as_ref().unwrap().unsealed());
    let mut sealed = vec![0; format::SEALED_BLOCK as usize];
    let mut plain = vec![1; (blocks * format::BLOCK) as usize];
    for index in 1..blocks {
        storage::read_at(open.fd.as_fd(), &mut sealed, format::block_offset(index)).unwrap();
        assert!(sealed.iter().any(|byte| *byte != 0), "block {index} is a hole in a file that has none");
    }
    state.as_ref().unwrap().read(&fs.volume, open.fd.as_fd(), 0, &mut plain).unwrap();
    assert!(plain[format::BLOCK as usize..].iter().all(|byte| *byte == 0));
}

/// What mending logs must find its place: that is reserved before, and where there is none nothing is logged.
#[test]
fn mending_on_a_full_disk_waits_for_space() {
    let (vault, dir) = (Vault::new(), testing::directory());
    let (fs, inode) = torn(&vault, dir.path(), 3);
    let file = inode.ino;
    recorder::rule(Some(Box::new(move |call, ino, _| {
        (call == recorder::Call::Reserve && ino == file).then_some(Errno::NOSPC)
    })));
    assert_eq!(fs.seal_all(), 1);
    assert!(fs.file(&inode).unwrap().0.as_ref().unwrap().unsealed());
    let blocks = |fs: &Filesystem| {
        let found = log::read(fs.volume.root().as_fd(), fs.volume.keys()).unwrap();
        found.records.iter().filter(|record| matches!(record.change, log::Change::Blocks { .. })).count()
    };
    assert_eq!(blocks(&fs), 0, "what has no place was logged");
    recorder::rule(None);
    assert_eq!(fs.seal_all(), 0);
    assert_eq!(blocks(&fs), 2);
    is_mended(&fs, &inode, 3);
    fs.end_log().unwrap();
}

/// Where the log cannot grow, mending makes room in it as writing does: of three records only one at a time has space.
#[test]
fn mending_makes_room_in_a_log_that_cannot_grow() {
    let (vault, dir) = (Vault::new(), testing::directory());
    let (fs, inode) = torn(&vault, dir.path(), 4);
    let file = inode.ino;
    recorder::rule(Some(Box::new(move |call, ino, offset| {
        (call == recorder::Call::Write && ino != file && offset > 4096).then_some(Errno::NOSPC)
    })));
    assert_eq!(fs.seal_all(), 0);
    recorder::rule(None);
    is_mended(&fs, &inode, 4);
    fs.end_log().unwrap();
}

fn logged(dir: &std::path::Path) -> Filesystem {
    let mut volume = testing::volume(dir);
    volume.begin_log().unwrap();
    Filesystem::new(volume, 64, false)
}

/// A sealed file of so many blocks.
fn sealed(fs: &Filesystem, name: &[u8], blocks: u64) -> Arc<Inode> {
    let ino = fs.create(fs.owner, ROOT, name, 0o600, 0, true).unwrap().ino;
    fs.write(ino, 0, &vec![b'x'; (blocks * format::BLOCK) as usize], false).unwrap();
    assert_eq!(fs.seal_all(), 0);
    fs.inode(ino).unwrap()
}

/// Bytes that the backing file takes.
fn space(fs: &Filesystem, inode: &Arc<Inode>) -> u64 {
    let open = fs.open(inode).unwrap();
    storage::stat_fd(open.fd.as_fd()).unwrap().st_blocks as u64 * 512
}

const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;

/// A cut that is pending gives space back when it is done: what is reserved after it is reserved after that, too.
#[test]
fn a_reservation_outlives_the_cut_before_it() {
    let dir = testing::directory();
    let fs = logged(dir.path());
    let inode = sealed(&fs, b"file", 50);
    fs.resize(&inode, 0).unwrap();
    fs.allocate(inode.ino, 0, 50 * format::BLOCK, KEEP, false).unwrap();
    fs.commit().unwrap();
    assert!(space(&fs, &inode) >= 50 * format::SEALED_BLOCK);
}

/// What is written into a hole that is still to be punched has its space reserved before the punch frees it.
#[test]
fn a_punch_keeps_the_space_of_what_is_written_after_it() {
    let dir = testing::directory();
    let fs = logged(dir.path());
    let (kept, freed) = (sealed(&fs, b"kept", 50), sealed(&fs, b"freed", 50));
    let before = space(&fs, &kept);
    for inode in [&kept, &freed] {
        fs.allocate(inode.ino, 0, 50 * format::BLOCK, PUNCH, false).unwrap();
    }
    fs.write(kept.ino, 40 * format::BLOCK, b"written", false).unwrap();
    fs.commit().unwrap();
    assert_eq!(space(&fs, &kept), before);
    assert!(space(&fs, &freed) < 4 * format::BLOCK);
    let mut read = vec![1; 50 * format::BLOCK as usize];
    fs.read(kept.ino, 0, &mut read).unwrap();
    let written = 40 * format::BLOCK as usize..40 * format::BLOCK as usize + 7;
    assert!(read.iter().enumerate().all(|(at, byte)| (*byte != 0) == written.contains(&at)));
}

/// Holes wait in memory, and a read looks at each: not for more than so many.
#[test]
fn many_holes_do_not_pile_up() {
    let dir = testing::directory();
    let fs = logged(dir.path());
    let inode = sealed(&fs, b"file", 1200);
    let mut most = 0;
    for n in 0..600 {
        fs.allocate(inode.ino, 2 * n * format::BLOCK, format::BLOCK, PUNCH, false).unwrap();
        most = most.max(usize::from(fs.file(&inode).unwrap().0.as_ref().unwrap().is_crowded()));
    }
    assert_eq!(most, 1, "so many are crowded");
    let mut read = vec![1; 1200 * format::BLOCK as usize];
    fs.read(inode.ino, 0, &mut read).unwrap();
    assert!(read.chunks(format::BLOCK as usize).enumerate().all(|(n, block)| (block[5] == 0) == (n % 2 == 0)));
    assert!(space(&fs, &inode) < 1200 * format::SEALED_BLOCK, "none of them is in place");
    assert_eq!(fs.seal_all(), 0);
}
