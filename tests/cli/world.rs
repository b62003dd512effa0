//! A directory with everything that the binary would otherwise find on the host, and what a run of it gave.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) struct World {
    dir: tempfile::TempDir,
}

/// What a run gave.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Run {
    #[track_caller]
    pub(crate) fn is(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        if code != 0 && !self.err.starts_with("lethefs: init needs") {
            let lines = self.err.lines().filter(|line| !line.starts_with("lethefs: warning: ")).count();
            assert_eq!(lines, 1, "not one line: {}", self.err);
            assert!(self.err.starts_with("lethefs: "), "{}", self.err);
        }
        self
    }

    #[track_caller]
    pub(crate) fn says(&self, part: &str) -> &Self {
        assert!(self.err.contains(part), "{part:?} is not in {}", self.err);
        self
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["keys", "trust", "run", "state", "mnt", "home"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::set_permissions(dir.path().join(name), std::fs::Permissions::from_mode(0o700)).unwrap();
        }
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        std::fs::canonicalize(self.dir.path()).unwrap().join(name)
    }

    pub(crate) fn uri(&self, key: &str) -> String {
        format!("file://{}", self.path("keys").join(key).display())
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = self.prepare(Command::new(env!("CARGO_BIN_EXE_lethefs")));
        command.args(args);
        command
    }

    pub(crate) fn prepare(&self, mut command: Command) -> Command {
        command.current_dir(self.dir.path()).env_clear().stdin(Stdio::null());
        for (name, dir) in
            [("LETHEFS_TRUST_DIR", "trust"), ("LETHEFS_RUNTIME_DIR", "run"), ("LETHEFS_STATE_DIR", "state")]
        {
            command.env(name, self.path(dir));
        }
        command.env("HOME", self.path("home")).env("PATH", "/usr/bin:/bin");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Run {
        Self::finish(&mut self.command(args))
    }

    pub(crate) fn finish(command: &mut Command) -> Run {
        let output = command.output().unwrap();
        Run {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// A volume under a key file, and its id.
    pub(crate) fn volume(&self, name: &str, key: &str) -> String {
        let run = self.run(&["init", name, "--kms", &self.uri(key), "--json"]);
        run.is(0);
        let report: serde_json::Value = serde_json::from_str(&run.out).unwrap();
        report["volume_id"].as_str().unwrap().to_owned()
    }

    /// The name that confirms the erase of a key file.
    pub(crate) fn key_name(&self, key: &str) -> String {
        let text = std::fs::read(self.path("keys").join(key)).unwrap();
        let key: serde_json::Value = serde_json::from_slice(&text).unwrap();
        key["key_id"].as_str().unwrap().to_owned()
    }

    /// Changes both copies of a volume file.
    pub(crate) fn edit(&self, volume: &str, change: impl Fn(&str) -> String) {
        for name in ["lethefs.volume", "lethefs.volume.bak"] {
            let path = self.path(volume).join(name);
            let text = std::fs::read_to_string(&path).unwrap();
            let changed = change(&text);
            assert_ne!(text, changed);
            std::fs::write(&path, changed).unwrap();
        }
    }

    /// Everything on disk: names, modes, contents, link targets. Not the runtime directory, and not the audit log, in which a
    /// refusal leaves its trace.
    pub(crate) fn snapshot(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let mut found = BTreeMap::new();
        let mut todo = vec![self.dir.path().to_owned()];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = std::fs::symlink_metadata(&path).unwrap();
                let contents = if meta.is_dir() {
                    Vec::new()
                } else if meta.is_symlink() {
                    std::os::unix::ffi::OsStrExt::as_bytes(std::fs::read_link(&path).unwrap().as_os_str()).to_vec()
                } else {
                    std::fs::read(&path).unwrap()
                };
                if path == self.dir.path().join("state/audit") {
                    continue;
                }
                if meta.is_dir() && path != self.dir.path().join("run") {
                    todo.push(path.clone());
                }
                found.insert(path, (meta.mode(), contents));
            }
        }
        found
    }

    /// Runs, and makes sure that it fails so and changes nothing.
    #[track_caller]
    pub(crate) fn refuses(&self, args: &[&str], code: i32, part: &str) {
        let before = self.snapshot();
        self.run(args).is(code).says(part);
        assert!(before == self.snapshot(), "{args:?} changed something on disk");
    }
}

/// Replaces within the JSON of a volume file.
pub(crate) fn swap<'a>(from: &'a str, to: &'a str) -> impl Fn(&str) -> String + use<'a> {
    move |text| text.replace(from, to)
}

/// Whether two paths are the same tree is not asked here; only whether one exists.
pub(crate) fn gone(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err()
}
