//! What a replay must not do with records that are authentic: put into a file what is not that file's.

use std::os::fd::OwnedFd;

use super::*;
use crate::volume::file::FileState;
use crate::volume::testing::{Vault, directory};

struct Fixture {
    vault: Vault,
    volume: Volume,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let (vault, dir) = (Vault::new(), directory());
        vault.create(dir.path());
        let mut volume = vault.open(dir.path()).unwrap();
        volume.begin_log().unwrap();
        Self { vault, volume, _dir: dir }
    }

    /// A sealed file of so many bytes, and what a record would say of it that changes it next.
    fn file(&self, name: &[u8], data: &[u8]) -> (OwnedFd, Subject) {
        let name = self.volume.root_dir().name(self.volume.keys(), name).unwrap();
        let fd = storage::create_file(self.volume.root().as_fd(), name.as_str(), 0o600).unwrap();
        let mut state = FileState::create(&self.volume, fd.as_fd()).unwrap();
        state.write(&self.volume, fd.as_fd(), 0, data).unwrap();
        state.seal(&self.volume, fd.as_fd()).unwrap();
        let counter = read_header(&self.volume, fd.as_fd()).unwrap().mutable.counter;
        let subject = Subject {
            object: state.dek().object(),
            ino: storage::stat_fd(fd.as_fd()).unwrap().st_ino,
            born: storage::born(fd.as_fd()).unwrap(),
            root: self.volume.log().unwrap().root(),
            low: 0,
            opened: counter,
        };
        (fd, subject)
    }

    fn log(&self, subject: &Subject, change: &Change) {
        let log = self.volume.log().unwrap();
        let (sequence, _) = log.append(self.volume.keys(), subject, change).unwrap();
        log.flush(sequence).unwrap();
    }

    fn replay(&mut self) -> Replayed {
        self.volume.end_of_log_for_tests();
        let done = replay(&self.volume).unwrap();
        self.volume.begin_log().unwrap();
        done
    }

    fn read(&self, fd: &OwnedFd) -> Result<Vec<u8>, VolumeError> {
        let state = FileState::load(&self.volume, fd.as_fd())?;
        let mut data = vec![0; state.size() as usize];
        state.read(&self.volume, fd.as_fd(), 0, &mut data).map_err(|error| error.error)?;
        Ok(data)
    }
}

/// The sealed bytes of a block.
fn block(fd: &OwnedFd, index: u64) -> Vec<u8> {
    let mut sealed = vec![0; SEALED_BLOCK as usize];
    storage::read_at(fd.as_fd(), &mut sealed, format::block_offset(index)).unwrap();
    sealed
}

#[test]
fn logged_blocks_that_do_not_authenticate_do_not_go_in_place() {
    let mut fixture = Fixture::new();
    let data: Vec<u8> = (0..3 * BLOCK).map(|n| (n / 100) as u8).collect();
    let (other, _) = fixture.file(b"other", &data);
    let mut flipped = Vec::new();
    for what in 0..4 {
        let (fd, subject) = fixture.file(&[b'f', b'0' + what], &data);
        let mut sealed = match what {
            0 => vec![7; SEALED_BLOCK as usize],
            1 => block(&other, 1),
            2 => block(&fd, 2),
            _ => block(&fd, 1),
        };
        if what == 3 {
            sealed[100] ^= 1;
        }
        flipped.push((fd, subject, sealed));
    }
    for (fd, subject, sealed) in &flipped {
        // As a block alone, and as the last one of a cut.
        fixture.log(subject, &Change::Blocks { first: 1, sealed: sealed.clone() });
        let before = block(fd, 1);
        let done = fixture.replay();
        assert_eq!((done.files, done.passed_over, done.lost), (0, 1, 0));
        assert!(block(fd, 1) == before);
        assert_eq!(fixture.read(fd).unwrap(), data);
    }
    assert_eq!(fixture.volume.integrity_failures(), 4);
    // And one that does authenticate goes there: the records are about these files.
    let (fd, subject) = fixture.file(b"right", &data);
    let right = block(&fd, 1);
    fixture.log(&subject, &Change::Blocks { first: 1, sealed: right.clone() });
    storage::write_at(fd.as_fd(), &[1; 50], format::block_offset(1)).unwrap();
    assert_eq!(fixture.replay().files, 1);
    assert!(block(&fd, 1) == right);
    let Fixture { vault, volume, .. } = fixture;
    vault.close(volume);
}

/// A file that merely claims to be another object, in the copy of its header that does not count: in a volume that was moved
/// there is no number to tell it by.
#[test]
fn records_of_one_object_do_not_cut_another() {
    let mut fixture = Fixture::new();
    let data = vec![5; 3 * BLOCK as usize];
    let (victim, _) = fixture.file(b"victim", &data);
    let (gone, subject) = fixture.file(b"gone", &data);
    let mut claim = [0; STATIC_LEN];
    storage::read_at(gone.as_fd(), &mut claim, 0).unwrap();
    storage::write_at(victim.as_fd(), &claim, STATIC_LEN as u64).unwrap();
    let name = fixture.volume.root_dir().name(fixture.volume.keys(), b"gone").unwrap();
    storage::unlink(fixture.volume.root().as_fd(), name.as_str()).unwrap();
    let moved = Subject { root: subject.root + 1, ..subject };
    fixture.log(&moved, &Change::Cut { size: BLOCK, tail: Vec::new() });
    let done = fixture.replay();
    assert_eq!((done.files, done.passed_over), (0, 1));
    assert_eq!(fixture.read(&victim).unwrap(), data);
    // The same record does cut the file that it is about.
    let (own, subject) = fixture.file(b"own", &data);
    let moved = Subject { root: subject.root + 1, ..subject };
    fixture.log(&moved, &Change::Cut { size: BLOCK, tail: Vec::new() });
    assert_eq!(fixture.replay().files, 1);
    assert_eq!(fixture.read(&own).unwrap(), data[..BLOCK as usize]);
    let Fixture { vault, volume, .. } = fixture;
    vault.close(volume);
}

#[test]
fn without_keys_nothing_is_lost() {
    let mut fixture = Fixture::new();
    let (_fd, subject) = fixture.file(b"file", &[1; 4096]);
    fixture.log(&subject, &Change::Grow { size: 8192 });
    fixture.volume.end_of_log_for_tests();
    fixture.volume.keys().wipe(crate::keyring::SealReason::Revoked);
    assert!(matches!(replay(&fixture.volume), Err(VolumeError::Keyring(KeyringError::Sealed(_)))));
    let names = log::NAMES.iter().filter(|name| storage::stat(fixture.volume.root().as_fd(), **name).is_ok());
    assert!(names.count() > 0, "the log is still there");
}
