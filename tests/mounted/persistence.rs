//! How a mount begins and ends, and what is there afterwards.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;

use crate::reader::{reader, verify};
use crate::support::volume::{Output, TestVolume, mounts_below};
use crate::{bytes, errno, names};

/// Files of several sizes, the last one still open.
fn fill(v: &TestVolume, round: u64) -> File {
    let dir = v.at(format!("round{round}"));
    fs::create_dir(&dir).unwrap();
    for size in [1, 4096, 10_000, 300_000] {
        fs::write(dir.join(size.to_string()), bytes(size, round + size as u64)).unwrap();
    }
    symlink("t".repeat(3000), dir.join("link")).unwrap();
    let mut file = File::options().read(true).append(true).create_new(true).open(dir.join("open")).unwrap();
    file.write_all(&bytes(6000, round)).unwrap();
    file
}

fn check(v: &TestVolume, round: u64) {
    let dir = v.at(format!("round{round}"));
    for size in [1, 4096, 10_000, 300_000] {
        assert!(fs::read(dir.join(size.to_string())).unwrap() == bytes(size, round + size as u64), "{round} {size}");
    }
    assert_eq!(fs::read_link(dir.join("link")).unwrap().as_os_str().len(), 3000);
    assert!(fs::read(dir.join("open")).unwrap() == bytes(6000, round));
}

/// Every file's header vouches for its size: a little more, and the reader says so.
fn all_sealed(v: &TestVolume) {
    verify(v);
    let copy = v.path("copy");
    Output::of(v.command("cp").arg("-a").arg(v.backing()).arg(&copy)).is(0);
    let mut longer = 0;
    let mut todo = vec![copy.clone()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let (path, meta) = entry.map(|entry| (entry.path(), entry.metadata().unwrap())).unwrap();
            if meta.is_dir() {
                todo.push(path);
            } else if meta.is_file() && !path.file_name().unwrap().to_string_lossy().starts_with("lethefs.") {
                File::options().write(true).open(path).unwrap().set_len(meta.len() + 100).unwrap();
                longer += 1;
            }
        }
    }
    let report = reader(v, &copy, "verify").json();
    let noticed = report["errors"].as_array().unwrap().iter().filter(|e| e.as_str().unwrap().contains("sealed with"));
    assert_eq!(noticed.count(), longer, "of {longer} files: {report}");
    fs::remove_dir_all(copy).unwrap();
}

#[test]
fn every_way_to_unmount_ends_cleanly() {
    let v = TestVolume::init();
    let kill = |signal| rustix::process::kill_process(v.daemon(), signal).unwrap();
    let ends: [(&str, &dyn Fn()); 7] = [
        ("lethefs umount", &|| _ = v.cli(&["umount", "mnt"]).is(0)),
        ("lethefs umount --lazy", &|| _ = v.cli(&["umount", "--lazy", "mnt"]).is(0)),
        ("umount", &|| _ = Output::of(v.command("umount").arg(v.mnt())).is(0)),
        ("fusermount3 -u", &|| _ = Output::of(v.command("fusermount3").arg("-u").arg(v.mnt())).is(0)),
        ("SIGTERM", &|| kill(Signal::TERM)),
        ("SIGINT", &|| kill(Signal::INT)),
        ("SIGHUP", &|| kill(Signal::HUP)),
    ];
    for (round, (how, end)) in ends.iter().enumerate() {
        v.mount(&[]);
        drop(fill(&v, round as u64));
        end();
        assert_eq!(v.daemon_exit(), Some(0), "{how}: {}", v.log());
        assert!(mounts_below(&v.path("")).is_empty(), "{how}");
        assert!(names(v.path("run")).iter().all(|name| name.ends_with(b".log")), "{how}: record or socket left");
        assert!(names(v.mnt()).is_empty(), "{how}");
    }
    all_sealed(&v);
    v.mount(&[]);
    (0..ends.len()).for_each(|round| check(&v, round as u64));
}

#[test]
fn a_mount_in_use_is_served_to_its_last_user() {
    let v = TestVolume::mounted(&[]);
    let mut open = fill(&v, 1);
    v.cli(&["umount", "mnt"]).is(15).says("in use");
    assert_eq!(mounts_below(&v.path("")).len(), 1);
    rustix::process::kill_process(v.daemon(), Signal::TERM).unwrap();
    // Detached by the daemon; the descriptor goes on.
    while !mounts_below(&v.path("")).is_empty() {
        std::thread::yield_now();
    }
    open.write_all(b"and more").unwrap();
    let mut whole = vec![0; 6008];
    open.read_exact_at(&mut whole, 0).unwrap();
    assert!(whole.starts_with(&bytes(6000, 1)) && whole.ends_with(b"and more"));
    v.cli(&["mount", "backing", "mnt"]).is(11);
    open.set_len(6000).unwrap();
    drop(open);
    assert_eq!(v.daemon_exit(), Some(0), "{}", v.log());
    all_sealed(&v);
    v.mount(&[]);
    check(&v, 1);
}

#[test]
fn what_was_written_survives_kill_9_of_the_daemon() {
    let v = TestVolume::init();
    for round in 0..3 {
        v.mount(&[]);
        (0..round).for_each(|round| check(&v, round));
        let open = fill(&v, round);
        // What was closed has left the kernel's cache; what is still open needs fsync.
        open.sync_data().unwrap();
        rustix::process::kill_process(v.daemon(), Signal::KILL).unwrap();
        assert_eq!(v.daemon_exit(), None, "ended by a signal");
        assert_eq!(open.metadata().unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
        drop(open);
        v.cli(&["status", "--json"]).is(0);
        // Its supervisor has cleared up.
        assert!(mounts_below(&v.path("")).is_empty());
    }
    let report = reader(&v, &v.backing(), "verify").json();
    assert_eq!(report["errors"], serde_json::json!([]));
    v.mount(&[]);
    (0..3).for_each(|round| check(&v, round));
    v.umount();
    verify(&v);
}

#[test]
fn a_read_only_mount_refuses_every_change() {
    let v = TestVolume::mounted(&[]);
    drop(fill(&v, 0));
    rustix::fs::setxattr(v.at("round0"), "user.a", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    v.umount();
    let before = listing(&v);
    v.mount(&["-o", "ro"]);
    check(&v, 0);
    let file = v.at("round0/1");
    let refused: [std::io::Result<()>; 13] = [
        fs::write(v.at("new"), ""),
        File::options().append(true).open(&file).map(drop),
        File::options().write(true).truncate(true).open(&file).map(drop),
        fs::create_dir(v.at("new")),
        symlink("x", v.at("new")),
        fs::hard_link(&file, v.at("new")),
        fs::rename(&file, v.at("new")),
        fs::remove_file(&file),
        fs::remove_dir(v.at("round0")),
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)),
        std::os::unix::fs::chown(&file, Some(1), None),
        rustix::fs::setxattr(&file, "user.b", b"", rustix::fs::XattrFlags::empty()).map_err(Into::into),
        rustix::fs::mknodat(rustix::fs::CWD, v.at("n"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .map_err(Into::into),
    ];
    for result in refused {
        assert_eq!(errno(result), libc::EROFS);
    }
    v.umount();
    assert!(listing(&v) == before, "a read-only mount changed the backing directory");
}

/// Names, times, lengths and contents in the backing directory.
fn listing(v: &TestVolume) -> String {
    let script =
        "find . -printf '%p %y %m %s %T@ %l\\n' | LC_ALL=C sort; find . -type f -exec sha256sum {} + | LC_ALL=C sort";
    let run = Output::of(v.command("sh").args(["-c", script]).current_dir(v.backing()));
    run.is(0);
    run.out
}

#[test]
fn the_exit_code_tells_the_truth() {
    let v = TestVolume::init();
    fs::write(v.path("file"), "x").unwrap();
    fs::create_dir(v.path("other")).unwrap();
    let before = listing(&v);
    let mount = |args: &[&str]| v.cli(&[&["mount"], args].concat());
    mount(&["backing", "file"]).is(15).says("not a directory");
    mount(&["backing", "absent"]).is(15).says("make the directory first");
    mount(&["absent", "mnt"]).is(2);
    mount(&["other", "mnt"]).is(10);
    mount(&["backing", "backing"]).is(2);
    mount(&["backing", "mnt", "-o", "nonsense"]).is(2);
    mount(&["backing", "mnt", "-o", "threads=0"]).is(2);
    mount(&["backing", "mnt", "--log-file", "/proc/log"]).is(1).says("log");
    mount(&["-f", "backing", "file"]).is(15).says("not a directory");
    assert!(mounts_below(&v.path("")).is_empty());
    assert!(listing(&v) == before, "a refused mount changed the backing directory");
    v.cli(&["umount", "mnt"]).is(15).says("nothing is mounted");

    v.mount(&[]);
    // Told of success only once it answers.
    fs::write(v.at("at-once"), "x").unwrap();
    mount(&["backing", "mnt"]).is(11);
    mount(&["backing", "other"]).is(11).says(&v.mnt().to_string_lossy());
    v.cli(&["umount", "other"]).is(15).says("nothing is mounted");
    v.umount();
    // A mountpoint with something in it is covered, not changed.
    fs::write(v.mnt().join("covered"), "x").unwrap();
    v.mount(&[]);
    assert_eq!(names(v.mnt()), [b"at-once"]);
    v.umount();
    assert_eq!(names(v.mnt()), [b"covered"]);
}

#[test]
fn a_mount_in_the_foreground() {
    let v = TestVolume::init();
    for signal in [Signal::INT, Signal::TERM] {
        let mut child = v
            .lethefs(&["mount", "-f", "backing", "mnt"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It says so once it answers.
        let mut said = [0; 1];
        child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        assert_eq!(mounts_below(&v.path("")).len(), 1);
        fs::write(v.at("file"), format!("{signal:?}")).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(mounts_below(&v.path("")).is_empty());
    }
    all_sealed(&v);
}

#[test]
fn options_reach_the_kernel() {
    let v = TestVolume::mounted(&["-o", "ro,noexec,noatime,fsname=a name"]);
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| Path::new(line.split(' ').nth(4).unwrap()) == v.mnt()).unwrap();
    let (before, after) = line.split_once(" - ").unwrap();
    for word in ["ro", "nosuid", "nodev", "noexec", "noatime"] {
        assert!(before.split([' ', ',']).any(|w| w == word), "no {word} in {line}");
    }
    assert!(after.starts_with(r"fuse.lethefs a\040name "), "{line}");
    assert!(after.contains("default_permissions") && !after.contains("allow_other"), "{line}");
    v.remount(&["--suid", "--dev", "--allow-other", "-o", "nosuid"]);
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| Path::new(line.split(' ').nth(4).unwrap()) == v.mnt()).unwrap();
    assert!(!line.contains("nosuid") && !line.contains("nodev") && line.contains("allow_other"), "{line}");
}
