//! The administrator's side of a key of AWS KMS: disable, enable, schedule its deletion, prove.
//!
//! Needs other rights than a mount's (docs/KMS.md has the policies). Nothing is changed before it is shown that the key is
//! the recorded one. A deletion is never at once: AWS KMS waits for 7 to 30 days.

use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use aws_sdk_kms::types::KeyState;

use super::classify::{Meaning, Refused};
use super::key::KeyInfo;
use super::{Aws, parse};
use crate::crypto::VolumeId;
use crate::kms::{
    Binding, Destruction, Failure, Finding, KeyAdmin, KeyDescription, KeyIdentity, KeySource, KmsError, Proof, Purpose,
    Wrapped,
};

fn not_destroyed(message: impl Into<String>) -> KmsError {
    KmsError::new(Failure::NotDestroyed, message)
}

/// That this very key does not exist, in the service's words: an answer about another key, or from something that is not
/// AWS KMS, is no evidence.
fn says_gone(refused: &Refused, arn: &str) -> bool {
    refused.meaning == Meaning::NoKey && refused.said.contains(&format!("'{arn}'"))
}

impl Aws {
    /// The recorded key. `Ok(None)`: there is none. Refuses another.
    fn verified(&self, identity: &KeyIdentity) -> Result<Option<KeyInfo>, KmsError> {
        let arn = self.recorded(identity)?;
        let info = match self.info(arn) {
            Ok(info) => info,
            Err(refused) if refused.meaning == Meaning::NoKey => return Ok(None),
            Err(refused) => return Err(refused.error),
        };
        if info.identity() != *identity {
            return Err(KmsError::new(
                Failure::Recreated,
                format!(
                    "AWS KMS key {arn} is not the recorded one: its date, origin or type differ; nothing was changed"
                ),
            ));
        }
        Ok(Some(info))
    }

    fn scheduled(info: &KeyInfo) -> Destruction {
        let at = info.deletion_date.and_then(|date| jiff::Timestamp::from_second(date.secs()).ok());
        match at {
            Some(at) => Destruction::Scheduled { at: at.to_string() },
            // It waits for its replicas, or AWS does not say.
            None => Destruction::Suspended,
        }
    }

    /// The rule: both parts, each about this key, or no proof.
    pub(super) fn evidence(&self, arn: &str, probe: Option<(&Binding, &[u8])>) -> Result<Vec<Finding>, KmsError> {
        let kept = |error: KmsError| KmsError { failure: Failure::NotDestroyed, ..error };
        let described = match self.info(arn) {
            Err(refused) if says_gone(&refused, arn) => Finding {
                asked: format!("DescribeKey KeyId={arn}"),
                answered: refused.said,
                shows: "no key has this ARN; AWS KMS never gives one twice".to_owned(),
            },
            Ok(info) => {
                let until = match Self::scheduled(&info) {
                    Destruction::Scheduled { at } => format!(" until {at}, and its deletion can be cancelled"),
                    _ => String::new(),
                };
                return Err(not_destroyed(format!("AWS KMS key {arn} is there ({}){until}", info.state.as_str())));
            }
            Err(refused) => return Err(kept(refused.error)),
        };
        Ok(vec![described, self.does_not_open(arn, probe)?])
    }

    /// Asks the key to open something; who may not ask that asks for its rotation.
    fn does_not_open(&self, arn: &str, probe: Option<(&Binding, &[u8])>) -> Result<Finding, KmsError> {
        let none = Binding { volume: VolumeId([0; 16]), scope: 0, version: 0, purpose: Purpose::Canary };
        let (binding, blob) = probe.unwrap_or((&none, &[0; 64]));
        let refused = match self.decrypt(arn, binding, blob) {
            Ok(_) => return Err(not_destroyed(format!("AWS KMS key {arn} still opens what it wrapped"))),
            Err(refused) => refused,
        };
        let shows = "the key no longer opens anything".to_owned();
        if says_gone(&refused, arn) {
            return Ok(Finding { asked: format!("Decrypt KeyId={arn}"), answered: refused.said, shows });
        }
        match refused.error.failure {
            // Says nothing of the key: without a probe AWS KMS may look at what is to be opened first.
            Failure::Denied | Failure::BadData | Failure::Protocol => {}
            Failure::Suspended => {
                return Err(not_destroyed(format!("AWS KMS key {arn} is only disabled and can be enabled again")));
            }
            _ if refused.meaning == Meaning::State => {
                let why = self.state(refused, arn);
                return Err(KmsError { failure: Failure::NotDestroyed, ..why });
            }
            _ => return Err(KmsError { failure: Failure::NotDestroyed, ..refused.error }),
        }
        let asked = self.client.call(async |client| client.get_key_rotation_status().key_id(arn).send().await);
        match asked {
            Err(refused) if says_gone(&refused, arn) => Ok(Finding {
                asked: format!("GetKeyRotationStatus KeyId={arn}"),
                answered: refused.said,
                shows: "there is no key of which to tell".to_owned(),
            }),
            Err(refused) => Err(KmsError { failure: Failure::NotDestroyed, ..refused.error }),
            Ok(_) => Err(not_destroyed(format!("AWS KMS key {arn} is there"))),
        }
    }

    /// A change of the key's state; what keeps AWS from making it is told.
    fn change<T, E>(
        &self,
        did: &str,
        ask: impl AsyncFn(&aws_sdk_kms::Client) -> Result<T, SdkError<E, aws_sdk_kms::config::http::HttpResponse>>,
    ) -> Result<T, KmsError>
    where
        T: RequestId,
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        self.client.call(ask).inspect(|reply| self.note(reply)).map_err(|refused| match refused.error.failure {
            Failure::Denied => {
                let line = format!("no policy lets these AWS credentials {did}: see docs/KMS.md for the policy");
                KmsError { message: line, ..refused.error }
            }
            _ => refused.error,
        })
    }
}

impl KeyAdmin for Aws {
    fn describe(&self) -> Result<KeyDescription, KmsError> {
        KeySource::describe(self)
    }

    fn suspend(&self, identity: &KeyIdentity) -> Result<Option<Destruction>, KmsError> {
        let Some(info) = self.verified(identity)? else {
            return Err(KmsError::new(Failure::Missing, format!("{identity} is not there")));
        };
        match info.state {
            KeyState::Disabled
            | KeyState::PendingDeletion
            | KeyState::PendingReplicaDeletion
            | KeyState::PendingImport => {}
            _ => {
                self.change("disable the key", async |client| client.disable_key().key_id(&info.arn).send().await)?;
            }
        }
        Ok(Some(Destruction::Suspended))
    }

    /// Cancels a scheduled deletion, too.
    fn restore(&self) -> Result<(), KmsError> {
        let info = self.info(&self.key.key).map_err(|refused| refused.error)?;
        let arn = &info.arn;
        match info.state {
            KeyState::Enabled => return Ok(()),
            KeyState::PendingDeletion | KeyState::PendingReplicaDeletion => {
                self.change("cancel the key's deletion", async |client| {
                    client.cancel_key_deletion().key_id(arn).send().await
                })?;
            }
            KeyState::PendingImport => {
                return Err(KmsError::new(
                    Failure::Suspended,
                    format!("AWS KMS key {arn} has lost its imported material: who kept it can import it again"),
                ));
            }
            _ => {}
        }
        // A cancelled deletion leaves the key disabled.
        self.change("enable the key", async |client| client.enable_key().key_id(arn).send().await)?;
        Ok(())
    }

    fn may_destroy(&self, identity: &KeyIdentity) -> Result<Option<bool>, KmsError> {
        Ok(match self.verified(identity)? {
            None => Some(true),
            Some(info) if matches!(info.state, KeyState::PendingDeletion | KeyState::PendingReplicaDeletion) => {
                Some(true)
            }
            Some(_) => None,
        })
    }

    fn destroy(&self, identity: &KeyIdentity) -> Result<Destruction, KmsError> {
        let Some(info) = self.verified(identity)? else { return Ok(Destruction::CarriedOut) };
        if matches!(info.state, KeyState::PendingDeletion | KeyState::PendingReplicaDeletion) {
            return Ok(Self::scheduled(&info));
        }
        let days = self.client.config().deletion_days;
        self.change("schedule the key's deletion", async |client| {
            client.schedule_key_deletion().key_id(&info.arn).pending_window_in_days(days).send().await
        })?;
        tracing::info!(key = %info.arn, days, "AWS KMS has scheduled the deletion");
        // The description has the date, as every later look at it.
        let info = self.info(&info.arn).map_err(|refused| refused.error)?;
        Ok(Self::scheduled(&info))
    }

    fn prove_destroyed(&self, identity: &KeyIdentity, probe: Option<(&Binding, &Wrapped)>) -> Result<Proof, KmsError> {
        let arn = self.recorded(identity)?;
        let blob = probe.and_then(|(binding, wrapped)| Some((binding, parse(wrapped)?)));
        let findings = self.evidence(arn, blob.as_ref().map(|(binding, blob)| (*binding, blob.as_slice())))?;
        Ok(Proof { self_asserted: false, at: jiff::Timestamp::now().to_string(), findings })
    }

    fn last_request_id(&self) -> Option<String> {
        self.noted()
    }
}
