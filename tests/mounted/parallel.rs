//! Many threads in one tree. Whatever the order, each file read is one that somebody wrote, and nothing waits for ever.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};

use crate::reader::verify;
use crate::support::fuse_for_all::FuseForAll;
use crate::support::volume::TestVolume;
use crate::users::NOBODY;
use crate::{as_user, bytes};

const THREADS: u64 = 6;
const STEPS: usize = 1200;

/// A file's contents: which, and that.
fn contents(seed: u64) -> Vec<u8> {
    let body = bytes((seed % 15_000) as usize, seed);
    [seed.to_le_bytes().as_slice(), &body].concat()
}

/// What is there is the beginning of something whole.
fn check(data: &[u8]) {
    if let Some(seed) = data.first_chunk() {
        assert!(contents(u64::from_le_bytes(*seed)).starts_with(data), "a file that nobody wrote");
    }
}

/// What a race may end with.
#[track_caller]
fn may_fail<T>(result: std::io::Result<T>) -> Option<T> {
    // EPERM: a link to what has just become a directory.
    let races = [
        libc::EPERM,
        libc::ENOENT,
        libc::EEXIST,
        libc::ENOTEMPTY,
        libc::EINVAL,
        libc::ENOTDIR,
        libc::EISDIR,
        libc::EBUSY,
    ];
    match result {
        Ok(value) => Some(value),
        Err(error) if races.contains(&error.raw_os_error().unwrap_or(0)) => None,
        Err(error) => panic!("{error}"),
    }
}

fn work(root: &Path, thread: u64) -> usize {
    let mut state = thread + 1;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize) % below
    };
    let mut held: Option<(File, u64)> = None;
    let mut worked = 0;
    for step in 0..STEPS {
        let mut path = || -> PathBuf {
            let mut path = root.to_owned();
            for _ in 0..random(3) {
                path.push(format!("d{}", random(4)));
            }
            let name = random(40);
            // Some with names that are long on the backing side.
            path.push(if name % 8 == 0 { format!("{}{name}", "n".repeat(200)) } else { format!("f{name}") });
            path
        };
        let (one, two) = (path(), path());
        let seed = thread * 1_000_000 + step as u64;
        let done = match random(13) {
            0..=2 => may_fail(File::options().read(true).write(true).create_new(true).open(&one)).map(|mut file| {
                let data = contents(seed);
                file.write_all(&data[..data.len() / 2]).unwrap();
                file.write_all(&data[data.len() / 2..]).unwrap();
                held = Some((file, seed));
            }),
            3 | 4 => may_fail(fs::read(&one)).map(|data| check(&data)),
            5 => may_fail(fs::rename(&one, &two)),
            6 => may_fail(
                Ok(rustix::fs::renameat_with(CWD, &one, CWD, &two, RenameFlags::EXCHANGE)).and_then(|r| Ok(r?)),
            ),
            7 => may_fail(fs::remove_file(&one)),
            8 if !one.is_dir() => may_fail(fs::hard_link(&one, &two)),
            9 => may_fail(symlink("t/".repeat(350), &one)).and_then(|()| may_fail(fs::remove_file(&one))),
            10 => may_fail(fs::read_dir(one.parent().unwrap())).map(|dir| {
                for entry in dir {
                    if let Some(meta) = may_fail(entry.unwrap().metadata()) {
                        assert!(meta.is_dir() || meta.is_file() || meta.is_symlink());
                    }
                }
            }),
            11 => {
                // A directory wherever a file may be, with something in it, moved, and gone again.
                may_fail(fs::create_dir(&one)).map(|()| {
                    let _ = may_fail(fs::write(one.join("inside"), contents(seed)));
                    let _ = may_fail(fs::rename(&one, &two));
                    for dir in [&one, &two] {
                        let _ = may_fail(fs::remove_file(dir.join("inside")));
                        let _ = may_fail(fs::remove_dir(dir));
                    }
                })
            }
            // The last file made, by descriptor: whatever became of its name.
            _ => held.take().map(|(file, seed)| {
                file.sync_data().unwrap();
                let mut data = Vec::new();
                let mut file = file;
                std::io::Seek::rewind(&mut file).unwrap();
                file.read_to_end(&mut data).unwrap();
                assert!(data == contents(seed));
            }),
        };
        worked += usize::from(done.is_some());
    }
    worked
}

/// Every file below is whole; which there are.
fn check_all(root: &Path) -> BTreeSet<PathBuf> {
    let (mut files, mut todo) = (BTreeSet::new(), vec![root.to_owned()]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() {
                let data = fs::read(entry.path()).unwrap();
                check(&data);
                files.insert(entry.path());
            }
        }
    }
    files
}

/// The work of all threads, by this user, and what is left of it after a remount.
fn together(v: &TestVolume, uid: u32) {
    let root = v.at("tree");
    as_user(uid, uid, || {
        for a in 0..4 {
            for b in 0..4 {
                fs::create_dir_all(root.join(format!("d{a}/d{b}"))).unwrap();
            }
        }
    });
    let worked: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| (thread, root.clone()))
            .map(|(thread, root)| scope.spawn(move || as_user(uid, uid, || work(&root, thread))))
            .collect();
        let joined = threads.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|panic| {
                eprintln!("the daemon's log:\n{}", v.log());
                std::panic::resume_unwind(panic)
            })
        });
        joined.sum()
    });
    assert!(worked > STEPS, "{worked} of {} steps worked", STEPS * THREADS as usize);
    let files = as_user(uid, uid, || check_all(&root));
    assert!(files.len() > 10);
    let log = v.log();
    v.remount(&[]);
    let after = as_user(uid, uid, || check_all(&root));
    let differ: Vec<_> = files.symmetric_difference(&after).collect();
    assert!(differ.is_empty(), "listed only before or after the remount: {differ:?}; the daemon's log: {log}");
    v.umount();
    if uid != 0 {
        v.become_root();
    }
    verify(v);
}

#[test]
fn threads_that_get_in_each_others_way() {
    let v = TestVolume::mounted(&[]);
    together(&v, 0);
}

#[test]
fn the_same_with_hardly_a_descriptor_to_spare() {
    let _fuse = FuseForAll::new();
    let v = TestVolume::new();
    v.become_user(NOBODY);
    v.init_with(&v.file_uri());
    // The daemon caches a quarter of these; the tree has more objects.
    let program = v.lethefs::<&str>(&[]).get_program().to_owned();
    let mut command = v.command("sh");
    command.args(["-c", "ulimit -n 300; exec \"$0\" mount backing mnt --json"]).arg(program);
    v.try_mount_by(&mut command).is(0);
    together(&v, NOBODY);
}

/// A mount of an ordinary user whose daemon caches hardly any descriptor, and many files to push those out with.
fn with_few_descriptors() -> TestVolume {
    let v = TestVolume::new();
    v.become_user(NOBODY);
    v.init_with(&v.file_uri());
    let program = v.lethefs::<&str>(&[]).get_program().to_owned();
    let mut command = v.command("sh");
    command.args(["-c", "ulimit -n 300; exec \"$0\" mount backing mnt --json"]).arg(program);
    v.try_mount_by(&mut command).is(0);
    as_user(NOBODY, NOBODY, || {
        fs::create_dir(v.at("others")).unwrap();
        for n in 0..300 {
            fs::write(v.at(format!("others/{n}")), b"x").unwrap();
        }
    });
    v
}

/// Opens the files that push everything else out of the descriptor cache. Truncation reaches the daemon, a read may not.
fn push_out(v: &TestVolume) {
    for n in 0..300 {
        fs::File::options().write(true).open(v.at(format!("others/{n}"))).unwrap().set_len(0).unwrap();
    }
}

#[test]
fn a_deep_tree_costs_no_stack() {
    use rustix::fs::{Mode, OFlags};
    let _fuse = FuseForAll::new();
    let v = with_few_descriptors();
    as_user(NOBODY, NOBODY, || {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = rustix::fs::openat(CWD, v.at(""), flags, Mode::empty()).unwrap();
        for _ in 0..8_000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, "d", flags, Mode::empty()).unwrap();
        }
        push_out(&v);
        // Each of its 8,000 ancestors has to be opened for this.
        rustix::fs::mkdirat(&at, "bottom", Mode::RWXU).unwrap();
        drop(at);
        assert!(v.command("rm").arg("-rf").arg(v.at("d")).status().unwrap().success());
    });
}

#[test]
fn a_directory_that_was_forgotten_and_renamed_is_still_one() {
    let _fuse = FuseForAll::new();
    let v = with_few_descriptors();
    let open = as_user(NOBODY, NOBODY, || {
        fs::create_dir(v.at("d1")).unwrap();
        fs::create_dir(v.at("d2")).unwrap();
        fs::write(v.at("d1/a"), b"forget me").unwrap();
        fs::hard_link(v.at("d1/a"), v.at("d2/b")).unwrap();
        fs::metadata(v.at("d1/a")).unwrap();
        fs::File::options().read(true).write(true).open(v.at("d2/b")).unwrap()
    });
    // Dentries and inodes that nobody uses: the kernel forgets d1.
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    as_user(NOBODY, NOBODY, || {
        fs::rename(v.at("d1"), v.at("dX")).unwrap();
        push_out(&v);
        open.write_all_at(b"F", 0).unwrap();
        open.sync_all().unwrap();
        assert_eq!(fs::read(v.at("dX/a")).unwrap(), b"Forget me");
    });
}
