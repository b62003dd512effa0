//! The command line, declared. What the arguments mean is decided in [`super::options`] and [`super`].

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// An encrypting filesystem whose volumes die with one key.
#[derive(Debug, Parser)]
#[command(name = "lethefs", version, disable_help_subcommand = false, arg_required_else_help = true)]
pub struct Cli {
    /// Say more on stderr: once what happens, twice everything. LETHEFS_LOG sets it more finely
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a volume in an empty directory
    Init(Init),
    /// Mount a volume
    Mount(Mount),
    /// Unmount a volume; returns when everything is on disk
    Umount(Umount),
    /// Show a volume, a mount, or all live mounts
    Status(Status),
    /// Check a volume, and repair what can be repaired
    Fsck(Fsck),
    /// Destroy a volume's key, and with it the contents of every copy
    Erase(Erase),
    /// Suspend a volume's keys, reversibly, and seal its mounts on this host
    Revoke(Revoke),
    /// Bring suspended keys back, and have mounts on this host go on
    Restore(Revoke),
    /// List, check, add and remove the keys that open a volume; save and put back its header
    Keys {
        /// What to do
        #[command(subcommand)]
        command: Keys,
    },
    /// Check or show the audit log of a volume
    Audit {
        /// What to do
        #[command(subcommand)]
        command: Audit,
    },
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
}

/// `init`
#[derive(Debug, Args)]
pub struct Init {
    /// Backing directory: empty, or not there yet
    pub backing: PathBuf,
    /// Key that the volume lives and dies with: hashivault://KEY?engine=transit, pkcs11:token=T;object=KEY,
    /// awskms:///ARN or file:///PATH
    #[arg(long, value_name = "URI")]
    pub kms: Option<String>,
    /// Name for people, not encrypted
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `mount`
#[derive(Debug, Args)]
pub struct Mount {
    /// Backing directory
    pub backing: PathBuf,
    /// Where to mount
    pub mountpoint: PathBuf,
    /// Stay in the foreground
    #[arg(short, long)]
    pub foreground: bool,
    /// Vouch for a volume that this host does not know yet
    #[arg(long)]
    pub trust: bool,
    /// The key, where this host does not know it (a key file that moved)
    #[arg(long, value_name = "URI")]
    pub kms: Option<String>,
    /// Where a mount in the background logs to
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<OsString>,
    /// Mount options, separated by commas; each is also a flag of its own
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Let other users in
    #[arg(long)]
    pub allow_other: bool,
    /// Let the kernel check permissions
    #[arg(long)]
    pub default_permissions: bool,
    /// Read-only
    #[arg(long, overrides_with = "rw")]
    pub ro: bool,
    /// Read-write (default)
    #[arg(long)]
    pub rw: bool,
    /// Honour set-user-id bits
    #[arg(long, overrides_with = "nosuid")]
    pub suid: bool,
    /// Ignore set-user-id bits (default)
    #[arg(long)]
    pub nosuid: bool,
    /// Honour device files
    #[arg(long, overrides_with = "nodev")]
    pub dev: bool,
    /// Ignore device files (default)
    #[arg(long)]
    pub nodev: bool,
    /// Allow programs to run (default)
    #[arg(long, overrides_with = "noexec")]
    pub exec: bool,
    /// Do not allow programs to run
    #[arg(long)]
    pub noexec: bool,
    /// Do not record access times
    #[arg(long, overrides_with_all = ["atime", "relatime"])]
    pub noatime: bool,
    /// Record access times as the kernel does by default
    #[arg(long)]
    pub atime: bool,
    /// The same
    #[arg(long)]
    pub relatime: bool,
    /// Name shown as the source of the mount
    #[arg(long, value_name = "NAME")]
    pub fsname: Option<String>,
    /// POSIX access control lists
    #[arg(long)]
    pub acl: bool,
    /// Time from one proof that the key service still gives the key to the next [default: 5s]
    #[arg(long, value_name = "TIME")]
    pub renew_interval: Option<String>,
    /// How long to work on while the key service does not answer; 0: not at all [default: 10m]
    #[arg(long, value_name = "TIME")]
    pub grace: Option<String>,
    /// Worker threads
    #[arg(long, value_name = "N")]
    pub threads: Option<String>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `umount`
#[derive(Debug, Args)]
pub struct Umount {
    /// Mountpoint
    pub mountpoint: PathBuf,
    /// Detach at once even if in use; does not wait for its users
    #[arg(long)]
    pub lazy: bool,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `status`
#[derive(Debug, Args)]
pub struct Status {
    /// Backing directory or mountpoint; without it, all live mounts
    pub path: Option<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `erase`
#[derive(Debug, Args)]
pub struct Erase {
    /// Backing directory
    #[arg(required_unless_present = "volume_id", conflicts_with = "volume_id")]
    pub backing: Option<PathBuf>,
    /// Show what would be lost and what would remain possible; change nothing
    #[arg(long, conflicts_with_all = ["confirm_volume", "confirm_key", "also_erases"])]
    pub plan: bool,
    /// Confirm: the volume's id
    #[arg(long, value_name = "ID")]
    pub confirm_volume: Option<String>,
    /// Confirm: the key's name; once for each key
    #[arg(long, value_name = "NAME")]
    pub confirm_key: Vec<String>,
    /// Confirm: another volume that dies with the same key; once for each
    #[arg(long, value_name = "ID")]
    pub also_erases: Vec<String>,
    /// Destroy the keys that can be destroyed, although others cannot and still open the volume. Without it, all or none
    #[arg(long)]
    pub partial: bool,
    /// The key, for a volume that this host has no pin of; may be repeated
    #[arg(long, value_name = "URI")]
    pub key: Vec<String>,
    /// Erase this volume although its backing directory is out of reach (a stolen disk)
    #[arg(long, value_name = "ID")]
    pub volume_id: Option<String>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `revoke`, `restore`
#[derive(Debug, Args)]
pub struct Revoke {
    /// Backing directory or mountpoint
    #[arg(required_unless_present = "volume_id", conflicts_with = "volume_id")]
    pub path: Option<PathBuf>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// The key, for a volume that this host has no pin of; may be repeated
    #[arg(long, value_name = "URI")]
    pub key: Vec<String>,
    /// A volume whose backing directory is out of reach (a stolen disk)
    #[arg(long, value_name = "ID")]
    pub volume_id: Option<String>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fsck`
#[derive(Debug, Args)]
pub struct Fsck {
    /// Backing directory, or mountpoint: a mounted volume is checked as it is
    pub path: PathBuf,
    /// Repair what can be repaired. The volume must not be mounted
    #[arg(long)]
    pub repair: bool,
    /// Show plaintext names as well
    #[arg(long)]
    pub names: bool,
    /// Vouch for a volume that this host does not know yet, for this one time
    #[arg(long)]
    pub trust: bool,
    /// The key, where this host does not know it (a key file that moved)
    #[arg(long, value_name = "URI")]
    pub kms: Option<String>,
    /// No progress bar
    #[arg(short, long)]
    pub quiet: bool,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// `keys`
#[derive(Debug, Subcommand)]
pub enum Keys {
    /// List the keys that open a volume. Asks no key service
    List {
        /// Backing directory or mountpoint
        path: PathBuf,
        /// Report as JSON
        #[arg(long)]
        json: bool,
    },
    /// Let a further key open a volume
    AddSlot {
        /// Backing directory or mountpoint
        path: PathBuf,
        /// The key; or `recovery:` for shares on paper
        uri: String,
        /// recovery: how many shares to make
        #[arg(long, value_name = "N", default_value_t = 5)]
        shares: u8,
        /// recovery: how many of them are needed
        #[arg(long, value_name = "K", default_value_t = 3)]
        threshold: u8,
        /// How the volume is opened
        #[command(flatten)]
        open: Open,
    },
    /// Take a key's slot out. Another one must open the volume
    RemoveSlot {
        /// Backing directory or mountpoint
        path: PathBuf,
        /// Number of the slot, as `keys list` shows it
        slot: u32,
        /// How the volume is opened
        #[command(flatten)]
        open: Open,
    },
    /// Save what a volume needs besides its files
    BackupHeader {
        /// Backing directory or mountpoint
        path: PathBuf,
        /// Where to; must not be there yet
        file: PathBuf,
        /// Report as JSON
        #[arg(long)]
        json: bool,
    },
    /// Put a saved header back, if it is genuine and not older
    RestoreHeader {
        /// Backing directory; must not be mounted
        path: PathBuf,
        /// The saved header
        file: PathBuf,
        /// Also over a newer one that is in place. Never below what this host's pin has seen
        #[arg(long)]
        older: bool,
        /// How the volume is opened
        #[command(flatten)]
        open: Open,
    },
    /// Whether a key can be reached, used and destroyed from here, and why not
    Check {
        /// The key
        uri: String,
        /// Report as JSON
        #[arg(long)]
        json: bool,
    },
}

/// `audit`
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Find edits, losses and reordering. What was cut off at the end shows only to --expect-head or --at-least
    Verify {
        /// A log file, or a backing directory or mountpoint
        path: PathBuf,
        /// The head that an earlier check printed: it must still be in the log
        #[arg(long, value_name = "HASH")]
        expect_head: Option<String>,
        /// There must be at least so many records
        #[arg(long, value_name = "N")]
        at_least: Option<u64>,
        /// Earlier files were put away, and ended with this head
        #[arg(long, value_name = "HASH")]
        after: Option<String>,
        /// Report as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the records for people (they are JSON already)
    Show {
        /// A log file, or a backing directory or mountpoint
        path: PathBuf,
    },
}

/// How `keys` opens a volume
#[derive(Debug, Args)]
pub struct Open {
    /// Vouch for a volume that this host does not know yet
    #[arg(long)]
    pub trust: bool,
    /// The key to ask, where it is not the first that this host knows
    #[arg(long, value_name = "URI")]
    pub kms: Option<String>,
    /// Open with recovery shares from these files (one a line); `-` asks at the terminal
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub recovery_shares: Vec<PathBuf>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// What mount(8) passes to `/sbin/mount.fuse.lethefs` and `/sbin/mount.lethefs`.
#[derive(Debug, Parser)]
#[command(name = "mount.fuse.lethefs", version)]
pub struct Helper {
    /// Backing directory
    pub backing: PathBuf,
    /// Where to mount
    pub mountpoint: PathBuf,
    /// Mount options
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Ignore options that are not known
    #[arg(short = 's')]
    pub sloppy: bool,
    /// Fake: check the arguments, mount nothing
    #[arg(short = 'f')]
    pub fake: bool,
    /// Accepted and ignored: there is no mtab
    #[arg(short = 'n')]
    pub no_mtab: bool,
    /// Say more
    #[arg(short = 'v', action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Accepted and ignored: the type
    #[arg(short = 't', value_name = "TYPE")]
    pub fs_type: Option<String>,
}
