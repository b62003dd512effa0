//! Every operation, each with its usual and its refused forms.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink,
};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags,
};

use crate::support::volume::{Output, TestVolume};
use crate::{as_user, bytes, errno, name, names, python};

fn mode(path: impl AsRef<Path>) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn rename_with(from: impl AsRef<Path>, to: impl AsRef<Path>, flags: RenameFlags) -> rustix::io::Result<()> {
    rustix::fs::renameat_with(CWD, from.as_ref(), CWD, to.as_ref(), flags)
}

/// Names on both sides of where encrypted ones become long, and what is no text.
fn awkward_names() -> Vec<Vec<u8>> {
    let utf8 = "\u{e9}\u{1f5dd}".repeat(29);
    let mut all: Vec<Vec<u8>> = [1, 2, 174, 175, 176, 177, 254, 255].map(|len| vec![b'n'; len]).to_vec();
    all.extend([b"\xff\xfe\x80".to_vec(), vec![0xfe; 255], b" -\n*\\".to_vec(), utf8.into_bytes()]);
    all.extend([b"lethefs.dir".to_vec(), b"lethefs.volume".to_vec(), b"...".to_vec()]);
    all
}

#[test]
fn names_of_every_sort_in_every_operation() {
    let v = TestVolume::mounted(&[]);
    let makers: [fn(&Path) -> io::Result<()>; 5] = [
        |path| File::options().write(true).create_new(true).open(path).map(drop),
        |path| fs::create_dir(path),
        |path| symlink("target", path),
        |path| fs::hard_link(path.parent().unwrap().join("there"), path),
        |path| Ok(rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0)?),
    ];
    for (at, make) in makers.iter().enumerate() {
        let dir = v.at(format!("d{at}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("there"), "x").unwrap();
        let mut expected = vec![b"there".to_vec()];
        for bytes in awkward_names() {
            make(&dir.join(name(&bytes))).unwrap_or_else(|error| panic!("{at} {bytes:?}: {error}"));
            assert_eq!(errno(make(&dir.join(name(&bytes)))), libc::EEXIST);
            expected.push(bytes);
        }
        expected.sort();
        assert_eq!(names(&dir), expected, "maker {at}");
        assert_eq!(errno(make(&dir.join(name(&[b'n'; 256])))), libc::ENAMETOOLONG, "maker {at}");
    }
    v.remount(&[]);
    for at in 0..makers.len() {
        let (dir, moved) = (v.at(format!("d{at}")), v.at("moved"));
        fs::create_dir(&moved).unwrap();
        // Each takes the name of the next, whose length is another.
        let all = awkward_names();
        for (from, to) in all.iter().zip(all.iter().cycle().skip(1)) {
            fs::rename(dir.join(name(from)), moved.join(name(to))).unwrap();
            assert_eq!(errno(fs::symlink_metadata(dir.join(name(from)))), libc::ENOENT);
            fs::symlink_metadata(moved.join(name(to))).unwrap();
        }
        assert_eq!(names(&dir), [b"there"]);
        assert_eq!(errno(fs::rename(dir.join("there"), moved.join(name(&[b'n'; 256])))), libc::ENAMETOOLONG);
        for bytes in all {
            let path = moved.join(name(&bytes));
            if at == 1 { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        assert!(names(&moved).is_empty());
        fs::remove_dir(&moved).unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }
    for result in [fs::metadata(v.at(name(&[b'n'; 256]))).map(drop), fs::remove_file(v.at(name(&[b'n'; 256])))] {
        assert_eq!(errno(result), libc::ENAMETOOLONG);
    }
    let left = names(v.backing())
        .into_iter()
        .filter(|name| !name.starts_with(b"lethefs.volume") && !name.starts_with(b"lethefs.log."));
    assert_eq!(left.collect::<Vec<_>>(), [b"lethefs.dir"], "something is left in the backing directory");
}

#[test]
fn setattr() {
    let v = TestVolume::mounted(&[]);
    let (file, dir, link) = (v.at("file"), v.at("dir"), v.at("link"));
    fs::write(&file, bytes(10_000, 1)).unwrap();
    fs::create_dir(&dir).unwrap();
    symlink("file", &link).unwrap();
    rustix::fs::mknodat(CWD, v.at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    for path in [&file, &dir, &v.at("fifo")] {
        for bits in [0, 0o400, 0o7777, 0o640] {
            chmod(path, bits);
            assert_eq!(mode(path), bits);
        }
    }
    for path in [&file, &dir, &link, &v.at("fifo")] {
        std::os::unix::fs::lchown(path, Some(1234), None).unwrap();
        std::os::unix::fs::lchown(path, None, Some(4321)).unwrap();
        let meta = fs::symlink_metadata(path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 4321));
        let times = |atime, mtime| Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: atime },
            last_modification: Timespec { tv_sec: 0, tv_nsec: mtime },
        };
        let exact = Timestamps {
            last_access: Timespec { tv_sec: -86_400, tv_nsec: 123_456_789 },
            last_modification: Timespec { tv_sec: 4_000_000_000, tv_nsec: 999_999_999 },
        };
        let set = |times: &Timestamps| rustix::fs::utimensat(CWD, path, times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        set(&exact);
        let seen = || {
            let meta = fs::symlink_metadata(path).unwrap();
            (meta.atime(), meta.atime_nsec(), meta.mtime(), meta.mtime_nsec())
        };
        assert_eq!(seen(), (-86_400, 123_456_789, 4_000_000_000, 999_999_999), "{}", path.display());
        set(&times(UTIME_OMIT, UTIME_OMIT));
        assert_eq!(seen(), (-86_400, 123_456_789, 4_000_000_000, 999_999_999));
        // The earliest time there is, which the backing filesystem may cut to its own first.
        let first = Timespec { tv_sec: i64::MIN, tv_nsec: 1 };
        set(&Timestamps { last_access: first, last_modification: exact.last_modification });
        assert!(seen().0 < 0);
        set(&times(UTIME_NOW, UTIME_OMIT));
        assert!(seen().0 > 1_000_000_000);
        assert_eq!((seen().2, seen().3), (4_000_000_000, 999_999_999));
    }
    // A time that was set stays, whatever our own upkeep of the header does: fsync, sealing, unmounting.
    let timed = File::create(v.at("timed")).unwrap();
    for round in 0..3 {
        timed.write_all_at(&bytes(5000, round), round * 5000).unwrap();
        timed.sync_all().unwrap();
    }
    let past = Timespec { tv_sec: 1_000_000_000, tv_nsec: 7 };
    rustix::fs::futimens(&timed, &Timestamps { last_access: past, last_modification: past }).unwrap();
    timed.sync_all().unwrap();
    drop(timed);
    v.remount(&[]);
    let meta = fs::metadata(v.at("timed")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_000_000, 7));

    // A later write takes the place of a time that was set.
    File::options().write(true).open(&file).unwrap().write_all_at(b"x", 0).unwrap();
    assert!(fs::metadata(&file).unwrap().mtime() < 4_000_000_000);

    let mut expected = fs::read(&file).unwrap();
    for size in [4097, 4096, 4095, 1, 0, 1, 4096, 9000, 12_288, 20_001, 5] {
        File::options().write(true).open(&file).unwrap().set_len(size).unwrap();
        expected.resize(size as usize, 0);
        assert_eq!(fs::metadata(&file).unwrap().len(), size);
        assert!(fs::read(&file).unwrap() == expected, "after truncate to {size}");
    }
    v.remount(&[]);
    assert_eq!(fs::read(&file).unwrap(), expected);
    assert_eq!((mode(&file), mode(&dir)), (0o640, 0o640));
}

#[test]
fn directories() {
    let v = TestVolume::mounted(&[]);
    let d = v.at("d");
    fs::create_dir(&d).unwrap();
    assert_eq!(fs::metadata(&d).unwrap().nlink(), 2);
    assert_eq!(errno(fs::create_dir(&d)), libc::EEXIST);
    fs::create_dir(d.join("e")).unwrap();
    assert_eq!(fs::metadata(&d).unwrap().nlink(), 3);
    assert_eq!(errno(fs::remove_dir(&d)), libc::ENOTEMPTY);
    assert_eq!(errno(fs::remove_file(&d)), libc::EISDIR);
    fs::remove_dir(d.join("e")).unwrap();
    fs::write(d.join("f"), "").unwrap();
    assert_eq!(errno(fs::remove_dir(&d)), libc::ENOTEMPTY);
    assert_eq!(errno(fs::remove_dir(d.join("f"))), libc::ENOTDIR);
    assert_eq!(errno(fs::metadata(d.join("f/x"))), libc::ENOTDIR);
    fs::remove_file(d.join("f")).unwrap();
    assert_eq!(errno(fs::remove_dir(d.join("absent"))), libc::ENOENT);
    assert_eq!(errno(fs::remove_file(d.join("absent"))), libc::ENOENT);
    let inode = fs::metadata(&d).unwrap().ino();
    assert_eq!(fs::metadata(d.join("..")).unwrap().ino(), fs::metadata(v.mnt()).unwrap().ino());
    assert_eq!(fs::metadata(d.join(".")).unwrap().ino(), inode);

    // As the working directory of a process, and as an open one.
    let open = File::open(&d).unwrap();
    let script = "cd d && rmdir ../d && { ls -a; touch x 2>/dev/null && echo made; mkdir y 2>/dev/null && echo made; }; echo end";
    let run = Output::of(v.command("sh").args(["-c", script]).current_dir(v.mnt()));
    assert_eq!((run.code, run.out.as_str()), (Some(0), "end\n"), "{}", run.err);
    let listed = rustix::fs::Dir::read_from(&open).unwrap().map(|entry| entry.unwrap().file_name().to_owned());
    assert!(listed.into_iter().all(|name| name == c"." || name == c".."));
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    assert_eq!(errno(rustix::fs::openat(&open, "x", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR)), libc::ENOENT);
    open.sync_all().unwrap();
    fs::create_dir(&d).unwrap();
    assert_eq!(fs::read_dir(&d).unwrap().count(), 0);
}

#[test]
fn nodes() {
    let v = TestVolume::mounted(&["-o", "dev"]);
    let make =
        |name: &str, kind, device| rustix::fs::mknodat(CWD, v.at(name), kind, Mode::from_raw_mode(0o620), device);
    make("fifo", FileType::Fifo, 0).unwrap();
    make("zero", FileType::CharacterDevice, rustix::fs::makedev(1, 5)).unwrap();
    make("big", FileType::BlockDevice, rustix::fs::makedev(4000, 0xf_ffff)).unwrap();
    make("file", FileType::RegularFile, 0).unwrap();
    // The path of a socket may not exceed 107 bytes.
    let dir = File::open(v.mnt()).unwrap();
    let short = format!("/proc/self/fd/{}/socket", dir.as_raw_fd());
    let listener = UnixListener::bind(&short).unwrap();
    let seen = |v: &TestVolume| {
        ["fifo", "zero", "big", "file", "socket"].map(|name| {
            let meta = fs::symlink_metadata(v.at(name)).unwrap();
            assert_eq!(meta.len(), 0);
            (meta.mode(), meta.rdev(), meta.nlink())
        })
    };
    let before = seen(&v);
    assert_eq!(before[0].0 & libc::S_IFMT, libc::S_IFIFO);
    assert_eq!(before[1], (libc::S_IFCHR | 0o600, rustix::fs::makedev(1, 5), 1));
    assert_eq!(before[2].1, rustix::fs::makedev(4000, 0xf_ffff));
    assert!(fs::metadata(v.at("socket")).unwrap().file_type().is_socket());

    let connected = UnixStream::connect(&short).unwrap();
    (&connected).write_all(b"through the socket").unwrap();
    drop(connected);
    let mut heard = String::new();
    listener.accept().unwrap().0.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "through the socket");
    std::thread::scope(|scope| {
        scope.spawn(|| fs::write(v.at("fifo"), "through the pipe").unwrap());
        assert_eq!(fs::read(v.at("fifo")).unwrap(), b"through the pipe");
    });
    let mut zeros = [1; 16];
    File::open(v.at("zero")).unwrap().read_exact(&mut zeros).unwrap();
    assert_eq!(zeros, [0; 16]);
    drop((listener, dir));

    v.remount(&[]);
    assert_eq!(seen(&v), before);
    assert_eq!(errno(File::open(v.at("zero"))), libc::EACCES, "without -o dev");
    for name in ["fifo", "zero", "big", "socket"] {
        fs::rename(v.at(name), v.at(format!("{name}2"))).unwrap();
        fs::hard_link(v.at(format!("{name}2")), v.at(format!("{name}3"))).unwrap();
        assert_eq!(fs::symlink_metadata(v.at(format!("{name}3"))).unwrap().nlink(), 2);
        fs::remove_file(v.at(format!("{name}2"))).unwrap();
        fs::remove_file(v.at(format!("{name}3"))).unwrap();
    }
}

fn overflow(v: &TestVolume) -> usize {
    fs::read_dir(v.backing().join("lethefs.overflow")).map_or(0, |dir| dir.count())
}

#[test]
fn symlinks() {
    let v = TestVolume::mounted(&[]);
    let lengths = [1, 2, 100, 607, 608, 609, 610, 611, 612, 1372, 1373, 1374, 1375, 3000, 4094, 4095];
    let target = |len: usize| bytes(len, len as u64).into_iter().map(|byte| byte | 1).collect::<Vec<u8>>();
    let check = || {
        for len in lengths {
            let path = v.at(len.to_string());
            assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), target(len), "{len}");
            assert_eq!(fs::symlink_metadata(&path).unwrap().len(), len as u64, "st_size of {len}");
        }
    };
    for len in lengths {
        symlink(name(&target(len)), v.at(len.to_string())).unwrap();
    }
    check();
    v.remount(&[]);
    check();
    let tails = overflow(&v);
    assert!(tails > 5);
    for len in [1, 611, 4095] {
        assert_eq!(errno(symlink(name(&target(4095)), v.at(len.to_string()))), libc::EEXIST);
    }
    assert_eq!(errno(symlink(name(&[b'x'; 4096]), v.at("more"))), libc::ENAMETOOLONG);
    assert_eq!(errno(symlink("", v.at("none"))), libc::ENOENT);
    assert_eq!(overflow(&v), tails, "a refused symlink left its tail");
    check();

    // A tail lives as long as the last name.
    fs::hard_link(v.at("4095"), v.at("second")).unwrap();
    fs::remove_file(v.at("4095")).unwrap();
    assert_eq!(fs::read_link(v.at("second")).unwrap().as_os_str().as_bytes(), target(4095));
    fs::rename(v.at("second"), v.at("4095")).unwrap();
    check();
    fs::rename(v.at("4094"), v.at("4095")).unwrap();
    assert_eq!(fs::read_link(v.at("4095")).unwrap().as_os_str().as_bytes(), target(4094));
    for entry in fs::read_dir(v.mnt()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert_eq!(overflow(&v), 0);

    fs::create_dir(v.at("dir")).unwrap();
    fs::write(v.at("dir/file"), "found").unwrap();
    symlink("dir", v.at("to-dir")).unwrap();
    symlink("loop", v.at("loop")).unwrap();
    assert_eq!(fs::read(v.at("to-dir/file")).unwrap(), b"found");
    assert_eq!(errno(fs::read(v.at("loop"))), libc::ELOOP);
    assert_eq!(errno(File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(v.at("to-dir"))), libc::ELOOP);
    assert_eq!(errno(fs::remove_dir(v.at("to-dir"))), libc::ENOTDIR);
    assert_eq!(errno(fs::read_link(v.at("dir"))), libc::EINVAL);
}

#[test]
fn hard_links() {
    let v = TestVolume::mounted(&[]);
    let long = [b'l'; 255];
    fs::create_dir(v.at("d")).unwrap();
    fs::write(v.at("a"), bytes(5000, 2)).unwrap();
    // Dirty data must not be missing from the size that the reply to link gives.
    let mut writer = File::options().append(true).open(v.at("a")).unwrap();
    writer.write_all(&bytes(3000, 3)).unwrap();
    fs::hard_link(v.at("a"), v.at("d").join(name(&long))).unwrap();
    for path in [v.at("a"), v.at("d").join(name(&long))] {
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.nlink()), (8000, 2));
    }
    assert_eq!(errno(fs::hard_link(v.at("a"), v.at("d").join(name(&long)))), libc::EEXIST);
    assert_eq!(errno(fs::hard_link(v.at("d"), v.at("e"))), libc::EPERM);
    assert_eq!(errno(fs::hard_link(v.at("absent"), v.at("e"))), libc::ENOENT);
    fs::rename(v.at("a"), v.at("d").join(name(&long))).unwrap();
    assert!(v.at("a").exists(), "a rename between two names of one file does nothing");
    fs::remove_file(v.at("a")).unwrap();
    writer.write_all(b"after unlink of one name").unwrap();
    drop(writer);
    let expected = [bytes(5000, 2), bytes(3000, 3), b"after unlink of one name".to_vec()].concat();
    assert!(fs::read(v.at("d").join(name(&long))).unwrap() == expected);
    v.remount(&[]);
    assert!(fs::read(v.at("d").join(name(&long))).unwrap() == expected);
    assert_eq!(fs::metadata(v.at("d").join(name(&long))).unwrap().nlink(), 1);
    // By its other name after the first one, by which it was looked up, is gone.
    fs::hard_link(v.at("d").join(name(&long)), v.at("b")).unwrap();
    let open = File::open(v.at("d").join(name(&long))).unwrap();
    fs::remove_dir_all(v.at("d")).unwrap();
    assert_eq!(open.metadata().unwrap().nlink(), 1);
    assert!(fs::read(v.at("b")).unwrap() == expected);
    // An open file without a name gets one again.
    fs::remove_file(v.at("b")).unwrap();
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    let revived =
        rustix::fs::linkat(CWD, format!("/proc/self/fd/{}", open.as_raw_fd()), CWD, v.at("c"), AtFlags::SYMLINK_FOLLOW);
    assert_eq!(errno(revived), libc::ENOENT, "as on any filesystem");
}

#[test]
fn renames() {
    let v = TestVolume::mounted(&[]);
    let long = |letter: u8| v.at(name(&[letter; 255])).to_owned();
    let text = |path: &Path| fs::read_to_string(path).unwrap();
    for (one, two) in
        [(v.at("one"), v.at("two")), (long(b'1'), long(b'2')), (v.at("one"), long(b'2')), (long(b'1'), v.at("two"))]
    {
        fs::write(&one, "1").unwrap();
        fs::write(&two, "2").unwrap();
        assert_eq!(errno(rename_with(&one, &two, RenameFlags::NOREPLACE)), libc::EEXIST);
        rename_with(&one, &two, RenameFlags::EXCHANGE).unwrap();
        assert_eq!((text(&one), text(&two)), ("2".into(), "1".into()));
        let replaced = File::open(&two).unwrap();
        fs::rename(&one, &two).unwrap();
        assert_eq!(text(&two), "2");
        assert_eq!(replaced.metadata().unwrap().nlink(), 0);
        let mut old = String::new();
        (&replaced).read_to_string(&mut old).unwrap();
        assert_eq!(old, "1", "what was replaced stays readable");
        drop(replaced);
        rename_with(&two, &one, RenameFlags::NOREPLACE).unwrap();
        assert_eq!(errno(fs::rename(&two, &one)), libc::ENOENT);
        assert_eq!(errno(rename_with(&one, &two, RenameFlags::EXCHANGE)), libc::ENOENT);
        fs::rename(&one, &one).unwrap();
        fs::remove_file(&one).unwrap();

        // Directories: full, over an empty one, over a full one, exchanged with a file.
        fs::create_dir(&one).unwrap();
        fs::write(one.join("inside"), "1").unwrap();
        fs::create_dir(&two).unwrap();
        fs::rename(&one, &two).unwrap();
        assert_eq!(text(&two.join("inside")), "1");
        assert!(!one.exists());
        fs::create_dir(&one).unwrap();
        assert_eq!(errno(fs::rename(&one, &two)), libc::ENOTEMPTY);
        assert_eq!(errno(fs::rename(&two, two.join("below"))), libc::EINVAL);
        assert_eq!(errno(rename_with(&two, two.join("inside"), RenameFlags::EXCHANGE)), libc::EINVAL);
        assert_eq!(errno(fs::rename(two.join("inside"), &one)), libc::EISDIR);
        assert_eq!(errno(fs::rename(&one, two.join("inside"))), libc::ENOTDIR);
        rename_with(&one, two.join("inside"), RenameFlags::EXCHANGE).unwrap();
        assert_eq!(text(&one), "1");
        assert!(two.join("inside").is_dir());
        fs::rename(&one, two.join("inside/file")).unwrap();
        assert_eq!(text(&two.join("inside/file")), "1");
        assert_eq!(names(v.mnt()).len(), 1);
        v.remount(&[]);
        assert_eq!(text(&two.join("inside/file")), "1");
        fs::remove_dir_all(&two).unwrap();
    }
    // A whole tree to elsewhere, with files open and dirty in it.
    fs::create_dir_all(v.at("from/a/b")).unwrap();
    fs::create_dir(v.at("to")).unwrap();
    let mut writer = File::create(v.at("from/a/b/file")).unwrap();
    writer.write_all(b"before, ").unwrap();
    fs::rename(v.at("from/a"), v.at("to").join(name(&[b't'; 200]))).unwrap();
    writer.write_all(b"after").unwrap();
    drop(writer);
    let moved = v.at("to").join(name(&[b't'; 200])).join("b");
    assert_eq!(text(&moved.join("file")), "before, after");
    assert_eq!(fs::metadata(v.at("from")).unwrap().nlink(), 2);
    assert_eq!(fs::metadata(v.at("to")).unwrap().nlink(), 3);
    assert_eq!(fs::metadata(moved.join("../..")).unwrap().ino(), fs::metadata(v.at("to")).unwrap().ino());
    assert_eq!(errno(rename_with(v.at("from"), v.at("x"), RenameFlags::WHITEOUT)), libc::EINVAL);
}

#[test]
fn opening_and_writing() {
    let v = TestVolume::mounted(&[]);
    let path = v.at("file");
    let open = |flags: OFlags| rustix::fs::open(&path, flags, Mode::from_raw_mode(0o666)).map(File::from);
    assert_eq!(errno(open(OFlags::RDWR)), libc::ENOENT);
    open(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL).unwrap().write_all(b"one two").unwrap();
    assert_eq!(errno(open(OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)), libc::EEXIST);
    open(OFlags::RDWR | OFlags::CREATE).unwrap().write_all(b"ONE").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"ONE two");
    let (mut a, mut b) =
        (open(OFlags::WRONLY | OFlags::APPEND).unwrap(), open(OFlags::WRONLY | OFlags::APPEND).unwrap());
    for _ in 0..3 {
        a.write_all(b"a").unwrap();
        b.write_all(b"b").unwrap();
    }
    assert_eq!(fs::read(&path).unwrap(), b"ONE twoababab");
    assert_eq!(errno(a.read(&mut [0])), libc::EBADF);
    drop(b);
    open(OFlags::WRONLY | OFlags::TRUNC).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    a.write_all(b"again").unwrap();
    drop(a);
    assert_eq!(fs::read(&path).unwrap(), b"again");
    open(OFlags::WRONLY | OFlags::TRUNC | OFlags::CREATE).unwrap().write_all(b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(errno(rustix::fs::open(v.mnt(), OFlags::WRONLY, Mode::empty())), libc::EISDIR);
    assert_eq!(errno(open(OFlags::RDONLY | OFlags::DIRECTORY)), libc::ENOTDIR);
    // The umask is the caller's, and the mode what is left.
    let run =
        Output::of(v.command("sh").args(["-c", "umask 027; : > u; mkdir ud; umask 0; : > z"]).current_dir(v.mnt()));
    assert_eq!((run.code, mode(v.at("u")), mode(v.at("ud")), mode(v.at("z"))), (Some(0), 0o640, 0o750, 0o666));

    // Overwriting, appending and cutting across block borders, checked against memory.
    let mut model = Vec::new();
    let file = open(OFlags::RDWR | OFlags::TRUNC).unwrap();
    for (step, (at, len)) in [(0, 10), (4090, 10), (4096, 4096), (8191, 2), (1, 12_000), (100_000, 1), (40_000, 70_000)]
        .into_iter()
        .enumerate()
    {
        let data = bytes(len, step as u64);
        file.write_all_at(&data, at as u64).unwrap();
        model.resize(model.len().max(at + len), 0);
        model[at..at + len].copy_from_slice(&data);
        if step % 2 == 1 {
            file.sync_all().unwrap();
        }
        assert!(fs::read(&path).unwrap() == model, "step {step}");
    }
    drop(file);
    v.remount(&[]);
    assert!(fs::read(&path).unwrap() == model);
}

#[test]
fn sparse_files() {
    let v = TestVolume::mounted(&[]);
    let file = File::options().read(true).write(true).create_new(true).open(v.at("sparse")).unwrap();
    let far = (1 << 40) + 12_345;
    file.write_all_at(b"end", far).unwrap();
    file.write_all_at(b"middle", (1 << 30) + 4094).unwrap();
    file.sync_all().unwrap();
    assert!(fs::metadata(v.at("sparse")).unwrap().blocks() < 1000);
    let check = |file: &File| {
        let mut buffer = [1; 8192];
        file.read_exact_at(&mut buffer, 1 << 30).unwrap();
        assert_eq!(&buffer[4094..4100], b"middle");
        assert!(buffer[..4094].iter().chain(&buffer[4100..]).all(|byte| *byte == 0));
        file.read_exact_at(&mut buffer, 77_777).unwrap();
        assert_eq!(buffer, [0; 8192]);
        let mut file = file;
        file.seek(SeekFrom::Start(far - 5)).unwrap();
        let mut tail = Vec::new();
        file.read_to_end(&mut tail).unwrap();
        assert_eq!(tail, b"\0\0\0\0\0end");
    };
    check(&file);
    drop(file);
    // Writing nothing but zeros gives the same.
    fs::write(v.at("zeros"), vec![0; 50_000]).unwrap();
    v.remount(&[]);
    check(&File::open(v.at("sparse")).unwrap());
    assert!(fs::read(v.at("zeros")).unwrap() == vec![0; 50_000]);
    let file = File::options().write(true).open(v.at("zeros")).unwrap();
    file.set_len(1 << 35).unwrap();
    file.set_len(60_000).unwrap();
    drop(file);
    assert!(fs::read(v.at("zeros")).unwrap() == vec![0; 60_000]);
    v.remount(&[]);
    assert!(fs::read(v.at("zeros")).unwrap() == vec![0; 60_000]);
}

#[test]
fn shared_mappings() {
    let v = TestVolume::mounted(&[]);
    fs::write(v.at("m"), bytes(20_000, 4)).unwrap();
    let script = r#"
import mmap, os
fd = os.open("m", os.O_RDWR)
m = mmap.mmap(fd, 0)
assert len(m) == 20000
m[4090:4100] = b"0123456789"
m[19999] = 65
assert os.pread(fd, 10, 4090) == b"0123456789", "not coherent with read"
os.pwrite(fd, b"written", 100)
assert m[100:107] == b"written", "not coherent with write"
m.flush()
os.fsync(fd)
m[8192:8195] = b"end"      # left to the kernel
other = mmap.mmap(os.open("m", os.O_RDONLY), 0, prot=mmap.PROT_READ)
assert other[8192:8195] == b"end"
private = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE)
private[0:4] = b"mine"
assert other[0:4] != b"mine"
"#;
    let run = Output::of(v.command(python()).args(["-c", script]).current_dir(v.mnt()));
    assert_eq!(run.code, Some(0), "{}", run.err);
    let mut expected = bytes(20_000, 4);
    expected[4090..4100].copy_from_slice(b"0123456789");
    expected[19_999] = 65;
    expected[100..107].copy_from_slice(b"written");
    expected[8192..8195].copy_from_slice(b"end");
    assert!(fs::read(v.at("m")).unwrap() == expected);
    v.remount(&[]);
    assert!(fs::read(v.at("m")).unwrap() == expected);
    // A program is a private mapping.
    fs::copy("/bin/true", v.at("true")).unwrap();
    chmod(v.at("true"), 0o755);
    assert!(std::process::Command::new(v.at("true")).status().unwrap().success());
}

#[test]
fn files_without_a_name() {
    let v = TestVolume::mounted(&[]);
    fs::create_dir(v.at("d")).unwrap();
    let make = |path: &Path| {
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.write_all_at(&bytes(9000, 5), 0).unwrap();
        file
    };
    let (unlinked, replaced, elsewhere) = (make(&v.at("a")), make(&v.at("b")), make(&v.at("d/c")));
    fs::remove_file(v.at("a")).unwrap();
    make(&v.at("other"));
    fs::rename(v.at("other"), v.at("b")).unwrap();
    fs::remove_dir_all(v.at("d")).unwrap();
    for file in [&unlinked, &replaced, &elsewhere] {
        let mut model = bytes(9000, 5);
        file.sync_all().unwrap();
        file.write_all_at(b"written later", 8995).unwrap();
        model.truncate(8995);
        model.extend(b"written later");
        let meta = file.metadata().unwrap();
        assert_eq!((meta.len(), meta.nlink()), (9008, 0));
        file.set_len(4100).unwrap();
        model.truncate(4100);
        file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fsetxattr(file, "user.late", b"value", XattrFlags::empty()).unwrap();
        let mut read = vec![0; 5000];
        let n = file.read_at(&mut read, 0).unwrap();
        assert!(read[..n] == model);
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o600);
    }
    drop((unlinked, replaced, elsewhere));
    assert_eq!(names(v.mnt()), [b"b"]);
    v.umount();
    assert_eq!(names(v.backing()).iter().filter(|name| !name.starts_with(b"lethefs.")).count(), 1);
}

#[test]
fn sync_and_statfs() {
    let v = TestVolume::mounted(&[]);
    fs::create_dir(v.at("d")).unwrap();
    let mut file = File::create(v.at("d/f")).unwrap();
    for step in 0..3 {
        file.write_all(&bytes(5000, step)).unwrap();
        if step == 1 { file.sync_data().unwrap() } else { file.sync_all().unwrap() }
    }
    File::open(v.at("d")).unwrap().sync_all().unwrap();
    File::open(v.mnt()).unwrap().sync_all().unwrap();
    rustix::fs::syncfs(&file).unwrap();
    // What fsync promised is there without a clean end.
    drop(file);
    v.crash();
    v.mount(&[]);
    assert!(fs::read(v.at("d/f")).unwrap() == [bytes(5000, 0), bytes(5000, 1), bytes(5000, 2)].concat());
    let (ours, theirs) = (rustix::fs::statvfs(v.mnt()).unwrap(), rustix::fs::statvfs(v.backing()).unwrap());
    assert_eq!((ours.f_namemax, ours.f_blocks, ours.f_files), (255, theirs.f_blocks, theirs.f_files));
    assert!(ours.f_bavail > 0);
}

#[test]
fn extended_attributes() {
    let v = TestVolume::mounted(&["-o", "dev"]);
    fs::write(v.at("f"), "x").unwrap();
    fs::create_dir(v.at("d")).unwrap();
    rustix::fs::mknodat(CWD, v.at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    symlink("f", v.at("l")).unwrap();
    let set = |path: &str, name: &str, value: &[u8], flags| rustix::fs::lsetxattr(v.at(path), name, value, flags);
    let get = |path: &str, name: &str, size: usize| {
        let mut buffer = vec![0; size];
        let n = rustix::fs::lgetxattr(v.at(path), name, &mut buffer)?;
        buffer.truncate(n);
        Ok::<_, rustix::io::Errno>(buffer)
    };
    let list = |path: &str| {
        let mut buffer = vec![0; 4096];
        let n = rustix::fs::llistxattr(v.at(path), &mut buffer).unwrap();
        let mut names: Vec<String> =
            buffer[..n].split(|byte| *byte == 0).map(|name| String::from_utf8(name.to_vec()).unwrap()).collect();
        names.sort();
        names.into_iter().filter(|name| !name.is_empty()).collect::<Vec<_>>()
    };
    let (create, replace, any) = (XattrFlags::CREATE, XattrFlags::REPLACE, XattrFlags::empty());
    for path in ["f", "d"] {
        assert!(list(path).is_empty());
        assert_eq!(errno(get(path, "user.a", 10)), libc::ENODATA);
        assert_eq!(errno(set(path, "user.a", b"1", replace)), libc::ENODATA);
        set(path, "user.a", b"one", create).unwrap();
        assert_eq!(errno(set(path, "user.a", b"1", create)), libc::EEXIST);
        set(path, "user.a", b"three", replace).unwrap();
        set(path, "user.empty", b"", any).unwrap();
        set(path, "trusted.t", b"t", any).unwrap();
        set(path, "security.s", b"s", any).unwrap();
        let (long, longer) = (format!("user.{}", "n".repeat(160)), format!("user.{}", "n".repeat(161)));
        set(path, &long, &[0xff; 500], any).unwrap();
        assert_eq!(errno(set(path, &longer, b"", any)), libc::ERANGE);
        assert_eq!(list(path), ["security.s", "trusted.t", "user.a", "user.empty", &long]);
        assert_eq!(rustix::fs::lgetxattr_query(v.at(path), "user.a"), Ok(5));
        assert_eq!(get(path, "user.a", 5).unwrap(), b"three");
        assert_eq!(errno(get(path, "user.a", 4)), libc::ERANGE);
        assert_eq!(get(path, "user.empty", 1).unwrap(), b"");
        assert_eq!(get(path, &long, 600).unwrap(), [0xff; 500]);
        let need = rustix::fs::llistxattr_query(v.at(path)).unwrap();
        assert_eq!(need, list(path).iter().map(|name| name.len() + 1).sum::<usize>());
        assert_eq!(errno(rustix::fs::llistxattr(v.at(path), &mut vec![0; need - 1])), libc::ERANGE);
        assert_eq!(errno(set(path, "system.other", b"", any)), libc::EOPNOTSUPP);
        rustix::fs::lremovexattr(v.at(path), "user.empty").unwrap();
        assert_eq!(errno(rustix::fs::lremovexattr(v.at(path), "user.empty")), libc::ENODATA);
    }
    // The kernel's rules for what is neither file nor directory.
    assert_eq!(errno(set("l", "user.a", b"1", any)), libc::EPERM);
    assert_eq!(errno(set("fifo", "user.a", b"1", any)), libc::EPERM);
    set("fifo", "trusted.a", b"node", any).unwrap();
    assert!(list("l").is_empty());

    fs::rename(v.at("f"), v.at("g")).unwrap();
    fs::hard_link(v.at("g"), v.at("h")).unwrap();
    v.remount(&[]);
    assert_eq!(get("h", "user.a", 9).unwrap(), b"three");
    assert_eq!(get("d", "trusted.t", 9).unwrap(), b"t");
    assert_eq!(get("fifo", "trusted.a", 9).unwrap(), b"node");
    assert_eq!(list("g").len(), 4);
}

#[test]
fn a_large_directory_that_changes_while_it_is_read() {
    const COUNT: usize = 5000;
    let v = TestVolume::mounted(&[]);
    let dir = v.at("many");
    fs::create_dir(&dir).unwrap();
    let path = |prefix: &str, n: usize| dir.join(format!("{prefix}{n:04}"));
    for n in 0..COUNT {
        File::create(path("f", n)).unwrap();
    }
    let mut seen = std::collections::BTreeMap::<Vec<u8>, usize>::new();
    for (at, entry) in fs::read_dir(&dir).unwrap().enumerate() {
        *seen.entry(entry.unwrap().file_name().as_bytes().to_vec()).or_default() += 1;
        match at {
            // With the first pages read: some go, some come, some get a new name in place.
            1000 => (0..COUNT).step_by(5).for_each(|n| fs::remove_file(path("f", n)).unwrap()),
            1500 => (0..500).for_each(|n| drop(File::create(path("new", n)).unwrap())),
            2000 => (1..COUNT).step_by(5).for_each(|n| fs::rename(path("f", n), path("moved", n)).unwrap()),
            _ => {}
        }
    }
    assert!(seen.values().all(|times| *times == 1), "an entry came twice");
    for n in (0..COUNT).filter(|n| n % 5 > 1) {
        assert!(seen.contains_key(format!("f{n:04}").as_bytes()), "f{n:04} was there all the time and not shown");
    }
    let mut expected: Vec<Vec<u8>> = (0..COUNT)
        .filter(|n| n % 5 != 0)
        .map(|n| format!("{}{n:04}", if n % 5 == 1 { "moved" } else { "f" }).into_bytes())
        .chain((0..500).map(|n| format!("new{n:04}").into_bytes()))
        .collect();
    expected.sort();
    assert!(names(&dir) == expected);
    v.remount(&[]);
    assert!(names(&dir) == expected);
    // rm -r reads and removes by turns.
    fs::remove_dir_all(&dir).unwrap();
    assert!(names(v.mnt()).is_empty());
}

#[test]
fn setgid_directories() {
    let v = TestVolume::mounted(&["-o", "allow_other,suid"]);
    v.open_to_all();
    chmod(v.mnt(), 0o755);
    let dir = v.at("shared");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::chown(&dir, None, Some(4242)).unwrap();
    chmod(&dir, 0o2777);
    as_user(1001, 1001, || {
        File::create(dir.join("file")).unwrap();
        fs::create_dir(dir.join("sub")).unwrap();
        symlink("x", dir.join("link")).unwrap();
        rustix::fs::mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        File::create(dir.join("sub/deeper")).unwrap();
    });
    for name in ["file", "sub", "link", "fifo", "sub/deeper"] {
        let meta = fs::symlink_metadata(dir.join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1001, 4242), "{name}");
    }
    assert_eq!((mode(dir.join("sub")) & 0o2000, mode(dir.join("file")) & 0o2000), (0o2000, 0));
    // Somebody outside the group does not get a setgid program by making one there.
    as_user(1001, 1001, || File::options().write(true).create_new(true).mode(0o2755).open(dir.join("prog")).unwrap());
    assert_eq!(mode(dir.join("prog")) & 0o2000, 0);
}

#[test]
fn writing_takes_privileges_away() {
    let v = TestVolume::mounted(&["-o", "allow_other,suid"]);
    v.open_to_all();
    chmod(v.mnt(), 0o755);
    let fresh = |name: &str| {
        fs::write(v.at(name), "program").unwrap();
        chmod(v.at(name), 0o6777);
        v.at(name)
    };
    let (written, cut, by_root, appended) = (fresh("written"), fresh("cut"), fresh("root"), fresh("appended"));
    as_user(1001, 1001, || {
        File::options().write(true).open(&written).unwrap().write_all_at(b"x", 0).unwrap();
        File::options().append(true).open(&appended).unwrap().write_all(b"x").unwrap();
        File::options().write(true).open(&cut).unwrap().set_len(1).unwrap();
    });
    File::options().write(true).open(&by_root).unwrap().write_all_at(b"x", 0).unwrap();
    let check = || {
        for path in [&written, &cut, &appended] {
            assert_eq!(mode(path), 0o777, "{}", path.display());
        }
        assert_eq!(mode(&by_root), 0o6777);
    };
    check();
    v.remount(&["-o", "allow_other,suid"]);
    check();
    // chown does it, too.
    let owned = fresh("owned");
    std::os::unix::fs::chown(&owned, Some(1001), None).unwrap();
    assert_eq!(mode(&owned), 0o777);
}
