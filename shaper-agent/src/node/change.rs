//! Changes of what a task may use: written down, put in force, and undone where that fails.

use std::path::PathBuf;

use shaper_core::{
    id::TaskId,
    ledger::{Actor, Cause, Kind, Outcome},
    limits::{Limit, Limits, LimitsChange},
    task::UnixNanos,
    units::{BitsPerSec, Bytes},
};
use shaper_proto::{failpoint, peer::Caller};

use super::{Node, NodeError, Task, not_established, now};
use crate::{
    actuate::{self, ActuateError, Knob, Lasts, Plan, Target, Value, Values, Wish},
    kernel::bpf::Bpf,
    launch,
    ledger::{self, Intent, Ledger, Summary},
    record::Before,
};

/// How long a change stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Until the next one, over restarts of the agent.
    Standing,
    /// As long as this agent lives: the next one puts back what was decided before.
    Transient,
}

impl From<Hold> for Kind {
    fn from(hold: Hold) -> Kind {
        match hold {
            Hold::Standing => Kind::Standing,
            Hold::Transient => Kind::Transient,
        }
    }
}

impl Node {
    /// Changes limits of a task, all or none.
    pub(super) fn change(
        &mut self,
        id: &TaskId,
        change: &LimitsChange,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        self.may_reclaim_idle(id, change, cause)?;
        self.may_share_network(id, change)?;
        if change.gpu_cards.is_some() {
            self.make_card_room(id)?;
        }
        if change.gpu_power.is_some() {
            self.give_power_back();
        }
        self.may_have_cards(id, change)?;
        let limits = self.task(id)?.record.limits.with(change);
        let mut standing = self.task(id)?.record.standing.clone();
        if change.cpu_weight.is_some() {
            // Whoever names a weight wants that, and nothing that was decided in its place.
            standing.remove(&Knob::CpuWeight);
        }
        if change.storage_io_weight.is_some() {
            standing.retain(|knob, _| !matches!(knob, Knob::IoWeight | Knob::BfqWeight));
        }
        if let Some(Limit::At(_)) = change.storage_io_latency {
            self.can_promise_latency()?;
        }
        if change.memory.is_some() {
            standing.remove(&Knob::Memory);
        }
        let mut wishes = Wish::of(change);
        if let Some(ceiling) = change.storage_io {
            wishes.extend(self.io_wishes(id, ceiling)?);
        }
        if let Some(weight) = change.storage_io_weight {
            wishes.extend(self.io_weight_wishes(weight)?);
        }
        if change.gpu_cards.is_some() || change.gpu_memory.is_some() || change.gpu_power.is_some() {
            wishes.extend(self.card_wishes(id, &limits)?);
        }
        self.carry_through(id, &wishes, limits, standing, Kind::Standing, cause)?;
        if change.memory.is_some()
            && let Some(task) = self.tasks.get_mut(id)
        {
            task.idling.disturb();
        }
        if change.cpu.is_some()
            && let Err(error) = self.watch_quota(id)
        {
            // The limit holds all the same; what is lost is the warning.
            tracing::warn!(task = %id, error = %launch::chain(&error), "cannot watch a CPU quota");
        }
        Ok(())
    }

    /// Refuses a part of the network where that is not divided, and a guarantee that does not fit beside those that others have.
    fn may_share_network(&self, id: &TaskId, change: &LimitsChange) -> Result<(), NodeError> {
        let LimitsChange { net_egress_guarantee, net_egress_weight, .. } = change;
        let Some(capacity) = self.config.capacity.network else {
            let asks = net_egress_weight.is_some() || net_egress_guarantee.is_some_and(|it| it.0 > 0);
            return if asks { Err(NodeError::Precondition(actuate::NOT_DIVIDED.into())) } else { Ok(()) };
        };
        let Some(guarantee) = *net_egress_guarantee else { return Ok(()) };
        let others = self.tasks.iter().filter(|(other, task)| *other != id && task.is_held());
        let promised: u64 = others
            .map(|(_, task)| task.record.limits.net_egress_guarantee.map_or(0, |guarantee| guarantee.0))
            .sum();
        if guarantee.0 <= capacity.0.saturating_sub(promised) {
            return Ok(());
        }
        Err(NodeError::Precondition(format!(
            "net_egress_guarantee: {guarantee} do not fit: of {capacity} {} are promised to other tasks and {} are left. \
             Promise less, or give the task a weight instead",
            BitsPerSec(promised),
            BitsPerSec(capacity.0.saturating_sub(promised))
        )))
    }

    /// Turns knobs of a task beside or within its limits, all or none. What a knob held before it was first turned is
    /// on disk before it is.
    pub fn set_knobs(
        &mut self,
        id: &TaskId,
        wishes: &[Wish],
        hold: Hold,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        let record = &self.task(id)?.record;
        let (limits, mut standing) = (record.limits, record.standing.clone());
        if hold == Hold::Standing {
            let (target, bpf) = self.held(id)?;
            standing.extend(actuate::values(target, bpf, wishes)?);
        }
        self.carry_through(id, wishes, limits, standing, hold.into(), cause)
    }

    /// Puts knobs back to what was decided for good: the limits, what stands, or what was there before.
    pub fn put_back(&mut self, id: &TaskId, knobs: &[Knob], cause: &Cause) -> Result<(), NodeError> {
        let record = &self.task(id)?.record;
        let (limits, standing) = (record.limits, record.standing.clone());
        let mut wishes = actuate::decided(&limits, &standing, &record.baseline);
        wishes.retain(|wish| knobs.contains(&wish.knob()));
        self.carry_through(id, &wishes, limits, standing, Kind::Transient, cause)
    }

    /// Turns knobs back to what is in force.
    pub(super) fn hold_knobs(
        &mut self,
        id: &TaskId,
        wishes: &[Wish],
        hold: Hold,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        let record = &self.task(id)?.record;
        let (limits, standing) = (record.limits, record.standing.clone());
        self.carry_through(id, wishes, limits, standing, hold.into(), cause)
    }

    /// Puts every knob of a task that was ever turned to what was decided for it.
    pub(super) fn put_all_back(&mut self, id: &TaskId, cause: &Cause) -> Result<(), NodeError> {
        let knobs: Vec<Knob> = self.task(id)?.record.baseline.keys().copied().collect();
        self.put_back(id, &knobs, cause)
    }

    /// What was decided last cannot be put in force, and the agent that was about to do it died before it could say so: what
    /// was decided before holds, as if it had lived to turn everything back.
    pub(super) fn go_back(&mut self, id: &TaskId, refused: NodeError) -> Result<(), NodeError> {
        let record = &mut self.task_mut(id)?.record;
        let Some(Before { limits, standing }) = record.before.take() else { return Err(refused) };
        let why = format!("the last change could not be put in force: {}", launch::chain(&refused));
        let wishes = actuate::decided(&limits, &standing, &record.baseline);
        self.carry_through(id, &wishes, limits, standing, Kind::Standing, &Cause::agent("start", &why))?;
        self.task(id)?.record.save(self.state_dir())?;
        self.note(id, &format!("{why}; what was decided before holds"));
        Ok(())
    }

    /// The kernel's side of a task.
    fn held(&self, id: &TaskId) -> Result<(&Target, &Bpf), NodeError> {
        let target = self.task(id)?.target.as_ref().ok_or_else(not_established)?;
        Ok((target, self.bpf.as_ref().ok_or_else(not_established)?))
    }

    /// Turns knobs. Meanwhile nothing is lent to the task: what is changed, and what it is changed back to if that fails,
    /// is its limit and not a loan.
    fn carry_through(
        &mut self,
        id: &TaskId,
        wishes: &[Wish],
        limits: Limits,
        standing: Values,
        kind: Kind,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        if !wishes.iter().any(|wish| wish.knob() == Knob::Cpu) {
            return self.turn_knobs(id, wishes, limits, standing, kind, cause);
        }
        let (target, _) = self.held(id)?;
        if let Some(lending) = &self.lending {
            lending.suspend(target.slot);
        }
        let turned = self.turn_knobs(id, wishes, limits, standing, kind, cause);
        if let Err(error) = self.enrol(id) {
            tracing::warn!(task = %id, error = %launch::chain(&error), "nothing can be lent to a task");
        }
        turned
    }

    /// Turns knobs, with what is to be remembered of it: the record and the ledger first, then the effect.
    ///
    /// The record is brought to the disk when a knob is turned that never was before, and when somebody asked for other
    /// limits. What a loop does within what is recorded is in the ledger, from which the next agent takes it.
    fn turn_knobs(
        &mut self,
        id: &TaskId,
        wishes: &[Wish],
        limits: Limits,
        standing: Values,
        kind: Kind,
        cause: &Cause,
    ) -> Result<(), NodeError> {
        let (target, bpf) = self.held(id)?;
        let Plan { changes, in_force } = actuate::plan(target, bpf, wishes)?;
        self.notice_what_was_written(id, &changes);
        let state_dir = self.config.state_dir.clone();
        let task = self.tasks.get_mut(id).ok_or_else(|| NodeError::NoSuchTask(id.clone()))?;
        let target = task.target.as_ref().ok_or_else(not_established)?;
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        let record = &mut task.record;
        let intent = Intent {
            execution: record.execution.clone(),
            owner: record.owner,
            kind,
            cause: cause.clone(),
            limits: (record.limits != limits).then_some(limits),
            standing: (record.standing != standing).then(|| standing.clone()),
            changes,
        };
        if intent.changes.is_empty() && intent.limits.is_none() && intent.standing.is_none() {
            task.in_force.extend(in_force);
            return Ok(());
        }
        let before = (record.limits, std::mem::replace(&mut record.standing, standing));
        record.limits = limits;
        let known = record.baseline.len();
        for change in &intent.changes {
            record.baseline.entry(change.knob).or_insert(change.before);
        }
        let is_loop = matches!(cause.actor, Actor::Agent(_) | Actor::Policy(_));
        let is_saved = record.baseline.len() > known || !is_loop;
        if is_saved {
            failpoint::hit("change-before-record");
            record.ledger_number = self.ledger.next_number();
            if kind == Kind::Standing {
                record.before = Some(Before { limits: before.0, standing: before.1.clone() });
            }
            if let Err(error) = record.save(&state_dir) {
                record.before = None;
                (record.limits, record.standing) = before;
                return Err(error.into());
            }
            failpoint::hit("change-after-record");
        }
        let changes = intent.changes.clone();
        let result = match self.ledger.intend(now(), intent) {
            Ok(number) => {
                failpoint::hit("ledger-after-intent");
                let lasts = if kind == Kind::Transient { Lasts::ForAWhile } else { Lasts::ForGood };
                let result = actuate::execute(target, bpf, &changes, lasts);
                failpoint::hit("change-after-effect");
                conclude(&mut self.ledger, number, &result);
                failpoint::hit("ledger-after-outcome");
                result.map_err(NodeError::from)
            }
            // Nothing is done that is not written down.
            Err(error) => Err(error.into()),
        };
        if kind == Kind::Standing {
            // It is known what came of it; on disk the ledger says so.
            record.before = None;
        }
        if result.is_err() {
            (record.limits, record.standing) = before;
            if is_saved {
                record.save(&state_dir)?;
            }
        } else {
            task.differs.retain(|knob, _| !in_force.contains_key(knob));
            task.in_force.extend(in_force);
        }
        result
    }

    /// Puts back what every knob of a task held before it was first turned, for good. What cannot be written down is
    /// done all the same: nothing is to keep a task from being let go. A memory limit below what the task uses is left
    /// out, as the kernel would kill for it: then the answer is how much that is.
    pub(super) fn restore(&mut self, task: &Task, cause: &Cause) -> Result<Option<Bytes>, NodeError> {
        let Some(target) = &task.target else { return Ok(None) };
        let bpf = self.bpf.as_mut().ok_or_else(not_established)?;
        let mut wishes = actuate::as_before(&task.record.baseline);
        let mut too_much = None;
        if let Some(Value::Memory(Limit::At(limit))) = task.record.baseline.get(&Knob::Memory) {
            let used = match actuate::memory_in_use(target) {
                Err(error) if error.is_gone() => return Ok(None),
                other => other?,
            };
            too_much = used.filter(|used| used > limit);
        }
        if too_much.is_some() {
            wishes.retain(|wish| wish.knob() != Knob::Memory);
        }
        let planned = actuate::plan(target, bpf, &wishes);
        let changes = match planned {
            Err(error) if error.is_gone() => return Ok(None),
            other => other?.changes,
        };
        let intent = Intent {
            execution: task.record.execution.clone(),
            owner: task.record.owner,
            kind: Kind::Release,
            cause: cause.clone(),
            limits: None,
            standing: None,
            changes: changes.clone(),
        };
        let number = self.ledger.intend(now(), intent).inspect_err(|error| {
            tracing::warn!(error = %launch::chain(error), "a release is not in the ledger");
        });
        failpoint::hit("ledger-after-intent");
        let result = match actuate::execute(target, bpf, &changes, Lasts::ForGood) {
            Err(error) if error.is_gone() => Ok(()),
            other => other,
        };
        failpoint::hit("change-after-effect");
        if let Ok(number) = number {
            conclude(&mut self.ledger, number, &result);
        }
        failpoint::hit("ledger-after-outcome");
        result?;
        Ok(too_much)
    }

    /// Every second: brings the ledger to the disk, and begins a new file of it where the last is long.
    pub(super) fn keep_ledger(&mut self) {
        if self.ledger.is_full() {
            let held = self.tasks.values().filter(|task| task.is_held());
            let summaries = held.map(|Task { record, .. }| Summary {
                execution: record.execution.clone(),
                owner: record.owner,
                limits: record.limits,
                standing: record.standing.clone(),
                baseline: record.baseline.clone(),
            });
            let summaries = summaries.collect();
            if let Err(error) = self.ledger.compact(now(), summaries) {
                tracing::warn!(error = %launch::chain(&error), "cannot begin a new file of the ledger");
            }
        }
        self.ledger.sync(&self.runtime);
    }

    /// Where the ledger is, and what of it a caller may see.
    pub fn ledger_query(
        &self,
        caller: &Caller,
        task: Option<TaskId>,
        since: UnixNanos,
    ) -> (PathBuf, ledger::Query) {
        let owner = (!caller.is_operator()).then_some(caller.uid);
        (self.ledger.directory().to_owned(), ledger::Query { task, owner, since })
    }
}

/// Writes down what came of a change. Where that fails it stays unknown, which is true.
pub(super) fn conclude(ledger: &mut Ledger, number: u64, result: &Result<(), ActuateError>) {
    let outcome = match result {
        Ok(()) => Outcome::Done,
        Err(error) if error.is_undone() => Outcome::RolledBack(launch::chain(error)),
        Err(error) => Outcome::Failed(launch::chain(error)),
    };
    if let Err(error) = ledger.conclude(now(), number, outcome) {
        tracing::warn!(error = %launch::chain(&error), "the outcome of a change is not in the ledger");
    }
}
