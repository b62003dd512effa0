//! `keys backup-header`, `keys restore-header`: what a volume needs besides its files, in one file with a checksum.
//!
//! The volume file twice, and the root directory's header. None of it is secret; but as long as such a copy exists, a key that is still
//! there opens it, and so do shares on paper.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::AtFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::opening::{self, With};
use crate::audit::Event;
use crate::crypto::VolumeId;
use crate::crypto::ids::hex;
use crate::keyring::SealReason;
use crate::service::mount::{take_lock, unlock};
use crate::service::record::path_text;
use crate::service::trust::TrustError;
use crate::service::{Error, SCHEMA, audit, backing, now, places, trust};
use crate::volume::dir::DirKeys;
use crate::volume::format::{self, DIR_HEADER, VOLUME_FILE, VOLUME_FILE_COPY};
use crate::volume::meta::{self, MetaError, VolumeFile};
use crate::volume::storage;

/// Longest file read, in bytes: two volume files in base64, and some.
const MAX_LEN: u64 = 4 * meta::MAX_LEN;

/// A saved header.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    lethefs_header: u32,
    volume_id: VolumeId,
    generation: u64,
    saved: String,
    /// Both copies, base64; null for one that could not be read.
    volume_file: Option<String>,
    volume_file_copy: Option<String>,
    /// Target of the root's `lethefs.dir`.
    root_header: Option<String>,
    /// SHA-256 over the fields above, hex.
    sha256: String,
}

impl Saved {
    fn checksum(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("lethefs/1/header\n{}\n{}\n{}\n", self.volume_id, self.generation, self.saved));
        for part in [&self.volume_file, &self.volume_file_copy, &self.root_header] {
            hash.update(part.as_deref().unwrap_or("-"));
            hash.update("\n");
        }
        hex(&hash.finalize())
    }
}

/// What was saved or put back.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Generation of what was saved or put back.
    pub generation: u64,
    /// The file.
    #[serde(with = "path_text")]
    pub file: PathBuf,
    /// What was put back: `volume-file`, `root-header`.
    pub restored: Vec<&'static str>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Saves. Asks no key service, and works beside a mount. Never over a file that is there.
///
/// # Errors
/// Not a volume; the file is there already or cannot be made.
pub fn backup(path: &Path, file: &Path) -> Result<Report, Error> {
    let path = opening::backing_of(path)?;
    let dir = backing::open(&path)?;
    let copies = VolumeFile::read(&dir)?;
    let Some(best) = copies.first().map(VolumeFile::body) else {
        return Err(MetaError::NotAVolume.into());
    };
    let mut warnings = Vec::new();
    match trust::find(best.volume_id)? {
        Some(found) => drop(trust::verify(&found, best)?),
        None => warnings
            .push("this host has no pin of the volume, so what was saved is only what the volume file says".into()),
    }
    let read = |name: &str| -> Result<Option<String>, Error> {
        let bytes = backing::read_small(&dir, name, meta::MAX_LEN).map_err(Error::io(format!("cannot read {name}")))?;
        Ok(bytes.filter(|bytes| VolumeFile::parse(bytes).is_ok()).map(|bytes| STANDARD.encode(bytes)))
    };
    let root = rustix::fs::readlinkat(&dir, DIR_HEADER, Vec::new()).ok();
    let mut saved = Saved {
        lethefs_header: 1,
        volume_id: best.volume_id,
        generation: best.generation,
        saved: now(),
        volume_file: read(VOLUME_FILE)?,
        volume_file_copy: read(VOLUME_FILE_COPY)?,
        root_header: root.and_then(|root| root.into_string().ok()),
        sha256: String::new(),
    };
    saved.sha256 = saved.checksum();
    if saved.root_header.is_none() {
        warnings.push("the root directory's header is missing, and was not saved: see `lethefs fsck`".into());
    }
    if best
        .scopes
        .iter()
        .flat_map(|scope| &scope.keks)
        .all(|kek| kek.slots.iter().all(|slot| slot.wrapped.0.is_empty()))
    {
        warnings.push("the volume is erased: what was saved opens nothing".into());
    }
    let mut text = serde_json::to_vec_pretty(&saved).map_err(|error| Error::io("cannot write JSON")(error))?;
    text.push(b'\n');
    write_new(file, &text).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::Usage(format!("{} is there already and is not overwritten: name another file", file.display()))
        }
        std::io::ErrorKind::NotFound => {
            Error::Usage(format!("{} cannot be made: its directory is not there", file.display()))
        }
        _ => Error::io(format!("cannot write {}", file.display()))(error),
    })?;
    let event = Event::HeaderSaved { generation: saved.generation };
    audit::warn(&audit::open(saved.volume_id), event, &mut warnings);
    warnings.push(
        "while this file exists, any key of the volume that is not destroyed, and shares on paper, open it with the files: an erase \
         does not reach it"
            .into(),
    );
    Ok(Report {
        schema: SCHEMA,
        volume_id: saved.volume_id,
        generation: saved.generation,
        file: file.to_owned(),
        restored: Vec::new(),
        warnings,
    })
}

fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".lethefs-header-").tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    std::fs::File::open(dir)?.sync_all()
}

/// Puts a saved header back: only if it authenticates with the volume's key, and over a newer one only if that was asked for.
///
/// # Errors
/// A file that is damaged or of another volume; the pin's or the key service's; the volume is mounted. Nothing is changed then.
pub fn restore(path: &Path, file: &Path, with: &With, older: bool) -> Result<Report, Error> {
    crate::sys::process::harden();
    let path = backing::canonical(path, "backing directory")?;
    let dir = backing::open(&path)?;
    take_lock(&dir, &path)?;
    let bad = |why: &str| Error::Usage(format!("{} {why}", file.display()));
    let (_, bytes) =
        places::read_regular(file, MAX_LEN).map_err(Error::io(format!("cannot read {}", file.display())))?;
    let saved: Saved = serde_json::from_slice(&bytes).map_err(|_| bad("is not a saved header, or is damaged"))?;
    if saved.lethefs_header != 1 || saved.sha256 != saved.checksum() {
        return Err(bad("is damaged, or of a newer version: its checksum is not right"));
    }
    let parts = [&saved.volume_file, &saved.volume_file_copy];
    let copies: Vec<VolumeFile> =
        parts.into_iter().flatten().filter_map(|text| VolumeFile::parse(&STANDARD.decode(text).ok()?).ok()).collect();
    if copies.is_empty() {
        return Err(bad("holds no volume file that can be read"));
    }
    // The pin refuses what is older than this host has seen.
    let grant = trust::grant(copies, with.trust, with.uri.as_ref()).map_err(|error| match error {
        TrustError::Older { path, found, pinned } => {
            TrustError::OlderHeader { header: file.to_owned(), pin: path, found, pinned }
        }
        other => other,
    })?;
    let unlock::Unlocked { keys, body, audit, .. } = unlock::unlock(&grant, None, "restore-header")?;

    let there = match VolumeFile::read(&dir) {
        Err(MetaError::NotAVolume | MetaError::Lost | MetaError::Damaged(_)) => Vec::new(),
        there => there?,
    };
    if let Some(root) = DirKeys::claimed_id(dir.as_fd()).filter(|root| *root != body.root_id) {
        return Err(bad(&format!("is of a volume with root {}, and this directory has root {root}", body.root_id)));
    }
    if let Some(other) = there.iter().map(VolumeFile::body).find(|other| other.volume_id != body.volume_id) {
        return Err(bad(&format!("is of volume {}, and the directory holds {}", body.volume_id, other.volume_id)));
    }
    let replaced = there.iter().filter_map(|copy| copy.authenticate(&keys).ok()).map(|body| body.generation).max();
    if let Some(newer) = replaced.filter(|newer| *newer > body.generation && !older) {
        return Err(bad(&format!(
            "is of generation {}, and the volume file in place is genuine and of {newer}: nothing was changed (--older puts it back all the same)",
            body.generation
        )));
    }
    let mut warnings = Vec::new();
    let root_is_right = DirKeys::load(dir.as_fd(), &keys).is_ok_and(|root| root.id() == body.root_id);
    let root = (!root_is_right).then(|| saved.root_header.as_deref().filter(|text| opens(text, &body, &keys)));
    let event = Event::HeaderRestored { generation: body.generation, replaced };
    audit::warn(&audit, event, &mut warnings);
    let mut restored = Vec::new();
    if replaced != Some(body.generation)
        || there.len() < 2
        || there.iter().any(|copy| copy.authenticate(&keys).ok() != Some(&body))
    {
        VolumeFile::write(&dir, &body, &keys)?;
        restored.push("volume-file");
    }
    match root {
        None => {}
        Some(Some(text)) => {
            put_root(&dir, text).map_err(Error::io("cannot write the root directory's header"))?;
            restored.push("root-header");
        }
        Some(None) => warnings.push(
            "the root directory's header is missing, and the saved one is not genuine: see `lethefs fsck --repair`"
                .into(),
        ),
    }
    let mut pin = grant.pin;
    pin.refresh(&body);
    if let Err(error) = pin.save() {
        warnings.push(format!("{error}; this host will not remember what it saw"));
    }
    keys.wipe(SealReason::Unmounted);
    Ok(Report {
        schema: SCHEMA,
        volume_id: body.volume_id,
        generation: body.generation,
        file: file.to_owned(),
        restored,
        warnings,
    })
}

/// Whether this is the header of the volume's root.
fn opens(text: &str, body: &meta::Body, keys: &crate::keyring::Keyring) -> bool {
    DirKeys::parse(text.as_bytes(), keys).is_ok_and(|root| root.id() == body.root_id)
}

fn put_root(dir: impl std::os::fd::AsFd, text: &str) -> std::io::Result<()> {
    let temporary = format::temporary_name()?;
    storage::symlink(dir.as_fd(), &*temporary, text.as_bytes()).map_err(std::io::Error::from)?;
    if let Err(error) = rustix::fs::renameat(&dir, &*temporary, &dir, DIR_HEADER) {
        let _ = rustix::fs::unlinkat(&dir, &*temporary, AtFlags::empty());
        return Err(error.into());
    }
    Ok(rustix::fs::fsync(&dir)?)
}
