//! A volume for unit tests: a backing directory of its own, and a KEK that nobody keeps.

use std::path::Path;

use super::Volume;
use super::meta::{Body, Extra, KekRecord, KeyState, Scope};
use crate::crypto::{Key32, ObjectId, VolumeId};
use crate::keyring::Keyring;

/// A new volume in an empty directory.
pub(crate) fn volume(dir: &Path) -> Volume {
    let id = VolumeId([1; 16]);
    let keys = Keyring::new(id).unwrap();
    keys.admit(0, 1, &Key32::random().unwrap(), true).unwrap();
    let root = ObjectId([2; 16]);
    let fd = std::fs::File::open(dir).unwrap();
    Volume::create_root(&fd, &keys, root).unwrap();
    let kek = KekRecord {
        version: 1,
        state: KeyState::Active,
        created: String::new(),
        commitment: String::new(),
        slots: Vec::new(),
        extra: Extra::new(),
    };
    let body = Body {
        magic: "lethefs".into(),
        format: 1,
        volume_id: id,
        label: String::new(),
        created: String::new(),
        generation: 1,
        incompat: Vec::new(),
        compat: Vec::new(),
        root_id: root,
        scopes: vec![Scope { id: 0, current: 1, keks: vec![kek], extra: Extra::new() }],
        extra: Extra::new(),
    };
    Volume::open(fd.into(), Path::new("/"), &body, keys, false).unwrap()
}
