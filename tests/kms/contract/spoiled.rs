//! A real server's replies, spoiled on the way by whoever terminates the TLS: a proxy, a load balancer, a middlebox. And what the
//! real server says when it must not serve.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lethefs::kms::transit::Transit;
use lethefs::kms::{Failure, KeyAdmin, KeySource, Standing};

use super::Case;
use crate::openbao::{Server, Storage};
use crate::stub::Stub;
use crate::{BINDING, config, error, failure, key, token, tokens};

/// Head and body of a reply.
fn parts(reply: &[u8]) -> (String, &[u8]) {
    let end = reply.windows(4).position(|four| four == b"\r\n\r\n").expect("a head") + 4;
    (String::from_utf8(reply[..end].to_vec()).expect("text"), &reply[end..])
}

/// The reply with another body, and with the length of that, if it is told.
fn with_body(reply: &[u8], body: &[u8], tell: usize) -> Vec<u8> {
    let head = parts(reply).0;
    let kept = head.lines().filter(|line| !line.is_empty() && !line.to_ascii_lowercase().starts_with("content-length"));
    let mut new: String = kept.map(|line| format!("{line}\r\n")).collect();
    new += &format!("Content-Length: {tell}\r\n\r\n");
    [new.as_bytes(), body].concat()
}

type Spoil = Box<dyn Fn(Vec<u8>) -> Vec<u8> + Send + Sync>;

#[test]
fn a_real_reply_that_was_spoiled_seals_nothing() {
    let server = Server::start(Storage::Memory);
    let case = Case::new(&server, "vol1");
    let (host, admin) = tokens(&server, "vol1");
    let at = |stub: &Stub, token_text: &str| {
        Transit::new(&key("vol1"), config(&stub.address, &stub.dir.path().join("ca.pem"), token(token_text)))
    };
    let half = |reply: Vec<u8>| {
        let body = parts(&reply).1.to_vec();
        with_body(&reply, &body[..body.len() / 2], body.len() / 2)
    };
    let spoils: Vec<(&str, Spoil, Failure, &str)> = vec![
        ("cut within the head", Box::new(|reply| reply[..40].to_vec()), Failure::Unreachable, "cannot be reached"),
        ("nothing", Box::new(|_| Vec::new()), Failure::Unreachable, "cannot be reached"),
        (
            "cut within the body",
            Box::new(|reply| {
                let body = parts(&reply).1.to_vec();
                with_body(&reply, &body[..body.len() - 5], body.len())
            }),
            Failure::Unreachable,
            "broke off",
        ),
        ("half of the JSON, called whole", Box::new(half), Failure::Protocol, "not the JSON"),
        (
            "a quarter megabyte of white space behind it",
            Box::new(|reply| {
                let body = [parts(&reply).1, &[b' '; 256 * 1024][..]].concat();
                with_body(&reply, &body, body.len())
            }),
            Failure::Protocol,
            "is larger than 262144 bytes",
        ),
        (
            "the same without an end in sight",
            Box::new(|reply| {
                let (head, body) = parts(&reply);
                let kept = head
                    .lines()
                    .filter(|line| !line.is_empty() && !line.to_ascii_lowercase().starts_with("content-length"));
                let mut new = kept.map(|line| format!("{line}\r\n")).collect::<String>().into_bytes();
                new.extend_from_slice(b"\r\n");
                new.extend_from_slice(body);
                new.extend_from_slice(&[b' '; 256 * 1024]);
                new
            }),
            Failure::Protocol,
            "is larger than 262144 bytes",
        ),
        (
            "one bit of the body",
            Box::new(|mut reply| {
                let at = reply.len() - parts(&reply).1.len();
                reply[at] ^= 1;
                reply
            }),
            Failure::Protocol,
            "not the JSON",
        ),
    ];
    for (what, spoil, class, words) in spoils {
        // First as it is, to know that what follows is the spoiling and nothing else.
        let on = Arc::new(AtomicBool::new(false));
        let switch = on.clone();
        let stub = Stub::before(&server, move |reply| if switch.load(Ordering::SeqCst) { spoil(reply) } else { reply });
        let client = at(&stub, &host);
        let unwrap = || client.unwrap(&BINDING, &case.made.wrapped, &case.made.identity);
        assert!(unwrap().unwrap_or_else(|e| panic!("{what}: {e} {:?}", e.detail)).same_as(&case.made.key));
        on.store(true, Ordering::SeqCst);
        let said = error(what, unwrap());
        assert_eq!(said.failure, class, "{what}: {said} {:?}", said.detail);
        assert!(said.message.contains(words), "{what}: {said}");
        assert_eq!(said.failure.standing(), Standing::Uncertain, "{what}");
        case.made.key.expose(|bytes| {
            use base64::Engine as _;
            let text = base64::engine::general_purpose::STANDARD.encode(bytes);
            assert!(!format!("{said} {said:?}").contains(&text[..20]), "{what}: shows the key");
        });
        // Nor is a change taken for done, or a proof for one.
        let admin = at(&stub, &admin);
        failure(what, admin.suspend(&case.made.identity));
        failure(what, admin.destroy(&case.made.identity));
        assert_eq!(failure(what, admin.prove_destroyed(&case.made.identity, None)), Failure::NotDestroyed, "{what}");
        assert_eq!(server.get("transit/keys/vol1")["deletion_allowed"], false, "{what}");
    }

    // Whoever terminates the TLS and speaks plain HTTP to the server's TLS port passes on its plain-text 400.
    let port = server.port();
    let front = Stub::answering(move |request| {
        let mut plain = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the real server");
        plain.write_all(request).expect("asked");
        let mut reply = Vec::new();
        plain.read_to_end(&mut reply).expect("its words");
        assert!(String::from_utf8_lossy(&reply).ends_with("Client sent an HTTP request to an HTTPS server.\n"));
        reply
    });
    let said = error("plain text", at(&front, &host).unwrap(&BINDING, &case.made.wrapped, &case.made.identity));
    assert_eq!((said.failure, said.failure.standing()), (Failure::Protocol, Standing::Uncertain), "{said}");
}

#[test]
fn an_audit_disk_that_is_full_is_no_word_about_the_key() {
    let server = Server::start_with_small_audit_disk();
    let case = Case::new(&server, "vol1");
    case.unwrap_as(&case.host).expect("with room for the log");
    server.fill_audit_disk();
    let (class, said) = case.refusal();
    assert_eq!((class, class.standing()), (Failure::Unavailable, Standing::Uncertain), "{said}");
    assert!(said.contains("500"), "{said}");
    assert_eq!(failure("destroy", case.admin.destroy(&case.made.identity)), Failure::Unavailable);
    assert_eq!(failure("proof", case.admin.prove_destroyed(&case.made.identity, None)), Failure::NotDestroyed);
    server.empty_audit_disk();
    case.unwrap_as(&case.host).expect("with room again");
}
