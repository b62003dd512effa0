//! The erase itself: T1 inaccessible, live mounts sealed, T2 destruction, T3 proof. Journalled before and after each.

use serde::Serialize;

use super::{Confirmed, Target};
use crate::crypto::VolumeId;
use crate::kms::{self, Destruction, Failure, KeyIdentity, KmsError};
use crate::service::control::{Client, Op};
use crate::service::journal::{Journal, Place, Receipt, SlotJournal, SlotState, State};
use crate::service::record::{self, path_text};
use crate::service::{Error, SCHEMA, mountinfo, now};
use crate::volume::meta::{KeyState, VolumeFile};

/// How far an erase got.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// The volume.
    pub volume_id: VolumeId,
    /// How far.
    pub state: State,
    /// The proof is only this program's own word (`file://`).
    pub self_asserted: bool,
    /// Every step and proof.
    pub journal: Journal,
    /// Keys that were not touched and may open the volume.
    pub left: Vec<KeyIdentity>,
    /// What nobody here can exclude.
    pub remains: Vec<String>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// The end of a run.
pub struct Outcome {
    /// What to show.
    pub report: Report,
    /// Why the erase is not complete, if it is not.
    pub incomplete: Option<Error>,
}

impl Confirmed {
    /// Erases. May be killed at any instant and run again.
    ///
    /// # Errors
    /// Only what keeps it from writing its journal; a key that cannot be destroyed is an incomplete [`Outcome`].
    pub fn run(self) -> Result<Outcome, Error> {
        let mut run = Run { warnings: Vec::new(), self_asserted: false, journal: self.journal(), confirmed: &self };
        run.save()?;
        checkpoint("begun");
        // Live mounts are sealed only once the key service let these credentials do their part: an erase that was never
        // allowed must not cost a running mount its unwritten data.
        run.suspend()?;
        checkpoint("inaccessible");
        let suspended = run.every(|state| state == SlotState::Suspended);
        if suspended {
            run.seal_mounts()?;
            checkpoint("sealed");
        }
        run.destroy()?;
        let gone = [SlotState::Suspended, SlotState::Scheduled, SlotState::CarriedOut];
        if !suspended && run.every(|state| gone.contains(&state)) {
            run.seal_mounts()?;
            checkpoint("sealed");
        }
        checkpoint("scheduled");
        let incomplete = run.prove()?;
        Ok(Outcome {
            report: Report {
                schema: SCHEMA,
                volume_id: run.journal.volume_id,
                state: run.journal.state,
                self_asserted: run.self_asserted,
                journal: run.journal,
                left: self.prepared.plan.left.clone(),
                remains: self.prepared.plan.remains.clone(),
                warnings: run.warnings,
            },
            incomplete,
        })
    }

    /// A new journal, with the times of an earlier run's where it is about the same keys.
    fn journal(&self) -> Journal {
        let volume = self.prepared.plan.volume_id;
        let mut journal = Journal::new(volume);
        let slots = self.prepared.targets.iter().map(|target| SlotJournal {
            scope: target.scope,
            version: target.version,
            id: target.slot,
            identity: target.identity.clone(),
            uri: target.uri.to_string(),
            state: SlotState::Pending,
            restorable_until: None,
            problem: None,
            proof: None,
        });
        journal.slots = slots.collect();
        if let Some(earlier) = self.place.read(volume) {
            let same = earlier.slots.len() == journal.slots.len()
                && earlier.slots.iter().all(|old| journal.slots.iter().any(|new| new.identity == old.identity));
            if same {
                journal.begun_at = earlier.begun_at;
                journal.inaccessible_at = earlier.inaccessible_at;
                journal.scheduled_at = earlier.scheduled_at;
                journal.irrecoverable_at = earlier.irrecoverable_at;
                journal.receipts = earlier.receipts;
                // Not the states: each is established anew below.
            }
        }
        journal
    }
}

struct Run<'a> {
    confirmed: &'a Confirmed,
    journal: Journal,
    warnings: Vec<String>,
    self_asserted: bool,
}

impl Run<'_> {
    fn save(&self) -> Result<(), Error> {
        let what = match self.confirmed.place {
            Place::Backing(_) => {
                "cannot write the erase journal into the backing directory (if it cannot be written to, use erase --key URI --volume-id ID)"
            }
            Place::Host(_) => "cannot write the erase journal",
        };
        self.confirmed.place.write(&self.journal).map_err(Error::io(what))
    }

    fn every(&self, is: impl Fn(SlotState) -> bool) -> bool {
        self.journal.slots.iter().all(|slot| is(slot.state))
    }

    /// Wipes the keys of every mount on this host that dies with these KMS keys.
    fn seal_mounts(&mut self) -> Result<(), Error> {
        let plan = &self.confirmed.prepared.plan;
        let users: Vec<u32> = mountinfo::read().unwrap_or_default().iter().filter_map(|mount| mount.user).collect();
        for (record, files) in record::all(&users) {
            let concerned = record.volume_id == plan.volume_id
                || plan.shared_with.iter().any(|shared| shared.volume_id == record.volume_id);
            if !concerned {
                continue;
            }
            // Nobody listens: a record left by a dead daemon, or one that hangs; the plan told them apart.
            let Ok(client) = Client::connect(&files.socket) else { continue };
            let mountpoint = path_text::encode(&record.mountpoint);
            match client.ask(Op::Seal) {
                Ok(answer) => {
                    let receipts = &mut self.journal.receipts;
                    let again = answer["sealed_now"] == false
                        && receipts.iter().any(|old| old.volume_id == record.volume_id && old.mountpoint == mountpoint);
                    if !again {
                        receipts.push(Receipt { volume_id: record.volume_id, mountpoint, at: now(), answer });
                    }
                }
                Err(error) => self.warnings.push(format!("the mount at {mountpoint} could not be sealed: {error}")),
            }
        }
        for mount in plan.live_mounts.iter().filter(|mount| !mount.reachable) {
            self.warnings.push(format!("the mount at {} could not be reached and was not sealed", mount.mountpoint));
        }
        self.save()
    }

    /// T1: unusable at once, for services that can do that reversibly.
    fn suspend(&mut self) -> Result<(), Error> {
        let mut all = true;
        for (n, target) in self.confirmed.prepared.targets.iter().enumerate() {
            self.journal.slots[n].state = SlotState::Suspending;
            self.save()?;
            let slot = &mut self.journal.slots[n];
            slot.state = match kms::admin(&target.uri).and_then(|admin| admin.suspend()) {
                Ok(Some(_)) => SlotState::Suspended,
                // No such state there: inaccessible only once destroyed.
                Ok(None) => {
                    all = false;
                    SlotState::Pending
                }
                // Not there to be used by anybody; what that means is for the proof to find out.
                Err(error) if matches!(error.failure, Failure::Missing | Failure::Destroyed) => SlotState::Suspended,
                Err(error) => {
                    all = false;
                    slot.problem = Some(problem(&error));
                    SlotState::Pending
                }
            };
            self.save()?;
        }
        if all {
            self.reached(State::Inaccessible);
        }
        self.save()
    }

    /// T2: destruction, or the date of it.
    fn destroy(&mut self) -> Result<(), Error> {
        let mut all = true;
        for (n, target) in self.confirmed.prepared.targets.iter().enumerate() {
            let before = self.journal.slots[n].state;
            self.journal.slots[n].state = SlotState::Destroying;
            self.save()?;
            let slot = &mut self.journal.slots[n];
            slot.problem = None;
            slot.state = match kms::admin(&target.uri).and_then(|admin| admin.destroy(&target.identity)) {
                Ok(Destruction::CarriedOut) => SlotState::CarriedOut,
                Ok(Destruction::Scheduled { at }) => {
                    slot.restorable_until = Some(at);
                    SlotState::Scheduled
                }
                Ok(Destruction::Suspended) => {
                    all = false;
                    slot.problem = Some("the key service only suspended the key".into());
                    SlotState::Suspended
                }
                Err(error) => {
                    all = false;
                    slot.problem = Some(problem(&error));
                    before
                }
            };
            self.save()?;
        }
        if all {
            self.reached(State::Inaccessible);
            self.reached(State::Scheduled);
        }
        self.save()
    }

    /// T3: the key service's proof for every key, or what is missing to it.
    fn prove(&mut self) -> Result<Option<Error>, Error> {
        let mut missing = Vec::new();
        for (n, target) in self.confirmed.prepared.targets.iter().enumerate() {
            let slot = &mut self.journal.slots[n];
            let probe = target.probe.as_ref().map(|(binding, wrapped)| (binding, wrapped));
            let proved = kms::admin(&target.uri).and_then(|admin| admin.prove_destroyed(&target.identity, probe));
            match proved {
                Ok(proof) => {
                    self.self_asserted |= proof.self_asserted;
                    slot.proof = serde_json::to_value(&proof).ok();
                    slot.state = SlotState::Destroyed;
                    slot.problem = None;
                }
                Err(error) => {
                    missing.push(self.still_restorable(n, target, &error));
                    self.journal.slots[n].problem.get_or_insert(problem(&error));
                }
            }
        }
        let left = &self.confirmed.prepared.plan.left;
        for key in left {
            let key = key.to_string().escape_debug().to_string();
            missing.push(format!("{key} was not touched, for want of its URI (--key)"));
        }
        if !missing.is_empty() {
            self.journal.irrecoverable_at = None;
            self.save()?;
            return Ok(Some(Error::StillRestorable(format!("still restorable: {}", missing.join("; ")))));
        }
        self.reached(State::Inaccessible);
        self.reached(State::Scheduled);
        self.reached(State::Irrecoverable);
        self.save()?;
        checkpoint("irrecoverable");
        self.tombstone()?;
        Ok(None)
    }

    fn still_restorable(&self, n: usize, target: &Target, error: &KmsError) -> String {
        let slot = &self.journal.slots[n];
        let until = slot.restorable_until.as_ref().map(|at| format!(" until {at}")).unwrap_or_default();
        let why = slot.problem.clone().unwrap_or_else(|| problem(error));
        format!("{}{until} ({why})", target.identity.name())
    }

    /// Takes the wrapped keys out of the volume file, now that they are waste.
    fn tombstone(&mut self) -> Result<(), Error> {
        let Some(dir) = &self.confirmed.prepared.backing else { return Ok(()) };
        let copies = VolumeFile::read(dir)?;
        let Some(copy) = copies.iter().find(|copy| copy.body().volume_id == self.journal.volume_id) else {
            return Ok(());
        };
        let mut body = copy.body().clone();
        for kek in body.scopes.iter_mut().flat_map(|scope| &mut scope.keks) {
            kek.state = KeyState::Destroyed;
            for slot in &mut kek.slots {
                slot.wrapped.0.clear();
                slot.canary.0.clear();
            }
        }
        if copies.iter().all(|copy| *copy.body() == body) && copies.len() == 2 {
            return Ok(());
        }
        body.generation = body.generation.saturating_add(1);
        VolumeFile::write_tombstone(dir, &body)?;
        checkpoint("tombstone");
        Ok(())
    }

    /// Marks a step; a time from an earlier run stays.
    fn reached(&mut self, state: State) {
        let journal = &mut self.journal;
        let at = match state {
            State::Begun => return,
            State::Inaccessible => &mut journal.inaccessible_at,
            State::Scheduled => &mut journal.scheduled_at,
            State::Irrecoverable => &mut journal.irrecoverable_at,
        };
        at.get_or_insert_with(now);
        journal.state = state;
    }
}

/// Class and line of a failure.
fn problem(error: &KmsError) -> String {
    let class = serde_json::to_value(error.failure).ok();
    let class = class.as_ref().and_then(|class| class.as_str()).unwrap_or("unknown");
    format!("{class}: {error}")
}

/// Debug builds only: dies here as by `kill -9` if `LETHEFS_TEST_ABORT_AFTER` names this step. The tests run every step's
/// death and the run after it.
fn checkpoint(step: &str) {
    #[cfg(debug_assertions)]
    if std::env::var("LETHEFS_TEST_ABORT_AFTER").is_ok_and(|wanted| wanted == step) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
    #[cfg(not(debug_assertions))]
    let _ = step;
}
