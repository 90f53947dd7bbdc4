//! Others who turn the knobs that shaper holds: container runtimes, systemd, people (docs/decisions/0012).
//!
//! The kernel tells of each write to a file of a managed cgroup, and whose it was ([`crate::kernel::writers`]); what then
//! differs from what is in force is in the ledger before anything is done about it. Writes that the kernel could not tell
//! of are found by comparing, a part of the tasks each second.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use shaper_core::{
    adopt,
    id::TaskId,
    ledger::{Actor, Cause, Kind, Outcome},
    limits::{Limit, LimitsChange},
};

use super::{Hold, Node, NodeError, not_established, now};
use crate::{
    actuate::{self, Change, Knob, Target, Value, Wish},
    config::SecondWriter,
    kernel::{
        cgroup::cpu::{Bandwidth, CpuMax},
        mapped::monotonic_ns,
        writers::{self, FileId, Told, Write, Writers},
    },
    launch,
    ledger::Intent,
};

/// A task's knobs are turned back so often …
const TURNS_MAX: usize = 20;
/// … within this: two who insist would keep each other busy.
const TURNS_WITHIN_NS: u64 = 60_000_000_000;
/// All tasks are compared within so many seconds.
const ROUNDS: u64 = 10;

/// What a knob holds, in place of what was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Differs {
    found: Value,
    decided: Value,
    who: Actor,
    /// Why it is left so.
    why: &'static str,
}

impl Differs {
    pub(super) fn note(&self, knob: Knob) -> String {
        let Differs { found, decided, who, why } = self;
        format!("{knob} is `{found}` where `{decided}` was decided: {who} wrote it, and {why}")
    }
}

/// Somebody whom nobody saw.
fn unseen() -> Actor {
    Actor::Process { pid: 0, name: String::new() }
}

/// Whose writes are told of.
#[derive(Default)]
pub(super) struct Watch {
    writers: Option<Writers>,
    files: HashMap<FileId, (u32, String)>,
}

impl Watch {
    /// Watches the files of a task. Where that fails they are compared.
    pub(super) fn watch(&mut self, target: &Target) {
        let Some(writers) = &self.writers else { return };
        let watched = of_task(target, |directory| {
            writers.watch(directory)?;
            for (file, name) in writers::files(directory)? {
                if Knob::any_is_in(&name) {
                    self.files.insert(file, (target.slot, name));
                }
            }
            Ok(())
        });
        if let Err(error) = watched {
            tracing::warn!(cgroup = %target.cgroup.path().display(), %error, "cannot watch a cgroup for second writers: they are found by looking");
        }
    }

    /// Watches them no more.
    pub(super) fn forget(&mut self, target: &Target) {
        self.files.retain(|_, (slot, _)| *slot != target.slot);
        let Some(writers) = &self.writers else { return };
        // A cgroup that is gone took its mark with it.
        let _ = of_task(target, |directory| writers.forget(directory));
    }
}

/// The directories of a task in all hierarchies.
fn of_task(target: &Target, mut each: impl FnMut(BorrowedFd<'_>) -> io::Result<()>) -> io::Result<()> {
    each(target.cgroup.as_fd())?;
    for group in [&target.v1_cpu, &target.v1_memory, &target.v1_io].into_iter().flatten() {
        each(writers::directory(group.directory())?.as_fd())?;
    }
    Ok(())
}

impl Node {
    /// Has the kernel tell of writes to the tasks' files.
    pub(super) fn watch_writers(&mut self) {
        let handle = self.handle.clone();
        // A node with a full queue finds by looking what it is not told.
        let tell = move |told| handle.try_tell(move |node| node.told_of_writes(told));
        let started = self.config.opener.writers().and_then(|group| Writers::start(group, tell));
        match started {
            Ok(writers) => self.writers.writers = Some(writers),
            Err(error) => {
                tracing::warn!(%error, "the kernel does not tell of second writers: they are found by looking, and nobody knows who they are");
            }
        }
    }

    fn told_of_writes(&mut self, told: Told) {
        let writes = match told {
            Told::Writes(writes) => writes,
            Told::Lost => {
                tracing::warn!(
                    "the kernel has dropped some of what it had to tell of writes: all tasks are compared"
                );
                self.compare_where(|_| true);
                return;
            }
        };
        for Write { file, pid, name } in writes {
            // What it has put in force the books know.
            if self.warden.as_ref().is_some_and(|warden| warden.pid() == pid) {
                continue;
            }
            let Some((slot, file)) = self.writers.files.get(&file).cloned() else { continue };
            let Some(id) = self.task_of_slot(slot) else { continue };
            let Some(task) = self.tasks.get(&id) else { continue };
            let knobs: Vec<Knob> = task.in_force.keys().copied().filter(|knob| knob.is_in(&file)).collect();
            self.compare(&id, &knobs, &Actor::Process { pid, name });
        }
    }

    /// Every second: a part of the tasks, or all where the kernel tells nothing.
    pub(super) fn compare_some(&mut self) {
        let (second, told) = (self.ticks / 10, self.writers.writers.is_some());
        self.compare_where(|index| !told || index as u64 % ROUNDS == second % ROUNDS);
    }

    fn compare_where(&mut self, is_wanted: impl Fn(usize) -> bool) {
        let all: Vec<(TaskId, Vec<Knob>)> = self
            .tasks
            .iter()
            .enumerate()
            // What could not be turned back is tried again.
            .filter(|(index, (_, task))| is_wanted(*index) || !task.differs.is_empty())
            .filter(|(_, (_, task))| task.is_running() && task.target.is_some())
            .map(|(_, (id, task))| (id.clone(), task.in_force.keys().copied().collect()))
            .collect();
        for (id, knobs) in all {
            self.compare(&id, &knobs, &unseen());
        }
    }

    /// Compares knobs of a task with what is in force, and does what the policy says where they differ.
    fn compare(&mut self, id: &TaskId, knobs: &[Knob], who: &Actor) {
        let result = self
            .different(id, knobs)
            .and_then(|found| if found.is_empty() { Ok(()) } else { self.found_different(id, &found, who) });
        match result {
            Err(NodeError::Actuate(error)) if error.is_gone() => {}
            Err(error) => {
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot deal with a second writer");
            }
            Ok(()) => {}
        }
    }

    /// Knobs that hold something else than what is in force, as changes that were made.
    fn different(&mut self, id: &TaskId, knobs: &[Knob]) -> Result<Vec<Change>, NodeError> {
        let task = self.task(id)?;
        let (Some(target), Some(bpf)) = (&task.target, &self.bpf) else { return Ok(Vec::new()) };
        if !task.is_running() {
            return Ok(Vec::new());
        }
        let mut different = Vec::new();
        let mut as_decided = Vec::new();
        for knob in knobs {
            // A conversation about memory writes and reads these all the time, and finds by itself what others do.
            let in_conversation = matches!(knob, Knob::Memory | Knob::MemoryHigh) && task.shrinking.is_some();
            let Some(before) = task.in_force.get(knob).filter(|_| !in_conversation) else { continue };
            let before = self.with_loan(target.slot, *knob, *before);
            let after = match actuate::read(target, bpf, *knob) {
                // It is compared when it answers again.
                Err(error) if error.is_of_a_card() => continue,
                after => after?,
            };
            // A loan may have begun or ended in between.
            if after == before || after == self.with_loan(target.slot, *knob, before) {
                as_decided.push(*knob);
            } else {
                different.push(Change { knob: *knob, before, after });
            }
        }
        let task = self.task_mut(id)?;
        task.differs.retain(|knob, _| !as_decided.contains(knob));
        Ok(different)
    }

    /// What a knob is to hold while CPU time is lent.
    fn with_loan(&self, slot: u32, knob: Knob, in_force: Value) -> Value {
        let (Knob::Cpu, Value::Bandwidth(bandwidth)) = (knob, in_force) else { return in_force };
        let Some(quota) = self.lending.as_ref().and_then(|lending| lending.quota(slot)) else {
            return in_force;
        };
        let max = CpuMax { quota: Limit::At(quota.quota), ..bandwidth.max };
        Value::Bandwidth(Bandwidth { max, burst: bandwidth.burst.map(|_| quota.saving) })
    }

    /// Writes down that the knobs of `changes` hold something else than what was last in force: they are about to be turned,
    /// before anybody told of it.
    pub(super) fn notice_what_was_written(&mut self, id: &TaskId, changes: &[Change]) {
        let Some(task) = self.tasks.get(id) else { return };
        let others: Vec<Change> = changes
            .iter()
            .filter_map(|change| {
                let before = *task.in_force.get(&change.knob)?;
                let is_known =
                    task.differs.get(&change.knob).is_some_and(|differs| differs.found == change.before);
                let is_other = before != change.before && !is_known;
                is_other.then_some(Change { knob: change.knob, before, after: change.before })
            })
            .collect();
        if !others.is_empty() {
            self.write_down(id, &others, &unseen());
        }
    }

    /// What is done when others write to the files of a task.
    fn writers_policy(&self, id: &TaskId) -> SecondWriter {
        let own = self.tasks.get(id).and_then(|task| task.record.writers);
        match own {
            Some(adopt::Writers::Hold) => SecondWriter::Hold,
            Some(adopt::Writers::Yield) => SecondWriter::Yield,
            Some(adopt::Writers::Report) => SecondWriter::Report,
            None => self.config.second_writer,
        }
    }

    fn write_down(&mut self, id: &TaskId, found: &[Change], who: &Actor) {
        let Some(task) = self.tasks.get(id) else { return };
        self.counts.second_writes += 1;
        let reason = match self.writers_policy(id) {
            SecondWriter::Hold => "a second writer; it is turned back",
            SecondWriter::Yield => "a second writer; it is left to them",
            SecondWriter::Report => "a second writer; it is left so",
        };
        let intent = Intent {
            execution: task.record.execution.clone(),
            owner: task.record.owner,
            kind: Kind::SecondWriter,
            cause: Cause::new(who.clone(), reason),
            changes: found.to_vec(),
            limits: None,
            standing: None,
        };
        let written = self
            .ledger
            .intend(now(), intent)
            .and_then(|number| self.ledger.conclude(now(), number, Outcome::Done));
        if let Err(error) = written {
            tracing::warn!(task = %id, error = %launch::chain(&error), "what a second writer did is not in the ledger");
        }
    }

    fn found_different(&mut self, id: &TaskId, found: &[Change], who: &Actor) -> Result<(), NodeError> {
        let task = self.task(id)?;
        let is_news = |change: &&Change| {
            task.differs.get(&change.knob).is_none_or(|differs| differs.found != change.after)
        };
        let news: Vec<Change> = found.iter().filter(is_news).copied().collect();
        if !news.is_empty() {
            let what: Vec<String> = news
                .iter()
                .map(|Change { knob, before, after }| format!("{knob}: {before} → {after}"))
                .collect();
            tracing::warn!(task = %id, %who, what = what.join("; "), policy = ?self.writers_policy(id), "a second writer");
            self.write_down(id, &news, who);
        }
        match self.writers_policy(id) {
            SecondWriter::Report => {
                self.remember(id, &news, who, "is left so (--second-writer report)");
                Ok(())
            }
            SecondWriter::Yield => self.yield_to(id, found, who),
            SecondWriter::Hold => self.turn_back(id, found, &news, who),
        }
    }

    fn remember(&mut self, id: &TaskId, changes: &[Change], who: &Actor, why: &'static str) {
        let Some(task) = self.tasks.get_mut(id) else { return };
        for Change { knob, before, after } in changes {
            let differs = Differs { found: *after, decided: *before, who: who.clone(), why };
            task.differs.insert(*knob, differs);
        }
    }

    fn turn_back(
        &mut self,
        id: &TaskId,
        found: &[Change],
        news: &[Change],
        who: &Actor,
    ) -> Result<(), NodeError> {
        let now_ns = monotonic_ns();
        let state_dir = self.config.state_dir.clone();
        let task = self.task_mut(id)?;
        while task.turned_back_ns.front().is_some_and(|at| at + TURNS_WITHIN_NS <= now_ns) {
            task.turned_back_ns.pop_front();
        }
        if task.turned_back_ns.len() >= TURNS_MAX {
            self.remember(id, news, who, "was turned back so often in a minute that it has to wait");
            return Ok(());
        }
        task.turned_back_ns.push_back(now_ns);
        // What others asked for last is what they find again once shaper lets go.
        for Change { knob, before, after } in found {
            let was = task.record.baseline.entry(*knob).or_insert(*after);
            *was = was.with_what_changed(before, after);
        }
        task.record.save(&state_dir)?;
        self.remember(id, news, who, "cannot be turned back yet");
        let (standing, transient): (Vec<Knob>, Vec<Knob>) =
            found.iter().map(|change| change.knob).partition(|knob| self.stands(id, *knob));
        let cause = Cause::agent("second writer", format!("hold: turned back what {who} wrote"));
        let mut result = Ok(());
        let limit = self.task(id)?.record.limits.memory;
        // A limit of ours below what is in use by now comes down by conversation.
        let converses = standing.contains(&Knob::Memory) && limit != Limit::Unlimited;
        if converses {
            let change = LimitsChange { memory: Some(limit), ..LimitsChange::default() };
            result = self.change_or_shrink(id, &change, &cause);
        }
        for (knobs, hold) in [(standing, Hold::Standing), (transient, Hold::Transient)] {
            let task = self.task(id)?;
            let wish = |knob: &Knob| match (knob, task.in_force.get(knob)?) {
                (Knob::Memory, _) if converses => None,
                // Not ours, and put back all the same; but nobody is to be killed for it.
                (Knob::Memory, Value::Memory(limit)) => Some(Wish::Memory(*limit)),
                (_, value) => Some(Wish::Exactly(*knob, *value)),
            };
            let wishes: Vec<Wish> = knobs.iter().filter_map(wish).collect();
            if !wishes.is_empty() {
                result = result.and(self.hold_knobs(id, &wishes, hold, &cause));
            }
        }
        result
    }

    /// Whether what is in force for a knob is what was decided for good.
    fn stands(&self, id: &TaskId, knob: Knob) -> bool {
        let Some(task) = self.tasks.get(id) else { return false };
        match knob {
            Knob::Cpu | Knob::CpuWeight | Knob::Memory => true,
            Knob::NetEgress | Knob::NetGuarantee | Knob::NetWeight | Knob::NetIngress => true,
            Knob::GpuCards | Knob::GpuMemory(_) | Knob::GpuPower(_) => true,
            other => task.record.standing.contains_key(&other),
        }
    }

    /// From now on these knobs are somebody else's: they have no limit of ours, and nothing to be put back.
    fn yield_to(&mut self, id: &TaskId, found: &[Change], who: &Actor) -> Result<(), NodeError> {
        let state_dir = self.config.state_dir.clone();
        let ledger_number = self.ledger.next_number();
        let task = self.task_mut(id)?;
        let record = &mut task.record;
        let is_theirs = |knob: &Knob| found.iter().any(|change| change.knob == *knob);
        if is_theirs(&Knob::Cpu) {
            record.limits.cpu = Limit::Unlimited;
        }
        if is_theirs(&Knob::CpuWeight) {
            record.limits.cpu_weight = None;
        }
        if is_theirs(&Knob::Memory) {
            record.limits.memory = Limit::Unlimited;
        }
        if is_theirs(&Knob::NetIngress) {
            record.limits.net_ingress = Limit::Unlimited;
        }
        if is_theirs(&Knob::GpuCards) {
            record.limits.gpu_cards = None;
        }
        // One limit for all cards is not held where one of them is somebody else's.
        let any_card = found.iter().any(|change| matches!(change.knob, Knob::GpuMemory(_)));
        if any_card {
            record.limits.gpu_memory = Limit::Unlimited;
        }
        let any_power = found.iter().any(|change| matches!(change.knob, Knob::GpuPower(_)));
        if any_power {
            record.limits.gpu_power = Limit::Unlimited;
        }
        // One ceiling over all devices is not held where one of them is somebody else's.
        let any_device = found.iter().any(|change| matches!(change.knob, Knob::IoMax(_)));
        if any_device {
            record.limits.storage_io = Limit::Unlimited;
        }
        let is_ours = |knob: &Knob| {
            !(is_theirs(knob)
                || any_device && matches!(knob, Knob::IoMax(_))
                || any_card && matches!(knob, Knob::GpuMemory(_))
                || any_power && matches!(knob, Knob::GpuPower(_)))
        };
        record.baseline.retain(|knob, _| is_ours(knob));
        record.standing.retain(|knob, _| is_ours(knob));
        task.in_force.retain(|knob, _| is_ours(knob));
        task.differs.retain(|knob, _| is_ours(knob));
        let intent = Intent {
            execution: record.execution.clone(),
            owner: record.owner,
            kind: Kind::Standing,
            cause: Cause::agent("second writer", format!("yield: left to {who}")),
            changes: Vec::new(),
            limits: Some(record.limits),
            standing: Some(record.standing.clone()),
        };
        record.ledger_number = ledger_number;
        record.save(&state_dir)?;
        let number = self.ledger.intend(now(), intent)?;
        self.ledger.conclude(now(), number, Outcome::Done)?;
        for change in found {
            let text =
                format!("{} was left to {who}, who had changed it (--second-writer yield)", change.knob);
            self.note(id, &text);
        }
        if is_theirs(&Knob::Cpu) {
            let slot = self.task(id)?.target.as_ref().ok_or_else(not_established)?.slot;
            if let Some(lending) = &self.lending {
                lending.withdraw(slot);
            }
            self.watch_quota(id)?;
        }
        Ok(())
    }
}
