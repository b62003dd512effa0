//! A simulated disk under the whole filesystem: workloads run over a recorded backing directory, and are cut after every
//! change. What a power cut or a kill may leave ([`medium`](crate::volume::storage::medium)) is mounted again, and held
//! against a model.
//!
//! - `LETHEFS_SIM_WORKLOADS`: random workloads for each test; `LETHEFS_SIM_STATES`: states for each cut. With `all` every
//!   recovery is itself cut after each of its changes, not at some of them in some recoveries;
//! - `LETHEFS_SIM_SEED`: runs only the workload with this seed.

mod directed;
mod model;
mod punched;
mod random;
mod repaired;
mod session;
mod whole;

use model::{End, Found, Model, empty, look};
use session::{Do, Session, Setup, kill, mount, unmount};

use crate::volume::storage::medium::{Choice, Dice, History, Image, Order};
use crate::volume::storage::recorder;
use crate::volume::testing::{Ring, Vault, directory};

/// What was tried.
#[derive(Clone, Copy, Default, Debug)]
struct Figures {
    workloads: u64,
    steps: u64,
    cuts: u64,
    states: u64,
    /// Second ends, during the recovery from the first.
    second: u64,
}

impl std::ops::AddAssign for Figures {
    fn add_assign(&mut self, other: Self) {
        self.workloads += other.workloads;
        self.steps += other.steps;
        self.cuts += other.cuts;
        self.states += other.states;
        self.second += other.second;
    }
}

/// How a workload is cut.
#[derive(Clone, Copy, Debug)]
struct Plan {
    setup: Setup,
    seed: u64,
    /// States for each cut.
    states: u64,
    /// One state in so many meets a second end while it is mounted again, after so many of the changes that this makes.
    /// `None`: each does, after every one of them.
    second: Option<(u64, u64)>,
    order: Order,
}

/// For most tests.
const OFTEN: Option<(u64, u64)> = Some((4, 3));

/// How many states, and which second ends: what the environment asks for, or these.
fn asked(states: u64, second: Option<(u64, u64)>) -> (u64, Option<(u64, u64)>) {
    match std::env::var("LETHEFS_SIM_STATES").as_deref() {
        Ok("all") => (states, None),
        _ => (number("LETHEFS_SIM_STATES").unwrap_or(states), second),
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Runs a workload, cuts it after every change, and holds what is left against the model.
fn cut_everywhere(steps: &[Do], plan: Plan) -> Result<Figures, String> {
    let vault = Vault::new();
    let mut figures = Figures { workloads: 1, ..Figures::default() };
    let mut base = None;
    for (n, part) in steps.split(|step| *step == Do::Cut).enumerate() {
        let plan = Plan { seed: plan.seed.wrapping_add(n as u64), ..plan };
        base = Some(cut_part(&vault, base, part, plan, &mut figures).map_err(|what| format!("part {n}: {what}"))?);
    }
    Ok(figures)
}

/// The part between two power cuts. Gives something that is left after it.
fn cut_part(
    vault: &Vault,
    base: Option<Image>,
    steps: &[Do],
    plan: Plan,
    figures: &mut Figures,
) -> Result<Image, String> {
    let dir = directory();
    let new = base.is_none();
    let base = base.unwrap_or_else(Image::new);
    recorder::simulate(base.put(dir.path(), false));
    recorder::record(true);
    if new {
        vault.create(dir.path());
    }
    let (begun, started) = (recorder::position(), vault.held());
    figures.steps += steps.len() as u64;
    let ran = (|| {
        let mut session = Session::new(vault, dir.path(), plan.setup, plan.seed)?;
        for (n, step) in steps.iter().enumerate() {
            session.step(step).map_err(|what| format!("step {n}: {what}"))?;
        }
        session.same_as_model(&session.look()?)?;
        Ok(session.end())
    })();
    let (_, trace) = recorder::end();
    let model = ran.map_err(|what: String| format!("without a crash: {what}"))?;
    let history = History::new(base, trace);
    let (held, before) = (vault.held(), if model.rewrapped.is_some() { Ring::Both } else { started });
    for cut in begun..=history.len() {
        figures.cuts += 1;
        // Once everything is wrapped under the new KEK version, and that is flushed, the old one is not needed. In the middle of
        // it both are.
        vault.hold(if model.rewrapped.is_some_and(|done| done <= cut) { Ring::New } else { before });
        let mut dice = Dice::new(plan.seed.wrapping_mul(1_000_003).wrapping_add(cut as u64));
        for n in 0..plan.states {
            let one = Trial { vault, model: &model, plan, cut };
            one.run(&history, n, &mut dice, figures)
                .map_err(|what| format!("cut after {cut} of {} changes, state {n}: {what}", history.len()))?;
        }
    }
    vault.hold(held);
    let mut dice = Dice::new(plan.seed);
    let cut = history.len() - dice.below((history.len() - begun) as u64 / 2 + 1) as usize;
    Ok(history.power_cut(cut, Choice { order: plan.order, seed: dice.next() }))
}

struct Trial<'a> {
    vault: &'a Vault,
    model: &'a Model,
    plan: Plan,
    cut: usize,
}

impl Trial<'_> {
    fn run(&self, history: &History, n: u64, dice: &mut Dice, figures: &mut Figures) -> Result<(), String> {
        let seed = dice.next();
        // Moved as a whole: all numbers are others.
        let moved = dice.one_in(8);
        // Each fourth state is a kill's.
        let killed = if n % 4 == 3 { history.kill(self.cut, dice.below(3)) } else { None };
        // With what is behind it, should it end once more.
        let (image, end, then) = match killed {
            Some(left) => {
                let end = End::Kill { torn: left.len() > self.cut };
                (left.all(), end, left)
            }
            None => {
                let image = history.power_cut(self.cut, Choice { order: self.plan.order, seed });
                let end = if self.plan.order == Order::Journal { End::Power } else { End::Loose };
                (image.clone(), end, History::new(image, Vec::new()))
            }
        };
        figures.states += 1;
        let under_way = then.len().max(self.cut);
        let twice = match self.plan.second {
            Some((one_in, _)) => n % 4 != 1 && dice.one_in(one_in) && !moved,
            None => !moved,
        };
        let (found, trace) =
            self.recover(&image, moved, twice, end, under_way).map_err(|what| format!("{end:?} {what}"))?;
        if !twice {
            return Ok(());
        }
        let again = then.then(trace);
        let first = then.len();
        let all = again.len() - first;
        let cuts: Vec<usize> = match self.plan.second {
            Some((_, times)) => (0..times).map(|_| first + dice.below(all as u64 + 1) as usize).collect(),
            None => (first..=first + all).collect(),
        };
        for cut in cuts {
            figures.second += 1;
            let choice = Choice { order: self.plan.order, seed: dice.next() };
            let second = if self.plan.order == Order::Journal { End::Power } else { End::Loose };
            let (later, _) = self
                .recover(&again.power_cut(cut, choice), false, false, second, under_way)
                .map_err(|what| format!("{end:?}, then again after {} of {all} changes: {what}", cut - first))?;
            // From what is all on the medium a recovery always makes the same.
            if !matches!(end, End::Kill { .. }) && later != found {
                return Err(format!("{end:?}, again after {} of {all} changes: it reads otherwise", cut - first));
            }
        }
        Ok(())
    }

    /// Mounts what is left and looks at all of it. Gives what was done for that.
    fn recover(
        &self,
        image: &Image,
        moved: bool,
        recorded: bool,
        end: End,
        under_way: usize,
    ) -> Result<(Found, Vec<recorder::Op>), String> {
        let dir = directory();
        let numbers = image.put(dir.path(), moved);
        let shift = if moved { 1 << 41 } else { 0 };
        recorder::simulate(numbers);
        recorder::record(recorded);
        let result = (|| {
            let fs = mount(self.vault, dir.path(), self.plan.setup)?;
            let found = look(&fs, shift)?;
            self.model.check(&found, self.cut, under_way, end)?;
            // Sealed again, it reads the same.
            unmount(&fs)?;
            let trace = recorder::trace();
            recorder::record(false);
            kill(self.vault, fs);
            let fs = mount(self.vault, dir.path(), self.plan.setup)?;
            if look(&fs, shift)? != found {
                return Err("unmounted and mounted again, it reads otherwise".to_owned());
            }
            empty(&fs)?;
            unmount(&fs)?;
            kill(self.vault, fs);
            kill(self.vault, mount(self.vault, dir.path(), self.plan.setup)?);
            leftovers(dir.path())?;
            Ok((found, trace))
        })();
        recorder::end();
        result
    }
}

/// After everything was removed: nothing of ours is left but the root's header and the place for long symlinks.
fn leftovers(dir: &std::path::Path) -> Result<(), String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = names.filter(|name| name != "lethefs.dir" && name != "lethefs.overflow").collect();
    if left.is_empty() { Ok(()) } else { Err(format!("left over: {left:?}")) }
}

/// Workloads with these seeds, or the one that the environment asks for.
fn random_workloads(first: u64, usual: u64, order: Order) -> (Figures, Vec<String>) {
    let (seeds, states) = match number("LETHEFS_SIM_SEED") {
        Some(seed) => (seed..seed + 1, 8),
        None => (first..first + number("LETHEFS_SIM_WORKLOADS").unwrap_or(usual), 4),
    };
    let (states, second) = asked(states, OFTEN);
    let mut all = Figures::default();
    let mut violations = Vec::new();
    for seed in seeds {
        let (steps, setup) = random::workload(seed);
        match cut_everywhere(&steps, Plan { setup, seed, states, second, order }) {
            Ok(figures) => all += figures,
            Err(what) => violations.push(format!("LETHEFS_SIM_SEED={seed}: {what}\n{setup:?} {steps:?}")),
        }
    }
    println!("{order:?}: {all:?}, {} violations", violations.len());
    (all, violations)
}

fn none(violations: &[String]) {
    assert!(violations.is_empty(), "{}", violations.join("\n\n"));
}

#[test]
fn random_workloads_survive_every_cut() {
    none(&random_workloads(1, 15, Order::Journal).1);
}

#[test]
fn other_random_workloads_survive_every_cut() {
    none(&random_workloads(1_000_001, 15, Order::Journal).1);
}

/// Not every filesystem keeps the order between two directories. Where it only keeps that within each, and that of what is
/// done to one object, nothing is lost either.
#[test]
fn random_workloads_survive_cuts_that_mix_the_order_of_directories() {
    let order = Order::Directories { objects: true };
    let setup = Setup { logged: true, full: 32 << 20 };
    let plan = Plan { setup, seed: 1, states: 16, second: OFTEN, order };
    println!("{:?}", cut_everywhere(&directed::two_directories(), plan).unwrap());
    none(&random_workloads(2_000_001, 8, order).1);
}

/// What docs/FORMAT.md section 11 asks of the medium is needed: where a rename can be there without what was done to the
/// object before, a new directory may be there without its header.
#[test]
fn a_rename_without_what_was_done_before_it_would_lose_new_objects() {
    for step in [Do::Mkdir("a".into()), Do::Create("a".into())] {
        let setup = Setup { logged: true, full: 32 << 20 };
        let order = Order::Directories { objects: false };
        let found =
            cut_everywhere(std::slice::from_ref(&step), Plan { setup, seed: 1, states: 30, second: OFTEN, order });
        let lost = |what: String| what.contains("Header at");
        assert!(found.is_err_and(lost), "{step:?}");
    }
}

/// Workloads that were thought of, and those that found something.
fn directed_workloads(full: u64) {
    let mut all = Figures::default();
    let mut violations = Vec::new();
    let (states, second) = asked(4, OFTEN);
    for (name, steps) in directed::workloads() {
        let setup = Setup { logged: true, full };
        let plan = Plan { setup, seed: full, states, second, order: Order::Journal };
        match cut_everywhere(&steps, plan) {
            Ok(figures) => all += figures,
            Err(what) => violations.push(format!("{name}: {what}\n{steps:?}")),
        }
    }
    println!("{all:?}, {} violations", violations.len());
    none(&violations);
}

#[test]
fn directed_workloads_survive_every_cut() {
    directed_workloads(32 << 20);
}

#[test]
fn directed_workloads_survive_every_cut_with_a_log_that_is_soon_full() {
    directed_workloads(2048);
}

/// Each recovery is itself cut short, at many places: what is done again must still be about the same files.
#[test]
fn recoveries_that_are_cut_short_are_taken_up_again() {
    let mut all = Figures::default();
    let (states, second) = asked(8, Some((1, 6)));
    for (name, steps) in directed::recoveries() {
        let setup = Setup { logged: true, full: 32 << 20 };
        let plan = Plan { setup, seed: 35, states, second, order: Order::Journal };
        match cut_everywhere(&steps, plan) {
            Ok(figures) => all += figures,
            Err(what) => panic!("{name}: {what}\n{steps:?}"),
        }
    }
    println!("{all:?}, 0 violations");
}

/// The same workloads and cuts without the intent log: what the log is for. If this finds nothing, the others could not
/// fail either.
#[test]
fn without_the_log_the_same_cuts_lose_what_was_acknowledged() {
    let mut damaged = 0;
    for seed in 1..=20 {
        let (steps, setup) = random::workload(seed);
        let plan =
            Plan { setup: Setup { logged: false, ..setup }, seed, states: 4, second: OFTEN, order: Order::Journal };
        // Only what a cut did: a workload that fails by itself shows nothing.
        let found = cut_everywhere(&steps, plan).err();
        damaged += u64::from(found.is_some_and(|what| !what.contains("without a crash")));
    }
    println!("{damaged} of 20 workloads find damage");
    assert!(damaged > 5, "{damaged} of 20 workloads");
}
