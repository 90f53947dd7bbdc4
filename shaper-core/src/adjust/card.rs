//! Memory of one GPU card, divided among the tasks that share it.
//!
//! It is unlike other memory. What is beyond a limit is refused to the task, which mostly ends by that, so its want is not seen before:
//! what is free is *lent ahead*. And nothing of it can be reclaimed: what a task uses comes back when the task frees it, or
//! ends.
//!
//! So each task may have its request in any case. What is left is lent, up to the tasks' limits, to high priorities first, of
//! equals to those that are there longest. Nobody has to give back what he uses, and an eighth more, to lend it to somebody else, with one
//! exception. A task is *short* when it uses seven eighths of what it may have, and could be lent more. Then those of a
//! lower priority are brought down to their requests, one after the other, if a policy says that lower ones end for it: the
//! lowest first, and of them whoever has most beyond his request. They may allocate nothing from then on; whoever has not
//! freed what is too much after a grace is ended by the agent. What they still use nobody is lent meanwhile.
//!
//! Steady use leads to no moves, and neither does less than a sixteenth, or 256 MiB.

use std::cmp::Reverse;

use super::GrantKind;
use crate::{id::ExecutionId, spec::Priority, task::UnixNanos, units::Bytes};

const MIB: u64 = 1 << 20;
/// Less than this is not worth a move.
const WORTH: u64 = 256 * MIB;

/// A card.
#[derive(Clone, Copy, Debug)]
pub struct CardOf {
    /// Its number.
    pub number: u32,
    /// Its memory.
    pub memory: Bytes,
    /// Of that: what is used by nobody of the tasks.
    pub used_by_others: Bytes,
}

/// What is known of a task that shares it.
#[derive(Clone, Copy, Debug)]
pub struct CardTask<'a> {
    /// Which run of which task.
    pub execution: &'a ExecutionId,
    /// Its priority.
    pub priority: Priority,
    /// What it has in any case.
    pub request: Bytes,
    /// What it could ever be granted; not below the request.
    pub limit: Bytes,
    /// What it may have now.
    pub grant: Bytes,
    /// In use.
    pub used: Bytes,
    /// When it started.
    pub started_at: UnixNanos,
    /// By which policy lower ones end for it.
    pub policy: Option<&'a str>,
    /// Whether its grant is not to be moved: it is only reckoned with.
    pub is_fixed: bool,
}

/// A task that may have another amount from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardMove {
    /// Which.
    pub execution: ExecutionId,
    /// How much.
    pub to: Bytes,
    /// In which direction.
    pub kind: GrantKind,
    /// Why, for people.
    pub reason: String,
    /// Whether it ends if it does not free what is too much.
    pub is_to_free: bool,
}

impl CardTask<'_> {
    /// What is not lent to others: what it needs, with some room, and at least its request.
    fn keeps(&self) -> u64 {
        if self.is_fixed {
            return self.grant.0;
        }
        let (used, grant) = (self.used.0, self.grant.0);
        used.saturating_add(used / 8).min(grant).max(self.request.0)
    }

    fn is_short(&self) -> bool {
        !self.is_fixed && self.grant < self.limit && self.used.0 >= self.grant.0 - self.grant.0 / 8
    }

    /// What it has beyond its request.
    fn excess(&self) -> u64 {
        self.grant.0.saturating_sub(self.request.0)
    }

    fn is_worth(&self, to: u64) -> bool {
        let by = self.grant.0.abs_diff(to);
        by > 0 && (by >= WORTH.max(self.grant.0 / 16) || to == self.limit.0 || self.grant < self.request)
    }
}

/// What each task may have next, those that get less before those that get more. To be asked each second, with tasks that
/// share one card.
pub fn divide_card(card: &CardOf, tasks: &[CardTask<'_>]) -> Vec<CardMove> {
    let mut keeps: Vec<u64> = tasks.iter().map(CardTask::keeps).collect();
    let to_free = who_frees(card, tasks, &keeps);
    let frees = |place: usize| to_free.iter().any(|(to_free, _)| *to_free == place);
    for (place, _) in &to_free {
        keeps[*place] = tasks[*place].request.0;
    }
    let targets = loop {
        let targets = lend(card, tasks, &keeps, &frees);
        // Whose move is not worth it keeps what he has: it is not there for others.
        let stays = |place: &usize| {
            let (task, target) = (&tasks[*place], targets[*place]);
            target < task.grant.0 && !task.is_worth(target) && !frees(*place)
        };
        let Some(place) = (0..tasks.len()).find(stays) else { break targets };
        keeps[place] = tasks[place].grant.0;
    };
    let mut moves = Vec::new();
    for (place, (task, target)) in tasks.iter().zip(&targets).enumerate() {
        let for_whom = to_free.iter().find(|(to_free, _)| *to_free == place).map(|(_, whom)| &tasks[*whom]);
        if task.is_fixed || !(task.is_worth(*target) || for_whom.is_some() && task.grant.0 > *target) {
            continue;
        }
        let kind = if *target > task.grant.0 { GrantKind::Grew } else { GrantKind::Shrunk };
        let amounts = format!(
            "memory of card {} {} → {}: it uses {}",
            card.number,
            task.grant,
            Bytes(*target),
            task.used
        );
        let why = match (for_whom, kind) {
            (Some(whom), _) => {
                let CardTask { execution, priority, policy, used, grant, .. } = whom;
                let policy = policy.unwrap_or_default();
                format!(
                    ", and `{}` of priority {priority} uses {used} of {grant} that it may have and needs more, for which \
                     lower ones end by policy `{policy}`",
                    execution.task
                )
            }
            (None, GrantKind::Grew) => ", and nobody else needs that".to_owned(),
            (None, GrantKind::Shrunk) => ", and others come first".to_owned(),
        };
        moves.push(CardMove {
            execution: task.execution.clone(),
            to: Bytes(*target),
            kind,
            reason: amounts + &why,
            is_to_free: for_whom.is_some() && task.used.0 > *target,
        });
    }
    moves.sort_by_key(|a_move| a_move.kind == GrantKind::Grew);
    moves
}

/// What each could have, if these keep that.
fn lend(card: &CardOf, tasks: &[CardTask<'_>], keeps: &[u64], frees: &impl Fn(usize) -> bool) -> Vec<u64> {
    let mut rest = free(card, tasks, keeps);
    let mut order: Vec<usize> = (0..tasks.len()).collect();
    order.sort_by_key(|place| {
        let task = &tasks[*place];
        (Reverse(task.priority), task.started_at, task.execution)
    });
    let mut targets = keeps.to_vec();
    for place in order {
        let task = &tasks[place];
        // Whoever has more than he may have frees it before he is lent any again.
        if task.is_fixed || task.used.0 > targets[place] || frees(place) {
            continue;
        }
        let lent = task.limit.0.saturating_sub(targets[place]).min(rest);
        targets[place] += lent;
        rest -= lent;
    }
    targets
}

/// What nobody keeps. What somebody uses beyond what he may have is not there.
fn free(card: &CardOf, tasks: &[CardTask<'_>], keeps: &[u64]) -> u64 {
    let held = tasks.iter().zip(keeps).map(|(task, keep)| task.used.0.max(*keep));
    let held = held.fold(card.used_by_others.0, u64::saturating_add);
    card.memory.0.saturating_sub(held)
}

/// Who is brought down to his request, and for whom.
fn who_frees(card: &CardOf, tasks: &[CardTask<'_>], keeps: &[u64]) -> Vec<(usize, usize)> {
    let mut rest = free(card, tasks, keeps);
    let mut short: Vec<usize> = (0..tasks.len()).filter(|place| tasks[*place].is_short()).collect();
    short.sort_by_key(|place| (Reverse(tasks[*place].priority), tasks[*place].started_at, *place));
    let mut found: Vec<(usize, usize)> = Vec::new();
    for whom in short {
        let task = &tasks[whom];
        // What lets it go on: a quarter more.
        let wanted = (task.grant.0 / 4).max(WORTH).min(task.limit.0 - task.grant.0);
        if rest >= wanted {
            rest -= wanted;
            continue;
        }
        if task.policy.is_none() {
            continue;
        }
        let may_free = |place: &usize| {
            let other = &tasks[*place];
            let frees = other.used.0.max(keeps[*place]).saturating_sub(other.request.0);
            !other.is_fixed
                && other.priority < task.priority
                && frees > 0
                && found.iter().all(|(found, _)| found != place)
        };
        let mut lower: Vec<usize> = (0..tasks.len()).filter(may_free).collect();
        lower.sort_by_key(|place| (tasks[*place].priority, Reverse(tasks[*place].excess()), *place));
        for place in lower {
            if rest >= wanted {
                break;
            }
            found.push((place, whom));
            rest = rest.saturating_add(tasks[place].used.0.max(keeps[place]) - tasks[place].request.0);
        }
        rest = rest.saturating_sub(wanted);
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const GIB: u64 = 1 << 30;

    fn execution(number: usize) -> ExecutionId {
        ExecutionId { task: format!("t{number}").parse().unwrap(), attempt: 1 }
    }

    /// In GiB: request, limit, grant, use.
    fn task(execution: &ExecutionId, priority: Priority, amounts: [u64; 4]) -> CardTask<'_> {
        let [request, limit, grant, used] = amounts.map(|amount| Bytes(amount * GIB));
        let policy = (priority > Priority::Low).then_some("gold");
        CardTask { execution, priority, request, limit, grant, used, started_at: 0, policy, is_fixed: false }
    }

    fn card(others: u64) -> CardOf {
        CardOf { number: 0, memory: Bytes(80 * GIB), used_by_others: Bytes(others * GIB) }
    }

    fn moved(card: &CardOf, tasks: &[CardTask<'_>]) -> Vec<(String, u64, bool)> {
        let shown = |it: CardMove| (it.execution.task.to_string(), it.to.0 / GIB, it.is_to_free);
        divide_card(card, tasks).into_iter().map(shown).collect()
    }

    #[test]
    fn what_is_free_is_lent_ahead_to_high_ones_first() {
        let ids = [execution(1), execution(2)];
        let alone = task(&ids[0], Priority::Low, [20, 60, 20, 5]);
        assert_eq!(moved(&card(0), &[alone]), [("t1".into(), 60, false)]);
        assert_eq!(moved(&card(30), &[alone]), [("t1".into(), 50, false)]);
        let moves = divide_card(&card(0), &[alone]);
        let reason = "memory of card 0 20 GiB → 60 GiB: it uses 5 GiB, and nobody else needs that";
        assert_eq!((moves[0].reason.as_str(), moves[0].kind), (reason, GrantKind::Grew));
        // Who comes later and is of a higher priority is lent first, of what nobody uses.
        let low = task(&ids[0], Priority::Low, [20, 60, 60, 16]);
        let high = task(&ids[1], Priority::High, [20, 60, 20, 0]);
        assert_eq!(moved(&card(0), &[low, high]), [("t1".into(), 20, false), ("t2".into(), 60, false)]);
        // What it uses, and an eighth more, it keeps.
        let low = task(&ids[0], Priority::Low, [20, 60, 60, 48]);
        assert_eq!(moved(&card(0), &[low, high]), [("t1".into(), 54, false), ("t2".into(), 26, false)]);
    }

    #[test]
    fn lower_ones_free_what_is_beyond_their_request_for_one_that_is_short() {
        let ids = [execution(1), execution(2), execution(3)];
        let low = task(&ids[0], Priority::Low, [20, 60, 54, 48]);
        let high = task(&ids[1], Priority::High, [20, 60, 26, 24]);
        let moves = divide_card(&card(0), &[low, high]);
        // What the low one still uses is not there for the high one.
        assert_eq!(moved(&card(0), &[low, high])[0], ("t1".into(), 20, true));
        assert_eq!(
            moves[0].reason,
            "memory of card 0 54 GiB → 20 GiB: it uses 48 GiB, and `t2` of priority high uses 24 GiB of 26 GiB that it \
             may have and needs more, for which lower ones end by policy `gold`"
        );
        let grown = moves.iter().find(|it| it.execution == ids[1]).map_or(26, |it| it.to.0 / GIB);
        assert!(grown + 48 <= 80, "{grown}");
        // It has freed, or ended: the high one has all that it may have.
        let freed = task(&ids[0], Priority::Low, [20, 60, 20, 18]);
        assert_eq!(moved(&card(0), &[freed, high]), [("t2".into(), 60, false)]);
        // Nobody frees anything for want of a policy, for his own priority, or of what he requested.
        let poor = CardTask { policy: None, ..high };
        let peer = CardTask { priority: Priority::Low, ..high };
        let within = task(&ids[0], Priority::Low, [54, 60, 54, 50]);
        for tasks in [[low, poor], [low, peer], [within, high]] {
            assert!(
                moved(&card(0), &tasks).iter().all(|(id, _, to_free)| id != "t1" && !to_free),
                "{tasks:?}"
            );
        }
        // Of several the lowest, and as few as are needed.
        let medium = task(&ids[2], Priority::Medium, [5, 30, 10, 10]);
        let low = task(&ids[0], Priority::Low, [20, 60, 44, 40]);
        let frees: Vec<_> =
            moved(&card(0), &[medium, low, high]).into_iter().filter(|(_, _, to_free)| *to_free).collect();
        assert_eq!(frees, [("t1".into(), 20, true)]);
    }

    proptest! {
        #[test]
        fn no_more_is_granted_than_there_is(
            amounts in vec((1..20u64, 0..60u64, 0..80u64, 0..100u64, 0..3usize, any::<bool>()), 1..6),
            others in 0..10u64,
        ) {
            let ids: Vec<ExecutionId> = (0..amounts.len()).map(execution).collect();
            let priorities = [Priority::Low, Priority::Medium, Priority::High];
            let mut left = 80 - others;
            let mut tasks = Vec::new();
            for (id, (request, more, grant, used, priority, has_policy)) in ids.iter().zip(amounts) {
                // What is requested fits, and what is granted and used.
                let request = request.min(left / 2);
                let grant = (request + grant).min(left).min(request + more);
                left -= grant;
                let used = grant * used / 100;
                let it = task(id, priorities[priority], [request, request + more, grant, used]);
                tasks.push(CardTask { policy: has_policy.then_some("p"), ..it });
            }
            // Second by second, with what is used as it is: it comes to rest, and holds at each step.
            for step in 0..8 {
                let moves = divide_card(&card(others), &tasks);
                prop_assert!(step < 7 || moves.is_empty(), "no rest: {moves:?}");
                for CardMove { execution, to, is_to_free, .. } in &moves {
                    let it = tasks.iter_mut().find(|it| it.execution == execution).unwrap();
                    prop_assert!(it.request <= *to && *to <= it.limit);
                    prop_assert_eq!(*is_to_free, it.used > *to);
                    if *is_to_free {
                        prop_assert_eq!(*to, it.request);
                    }
                    it.grant = *to;
                    let held: u64 = tasks.iter().map(|it| it.grant.0.max(it.used.0)).sum();
                    prop_assert!(held + others * GIB <= 80 * GIB);
                }
            }
        }
    }
}
