//! Which renewals are recorded: a record for each, every five seconds, would be noise that hides the rest.

use std::time::Duration;

use super::Event;

/// A steady state is recorded this often.
const STEADY: Duration = Duration::from_secs(3600);

/// Counts renewals, and says when to record: the first, every change of outcome (with the count of what went before), and the
/// count once an hour. Pure; the time is the caller's, since any fixed moment.
#[derive(Debug, Default)]
pub struct Renewals {
    /// What is going on, since when it is counted, how many were.
    run: Option<(String, Duration, u64)>,
}

impl Renewals {
    /// One renewal of `slot` at `now`: `outcome` is `ok` or the class of the failure. The events to record, oldest first.
    pub fn note(&mut self, now: Duration, slot: u32, outcome: &str, request_id: Option<String>) -> Vec<Event> {
        let renew =
            |outcome: &str, count, request_id| Event::Renew { slot, outcome: outcome.into(), count, request_id };
        match &mut self.run {
            Some((running, since, count)) if running == outcome => {
                *count += 1;
                if now.saturating_sub(*since) < STEADY {
                    return Vec::new();
                }
                let counted = std::mem::take(count);
                *since = now;
                vec![renew(outcome, counted, request_id)]
            }
            running => {
                let before = running.replace((outcome.to_owned(), now, 0));
                let before = before.filter(|(_, _, count)| *count > 0);
                let mut events: Vec<Event> =
                    before.map(|(outcome, _, count)| renew(&outcome, count, None)).into_iter().collect();
                events.push(renew(outcome, 1, request_id));
                events
            }
        }
    }

    /// What is counted and not recorded yet, for the end of a mount.
    pub fn rest(&mut self, slot: u32) -> Option<Event> {
        let (outcome, _, count) = self.run.take()?;
        (count > 0).then_some(Event::Renew { slot, outcome, count, request_id: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_recorded_twice_and_every_renewal_is_counted() {
        let mut renewals = Renewals::default();
        let (mut records, mut counted) = (0, 0);
        let mut take = |events: Vec<Event>| {
            for event in events {
                let Event::Renew { count, .. } = event else { panic!("another event") };
                (records, counted) = (records + 1, counted + count);
            }
        };
        // A day at five seconds each, with an outage in it.
        for n in 0..17_280_u64 {
            let outcome = if (5000..5010).contains(&n) { "unreachable" } else { "ok" };
            take(renewals.note(Duration::from_secs(n * 5), 1, outcome, None));
        }
        take(renewals.rest(1).into_iter().collect());
        assert_eq!(counted, 17_280);
        assert!((24..=32).contains(&records), "{records}");
        assert!(renewals.rest(1).is_none());
    }
}
