//! A volume's life under each key service, through the program: checked, made, written, mounted again, refused while the
//! key is switched off, erased with proof.

use std::fs;

use serde_json::{Value, json};

use crate::support::openbao::{Server, Storage};
use crate::support::softhsm::{LABEL, PIN, Token};
use crate::support::volume::{Output, TestVolume};

const EKEYREVOKED: i32 = 128;

/// A key service with a key, and what its administrator does.
struct Service<'a> {
    uri: &'a str,
    /// What confirms the key's erase.
    key: &'a str,
    /// Switches to the administrator's credentials.
    administer: &'a dyn Fn(&TestVolume),
    /// The same for one command.
    as_administrator: &'a dyn Fn(&mut std::process::Command),
    /// The key off and on, if there is such a state, and the exit code of a mount while it is off.
    switch: Option<(&'a dyn Fn(bool), i32)>,
    /// Lets the waiting period of a scheduled deletion pass.
    wait: Option<&'a dyn Fn()>,
    self_asserted: bool,
}

fn erase(v: &TestVolume, id: &str, key: &str) -> Output {
    v.cli(&["erase", "backing", "--confirm-volume", id, "--confirm-key", key, "--json"])
}

#[track_caller]
fn journal(v: &TestVolume) -> Value {
    serde_json::from_slice(&fs::read(v.backing().join("lethefs.erase")).unwrap()).unwrap()
}

fn life(v: &TestVolume, service: &Service<'_>) {
    let id = v.init_with(service.uri);
    let checked = v.cli(&["keys", "check", service.uri, "--json"]);
    checked.is(0);
    assert_eq!(checked.json()["mountable"], true, "{}", checked.out);
    v.mount(&[]);
    fs::write(v.at("file"), b"kept").unwrap();
    v.umount();
    v.mount(&[]);
    assert_eq!(fs::read(v.at("file")).unwrap(), b"kept");
    v.umount();

    if let Some((switch, code)) = &service.switch {
        switch(false);
        v.try_mount(&[]).is(*code);
        switch(true);
        v.mount(&[]);
        assert_eq!(fs::read(v.at("file")).unwrap(), b"kept");
        v.umount();
    }

    // Suspended from another host (which knows nothing of this mount): the mount hears it at its next renewal, is sealed, and goes
    // on when the key is back.
    v.mount(&["-o", "renew_interval=200ms"]);
    let open = fs::File::open(v.at("file")).unwrap();
    let elsewhere = |verb: &[&str]| {
        let mut command = v.lethefs(verb);
        command.env("LETHEFS_RUNTIME_DIR", v.path("elsewhere"));
        (service.as_administrator)(&mut command);
        Output::of(&mut command).is_code(0);
    };
    let reached = |state: &str| {
        crate::support::openbao::wait_for(state, || {
            let custody = v.cli(&["status", "mnt", "--json"]).json()["live"]["custody"].clone();
            (custody["state"] == state).then_some(custody)
        })
    };
    elsewhere(&["revoke", "backing", "--yes"]);
    let custody = reached("revoked");
    assert_eq!(custody["failure"], "suspended", "{custody}");
    assert_eq!(fs::read(v.at("file")).unwrap_err().raw_os_error(), Some(EKEYREVOKED));
    assert_eq!(
        std::os::unix::fs::FileExt::read_at(&open, &mut [0; 4], 0).unwrap_err().raw_os_error(),
        Some(EKEYREVOKED)
    );
    v.try_mount(&[]).is(11);
    elsewhere(&["restore", "backing"]);
    reached("active");
    assert_eq!(fs::read(v.at("file")).unwrap(), b"kept");
    drop(open);
    v.umount();

    // Another host, which has no pin: the volume file's names lead to the key.
    if !service.self_asserted {
        fs::rename(v.path("trust"), v.path("trust.away")).unwrap();
        fs::create_dir(v.path("trust")).unwrap();
        v.try_mount(&[]).is(16);
        v.mount(&["--trust", "--kms", service.uri]);
        v.umount();
        fs::remove_dir_all(v.path("trust")).unwrap();
        fs::rename(v.path("trust.away"), v.path("trust")).unwrap();
    }

    (service.administer)(v);
    if let Some(wait) = service.wait {
        erase(v, &id, service.key).is_code(18);
        assert_eq!(journal(v)["state"], "scheduled");
        v.try_mount(&[]);
        wait();
    }
    erase(v, &id, service.key).is_code(0);
    let written = journal(v);
    assert_eq!(written["state"], "irrecoverable", "{written}");
    let proof = &written["slots"][0]["proof"];
    assert_eq!(proof["self_asserted"], service.self_asserted, "{written}");
    assert!(proof["findings"].as_array().unwrap().len() >= 2, "{written}");
    v.try_mount(&[]).is(17);
}

#[test]
fn transit() {
    let server = Server::start(Storage::Memory);
    server.create_key("vol1");
    let v = TestVolume::new();
    v.env("VAULT_ADDR", server.address());
    v.env("VAULT_CACERT", server.ca());
    let rights =
        |path: &str| format!("path \"{path}\" {{ capabilities = [\"create\", \"read\", \"update\", \"delete\"] }}\n");
    server.policy("all", &["transit/keys/*", "transit/datakey/*", "transit/decrypt/*"].map(rights).concat());
    v.env("VAULT_TOKEN", server.token(&["all"], "1h"));
    let switch = |on: bool| {
        if on {
            server.put("transit/keys/vol1/soft-delete-restore", json!({}));
        } else {
            server.delete("transit/keys/vol1/soft-delete");
        }
    };
    life(
        &v,
        &Service {
            uri: "hashivault://vol1",
            key: "vol1",
            administer: &|_| {},
            as_administrator: &|_| {},
            switch: Some((&switch, 14)),
            wait: None,
            self_asserted: false,
        },
    );
}

#[test]
fn key_file() {
    let v = TestVolume::new();
    let uri = v.file_uri();
    // Made here, so that its id is known before the volume is.
    v.init_with(&uri);
    fs::remove_dir_all(v.backing()).unwrap();
    let key: Value = serde_json::from_slice(&fs::read(v.path("keys/key")).unwrap()).unwrap();
    fs::remove_dir_all(v.path("trust")).unwrap();
    fs::create_dir(v.path("trust")).unwrap();
    life(
        &v,
        &Service {
            uri: &uri,
            key: key["key_id"].as_str().unwrap(),
            administer: &|_| {},
            as_administrator: &|_| {},
            switch: None,
            wait: None,
            self_asserted: true,
        },
    );
}

#[test]
fn pkcs11() {
    let token = Token::new();
    token.create_key("vol1", "0b0c");
    let v = TestVolume::new();
    // SoftHSM itself, as a host would have it.
    v.env("SOFTHSM2_CONF", token.conf());
    v.env("LETHEFS_PKCS11_MODULE", Token::real_module());
    let uri = format!("pkcs11:token={};object=vol1", LABEL.replace(' ', "%20"));
    // Without the PIN, and with a wrong one.
    v.cli(&["init", "backing", "--kms", &uri]).is(2).says("LETHEFS_PKCS11_PIN_FILE");
    v.env("LETHEFS_PKCS11_PIN_FILE", token.pin_file());
    token.set_pin("86427531");
    v.cli(&["init", "backing", "--kms", &uri]).is(13).says("does not accept the PIN");
    token.set_pin(PIN);
    v.cli(&["init", "backing", "--kms", &format!("{uri}x")]).is(14).says("docs/KMS.md");
    assert!(!v.backing().exists());
    let switch = |on: bool| token.set_present(on);
    life(
        &v,
        &Service {
            uri: &uri,
            key: "vol1",
            administer: &|_| {},
            as_administrator: &|_| {},
            // The token is away: that is no refusal, and a mount fails all the same.
            switch: Some((&switch, 12)),
            wait: None,
            self_asserted: false,
        },
    );
    assert!(!v.log().contains(PIN));
}

#[cfg(feature = "kms-aws")]
#[test]
fn aws() {
    use crate::support::aws::{self, REGION};

    let server = aws::Server::start();
    let key = server.create_key(&json!({}));
    let v = TestVolume::new();
    let log_in = |v: &TestVolume, profile: &std::path::Path| {
        v.env("AWS_CONFIG_FILE", profile);
        v.env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    };
    v.env("AWS_CA_BUNDLE", server.ca());
    v.env("AWS_EC2_METADATA_DISABLED", "true");
    v.env("LETHEFS_AWS_DELETION_DAYS", "7");
    let uri = format!("awskms:///{}?region={REGION}", aws::Server::arn(&key));
    v.cli(&["init", "backing", "--kms", &uri]).is(2).says("credentials");
    log_in(&v, &server.path("host.profile"));
    // The endpoint from the environment, too, as the AWS tools have it; and the credentials.
    v.env("AWS_ENDPOINT_URL_KMS", server.address());
    let switch = |on: bool| server.set_state(&key, if on { "Enabled" } else { "Disabled" });
    let administer = |v: &TestVolume| {
        v.env("AWS_ACCESS_KEY_ID", "AKIDadmin");
        v.env("AWS_SECRET_ACCESS_KEY", "secret-of-admin");
    };
    life(
        &v,
        &Service {
            uri: &uri,
            key: &key,
            administer: &administer,
            as_administrator: &|command| {
                command.env("AWS_ACCESS_KEY_ID", "AKIDadmin").env("AWS_SECRET_ACCESS_KEY", "secret-of-admin");
            },
            switch: Some((&switch, 14)),
            wait: Some(&|| server.expire()),
            self_asserted: false,
        },
    );
    assert!(!v.log().contains("secret-of-"));
    // The audit log has the service's own numbers of the requests.
    let log = fs::read_dir(v.path("state/audit")).unwrap().flatten().next().unwrap().path();
    let theirs = fs::read_to_string(server.path("requests")).unwrap();
    let records = fs::read_to_string(log).unwrap();
    let records: Vec<Value> = records.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (event, operation) in
        [("init", "GenerateDataKey"), ("fetch", "Decrypt"), ("suspend", "DisableKey"), ("restore", "EnableKey")]
    {
        let of = |record: &&Value| record["event"] == event;
        assert!(records.iter().any(|record| of(&record)), "{event}");
        for record in records.iter().filter(of) {
            let number = record["data"]["request_id"].as_str().unwrap_or_else(|| panic!("{record}"));
            assert!(theirs.contains(&format!("{number} {operation} 200")), "{record}");
        }
    }
}
