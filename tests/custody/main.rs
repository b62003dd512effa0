//! A live mount and its key service: renewal, revocation, outages, resuming. Needs root, `/dev/fuse`, `fuse3` and OpenBao.
#![allow(clippy::unwrap_used, missing_docs)]

mod bound;
mod cluster;
mod drain;
mod hung;
mod memory;
mod outage;
mod revoked;
mod slots;
mod still;
mod supervisor;
#[path = "../support/mod.rs"]
mod support;

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use serde_json::Value;

use support::openbao::wait_for;
use support::volume::TestVolume;

pub(crate) const EKEYEXPIRED: i32 = 127;
pub(crate) const EKEYREVOKED: i32 = 128;

/// Renews often, so that a test waits little. The grace is each test's.
pub(crate) const OFTEN: &str = "--renew-interval=200ms";

/// The errno of what must have failed.
#[track_caller]
pub(crate) fn errno<T, E: Into<io::Error>>(result: Result<T, E>) -> i32 {
    match result {
        Ok(_) => panic!("it worked"),
        Err(error) => error.into().raw_os_error().unwrap(),
    }
}

/// What `status` says of the lease.
pub(crate) fn custody(volume: &TestVolume) -> Value {
    let run = volume.cli(&["status", "mnt", "--json"]);
    run.is(0);
    run.json()["live"]["custody"].clone()
}

/// Waits until the lease is in this state.
pub(crate) fn wait_for_state(volume: &TestVolume, state: &str) -> Value {
    let mut last = Value::Null;
    wait_for(state, || {
        let now = custody(volume);
        // Shown if the wait is in vain.
        if now["state"] != last["state"] {
            eprintln!("{now}\n{}", volume.log());
        }
        last = now;
        (last["state"] == state).then(|| last.clone())
    })
}

/// Asks the mount one thing through its control socket.
pub(crate) fn ask(volume: &TestVolume, op: &str) -> Value {
    let dir = std::fs::read_dir(volume.path("run")).unwrap().flatten().map(|entry| entry.path());
    let socket = { dir }.find(|path| path.extension().is_some_and(|end| end == "sock")).expect("a socket");
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.write_all(format!("{{\"v\":1,\"op\":\"{op}\"}}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

/// Another process that has something of the mount in use, and tells how it fares each time it is asked.
pub(crate) struct Program {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Program {
    /// Python, with `look()` defined by `script`: what it returns or raises is told.
    pub(crate) fn new(volume: &TestVolume, script: &str) -> Self {
        let frame = format!(
            "import os, sys, mmap\nos.chdir('mnt')\n{script}\nprint('ready', flush=True)\nfor line in sys.stdin:\n  try:\n    print('ok', look(), flush=True)\n  \
             except OSError as e:\n    print('errno', e.errno, flush=True)\n"
        );
        let mut command = volume.command("python3");
        command.args(["-c", &frame]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (to, mut from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{script}");
        Self { child, to, from }
    }

    /// What it says now: `ok …` or `errno N`; `signal N` if that killed it.
    pub(crate) fn look(&mut self) -> String {
        use std::os::unix::process::ExitStatusExt as _;
        let _ = self.to.write_all(b"\n");
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        match line.trim() {
            "" => format!("signal {}", self.child.wait().unwrap().signal().unwrap_or_default()),
            line => line.to_owned(),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The names in a directory. (Opening the root is always possible.)
pub(crate) fn list(dir: &std::path::Path) -> io::Result<Vec<std::fs::DirEntry>> {
    std::fs::read_dir(dir)?.collect()
}

/// Reads at a place, as a program with the file open does.
pub(crate) fn peek(file: &File, offset: u64) -> io::Result<u8> {
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut byte, offset)?;
    Ok(byte[0])
}
