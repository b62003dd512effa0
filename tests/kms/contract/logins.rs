//! What credentials allow, and what becomes of them.

use lethefs::kms::transit::Credentials;
use lethefs::kms::{Failure, KeyAdmin, KeySource};
use reqwest::Method;
use serde_json::{Value, json};

use super::{Case, expect};
use crate::openbao::{Server, Storage, wait_for};
use crate::{BINDING, HOST_POLICY, approle, documented_policy, error, failure, token, tokens, transit};

#[test]
fn each_fate_of_a_login_has_its_class() {
    let server = &Server::start(Storage::Memory);

    // Least privilege: what the documented policies do not grant, the server refuses.
    let case = Case::new(server, "vol1");
    server.create_key("vol2");
    let (host, admin) = tokens(server, "vol1");
    let forbidden_to_both = [
        (Method::POST, "transit/encrypt/vol1"),
        (Method::POST, "transit/keys/vol1/trim"),
        (Method::GET, "transit/export/encryption-key/vol1"),
        (Method::GET, "transit/backup/vol1"),
        (Method::GET, "transit/keys?list=true"),
        (Method::GET, "transit/keys/vol2"),
        (Method::DELETE, "transit/keys/vol2"),
        (Method::POST, "transit/decrypt/vol2"),
        (Method::POST, "transit/rewrap/vol2"),
    ];
    let forbidden_to_host = [
        (Method::POST, "transit/keys/vol1"),
        (Method::DELETE, "transit/keys/vol1"),
        (Method::POST, "transit/keys/vol1/config"),
        (Method::POST, "transit/keys/vol1/rotate"),
        (Method::DELETE, "transit/keys/vol1/soft-delete"),
        (Method::POST, "transit/keys/vol1/soft-delete-restore"),
        (Method::POST, "transit/rewrap/vol1"),
    ];
    let forbidden_to_admin = [(Method::POST, "transit/decrypt/vol1"), (Method::POST, "transit/datakey/plaintext/vol1")];
    for (who, token, more) in [("host", &host, &forbidden_to_host[..]), ("admin", &admin, &forbidden_to_admin[..])] {
        for (method, path) in forbidden_to_both.iter().chain(more) {
            let (status, reply) = server.ask(token, method.clone(), path, &json!({}));
            assert_eq!(status, 403, "{who} may {method} {path}: {reply}");
        }
    }
    let may = case.admin.permissions().expect("permissions");
    let told = (may.make, may.unwrap, may.describe, may.suspend, may.destroy);
    assert_eq!(told, (Some(false), Some(false), Some(true), Some(true), Some(true)));
    let root = transit(server, "vol1", token(&server.token(&["everything"], "1h"))).permissions().expect("permissions");
    assert_eq!((root.make, root.destroy), (Some(true), Some(true)));
    for (what, refused) in [
        ("destroy", failure("destroy", case.host.destroy(&case.made.identity))),
        ("suspend", failure("suspend", case.host.suspend(&case.made.identity))),
        ("restore", failure("restore", case.host.restore())),
        ("make", failure("make", case.admin.make(&BINDING))),
        ("unwrap", failure("unwrap", case.unwrap_as(&case.admin))),
    ] {
        assert_eq!(refused, Failure::Denied, "{what}");
    }
    case.unwrap_as(&case.host).expect("untouched");

    // The policy is taken away: the token is good, and allowed nothing.
    let case = Case::new(server, "policy");
    server.policy("host-policy", r#"path "nothing" { capabilities = ["read"] }"#);
    expect(&case, Failure::Denied, &["no policy lets these credentials unwrap keys", "permission denied"]);
    // A token without the default policy cannot even look itself up; it is still not a bad token.
    let reply = server.put("auth/token/create", json!({ "policies": ["host-policy"], "no_default_policy": true }));
    let bare = transit(server, "policy", token(reply["auth"]["client_token"].as_str().expect("token")));
    assert_eq!(failure("bare", case.unwrap_as(&bare)), Failure::Denied);
    assert_eq!(bare.permissions().expect("permissions").make, None);
    server.policy("host-policy", &documented_policy(HOST_POLICY, "policy"));
    case.unwrap_as(&bare).expect("granted again");
    bare.make(&BINDING).expect("the documented policy is enough without `default`");

    // Tokens: unknown, revoked, expired.
    let unknown = transit(server, "vol1", token("s.0123456789abcdefghijklmn"));
    let said = error("unknown token", unknown.make(&BINDING));
    assert_eq!(said.failure, Failure::Unauthenticated, "{said}");
    assert!(said.message.contains("VAULT_TOKEN"), "{said}");
    let secret = server.token(&["host-vol1"], "1h");
    let client = transit(server, "vol1", token(&secret));
    client.make(&BINDING).expect("made");
    server.revoke(&secret);
    let said = error("revoked token", client.make(&BINDING));
    assert_eq!(said.failure, Failure::Unauthenticated, "{said}");
    assert!(!format!("{said} {said:?}").contains(&secret), "the token shows");
    let short = server.token(&["host-vol1"], "1s");
    let client = transit(server, "vol1", token(&short));
    wait_for("the token to expire", || {
        (server.ask(&short, Method::GET, "auth/token/lookup-self", &Value::Null).0 == 403).then_some(())
    });
    assert_eq!(failure("expired token", client.make(&BINDING)), Failure::Unauthenticated);

    // A token file: read when it is needed, and again when its token no longer works.
    let first = server.token(&["host-vol1"], "1h");
    let path = server.file("token", &format!("{first}\n"));
    let client = transit(server, "vol1", Credentials::TokenFile(path.clone()));
    client.make(&BINDING).expect("made");
    server.revoke(&first);
    assert_eq!(failure("old token file", client.make(&BINDING)), Failure::Unauthenticated);
    server.file("token", &server.token(&["host-vol1"], "1h"));
    client.make(&BINDING).expect("made with the new token");
    std::fs::remove_file(path).expect("removed");
    client.make(&BINDING).expect("made without the file, since the token works");
    let nowhere = transit(server, "vol1", Credentials::TokenFile("/nowhere/token".into()));
    assert_eq!(failure("no token file", nowhere.make(&BINDING)), Failure::Config);

    // AppRole: one login, then one request a call; a new login when the token is gone.
    let role = server.approle("fs-host", &["host-vol1"], "1h");
    let case = Case::new(server, "role");
    server.policy("host-vol1", &(documented_policy(HOST_POLICY, "role") + &documented_policy(HOST_POLICY, "vol1")));
    let client = transit(server, "role", approle(&role));
    let since = |mark: usize| server.audit()[mark..].to_vec();
    let mark = server.audit().len();
    case.unwrap_as(&client).expect("unwrapped");
    assert_eq!(since(mark), ["update auth/approle/login", "update transit/decrypt/role"]);
    let mark = server.audit().len();
    case.unwrap_as(&client).expect("unwrapped");
    assert_eq!(since(mark), ["update transit/decrypt/role"]);
    server.revoke_logins("approle");
    let mark = server.audit().len();
    case.unwrap_as(&client).expect("logged in again");
    let decrypt = "update transit/decrypt/role";
    assert_eq!(since(mark), [decrypt, "read auth/token/lookup-self", "update auth/approle/login", decrypt]);
    // A short-lived token is replaced before it expires.
    let brief = server.approle("brief", &["host-vol1"], "3s");
    let client_of_brief = transit(server, "role", approle(&brief));
    case.unwrap_as(&client_of_brief).expect("unwrapped");
    let mark = server.audit().len();
    wait_for("a login ahead of time", || {
        case.unwrap_as(&client_of_brief).expect("unwrapped");
        since(mark).iter().any(|line| line == "update auth/approle/login").then_some(())
    });
    assert!(!since(mark).iter().any(|line| line.contains("lookup-self")), "waited for a refusal");
    // The policy goes: denied, with no second login.
    server.policy("host-vol1", r#"path "nothing" { capabilities = ["read"] }"#);
    let mark = server.audit().len();
    assert_eq!(failure("AppRole, no policy", case.unwrap_as(&client)), Failure::Denied);
    assert_eq!(since(mark), [decrypt, "read auth/token/lookup-self"]);
    server.policy("host-vol1", &documented_policy(HOST_POLICY, "role"));
    // The secret id goes: the token works on until it is gone.
    let destroy = format!("auth/approle/role/{}/secret-id/destroy", role.role);
    server.put(&destroy, json!({ "secret_id": role.secret_id }));
    case.unwrap_as(&client).expect("the token still works");
    server.revoke_logins("approle");
    for round in ["first", "second"] {
        let said = error("secret id destroyed", case.unwrap_as(&client));
        assert_eq!(said.failure, Failure::Unauthenticated, "{round}: {said} {:?}", said.detail);
        assert!(!format!("{said} {said:?}").contains(&role.secret_id), "the secret id shows");
    }
    // A new secret id in the file is taken up without a restart.
    let fresh = server.put("auth/approle/role/fs-host/secret-id", json!({}));
    server.file("fs-host.secret_id", fresh["data"]["secret_id"].as_str().expect("id"));
    case.unwrap_as(&client).expect("with the new secret id");
    server.delete("sys/auth/approle");
    let said = error("AppRole unmounted", case.unwrap_as(&client));
    assert_eq!(said.failure, Failure::Unauthenticated, "{said} {:?}", said.detail);
    assert!(said.message.contains("no AppRole login at auth/approle"), "{said}");
}
