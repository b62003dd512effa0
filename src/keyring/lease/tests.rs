use proptest::prelude::*;

use super::*;

const TERMS: Terms =
    Terms { interval: Duration::from_secs(5), patience: Duration::from_secs(3), grace: Duration::from_secs(60) };

fn s(seconds: u64) -> Tick {
    Duration::from_secs(seconds)
}

#[test]
fn an_outage_is_ridden_out_for_as_long_as_the_grace_and_then_sealed_in_order() {
    let mut lease = Lease::new(TERMS, s(100));
    assert_eq!((lease.next(), lease.deadline()), (Some(s(105)), Some(s(108))));
    assert_eq!(lease.heard(s(105), s(108), Answer::Nothing, 0.0), None);
    assert_eq!((lease.state(), lease.next(), lease.deadline()), (State::Grace, Some(s(113)), Some(s(168))));
    assert_eq!(lease.passed(s(167)), None);
    assert_eq!(lease.passed(s(168)), Some(Action::Drain));
    assert_eq!((lease.state(), lease.passed(s(500))), (State::Expired, None), "once");
    assert_eq!(lease.heard(s(600), s(601), Answer::Proved, 0.0), Some(Action::Resume));
    assert_eq!((lease.state(), lease.deadline()), (State::Active, Some(s(608))));
}

#[test]
fn an_answer_within_the_grace_ends_it() {
    let mut lease = Lease::new(TERMS, s(0));
    assert_eq!(lease.passed(s(8)), None);
    assert_eq!(lease.state(), State::Grace);
    assert_eq!(lease.heard(s(30), s(31), Answer::Proved, 1.0), None);
    assert_eq!((lease.state(), lease.next(), lease.deadline()), (State::Active, Some(s(34)), Some(s(38))));
}

#[test]
fn without_a_grace_the_end_of_the_lease_is_the_end() {
    let mut lease = Lease::new(Terms { grace: Duration::ZERO, ..TERMS }, s(0));
    assert_eq!(lease.heard(s(5), s(6), Answer::Nothing, 0.0), None, "the lease itself still runs");
    assert_eq!(lease.passed(s(8)), Some(Action::Drain));
}

#[test]
fn refused_is_at_once_and_may_come_back_destroyed_never_does() {
    let mut lease = Lease::new(TERMS, s(0));
    assert_eq!(lease.heard(s(5), s(5), Answer::Refused, 0.0), Some(Action::Wipe));
    assert_eq!(lease.heard(s(10), s(10), Answer::Refused, 0.0), None, "sealed already");
    assert_eq!(lease.heard(s(20), s(20), Answer::Proved, 0.0), Some(Action::Resume));
    lease.not_resumed(s(21));
    assert_eq!(lease.state(), State::Revoked);
    assert_eq!(lease.heard(s(30), s(30), Answer::Proved, 0.0), Some(Action::Resume));
    assert_eq!(lease.heard(s(35), s(35), Answer::Destroyed, 0.0), Some(Action::Wipe));
    assert_eq!(lease.heard(s(40), s(40), Answer::Proved, 0.0), None);
    lease.release(s(41));
    assert_eq!(lease.heard(s(41), s(41), Answer::Proved, 0.0), None);
    assert_eq!((lease.state(), lease.next()), (State::Destroyed, None));
}

#[test]
fn a_seal_on_request_lasts_until_it_is_released() {
    let mut lease = Lease::new(TERMS, s(0));
    assert_eq!(lease.hold(), Some(Action::Wipe));
    assert_eq!(lease.heard(s(5), s(5), Answer::Proved, 0.0), None, "asked before it was held");
    assert_eq!(lease.heard(s(6), s(6), Answer::Refused, 0.0), None);
    assert_eq!((lease.state(), lease.next()), (State::Held, None));
    lease.release(s(50));
    assert_eq!(lease.next(), Some(s(50)));
    assert_eq!(lease.heard(s(50), s(51), Answer::Proved, 0.0), Some(Action::Resume));
}

#[test]
fn an_attempt_that_was_asked_for_is_not_put_off_by_one_under_way() {
    let mut lease = Lease::new(TERMS, s(0));
    lease.hold();
    lease.release(s(50));
    // Begun before; it finds the key refused, as it was then.
    assert_eq!(lease.heard(s(49), s(51), Answer::Refused, 0.0), None);
    assert_eq!(lease.next(), Some(s(50)), "at once");
    assert_eq!(lease.heard(s(51), s(52), Answer::Proved, 0.0), Some(Action::Resume));
    assert_eq!(lease.next(), Some(s(56)));
}

#[test]
fn a_proof_that_was_on_its_way_for_too_long_opens_nothing() {
    let mut lease = Lease::new(TERMS, s(0));
    assert_eq!(lease.passed(s(68)), Some(Action::Drain));
    assert_eq!(lease.heard(s(5), s(70), Answer::Proved, 0.0), None);
    assert_eq!(lease.state(), State::Expired);
    let mut lease = Lease::new(TERMS, s(0));
    assert_eq!(lease.heard(s(5), s(20), Answer::Proved, 0.0), None);
    assert_eq!((lease.state(), lease.deadline()), (State::Grace, Some(s(73))), "it counts from when it was asked");
}

#[test]
fn while_sealed_it_asks_as_often_as_before() {
    let mut lease = Lease::new(TERMS, s(0));
    for n in 1..20 {
        lease.heard(s(5 * n), s(5 * n), if n % 2 == 0 { Answer::Refused } else { Answer::Nothing }, 0.0);
        assert_eq!(lease.next(), Some(s(5 * n + 5)));
    }
}

#[derive(Clone, Debug)]
enum Event {
    Heard { took: u64, answer: Answer },
    Passed,
    Hold,
    Release,
    NotResumed,
}

fn event() -> impl Strategy<Value = Event> {
    let answer = prop_oneof![
        6 => Just(Answer::Proved),
        6 => Just(Answer::Nothing),
        2 => Just(Answer::Refused),
        1 => Just(Answer::Destroyed),
    ];
    prop_oneof![
        8 => (0..20_u64, answer).prop_map(|(took, answer)| Event::Heard { took, answer }),
        4 => Just(Event::Passed),
        1 => Just(Event::Hold),
        1 => Just(Event::Release),
        1 => Just(Event::NotResumed),
    ]
}

proptest! {
    /// Whatever happens in whatever order: keys are used only within the terms of a proof, what closes says so once, a
    /// refusal closes, and nothing but a proof opens.
    #[test]
    fn keys_serve_only_on_a_proof(grace in 0..100_u64, events in prop::collection::vec((0..40_u64, event()), 1..80)) {
        let terms = Terms { grace: s(grace), ..TERMS };
        let mut now = s(1000);
        let mut lease = Lease::new(terms, now);
        let (mut proof, mut open, mut ended) = (now, true, false);
        for (later, event) in events {
            now += s(later);
            let mut proved = false;
            let action = match event {
                Event::Heard { took, answer } => {
                    let asked = now.saturating_sub(s(took));
                    let before = lease.state();
                    proved = answer == Answer::Proved;
                    if proved && before.serves() {
                        proof = proof.max(asked);
                    }
                    let action = lease.heard(asked, now, answer, 0.5);
                    if action == Some(Action::Resume) {
                        proof = asked;
                    }
                    if answer == Answer::Refused || answer == Answer::Destroyed {
                        prop_assert!(!lease.state().serves());
                    }
                    ended |= answer == Answer::Destroyed;
                    action
                }
                Event::Passed => lease.passed(now),
                Event::Hold => lease.hold(),
                Event::Release => { lease.release(now); None }
                Event::NotResumed => { lease.not_resumed(now); open = false; None }
            };
            match action {
                Some(Action::Resume) => {
                    prop_assert!(!open && proved && !ended);
                    open = true;
                }
                Some(Action::Wipe | Action::Drain) => {
                    prop_assert!(open);
                    open = false;
                }
                None => {}
            }
            prop_assert_eq!(open, lease.state().serves(), "{:?}", lease);
            // A caller that heeds the deadline never serves beyond it.
            if let Some(deadline) = lease.deadline() {
                prop_assert!(deadline <= proof + terms.longest());
                prop_assert!(open);
            }
            prop_assert!(!(ended && open));
        }
    }
}
