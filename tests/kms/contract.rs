//! What each of a real server's replies comes to: a case per row of docs/KMS.md's table.
//!
//! [`keys`] changes keys, [`logins`] credentials, [`server`] the server itself; [`spoiled`] has real replies
//! broken on the way, and a full audit disk; [`replies`] needs a stub.

mod keys;
mod logins;
mod replies;
mod server;
mod spoiled;

use lethefs::kms::transit::Transit;
use lethefs::kms::{Failure, KeyAdmin, KeyIdentity, KeySource, KmsError, MadeKey, Proof};

use super::openbao::Server;
use super::{BINDING, error, token, tokens, transit};

/// A key with the documented policies and something wrapped under it.
struct Case {
    name: String,
    host: Transit,
    admin: Transit,
    made: MadeKey,
}

impl Case {
    fn new(server: &Server, name: &str) -> Self {
        server.create_key(name);
        let (host, admin) = tokens(server, name);
        let host = transit(server, name, token(&host));
        let made = host.make(&BINDING).unwrap_or_else(|e| panic!("{name}: {e} {:?}", e.detail));
        Self { name: name.to_owned(), host, admin: transit(server, name, token(&admin)), made }
    }

    fn unwrap_as(&self, who: &Transit) -> Result<(), KmsError> {
        let key = who.unwrap(&BINDING, &self.made.wrapped, &self.made.identity)?;
        assert!(key.same_as(&self.made.key), "{}", self.name);
        Ok(())
    }

    /// Unwraps as the host; gives class, message and detail.
    fn refusal(&self) -> (Failure, String) {
        let error = error(&self.name, self.unwrap_as(&self.host));
        (error.failure, format!("{} ({})", error.message, error.detail.unwrap_or_default()))
    }

    /// The identity with something else in it.
    fn changed(&self, change: impl FnOnce(&mut String, &mut String)) -> KeyIdentity {
        let mut other = self.made.identity.clone();
        if let KeyIdentity::Transit { cluster_id, engine_uuid, .. } = &mut other {
            change(cluster_id, engine_uuid);
        }
        other
    }

    fn prove(&self) -> Result<Proof, KmsError> {
        self.admin.prove_destroyed(&self.made.identity, Some((&BINDING, &self.made.wrapped)))
    }
}

#[track_caller]
fn expect(case: &Case, class: Failure, words: &[&str]) {
    let (failure, said) = case.refusal();
    assert_eq!(failure, class, "{}: {said}", case.name);
    for words in words {
        assert!(said.contains(words), "{}: `{words}` is not in: {said}", case.name);
    }
}
