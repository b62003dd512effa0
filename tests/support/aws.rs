//! AWS KMS for tests: tests/kms/aws_server.py (moto with key states, signatures and roles) over TLS, with its own
//! temporary directory, and profiles for a host and an administrator.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use reqwest::blocking::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::openbao::{make_certificates, wait_for};

pub(crate) const REGION: &str = "eu-central-1";
/// moto's.
pub(crate) const ACCOUNT: &str = "123456789012";

/// A running server. It ends when our end of its stdin closes.
pub(crate) struct Server {
    dir: TempDir,
    child: Mutex<Child>,
    port: u16,
    http: Client,
}

/// The actions of a policy in docs/KMS.md that stands under this heading.
fn documented_actions(heading: &str) -> Vec<String> {
    let docs = include_str!("../../docs/KMS.md");
    let section = docs.split_once(heading).unwrap_or_else(|| panic!("docs/KMS.md has no `{heading}`")).1;
    let block = section.split_once("```json\n").and_then(|(_, rest)| rest.split_once("```")).expect("a json block").0;
    let policy: Value = serde_json::from_str(block).expect(block);
    let actions = policy["Action"].as_array().expect("actions").iter();
    actions.map(|action| action.as_str().expect("text").to_owned()).collect()
}

impl Server {
    pub(crate) fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = TempDir::with_prefix("lethefs-aws.").expect("temporary directory");
        make_certificates(dir.path());
        let python =
            std::env::var_os("LETHEFS_TEST_PYTHON").expect("LETHEFS_TEST_PYTHON: run scripts/test, which sets it");
        let log = fs::File::create(dir.path().join("server.log")).expect("log");
        let child = Command::new(python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms/aws_server.py"))
            .arg(dir.path())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("python runs");
        let ca = reqwest::Certificate::from_pem(&fs::read(dir.path().join("ca.pem")).expect("CA")).expect("CA");
        let http = Client::builder().no_proxy().tls_certs_only([ca]).build().expect("HTTP client");
        let mut server = Self { dir, child: Mutex::new(child), port: 0, http };
        server.set_roles(&[]);
        server.port = wait_for("the AWS server", || {
            let ended = server.child.lock().expect("child").try_wait().expect("waited");
            assert!(ended.is_none(), "{}", fs::read_to_string(server.path("server.log")).unwrap_or_default());
            fs::read_to_string(server.path("port")).ok()?.parse().ok()
        });
        for role in ["host", "admin", "wrapper", "owner"] {
            server.profile(role, &server.address());
        }
        server
    }

    /// The roles, but for those whose keys are expired or gone.
    pub(crate) fn set_roles(&self, without: &[(&str, &str)]) {
        let mut roles = BTreeMap::new();
        let owner = ["CreateKey", "CreateAlias", "DescribeKey", "ScheduleKeyDeletion", "EnableKey", "DisableKey"];
        for (role, actions) in [
            ("host", documented_actions("### The mount host's rights")),
            ("admin", documented_actions("### The administrator's rights")),
            ("wrapper", documented_actions("### The rights of whoever adds a slot")),
            ("owner", owner.map(|action| format!("kms:{action}")).to_vec()),
        ] {
            roles.insert(format!("AKID{role}"), json!({ "secret": format!("secret-of-{role}"), "actions": actions }));
        }
        for (role, change) in without {
            let role = format!("AKID{role}");
            match *change {
                "gone" => drop(roles.remove(&role)),
                "expired" => roles.get_mut(&role).expect("role")["expired"] = true.into(),
                action => roles.get_mut(&role).expect("role")["actions"]
                    .as_array_mut()
                    .expect("actions")
                    .retain(|granted| granted != action),
            }
        }
        fs::write(self.path("roles.new"), serde_json::to_string(&roles).expect("JSON")).expect("written");
        fs::rename(self.path("roles.new"), self.path("roles.json")).expect("renamed");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// A file for AWS_CONFIG_FILE that logs in as a role at an address.
    pub(crate) fn profile(&self, role: &str, address: &str) -> PathBuf {
        self.profile_with(role, address, &format!("AKID{role}"), &format!("secret-of-{role}"))
    }

    pub(crate) fn profile_with(&self, file: &str, address: &str, key: &str, secret: &str) -> PathBuf {
        let path = self.path(&format!("{file}.profile"));
        let text = format!(
            "[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\nregion = {REGION}\n\
             endpoint_url = {address}\n"
        );
        fs::write(&path, text).expect("profile");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        path
    }

    fn control(&self, what: &str, body: &Value) -> Value {
        let reply = self.http.post(format!("{}/test/{what}", self.address())).body(body.to_string()).send();
        serde_json::from_str(&reply.expect("answer").text().expect("text")).expect("JSON")
    }

    /// Every deletion that waits comes true.
    pub(crate) fn expire(&self) {
        self.control("expire", &json!({}));
    }

    /// Gives an operation a certain answer.
    pub(crate) fn tell(&self, answer: &Value) {
        self.control("answer", answer);
    }

    pub(crate) fn set_state(&self, key: &str, state: &str) {
        self.control("state", &json!({ "key": key, "state": state }));
    }

    /// The operations since the last time.
    pub(crate) fn calls(&self) -> Vec<String> {
        serde_json::from_value(self.control("calls", &json!({}))).expect("list")
    }

    /// Asks with the owner's rights, by a client that is not the one under test.
    #[track_caller]
    pub(crate) fn owner(&self, operation: &str, body: &Value) -> Value {
        let script = "import boto3, json, sys\n\
             client = boto3.client('kms', endpoint_url=sys.argv[1], verify=sys.argv[2], region_name=sys.argv[3],\n\
                 aws_access_key_id='AKIDowner', aws_secret_access_key='secret-of-owner')\n\
             print(json.dumps(getattr(client, sys.argv[4])(**json.loads(sys.argv[5])), default=str))";
        let python = std::env::var_os("LETHEFS_TEST_PYTHON").expect("LETHEFS_TEST_PYTHON");
        let mut command = Command::new(python);
        command.args(["-c", script, &self.address()]).arg(self.ca()).args([REGION, operation, &body.to_string()]);
        let done = command.output().expect("python runs");
        assert!(done.status.success(), "{operation}: {}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).expect("JSON")
    }

    /// Makes a key; its id.
    #[track_caller]
    pub(crate) fn create_key(&self, options: &Value) -> String {
        self.owner("create_key", options)["KeyMetadata"]["KeyId"].as_str().expect("id").to_owned()
    }

    pub(crate) fn arn(id: &str) -> String {
        format!("arn:aws:kms:{REGION}:{ACCOUNT}:key/{id}")
    }

    /// Ends the server; its port refuses then.
    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().expect("child");
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
