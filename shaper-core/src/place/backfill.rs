//! EASY backfill: who starts now, when the first in the queue does not fit.
//!
//! The first that does not fit gets a *reservation*: the time at which it will, by what is known of when those that
//! run will end. Others behind it may start before it if they do not delay it: if they end before that time, or if
//! what they take will not be needed then. Whoever runs longer than was thought is not ended; the reservation is
//! made anew at each look.
//!
//! The amounts are of the whole cluster, so this says who may start, and the index says where.

/// Resources that are counted: CPU, memory, thousandths of GPUs.
pub const COUNTED: usize = 3;

/// An amount of each.
pub type Amounts = [u64; COUNTED];

/// Somebody who runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// What it will give back.
    pub amounts: Amounts,
    /// When, as far as is known; who is over time ends any moment.
    pub until: u64,
}

/// Somebody who waits: one task, or a gang, which starts as a whole or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What it wants.
    pub amounts: Amounts,
    /// How long it will run, as far as is known; `None`: nobody knows, so it may never end.
    pub runs_for: Option<u64>,
}

/// Who starts, and what was promised.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Who starts now, by place in the queue.
    pub start: Vec<usize>,
    /// The first who does not, and when it will; `None` for the time: not as long as those run who run now.
    pub reserved: Option<(usize, Option<u64>)>,
}

fn fits(wanted: &Amounts, free: &Amounts) -> bool {
    wanted.iter().zip(free).all(|(wanted, free)| wanted <= free)
}

fn take(free: &mut Amounts, wanted: &Amounts) {
    for (free, wanted) in free.iter_mut().zip(wanted) {
        *free = free.saturating_sub(*wanted);
    }
}

fn give(free: &mut Amounts, amounts: &Amounts) {
    for (free, amount) in free.iter_mut().zip(amounts) {
        *free = free.saturating_add(*amount);
    }
}

/// Who of `queue`, in this order, starts at `now`.
pub fn plan(now: u64, mut free: Amounts, running: &[Holder], queue: &[Waiting]) -> Plan {
    let mut plan = Plan::default();
    let mut running = running.to_vec();
    let mut waiting = queue.iter().enumerate();
    let head = loop {
        let Some((index, next)) = waiting.next() else { return plan };
        if !fits(&next.amounts, &free) {
            break (index, next);
        }
        take(&mut free, &next.amounts);
        let until = next.runs_for.map_or(u64::MAX, |it| now.saturating_add(it));
        running.push(Holder { amounts: next.amounts, until });
        plan.start.push(index);
    };
    // When the head fits, and what is left over then.
    running.sort_by_key(|holder| holder.until);
    let mut then = free;
    let mut at = None;
    for holder in &running {
        if holder.until == u64::MAX {
            break;
        }
        give(&mut then, &holder.amounts);
        if fits(&head.1.amounts, &then) {
            at = Some(holder.until.max(now));
            break;
        }
    }
    plan.reserved = Some((head.0, at));
    // All that end at that time count, or what is left over would be too little.
    if let Some(at) = at {
        then = free;
        for holder in running.iter().filter(|holder| holder.until.max(now) <= at) {
            give(&mut then, &holder.amounts);
        }
        take(&mut then, &head.1.amounts);
    }
    for (index, next) in waiting {
        if !fits(&next.amounts, &free) {
            continue;
        }
        let ends_before = at.is_none_or(|at| next.runs_for.is_some_and(|it| now.saturating_add(it) <= at));
        if !ends_before && !fits(&next.amounts, &then) {
            continue;
        }
        take(&mut free, &next.amounts);
        if !ends_before {
            take(&mut then, &next.amounts);
        }
        plan.start.push(index);
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn waiting(cpu: u64, runs_for: u64) -> Waiting {
        Waiting { amounts: [cpu, 0, 0], runs_for: Some(runs_for) }
    }

    #[test]
    fn who_does_not_delay_the_head_goes_first() {
        let running = [Holder { amounts: [6, 0, 0], until: 100 }, Holder { amounts: [2, 0, 0], until: 300 }];
        let queue =
            [waiting(1, 50), waiting(5, 10), waiting(1, 91), waiting(1, 90), waiting(1, 500), waiting(1, 10)];
        let found = plan(10, [4, 0, 0], &running, &queue);
        // The head needs 5 at 100, when 10 would be free: others may still hold 5 then.
        assert_eq!(found, Plan { start: vec![0, 2, 3, 4], reserved: Some((1, Some(100))) });
    }

    #[test]
    fn where_nobody_knows_when_it_ends_nothing_is_promised() {
        let running = [Holder { amounts: [8, 0, 0], until: u64::MAX }];
        let found = plan(0, [2, 0, 0], &running, &[waiting(4, 1), waiting(2, 1)]);
        assert_eq!(found, Plan { start: vec![1], reserved: Some((0, None)) });
    }

    proptest! {
        /// If everybody ends when he was thought to, the head starts when it was promised, whoever starts before it.
        #[test]
        fn the_promise_is_kept(
            holders in prop::collection::vec((1u64..5, 1u64..50), 0..8),
            queue in prop::collection::vec((1u64..9, 1u64..50), 1..12),
            free in 0u64..6,
        ) {
            let running: Vec<Holder> =
                holders.iter().map(|(cpu, until)| Holder { amounts: [*cpu, 0, 0], until: *until }).collect();
            let queue: Vec<Waiting> = queue.iter().map(|(cpu, runs_for)| waiting(*cpu, *runs_for)).collect();
            let found = plan(0, [free, 0, 0], &running, &queue);
            let started: u64 = found.start.iter().map(|index| queue[*index].amounts[0]).sum();
            prop_assert!(started <= free);
            if let Some((head, Some(at))) = found.reserved {
                let ended: u64 = running.iter().filter(|it| it.until <= at).map(|it| it.amounts[0]).sum();
                let holds = |index: &&usize| queue[**index].runs_for.is_some_and(|it| it > at);
                let held: u64 = found.start.iter().filter(holds).map(|index| queue[*index].amounts[0]).sum();
                prop_assert!(queue[head].amounts[0] <= free + ended - held);
                // And it could not have been promised earlier.
                let before: u64 = running.iter().filter(|it| it.until < at).map(|it| it.amounts[0]).sum();
                let ahead: u64 = found.start.iter().filter(|it| **it < head).map(|it| queue[*it].amounts[0]).sum();
                let back: u64 = found.start.iter().filter(|it| **it < head)
                    .filter(|it| queue[**it].runs_for.is_some_and(|it| it < at)).map(|it| queue[*it].amounts[0]).sum();
                prop_assert!(queue[head].amounts[0] > free + before + back - ahead);
            }
        }
    }
}
