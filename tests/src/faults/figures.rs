//! How long the cluster was without a leader, by what was observed.

use std::{collections::BTreeMap, time::Duration};

use super::history::{Entry, Seen, Target};

/// After a fault of etcd's, for so long a leader's loss is not taken for his alone: its members may still elect one of
/// theirs, and that one gives each lease its full length again.
const SETTLES: Duration = Duration::from_secs(3);
/// One that was killed is started again by then.
const STARTS: Duration = Duration::from_secs(2);
/// A leader that did not end within this time after it was whole again has led on.
const FOLLOWS: Duration = Duration::from_secs(3);

/// From the fault that took a leader until another serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failover {
    pub(super) took: Duration,
    pub(super) fault: String,
    /// When the fault was.
    pub(super) at: Duration,
    pub(super) beside: Beside,
}

/// What else was at fault, and might keep another from leading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Beside {
    /// At least one other broker was whole, and so was etcd.
    Nothing,
    /// So it was, but for one member of etcd.
    OneMember,
    /// More of etcd, or all other brokers.
    More,
}

impl Beside {
    pub(super) const ALL: [Beside; 3] = [Beside::Nothing, Beside::OneMember, Beside::More];

    pub(super) fn text(self) -> &'static str {
        match self {
            Beside::Nothing => "with nothing else at fault",
            Beside::OneMember => "with one member of etcd at fault",
            Beside::More => "with more of etcd at fault, or all other brokers",
        }
    }
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
                let beside = beside(&broken, leader, brokers, since, *at);
                found.push(Failover { took: *at - since, fault, at: since, beside });
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

fn beside(broken: &Broken, leader: usize, brokers: usize, since: Duration, until: Duration) -> Beside {
    let was_whole = |target: &Target| {
        let settles = if matches!(target, Target::Etcd(_)) { SETTLES } else { STARTS };
        let begins = since.saturating_sub(settles);
        let times = broken.get(target).map(Vec::as_slice).unwrap_or_default();
        times.iter().all(|(from, to)| *to < begins || *from > until)
    };
    let members = broken.keys().filter(|it| matches!(it, Target::Etcd(_)) && !was_whole(it)).count();
    let has_other = (0..brokers).any(|other| other != leader && was_whole(&Target::Broker(other)));
    match members {
        0 if has_other => Beside::Nothing,
        1 if has_other => Beside::OneMember,
        _ => Beside::More,
    }
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

    fn of(seen: Vec<(u64, Seen)>) -> Vec<(u64, Beside)> {
        let entry = |(at, seen)| Entry { at: Duration::from_millis(at), seen };
        let entries: Vec<_> = seen.into_iter().map(entry).collect();
        let found = failovers(&entries, 3).into_iter();
        found.map(|it| (it.took.as_millis() as u64, it.beside)).collect()
    }

    #[test]
    fn a_failover_is_from_the_fault_to_the_next_that_serves() {
        let leader = || struck(Target::Broker(0), true);
        assert_eq!(
            of(vec![(0, serves("b0.1")), (9000, leader()), (11000, serves("b1.1"))]),
            [(2000, Beside::Nothing)]
        );
        // A fault of one that does not lead is none, nor one that the leader outlives.
        let standby = struck(Target::Broker(1), false);
        assert_eq!(of(vec![(9000, standby), (11000, serves("b1.1"))]), []);
        let mended = Seen::Mended { target: Target::Broker(0) };
        assert_eq!(of(vec![(9000, leader()), (9100, mended.clone()), (19000, serves("b1.1"))]), []);
        // The last of two counts.
        let twice = vec![(1000, leader()), (1100, mended), (9000, leader()), (11500, serves("b1.1"))];
        assert_eq!(of(twice), [(2500, Beside::Nothing)]);
    }

    #[test]
    fn what_else_was_at_fault_is_told() {
        let leader = || struck(Target::Broker(0), true);
        let etcd = |at| (at, struck(Target::Etcd(2), false));
        let mended = |at| (at, Seen::Mended { target: Target::Etcd(2) });
        let end = || [(9000, leader()), (11000, serves("b1.1"))];
        let with = |more: Vec<(u64, Seen)>| of(more.into_iter().chain(end()).collect());
        assert_eq!(with(vec![etcd(1000)]), [(2000, Beside::OneMember)]);
        let other = (8000, struck(Target::Etcd(0), false));
        assert_eq!(with(vec![etcd(1000), other]), [(2000, Beside::More)]);
        assert_eq!(with(vec![etcd(1000), mended(2000)]), [(2000, Beside::Nothing)]);
        assert_eq!(with(vec![etcd(1000), mended(7000)]), [(2000, Beside::OneMember)]);
        let standby = |number| (8000, struck(Target::Broker(number), false));
        assert_eq!(with(vec![standby(1)]), [(2000, Beside::Nothing)]);
        assert_eq!(with(vec![standby(1), standby(2)]), [(2000, Beside::More)]);
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
