//! A loop device with a filesystem of its own for the backing directory.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::volume::TestVolume;

pub(crate) struct Disk {
    kind: String,
    image: PathBuf,
    at: PathBuf,
    /// Where the backing directory is bound to.
    bound: PathBuf,
    options: String,
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: run scripts/test"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Disk {
    /// A directory of it is the volume's backing directory.
    pub(crate) fn new(v: &TestVolume, kind: &str) -> Self {
        Self::with(v, kind, 512 << 20, "")
    }

    /// So many bytes, with these mount options.
    pub(crate) fn with(v: &TestVolume, kind: &str, size: u64, options: &str) -> Self {
        let disk = Self {
            kind: kind.to_owned(),
            image: v.path("disk.img"),
            at: v.path("disk"),
            bound: v.backing(),
            options: if options.is_empty() { "loop".into() } else { format!("loop,{options}") },
        };
        for dir in [&disk.at, &disk.bound] {
            fs::create_dir(dir).unwrap();
        }
        File::create(&disk.image).unwrap().set_len(size).unwrap();
        let mut make = Command::new(format!("/sbin/mkfs.{kind}"));
        make.arg("-q");
        if kind == "ext4" {
            // Full for root is what is full for everybody.
            make.args(["-m", "0"]);
        }
        run(make.arg(&disk.image));
        disk.mount();
        disk
    }

    pub(crate) fn kind(&self) -> &str {
        &self.kind
    }

    pub(crate) fn mount(&self) {
        // The kernel frees the loop device with the mount.
        run(Command::new("mount").args(["-t", &self.kind, "-o", &self.options]).arg(&self.image).arg(&self.at));
        let backing = self.at.join("backing");
        if !backing.exists() {
            if self.kind == "btrfs" {
                // What a quota is for.
                run(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(&backing));
            } else {
                fs::create_dir(&backing).unwrap();
            }
        }
        run(Command::new("mount").arg("--bind").arg(&backing).arg(&self.bound));
    }

    pub(crate) fn unmount(&self) {
        for at in [&self.bound, &self.at] {
            run(Command::new("umount").arg(at));
        }
    }

    /// Whether mount(8) could.
    pub(crate) fn remount(&self, options: &str) -> Result<(), String> {
        let output = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.at).output().unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    /// EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN are the same number (fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h); 2 is "no log
    /// flush": what is not on the medium by now never will be.
    pub(crate) fn shut_down(&self) {
        let script = "import fcntl, os, struct, sys\n\
            fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        run(Command::new("python3").args(["-c", script]).arg(&self.at));
    }

    /// ext4's own way to find itself damaged (fs/ext4/sysfs.c).
    pub(crate) fn find_an_error(&self) {
        fs::write(format!("/sys/fs/ext4/{}/trigger_fs_error", self.device()), "found by a test").unwrap();
    }

    /// As in /sys/block.
    pub(crate) fn device(&self) -> String {
        let device = fs::metadata(&self.at).unwrap().dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).unwrap();
        link.file_name().unwrap().to_str().unwrap().to_owned()
    }

    /// Flushes that the device was asked for so far (Documentation/block/stat.rst).
    pub(crate) fn flushes(&self) -> u64 {
        let stat = fs::read_to_string(format!("/sys/block/{}/stat", self.device())).unwrap();
        stat.split_whitespace().nth(15).unwrap().parse().unwrap()
    }

    /// After the shutdown, with nobody left in it.
    pub(crate) fn power_on(&self) {
        self.unmount();
        self.mount();
    }

    /// Nothing is free any more but so many bytes.
    pub(crate) fn fill(&self, leave: u64) {
        let file = File::options().create(true).append(true).open(self.at.join("filler")).unwrap();
        let free = || {
            let stat = rustix::fs::statvfs(&self.at).unwrap();
            stat.f_bavail * stat.f_frsize
        };
        let mut len = file.metadata().unwrap().len();
        let mut step = free().saturating_sub(leave);
        // A filesystem keeps something back for its own tables: by halves, until it has nothing to give.
        while step >= 4096 {
            let wanted = step.min(free().saturating_sub(leave)) / 4096 * 4096;
            if wanted == 0 {
                break;
            }
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), len, wanted) {
                Ok(()) => len += wanted,
                Err(rustix::io::Errno::NOSPC) => step /= 2,
                Err(errno) => panic!("fallocate: {errno}"),
            }
        }
        rustix::fs::syncfs(&file).unwrap();
    }

    /// What [`fill`](Self::fill) took.
    pub(crate) fn free(&self) {
        fs::remove_file(self.at.join("filler")).unwrap();
        // Some free blocks only with the next commit.
        rustix::fs::syncfs(File::open(&self.at).unwrap()).unwrap();
    }

    /// From now on the backing directory may hold so much and no more (btrfs; none: as much as there is).
    pub(crate) fn quota(&self, bytes: Option<u64>) {
        let limit = bytes.map_or("none".into(), |bytes| bytes.to_string());
        // By its number: by its path the change would count against the quota itself.
        let output = Command::new("btrfs").args(["inspect-internal", "rootid"]).arg(self.at.join("backing")).output();
        let group = format!("0/{}", String::from_utf8(output.unwrap().stdout).unwrap().trim());
        run(Command::new("btrfs").args(["-q", "qgroup", "limit", &limit, &group]).arg(&self.at));
    }

    /// Quotas are counted from now on.
    pub(crate) fn count_quota(&self) {
        run(Command::new("btrfs").args(["-q", "quota", "enable"]).arg(&self.at));
    }

    /// What the backing directory holds by that count.
    pub(crate) fn quota_used(&self) -> u64 {
        rustix::fs::syncfs(File::open(&self.at).unwrap()).unwrap();
        let mut command = Command::new("btrfs");
        command.args(["qgroup", "show", "--raw", "-f"]).arg(self.at.join("backing"));
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|line| line.starts_with("0/")).unwrap_or_else(|| panic!("{text}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for at in [&self.bound, &self.at] {
            let _ = Command::new("umount").args(["-l", path(at)]).stderr(std::process::Stdio::null()).status();
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
