//! The audit log of a volume on this host: where it is, `audit verify`, `audit show`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::record::path_text;
use super::{Error, SCHEMA, backing, mount, mountinfo, places, umount};
use crate::audit::{self, Event, Expected, Record, Recorded, Sink, Verdict};
use crate::crypto::VolumeId;
use crate::kms::{KeyIdentity, KmsError};
use crate::volume::meta::VolumeFile;

/// The log of a volume, for this user. Never fails: what cannot be recorded is counted and told in the log.
pub fn open(volume: VolumeId) -> Arc<Sink> {
    let dir = places::audit_dir().unwrap_or_else(|error| {
        tracing::error!(%error, "there is no place for the audit log: events are lost");
        // Nothing can be made there, so every event counts as lost.
        PathBuf::from("/proc/lethefs-audit")
    });
    Arc::new(Sink::open(&dir, volume))
}

/// A key's identity as the log holds it.
pub(super) fn key(identity: &KeyIdentity) -> Value {
    serde_json::to_value(identity).unwrap_or_default()
}

/// What a person must be told of a log that loses events.
pub(super) fn complaint(sink: &Sink) -> Option<String> {
    let line = || format!("the audit log {} cannot be written: what is done is not in it", sink.path().display());
    (sink.lost() > 0).then(line)
}

/// What a person must be told if a record that a verb promises is lost.
pub(super) fn warn(sink: &Sink, event: Event, warnings: &mut Vec<String>) {
    if sink.record(event) == Recorded::Lost {
        warnings.extend(complaint(sink).filter(|line| !warnings.contains(line)));
    }
}

/// An unwrap that failed.
pub(super) fn fetch_failed(
    purpose: &'static str,
    slot: u32,
    uri: String,
    identity: &KeyIdentity,
    error: &KmsError,
) -> Event {
    let (class, message) = (error.failure.word(), error.message.clone());
    Event::FetchFailed { purpose, slot, uri, key: key(identity), class, message, request_id: None }
}

/// A filesystem answers.
pub(super) fn mounted(sink: &Sink, report: &mount::Report, generation: u64) {
    let (backing, mountpoint) = (path_text::encode(&report.backing), path_text::encode(&report.mountpoint));
    let _ = sink.record(Event::Mount { backing, mountpoint, options: report.options.clone(), generation });
}

/// It ended, or did not come about.
pub(super) fn unmounted(sink: &Sink, mountpoint: &Path, started: Option<&Error>, ended: Option<&io::Error>) {
    let problem = started.map(ToString::to_string).or_else(|| ended.map(ToString::to_string));
    let _ = sink.record(Event::Unmount { mountpoint: path_text::encode(mountpoint), problem });
}

/// What `audit verify` found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume, if anything tells.
    pub volume_id: Option<VolumeId>,
    /// The files, oldest first.
    pub files: Vec<String>,
    /// Everything else.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// Checks a log: a file of it, or that of the volume in a backing directory or at a mountpoint.
///
/// # Errors
/// There is no such log, or it cannot be read. What is wrong with it is no error.
pub fn verify(path: &Path, expected: &Expected) -> Result<Report, Error> {
    let files = files(path)?;
    let verdict = audit::verify(&files, expected).map_err(Error::io("cannot read the audit log"))?;
    let files = files.iter().map(|file| path_text::encode(file)).collect();
    Ok(Report { schema: SCHEMA, volume_id: verdict.volume, files, verdict })
}

/// Every record, oldest first.
///
/// # Errors
/// As [`verify`].
pub fn show(path: &Path, mut each: impl FnMut(Record)) -> Result<Shown, Error> {
    let mut records = 0_u64;
    let other = audit::records(&files(path)?, |record| {
        records += 1;
        each(record);
    });
    let other = other.map_err(Error::io("cannot read the audit log"))?;
    if records == 0 && other > 0 {
        return Err(Error::Usage(format!("{} is no audit log: no line of it is a record", path.display())));
    }
    Ok(Shown { other })
}

/// What `audit show` could not show.
pub struct Shown {
    /// Lines that are no record.
    pub other: u64,
}

fn files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let meta = std::fs::metadata(path);
    let log = match meta {
        Ok(meta) if meta.is_dir() => places::audit_dir()
            .map_err(Error::io("there is no place for audit logs"))?
            .join(audit::file_name(volume_of(path)?)),
        Ok(_) => path.to_owned(),
        // A log whose last file was just given a number still is one.
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        Err(error) => return Err(Error::io(format!("cannot reach {}", path.display()))(error)),
    };
    let missing =
        |_| Error::Usage(format!("there is no audit log {}: nothing was recorded here by this user", log.display()));
    let files = audit::files_of(&log).map_err(missing)?;
    match files.as_slice() {
        [only] if std::fs::symlink_metadata(only).is_err() => Err(missing(io::ErrorKind::NotFound.into())),
        _ => Ok(files),
    }
}

/// The volume at a mountpoint or in a backing directory.
pub(super) fn volume_of(path: &Path) -> Result<VolumeId, Error> {
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if let Some(mount) = mountinfo::at(&mounts, &resolved).filter(|mount| mount.is_lethefs())
        && let Some((record, _)) = umount::find(&resolved, mount.user)
    {
        return Ok(record.volume_id);
    }
    let path = backing::canonical(path, "directory")?;
    let copies = VolumeFile::read(backing::open(&path)?)?;
    copies.first().map(|copy| copy.body().volume_id).ok_or(Error::Meta(crate::volume::meta::MetaError::NotAVolume))
}
