//! Headers of other directories and volumes; the root's own.

use super::*;

#[test]
fn directories_with_headers_of_others() {
    let (volume, other) = (TestVolume::mounted(&[]), TestVolume::mounted(&[]));
    let dirs = ["swap1", "swap2", "foreign", "none", "file", "flipped", "cut", "regular", "empty"];
    for name in dirs {
        fs::create_dir(volume.at(name)).unwrap();
        if name != "empty" {
            fs::write(volume.at(name).join(NAME), content(5000, name)).unwrap();
        }
    }
    fs::create_dir(other.at("dir")).unwrap();
    fs::write(volume.at("regular file"), b"1").unwrap();
    volume.umount();
    other.umount();
    let keys = Keys::of(&volume);
    let header = |name: &str| keys.find(name).join(DIR_HEADER);
    let mut found: Vec<_> = dirs.iter().map(|name| keys.find(name)).collect();
    let text = |name: &str| fs::read_link(header(name)).unwrap().into_os_string().into_string().unwrap();
    let put = |name: &str, text: &str| {
        fs::remove_file(header(name)).unwrap();
        symlink(text, header(name)).unwrap();
    };
    let genuine = text("flipped");
    let regular = format::b64(&fs::read(keys.find("regular file")).unwrap()[..128]);
    let (first, second) = (text("swap1"), text("swap2"));
    put("swap1", &second);
    put("swap2", &first);
    let theirs = fs::read_link(Keys::of(&other).find("dir").join(DIR_HEADER)).unwrap();
    put("foreign", theirs.to_str().unwrap());
    fs::remove_file(header("none")).unwrap();
    fs::remove_file(header("file")).unwrap();
    fs::write(header("file"), &genuine).unwrap();
    put("flipped", &genuine.replacen('A', "B", 1));
    put("cut", &genuine[..170]);
    put("regular", &regular);
    fs::remove_file(header("empty")).unwrap();
    found.sort();

    volume.mount(&[]);
    for name in ["swap1", "swap2"] {
        assert!(listed(&volume.at(name)).is_empty());
        assert_eq!(errno(fs::read(volume.at(name).join(NAME))), 2);
    }
    for name in ["foreign", "none", "file", "flipped", "cut", "regular", "empty"] {
        assert!(fs::symlink_metadata(volume.at(name)).unwrap().is_dir());
        let read = fs::read_dir(volume.at(name)).and_then(|mut entries| entries.next().transpose());
        assert_eq!(errno(read), EIO, "{name}");
        assert_eq!(errno(fs::read(volume.at(name).join(NAME))), EIO, "{name}");
        assert_eq!(errno(fs::write(volume.at(name).join("new"), b"x")), EIO, "{name}");
    }
    assert!(counter(&volume, "integrity_failures") >= 9);
    // An empty one can go, one with entries that nobody can name cannot.
    fs::remove_dir(volume.at("empty")).unwrap();
    assert_eq!(errno(fs::remove_dir(volume.at("cut"))), 39, "ENOTEMPTY");
    volume.umount();
    assert_discreet(&volume);

    // The root's own.
    let root = volume.backing().join(DIR_HEADER);
    let genuine = fs::read_link(&root).unwrap();
    let foreign = fs::read_link(other.backing().join(DIR_HEADER)).unwrap();
    for text in [first.as_str(), foreign.to_str().unwrap(), &regular, "/etc/passwd", "x"] {
        fs::remove_file(&root).unwrap();
        symlink(text, &root).unwrap();
        refuses(&volume, &["mount", "backing", "mnt"], 10, "root directory's header");
    }
    fs::remove_file(&root).unwrap();
    refuses(&volume, &["mount", "backing", "mnt"], 10, "root directory's header");
    rustix::fs::mknodat(CWD, &root, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    refuses(&volume, &["mount", "backing", "mnt"], 10, "root directory's header");
    fs::remove_file(&root).unwrap();
    symlink(genuine, &root).unwrap();
    volume.mount(&[]);
}
