//! A volume of a test's own: temporary directory, isolated places, the real binary, and an end that leaves nothing.
//!
//! The daemon becomes a child of the test (which is made a subreaper), so that its exit code can be read, and so that
//! nothing else can ever be killed by its number.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lethefs::kms::{Binding, KeyIdentity, Purpose, Wrapped};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, WaitOptions};
use tempfile::TempDir;

/// What a run gave.
#[derive(Debug)]
pub(crate) struct Output {
    /// Exit code; none if a signal ended it.
    pub(crate) code: Option<i32>,
    /// stdout.
    pub(crate) out: String,
    /// stderr.
    pub(crate) err: String,
}

impl Output {
    /// Runs a command to its end.
    #[track_caller]
    pub(crate) fn of(command: &mut Command) -> Self {
        let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
            panic!("{} does not run ({error}): run scripts/test", command.get_program().display())
        });
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Ended with this code; a failure is one line.
    #[track_caller]
    pub(crate) fn is(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        if code != 0 {
            let lines = self.err.lines().filter(|line| !line.starts_with("lethefs: warning: ")).count();
            assert_eq!(lines, 1, "not one line: {}", self.err);
        }
        self
    }

    /// Ended with this code, which is no failure of the program's.
    #[track_caller]
    pub(crate) fn is_code(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        self
    }

    /// stderr has this in it.
    #[track_caller]
    pub(crate) fn says(&self, part: &str) -> &Self {
        assert!(self.err.contains(part), "{part:?} is not in {}", self.err);
        self
    }

    /// stdout as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}{}", self.out, self.err))
    }
}

/// Fails, in one line, where mounts cannot be tested.
#[track_caller]
pub(crate) fn require_mounts() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts as root: run scripts/test as root");
    assert!(Path::new("/dev/fuse").exists(), "there is no /dev/fuse: run scripts/test, which says what to do");
    let there = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join("fusermount3").is_file());
    assert!(there, "there is no fusermount3: run scripts/test, which installs it");
}

/// A volume, mounted or not, and everything that belongs to it.
pub(crate) struct TestVolume {
    dir: Option<TempDir>,
    root: PathBuf,
    state: Mutex<State>,
}

struct State {
    program: PathBuf,
    user: Option<u32>,
    env: Vec<(OsString, OsString)>,
    daemons: Vec<Daemon>,
}

/// A mount's two processes.
#[derive(Clone, Copy)]
struct Daemon {
    /// Serves; the supervisor's child.
    pid: Pid,
    /// Our child, once whoever started it is gone; ends as the daemon ended.
    supervisor: Pid,
}

impl TestVolume {
    /// The directories and nothing in them; `backing` is not there yet.
    pub(crate) fn new() -> Self {
        require_mounts();
        // Daemons that go to the background become children of this process.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
        let dir = TempDir::with_prefix("lethefs-mounted.").unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["keys", "trust", "run", "state", "home", "mnt"] {
            fs::create_dir(root.join(name)).unwrap();
            fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let env = [("LETHEFS_TRUST_DIR", "trust"), ("LETHEFS_RUNTIME_DIR", "run"), ("LETHEFS_STATE_DIR", "state")]
            .into_iter()
            .chain([("HOME", "home")])
            .map(|(name, dir)| (name.into(), root.join(dir).into()))
            // What tells a process of this run from others (scripts/test), and what every program needs.
            .chain(
                ["LETHEFS_TEST_RUN", "PATH"]
                    .into_iter()
                    .filter_map(|name| Some((name.into(), std::env::var_os(name)?))),
            )
            .collect();
        Self {
            dir: Some(dir),
            root,
            state: Mutex::new(State {
                program: env!("CARGO_BIN_EXE_lethefs").into(),
                user: None,
                env,
                daemons: Vec::new(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new volume under a key file.
    pub(crate) fn init() -> Self {
        let volume = Self::new();
        volume.init_with(&volume.file_uri());
        volume
    }

    /// A new volume under a key file, mounted with these arguments.
    #[track_caller]
    pub(crate) fn mounted(args: &[&str]) -> Self {
        let volume = Self::init();
        volume.mount(args);
        volume
    }

    /// Makes sure that other users reach the mountpoint.
    pub(crate) fn open_to_all(&self) {
        let open = |path: &Path| fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0);
        for above in self.root.ancestors().skip(1).filter(|path| !open(path)) {
            let ours = std::env::var_os("LETHEFS_TEST_RUN").and_then(|run| fs::canonicalize(run).ok());
            assert!(ours.as_deref() == Some(above), "{} is closed to other users: run scripts/test", above.display());
            fs::set_permissions(above, fs::Permissions::from_mode(0o711)).unwrap();
        }
    }

    /// Everything is done as this user from now on, who owns all the directories.
    pub(crate) fn become_user(&self, uid: u32) {
        self.open_to_all();
        for name in ["keys", "trust", "run", "state", "home", "mnt", ""] {
            std::os::unix::fs::chown(self.root.join(name), Some(uid), Some(uid)).unwrap();
        }
        // The target directory may be out of this user's reach.
        let program = self.root.join("lethefs");
        fs::copy(env!("CARGO_BIN_EXE_lethefs"), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut state = self.state();
        (state.program, state.user) = (program, Some(uid));
    }

    /// Everything is done as root again, who takes the key file as well.
    pub(crate) fn become_root(&self) {
        self.state().user = None;
        std::os::unix::fs::chown(self.path("keys/key"), Some(0), Some(0)).unwrap();
    }

    /// Sets a variable for every later run.
    pub(crate) fn env(&self, name: &str, value: impl Into<OsString>) {
        let mut state = self.state();
        state.env.retain(|(known, _)| known != name);
        state.env.push((name.into(), value.into()));
    }

    /// A path in the temporary directory.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// The backing directory.
    pub(crate) fn backing(&self) -> PathBuf {
        self.path("backing")
    }

    /// The mountpoint.
    pub(crate) fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    /// A path in the mount.
    pub(crate) fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.mnt().join(name)
    }

    /// The URI of the key file.
    pub(crate) fn file_uri(&self) -> String {
        format!("file://{}", self.path("keys/key").display())
    }

    /// Any program, in this volume's places and as its user.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let state = self.state();
        command.current_dir(&self.root).env_clear().envs(state.env.iter().map(|(name, value)| (name, value)));
        if let Some(uid) = state.user {
            command.uid(uid).gid(uid);
        }
        command
    }

    /// The real binary.
    pub(crate) fn lethefs<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let program = self.state().program.clone();
        let mut command = self.command(program);
        command.args(args);
        command
    }

    /// Runs the real binary.
    #[track_caller]
    pub(crate) fn cli<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        Output::of(&mut self.lethefs(args))
    }

    /// Makes the volume, under any key. Its id.
    #[track_caller]
    pub(crate) fn init_with(&self, uri: &str) -> String {
        let made = self.cli(&["init", "backing", "--kms", uri, "--label", "test", "--json"]);
        made.is(0);
        made.json()["volume_id"].as_str().unwrap().to_owned()
    }

    /// Mounts; must work. The daemon.
    #[track_caller]
    pub(crate) fn mount(&self, args: &[&str]) -> Pid {
        let run = self.try_mount(args);
        run.is(0);
        self.daemon()
    }

    /// Mounts, or not.
    #[track_caller]
    pub(crate) fn try_mount(&self, args: &[&str]) -> Output {
        self.try_mount_by(&mut self.lethefs(&[&["mount", "backing", "mnt", "--json"], args].concat()))
    }

    /// The same, by any command that ends up as `lethefs mount … --json`.
    #[track_caller]
    pub(crate) fn try_mount_by(&self, command: &mut Command) -> Output {
        let run = Output::of(command);
        if run.code == Some(0) {
            let told = run.json();
            let pid = |name: &str| told[name].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).unwrap();
            self.state().daemons.push(Daemon { pid: pid("pid"), supervisor: pid("supervisor") });
        }
        run
    }

    /// Unmounts with `lethefs umount`; must work, and the daemon must have ended with 0.
    #[track_caller]
    pub(crate) fn umount(&self) {
        self.cli(&["umount", "mnt"]).is(0);
        assert_eq!(self.daemon_exit(), Some(0), "{}", self.log());
    }

    /// Unmounts and mounts again.
    #[track_caller]
    pub(crate) fn remount(&self, args: &[&str]) {
        self.umount();
        self.mount(args);
    }

    /// The running daemon.
    #[track_caller]
    pub(crate) fn daemon(&self) -> Pid {
        self.state().daemons.last().expect("mounted").pid
    }

    /// Its supervisor.
    #[track_caller]
    pub(crate) fn supervisor(&self) -> Pid {
        self.state().daemons.last().expect("mounted").supervisor
    }

    /// Waits for the newest daemon's end. Its exit code; none if a signal ended it.
    #[track_caller]
    pub(crate) fn daemon_exit(&self) -> Option<i32> {
        let daemon = self.state().daemons.pop().expect("mounted");
        reap(daemon.supervisor).and_then(|status| status.exit_status())
    }

    /// kill -9 of the daemon, and out of the way with the dead mount.
    #[track_caller]
    pub(crate) fn crash(&self) {
        rustix::process::kill_process(self.daemon(), Signal::KILL).unwrap();
        assert_eq!(self.daemon_exit(), None);
        detach_all(&self.mnt());
    }

    /// What the daemons logged.
    pub(crate) fn log(&self) -> String {
        for daemon in &self.state().daemons {
            log_is_written(daemon.pid);
        }
        let files = fs::read_dir(self.path("run")).into_iter().flatten().flatten().map(|entry| entry.path());
        let logs = files.filter(|path| path.extension().is_some_and(|end| end == "log"));
        logs.map(|path| fs::read_to_string(path).unwrap_or_default()).collect()
    }

    /// The KEK (scope 0, version 1) of a volume under a key file, by way of the library's key service: the program
    /// itself never gives it out.
    pub(crate) fn kek(&self) -> [u8; 32] {
        let text = fs::read_to_string(self.backing().join("lethefs.volume")).unwrap();
        let body: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let slot = &body["scopes"][0]["keks"][0]["slots"][0];
        let binding = Binding {
            volume: body["volume_id"].as_str().unwrap().parse().unwrap(),
            scope: 0,
            version: 1,
            purpose: Purpose::Kek,
        };
        let identity: KeyIdentity = serde_json::from_value(slot["identity"].clone()).unwrap();
        let wrapped = Wrapped(slot["wrapped"].as_str().unwrap().to_owned());
        let source = lethefs::kms::source(&self.file_uri().parse().unwrap()).unwrap();
        source.unwrap(&binding, &wrapped, &identity).unwrap().expose(|bytes| *bytes)
    }
}

impl Drop for TestVolume {
    fn drop(&mut self) {
        detach_all(&self.root);
        for daemon in std::mem::take(&mut self.state().daemons) {
            // Its number is its own as long as its supervisor, which is our child, has not seen its end.
            if matches!(rustix::process::waitpid(Some(daemon.supervisor), WaitOptions::NOHANG), Ok(None)) {
                let _ = rustix::process::kill_process(daemon.pid, Signal::KILL);
                reap(daemon.supervisor);
            }
            // Where a test has killed the supervisor, the daemon became ours.
            reap(daemon.pid);
        }
        // Never remove a directory with something mounted in it.
        if !mounts_below(&self.root).is_empty() {
            let _ = self.dir.take().map(TempDir::keep);
        }
    }
}

fn reap(pid: Pid) -> Option<rustix::process::WaitStatus> {
    loop {
        match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.ok().flatten().map(|(_, status)| status),
        }
    }
}

/// Mountpoints below `dir`, innermost first.
pub(crate) fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    below.reverse();
    below
}

fn detach_all(dir: &Path) {
    for point in mounts_below(dir) {
        let _ = rustix::mount::unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }
}

/// Until a daemon that lives has written what it logged: its thread for that sleeps when nothing is left (`service/log.rs`).
fn log_is_written(daemon: Pid) {
    let asleep = |task: &Path| {
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
        let stat = fs::read_to_string(task.join("stat")).unwrap_or_default();
        name.trim() != "lethefs-log" || stat.rsplit(") ").next().is_none_or(|rest| !rest.starts_with(['R', 'D']))
    };
    let tasks = PathBuf::from(format!("/proc/{}/task", daemon.as_raw_nonzero()));
    while !fs::read_dir(&tasks).into_iter().flatten().flatten().all(|task| asleep(&task.path())) {
        std::thread::yield_now();
    }
}
