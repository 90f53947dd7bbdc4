//! What a node tells of itself to whoever scrapes its metrics: one look on its thread, which writes no text.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use shaper_core::{
    snapshot::{NodeSnapshot, TaskSnapshot},
    spec::{Capacity, DecisionKind},
    task::{Origin, Phase},
    units::{Bytes, Millicores},
};
use shaper_metrics::Durations;

use super::{Node, Task, now};
use crate::{config::SecondWriter, meter::Waits};

/// Tasks that are told of one by one.
pub const MOST_TASKS: usize = 1000;

/// What is counted for the metrics alone, since the agent began.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// What was decided about tasks, by kind.
    pub decisions: BTreeMap<&'static str, u64>,
    /// Moves of the fast loop that could not be carried out.
    pub failures: u64,
    /// Changes that somebody else made.
    pub second_writes: u64,
    /// How long each turn took.
    pub ticks: Durations,
    /// Tasks that were left out of a scrape.
    pub left_out: u64,
}

impl Counts {
    pub(super) fn decided(&mut self, kind: DecisionKind) {
        let name = match kind {
            DecisionKind::Grew => "grew",
            DecisionKind::Shrunk => "shrunk",
            DecisionKind::Reclaimed => "reclaimed",
            DecisionKind::Evicted => "evicted",
            // The broker decides these.
            DecisionKind::Placed
            | DecisionKind::Pending
            | DecisionKind::ScaleOut
            | DecisionKind::Refused
            | DecisionKind::Ended
            | DecisionKind::Lost
            | DecisionKind::Cancelled => return,
        };
        *self.decisions.entry(name).or_default() += 1;
    }

    pub(super) fn turned(&mut self, took: Duration) {
        self.ticks.add(took);
    }
}

/// What is told of one task.
#[derive(Clone, Debug)]
pub struct TaskReading {
    /// What it uses, and what it may.
    pub usage: TaskSnapshot,
    /// The namespace and the name under which it was submitted, with what it was promised; `None` of one that was not.
    pub submitted: Option<Submitted>,
    /// How it came here.
    pub origin: &'static str,
    /// For how long its CPU limit has stopped it, ns.
    pub throttled_ns: Option<u64>,
    /// How long it waited for CPUs.
    pub waits: Option<Waits>,
    /// Knobs that hold what somebody else wrote.
    pub differing: usize,
}

/// What is known of a task of the broker's besides.
#[derive(Clone, Debug)]
pub struct Submitted {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// CPU that it was promised.
    pub cpu: Millicores,
    /// Memory likewise.
    pub memory: Bytes,
}

/// What is told of a node.
#[derive(Clone, Debug)]
pub struct Reading {
    /// The machine, and the measurement; its tasks are in `tasks`.
    pub snapshot: NodeSnapshot,
    /// Those that run, or those of them that use most.
    pub tasks: Vec<TaskReading>,
    /// How many run …
    pub running: usize,
    /// … and how many have ended and are remembered.
    pub ended: usize,
    /// What the node has for the broker's tasks.
    pub capacity: Capacity,
    /// Whether there is a session with the broker; `None` where none is wanted.
    pub connected: Option<bool>,
    /// Of the policies in force.
    pub policies_revision: u64,
    /// Entries of the ledger so far.
    pub ledger_entries: u64,
    /// How often stock was taken.
    pub stocks: u64,
    /// Whether the kernel programs are attached.
    pub attached: bool,
    /// Programs that are not, and measurements that are not believed.
    pub left_out: Vec<String>,
    /// `unified` or `hybrid`.
    pub cgroups: &'static str,
    /// What is done about second writers.
    pub second_writer: SecondWriter,
    /// What was counted.
    pub counts: Counts,
}

impl Node {
    /// All that there is to tell, of all tasks.
    pub fn reading(&mut self) -> Reading {
        let tasks = self.task_readings();
        let mut snapshot = self.meter.node(&self.config.node, self.bpf.as_ref(), now());
        snapshot.cpu_pool = self.cpu_pool();
        snapshot.gpus = self.card_usages();
        let running = self.tasks.values().filter(|task| task.is_running()).count();
        let ended =
            self.tasks.values().filter(|task| matches!(task.record.phase, Phase::Ended { .. })).count();
        let mut left_out = Vec::new();
        if let Some(bpf) = &self.bpf {
            left_out.extend(bpf.without().iter().map(|(name, _)| (*name).to_owned()));
            left_out.extend(bpf.distrusted().iter().map(|(measure, _)| format!("self-test: {measure}")));
        }
        self.counts.left_out += running.saturating_sub(MOST_TASKS) as u64;
        Reading {
            snapshot,
            tasks,
            running,
            ended,
            capacity: self.config.capacity,
            connected: (!self.config.brokers.is_empty()).then_some(self.news.is_some()),
            policies_revision: self.policies_revision,
            ledger_entries: self.ledger.next_number().saturating_sub(1),
            stocks: *self.stocks.borrow(),
            attached: self.bpf.is_some(),
            left_out,
            cgroups: self.config.hierarchies.name(),
            second_writer: self.config.second_writer,
            counts: self.counts.clone(),
        }
    }

    fn task_readings(&mut self) -> Vec<TaskReading> {
        let Some(bpf) = &self.bpf else { return Vec::new() };
        let running = self.tasks.values().filter(|task| task.is_running());
        let mut chosen: Vec<(&Task, u32)> =
            running.filter_map(|task| Some((task, task.target.as_ref()?.slot))).collect();
        if chosen.len() > MOST_TASKS {
            // Without the rest of what is known of each: they may be tens of thousands.
            let use_of = |&(_, slot): &(&Task, u32)| {
                let now = self.meter.counters(slot).map_or(0, |now| now.cpu_ns);
                let before = self.meter.counters_before(slot).map_or(now, |before| before.cpu_ns);
                Reverse((
                    now.saturating_sub(before),
                    self.meter.memory_used(slot).map_or(0, |memory| memory.0),
                ))
            };
            chosen.select_nth_unstable_by_key(MOST_TASKS, use_of);
            chosen.truncate(MOST_TASKS);
        }
        let mut readings = Vec::with_capacity(chosen.len());
        for (task, slot) in chosen {
            let name_of = |_| String::new();
            let Some(mut usage) = self.meter.task(slot, bpf, &task.record, name_of) else { continue };
            if let Some(loan) = self.lending.as_ref().and_then(|lending| lending.loan(slot)) {
                (usage.cpu.lent, usage.cpu.loans) = (loan.lent.per_period(), loan.count);
            }
            if let Some(memory) = &mut usage.memory {
                memory.idle_reclaimed = task.idling.status().map(|status| status.reclaimed);
            }
            usage.gpu_memory = self.card_memory(&task.record.execution.task);
            let submitted = task.record.assignment.as_ref().map(|assignment| Submitted {
                namespace: assignment.spec.namespace.clone(),
                name: assignment.spec.name.clone(),
                cpu: assignment.request().cpu,
                memory: assignment.request().memory,
            });
            readings.push(TaskReading {
                usage,
                submitted,
                origin: match task.record.origin {
                    Origin::Launched { .. } => "launched",
                    Origin::Adopted => "adopted",
                    Origin::Entered { .. } => "entered",
                },
                throttled_ns: self.meter.throttled_ns_read(slot),
                waits: self.meter.waits(slot, bpf),
                differing: task.differs.len(),
            });
        }
        readings
    }
}
