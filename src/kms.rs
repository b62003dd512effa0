//! Key services: what a mount host may ask of one ([`KeySource`]), what its administrator may ([`KeyAdmin`]), and the
//! providers. Knows nothing of volumes beyond the [`Binding`] bytes, and nothing of files.
//!
//! Every provider answers failures with one [`KmsError`] whose [`Failure`] class is all that callers decide by.
//! How each server's replies map to classes is written down, provider by provider, in `docs/KMS.md`.

#[cfg(feature = "kms-file")]
pub mod file;
#[cfg(feature = "kms-transit")]
pub mod transit;
pub mod uri;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::crypto::{Key32, VolumeId};

pub use uri::KeyUri;

/// What a wrapped key is bound to at the KMS, so that it opens nowhere else (docs/FORMAT.md section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The volume.
    pub volume: VolumeId,
    /// The scope within it; format 1 has only 0.
    pub scope: u32,
    /// The KEK's version, from 1.
    pub version: u32,
    /// What the key is for.
    pub purpose: Purpose,
}

/// What a key made by the KMS is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The key-encryption key itself.
    Kek,
    /// A throw-away key that only shows whether the KMS still unwraps.
    Canary,
}

impl Binding {
    /// The bytes handed to the KMS as context or associated data.
    pub fn bytes(&self) -> Vec<u8> {
        let purpose: &[u8] = match self.purpose {
            Purpose::Kek => b"kek/",
            Purpose::Canary => b"canary/",
        };
        let mut bytes = b"lethefs/1/".to_vec();
        bytes.extend_from_slice(purpose);
        bytes.extend_from_slice(&self.volume.0);
        bytes.extend_from_slice(&self.scope.to_le_bytes());
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes
    }
}

/// A key as the KMS wrapped it: text that only that KMS key opens. Not secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrapped(pub String);

/// The facts that identify a KMS key for ever: a key made later under the same name differs in at least one.
///
/// Stored in the volume file and in the pin. Holds no address, path or credential: those are the host's business.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "provider", rename_all = "lowercase", deny_unknown_fields)]
pub enum KeyIdentity {
    /// A key of an OpenBao or Vault Transit engine.
    Transit {
        /// Path of the Transit engine, `transit` by default.
        engine: String,
        /// The engine's own id, which stays when the engine is moved and differs when another is put in its place.
        engine_uuid: String,
        /// Name of the key in it.
        key: String,
        /// Namespace, empty for the root namespace.
        namespace: String,
        /// Version of the key that wrapped.
        key_version: u32,
        /// When that version was made: Unix time in seconds, by the server's clock.
        key_version_created: i64,
        /// The cluster's id as `sys/health` gives it.
        cluster_id: String,
        /// Transit's name of the key's type, as in `aes256-gcm96`.
        key_type: String,
    },
    /// A key file on this machine.
    File {
        /// Random id inside the key file.
        key_id: VolumeId,
        /// When the file was made, RFC 3339.
        created: String,
    },
    /// A recovery key: no service has it, only its shares on paper. Opens by `keys` alone, never at a mount.
    Recovery {
        /// Random id, which the shares carry.
        recovery_id: VolumeId,
        /// When it was made, RFC 3339.
        created: String,
        /// So many shares are needed,
        threshold: u8,
        /// of so many.
        shares: u8,
    },
    /// A key of a service that this program does not know. Kept as it is, and good for nothing.
    #[serde(untagged)]
    Foreign(ForeignIdentity),
}

/// An identity with a `provider` that this program does not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Map<String, serde_json::Value>")]
pub struct ForeignIdentity(serde_json::Map<String, serde_json::Value>);

impl ForeignIdentity {
    /// What it says the service is.
    pub fn provider(&self) -> &str {
        self.0.get("provider").and_then(serde_json::Value::as_str).unwrap_or_default()
    }
}

impl TryFrom<serde_json::Map<String, serde_json::Value>> for ForeignIdentity {
    type Error = &'static str;

    /// Not for services that are known: of those every field must be.
    fn try_from(fields: serde_json::Map<String, serde_json::Value>) -> Result<Self, Self::Error> {
        match fields.get("provider").and_then(serde_json::Value::as_str) {
            None | Some("transit" | "file" | "recovery" | "") => Err("not an identity of a key"),
            Some(_) => Ok(Self(fields)),
        }
    }
}

impl KeyIdentity {
    /// What an administrator types to confirm that this very key goes: Transit's key name, a key file's id.
    pub fn name(&self) -> String {
        match self {
            Self::Transit { key, .. } => key.clone(),
            Self::File { key_id, .. } => key_id.to_string(),
            Self::Recovery { recovery_id, .. } => recovery_id.to_string(),
            Self::Foreign(foreign) => foreign.provider().to_owned(),
        }
    }

    /// The same KMS key, whichever of its versions wrapped. (Destroying one destroys the other.)
    pub fn same_key(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Transit { engine_uuid, key, namespace, cluster_id, .. },
                Self::Transit { engine_uuid: u, key: k, namespace: n, cluster_id: c, .. },
            ) => (engine_uuid, key, namespace, cluster_id) == (u, k, n, c),
            (Self::File { key_id, .. }, Self::File { key_id: other, .. }) => key_id == other,
            (Self::Recovery { recovery_id, .. }, Self::Recovery { recovery_id: other, .. }) => recovery_id == other,
            (Self::Foreign(this), Self::Foreign(other)) => this == other,
            _ => false,
        }
    }
}

/// One line for people, as in "Transit key vol1 (engine transit, cluster 5e…)".
impl fmt::Display for KeyIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transit { engine, key, namespace, key_version, cluster_id, .. } => {
                write!(f, "Transit key {key} version {key_version} (engine {engine}, ")?;
                if !namespace.is_empty() {
                    write!(f, "namespace {namespace}, ")?;
                }
                write!(f, "cluster {cluster_id})")
            }
            Self::File { key_id, .. } => write!(f, "key file with id {key_id}"),
            Self::Recovery { recovery_id, threshold, shares, .. } => {
                write!(f, "recovery key {recovery_id}, any {threshold} of {shares} shares")
            }
            Self::Foreign(foreign) => write!(f, "key of a service that is not known here: {}", foreign.provider()),
        }
    }
}

/// A key that the KMS made: once in clear for us, once wrapped for the volume file.
pub struct MadeKey {
    /// The key.
    pub key: Key32,
    /// The key under the KMS key.
    pub wrapped: Wrapped,
    /// What identifies the KMS key that wrapped it.
    pub identity: KeyIdentity,
}

/// A given key under a KMS key.
pub struct WrappedKey {
    /// It.
    pub wrapped: Wrapped,
    /// What identifies the KMS key that wrapped it.
    pub identity: KeyIdentity,
}

/// What a provider can tell of its key without using it.
#[derive(Clone, Debug, Serialize)]
pub struct KeyDescription {
    /// Identity of the newest version.
    pub identity: KeyIdentity,
    /// Whether an erase through it survives a later break of RSA or elliptic curves.
    pub quantum_durable: bool,
    /// Properties that weaken an erase, each a sentence: exportable, backed up in plaintext, imported, ….
    pub warnings: Vec<String>,
    /// Whether the server would let somebody with the right destroy it now (Transit: `deletion_allowed`).
    pub deletion_allowed: bool,
}

/// What these credentials may do with the key, as far as the service tells (`keys check`).
#[derive(Clone, Debug, Serialize)]
pub struct Permissions {
    /// Make KEKs under it. `None`: the service does not tell.
    pub make: Option<bool>,
    /// Unwrap.
    pub unwrap: Option<bool>,
    /// Read its description, needed to tell a destroyed key from a missing permission.
    pub describe: Option<bool>,
    /// Suspend it reversibly.
    pub suspend: Option<bool>,
    /// Destroy it.
    pub destroy: Option<bool>,
}

/// The mount host's side of a key service.
pub trait KeySource: Send + Sync {
    /// Makes a new 256-bit key, wrapped and bound.
    ///
    /// # Errors
    /// Any [`KmsError`]. Refuses a KMS key that cannot bind (Transit: one that is not `derived`).
    fn make(&self, binding: &Binding) -> Result<MadeKey, KmsError>;

    /// Wraps a given key, as [`make`](Self::make) does with a new one: a KEK gets a further slot. Makes no key at a
    /// service that is not there.
    /// An administrator's right, not a mount host's, where the service tells them apart.
    ///
    /// # Errors
    /// Any [`KmsError`]; [`Failure::Unsuitable`] if the provider cannot.
    fn wrap(&self, binding: &Binding, key: &Key32) -> Result<WrappedKey, KmsError> {
        let _ = (binding, key);
        Err(KmsError::new(
            Failure::Unsuitable,
            "this key service cannot wrap a given key: use another for a further slot",
        ))
    }

    /// Unwraps with one request (besides a login). `identity` is what the slot recorded; on failure it serves to tell
    /// why, with as many further requests as that needs.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn unwrap(&self, binding: &Binding, wrapped: &Wrapped, identity: &KeyIdentity) -> Result<Key32, KmsError>;

    /// Describes the key as it is now.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn describe(&self) -> Result<KeyDescription, KmsError>;

    /// What these credentials may do.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn permissions(&self) -> Result<Permissions, KmsError>;

    /// The service's own number of the last [`make`](Self::make) or [`unwrap`](Self::unwrap) that succeeded, for the audit log.
    /// `None`: it gives none.
    fn last_request_id(&self) -> Option<String> {
        None
    }
}

/// What the service says of the way to destruction after a step of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Destruction {
    /// Unusable now, but whoever has the right can bring it back.
    Suspended,
    /// Will be destroyed at this time (RFC 3339), and can be brought back until then.
    Scheduled {
        /// Not before.
        at: String,
    },
    /// The service carried the destruction out; the proof is another call.
    CarriedOut,
}

/// Evidence that a key no longer exists, each finding as the service worded it.
#[derive(Clone, Debug, Serialize)]
pub struct Proof {
    /// Whether this is a key service's word or only our own (`file://`).
    pub self_asserted: bool,
    /// When, RFC 3339, by this machine's clock.
    pub at: String,
    /// The parts of the rule, in order.
    pub findings: Vec<Finding>,
}

/// One part of a [`Proof`].
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was asked, as in `POST transit/decrypt/vol1`.
    pub asked: String,
    /// HTTP status or the like, and the body, verbatim.
    pub answered: String,
    /// What it shows.
    pub shows: String,
}

/// The administrator's side of a key service. Needs other credentials than the mount's.
pub trait KeyAdmin: Send + Sync {
    /// Describes the key as it is now.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn describe(&self) -> Result<KeyDescription, KmsError>;

    /// Makes the key unusable but restorable, where the service can. `Ok(None)`: it has no such state.
    /// A key that is already suspended is a success. Refuses, having changed nothing, a key that is not `identity`, as
    /// [`destroy`](Self::destroy) does.
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn suspend(&self, identity: &KeyIdentity) -> Result<Option<Destruction>, KmsError>;

    /// Undoes [`suspend`](Self::suspend).
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn restore(&self) -> Result<(), KmsError>;

    /// Destroys the key or schedules it. Refuses, having changed nothing, a key that is not `identity`
    /// (another cluster, or re-created under the same name). A key that is already gone is [`Destruction::CarriedOut`].
    ///
    /// # Errors
    /// Any [`KmsError`].
    fn destroy(&self, identity: &KeyIdentity) -> Result<Destruction, KmsError>;

    /// Asks for proof that `identity` no longer exists. `probe` is something the key had wrapped, if at hand.
    ///
    /// # Errors
    /// [`Failure::NotDestroyed`] with what is still there, or what kept us from finding out.
    fn prove_destroyed(&self, identity: &KeyIdentity, probe: Option<(&Binding, &Wrapped)>) -> Result<Proof, KmsError>;

    /// The service's own number of the last change that succeeded, for the audit log. `None`: it gives none.
    fn last_request_id(&self) -> Option<String> {
        None
    }
}

impl Failure {
    /// The class as one word, as JSON and the audit log write it.
    pub fn word(self) -> String {
        let word = serde_json::to_value(self).ok();
        word.and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// Why a key service did not do what was asked. Callers decide by this alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// No answer: refused, timed out, name not resolved, TLS not established. May pass.
    Unreachable,
    /// The server answers but cannot serve now: sealed, standby, rate-limited, 5xx. May pass.
    Unavailable,
    /// Who answers cannot be shown to be the right server: wrong CA or name. Does not pass by itself.
    Untrusted,
    /// The credentials are not accepted, and logging in again did not help.
    Unauthenticated,
    /// The credentials are good but do not allow this.
    Denied,
    /// The key exists and has been switched off reversibly: soft-deleted, disabled, version below the minimum.
    Suspended,
    /// The key is not there, and nothing more than that is shown.
    Missing,
    /// The key is destroyed: every part of the proof is there.
    Destroyed,
    /// Another key stands under the same name.
    Recreated,
    /// The KMS rejects the wrapped key as not authentic: damaged, or bound to another volume.
    BadData,
    /// The key service's answer is not understood, or larger than allowed.
    Protocol,
    /// The local configuration is missing or wrong: address, token, CA file, URI.
    Config,
    /// A KMS key that must not be used for this: cannot bind, wrong type.
    Unsuitable,
    /// A destruction that was asked for is not (yet) proved.
    NotDestroyed,
}

/// A failure of a key service: its class, one line for people, and what the service said.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct KmsError {
    /// The class.
    pub failure: Failure,
    /// What happened and what to do, on one line, without secrets.
    pub message: String,
    /// The service's own words, for the log; free of secrets.
    pub detail: Option<String>,
    /// The underlying error.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl KmsError {
    /// An error of this class with this line.
    pub fn new(failure: Failure, message: impl Into<String>) -> Self {
        Self { failure, message: message.into(), detail: None, source: None }
    }

    /// Adds the service's own words.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds the underlying error.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }
}

/// The mount host's side of the key that `uri` names, configured from this host's environment.
/// Nothing is contacted and no file opened before the first call.
///
/// # Errors
/// [`Failure::Config`] if this build lacks the provider or the environment lacks what it needs.
pub fn source(uri: &KeyUri) -> Result<Box<dyn KeySource>, KmsError> {
    match uri {
        #[cfg(feature = "kms-transit")]
        KeyUri::Transit(key) => Ok(Box::new(transit::Transit::from_env(key)?)),
        #[cfg(feature = "kms-file")]
        KeyUri::File(path) => Ok(Box::new(file::KeyFile::new(path))),
        #[allow(unreachable_patterns)]
        _ => Err(not_built(uri)),
    }
}

/// The administrator's side of the key that `uri` names.
///
/// # Errors
/// As [`source`].
pub fn admin(uri: &KeyUri) -> Result<Box<dyn KeyAdmin>, KmsError> {
    match uri {
        #[cfg(feature = "kms-transit")]
        KeyUri::Transit(key) => Ok(Box::new(transit::Transit::from_env(key)?)),
        #[cfg(feature = "kms-file")]
        KeyUri::File(path) => Ok(Box::new(file::KeyFile::new(path))),
        #[allow(unreachable_patterns)]
        _ => Err(not_built(uri)),
    }
}

#[allow(dead_code)]
fn not_built(uri: &KeyUri) -> KmsError {
    KmsError::new(
        Failure::Config,
        format!("this build of lethefs cannot talk to {uri}: rebuild it with that provider's feature"),
    )
}
