//! What a token's return codes mean: the one table, and nothing that asks again.
//!
//! The names are Cryptoki's without `CKR_`. Codes that need a second look (an empty search, a decryption that fails for no
//! said reason) get it in [`super::token`] and [`super::diagnose`].

use std::path::Path;

use cryptoki::error::{Error, RvError};

use crate::kms::{Failure, KmsError};

/// The class of a return code if nothing more is asked.
pub(super) fn class(code: RvError) -> Failure {
    match code {
        // The PIN, or the right to use it.
        RvError::PinIncorrect
        | RvError::PinInvalid
        | RvError::PinLenRange
        | RvError::PinExpired
        | RvError::PinLocked
        | RvError::UserPinNotInitialized => Failure::Unauthenticated,
        RvError::ActionProhibited
        | RvError::AttributeReadOnly
        | RvError::TokenWriteProtected
        | RvError::FunctionRejected => Failure::Denied,
        RvError::KeyFunctionNotPermitted => Failure::Suspended,
        // Not by itself a sign of anything: also after a logout, and when the token's store is gone.
        RvError::ObjectHandleInvalid | RvError::KeyHandleInvalid => Failure::Missing,
        RvError::EncryptedDataInvalid | RvError::EncryptedDataLenRange => Failure::BadData,
        RvError::MechanismInvalid
        | RvError::MechanismParamInvalid
        | RvError::FunctionNotSupported
        | RvError::KeySizeRange
        | RvError::KeyTypeInconsistent
        | RvError::RandomNoRng => Failure::Unsuitable,
        RvError::TokenNotPresent | RvError::TokenNotRecognized | RvError::DeviceRemoved | RvError::SlotIdInvalid => {
            Failure::Unreachable
        }
        RvError::GeneralError
        | RvError::FunctionFailed
        | RvError::DeviceError
        | RvError::DeviceMemory
        | RvError::HostMemory
        | RvError::SessionCount
        | RvError::SessionClosed
        | RvError::SessionHandleInvalid
        | RvError::SessionExists
        | RvError::UserNotLoggedIn
        | RvError::UserAnotherAlreadyLoggedIn
        | RvError::UserTooManyTypes
        | RvError::OperationActive
        | RvError::FunctionCanceled
        | RvError::Cancel
        | RvError::CryptokiNotInitialized
        | RvError::FipsSelfTestFailed
        | RvError::LibraryLoadFailed
        | RvError::CantLock
        | RvError::NeedToCreateThreads => Failure::Unavailable,
        _ => Failure::Protocol,
    }
}

/// The code of an error, if it is one.
pub(super) fn code(error: &Error) -> Option<RvError> {
    match error {
        Error::Pkcs11(code, _) => Some(*code),
        _ => None,
    }
}

/// An error that is final. `what` names the token or key, `did` what was asked of it.
pub(super) fn failed(error: &Error, what: &str, did: &str) -> KmsError {
    // The crate's own text has a paragraph of the standard for each code; the name says it.
    let said = match error {
        Error::Pkcs11(code, function) => format!("C_{function:?}: CKR {code:?}"),
        other => other.to_string().replace('\n', " "),
    };
    let failure = match error {
        Error::Pkcs11(code, _) => class(*code),
        Error::LibraryLoading(_) | Error::MissingSymbol(_) | Error::PinNotSet => Failure::Config,
        Error::NotSupported | Error::NullFunctionPointer => Failure::Unsuitable,
        _ => Failure::Protocol,
    };
    let message = match failure {
        Failure::Unauthenticated if code(error) == Some(RvError::PinLocked) => {
            format!("{what} has locked its PIN: its security officer can set a new one (C_InitPIN)")
        }
        Failure::Unauthenticated => {
            format!("{what} does not accept the PIN ({said}): put the right one into LETHEFS_PKCS11_PIN_FILE")
        }
        Failure::Denied => format!("{what} does not allow to {did} ({said})"),
        Failure::Suspended => {
            format!("{what} is switched off (CKA_DECRYPT is false): who has the right can switch it on again")
        }
        Failure::Missing => format!("{what} is not there any more"),
        Failure::BadData => format!("{what} rejects the wrapped key: it is damaged, or belongs to another volume"),
        Failure::Unsuitable => format!("{what} cannot {did} ({said}): AES-GCM with a 256-bit key is needed"),
        Failure::Unreachable => format!("{what} is not in its slot ({said}): put it back"),
        Failure::Unavailable => format!("{what} cannot {did} now ({said}): try again"),
        _ => format!("{what} gave an answer that is not understood when asked to {did} ({said})"),
    };
    KmsError::new(failure, message).with_detail(said)
}

/// A module that has not come back in time.
pub(super) fn never_answered(module: &Path) -> KmsError {
    KmsError::new(
        Failure::Unreachable,
        format!("the token's module {} does not answer: check the device and its connection", module.display()),
    )
}

#[cfg(test)]
mod tests {
    use cryptoki::context::Function;
    use cryptoki::error::Rv;

    use super::*;

    fn codes() -> impl Iterator<Item = RvError> {
        (1..0x400).filter_map(|number| match Rv::from(number) {
            Rv::Error(code) => Some(code),
            Rv::Ok => None,
        })
    }

    #[test]
    fn no_code_means_destroyed_or_another_key() {
        assert!(codes().count() > 100);
        for code in codes() {
            let class = class(code);
            assert!(!matches!(class, Failure::Destroyed | Failure::Recreated | Failure::NotDestroyed), "{code:?}");
        }
    }

    #[test]
    fn lines_are_lines() {
        for code in codes() {
            let error = failed(&Error::Pkcs11(code, Function::Decrypt), "token key k", "unwrap keys");
            assert!(error.failure == class(code) && error.message.len() < 200, "{error}");
            assert!(!error.message.contains('\n'), "{error}");
        }
        let error = failed(&Error::Pkcs11(RvError::PinIncorrect, Function::Login), "token t", "log in");
        assert!(error.message.contains("C_Login: CKR PinIncorrect"), "{error}");
    }
}
