//! Requests to AWS KMS: the official client, made ready at the first call, with limits on time and size, over TLS only.
//!
//! The client is asynchronous; one current-thread runtime in here drives it, only while a call waits, and nothing
//! asynchronous leaves this module. Credentials come from the client's default chain (environment, profile, web identity,
//! container, instance) and are renewed by it; if the service does not accept them, they are fetched anew once.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_sdk_kms::Client;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::config::interceptors::{
    BeforeDeserializationInterceptorContextMut, BeforeTransmitInterceptorContextRef,
};
use aws_sdk_kms::config::{ConfigBag, Intercept, Region, RuntimeComponents};
use aws_sdk_kms::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::tls;
use aws_smithy_types::body::SdkBody;
use http_body_util::Limited;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::runtime::Runtime;

use super::classify::{Refused, config};
use super::config::Config;
use crate::kms::{Failure, KmsError};

/// Replies are a few kilobytes.
pub(super) const MAX_REPLY: usize = 256 * 1024;

/// Refusal of an address that is not `https`.
#[derive(Debug, thiserror::Error)]
#[error("the address of the key service is not https")]
pub(super) struct PlainHttp;

/// What goes over the wire in plain sight, or would not end.
#[derive(Debug)]
struct Guard;

impl Intercept for Guard {
    fn name(&self) -> &'static str {
        "lethefs"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if context.request().uri().starts_with("https://") { Ok(()) } else { Err(PlainHttp.into()) }
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let body = context.response_mut().body_mut();
        let whole = std::mem::replace(body, SdkBody::taken());
        *body = SdkBody::from_body_1_x(Limited::new(whole, MAX_REPLY));
        Ok(())
    }
}

struct Ready {
    runtime: Runtime,
    client: Client,
}

/// The client, or what it is made of.
pub(super) struct Aws {
    config: Config,
    region: Option<String>,
    ready: Mutex<Option<Arc<Ready>>>,
}

impl Aws {
    pub(super) fn new(config: Config, region: Option<String>) -> Self {
        Self { config, region, ready: Mutex::new(None) }
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// Asks. If the credentials are not accepted, once more with credentials fetched anew.
    pub(super) fn call<T, E>(
        &self,
        ask: impl AsyncFn(&Client) -> Result<T, SdkError<E, HttpResponse>>,
    ) -> Result<T, Refused>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let first = self.call_once(&ask);
        match first {
            Err(refused) if refused.error.failure == Failure::Unauthenticated => {
                // Drops the credentials that were kept.
                *self.locked() = None;
                self.call_once(&ask)
            }
            other => other,
        }
    }

    fn call_once<T, E>(&self, ask: &impl AsyncFn(&Client) -> Result<T, SdkError<E, HttpResponse>>) -> Result<T, Refused>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let ready = self.ready()?;
        // The client's own limits do not cover everything that it does (a credential process, for one).
        let limit = self.config.timeout + Duration::from_secs(5);
        let done = ready.runtime.block_on(async { tokio::time::timeout(limit, ask(&ready.client)).await });
        match done {
            Ok(result) => result.map_err(|error| Refused::new(&error)),
            Err(_) => Err(Refused::from(KmsError::new(
                Failure::Unreachable,
                "AWS KMS did not answer in time: try again when it can",
            ))),
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Option<Arc<Ready>>> {
        // The value is replaced whole, so a panic elsewhere leaves it valid.
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready(&self) -> Result<Arc<Ready>, KmsError> {
        let mut ready = self.locked();
        if let Some(ready) = &*ready {
            return Ok(ready.clone());
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|error| config(format!("AWS KMS cannot be asked: {error}")).with_source(error))?;
        let tls = tls::TlsContext::builder()
            .with_trust_store(self.roots()?)
            .build()
            .map_err(|error| config("TLS cannot be set up").with_source(error))?;
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
            .tls_context(tls)
            .build_https();
        let limits = TimeoutConfig::builder()
            .connect_timeout(self.config.connect_timeout)
            .read_timeout(self.config.attempt_timeout)
            .operation_attempt_timeout(self.config.attempt_timeout)
            .operation_timeout(self.config.timeout)
            .build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .http_client(http)
            .timeout_config(limits)
            .retry_config(RetryConfig::standard().with_max_attempts(self.config.attempts));
        if let Some(region) = &self.region {
            loader = loader.region(Region::new(region.clone()));
        }
        if let Some(path) = &self.config.profile_file {
            let files = EnvConfigFiles::builder().with_file(EnvConfigFileKind::Config, path).build();
            loader = loader.profile_files(files);
        }
        let limit = self.config.timeout + Duration::from_secs(5);
        let shared = runtime.block_on(async { tokio::time::timeout(limit, loader.load()).await }).map_err(|_| {
            KmsError::new(Failure::Unreachable, "AWS credentials and region could not be found in time")
        })?;
        if shared.region().is_none() {
            return Err(config(
                "the region of the AWS KMS key is not known: add ?region=REGION to the URI, or set AWS_REGION",
            ));
        }
        let client = Client::from_conf(aws_sdk_kms::config::Builder::from(&shared).interceptor(Guard).build());
        let made = Arc::new(Ready { runtime, client });
        *ready = Some(made.clone());
        Ok(made)
    }

    fn roots(&self) -> Result<tls::TrustStore, KmsError> {
        let Some(path) = &self.config.ca_file else { return Ok(tls::TrustStore::default()) };
        let shown = path.display();
        let pem = read_pem(path)
            .map_err(|error| config(format!("cannot read AWS_CA_BUNDLE {shown}: {error}")).with_source(error))?;
        // The client panics at a file that is none.
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        if !certificates.is_ok_and(|certificates| !certificates.is_empty()) {
            return Err(config(format!("AWS_CA_BUNDLE {shown} holds no PEM certificate")));
        }
        Ok(tls::TrustStore::empty().with_pem_certificate(pem))
    }
}

fn read_pem(path: &PathBuf) -> std::io::Result<Vec<u8>> {
    std::fs::read(path)
}
