//! From a path to a KEK in hand and the right to change the volume file.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::audit::Sink;
use crate::crypto::Key32;
use crate::crypto::recovery::RecoveryKey;
use crate::keyring::Keyring;
use crate::kms::{Binding, KeyIdentity, KeyUri, Purpose};
use crate::service::mount::unlock::{self, Unlocked};
use crate::service::trust::{self, Pin};
use crate::service::{Error, audit, backing, journal, mountinfo, umount};
use crate::sys::process;
use crate::volume::meta::{Body, KekRecord, KeyState, MetaError, VolumeFile, WriteLock};

/// How long a change waits for another.
const PATIENCE: Duration = Duration::from_secs(10);

/// What opens the KEK.
pub struct With {
    /// Vouch for a volume that this host does not know.
    pub trust: bool,
    /// The key to ask, where it is not the pin's first.
    pub uri: Option<KeyUri>,
    /// Shares on paper instead.
    pub recovery: Option<RecoveryKey>,
}

/// A volume whose KEK is here. Nobody else changes the volume file meanwhile.
pub(super) struct Opened {
    pub(super) path: PathBuf,
    pub(super) dir: OwnedFd,
    pub(super) lock: WriteLock,
    pub(super) keys: Keyring,
    pub(super) kek: Key32,
    pub(super) body: Body,
    pub(super) pin: Pin,
    pub(super) audit: Arc<Sink>,
    repair: bool,
}

impl Opened {
    /// The record of the current KEK version, the only one there may be.
    pub(super) fn current<'a>(&self, body: &'a mut Body) -> Result<&'a mut KekRecord, Error> {
        let scope = body.scope_mut();
        let current = scope.current;
        let others = scope.keks.iter().filter(|kek| kek.version != current && kek.state != KeyState::Destroyed);
        if let Some(other) = others.map(|kek| kek.version).next() {
            return Err(Error::Usage(format!(
                "the volume also has KEK version {other}, for which this lethefs cannot change slots: use a newer one"
            )));
        }
        scope.keks.iter_mut().find(|kek| kek.version == current).ok_or(Error::Meta(MetaError::Unauthentic))
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let line = "one copy of the volume file was missing, damaged or older: both are written anew";
        self.repair.then(|| line.to_owned()).into_iter().collect()
    }
}

/// The backing directory of a path: itself, or that of the mount there.
pub(super) fn backing_of(path: &Path) -> Result<PathBuf, Error> {
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let Some(mount) = mountinfo::at(&mounts, &resolved).filter(|mount| mount.is_lethefs()) else {
        return backing::canonical(path, "backing directory");
    };
    match umount::find(&resolved, mount.user) {
        Some((record, _)) => Ok(record.backing),
        None => Err(Error::Mount(format!(
            "the daemon of the mount at {} cannot be reached from here: name the backing directory",
            resolved.display()
        ))),
    }
}

/// Opens a volume to change its slots. `without`: by another slot than this.
pub(super) fn open(path: &Path, with: &With, purpose: &'static str, without: Option<u32>) -> Result<Opened, Error> {
    process::harden();
    let path = backing_of(path)?;
    let dir = backing::open(&path)?;
    let Some(lock) = WriteLock::take(&dir, PATIENCE)? else {
        return Err(Error::InUse("another lethefs changes this volume's slots just now: wait for it".into()));
    };
    let copies = VolumeFile::read(&dir)?;
    let journal = journal::read_backing(&dir);
    let Some(recovery) = &with.recovery else {
        let grant = trust::grant(copies, with.trust, with.uri.as_ref())?;
        let (unlocked, kek) = unlock::unlock_keeping(&grant, journal.as_ref(), purpose, without)?;
        let Unlocked { keys, body, repair, audit, .. } = unlocked;
        return Ok(Opened { path, dir, lock, keys, kek, body, pin: grant.pin, audit, repair });
    };
    let grant = trust::grant_without_keys(copies, with.trust)?;
    let (scope, version, commitment, kek, slot) = by_shares(&grant, recovery, without)?;
    let unlock::Proved { keys, body, repair } = unlock::prove(&grant, scope, version, &commitment, &kek)?;
    let audit = audit::open(body.volume_id);
    let (slot, key) = (slot.id, audit::key(&slot.identity));
    let event = crate::audit::Event::Fetch { purpose, slot, uri: "recovery:".into(), key, request_id: None };
    let _ = audit.record(event);
    Ok(Opened { path, dir, lock, keys, kek, body, pin: grant.pin, audit, repair })
}

type ByShares = (u32, u32, [u8; 32], Key32, crate::volume::meta::Slot);

/// The KEK out of the slot that these shares are for.
fn by_shares(grant: &trust::Grant, recovery: &RecoveryKey, without: Option<u32>) -> Result<ByShares, Error> {
    let ours = |identity: &KeyIdentity| matches!(identity, KeyIdentity::Recovery { recovery_id, .. } if *recovery_id == recovery.id());
    let mut met = false;
    for (copy, _) in &grant.copies {
        let scope = copy.body().scope();
        let Some(record) = scope.keks.iter().find(|kek| kek.version == scope.current) else { continue };
        for slot in record.slots.iter().filter(|slot| Some(slot.id) != without && ours(&slot.identity)) {
            met = true;
            let (volume, version) = (grant.pin.volume_id, record.version);
            let binding = Binding { volume, scope: scope.id, version, purpose: Purpose::Kek };
            if let Some(kek) = recovery.unwrap(&binding.bytes(), &slot.wrapped.0) {
                return Ok((scope.id, version, record.commitment(), kek, slot.clone()));
            }
        }
    }
    Err(Error::Usage(if met {
        "these recovery shares do not open this volume: one of them is of another key, or the volume file is damaged or erased"
            .into()
    } else {
        format!("no (other) slot of this volume is for these recovery shares, which are of key {}", recovery.id())
    }))
}
