//! A real OpenBao server for tests: TLS, static seal, self-init, audit log, its own temporary directory.
//!
//! Killed and removed on drop, so a test owns its server, or when the test's process ends without that. Needs a `bao`
//! binary (`LETHEFS_TEST_BAO`, else `bao` in `PATH`) and the `openssl` command.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::Method;
use reqwest::blocking::Client;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything that is waited for may take: generous, since it only delays a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// Polls `ready` until it gives something.
pub(crate) fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Where the server keeps its data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Gone with the process; starts fastest.
    Memory,
    /// Survives [`Server::restart`].
    Raft,
}

/// A running server.
pub(crate) struct Server {
    dir: TempDir,
    storage: Storage,
    /// The audit log is on a file system of its own, of a megabyte, that only the server sees.
    small_audit_disk: bool,
    port: u16,
    child: Option<Child>,
    watchdog: Option<Child>,
    http: Client,
    token: String,
}

/// Files that log in with an AppRole.
pub(crate) struct AppRole {
    pub(crate) role: String,
    pub(crate) role_id_file: PathBuf,
    pub(crate) secret_id_file: PathBuf,
    pub(crate) secret_id: String,
}

pub(crate) fn bao() -> PathBuf {
    let named = std::env::var_os("LETHEFS_TEST_BAO").map(PathBuf::from);
    let found = named.or_else(|| {
        std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join("bao")).find(|path| path.is_file())
    });
    found.filter(|path| path.is_file()).expect("no `bao` binary for this test: run scripts/test, which installs it")
}

fn openssl(dir: &Path, arguments: &str) {
    let done = Command::new("openssl").args(arguments.split(' ')).current_dir(dir).output().expect("openssl runs");
    assert!(done.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Writes `ca.pem`, `srv.pem` and `srv.key`: a new CA, and a certificate of it for 127.0.0.1 and nothing else.
pub(crate) fn make_certificates(dir: &Path) {
    let new = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
    openssl(
        dir,
        &format!(
            "req -x509 {new} -subj /CN=test-ca -keyout ca.key -out ca.pem \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign"
        ),
    );
    openssl(
        dir,
        &format!(
            "req -x509 {new} -CA ca.pem -CAkey ca.key -subj /CN=test-server -keyout srv.key -out srv.pem \
             -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=IP:127.0.0.1 \
             -addext extendedKeyUsage=serverAuth"
        ),
    );
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a free port").port()
}

impl Server {
    /// Starts a server with an empty Transit engine at `transit` and AppRole at `approle`.
    pub(crate) fn start(storage: Storage) -> Self {
        Self::start_as(storage, false)
    }

    /// The same, in memory, with its only audit device on a disk that can be filled. Needs root.
    pub(crate) fn start_with_small_audit_disk() -> Self {
        Self::start_as(Storage::Memory, true)
    }

    fn start_as(storage: Storage, small_audit_disk: bool) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = TempDir::with_prefix("lethefs-bao.").expect("temporary directory");
        make_certificates(dir.path());
        fs::write(dir.path().join("seal.key"), [7; 32]).expect("seal key");
        fs::create_dir(dir.path().join("data")).expect("data directory");
        fs::create_dir(dir.path().join("audit")).expect("directory of the audit log");
        let ca = reqwest::Certificate::from_pem(&fs::read(dir.path().join("ca.pem")).expect("CA")).expect("CA");
        let http = Client::builder().no_proxy().tls_certs_only([ca]).timeout(PATIENCE).build().expect("HTTP client");
        let mut server =
            Self { dir, storage, small_audit_disk, port: 0, child: None, watchdog: None, http, token: String::new() };
        // Another process may take the port first: try a few.
        let started = (0..5).any(|_| {
            server.port = free_port();
            server.write_configuration();
            server.spawn()
        });
        assert!(started, "OpenBao does not start:\n{}", server.log());
        // Active comes a moment before self-init is done.
        let login = json!({ "password": "admin-password" });
        server.token = wait_for("self-init", || {
            let (status, reply) = server.ask("", Method::POST, "auth/userpass/login/admin", &login);
            (status == 200).then(|| reply["auth"]["client_token"].as_str().expect("token").to_owned())
        });
        server.put("sys/mounts/transit", json!({ "type": "transit" }));
        server.put("sys/auth/approle", json!({ "type": "approle" }));
        server
    }

    fn write_configuration(&self) {
        let (dir, port, cluster) = (self.dir.path().display(), self.port, free_port());
        let storage = match self.storage {
            Storage::Memory => "storage \"inmem\" {}".to_owned(),
            // The multiplier makes the election of the only node short.
            Storage::Raft => {
                format!(
                    "storage \"raft\" {{\n path = \"{dir}/data\"\n node_id = \"n1\"\n performance_multiplier = 1\n}}"
                )
            }
        };
        let audit = if self.small_audit_disk { format!("{dir}/audit/log") } else { format!("{dir}/audit.log") };
        let text = format!(
            r#"{storage}
seal "static" {{
  current_key_id = "k1"
  current_key    = "file://{dir}/seal.key"
}}
listener "tcp" {{
  address         = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster}"
  tls_cert_file   = "{dir}/srv.pem"
  tls_key_file    = "{dir}/srv.key"
}}
api_addr     = "https://127.0.0.1:{port}"
cluster_addr = "https://127.0.0.1:{cluster}"
audit "file" "to-file" {{
  options {{
    file_path = "{audit}"
  }}
}}
initialize "setup" {{
  request "policy" {{
    operation = "update"
    path      = "sys/policies/acl/everything"
    data      = {{
      policy = "path \"*\" {{ capabilities = [\"create\", \"read\", \"update\", \"delete\", \"list\", \"sudo\"] }}"
    }}
  }}
  request "userpass" {{
    operation = "update"
    path      = "sys/auth/userpass"
    data      = {{ type = "userpass" }}
  }}
  request "admin" {{
    operation = "update"
    path      = "auth/userpass/users/admin"
    data      = {{ password = "admin-password", token_policies = ["everything"] }}
  }}
}}
"#
        );
        fs::write(self.dir.path().join("bao.hcl"), text).expect("configuration");
    }

    /// `false` if the process ended instead of serving.
    fn spawn(&mut self) -> bool {
        let path = self.dir.path();
        let log = fs::File::options().create(true).append(true).open(path.join("server.log")).expect("log");
        let mut command = if self.small_audit_disk {
            // In a mount namespace of the server's own, so that nothing stays mounted, however this ends.
            let script = "mount -t tmpfs -o size=1m,mode=700 lethefs-audit audit && exec \"$0\" server -config=bao.hcl";
            let mut command = Command::new("unshare");
            command.args(["-m", "sh", "-c", script]).arg(bao());
            command
        } else {
            let mut command = Command::new(bao());
            command.args(["server", "-config=bao.hcl"]);
            command
        };
        let child = command
            .current_dir(path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("bao runs");
        // Ends the server should this process end without dropping it: the read ends when our end of the pipe closes.
        let script = "read -r _; kill -9 \"$0\"; rm -rf \"$1\"";
        let mut watchdog = Command::new("sh");
        watchdog.args(["-c", script, &child.id().to_string()]).arg(path);
        watchdog.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        self.watchdog = Some(watchdog.spawn().expect("sh runs"));
        self.child = Some(child);
        wait_for("OpenBao to be active", || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("waited")).is_some();
            if ended {
                return Some(false);
            }
            let health = self.http.get(format!("{}/v1/sys/health", self.address())).send();
            health.is_ok_and(|reply| reply.status() == 200).then_some(true)
        })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default()
    }

    pub(crate) fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// A file in the server's directory.
    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("chmod");
        path
    }

    /// Asks as whoever holds `token`, for a namespace if the path begins with `NAMESPACE:`.
    pub(crate) fn ask(&self, token: &str, method: Method, path: &str, body: &Value) -> (u16, Value) {
        let (namespace, path) = path.split_once(':').unwrap_or(("", path));
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.address())).json_body(body);
        if !token.is_empty() {
            request = request.header("X-Vault-Token", token);
        }
        if !namespace.is_empty() {
            request = request.header("X-Vault-Namespace", namespace);
        }
        let reply = request.send().expect("OpenBao answers");
        let status = reply.status().as_u16();
        (status, serde_json::from_str(&reply.text().expect("text")).unwrap_or(Value::Null))
    }

    /// Asks as the administrator of everything; must succeed.
    pub(crate) fn must(&self, method: Method, path: &str, body: Value) -> Value {
        let (status, reply) = self.ask(&self.token, method.clone(), path, &body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {reply}");
        reply
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        self.must(Method::GET, path, Value::Null)["data"].take()
    }

    pub(crate) fn put(&self, path: &str, body: Value) -> Value {
        self.must(Method::POST, path, body)
    }

    pub(crate) fn delete(&self, path: &str) {
        self.must(Method::DELETE, path, Value::Null);
    }

    /// The right sort of key, below the engine `transit`.
    pub(crate) fn create_key(&self, name: &str) {
        self.put(&format!("transit/keys/{name}"), json!({ "type": "aes256-gcm96", "derived": true }));
    }

    pub(crate) fn configure_key(&self, name: &str, settings: Value) {
        self.put(&format!("transit/keys/{name}/config"), settings);
    }

    pub(crate) fn rotate_key(&self, name: &str) {
        self.put(&format!("transit/keys/{name}/rotate"), json!({}));
    }

    /// Deletes a key for good, as root would.
    pub(crate) fn delete_key(&self, name: &str) {
        self.configure_key(name, json!({ "deletion_allowed": true }));
        self.delete(&format!("transit/keys/{name}"));
    }

    /// Waits until the server's clock has left the second that it is in.
    pub(crate) fn let_a_second_pass_since_now(&self) {
        let clock =
            || self.ask("", Method::GET, "sys/health", &Value::Null).1["server_time_utc"].as_i64().expect("time");
        let now = clock();
        wait_for("the next second", || (clock() > now).then_some(()));
    }

    /// Waits until the server's clock has left the second in which the key was made.
    pub(crate) fn let_a_second_pass(&self, name: &str) {
        let info = self.get(&format!("transit/keys/{name}"));
        let newest = info["keys"].as_object().expect("keys").values().filter_map(Value::as_i64).max().expect("version");
        wait_for("the next second", || {
            let (_, health) = self.ask("", Method::GET, "sys/health", &Value::Null);
            (health["server_time_utc"].as_i64().expect("time") > newest + 1).then_some(())
        });
    }

    pub(crate) fn policy(&self, name: &str, text: &str) {
        self.put(&format!("sys/policies/acl/{name}"), json!({ "policy": text }));
    }

    /// A token with these policies, and `default`.
    pub(crate) fn token(&self, policies: &[&str], ttl: &str) -> String {
        let made = self.put("auth/token/create", json!({ "policies": policies, "ttl": ttl, "renewable": false }));
        made["auth"]["client_token"].as_str().expect("token").to_owned()
    }

    pub(crate) fn revoke(&self, token: &str) {
        self.put("auth/token/revoke", json!({ "token": token }));
    }

    pub(crate) fn approle(&self, role: &str, policies: &[&str], ttl: &str) -> AppRole {
        self.put(&format!("auth/approle/role/{role}"), json!({ "token_policies": policies, "token_ttl": ttl }));
        let role_id =
            self.get(&format!("auth/approle/role/{role}/role-id"))["role_id"].as_str().expect("id").to_owned();
        let made = self.put(&format!("auth/approle/role/{role}/secret-id"), json!({}));
        let secret_id = made["data"]["secret_id"].as_str().expect("id").to_owned();
        AppRole {
            role: role.to_owned(),
            role_id_file: self.file(&format!("{role}.role_id"), &format!("{role_id}\n")),
            secret_id_file: self.file(&format!("{role}.secret_id"), &secret_id),
            secret_id,
        }
    }

    /// Revokes every token that an auth method has given out.
    pub(crate) fn revoke_logins(&self, mount: &str) {
        self.put(&format!("sys/leases/revoke-prefix/auth/{mount}"), json!({}));
    }

    /// `OPERATION PATH` of every request that the server has logged so far.
    pub(crate) fn audit(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("audit.log")).expect("audit log");
        let entries = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        entries
            .filter(|entry| entry["type"] == "request")
            .map(|entry| {
                let part = |name: &str| entry["request"][name].as_str().unwrap_or_default().to_owned();
                format!("{} {}", part("operation"), part("path"))
            })
            .collect()
    }

    fn on_audit_disk(&self, name: &str) -> PathBuf {
        assert!(self.small_audit_disk, "started without one");
        let audit = self.dir.path().join("audit").join(name);
        let inside = audit.strip_prefix("/").expect("absolute");
        PathBuf::from(format!("/proc/{}/root", self.child.as_ref().expect("running").id())).join(inside)
    }

    /// Leaves no byte for the audit log.
    pub(crate) fn fill_audit_disk(&self) {
        use std::io::Write as _;
        let mut filler = fs::File::create(self.on_audit_disk("filler")).expect("filler");
        for size in [4096, 1] {
            while filler.write_all(&vec![0; size]).is_ok() {}
        }
        // The page of which the log has a part already.
        let log = fs::File::options().append(true).open(self.on_audit_disk("log")).expect("log");
        while (&log).write_all(b"\n").is_ok() {}
    }

    pub(crate) fn empty_audit_disk(&self) {
        fs::remove_file(self.on_audit_disk("filler")).expect("removed");
    }

    /// The audit log as it is, to look for what must not be in it.
    pub(crate) fn audit_text(&self) -> String {
        fs::read_to_string(self.dir.path().join("audit.log")).expect("audit log")
    }

    /// Seals the server. Its answer comes before the deed; for a moment it calls itself a standby, and sometimes it is
    /// elected again instead, so it is asked until it is sealed.
    pub(crate) fn seal(&self) {
        wait_for("the seal", || {
            let (status, reply) = self.ask(&self.token, Method::GET, "auth/token/lookup-self", &Value::Null);
            if status == 200 {
                let _ = self.ask(&self.token, Method::PUT, "sys/seal", &json!({}));
            }
            (status == 503 && reply["errors"][0] == "Vault is sealed").then_some(())
        });
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("running");
        kill_process(Pid::from_child(child), signal).expect("signalled");
    }

    /// Hangs the server: its port still accepts connections. Returns once every thread of it stands still.
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.as_ref().expect("running").id());
        wait_for("the server to stop", || {
            let mut states = fs::read_dir(&tasks).expect("tasks").flatten().map(|task| {
                let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T"))
            });
            states.all(|stopped| stopped).then_some(())
        });
    }

    pub(crate) fn cont(&self) {
        self.signal(Signal::CONT);
    }

    /// Ends the process, and frees its port.
    pub(crate) fn kill(&mut self) {
        // The watchdog first: it must not outlive the process whose number it knows.
        for mut child in [self.watchdog.take(), self.child.take()].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again over the same data: unsealed, with the same keys, tokens and address.
    pub(crate) fn restart(&mut self) {
        assert!(self.storage == Storage::Raft, "only raft survives");
        self.kill();
        assert!(self.spawn(), "OpenBao does not come back:\n{}", self.log());
        wait_for("logins to be restored", || {
            (self.ask(&self.token, Method::GET, "auth/token/lookup-self", &Value::Null).0 == 200).then_some(())
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

trait JsonBody {
    fn json_body(self, body: &Value) -> Self;
}

/// reqwest's own `json` is a feature that lethefs has no need of.
impl JsonBody for reqwest::blocking::RequestBuilder {
    fn json_body(self, body: &Value) -> Self {
        if body.is_null() { self } else { self.header("Content-Type", "application/json").body(body.to_string()) }
    }
}
