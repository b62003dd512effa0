//! A volume under a key of its own at an OpenBao server, with a mount host's rights and no more.

use super::openbao::Server;
use super::volume::TestVolume;

/// docs/KMS.md's policy of a mount host.
pub(crate) fn host_policy(key: &str) -> String {
    format!(
        r#"path "transit/datakey/plaintext/{key}" {{ capabilities = ["update"] }}
path "transit/decrypt/{key}" {{ capabilities = ["update"] }}
path "transit/keys/{key}" {{ capabilities = ["read"] }}"#
    )
}

/// A volume under a key of its own at the server, with the mount's AppRole.
pub(crate) fn volume(server: &Server, key: &str) -> TestVolume {
    let volume = TestVolume::new();
    at(&volume, server, key);
    volume
}

/// The same in a place that is there already.
pub(crate) fn at(volume: &TestVolume, server: &Server, key: &str) {
    server.create_key(key);
    server.policy(&format!("host-{key}"), &host_policy(key));
    let role = server.approle(&format!("role-{key}"), &[&format!("host-{key}")], "1h");
    volume.env("VAULT_ADDR", server.address());
    volume.env("VAULT_CACERT", server.ca());
    volume.env("LETHEFS_APPROLE_ROLE_ID_FILE", role.role_id_file);
    volume.env("LETHEFS_APPROLE_SECRET_ID_FILE", role.secret_id_file);
    volume.init_with(&format!("hashivault://{key}"));
}
