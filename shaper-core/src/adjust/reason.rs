//! Changed grants as moves, with the reason in words: what was seen, in numbers, and who gains by it.

use super::{CPU, GrantKind, Move, Resource, Seat, arrange::Next, pressure::Acting};
use crate::{limits::LimitsChange, spec::Policy};

/// One resource, after its step has been arranged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'a> {
    pub(super) resource: Resource,
    pub(super) capacity: u64,
    pub(super) seats: &'a [Seat<'a>],
    pub(super) next: &'a [Next],
    pub(super) acting: &'a [Acting<'a>],
}

impl Table<'_> {
    /// A move for each grant that changes.
    pub(super) fn moves(&self, change: impl Fn(u64) -> LimitsChange) -> Vec<Move> {
        let changed = (self.seats.iter().zip(self.next).enumerate())
            .filter(|(_, (seat, next))| seat.task.managed && seat.current != next.grant);
        changed
            .map(|(index, (seat, next))| {
                let (kind, reason) = match next.grant > seat.current {
                    true => (GrantKind::Grew, self.grew(seat)),
                    false => (GrantKind::Shrunk, self.shrunk(index)),
                };
                Move::Grant {
                    execution: seat.task.execution.clone(),
                    change: change(next.grant),
                    kind,
                    reason,
                }
            })
            .collect()
    }

    fn grew(&self, seat: &Seat<'_>) -> String {
        if seat.current < seat.floor {
            return format!("is raised towards its request, {}", self.shown(seat.floor));
        }
        let usage = usage(self.resource, seat);
        let held = self.seats.iter().map(|seat| match seat.task.managed {
            true => u128::from(seat.current.min(seat.ceiling)),
            false => u128::from(seat.used),
        });
        let free = u128::from(self.capacity).saturating_sub(held.sum());
        match u64::try_from(free).unwrap_or(u64::MAX) {
            free if free < self.resource.least_change => format!("{usage}; others make room"),
            free => format!("{usage}; {} {} free", self.shown(free), self.are(free)),
        }
    }

    fn shrunk(&self, index: usize) -> String {
        let (seat, next) = (&self.seats[index], &self.next[index]);
        if seat.current == u64::MAX {
            let used = self.shown(seat.used);
            return format!("was not limited and uses {used}; what it does not need is for all");
        }
        if seat.current > seat.ceiling {
            return format!("may have at most {}", self.shown(seat.ceiling));
        }
        if let Some(acting) = self.acting.iter().find(|acting| acting.below.contains(&index)) {
            return self.pressed(seat, acting);
        }
        if next.for_guarantee {
            let below = self.seats.iter().find(|other| other.task.managed && other.current < other.floor);
            return match below {
                Some(other) => format!(
                    "makes room for the request of `{}` ({}), {}",
                    other.task.execution,
                    other.task.priority,
                    self.shown(other.floor)
                ),
                None => format!("more was granted than there is, {}", self.shown(self.capacity)),
            };
        }
        if seat.desired() < seat.current {
            return format!("{}; it does not need that much", usage(self.resource, seat));
        }
        let gain = |seat: &Seat<'_>, next: &Next| next.grant.saturating_sub(seat.current);
        let gainer = (self.seats.iter().zip(self.next))
            .filter(|(other, _)| other.task.managed && other.current < other.desired())
            .max_by_key(|(other, next)| (gain(other, next), other.desired() - other.current));
        match gainer {
            Some((other, _)) => format!(
                "makes room for `{}` ({}), which {}",
                other.task.execution,
                other.task.priority,
                usage(self.resource, other)
            ),
            None => "makes room for others".to_owned(),
        }
    }

    fn pressed(&self, seat: &Seat<'_>, acting: &Acting<'_>) -> String {
        let covered = acting.covered.iter().map(|index| &self.seats[*index]);
        let whom = covered.max_by_key(|seat| seat.need.saturating_sub(seat.current));
        format!(
            "policy `{}`: the node was {} busy over {} (threshold {}), and {}; goes down towards its request, {}",
            acting.policy.policy_name,
            percent(acting.busy_permille),
            seconds(acting.policy.window_millis),
            percent(acting.policy.eviction_threshold_permille.unwrap_or(0).into()),
            if acting.waiting { in_need(None) } else { in_need(whom) },
            self.shown(seat.floor)
        )
    }

    fn shown(&self, amount: u64) -> String {
        (self.resource.show)(amount).0
    }

    fn are(&self, amount: u64) -> &'static str {
        if self.shown(amount) == "1 core" { "is" } else { "are" }
    }
}

/// Who it is that needs more; `None`: one that is not here yet.
pub(super) fn in_need(seat: Option<&Seat<'_>>) -> String {
    seat.map_or("a task that it covers waits for this node".to_owned(), |seat| {
        format!("`{}` ({}) {}", seat.task.execution, seat.task.priority, usage(CPU, seat))
    })
}

pub(super) fn evicted(policy: &Policy, whom: &str, victim: &Seat<'_>) -> String {
    format!(
        "policy `{}`: {whom}, and for {} nothing was left to take but the requests of lower tasks; \
         of those it is the youngest of the lowest priority ({})",
        policy.policy_name,
        seconds(policy.window_millis),
        victim.task.priority
    )
}

/// `uses 0.98 of 1 core and is throttled 40 % of the time`.
fn usage(resource: Resource, seat: &Seat<'_>) -> String {
    let ((used, bare), (grant, _)) = ((resource.show)(seat.used), (resource.show)(seat.current));
    let uses = match seat.current {
        u64::MAX => format!("uses {used}"),
        _ => format!("uses {bare} of {grant}"),
    };
    match seat.throttled_permille {
        Some(permille) if permille >= 10 => {
            format!("{uses} and is throttled {} of the time", percent(permille.min(1000).into()))
        }
        _ => uses,
    }
}

fn percent(permille: u64) -> String {
    format!("{} %", permille / 10)
}

fn seconds(millis: u64) -> String {
    match millis % 1000 {
        0 => format!("{} s", millis / 1000),
        _ => format!("{millis} ms"),
    }
}
