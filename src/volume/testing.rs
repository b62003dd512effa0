//! A volume for unit tests: a backing directory of its own, and a KEK that nobody keeps.

use std::cell::RefCell;
use std::path::Path;

use super::meta::{Body, Extra, KekRecord, KeyState, Scope};
use super::{Volume, VolumeError};
use crate::crypto::{Key32, ObjectId, VolumeId};
use crate::keyring::Keyring;

/// A directory of its own; in memory, if there is such a filesystem: tests that flush it thousands of times must not wait
/// for other people's data.
pub(crate) fn directory() -> tempfile::TempDir {
    // scripts/test knows by the name what a test that it ended has left.
    let run = std::env::var("LETHEFS_TEST_RUN").unwrap_or_default();
    let run = Path::new(&run).file_name().unwrap_or("lethefs-test".as_ref());
    let mut prefix = run.to_owned();
    prefix.push(".");
    let made = tempfile::Builder::new().prefix(&prefix).tempdir_in("/dev/shm");
    made.or_else(|_| tempfile::tempdir()).unwrap()
}

/// What opens a volume again.
pub(crate) struct Vault {
    kek: Key32,
    /// Rings that are not in use: key memory is dear to make.
    rings: RefCell<Vec<Keyring>>,
}

impl Vault {
    pub(crate) fn new() -> Self {
        Self { kek: Key32::random().unwrap(), rings: RefCell::default() }
    }

    fn keys(&self) -> Keyring {
        self.rings.borrow_mut().pop().unwrap_or_else(|| {
            let keys = Keyring::new(VolumeId([1; 16])).unwrap();
            keys.admit(0, 1, &self.kek, true).unwrap();
            keys
        })
    }

    /// Takes the keys of a volume back that ended, however it did.
    pub(crate) fn close(&self, volume: Volume) {
        self.rings.borrow_mut().push(volume.into_keys_for_tests());
    }

    /// Makes an empty directory a volume.
    pub(crate) fn create(&self, dir: &Path) {
        let fd = std::fs::File::open(dir).unwrap();
        Volume::create_root(&fd, &self.keys(), ObjectId([2; 16])).unwrap();
    }

    /// Opens the volume that is there.
    pub(crate) fn open(&self, dir: &Path) -> Result<Volume, VolumeError> {
        let fd = std::fs::File::open(dir).unwrap();
        Volume::open(fd.into(), Path::new("/"), &body(), self.keys(), false)
    }

    /// The same, whatever its root's header is like.
    pub(crate) fn open_to_check(&self, dir: &Path) -> Result<Volume, VolumeError> {
        let fd = std::fs::File::open(dir).unwrap();
        Volume::open_to_check(fd.into(), Path::new("/"), &body(), self.keys())
    }
}

fn body() -> Body {
    let kek = KekRecord {
        version: 1,
        state: KeyState::Active,
        created: String::new(),
        commitment: String::new(),
        slots: Vec::new(),
        extra: Extra::new(),
    };
    Body {
        magic: "lethefs".into(),
        format: 1,
        volume_id: VolumeId([1; 16]),
        label: String::new(),
        created: String::new(),
        generation: 1,
        incompat: Vec::new(),
        compat: Vec::new(),
        root_id: ObjectId([2; 16]),
        scopes: vec![Scope { id: 0, current: 1, keks: vec![kek], extra: Extra::new() }],
        extra: Extra::new(),
    }
}

/// A new volume in an empty directory.
pub(crate) fn volume(dir: &Path) -> Volume {
    let vault = Vault::new();
    vault.create(dir);
    vault.open(dir).unwrap()
}
