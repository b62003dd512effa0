//! A cluster of three OpenBao nodes that loses its leader in the middle of the work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lethefs::kms::transit::Transit;
use lethefs::kms::{Failure, KeySource};
use reqwest::Method;
use reqwest::blocking::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::openbao::{bao, free_port, make_certificates, wait_for};
use super::{BINDING, HOST_POLICY, config, documented_policy, key, token};

struct Node {
    port: u16,
    child: Child,
    watchdog: Child,
}

impl Node {
    fn kill(&mut self) {
        // The watchdog first: it must not outlive the process whose number it knows.
        for child in [&mut self.watchdog, &mut self.child] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }
}

/// Three nodes with raft storage and one static seal; nodes two and three join the first.
struct Cluster {
    dir: TempDir,
    nodes: Vec<Node>,
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
    fn start() -> Self {
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

    fn ask(&self, node: usize, method: Method, path: &str, body: &Value) -> Option<(u16, Value)> {
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
    fn put(&self, path: &str, body: &Value) -> Value {
        let (status, reply) = self.ask(0, Method::POST, path, body).expect("answer");
        assert!((200..300).contains(&status), "{path}: {status} {reply}");
        reply
    }

    fn leader(&self) -> usize {
        let leads = |node: usize| {
            let (_, reply) = self.ask(node, Method::GET, "sys/leader", &Value::Null)?;
            (reply["is_self"] == true).then_some(node)
        };
        wait_for("a leader", || (0..self.nodes.len()).find_map(leads))
    }

    fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }
}

#[test]
fn a_cluster_that_loses_its_leader_fails_no_operation() {
    let mut cluster = Cluster::start();
    cluster.put("sys/mounts/transit", &json!({ "type": "transit" }));
    cluster.put("transit/keys/vol1", &json!({ "type": "aes256-gcm96", "derived": true }));
    cluster.put("sys/policies/acl/host", &json!({ "policy": documented_policy(HOST_POLICY, "vol1") }));
    let made = cluster.put("auth/token/create", &json!({ "policies": ["host"], "ttl": "1h" }));
    let host_token = made["auth"]["client_token"].as_str().expect("token").to_owned();

    let leader = cluster.leader();
    let mut settings = config(&cluster.nodes[leader].address(), &cluster.ca(), token(&host_token));
    settings.addresses = cluster.nodes.iter().map(|node| node.address().parse().expect("address")).collect();
    settings.timeout = Duration::from_secs(10);
    settings.patience = Duration::from_secs(60);
    let transit = Transit::new(&key("vol1"), settings);
    let made = transit.make(&BINDING).unwrap_or_else(|e| panic!("{e} {:?}", e.detail));

    let mut took: Vec<Duration> = Vec::new();
    let mut unwrap = |many: usize| {
        for n in 0..many {
            let began = Instant::now();
            let opened = transit.unwrap(&BINDING, &made.wrapped, &made.identity);
            let opened = opened.unwrap_or_else(|e| panic!("unwrap {n}: {e} {:?}", e.detail));
            assert!(opened.same_as(&made.key));
            took.push(began.elapsed());
        }
    };
    unwrap(100);
    cluster.nodes[leader].kill();
    unwrap(200);
    assert_ne!(cluster.leader(), leader);
    let longest = took.iter().max().expect("some");
    let usual = {
        let mut sorted = took.clone();
        sorted.sort();
        sorted[sorted.len() / 2]
    };
    println!("unwraps: {}, failed: 0, median {usual:?}, longest {longest:?}", took.len());

    // One node is no cluster: nobody leads, and that is told within the time that was given.
    let other = cluster.leader();
    cluster.nodes[other].kill();
    let mut settings = config(&cluster.nodes[0].address(), &cluster.ca(), token(&host_token));
    settings.addresses = cluster.nodes.iter().map(|node| node.address().parse().expect("address")).collect();
    settings.patience = Duration::from_secs(2);
    settings.timeout = Duration::from_secs(2);
    let transit = Transit::new(&key("vol1"), settings);
    let alone = super::failure("alone", transit.unwrap(&BINDING, &made.wrapped, &made.identity));
    assert!(matches!(alone, Failure::Unavailable | Failure::Unreachable), "{alone:?}");
}
