//! Node records: FIFOs and devices that were altered.

use super::*;

#[test]
fn node_records_that_were_altered() {
    let volume = TestVolume::mounted(&["-o", "dev"]);
    let null = rustix::fs::makedev(1, 3);
    let cuts = [0_usize, 1, 127, 129, 511, 512, 600];
    let flips = [0_usize, 8, 10, 11, 12, 16, 24, 40, 41, 47, 50, 68, 80, 127];
    let names: Vec<String> =
        cuts.iter().map(|n| format!("cut {n}")).chain(flips.iter().map(|n| format!("flip {n}"))).collect();
    for name in names.iter().map(String::as_str).chain(["device", "typed", "regular", "dir"]) {
        rustix::fs::mknodat(CWD, volume.at(name), FileType::CharacterDevice, Mode::from_raw_mode(0o644), null).unwrap();
    }
    rustix::fs::mknodat(CWD, volume.at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    fs::write(volume.at("file"), content(3000, "file")).unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    let alter = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let path = keys.find(name);
        let mut bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 128);
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    };
    for len in cuts {
        alter(&format!("cut {len}"), &|bytes| bytes.resize(len, 0));
    }
    for at in flips {
        alter(&format!("flip {at}"), &|bytes| bytes[at] ^= 4);
    }
    // /dev/null becomes a disk, with /dev/vda's number.
    alter("typed", &|bytes| {
        bytes[10] = 7;
        bytes[40..48].copy_from_slice(&rustix::fs::makedev(254, 0).to_le_bytes());
    });
    let header = fs::read(keys.find("file")).unwrap()[..128].to_vec();
    alter("regular", &|bytes| bytes.copy_from_slice(&header));
    let root = fs::read_link(volume.backing().join(DIR_HEADER)).unwrap();
    let root = format::un_b64(root.as_os_str().as_encoded_bytes()).unwrap();
    alter("dir", &|bytes| bytes.copy_from_slice(&root));
    // A file that looks like a record.
    let file = fs::read(keys.find("fifo")).unwrap();
    fs::write(keys.find("file"), file).unwrap();

    volume.mount(&["-o", "dev"]);
    let device = fs::symlink_metadata(volume.at("device")).unwrap();
    assert!(device.file_type().is_char_device() && device.rdev() == null);
    assert!(fs::symlink_metadata(volume.at("fifo")).unwrap().file_type().is_fifo());
    // A genuine record under another name of the same volume (docs/FORMAT.md section 13).
    assert!(fs::symlink_metadata(volume.at("file")).unwrap().file_type().is_fifo());
    let damaged: Vec<&str> = names.iter().map(String::as_str).chain(["typed", "regular", "dir"]).collect();
    for name in &damaged {
        let meta = fs::symlink_metadata(volume.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(meta.is_file() && meta.rdev() == 0, "{name}");
        assert_eq!(errno(fs::read(volume.at(name))), EIO, "{name}");
    }
    assert_eq!(listed(&volume.mnt()).len(), names.len() + 6);
    assert!(counter(&volume, "integrity_failures") >= damaged.len() as u64);
    for (n, name) in damaged.iter().enumerate() {
        renew(&volume.at(name), b"new", n % 2 == 0, name);
    }
    volume.remount(&[]);
    assert_eq!(fs::read(volume.at("typed")).unwrap(), b"new");
}
