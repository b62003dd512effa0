//! Alterations under a live mount: what the kernel knows stays, what it asks for is checked.

use super::*;

/// The same while mounted: what the kernel knows stays, what it asks for is checked.
#[test]
fn alterations_under_a_live_mount() {
    let volume = TestVolume::mounted(&[]);
    let names: Vec<String> = (0..12).map(|n| format!("{NAME}-{n}")).collect();
    for name in &names {
        fs::write(volume.at(name), content(12293, name)).unwrap();
    }
    volume.remount(&[]);
    let keys = Keys::of(&volume);
    // Half of them only looked at, half of them read before.
    for (n, name) in names.iter().enumerate() {
        let file = File::open(volume.at(name)).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12293);
        if n % 2 == 1 {
            file.read_exact_at(&mut [0; 100], 0).unwrap();
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        }
    }
    let watch = Watch::new();
    let file = |name: &str| fs::File::options().write(true).open(keys.find(name)).unwrap();
    for (n, name) in names.iter().enumerate() {
        let path = keys.find(name);
        match n / 2 {
            0 => file(name).write_all_at(b"x", 512 + 20).unwrap(),
            1 => file(name).set_len(512 + 4124).unwrap(),
            2 => file(name).set_len(0).unwrap(),
            3 => file(name).write_all_at(&[0; 4124], 512).unwrap(),
            4 => {
                fs::remove_file(&path).unwrap();
                rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
                watch.add(&path);
            }
            _ => {
                fs::remove_file(&path).unwrap();
                let null = rustix::fs::makedev(1, 3);
                rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::from_raw_mode(0o600), null).unwrap();
                watch.add(&path);
            }
        }
    }
    for (n, name) in names.iter().enumerate() {
        // Replaced behind an open descriptor: what was written is still what is read.
        let may_read = n == 9 || n == 11;
        match fs::read(volume.at(name)) {
            Ok(bytes) => assert!(may_read && bytes == content(12293, name), "{n}"),
            Err(error) => assert!(!may_read && matches!(error.raw_os_error(), Some(EIO | 6)), "{n}: {error}"),
        }
    }
    assert!(!watch.opened(), "the daemon opened a device or FIFO that was planted");
    assert!(counter(&volume, "integrity_failures") >= 8);
    volume.remount(&[]);
    for name in &names[8..] {
        assert_eq!(errno(fs::symlink_metadata(volume.at(name))), EIO);
    }
    assert!(!watch.opened(), "the daemon opened a device or FIFO that was planted");
    assert_discreet(&volume);
}

/// Between stat and the first read another genuine file comes in a file's place, of another size than the kernel was told:
/// neither cut to that size nor filled up with zeros.
#[test]
fn a_swap_between_stat_and_read() {
    let volume = TestVolume::mounted(&[]);
    let sizes = [(100, 5000), (100, 12293), (5000, 100), (5000, 12293), (12293, 100), (12293, 5000)];
    let named = |how| sizes.map(|(a, b)| (format!("{how} {a} {b}"), a, b));
    let pairs = ["in place", "by name"].map(named).concat();
    for (name, a, b) in &pairs {
        fs::write(volume.at(name), content(*a, name)).unwrap();
        fs::write(volume.at(format!("other {name}")), content(*b, "other")).unwrap();
    }
    volume.remount(&[]);
    let keys = Keys::of(&volume);
    for (name, a, _) in &pairs {
        assert_eq!(fs::metadata(volume.at(name)).unwrap().len(), *a as u64);
        let (here, other) = (keys.find(name), keys.find(&format!("other {name}")));
        if name.starts_with("in place") {
            fs::write(here, fs::read(other).unwrap()).unwrap();
        } else {
            rustix::fs::renameat_with(CWD, here, CWD, other, rustix::fs::RenameFlags::EXCHANGE).unwrap();
        }
    }
    for (name, ..) in &pairs {
        assert_eq!(errno(fs::read(volume.at(name))), EIO, "{name}");
    }
    // Looked up anew they are what they are: whole files, put in another's place (docs/FORMAT.md section 13).
    volume.remount(&[]);
    for (name, _, b) in &pairs {
        assert_eq!(fs::read(volume.at(name)).unwrap(), content(*b, "other"), "{name}");
    }
}

/// Backing filesystems give the number of a deleted object to the next new one. The kernel must not take what we make for
/// what it knew by that number.
#[test]
fn numbers_of_deleted_objects_used_again() {
    let volume = TestVolume::mounted(&[]);
    let names: Vec<String> = (0..30).map(|n| n.to_string()).collect();
    for name in &names {
        fs::write(volume.at(format!("file {name}")), content(5000, name)).unwrap();
        symlink(format!("old {name}"), volume.at(format!("link {name}"))).unwrap();
        fs::create_dir(volume.at(format!("dir {name}"))).unwrap();
    }
    volume.remount(&[]);
    let keys = Keys::of(&volume);
    for name in &names {
        fs::symlink_metadata(volume.at(format!("file {name}"))).unwrap();
        fs::read_link(volume.at(format!("link {name}"))).unwrap();
        assert!(fs::read_dir(volume.at(format!("dir {name}"))).unwrap().next().is_none());
    }
    // One kind after the other, so that each gets the numbers of its own.
    for name in &names {
        fs::remove_file(keys.find(&format!("file {name}"))).unwrap();
    }
    for name in &names {
        let path = volume.at(format!("new file {name}"));
        match fs::write(&path, content(100, name)) {
            Ok(()) => assert_eq!(fs::read(&path).unwrap(), content(100, name)),
            Err(error) => assert_eq!(error.raw_os_error(), Some(EIO)),
        }
    }
    for name in &names {
        fs::remove_file(keys.find(&format!("link {name}"))).unwrap();
    }
    for name in &names {
        let path = volume.at(format!("new link {name}"));
        match symlink(name, &path) {
            Ok(()) => assert_eq!(fs::read_link(&path).unwrap(), Path::new(name)),
            Err(error) => assert_eq!(error.raw_os_error(), Some(EIO)),
        }
    }
    for name in &names {
        let dir = keys.find(&format!("dir {name}"));
        fs::remove_file(dir.join(DIR_HEADER)).unwrap();
        fs::remove_dir(dir).unwrap();
    }
    let mut whole = BTreeSet::new();
    for name in &names {
        let path = volume.at(format!("new dir {name}"));
        match fs::create_dir(&path).and_then(|()| fs::write(path.join("x"), b"x")) {
            Ok(()) => {
                assert_eq!(listed(&path), ["x"]);
                whole.insert(name.as_str());
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(EIO)),
        }
    }
    // What was made is there, and is what it was made as.
    volume.remount(&[]);
    assert!(whole.iter().all(|name| listed(&volume.at(format!("new dir {name}"))) == ["x"]));
    for name in listed(&volume.mnt()) {
        let (kind, number) = name.rsplit_once(' ').unwrap();
        match kind {
            "new file" => assert_eq!(fs::read(volume.at(&name)).unwrap(), content(100, number)),
            "new link" => assert_eq!(fs::read_link(volume.at(&name)).unwrap(), Path::new(number)),
            _ => assert!(listed(&volume.at(&name)).is_empty() || whole.contains(number), "{name}"),
        }
    }
}

/// A file that this mount has just written is not one that a crash left: whatever the header on disk promises so far, it has
/// no holes, and none of it is missing.
#[test]
fn what_was_just_written_cannot_be_zeroed_or_cut() {
    let volume = TestVolume::mounted(&[]);
    let keys = Keys::of(&volume);
    for syncs in [1, 2] {
        for alteration in ["zero", "cut", "punch"] {
            let name = format!("{syncs} {alteration}");
            let mut file = File::create_new(volume.at(&name)).unwrap();
            file.write_all(&content(12293, &name)).unwrap();
            // The first makes it durable, the second makes the header say so.
            (0..syncs).for_each(|_| file.sync_all().unwrap());
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            let backing = File::options().write(true).open(keys.find(&name)).unwrap();
            let second = (HEADER + SEALED) as u64;
            match alteration {
                "zero" => backing.write_all_at(&[0; SEALED], second).unwrap(),
                "cut" => backing.set_len(second).unwrap(),
                _ => {
                    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&backing, flags, second, SEALED as u64).unwrap();
                }
            }
            let read = File::open(volume.at(&name)).unwrap().read_at(&mut [0; 4096], 4096);
            assert_eq!(errno(read), EIO, "{name}");
        }
    }
}

/// Small and the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }
}

/// One thing that an attacker does to entries of the backing tree. What is not there any more he cannot do it to.
fn attack(dice: &mut Dice, entries: &[PathBuf], originals: &[Vec<u8>], dirs: &[PathBuf]) {
    let (a, b) = (dice.roll(entries.len()), dice.roll(entries.len()));
    let entry = &entries[a];
    let writable =
        || File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(entry);
    let replace = |make: &dyn Fn() -> std::io::Result<()>| {
        let _ = fs::remove_file(entry).or_else(|_| fs::remove_dir(entry));
        let _ = make();
    };
    let exchange = |a: &Path, b: &Path| {
        let _ = rustix::fs::renameat_with(CWD, a, CWD, b, rustix::fs::RenameFlags::EXCHANGE);
    };
    let node = |kind, device| Ok(rustix::fs::mknodat(CWD, entry, kind, Mode::from_raw_mode(0o600), device)?);
    match dice.roll(12) {
        0 | 1 => exchange(entry, &entries[b]),
        2 => {
            if let Ok(file) = writable() {
                let at = dice.roll(originals[a].len()) as u64;
                let _ = file.write_all_at(&[dice.roll(256) as u8], at);
            }
        }
        3 => drop(writable().and_then(|file| file.set_len(dice.roll(20_000) as u64))),
        4 => drop(writable().and_then(|file| {
            file.write_all_at(&originals[b], 0)?;
            file.set_len(originals[b].len() as u64)
        })),
        5 => drop(writable().and_then(|file| {
            let at = HEADER + dice.roll(4) * SEALED;
            let end = originals[b].len().min(at + SEALED);
            file.write_all_at(originals[b].get(at..end).unwrap_or_default(), at as u64)
        })),
        6 => replace(&|| node(FileType::Fifo, 0)),
        7 => replace(&|| symlink("/etc/passwd", entry)),
        8 => replace(&|| fs::create_dir(entry)),
        9 => exchange(&dirs[0], &dirs[1]),
        10 => exchange(&dirs[0].join(DIR_HEADER), &dirs[1].join(DIR_HEADER)),
        _ => replace(&|| fs::write(entry, &originals[a])),
    }
}

/// All at once, without pause, while programs look and read: whole contents of some file or an error, and no end of the daemon.
#[test]
fn an_attacker_at_work_while_programs_read() {
    let volume = TestVolume::mounted(&[]);
    let names: Vec<String> =
        ["d", "e"].iter().flat_map(|dir| SIZES.iter().map(move |size| format!("{dir}/{NAME}-{size}"))).collect();
    let contents: Vec<Vec<u8>> =
        names.iter().zip(SIZES.iter().cycle()).map(|(name, size)| content(*size, name)).collect();
    for dir in ["d", "e"] {
        fs::create_dir(volume.at(dir)).unwrap();
    }
    for (name, content) in names.iter().zip(&contents) {
        fs::write(volume.at(name), content).unwrap();
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let entries: Vec<PathBuf> = names.iter().map(|name| keys.find(name)).collect();
    let originals: Vec<Vec<u8>> = entries.iter().map(|path| fs::read(path).unwrap()).collect();
    let dirs = [keys.find("d"), keys.find("e")];

    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for round in 0..6 {
        volume.mount(&[]);
        let done = AtomicBool::new(false);
        let read = |salt: u64| {
            let mut dice = Dice(0xd1b5_4a32 + salt);
            while !done.load(Ordering::Relaxed) {
                let path = volume.at(&names[dice.roll(names.len())]);
                let _ = fs::symlink_metadata(&path);
                let _ = fs::read_dir(volume.at(["d", "e"][dice.roll(2)])).map(Iterator::count);
                let _ = fs::read_link(&path);
                let Ok(mut file) = File::open(&path) else { continue };
                let mut bytes = Vec::new();
                if file.read_to_end(&mut bytes).is_ok() {
                    assert!(contents.contains(&bytes), "{}: {} wrong bytes", path.display(), bytes.len());
                }
                let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| read(round));
            scope.spawn(|| read(round + 100));
            for _ in 0..1500 {
                attack(&mut dice, &entries, &originals, &dirs);
            }
            done.store(true, Ordering::Relaxed);
        });
        // Still there, and ends as it should.
        counter(&volume, "integrity_failures");
        volume.umount();
    }
    assert_discreet(&volume);
}
