//! How long the cluster was without a leader, by what was observed.

use std::{collections::BTreeMap, time::Duration};

use super::history::{Entry, Seen, Target};

/// After a fault of etcd's, for so long a leader's loss is not taken for his alone: its members may still elect one of
/// theirs, and that one gives each lease its full length again.
const SETTLES: Duration = Duration::from_secs(3);
/// A leader that did not end within this time after it was whole again has led on.
const FOLLOWS: Duration = Duration::from_secs(3);

/// From the fault that took a leader until another serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failover {
    pub(super) took: Duration,
    pub(super) fault: String,
    /// When the fault was.
    pub(super) at: Duration,
    /// Nothing else was at fault: neither a member of etcd nor all the others that could lead.
    pub(super) is_alone: bool,
}

/// When each target was at fault.
type Broken = BTreeMap<Target, Vec<(Duration, Duration)>>;

/// All of them, of so many brokers.
pub(super) fn failovers(entries: &[Entry], brokers: usize) -> Vec<Failover> {
    let broken = broken(entries);
    let mut found = Vec::new();
    let mut pending: Option<(usize, Duration, String, Option<Duration>)> = None;
    for Entry { at, seen } in entries {
        match seen {
            Seen::Struck { target: Target::Broker(number), fault, leads: true } => {
                pending = Some((*number, *at, fault.clone(), None));
            }
            Seen::Mended { target: Target::Broker(number) } => {
                if let Some((leader, _, _, whole)) = &mut pending
                    && *leader == *number
                {
                    *whole = Some(*at);
                }
            }
            Seen::Serves { .. } => {
                let Some((leader, since, fault, whole)) = pending.take() else { continue };
                if whole.is_some_and(|whole| *at > whole + FOLLOWS) {
                    continue;
                }
                let is_alone = is_alone(&broken, leader, brokers, since, *at);
                found.push(Failover { took: *at - since, fault, at: since, is_alone });
            }
            _ => {}
        }
    }
    found
}

fn broken(entries: &[Entry]) -> Broken {
    let mut broken = Broken::new();
    for Entry { at, seen } in entries {
        match seen {
            Seen::Struck { target, .. } => {
                broken.entry(*target).or_default().push((*at, Duration::MAX));
            }
            Seen::Mended { target } => {
                if let Some((_, until)) = broken.entry(*target).or_default().last_mut() {
                    *until = *at;
                }
            }
            _ => {}
        }
    }
    broken
}

fn is_alone(broken: &Broken, leader: usize, brokers: usize, since: Duration, until: Duration) -> bool {
    // One that was at fault a moment ago may still be starting.
    let begins = since.saturating_sub(SETTLES);
    let was_whole = |target: Target| {
        let times = broken.get(&target).map(Vec::as_slice).unwrap_or_default();
        times.iter().all(|(from, to)| *to < begins || *from > until)
    };
    let etcd_was = broken.keys().filter(|it| matches!(it, Target::Etcd(_))).all(|it| was_whole(*it));
    etcd_was && (0..brokers).any(|other| other != leader && was_whole(Target::Broker(other)))
}

/// The value below which so many percent of them are.
pub(super) fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(index).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn struck(target: Target, leads: bool) -> Seen {
        Seen::Struck { target, fault: "kill".into(), leads }
    }

    fn serves(by: &str) -> Seen {
        Seen::Serves { by: by.into() }
    }

    fn of(seen: Vec<(u64, Seen)>) -> Vec<(u64, bool)> {
        let entry = |(at, seen)| Entry { at: Duration::from_millis(at), seen };
        let entries: Vec<_> = seen.into_iter().map(entry).collect();
        let found = failovers(&entries, 3).into_iter();
        found.map(|it| (it.took.as_millis() as u64, it.is_alone)).collect()
    }

    #[test]
    fn a_failover_is_from_the_fault_to_the_next_that_serves() {
        let leader = || struck(Target::Broker(0), true);
        assert_eq!(of(vec![(0, serves("b0.1")), (9000, leader()), (11000, serves("b1.1"))]), [(2000, true)]);
        // A fault of one that does not lead is none, nor one that the leader outlives.
        let standby = struck(Target::Broker(1), false);
        assert_eq!(of(vec![(9000, standby), (11000, serves("b1.1"))]), []);
        let mended = Seen::Mended { target: Target::Broker(0) };
        assert_eq!(of(vec![(9000, leader()), (9100, mended.clone()), (19000, serves("b1.1"))]), []);
        // The last of two counts.
        let twice = vec![(1000, leader()), (1100, mended), (9000, leader()), (11500, serves("b1.1"))];
        assert_eq!(of(twice), [(2500, true)]);
    }

    #[test]
    fn what_else_was_at_fault_is_told() {
        let leader = || struck(Target::Broker(0), true);
        let etcd = |at| (at, struck(Target::Etcd(2), false));
        let mended = |at| (at, Seen::Mended { target: Target::Etcd(2) });
        let end = || [(9000, leader()), (11000, serves("b1.1"))];
        let with = |more: Vec<(u64, Seen)>| of(more.into_iter().chain(end()).collect());
        assert_eq!(with(vec![etcd(1000)]), [(2000, false)]);
        assert_eq!(with(vec![etcd(1000), mended(2000)]), [(2000, true)]);
        assert_eq!(with(vec![etcd(1000), mended(7000)]), [(2000, false)]);
        let standby = |number| (8000, struck(Target::Broker(number), false));
        assert_eq!(with(vec![standby(1)]), [(2000, true)]);
        assert_eq!(with(vec![standby(1), standby(2)]), [(2000, false)]);
    }

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let sorted: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile(&sorted, 50), Some(Duration::from_millis(100)));
        assert_eq!(percentile(&sorted, 99), Some(Duration::from_millis(198)));
        assert_eq!(percentile(&sorted, 100), Some(Duration::from_millis(200)));
        assert_eq!(percentile(&[], 50), None);
    }
}
