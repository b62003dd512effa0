//! The pin (docs/FORMAT.md section 4): what this host knows of a volume by itself, kept where whoever can write the backing
//! directory cannot. Until a volume file agrees with it, no key service is asked, no path opened, no address used.
//!
//! Here: finding, checking, making and renewing pins. Called by every verb that reads a volume file. Contacts nobody.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{SCHEMA, places};
use crate::crypto::VolumeId;
use crate::crypto::ids::{hex, unhex};
use crate::keyring;
use crate::kms::{KeyIdentity, KeyUri};
use crate::volume::meta::{Body, KekRecord, KeyState, Slot, VolumeFile};

/// How long a pin waits for another process to have written its own.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

/// Longest pin read, in bytes.
const MAX_PIN: u64 = 1 << 20;

/// What this host knows of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Its label when the pin was written.
    pub label: String,
    /// The highest generation of the volume file seen.
    pub generation: u64,
    /// Objects wrapped under lower KEK versions are refused.
    pub lowest_version: u32,
    /// KEK versions known.
    pub keks: Vec<PinnedKek>,
}

/// A KEK version of a pin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedKek {
    /// Scope.
    pub scope: u32,
    /// Version.
    pub version: u32,
    /// Commitment, hex.
    pub commitment: String,
    /// The KMS keys that wrap it.
    pub slots: Vec<PinnedSlot>,
}

/// A KMS key of a pin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedSlot {
    /// The slot's number.
    pub id: u32,
    /// How this host reaches the key.
    pub uri: KeyUri,
    /// Which key it is.
    pub identity: KeyIdentity,
}

/// A pin and its file.
#[derive(Clone, Debug)]
pub struct Found {
    /// The pin.
    pub pin: Pin,
    /// The file.
    pub path: PathBuf,
}

/// A wrapped KEK that the pin vouches for.
#[derive(Clone, Debug)]
pub struct Usable {
    /// Scope of the KEK.
    pub scope: u32,
    /// Version of the KEK.
    pub version: u32,
    /// What the KEK must commit to.
    pub commitment: [u8; 32],
    /// Its slot in the volume file.
    pub slot: Slot,
    /// The pin's URI.
    pub uri: KeyUri,
}

/// Why a volume file is not believed.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// This host does not know the volume.
    #[error(
        "this host has no pin for volume {volume}, so no key service was asked: its volume file claims, unverified, {claims}; if that is your volume and your key, mount it once with {how}"
    )]
    NoPin {
        /// The id the file claims.
        volume: VolumeId,
        /// What else it claims, made safe to print.
        claims: String,
        /// What to add to the command.
        how: &'static str,
    },
    /// The file says something else than the pin.
    #[error(
        "the volume file does not match this host's pin {}, so no key service was asked: {what}; if this is right, remove that file and mount with --trust", path.display()
    )]
    Differs {
        /// The pin's file.
        path: PathBuf,
        /// The difference.
        what: String,
    },
    /// A volume file from before.
    #[error(
        "the volume file is older (generation {found}) than this host has seen ({pinned}): somebody put back an old copy; if that was you, remove {} and mount with --trust", path.display()
    )]
    Older {
        /// The pin's file.
        path: PathBuf,
        /// What the file has.
        found: u64,
        /// What the pin has.
        pinned: u64,
    },
    /// A saved header of a generation lower than the pin's.
    #[error(
        "the saved header {} is older (generation {found}) than this host has seen ({pinned}), and was not put back: use a newer one; if there is none, remove {} and put it back with --trust", header.display(), pin.display()
    )]
    OlderHeader {
        /// The saved header.
        header: PathBuf,
        /// The pin's file.
        pin: PathBuf,
        /// What the header has.
        found: u64,
        /// What the pin has.
        pinned: u64,
    },
    /// The key URI given with the command is not the pin's.
    #[error("{given} is not the key of this volume: {why}")]
    OtherKey {
        /// The URI.
        given: KeyUri,
        /// What to do.
        why: String,
    },
    /// A pin that cannot be read or must not be believed.
    #[error("cannot use the pin {}: {source}", path.display())]
    Unusable {
        /// The pin's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No place for pins.
    #[error("cannot keep a pin: {0}")]
    NoPlace(io::Error),
}

impl Pin {
    /// A pin of everything in `body`, with the URIs that `uri_of` knows.
    fn of(body: &Body, uri_of: impl Fn(&Slot) -> Option<KeyUri>) -> Self {
        let mut pin = Self {
            schema: SCHEMA,
            volume_id: body.volume_id,
            label: body.label.clone(),
            generation: body.generation,
            lowest_version: 1,
            keks: Vec::new(),
        };
        pin.learn(body, uri_of);
        pin
    }

    /// The pin of a volume that was just made under `uri`.
    pub fn of_new_volume(body: &Body, uri: &KeyUri) -> Self {
        Self::of(body, |_| Some(uri.clone()))
    }

    /// Takes in what an authenticated body says: generation, label, KEK versions and slots not yet known. Slots that it does not have
    /// any more go; what else is known stays.
    pub fn refresh(&mut self, body: &Body) {
        self.generation = self.generation.max(body.generation);
        self.label.clone_from(&body.label);
        let usable = body.scope().keks.iter().filter(|kek| kek.state != KeyState::Destroyed);
        self.lowest_version = self.lowest_version.max(usable.map(|kek| kek.version).min().unwrap_or(1));
        self.learn(body, |slot| slot.identity.uri());
        for known in &mut self.keks {
            let records = body.scopes.iter().filter(|scope| scope.id == known.scope).flat_map(|scope| &scope.keks);
            for record in records.filter(|record| record.version == known.version) {
                known.slots.retain(|slot| record.slots.iter().any(|other| other.identity == slot.identity));
            }
        }
    }

    /// Says how this host reaches the key of a slot.
    pub fn set_uri(&mut self, scope: u32, version: u32, slot: &Slot, uri: &KeyUri) {
        let Some(kek) = self.keks.iter_mut().find(|kek| (kek.scope, kek.version) == (scope, version)) else { return };
        kek.slots.retain(|known| known.identity != slot.identity);
        kek.slots.push(PinnedSlot { id: slot.id, uri: uri.clone(), identity: slot.identity.clone() });
        kek.slots.sort_by_key(|known| known.id);
    }

    fn learn(&mut self, body: &Body, uri_of: impl Fn(&Slot) -> Option<KeyUri>) {
        for scope in &body.scopes {
            for kek in &scope.keks {
                let at = self.keks.iter().position(|known| (known.scope, known.version) == (scope.id, kek.version));
                let at = at.unwrap_or_else(|| {
                    self.keks.push(PinnedKek {
                        scope: scope.id,
                        version: kek.version,
                        commitment: kek.commitment.clone(),
                        slots: Vec::new(),
                    });
                    self.keks.len() - 1
                });
                let known = &mut self.keks[at];
                for slot in &kek.slots {
                    if known.slots.iter().any(|old| old.identity == slot.identity) {
                        continue;
                    }
                    if let Some(uri) = uri_of(slot) {
                        known.slots.push(PinnedSlot { id: slot.id, uri, identity: slot.identity.clone() });
                    }
                }
            }
        }
    }

    /// Takes in slots of a pin of the same generation.
    fn join(&mut self, other: &Self) {
        for kek in &mut self.keks {
            let same = |one: &&PinnedKek| {
                (one.scope, one.version, &one.commitment) == (kek.scope, kek.version, &kek.commitment)
            };
            for slot in other.keks.iter().filter(same).flat_map(|kek| &kek.slots).collect::<Vec<_>>() {
                if kek.slots.iter().all(|known| known.identity != slot.identity) {
                    kek.slots.push(slot.clone());
                }
            }
            kek.slots.sort_by_key(|slot| slot.id);
        }
    }

    /// Every slot, with its KEK's scope and version.
    pub fn slots(&self) -> impl Iterator<Item = (u32, u32, &PinnedSlot)> {
        self.keks.iter().flat_map(|kek| kek.slots.iter().map(|slot| (kek.scope, kek.version, slot)))
    }

    /// Writes the pin durably, into the directory of this user. Never over one that has seen a newer volume file, and with what one
    /// that has seen the same knows besides: a mount that begins and a change of slots both end with this.
    ///
    /// # Errors
    /// [`TrustError::NoPlace`].
    pub fn save(&self) -> Result<PathBuf, TrustError> {
        let save = || {
            let dir = places::trust_dir()?;
            places::make_dir(&dir)?;
            let path = dir.join(self.volume_id.to_string());
            let _lock = lock(&dir)?;
            let mut pin = self.clone();
            match load(&dir, &path) {
                Ok(there) if there.volume_id == pin.volume_id && there.generation > pin.generation => return Ok(path),
                Ok(there) if there.volume_id == pin.volume_id && there.generation == pin.generation => pin.join(&there),
                _ => {}
            }
            let mut text = serde_json::to_vec_pretty(&pin)?;
            text.push(b'\n');
            places::write_own(&path, &text, 0o644)?;
            Ok(path)
        };
        save().map_err(TrustError::NoPlace)
    }
}

/// Keeps two processes of this user from changing pins at once. A file of its own, which nobody else can open and so keep; and if
/// somebody hangs with it, it is gone on without.
fn lock(dir: &Path) -> io::Result<std::fs::File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::open(dir.join(".lock"), flags, Mode::RUSR | Mode::WUSR)?);
    let until = Instant::now() + LOCK_PATIENCE;
    while let Err(Errno::WOULDBLOCK) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        if Instant::now() >= until {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(file)
}

/// This host's pin of a volume.
///
/// # Errors
/// [`TrustError::Unusable`]: there is one, but it must not be believed.
pub fn find(volume: VolumeId) -> Result<Option<Found>, TrustError> {
    for dir in places::trust_dirs() {
        let path = dir.join(volume.to_string());
        match load(&dir, &path) {
            Ok(pin) if pin.volume_id == volume => return Ok(Some(Found { pin, path })),
            Ok(_) => {
                return Err(TrustError::Unusable { path, source: io::Error::other("it is the pin of another volume") });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(TrustError::Unusable { path, source }),
        }
    }
    Ok(None)
}

/// Every pin that this user can read and believe.
pub fn all() -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    for dir in places::trust_dirs() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let is_pin = entry.file_name().to_str().is_some_and(|name| unhex::<16>(name).is_some());
            if !is_pin {
                continue;
            }
            match load(&dir, &entry.path()) {
                Ok(pin) if found.iter().all(|other| other.pin.volume_id != pin.volume_id) => {
                    found.push(Found { pin, path: entry.path() });
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(pin = %entry.path().display(), %error, "a pin was left out"),
            }
        }
    }
    found
}

fn load(dir: &Path, path: &Path) -> io::Result<Pin> {
    let bytes = places::read_own(path, MAX_PIN)?;
    places::check_dir(dir)?;
    let pin: Pin = serde_json::from_slice(&bytes)?;
    if pin.schema != SCHEMA {
        return Err(io::Error::other(format!("it has schema {}: use a newer lethefs", pin.schema)));
    }
    Ok(pin)
}

/// What in `body` this pin vouches for: the wrapped KEKs of the current version.
///
/// # Errors
/// [`TrustError::Differs`] or [`TrustError::Older`].
pub fn verify(found: &Found, body: &Body) -> Result<Vec<Usable>, TrustError> {
    let (record, known, commitment) = verify_kek(found, body)?;
    let mut usable = Vec::new();
    // One slot for each pinned key: the file is not authentic yet, and each slot of it costs a request.
    for known in &known.slots {
        if let Some(slot) = record.slots.iter().find(|slot| slot.identity == known.identity) {
            usable.push(Usable {
                scope: body.scope().id,
                version: record.version,
                commitment,
                slot: slot.clone(),
                uri: known.uri.clone(),
            });
        }
    }
    if usable.is_empty() {
        let what = format!("it names another key, unverified: {}", keys_of(body));
        return Err(TrustError::Differs { path: found.path.clone(), what });
    }
    not_older(found, body)?;
    Ok(usable)
}

/// Refuses a generation lower than the pin's.
fn not_older(Found { pin, path }: &Found, body: &Body) -> Result<(), TrustError> {
    if body.generation < pin.generation {
        return Err(TrustError::Older { path: path.clone(), found: body.generation, pinned: pin.generation });
    }
    Ok(())
}

/// What of the current KEK version in `body` the pin vouches for, whatever its slots.
fn verify_kek<'a>(found: &'a Found, body: &'a Body) -> Result<(&'a KekRecord, &'a PinnedKek, [u8; 32]), TrustError> {
    let Found { pin, path } = found;
    let differs = |what: String| Err(TrustError::Differs { path: path.clone(), what });
    if pin.volume_id != body.volume_id {
        return differs(format!("it is of volume {}, the pin of {}", body.volume_id, pin.volume_id));
    }
    let scope = body.scope();
    if scope.current < pin.lowest_version {
        return differs(format!(
            "its current KEK version is {}, the lowest that this host still accepts is {}",
            scope.current, pin.lowest_version
        ));
    }
    let Some(record) = scope.keks.iter().find(|kek| kek.version == scope.current) else {
        return differs("its current KEK version is not listed".into());
    };
    let known = pin.keks.iter().find(|kek| (kek.scope, kek.version) == (scope.id, scope.current));
    let Some(known) = known else {
        return differs(format!("its current KEK version is {}, which the pin does not know", scope.current));
    };
    let commitment = record.commitment();
    let same = unhex(&known.commitment).is_some_and(|pinned| keyring::same(&commitment, &pinned));
    if !same {
        return differs(format!("the commitment of KEK version {} is another one", scope.current));
    }
    Ok((record, known, commitment))
}

/// A volume file that this host has a reason to ask a key service about.
pub struct Grant {
    /// The pin, or what will be the pin once the volume proved authentic.
    pub pin: Pin,
    /// Copies that agree with it, in the order they were read, each with what may be unwrapped.
    pub copies: Vec<(VolumeFile, Vec<Usable>)>,
}

/// Decides whether a key service may be asked about these copies of a volume file.
///
/// # Errors
/// Any [`TrustError`]; nothing was contacted then.
pub fn grant(copies: Vec<VolumeFile>, trust: bool, uri: Option<&KeyUri>) -> Result<Grant, TrustError> {
    let mut first_error = None;
    for candidate in &copies {
        let body = candidate.body();
        let attempt = find(body.volume_id).and_then(|found| match found {
            Some(found) => with_uri(found, trust, uri),
            None if trust => first_sight(body, uri),
            None => Err(no_pin(body)),
        });
        let granted = attempt.and_then(|found| verify(&found, body).map(|_| found));
        match granted {
            Ok(found) => {
                let copies = copies.into_iter().filter_map(|copy| {
                    let mut usable = verify(&found, copy.body()).ok()?;
                    // A key that was named is the one that is asked, not another slot's before it.
                    if let Some(uri) = uri.filter(|uri| usable.iter().any(|one| one.uri == **uri)) {
                        usable.retain(|one| one.uri == *uri);
                    }
                    Some((copy, usable))
                });
                return Ok(Grant { copies: copies.collect(), pin: found.pin });
            }
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    Err(first_error.unwrap_or_else(|| TrustError::NoPlace(io::Error::other("no copy of the volume file"))))
}

/// Which copies of a volume file may be opened with recovery shares: no key service is asked then, so the pin need not know one, but
/// the KEK's commitment and the generation must agree.
///
/// # Errors
/// Any [`TrustError`].
pub fn grant_without_keys(copies: Vec<VolumeFile>, trust: bool) -> Result<Grant, TrustError> {
    let mut first_error = None;
    for candidate in &copies {
        let body = candidate.body();
        let found = match find(body.volume_id)? {
            Some(found) => found,
            None if trust => {
                let path = trust_path(body)?;
                Found { pin: Pin::of(body, |_| None), path }
            }
            None => return Err(no_pin(body)),
        };
        match verify_kek(&found, body).and_then(|_| not_older(&found, body)) {
            Ok(()) => {
                let agrees = |copy: &VolumeFile| {
                    verify_kek(&found, copy.body()).and_then(|_| not_older(&found, copy.body())).is_ok()
                };
                let copies = copies.into_iter().filter(agrees).map(|copy| (copy, Vec::new())).collect();
                return Ok(Grant { copies, pin: found.pin });
            }
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    Err(first_error.unwrap_or_else(|| TrustError::NoPlace(io::Error::other("no copy of the volume file"))))
}

fn trust_path(body: &Body) -> Result<PathBuf, TrustError> {
    Ok(places::trust_dir().map_err(TrustError::NoPlace)?.join(body.volume_id.to_string()))
}

/// The pin of a volume that the user vouches for now. Of what the file says, only the key's name is used, never an address.
fn first_sight(body: &Body, uri: Option<&KeyUri>) -> Result<Found, TrustError> {
    let pin = Pin::of(body, |slot| match (&slot.identity, uri) {
        (KeyIdentity::File { .. }, Some(uri @ KeyUri::File(_))) => Some(uri.clone()),
        (KeyIdentity::File { .. }, _) => None,
        (identity, None) => identity.uri(),
        (identity, Some(uri)) => Some(uri.clone()).filter(|uri| identity.is_named_by(uri)),
    });
    if pin.slots().next().is_some() {
        return Ok(Found { pin, path: trust_path(body)? });
    }
    match uri {
        None => Err(no_pin(body)),
        Some(uri) => Err(TrustError::OtherKey {
            given: uri.clone(),
            why: format!("its volume file names, unverified, {}", keys_of(body)),
        }),
    }
}

/// Brings a URI given with the command together with the pin's.
fn with_uri(mut found: Found, trust: bool, uri: Option<&KeyUri>) -> Result<Found, TrustError> {
    let Some(uri) = uri else { return Ok(found) };
    if found.pin.slots().any(|(_, _, slot)| slot.uri == *uri) {
        return Ok(found);
    }
    let slots = || found.pin.slots().map(|(_, _, slot)| slot.uri.to_string()).collect::<Vec<_>>().join(", ");
    let other = |why| Err(TrustError::OtherKey { given: uri.clone(), why });
    let has_file = found.pin.slots().any(|(_, _, slot)| matches!(slot.identity, KeyIdentity::File { .. }));
    match uri {
        KeyUri::File(_) if has_file && !trust => {
            other(format!("this host's pin says {}; if the key file has moved, add --trust", slots()))
        }
        KeyUri::File(_) if has_file => {
            for slot in found.pin.keks.iter_mut().flat_map(|kek| &mut kek.slots) {
                if matches!(slot.identity, KeyIdentity::File { .. }) {
                    slot.uri = uri.clone();
                }
            }
            Ok(found)
        }
        // The same key at a server that this host calls by a name: which key it must be stays as pinned.
        KeyUri::Transit(_) if found.pin.slots().filter(|(_, _, slot)| slot.identity.is_named_by(uri)).count() == 1 => {
            for slot in found.pin.keks.iter_mut().flat_map(|kek| &mut kek.slots) {
                if slot.identity.is_named_by(uri) {
                    slot.uri = uri.clone();
                }
            }
            Ok(found)
        }
        KeyUri::File(_) | KeyUri::Transit(_) | KeyUri::Pkcs11(_) | KeyUri::Aws(_) => {
            other(format!("this host's pin says {}", slots()))
        }
    }
}

fn no_pin(body: &Body) -> TrustError {
    let slots = || body.scopes.iter().flat_map(|scope| &scope.keks).flat_map(|kek| &kek.slots);
    let only_files = slots().all(|slot| matches!(slot.identity, KeyIdentity::File { .. }));
    TrustError::NoPin {
        volume: body.volume_id,
        claims: format!("the label {:?} and {}", body.label, keys_of(body)),
        how: if only_files { "--trust --kms file:///PATH/OF/THE/KEY" } else { "--trust" },
    }
}

/// The keys that a volume file claims, made safe to print.
pub fn keys_of(body: &Body) -> String {
    let mut keys: Vec<String> = Vec::new();
    for slot in body.scopes.iter().flat_map(|scope| &scope.keks).flat_map(|kek| &kek.slots) {
        let key = slot.identity.to_string().escape_debug().to_string();
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    if keys.is_empty() { "no key".into() } else { keys.join(", ") }
}

/// A commitment's text, as volume file and pin write it.
pub(crate) fn commitment_text(commitment: &[u8; 32]) -> String {
    hex(commitment)
}

#[cfg(test)]
mod tests;
