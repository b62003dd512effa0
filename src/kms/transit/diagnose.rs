//! Why an unwrap failed, and whether a key is gone for good: the questions that take more than one reply.
//!
//! The rule of evidence ([`Transit::evidence`]) is the only way to [`Failure::Destroyed`] here besides a trimmed
//! version ([`Transit::too_old`]), and neither rests on one reply. Called when an unwrap failed and by the
//! administrator's proof.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use serde_json::json;

use super::Transit;
use super::classify::{Meaning, classify};
use super::http::{HEALTH, Reply};
use super::key::{EngineInfo, Health, SameVersion};
use crate::kms::{Binding, Failure, Finding, KeyIdentity, KmsError, Wrapped};

/// The recorded facts of a Transit key.
pub(super) struct Recorded<'a> {
    pub(super) engine_uuid: &'a str,
    pub(super) key_version: u32,
    pub(super) key_version_created: i64,
    pub(super) cluster_id: &'a str,
}

/// The recorded cluster and engine, found at one server.
pub(super) struct Place {
    /// Which of the addresses.
    pub(super) server: usize,
    /// What showed it.
    pub(super) findings: Vec<Finding>,
}

/// A wrapped key of the right form that no key ever made: 12 bytes of nonce, 32 of key, 16 of tag, all zero.
fn dummy() -> Wrapped {
    Wrapped(format!("vault:v1:{}", STANDARD.encode([0; 60])))
}

/// The version in `vault:vN:…`. The server also takes 0 for 1; nothing writes that.
pub(super) fn wrapped_version(wrapped: &Wrapped) -> Option<u32> {
    wrapped.0.strip_prefix("vault:v")?.split_once(':')?.0.parse().ok().filter(|version| *version > 0)
}

fn not_destroyed(message: impl Into<String>) -> KmsError {
    KmsError::new(Failure::NotDestroyed, message)
}

impl Transit {
    /// The parts of an identity that say who the key is, if it is one of ours at all.
    pub(super) fn recorded<'a>(&self, identity: &'a KeyIdentity) -> Result<Recorded<'a>, KmsError> {
        match identity {
            KeyIdentity::Transit {
                key, namespace, engine_uuid, key_version, key_version_created, cluster_id, ..
            } if *key == self.key.key && namespace == self.client.namespace() => Ok(Recorded {
                engine_uuid,
                key_version: *key_version,
                key_version_created: *key_version_created,
                cluster_id,
            }),
            other => Err(KmsError::new(
                Failure::Config,
                format!("{} is not what was recorded, {other}: check the key URI and VAULT_NAMESPACE", self.what()),
            )),
        }
    }

    /// Why `reply` to an unwrap is not a key.
    pub(super) fn explain(
        &self,
        reply: &Reply,
        binding: &Binding,
        wrapped: &Wrapped,
        identity: &KeyIdentity,
    ) -> KmsError {
        let plain = reply.refuse(&self.what(), "unwrap keys");
        let recorded = match self.recorded(identity) {
            Ok(recorded) => recorded,
            // The server answered, but not about the key that was recorded.
            Err(error) => return error.with_detail(reply.quote()),
        };
        match classify(reply).0 {
            Meaning::NoKey => self.confirm_gone(&recorded, Some((binding, wrapped)), plain),
            Meaning::TooOld => self.too_old(&recorded, wrapped, plain),
            Meaning::NotAuthentic | Meaning::TooNew => self.not_authentic(&recorded, plain),
            _ => plain,
        }
    }

    fn confirm_gone(&self, recorded: &Recorded<'_>, probe: Option<(&Binding, &Wrapped)>, plain: KmsError) -> KmsError {
        let what = self.what();
        match self.evidence(recorded, probe) {
            Ok(findings) => {
                let said: Vec<_> = findings.iter().map(|f| format!("{}: {}", f.asked, f.answered)).collect();
                KmsError::new(
                    Failure::Destroyed,
                    format!("{what} is destroyed: what it wrapped cannot be opened again"),
                )
                .with_detail(said.join(" | "))
            }
            Err(why) => {
                let detail = [plain.detail, why.detail].into_iter().flatten().collect::<Vec<_>>().join(" | ");
                KmsError::new(
                    Failure::Missing,
                    format!("{what} is not there, but that it was destroyed is not shown: {}", why.message),
                )
                .with_detail(detail)
            }
        }
    }

    /// Below the minimum version: trimmed away for good, or only switched off.
    fn too_old(&self, recorded: &Recorded<'_>, wrapped: &Wrapped, plain: KmsError) -> KmsError {
        // A damaged or forged version number must not make a live key look destroyed.
        if wrapped_version(wrapped) != Some(recorded.key_version) {
            let detail = plain.detail.unwrap_or_default();
            return KmsError::new(
                Failure::BadData,
                "the wrapped key names another version of its KMS key than was recorded with it: it is damaged",
            )
            .with_detail(detail);
        }
        let place = self.same_place(recorded);
        let server = place.as_ref().ok().map(|place| place.server);
        let Ok((info, reply)) = self.read_key(server) else { return plain };
        if info.min_available_version <= recorded.key_version {
            return plain;
        }
        let said = reply.quote();
        if let Err(why) = place {
            return KmsError::new(
                Failure::Missing,
                format!(
                    "{} has lost that version, but whether it is the recorded key is not shown: {}",
                    self.what(),
                    why.message
                ),
            )
            .with_detail(said);
        }
        KmsError::new(
            Failure::Destroyed,
            format!(
                "version {} of {} is destroyed (trimmed away): what it wrapped cannot be opened again",
                recorded.key_version,
                self.what()
            ),
        )
        .with_detail(said)
    }

    /// Not authentic: the wrapped key's fault, or another key under the same name.
    fn not_authentic(&self, recorded: &Recorded<'_>, plain: KmsError) -> KmsError {
        let (info, reply) = match self.read_key(None) {
            Ok(read) => read,
            Err(error) if error.failure == Failure::Denied => return plain,
            // The key cannot be looked at: that it is damaged is not known either.
            Err(error) => return error,
        };
        if info.is_same(recorded.key_version, recorded.key_version_created) == SameVersion::No {
            return self.recreated(&reply);
        }
        match self.same_place(recorded) {
            Err(why) if why.failure == Failure::Recreated => why.with_detail(reply.quote()),
            _ => plain,
        }
    }

    pub(super) fn recreated(&self, reply: &Reply) -> KmsError {
        KmsError::new(
            Failure::Recreated,
            format!("{} is not the recorded key: another was made under its name", self.what()),
        )
        .with_detail(reply.quote())
    }

    /// That the server is the recorded cluster and the engine the recorded engine. [`Failure::Recreated`] if one is
    /// another, any other class if that cannot be found out.
    pub(super) fn same_place(&self, recorded: &Recorded<'_>) -> Result<Place, KmsError> {
        let (health, health_reply) = self.read_health()?;
        let server = health_reply.server;
        if health.cluster_id != recorded.cluster_id {
            let message = format!(
                "the server at {} is another cluster ({}) than the recorded one ({})",
                self.client.http().address(server),
                health.cluster_id,
                recorded.cluster_id
            );
            return Err(KmsError::new(Failure::Recreated, message).with_detail(health_reply.quote()));
        }
        let (engine, engine_reply) = self.read_engine(Some(server))?;
        if engine.uuid != recorded.engine_uuid {
            let message = format!(
                "the engine at {} is another one ({}) than the recorded one ({}): the recorded one was moved or \
                 removed",
                self.key.engine, engine.uuid, recorded.engine_uuid
            );
            return Err(KmsError::new(Failure::Recreated, message).with_detail(engine_reply.quote()));
        }
        let findings = vec![
            Finding {
                asked: format!("TLS connection to {}", self.client.http().address(server)),
                answered: format!("certificate verified against {}", self.client.http().roots()),
                shows: "who answers is the configured server".to_owned(),
            },
            Finding {
                asked: format!("GET {HEALTH}"),
                answered: health_reply.quote(),
                shows: "the server is active and unsealed, and its cluster is the recorded one".to_owned(),
            },
            Finding {
                asked: format!("GET {}", self.engine_path()),
                answered: engine_reply.quote(),
                shows: "the engine is the recorded one, neither moved nor made anew".to_owned(),
            },
        ];
        Ok(Place { server, findings })
    }

    /// The rule: every part from one server, or no proof. The class of an error is [`Failure::NotDestroyed`].
    pub(super) fn evidence(
        &self,
        recorded: &Recorded<'_>,
        probe: Option<(&Binding, &Wrapped)>,
    ) -> Result<Vec<Finding>, KmsError> {
        let kept = |error: KmsError| KmsError { failure: Failure::NotDestroyed, ..error };
        let Place { server, mut findings } = self.same_place(recorded).map_err(kept)?;
        findings.push(self.ask_to_open(recorded, probe, server)?);
        let path = self.key_path();
        let reply = self.client.call(&Method::GET, &path, None, Some(server)).map_err(kept)?;
        match classify(&reply).0 {
            Meaning::Nothing => findings.push(Finding {
                asked: format!("GET {path}"),
                answered: reply.quote(),
                shows: "no key of that name exists".to_owned(),
            }),
            Meaning::Done => return Err(not_destroyed(format!("{} is there", self.what()))),
            _ => return Err(kept(reply.refuse(&self.what(), "read the key"))),
        }
        Ok(findings)
    }

    /// Asks the key to open something, or, if that is not allowed, to rewrap it, which shows no plaintext.
    fn ask_to_open(
        &self,
        recorded: &Recorded<'_>,
        probe: Option<(&Binding, &Wrapped)>,
        server: usize,
    ) -> Result<Finding, KmsError> {
        let kept = |error: KmsError| KmsError { failure: Failure::NotDestroyed, ..error };
        let (context, wrapped) = match probe {
            Some((binding, wrapped)) => (binding.bytes(), wrapped.clone()),
            None => (b"lethefs/1/probe".to_vec(), dummy()),
        };
        let body = json!({ "ciphertext": wrapped.0, "context": STANDARD.encode(context) });
        let what = self.what();
        for verb in ["decrypt", "rewrap"] {
            let path = self.path(verb);
            let reply = self.client.call(&Method::POST, &path, Some(&body), Some(server)).map_err(kept)?;
            match classify(&reply).0 {
                Meaning::NoKey => {
                    return Ok(Finding {
                        asked: format!("POST {path}"),
                        answered: reply.quote(),
                        shows: "the key no longer opens anything".to_owned(),
                    });
                }
                Meaning::NotGranted => {}
                Meaning::Done => return Err(not_destroyed(format!("{what} still opens what it wrapped"))),
                Meaning::SoftDeleted => {
                    return Err(not_destroyed(format!("{what} is only soft-deleted and can be restored"))
                        .with_detail(reply.quote()));
                }
                Meaning::NotAuthentic | Meaning::TooNew | Meaning::TooOld | Meaning::Malformed => {
                    return Err(self.stands(recorded, &reply, server));
                }
                _ => return Err(kept(reply.refuse(&what, "open keys"))),
            }
        }
        Err(not_destroyed(format!(
            "these credentials may neither decrypt nor rewrap with {what}: grant update on {}",
            self.path("rewrap")
        )))
    }

    /// A key answered. Whether it is the recorded one or a later one of the same name, nothing is proved.
    fn stands(&self, recorded: &Recorded<'_>, reply: &Reply, server: usize) -> KmsError {
        let what = self.what();
        let read = self.read_key(Some(server));
        let same = read.map(|(info, _)| info.is_same(recorded.key_version, recorded.key_version_created));
        let message = match same {
            Ok(SameVersion::No) => format!(
                "another key was made under the name of {what}, which hides whether the recorded one is gone: \
                 destroy the new one too if nothing uses it, then ask again"
            ),
            _ => format!("{what} is there"),
        };
        not_destroyed(message).with_detail(reply.quote())
    }

    /// Who serves, from the active server.
    pub(super) fn read_health(&self) -> Result<(Health, Reply), KmsError> {
        let reply = self.client.health()?;
        if reply.status != 200 {
            let sealed = serde_json::from_slice::<Health>(reply.body()).is_ok_and(|health| health.sealed);
            let state = if sealed { "is sealed: have it unsealed" } else { "is not an active, unsealed server" };
            return Err(KmsError::new(
                Failure::Unavailable,
                format!("the key service at {} {state}", self.client.http().address(reply.server)),
            )
            .with_detail(reply.quote()));
        }
        let health: Health = reply.parse()?;
        if health.cluster_id.is_empty() {
            return Err(KmsError::new(Failure::Protocol, "the key service does not tell its cluster's id")
                .with_detail(reply.quote()));
        }
        Ok((health, reply))
    }

    /// Which engine is mounted at the path. Any token that may do anything within the engine may ask.
    pub(super) fn read_engine(&self, server: Option<usize>) -> Result<(EngineInfo, Reply), KmsError> {
        let reply = self.client.call(&Method::GET, &self.engine_path(), None, server)?;
        if classify(&reply).0 != Meaning::Done {
            return Err(reply.refuse(&self.what(), "look at the engine"));
        }
        let engine: EngineInfo = reply.data()?;
        if engine.path.trim_end_matches('/') != self.key.engine || engine.kind != "transit" {
            let message = format!("what is mounted at {} is not a Transit engine of that path", self.key.engine);
            return Err(KmsError::new(Failure::Config, message).with_detail(reply.quote()));
        }
        Ok((engine, reply))
    }

    fn engine_path(&self) -> String {
        format!("sys/internal/ui/mounts/{}", self.key.engine)
    }
}
