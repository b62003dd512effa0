//! What AWS KMS's errors mean: the one table of its codes, and nothing that asks again.
//!
//! Codes that need a second look ([`Meaning::NoKey`], [`Meaning::State`]) get it in [`super::admin`] and [`super`].

use std::error::Error as StdError;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

use super::client::PlainHttp;
use crate::kms::{Failure, KmsError};

/// What one error says, taken alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// `NotFoundException`.
    NoKey,
    /// `KMSInvalidStateException`: which state is in the key's description.
    State,
    /// Everything else: the class says it.
    Final,
}

/// An error of a call.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) meaning: Meaning,
    pub(super) error: KmsError,
    /// The service's code and words, for a proof.
    pub(super) said: String,
}

impl From<KmsError> for Refused {
    fn from(error: KmsError) -> Self {
        Self { meaning: Meaning::Final, said: error.message.clone(), error }
    }
}

pub(super) fn config(message: impl Into<String>) -> KmsError {
    KmsError::new(Failure::Config, message)
}

/// The class of the service's codes. What AWS documents as a fault of its own may pass.
fn class(code: &str, words: &str) -> Option<(Meaning, Failure)> {
    let fin = |failure| Some((Meaning::Final, failure));
    match code {
        "NotFoundException" => Some((Meaning::NoKey, Failure::Missing)),
        "KMSInvalidStateException" => Some((Meaning::State, Failure::Unavailable)),
        "DisabledException" => fin(Failure::Suspended),
        "InvalidCiphertextException" | "IncorrectKeyException" => fin(Failure::BadData),
        "AccessDeniedException" | "AccessDenied" | "NotAuthorized" => fin(Failure::Denied),
        // This host's clock is wrong, of which somebody on the network may be the cause: no word about the credentials.
        "InvalidSignatureException" | "SignatureDoesNotMatch"
            if words.contains("Signature expired") || words.contains("not yet current") =>
        {
            fin(Failure::Config)
        }
        "RequestExpired" | "RequestTimeTooSkewed" => fin(Failure::Config),
        "ExpiredTokenException"
        | "ExpiredToken"
        | "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidSignatureException"
        | "SignatureDoesNotMatch"
        | "IncompleteSignature"
        | "IncompleteSignatureException"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException" => fin(Failure::Unauthenticated),
        "ThrottlingException"
        | "Throttling"
        | "TooManyRequestsException"
        | "LimitExceededException"
        | "RequestLimitExceeded"
        | "KMSInternalException"
        | "KeyUnavailableException"
        | "DependencyTimeoutException"
        | "InternalFailure"
        | "InternalServerError"
        | "ServiceUnavailable"
        | "ServiceUnavailableException"
        | "CloudHsmClusterNotActiveException"
        | "CustomKeyStoreInvalidStateException" => fin(Failure::Unavailable),
        "InvalidKeyUsageException" | "UnsupportedOperationException" => fin(Failure::Unsuitable),
        _ => None,
    }
}

/// The first error of a kind in a chain.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if let Some(found) = error.downcast_ref().or_else(|| inner?.downcast_ref()) {
            return Some(found);
        }
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Why there are no credentials.
fn of_credentials(error: &CredentialsError, words: &str) -> (Failure, &'static str) {
    // The security token service's words when it is asked to exchange an identity.
    let refused = ["AccessDenied", "ExpiredToken", "InvalidIdentityToken", "IDPRejectedClaim", "InvalidClientTokenId"];
    match error {
        CredentialsError::CredentialsNotLoaded(_) => (
            Failure::Config,
            "no AWS credentials: set AWS_PROFILE, AWS_ACCESS_KEY_ID, or another source that the AWS tools know",
        ),
        CredentialsError::InvalidConfiguration(_) => {
            (Failure::Config, "the configuration of the AWS credentials is wrong: check ~/.aws and the AWS_* variables")
        }
        _ if refused.iter().any(|word| words.contains(word)) => (
            Failure::Unauthenticated,
            "AWS refuses to give this host credentials: check the role and who may assume it",
        ),
        _ => (Failure::Unreachable, "the source of the AWS credentials does not answer: try again when it can"),
    }
}

impl Refused {
    pub(super) fn new<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + StdError + Send + Sync + 'static,
    {
        let chain = DisplayErrorContext(error).to_string().replace(['\n', '\r'], " ");
        let chain: String = chain.chars().take(2000).collect();
        let fin = |failure, message: String| Self {
            meaning: Meaning::Final,
            said: chain.clone(),
            error: KmsError::new(failure, message).with_detail(chain.clone()),
        };
        if find::<PlainHttp>(error).is_some() {
            return fin(
                Failure::Config,
                "the address of AWS KMS is not https, and keys travel over https only: check AWS_ENDPOINT_URL_KMS"
                    .into(),
            );
        }
        if let Some(credentials) = find::<CredentialsError>(error) {
            let (failure, line) = of_credentials(credentials, &chain);
            return fin(failure, line.into());
        }
        let tls = find::<rustls::Error>(error);
        if matches!(tls, Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented)) {
            return fin(
                Failure::Untrusted,
                "the certificate of what answers for AWS KMS is not vouched for: check AWS_CA_BUNDLE and the address"
                    .into(),
            );
        }
        match error {
            SdkError::ServiceError(service) => {
                let status = service.raw().status().as_u16();
                let code = service.err().code().unwrap_or_default();
                let words = service.err().message().unwrap_or_default();
                Self::of_service(status, code, words, service.raw().headers().get("x-amzn-requestid"))
            }
            SdkError::TimeoutError(_) => {
                fin(Failure::Unreachable, "AWS KMS did not answer in time: try again when it can".into())
            }
            SdkError::DispatchFailure(failure) if failure.is_timeout() => {
                fin(Failure::Unreachable, "AWS KMS did not answer in time: try again when it can".into())
            }
            SdkError::DispatchFailure(_) => {
                fin(Failure::Unreachable, "AWS KMS cannot be reached: try again when it can".into())
            }
            SdkError::ResponseError(response) => {
                let status = response.raw().status().as_u16();
                if find::<http_body_util::LengthLimitError>(error).is_some() {
                    let line = "the answer of AWS KMS is larger than it ever is: is AWS_ENDPOINT_URL_KMS right?";
                    fin(Failure::Protocol, line.into())
                } else if status >= 500 {
                    fin(Failure::Unavailable, "AWS KMS cannot serve now: try again".into())
                } else if chain.contains("hyper") || chain.contains("IncompleteMessage") {
                    fin(Failure::Unreachable, "the connection to AWS KMS broke off within an answer: try again".into())
                } else {
                    fin(Failure::Protocol, "what answers is not AWS KMS: check AWS_ENDPOINT_URL_KMS".into())
                }
            }
            _ => fin(Failure::Config, format!("AWS KMS cannot be asked: {chain}")),
        }
    }

    fn of_service(status: u16, code: &str, words: &str, request: Option<&str>) -> Self {
        let one_line = |text: &str| text.replace(['\n', '\r'], " ").chars().take(1000).collect::<String>();
        let said = format!("HTTP {status} {}: {}", one_line(code), one_line(words));
        let detail = match request {
            Some(id) => format!("{said} (request {})", one_line(id)),
            None => said.clone(),
        };
        let (meaning, failure) = class(code, words).unwrap_or({
            // Somebody in between, or a code that is new.
            if status >= 500 || status == 429 {
                (Meaning::Final, Failure::Unavailable)
            } else {
                (Meaning::Final, Failure::Protocol)
            }
        });
        let message = match failure {
            Failure::Missing => "AWS KMS has no such key: check the ARN and the region".to_owned(),
            Failure::Suspended => "the AWS KMS key is disabled: its administrator can enable it again".to_owned(),
            Failure::BadData => {
                "AWS KMS rejects the wrapped key: it is damaged, or belongs to another volume".to_owned()
            }
            Failure::Denied => "no policy lets these AWS credentials do this with the key: see docs/KMS.md".to_owned(),
            Failure::Config => "AWS does not accept the time of this host's requests: set the clock".to_owned(),
            Failure::Unauthenticated => format!("AWS does not accept these credentials ({code}): renew them"),
            Failure::Unsuitable => format!("the AWS KMS key is not one for this ({code}): see docs/KMS.md"),
            Failure::Unavailable => {
                format!("AWS KMS cannot serve now ({}): try again", if code.is_empty() { "5xx" } else { code })
            }
            _ => {
                "what answers for AWS KMS gave an answer that is not understood: check AWS_ENDPOINT_URL_KMS".to_owned()
            }
        };
        Self { meaning, said, error: KmsError::new(failure, one_line(&message)).with_detail(detail) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_single_answer_means_destroyed() {
        for code in ["NotFoundException", "KMSInvalidStateException", "DisabledException", "AccessDeniedException", ""]
        {
            for status in [400, 403, 404, 500] {
                let refused = Refused::of_service(status, code, "Key 'arn' does not exist", None);
                assert!(!matches!(refused.error.failure, Failure::Destroyed | Failure::Recreated), "{code}");
            }
        }
    }

    #[test]
    fn codes_have_their_class() {
        for (status, code, words, failure) in [
            (400, "NotFoundException", "", Failure::Missing),
            (400, "InvalidSignatureException", "Signature expired: 20260101T000000Z is now earlier", Failure::Config),
            (400, "InvalidSignatureException", "The request signature we calculated", Failure::Unauthenticated),
            (400, "ExpiredTokenException", "", Failure::Unauthenticated),
            (400, "ThrottlingException", "Rate exceeded", Failure::Unavailable),
            (500, "KMSInternalException", "", Failure::Unavailable),
            (502, "", "", Failure::Unavailable),
            (403, "", "<html>", Failure::Protocol),
            (400, "NewException", "", Failure::Protocol),
        ] {
            let refused = Refused::of_service(status, code, words, None);
            assert_eq!(refused.error.failure, failure, "{status} {code}");
            assert!(!refused.error.message.contains('\n'));
        }
    }
}
