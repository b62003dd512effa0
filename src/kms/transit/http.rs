//! One request to one address: TLS, time-outs, size limits, and the reply.
//!
//! Knows nothing of logins, which are [`super::client`]'s. Replies may carry a token or a key: a body sits in one
//! buffer that is wiped on drop. What the HTTP and TLS libraries buffer on the way is not ours to wipe (docs/KMS.md,
//! "Residue").

use std::error::Error as StdError;
use std::io::Read as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Method;
use reqwest::blocking::Client;
use reqwest::header::{CONTENT_TYPE, HeaderValue, LOCATION};
use serde::Deserialize;
use url::Url;
use zeroize::Zeroizing;

use super::classify::{Meaning, classify, line};
use super::config::{Config, Secret, config};
use crate::kms::{Failure, KmsError};

/// Replies are a few kilobytes; a key with very many versions has some tens.
const MAX_REPLY: usize = 256 * 1024;

/// What the server answered, with the address (by its place in the configuration) that did.
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) server: usize,
    /// Where a standby says that the active node is, if that is one of the configured addresses.
    pub(super) active: Option<usize>,
    body: Zeroizing<Vec<u8>>,
}

impl Reply {
    /// The body, which may hold a secret.
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    /// The `data` of a 200, without secrets in it.
    pub(super) fn data<'a, T: Deserialize<'a>>(&'a self) -> Result<T, KmsError> {
        #[derive(Deserialize)]
        struct Outer<T> {
            data: T,
        }
        self.parse::<Outer<T>>().map(|outer| outer.data)
    }

    /// The whole of a 200. The JSON library's own error may quote the reply, so it is dropped.
    pub(super) fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, KmsError> {
        serde_json::from_slice(&self.body).map_err(|error| {
            let place = format!("line {}, column {}", error.line(), error.column());
            KmsError::new(
                Failure::Protocol,
                "the key service's answer is not the JSON that was expected: is VAULT_ADDR right?",
            )
            .with_detail(format!("status {}, {place}", self.status))
        })
    }

    /// The server's own number of the request. Refusals carry none.
    pub(super) fn request_id(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Outer<'a> {
            request_id: &'a str,
        }
        let id = serde_json::from_slice::<Outer<'_>>(&self.body).ok()?.request_id;
        // It goes into the audit log as it is.
        let plain = !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        plain.then(|| id.to_owned())
    }

    /// Status and body on one line. Only for replies that hold no secret: errors, and `sys/health`.
    pub(super) fn quote(&self) -> String {
        let text = String::from_utf8_lossy(&self.body);
        let mut line = format!("{} ", self.status);
        line.extend(text.trim_end().chars().take(2000).map(|c| if c.is_control() { ' ' } else { c }));
        line
    }

    /// As an error, if nothing more is to be asked. `what` names the key, `did` what was asked of it.
    pub(super) fn refuse(&self, what: &str, did: &str) -> KmsError {
        let (meaning, failure) = classify(self);
        let error = KmsError::new(failure, line(meaning, what, did));
        // A 2xx in the wrong place may hold a secret.
        if meaning == Meaning::Done { error } else { error.with_detail(self.quote()) }
    }

    /// Whether that may be an election, which passes. A sealed server stays sealed until somebody comes.
    pub(super) fn may_pass_soon(&self) -> bool {
        !matches!(classify(self).0, Meaning::Sealed)
    }

    /// Whether another address may do better.
    pub(super) fn try_elsewhere(&self, path: &str) -> bool {
        matches!(self.status, 300..=399 | 412 | 472 | 473 | 500..=599) || (self.status == 429 && path == HEALTH)
    }
}

/// Which server; asked without a token or a namespace.
pub(super) const HEALTH: &str = "sys/health";

/// The transport: made ready at the first request.
pub(super) struct Http {
    pub(super) config: Config,
    client: Mutex<Option<Client>>,
}

impl Http {
    pub(super) fn new(config: Config) -> Self {
        Self { config, client: Mutex::new(None) }
    }

    /// The address of a reply's server, for people.
    pub(super) fn address(&self, server: usize) -> String {
        self.config.addresses.get(server).map(|url| url.as_str().trim_end_matches('/').to_owned()).unwrap_or_default()
    }

    /// By whom certificates are vouched for, for people.
    pub(super) fn roots(&self) -> &'static str {
        if self.config.ca_file.is_some() { "the roots of VAULT_CACERT" } else { "this system's roots" }
    }

    /// Asks one address, by its place in the configuration.
    pub(super) fn send_to(
        &self,
        server: usize,
        method: &Method,
        path: &str,
        body: Option<&[u8]>,
        token: Option<&Secret>,
    ) -> Result<Reply, KmsError> {
        let address = self.address(server);
        let began = Instant::now();
        let limit = self.limit();
        let mut request = self.client()?.request(method.clone(), format!("{address}/v1/{path}")).timeout(limit);
        // Agents in front of the server ask for this against forged requests from browsers.
        request = request.header("X-Vault-Request", "true");
        if let Some(namespace) = self.config.namespace_header().filter(|_| path != HEALTH) {
            request = request.header("X-Vault-Namespace", namespace);
        }
        if let Some(token) = token {
            let mut value =
                HeaderValue::from_str(token.expose()).map_err(|_| config("the token holds odd characters"))?;
            value.set_sensitive(true);
            request = request.header("X-Vault-Token", value);
        }
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.to_vec());
        }
        let mut response = request.send().map_err(|error| self.transport(&address, error))?;
        let status = response.status().as_u16();
        let active = response.headers().get(LOCATION).and_then(|to| self.configured(to.to_str().ok()?));
        let expected = response.content_length().and_then(|length| usize::try_from(length).ok()).unwrap_or(16 * 1024);
        let mut body = Zeroizing::new(Vec::with_capacity(expected.min(MAX_REPLY) + 1));
        let mut chunk = Zeroizing::new([0; 8192]);
        loop {
            let read = match response.read(&mut *chunk) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(KmsError::new(
                        Failure::Unreachable,
                        format!("the connection to the key service at {address} broke off within an answer: try again"),
                    )
                    .with_source(error));
                }
            };
            if body.len() + read > MAX_REPLY {
                return Err(KmsError::new(
                    Failure::Protocol,
                    format!("the answer of {address} is larger than {MAX_REPLY} bytes: is VAULT_ADDR right?"),
                ));
            }
            if began.elapsed() > limit {
                return Err(KmsError::new(
                    Failure::Unreachable,
                    format!("the key service at {address} did not finish its answer in time: try again"),
                ));
            }
            append(&mut body, &chunk[..read]);
        }
        tracing::debug!(%method, path, status, %address, "asked the key service");
        Ok(Reply { status, server, active, body })
    }

    /// How long one address may take. With several, one that hangs must leave time for the others.
    fn limit(&self) -> Duration {
        let Config { timeout, patience, addresses, .. } = &self.config;
        if addresses.len() > 1 { (*timeout).min(*patience / 3) } else { *timeout }
    }

    /// The configured address to which a redirect leads. A token goes nowhere else, whatever a server says.
    fn configured(&self, location: &str) -> Option<usize> {
        let to = Url::parse(location).ok()?;
        self.config.addresses.iter().position(|address| address.origin() == to.origin())
    }

    /// The HTTP client, made at the first call: making it reads the CA file and starts a thread.
    fn client(&self) -> Result<Client, KmsError> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        // Fails only if the process has installed a provider already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = Client::builder()
            .https_only(true)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .user_agent(concat!("lethefs/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(self.config.connect_timeout)
            .timeout(self.config.timeout);
        if let Some(path) = &self.config.ca_file {
            let shown = path.display();
            let pem = std::fs::read(path)
                .map_err(|error| config(format!("cannot read VAULT_CACERT {shown}: {error}")).with_source(error))?;
            let roots = reqwest::Certificate::from_pem_bundle(&pem)
                .ok()
                .filter(|roots| !roots.is_empty())
                .ok_or_else(|| config(format!("VAULT_CACERT {shown} holds no PEM certificate")))?;
            builder = builder.tls_certs_only(roots);
        }
        let made = builder.build().map_err(|error| {
            let reason = chain(&error);
            config(format!(
                "TLS cannot be set up: {reason}: check VAULT_CACERT, or install the system's CA certificates"
            ))
            .with_source(error)
        })?;
        *client = Some(made.clone());
        Ok(made)
    }

    fn transport(&self, address: &str, error: reqwest::Error) -> KmsError {
        let error = error.without_url();
        let reason = chain(&error);
        let (failure, message) = if error.is_builder() {
            (Failure::Config, format!("{address} cannot be asked: {reason}"))
        } else if is_untrusted(&error) {
            let roots = self.roots();
            (
                Failure::Untrusted,
                format!(
                    "the certificate of {address} is not vouched for by {roots}: check VAULT_CACERT and the address"
                ),
            )
        } else if error.is_timeout() {
            (
                Failure::Unreachable,
                format!("the key service at {address} did not answer in time: try again when it can"),
            )
        } else {
            (
                Failure::Unreachable,
                format!("the key service at {address} cannot be reached ({reason}): try again when it can"),
            )
        };
        KmsError::new(failure, message).with_detail(reason).with_source(error)
    }
}

/// Adds to a buffer of secrets without leaving its old contents behind when it has to grow.
fn append(buffer: &mut Zeroizing<Vec<u8>>, bytes: &[u8]) {
    if buffer.capacity() - buffer.len() < bytes.len() {
        let mut larger = Zeroizing::new(Vec::with_capacity((buffer.len() + bytes.len()) * 2));
        larger.extend_from_slice(buffer);
        *buffer = larger;
    }
    buffer.extend_from_slice(bytes);
}

/// The innermost reason, on one line.
fn chain(error: &dyn StdError) -> String {
    let mut last = error;
    while let Some(next) = last.source() {
        last = next;
    }
    last.to_string().replace(['\n', '\r'], " ")
}

/// Whether the handshake failed because of who the server is. Other TLS failures may be an accident on the way.
fn is_untrusted(error: &(dyn StdError + 'static)) -> bool {
    let mut next: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = error.downcast_ref::<rustls::Error>().or_else(|| inner?.downcast_ref());
        if tls
            .is_some_and(|e| matches!(e, rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented))
        {
            return true;
        }
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    false
}
