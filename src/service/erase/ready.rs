//! All keys or none: what is looked at before the first one is destroyed. One key that is left opens the volume, and then the others
//! were destroyed for nothing.

use super::run::{KeyPlace, Run};
use super::{Confirmed, PlannedKey, Prepared, Target};
use crate::service::Error;
use crate::service::journal::SlotState;

impl Prepared {
    fn planned(&self, target: &Target) -> Option<&PlannedKey> {
        let same = |key: &&PlannedKey| key.uri == target.uri && key.identity.same_key(&target.identity);
        self.plan.keys.iter().find(same)
    }

    /// Whether the key service promised that the key may be destroyed.
    pub(super) fn promised(&self, target: &Target) -> bool {
        self.planned(target).is_some_and(|key| key.erasable == Some(true))
    }

    fn several(&self) -> bool {
        let first = self.targets.first();
        self.targets.iter().any(|target| first.is_some_and(|first| !first.identity.same_key(&target.identity)))
    }
}

impl Confirmed {
    /// Whether no key is to be destroyed if another cannot be.
    pub(super) fn all_or_none(&self) -> bool {
        !self.partial && self.prepared.several()
    }

    /// Refuses, with nothing changed, if it is known by now that a key would be left.
    pub(super) fn ready(&self, places: &[KeyPlace]) -> Result<(), Error> {
        if !self.all_or_none() {
            return Ok(());
        }
        let targets = &self.prepared.targets;
        // A key file may lie at any of its places; a key service is one place.
        let at = |n: usize| {
            let planned = self.prepared.planned(&targets[n]);
            let obstacle = planned.and_then(|key| key.obstacle.clone());
            match (places[n].shown(), obstacle) {
                (_, Some(why)) => Err(why),
                (false, None) => {
                    Err(format!("no key file is there: name its place with --key file:///PATH ({})", targets[n].uri))
                }
                (true, None) => Ok(()),
            }
        };
        let (mut can, mut cannot) = (Vec::new(), Vec::new());
        for (n, target) in targets.iter().enumerate() {
            let same = |other: &usize| targets[*other].identity.same_key(&target.identity);
            if (0..n).any(|other| same(&other)) {
                continue;
            }
            let name = target.identity.name();
            let tries: Vec<Result<(), String>> = (n..targets.len()).filter(same).map(at).collect();
            match tries.iter().any(Result::is_ok) {
                true => can.push(name),
                false => cannot.extend(tries.into_iter().filter_map(Result::err).map(|why| format!("{name} ({why})"))),
            }
        }
        if cannot.is_empty() {
            return Ok(());
        }
        let rest = if can.is_empty() { String::new() } else { format!(", so {} was left alone", can.join(", ")) };
        Err(Error::NotAllKeys(format!(
            "nothing was destroyed or changed: {} cannot be destroyed and would open the volume{rest}; use credentials for every key \
             (`revoke` suspends what it can, --partial destroys what can be destroyed)",
            cannot.join("; ")
        )))
    }
}

impl Run<'_> {
    /// Stops before the first destruction if a key could not be suspended and nobody promised that it may be destroyed.
    pub(super) fn all_suspended(&mut self) -> Result<(), Error> {
        if !self.confirmed.all_or_none() {
            return Ok(());
        }
        let targets = self.confirmed.prepared.targets.iter();
        let refused: Vec<String> = targets
            .zip(&self.journal.slots)
            .filter(|(target, slot)| slot.problem.is_some() && !self.confirmed.prepared.promised(target))
            .map(|(target, slot)| {
                format!("{} ({})", target.identity.name(), slot.problem.as_deref().unwrap_or_default())
            })
            .collect();
        if refused.is_empty() {
            return Ok(());
        }
        let slots = self.journal.slots.iter();
        let suspended: Vec<String> =
            slots.filter(|slot| slot.state == SlotState::Suspended).map(|slot| slot.identity.name()).collect();
        let so_far = match suspended.as_slice() {
            [] => String::new(),
            names => format!("; {} is suspended (`lethefs restore` brings it back)", names.join(", ")),
        };
        let line =
            format!("no key was destroyed, since one could not even be suspended: {}{so_far}", refused.join("; "));
        self.record(self.journal.state, Some(line.clone()));
        Err(Error::StillRestorable(line))
    }
}
