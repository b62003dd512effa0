use std::io::Write as _;
use std::process::{Child, Command, Stdio};

use super::*;

/// A supervisor of a shell, and what a daemon and the system have of it.
fn over(script: &str) -> (Supervisor, Child, OwnedFd, OwnedFd) {
    let daemon = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let daemon = daemon.expect("sh runs");
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a pair");
    let (read, write) = rustix::pipe::pipe().expect("a pipe");
    let list = SharedList::new().expect("memory");
    let pid = Pid::from_child(&daemon);
    (Supervisor { socket: ours, list, daemon: pid, signals: read }, daemon, theirs, write)
}

#[test]
fn signals_are_passed_on_whatever_the_daemon_says() {
    for said in [&b"not a message"[..], b"{}", b""] {
        // Ends when it is signalled, and says first that it is ready to be.
        let (supervisor, mut daemon, socket, signals) =
            over("trap 'exit 7' USR1; trap 'exit 8' TERM; echo ready; while :; do read -r line || exit 9; done");
        let mut ready = [0; 6];
        io::Read::read_exact(daemon.stdout.as_mut().expect("a pipe"), &mut ready).expect("ready");
        if said.is_empty() {
            drop(socket);
        } else {
            rustix::net::send(&socket, said, SendFlags::NOSIGNAL).expect("sent");
        }
        let watching = std::thread::spawn(move || supervisor.wait());
        rustix::io::write(&signals, b"x").expect("signalled");
        // A shell hears of a signal when its read is over.
        let mut input = daemon.stdin.take().expect("a pipe");
        while !watching.is_finished() {
            let _ = input.write_all(b"\n");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(matches!(watching.join().expect("joined"), Ended::With(7 | 8)));
    }
}

#[test]
fn who_stands_still_is_not_killed_before_there_is_a_mount() {
    let (supervisor, daemon, _socket, _signals) = over("read -r line; exit 3");
    supervisor.list.set_due(Some(crate::sys::shared_list::Due::SinceBoot(Duration::from_secs(1))));
    drop(daemon.stdin);
    assert_eq!(supervisor.wait(), Ended::With(3));
}
