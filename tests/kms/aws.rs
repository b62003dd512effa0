//! What each of AWS KMS's answers comes to: a case per row of docs/KMS.md's table that AWS KMS can give.

use std::path::PathBuf;
use std::time::Duration;

use lethefs::kms::aws::{Aws, Config};
use lethefs::kms::uri::AwsKey;
use lethefs::kms::{Destruction, Failure, KeyAdmin, KeyIdentity, KeySource, KmsError, MadeKey, Standing, Wrapped};
use serde_json::{Value, json};

use super::aws_server::{REGION, Server};
use super::{BINDING, error, failure};

/// A patient configuration that logs in as a role.
pub(crate) fn config(server: &Server, role: &str) -> Config {
    with_profile(server, server.path(&format!("{role}.profile")))
}

fn with_profile(server: &Server, profile: PathBuf) -> Config {
    Config {
        ca_file: Some(server.ca()),
        profile_file: Some(profile),
        deletion_days: 7,
        connect_timeout: Duration::from_secs(20),
        attempt_timeout: Duration::from_secs(30),
        attempts: 1,
        timeout: Duration::from_secs(30),
    }
}

fn key(id: &str) -> AwsKey {
    AwsKey { key: Server::arn(id), region: None }
}

/// A key and something wrapped under it.
struct Case<'a> {
    server: &'a Server,
    id: String,
    host: Aws,
    admin: Aws,
    made: MadeKey,
}

impl<'a> Case<'a> {
    fn new(server: &'a Server) -> Self {
        let id = server.create_key(&json!({}));
        let (host, admin) = (Aws::new(&key(&id), config(server, "host")), Aws::new(&key(&id), config(server, "admin")));
        let made = host.make(&BINDING).unwrap_or_else(|e| panic!("{e} {:?}", e.detail));
        Self { server, id, host, admin, made }
    }

    fn unwrap_by(&self, who: &Aws) -> Result<(), KmsError> {
        let key = who.unwrap(&BINDING, &self.made.wrapped, &self.made.identity)?;
        assert!(key.same_as(&self.made.key));
        Ok(())
    }

    #[track_caller]
    fn opens(&self) {
        self.unwrap_by(&self.host).unwrap_or_else(|e| panic!("{e} {:?}", e.detail));
    }

    #[track_caller]
    fn refuses_by(&self, who: &Aws, class: Failure, words: &str) {
        let error = error(words, self.unwrap_by(who));
        let said = format!("{} ({})", error.message, error.detail.unwrap_or_default());
        assert_eq!(error.failure, class, "{said}");
        assert!(said.contains(words), "`{words}` is not in: {said}");
        assert!(!said.contains("secret-of-"), "shows a secret: {said}");
        assert_ne!(class.standing(), Standing::Destroyed, "{said}");
    }

    #[track_caller]
    fn refuses(&self, class: Failure, words: &str) {
        self.refuses_by(&self.host, class, words);
    }

    /// An unwrap when the service answers so.
    #[track_caller]
    fn told(&self, answer: &Value, class: Failure, words: &str) {
        self.server.tell(answer);
        self.refuses(class, words);
        self.server.tell(&json!({}));
        self.opens();
    }
}

#[test]
fn keys() {
    let server = Server::start();
    let case = Case::new(&server);
    let KeyIdentity::Aws { key_arn, created, origin, key_spec } = &case.made.identity else { panic!("AWS") };
    assert_eq!((key_arn, origin.as_str(), key_spec.as_str()), (&Server::arn(&case.id), "AWS_KMS", "SYMMETRIC_DEFAULT"));
    assert!(*created > 1_600_000_000, "{created}");

    // One request, with the key's ARN (the server refuses others) and the readable context.
    server.calls();
    case.opens();
    assert_eq!(server.calls(), ["Decrypt"]);

    // Disabled; scheduled for deletion; the deletion cancelled.
    case.admin.suspend(&case.made.identity).expect("disabled");
    case.refuses(Failure::Suspended, "disabled");
    case.admin.restore().expect("enabled");
    case.opens();
    let Destruction::Scheduled { at } = case.admin.destroy(&case.made.identity).expect("scheduled") else { panic!() };
    let days = (at.parse::<jiff::Timestamp>().expect("time") - jiff::Timestamp::now()).total(jiff::Unit::Hour);
    assert!((6.0 * 24.0..=7.0 * 24.0).contains(&days.expect("hours")), "{at}");
    case.refuses(Failure::Suspended, "cancel");
    let proof = error("scheduled", case.admin.prove_destroyed(&case.made.identity, None));
    assert!(proof.message.contains("cancel"), "{proof}");
    // Without the right to look at the key, the service's words count.
    server.set_roles(&[("host", "kms:DescribeKey")]);
    case.refuses(Failure::Suspended, "brought back");
    server.set_roles(&[]);

    // Deleted: both sides see it, and the proof has two answers about this very key.
    server.expire();
    let gone = error("deleted", case.unwrap_by(&case.host));
    assert_eq!((gone.failure, gone.failure.standing()), (Failure::Destroyed, Standing::Destroyed), "{gone}");
    let proof = case.admin.prove_destroyed(&case.made.identity, None).expect("proved");
    assert_eq!(proof.findings.len(), 2);
    assert!(proof.findings.iter().all(|f| f.answered.contains("NotFoundException") && f.answered.contains(key_arn)));
    server.set_roles(&[("host", "kms:DescribeKey")]);
    case.refuses(Failure::Missing, "not shown");
    server.set_roles(&[]);
    // "Not found" in words that are not about this key shows nothing.
    server.tell(
        &json!({ "operation": "*", "status": 400, "code": "NotFoundException", "message": "Key 'x' does not exist" }),
    );
    case.refuses(Failure::Missing, "not shown");
    assert_eq!(failure("words", case.admin.prove_destroyed(&case.made.identity, None)), Failure::NotDestroyed);
    server.tell(&json!({}));

    // The imported material is deleted: it can be imported again.
    let case = Case::new(&server);
    server.set_state(&case.id, "PendingImport");
    case.refuses(Failure::Suspended, "import");
    let restored = error("import", case.admin.restore());
    assert!(restored.failure == Failure::Suspended && restored.message.contains("import"), "{restored}");
    // States that pass.
    server.set_state(&case.id, "Enabled");
    case.opens();
    for state in ["Updating", "Unavailable"] {
        let told = json!({ "operation": "Decrypt", "status": 400, "code": "KMSInvalidStateException", "message": "x" });
        server.set_state(&case.id, state);
        server.tell(&told);
        case.refuses(Failure::Unavailable, "may pass");
        server.tell(&json!({}));
    }
    server.set_state(&case.id, "Enabled");

    // Another key's wrapped text, and what is none.
    let other = Case::new(&server);
    for wrapped in [&other.made.wrapped, &Wrapped("vault:v1:AAAA".into()), &Wrapped("lethefs-awskms:v1:".into())] {
        let opened = case.host.unwrap(&BINDING, wrapped, &case.made.identity);
        assert_eq!(failure(&wrapped.0, opened), Failure::BadData);
    }
    // A URI that cannot mean the recorded key.
    let opened = other.host.unwrap(&BINDING, &case.made.wrapped, &case.made.identity);
    assert_eq!(failure("other key", opened), Failure::Config);
}

#[test]
fn names_and_kinds_of_keys() {
    let server = Server::start();
    let case = Case::new(&server);
    // By id and by alias: pinned to the ARN, whatever the alias means later.
    let by_id = AwsKey { key: case.id.clone(), region: Some(REGION.into()) };
    case.unwrap_by(&Aws::new(&by_id, config(&server, "host"))).expect("by id");
    server.owner("create_alias", &json!({ "AliasName": "alias/vol1", "TargetKeyId": case.id }));
    let alias = AwsKey { key: "alias/vol1".into(), region: Some(REGION.into()) };
    let by_alias = Aws::new(&alias, config(&server, "host"));
    let made = by_alias.make(&BINDING).expect("by alias");
    assert_eq!(made.identity, case.made.identity);
    server.tell(&json!({ "operation": "DescribeKey", "status": 400, "code": "AccessDeniedException", "message": "" }));
    case.unwrap_by(&by_alias).expect("the ARN is asked, not the alias");
    server.tell(&json!({}));
    let missing = AwsKey { key: "alias/none".into(), region: Some(REGION.into()) };
    assert_eq!(failure("alias", Aws::new(&missing, config(&server, "host")).make(&BINDING)), Failure::Missing);

    for (options, unsuitable, warning) in [
        (json!({ "KeySpec": "RSA_2048", "KeyUsage": "ENCRYPT_DECRYPT" }), true, "not symmetric"),
        (json!({ "KeySpec": "HMAC_256", "KeyUsage": "GENERATE_VERIFY_MAC" }), true, "not symmetric"),
        (json!({ "Origin": "EXTERNAL" }), false, "imported"),
        (json!({ "MultiRegion": true }), false, "replicas"),
    ] {
        let id = server.create_key(&options);
        let host = Aws::new(&key(&id), config(&server, "host"));
        let described = KeySource::describe(&host).expect("described");
        assert!(described.warnings.iter().any(|told| told.contains(warning)), "{options}: {:?}", described.warnings);
        assert_eq!(described.quantum_durable, !unsuitable, "{options}");
        if options["Origin"] == "EXTERNAL" {
            assert_eq!(failure("no material", host.make(&BINDING)), Failure::Suspended);
            server.set_state(&id, "Enabled");
        }
        let made = host.make(&BINDING);
        assert_eq!(made.as_ref().err().map(|e| e.failure), unsuitable.then_some(Failure::Unsuitable), "{options}");
    }
}

#[test]
fn credentials_and_answers() {
    let server = Server::start();
    let case = Case::new(&server);

    // A right taken away: at once, and back.
    server.set_roles(&[("host", "kms:Decrypt")]);
    case.refuses(Failure::Denied, "AccessDeniedException");
    server.set_roles(&[]);
    case.opens();
    // Credentials expired or revoked: fetched anew once, and no more.
    for (change, words) in [("expired", "ExpiredTokenException"), ("gone", "UnrecognizedClientException")] {
        server.set_roles(&[("host", change)]);
        server.calls();
        case.refuses(Failure::Unauthenticated, words);
        assert_eq!(server.calls(), ["Decrypt", "Decrypt"], "{change}");
    }
    // New ones in the same place are taken up by themselves.
    server.profile_with("host", &server.address(), "AKIDadmin", "secret-of-admin");
    case.refuses(Failure::Denied, "AccessDeniedException");
    server.set_roles(&[]);
    server.profile("host", &server.address());
    let wrong = server.profile_with("wrong", &server.address(), "AKIDhost", "another");
    let wrong = Aws::new(&key(&case.id), with_profile(&server, wrong));
    case.refuses_by(&wrong, Failure::Unauthenticated, "InvalidSignatureException");
    let case = Case { host: Aws::new(&key(&case.id), config(&server, "host")), ..case };
    case.opens();

    // What the service says of itself, and of this host's clock.
    for (status, code, words, class) in [
        (400, "ThrottlingException", "Rate exceeded", Failure::Unavailable),
        (500, "KMSInternalException", "", Failure::Unavailable),
        (500, "KeyUnavailableException", "", Failure::Unavailable),
        (503, "DependencyTimeoutException", "", Failure::Unavailable),
        (400, "LimitExceededException", "", Failure::Unavailable),
        (400, "InvalidSignatureException", "Signature expired: x is now earlier than y", Failure::Config),
        (400, "SomethingNewException", "", Failure::Protocol),
        (400, "InvalidKeyUsageException", "", Failure::Unsuitable),
    ] {
        let answer = json!({ "operation": "Decrypt", "status": status, "code": code, "message": words });
        case.told(&answer, class, code);
        assert_eq!(class.standing(), Standing::Uncertain, "{code}");
    }
    // What is not the service: plain text, a proxy, an answer without end, and half a one.
    let raw = |status: u16, text: &str| json!({ "operation": "Decrypt", "status": status, "raw": text });
    case.told(&raw(400, "Client sent an HTTP request to an HTTPS server."), Failure::Protocol, "AWS_ENDPOINT_URL_KMS");
    case.told(&raw(502, "bad gateway"), Failure::Unavailable, "try again");
    case.told(&raw(403, "<html>Forbidden</html>"), Failure::Protocol, "AWS_ENDPOINT_URL_KMS");
    case.told(&raw(200, "{\"Plaintext\":"), Failure::Protocol, "AWS_ENDPOINT_URL_KMS");
    case.told(&raw(200, "{}"), Failure::Protocol, "another key");
    let endless = json!({ "operation": "Decrypt", "status": 200, "raw": "A".repeat(4096), "times": 20_000 });
    case.told(&endless, Failure::Protocol, "larger");
}

#[test]
fn the_way_to_the_service() {
    let server = Server::start();
    let case = Case::new(&server);
    let at = |server: &Server, address: &str| {
        let profile = server.profile("host", address);
        Aws::new(&key(&case_id(&case.made.identity)), with_profile(server, profile))
    };
    let address = server.address();

    // Not https: refused before anything is sent.
    server.calls();
    case.refuses_by(&at(&server, &address.replace("https", "http")), Failure::Config, "https");
    assert_eq!(server.calls(), Vec::<String>::new());
    // Another root, another name.
    let others = tempfile::tempdir().expect("temporary directory");
    super::openbao::make_certificates(others.path());
    let profile = server.profile("host", &address);
    let config = Config { ca_file: Some(others.path().join("ca.pem")), ..with_profile(&server, profile.clone()) };
    case.refuses_by(&Aws::new(&key(&case.id), config), Failure::Untrusted, "AWS_CA_BUNDLE");
    case.refuses_by(&at(&server, &address.replace("127.0.0.1", "localhost")), Failure::Untrusted, "AWS_CA_BUNDLE");
    for (file, words) in [("none.pem", "cannot read"), ("roles.json", "no PEM")] {
        let config = Config { ca_file: Some(server.path(file)), ..with_profile(&server, profile.clone()) };
        case.refuses_by(&Aws::new(&key(&case.id), config), Failure::Config, words);
    }
    // Hung: within the limits, attempts and all.
    let hasty = Config {
        attempt_timeout: Duration::from_millis(200),
        attempts: 2,
        timeout: Duration::from_secs(2),
        ..with_profile(&server, server.profile("host", &address))
    };
    server.tell(&json!({ "operation": "Decrypt", "hang": 30 }));
    case.refuses_by(&Aws::new(&key(&case.id), hasty), Failure::Unreachable, "in time");
    server.tell(&json!({}));
    // Broken off within an answer.
    let half = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-amz-json-1.1\r\ncontent-length: 1000\r\n\r\n{".to_vec();
    let stub = super::stub::Stub::start(half);
    let config = Config {
        ca_file: Some(stub.dir.path().join("ca.pem")),
        ..with_profile(&server, server.profile("host", &stub.address))
    };
    case.refuses_by(&Aws::new(&key(&case.id), config), Failure::Unreachable, "broke off");
    server.profile("host", &address);
    // No credentials at all.
    std::fs::write(server.path("empty.profile"), format!("[default]\nregion = {REGION}\n")).expect("written");
    let none = Aws::new(&key(&case.id), with_profile(&server, server.path("empty.profile")));
    let refused = error("no credentials", case.unwrap_by(&none));
    assert_eq!(refused.failure.standing(), Standing::Uncertain, "{refused} {:?}", refused.detail);
    // Refused.
    let host = at(&server, &address);
    case.unwrap_by(&host).expect("opens");
    server.kill();
    case.refuses_by(&host, Failure::Unreachable, "reached");
}

fn case_id(identity: &KeyIdentity) -> String {
    identity.name()
}
