//! Going to the background, with a parent whose exit code tells the truth.
//!
//! [`split`] forks at the very beginning, before any thread or key exists. The child does all the work with the caller's
//! terminal still attached; what becomes of it travels through a pipe as one [`Told`]. Then the child lets go of the
//! terminal and stays. A child that dies without a word is reported, too.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Pid, WaitOptions};
use serde::{Deserialize, Serialize};

use super::{Error, places};
use crate::sys::process::{self, Fork};

/// What the child tells the parent: the exit code, and what the parent prints.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Exit code for the parent.
    pub exit: u8,
    /// Lines for stdout.
    pub out: String,
    /// Lines for stderr.
    pub err: String,
}

/// The side of the split.
pub enum Side {
    /// The caller's process.
    Parent(Waiting),
    /// The one that stays.
    Child(Reporter),
}

/// The parent's end.
pub struct Waiting {
    child: Pid,
    pipe: File,
}

/// The child's end.
pub struct Reporter(File);

/// Forks.
///
/// # Errors
/// The system's.
pub fn split() -> Result<Side, Error> {
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(Error::io("cannot make a pipe"))?;
    match process::fork_single_threaded().map_err(Error::io("cannot go to the background"))? {
        Fork::Parent(child) => Ok(Side::Parent(Waiting { child, pipe: read.into() })),
        Fork::Child => Ok(Side::Child(Reporter(write.into()))),
    }
}

impl Waiting {
    /// Waits until the child tells, or ends without telling.
    ///
    /// # Errors
    /// How the child ended, if it told nothing.
    pub fn wait(mut self) -> Result<Told, Error> {
        let mut text = String::new();
        // The child closes its end after one message, and keeps running.
        let _ = self.pipe.read_to_string(&mut text);
        if let Ok(told) = serde_json::from_str(&text) {
            return Ok(told);
        }
        let how = match rustix::process::waitpid(Some(self.child), WaitOptions::empty()) {
            Ok(Some((_, status))) => match (status.terminating_signal(), status.exit_status()) {
                (Some(signal), _) => format!("was ended by signal {signal}"),
                (None, Some(code)) => format!("ended with code {code}"),
                (None, None) => "stopped".into(),
            },
            _ => "is gone".into(),
        };
        Err(Error::Mount(format!("the mount's process {how} before it was ready: run it with -f -v to see more")))
    }
}

impl Reporter {
    /// Tells the parent. It ends; this process goes on.
    pub fn tell(mut self, told: &Told) {
        // A parent that is gone needs no answer.
        if let Ok(text) = serde_json::to_vec(told) {
            let _ = self.0.write_all(&text);
        }
    }
}

/// Lets go of terminal, session and working directory; what is logged from now on goes to `log`.
///
/// # Errors
/// The system's, above all for the log.
pub fn detach(log: &Path) -> Result<(), Error> {
    let log_fd = places::open_log(log).map_err(Error::io(format!("cannot open the log {}", log.display())))?;
    let null = File::options().read(true).write(true).open("/dev/null").map_err(Error::io("cannot open /dev/null"))?;
    detach_to(&OwnedFd::from(null), &log_fd).map_err(Error::io("cannot detach from the terminal"))
}

fn detach_to(null: &OwnedFd, log: &OwnedFd) -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::chdir("/")?;
    rustix::stdio::dup2_stdin(null)?;
    rustix::stdio::dup2_stdout(null)?;
    Ok(rustix::stdio::dup2_stderr(log)?)
}
