//! What each of a token's answers comes to: a case per row of docs/KMS.md's table that a token can give.
//!
//! SoftHSM gives most; a module in front of it (tests/support/module.c) gives what it cannot be brought to say.

use std::time::{Duration, Instant};

use lethefs::kms::pkcs11::{Config, Pkcs11};
use lethefs::kms::uri::TokenKey;
use lethefs::kms::{Destruction, Failure, KeyAdmin, KeyIdentity, KeySource, MadeKey, Standing, Wrapped};

use super::softhsm::{LABEL, PIN, Token};
use super::{BINDING, error, failure};

/// A patient configuration.
pub(crate) fn config(token: &Token) -> Config {
    Config { module: token.module(), pin_file: Some(token.pin_file()), timeout: Duration::from_secs(30) }
}

fn key(label: &str) -> TokenKey {
    TokenKey { token: Some(LABEL.into()), object: Some(label.into()), ..TokenKey::default() }
}

/// A key and something wrapped under it.
struct Case<'a> {
    token: &'a Token,
    label: String,
    id: &'static str,
    provider: Pkcs11,
    made: MadeKey,
}

impl<'a> Case<'a> {
    fn new(token: &'a Token, label: &str, id: &'static str) -> Self {
        token.create_key(label, id);
        let provider = Pkcs11::new(&key(label), config(token));
        let made = provider.make(&BINDING).unwrap_or_else(|e| panic!("{label}: {e} {:?}", e.detail));
        Self { token, label: label.to_owned(), id, provider, made }
    }

    #[track_caller]
    fn opens(&self) {
        let key = self.provider.unwrap(&BINDING, &self.made.wrapped, &self.made.identity);
        let key = key.unwrap_or_else(|e| panic!("{}: {e} {:?}", self.label, e.detail));
        assert!(key.same_as(&self.made.key), "{}", self.label);
    }

    #[track_caller]
    fn refuses(&self, class: Failure, words: &str) {
        let error = error(&self.label, self.provider.unwrap(&BINDING, &self.made.wrapped, &self.made.identity));
        let said = format!("{} ({})", error.message, error.detail.unwrap_or_default());
        assert_eq!(error.failure, class, "{}: {said}", self.label);
        assert!(said.contains(words), "{}: `{words}` is not in: {said}", self.label);
        assert!(!said.contains(PIN), "shows the PIN: {said}");
    }

    /// An unwrap, and a proof, when the module answers so: the class, and never a proof.
    #[track_caller]
    fn told(&self, lines: &str, class: Failure, words: &str) {
        self.token.tell(lines);
        self.refuses(class, words);
        let proof = self.provider.prove_destroyed(&self.made.identity, None);
        assert_eq!(failure(lines, proof), Failure::NotDestroyed, "{lines}");
        self.token.tell("");
        self.opens();
    }
}

#[test]
fn keys() {
    let token = Token::new();

    // Deleted by somebody else, and then another made under its id.
    let case = Case::new(&token, "deleted", "0a01");
    let KeyIdentity::Pkcs11 { token_firmware, key_id, token_model, .. } = &case.made.identity else { panic!("token") };
    assert!(token_firmware.0.contains('.') && !token_model.is_empty() && key_id == "0a01");
    token.delete_key(case.id);
    case.refuses(Failure::Destroyed, "C_FindObjects");
    assert_eq!(Failure::Destroyed.standing(), Standing::Destroyed);
    let proof = case.provider.prove_destroyed(&case.made.identity, None).expect("proved");
    let asked: Vec<_> = proof.findings.iter().map(|finding| finding.asked.as_str()).collect();
    assert_eq!(asked.len(), 4, "{asked:?}");
    assert!(asked[0] == "C_GetTokenInfo" && asked[1].starts_with("C_Login") && asked[2].ends_with("CKA_ID=0a01"));
    assert!(!proof.self_asserted && proof.findings[2].answered.ends_with("0 objects"));
    token.create_key("deleted", case.id);
    case.refuses(Failure::Recreated, "another was made");
    let proof = error("hidden", case.provider.prove_destroyed(&case.made.identity, None));
    assert!(proof.failure == Failure::NotDestroyed && proof.message.contains("hides"), "{proof}");
    let refused = error("destroy", case.provider.destroy(&case.made.identity));
    assert!(refused.failure == Failure::Recreated && refused.message.ends_with("nothing was changed"), "{refused}");

    // Another key beside it under the same id: the recorded one is found by its check value, and destroyed with care.
    let case = Case::new(&token, "shared", "0a02");
    token.create_key("intruder", case.id);
    case.opens();
    assert_eq!(failure("shared id", case.provider.destroy(&case.made.identity)), Failure::Recreated);
    case.opens();

    // Two keys of one name.
    let case = Case::new(&token, "twice", "0a03");
    token.create_key("twice", "0a04");
    case.opens();
    let refused = error("twice", case.provider.make(&BINDING));
    assert!(refused.failure == Failure::Config && refused.message.contains("2 keys"), "{refused}");

    // Suspended: a refusal that can be undone. A key that was never made, and what is no wrapped key.
    let case = Case::new(&token, "suspended", "0a05");
    assert_eq!(case.provider.suspend(&case.made.identity).expect("suspended"), Some(Destruction::Suspended));
    case.refuses(Failure::Suspended, "CKA_DECRYPT");
    assert!(case.provider.describe_both().iter().any(|warning| warning.contains("switched off")));
    case.provider.restore().expect("restored");
    case.opens();
    assert_eq!(failure("never made", Pkcs11::new(&key("none"), config(&token)).make(&BINDING)), Failure::Missing);
    let other = Wrapped("vault:v1:AAAA".into());
    assert_eq!(failure("form", case.provider.unwrap(&BINDING, &other, &case.made.identity)), Failure::BadData);

    // Not fit to make keys under.
    for (label, options, fault) in [
        ("short", "--key-type AES:16 --sensitive", "256 bits"),
        ("readable", "--key-type AES:32 --extractable", "read out"),
        ("noid", "--key-type AES:32 --sensitive", "no CKA_ID"),
    ] {
        token.create_with(&format!("{options} --label {label}"));
        let provider = Pkcs11::new(&key(label), config(&token));
        let refused = error(label, provider.make(&BINDING));
        assert!(refused.failure == Failure::Unsuitable && refused.message.contains(fault), "{label}: {refused}");
        assert!(!provider.describe_both().is_empty(), "{label}");
    }
}

trait Both {
    fn describe_both(&self) -> Vec<String>;
}

impl Both for Pkcs11 {
    fn describe_both(&self) -> Vec<String> {
        KeySource::describe(self).expect("described").warnings
    }
}

#[test]
fn tokens() {
    let token = Token::new();
    let case = Case::new(&token, "vol1", "01");

    // The PIN: refused once, and not tried again, or the token would lock itself; another one is tried.
    token.set_pin("13572468");
    token.calls("C_Login");
    case.refuses(Failure::Unauthenticated, "PinIncorrect");
    assert_eq!(token.calls("C_Login"), 1);
    case.refuses(Failure::Unauthenticated, "not tried again");
    assert_eq!(failure("proof", case.provider.prove_destroyed(&case.made.identity, None)), Failure::NotDestroyed);
    assert_eq!(token.calls("C_Login"), 0);
    token.set_pin(PIN);
    case.opens();
    std::fs::remove_file(token.pin_file()).expect("removed");
    case.refuses(Failure::Config, "cannot read the PIN");
    token.set_pin(PIN);
    let without = Pkcs11::new(&key("vol1"), Config { pin_file: None, ..config(&token) });
    let refused = error("no PIN", without.unwrap(&BINDING, &case.made.wrapped, &case.made.identity));
    assert!(refused.failure == Failure::Config && refused.message.contains("LETHEFS_PKCS11_PIN_FILE"), "{refused}");

    // The token's store vanishes: SoftHSM's search then finds nothing, with CKR_OK, which must not be believed.
    token.set_present(false);
    case.refuses(Failure::Unavailable, "");
    assert_eq!(failure("proof", case.provider.prove_destroyed(&case.made.identity, None)), Failure::NotDestroyed);
    token.set_present(true);
    case.opens();

    // No such token; and in its place another one of the same name.
    let elsewhere = TokenKey { token: Some("none".into()), ..key("vol1") };
    let elsewhere = Pkcs11::new(&elsewhere, config(&token));
    let away = failure("none", elsewhere.unwrap(&BINDING, &case.made.wrapped, &case.made.identity));
    assert_eq!((away, away.standing()), (Failure::Unreachable, Standing::Uncertain));
    let mut other = case.made.identity.clone();
    if let KeyIdentity::Pkcs11 { token_serial, .. } = &mut other {
        *token_serial = "0000".into();
    }
    let refused = error("other token", case.provider.unwrap(&BINDING, &case.made.wrapped, &other));
    assert!(refused.failure == Failure::Recreated && refused.message.contains("another one"), "{refused}");
    assert_eq!(failure("proof", case.provider.prove_destroyed(&other, None)), Failure::NotDestroyed);

    // No module.
    for (module, words) in [("/none.so", "cannot open"), ("/etc/passwd", "cannot be loaded")] {
        let provider = Pkcs11::new(&key("vol1"), Config { module: module.into(), ..config(&token) });
        let refused = error(module, provider.unwrap(&BINDING, &case.made.wrapped, &case.made.identity));
        assert!(refused.failure == Failure::Config && refused.message.contains(words), "{refused}");
    }
}

#[test]
fn codes_that_no_softhsm_gives() {
    let token = Token::new();
    let case = Case::new(&token, "vol1", "01");
    for (lines, class, words) in [
        // The device, its driver, its connection.
        ("C_GetSlotList 0x30", Failure::Unavailable, "C_GetSlotList"),
        ("C_GetTokenInfo 0xe0", Failure::Unreachable, "slot"),
        ("C_GetTokenInfo 0x05", Failure::Unavailable, "GeneralError"),
        ("C_OpenSession 0xe0", Failure::Unreachable, "TokenNotPresent"),
        ("C_OpenSession 0xb1", Failure::Unavailable, "SessionCount"),
        ("C_Login 0x30", Failure::Unavailable, "DeviceError"),
        ("C_Login 0x05", Failure::Unavailable, "GeneralError"),
        ("C_FindObjectsInit 0x32", Failure::Unreachable, "DeviceRemoved"),
        ("C_FindObjectsInit 0x101", Failure::Unavailable, "UserNotLoggedIn"),
        ("C_DecryptInit 0x31", Failure::Unavailable, "DeviceMemory"),
        ("C_Decrypt 0xb3", Failure::Unavailable, "SessionHandleInvalid"),
        // The credentials.
        ("C_Login 0xa3", Failure::Unauthenticated, "PinExpired"),
        ("C_Login 0xa4", Failure::Unauthenticated, "locked"),
        ("C_Login 0x102", Failure::Unauthenticated, "UserPinNotInitialized"),
        // A token that fails to decrypt anything says nothing of the wrapped key …
        ("C_Decrypt 0x05", Failure::Unavailable, "GeneralError"),
        ("C_Decrypt 0x06", Failure::Unavailable, "FunctionFailed"),
        ("C_Decrypt 0x80000001", Failure::Unavailable, "VendorDefined"),
        // … unless it says so.
        ("C_Decrypt 0x40", Failure::BadData, "EncryptedDataInvalid"),
        ("C_DecryptInit 0x68", Failure::Suspended, "CKA_DECRYPT"),
        ("C_DecryptInit 0x82", Failure::Missing, "ObjectHandleInvalid"),
        ("C_DecryptInit 0x70", Failure::Unsuitable, "MechanismInvalid"),
    ] {
        case.told_but_for_the_proof(lines, class, words);
    }
    // A random number generator that is not there, or does nothing.
    token.tell("C_GenerateRandom 0x121");
    assert_eq!(failure("no generator", case.provider.make(&BINDING)), Failure::Unsuitable);
    token.tell("C_GenerateRandom 0x0");
    let refused = error("zeros", case.provider.make(&BINDING));
    assert!(refused.failure == Failure::Protocol && refused.message.contains("random"), "{refused}");
    // A token whose attributes cannot be changed has no suspended state; one that keeps its keys cannot destroy.
    for code in ["0x10", "0x1b"] {
        token.tell(&format!("C_SetAttributeValue {code}"));
        assert_eq!(case.provider.suspend(&case.made.identity).expect("no such state"), None);
    }
    token.tell("C_SetAttributeValue 0x0");
    assert_eq!(failure("lied", case.provider.suspend(&case.made.identity)), Failure::Protocol);
    token.tell("C_DestroyObject 0x1b");
    assert_eq!(failure("kept", case.provider.destroy(&case.made.identity)), Failure::Denied);
    token.tell("C_DestroyObject 0x0");
    assert_eq!(failure("lied", case.provider.destroy(&case.made.identity)), Failure::Protocol);
    token.tell("");
    case.opens();
}

impl Case<'_> {
    /// As [`Case::told`], where only the decryption fails: then the proof says that the key is there.
    #[track_caller]
    fn told_but_for_the_proof(&self, lines: &str, class: Failure, words: &str) {
        self.told(lines, class, words);
        let standing = class.standing();
        let refusal = matches!(
            class,
            Failure::Unauthenticated | Failure::Suspended | Failure::Missing | Failure::BadData | Failure::Recreated
        );
        assert_eq!(standing, if refusal { Standing::Revoked } else { Standing::Uncertain }, "{lines}");
    }
}

#[test]
fn a_module_that_hangs_keeps_nobody_for_ever() {
    let token = Token::new();
    let case = Case::new(&token, "vol1", "01");
    let limit = Duration::from_millis(300);
    let hasty = Pkcs11::new(&key("vol1"), Config { timeout: limit, ..config(&token) });
    let ask = || failure("hung", hasty.unwrap(&BINDING, &case.made.wrapped, &case.made.identity));
    let threads = || std::fs::read_dir("/proc/self/task").expect("tasks").count();
    for function in ["C_Login", "C_FindObjects", "C_Decrypt", "C_CloseSession"] {
        token.tell(&format!("{function} hang"));
        let (began, before) = (Instant::now(), threads());
        for round in 0..5 {
            // A result may be out before the session is closed.
            if !(function == "C_CloseSession" && round == 0) {
                assert_eq!(ask(), Failure::Unreachable, "{function}, {round}");
            }
        }
        assert!(began.elapsed() >= limit, "{function}: did not hang");
        assert!(threads() <= before + 1, "{function}: a hung call costs one thread, not one for each that follows");
        // Comes back by itself, for all who ask.
        token.tell("");
        case.opens();
    }
    // Many at once: each is served.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| case.opens());
        }
    });
}

#[test]
fn the_documented_command_makes_a_right_key() {
    let docs = include_str!("../../docs/KMS.md");
    let section = docs.split_once("### Making the token's key").expect("heading").1;
    let commands: String = section
        .lines()
        .skip_while(|line| !line.starts_with("    "))
        .take_while(|line| line.starts_with("    "))
        .fold(String::new(), |all, line| all + line.trim() + "\n");
    assert!(commands.contains("--keygen"), "{commands}");
    let token = Token::new();
    let script = commands.replace("--token-label fs", &format!("--token-label '{LABEL}'"));
    let script = script.replace("--login", "--login --pin env:PIN");
    token.shell(&script);
    let provider = Pkcs11::new(&key("vol1"), config(&token));
    let described = KeySource::describe(&provider).expect("described");
    assert_eq!(described.warnings, Vec::<String>::new());
    assert!(described.quantum_durable && described.deletion_allowed);
    provider.make(&BINDING).expect("made");
}
