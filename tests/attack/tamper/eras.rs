//! Headers of an older era: wrapped under a KEK version that is not used any more.

use lethefs::crypto::ids::hex;
use lethefs::keyring;
use lethefs::kms::{self, Binding, Purpose};
use lethefs::volume::header::{ObjectType, Static};
use lethefs::volume::meta::{self, Body, KekRecord, VolumeFile};

use super::*;

/// Makes KEK version 2 the only one that is still good, as a finished rotation would: new root header, new volume file.
fn rotate(volume: &TestVolume) {
    let keys = Keys::of(volume);
    let mut body: Body = serde_json::from_value(crate::store::body(volume)).unwrap();
    let source = kms::source(&volume.file_uri().parse().unwrap()).unwrap();
    let make = |purpose| source.make(&Binding { volume: body.volume_id, scope: 0, version: 2, purpose }).unwrap();
    let (kek, canary) = (make(Purpose::Kek), make(Purpose::Canary));
    keys.ring.admit(0, 2, &kek.key, true).unwrap();
    let mut record: KekRecord = serde_json::from_value(serde_json::to_value(&body.scopes[0].keks[0]).unwrap()).unwrap();
    record.version = 2;
    record.commitment = hex(&keyring::commitment(&body.volume_id, 0, 2, &kek.key));
    let slot = &mut record.slots[0];
    (slot.identity, slot.wrapped, slot.canary) = (kek.identity, kek.wrapped, canary.wrapped);
    slot.canary_check = hex(&keyring::canary_check(&body.volume_id, 0, 2, &canary.key));
    body.scopes[0].current = 2;
    body.scopes[0].keks[0].state = meta::KeyState::Destroyed;
    body.scopes[0].keks.push(record);
    body.generation += 1;
    let root = Static::make(&keys.ring, body.root_id, ObjectType::Directory, 0).unwrap();
    let header = volume.backing().join(DIR_HEADER);
    fs::remove_file(&header).unwrap();
    symlink(format::b64(&root.bytes()), header).unwrap();
    VolumeFile::write(meta::open_backing(&volume.backing()).unwrap(), &body, &keys.ring).unwrap();
}

#[test]
fn headers_of_an_older_era_are_not_believed() {
    let volume = TestVolume::mounted(&[]);
    fs::create_dir(volume.at("dir")).unwrap();
    fs::write(volume.at("file"), content(5000, "old")).unwrap();
    symlink("old", volume.at("link")).unwrap();
    rustix::fs::mknodat(CWD, volume.at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    volume.umount();
    let keys = Keys::of(&volume);
    let old = ["dir", "file", "link", "fifo"].map(|name| keys.find(name));
    // Away, so that the new era has none of it.
    let kept = volume.path("state/old");
    fs::create_dir(&kept).unwrap();
    for (n, path) in old.iter().enumerate() {
        fs::rename(path, kept.join(n.to_string())).unwrap();
    }
    rotate(&volume);
    volume.cli(&["mount", "backing", "mnt"]).is(16).says("does not match this host's pin");
    // What the host learns of a rotation: today by hand.
    fs::remove_file(volume.path("trust").join(crate::store::body(&volume)["volume_id"].as_str().unwrap())).unwrap();
    volume.mount(&["--trust", "--kms", &volume.file_uri()]);
    fs::create_dir(volume.at("dir")).unwrap();
    for name in ["file", "static"] {
        fs::write(volume.at(name), content(5000, name)).unwrap();
    }
    symlink("new", volume.at("link")).unwrap();
    rustix::fs::mknodat(CWD, volume.at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    volume.umount();

    // The names of the new era have another key; they are known by their types.
    let entries: Vec<PathBuf> = fs::read_dir(volume.backing()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let of = |wanted: &dyn Fn(&fs::Metadata) -> bool| -> Vec<PathBuf> {
        let ours = |path: &&PathBuf| !path.file_name().unwrap().to_str().unwrap().starts_with("lethefs.");
        entries.iter().filter(ours).filter(|path| wanted(&fs::symlink_metadata(path).unwrap())).cloned().collect()
    };
    let files = of(&|meta| meta.is_file() && meta.len() > 128);
    let header = fs::read(kept.join("1")).unwrap();
    // The whole old file; and only the old static header in a new one.
    fs::copy(kept.join("1"), &files[0]).unwrap();
    let mut bytes = fs::read(&files[1]).unwrap();
    bytes[..256].copy_from_slice(&header[..256]);
    fs::write(&files[1], bytes).unwrap();
    let node = &of(&|meta| meta.is_file() && meta.len() == 128)[0];
    fs::copy(kept.join("3"), node).unwrap();
    let link = &of(&|meta| meta.is_symlink())[0];
    fs::remove_file(link).unwrap();
    symlink(fs::read_link(kept.join("2")).unwrap(), link).unwrap();
    let dir = &of(&|meta| meta.is_dir())[0];
    fs::remove_file(dir.join(DIR_HEADER)).unwrap();
    symlink(fs::read_link(kept.join("0").join(DIR_HEADER)).unwrap(), dir.join(DIR_HEADER)).unwrap();

    volume.mount(&[]);
    for name in ["file", "static", "fifo"] {
        assert_eq!(errno(fs::read(volume.at(name))), EIO, "{name}");
    }
    assert_eq!(errno(fs::read_link(volume.at("link"))), EIO);
    let read = fs::read_dir(volume.at("dir")).and_then(|mut entries| entries.next().transpose());
    assert_eq!(errno(read), EIO);
    volume.umount();
    // The root's own old header.
    let root = volume.backing().join(DIR_HEADER);
    fs::remove_file(&root).unwrap();
    symlink(fs::read_link(kept.join("0").join(DIR_HEADER)).unwrap(), &root).unwrap();
    refuses(&volume, &["mount", "backing", "mnt"], 10, "root directory's header");
}
