//! Objects of types that we never make, absurd numbers, names of ours in the place of other things.

use super::*;

/// Plants an object of each kind at the paths that `path` makes of its name.
fn plant(path: impl Fn(&str) -> PathBuf) {
    let node = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, path(name), kind, Mode::from_raw_mode(0o666), device).unwrap();
    };
    node("fifo", FileType::Fifo, 0);
    node("socket", FileType::Socket, 0);
    node("char", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("block", FileType::BlockDevice, rustix::fs::makedev(7, 250));
    symlink("/etc/passwd", path("link")).unwrap();
    symlink("a".repeat(1020), path("long-link")).unwrap();
    for len in [0, 10, 128, 600] {
        fs::write(path(&format!("file{len}")), vec![b'a'; len]).unwrap();
    }
    fs::create_dir(path("dir")).unwrap();
    fs::create_dir(path("dir-link")).unwrap();
    symlink("/etc/passwd", path("dir-link").join(DIR_HEADER)).unwrap();
    fs::create_dir(path("dir-fifo")).unwrap();
    let header = path("dir-fifo").join(DIR_HEADER);
    rustix::fs::mknodat(CWD, header, FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
}

const PLANTED: [&str; 13] = [
    "fifo",
    "socket",
    "char",
    "block",
    "link",
    "long-link",
    "file0",
    "file10",
    "file128",
    "file600",
    "dir",
    "dir-link",
    "dir-fifo",
];

#[test]
fn planted_objects_are_not_believed_and_not_opened() {
    let volume = TestVolume::mounted(&[]);
    fs::create_dir(volume.at("d")).unwrap();
    for name in PLANTED {
        fs::write(volume.at("d").join(name), content(100, name)).unwrap();
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let dir = keys.find("d");
    let watch = Watch::new();
    // In the place of genuine entries, and under names of no meaning.
    for name in PLANTED {
        fs::remove_file(keys.find(&format!("d/{name}"))).unwrap();
    }
    plant(|name| keys.find(&format!("d/{name}")));
    plant(|name| dir.join(format::b64(&Sha256::digest(name))));
    plant(|name| dir.join(format!("no base64 {name}")));
    plant(|name| dir.join(format!("lethefs.own.{name}")));
    for entry in fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()) {
        if is_special(&entry) {
            watch.add(&entry);
        }
    }
    watch.add(&keys.find("d/dir-fifo").join(DIR_HEADER));

    volume.mount(&[]);
    let shown = listed(&volume.at("d"));
    let expected: BTreeSet<&str> = PLANTED[4..].iter().copied().collect();
    assert_eq!(shown.iter().map(String::as_str).collect::<BTreeSet<_>>(), expected);
    let at = |name: &str| volume.at("d").join(name);
    for name in ["fifo", "socket", "char", "block"] {
        assert_eq!(errno(fs::symlink_metadata(at(name))), EIO, "{name}");
        assert_eq!(errno(File::open(at(name))), EIO, "{name}");
    }
    for name in ["link", "long-link"] {
        assert!(fs::symlink_metadata(at(name)).unwrap().is_symlink(), "{name}");
        assert_eq!(errno(fs::read_link(at(name))), EIO, "{name}");
        assert_eq!(errno(File::open(at(name))), EIO, "{name}");
    }
    for name in ["file0", "file10", "file128", "file600"] {
        assert_eq!(errno(fs::read(at(name))), EIO, "{name}");
        let attribute: &mut [u8] = &mut [0; 10];
        assert_eq!(rustix::fs::getxattr(at(name), "user.x", attribute).unwrap_err().raw_os_error(), EIO, "{name}");
    }
    for name in ["dir", "dir-link", "dir-fifo"] {
        let read = fs::read_dir(at(name)).and_then(|mut entries| entries.next().transpose());
        assert_eq!(errno(read), EIO, "{name}");
        assert_eq!(errno(File::create(at(name).join("x"))), EIO, "{name}");
    }
    assert!(counter(&volume, "integrity_failures") >= 30);
    // All but the four that are nothing can be thrown away.
    for name in ["dir", "dir-link", "dir-fifo"] {
        fs::remove_dir(at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for name in &PLANTED[4..10] {
        fs::remove_file(at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert!(listed(&volume.at("d")).is_empty());
    assert!(!watch.opened(), "the daemon opened a device or FIFO that was planted");
    volume.umount();
    assert_discreet(&volume);

    // In the place of our own files: the mount says so, or heals what there are two of.
    for name in ["lethefs.volume", "lethefs.erase", "lethefs.overflow", "lethefs.tmp.x"] {
        let path = volume.backing().join(name);
        let _ = fs::remove_file(&path);
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        watch.add(&path);
    }
    volume.mount(&[]);
    assert_eq!(errno(symlink("x".repeat(2000), volume.at("long"))), 20, "ENOTDIR: the tails have no place");
    assert!(volume.cli(&["erase", "backing", "--plan"]).code == Some(0));
    volume.umount();
    assert!(!watch.opened(), "the daemon opened a FIFO that was planted");
}

/// What the kernel may make of absurd numbers in the backing tree.
#[test]
fn absurd_sizes_and_times() {
    let volume = TestVolume::mounted(&[]);
    for name in ["huge", "old", "future", "open"] {
        fs::write(volume.at(name), content(5000, name)).unwrap();
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let file = |name: &str| File::options().write(true).open(keys.find(name)).unwrap();
    // As large as the backing filesystem allows.
    let largest = (32..63).rev().find(|bits| file("huge").set_len((1 << bits) - 1).is_ok()).unwrap();
    for (name, seconds) in [("old", i64::MIN), ("future", i64::MAX)] {
        let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 999_999_999 };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        rustix::fs::futimens(file(name), &times).unwrap();
    }
    volume.mount(&[]);
    assert!(fs::symlink_metadata(volume.at("huge")).unwrap().len() > 1 << (largest - 1));
    let huge = File::open(volume.at("huge")).unwrap();
    for at in [0, 4096, 1 << 30, (1 << (largest - 1)) - 5] {
        assert_eq!(errno(huge.read_at(&mut [0; 4096], at)), EIO);
    }
    for name in ["old", "future"] {
        fs::symlink_metadata(volume.at(name)).unwrap();
        assert_eq!(fs::read(volume.at(name)).unwrap(), content(5000, name));
    }
    renew(&volume.at("huge"), b"new", false, "huge");
    assert!(volume.cli(&["erase", "backing", "--plan"]).code == Some(0));
}

/// Names of files that lie outside of the volume, and another filesystem mounted in the tree: not believed, not changed.
#[test]
fn what_lies_outside_stays_outside() {
    let volume = TestVolume::mounted(&[]);
    for name in ["hard", "genuine", "again"] {
        fs::write(volume.at(name), content(5000, name)).unwrap();
    }
    fs::create_dir(volume.at("other")).unwrap();
    fs::create_dir(volume.at("d")).unwrap();
    fs::write(volume.at("d/file"), content(5000, "d")).unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    let secret = volume.path("state/outside");
    fs::write(&secret, content(4636, "outside")).unwrap();
    fs::remove_file(keys.find("hard")).unwrap();
    fs::hard_link(&secret, keys.find("hard")).unwrap();
    // Two names of one genuine file are what link(2) makes.
    fs::remove_file(keys.find("again")).unwrap();
    fs::hard_link(keys.find("genuine"), keys.find("again")).unwrap();
    // A copy of a genuine directory, on another filesystem, over a genuine one: seen at mount, and later.
    let (dir, other, file) = (keys.find("d"), keys.find("other"), keys.find("d/file"));
    let cover = || {
        let none: Option<&std::ffi::CStr> = None;
        rustix::mount::mount("none", &other, "tmpfs", rustix::mount::MountFlags::empty(), none).unwrap();
        symlink(fs::read_link(dir.join(DIR_HEADER)).unwrap(), other.join(DIR_HEADER)).unwrap();
        fs::copy(&file, other.join(file.file_name().unwrap())).unwrap();
    };
    let uncover = || rustix::mount::unmount(&other, rustix::mount::UnmountFlags::empty()).unwrap();
    cover();
    volume.cli(&["mount", "backing", "mnt"]).is(15).says("another filesystem is mounted below");
    uncover();

    volume.mount(&[]);
    cover();
    assert_eq!(errno(fs::read(volume.at("hard"))), EIO);
    assert_eq!(fs::read(volume.at("again")).unwrap(), content(5000, "genuine"));
    assert_eq!(errno(fs::symlink_metadata(volume.at("other"))), 18, "EXDEV");
    assert_eq!(errno(fs::read(volume.at("other/file"))), 18, "EXDEV");
    assert_eq!(listed(&volume.mnt()), ["again", "d", "genuine", "hard"]);
    fs::remove_file(volume.at("hard")).unwrap();
    assert_eq!(fs::read(&secret).unwrap(), content(4636, "outside"));
    uncover();
    volume.umount();
}
