//! A loop device with a filesystem of its own for the backing directory.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::volume::TestVolume;

pub(crate) struct Disk {
    image: PathBuf,
    at: PathBuf,
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: run scripts/test"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Disk {
    /// Mounted at the volume's backing directory.
    pub(crate) fn new(v: &TestVolume, kind: &str) -> Self {
        let disk = Self { image: v.path("disk.img"), at: v.backing() };
        std::fs::create_dir(&disk.at).unwrap();
        std::fs::File::create(&disk.image).unwrap().set_len(512 << 20).unwrap();
        run(Command::new(format!("/sbin/mkfs.{kind}")).arg("-q").arg(&disk.image));
        disk.mount();
        // What mkfs leaves there would be in the way of init.
        let _ = std::fs::remove_dir(disk.at.join("lost+found"));
        disk
    }

    fn mount(&self) {
        // The kernel frees the loop device with the mount.
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.at));
    }

    /// EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN are the same number (fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h); 2 is "no log
    /// flush": what is not on the medium by now never will be.
    pub(crate) fn shut_down(&self) {
        let script = "import fcntl, os, struct, sys\n\
            fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        run(Command::new("python3").args(["-c", script]).arg(&self.at));
    }

    /// After the shutdown, with nobody left in it.
    pub(crate) fn power_on(&self) {
        run(Command::new("umount").arg(&self.at));
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", path(&self.at)]).status();
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
