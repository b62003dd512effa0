//! A SoftHSM token of a test's own, and a module that can be told to fail.
//!
//! Keys are made and destroyed by `pkcs11-tool`, as an administrator would, in other processes than the test's.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

pub(crate) const PIN: &str = "24681357";
pub(crate) const LABEL: &str = "lethefs test";

/// Debian's, and where other systems have it.
fn softhsm() -> &'static Path {
    let known = ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so"].map(Path::new);
    let found = known.into_iter().find(|path| path.is_file());
    found.expect("no libsofthsm2.so for this test: run scripts/test, which installs it")
}

/// A directory with one token.
pub(crate) struct Token {
    dir: TempDir,
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let done = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{} does not run ({error}): run scripts/test", command.get_program().display()));
    let out = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{command:?}: {out}{}", String::from_utf8_lossy(&done.stderr));
    out
}

impl Token {
    /// A new token, and the file with its PIN.
    pub(crate) fn new() -> Self {
        let token = Self { dir: TempDir::with_prefix("lethefs-hsm.").expect("temporary directory") };
        fs::create_dir(token.path("tokens")).expect("directory");
        let text = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
            token.path("tokens").display()
        );
        fs::write(token.conf(), text).expect("configuration");
        token.init(LABEL);
        token.set_pin(PIN);
        token
    }

    /// Another token beside it.
    pub(crate) fn init(&self, label: &str) {
        let args = ["--init-token", "--free", "--label", label, "--so-pin", "12345678", "--pin", PIN];
        run(Command::new("softhsm2-util").args(args).env("SOFTHSM2_CONF", self.conf()));
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn conf(&self) -> PathBuf {
        self.path("softhsm2.conf")
    }

    pub(crate) fn pin_file(&self) -> PathBuf {
        self.path("pin")
    }

    /// What stands in the PIN's file.
    pub(crate) fn set_pin(&self, pin: &str) {
        fs::write(self.pin_file(), format!("{pin}\n")).expect("PIN");
        fs::set_permissions(self.pin_file(), fs::Permissions::from_mode(0o600)).expect("chmod");
    }

    /// SoftHSM itself, for processes with `SOFTHSM2_CONF` in their environment.
    pub(crate) fn real_module() -> PathBuf {
        softhsm().to_owned()
    }

    /// SoftHSM behind a module that does what it is told, and that knows its configuration.
    pub(crate) fn module(&self) -> PathBuf {
        let path = self.path("module.so");
        if !path.exists() {
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/module.c");
            let define = |name: &str, value: &Path| format!("-D{name}=\"{}\"", value.display());
            run(Command::new("gcc")
                .args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
                .arg(&path)
                .args([define("REAL", softhsm()), define("CONF", &self.conf()), define("TOLD", &self.path("told"))])
                .arg(source)
                .arg("-ldl"));
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        }
        path
    }

    /// Tells the module what to answer; nothing: what the token answers.
    pub(crate) fn tell(&self, lines: &str) {
        fs::write(self.path("told.new"), lines).expect("written");
        fs::rename(self.path("told.new"), self.path("told")).expect("renamed");
    }

    /// How often the module was asked for this since the last time.
    pub(crate) fn calls(&self, function: &str) -> usize {
        let path = self.path("told.calls");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(path);
        text.lines().filter(|line| *line == function).count()
    }

    /// Runs a command of an administrator's shell.
    #[track_caller]
    pub(crate) fn shell(&self, script: &str) -> String {
        let mut command = Command::new("sh");
        command.args(["-ec", script]).env("SOFTHSM2_CONF", self.conf()).env("PIN", PIN);
        run(command.env("LETHEFS_PKCS11_MODULE", softhsm()))
    }

    #[track_caller]
    fn tool(&self, args: &str) -> String {
        self.shell(&format!(
            "pkcs11-tool --module \"$LETHEFS_PKCS11_MODULE\" --token-label '{LABEL}' --login --pin env:PIN {args}"
        ))
    }

    /// Makes a key in the documented way, but with a given id, so that it can be made again.
    #[track_caller]
    pub(crate) fn create_key(&self, label: &str, id: &str) {
        self.tool(&format!("--keygen --key-type AES:32 --label {label} --id {id} --sensitive"));
    }

    /// Makes a key with other options.
    #[track_caller]
    pub(crate) fn create_with(&self, options: &str) {
        self.tool(&format!("--keygen {options}"));
    }

    #[track_caller]
    pub(crate) fn delete_key(&self, id: &str) {
        self.tool(&format!("--delete-object --type secrkey --id {id}"));
    }

    /// Takes the token's store away, or brings it back.
    pub(crate) fn set_present(&self, present: bool) {
        let (here, away) = (self.path("tokens"), self.path("tokens.away"));
        let (from, to) = if present { (away, here) } else { (here, away) };
        fs::rename(from, to).expect("renamed");
    }
}
