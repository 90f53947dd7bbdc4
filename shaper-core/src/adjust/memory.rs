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
//!
//! What was given so comes back ([`give_back`]): when a task has used well less than it has for a minute, down to what it
//! used at most and a quarter more; or at once, down to what it uses now and an eighth more, when another has met its limit and the
//! node has nothing left for it. Never below its floor: its request, or what an operator set since. A quarter above what it
//! used is below the wall, so that it does not grow again for having given; and nobody gives less than 16 MiB. So
//! steady use leads to no moves.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
};

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
const SECOND: u64 = 1_000_000_000;
/// Of so long the most that was used is kept for a task …
const QUIET: u64 = 60 * SECOND;
/// … and of so long, when others need it.
const LATELY: u64 = 2 * SECOND;
/// Uses are kept by the second.
const GRAIN: u64 = SECOND;
/// After a conversation that was given up a task is left alone for so long.
const LEFT_ALONE: u64 = 300 * SECOND;

/// What is known of the memory of one of the broker's tasks.
#[derive(Clone, Copy, Debug)]
pub struct MemoryTask<'a> {
    /// Which run of which task.
    pub execution: &'a ExecutionId,
    /// Its priority.
    pub priority: Priority,
    /// Its explicit limit, as its owner gave it.
    pub limit: Limit<Bytes>,
    /// What it keeps whatever happens: its request, or what an operator set since.
    pub floor: Bytes,
    /// Whether its limit is not to be moved now: it is only reckoned with.
    pub is_fixed: bool,
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
        if self.is_fixed {
            return 0;
        }
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

/// A task that is to have less.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Return {
    /// Which.
    pub execution: ExecutionId,
    /// Its new limit, above what it uses.
    pub to: Bytes,
    /// Why, for people.
    pub reason: String,
}

/// What tasks have used, lately: what they do not need any more is told by it.
#[derive(Clone, Debug, Default)]
pub struct Uses(BTreeMap<ExecutionId, Use>);

#[derive(Clone, Debug)]
struct Use {
    since: u64,
    /// When, and the most of that moment; later ones are less: what was less than a later one is of no account.
    peaks: VecDeque<(u64, u64)>,
    left_alone_until: u64,
}

impl Use {
    fn saw(&mut self, used: u64, now: u64) {
        while self.peaks.back().is_some_and(|(_, peak)| *peak <= used) {
            self.peaks.pop_back();
        }
        // Two looks within a second are one.
        if self.peaks.back().is_none_or(|(at, _)| now - at >= GRAIN) {
            self.peaks.push_back((now, used));
        }
        while self.peaks.front().is_some_and(|(at, _)| now - at > QUIET) {
            self.peaks.pop_front();
        }
    }

    /// The most that was used in the last so long.
    fn most(&self, used: u64, within: u64, now: u64) -> u64 {
        let lately = self.peaks.iter().find(|(at, _)| now - at <= within);
        lately.map_or(used, |(_, peak)| used.max(*peak))
    }
}

/// What a task could do without if others need it.
struct Spare {
    /// The most that it used, lately.
    lately: u64,
    /// What it keeps.
    keep: u64,
    /// What it has beyond that.
    slack: u64,
}

impl Use {
    fn spare(&self, task: &MemoryTask<'_>, within: u64, now: u64) -> Option<Spare> {
        let Limit::At(Bytes(grant)) = task.grant else { return None };
        if task.is_fixed || task.is_short || now < self.left_alone_until || now - self.since < within {
            return None;
        }
        let lately = self.most(task.used.0, within, now);
        let keep = lately.saturating_add((lately / 8).max(STEP_MIN)).max(task.floor.0);
        let slack = grant.saturating_sub(keep);
        (slack >= STEP_MIN).then_some(Spare { lately, keep, slack })
    }
}

impl Uses {
    /// What it may soon have to spare.
    fn slack(&self, task: &MemoryTask<'_>, now_ns: u64) -> u64 {
        let of_task = self.0.get(task.execution);
        of_task.and_then(|it| it.spare(task, 0, now_ns.max(it.since))).map_or(0, |spare| spare.slack)
    }

    /// Its limit was not brought down after all: it is left alone for a while.
    pub fn leave_alone(&mut self, execution: &ExecutionId, now_ns: u64) {
        if let Some(task) = self.0.get_mut(execution) {
            task.left_alone_until = now_ns.max(task.since).saturating_add(LEFT_ALONE);
        }
    }
}

/// Those that have been given more than they need, and what they should go back to. To be asked every second or so, and
/// whenever a task has met its limit.
pub fn give_back(uses: &mut Uses, node: &NodeMemory, tasks: &[MemoryTask<'_>], now_ns: u64) -> Vec<Return> {
    uses.0.retain(|execution, _| tasks.iter().any(|task| task.execution == execution));
    let mut returns: Vec<Return> = Vec::new();
    let free = free(node, tasks);
    let wanted: u64 =
        tasks.iter().filter(|task| task.is_short).fold(0, |sum, task| sum.saturating_add(task.step(node)));
    let mut shortage = wanted.saturating_sub(free);
    // Those of low priority first, and of them whoever has most to give.
    let mut lenders = Vec::new();
    for task in tasks {
        let begin = || Use { since: now_ns, peaks: VecDeque::new(), left_alone_until: 0 };
        let of_task = uses.0.entry(task.execution.clone()).or_insert_with(begin);
        let now = now_ns.max(of_task.since);
        of_task.saw(task.used.0, now);
        let Limit::At(Bytes(grant)) = task.grant else { continue };
        if task.is_fixed || task.is_short || now < of_task.left_alone_until {
            continue;
        }
        let floor = task.floor.0;
        let quiet = of_task.most(task.used.0, QUIET, now);
        let keep = quiet.saturating_add((quiet / 4).max(STEP_MIN)).max(floor);
        let slack = grant.saturating_sub(keep);
        if now - of_task.since >= QUIET && slack >= STEP_MIN.max(grant / 8) {
            let reason = format!(
                "memory {} → {}: it used {} at most in the last minute",
                Bytes(grant),
                Bytes(keep),
                Bytes(quiet)
            );
            returns.push(Return { execution: task.execution.clone(), to: Bytes(keep), reason });
            shortage = shortage.saturating_sub(slack);
            continue;
        }
        if let Some(Spare { lately, keep, slack }) = of_task.spare(task, LATELY, now) {
            lenders.push((task.priority, Reverse(slack), grant, keep, lately, task.execution));
        }
    }
    lenders.sort();
    for (_, Reverse(slack), grant, keep, lately, execution) in lenders {
        if shortage == 0 {
            break;
        }
        shortage = shortage.saturating_sub(slack);
        let reason = format!(
            "memory {} → {}: it uses {}, and others have met their limits, with {} free",
            Bytes(grant),
            Bytes(keep),
            Bytes(lately),
            Bytes(free)
        );
        returns.push(Return { execution: execution.clone(), to: Bytes(keep), reason });
    }
    returns
}

/// Where a task with that limit begins to be short.
pub fn wall(Bytes(grant): Bytes) -> Bytes {
    let gap = (grant / 16).clamp(GAP_MIN, GAP_MAX);
    Bytes(grant.saturating_sub(gap))
}

/// Where `memory.high` should stand for each task, in their order: what it could grow into is free, or others could give it
/// back.
pub fn walls(node: &NodeMemory, tasks: &[MemoryTask<'_>], uses: &Uses, now_ns: u64) -> Vec<Limit<Bytes>> {
    let free = free(node, tasks);
    let slacks: Vec<u64> = tasks.iter().map(|task| uses.slack(task, now_ns)).collect();
    let all = slacks.iter().fold(0, |sum: u64, slack| sum.saturating_add(*slack));
    let wall_of = |(task, slack): (&MemoryTask<'_>, &u64)| match task.grant {
        Limit::At(grant) if task.step(node).min(free.saturating_add(all - slack)) >= WORTH => {
            Limit::At(wall(grant))
        }
        _ => Limit::Unlimited,
    };
    tasks.iter().zip(&slacks).map(wall_of).collect()
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
            floor: Bytes(32 * MIB),
            is_fixed: false,
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
        let walls = |node: &NodeMemory, tasks: &[MemoryTask<'_>]| walls(node, tasks, &Uses::default(), 0);
        assert_eq!(walls(&node(1024), &[task(&id, 256, 100)]), [Limit::At(Bytes(240 * MIB))]);
        assert_eq!(walls(&node(256), &[task(&id, 256, 100)]), [Limit::Unlimited]);
        let limited = MemoryTask { limit: Limit::At(Bytes(256 * MIB)), ..task(&id, 256, 100) };
        assert_eq!(walls(&node(1024), &[limited]), [Limit::Unlimited]);
    }

    /// Seconds of a task; the limits that it was to go back to.
    fn second_by_second(
        uses: &mut Uses,
        node: &NodeMemory,
        task: &mut MemoryTask<'_>,
        used: impl Fn(u64) -> u64,
        seconds: std::ops::Range<u64>,
    ) -> Vec<(u64, u64)> {
        let mut returns = Vec::new();
        for second in seconds {
            task.used = Bytes(used(second) * MIB);
            for back in give_back(uses, node, &[*task], second * SECOND) {
                task.grant = Limit::At(back.to);
                returns.push((second, back.to.0 / MIB));
            }
        }
        returns
    }

    #[test]
    fn what_was_not_used_for_a_minute_comes_back_and_no_more() {
        let id = execution(1);
        let mut task = MemoryTask { is_short: false, ..task(&id, 320, 300) };
        let mut uses = Uses::default();
        // In use, then less and less, then steady.
        let used = |second: u64| if second < 100 { 300 } else { 96 };
        let returns = second_by_second(&mut uses, &node(1024), &mut task, used, 0..1000);
        assert_eq!(returns, [(160, 120)]);
        // At what it was when that is all that it needs, and never below its request.
        let returns = second_by_second(&mut uses, &node(1024), &mut task, |_| 1, 1000..2000);
        assert_eq!(returns, [(1060, 32)]);
        let reason = {
            let mut uses = Uses::default();
            let task = MemoryTask { is_short: false, ..self::task(&id, 320, 100) };
            give_back(&mut uses, &node(1024), &[task], 0);
            give_back(&mut uses, &node(1024), &[task], 61 * SECOND).remove(0).reason
        };
        assert_eq!(reason, "memory 320 MiB → 125 MiB: it used 100 MiB at most in the last minute");
    }

    #[test]
    fn what_another_needs_comes_back_at_once_from_the_lowest_first() {
        let ids = [execution(1), execution(2), execution(3)];
        let idle = MemoryTask { is_short: false, ..task(&ids[0], 400, 100) };
        let low = MemoryTask { priority: Priority::Low, ..MemoryTask { execution: &ids[1], ..idle } };
        let short = MemoryTask { execution: &ids[2], is_short: true, ..task(&ids[2], 200, 200) };
        let mut uses = Uses::default();
        let tasks = [idle, low, short];
        assert!(give_back(&mut uses, &node(1000), &tasks, 0).is_empty());
        let returns = give_back(&mut uses, &node(1000), &tasks, 6 * SECOND);
        assert_eq!(returns.len(), 1);
        assert_eq!((&returns[0].execution, returns[0].to), (&ids[1], Bytes(116 * MIB)));
        assert_eq!(
            returns[0].reason,
            "memory 400 MiB → 116 MiB: it uses 100 MiB, and others have met their limits, with 0 B free"
        );
        // So there is something to grow into for the one that is short: it is slowed down before it is killed.
        assert_eq!(walls(&node(1000), &tasks, &uses, 6 * SECOND)[2], Limit::At(wall(Bytes(200 * MIB))));
        assert_eq!(walls(&node(1000), &tasks, &Uses::default(), 6 * SECOND)[2], Limit::Unlimited);
        // Where there is enough for all, nobody has to.
        assert!(give_back(&mut uses, &node(2000), &tasks, 7 * SECOND).is_empty());
        uses.leave_alone(&ids[1], 7 * SECOND);
        let returns = give_back(&mut uses, &node(1000), &tasks, 8 * SECOND);
        assert_eq!(returns.iter().map(|back| &back.execution).collect::<Vec<_>>(), [&ids[0]]);
    }

    #[test]
    fn what_is_fixed_is_only_reckoned_with() {
        let id = execution(1);
        let fixed = MemoryTask { is_fixed: true, ..task(&id, 256, 250) };
        assert!(grow(&node(1024), &[fixed]).is_empty());
        let other = execution(2);
        let growths = grow(&node(300), &[fixed, task(&other, 32, 32)]);
        assert_eq!(growths[0].to, Bytes(44 * MIB));
        let mut uses = Uses::default();
        let unused = MemoryTask { used: Bytes(0), is_short: false, ..fixed };
        give_back(&mut uses, &node(1024), &[unused], 0);
        assert!(give_back(&mut uses, &node(1024), &[unused], 100 * SECOND).is_empty());
    }

    proptest! {
        /// Growing and giving back together, with use that moves for a while and then stays: never below what is used and
        /// some room, never below the floor, and once it is steady, no moves.
        #[test]
        fn it_settles(
            capacity in 256..2048u64,
            tasks in vec((0..3u8, 16..400u64, 0..400u64, vec(0..400u64, 1..6)), 1..5),
        ) {
            let ids: Vec<ExecutionId> = (0..tasks.len()).map(execution).collect();
            let node = node(capacity);
            let mut uses = Uses::default();
            let mut state: Vec<MemoryTask<'_>> = tasks.iter().zip(&ids).map(|((priority, floor, more, _), id)| {
                MemoryTask {
                    priority: [Priority::Low, Priority::Medium, Priority::High][usize::from(*priority)],
                    floor: Bytes(floor * MIB),
                    ..task(id, floor + more, 0)
                }
            }).collect();
            let mut last_move = 0;
            for second in 0..1200u64 {
                for (task, (_, _, _, uses)) in state.iter_mut().zip(&tasks) {
                    let wanted = uses[usize::try_from(second / 60).unwrap().min(uses.len() - 1)] * MIB;
                    // It cannot use more than it has.
                    let grant = task.grant.at().unwrap();
                    task.used = Bytes(wanted.min(grant.0));
                    task.is_short = task.used > wall(grant);
                }
                for growth in grow(&node, &state) {
                    let task = state.iter_mut().find(|task| *task.execution == growth.execution).unwrap();
                    task.grant = Limit::At(growth.to);
                    last_move = second;
                }
                for back in give_back(&mut uses, &node, &state, second * SECOND) {
                    let task = state.iter_mut().find(|task| *task.execution == back.execution).unwrap();
                    let grant = task.grant.at().unwrap();
                    prop_assert!(back.to.0 + STEP_MIN <= grant.0 && back.to >= task.floor);
                    prop_assert!(back.to.0 >= task.used.0 + task.used.0 / 8 && back.to.0 >= task.used.0 + STEP_MIN);
                    prop_assert!(task.used <= wall(back.to), "it would grow again for that");
                    task.grant = Limit::At(back.to);
                    last_move = second;
                }
            }
            prop_assert!(last_move <= 6 * 60 + 120, "moved in second {}", last_move);
        }

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
            for (task, wall) in tasks.iter().zip(walls(&node, &tasks, &Uses::default(), 0)) {
                if let Limit::At(wall) = wall {
                    prop_assert!(wall < task.grant.at().unwrap());
                }
            }
        }
    }
}
