//! What policies with an eviction threshold do for the tasks that they cover. (Which those are, where
//! several want to act for one task, [`crate::policy`] says: each task has one policy that acts for it.)
//!
//! The threshold is on the CPU utilisation of the node, averaged over the window of the policy. To reach
//! it only **arms** the policy: a busy node is a good node. It **acts** while, besides, a task that it
//! covers is short, that is, wants more than it has and cannot be given more; or waits for this node.
//! Then, in the namespace of the policy:
//!
//! 1. **Press.** All tasks of lower priority are held at their requests until those that are covered have
//!    what they need. This needs no permission: a request is all that was ever promised.
//! 2. **Evict.** If somebody is still short after a whole window of that, and the policy may preempt, one
//!    task is ended: of the lowest priority, and there the youngest. Then it looks again, after another
//!    whole window. On the whole node there is one eviction a window at most; and while an evicted task
//!    has not left, so that what it holds is not free, it is asked to leave again instead of another one.
//!
//! ```text
//!  ├─────── window ───────┼─────── window ───────┼─────── window ───────┤
//!  busy                   press                  evict one, if          evict another, if
//!  somebody is short                             still short            still short
//! ```
//!
//! The pressure ends when it is no longer needed: when, without it, everybody whom the policy covers would
//! have what they need. It does not end when the threshold is no longer reached, for pressure itself
//! may lower utilisation; the node would swing between the two.
//!
//! What follows from these rules: a lone batch task that uses the whole node is never touched, for nobody is
//! short. Neither is a task of equal or higher priority, of another namespace, or unmanaged.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
};

use super::{CPU, Move, Observation, Seat, reason};
use crate::{id::ExecutionId, spec::Policy};

/// A window shorter than this is taken as this: no remedy shows sooner.
const WINDOW_MIN_NS: u64 = 1_000_000_000;
/// A window longer than this is taken as this, which bounds what is remembered.
const WINDOW_MAX_NS: u64 = 3_600_000_000_000;

/// A policy's name and namespace.
type Key = (String, String);

#[derive(Clone, Debug, Default)]
pub(super) struct Pressure {
    states: BTreeMap<Key, State>,
    load: Load,
    last_eviction: Option<u64>,
    leaving: BTreeSet<ExecutionId>,
}

#[derive(Clone, Debug, Default)]
struct State {
    /// While it acts: how busy the node was when that began, in thousandths.
    acts_since_busy: Option<u64>,
    /// Since when somebody has been short in spite of the pressure, without a break.
    short_since: Option<u64>,
    /// When it was last said that nothing helps, or would have been.
    stuck_at: Option<u64>,
}

/// A policy that acts, at this step. Indices are those of the seats.
#[derive(Debug)]
pub(super) struct Acting<'a> {
    pub(super) policy: &'a Policy,
    /// How busy the node was when it began to act, in thousandths.
    pub(super) busy_permille: u64,
    /// Those that are pressed.
    pub(super) below: BTreeSet<usize>,
    /// Those for whom it acts.
    pub(super) covered: Vec<usize>,
    /// Whether one of those waits elsewhere.
    pub(super) waiting: bool,
    is_armed: bool,
}

impl Pressure {
    /// Takes note of what the node did since the last step.
    pub(super) fn observe(&mut self, observation: &Observation<'_>, now: u64, elapsed: u64) {
        let windows = observation.policies.iter().map(|policy| window_ns(policy.policy));
        self.load.record(observation.cpu_used.0, now, elapsed, windows.max().unwrap_or(0));
        let present: BTreeSet<&ExecutionId> = observation.tasks.iter().map(|task| task.execution).collect();
        self.leaving.retain(|execution| present.contains(execution));
        let in_force: BTreeSet<Key> = observation.policies.iter().map(|policy| key(policy.policy)).collect();
        self.states.retain(|key, _| in_force.contains(key));
    }

    /// Which policies act, given what everybody would get without them.
    pub(super) fn press<'a>(
        &mut self,
        observation: &Observation<'a>,
        seats: &[Seat<'_>],
        plain: &[u64],
        now: u64,
    ) -> Vec<Acting<'a>> {
        let mut acting = Vec::new();
        for in_force in observation.policies {
            let policy = in_force.policy;
            let Some(threshold) = policy.eviction_threshold_permille else { continue };
            let state = self.states.entry(key(policy)).or_default();
            let busy = self.load.permille(window_ns(policy), now, observation.cpu.0);
            let is_armed = busy.is_some_and(|busy| busy >= threshold.into());
            let among = |which: &dyn Fn(&Seat<'_>) -> bool| -> Vec<usize> {
                let ours = |seat: &Seat<'_>| seat.task.managed && seat.task.namespace == policy.namespace;
                (0..seats.len()).filter(|index| ours(&seats[*index]) && which(&seats[*index])).collect()
            };
            let covered = among(&|seat| seat.task.policy == Some(policy.policy_name.as_str()));
            let lacks = |index: &&usize| lacks(&seats[**index], plain[**index]);
            let begins = in_force.waiting || covered.iter().filter(lacks).any(|index| seats[*index].is_short);
            let goes_on = in_force.waiting || covered.iter().any(|index| lacks(&index));
            state.acts_since_busy = match state.acts_since_busy {
                None if is_armed && begins => busy,
                Some(busy) if goes_on => Some(busy),
                _ => None,
            };
            if let Some(busy_permille) = state.acts_since_busy {
                let below = among(&|seat| seat.task.priority < policy.priority).into_iter().collect();
                let waiting = in_force.waiting;
                acting.push(Acting { policy, busy_permille, below, covered, is_armed, waiting });
            } else {
                state.short_since = None;
            }
        }
        acting
    }

    /// Whether pressure is not enough, given what everybody gets with it.
    pub(super) fn judge(
        &mut self,
        acting: &[Acting<'_>],
        seats: &[Seat<'_>],
        targets: &[u64],
        now: u64,
    ) -> Vec<Move> {
        let mut moves = Vec::new();
        for Acting { policy, below, covered, is_armed, waiting, .. } in acting {
            let state = self.states.entry(key(policy)).or_default();
            let window = window_ns(policy);
            let short = (covered.iter())
                .map(|index| (&seats[*index], targets[*index]))
                .filter(|(seat, target)| seat.is_short && lacks(seat, *target))
                .max_by_key(|(seat, target)| (seat.need.abs_diff(*target), Reverse(seat.task.execution)));
            if !is_armed || (short.is_none() && !waiting) {
                state.short_since = None;
                continue;
            }
            let since = *state.short_since.get_or_insert(now);
            let is_due = [Some(since), self.last_eviction]
                .iter()
                .flatten()
                .all(|at| now.saturating_sub(*at) >= window);
            let whom = reason::in_need(short.map(|(seat, _)| seat));

            let stuck = if below.is_empty() {
                Some("no task of lower priority can be moved in its namespace")
            } else if is_due && !policy.preemption_enabled {
                Some(
                    "the tasks of lower priority are held at their requests already, and the policy may not preempt",
                )
            } else {
                None
            };
            if let Some(why) = stuck {
                let said = state.stuck_at.replace(now);
                if said.is_none_or(|at| now.saturating_sub(at) > window) {
                    let policy = policy.policy_name.clone();
                    moves.push(Move::Stuck { policy, reason: format!("{whom}, but {why}") });
                }
            } else if is_due && let Some(victim) = victim(below, seats, &self.leaving) {
                self.last_eviction = Some(now);
                self.leaving.insert(victim.task.execution.clone());
                moves.push(Move::Evict {
                    execution: victim.task.execution.clone(),
                    reason: reason::evicted(policy, &whom, victim),
                });
            }
        }
        moves
    }
}

/// Whoever has to go: the one that should be gone already, else the youngest of the lowest priority.
fn victim<'s, 't>(
    below: &BTreeSet<usize>,
    seats: &'s [Seat<'t>],
    leaving: &BTreeSet<ExecutionId>,
) -> Option<&'s Seat<'t>> {
    below.iter().map(|index| &seats[*index]).min_by_key(|seat| {
        let task = seat.task;
        (!leaving.contains(task.execution), task.priority, Reverse(task.started_at), task.execution)
    })
}

/// Whether a grant would leave a task without something that it needs.
fn lacks(seat: &Seat<'_>, grant: u64) -> bool {
    grant < seat.need && CPU.is_worth(grant, seat.need)
}

fn key(policy: &Policy) -> Key {
    (policy.namespace.clone(), policy.policy_name.clone())
}

fn window_ns(policy: &Policy) -> u64 {
    policy.window_millis.saturating_mul(1_000_000).clamp(WINDOW_MIN_NS, WINDOW_MAX_NS)
}

/// The CPU time of the node: its running sum at each step, so that an average over any window is the
/// difference of two of them.
#[derive(Clone, Debug, Default)]
struct Load {
    /// Time, ns, and CPU time until then, millicores × ns.
    sums: VecDeque<(u64, u128)>,
}

impl Load {
    fn record(&mut self, used: u64, now: u64, elapsed: u64, longest: u64) {
        let before = self.sums.back().map_or(0, |(_, sum)| *sum);
        self.sums.push_back((now, before.saturating_add(u128::from(used) * u128::from(elapsed))));
        // The last one at or before the beginning of the longest window stays.
        let begin = now.saturating_sub(longest);
        while self.sums.get(1).is_some_and(|(at, _)| *at <= begin) {
            self.sums.pop_front();
        }
    }

    /// The average over the window until now, in thousandths of the capacity; `None` while less than a
    /// window has been seen.
    fn permille(&self, window: u64, now: u64, capacity: u64) -> Option<u64> {
        let begin = now.checked_sub(window)?;
        let index = self.sums.partition_point(|(at, _)| *at <= begin).checked_sub(1)?;
        let ((from, before), (until, sum)) = (self.sums.get(index)?, self.sums.back()?);
        let average = (sum - before).checked_div((until - from).into())?;
        let permille = average.saturating_mul(1000).checked_div(capacity.into())?;
        Some(u64::try_from(permille).unwrap_or(u64::MAX))
    }
}
