//! What the server tells of a Transit key, and whether such a key may be used here. Asks nothing itself.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::kms::{Failure, KmsError};

/// The `data` of `GET ENGINE/keys/KEY`.
#[derive(Debug, Deserialize)]
pub(super) struct KeyInfo {
    #[serde(rename = "type")]
    pub(super) key_type: String,
    #[serde(default)]
    derived: bool,
    #[serde(default)]
    convergent_encryption: bool,
    #[serde(default)]
    exportable: bool,
    #[serde(default)]
    allow_plaintext_backup: bool,
    #[serde(default)]
    imported_key: bool,
    #[serde(default)]
    pub(super) deletion_allowed: bool,
    /// OpenBao's; Vault does not have it.
    #[serde(default)]
    pub(super) soft_deleted: bool,
    pub(super) latest_version: u32,
    /// Versions below have been trimmed away; 0 if none ever was.
    #[serde(default)]
    pub(super) min_available_version: u32,
    #[serde(default)]
    pub(super) min_decryption_version: u32,
    /// Versions from `min_decryption_version` on.
    keys: BTreeMap<String, Version>,
}

/// A version is a number for symmetric keys, an object with the public key for others.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Version {
    Created(i64),
    Public { creation_time: String },
}

/// The `data` of `GET sys/internal/ui/mounts/ENGINE`.
#[derive(Debug, Deserialize)]
pub(super) struct EngineInfo {
    pub(super) path: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) uuid: String,
}

/// The body of `GET sys/health`.
#[derive(Debug, Deserialize)]
pub(super) struct Health {
    #[serde(default)]
    pub(super) cluster_id: String,
    #[serde(default)]
    pub(super) sealed: bool,
}

/// What a look at a recorded version shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SameVersion {
    /// The version is there and as old as recorded.
    Yes,
    /// It is there and was made at another time, or the key does not have that many versions.
    No,
    /// It is not listed: below the minimum, or trimmed away.
    Hidden,
}

impl KeyInfo {
    /// When a version was made, in Unix seconds, if the server lists it.
    pub(super) fn created(&self, version: u32) -> Option<i64> {
        match self.keys.get(&version.to_string())? {
            Version::Created(seconds) => Some(*seconds),
            Version::Public { creation_time } => creation_time.parse::<jiff::Timestamp>().ok().map(|t| t.as_second()),
        }
    }

    /// Whether this is the key of which a version and its age were recorded.
    pub(super) fn is_same(&self, version: u32, created: i64) -> SameVersion {
        match self.created(version) {
            Some(now) if now == created => SameVersion::Yes,
            Some(_) => SameVersion::No,
            None if version > self.latest_version => SameVersion::No,
            // A version is never older than the one before it, so an older successor shows another key too.
            None if self.created(self.latest_version).is_some_and(|latest| latest < created) => SameVersion::No,
            None => SameVersion::Hidden,
        }
    }

    /// Symmetric and authenticated: the types under which a destroyed key stays destroyed.
    fn is_aead(&self) -> bool {
        matches!(self.key_type.as_str(), "aes256-gcm96" | "chacha20-poly1305" | "xchacha20-poly1305")
    }

    pub(super) fn quantum_durable(&self) -> bool {
        self.is_aead()
    }

    /// Refuses a key that cannot bind or cannot be trusted to stay destroyed.
    pub(super) fn check_suitable(&self, what: &str, engine: &str, key: &str) -> Result<(), KmsError> {
        let fault = if !self.is_aead() {
            format!("is of type {}", self.key_type)
        } else if !self.derived {
            "is not derived, so it cannot bind a wrapped key to its volume".to_owned()
        } else if self.convergent_encryption {
            "encrypts convergently".to_owned()
        } else if self.soft_deleted {
            return Err(KmsError::new(
                Failure::Suspended,
                format!("{what} is soft-deleted: have it restored, or use another key"),
            ));
        } else {
            return Ok(());
        };
        let command = create_command(engine, key);
        Err(KmsError::new(
            Failure::Unsuitable,
            format!("{what} {fault}: make another under a new name, as in `{command}`"),
        ))
    }

    /// Properties that weaken an erase.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut warn = |applies: bool, text: &str| {
            if applies {
                warnings.push(text.to_owned());
            }
        };
        warn(self.exportable, "The key is exportable: copies of it may exist that survive its destruction.");
        warn(
            self.allow_plaintext_backup,
            "The key allows plaintext backups: one may exist that survives its destruction.",
        );
        warn(self.imported_key, "The key was imported: whoever made it may still hold it.");
        warn(!self.is_aead(), "The key's type is not one that lethefs makes keys under.");
        warn(!self.derived, "The key is not derived: it cannot bind a wrapped key to its volume.");
        warn(self.soft_deleted, "The key is soft-deleted: nothing opens until it is restored.");
        warnings
    }
}

/// What an administrator types to make a right key.
pub(super) fn create_command(engine: &str, key: &str) -> String {
    format!("bao write -f {engine}/keys/{key} type=aes256-gcm96 derived=true")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(text: &str) -> KeyInfo {
        serde_json::from_str(text).expect(text)
    }

    #[test]
    fn versions_are_told_apart_by_age() {
        let key =
            info(r#"{"type":"aes256-gcm96","latest_version":4,"min_decryption_version":3,"keys":{"3":300,"4":400}}"#);
        assert_eq!(key.is_same(3, 300), SameVersion::Yes);
        assert_eq!(key.is_same(3, 301), SameVersion::No);
        assert_eq!(key.is_same(5, 500), SameVersion::No);
        assert_eq!(key.is_same(2, 200), SameVersion::Hidden);
        assert_eq!(key.is_same(2, 500), SameVersion::No);
        let rsa =
            info(r#"{"type":"rsa-2048","latest_version":1,"keys":{"1":{"creation_time":"1970-01-01T00:01:40.5Z"}}}"#);
        assert_eq!(rsa.is_same(1, 100), SameVersion::Yes);
        assert!(!rsa.quantum_durable());
    }

    #[test]
    fn unsuitable_keys_are_refused_with_the_remedy() {
        for (text, fault) in [
            (r#"{"type":"rsa-2048","latest_version":1,"keys":{}}"#, "is of type rsa-2048"),
            (r#"{"type":"aes128-gcm96","derived":true,"latest_version":1,"keys":{}}"#, "is of type aes128-gcm96"),
            (r#"{"type":"aes256-gcm96","latest_version":1,"keys":{}}"#, "is not derived"),
            (
                r#"{"type":"aes256-gcm96","derived":true,"convergent_encryption":true,"latest_version":1,"keys":{}}"#,
                "convergently",
            ),
        ] {
            let error = info(text).check_suitable("Transit key k", "t", "k").expect_err(text);
            assert_eq!(error.failure, Failure::Unsuitable);
            assert!(error.message.contains(fault), "{error}");
            assert!(error.message.contains("bao write -f t/keys/k type=aes256-gcm96 derived=true"), "{error}");
        }
        let fine =
            info(r#"{"type":"xchacha20-poly1305","derived":true,"exportable":true,"latest_version":1,"keys":{}}"#);
        assert!(fine.check_suitable("k", "t", "k").is_ok());
        assert_eq!(fine.warnings().len(), 1);
    }
}
