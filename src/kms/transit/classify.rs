//! What a Transit server's reply means: the one table of its words, and nothing that asks again.
//!
//! All of the server's refusals of a key share the status 400, so its words are the only thing that tells them apart.
//! They are written down here verbatim, as OpenBao 2.7.2 gives them, and `tests/kms/contract.rs` provokes every row on
//! a real server. Replies that need a second look ([`Meaning::NoKey`] and others) get it in [`super::diagnose`].

use serde::Deserialize;

use super::http::Reply;
use crate::kms::Failure;

/// What one reply says, taken alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// 2xx.
    Done,
    /// The server is sealed.
    Sealed,
    /// A standby that will not serve this, or a redirect to the active node.
    Standby,
    /// A rate limit, or a 5xx.
    Busy,
    /// The token is valid (or so it seems) but no policy grants this.
    NotGranted,
    /// The token is not accepted; the server says the same when there is no token, or when it may not be used here.
    BadToken,
    /// An AppRole login with a role id or secret id that is unknown, used up or destroyed.
    BadLogin,
    /// No key of that name. Not a proof of anything by itself.
    NoKey,
    /// `GET` of a key, or of anything else, that is not there.
    Nothing,
    /// The key is soft-deleted.
    SoftDeleted,
    /// The version is below the minimum that the key's policy allows, or has been trimmed away: the same words.
    TooOld,
    /// The wrapped key names a version that the key does not have.
    TooNew,
    /// Not authentic: damaged, wrong context, or another key under the same name.
    NotAuthentic,
    /// The wrapped key is not even well-formed.
    Malformed,
    /// Deleting needs `deletion_allowed`.
    DeletionNotAllowed,
    /// No engine is mounted at that path.
    NoEngine,
    /// No such namespace.
    NoNamespace,
    /// The server does not know this request: Vault has no soft-delete.
    NoSuchRequest,
    /// An answer that is not the server's JSON, as a proxy or a plain-http port gives it.
    Foreign,
    /// Words that are not in the table.
    Unknown,
}

/// How a row looks for its words.
#[derive(Clone, Copy)]
enum Words {
    /// The only error, word for word.
    Is(&'static str),
    /// The only error begins so.
    Begins(&'static str),
    /// The only error ends so.
    Ends(&'static str),
    /// The only error holds this.
    Holds(&'static str),
    /// `{"errors":[]}`.
    None,
    /// Any words, or none, or not even JSON: a gateway in front may answer for the server.
    Any,
}

struct Row {
    statuses: std::ops::RangeInclusive<u16>,
    words: Words,
    meaning: Meaning,
    /// The class if nothing more is asked.
    failure: Failure,
}

const fn row(status: u16, words: Words, meaning: Meaning, failure: Failure) -> Row {
    Row { statuses: status..=status, words, meaning, failure }
}

const fn rows(from: u16, to: u16, meaning: Meaning, failure: Failure) -> Row {
    Row { statuses: from..=to, words: Words::Any, meaning, failure }
}

/// First match wins.
static TABLE: &[Row] = &[
    row(400, Words::Is("encryption key not found"), Meaning::NoKey, Failure::Missing),
    row(400, Words::Ends("could not delete key; not found"), Meaning::NoKey, Failure::Missing),
    row(400, Words::Begins("no existing key named "), Meaning::NoKey, Failure::Missing),
    row(404, Words::None, Meaning::Nothing, Failure::Missing),
    row(400, Words::Is("refusing to use soft-deleted key"), Meaning::SoftDeleted, Failure::Suspended),
    row(
        400,
        Words::Is("ciphertext or signature version is disallowed by policy (too old)"),
        Meaning::TooOld,
        Failure::Suspended,
    ),
    row(400, Words::Is("invalid ciphertext: version is too new"), Meaning::TooNew, Failure::BadData),
    // `cipher: …` for AES-GCM, `chacha20poly1305: …` for the other two types.
    row(400, Words::Ends(": message authentication failed"), Meaning::NotAuthentic, Failure::BadData),
    row(400, Words::Begins("invalid ciphertext"), Meaning::Malformed, Failure::BadData),
    row(400, Words::Ends("deletion is not allowed for this key"), Meaning::DeletionNotAllowed, Failure::Denied),
    row(400, Words::Is("invalid role or secret ID"), Meaning::BadLogin, Failure::Unauthenticated),
    row(403, Words::Is("permission denied"), Meaning::BadToken, Failure::Unauthenticated),
    row(403, Words::Holds("permission denied"), Meaning::NotGranted, Failure::Denied),
    row(403, Words::Begins("preflight capability check returned 403"), Meaning::NotGranted, Failure::Denied),
    row(404, Words::Begins("no handler for route"), Meaning::NoEngine, Failure::Missing),
    row(404, Words::Is("namespace not found"), Meaning::NoNamespace, Failure::Config),
    row(404, Words::Holds("unsupported path"), Meaning::NoSuchRequest, Failure::Protocol),
    // Vault's.
    row(405, Words::Holds("unsupported operation"), Meaning::NoSuchRequest, Failure::Protocol),
    // While it is being sealed, or between two leaders.
    row(
        500,
        Words::Is("local node not active but active cluster node not found"),
        Meaning::Standby,
        Failure::Unavailable,
    ),
    rows(300, 399, Meaning::Standby, Failure::Unavailable),
    rows(412, 412, Meaning::Standby, Failure::Unavailable),
    rows(429, 429, Meaning::Busy, Failure::Unavailable),
    rows(472, 473, Meaning::Standby, Failure::Unavailable),
    row(503, Words::Is("Vault is sealed"), Meaning::Sealed, Failure::Unavailable),
    rows(500, 599, Meaning::Busy, Failure::Unavailable),
];

#[derive(Deserialize)]
struct Errors {
    errors: Vec<String>,
}

/// What the reply says and the class it has if nothing more is asked.
pub(super) fn classify(reply: &Reply) -> (Meaning, Failure) {
    classify_parts(reply.status, reply.body())
}

fn classify_parts(status: u16, body: &[u8]) -> (Meaning, Failure) {
    if (200..300).contains(&status) {
        return (Meaning::Done, Failure::Protocol);
    }
    let errors = serde_json::from_slice::<Errors>(body).ok().map(|body| body.errors);
    let matches = |row: &&Row| {
        let one = match errors.as_deref() {
            Some([one]) => Some(one.as_str()),
            _ => None,
        };
        row.statuses.contains(&status)
            && match row.words {
                Words::Any => true,
                Words::None => errors.as_ref().is_some_and(Vec::is_empty),
                Words::Is(words) => one == Some(words),
                Words::Begins(words) => one.is_some_and(|one| one.starts_with(words)),
                Words::Ends(words) => one.is_some_and(|one| one.ends_with(words)),
                Words::Holds(words) => one.is_some_and(|one| one.contains(words)),
            }
    };
    match TABLE.iter().find(matches) {
        Some(row) => (row.meaning, row.failure),
        None if errors.is_none() => (Meaning::Foreign, Failure::Protocol),
        None => (Meaning::Unknown, Failure::Protocol),
    }
}

/// What happened and what to do, for replies that are final. `what` names the key, `did` what was asked of it.
pub(super) fn line(meaning: Meaning, what: &str, did: &str) -> String {
    match meaning {
        Meaning::Sealed => format!("the key service is sealed and cannot {did}: have it unsealed"),
        Meaning::Standby => format!("the key service is a standby and cannot {did}: give VAULT_ADDR the active node"),
        Meaning::Busy => format!("the key service cannot {did} now: it is overloaded or limits the rate; try again"),
        Meaning::NotGranted => format!(
            "no policy lets these credentials {did} ({what}): see docs/KMS.md for \
             the policy"
        ),
        Meaning::BadToken => {
            "the key service does not accept the token: renew it (VAULT_TOKEN, VAULT_TOKEN_FILE)".to_owned()
        }
        Meaning::BadLogin => {
            "the key service does not accept the AppRole's role id and secret id: ask its administrator for a \
             new secret id"
                .to_owned()
        }
        Meaning::NoKey | Meaning::Nothing => format!("{what} is not there"),
        Meaning::SoftDeleted => format!("{what} is soft-deleted: its administrator can restore it"),
        Meaning::TooOld => {
            format!("{what} no longer opens this version: its administrator can lower min_decryption_version")
        }
        Meaning::TooNew | Meaning::NotAuthentic | Meaning::Malformed => {
            format!("{what} rejects the wrapped key: it is damaged, or belongs to another volume")
        }
        Meaning::DeletionNotAllowed => format!("{what} does not allow its deletion: set deletion_allowed=true on it"),
        Meaning::NoEngine => {
            format!(
                "no Transit engine is mounted where {what} should be: check `engine` in the URI, \
                 VAULT_NAMESPACE, or mount it"
            )
        }
        Meaning::NoNamespace => "the key service has no such namespace: check VAULT_NAMESPACE".to_owned(),
        Meaning::NoSuchRequest => format!("the key service does not know how to {did}"),
        Meaning::Foreign => "what answers is not an OpenBao or Vault server, or something stands in between: check \
             VAULT_ADDR"
            .to_owned(),
        Meaning::Done | Meaning::Unknown => format!(
            "the key service gave an answer that is not understood when \
             asked to {did}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_status_both_count() {
        for (status, body, meaning, failure) in [
            (400, r#"{"errors":["encryption key not found"]}"#, Meaning::NoKey, Failure::Missing),
            (404, r#"{"errors":["encryption key not found"]}"#, Meaning::Unknown, Failure::Protocol),
            (400, r#"{"errors":["encryption key not found","x"]}"#, Meaning::Unknown, Failure::Protocol),
            (400, r#"{"errors":["some encryption key not found"]}"#, Meaning::Unknown, Failure::Protocol),
            (404, r#"{"errors":[]}"#, Meaning::Nothing, Failure::Missing),
            (400, r#"{"errors":[]}"#, Meaning::Unknown, Failure::Protocol),
            (404, "<html>not found</html>", Meaning::Foreign, Failure::Protocol),
            (404, "", Meaning::Foreign, Failure::Protocol),
            (400, "Client sent an HTTP request to an HTTPS server.\n", Meaning::Foreign, Failure::Protocol),
            (403, "Forbidden by proxy", Meaning::Foreign, Failure::Protocol),
            (403, r#"{"errors":["permission denied"]}"#, Meaning::BadToken, Failure::Unauthenticated),
            (
                403,
                r#"{"errors":["1 error occurred:\n\t* permission denied\n\n"]}"#,
                Meaning::NotGranted,
                Failure::Denied,
            ),
            (503, r#"{"errors":["Vault is sealed"]}"#, Meaning::Sealed, Failure::Unavailable),
            (502, "bad gateway", Meaning::Busy, Failure::Unavailable),
            (307, "", Meaning::Standby, Failure::Unavailable),
            (200, "", Meaning::Done, Failure::Protocol),
        ] {
            assert_eq!(classify_parts(status, body.as_bytes()), (meaning, failure), "{status} {body}");
        }
    }

    #[test]
    fn no_single_reply_means_destroyed() {
        assert!(TABLE.iter().all(|row| row.failure != Failure::Destroyed && row.failure != Failure::Recreated));
    }
}
