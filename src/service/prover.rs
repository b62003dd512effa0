//! Proves, while a volume is mounted, that a key service still unwraps for it; and fetches the KEK again. Holds no secret.
//!
//! Which of several slots is asked follows decision 13: where no answer comes the next one, and a no is a no. Each slot has a
//! thread that waits for its service, so that one that hangs does not take up the others' time; what it says too late is heard
//! all the same.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::audit;
use super::custody::{Bell, tick};
use super::mount::unlock::Unlocked;
use super::trust::{Grant, Usable};
use crate::audit::Event;
use crate::crypto::ids::unhex;
use crate::crypto::{Key32, VolumeId};
use crate::keyring;
use crate::keyring::lease::{Answer, Tick};
use crate::kms::{self, Binding, Failure, KeySource, KmsError, Purpose, Standing};

/// See the module's text.
pub(super) struct Prover {
    /// The one that opened the volume first.
    doors: Vec<Arc<Door>>,
    said: Mutex<Receiver<(usize, Heard)>>,
    say: Sender<(usize, Heard)>,
    /// Which said the last word that counted.
    last: AtomicUsize,
}

/// What a slot's key service said.
pub(super) struct Heard {
    /// The slot.
    pub(super) slot: u32,
    /// When it was asked.
    pub(super) asked: Tick,
    /// Whether it unwraps.
    pub(super) proved: Result<(), KmsError>,
    /// Its own number of the request, where it unwrapped.
    pub(super) request_id: Option<String>,
}

impl Heard {
    /// What it means to a lease.
    pub(super) fn answer(&self) -> Answer {
        match &self.proved {
            Ok(()) => Answer::Proved,
            Err(error) => match error.failure.standing() {
                Standing::Revoked => Answer::Refused,
                Standing::Destroyed => Answer::Destroyed,
                Standing::Uncertain => Answer::Nothing,
            },
        }
    }

    fn silence(&self) -> bool {
        matches!(&self.proved, Err(error) if error.failure.standing() == Standing::Uncertain)
    }
}

/// A KEK that was fetched again.
pub(super) struct Fetched {
    pub(super) slot: u32,
    pub(super) scope: u32,
    pub(super) version: u32,
    pub(super) kek: Key32,
    pub(super) request_id: Option<String>,
    /// For the audit log.
    pub(super) event: Event,
}

/// A slot, and the client of its key service once it was needed.
struct Door {
    volume: VolumeId,
    usable: Usable,
    source: OnceLock<Box<dyn KeySource>>,
    ask: OnceLock<Sender<()>>,
    /// It is being asked.
    busy: AtomicBool,
    /// It did not answer lately: nobody waits for it until it does.
    avoided: AtomicBool,
}

impl Prover {
    /// For a volume that was just unlocked. Takes the key service's client with its session.
    pub(super) fn new(grant: &Grant, unlocked: &mut Unlocked) -> Self {
        let used = &unlocked.used;
        let volume = unlocked.body.volume_id;
        // What stands in the copy that was tried first is nobody's word but the backing store's; what the KEK vouches for is.
        let genuine = |usable: &Usable| -> Option<Usable> {
            let scopes = unlocked.body.scopes.iter().filter(|scope| scope.id == usable.scope);
            let keks = scopes.flat_map(|scope| &scope.keks).filter(|kek| kek.version == usable.version);
            let slot = keks
                .flat_map(|kek| &kek.slots)
                .find(|slot| slot.id == usable.slot.id && slot.identity == usable.slot.identity)?;
            Some(Usable { slot: slot.clone(), ..usable.clone() })
        };
        let door = |usable: &Usable| Door {
            volume,
            usable: usable.clone(),
            source: OnceLock::new(),
            ask: OnceLock::new(),
            busy: AtomicBool::new(false),
            avoided: AtomicBool::new(false),
        };
        let first = door(&genuine(used).unwrap_or_else(|| used.clone()));
        if let Some(source) = unlocked.source.take() {
            let _ = first.source.set(source);
        }
        let mut doors = vec![first];
        for usable in &grant.copies.iter().flat_map(|(_, usable)| usable).filter_map(genuine).collect::<Vec<_>>() {
            let same_key =
                (usable.scope, usable.version) == (used.scope, used.version) && usable.commitment == used.commitment;
            let new = doors.iter().all(|known| known.usable.slot.id != usable.slot.id);
            if same_key && new && !usable.slot.wrapped.0.is_empty() && !usable.slot.canary.0.is_empty() {
                doors.push(door(usable));
            }
        }
        let (say, said) = channel();
        Self {
            doors: doors.into_iter().map(Arc::new).collect(),
            said: Mutex::new(said),
            say,
            last: AtomicUsize::new(0),
        }
    }

    /// Starts the threads. `bell` is rung for each answer.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn start(&self, bell: &Bell) -> io::Result<()> {
        for (n, door) in self.doors.iter().enumerate() {
            let (ask, asked) = channel();
            let _ = door.ask.set(ask);
            let (door, say, bell) = (door.clone(), self.say.clone(), bell.clone());
            std::thread::Builder::new().name(format!("lethefs-slot-{}", door.usable.slot.id)).spawn(move || {
                for () in asked {
                    let heard = door.prove();
                    door.avoided.store(heard.silence(), Ordering::SeqCst);
                    door.busy.store(false, Ordering::SeqCst);
                    let _ = say.send((n, heard));
                    bell.ring();
                }
            })?;
        }
        Ok(())
    }

    /// The slot that said the last word that counted.
    pub(super) fn slot(&self) -> u32 {
        self.doors[self.last.load(Ordering::SeqCst)].usable.slot.id
    }

    /// Asks for one proof, one slot after the other, and waits `patience` in all. The first word that counts, a proof or a no;
    /// else that nobody said any.
    pub(super) fn attempt(&self, patience: Duration) -> Heard {
        let (asked, begun) = (tick(), Instant::now());
        let avoided = |n: &usize| self.doors[*n].avoided.load(Ordering::SeqCst);
        let (late, mut good): (Vec<usize>, Vec<usize>) = (0..self.doors.len()).partition(avoided);
        // Asked for their no, or to be good again.
        late.iter().for_each(|n| self.doors[*n].ask());
        if good.is_empty() {
            good = late;
        }
        let mut silence = None;
        for (k, n) in good.iter().enumerate() {
            self.doors[*n].ask();
            let until = begun + patience.mul_f64((k + 1) as f64 / good.len() as f64);
            loop {
                match self.next_said(until) {
                    Some((door, heard)) if !heard.silence() => {
                        self.last.store(door, Ordering::SeqCst);
                        return heard;
                    }
                    Some((door, heard)) => {
                        silence.get_or_insert(heard);
                        if door == *n {
                            break;
                        }
                    }
                    None => {
                        self.doors[*n].avoided.store(true, Ordering::SeqCst);
                        break;
                    }
                }
            }
        }
        silence.unwrap_or_else(|| {
            let line = format!("the key service has not answered within {:.1} s", patience.as_secs_f64());
            Heard { slot: self.slot(), asked, proved: Err(KmsError::new(Failure::Unreachable, line)), request_id: None }
        })
    }

    /// A word that counts and came when nobody waited for it.
    pub(super) fn late(&self) -> Option<Heard> {
        loop {
            let (door, heard) = self.said().try_recv().ok()?;
            if !heard.silence() {
                self.last.store(door, Ordering::SeqCst);
                return Some(heard);
            }
        }
    }

    fn said(&self) -> std::sync::MutexGuard<'_, Receiver<(usize, Heard)>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_said(&self, until: Instant) -> Option<(usize, Heard)> {
        self.said().recv_timeout(until.saturating_duration_since(Instant::now())).ok()
    }

    /// The KEK, by the slot that has just proved its right.
    ///
    /// # Errors
    /// What its key service said, and that for the audit log.
    pub(super) fn fetch(&self) -> Result<Fetched, Box<(KmsError, Event)>> {
        let door = &self.doors[self.last.load(Ordering::SeqCst)];
        let (slot, uri) = (door.usable.slot.id, door.usable.uri.to_string());
        match door.fetch() {
            Ok((kek, request_id)) => {
                let key = audit::key(&door.usable.slot.identity);
                let event = Event::Fetch { purpose: "resume", slot, uri, key, request_id: request_id.clone() };
                let (scope, version) = (door.usable.scope, door.usable.version);
                Ok(Fetched { slot, scope, version, kek, request_id, event })
            }
            Err(error) => {
                let event = audit::fetch_failed("resume", slot, uri, &door.usable.slot.identity, &error);
                Err(Box::new((error, event)))
            }
        }
    }
}

impl Door {
    /// Unless it is being asked.
    fn ask(&self) {
        if !self.busy.swap(true, Ordering::SeqCst)
            && let Some(ask) = self.ask.get()
        {
            let _ = ask.send(());
        }
    }

    fn source(&self) -> Result<&dyn KeySource, KmsError> {
        if let Some(source) = self.source.get() {
            return Ok(&**source);
        }
        let made = kms::source(&self.usable.uri)?;
        Ok(&**self.source.get_or_init(|| made))
    }

    fn binding(&self, purpose: Purpose) -> Binding {
        Binding { volume: self.volume, scope: self.usable.scope, version: self.usable.version, purpose }
    }

    /// One request for a key that protects nothing.
    fn prove(&self) -> Heard {
        let asked = tick();
        let slot = &self.usable.slot;
        let proved = self.source().and_then(|source| {
            let canary = source.unwrap(&self.binding(Purpose::Canary), &slot.canary, &slot.identity)?;
            let check = keyring::canary_check(&self.volume, self.usable.scope, self.usable.version, &canary);
            let good = unhex(&slot.canary_check).is_some_and(|expected| keyring::same(&check, &expected));
            if good { Ok(source.last_request_id()) } else { Err(another_key()) }
        });
        // A service gives a number only to what it did.
        let (proved, request_id) = match proved {
            Ok(request_id) => (Ok(()), request_id),
            Err(error) => (Err(error), None),
        };
        Heard { slot: slot.id, asked, proved, request_id }
    }

    fn fetch(&self) -> Result<(Key32, Option<String>), KmsError> {
        let slot = &self.usable.slot;
        let source = self.source()?;
        let kek = source.unwrap(&self.binding(Purpose::Kek), &slot.wrapped, &slot.identity)?;
        let commitment = keyring::commitment(&self.volume, self.usable.scope, self.usable.version, &kek);
        match keyring::same(&commitment, &self.usable.commitment) {
            true => Ok((kek, source.last_request_id())),
            false => Err(another_key()),
        }
    }
}

/// Nobody who has the key would say so, and nobody who refuses it.
fn another_key() -> KmsError {
    KmsError::new(Failure::Untrusted, "the key service gave another key than it was given")
}
