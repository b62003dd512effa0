//! Logged-in requests to a Vault-compatible server: which address to ask, and keeping a token that works.
//!
//! Knows tokens and paths, not keys. A [`Reply`] is handed up whatever its status, except that an unaccepted token has
//! been renewed if that can help. One request to one address is [`super::http`]'s.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

use super::classify::{Meaning, classify};
use super::config::{Config, Credentials, Secret, config};
use super::http::{HEALTH, Http, Reply};
use crate::kms::{Failure, KmsError};

struct Session {
    token: Secret,
    /// When to log in again without waiting for a refusal.
    stale: Option<Instant>,
}

/// A logged-in client, or one that will log in at the first call.
pub(super) struct Client {
    http: Http,
    session: Mutex<Option<Session>>,
    /// The address that served last.
    preferred: AtomicUsize,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The value is replaced whole, so a panic elsewhere leaves it valid.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Client {
    pub(super) fn new(config: Config) -> Self {
        Self { http: Http::new(config), session: Mutex::new(None), preferred: AtomicUsize::new(0) }
    }

    pub(super) fn namespace(&self) -> &str {
        &self.http.config.namespace
    }

    /// The transport, for its addresses.
    pub(super) fn http(&self) -> &Http {
        &self.http
    }

    /// Asks with a token. A 403 that comes back means that the token is good.
    ///
    /// `server`: only that address, by its place, so that several answers are known to be from one server.
    pub(super) fn call(
        &self,
        method: &Method,
        path: &str,
        body: Option<&Value>,
        server: Option<usize>,
    ) -> Result<Reply, KmsError> {
        let body = body.map(|value| Zeroizing::new(value.to_string().into_bytes()));
        let ask = |token: &Secret| self.send(method, path, body.as_deref().map(Vec::as_slice), Some(token), server);
        let reply = self.with_token(&ask)?;
        if !matches!(classify(&reply).0, Meaning::BadToken | Meaning::NotGranted) || self.token_is_good(server)? {
            return Ok(reply);
        }
        if !self.renew()? {
            return Err(self.bad_token(&reply));
        }
        let reply = self.with_token(&ask)?;
        if matches!(classify(&reply).0, Meaning::BadToken | Meaning::NotGranted) && !self.token_is_good(server)? {
            return Err(self.bad_token(&reply));
        }
        Ok(reply)
    }

    /// `sys/health` of the active server.
    pub(super) fn health(&self) -> Result<Reply, KmsError> {
        self.send(&Method::GET, HEALTH, None, None, None)
    }

    fn with_token(&self, ask: &dyn Fn(&Secret) -> Result<Reply, KmsError>) -> Result<Reply, KmsError> {
        let mut session = locked(&self.session);
        if session.as_ref().is_some_and(|s| s.stale.is_some_and(|stale| Instant::now() >= stale)) {
            *session = None;
        }
        let token = match session.take() {
            Some(session) => session,
            None => self.log_in()?,
        };
        let reply = ask(&token.token);
        *session = Some(token);
        reply
    }

    /// Whether the server knows our token, whatever it allows. A refusal by policy is enough: only a valid token gets
    /// one.
    fn token_is_good(&self, server: Option<usize>) -> Result<bool, KmsError> {
        let ask = |token: &Secret| self.send(&Method::GET, "auth/token/lookup-self", None, Some(token), server);
        let reply = self.with_token(&ask)?;
        match classify(&reply).0 {
            Meaning::Done | Meaning::NotGranted => Ok(true),
            Meaning::BadToken => Ok(false),
            _ => Err(reply.refuse("the token", "look up its own token")),
        }
    }

    fn bad_token(&self, reply: &Reply) -> KmsError {
        let message = match &self.http.config.credentials {
            Credentials::Token(_) => "the key service does not accept VAULT_TOKEN: set it to a valid token".to_owned(),
            Credentials::TokenFile(path) => {
                format!("the key service does not accept the token in {}: renew it", path.display())
            }
            Credentials::AppRole { mount, .. } => {
                format!("the key service does not accept the token that it has just given us at auth/{mount}")
            }
        };
        KmsError::new(Failure::Unauthenticated, message).with_detail(reply.quote())
    }

    /// Gets another token, if there is a way to. `false`: there is none.
    fn renew(&self) -> Result<bool, KmsError> {
        let mut session = locked(&self.session);
        match &self.http.config.credentials {
            Credentials::Token(_) => Ok(false),
            Credentials::TokenFile(_) => {
                let fresh = self.log_in()?;
                let same = session.as_ref().is_some_and(|old| old.token.same_as(&fresh.token));
                *session = Some(fresh);
                Ok(!same)
            }
            Credentials::AppRole { .. } => {
                *session = None;
                *session = Some(self.log_in()?);
                Ok(true)
            }
        }
    }

    fn log_in(&self) -> Result<Session, KmsError> {
        match &self.http.config.credentials {
            Credentials::Token(token) => {
                let copy = Zeroizing::new(token.expose().to_owned());
                Ok(Session { token: Secret::new(copy, "VAULT_TOKEN")?, stale: None })
            }
            Credentials::TokenFile(path) => Ok(Session { token: Secret::read(path, "the token")?, stale: None }),
            Credentials::AppRole { mount, role_id_file, secret_id_file } => {
                let role_id = Secret::read(role_id_file, "the AppRole's role id")?;
                let secret_id = Secret::read(secret_id_file, "the AppRole's secret id")?;
                self.approle(mount, &role_id, &secret_id)
            }
        }
    }

    fn approle(&self, mount: &str, role_id: &Secret, secret_id: &Secret) -> Result<Session, KmsError> {
        #[derive(Serialize)]
        struct Login<'a> {
            role_id: &'a str,
            secret_id: &'a str,
        }
        #[derive(Deserialize)]
        struct LoggedIn<'a> {
            #[serde(borrow)]
            auth: Auth<'a>,
        }
        #[derive(Deserialize)]
        struct Auth<'a> {
            client_token: &'a str,
            lease_duration: u64,
        }
        let login = Login { role_id: role_id.expose(), secret_id: secret_id.expose() };
        // Room for both and the JSON around them (ids are printable ASCII, at worst escaped), so that it never grows.
        let room = 2 * (login.role_id.len() + login.secret_id.len()) + 64;
        let mut body = Zeroizing::new(Vec::with_capacity(room));
        serde_json::to_writer(&mut *body, &login).map_err(|_| config("the AppRole's ids cannot be sent"))?;
        let reply = self.send(&Method::POST, &format!("auth/{mount}/login"), Some(&body), None, None)?;
        match classify(&reply).0 {
            Meaning::Done => {
                let auth = reply.parse::<LoggedIn<'_>>()?.auth;
                // Log in again when two thirds are over, so that a renewal does not begin with a refusal.
                let stale = (auth.lease_duration > 0)
                    .then(|| Instant::now().checked_add(Duration::from_secs(auth.lease_duration).mul_f32(0.66)))
                    .flatten();
                tracing::debug!(mount, seconds = auth.lease_duration, "logged in to the key service");
                let copy = Zeroizing::new(auth.client_token.to_owned());
                Ok(Session { token: Secret::new(copy, "the key service's new token")?, stale })
            }
            Meaning::BadToken | Meaning::NotGranted | Meaning::NoEngine | Meaning::Nothing => Err(KmsError::new(
                Failure::Unauthenticated,
                format!(
                    "the key service has no AppRole login at auth/{mount}: check LETHEFS_APPROLE_PATH and \
                     VAULT_NAMESPACE"
                ),
            )
            .with_detail(reply.quote())),
            _ => Err(reply.refuse("the AppRole", "log in")),
        }
    }

    /// Asks the addresses in turn, beginning with the one that served last. While none of several leads, as in an election,
    /// they are asked again, for as long as the configuration's patience.
    fn send(
        &self,
        method: &Method,
        path: &str,
        body: Option<&[u8]>,
        token: Option<&Secret>,
        server: Option<usize>,
    ) -> Result<Reply, KmsError> {
        if let Some(server) = server {
            return self.http.send_to(server, method, path, body, token);
        }
        let deadline = Instant::now() + self.http.config.patience;
        let mut pause = Duration::from_millis(50);
        loop {
            let turn = self.round(method, path, body, token, deadline);
            let electing = self.http.config.addresses.len() > 1
                && turn.as_ref().is_ok_and(|reply| reply.try_elsewhere(path) && reply.may_pass_soon());
            if !electing || Instant::now() + pause >= deadline {
                return turn;
            }
            tracing::debug!("no address leads: asking again");
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Asks each address once; a standby that names the active one is followed, if that is one of them.
    fn round(
        &self,
        method: &Method,
        path: &str,
        body: Option<&[u8]>,
        token: Option<&Secret>,
        deadline: Instant,
    ) -> Result<Reply, KmsError> {
        let count = self.http.config.addresses.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut left: VecDeque<usize> = (0..count).map(|step| (first + step) % count).collect();
        let mut answered: Option<Reply> = None;
        let mut failed: Option<KmsError> = None;
        while let Some(server) = left.pop_front() {
            match self.http.send_to(server, method, path, body, token) {
                Ok(reply) if !reply.try_elsewhere(path) => {
                    self.preferred.store(server, Ordering::Relaxed);
                    return Ok(reply);
                }
                Ok(reply) => {
                    if let Some(at) = reply.active.and_then(|active| left.iter().position(|server| *server == active)) {
                        left.swap(0, at);
                    }
                    // What may pass counts for more than what does not.
                    if answered.as_ref().is_none_or(|old| !old.may_pass_soon()) {
                        answered = Some(reply);
                    }
                }
                Err(error) if matches!(error.failure, Failure::Unreachable | Failure::Untrusted) => {
                    tracing::debug!(address = %self.http.address(server), %error, "this address does not serve");
                    // What may pass by itself counts for more: the caller keeps trying.
                    if failed.as_ref().is_none_or(|old| old.failure == Failure::Untrusted) {
                        failed = Some(error);
                    }
                }
                Err(error) => return Err(error),
            }
            if count > 1 && Instant::now() >= deadline {
                break;
            }
        }
        match (answered, failed) {
            (Some(reply), _) => Ok(reply),
            (None, Some(error)) => Err(error),
            (None, None) => Err(config("VAULT_ADDR holds no address")),
        }
    }
}
