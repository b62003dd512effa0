//! A backing filesystem that is really full, over its quota or read-only, while many programs write: who syncs hears of it,
//! nothing that was acknowledged is lost, the mount survives, and once the trouble is over everything goes on.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::disk::Disk;
use crate::support::volume::TestVolume;
use crate::support::writers::{self, Worker};
use crate::{bytes, errno};

/// What there is too little of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Short {
    Space,
    Quota,
}

struct Tight {
    // Dropped in this order: the daemon of `v` holds on to what the disk lets go of.
    disk: Disk,
    v: TestVolume,
    short: Short,
}

impl Tight {
    fn new(kind: &str, size: u64, short: Short) -> Self {
        let v = TestVolume::new();
        let disk = Disk::with(&v, kind, size, "");
        if short == Short::Quota {
            disk.count_quota();
        }
        v.init_with(&v.file_uri());
        Self { disk, v, short }
    }

    /// From now on there is so much left, and no more.
    fn squeeze(&self, leave: u64) {
        match self.short {
            Short::Space => self.disk.fill(leave),
            Short::Quota => self.disk.quota(Some(self.disk.quota_used() + leave)),
        }
    }

    fn relieve(&self) {
        match self.short {
            Short::Space => self.disk.free(),
            Short::Quota => self.disk.quota(None),
        }
    }

    fn errno(&self) -> i32 {
        match self.short {
            Short::Space => libc::ENOSPC,
            Short::Quota => libc::EDQUOT,
        }
    }
}

/// Sets a flag at its end, whatever that is: who waits for it must not wait for a thread that failed.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Every worker does so many steps, none of which may fail.
fn work(workers: &mut [Worker], steps: u32) {
    let cut = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in workers {
            let cut = &cut;
            scope.spawn(move || {
                for n in 0..steps {
                    let more = worker.writer.step(cut).unwrap_or_else(|error| panic!("{} {n}: {error}", worker.name));
                    if !more {
                        break;
                    }
                }
            });
        }
    });
}

/// Every worker goes on until one that only grows has failed three times, and then a while longer. Who failed how often.
fn work_into(workers: &mut [Worker], wanted: &[i32]) -> BTreeMap<&'static str, u32> {
    let (cut, full) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for worker in workers {
            let (cut, full) = (&cut, &full);
            threads.push(scope.spawn(move || {
                let grows = worker.name == "append-large";
                let _at_end = grows.then_some(SetAtEnd(full));
                let (mut failed, mut after) = (0, 0);
                while after < 30 {
                    match worker.writer.step(cut) {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(error) => {
                            let told = error.raw_os_error();
                            assert!(wanted.iter().any(|errno| Some(*errno) == told), "{}: {error}", worker.name);
                            worker.writer.failed();
                            failed += 1;
                        }
                    }
                    if grows && failed == 3 {
                        full.store(true, Ordering::SeqCst);
                    }
                    after += u32::from(full.load(Ordering::SeqCst));
                }
                (worker.name, failed)
            }));
        }
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    })
}

/// After the trouble: what failed in the background meanwhile may be told once more; then everything works.
fn recover(workers: &mut [Worker], wanted: i32) {
    let cut = AtomicBool::new(false);
    for worker in workers.iter_mut() {
        let (mut well, mut failed) = (0, 0);
        while well < 15 {
            match worker.writer.step(&cut) {
                Ok(true) => well += 1,
                Ok(false) => break,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(wanted), "{}", worker.name);
                    worker.writer.failed();
                    (well, failed) = (0, failed + 1);
                    assert!(failed < 3, "{}: {error}, again and again", worker.name);
                }
            }
        }
    }
}

fn check(workers: &[Worker], when: &str, v: &TestVolume) {
    for worker in workers {
        worker.check().unwrap_or_else(|harm| panic!("{when}: {harm:?}\n{}", v.log()));
    }
}

/// Nothing is held open any more.
fn begin_again(workers: &mut [Worker]) {
    workers.iter_mut().for_each(|worker| worker.writer.begin_again());
}

/// How the trouble goes on.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// Things are removed, and then there is room again.
    Room,
    /// Unmounted and mounted while there is none.
    Unmount,
    /// Killed and mounted while there is none.
    Kill,
}

/// Mounts the volume, and then there is room.
fn mount_without_room(tight: &Tight, workers: &[Worker], name: &str) {
    let v = &tight.v;
    let mount = v.try_mount(&[]);
    if mount.code == Some(0) {
        check(workers, "mounted without room", v);
        tight.relieve();
    } else {
        mount.is(15).says("cannot be replayed: free some space in the backing filesystem");
        eprintln!("{name}: the mount waits for room");
        tight.relieve();
        v.mount(&[]);
    }
}

fn one_round(tight: &Tight, name: &str, leave: u64, then: Then, seed: u64) {
    let Tight { disk: _, v, short: _ } = tight;
    v.mount(&[]);
    let root = v.at(name);
    fs::create_dir(&root).unwrap();
    File::open(v.mnt()).unwrap().sync_all().unwrap();
    let mut workers = writers::all(&root, seed);
    work(&mut workers, 12);
    // Sealed files are what is overwritten then.
    begin_again(&mut workers);
    v.remount(&[]);
    check(&workers, "before", v);
    tight.squeeze(leave);
    let failed = work_into(&mut workers, &[tight.errno()]);
    eprintln!("{name}: {leave} bytes left, then {then:?}; failed: {failed:?}");
    assert!(failed["append-large"] > 0);
    check(&workers, "while there is no room", v);
    match then {
        Then::Room => {
            // What a person does first. (btrfs itself refuses to remove anything above its quota.)
            let gone = workers.remove(workers.iter().position(|worker| worker.name == "moves").unwrap());
            if tight.short == Short::Space {
                gone.remove().unwrap();
            }
            tight.relieve();
        }
        Then::Unmount => {
            begin_again(&mut workers);
            v.cli(&["umount", "mnt"]).is(0);
            // What finds no room in its place is kept in the log, and said.
            let clean = v.daemon_exit() == Some(0);
            assert!(!clean || !v.backing().join("lethefs.log.0").exists());
            assert!(clean || v.log().contains("the mount did not end cleanly: "), "{}", v.log());
            mount_without_room(tight, &workers, name);
        }
        Then::Kill => {
            begin_again(&mut workers);
            v.crash();
            mount_without_room(tight, &workers, name);
        }
    }
    check(&workers, "with room again", v);
    recover(&mut workers, tight.errno());
    check(&workers, "after more work", v);
    begin_again(&mut workers);
    v.remount(&[]);
    check(&workers, "at the end", v);
    remove(&root);
    v.umount();
}

fn rounds(tight: &Tight) {
    let seed = std::env::var("LETHEFS_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    eprintln!("LETHEFS_TEST_SEED={seed}");
    // From nothing at all to more than the log has from the beginning.
    let leave = [0, 700 << 10, 1500 << 10, 5 << 20];
    for (n, leave) in (0..).zip(leave) {
        let then = [Then::Room, Then::Unmount, Then::Kill][(n + seed as usize) % 3];
        one_round(tight, &format!("round{n}"), leave, then, seed ^ (n as u64) << 8);
    }
}

#[test]
fn no_space_on_ext4() {
    rounds(&Tight::new("ext4", 96 << 20, Short::Space));
}

#[test]
fn no_space_on_xfs() {
    rounds(&Tight::new("xfs", 320 << 20, Short::Space));
}

/// A quota of btrfs: the kernels at hand have none for ext4 and xfs. Nothing is overwritten in place there, so that here
/// what is logged may find no room in its place.
#[test]
fn over_quota_on_btrfs() {
    rounds(&Tight::new("btrfs", 512 << 20, Short::Quota));
}

/// A database on a full disk: overwriting what is there needs no space, however often.
#[test]
fn overwriting_goes_on_without_space() {
    for kind in ["ext4", "xfs"] {
        let tight = Tight::new(kind, 320 << 20, Short::Space);
        let v = &tight.v;
        v.mount(&[]);
        // The kernel's requests have up to 1 MiB.
        let mut expected = bytes(3 << 20, 1);
        // Backwards: a file that had holes once.
        let file = File::create(v.at("file")).unwrap();
        for from in [2 << 20, 1 << 20, 0] {
            file.write_all_at(&expected[from..from + (1 << 20)], from as u64).unwrap();
            file.sync_all().unwrap();
        }
        drop(file);
        v.remount(&[]);
        let file = File::options().read(true).write(true).open(v.at("file")).unwrap();
        // The first change makes the log.
        file.write_all_at(&expected[..10], 0).unwrap();
        file.sync_data().unwrap();
        tight.squeeze(0);
        for n in 0..450_u64 {
            let (at, data) = ((n * 7919 % 760 * 4096) as usize, bytes(if n % 100 == 0 { 1_500_000 } else { 4096 }, n));
            let at = at.min(expected.len() - data.len());
            file.write_all_at(&data, at as u64).unwrap();
            file.sync_data().unwrap_or_else(|error| panic!("{kind}, {n}: {error}\n{}", v.log()));
            expected[at..at + data.len()].copy_from_slice(&data);
        }
        drop(file);
        assert!(fs::read(v.at("file")).unwrap() == expected);
        v.crash();
        v.mount(&[]);
        assert!(fs::read(v.at("file")).unwrap() == expected);
        v.umount();
    }
}

/// What a program meets that tries everything on a filesystem that cannot be written to.
fn nothing_can_be_changed(v: &TestVolume, wanted: &[i32]) {
    let tried: [(&str, std::io::Result<()>); 7] = [
        ("create", fs::write(v.at("new"), b"new")),
        ("mkdir", fs::create_dir(v.at("newdir"))),
        ("rename", fs::rename(v.at("durable"), v.at("renamed"))),
        ("unlink", fs::remove_file(v.at("durable"))),
        ("truncate", File::options().write(true).open(v.at("durable")).and_then(|file| file.set_len(10))),
        ("chmod", fs::set_permissions(v.at("durable"), std::os::unix::fs::PermissionsExt::from_mode(0o600))),
        (
            "overwrite",
            File::options().write(true).open(v.at("durable")).and_then(|file| {
                file.write_all_at(b"never", 5000)?;
                file.sync_all()
            }),
        ),
    ];
    for (what, result) in tried {
        let told = errno(result);
        assert!(wanted.contains(&told), "{what}: {told}");
    }
}

/// As the administrator does it, while nothing is open for writing.
#[test]
fn a_backing_filesystem_that_is_remounted_read_only() {
    for kind in ["ext4", "xfs"] {
        let v = TestVolume::new();
        let disk = Disk::new(&v, kind);
        v.init_with(&v.file_uri());
        v.mount(&[]);
        fs::write(v.at("durable"), bytes(20_000, 1)).unwrap();
        let file = File::options().read(true).write(true).open(v.at("durable")).unwrap();
        file.sync_all().unwrap();
        // In use for writing: the kernel does not let it happen, and nothing has happened.
        disk.remount("ro").unwrap_err();
        file.write_all_at(b"still", 0).unwrap();
        file.sync_all().unwrap();
        let mut expected = bytes(20_000, 1);
        expected[..5].copy_from_slice(b"still");
        drop(file);

        v.remount(&[]);
        disk.remount("ro").unwrap();
        nothing_can_be_changed(&v, &[libc::EROFS]);
        // What was never written is in the kernel's cache, where it stays until it is dropped or read anew.
        drop_caches();
        assert!(fs::read(v.at("durable")).unwrap() == expected, "{kind}");
        disk.remount("rw").unwrap();
        let file = File::options().read(true).write(true).open(v.at("durable")).unwrap();
        file.write_all_at(b"again", 10_000).unwrap();
        file.sync_all().unwrap_or_else(|error| panic!("{kind}: {error}\n{}", v.log()));
        drop(file);
        expected[10_000..10_005].copy_from_slice(b"again");
        fs::write(v.at("new"), b"new").unwrap();
        assert!(fs::read(v.at("durable")).unwrap() == expected, "{kind}");
        v.remount(&[]);
        assert!(fs::read(v.at("durable")).unwrap() == expected, "{kind}");
        assert_eq!(fs::read(v.at("new")).unwrap(), b"new");
        // Unmounted while it is read-only.
        v.remount(&[]);
        disk.remount("ro").unwrap();
        assert!(fs::read(v.at("durable")).unwrap() == expected);
        v.umount();
        let refused = v.try_mount(&[]);
        eprintln!("{kind}: mount on a read-only filesystem: {:?} {}", refused.code, refused.err);
        if refused.code == Some(0) {
            v.umount();
        }
        v.mount(&["-o", "ro"]);
        assert!(fs::read(v.at("durable")).unwrap() == expected);
        v.umount();
    }
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// The backing filesystem finds an error and goes read-only (ext4), or shuts itself down (xfs), in the middle of everything.
#[test]
fn a_backing_filesystem_that_gives_up() {
    for kind in ["ext4", "xfs"] {
        let v = TestVolume::new();
        let disk = Disk::with(&v, kind, 512 << 20, if kind == "ext4" { "errors=remount-ro" } else { "" });
        v.init_with(&v.file_uri());
        v.mount(&[]);
        fs::write(v.at("durable"), bytes(20_000, 1)).unwrap();
        let root = v.at("root");
        fs::create_dir(&root).unwrap();
        File::open(v.mnt()).unwrap().sync_all().unwrap();
        let mut workers = writers::all(&root, 7);
        work(&mut workers, 12);
        begin_again(&mut workers);
        v.remount(&[]);
        work(&mut workers, 12);
        if kind == "ext4" {
            disk.find_an_error();
        } else {
            disk.shut_down();
        }
        let failed = work_into(&mut workers, &[libc::EROFS, libc::EIO]);
        eprintln!("{kind}: failed {failed:?}");
        let silent: Vec<_> = failed.iter().filter(|(name, n)| **n == 0 && **name != "unsynced").collect();
        assert!(silent.is_empty(), "{kind}: these never heard of it: {silent:?}");
        nothing_can_be_changed(&v, &[libc::EROFS, libc::EIO]);
        if kind == "ext4" {
            drop_caches();
            check(&workers, "read-only", &v);
            assert!(fs::read(v.at("durable")).unwrap() == bytes(20_000, 1));
        }
        begin_again(&mut workers);
        // The mount ends when it is told to, and says that the end was not a clean one.
        v.cli(&["umount", "mnt"]).is(0);
        assert_ne!(v.daemon_exit(), Some(0), "{kind}: {}", v.log());
        disk.unmount();
        if kind == "ext4" {
            // What ext4 asks for after an error.
            let image = v.path("disk.img");
            let code = Command::new("/sbin/e2fsck").args(["-f", "-y"]).arg(&image).output().unwrap().status.code();
            assert!(code.is_some_and(|code| code < 4), "{code:?}");
        }
        disk.mount();
        v.mount(&[]);
        check(&workers, "after its repair", &v);
        assert!(fs::read(v.at("durable")).unwrap() == bytes(20_000, 1));
        recover(&mut workers, libc::EIO);
        begin_again(&mut workers);
        v.remount(&[]);
        check(&workers, "at the end", &v);
        remove(&root);
        v.umount();
    }
}

fn remove(root: &Path) {
    fs::remove_dir_all(root).unwrap();
}
