//! The control socket of a live mount, both ends: one JSON line in, one JSON line out (docs/CLI.md).
//!
//! Only root and the daemon's own user get an answer, by SO_PEERCRED. Size and time are bounded on both sides. It answers
//! as well while the volume is sealed. What the operations do is the caller's closure ([`super::mount`]).

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::custody::CustodyStatus;
use super::places;
use super::record::path_text;
use crate::audit::Peer;
use crate::crypto::VolumeId;
use crate::kms::KeyIdentity;

/// The protocol.
const VERSION: u32 = 1;
/// Longest line in either direction, in bytes.
const MAX_LINE: u64 = 64 << 10;
/// How long a mount waits for a client's bytes.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a client waits for the whole of an answer, however it trickles in.
pub(crate) const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// How long a client waits for a seal, which drops every cached page.
const SEAL_PATIENCE: Duration = Duration::from_secs(60);
/// How long a mount waits for the outcome of a resume: one request's time limit, and some.
pub(crate) const RESUME_PATIENCE: Duration = Duration::from_secs(30);
/// Connections served at a time; one more is closed unanswered.
const MAX_CLIENTS: usize = 8;

/// What a mount can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// Who and how: [`Status`].
    Status,
    /// Counters alone.
    Metrics,
    /// Wipe the keys now, and keep them away until somebody asks to resume.
    Seal,
    /// Ask the key service now, and go on if it still gives the key.
    Resume,
    /// Check the whole volume, changing nothing. Findings and progress come in lines of their own before the answer.
    Fsck,
}

/// One question, for whoever answers it.
pub struct Asked<'a> {
    /// What is asked.
    pub op: Op,
    /// [`Op::Fsck`]: with plaintext names.
    pub names: bool,
    /// Who asks, for the audit log.
    pub peer: Peer,
    tell: &'a mut dyn FnMut(&str, &Value) -> io::Result<()>,
}

impl Asked<'_> {
    /// Sends a line before the answer: `{"v":1,WHAT:value}`.
    ///
    /// # Errors
    /// The client went away.
    pub fn tell(&mut self, what: &str, value: &Value) -> io::Result<()> {
        (self.tell)(what, value)
    }
}

/// The answer to [`Op::Status`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Its label.
    pub label: String,
    /// Backing directory.
    #[serde(with = "path_text")]
    pub backing: PathBuf,
    /// Mountpoint.
    #[serde(with = "path_text")]
    pub mountpoint: PathBuf,
    /// The daemon.
    pub pid: i32,
    /// The process that clears up behind it, as long as that lives.
    #[serde(default)]
    pub supervisor: Option<i32>,
    /// RFC 3339, UTC.
    pub started: String,
    /// The KMS key in use.
    pub key: KeyIdentity,
    /// How this host reaches it.
    pub uri: String,
    /// As `-o` writes them.
    pub options: Vec<String>,
    /// Why the keys are wiped, if they are.
    pub sealed: Option<String>,
    /// The lease on the key.
    #[serde(default)]
    pub custody: Option<CustodyStatus>,
    /// Counters of the filesystem.
    pub counters: Value,
}

#[derive(Serialize, Deserialize)]
struct Request {
    v: u32,
    op: String,
    #[serde(default)]
    names: bool,
}

#[derive(Serialize, Deserialize)]
struct Reply {
    v: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ok: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<Refusal>,
}

#[derive(Serialize, Deserialize)]
struct Refusal {
    code: String,
    message: String,
}

/// Makes the socket and serves it until the process ends. A socket left by a dead mount is replaced: whoever calls holds the
/// volume's lock.
///
/// # Errors
/// The system's.
pub fn serve(
    path: &Path,
    answer: impl Fn(&mut Asked<'_>) -> Result<Value, String> + Send + Sync + 'static,
) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // Between bind and chmod the peer check below is what keeps others out.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let answer = Arc::new(answer);
    let clients = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, most likely: not a reason to spin.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
                clients.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (answer, busy) = (Arc::clone(&answer), Arc::clone(&clients));
            let spawned = std::thread::Builder::new().name("control-client".into()).spawn(move || {
                if let Err(error) = converse(&stream, &*answer) {
                    tracing::debug!(%error, "a control client went away");
                }
                busy.fetch_sub(1, Ordering::SeqCst);
            });
            if spawned.is_err() {
                clients.fetch_sub(1, Ordering::SeqCst);
            }
        }
    })?;
    Ok(())
}

fn converse(
    stream: &UnixStream,
    answer: &(impl Fn(&mut Asked<'_>) -> Result<Value, String> + ?Sized),
) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    let peer = Peer { uid: peer.uid.as_raw(), pid: peer.pid.as_raw_nonzero().get() };
    stream.set_write_timeout(Some(PATIENCE))?;
    let reply = if peer.uid == 0 || peer.uid == places::euid() {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut line = Vec::new();
        BufReader::new(stream).take(MAX_LINE).read_until(b'\n', &mut line)?;
        let mut tell =
            |what: &str, value: &Value| write_line(stream, &serde_json::json!({ "v": VERSION, what: value }));
        respond(&line, peer, answer, &mut tell)
    } else {
        refuse("denied", "only root and the user of the mount are answered")
    };
    write_line(stream, &reply)
}

fn write_line(mut stream: &UnixStream, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    stream.write_all(&text)
}

fn respond(
    line: &[u8],
    peer: Peer,
    answer: &(impl Fn(&mut Asked<'_>) -> Result<Value, String> + ?Sized),
    tell: &mut dyn FnMut(&str, &Value) -> io::Result<()>,
) -> Reply {
    let Ok(request) = serde_json::from_slice::<Request>(line) else {
        return refuse("bad-request", "expected one line like {\"v\":1,\"op\":\"status\"}");
    };
    if request.v != VERSION {
        return refuse("unknown-version", "this mount speaks version 1");
    }
    let Ok(op) = serde_json::from_value(Value::String(request.op)) else {
        return refuse("unknown-op", "known are status, metrics, seal, resume, fsck");
    };
    match answer(&mut Asked { op, names: request.names, peer, tell }) {
        Ok(value) => Reply { v: VERSION, ok: Some(value), error: None },
        Err(why) => refuse("failed", &why),
    }
}

fn refuse(code: &str, message: &str) -> Reply {
    Reply { v: VERSION, ok: None, error: Some(Refusal { code: code.into(), message: message.into() }) }
}

/// A connection to a live mount.
pub struct Client {
    stream: UnixStream,
    pid: Option<Pid>,
}

impl Client {
    /// Connects, and makes sure that root or this user listens there. Does not wait: whose backlog is full does not answer.
    ///
    /// # Errors
    /// The system's: nobody listens. [`io::ErrorKind::WouldBlock`]: somebody does, and does not answer.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let dir = socket.parent().ok_or_else(|| io::Error::other("a socket without a directory"))?;
        let owner = std::fs::symlink_metadata(dir)?.uid();
        let meta = std::fs::symlink_metadata(socket)?;
        if !meta.file_type().is_socket() || (meta.uid() != 0 && meta.uid() != owner) {
            return Err(io::Error::other("what is in the control socket's place is not one"));
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(socket)?)?;
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false)?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        let (uid, own) = (peer.uid.as_raw(), places::euid());
        // Root looks into users' directories, too: there the user himself must be the one who listens.
        let trusted = if own == 0 { uid == owner } else { uid == 0 || uid == own };
        if !trusted {
            return Err(io::Error::other("somebody else listens on the control socket"));
        }
        Ok(Self { stream, pid: Some(peer.pid) })
    }

    /// The daemon, as the kernel knows it.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Asks one thing.
    ///
    /// # Errors
    /// The system's, a time-out, or the mount's refusal.
    pub fn ask(self, op: Op) -> io::Result<Value> {
        let patience = if matches!(op, Op::Seal | Op::Resume) { SEAL_PATIENCE } else { ANSWER_PATIENCE };
        self.ask_until(op, Instant::now() + patience)
    }

    /// Asks one thing, and waits for all of the answer until then.
    fn ask_until(self, op: Op, until: Instant) -> io::Result<Value> {
        outcome(self.exchange(&serde_json::json!({ "v": VERSION, "op": op }), until)?)
    }

    fn exchange(mut self, question: &Value, until: Instant) -> io::Result<Reply> {
        self.stream.set_write_timeout(Some(left(until)?))?;
        let mut line = serde_json::to_vec(question)?;
        line.push(b'\n');
        self.stream.write_all(&line)?;
        let mut reply = Vec::new();
        let mut chunk = [0; 4096];
        while !reply.contains(&b'\n') && (reply.len() as u64) < MAX_LINE {
            self.stream.set_read_timeout(Some(left(until)?))?;
            match self.stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => reply.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(serde_json::from_slice(&reply)?)
    }

    /// Asks one thing that the mount may be too old to know. `Err` within: its refusal, code and line.
    ///
    /// # Errors
    /// The system's, or a time-out.
    pub fn ask_word(self, op: &str) -> io::Result<Result<Value, (String, String)>> {
        let reply = self.exchange(&serde_json::json!({ "v": VERSION, "op": op }), Instant::now() + SEAL_PATIENCE)?;
        match (reply.ok, reply.error) {
            (Some(value), None) => Ok(Ok(value)),
            (_, Some(refusal)) => Ok(Err((refusal.code, refusal.message))),
            (None, None) => Err(io::Error::other("the mount gave an empty answer")),
        }
    }

    /// Asks for a check of the volume; calls `told` with each line before the answer. Waits as long as lines come.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn check(mut self, names: bool, told: &mut dyn FnMut(&Value)) -> io::Result<Value> {
        self.stream.set_write_timeout(Some(ANSWER_PATIENCE))?;
        self.stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
        let mut line = serde_json::to_vec(&serde_json::json!({ "v": VERSION, "op": Op::Fsck, "names": names }))?;
        line.push(b'\n');
        self.stream.write_all(&line)?;
        let mut lines = BufReader::new(&self.stream);
        loop {
            let mut line = Vec::new();
            (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line)?;
            if line.is_empty() {
                return Err(io::Error::other("the mount ended in the middle of it"));
            }
            let value: Value = serde_json::from_slice(&line)?;
            if value.get("ok").is_some() || value.get("error").is_some() {
                return outcome(serde_json::from_value(value)?);
            }
            told(&value);
        }
    }

    /// Asks for the status.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn status(self) -> io::Result<Status> {
        self.status_until(Instant::now() + ANSWER_PATIENCE)
    }

    /// Asks for the status, and waits for all of it until then.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub(crate) fn status_until(self, until: Instant) -> io::Result<Status> {
        Ok(serde_json::from_value(self.ask_until(Op::Status, until)?)?)
    }
}

fn outcome(reply: Reply) -> io::Result<Value> {
    match (reply.ok, reply.error) {
        (Some(value), None) => Ok(value),
        (_, Some(refusal)) => Err(io::Error::other(format!("the mount refused: {}", refusal.message))),
        (None, None) => Err(io::Error::other("the mount gave an empty answer")),
    }
}

/// The time until then. None left is an error: the system takes a time-out of zero for none.
fn left(until: Instant) -> io::Result<Duration> {
    match until.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(left),
        _ => Err(io::ErrorKind::TimedOut.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(path: &Path, bytes: &[u8]) -> Value {
        let mut stream = UnixStream::connect(path).expect("connected");
        stream.write_all(bytes).expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("answer");
        serde_json::from_str(&text).expect("one line of JSON")
    }

    #[test]
    fn the_protocol() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("s");
        std::fs::write(&path, "left over").expect("written");
        serve(&path, |asked| Ok(serde_json::json!({ "asked": asked.op }))).expect("served");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let value = Client::connect(&path).expect("connected").ask(Op::Seal).expect("answer");
        assert_eq!(value, serde_json::json!({ "asked": "seal" }));
        assert_eq!(Client::connect(&path).expect("connected").pid(), Some(rustix::process::getpid()));
        let code = |bytes: &[u8]| talk(&path, bytes)["error"]["code"].as_str().map(str::to_owned);
        assert_eq!(code(b"{\"v\":1,\"op\":\"fly\"}\n").as_deref(), Some("unknown-op"));
        assert_eq!(code(b"{\"v\":2,\"op\":\"status\"}\n").as_deref(), Some("unknown-version"));
        assert_eq!(code(b"hello\n").as_deref(), Some("bad-request"));
        assert_eq!(code(&vec![b'x'; MAX_LINE as usize]).as_deref(), Some("bad-request"), "a line without end");
    }

    #[test]
    fn whoever_does_not_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("s");
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let fd = fd.expect("socket");
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path).expect("address")).expect("bound");
        rustix::net::listen(&fd, 0).expect("listens");
        let begun = Instant::now();
        // Nobody accepts: the first are taken into the backlog, then it is full.
        let mut held = Vec::new();
        let error = loop {
            match Client::connect(&path) {
                Ok(client) => held.push(client),
                Err(error) => break error,
            }
            assert!(held.len() < 10, "the backlog has no end");
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let first = held.pop().expect("one was taken");
        assert!(first.status_until(Instant::now() + Duration::from_millis(100)).is_err(), "nobody answers");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn an_answer_that_trickles_in_is_not_waited_for() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("bound");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accepted");
            while stream.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let begun = Instant::now();
        let client = Client::connect(&path).expect("connected");
        client.status_until(begun + Duration::from_millis(300)).expect_err("no answer");
        assert!((Duration::from_millis(250)..Duration::from_secs(5)).contains(&begun.elapsed()), "{begun:?}");
    }

    #[test]
    fn only_a_socket_of_the_directorys_owner_is_connected_to() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("s");
        serve(&path, |_| Ok(Value::Null)).expect("served");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("link");
        assert!(Client::connect(&link).is_err(), "a symlink");
        std::fs::write(dir.path().join("file"), "").expect("written");
        assert!(Client::connect(&dir.path().join("file")).is_err(), "a file");
        assert!(Client::connect(&path).is_ok());
        if places::euid() == 0 {
            // Another user's directory with a socket of root's behind it: not what that user's mount would be.
            std::os::unix::fs::chown(dir.path(), Some(12345), None).expect("chown");
            assert!(Client::connect(&path).is_err(), "not the directory's owner");
        }
    }
}
