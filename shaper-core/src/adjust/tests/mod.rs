//! A node that is simpler than any real one, on which stories are told and promises are kept.

mod promises;
mod stories;

use super::*;
use std::collections::BTreeMap;

use crate::{
    policy::{self, PolicyLimits, Selector, Setting, Subject},
    units::{Bytes, Iops},
};

/// A tick, and the tenths of a second that the stories count in.
const TICK_NS: u64 = 100_000_000;
const ENDLESS: u64 = 1_000_000;

/// A task as it really is. The brain sees only what it uses.
#[derive(Clone, Debug)]
struct Real {
    execution: ExecutionId,
    namespace: String,
    labels: BTreeMap<String, String>,
    priority: Priority,
    request: Demand,
    limits: Limits,
    started_at: UnixNanos,
    managed: bool,
    wants_cpu: u64,
    counts_throttling: bool,
    cpu_grant: Limit<Millicores>,
}

fn task(name: &str, priority: Priority, request: u64, wants_cpu: u64) -> Real {
    Real {
        execution: ExecutionId { task: name.parse().unwrap(), attempt: 1 },
        namespace: "default".into(),
        labels: BTreeMap::new(),
        priority,
        request: Demand {
            cpu: Millicores(request),
            memory: Bytes(1 << 30),
            gpu_memory: None,
            network: None,
            storage_io: Some(Iops(100)),
        },
        limits: Limits::default(),
        started_at: 0,
        managed: true,
        wants_cpu,
        counts_throttling: true,
        cpu_grant: Limit::At(Millicores(request)),
    }
}

impl Real {
    /// The policy that acts for it.
    fn policy<'a>(&self, policies: impl IntoIterator<Item = &'a Policy>) -> Option<&'a str> {
        let subject = Subject {
            priority: self.priority,
            namespace: &self.namespace,
            name: self.execution.task.as_str(),
            labels: &self.labels,
        };
        let given = policy::resolve(policies, &subject);
        let acts = given.iter().find(|given| given.setting == Setting::Eviction)?;
        Some(&acts.policy.policy_name)
    }
}

fn policy(priority: Priority) -> Policy {
    Policy {
        policy_name: format!("{priority}_tasks"),
        priority,
        namespace: "default".into(),
        demand: None,
        eviction_threshold_permille: Some(900),
        preemption_enabled: true,
        window_millis: 10_000,
        selector: Selector::default(),
        limits: PolicyLimits::default(),
        floors: Default::default(),
    }
}

/// A node on which a task uses what it wants, as far as its grant and its fair share allow.
struct Plant {
    cpu: u64,
    tasks: Vec<Real>,
    policies: Vec<(Policy, bool)>,
    brain: Brain,
    tick: u64,
    /// When, in ticks, and what.
    log: Vec<(u64, Move)>,
}

impl Plant {
    fn new(cpu: u64, tasks: Vec<Real>, policies: Vec<Policy>) -> Plant {
        let policies = policies.into_iter().map(|policy| (policy, false)).collect();
        Plant { cpu, tasks, policies, brain: Brain::default(), tick: 0, log: Vec::new() }
    }

    fn run(&mut self, ticks: u64) -> Vec<Move> {
        let before = self.log.len();
        for _ in 0..ticks {
            self.step();
        }
        self.log[before..].iter().map(|(_, a_move)| a_move.clone()).collect()
    }

    fn step(&mut self) {
        let used =
            fair(self.cpu, self.tasks.iter().map(|task| (task.wants_cpu, task.cpu_grant.at().map(|g| g.0))));
        let tasks: Vec<TaskObservation<'_>> = (self.tasks.iter().zip(&used))
            .map(|(task, used)| TaskObservation {
                execution: &task.execution,
                namespace: &task.namespace,
                priority: task.priority,
                request: task.request,
                limits: task.limits,
                policy: task.policy(self.policies.iter().map(|(policy, _)| policy)),
                started_at: task.started_at,
                managed: task.managed,
                cpu_grant: task.cpu_grant,
                cpu_used: Millicores(*used),
                cpu_throttled_permille: task.counts_throttling.then(|| {
                    let stopped =
                        task.cpu_grant.at().map_or(0, |grant| task.wants_cpu.saturating_sub(grant.0));
                    (stopped * 1000 / task.wants_cpu.max(1)) as u32
                }),
            })
            .collect();
        let policies: Vec<PolicyInForce<'_>> = self
            .policies
            .iter()
            .map(|(policy, waiting)| PolicyInForce { policy, waiting: *waiting })
            .collect();
        let observation = Observation {
            cpu: Millicores(self.cpu),
            cpu_used: Millicores(used.iter().sum()),
            tasks: &tasks,
            policies: &policies,
        };
        let moves = step(&mut self.brain, &observation, self.tick * TICK_NS);
        for a_move in &moves {
            match a_move {
                Move::Grant { execution, change, .. } => {
                    let task = self.tasks.iter_mut().find(|task| task.execution == *execution).unwrap();
                    task.cpu_grant = change.cpu.unwrap_or(task.cpu_grant);
                }
                Move::Evict { execution, .. } => self.tasks.retain(|task| task.execution != *execution),
                Move::Stuck { .. } => {}
            }
        }
        self.log.extend(moves.into_iter().map(|a_move| (self.tick, a_move)));
        self.tick += 1;
    }

    fn real(&mut self, name: &str) -> &mut Real {
        self.tasks.iter_mut().find(|task| task.execution.task.as_str() == name).unwrap()
    }

    fn cpu_of(&mut self, name: &str) -> u64 {
        self.real(name).cpu_grant.at().unwrap().0
    }

    /// When, in ticks, and who.
    fn evicted(&self) -> Vec<(u64, &str)> {
        let evicted = self.log.iter().filter_map(|(tick, a_move)| match a_move {
            Move::Evict { execution, .. } => Some((*tick, execution.task.as_str())),
            _ => None,
        });
        evicted.collect()
    }
}

/// Divides what there is among what is used, without any weight.
fn fair(capacity: u64, uses: impl Iterator<Item = (u64, Option<u64>)>) -> Vec<u64> {
    let claims: Vec<share::Claim> = uses
        .map(|(wants, grant)| {
            let most = wants.min(grant.unwrap_or(wants));
            let priority = Priority::Medium;
            share::Claim { request: 0, limit: Limit::At(most), weight: 1, demand: most, priority }
        })
        .collect();
    share::divide(capacity, &claims)
}

fn reasons(moves: &[Move]) -> Vec<(&str, &str)> {
    let told = moves.iter().map(|a_move| match a_move {
        Move::Grant { execution, reason, .. } | Move::Evict { execution, reason } => {
            (execution.task.as_str(), reason.as_str())
        }
        Move::Stuck { policy, reason } => (policy.as_str(), reason.as_str()),
    });
    told.collect()
}
