//! The server hung, sealed, down, replaced by another, or not to be trusted.

use std::time::{Duration, Instant};

use lethefs::kms::transit::{Config, Transit};
use lethefs::kms::{Failure, KeyAdmin, KeySource};

use crate::openbao::{Server, Storage, free_port};
use crate::{BINDING, config, error, failure, key, token, tokens, transit};

fn impatient(config: Config) -> Config {
    Config { connect_timeout: Duration::from_millis(300), timeout: Duration::from_millis(500), ..config }
}

#[test]
fn each_fault_of_the_server_has_its_class() {
    let mut server = Server::start(Storage::Raft);
    server.create_key("vol1");
    let (host, admin) = tokens(&server, "vol1");
    let client = transit(&server, "vol1", token(&host));
    let made = client.make(&BINDING).expect("made");
    let unwrap = |client: &Transit| client.unwrap(&BINDING, &made.wrapped, &made.identity).map(drop);
    let port = server.port();
    let (address, ca) = (server.address(), server.ca());
    let at = |address: &str, ca: &std::path::Path| Transit::new(&key("vol1"), config(address, ca, token(&host)));

    // Hung, and going on.
    let hasty = Transit::new(&key("vol1"), impatient(config(&address, &ca, token(&host))));
    server.stop();
    let began = Instant::now();
    let said = error("hung", unwrap(&hasty));
    assert_eq!(said.failure, Failure::Unreachable, "{said}");
    assert!(said.message.contains("did not answer in time"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(
        failure("proof, hung", hasty.prove_destroyed(&made.identity, Some((&BINDING, &made.wrapped)))),
        Failure::NotDestroyed
    );
    server.cont();
    unwrap(&client).expect("goes on");

    // Not who it should be.
    let other = Server::start(Storage::Memory);
    let said = error("another CA", unwrap(&at(&address, &other.ca())));
    assert_eq!(said.failure, Failure::Untrusted, "{said} {:?}", said.detail);
    assert!(said.message.contains("VAULT_CACERT"), "{said}");
    let by_name = format!("https://localhost:{port}");
    assert_eq!(failure("another name", unwrap(&at(&by_name, &ca))), Failure::Untrusted);
    let system = Config { ca_file: None, ..config(&address, &ca, token(&host)) };
    let said = error("the system's roots", unwrap(&Transit::new(&key("vol1"), system)));
    // A machine without any roots says so.
    assert!(matches!(said.failure, Failure::Untrusted | Failure::Config), "{said}");
    let said = error("a CA file that is none", unwrap(&at(&address, &server.file("empty.pem", ""))));
    assert_eq!(said.failure, Failure::Config, "{said}");
    assert_eq!(failure("no CA file", unwrap(&at(&address, "/nowhere/ca.pem".as_ref()))), Failure::Config);

    // Another cluster under a trusted certificate: with no such key, and with one of the same name.
    let elsewhere = |name: &str| {
        let all = other.token(&["everything"], "1h");
        Transit::new(&key(name), config(&other.address(), &other.ca(), token(&all)))
    };
    let said = error("another cluster", unwrap(&elsewhere("vol1")));
    assert_eq!(said.failure, Failure::Missing, "{said}");
    assert!(said.message.contains("is another cluster"), "{said}");
    let proof = elsewhere("vol1").prove_destroyed(&made.identity, Some((&BINDING, &made.wrapped)));
    assert_eq!(failure("another cluster", proof), Failure::NotDestroyed);
    other.create_key("vol1");
    assert_eq!(failure("another cluster's key", unwrap(&elsewhere("vol1"))), Failure::Recreated);
    assert_eq!(failure("another cluster's key", elsewhere("vol1").destroy(&made.identity)), Failure::Recreated);
    assert_eq!(other.get("transit/keys/vol1")["deletion_allowed"], false);

    // Nobody there, and a second address.
    let closed = format!("https://127.0.0.1:{}", free_port());
    let said = error("refused", unwrap(&at(&closed, &ca)));
    assert_eq!(said.failure, Failure::Unreachable, "{said}");
    assert!(said.message.contains("cannot be reached (Connection refused"), "{said}");
    let said = error("no such name", unwrap(&at("https://kms.invalid:8200", &ca)));
    assert_eq!(said.failure, Failure::Unreachable, "{said}");
    let mut several = config(&closed, &ca, token(&host));
    several.addresses.push(other.address().parse().expect("address")); // not trusted
    several.addresses.push(address.parse().expect("address"));
    let several = Transit::new(&key("vol1"), several);
    unwrap(&several).expect("the third address serves");

    // The words of a TLS port to whoever speaks plain http, which is refused before it comes to that.
    use std::io::{Read as _, Write as _};
    let mut plain = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connected");
    plain.write_all(b"GET /v1/sys/health HTTP/1.0\r\n\r\n").expect("written");
    let mut words = String::new();
    plain.read_to_string(&mut words).expect("read");
    assert!(words.contains("400 Bad Request") && words.ends_with("Client sent an HTTP request to an HTTPS server.\n"));

    // Sealed, down, and back with everything it had.
    server.seal();
    for (case, result) in [
        ("unwrap", unwrap(&client)),
        ("the other addresses do no better", unwrap(&several)),
        ("make", client.make(&BINDING).map(drop)),
        ("destroy", transit(&server, "vol1", token(&admin)).destroy(&made.identity).map(drop)),
    ] {
        let said = error(case, result);
        assert_eq!(said.failure, Failure::Unavailable, "sealed, {case}: {said} {:?}", said.detail);
        assert!(said.message.contains("sealed"), "{case}: {said} {:?}", said.detail);
    }
    // With a sealed server first in the list, the next one is asked.
    let both = server.file("both.pem", &[&ca, &other.ca()].map(|ca| std::fs::read_to_string(ca).expect("CA")).concat());
    let all = other.token(&["everything"], "1h");
    let mut list = config(&address, &both, token(&all));
    list.addresses.push(other.address().parse().expect("address"));
    KeySource::describe(&Transit::new(&key("vol1"), list)).expect("the second address serves");
    assert_eq!(failure("proof, sealed", client.prove_destroyed(&made.identity, None)), Failure::NotDestroyed);
    server.kill();
    assert_eq!(failure("down", unwrap(&client)), Failure::Unreachable);
    server.restart();
    unwrap(&client).expect("back");
    transit(&server, "vol1", token(&admin)).destroy(&made.identity).expect("destroyed");
    assert_eq!(failure("destroyed", unwrap(&client)), Failure::Destroyed);
    server.restart();
    assert_eq!(failure("destroyed, after a restart", unwrap(&client)), Failure::Destroyed);
}
