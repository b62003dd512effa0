//! Why an unwrap failed, and whether a key is gone for good.
//!
//! The rule of evidence ([`Open::evidence`]) is the only way to [`Failure::Destroyed`] here. An empty search is no proof by
//! itself: SoftHSM gives one with `CKR_OK` when its token directory has vanished, and any token gives one to a session that
//! is not logged in. So the search stands between two answers of the token to who it is, in a session that has logged in
//! itself.

use cryptoki::error::{Error, RvError};

use super::classify::{class, code, failed};
use super::token::{Found, Open, Recorded};
use super::{called, seal, unseal};
use crate::kms::{Failure, Finding, KmsError};

impl Open<'_> {
    /// The recorded key, or why it is not there.
    pub(super) fn pick(&self, recorded: &Recorded) -> Result<Found, KmsError> {
        let found = self.with_id(recorded)?;
        if found.is_empty() {
            return Err(match self.evidence(recorded) {
                Ok(findings) => {
                    let said: Vec<_> = findings.iter().map(|f| format!("{}: {}", f.asked, f.answered)).collect();
                    KmsError::new(
                        Failure::Destroyed,
                        format!(
                            "the key with id {} on {} is destroyed: what it wrapped cannot be opened again",
                            recorded.id, self.what
                        ),
                    )
                    .with_detail(said.join(" | "))
                }
                Err(why) if why.failure == Failure::NotDestroyed => KmsError {
                    failure: Failure::Missing,
                    message: format!(
                        "the key with id {} is not there, but that it was destroyed is not shown: {}",
                        recorded.id, why.message
                    ),
                    ..why
                },
                // The token itself is in trouble: nothing is known of the key.
                Err(why) => why,
            });
        }
        let mut same: Vec<Found> = found.into_iter().filter(|found| found.may_be(recorded)).collect();
        // Copies of the key under its id open alike.
        same.pop().ok_or_else(|| self.recreated(recorded))
    }

    pub(super) fn recreated(&self, recorded: &Recorded) -> KmsError {
        KmsError::new(
            Failure::Recreated,
            format!("the key with id {} on {} is not the recorded one: another was made", recorded.id, self.what),
        )
    }

    /// Why a decryption failed.
    pub(super) fn explain(&self, error: &Error, found: &Found) -> KmsError {
        let what = called(self);
        let plain = failed(error, &what, "unwrap keys");
        let Some(code) = code(error) else { return plain };
        let unclear = match class(code) {
            // SoftHSM says GENERAL_ERROR for a wrong tag, others say FUNCTION_FAILED, or a code of a newer version.
            Failure::Unavailable => matches!(code, RvError::GeneralError | RvError::FunctionFailed),
            Failure::Protocol => true,
            _ => false,
        };
        if !unclear {
            return plain;
        }
        // Whether it is the key or the wrapped text: if the key opens what it has just sealed, it is the text.
        let (aad, probe) = (b"lethefs/1/probe", [0x5a; 32]);
        let tried = seal(&self.session, found.handle, aad, &probe)
            .and_then(|sealed| unseal(&self.session, found.handle, aad, &sealed));
        match tried {
            Ok(opened) if opened.as_slice() == probe => {
                let line = format!("{what} rejects the wrapped key: it is damaged, or belongs to another volume");
                KmsError { failure: Failure::BadData, message: line, ..plain }
            }
            _ => KmsError { failure: Failure::Unavailable, ..plain },
        }
    }

    /// The rule: every part from one session, or no proof. [`Failure::NotDestroyed`] if a key answers, any other class if
    /// that cannot be found out.
    pub(super) fn evidence(&self, recorded: &Recorded) -> Result<Vec<Finding>, KmsError> {
        if !self.token.login_required {
            // Whether the token hides objects from who is not logged in is then not known.
            return Err(KmsError::new(
                Failure::NotDestroyed,
                format!("{} needs no login, so an empty search shows nothing", self.what),
            ));
        }
        let before = self.still_there()?;
        let found = self.with_id(recorded)?;
        let after = self.still_there()?;
        if let Some(found) = found.first() {
            let line = if found.may_be(recorded) {
                format!("the key with id {} is on {}", recorded.id, self.what)
            } else {
                format!(
                    "another key was made under id {} on {}, which hides whether the recorded one is gone: destroy the \
                     new one too if nothing uses it, then ask again",
                    recorded.id, self.what
                )
            };
            return Err(KmsError::new(Failure::NotDestroyed, line));
        }
        Ok(vec![
            Finding {
                asked: "C_GetTokenInfo".to_owned(),
                answered: before.quote(),
                shows: "the token is the recorded one".to_owned(),
            },
            Finding {
                asked: "C_Login, in a new session".to_owned(),
                answered: "CKR_OK".to_owned(),
                shows: "nothing of this user's is hidden from the search".to_owned(),
            },
            Finding {
                asked: format!("C_FindObjects CKA_CLASS=CKO_SECRET_KEY CKA_TOKEN=true CKA_ID={}", recorded.id),
                answered: "CKR_OK: 0 objects".to_owned(),
                shows: "no key has the recorded key's id".to_owned(),
            },
            Finding {
                asked: "C_GetTokenInfo, after the search".to_owned(),
                answered: after.quote(),
                shows: "the token's store did not vanish under the search".to_owned(),
            },
        ])
    }
}
