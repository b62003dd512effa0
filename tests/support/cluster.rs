//! A real cluster of three OpenBao nodes for tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reqwest::Method;
use reqwest::blocking::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::openbao::{bao, free_port, make_certificates, wait_for};

pub(crate) struct Node {
    port: u16,
    child: Child,
    watchdog: Child,
}

impl Node {
    pub(crate) fn kill(&mut self) {
        // The watchdog first: it must not outlive the process whose number it knows.
        for child in [&mut self.watchdog, &mut self.child] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub(crate) fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }
}

/// Three nodes with raft storage and one static seal; nodes two and three join the first.
pub(crate) struct Cluster {
    dir: TempDir,
    pub(crate) nodes: Vec<Node>,
    http: Client,
    token: String,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.iter_mut().for_each(Node::kill);
    }
}

fn configuration(dir: &Path, number: usize, ports: &[(u16, u16)]) -> String {
    let (port, cluster) = ports[number];
    // As docs/KMS.md asks: otherwise standbys answer unwraps by themselves, and no election is ever noticed.
    let standbys = "disable_standby_reads = true";
    let dir = dir.display();
    let join: String = (0..ports.len())
        .filter(|other| *other != number)
        .map(|other| {
            format!(
                "  retry_join {{\n    leader_api_addr = \"https://127.0.0.1:{}\"\n    leader_ca_cert_file = \"{dir}/ca.pem\"\n  }}\n",
                ports[other].0
            )
        })
        .collect();
    let initialize = r#"
initialize "setup" {
  request "policy" {
    operation = "update"
    path      = "sys/policies/acl/everything"
    data      = {
      policy = "path \"*\" { capabilities = [\"create\", \"read\", \"update\", \"delete\", \"list\", \"sudo\"] }"
    }
  }
  request "userpass" {
    operation = "update"
    path      = "sys/auth/userpass"
    data      = { type = "userpass" }
  }
  request "admin" {
    operation = "update"
    path      = "auth/userpass/users/admin"
    data      = { password = "admin-password", token_policies = ["everything"] }
  }
}
"#;
    // Only the first makes the cluster: three that initialise themselves would be three clusters.
    let (join, initialize) = if number == 0 { (String::new(), initialize) } else { (join, "") };
    format!(
        r#"{standbys}
storage "raft" {{
  path                   = "{dir}/data{number}"
  node_id                = "n{number}"
  performance_multiplier = 1
{join}}}
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
{initialize}"#
    )
}

fn start_node(dir: &Path, number: usize, ports: &[(u16, u16)]) -> Node {
    fs::create_dir_all(dir.join(format!("data{number}"))).expect("directory");
    let file = dir.join(format!("n{number}.hcl"));
    fs::write(&file, configuration(dir, number, ports)).expect("configuration");
    let log = fs::File::create(dir.join(format!("n{number}.log"))).expect("log");
    let child = Command::new(bao())
        .arg("server")
        .arg(format!("-config={}", file.display()))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("log"))
        .stderr(log)
        .spawn()
        .expect("bao runs");
    // Ends the node should this process end without dropping it.
    let mut watchdog = Command::new("sh");
    watchdog.args(["-c", "read -r _; kill -9 \"$0\"; rm -rf \"$1\"", &child.id().to_string()]).arg(dir);
    watchdog.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    Node { port: ports[number].0, child, watchdog: watchdog.spawn().expect("sh runs") }
}

impl Cluster {
    pub(crate) fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = TempDir::with_prefix("lethefs-cluster.").expect("temporary directory");
        make_certificates(dir.path());
        fs::write(dir.path().join("seal.key"), [7; 32]).expect("seal key");
        let ca = reqwest::Certificate::from_pem(&fs::read(dir.path().join("ca.pem")).expect("CA")).expect("CA");
        let http = Client::builder().no_proxy().tls_certs_only([ca]).timeout(Duration::from_secs(10)).build();
        let ports: Vec<_> = (0..3).map(|_| (free_port(), free_port())).collect();
        let mut cluster = Self { dir, nodes: Vec::new(), http: http.expect("HTTP client"), token: String::new() };
        cluster.nodes.push(start_node(cluster.dir.path(), 0, &ports));
        cluster.token = wait_for("the first node", || {
            let login = json!({ "password": "admin-password" });
            let (status, reply) = cluster.ask(0, Method::POST, "auth/userpass/login/admin", &login)?;
            (status == 200).then(|| reply["auth"]["client_token"].as_str().expect("token").to_owned())
        });
        for number in 1..3 {
            cluster.nodes.push(start_node(cluster.dir.path(), number, &ports));
        }
        // All three vote; only then one may go.
        wait_for("three voters", || {
            let (_, reply) = cluster.ask(0, Method::GET, "sys/storage/raft/configuration", &Value::Null)?;
            let servers = reply["data"]["config"]["servers"].as_array()?;
            (servers.len() == 3 && servers.iter().all(|server| server["voter"] == true)).then_some(())
        });
        wait_for("the standbys", || {
            let standby = |node: usize| cluster.ask(node, Method::GET, "sys/health", &Value::Null).map(|(s, _)| s);
            (standby(1) == Some(429) && standby(2) == Some(429)).then_some(())
        });
        cluster
    }

    pub(crate) fn ask(&self, node: usize, method: Method, path: &str, body: &Value) -> Option<(u16, Value)> {
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.nodes[node].address()));
        if !self.token.is_empty() {
            request = request.header("X-Vault-Token", &self.token);
        }
        if !body.is_null() {
            request = request.body(body.to_string());
        }
        let reply = request.send().ok()?;
        let status = reply.status().as_u16();
        Some((status, serde_json::from_str(&reply.text().ok()?).unwrap_or(Value::Null)))
    }

    #[track_caller]
    pub(crate) fn put(&self, path: &str, body: &Value) -> Value {
        let (status, reply) = self.ask(0, Method::POST, path, body).expect("answer");
        assert!((200..300).contains(&status), "{path}: {status} {reply}");
        reply
    }

    pub(crate) fn leader(&self) -> usize {
        let leads = |node: usize| {
            let (_, reply) = self.ask(node, Method::GET, "sys/leader", &Value::Null)?;
            (reply["is_self"] == true).then_some(node)
        };
        wait_for("a leader", || (0..self.nodes.len()).find_map(leads))
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }
}
