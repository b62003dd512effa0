//! Names that are none, moved or cut off; long names and their sidecars.

use super::*;

#[test]
fn names_that_are_none_are_not_shown() {
    let volume = TestVolume::mounted(&[]);
    fs::create_dir(volume.at("d")).unwrap();
    fs::create_dir(volume.at("e")).unwrap();
    fs::write(volume.at("d/one"), content(100, "one")).unwrap();
    fs::write(volume.at("e/else"), content(100, "else")).unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    let (dir, one) = (keys.find("d"), keys.find("d/one"));
    let mut planted = 0;
    let mut add = |name: &str| {
        fs::copy(&one, dir.join(name)).unwrap();
        planted += 1;
    };
    for bad in [b"".as_slice(), b".", b"..", b"a/b", b"/", b"../../etc/passwd", b"nul\0"] {
        add(&format::b64(&keys.seal_name(&dir, bad)));
    }
    // Of 256 bytes, with its sidecar.
    let sealed = keys.seal_name(&dir, &[b'x'; 256]);
    let hash = format::b64(&Sha256::digest(&sealed));
    symlink(format::b64(&sealed), dir.join(format!("{LONG_NAME_PREFIX}{hash}"))).unwrap();
    add(&format!("{LONG_PREFIX}{hash}"));
    // A short name in the form of a long one would be a second name of the same entry.
    let sealed = keys.seal_name(&dir, b"two");
    let hash = format::b64(&Sha256::digest(&sealed));
    symlink(format::b64(&sealed), dir.join(format!("{LONG_NAME_PREFIX}{hash}"))).unwrap();
    add(&format!("{LONG_PREFIX}{hash}"));
    // The same bytes written otherwise: 19 bytes are 26 characters, the last with four bits to spare.
    let genuine = one.file_name().unwrap().to_str().unwrap();
    let (rest, last) = genuine.split_at(genuine.len() - 1);
    let other = char::from(if last == "A" { b'B' } else { last.as_bytes()[0] + 1 });
    add(&format!("{rest}{other}"));
    add(&format!("{genuine}=="));
    add(&format!("{genuine}AAAA"));
    add(&genuine[..genuine.len() - 1]);
    // An entry of another directory, under its name there.
    add(keys.find("e/else").file_name().unwrap().to_str().unwrap());
    add("not-base64!");

    volume.mount(&[]);
    assert_eq!(listed(&volume.at("d")), ["one"]);
    assert!(counter(&volume, "integrity_failures") >= planted);
    assert_eq!(listed(&volume.at("e")), ["else"]);
    for name in ["two", "else", &"x".repeat(255)] {
        assert_eq!(errno(fs::symlink_metadata(volume.at("d").join(name))), 2, "{name}");
    }
    assert_eq!(errno(File::create(volume.at("d").join("x".repeat(256)))), 36, "ENAMETOOLONG");
    // The mount works on.
    fs::write(volume.at("d/two"), b"2").unwrap();
    assert_eq!(listed(&volume.at("d")), ["one", "two"]);
}

#[test]
fn long_names_and_their_sidecars() {
    let volume = TestVolume::mounted(&[]);
    let name = |letter: &str| letter.repeat(255);
    for letter in ["a", "b", "c", "d", "e", "f", "g"] {
        fs::write(volume.at(name(letter)), content(100, letter)).unwrap();
    }
    volume.umount();
    let keys = Keys::of(&volume);
    let entry = |letter: &str| keys.find(&name(letter));
    let sidecar = |letter: &str| {
        let entry = entry(letter).file_name().unwrap().to_str().unwrap().to_owned();
        volume.backing().join(entry.replace(LONG_PREFIX, LONG_NAME_PREFIX))
    };
    fs::remove_file(sidecar("a")).unwrap();
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(CWD, sidecar("b"), CWD, sidecar("c"), exchange).unwrap();
    fs::remove_file(sidecar("d")).unwrap();
    symlink("x".repeat(300), sidecar("d")).unwrap();
    fs::remove_file(sidecar("e")).unwrap();
    rustix::fs::mknodat(CWD, sidecar("e"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    rustix::fs::renameat_with(CWD, entry("f"), CWD, entry("g"), exchange).unwrap();

    volume.mount(&[]);
    // Two whole files swapped for each other are two genuine files (docs/FORMAT.md section 13).
    assert_eq!(listed(&volume.mnt()), [name("f"), name("g")]);
    assert_eq!(fs::read(volume.at(name("f"))).unwrap(), content(100, "g"));
    assert!(counter(&volume, "integrity_failures") >= 5);
    for letter in ["a", "b", "c", "d", "e"] {
        assert_eq!(fs::read(volume.at(name(letter))).unwrap(), content(100, letter), "a lookup does not need it");
        fs::remove_file(volume.at(name(letter))).unwrap();
    }
    assert!(!entry("a").exists());
}
