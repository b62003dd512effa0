//! What a person is asked at a terminal, typed at a real pseudo-terminal.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;

use crate::world::{World, gone};

/// A run of the program whose three streams are a terminal of its own.
struct Session {
    child: Child,
    terminal: std::fs::File,
    shown: String,
}

impl Session {
    fn start(world: &World, args: &[&str]) -> Self {
        let terminal = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        rustix::pty::grantpt(&terminal).unwrap();
        rustix::pty::unlockpt(&terminal).unwrap();
        let name = rustix::pty::ptsname(&terminal, Vec::new()).unwrap();
        let open = || -> OwnedFd {
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap()
        };
        let size = rustix::termios::Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&terminal, size).unwrap();
        let mut command = world.command(args);
        command.env("TERM", "xterm");
        command.stdin(Stdio::from(open())).stdout(Stdio::from(open())).stderr(Stdio::from(open()));
        let child = command.spawn().unwrap();
        // The child's ends are the only ones left: its end is the terminal's.
        drop(command);
        Self { child, terminal: terminal.into(), shown: String::new() }
    }

    /// Reads until the program has shown `part`; everything shown since the last call.
    #[track_caller]
    fn sees(&mut self, part: &str) -> String {
        while !self.shown.contains(part) {
            let mut buffer = [0; 4096];
            // EIO: the last process closed it.
            let n = self.terminal.read(&mut buffer).unwrap_or(0);
            assert_ne!(n, 0, "ended without saying {part:?}: {}", self.shown);
            self.shown.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        std::mem::take(&mut self.shown)
    }

    fn types(&mut self, line: &str) {
        self.terminal.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Everything up to the end, and the exit code.
    fn ends(mut self) -> (String, Option<i32>) {
        let mut rest = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = self.terminal.read(&mut buffer) {
            rest.extend_from_slice(&buffer[..n]);
        }
        (self.shown + &String::from_utf8_lossy(&rest), self.child.wait().unwrap().code())
    }
}

const VOLUME: &str = "Type the volume id";
const KEY: &str = "Type the key's name";

#[test]
fn an_erase_is_confirmed_by_typing_volume_and_key() {
    let world = World::new();
    let id = world.volume("vol", "key");
    let name = world.key_name("key");

    // Wrong words, and nobody there to type any: nothing happens.
    let wrong = "0".repeat(32);
    for words in [[wrong.as_str(), name.as_str()], [id.as_str(), wrong.as_str()], ["", ""], ["yes", "yes"]] {
        let before = world.snapshot();
        let mut session = Session::start(&world, &["erase", "vol"]);
        let plan = session.sees(VOLUME);
        assert!(plan.contains(&id) && plan.contains(&name), "{plan}");
        session.types(words[0]);
        session.sees(KEY);
        session.types(words[1]);
        let (said, code) = session.ends();
        assert_eq!(code, Some(19), "{said}");
        assert!(said.contains("nothing was changed"), "{said}");
        assert!(before == world.snapshot(), "{words:?} changed something on disk");
    }
    let before = world.snapshot();
    let mut session = Session::start(&world, &["erase", "vol"]);
    session.sees(VOLUME);
    // The end of input (Ctrl-D) at each question.
    session.terminal.write_all(b"\x04").unwrap();
    session.sees(KEY);
    session.terminal.write_all(b"\x04").unwrap();
    let (said, code) = session.ends();
    assert_eq!(code, Some(19), "{said}");
    assert!(before == world.snapshot());

    // A flag answers its question; the other one is still asked.
    let mut session = Session::start(&world, &["erase", "vol", "--confirm-volume", &id]);
    let plan = session.sees(KEY);
    assert!(!plan.contains(VOLUME), "{plan}");
    session.types("no");
    assert_eq!(session.ends().1, Some(19));
    assert!(before == world.snapshot());

    // The right ones.
    let mut session = Session::start(&world, &["erase", "vol"]);
    session.sees(VOLUME);
    session.types(&id);
    session.sees(KEY);
    session.types(&format!("  {name} "));
    let (said, code) = session.ends();
    assert_eq!(code, Some(0), "{said}");
    assert!(gone(&world.path("keys/key")), "{said}");
}

/// A check at a terminal shows how it goes on, and takes that away again; nobody else gets to see it.
#[test]
fn a_check_shows_a_bar_at_a_terminal_only() {
    let world = World::new();
    world.volume("vol", "key");
    let (said, code) = Session::start(&world, &["fsck", "vol"]).ends();
    assert_eq!(code, Some(0), "{said}");
    // Drawn at least at the beginning and at the end: percent of the work, objects and bytes.
    assert!(said.contains("checking: 0 objects, 0 B [") && said.contains("0%"), "{said:?}");
    assert!(said.contains("checking: 1 objects, 0 B [") && said.contains("100%"), "{said:?}");
    // And the line cleared (ECMA-48, EL) before the report, which is what a pipe gets.
    let piped = world.run(&["fsck", "vol"]);
    piped.is(0);
    let report = said.rsplit("\x1b[2K").next().unwrap().trim_start_matches('\r').replace("\r\n", "\n");
    assert_eq!(report, piped.out, "{said:?}");
    assert!(!piped.out.is_empty() && piped.err.is_empty(), "{}", piped.err);
    let (quiet, code) = Session::start(&world, &["fsck", "vol", "--quiet"]).ends();
    assert_eq!(code, Some(0), "{quiet}");
    assert!(!quiet.contains("checking") && !quiet.contains('\x1b'), "{quiet:?}");
}
