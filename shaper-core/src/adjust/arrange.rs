//! From what is in force to what should be, without ever being over capacity on the way.
//!
//! Targets add up to no more than the capacity, but a step rarely reaches them: a change that is mere
//! noise is not made, and a CPU limit is lowered by a quarter at most. So the step is arranged in this
//! order:
//!
//! 1. **Takes**, as large as they should be, and gentle.
//! 2. **Takes for gives.** Where those do not make room for the gives that are worth making, even little is
//!    taken. Were it left as noise, ten tasks that each have a bit too much could keep one from growing.
//! 3. **Takes for guarantees.** If somebody's floor still finds no room, what is lacking is taken at
//!    once, however much that is.
//! 4. **Gives**, out of the room that there really is, divided like everything else. A task that is short
//!    gets even the last few percent; otherwise it would be throttled for ever beside free capacity.
//!
//! In 2 and 3 just what is lacking is taken, from the lowest priority first, and there from whoever has most
//! beyond its target.

use std::cmp::Reverse;

use super::{Resource, Seat, weight};
use crate::{limits::Limit, share, share::Claim};

/// What a seat may use after this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Next {
    pub(super) grant: u64,
    /// Whether somebody's guarantee made it shrink more than it would have.
    pub(super) for_guarantee: bool,
}

/// One for each seat; for an unmanaged one, what it has.
pub(super) fn arrange(resource: Resource, capacity: u64, seats: &[Seat<'_>], targets: &[u64]) -> Vec<Next> {
    let mut step = Step { resource, seats, targets, next: Vec::with_capacity(seats.len()) };
    for (seat, target) in seats.iter().zip(targets) {
        // Above an explicit limit, or not limited at all: that is put right at once.
        let has = seat.current.min(seat.ceiling);
        let worth = resource.is_worth(has, *target);
        let grant = if *target < has && worth { step.gently(has, *target) } else { has };
        step.next.push(Next { grant, for_guarantee: false });
    }

    let wanted = step.total(|index, grant| match step.is_worth_giving(index, targets[index]) {
        true => targets[index],
        false => grant,
    });
    step.take(wanted.saturating_sub(capacity.into()), false);

    for ((seat, target), next) in seats.iter().zip(targets).zip(&mut step.next) {
        next.grant = next.grant.max(seat.floor.min(*target));
    }
    let guaranteed = step.total(|_, grant| grant);
    step.take(guaranteed.saturating_sub(capacity.into()), true);

    step.give(capacity);
    step.next
}

struct Step<'a> {
    resource: Resource,
    seats: &'a [Seat<'a>],
    targets: &'a [u64],
    next: Vec<Next>,
}

impl Step<'_> {
    fn is_managed(&self, index: usize) -> bool {
        self.seats[index].task.managed
    }

    /// How far down a grant may go for a target, if no guarantee is at stake.
    fn gently(&self, grant: u64, target: u64) -> u64 {
        if self.resource.gentle { target.max(grant - grant / 4) } else { target }
    }

    /// Whether `to` is more than it has, and not for nothing.
    fn is_worth_giving(&self, index: usize, to: u64) -> bool {
        let (seat, has) = (&self.seats[index], self.next[index].grant);
        match seat.is_short {
            true => to > has && (to == seat.ceiling || to - has >= self.resource.least_change),
            false => to > has && self.resource.is_worth(has, to),
        }
    }

    /// What `of` makes of the managed grants, and what is kept for the unmanaged: their floor, which
    /// does not change from sample to sample as their use does.
    fn total(&self, of: impl Fn(usize, u64) -> u64) -> u128 {
        let kept = self.next.iter().enumerate().map(|(index, next)| match self.is_managed(index) {
            true => of(index, next.grant),
            false => self.seats[index].floor.min(self.targets[index]),
        });
        kept.map(u128::from).sum()
    }

    /// Takes what is lacking from those that have more than they should.
    fn take(&mut self, mut lacking: u128, for_guarantee: bool) {
        if lacking == 0 {
            return;
        }
        let lowest = |step: &Self, index: usize| match for_guarantee {
            true => step.targets[index],
            // Gentle with respect to what the task has now, not to what a take of this step left.
            false => {
                step.gently(step.seats[index].current.min(step.seats[index].ceiling), step.targets[index])
            }
        };
        let mut givers: Vec<(usize, u64)> = (0..self.seats.len())
            .filter(|index| self.is_managed(*index))
            .map(|index| (index, self.next[index].grant.saturating_sub(lowest(self, index))))
            .filter(|(_, spare)| *spare > 0)
            .collect();
        givers.sort_by_key(|(index, spare)| {
            let task = self.seats[*index].task;
            (task.priority, Reverse(*spare), task.execution)
        });
        for (index, spare) in givers {
            let taken = spare.min(u64::try_from(lacking).unwrap_or(u64::MAX));
            if taken > 0 {
                let next = &mut self.next[index];
                *next = Next { grant: next.grant - taken, for_guarantee };
                lacking -= u128::from(taken);
            }
        }
    }

    /// A seat that is not raised claims just what it has; an unmanaged one, what it should have.
    fn give(&mut self, capacity: u64) {
        let claims: Vec<Claim> = (0..self.seats.len())
            .map(|index| {
                let (task, target) = (self.seats[index].task, self.targets[index]);
                let has = if task.managed { self.next[index].grant } else { target };
                let most = if self.is_worth_giving(index, target) { target } else { has };
                let (weight, priority) = (weight(task.priority), task.priority);
                Claim { request: has, limit: Limit::At(most), weight, demand: most, priority }
            })
            .collect();
        for (index, most) in share::divide(capacity, &claims).into_iter().enumerate() {
            // There may be room for less than what would be worth giving.
            if self.is_worth_giving(index, most) {
                self.next[index].grant = most;
            }
            let (seat, next) = (&self.seats[index], &mut self.next[index]);
            next.grant = if seat.task.managed { next.grant.max(self.resource.minimum) } else { seat.current };
        }
    }
}
