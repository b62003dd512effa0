//! Mounting, the worker threads, unmounting.
//!
//! We mount ourselves (mount(2) as root, fusermount3 otherwise) and hand the descriptor to fuser: its own unmount as root
//! loses the mount (fuser issue 686), and INC_EPOCH needs the descriptor.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::mount::{MountFlags, UnmountFlags};
use serde::Serialize;

use super::adapter::Adapter;
use super::core::Filesystem;
use super::refuser::Refuser;
use super::seal::SealReport;
use crate::keyring::SealReason;
use crate::sys::shared_list::SharedList;
use crate::volume::storage::Errno;
use crate::volume::{Volume, VolumeError, check};

/// The type in /proc/mounts.
pub const FS_TYPE: &str = "fuse.lethefs";

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Users other than the mounting one may come in.
    pub allow_other: bool,
    /// The kernel checks permissions. Always on: without OPEN requests nobody else could.
    pub default_permissions: bool,
    /// Nothing may be written.
    pub read_only: bool,
    /// Honour setuid bits.
    pub suid: bool,
    /// Honour device nodes.
    pub dev: bool,
    /// Allow execution.
    pub exec: bool,
    /// Do not update access times.
    pub noatime: bool,
    /// POSIX ACLs.
    pub acl: bool,
    /// The source in /proc/mounts; the backing directory by default.
    pub fsname: Option<String>,
    /// Worker threads.
    pub threads: Option<usize>,
    /// For measuring only: no intent log, so that a crash can cost blocks.
    pub no_log: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            allow_other: false,
            default_permissions: true,
            read_only: false,
            suid: false,
            dev: false,
            exec: true,
            noatime: false,
            acl: false,
            fsname: None,
            threads: None,
            no_log: false,
        }
    }
}

/// The mount as it is now.
#[derive(Clone, Debug, Serialize)]
pub struct MountStatus {
    /// Inodes the kernel knows.
    pub cached_inodes: usize,
    /// Open backing files, at most.
    pub open_files: usize,
    /// Requests answered.
    pub requests: u64,
    /// Plaintext bytes handed out.
    pub bytes_read: u64,
    /// Plaintext bytes taken in.
    pub bytes_written: u64,
    /// Files whose header is not sealed yet.
    pub unsealed_files: usize,
    /// Damage met since mount.
    pub integrity_failures: u64,
    /// How key memory is kept: `memfd_secret` or `mlock`.
    pub key_memory: &'static str,
    /// Objects whose keys are cached.
    pub cached_keys: usize,
    /// Bytes that programs had written and seals refused.
    pub dropped_bytes: u64,
    /// Worker threads that ended with an error.
    pub lost_workers: u64,
    /// Why the keys were wiped, if they were.
    pub sealed: Option<SealReason>,
}

/// A live mount.
pub struct Mounted {
    handle: MountHandle,
    session: JoinHandle<io::Result<()>>,
    sealer: JoinHandle<()>,
}

/// What other threads may do with a mount.
#[derive(Clone)]
pub struct MountHandle {
    pub(super) fs: Arc<Filesystem>,
    pub(super) device: Arc<OwnedFd>,
    pub(super) sealing: Arc<Mutex<Option<SealReport>>>,
    pub(super) refuser: Arc<Mutex<Option<Refuser>>>,
    pub(super) mountpoint: Arc<PathBuf>,
    pub(super) workers: usize,
}

impl Mounted {
    /// Mounts, starts the workers, and returns once the filesystem answers. `list` is kept up to date with what the kernel may
    /// cache; `made` gets the connection's descriptor as soon as there is one, before anything can be cached.
    ///
    /// # Errors
    /// The system's; nothing stays mounted then.
    pub fn start(
        mut volume: Volume,
        mountpoint: &Path,
        options: &MountOptions,
        list: Option<Arc<SharedList>>,
        made: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<Self> {
        if !volume.read_only() && !options.no_log {
            volume.begin_log().map_err(|error| io::Error::other(format!("no intent log: {error}")))?;
        }
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 20);
        let fs = Arc::new(Filesystem::listing(volume, (files / 4).clamp(64, 4096) as usize, options.acl, list));
        fs.clean(super::inode::ROOT).map_err(|failed| io::Error::from_raw_os_error(failed.errno()))?;
        let fuse = mount(fs.volume.path(), mountpoint, options).inspect_err(|_| {
            // Nothing was mounted: nothing stays.
            let _ = fs.end_log();
        })?;
        let device = Arc::new(fuse.try_clone()?);
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        let workers = options.threads.unwrap_or(processors.max(4));
        let mountpoint_of = Arc::new(mountpoint.to_owned());
        let handle = MountHandle {
            fs: fs.clone(),
            device,
            sealing: Arc::default(),
            refuser: Arc::default(),
            mountpoint: mountpoint_of,
            workers,
        };
        made(fuse.as_fd()).and_then(|()| Self::serve(fs, fuse, &handle)).inspect_err(|_| {
            let _ = unmount_path(mountpoint, true);
        })
    }

    fn serve(fs: Arc<Filesystem>, fuse: OwnedFd, handle: &MountHandle) -> io::Result<Self> {
        let mut config = fuser::Config::default();
        config.n_threads = Some(handle.workers);
        // The kernel keeps others out (allow_other); fuser need not ask again.
        let session = fuser::Session::from_fd(
            Adapter::new(fs.clone(), handle.device.clone()),
            fuse,
            fuser::SessionACL::All,
            config,
        )?;
        let session = std::thread::Builder::new().name("lethefs-session".into()).spawn(move || session.run())?;
        let sealing = fs.clone();
        let sealer = std::thread::Builder::new().name("lethefs-sealer".into()).spawn(move || sealing.run_sealer())?;
        // The proof that it answers: a request that comes to us.
        rustix::fs::statvfs(handle.mountpoint.as_path())?;
        tune_readahead(handle.mountpoint.as_path());
        Ok(Self { handle: handle.clone(), session, sealer })
    }

    /// For other threads.
    pub fn handle(&self) -> MountHandle {
        self.handle.clone()
    }

    /// Blocks until the kernel has ended the session, then flushes and seals every file and wipes the keys.
    ///
    /// # Errors
    /// The session's end by anything but an unmount, or files that could not be sealed (they are unsealed, not lost).
    pub fn wait(self) -> io::Result<()> {
        let ended = self.session.join().unwrap_or_else(|_| Err(io::Error::other("a worker panicked")));
        let fs = &self.handle.fs;
        fs.stop_sealer();
        let _ = self.sealer.join();
        let left = if fs.volume.keys().sealed().is_none() { fs.seal_all() } else { 0 };
        fs.volume.keys().wipe(SealReason::Unmounted);
        let emptied = fs.end_log();
        ended?;
        emptied.map_err(|failed| {
            let cause = io::Error::from_raw_os_error(failed.errno());
            io::Error::other(format!("the intent log could not be emptied and is kept for the next mount: {cause}"))
        })?;
        if left > 0 {
            return Err(io::Error::other(format!("{left} files could not be flushed and sealed: see the log")));
        }
        Ok(())
    }
}

impl MountHandle {
    /// Writes dirty data out, then unmounts; `lazy` detaches a mount in use and lets it end with its last user.
    ///
    /// # Errors
    /// `EBUSY`, or the system's.
    pub fn unmount(&self, lazy: bool) -> io::Result<()> {
        if let Ok(root) = self.open_root() {
            let _ = rustix::fs::syncfs(&root);
        }
        unmount_path(&self.mountpoint, lazy)
    }

    /// The root directory of the mount. It is in use as long as somebody holds this.
    pub(super) fn open_root(&self) -> io::Result<OwnedFd> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(self.mountpoint.as_path(), flags, Mode::empty())?)
    }

    /// Checks the volume while it is in use, changing nothing. Takes half of the processors.
    ///
    /// # Errors
    /// As [`check`](fn@check::check).
    pub fn check(
        &self,
        progress: &check::Progress,
        found: &(dyn Fn(check::Finding) + Sync),
    ) -> Result<(), VolumeError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).div_ceil(2);
        let request = check::Request { live: Some(&*self.fs), threads, progress };
        check::check(&self.fs.volume, &request, found)
    }

    /// The mount as it is now.
    pub fn status(&self) -> MountStatus {
        let fs = &self.fs;
        let (key_memory, cached_keys) = fs.volume.keys().memory();
        MountStatus {
            cached_inodes: fs.inodes.len(),
            open_files: fs.fds.len(),
            requests: fs.counters.requests.load(Ordering::Relaxed),
            bytes_read: fs.counters.read.load(Ordering::Relaxed),
            bytes_written: fs.counters.written.load(Ordering::Relaxed),
            unsealed_files: fs.unsealed(),
            integrity_failures: fs.volume.integrity_failures(),
            key_memory,
            cached_keys,
            dropped_bytes: fs.gate.dropped(),
            lost_workers: fs.counters.lost_workers.load(Ordering::Relaxed),
            sealed: fs.volume.keys().sealed(),
        }
    }
}

/// Unmounts a path: umount2(2) as root, `fusermount3 -u` otherwise.
///
/// # Errors
/// `EBUSY`, or the system's; for fusermount3 its own words.
pub fn unmount_path(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        return Ok(rustix::mount::unmount(mountpoint, flags | UnmountFlags::NOFOLLOW)?);
    }
    let mut command = Command::new("fusermount3");
    command.args(if lazy { ["-u", "-z"].as_slice() } else { &["-u"] }).arg("--").arg(mountpoint);
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.lines().next().unwrap_or("fusermount3 failed").trim();
    match output.status.success() {
        true => Ok(()),
        // umount2(2)'s EBUSY in strerror(3)'s words.
        false if words.ends_with("Device or resource busy") => Err(Errno::BUSY.into()),
        false => Err(io::Error::other(words.to_owned())),
    }
}

fn mount(backing: &Path, mountpoint: &Path, options: &MountOptions) -> io::Result<OwnedFd> {
    let source = options.fsname.clone().unwrap_or_else(|| backing.display().to_string());
    if rustix::process::geteuid().is_root() {
        mount_as_root(&source, mountpoint, options)
    } else {
        mount_by_fusermount(&source, mountpoint, options)
    }
}

fn mount_as_root(source: &str, mountpoint: &Path, options: &MountOptions) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd as _;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    let fuse = rustix::fs::open("/dev/fuse", flags, rustix::fs::Mode::empty()).map_err(|errno| {
        io::Error::new(io::Error::from(errno).kind(), "cannot open /dev/fuse: is the fuse module loaded?")
    })?;
    let mut mount_flags = MountFlags::empty();
    mount_flags.set(MountFlags::NOSUID, !options.suid);
    mount_flags.set(MountFlags::NODEV, !options.dev);
    mount_flags.set(MountFlags::NOEXEC, !options.exec);
    mount_flags.set(MountFlags::RDONLY, options.read_only);
    mount_flags.set(MountFlags::NOATIME, options.noatime);
    // The kernel wants the type of the root and who mounts (Documentation/filesystems/fuse.rst).
    let mut data = format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions", fuse.as_raw_fd());
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let data = std::ffi::CString::new(data)?;
    rustix::mount::mount(source, mountpoint, FS_TYPE, mount_flags, Some(data.as_c_str()))?;
    Ok(fuse)
}

/// fusermount3 mounts and sends the descriptor over the socket that `_FUSE_COMMFD` names (libfuse, util/fusermount.c).
fn mount_by_fusermount(source: &str, mountpoint: &Path, options: &MountOptions) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType};
    use std::os::fd::AsRawFd as _;
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // dup leaves FD_CLOEXEC off: the child shall have this one.
    let theirs = rustix::io::dup(&theirs)?;
    let escaped = source.replace('\\', "\\\\").replace(',', "\\,");
    let mut list = format!("fsname={escaped},subtype=lethefs,default_permissions");
    for (on, option) in [
        (options.allow_other, ",allow_other"),
        (options.read_only, ",ro"),
        (!options.exec, ",noexec"),
        (options.noatime, ",noatime"),
        (options.suid, ",suid"),
        (options.dev, ",dev"),
    ] {
        if on {
            list.push_str(option);
        }
    }
    let output = Command::new("fusermount3")
        .args(["-o", &list, "--"])
        .arg(mountpoint)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| io::Error::new(error.kind(), "cannot run fusermount3: install the package fuse3"))?;
    drop(theirs);
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(words.lines().next().unwrap_or("fusermount3 failed").trim().to_owned()));
    }
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut buffers = [io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(&ours, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .ok_or_else(|| io::Error::other("fusermount3 sent no descriptor"))
}

/// The kernel's caution with FUSE mounts costs half the speed of large reads and writes; only root may lift it. Best effort.
fn tune_readahead(mountpoint: &Path) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let Ok(stat) = rustix::fs::stat(mountpoint) else { return };
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    for (knob, value) in [("read_ahead_kb", "1024"), ("strict_limit", "0"), ("max_ratio", "100")] {
        let _ = std::fs::write(format!("/sys/class/bdi/{major}:{minor}/{knob}"), value);
    }
}
