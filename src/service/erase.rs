//! `erase`: destroys a volume's keys at the key service, step by step, each step journalled.
//!
//! [`prepare`](plan::prepare) looks and changes nothing; [`Prepared::confirm`] compares what the person typed;
//! [`Confirmed::run`](run) acts. Every step can be repeated: after a crash the command is simply run again, and the journal
//! only carries over when things happened, and that a key file was there before it was destroyed.

mod plan;
mod ready;
mod run;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::Serialize;

use super::Error;
use super::backing::Contents;
use super::journal::{Journal, Place};
use crate::crypto::VolumeId;
use crate::kms::{Binding, KeyDescription, KeyIdentity, KeyUri, Wrapped};

pub use plan::prepare;
pub use run::{Outcome, Report};

/// What to erase.
#[derive(Clone, Debug)]
pub enum Victim {
    /// The volume in this backing directory.
    Backing(PathBuf),
    /// A volume whose backing directory is out of reach.
    OutOfReach(VolumeId),
}

/// A KMS key to destroy.
pub(super) struct Target {
    scope: u32,
    version: u32,
    slot: u32,
    pub(super) identity: KeyIdentity,
    pub(super) uri: KeyUri,
    probe: Option<(Binding, Wrapped)>,
}

/// What an erase would do.
#[derive(Debug, Serialize)]
pub struct Plan {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// Its label, if known.
    pub label: Option<String>,
    /// Its backing directory, if within reach.
    pub backing: Option<String>,
    /// Whether this host's pin vouches for the keys below. If not, they are what volume file and command line say.
    pub pinned: bool,
    /// The keys that would be destroyed.
    pub keys: Vec<PlannedKey>,
    /// Keys that the volume file names besides, unverified, for which there is no URI. They would be left.
    pub left: Vec<KeyIdentity>,
    /// Recovery keys: shares on paper that nobody here can reach.
    pub paper: Vec<KeyIdentity>,
    /// Other volumes that this host knows to die with these keys.
    pub shared_with: Vec<Shared>,
    /// What the volume holds, if within reach.
    pub contents: Option<Contents>,
    /// Where these volumes are mounted on this host.
    pub live_mounts: Vec<LiveMount>,
    /// What would remain possible afterwards.
    pub remains: Vec<String>,
    /// An erase that was begun before. Not authenticated.
    pub begun: Option<Journal>,
}

/// A key in a [`Plan`].
#[derive(Debug, Serialize)]
pub struct PlannedKey {
    /// What to type to confirm.
    pub name: String,
    /// Which key.
    pub identity: KeyIdentity,
    /// How this host reaches it.
    pub uri: KeyUri,
    /// What the key service says of it now.
    pub description: Option<KeyDescription>,
    /// Why it says nothing.
    pub problem: Option<String>,
    /// Whether these credentials may destroy it, found out without trying. Null: the key service does not tell.
    pub erasable: Option<bool>,
    /// What would keep it from being destroyed.
    pub obstacle: Option<String>,
}

/// A volume that shares a key.
#[derive(Debug, Serialize)]
pub struct Shared {
    /// The volume.
    pub volume_id: VolumeId,
    /// Its label.
    pub label: String,
}

/// A mount that would be sealed.
#[derive(Debug, Serialize)]
pub struct LiveMount {
    /// The volume; null if its daemon cannot be reached.
    pub volume_id: Option<VolumeId>,
    /// Where.
    pub mountpoint: String,
    /// Its daemon answers.
    pub reachable: bool,
}

/// An erase that has been looked at.
pub struct Prepared {
    /// What it would do.
    pub plan: Plan,
    pub(super) targets: Vec<Target>,
    backing: Option<OwnedFd>,
}

/// An erase that may act. Unless `partial` was asked for, an erase of several keys destroys none as long as it is known that another
/// would be left: what is lost must not be some keys, and with them some hosts' access, for nothing.
pub struct Confirmed {
    prepared: Prepared,
    place: Place,
    partial: bool,
}

/// What a person typed to confirm.
#[derive(Clone, Debug, Default)]
pub struct Confirmation {
    /// The volume's id.
    pub volume: String,
    /// The name of each key.
    pub keys: Vec<String>,
    /// Other volumes that may die with the keys.
    pub also: Vec<VolumeId>,
    /// Destroy what can be destroyed, although keys are left that open the volume.
    pub partial: bool,
}

impl Plan {
    /// Where mounts are of which nobody here can tell whether they are of these volumes: other users', mostly.
    pub fn foreign_mounts(&self) -> impl Iterator<Item = &str> {
        self.live_mounts.iter().filter(|mount| mount.volume_id.is_none()).map(|mount| mount.mountpoint.as_str())
    }

    /// A warning for each mount of these volumes that could not be sealed or asked. Mounts that may be of any volume are no reason to
    /// worry somebody; the plan lists them.
    pub(super) fn unreached<'a>(&'a self, done: &'a str) -> impl Iterator<Item = String> + 'a {
        let ours = self.live_mounts.iter().filter(|mount| !mount.reachable && mount.volume_id.is_some());
        ours.map(move |mount| format!("the mount at {} could not be reached and was not {done}", mount.mountpoint))
    }
}

impl Prepared {
    /// Names of the keys, each once.
    pub fn key_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.plan.keys.iter().map(|key| key.name.clone()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Compares a confirmation. Nothing has been changed up to here.
    ///
    /// # Errors
    /// [`Error::NotConfirmed`]; or no place for the journal.
    pub fn confirm(self, confirmation: &Confirmation) -> Result<Confirmed, Error> {
        let refuse = |why: String| Err(Error::NotConfirmed(format!("{why}; nothing was changed")));
        if confirmation.volume.trim() != self.plan.volume_id.to_string() {
            return refuse("the volume id typed is not this volume's".into());
        }
        let mut typed: Vec<String> = confirmation.keys.iter().map(|key| key.trim().to_owned()).collect();
        typed.sort();
        typed.dedup();
        if typed != self.key_names() {
            return refuse(format!(
                "the key names typed are not this volume's keys: {}",
                differ(&self.key_names(), &typed)
            ));
        }
        let unnamed: Vec<String> = self
            .plan
            .shared_with
            .iter()
            .filter(|shared| !confirmation.also.contains(&shared.volume_id))
            .map(|shared| shared.volume_id.to_string())
            .collect();
        if !unnamed.is_empty() {
            return refuse(format!(
                "other volumes die with the same key: {}; if they are to go too, add --also-erases for each",
                unnamed.join(", ")
            ));
        }
        let place = match &self.backing {
            Some(fd) => Place::Backing(fd.try_clone().map_err(Error::io("cannot duplicate a descriptor"))?),
            None => Place::on_host(self.plan.volume_id).map_err(Error::io("no place for the journal of the erase"))?,
        };
        Ok(Confirmed { prepared: self, place, partial: confirmation.partial })
    }
}

/// What was typed beside what had to be.
fn differ(wanted: &[String], typed: &[String]) -> String {
    let list = |of: &[String], without: &[String], what: &str| {
        let names: Vec<String> =
            of.iter().filter(|name| !without.contains(name)).map(|name| name.escape_debug().to_string()).collect();
        (!names.is_empty()).then(|| format!("{what} {}", names.join(", ")))
    };
    let parts = [list(wanted, typed, "not typed:"), list(typed, wanted, "no key of it:")];
    parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
}
