//! Memory of GPU cards, as it is used: what is lent to whom, and what becomes of tasks that have more than they may.
//!
//! `shaper_core::adjust::card` says how a card is divided. Whatever holds a task to its part, what it uses is compared with that each
//! second. Nothing takes memory of a card from a process that has it: who has too much may free it, and is ended after a grace, or frozen
//! so that it does not grow, or only told of, as `--gpu-memory-exceeded` says. Where a policy brings a task down for another
//! one, it is ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use shaper_core::{
    adjust::card::{CardMove, CardOf, CardTask, divide_card},
    gpu::CardUsage,
    id::{ExecutionId, TaskId},
    ledger::Cause,
    limits::Limit,
    policy::Effective,
    spec::{DecisionKind, Priority},
    task::{Origin, UnixNanos},
    units::Bytes,
};
use shaper_proto::peer::Caller;

use super::{EVICTION_GRACE, Node, NodeError, Task, cards::Cards, change::Hold};
use crate::{
    actuate::{Knob, Value, Wish},
    config::Exceeded,
    kernel::mapped::monotonic_ns,
    launch,
};

/// A task that uses more of a card than it may.
#[derive(Clone, Copy, Debug)]
pub(super) struct Over {
    since_ns: u64,
    used: Bytes,
    limit: Bytes,
    /// What was to be done was done.
    is_dealt_with: bool,
}

/// One task that shares a card, owned: what divides it borrows from this.
struct Seen {
    execution: ExecutionId,
    priority: Priority,
    request: Bytes,
    limit: Bytes,
    grant: Bytes,
    used: Bytes,
    started_at: UnixNanos,
    policy: Option<String>,
    is_fixed: bool,
}

impl Task {
    /// Of a task of the broker's that shares a card: its priority, and what it requested of it.
    pub(super) fn lent_of_card(&self) -> Option<(Priority, Bytes)> {
        let assignment = self.record.assignment.as_ref()?;
        let request = assignment.request().gpu_memory.filter(|_| assignment.spec.gpus.count == 0)?;
        Some((assignment.spec.profile.priority, request))
    }
}

impl Node {
    /// After each reading of the cards.
    pub(super) fn watch_card_memory(&mut self) {
        self.notice_card_memory();
        self.divide_cards();
    }

    /// Who has too much, and since when; and what is done about it.
    fn notice_card_memory(&mut self) {
        let now_ns = monotonic_ns();
        let (mut over, mut due) = (BTreeMap::new(), Vec::new());
        for (id, task) in self.tasks.iter().filter(|(_, task)| task.is_running()) {
            let Limit::At(limit) = task.record.limits.gpu_memory else { continue };
            for number in task.record.limits.gpu_cards.unwrap_or_default().numbers() {
                let used = self.cards.used(id, number);
                if used <= limit {
                    continue;
                }
                let key = (task.record.execution.clone(), number);
                let before = self.cards.over.get(&key).copied();
                let is_news = before.is_none();
                let known = before.unwrap_or(Over { since_ns: now_ns, used, limit, is_dealt_with: false });
                if is_news {
                    tracing::warn!(task = %id, card = number, %used, %limit, "a task uses more memory of a card than it may");
                }
                let grace = u64::try_from(self.config.gpu_memory_grace.as_nanos()).unwrap_or(u64::MAX);
                if !known.is_dealt_with && now_ns.saturating_sub(known.since_ns) >= grace {
                    due.push(key.clone());
                }
                over.insert(key, Over { used, limit, ..known });
            }
        }
        self.cards.over = over;
        let is_over = |execution: &ExecutionId, over: &BTreeMap<(ExecutionId, u32), Over>| {
            over.keys().any(|(it, _)| it == execution)
        };
        // Whoever has freed enough is told of no more.
        let Cards { over, asked, .. } = &mut self.cards;
        asked.retain(|execution, _| is_over(execution, over));
        for (execution, number) in due {
            self.deal_with_over(&execution, number);
        }
        let thaws = self.tasks.iter().filter(|(_, task)| {
            task.in_force.get(&Knob::Frozen) == Some(&Value::Frozen(true))
                && !is_over(&task.record.execution, &self.cards.over)
        });
        for id in thaws.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            let cause = Cause::agent("gpu memory", "it has no more of a card than it may");
            if let Err(error) = self.put_back(&id, &[Knob::Frozen], &cause) {
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot let a task go on");
            }
        }
    }

    fn deal_with_over(&mut self, execution: &ExecutionId, number: u32) {
        let id = &execution.task;
        let key = (execution.clone(), number);
        let Some(Over { used, limit, .. }) = self.cards.over.get(&key).copied() else { return };
        let Some(task) = self.tasks.get(id).filter(|task| task.record.kill_at_boottime_ns.is_none()) else {
            return;
        };
        let asked = self.cards.asked.get(execution).cloned();
        let adopted = task.record.origin == Origin::Adopted;
        let grace = self.config.gpu_memory_grace.as_secs();
        let had = format!("it used {used} of card {number} for {grace} s, and may have {limit}");
        let done = match (&asked, self.config.gpu_memory_exceeded) {
            (Some(why), _) => self.end_for_card(execution, format!("{had}: {why}")),
            (None, Exceeded::End) if !adopted => self.end_for_card(execution, had),
            (None, Exceeded::Freeze) => {
                let cause = Cause::agent("gpu memory", had);
                self.set_knobs(id, &[Wish::Frozen(true)], Hold::Transient, &cause)
            }
            // What somebody else started is not ended, but told of.
            (None, Exceeded::End | Exceeded::Warn) => Ok(()),
        };
        match done {
            Ok(()) => {
                if let Some(over) = self.cards.over.get_mut(&key) {
                    over.is_dealt_with = true;
                }
            }
            Err(error) => {
                self.counts.failures += 1;
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot deal with a task that has too much of a card");
            }
        }
    }

    fn end_for_card(&mut self, execution: &ExecutionId, reason: String) -> Result<(), NodeError> {
        if self.task(&execution.task)?.record.assignment.is_some() {
            return self.evict(execution, reason);
        }
        tracing::warn!(%execution, reason, "ends a task");
        self.note(&execution.task, &format!("it was ended: {reason}"));
        let operator = Caller { uid: 0, gid: 0, groups: Vec::new() };
        self.cancel(&operator, &execution.task, EVICTION_GRACE).map(drop)
    }

    /// Lends what is free of each card that tasks share.
    fn divide_cards(&mut self) {
        let usages = self.card_usages();
        for CardUsage { card, memory, memory_used, trouble, .. } in usages {
            let (Some(memory), Some(all_used), None) = (memory, memory_used, trouble) else { continue };
            let seen = self.see_card(card.number);
            if seen.is_empty() {
                continue;
            }
            let by_tasks: u64 = seen.iter().map(|task| task.used.0).sum();
            let used_by_others = Bytes(all_used.0.saturating_sub(by_tasks));
            let card = CardOf { number: card.number, memory, used_by_others };
            let tasks: Vec<CardTask<'_>> = seen.iter().map(Seen::task).collect();
            for CardMove { execution, to, kind, reason, is_to_free } in divide_card(&card, &tasks) {
                match self.lend_of_card(&execution.task, to, &reason, DecisionKind::from(kind)) {
                    Ok(()) if is_to_free => self.ask_to_free(&execution.task, reason),
                    Ok(()) => {}
                    Err(error) => {
                        self.counts.failures += 1;
                        tracing::warn!(%execution, error = %launch::chain(&error), "cannot lend memory of a card");
                    }
                }
            }
        }
    }

    /// Those that have a part of a card; none where nothing of it is lent.
    fn see_card(&self, number: u32) -> Vec<Seen> {
        let mut seen = Vec::new();
        for (id, task) in self.holders_of(number, None) {
            let Limit::At(grant) = task.record.limits.gpu_memory else { return Vec::new() };
            let ends = task.over || task.record.kill_at_boottime_ns.is_some();
            let starts = task.started.is_none();
            let fixed = Seen {
                execution: task.record.execution.clone(),
                priority: Priority::Medium,
                request: grant,
                limit: grant,
                grant,
                used: self.cards.used(id, number),
                started_at: task.record.created_at,
                policy: None,
                is_fixed: true,
            };
            let lent = task.record.assignment.as_ref().zip(task.lent_of_card());
            let Some((assignment, (priority, request))) = lent.filter(|_| !ends && !starts) else {
                seen.push(fixed);
                continue;
            };
            let effective = Effective::of(&self.policies, &assignment.spec);
            let limit = effective.gpu_memory_limit(&assignment.spec).at().unwrap_or(request);
            seen.push(Seen {
                priority,
                request,
                limit: limit.max(request),
                policy: effective.preemption,
                is_fixed: false,
                ..fixed
            });
        }
        if seen.iter().any(|task| !task.is_fixed) { seen } else { Vec::new() }
    }

    /// What is to be known of a task that has too much of a card.
    pub(super) fn card_notes(&self, task: &Task) -> Vec<String> {
        let execution = &task.record.execution;
        let now_ns = monotonic_ns();
        let note = |((_, number), over): (&(ExecutionId, u32), &Over)| {
            let since = Duration::from_nanos(now_ns.saturating_sub(over.since_ns));
            let left = self.config.gpu_memory_grace.saturating_sub(since).as_secs();
            let asked = self.cards.asked.get(execution);
            let adopted = task.record.origin == Origin::Adopted;
            let then = match (asked, self.config.gpu_memory_exceeded) {
                (Some(why), _) => format!("unless it frees that it is ended in {left} s: {why}"),
                (None, Exceeded::End) if !adopted => format!("unless it frees that it is ended in {left} s"),
                (None, Exceeded::Freeze) => format!("unless it frees that it is frozen in {left} s"),
                (None, _) => "nothing is done about it (--gpu-memory-exceeded)".to_owned(),
            };
            format!(
                "it uses {} of the memory of card {number}, and may have {}: {then}",
                over.used, over.limit
            )
        };
        self.cards.over.iter().filter(|((it, _), _)| it == execution).map(note).collect()
    }

    /// Errors that the driver told of: whose card it was.
    pub(super) fn note_card_errors(&mut self) {
        let errors = self.cards.take_errors();
        for error in errors {
            let Some(number) = self.cards.table.by_id(&error.card).map(|card| card.number) else { continue };
            let code = error.code.map_or("of an unknown number".to_owned(), |code| code.to_string());
            tracing::error!(card = number, xid = code, "the driver tells of an error of a GPU card");
            *self.cards.errors.entry(number).or_default() += 1;
            let ids: BTreeSet<TaskId> = self.holders_of(number, None).map(|(id, _)| id.clone()).collect();
            for id in ids {
                self.note(
                    &id,
                    &format!("the driver told of an error (XID {code}) of card {number} while it had that"),
                );
                self.tell_task(&id);
            }
        }
    }
}

impl Seen {
    fn task(&self) -> CardTask<'_> {
        let Seen { execution, priority, request, limit, grant, used, started_at, policy, is_fixed } = self;
        CardTask {
            execution,
            priority: *priority,
            request: *request,
            limit: *limit,
            grant: *grant,
            used: *used,
            started_at: *started_at,
            policy: policy.as_deref(),
            is_fixed: *is_fixed,
        }
    }
}
