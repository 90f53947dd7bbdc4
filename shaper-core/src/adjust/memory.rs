//! Memory grows before the kernel kills for want of it.
//!
//! A task without a limit of its own begins with its request as its memory limit. What it needs beyond that cannot be
//! found by asking for it, as CPU is: memory that was given is not given back by wanting less. So nothing is lent ahead.
//! A task grows when it has met its limit, by a quarter, out of what the node has free, and that many times; the way
//! down is a conversation ([`crate::shrink`]).
//!
//! For that to come in time a task must meet something before `memory.max`, at which the kernel kills: [`wall`] is where
//! `memory.high` stands, a sixteenth below, as long as there is anything to grow into. There the kernel tells of it and
//! slows the task down, little at first. Where it cannot grow, the wall is only in its way.

use crate::{
    id::ExecutionId,
    limits::Limit,
    share::{self, Claim},
    spec::Priority,
    units::Bytes,
};

const MIB: u64 = 1 << 20;
/// The least that a task grows by, if it may: less would bring it back at once.
const STEP_MIN: u64 = 16 * MIB;
/// Less than this is not worth a move.
const WORTH: u64 = MIB;
/// Between the wall and the limit.
const GAP_MIN: u64 = MIB;
const GAP_MAX: u64 = 256 * MIB;

/// What is known of the memory of one of the broker's tasks.
#[derive(Clone, Copy, Debug)]
pub struct MemoryTask<'a> {
    /// Which run of which task.
    pub execution: &'a ExecutionId,
    /// Its priority.
    pub priority: Priority,
    /// Its explicit limit, as its owner gave it.
    pub limit: Limit<Bytes>,
    /// The limit in force.
    pub grant: Limit<Bytes>,
    /// In use.
    pub used: Bytes,
    /// Whether it has met its limit or the wall since it was last looked at, or waits for memory with its limit near.
    pub is_short: bool,
}

/// What a node has.
#[derive(Clone, Copy, Debug)]
pub struct NodeMemory {
    /// For tasks.
    pub capacity: Bytes,
    /// Of the machine: what could be had now without swapping.
    pub available: Bytes,
}

/// A task that is to have more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Growth {
    /// Which.
    pub execution: ExecutionId,
    /// Its new limit.
    pub to: Bytes,
    /// Why, for people.
    pub reason: String,
}

impl MemoryTask<'_> {
    /// The most it could ever have on this node.
    fn ceiling(&self, node: &NodeMemory) -> u64 {
        self.limit.at().map_or(node.capacity.0, |limit| limit.0.min(node.capacity.0))
    }

    /// What it has, or takes: what is not free for others.
    fn held(&self) -> u64 {
        self.grant.at().unwrap_or(self.used).0
    }

    /// What it should grow by if there is enough.
    fn step(&self, node: &NodeMemory) -> u64 {
        let Limit::At(Bytes(grant)) = self.grant else { return 0 };
        (grant / 4).max(STEP_MIN).min(self.ceiling(node).saturating_sub(grant))
    }
}

/// What nobody has been granted, and is there.
fn free(node: &NodeMemory, tasks: &[MemoryTask<'_>]) -> u64 {
    let held = tasks.iter().fold(0, |sum: u64, task| sum.saturating_add(task.held()));
    // Of what is available, what tasks have been granted and do not use yet is promised.
    let promised =
        tasks.iter().fold(0, |sum: u64, task| sum.saturating_add(task.held().saturating_sub(task.used.0)));
    node.capacity.0.saturating_sub(held).min(node.available.0.saturating_sub(promised))
}

/// Those that are short of memory, and may have more.
pub fn grow(node: &NodeMemory, tasks: &[MemoryTask<'_>]) -> Vec<Growth> {
    let free = free(node, tasks);
    let claims: Vec<Claim> = tasks
        .iter()
        .map(|task| {
            let step = if task.is_short { task.step(node) } else { 0 };
            Claim {
                request: 0,
                limit: Limit::At(step),
                weight: super::weight(task.priority),
                demand: step,
                priority: task.priority,
            }
        })
        .collect();
    let mut growths = Vec::new();
    for (task, more) in tasks.iter().zip(share::divide(free, &claims)) {
        if let Limit::At(Bytes(grant)) = task.grant
            && more >= WORTH
        {
            let reason = format!(
                "memory {} → {}: it uses {}, and {} of {} are free",
                Bytes(grant),
                Bytes(grant + more),
                task.used,
                Bytes(free),
                node.capacity
            );
            growths.push(Growth { execution: task.execution.clone(), to: Bytes(grant + more), reason });
        }
    }
    growths
}

/// Where a task with that limit begins to be short.
pub fn wall(Bytes(grant): Bytes) -> Bytes {
    let gap = (grant / 16).clamp(GAP_MIN, GAP_MAX);
    Bytes(grant.saturating_sub(gap))
}

/// Where `memory.high` should stand for each task, in their order.
pub fn walls(node: &NodeMemory, tasks: &[MemoryTask<'_>]) -> Vec<Limit<Bytes>> {
    let free = free(node, tasks);
    let wall_of = |task: &MemoryTask<'_>| match task.grant {
        Limit::At(grant) if task.step(node).min(free) >= WORTH => Limit::At(wall(grant)),
        _ => Limit::Unlimited,
    };
    tasks.iter().map(wall_of).collect()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn execution(number: usize) -> ExecutionId {
        ExecutionId { task: format!("t{number}").parse().unwrap(), attempt: 1 }
    }

    fn task(execution: &ExecutionId, grant: u64, used: u64) -> MemoryTask<'_> {
        MemoryTask {
            execution,
            priority: Priority::Medium,
            limit: Limit::Unlimited,
            grant: Limit::At(Bytes(grant * MIB)),
            used: Bytes(used * MIB),
            is_short: true,
        }
    }

    fn node(capacity: u64) -> NodeMemory {
        NodeMemory { capacity: Bytes(capacity * MIB), available: Bytes(capacity * MIB) }
    }

    #[test]
    fn a_task_that_met_its_limit_grows_by_a_quarter() {
        let id = execution(1);
        let growths = grow(&node(1024), &[task(&id, 256, 240)]);
        assert_eq!(growths.len(), 1);
        assert_eq!(growths[0].to, Bytes(320 * MIB));
        assert_eq!(
            growths[0].reason,
            "memory 256 MiB → 320 MiB: it uses 240 MiB, and 768 MiB of 1 GiB are free"
        );
        assert!(grow(&node(1024), &[MemoryTask { is_short: false, ..task(&id, 256, 240) }]).is_empty());
        assert!(grow(&node(1024), &[MemoryTask { grant: Limit::Unlimited, ..task(&id, 0, 240) }]).is_empty());
    }

    #[test]
    fn its_own_limit_and_what_is_free_bound_it() {
        let id = execution(1);
        let limited = MemoryTask { limit: Limit::At(Bytes(270 * MIB)), ..task(&id, 256, 240) };
        assert_eq!(grow(&node(1024), &[limited])[0].to, Bytes(270 * MIB));
        assert_eq!(grow(&node(260), &[task(&id, 256, 240)])[0].to, Bytes(260 * MIB));
        assert!(grow(&node(256), &[task(&id, 256, 240)]).is_empty());
        // The rest of the machine has it.
        let crowded = NodeMemory { available: Bytes(20 * MIB), ..node(1024) };
        assert_eq!(grow(&crowded, &[task(&id, 256, 240)])[0].to, Bytes(260 * MIB));
    }

    #[test]
    fn what_is_scarce_goes_by_priority() {
        let ids = [execution(1), execution(2)];
        let high = MemoryTask { priority: Priority::High, ..task(&ids[0], 256, 240) };
        let low = MemoryTask { priority: Priority::Low, ..task(&ids[1], 256, 240) };
        let growths = grow(&node(532), &[high, low]);
        assert_eq!(growths.iter().map(|growth| growth.to.0 / MIB).collect::<Vec<_>>(), [272, 260]);
    }

    #[test]
    fn there_is_a_wall_only_before_room() {
        let id = execution(1);
        assert_eq!(walls(&node(1024), &[task(&id, 256, 100)]), [Limit::At(Bytes(240 * MIB))]);
        assert_eq!(walls(&node(256), &[task(&id, 256, 100)]), [Limit::Unlimited]);
        let limited = MemoryTask { limit: Limit::At(Bytes(256 * MIB)), ..task(&id, 256, 100) };
        assert_eq!(walls(&node(1024), &[limited]), [Limit::Unlimited]);
    }

    proptest! {
        #[test]
        fn nobody_gets_what_is_not_there(
            capacity in 0..4096u64,
            available in 0..4096u64,
            tasks in vec((0..3u8, 0..2048u64, 0..2048u64, prop::option::of(0..2048u64), any::<bool>()), 0..8),
        ) {
            let ids: Vec<ExecutionId> = (0..tasks.len()).map(execution).collect();
            let tasks: Vec<MemoryTask<'_>> = tasks.iter().zip(&ids).map(|(&(priority, grant, used, limit, short), id)| {
                MemoryTask {
                    priority: [Priority::Low, Priority::Medium, Priority::High][usize::from(priority)],
                    limit: limit.map_or(Limit::Unlimited, |limit| Limit::At(Bytes(limit * MIB))),
                    is_short: short,
                    ..task(id, grant, used)
                }
            }).collect();
            let node = NodeMemory { capacity: Bytes(capacity * MIB), available: Bytes(available * MIB) };
            let free = free(&node, &tasks);
            let growths = grow(&node, &tasks);
            let mut more = 0;
            for growth in &growths {
                let task = tasks.iter().find(|task| *task.execution == growth.execution).unwrap();
                let grant = task.grant.at().unwrap();
                prop_assert!(task.is_short && growth.to > grant && growth.to.0 <= task.ceiling(&node));
                more += growth.to.0 - grant.0;
            }
            prop_assert!(more <= free);
            for (task, wall) in tasks.iter().zip(walls(&node, &tasks)) {
                if let Limit::At(wall) = wall {
                    prop_assert!(wall < task.grant.at().unwrap());
                }
            }
        }
    }
}
