//! What AWS KMS tells of a key, and whether such a key may be used here. Asks nothing itself.

use aws_sdk_kms::primitives::DateTime;
use aws_sdk_kms::types::{KeyManagerType, KeyMetadata, KeySpec, KeyState, KeyUsageType, OriginType};

use crate::kms::{Failure, KeyIdentity, KmsError};

/// `KeyMetadata`, as far as it counts.
pub(super) struct KeyInfo {
    pub(super) arn: String,
    created: i64,
    pub(super) state: KeyState,
    pub(super) deletion_date: Option<DateTime>,
    origin: OriginType,
    spec: KeySpec,
    usage: Option<KeyUsageType>,
    managed_by_aws: bool,
    multi_region: bool,
    expires: bool,
}

impl KeyInfo {
    pub(super) fn new(metadata: KeyMetadata) -> Result<Self, KmsError> {
        let odd = |what: &str| KmsError::new(Failure::Protocol, format!("AWS KMS described a key without its {what}"));
        let arn = metadata.arn.ok_or_else(|| odd("ARN"))?;
        // Goes into the volume file, into messages and back into requests.
        if arn.len() > 256 || !arn.starts_with("arn:") || !arn.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(odd("ARN"));
        }
        Ok(Self {
            arn,
            created: metadata.creation_date.ok_or_else(|| odd("date"))?.secs(),
            state: metadata.key_state.ok_or_else(|| odd("state"))?,
            deletion_date: metadata.deletion_date,
            origin: metadata.origin.ok_or_else(|| odd("origin"))?,
            spec: metadata.key_spec.ok_or_else(|| odd("spec"))?,
            usage: metadata.key_usage,
            managed_by_aws: metadata.key_manager == Some(KeyManagerType::Aws),
            multi_region: metadata.multi_region.unwrap_or_default(),
            expires: metadata.valid_to.is_some(),
        })
    }

    pub(super) fn identity(&self) -> KeyIdentity {
        KeyIdentity::Aws {
            key_arn: self.arn.clone(),
            created: self.created,
            origin: self.origin.as_str().to_owned(),
            key_spec: self.spec.as_str().to_owned(),
        }
    }

    /// `SYMMETRIC_DEFAULT` is AES-256-GCM, but SM4 with its 128 bits in the regions of China.
    pub(super) fn quantum_durable(&self) -> bool {
        self.spec == KeySpec::SymmetricDefault && !self.arn.starts_with("arn:aws-cn:")
    }

    /// Refuses a key that cannot bind, or that its owner cannot destroy.
    pub(super) fn check_suitable(&self) -> Result<(), KmsError> {
        let arn = &self.arn;
        let fault = if self.spec != KeySpec::SymmetricDefault || self.usage != Some(KeyUsageType::EncryptDecrypt) {
            format!("is of type {}, not a symmetric key for encryption", self.spec.as_str())
        } else if self.managed_by_aws {
            "is managed by AWS: you could not destroy it".to_owned()
        } else {
            return match self.state {
                KeyState::Enabled => Ok(()),
                KeyState::Creating | KeyState::Updating | KeyState::Unavailable => Err(KmsError::new(
                    Failure::Unavailable,
                    format!("AWS KMS key {arn} is {} now: try again", self.state.as_str()),
                )),
                _ => Err(KmsError::new(
                    Failure::Suspended,
                    format!("AWS KMS key {arn} is {}: have it restored, or use another key", self.state.as_str()),
                )),
            };
        };
        Err(KmsError::new(
            Failure::Unsuitable,
            format!("AWS KMS key {arn} {fault}: make another, as docs/KMS.md shows"),
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
        warn(
            self.origin == OriginType::External,
            "The key's material was imported: whoever made it may still hold it, and can import it again even after it was \
             deleted.",
        );
        warn(self.expires, "The key's imported material expires: the volume cannot be opened after that.");
        warn(
            matches!(self.origin, OriginType::AwsCloudhsm | OriginType::ExternalKeyStore),
            "The key's material is in a key store of its own: AWS KMS cannot show that it is gone there.",
        );
        warn(
            self.multi_region,
            "The key is a multi-region key: its replicas have the same material and open the volume as long as one of them \
             exists.",
        );
        warn(
            self.spec != KeySpec::SymmetricDefault,
            "The key is not symmetric: lethefs makes no keys under it, and a later break of its algorithm would undo an erase.",
        );
        warn(self.arn.starts_with("arn:aws-cn:"), "Keys in the regions of China have 128 bits (SM4).");
        warn(self.managed_by_aws, "The key is managed by AWS: you cannot destroy it.");
        warn(self.state == KeyState::Disabled, "The key is disabled: nothing opens until it is enabled.");
        warn(
            matches!(self.state, KeyState::PendingDeletion | KeyState::PendingReplicaDeletion),
            "The key is scheduled for deletion: nothing opens unless that is cancelled.",
        );
        warn(self.state == KeyState::PendingImport, "The key has no material: nothing opens until it is imported.");
        warnings
    }
}
