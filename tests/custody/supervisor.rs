//! The daemon dies, and the process without keys clears up.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use crate::revoked::{all_fail, all_work, dirty, furnish, programs};
use crate::support::at_openbao::volume;
use crate::support::fuse_for_all::{ConnectionControl, FuseForAll};
use crate::support::openbao::{Server, Storage, wait_for};
use crate::support::volume::{TestVolume, mounts_below};
use crate::{custody, errno, peek};

const ENOTCONN: i32 = 107;
/// A user that has a name.
const NOBODY: u32 = 65534;

/// kill -9 of the daemon while programs have things in use and pages are dirty; waits for its supervisor.
fn daemon_dies(v: &TestVolume) {
    furnish(v);
    let mut programs = programs(v);
    all_work(&mut programs);
    programs.push(("dirty", dirty(v)));
    kill_process(v.daemon(), Signal::KILL).unwrap();
    assert_eq!(v.daemon_exit(), None, "its supervisor ends as it did");
    all_fail(&mut programs, ENOTCONN);
    assert!(mounts_below(&v.path("")).is_empty(), "out of the way");
    assert!(
        !fs::read_dir(v.path("run"))
            .unwrap()
            .flatten()
            .any(|file| file.path().extension().is_some_and(|e| e == "sock"))
    );
    assert!(v.log().contains("its plaintext was dropped"), "{}", v.log());
}

#[test]
fn a_dead_daemons_plaintext_is_gone_and_the_next_mount_works() {
    let v = TestVolume::mounted(&[]);
    daemon_dies(&v);
    v.mount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), vec![7; 1 << 20]);
    v.umount();
}

#[test]
fn of_an_ordinary_user_as_well() {
    let _fuse = FuseForAll::new();
    let v = TestVolume::new();
    v.become_user(NOBODY);
    v.init_with(&v.file_uri());
    // Without the kernel's control files there is another way, which is slower to give up.
    for control in [None, Some(ConnectionControl::new())] {
        v.mount(&[]);
        daemon_dies(&v);
        drop(control);
    }
    v.mount(&[]);
    all_work(&mut programs(&v));
    v.umount();
}

/// As when the system is full of processes.
#[test]
fn without_a_thread_as_well() {
    let _fuse = FuseForAll::new();
    let _control = ConnectionControl::new();
    let v = TestVolume::new();
    v.become_user(NOBODY);
    v.init_with(&v.file_uri());
    v.mount(&[]);
    furnish(&v);
    let mut programs = programs(&v);
    all_work(&mut programs);
    programs.push(("dirty", dirty(&v)));
    let limit = "import resource, sys; resource.prlimit(int(sys.argv[1]), resource.RLIMIT_NPROC, (1, 1))";
    let supervisor = v.supervisor().as_raw_nonzero().to_string();
    assert!(v.command("python3").args(["-c", limit, &supervisor]).status().unwrap().success());
    kill_process(v.daemon(), Signal::KILL).unwrap();
    assert_eq!(v.daemon_exit(), None);
    // It cannot unmount, for which it would need another process.
    all_fail(&mut programs, ENOTCONN);
    assert!(v.log().contains("its plaintext was dropped"), "{}", v.log());
}

#[test]
fn revoked_after_the_daemon_died() {
    let server = Server::start(Storage::Memory);
    let v = volume(&server, "vol");
    v.mount(&[]);
    furnish(&v);
    let open = File::open(v.at("file")).unwrap();
    assert_eq!(peek(&open, 5000).unwrap(), 7);
    server.delete_key("vol");
    kill_process(v.daemon(), Signal::KILL).unwrap();
    assert_eq!(v.daemon_exit(), None);
    assert_eq!(errno(peek(&open, 5000)), ENOTCONN);
    assert_ne!(v.try_mount(&[]).code, Some(0));
}

#[test]
fn another_mount_in_the_dead_ones_place_is_left_alone() {
    let v = TestVolume::mounted(&[]);
    fs::write(v.at("file"), "x").unwrap();
    // Something else is mounted over it.
    rustix::mount::mount("none", v.mnt(), "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    fs::write(v.at("theirs"), "y").unwrap();
    kill_process(v.daemon(), Signal::KILL).unwrap();
    assert_eq!(v.daemon_exit(), None);
    assert_eq!(fs::read(v.at("theirs")).unwrap(), b"y");
    assert_eq!(mounts_below(&v.path("")).len(), 2);
}

#[test]
fn a_mount_of_ours_in_the_place_of_one_that_is_gone_is_left_alone() {
    let (v, other) = (TestVolume::mounted(&[]), TestVolume::init());
    // A daemon that stands still while its mount goes: the next one may get its number.
    kill_process(v.daemon(), Signal::STOP).unwrap();
    rustix::mount::unmount(v.mnt(), rustix::mount::UnmountFlags::DETACH).unwrap();
    let at = v.mnt();
    other.try_mount_by(&mut other.lethefs(&["mount", "backing", at.to_str().unwrap(), "--json"])).is(0);
    fs::write(v.at("theirs"), "y").unwrap();
    let open = File::open(v.at("theirs")).unwrap();
    kill_process(v.daemon(), Signal::KILL).unwrap();
    assert_eq!(v.daemon_exit(), None);
    assert_eq!(peek(&open, 0).unwrap(), b'y');
    drop(open);
    other.cli(&["umount", at.to_str().unwrap()]).is(0);
}

/// `lethefs mount --foreground`: the process that was started, and the daemon's number.
fn foreground(v: &TestVolume) -> (std::process::Child, Pid) {
    foreground_with(v, &[], Stdio::null())
}

pub(crate) fn foreground_with(v: &TestVolume, options: &[&str], log: Stdio) -> (std::process::Child, Pid) {
    let mut command = v.lethefs(&[&["mount", "backing", "mnt", "--foreground", "--json"], options].concat());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
    let mut report = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    while serde_json::from_str::<serde_json::Value>(&report).is_err() {
        assert_ne!(out.read_line(&mut report).unwrap(), 0, "{report}");
    }
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["supervisor"], child.id());
    (child, Pid::from_raw(report["pid"].as_i64().unwrap() as i32).unwrap())
}

#[test]
fn signals_to_the_process_that_was_started() {
    for both in [false, true] {
        let v = TestVolume::init();
        let (mut child, daemon) = foreground(&v);
        fs::write(v.at("file"), "x").unwrap();
        // systemd signals every process of a service.
        if both {
            kill_process(daemon, Signal::TERM).unwrap();
        }
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "an orderly end, {both}");
        assert!(mounts_below(&v.path("")).is_empty());
        v.mount(&[]);
        assert_eq!(fs::read(v.at("file")).unwrap(), b"x");
        v.umount();
    }
}

#[test]
fn without_its_supervisor_the_daemon_serves_on() {
    let v = TestVolume::mounted(&[]);
    fs::write(v.at("file"), "x").unwrap();
    kill_process(v.supervisor(), Signal::KILL).unwrap();
    let status = || v.cli(&["status", "mnt", "--json"]).json()["live"].clone();
    wait_for("its end to be seen", || status()["supervisor"].is_null().then_some(()));
    assert_eq!(fs::read(v.at("file")).unwrap(), b"x");
    assert_eq!(custody(&v)["state"], "active");
    v.cli(&["umount", "mnt"]).is(0);
}

#[test]
fn the_supervisor_holds_no_key() {
    let v = TestVolume::mounted(&[]);
    fs::write(v.at("file"), "x").unwrap();
    let kek = v.kek();
    let pid = v.supervisor().as_raw_nonzero();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut scanned = 0;
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        // The list of inodes is a gigabyte that is hardly ever used.
        let mut bytes = vec![0; (to - from).min(1 << 20) as usize];
        if memory.read_exact_at(&mut bytes, from).is_ok() {
            scanned += bytes.len();
            assert!(!bytes.windows(32).any(|window| window == kek), "{line}");
        }
    }
    assert!(scanned > 100_000, "{scanned}");
    let mut text = String::new();
    File::open(format!("/proc/{pid}/maps")).unwrap().read_to_string(&mut text).unwrap();
    assert!(!text.contains("secretmem"), "it has the key memory mapped");
    v.umount();
}
