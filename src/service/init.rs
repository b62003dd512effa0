//! `init`: makes a volume. The key service is asked first, the disk is written last, and a failure leaves the backing
//! directory as it was.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::record::path_text;
use super::trust::{self, Pin};
use super::{Error, SCHEMA, audit, backing, mountinfo, now};
use crate::audit::Event;
use crate::crypto::ids::hex;
use crate::crypto::{ObjectId, VolumeId};
use crate::keyring::{self, Keyring, SealReason};
use crate::kms::{self, Binding, KeyIdentity, KeyUri, Purpose};
use crate::volume::Volume;
use crate::volume::format::{FORMAT, VOLUME_FILE};
use crate::volume::meta::{self, Body, Extra, KekRecord, KeyState, Scope, Slot, VolumeFile};

/// What to make.
pub struct Request {
    /// The backing directory: empty, or not there yet.
    pub backing: PathBuf,
    /// The key.
    pub uri: KeyUri,
    /// For people; not encrypted.
    pub label: String,
}

/// What was made.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Its label.
    pub label: String,
    /// The backing directory.
    #[serde(with = "path_text")]
    pub backing: PathBuf,
    /// The key.
    pub key: KeyIdentity,
    /// How this host reaches it.
    pub uri: KeyUri,
    /// The key is a file on this machine.
    pub embedded: bool,
    /// This host's pin.
    #[serde(with = "path_text")]
    pub pin: PathBuf,
    /// What weakens an erase.
    pub warnings: Vec<String>,
}

/// Makes a volume.
///
/// # Errors
/// What is wrong with the place or the key; nothing is left behind in the backing directory then.
pub fn run(request: &Request) -> Result<Report, Error> {
    meta::check_label(&request.label).map_err(Error::Usage)?;
    let place = check_place(&request.backing)?;
    check_key_place(&request.uri, &place.path)?;

    let volume = VolumeId::random().map_err(keyring::KeyringError::from)?;
    let source = kms::source(&request.uri)?;
    let binding = |purpose| Binding { volume, scope: 0, version: 1, purpose };
    let kek = source.make(&binding(Purpose::Kek))?;
    let request_id = source.last_request_id();
    let canary = source.make(&binding(Purpose::Canary))?;
    if !kek.identity.same_key(&canary.identity) {
        return Err(Error::Usage("the key service answered with two different keys: check its address".into()));
    }
    let mut warnings = match source.describe() {
        Ok(description) => description.warnings,
        Err(error) => vec![format!("the key could not be described, so its weaknesses are not known: {error}")],
    };

    let created = now();
    let slot = Slot {
        id: 1,
        created: created.clone(),
        identity: kek.identity.clone(),
        wrapped: kek.wrapped,
        canary: canary.wrapped,
        canary_check: hex(&keyring::canary_check(&volume, 0, 1, &canary.key)),
        extra: Extra::new(),
    };
    let record = KekRecord {
        version: 1,
        state: KeyState::Active,
        created: created.clone(),
        commitment: trust::commitment_text(&keyring::commitment(&volume, 0, 1, &kek.key)),
        slots: vec![slot],
        extra: Extra::new(),
    };
    let body = Body {
        magic: "lethefs".into(),
        format: FORMAT,
        volume_id: volume,
        label: request.label.clone(),
        created,
        generation: 1,
        incompat: Vec::new(),
        compat: Vec::new(),
        root_id: ObjectId::random().map_err(keyring::KeyringError::from)?,
        scopes: vec![Scope { id: 0, current: 1, keks: vec![record], extra: Extra::new() }],
        extra: Extra::new(),
    };
    let keys = Keyring::new(volume).map_err(Error::io("no locked memory for keys: raise the limit (ulimit -l)"))?;
    keys.admit(0, 1, &kek.key, true)?;
    let written = write(&place, &body, &keys, &request.uri);
    keys.wipe(SealReason::Unmounted);
    let pin = written?;
    let (backing, uri) = (super::record::path_text::encode(&place.path), request.uri.to_string());
    let event = Event::Init { backing, uri, key: audit::key(&kek.identity), request_id };
    audit::warn(&audit::open(volume), event, &mut warnings);
    Ok(Report {
        schema: SCHEMA,
        volume_id: volume,
        label: body.label,
        backing: place.path,
        key: kek.identity,
        uri: request.uri.clone(),
        embedded: matches!(request.uri, KeyUri::File(_)),
        pin,
        warnings,
    })
}

struct Place {
    path: PathBuf,
    exists: bool,
}

/// Where the volume will be. Makes nothing.
fn check_place(given: &Path) -> Result<Place, Error> {
    let place = match fs::symlink_metadata(given) {
        Ok(_) => Place { path: backing::canonical(given, "backing directory")?, exists: true },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let absolute = std::path::absolute(given).map_err(Error::io("no working directory"))?;
            let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
                return Err(Error::Usage(format!("{} cannot be a backing directory", given.display())));
            };
            Place { path: backing::canonical(parent, "parent directory")?.join(name), exists: false }
        }
        Err(error) => return Err(Error::io(format!("cannot reach {}", given.display()))(error)),
    };
    let shown = place.path.display();
    for dir in place.path.ancestors() {
        if fs::symlink_metadata(dir.join(VOLUME_FILE)).is_ok() {
            let what = if dir == place.path { "already is" } else { "is inside" };
            return Err(Error::Usage(format!("{shown} {what} a lethefs volume: choose an empty directory elsewhere")));
        }
    }
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    if mountinfo::holding(&mounts, &place.path).is_some_and(mountinfo::Mount::is_lethefs) {
        return Err(Error::Usage(format!("{shown} is inside a mounted lethefs volume: choose a directory outside")));
    }
    if place.exists {
        if let Some(mount) = mountinfo::below(&mounts, &place.path).next() {
            return Err(Error::Usage(format!(
                "something is mounted below {shown}, at {}: choose an empty directory",
                mount.mountpoint.display()
            )));
        }
        if !backing::is_empty(&place.path).map_err(Error::io(format!("cannot read {shown}")))? {
            return Err(Error::Usage(format!(
                "{shown} is not empty: choose an empty directory, or a name not there yet"
            )));
        }
    }
    Ok(place)
}

/// A key file inside its own volume would be copied, backed up and lost with it.
pub(super) fn check_key_place(uri: &KeyUri, backing: &Path) -> Result<(), Error> {
    match uri {
        KeyUri::File(path) => {
            let real = fs::canonicalize(path).or_else(|error| match (path.parent(), path.file_name()) {
                (Some(parent), Some(name)) => fs::canonicalize(parent).map(|parent| parent.join(name)),
                _ => Err(error),
            });
            let real = real.unwrap_or_else(|_| path.clone());
            if real.starts_with(backing) || path.starts_with(backing) {
                return Err(Error::Usage(format!(
                    "the key file {} would lie inside the backing directory: keep it apart, or whoever has the data has the key",
                    path.display()
                )));
            }
            Ok(())
        }
        KeyUri::Transit(_) | KeyUri::Pkcs11(_) | KeyUri::Aws(_) => Ok(()),
    }
}

/// Writes the volume, then the pin; undoes everything if one fails.
fn write(place: &Place, body: &Body, keys: &Keyring, uri: &KeyUri) -> Result<PathBuf, Error> {
    if !place.exists {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&place.path)
            .map_err(Error::io(format!("cannot make {}", place.path.display())))?;
    }
    let filled = backing::open(&place.path).and_then(|dir| {
        if !backing::lock(&dir, &place.path)? {
            return Err(Error::InUse(format!("another lethefs works on {}: wait for it", place.path.display())));
        }
        // Somebody may have been quicker between the first look and the lock.
        if !backing::is_empty(&place.path).map_err(Error::io("cannot read the backing directory"))? {
            return Err(Error::Usage(format!("{} is not empty any more: choose another", place.path.display())));
        }
        fill(&dir, body, keys, uri).inspect_err(|_| backing::remove_own_files(&dir))
    });
    if filled.is_err() && !place.exists {
        let _ = fs::remove_dir(&place.path);
    }
    filled
}

fn fill(dir: &OwnedFd, body: &Body, keys: &Keyring, uri: &KeyUri) -> Result<PathBuf, Error> {
    Volume::create_root(dir, keys, body.root_id)?;
    VolumeFile::write(dir, body, keys)?;
    Ok(Pin::of_new_volume(body, uri).save()?)
}
