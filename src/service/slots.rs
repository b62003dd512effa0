//! `keys add-slot`, `keys remove-slot`, `keys list`: the KMS keys that each open a volume's KEK.
//!
//! Every change is one: read both copies under the [`WriteLock`], open the KEK, think, record, write both copies, raise the pin. It works
//! beside a mount, whose daemon does not write the volume file. It can be cut off anywhere and run again.
//!
//! - [`header`]: saving and putting back what a volume needs besides its files; [`opening`]: from a path to a KEK in hand.

pub mod header;
mod opening;

use std::path::{Path, PathBuf};

use serde::Serialize;
use zeroize::Zeroizing;

use self::opening::Opened;
pub use self::opening::With;
use super::record::path_text;
use super::{Error, SCHEMA, audit, backing, checkpoint, init, journal, now, trust};
use crate::audit::Event;
use crate::crypto::ids::hex;
use crate::crypto::recovery::RecoveryKey;
use crate::crypto::{Key32, VolumeId};
use crate::keyring::{self, KeyringError, SealReason};
use crate::kms::{self, Binding, Failure, KeyIdentity, KeyUri, KmsError, Purpose, Wrapped, WrappedKey};
use crate::volume::meta::{Extra, Slot, VolumeFile};

/// What is to open the volume, too.
pub enum New {
    /// A KMS key.
    Key(KeyUri),
    /// Shares on paper: so many, of which so many are needed.
    Recovery {
        /// Needed.
        threshold: u8,
        /// Made.
        shares: u8,
    },
}

/// What changed.
#[derive(Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// The slot.
    pub slot: u32,
    /// Its key.
    pub key: KeyIdentity,
    /// How this host reaches it.
    pub uri: Option<KeyUri>,
    /// The volume file's, from now on.
    pub generation: u64,
    /// `added`, `there-already`, `removed`.
    pub done: &'static str,
    /// The shares, for whoever asked and nobody else: they are stored nowhere.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "shown")]
    pub recovery_shares: Vec<Zeroizing<String>>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

fn shown<S: serde::Serializer>(shares: &[Zeroizing<String>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(shares.iter().map(|share| share.as_str()))
}

/// Adds a slot.
///
/// # Errors
/// What kept it from opening the KEK, or the new key from wrapping it. Until the report, the volume is as before or has the whole slot.
pub fn add(path: &Path, new: &New, with: &With) -> Result<Report, Error> {
    let opened = opening::open(path, with, "add-slot", None)?;
    let mut warnings = opened.warnings();
    let begun = journal::read_backing(&opened.dir).map(|journal| journal.begun_at);
    let mut body = opened.body.clone();
    let scope = body.scope().id;
    let record = opened.current(&mut body)?;
    let version = record.version;
    let binding = |purpose| Binding { volume: opened.pin.volume_id, scope, version, purpose };
    let canary = Key32::random().map_err(KeyringError::from)?;
    let (mut shares, mut request_id) = (Vec::new(), None);
    let (kek, canary_wrapped, uri) = match new {
        New::Key(uri) => {
            init::check_key_place(uri, &opened.path)?;
            let source = kms::source(uri)?;
            // Made by an earlier run that was cut off, or by somebody else: this host only has to know.
            if let Ok(described) = source.describe()
                && let Some(there) = record.slots.iter().find(|slot| slot.identity.same_key(&described.identity))
                && !there.wrapped.0.is_empty()
            {
                let there = there.clone();
                return finish(&opened, &opened.body, &there, Some(uri), "there-already", shares, warnings);
            }
            let kek = source.wrap(&binding(Purpose::Kek), &opened.kek)?;
            request_id = source.last_request_id();
            let wrapped = source.wrap(&binding(Purpose::Canary), &canary)?;
            if !kek.identity.same_key(&wrapped.identity) {
                return Err(Error::Usage("the key service answered with two different keys: check its address".into()));
            }
            try_out(&*source, &binding(Purpose::Kek), &kek, &opened.kek, &mut warnings)?;
            match source.describe() {
                Ok(described) => warnings.extend(described.warnings),
                Err(error) => warnings.push(format!("the key could not be described: {error}")),
            }
            (kek, wrapped.wrapped, Some(uri))
        }
        New::Recovery { threshold, shares: count } => {
            let key = RecoveryKey::random().map_err(of_shares)?;
            shares = key.split(*threshold, *count).map_err(of_shares)?;
            // What is about to be printed must open what is about to be written.
            let again = RecoveryKey::combine(&shares[..usize::from(*threshold)]).map_err(of_shares)?;
            let bytes = binding(Purpose::Kek).bytes();
            let wrapped = key.wrap(&bytes, &opened.kek).map_err(KeyringError::from)?;
            if !again.unwrap(&bytes, &wrapped).is_some_and(|kek| kek.same_as(&opened.kek)) {
                return Err(Error::Io {
                    what: "the shares that were made do not open what they should".into(),
                    source: std::io::Error::other("nothing was changed"),
                });
            }
            let identity =
                KeyIdentity::Recovery { recovery_id: key.id(), created: now(), threshold: *threshold, shares: *count };
            let canary = key.wrap(&binding(Purpose::Canary).bytes(), &canary).map_err(KeyringError::from)?;
            (WrappedKey { wrapped: Wrapped(wrapped), identity }, Wrapped(canary), None)
        }
    };
    let slot = Slot {
        id: record.next_slot(),
        created: now(),
        identity: kek.identity,
        wrapped: kek.wrapped,
        canary: canary_wrapped,
        canary_check: hex(&keyring::canary_check(&opened.pin.volume_id, scope, version, &canary)),
        extra: Extra::new(),
    };
    record.slots.push(slot.clone());
    body.generation += 1;
    // An erase that began meanwhile must not be followed by a key that it does not know.
    if journal::read_backing(&opened.dir).map(|journal| journal.begun_at) != begun {
        return Err(Error::InUse("an erase of this volume has begun: nothing was changed".into()));
    }
    let event = Event::SlotAdded {
        slot: slot.id,
        uri: uri.map(ToString::to_string),
        key: audit::key(&slot.identity),
        generation: body.generation,
        request_id,
    };
    audit::warn(&opened.audit, event, &mut warnings);
    checkpoint("slot-recorded");
    opened.lock.write(&body, &opened.keys)?;
    checkpoint("slot-written");
    finish(&opened, &body, &slot, uri, "added", shares, warnings)
}

/// Takes a slot out. Another one must open the volume, here and now.
///
/// # Errors
/// There is no such slot; no other opens; what kept it from writing.
pub fn remove(path: &Path, id: u32, with: &With) -> Result<Report, Error> {
    let opened = opening::open(path, with, "remove-slot", Some(id))?;
    let mut warnings = opened.warnings();
    let mut body = opened.body.clone();
    let record = opened.current(&mut body)?;
    let Some(slot) = record.remove(id) else {
        return Err(Error::Usage(format!("there is no slot {id}: see `lethefs keys list`")));
    };
    body.generation += 1;
    warnings.push(format!(
        "copies of the volume file from before (backups, snapshots, saved headers) still open with {}: destroy that key as well if \
         that matters; an erase will name it",
        slot.identity
    ));
    let event = Event::SlotRemoved { slot: id, key: audit::key(&slot.identity), generation: body.generation };
    audit::warn(&opened.audit, event, &mut warnings);
    checkpoint("slot-recorded");
    opened.lock.write(&body, &opened.keys)?;
    checkpoint("slot-written");
    finish(&opened, &body, &slot, None, "removed", Vec::new(), warnings)
}

/// Raises the pin, and reports.
fn finish(
    opened: &Opened,
    body: &crate::volume::meta::Body,
    slot: &Slot,
    uri: Option<&KeyUri>,
    done: &'static str,
    recovery_shares: Vec<Zeroizing<String>>,
    mut warnings: Vec<String>,
) -> Result<Report, Error> {
    let mut pin = opened.pin.clone();
    pin.refresh(body);
    if let Some(uri) = uri {
        pin.set_uri(body.scope().id, body.scope().current, slot, uri);
    }
    // The slot is there; that this host does not know it yet is no failure of the volume's.
    if let Err(error) = pin.save() {
        warnings.push(format!("{error}; this host does not know the change: run it again when it can"));
    }
    checkpoint("slot-pinned");
    opened.keys.wipe(SealReason::Unmounted);
    Ok(Report {
        schema: SCHEMA,
        volume_id: body.volume_id,
        slot: slot.id,
        key: slot.identity.clone(),
        uri: uri.cloned(),
        generation: body.generation,
        done,
        recovery_shares,
        warnings,
    })
}

/// Opens what was just wrapped, if these credentials may.
fn try_out(
    source: &dyn kms::KeySource,
    binding: &Binding,
    wrapped: &WrappedKey,
    kek: &Key32,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    match source.unwrap(binding, &wrapped.wrapped, &wrapped.identity) {
        Ok(opened) if opened.same_as(kek) => Ok(()),
        Ok(_) => {
            let line = "the new key unwrapped to something else than what it had wrapped: nothing was changed";
            Err(KmsError::new(Failure::Protocol, line).into())
        }
        Err(error) if error.failure == Failure::Denied => {
            warnings.push("these credentials may wrap but not unwrap: that the slot opens was not tried".into());
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn of_shares(error: crate::crypto::recovery::ShareError) -> Error {
    match error {
        crate::crypto::recovery::ShareError::Random(error) => KeyringError::from(error).into(),
        error => Error::Usage(error.to_string()),
    }
}

/// The slots of a volume.
#[derive(Debug, Serialize)]
pub struct List {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Backing directory.
    #[serde(with = "path_text")]
    pub backing: PathBuf,
    /// Generation of the volume file.
    pub generation: u64,
    /// This host's pin agrees. If not, all is only what the volume file says.
    pub pinned: bool,
    /// The slots of the current KEK version.
    pub slots: Vec<Listed>,
    /// Slots that were taken out.
    pub removed: Vec<Listed>,
}

/// A slot in a [`List`].
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its number.
    pub id: u32,
    /// When it was made.
    pub created: String,
    /// Its key.
    pub key: KeyIdentity,
    /// How this host reaches it; null if it does not.
    pub uri: Option<KeyUri>,
    /// It holds no wrapped key any more.
    pub empty: bool,
}

/// Lists the slots. Contacts no key service.
///
/// # Errors
/// Not a volume.
pub fn list(path: &Path) -> Result<List, Error> {
    let path = opening::backing_of(path)?;
    let copies = VolumeFile::read(backing::open(&path)?)?;
    let Some(first) = copies.first() else { return Err(crate::volume::meta::MetaError::NotAVolume.into()) };
    let body = first.body();
    let found = trust::find(body.volume_id).ok().flatten();
    let pinned = found.as_ref().is_some_and(|found| trust::verify(found, body).is_ok());
    let scope = body.scope();
    let record = scope.keks.iter().find(|kek| kek.version == scope.current);
    let listed = |slot: &Slot| Listed {
        id: slot.id,
        created: slot.created.clone(),
        key: slot.identity.clone(),
        uri: found.as_ref().and_then(|found| {
            found
                .pin
                .slots()
                .find(|(_, _, known)| known.identity == slot.identity)
                .map(|(_, _, known)| known.uri.clone())
        }),
        empty: slot.wrapped.0.is_empty(),
    };
    Ok(List {
        schema: SCHEMA,
        volume_id: body.volume_id,
        generation: body.generation,
        pinned,
        slots: record.iter().flat_map(|record| &record.slots).map(listed).collect(),
        removed: record.map(|record| record.removed()).unwrap_or_default().iter().map(listed).collect(),
        backing: path,
    })
}
