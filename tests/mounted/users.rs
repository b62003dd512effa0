//! Several users at one mount, and mounts by users who are not root.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode};

use crate::support::fuse_for_all::FuseForAll;
use crate::support::volume::{Output, TestVolume, mounts_below};
use crate::{as_user, errno, names};

/// Two users who have nothing to do with each other, nor with any file of this machine.
const ALICE: u32 = 54_001;
const BOB: u32 = 54_002;
/// `nobody`: fusermount3 wants the user to have a name.
pub(crate) const NOBODY: u32 = 65_534;

fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn owner(path: impl AsRef<Path>) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.uid(), meta.gid())
}

/// A mount that all users of the machine can reach.
fn shared(options: &str) -> TestVolume {
    let v = TestVolume::init();
    v.open_to_all();
    v.mount(&["-o", options]);
    chmod(v.mnt(), 0o1777);
    v
}

#[test]
fn each_user_owns_what_that_user_makes() {
    let v = shared("allow_other,dev");
    let make = |uid: u32, gid: u32| {
        let dir = v.at(uid.to_string());
        as_user(uid, gid, || {
            fs::create_dir(&dir).unwrap();
            File::create(dir.join("file")).unwrap();
            File::options().write(true).create_new(true).mode(0o400).open(dir.join("read-only")).unwrap();
            symlink("file", dir.join("link")).unwrap();
            symlink("x".repeat(2000), dir.join("long-link")).unwrap();
            rustix::fs::mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
            rustix::fs::mknodat(CWD, dir.join("socket"), FileType::Socket, Mode::RUSR, 0).unwrap();
            fs::create_dir(dir.join("n".repeat(255))).unwrap();
            fs::hard_link(dir.join("file"), dir.join("file2")).unwrap();
            let device = || rustix::fs::mknodat(CWD, dir.join("dev"), FileType::CharacterDevice, Mode::RUSR, 0x103);
            if uid != 0 {
                assert_eq!(errno(device()), libc::EPERM);
            }
        });
    };
    make(ALICE, ALICE);
    make(BOB, 100);
    make(0, 0);
    let check = || {
        for (uid, gid) in [(ALICE, ALICE), (BOB, 100), (0, 0)].into_iter().filter(|(uid, _)| *uid != 0) {
            let dir = v.at(uid.to_string());
            assert_eq!(owner(&dir), (uid, gid));
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                assert_eq!(owner(&path), (uid, gid), "{}", path.display());
            }
        }
    };
    check();
    // And so it lies in the backing directory, which is what a backup keeps.
    v.remount(&["-o", "allow_other"]);
    check();
    assert_eq!(fs::read_dir(v.at(ALICE.to_string())).unwrap().count(), 8);

    // A process of that user from the start, not a thread.
    let script = "umask 022; mkdir d && cd d && echo text > f && ln f g && mv g h && ls -la . && cat h";
    let run =
        Output::of(v.command("sh").args(["-c", script]).current_dir(v.at(ALICE.to_string())).uid(ALICE).gid(ALICE));
    run.is(0);
    assert!(run.out.ends_with("text\n"), "{}", run.out);
    assert_eq!(owner(v.at(format!("{ALICE}/d/h"))), (ALICE, ALICE));
}

#[test]
fn permissions_are_enforced() {
    let v = shared("allow_other");
    let path = |name: &str| v.at(name);
    as_user(ALICE, ALICE, || {
        fs::create_dir(path("private")).unwrap();
        chmod(path("private"), 0o700);
        fs::write(path("private/file"), "secret").unwrap();
        fs::write(path("readable"), "public").unwrap();
        chmod(path("readable"), 0o644);
        fs::write(path("hidden"), "secret").unwrap();
        chmod(path("hidden"), 0o640);
        fs::create_dir(path("open")).unwrap();
        chmod(path("open"), 0o777);
        fs::write(path("open/file"), "x").unwrap();
        fs::write(path("none"), "mine").unwrap();
        chmod(path("none"), 0);
    });
    // Once root has had everything looked up and cached, the others still get only what is theirs.
    assert_eq!(fs::read(path("private/file")).unwrap(), b"secret");
    assert_eq!(fs::read(path("hidden")).unwrap(), b"secret");
    as_user(BOB, BOB, || {
        for denied in [
            fs::read(path("private/file")).map(drop),
            fs::metadata(path("private/file")).map(drop),
            fs::read_dir(path("private")).map(drop),
            fs::read(path("hidden")).map(drop),
            File::options().write(true).open(path("readable")).map(drop),
            fs::write(path("private/new"), ""),
            fs::hard_link(path("private/file"), path("stolen")),
            fs::rename(path("open"), path("private/open")),
        ] {
            assert_eq!(errno(denied), libc::EACCES);
        }
        for denied in [
            fs::set_permissions(path("readable"), fs::Permissions::from_mode(0o666)),
            std::os::unix::fs::chown(path("readable"), Some(BOB), None),
            // The sticky bit of the root.
            fs::remove_file(path("readable")),
            fs::rename(path("readable"), path("mine")),
        ] {
            assert_eq!(errno(denied), libc::EPERM);
        }
        assert_eq!(fs::read(path("readable")).unwrap(), b"public");
        let may = |bits| rustix::fs::accessat(CWD, path("readable"), bits, AtFlags::EACCESS);
        may(rustix::fs::Access::READ_OK).unwrap();
        assert_eq!(errno(may(rustix::fs::Access::WRITE_OK)), libc::EACCES);
        fs::remove_file(path("open/file")).unwrap();
        fs::write(path("open/bobs"), "x").unwrap();
    });
    assert_eq!(owner(path("open/bobs")), (BOB, BOB));
    as_user(ALICE, ALICE, || {
        assert_eq!(errno(fs::read(path("none"))), libc::EACCES, "the owner without the right");
        assert_eq!(errno(std::os::unix::fs::chown(path("readable"), Some(BOB), None)), libc::EPERM);
        std::os::unix::fs::chown(path("readable"), None, Some(ALICE)).unwrap();
        fs::remove_file(path("open/bobs")).unwrap();
    });
    assert_eq!(fs::read(path("none")).unwrap(), b"mine", "root with the capability");
}

#[test]
fn without_allow_other_only_the_mounting_user_comes_in() {
    let v = shared("rw");
    fs::write(v.at("file"), "x").unwrap();
    chmod(v.at("file"), 0o666);
    as_user(ALICE, ALICE, || {
        assert_eq!(errno(fs::metadata(v.mnt())), libc::EACCES);
        assert_eq!(errno(fs::read(v.at("file"))), libc::EACCES);
        assert_eq!(errno(fs::read_dir(v.mnt())), libc::EACCES);
    });
}

#[test]
fn access_control_lists() {
    let v = shared("allow_other,acl");
    let acl = |program: &str, args: &[&str]| {
        let run = Output::of(v.command(program).args(args).current_dir(v.mnt()));
        run.is(0);
        run.out
    };
    fs::create_dir(v.at("d")).unwrap();
    chmod(v.at("d"), 0o750);
    fs::write(v.at("f"), "text").unwrap();
    chmod(v.at("f"), 0o640);
    acl("setfacl", &["-m", &format!("u:{ALICE}:rw"), "f"]);
    acl("setfacl", &["-m", &format!("u:{ALICE}:rwx"), "d"]);
    acl("setfacl", &["-d", "-m", &format!("u::rwx,u:{ALICE}:rwx,g::r-x,o::---"), "d"]);
    let enforce = || {
        as_user(ALICE, ALICE, || {
            assert_eq!(fs::read(v.at("f")).unwrap(), b"text");
            File::options().append(true).open(v.at("f")).unwrap();
        });
        as_user(BOB, BOB, || {
            assert_eq!(errno(fs::read(v.at("f"))), libc::EACCES);
            assert_eq!(errno(fs::read_dir(v.at("d"))), libc::EACCES);
        });
    };
    enforce();
    // A default list, not the umask, decides what new files allow.
    let run = Output::of(
        v.command("sh")
            .args(["-c", "umask 077; echo x > d/new; mkdir d/sub; echo y > d/sub/deep"])
            .current_dir(v.mnt()),
    );
    run.is(0);
    let line =
        |text: &str| text.lines().map(str::trim).any(|l| l.split('\t').next() == Some(&format!("user:{ALICE}:rwx")));
    for new in ["d/new", "d/sub", "d/sub/deep"] {
        let shown = acl("getfacl", &["-n", new]);
        assert!(line(&shown), "{new}: {shown}");
    }
    assert!(acl("getfacl", &["-n", "-d", "d/sub"]).contains(&format!("user:{ALICE}:rwx")));
    let before = acl("getfacl", &["-n", "-R", "."]);
    v.remount(&["-o", "allow_other,acl"]);
    assert_eq!(acl("getfacl", &["-n", "-R", "."]), before);
    enforce();
    as_user(ALICE, ALICE, || assert_eq!(fs::read(v.at("d/new")).unwrap(), b"x\n"));
    acl("setfacl", &["-b", "f"]);
    as_user(ALICE, ALICE, || assert_eq!(errno(fs::read(v.at("f"))), libc::EACCES));

    v.remount(&["-o", "allow_other"]);
    let mut value = [0; 100];
    assert_eq!(errno(rustix::fs::getxattr(v.at("d"), "system.posix_acl_access", &mut value)), libc::EOPNOTSUPP);
    let run = Output::of(v.command("setfacl").args(["-m", "u:1:r", "f"]).current_dir(v.mnt()));
    assert!(run.code != Some(0) && run.err.contains("not supported"), "{}", run.err);
}

#[test]
fn an_ordinary_user_mounts_by_fusermount3() {
    let _fuse = FuseForAll::new();
    let v = TestVolume::new();
    v.become_user(NOBODY);
    v.init_with(&v.file_uri());
    let script = |text: &str| Output::of(v.command("sh").args(["-euc", text]).current_dir(v.path("")));
    v.mount(&[]);
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| line.contains(&*v.mnt().to_string_lossy())).unwrap();
    for part in ["fuse.lethefs", "nosuid", "nodev", &format!("user_id={NOBODY}"), "default_permissions"] {
        assert!(line.contains(part), "no {part} in {line}");
    }
    let work = "cd mnt; umask 022; mkdir -p a/b; echo text > a/b/f; ln a/b/f g; ln -s g l; mkfifo p; chmod 0 g; chmod 600 g
        truncate -s 100000 big; echo end >> big; mv a c; sync big; head -c 5 l; setfattr -n user.x -v y c; getfattr --only-values -n user.x c";
    let run = script(work);
    assert_eq!((run.code, run.out.as_str()), (Some(0), "text\ny"), "{}", run.err);
    // Read-only and unreadable files are still the owner's to write where a mode comes later.
    script("cd mnt; umask 777; echo hidden > none; chmod 400 none; cat none | grep -q hidden").is(0);
    // Not even root, without allow_other.
    assert_eq!(errno(fs::metadata(v.at("g"))), libc::EACCES);
    assert!(v.cli(&["status", "--json"]).json()["mounts"][0]["live"]["pid"].is_number());
    v.umount();
    assert!(mounts_below(&v.path("")).is_empty());
    assert_eq!(owner(v.backing()), (NOBODY, NOBODY));

    for end in ["fusermount3 -u mnt", "fusermount3 -u -z mnt", "kill -TERM $PID"] {
        let pid = v.mount(&[]);
        v.env("PID", pid.as_raw_nonzero().to_string());
        script("cat mnt/c/b/f mnt/none; echo more >> mnt/big").is(0);
        script(end).is(0);
        assert_eq!(v.daemon_exit(), Some(0), "{end}: {}", v.log());
        assert!(mounts_below(&v.path("")).is_empty(), "{end}");
    }
    v.mount(&["-o", "ro"]);
    let run = script("cat mnt/c/b/f; tail -n 3 mnt/big; ! touch mnt/x");
    assert_eq!((run.code, run.out.as_str()), (Some(0), "text\nmore\nmore\nmore\n"), "{}", run.err);
    v.umount();
    // A crash, after which the supervisor clears up.
    v.mount(&[]);
    script("echo kept > mnt/kept; sync mnt/kept").is(0);
    rustix::process::kill_process(v.daemon(), rustix::process::Signal::KILL).unwrap();
    assert_eq!(v.daemon_exit(), None);
    v.mount(&[]);
    assert_eq!(script("cat mnt/kept").out, "kept\n");
    // Why it does not unmount: in use, or whatever else fusermount3 says.
    let open = as_user(NOBODY, NOBODY, || File::open(v.at("kept")).unwrap());
    v.cli(&["umount", "mnt"]).is(15).says("in use");
    drop(open);
    fs::create_dir(v.path("bin")).unwrap();
    fs::write(v.path("bin/fusermount3"), "#!/bin/sh\necho 'fusermount3: failed to open /etc/mtab' >&2; exit 1\n")
        .unwrap();
    chmod(v.path("bin/fusermount3"), 0o755);
    let path = format!("{}:{}", v.path("bin").display(), std::env::var("PATH").unwrap());
    Output::of(v.lethefs(&["umount", "mnt"]).env("PATH", path)).is(15).says("failed to open /etc/mtab");
    v.umount();
    // What only root may allow.
    if !fs::read_to_string("/etc/fuse.conf").unwrap_or_default().lines().any(|line| line.trim() == "user_allow_other") {
        v.cli(&["mount", "backing", "mnt", "-o", "allow_other"]).is(15).says("user_allow_other");
    }
    assert!(names(v.path("run")).iter().all(|name| name.ends_with(b".log")), "record or socket left");
}
