//! `status`: what is mounted, and what a backing directory is. Never contacts a key service.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::control::{ANSWER_PATIENCE, Client, Status};
use super::journal::{self, Journal};
use super::record::{self, Record, path_text};
use super::trust::{self, TrustError};
use super::{Error, SCHEMA, backing, mountinfo, umount};
use crate::crypto::VolumeId;
use crate::kms::KeyIdentity;
use crate::volume::meta::VolumeFile;

/// What there is to say about one volume.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume; null if nothing tells.
    pub volume_id: Option<VolumeId>,
    /// Its label. Unverified unless the pin is `matches` or it is mounted.
    pub label: Option<String>,
    /// The backing directory, if known.
    pub backing: Option<String>,
    /// Where it is mounted.
    pub mountpoint: Option<String>,
    /// The mount's own words. Null: not mounted, or its daemon does not answer.
    pub live: Option<Status>,
    /// The volume file names these keys. Unverified, as `label`.
    pub keys: Vec<KeyIdentity>,
    /// Generation of the volume file. Unverified, as `label`.
    pub generation: Option<u64>,
    /// What this host's pin says to it.
    pub pin: PinState,
    /// The journal of an erase. Not authenticated.
    pub erase: Option<Journal>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// Every live mount.
#[derive(Debug, Serialize)]
pub struct List {
    /// 1.
    pub schema: u32,
    /// Always null: it is about many.
    pub volume_id: Option<VolumeId>,
    /// One each.
    pub mounts: Vec<Report>,
}

/// How a volume file stands to this host's pin.
#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum PinState {
    /// Agrees.
    Matches,
    /// There is no pin.
    None,
    /// Disagrees, or cannot be used.
    Refused {
        /// Why.
        why: String,
    },
    /// Not looked at: a live mount was asked instead.
    NotChecked,
}

/// Every live mount of this user (root: of all users).
///
/// # Errors
/// No `/proc`.
pub fn all() -> Result<List, Error> {
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let mine: Vec<_> = mounts.iter().filter(|mount| mount.is_lethefs()).collect();
    let users: Vec<u32> = mine.iter().filter_map(|mount| mount.user).collect();
    let mut reports: Vec<Report> = Vec::new();
    let mut recorded: Vec<PathBuf> = Vec::new();
    // One time limit for all that one user's directory holds: nobody keeps root waiting by filling it.
    let mut limits: HashMap<PathBuf, Instant> = HashMap::new();
    for (record, files) in record::all(&users) {
        let dir = files.socket.parent().unwrap_or(&files.socket).to_owned();
        let until = *limits.entry(dir).or_insert_with(|| Instant::now() + ANSWER_PATIENCE);
        let live = Client::connect(&files.socket).and_then(|client| client.status_until(until)).ok();
        let mounted = mine.iter().any(|mount| mount.mountpoint == record.mountpoint);
        // Neither mounted nor alive: a record that a killed daemon left.
        if live.is_none() && !mounted {
            continue;
        }
        recorded.push(record.mountpoint.clone());
        reports.push(of_mount(record, live));
    }
    for mount in mine.iter().filter(|mount| !recorded.contains(&mount.mountpoint)) {
        reports.push(of_stranger(&mount.mountpoint));
    }
    Ok(List { schema: SCHEMA, volume_id: None, mounts: reports })
}

/// A backing directory or a mountpoint.
///
/// # Errors
/// Neither; or what is wrong with the volume file.
pub fn of(path: &Path) -> Result<Report, Error> {
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if let Some(mount) = mountinfo::at(&mounts, &resolved).filter(|mount| mount.is_lethefs()) {
        return Ok(match umount::find(&resolved, mount.user) {
            Some((record, files)) => of_mount(record, Client::connect(&files.socket).and_then(Client::status).ok()),
            None => of_stranger(&resolved),
        });
    }
    of_backing(path)
}

fn of_mount(record: Record, live: Option<Status>) -> Report {
    let mut warnings = Vec::new();
    if live.is_none() {
        warnings.push(format!("process {} does not answer: if it is gone, unmount and mount again", record.pid));
    }
    Report {
        schema: SCHEMA,
        volume_id: Some(record.volume_id),
        label: Some(record.label),
        backing: Some(path_text::encode(&record.backing)),
        mountpoint: Some(path_text::encode(&record.mountpoint)),
        keys: live.iter().map(|live| live.key.clone()).collect(),
        live,
        generation: None,
        pin: PinState::NotChecked,
        erase: None,
        warnings,
    }
}

fn of_stranger(mountpoint: &Path) -> Report {
    Report {
        schema: SCHEMA,
        volume_id: None,
        label: None,
        backing: None,
        mountpoint: Some(path_text::encode(mountpoint)),
        live: None,
        keys: Vec::new(),
        generation: None,
        pin: PinState::NotChecked,
        erase: None,
        warnings: vec!["its daemon cannot be reached from here: it belongs to another user, or is gone".into()],
    }
}

fn of_backing(path: &Path) -> Result<Report, Error> {
    let path = backing::canonical(path, "directory")?;
    let dir = backing::open(&path)?;
    let copies = VolumeFile::read(&dir)?;
    let Some(first) = copies.first() else { return Err(crate::volume::meta::MetaError::NotAVolume.into()) };
    let body = first.body();
    let pin = match trust::find(body.volume_id) {
        Ok(None) => PinState::None,
        Ok(Some(found)) => refused(trust::verify(&found, body).map(drop)),
        Err(error) => refused(Err(error)),
    };
    let mounted = record::find(body.volume_id).filter(|record| record.backing == path);
    let live = mounted.as_ref().and_then(|record| {
        let dir = super::places::runtime_dir();
        let files = record::Files::new(&dir, record.volume_id);
        Client::connect(&files.socket).and_then(Client::status).ok()
    });
    let mut warnings = Vec::new();
    if copies.len() < 2 {
        warnings.push("one copy of the volume file is missing or damaged: the next mount writes it anew".into());
    }
    if live.is_none() && backing::is_locked(&path)? {
        warnings.push("it is in use by a process that does not answer here".into());
    }
    let mut keys = Vec::new();
    for slot in body.scopes.iter().flat_map(|scope| &scope.keks).flat_map(|kek| &kek.slots) {
        if !keys.contains(&slot.identity) {
            keys.push(slot.identity.clone());
        }
    }
    Ok(Report {
        schema: SCHEMA,
        volume_id: Some(body.volume_id),
        label: Some(body.label.clone()),
        backing: Some(path_text::encode(&path)),
        mountpoint: live.as_ref().map(|live| path_text::encode(&live.mountpoint)),
        live,
        keys,
        generation: Some(body.generation),
        pin,
        erase: journal::read_backing(&dir),
        warnings,
    })
}

fn refused(result: Result<(), TrustError>) -> PinState {
    match result {
        Ok(()) => PinState::Matches,
        Err(error) => PinState::Refused { why: error.to_string() },
    }
}
