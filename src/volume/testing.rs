//! A volume for unit tests: a backing directory of its own, and a KEK that nobody keeps.

use std::cell::{Cell, RefCell};
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

/// Which KEK versions a ring has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    /// The first.
    Old,
    /// Both; the second wraps.
    Both,
    /// The second.
    New,
}

/// What opens a volume again.
pub(crate) struct Vault {
    keks: [Key32; 2],
    ring: Cell<Ring>,
    /// Rings that are not in use: key memory is dear to make.
    rings: RefCell<Vec<(Ring, Keyring)>>,
}

impl Vault {
    pub(crate) fn new() -> Self {
        let keks = [Key32::random().unwrap(), Key32::random().unwrap()];
        Self { keks, ring: Cell::new(Ring::Old), rings: RefCell::default() }
    }

    /// What volumes are opened with from now on.
    pub(crate) fn hold(&self, ring: Ring) {
        self.ring.set(ring);
    }

    /// What they are opened with.
    pub(crate) fn held(&self) -> Ring {
        self.ring.get()
    }

    fn keys(&self) -> Keyring {
        let wanted = self.ring.get();
        let mut rings = self.rings.borrow_mut();
        if let Some(at) = rings.iter().position(|(ring, _)| *ring == wanted) {
            return rings.swap_remove(at).1;
        }
        let keys = Keyring::new(VolumeId([1; 16])).unwrap();
        if wanted != Ring::New {
            keys.admit(0, 1, &self.keks[0], true).unwrap();
        }
        if wanted != Ring::Old {
            keys.admit(0, 2, &self.keks[1], true).unwrap();
        }
        keys
    }

    /// Takes the keys of a volume back that ended, however it did.
    pub(crate) fn close(&self, volume: Volume) {
        let keys = volume.into_keys_for_tests();
        let ring = match keys.held()[..] {
            [(0, 1)] => Ring::Old,
            [(0, 2)] => Ring::New,
            _ => Ring::Both,
        };
        self.rings.borrow_mut().push((ring, keys));
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
