//! The erase itself: T1 inaccessible, live mounts sealed, T2 destruction, T3 proof. Journalled before and after each.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::{Confirmed, Target, plan};
use crate::audit::{Event, Sink};
use crate::crypto::VolumeId;
use crate::kms::{self, Destruction, Failure, KeyIdentity, KmsError};
use crate::service::control::{Client, Op};
use crate::service::journal::{Journal, Place, Receipt, SlotJournal, SlotState, State};
use crate::service::record::{self, path_text};
use crate::service::{Error, SCHEMA, audit, checkpoint, mountinfo, now};
use crate::volume::meta::{KeyState, VolumeFile, WriteLock};

/// How long a tombstone waits for a change of slots that is under way.
const TOMBSTONE_PATIENCE: Duration = Duration::from_secs(20);

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
    /// [`Error::NotAllKeys`] before anything is changed, [`Error::StillRestorable`] before anything is destroyed, and what keeps it
    /// from writing its journal; a key that cannot be destroyed is an incomplete [`Outcome`].
    pub fn run(self) -> Result<Outcome, Error> {
        let (begun_before, targets) = (self.begun_before(), &self.prepared.targets);
        let places: Vec<KeyPlace> = targets.iter().map(|target| KeyPlace::look(target, &begun_before)).collect();
        self.ready(&places)?;
        let journal = self.journal(&begun_before, &places);
        let audit = audit::open(self.prepared.plan.volume_id);
        let (warnings, logged) = (Vec::new(), Vec::new());
        let mut run = Run { warnings, self_asserted: false, places, journal, audit, logged, confirmed: &self };
        run.record(State::Begun, None);
        run.save()?;
        checkpoint("begun");
        // Live mounts are sealed only once the key service let these credentials do their part: an erase that was never
        // allowed must not cost a running mount its unwritten data.
        run.suspend()?;
        checkpoint("inaccessible");
        run.all_suspended()?;
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
        if let Some(error) = &incomplete {
            run.record(run.journal.state, Some(error.to_string()));
        }
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

    /// The journals of earlier runs: where this one's will be, and on this host.
    fn begun_before(&self) -> Vec<Journal> {
        let volume = self.prepared.plan.volume_id;
        self.place.read(volume).into_iter().chain(plan::existing_on_host(volume)).collect()
    }

    /// A new journal, with the times of an earlier run's where it is about the same keys.
    fn journal(&self, begun_before: &[Journal], places: &[KeyPlace]) -> Journal {
        let volume = self.prepared.plan.volume_id;
        let mut journal = Journal::new(volume);
        let slots = self.prepared.targets.iter().zip(places).map(|(target, place)| SlotJournal {
            scope: target.scope,
            version: target.version,
            id: target.slot,
            identity: target.identity.clone(),
            uri: target.uri.to_string(),
            // What shows that a key file was there, and went, must not be lost if this run dies early.
            state: if place.begun_before { SlotState::Destroying } else { SlotState::Pending },
            restorable_until: None,
            problem: None,
            proof: None,
        });
        journal.slots = slots.collect();
        if let Some(earlier) = begun_before.first() {
            let among = |some: &[SlotJournal], all: &[SlotJournal]| {
                some.iter().all(|slot| all.iter().any(|other| other.identity == slot.identity))
            };
            if among(&earlier.slots, &journal.slots) && among(&journal.slots, &earlier.slots) {
                journal.begun_at.clone_from(&earlier.begun_at);
                journal.inaccessible_at.clone_from(&earlier.inaccessible_at);
                journal.scheduled_at.clone_from(&earlier.scheduled_at);
                journal.irrecoverable_at.clone_from(&earlier.irrecoverable_at);
                journal.receipts.clone_from(&earlier.receipts);
                // Not the states: each is established anew below.
            }
        }
        journal
    }
}

/// What shows that a key's destruction is that key's, and not only that nothing is where it was looked for. A key service
/// answers for its keys; the absence of a key file shows nothing, since its path may be wrong.
pub(super) struct KeyPlace {
    /// The key is one whose destruction its service can tell.
    served: bool,
    /// A key file with this id was here when the run began.
    held: bool,
    /// An earlier run of this erase destroyed the key file, or found it here and was about to.
    begun_before: bool,
}

impl KeyPlace {
    fn look(target: &Target, begun_before: &[Journal]) -> Self {
        let served = !matches!(target.identity, KeyIdentity::File { .. });
        let described = || kms::admin(&target.uri).and_then(|admin| admin.describe());
        let uri = target.uri.to_string();
        // Begun tells of one place only, done of the key.
        let shows = |slot: &SlotJournal| match slot.state {
            SlotState::CarriedOut | SlotState::Destroyed => true,
            SlotState::Destroying => slot.uri == uri,
            _ => false,
        };
        Self {
            served,
            held: !served && described().is_ok_and(|described| described.identity.same_key(&target.identity)),
            begun_before: !served
                && begun_before
                    .iter()
                    .flat_map(|journal| &journal.slots)
                    .any(|slot| slot.identity.same_key(&target.identity) && shows(slot)),
        }
    }

    pub(super) fn shown(&self) -> bool {
        self.served || self.held || self.begun_before
    }
}

pub(super) struct Run<'a> {
    pub(super) confirmed: &'a Confirmed,
    /// As the targets.
    places: Vec<KeyPlace>,
    pub(super) journal: Journal,
    warnings: Vec<String>,
    self_asserted: bool,
    audit: Arc<Sink>,
    /// Steps that this run has recorded.
    logged: Vec<State>,
}

impl Run<'_> {
    /// Records a step in the audit log, on the medium before the journal calls it done. An erase goes on without.
    pub(super) fn record(&mut self, state: State, problem: Option<String>) {
        if problem.is_none() && self.logged.contains(&state) {
            return;
        }
        self.logged.push(state);
        let word = |value| serde_json::to_value(value).ok();
        let phase = match (&problem, word(state).as_ref().and_then(|word| word.as_str())) {
            (None, Some(word)) => word.to_owned(),
            _ => "incomplete".to_owned(),
        };
        let slots = self.journal.slots.iter();
        let keys = slots.map(|slot| {
            serde_json::json!({ "slot": slot.id, "uri": slot.uri, "key": audit::key(&slot.identity), "state": slot.state,
                "problem": slot.problem })
        });
        audit::warn(&self.audit, Event::Erase { phase, keys: keys.collect(), problem }, &mut self.warnings);
    }

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
        self.warnings.extend(plan.unreached("sealed"));
        self.save()
    }

    /// T1: unusable at once, for services that can do that reversibly.
    fn suspend(&mut self) -> Result<(), Error> {
        let mut all = true;
        for (n, target) in self.confirmed.prepared.targets.iter().enumerate() {
            // A key file cannot be suspended, and the state from an earlier run must stay.
            if !self.places[n].served {
                all = false;
                continue;
            }
            self.journal.slots[n].state = SlotState::Suspending;
            self.save()?;
            let slot = &mut self.journal.slots[n];
            slot.state = match kms::admin(&target.uri).and_then(|admin| admin.suspend(&target.identity)) {
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
        let targets = &self.confirmed.prepared.targets;
        // Where the key files are comes first: only then does it mean anything that one is not at another place.
        let (mut first, rest): (Vec<usize>, Vec<usize>) = (0..targets.len()).partition(|n| self.places[*n].shown());
        // A refusal that nobody could foresee should come before anything is lost.
        first.sort_by_key(|n| self.confirmed.prepared.promised(&targets[*n]));
        for n in first.into_iter().chain(rest) {
            if !all && self.confirmed.all_or_none() {
                self.journal.slots[n].problem = Some("not destroyed, since another key could not be".into());
                continue;
            }
            let target = &targets[n];
            let before = self.journal.slots[n].state;
            if self.places[n].shown() {
                self.journal.slots[n].state = SlotState::Destroying;
                self.save()?;
            }
            let destroyed = kms::admin(&target.uri).and_then(|admin| admin.destroy(&target.identity));
            let nowhere = !self.was_somewhere(n);
            let slot = &mut self.journal.slots[n];
            slot.problem = None;
            slot.state = match destroyed {
                Ok(Destruction::CarriedOut) if nowhere && !self.places[n].shown() => {
                    all = false;
                    slot.problem = Some(problem(&not_found(target)));
                    before
                }
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

    /// Whether more than absence shows that this key is destroyed: it is a key service's, or the key file was found and
    /// destroyed at some place, by this run or an earlier one.
    fn was_somewhere(&self, n: usize) -> bool {
        let key = &self.confirmed.prepared.targets[n].identity;
        let done = [SlotState::CarriedOut, SlotState::Destroyed];
        self.places[n].served
            || self.places[n].begun_before
            || self.confirmed.prepared.targets.iter().zip(&self.places).zip(&self.journal.slots).any(
                |((target, place), slot)| place.shown() && target.identity.same_key(key) && done.contains(&slot.state),
            )
    }

    /// T3: the key service's proof for every key, or what is missing to it.
    fn prove(&mut self) -> Result<Option<Error>, Error> {
        let mut missing = Vec::new();
        for (n, target) in self.confirmed.prepared.targets.iter().enumerate() {
            if !self.was_somewhere(n) {
                let error = not_found(target);
                missing.push(self.still_restorable(n, target, &error));
                self.journal.slots[n].problem.get_or_insert(problem(&error));
                continue;
            }
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
        match self.tombstone() {
            Err(error @ Error::StillRestorable(_)) => Ok(Some(error)),
            done => done.map(|()| None),
        }
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
        // Whoever changes slots now is waited for, but not for ever: the keys are gone.
        let _lock = WriteLock::take(dir, TOMBSTONE_PATIENCE)?;
        let copies = VolumeFile::read(dir)?;
        let Some(copy) = copies.iter().find(|copy| copy.body().volume_id == self.journal.volume_id) else {
            return Ok(());
        };
        let targets = &self.confirmed.prepared.targets;
        let slots =
            copies.iter().flat_map(|copy| &copy.body().scopes).flat_map(|scope| &scope.keks).flat_map(|kek| &kek.slots);
        for slot in slots {
            let known = targets.iter().any(|target| target.identity.same_key(&slot.identity));
            let told = self.confirmed.prepared.plan.left.contains(&slot.identity);
            if !known && !told && !matches!(slot.identity, KeyIdentity::Recovery { .. }) && !slot.wrapped.0.is_empty() {
                return Err(Error::StillRestorable(format!(
                    "a slot was added while this erase ran ({}): run it again",
                    slot.identity.to_string().escape_debug()
                )));
            }
        }
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
        self.record(state, None);
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

/// No file with this key's id has been seen: it may lie elsewhere, whole.
fn not_found(target: &Target) -> KmsError {
    let uri = &target.uri;
    let line = format!("the key file was not found where expected ({uri}): name its place with --key file:///PATH");
    KmsError::new(Failure::Missing, line)
}

/// Class and line of a failure.
pub(super) fn problem(error: &KmsError) -> String {
    let class = serde_json::to_value(error.failure).ok();
    let class = class.as_ref().and_then(|class| class.as_str()).unwrap_or("unknown");
    format!("{class}: {error}")
}
