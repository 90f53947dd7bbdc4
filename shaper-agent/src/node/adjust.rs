//! The fast loop: every 100 ms what the broker's tasks use is looked at, and `shaper_core::adjust`
//! decides what each may use next.

use std::{collections::HashMap, fs};

use shaper_core::{
    adjust::{self, Brain, Move, Observation, PolicyInForce, TaskObservation},
    id::ExecutionId,
    ledger::Cause,
    limits::{Limits, LimitsChange},
    policy::Effective,
    spec::{DecisionKind, Demand, Priority},
    task::UnixNanos,
    units::Millicores,
};
use shaper_proto::peer::Caller;

use super::{EVICTION_GRACE, Node, NodeError};
use crate::{
    kernel::{bpf::Counters, mapped::monotonic_ns},
    launch,
    meter::busy_ns,
};

/// What the loop remembers between its turns.
#[derive(Default)]
pub(super) struct Loop {
    brain: Brain,
    last: HashMap<ExecutionId, (Counters, Option<u64>)>,
    /// What the policies in force give each task.
    effective: HashMap<ExecutionId, Effective>,
    node: Option<(u64, u64)>,
    turn_ns: u64,
}

impl Loop {
    /// Other policies are in force.
    pub(super) fn forget_policies(&mut self) {
        self.effective.clear();
    }

    /// When the last turn was, `CLOCK_MONOTONIC` ns.
    pub(super) fn last_turn_ns(&self) -> u64 {
        self.turn_ns
    }
}

/// One task, owned: the brain borrows from it.
struct Seen {
    execution: ExecutionId,
    namespace: String,
    priority: Priority,
    request: Demand,
    limits: Limits,
    policy: Option<String>,
    started_at: UnixNanos,
    in_force: Limits,
    cpu_used: Millicores,
    throttled_permille: Option<u32>,
}

impl Node {
    /// One turn. Only looks on a node without tasks of the broker's.
    pub fn adjust(&mut self) {
        self.adjustment.turn_ns = monotonic_ns();
        if let Some(bpf) = &self.bpf {
            self.meter.look(bpf);
        }
        let Ok(seen) = self.look().inspect_err(|error| {
            tracing::warn!(error = %launch::chain(error), "cannot look at the tasks");
        }) else {
            return;
        };
        let Some((seen, now_ns, cpu_used)) = seen else { return };
        self.cpu_utilisation_permille = u32::try_from(cpu_used.0 * 1000 / self.config.capacity.cpu.0.max(1))
            .unwrap_or(u32::MAX)
            .min(1000);
        let tasks: Vec<TaskObservation<'_>> = seen.iter().map(Seen::observation).collect();
        let policies: Vec<PolicyInForce<'_>> =
            self.policies.iter().map(|policy| PolicyInForce { policy, waiting: false }).collect();
        let observation =
            Observation { cpu: self.config.capacity.cpu, cpu_used, tasks: &tasks, policies: &policies };
        let moves = adjust::step(&mut self.adjustment.brain, &observation, now_ns);
        for a_move in moves {
            self.carry_out(a_move);
        }
    }

    fn carry_out(&mut self, a_move: Move) {
        match a_move {
            Move::Grant { execution, change, kind, reason } => {
                match self.regrant(&execution, &change, &reason) {
                    Ok(()) => self.tell_decision(&execution, kind.into(), reason),
                    Err(error) => {
                        self.counts.failures += 1;
                        tracing::warn!(%execution, error = %launch::chain(&error), "cannot change a grant");
                    }
                }
            }
            Move::Evict { execution, reason } => {
                let is_there =
                    self.task(&execution.task).is_ok_and(|task| task.record.execution == execution);
                if !is_there {
                    return;
                }
                if let Err(error) = self.evict(&execution, reason) {
                    self.counts.failures += 1;
                    tracing::warn!(%execution, error = %launch::chain(&error), "cannot evict a task");
                }
            }
            Move::Stuck { policy, reason } => tracing::info!(policy, reason, "a policy cannot be served"),
        }
    }

    /// Ends a task of the broker's, and tells it so.
    pub(super) fn evict(&mut self, execution: &ExecutionId, reason: String) -> Result<(), NodeError> {
        let broker = Caller { uid: 0, gid: 0, groups: Vec::new() };
        self.mark_evicted(&execution.task)?;
        self.cancel(&broker, &execution.task, EVICTION_GRACE)?;
        self.tell_decision(execution, DecisionKind::Evicted, reason);
        Ok(())
    }

    fn regrant(
        &mut self,
        execution: &ExecutionId,
        change: &LimitsChange,
        reason: &str,
    ) -> Result<(), NodeError> {
        if self.task(&execution.task)?.record.execution != *execution {
            return Ok(());
        }
        self.change(&execution.task, change, &Cause::agent("adjust", reason))
    }

    /// The broker's running tasks with their use since the last turn; `None` on the first one.
    fn look(&mut self) -> Result<Option<(Vec<Seen>, u64, Millicores)>, NodeError> {
        if self.bpf.is_none() {
            return Ok(None);
        }
        let last = std::mem::take(&mut self.adjustment.last);
        let mut known = std::mem::take(&mut self.adjustment.effective);
        let mut seen = Vec::new();
        let mut now_ns = 0;
        for task in self.tasks.values() {
            let (Some(target), Some(assignment)) = (&task.target, &task.record.assignment) else { continue };
            // While it starts, or ends by request, it is not to be judged.
            if !task.is_running() || task.started.is_none() || task.record.kill_at_boottime_ns.is_some() {
                continue;
            }
            let Some(counters) = self.meter.counters(target.slot) else { continue };
            now_ns = counters.at_ns;
            let execution = &task.record.execution;
            let before = last.get(execution);
            // What used nothing was not stopped either: its file need not be read.
            let used = before.is_none_or(|(before, _)| counters.cpu_ns != before.cpu_ns);
            let throttled_before = before.and_then(|(_, throttled)| *throttled);
            let throttled_ns = if used { self.meter.throttled_ns(target.slot) } else { throttled_before };
            self.adjustment.last.insert(execution.clone(), (counters, throttled_ns));
            let Some((before, _)) = before else { continue };
            let elapsed = counters.at_ns.saturating_sub(before.at_ns).max(1);
            let per_second = |now: u64, before: u64, scale: u128| {
                let rate = u128::from(now.saturating_sub(before)) * scale / u128::from(elapsed);
                u64::try_from(rate).unwrap_or(u64::MAX)
            };
            let spec = &assignment.spec;
            let effective = known.remove(execution).unwrap_or_else(|| Effective::of(&self.policies, spec));
            seen.push(Seen {
                execution: execution.clone(),
                namespace: spec.namespace.clone(),
                priority: spec.profile.priority,
                request: *assignment.request(),
                limits: Limits { cpu: effective.cpu_limit(spec), ..spec.limits },
                policy: effective.eviction.clone(),
                started_at: task.record.created_at,
                in_force: task.record.limits,
                cpu_used: Millicores(per_second(counters.cpu_ns, before.cpu_ns, 1000)),
                throttled_permille: throttled_ns.map(|now| {
                    let before = throttled_before.unwrap_or(now);
                    u32::try_from(per_second(now, before, 1000)).unwrap_or(1000).min(1000)
                }),
            });
            self.adjustment.effective.insert(execution.clone(), effective);
        }
        if seen.is_empty() {
            return Ok(None);
        }
        let cpu_used = self.node_cpu(now_ns, &seen)?;
        Ok(Some((seen, now_ns, cpu_used)))
    }

    /// What everything on the node uses. Where the capacity is configured, the node is a part of the
    /// machine, and what its tasks use is all there is to know.
    fn node_cpu(&mut self, now_ns: u64, seen: &[Seen]) -> Result<Millicores, NodeError> {
        let of_tasks = Millicores(seen.iter().map(|task| task.cpu_used.0).sum());
        if self.config.capacity_is_configured {
            return Ok(of_tasks);
        }
        let stat = fs::read_to_string("/proc/stat")
            .map_err(|source| NodeError::System { verb: "read /proc/stat", source })?;
        let busy_ns = busy_ns(&stat);
        let before = self.adjustment.node.replace((now_ns, busy_ns));
        let Some((then_ns, busy_before)) = before else { return Ok(of_tasks) };
        let elapsed = now_ns.saturating_sub(then_ns).max(1);
        // /proc/stat has a resolution of 10 ms a CPU: never less than what the tasks were seen to use.
        Ok(Millicores(busy_ns.saturating_sub(busy_before) * 1000 / elapsed).max(of_tasks))
    }
}

impl Seen {
    fn observation(&self) -> TaskObservation<'_> {
        TaskObservation {
            execution: &self.execution,
            namespace: &self.namespace,
            priority: self.priority,
            request: self.request,
            limits: self.limits,
            policy: self.policy.as_deref(),
            started_at: self.started_at,
            managed: true,
            cpu_grant: self.in_force.cpu,
            cpu_used: self.cpu_used,
            cpu_throttled_permille: self.throttled_permille,
        }
    }
}
