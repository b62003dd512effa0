//! Replies that no real server can be brought to give.

use lethefs::kms::transit::Transit;
use lethefs::kms::{Failure, KeyIdentity, KeySource, Wrapped};

use crate::stub::Stub;
use crate::{BINDING, config, error, key, token};

#[test]
fn odd_replies_are_refused() {
    let body = |status: &str, length: usize, body: &str| {
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: \
             close\r\n\r\n{body}"
        )
        .into_bytes()
    };
    let whole = |status: &str, text: &str| body(status, text.len(), text);
    let huge = format!(r#"{{"data":{{"plaintext":"{}"}}}}"#, "A".repeat(300 * 1024));
    let chunked = |text: &str| {
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{text}\r\n0\r\n\r\n", text.len())
            .into_bytes()
    };
    let key_text = "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="; // 32 times `A`
    let identity = KeyIdentity::Transit {
        engine: "transit".into(),
        engine_uuid: "u".into(),
        key: "vol1".into(),
        namespace: String::new(),
        key_version: 1,
        key_version_created: 1,
        cluster_id: "c".into(),
        key_type: "aes256-gcm96".into(),
    };
    for (case, reply, class) in [
        ("oversized", whole("200 OK", &huge), Failure::Protocol),
        ("oversized, without a length", chunked(&huge), Failure::Protocol),
        ("oversized error", whole("400 Bad Request", &huge), Failure::Protocol),
        ("broken off", body("200 OK", 4000, r#"{"data":{"plaintext":"QUFB"#), Failure::Unreachable),
        ("half a document", whole("200 OK", r#"{"data":{"plaintext":"QUFB"#), Failure::Protocol),
        ("no header", b"".to_vec(), Failure::Unreachable),
        ("no HTTP", b"220 mail.example ESMTP\r\n".to_vec(), Failure::Unreachable),
        ("a page", whole("200 OK", "<html>welcome</html>"), Failure::Protocol),
        ("a page, not found", whole("404 Not Found", "<html>not found</html>"), Failure::Protocol),
        (
            "plain text",
            whole("400 Bad Request", "Client sent an HTTP request to an HTTPS server.\n"),
            Failure::Protocol,
        ),
        ("a proxy's refusal", whole("403 Forbidden", "no"), Failure::Protocol),
        ("a gateway", whole("502 Bad Gateway", "<html>"), Failure::Unavailable),
        ("a redirect", body("307 Temporary Redirect\r\nLocation: https://127.0.0.1:1/", 0, ""), Failure::Unavailable),
        ("no content", body("204 No Content", 0, ""), Failure::Protocol),
        ("another type", whole("200 OK", r#"{"data":{"plaintext":{"a":1}}}"#), Failure::Protocol),
        ("a short key", whole("200 OK", r#"{"data":{"plaintext":"QUFB"}}"#), Failure::Protocol),
        ("a long key", whole("200 OK", &format!(r#"{{"data":{{"plaintext":"QUFB{key_text}"}}}}"#)), Failure::Protocol),
        ("no base64", whole("200 OK", r#"{"data":{"plaintext":"%%%%"}}"#), Failure::Protocol),
        ("words not in the table", whole("400 Bad Request", r#"{"errors":["no soup today"]}"#), Failure::Protocol),
        // The words of a deleted key from a server that says them to every question.
        ("the right words", whole("400 Bad Request", r#"{"errors":["encryption key not found"]}"#), Failure::Missing),
    ] {
        let stub = Stub::start(reply);
        let settings = config(&stub.address, &stub.dir.path().join("ca.pem"), token("t"));
        let client = Transit::new(&key("vol1"), settings);
        let said = error(case, client.unwrap(&BINDING, &Wrapped("vault:v1:AAAA".into()), &identity));
        assert_eq!(said.failure, class, "{case}: {said} {:?}", said.detail);
        assert_eq!(
            case.starts_with("oversized"),
            said.message.contains("is larger than 262144 bytes"),
            "{case}: {said}"
        );
        let all = format!("{said} {said:?}");
        assert!(!all.contains("QUFB"), "{case}: shows the key: {all}");
    }
    // And a good one, to know that the stub is not what fails.
    let stub = Stub::start(whole("200 OK", &format!(r#"{{"data":{{"plaintext":"{key_text}"}}}}"#)));
    let client = Transit::new(&key("vol1"), config(&stub.address, &stub.dir.path().join("ca.pem"), token("t")));
    let opened = client.unwrap(&BINDING, &Wrapped("vault:v1:AAAA".into()), &identity).expect("opens");
    opened.expose(|bytes| assert_eq!(bytes, &[b'A'; 32]));

    // A standby's redirect is followed to a configured address, and nowhere else: the token must not go there.
    let to = format!("307 Temporary Redirect\r\nLocation: {}/v1/transit/decrypt/vol1", stub.address);
    let standby = Stub::start(body(&to, 0, ""));
    let away = Stub::start(body("307 Temporary Redirect\r\nLocation: https://127.0.0.1:1/", 0, ""));
    let pem = |stub: &Stub| std::fs::read_to_string(stub.dir.path().join("ca.pem")).expect("CA");
    let roots = stub.dir.path().join("all.pem");
    std::fs::write(&roots, pem(&stub) + &pem(&standby) + &pem(&away)).expect("written");
    let client = |stubs: &[&Stub]| {
        let mut settings = config(&stubs[0].address, &roots, token("t"));
        settings.addresses = stubs.iter().map(|stub| stub.address.parse().expect("address")).collect();
        settings.patience = std::time::Duration::from_secs(3);
        Transit::new(&key("vol1"), settings)
    };
    let unwrap = |client: &Transit| client.unwrap(&BINDING, &Wrapped("vault:v1:AAAA".into()), &identity);
    unwrap(&client(&[&standby, &away, &stub])).expect("followed");
    assert_eq!(error("not configured", unwrap(&client(&[&standby]))).failure, Failure::Unavailable);
    assert_eq!(error("nobody leads", unwrap(&client(&[&standby, &away]))).failure, Failure::Unavailable);
}
