//! What a live mount leaves in the runtime directory: `VOLUME_ID.json`, beside its socket and log. Says who has a volume
//! when the lock does not; believed only as a hint, and checked through the socket where it matters.

use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{SCHEMA, now, places};
use crate::crypto::VolumeId;
use crate::crypto::ids::unhex;

/// A live mount, as it recorded itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Its label.
    pub label: String,
    /// Canonical path of the backing directory.
    #[serde(with = "path_text")]
    pub backing: PathBuf,
    /// Canonical path of the mountpoint.
    #[serde(with = "path_text")]
    pub mountpoint: PathBuf,
    /// The daemon.
    pub pid: i32,
    /// RFC 3339, UTC.
    pub started: String,
}

impl Record {
    /// The record of this process.
    pub fn of_self(volume_id: VolumeId, label: String, backing: PathBuf, mountpoint: PathBuf) -> Self {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        Self { schema: SCHEMA, volume_id, label, backing, mountpoint, pid, started: now() }
    }
}

/// The runtime files of one volume.
#[derive(Clone, Debug)]
pub struct Files {
    /// `VOLUME_ID.json`
    pub record: PathBuf,
    /// `VOLUME_ID.sock`
    pub socket: PathBuf,
    /// `VOLUME_ID.log`
    pub log: PathBuf,
}

impl Files {
    /// Their names in `dir`.
    pub fn new(dir: &Path, volume: VolumeId) -> Self {
        let name = |end: &str| dir.join(format!("{volume}.{end}"));
        Self { record: name("json"), socket: name("sock"), log: name("log") }
    }

    /// Removes record and socket, if they are those of the mount that process `pid` served.
    pub fn remove(&self, pid: i32) {
        if read(&self.record).is_none_or(|record| record.pid != pid) {
            return;
        }
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(&self.record);
    }
}

/// Writes a record.
///
/// # Errors
/// The system's.
pub fn write(files: &Files, record: &Record) -> io::Result<()> {
    places::write_own(&files.record, &serde_json::to_vec_pretty(record)?, 0o600)
}

/// The record of a volume in this user's runtime directory.
pub fn find(volume: VolumeId) -> Option<Record> {
    read(&Files::new(&places::runtime_dir(), volume).record)
}

/// The record among these files.
pub(crate) fn of(files: &Files) -> Option<Record> {
    read(&files.record)
}

/// Every record in the runtime directories of this user (root: and of `users`), with its files.
pub fn all(users: &[u32]) -> Vec<(Record, Files)> {
    let mut found = Vec::new();
    for dir in places::runtime_dirs(users) {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let volume = name.to_str().and_then(|name| name.strip_suffix(".json")).and_then(unhex::<16>);
            let Some(volume) = volume.map(VolumeId) else { continue };
            if let Some(record) = read(&entry.path()).filter(|record| record.volume_id == volume) {
                found.push((record, Files::new(&dir, volume)));
            }
        }
    }
    found
}

/// Root may read what users wrote about their own mounts; nobody believes more than a path and a number out of it.
fn read(path: &Path) -> Option<Record> {
    serde_json::from_slice(&places::read_regular(path, 64 << 10).ok()?.1).ok()
}

/// Paths in JSON: bytes that are not UTF-8 as `\xNN`, and a backslash as `\\`. Reversible.
pub mod path_text {
    use super::*;
    use serde::{Deserializer, Serializer};

    /// The text of a path.
    pub fn encode(path: &Path) -> String {
        let mut text = String::new();
        for chunk in path.as_os_str().as_bytes().utf8_chunks() {
            text.push_str(&chunk.valid().replace('\\', "\\\\"));
            for byte in chunk.invalid() {
                text.push_str(&format!("\\x{byte:02x}"));
            }
        }
        text
    }

    /// The path of a text.
    pub fn decode(text: &str) -> Option<PathBuf> {
        let mut bytes = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find('\\') {
            bytes.extend_from_slice(&rest.as_bytes()[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('\\') {
                bytes.push(b'\\');
                rest = after;
            } else {
                let digits = rest.strip_prefix('x')?.get(..2)?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                rest = &rest[3..];
            }
        }
        bytes.extend_from_slice(rest.as_bytes());
        Some(std::ffi::OsString::from_vec(bytes).into())
    }

    pub(in crate::service) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(path))
    }

    pub(in crate::service) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        let text = String::deserialize(deserializer)?;
        decode(&text).ok_or_else(|| serde::de::Error::custom("not a path"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn any_path_survives_json(bytes in proptest::collection::vec(1u8..=255, 0..40)) {
            let path = PathBuf::from(std::ffi::OsString::from_vec(bytes));
            proptest::prop_assert_eq!(path_text::decode(&path_text::encode(&path)), Some(path));
        }
    }

    #[test]
    fn records_are_found_again() {
        let dir = tempfile::tempdir().expect("directory");
        let record = Record::of_self(VolumeId([3; 16]), "l".into(), "/b".into(), "/m".into());
        let files = Files::new(dir.path(), record.volume_id);
        write(&files, &record).expect("written");
        let pid = record.pid;
        assert_eq!(read(&files.record), Some(record));
        std::fs::write(&files.socket, "").expect("written");
        files.remove(pid + 1);
        assert!(files.record.exists() && files.socket.exists(), "another process's");
        files.remove(pid);
        assert!(!files.socket.exists());
        assert_eq!(read(&files.record), None);
    }
}
