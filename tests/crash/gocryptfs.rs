//! The same done to another filesystem of this kind, to know what the figures mean. Nothing in the ordinary tests runs it.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::support::volume::{TestVolume, mounts_below};

pub(crate) struct Gocryptfs<'a> {
    v: &'a TestVolume,
    daemon: Option<Child>,
    round: u32,
}

impl<'a> Gocryptfs<'a> {
    pub(crate) fn new(v: &'a TestVolume) -> Self {
        fs::write(v.path("password"), "password\n").unwrap();
        let _ = fs::create_dir(v.backing());
        let new = Self { v, daemon: None, round: 0 };
        new.init();
        new
    }

    fn cipher(&self) -> PathBuf {
        self.v.backing().join(format!("round{}", self.round))
    }

    fn init(&self) {
        fs::create_dir(self.cipher()).unwrap();
        let mut init = self.v.command("gocryptfs");
        // Cheap: the password is not what is tried here.
        init.args(["-init", "-q", "-scryptn", "10", "-passfile"]).arg(self.v.path("password")).arg(self.cipher());
        assert!(init.status().expect("gocryptfs (Debian: apt-get install gocryptfs)").success());
        rustix::fs::syncfs(fs::File::open(self.cipher()).unwrap()).unwrap();
    }

    pub(crate) fn mount(&mut self) {
        let mut mount = self.v.command("gocryptfs");
        mount.args(["-fg", "-q", "-nosyslog", "-passfile"]).arg(self.v.path("password"));
        let log = fs::File::options().create(true).append(true).open(self.v.path("gocryptfs.log")).unwrap();
        mount.arg(self.cipher()).arg(self.v.mnt()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child = mount.spawn().unwrap();
        while mounts_below(&self.v.mnt()).is_empty() {
            assert!(child.try_wait().unwrap().is_none(), "gocryptfs ended: {:?}", self.v.path("gocryptfs.log"));
            std::thread::yield_now();
        }
        self.daemon = Some(child);
    }

    pub(crate) fn crash(&mut self) {
        let mut child = self.daemon.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Command::new("umount").arg("-l").arg(self.v.mnt()).status().unwrap().success());
    }

    /// A new volume for the next round.
    pub(crate) fn start_over(&mut self) {
        assert!(Command::new("umount").arg("-l").arg(self.v.mnt()).status().unwrap().success());
        self.daemon.take().unwrap().wait().unwrap();
        fs::remove_dir_all(self.cipher()).unwrap();
        self.round += 1;
        self.init();
    }
}

impl Drop for Gocryptfs<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
