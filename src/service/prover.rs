//! Proves, while a volume is mounted, that a key service still unwraps for it; and fetches the KEK again. Holds no secret.
//!
//! Which of several slots is asked follows decision 13: where no answer comes the next one, and a no is a no.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::custody::tick;
use super::mount::unlock::Unlocked;
use super::trust::{Grant, Usable};
use crate::crypto::ids::unhex;
use crate::crypto::{Key32, VolumeId};
use crate::keyring::lease::Tick;
use crate::keyring::{self};
use crate::kms::{self, Binding, Failure, KeySource, KmsError, Purpose, Standing};

/// A slot whose service did not answer is asked after the others for this long: waiting for it would take up the lease. It is
/// asked all the same ([`Prover::recheck`]), for its no.
const AVOIDED: Duration = Duration::from_secs(60);

/// See the module's text.
pub(super) struct Prover {
    volume: VolumeId,
    /// The one that opened the volume first.
    slots: Vec<Door>,
    last: AtomicUsize,
}

/// A slot, and the client of its key service once it was needed.
struct Door {
    usable: Usable,
    source: OnceLock<Box<dyn KeySource>>,
    avoided: Mutex<Option<Tick>>,
}

impl Prover {
    /// For a volume that was just unlocked. Takes the key service's client with its session.
    pub(super) fn new(grant: &Grant, unlocked: &mut Unlocked) -> Self {
        let used = &unlocked.used;
        let door =
            |usable: &Usable| Door { usable: usable.clone(), source: OnceLock::new(), avoided: Mutex::new(None) };
        let first = door(used);
        if let Some(source) = unlocked.source.take() {
            let _ = first.source.set(source);
        }
        let mut slots = vec![first];
        for usable in grant.copies.iter().flat_map(|(_, usable)| usable) {
            let same_key =
                (usable.scope, usable.version) == (used.scope, used.version) && usable.commitment == used.commitment;
            let new = slots.iter().all(|known| known.usable.slot.id != usable.slot.id);
            if same_key && new && !usable.slot.wrapped.0.is_empty() && !usable.slot.canary.0.is_empty() {
                slots.push(door(usable));
            }
        }
        Self { volume: unlocked.body.volume_id, slots, last: AtomicUsize::new(0) }
    }

    /// The slot that was asked last, and its service's number of that request.
    pub(super) fn last(&self) -> (u32, Option<String>) {
        let door = &self.slots[self.last.load(Ordering::SeqCst)];
        (door.usable.slot.id, door.source.get().and_then(|source| source.last_request_id()))
    }

    /// One request for a key that protects nothing.
    ///
    /// # Errors
    /// The first that counts: a slot's no, else the first slot's silence.
    pub(super) fn prove(&self) -> Result<(), KmsError> {
        self.ask(|door| door.prove(self.volume))
    }

    /// After a proof by one slot: asks those before it that did not answer lately. A service that is back must be heard if it
    /// has come to say no.
    ///
    /// # Errors
    /// A slot's no.
    pub(super) fn recheck(&self) -> Result<(), KmsError> {
        for (n, door) in self.slots.iter().enumerate().filter(|(_, door)| door.avoided(tick())) {
            match door.prove(self.volume) {
                Ok(()) => door.avoid(None),
                Err(error) if error.failure.standing() == Standing::Uncertain => {}
                Err(no) => {
                    self.last.store(n, Ordering::SeqCst);
                    return Err(no);
                }
            }
        }
        Ok(())
    }

    /// The KEK, with its scope and version.
    ///
    /// # Errors
    /// As [`prove`](Self::prove).
    pub(super) fn fetch(&self) -> Result<(u32, u32, Key32), KmsError> {
        self.ask(|door| Ok((door.usable.scope, door.usable.version, door.fetch(self.volume)?)))
    }

    fn ask<T>(&self, what: impl Fn(&Door) -> Result<T, KmsError>) -> Result<T, KmsError> {
        let now = tick();
        let mut order: Vec<usize> = (0..self.slots.len()).collect();
        order.sort_by_key(|n| self.slots[*n].avoided(now));
        let mut silence = None;
        for n in order {
            let door = &self.slots[n];
            self.last.store(n, Ordering::SeqCst);
            match what(door) {
                Ok(value) => {
                    door.avoid(None);
                    return Ok(value);
                }
                Err(error) if error.failure.standing() == Standing::Uncertain => {
                    tracing::debug!(slot = door.usable.slot.id, class = ?error.failure, "no answer: {error}");
                    door.avoid(Some(tick() + AVOIDED));
                    silence.get_or_insert(error);
                }
                Err(no) => return Err(no),
            }
        }
        Err(silence.unwrap_or_else(|| KmsError::new(Failure::Config, "there is no slot to ask")))
    }
}

impl Door {
    fn avoided(&self, now: Tick) -> bool {
        self.avoided.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| until > now)
    }

    fn avoid(&self, until: Option<Tick>) {
        *self.avoided.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    fn source(&self) -> Result<&dyn KeySource, KmsError> {
        if let Some(source) = self.source.get() {
            return Ok(&**source);
        }
        let made = kms::source(&self.usable.uri)?;
        Ok(&**self.source.get_or_init(|| made))
    }

    fn binding(&self, volume: VolumeId, purpose: Purpose) -> Binding {
        Binding { volume, scope: self.usable.scope, version: self.usable.version, purpose }
    }

    fn prove(&self, volume: VolumeId) -> Result<(), KmsError> {
        let slot = &self.usable.slot;
        let canary = self.source()?.unwrap(&self.binding(volume, Purpose::Canary), &slot.canary, &slot.identity)?;
        let check = keyring::canary_check(&volume, self.usable.scope, self.usable.version, &canary);
        let expected = unhex(&slot.canary_check);
        expected.filter(|expected| keyring::same(&check, expected)).map(drop).ok_or_else(another_key)
    }

    fn fetch(&self, volume: VolumeId) -> Result<Key32, KmsError> {
        let slot = &self.usable.slot;
        let kek = self.source()?.unwrap(&self.binding(volume, Purpose::Kek), &slot.wrapped, &slot.identity)?;
        let commitment = keyring::commitment(&volume, self.usable.scope, self.usable.version, &kek);
        if keyring::same(&commitment, &self.usable.commitment) { Ok(kek) } else { Err(another_key()) }
    }
}

/// Nobody who has the key would say so, and nobody who refuses it.
fn another_key() -> KmsError {
    KmsError::new(Failure::Untrusted, "the key service gave another key than it was given")
}
