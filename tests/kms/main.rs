//! The key services against real servers: what every provider must do ([`conformance`]), and what each of the
//! service's answers comes to ([`contract`] for Transit, [`pkcs11`] for tokens, [`aws`]).
//!
//! A test that needs a server starts its own and runs many cases against it, each named in its assertions: a start
//! takes seconds, and test runners use one process per test.

#[cfg(feature = "kms-aws")]
mod aws;
#[cfg(feature = "kms-aws")]
#[path = "../support/aws.rs"]
#[allow(dead_code)]
mod aws_server;
mod cluster;
mod conformance;
mod contract;
#[path = "../support/openbao.rs"]
#[allow(dead_code)]
mod openbao;
mod pkcs11;
#[path = "../support/softhsm.rs"]
#[allow(dead_code)]
mod softhsm;
mod stub;
#[path = "../support/cluster.rs"]
#[allow(dead_code)]
mod support_cluster;

use std::path::Path;
use std::time::Duration;

use lethefs::crypto::VolumeId;
use lethefs::kms::transit::{Config, Credentials, Secret, Transit};
use lethefs::kms::uri::TransitKey;
use lethefs::kms::{Binding, Failure, KmsError, Purpose};

use openbao::{AppRole, Server};

/// The binding that most cases use.
pub(crate) const BINDING: Binding = Binding { volume: VolumeId([9; 16]), scope: 0, version: 1, purpose: Purpose::Kek };

pub(crate) fn token(text: &str) -> Credentials {
    Credentials::Token(Secret::new(text.to_owned().into(), "token").expect("token"))
}

pub(crate) fn approle(role: &AppRole) -> Credentials {
    Credentials::AppRole {
        mount: "approle".to_owned(),
        role_id_file: role.role_id_file.clone(),
        secret_id_file: role.secret_id_file.clone(),
    }
}

/// A patient configuration for one server.
pub(crate) fn config(address: &str, ca: &Path, credentials: Credentials) -> Config {
    Config {
        addresses: vec![address.parse().expect("address")],
        credentials,
        ca_file: Some(ca.to_owned()),
        namespace: String::new(),
        connect_timeout: Duration::from_secs(20),
        timeout: Duration::from_secs(30),
        patience: Duration::from_secs(30),
    }
}

pub(crate) fn key(name: &str) -> TransitKey {
    TransitKey { engine: "transit".to_owned(), key: name.to_owned(), server: None }
}

/// A key of the server's engine `transit`.
pub(crate) fn transit(server: &Server, name: &str, credentials: Credentials) -> Transit {
    Transit::new(&key(name), config(&server.address(), &server.ca(), credentials))
}

/// The block of `docs/KMS.md` that stands under this heading, for a key of the engine `transit`. So the policies that
/// people copy are the ones that are tested.
pub(crate) fn documented_policy(heading: &str, name: &str) -> String {
    let docs = include_str!("../../docs/KMS.md");
    let section = docs.split_once(heading).unwrap_or_else(|| panic!("docs/KMS.md has no `{heading}`")).1;
    let block = section.split_once("```hcl\n").and_then(|(_, rest)| rest.split_once("```")).expect("an hcl block").0;
    block.replace("vol1", name)
}

pub(crate) const HOST_POLICY: &str = "### The mount host's policy";
pub(crate) const WRAP_POLICY: &str = "### To add a slot";
pub(crate) const ADMIN_POLICY: &str = "### The administrator's policy";

/// A host's and an administrator's token for one key, with the documented policies.
pub(crate) fn tokens(server: &Server, name: &str) -> (String, String) {
    let (host, admin) = (format!("host-{name}"), format!("admin-{name}"));
    server.policy(&host, &documented_policy(HOST_POLICY, name));
    server.policy(&admin, &documented_policy(ADMIN_POLICY, name));
    (server.token(&[&host], "1h"), server.token(&[&admin], "1h"))
}

/// The error of a call that must fail, fit to be shown.
pub(crate) fn error<T>(case: &str, result: Result<T, KmsError>) -> KmsError {
    let Err(error) = result else { panic!("{case}: should have failed") };
    let message = &error.message;
    assert!(!message.contains('\n') && !message.is_empty(), "{case}: {message:?}");
    let all = format!("{message} {:?} {:?}", error.detail, error.source);
    for secret in ["s.", "hvs.", "secret_id\":", "plaintext\":"] {
        let found = all.match_indices(secret).any(|(at, _)| {
            let after: String = all[at + secret.len()..].chars().take(20).collect();
            after.len() == 20 && after.bytes().all(|b| b.is_ascii_alphanumeric())
        });
        assert!(!found, "{case}: shows a secret: {all}");
    }
    error
}

/// As [`error`], when only its class matters.
pub(crate) fn failure<T>(case: &str, result: Result<T, KmsError>) -> Failure {
    error(case, result).failure
}
