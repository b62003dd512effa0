//! The volume file (docs/FORMAT.md section 3): its body, its authentication, and its two copies on disk.
//!
//! A [`VolumeFile`] is what was read: a claim. [`VolumeFile::authenticate`] turns it into facts; until then its fields may be
//! used only where a pin vouches for them (`service::trust`).

use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::dir::DirKeys;
use super::format::{DIR_HEADER, FORMAT, VOLUME_FILE, VOLUME_FILE_COPY};
use super::storage::{self, Errno};
use crate::crypto::ids::{hex, unhex};
use crate::crypto::{ObjectId, VolumeId};
use crate::keyring::{Keyring, KeyringError};
use crate::kms::{KeyIdentity, Wrapped};

/// The longest volume file read, in bytes.
pub const MAX_LEN: u64 = 1 << 20;
/// Longest label, in bytes.
pub const MAX_LABEL: usize = 64;

/// The field of a KEK record's `extra` that lists slots taken out.
const REMOVED: &str = "removed_slots";
/// How long mending waits for a change that is under way.
const HEAL_PATIENCE: Duration = Duration::from_secs(5);

/// Fields that this program need not know. Authenticated with the rest.
pub type Extra = serde_json::Map<String, serde_json::Value>;

/// First line of the volume file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Body {
    /// `lethefs`.
    pub magic: String,
    /// Format of the volume.
    pub format: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// For people; not encrypted.
    pub label: String,
    /// RFC 3339, UTC.
    pub created: String,
    /// Rises by one with each rewrite.
    pub generation: u64,
    /// Features a reader must know.
    pub incompat: Vec<String>,
    /// Features a reader may ignore.
    pub compat: Vec<String>,
    /// The root directory's object.
    pub root_id: ObjectId,
    /// Scopes; format 1 has one.
    pub scopes: Vec<Scope>,
    /// What readers may ignore and writers keep.
    pub extra: Extra,
}

/// A part of the volume with KEKs of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scope {
    /// 0 is the whole volume.
    pub id: u32,
    /// The KEK version that wraps new DEKs.
    pub current: u32,
    /// Every KEK version that ever wrapped anything.
    pub keks: Vec<KekRecord>,
    /// What readers may ignore and writers keep.
    pub extra: Extra,
}

/// A KEK version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KekRecord {
    /// From 1.
    pub version: u32,
    /// NIST SP 800-57 part 1 rev. 5, section 7.
    pub state: KeyState,
    /// RFC 3339, UTC.
    pub created: String,
    /// Public commitment, hex.
    pub commitment: String,
    /// KMS keys that each open it.
    pub slots: Vec<Slot>,
    /// What readers may ignore and writers keep.
    pub extra: Extra,
}

/// Key states of NIST SP 800-57 part 1 rev. 5, section 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum KeyState {
    PreActive,
    Active,
    Suspended,
    Deactivated,
    Compromised,
    Destroyed,
}

/// A KEK under one KMS key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// From 1.
    pub id: u32,
    /// RFC 3339, UTC.
    pub created: String,
    /// Which KMS key, for ever.
    pub identity: KeyIdentity,
    /// The KEK as the KMS wrapped it; empty once erased.
    pub wrapped: Wrapped,
    /// A throw-away key under the same KMS key; empty once erased.
    pub canary: Wrapped,
    /// Public check value of the canary, hex.
    pub canary_check: String,
    /// What readers may ignore and writers keep.
    pub extra: Extra,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AuthLine {
    auth: Vec<Auth>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Auth {
    scope: u32,
    version: u32,
    mac: String,
}

/// Why a volume file is not usable.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// There is none.
    #[error("not a lethefs volume: it has no {VOLUME_FILE}")]
    NotAVolume,
    /// There is none any more.
    #[error(
        "{VOLUME_FILE} and {VOLUME_FILE_COPY} are both gone from what was a volume: put one of them back from a backup, or a saved header with `lethefs keys restore-header`"
    )]
    Lost,
    /// Neither copy can be read as a volume file.
    #[error("the volume file is damaged: {0}; `lethefs keys restore-header` puts a saved one back")]
    Damaged(String),
    /// A format from the future.
    #[error("the volume has format {0}; this lethefs knows format {FORMAT}: use a newer one")]
    NewerFormat(u32),
    /// A feature from the future.
    #[error("the volume needs the feature {0:?}, which this lethefs does not know: use a newer one")]
    UnknownFeature(String),
    /// The file does not authenticate under its KEK.
    #[error("the volume file is not authentic: it was altered, or belongs to another volume")]
    Unauthentic,
    /// The keys are not available.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The backing filesystem.
    #[error("cannot access the volume file: {0}")]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for MetaError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// A volume file as read: parsed, of a known format, not yet authentic.
#[derive(Clone, Debug)]
pub struct VolumeFile {
    body: Body,
    line: Vec<u8>,
    auth: Vec<(u32, u32, [u8; 32])>,
}

impl VolumeFile {
    /// The claims.
    pub fn body(&self) -> &Body {
        &self.body
    }

    /// Parses the two lines.
    ///
    /// # Errors
    /// Whatever makes the file unusable, before any key is asked for.
    pub fn parse(bytes: &[u8]) -> Result<Self, MetaError> {
        #[derive(Deserialize)]
        struct Peek {
            magic: String,
            format: u32,
            #[serde(default)]
            incompat: Vec<String>,
        }
        let damaged = |why: &str| MetaError::Damaged(why.into());
        let mut lines = bytes.split(|byte| *byte == b'\n');
        let (Some(line), Some(auth), Some(b""), None) = (lines.next(), lines.next(), lines.next(), lines.next()) else {
            return Err(damaged("it is cut off, or is not two lines of text"));
        };
        // A newer format or feature may change everything else: say that before anything about fields.
        let peek: Peek = serde_json::from_slice(line).map_err(|error| MetaError::Damaged(error.to_string()))?;
        if peek.magic != "lethefs" {
            return Err(damaged("it does not begin like one"));
        }
        if peek.format > FORMAT {
            return Err(MetaError::NewerFormat(peek.format));
        }
        if let Some(feature) = peek.incompat.into_iter().next() {
            return Err(MetaError::UnknownFeature(feature));
        }
        let body: Body = serde_json::from_slice(line).map_err(|error| MetaError::Damaged(error.to_string()))?;
        if body.format != FORMAT {
            return Err(damaged("there is no format 0"));
        }
        check_label(&body.label).map_err(|_| damaged("its label is too long or has control characters"))?;
        body.check().map_err(damaged)?;
        let auth: AuthLine = serde_json::from_slice(auth).map_err(|error| MetaError::Damaged(error.to_string()))?;
        let auth = auth
            .auth
            .into_iter()
            .map(|auth| unhex(&auth.mac).map(|mac| (auth.scope, auth.version, mac)))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| damaged("a MAC is not 64 hex digits"))?;
        Ok(Self { body, line: line.to_vec(), auth })
    }

    /// Proves the body genuine with any KEK version that the ring holds.
    ///
    /// # Errors
    /// [`MetaError::Unauthentic`], or the ring's.
    pub fn authenticate(&self, keys: &Keyring) -> Result<&Body, MetaError> {
        let mut proved = false;
        // Each MAC that can be checked must match: an old KEK version that leaked must not vouch alone.
        for (scope, version) in keys.held() {
            for (_, _, mac) in self.auth.iter().filter(|auth| (auth.0, auth.1) == (scope, version)) {
                let expected = keys.volume_mac(scope, version, &[b"lethefs/1/volume-file", &self.line])?;
                if !crate::keyring::same(&expected, mac) {
                    return Err(MetaError::Unauthentic);
                }
                proved = true;
            }
        }
        if proved { Ok(&self.body) } else { Err(MetaError::Unauthentic) }
    }

    /// The two copies of a backing directory that parse: first those that speak of its root directory, then by generation.
    /// So another volume's file in the place of one copy, however genuine, does not hide this volume's.
    ///
    /// # Errors
    /// [`MetaError::NotAVolume`], [`MetaError::Lost`], or what is wrong with the better copy if none is usable.
    pub fn read(backing: impl AsFd) -> Result<Vec<Self>, MetaError> {
        let mut found = Vec::new();
        let mut worst = None;
        for name in [VOLUME_FILE, VOLUME_FILE_COPY] {
            match read_copy(&backing, name).and_then(|bytes| Self::parse(&bytes)) {
                Ok(file) => found.push(file),
                Err(MetaError::NotAVolume) => {}
                Err(error) => {
                    worst.get_or_insert(error);
                }
            }
        }
        // A copy from the future means that this program must not touch the volume, whatever the other copy says.
        if let Some(error @ (MetaError::NewerFormat(_) | MetaError::UnknownFeature(_))) = worst {
            return Err(error);
        }
        if found.is_empty() {
            let was = || rustix::fs::statat(&backing, DIR_HEADER, AtFlags::SYMLINK_NOFOLLOW).is_ok();
            return Err(worst.unwrap_or_else(|| if was() { MetaError::Lost } else { MetaError::NotAVolume }));
        }
        let root = DirKeys::claimed_id(backing.as_fd());
        found.sort_by_key(|file| (Some(file.body.root_id) != root, std::cmp::Reverse(file.body.generation)));
        Ok(found)
    }

    /// Seals `body` under every KEK version the ring holds, and writes both copies, each atomically and durably.
    ///
    /// # Errors
    /// The ring's, or the backing filesystem's.
    pub fn write(backing: impl AsFd, body: &Body, keys: &Keyring) -> Result<(), MetaError> {
        let line = to_line(body)?;
        let mut auth = AuthLine { auth: Vec::new() };
        for (scope, version) in keys.held() {
            let mac = keys.volume_mac(scope, version, &[b"lethefs/1/volume-file", &line])?;
            auth.auth.push(Auth { scope, version, mac: hex(&mac) });
        }
        write_copies(backing, &line, &auth)
    }

    /// Makes both copies what the better of them is: `body`, or an authentic one of a higher generation that came to be since `body` was
    /// read. What is right already is left alone.
    ///
    /// # Errors
    /// The ring's, or the backing filesystem's; somebody else is changing the file.
    pub fn heal(backing: impl AsFd, body: &Body, keys: &Keyring) -> Result<(), MetaError> {
        let Some(lock) = WriteLock::take(&backing, HEAL_PATIENCE)? else {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "another lethefs changes it just now").into());
        };
        let copies = Self::read(&backing)?;
        let authentic: Vec<&Body> = copies.iter().filter_map(|copy| copy.authenticate(keys).ok()).collect();
        let best = authentic.iter().copied().chain([body]).max_by_key(|body| body.generation).unwrap_or(body);
        if authentic.len() == 2 && authentic.iter().all(|copy| *copy == best) {
            return Ok(());
        }
        lock.write(best, keys)
    }

    /// Writes the body of an erased volume. Its key is gone, so nothing can authenticate it: it is for people.
    ///
    /// # Errors
    /// The backing filesystem's.
    pub fn write_tombstone(backing: impl AsFd, body: &Body) -> Result<(), MetaError> {
        write_copies(backing, &to_line(body)?, &AuthLine { auth: Vec::new() })
    }
}

/// The right to change a volume file: held by whoever reads it, thinks, and writes. Needs no lock of the volume, so that it works
/// beside a mount, which never writes the file but when it begins.
pub struct WriteLock {
    dir: std::os::fd::OwnedFd,
    _file: std::fs::File,
}

impl WriteLock {
    /// Takes it, and waits for others that long. `None`: somebody has it still.
    ///
    /// # Errors
    /// [`MetaError::NotAVolume`], or the backing filesystem's.
    pub fn take(backing: impl AsFd, patience: Duration) -> Result<Option<Self>, MetaError> {
        let until = Instant::now() + patience;
        loop {
            // The copy that is replaced last: who waited for the old one then finds it replaced. If it is missing, or something else
            // stands in its place, the other.
            let (name, fd) = match storage::open_file(backing.as_fd(), VOLUME_FILE_COPY, false) {
                Ok(fd) => (VOLUME_FILE_COPY, fd),
                Err(_) => match storage::open_file(backing.as_fd(), VOLUME_FILE, false) {
                    Ok(fd) => (VOLUME_FILE, fd),
                    Err(Errno::NOENT) => return Err(MetaError::NotAVolume),
                    Err(errno) => return Err(errno.into()),
                },
            };
            let file = std::fs::File::from(fd);
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    let (held, there) =
                        (rustix::fs::fstat(&file)?, rustix::fs::statat(&backing, name, AtFlags::SYMLINK_NOFOLLOW));
                    if there.is_ok_and(|there| (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)) {
                        return Ok(Some(Self { dir: backing.as_fd().try_clone_to_owned()?, _file: file }));
                    }
                }
                Err(Errno::WOULDBLOCK) if Instant::now() >= until => return Ok(None),
                Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(10)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Writes both copies, as [`VolumeFile::write`].
    ///
    /// # Errors
    /// The ring's, or the backing filesystem's.
    pub fn write(&self, body: &Body, keys: &Keyring) -> Result<(), MetaError> {
        VolumeFile::write(&self.dir, body, keys)
    }
}

impl Body {
    fn check(&self) -> Result<(), &'static str> {
        let [scope] = self.scopes.as_slice() else { return Err("format 1 has exactly one scope") };
        if scope.id != 0 {
            return Err("format 1 has only scope 0");
        }
        if !scope.keks.iter().any(|kek| kek.version == scope.current) {
            return Err("its current KEK version is not listed");
        }
        for (n, kek) in scope.keks.iter().enumerate() {
            if kek.version == 0 || scope.keks[..n].iter().any(|other| other.version == kek.version) {
                return Err("a KEK version is zero or listed twice");
            }
            if unhex::<32>(&kek.commitment).is_none() {
                return Err("a commitment is not 64 hex digits");
            }
        }
        Ok(())
    }

    /// Scope 0.
    pub fn scope(&self) -> &Scope {
        &self.scopes[0]
    }

    /// Scope 0.
    pub fn scope_mut(&mut self) -> &mut Scope {
        &mut self.scopes[0]
    }
}

impl KekRecord {
    /// The slots that were taken out, oldest first, without what they had wrapped: their keys open copies of the volume file from before.
    pub fn removed(&self) -> Vec<Slot> {
        let list = self.extra.get(REMOVED).cloned().unwrap_or_default();
        serde_json::from_value(list).unwrap_or_default()
    }

    /// Takes a slot out, and remembers that it was. `None`: there is no such slot.
    pub fn remove(&mut self, id: u32) -> Option<Slot> {
        let at = self.slots.iter().position(|slot| slot.id == id)?;
        let slot = self.slots.remove(at);
        let mut removed = self.removed();
        removed.push(Slot { wrapped: Wrapped(String::new()), canary: Wrapped(String::new()), ..slot.clone() });
        self.extra.insert(REMOVED.into(), serde_json::to_value(removed).unwrap_or_default());
        Some(slot)
    }

    /// A number that no slot has or had.
    pub fn next_slot(&self) -> u32 {
        self.slots.iter().map(|slot| slot.id).chain(self.removed().iter().map(|slot| slot.id)).max().unwrap_or(0) + 1
    }

    /// The commitment's bytes.
    pub fn commitment(&self) -> [u8; 32] {
        unhex(&self.commitment).unwrap_or_default()
    }
}

/// Checks a label: at most [`MAX_LABEL`] bytes, no control characters.
///
/// # Errors
/// One line that says so.
pub fn check_label(label: &str) -> Result<(), String> {
    if label.len() > MAX_LABEL {
        return Err(format!("a label has at most {MAX_LABEL} bytes"));
    }
    if label.chars().any(char::is_control) {
        return Err("a label has no control characters".into());
    }
    Ok(())
}

fn to_line<T: Serialize>(value: &T) -> Result<Vec<u8>, MetaError> {
    serde_json::to_vec(value).map_err(|error| MetaError::Damaged(error.to_string()))
}

fn read_copy(backing: &impl AsFd, name: &str) -> Result<Vec<u8>, MetaError> {
    use std::io::Read as _;
    let fd = match storage::open_file(backing.as_fd(), name, false) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Err(MetaError::NotAVolume),
        Err(Errno::LOOP) => return Err(MetaError::Damaged(format!("{name} is a symlink"))),
        Err(Errno::NXIO) => return Err(MetaError::Damaged(format!("{name} is not a regular file"))),
        Err(errno) => return Err(errno.into()),
    };
    let mut bytes = Vec::new();
    std::fs::File::from(fd).take(MAX_LEN + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(MetaError::Damaged(format!("{name} is larger than 1 MiB")));
    }
    Ok(bytes)
}

fn write_copies(backing: impl AsFd, line: &[u8], auth: &AuthLine) -> Result<(), MetaError> {
    let mut bytes = line.to_vec();
    bytes.push(b'\n');
    bytes.extend(to_line(auth)?);
    bytes.push(b'\n');
    for name in [VOLUME_FILE, VOLUME_FILE_COPY] {
        replace_file(&backing, name, &bytes)?;
    }
    Ok(())
}

/// Replaces a file of the backing root atomically and durably: temporary name, fsync, rename, fsync of the directory.
///
/// # Errors
/// The backing filesystem's; the old file is then still whole.
pub fn replace_file(backing: impl AsFd, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = super::format::temporary_name()?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(&backing, &*temporary, flags, Mode::RUSR | Mode::WUSR)?;
    let mut file = std::fs::File::from(fd);
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| Ok(rustix::fs::renameat(&backing, &*temporary, &backing, name)?));
    if let Err(error) = written {
        let _ = rustix::fs::unlinkat(&backing, &*temporary, AtFlags::empty());
        return Err(error);
    }
    Ok(rustix::fs::fsync(&backing)?)
}

/// Opens a backing directory for everything below it.
///
/// # Errors
/// The system's: no such directory, no right.
pub fn open_backing(path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}
