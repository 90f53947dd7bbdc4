//! The broker's tasks on this node: its directives, and what is reported back.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use shaper_core::{
    gpu::{CardOffer, CardSet},
    id::{ExecutionId, TaskId},
    ledger::{Actor, Cause},
    limits::{Limit, Limits, LimitsChange},
    spec::{Capacity, Credentials, Decision, DecisionKind, Demand, Policy, Priority, TaskSpec},
    task::{Owner, TaskStatus},
    units::{Bytes, Weight},
};
use shaper_proto::{failpoint, peer::Caller};
use tokio::sync::{mpsc, oneshot};

use super::{Node, NodeError, RunRequest, Task, now};
use crate::{contact::Contact, durable, launch};

/// What makes a task the broker's: kept with its record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assignment {
    /// What was asked for.
    pub spec: TaskSpec,
    /// Of the latest directive that was carried out.
    pub generation: u64,
    /// This node has decided to evict it.
    #[serde(default)]
    pub evicted: bool,
    /// How long it goes on without the broker; `None`: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_seconds: Option<u32>,
    /// It is over because that was, or because the machine was started anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lease_over: bool,
    /// What is reserved for it, if the broker has said another amount since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resized: Option<Demand>,
}

impl Assignment {
    /// What is reserved for it: what it asked for, or what the broker has said since.
    pub fn request(&self) -> &Demand {
        self.resized.as_ref().unwrap_or(&self.spec.profile.demand)
    }

    pub(super) fn lease(&self) -> Option<Duration> {
        self.lease_seconds.map(|seconds| Duration::from_secs(seconds.into()))
    }
}

/// The numbers by which a directive is known: carried out once, however often it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectiveId {
    /// Which run of which task.
    pub execution: ExecutionId,
    /// Which directive for it.
    pub generation: u64,
    /// Of the broker that gave it.
    pub epoch: u64,
    /// Of the session in which it came: one that was still waiting when a new session began, whose inventory
    /// does not know of it, must not be carried out after that.
    pub session: u64,
}

/// A task of the broker's, as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct Assigned {
    /// The task.
    pub status: TaskStatus,
    /// Of the latest directive that was carried out for it.
    pub generation: u64,
    /// This node has decided to evict it.
    pub evicted: bool,
    /// It is over because its lease was, or because the machine was started anew.
    pub lease_over: bool,
    /// What is reserved for it.
    pub request: Option<Demand>,
}

/// What the node tells the broker on its own account.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// A task changed.
    Task(Box<Assigned>),
    /// A decision that this node took.
    Decision {
        /// About which task.
        execution: ExecutionId,
        /// What was decided.
        decision: Decision,
    },
    /// How the node is.
    Node {
        /// CPU utilisation, in thousandths.
        cpu_utilisation_permille: u32,
        /// The policies in force.
        policies_revision: u64,
    },
}

/// Everything that the broker must know of this node when they meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Inventory {
    /// Name of the node.
    pub node: String,
    /// The boot.
    pub boot_id: String,
    /// What it has.
    pub capacity: Capacity,
    /// Its GPU cards, those of which the capacity has the memory.
    pub gpus: Option<CardOffer>,
    /// Whether it runs tasks that have an image.
    pub runs_containers: bool,
    /// The broker's tasks.
    pub tasks: Vec<Assigned>,
    /// The highest epoch obeyed.
    pub highest_epoch: u64,
    /// The agent's own socket.
    pub agent_socket: String,
    /// Of this meeting; directives that come of it carry it.
    pub session: u64,
}

/// The answer to a `Start`.
pub enum Starting {
    /// It is there already.
    There(Box<Assigned>),
    /// It is being started.
    Waiting(oneshot::Receiver<Result<TaskStatus, NodeError>>),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HighestEpoch {
    epoch: u64,
}

impl Node {
    /// The file that keeps the highest epoch.
    fn epoch_file(&self) -> std::path::PathBuf {
        self.state_dir().join("epoch.json")
    }

    pub(super) fn load_epoch(&mut self) -> Result<(), NodeError> {
        self.highest_epoch =
            durable::read_json::<HighestEpoch>(&self.epoch_file())?.map_or(0, |file| file.epoch);
        Ok(())
    }

    /// Obeys an epoch, and from now on none below it.
    pub fn obey(&mut self, epoch: u64) -> Result<(), NodeError> {
        if epoch < self.highest_epoch {
            return Err(NodeError::Precondition(format!(
                "epoch {epoch} is over: this node has obeyed epoch {}",
                self.highest_epoch
            )));
        }
        if epoch > self.highest_epoch {
            durable::write_json(&self.epoch_file(), &HighestEpoch { epoch }, 0o600)?;
            self.highest_epoch = epoch;
        }
        Ok(())
    }

    fn heed(&mut self, directive: &DirectiveId) -> Result<(), NodeError> {
        if directive.session != self.session {
            return Err(NodeError::Precondition("the session in which this directive came is over".into()));
        }
        self.obey(directive.epoch)
    }

    /// Where it is noted that the broker was heard of.
    pub fn contact(&self) -> Arc<Contact> {
        self.contact.clone()
    }

    /// Has the broker asked often enough for those that need it.
    pub(super) fn keep_contact(&self) {
        let running = self.tasks.values().filter(|task| task.is_running());
        let leases = running.filter_map(|task| task.record.assignment.as_ref()?.lease());
        self.contact.keep(leases.min());
    }

    /// Ends those whose lease is over. That is their supervisors' to do, which may have been killed or stopped.
    pub(super) fn end_overdue(&mut self) {
        let is_overdue = |task: &Task| {
            let lease = task.record.assignment.as_ref().and_then(Assignment::lease);
            task.is_running() && !task.over && lease.is_some_and(|lease| self.contact.is_over(lease))
        };
        let overdue = self.tasks.iter().filter(|(_, task)| is_overdue(task));
        let overdue: Vec<TaskId> = overdue.map(|(id, _)| id.clone()).collect();
        for id in overdue {
            if let Err(error) = self.end_one_overdue(&id) {
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot end a task whose lease is over");
            }
        }
    }

    fn end_one_overdue(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let state_dir = self.config.state_dir.clone();
        let task = self.task_mut(id)?;
        if let Some(target) = &task.target {
            target.cgroup.kill()?;
        }
        // For the case that nobody sees how it ends.
        if let Some(assignment) = task.record.assignment.as_mut().filter(|assignment| !assignment.lease_over)
        {
            assignment.lease_over = true;
            tracing::warn!(task = %id, "the broker was not heard of for the lease of a task: it is ended");
            task.record.save(&state_dir)?;
        }
        Ok(())
    }

    /// What the broker is told first. From here on, changes go to `news`.
    pub fn meet(&mut self, news: mpsc::Sender<News>) -> Result<Inventory, NodeError> {
        self.news = Some(news);
        self.session += 1;
        let ids: Vec<TaskId> = self.assigned_ids();
        let tasks = ids.iter().map(|id| self.assigned(id)).collect::<Result<_, _>>()?;
        let offer = self.offer();
        Ok(Inventory {
            node: self.config.node.clone(),
            boot_id: self.boot_id.clone(),
            capacity: Capacity {
                gpu_memory: offer.as_ref().map(|(_, memory)| *memory),
                ..self.config.capacity
            },
            gpus: offer.map(|(offer, _)| offer),
            runs_containers: self.config.containers.is_some() && self.config.hierarchies.v1.is_empty(),
            tasks,
            highest_epoch: self.highest_epoch,
            agent_socket: self.config.socket.display().to_string(),
            session: self.session,
        })
    }

    fn assigned_ids(&self) -> Vec<TaskId> {
        let assigned = self.tasks.iter().filter(|(_, task)| task.record.assignment.is_some());
        assigned.map(|(id, _)| id.clone()).collect()
    }

    /// A task of the broker's, as it is now.
    pub fn assigned(&self, id: &TaskId) -> Result<Assigned, NodeError> {
        let assignment = self.task(id)?.record.assignment.as_ref();
        Ok(Assigned {
            status: self.status(id)?,
            generation: assignment.map_or(0, |assignment| assignment.generation),
            evicted: assignment.is_some_and(|assignment| assignment.evicted),
            lease_over: assignment.is_some_and(|assignment| assignment.lease_over),
            request: assignment.map(|assignment| *assignment.request()),
        })
    }

    /// Starts a task of the broker's, once: a repeated directive finds it there.
    pub fn start_assigned(
        &mut self,
        directive: &DirectiveId,
        owner: Owner,
        spec: TaskSpec,
        cards: CardSet,
        lease_seconds: Option<u32>,
    ) -> Result<Starting, NodeError> {
        self.heed(directive)?;
        let id = &directive.execution.task;
        if let Some(task) = self.tasks.get(id)
            && task.record.execution == directive.execution
        {
            return Ok(Starting::There(Box::new(self.assigned(id)?)));
        }
        let run_as =
            spec.run_as.clone().unwrap_or(Credentials { uid: owner.uid, gid: owner.gid, groups: Vec::new() });
        let Credentials { uid, gid, groups } = run_as;
        let image = spec.image.clone();
        let request = RunRequest {
            attempt: Some(directive.execution.attempt),
            task_id: Some(id.clone()),
            command: spec.command.clone(),
            env: spec.env.clone().into_iter().collect(),
            cwd: spec.cwd.clone().into(),
            limits: first_grant(&spec, cards, self.config.capacity.network.is_some()),
            run_as: Some(Caller { uid, gid, groups }),
            assignment: Some(Assignment {
                spec,
                generation: directive.generation,
                evicted: false,
                lease_seconds,
                lease_over: false,
                resized: None,
            }),
            owner: Some(owner),
            gpus: 0,
            gpu_model: String::new(),
            image,
        };
        let broker = Caller { uid: 0, gid: 0, groups: Vec::new() };
        let answer = self.run(&broker, request)?;
        self.keep_contact();
        Ok(Starting::Waiting(answer))
    }

    /// Ends a task of the broker's.
    pub fn stop_assigned(&mut self, directive: &DirectiveId, grace: Duration) -> Result<Assigned, NodeError> {
        self.heed(directive)?;
        let id = &directive.execution.task;
        if self.task(id)?.record.execution != directive.execution {
            return Err(NodeError::NoSuchTask(id.clone()));
        }
        let state_dir = self.config.state_dir.clone();
        let task = self.task_mut(id)?;
        if let Some(assignment) = &mut task.record.assignment {
            assignment.generation = assignment.generation.max(directive.generation);
            task.record.save(&state_dir)?;
        }
        self.cancel(&Caller { uid: 0, gid: 0, groups: Vec::new() }, id, grace)?;
        self.assigned(id)
    }

    /// Reserves another amount for a task of the broker's. CPU follows with the next turn of the adjustment, which guarantees
    /// what is reserved. Memory is limited to what is reserved where its owner has set no limit; a limit below what it uses is
    /// refused, and then nothing has changed.
    pub fn resize_assigned(
        &mut self,
        directive: &DirectiveId,
        request: Demand,
        reason: &str,
    ) -> Result<Assigned, NodeError> {
        self.heed(directive)?;
        let id = &directive.execution.task;
        let task = self.task(id)?;
        let assignment = task.record.assignment.as_ref();
        let Some(assignment) = assignment.filter(|_| task.record.execution == directive.execution) else {
            return Err(NodeError::NoSuchTask(id.clone()));
        };
        if assignment.generation >= directive.generation {
            return self.assigned(id);
        }
        let is_ending = task.over || task.record.kill_at_boottime_ns.is_some();
        if !task.is_running() || task.started.is_none() || is_ending {
            return Err(NodeError::Precondition(format!("`{id}` does not run, or is about to end")));
        }
        let (before, own) = (*assignment.request(), &assignment.spec.profile.demand);
        let rest = |demand: &Demand| (demand.gpu_memory, demand.network, demand.storage_io);
        if rest(&request) != rest(own) {
            return Err(NodeError::Invalid(
                "only CPU and memory of a running task can be reserved anew".into(),
            ));
        }
        let follows = assignment.spec.limits.memory == Limit::Unlimited && task.record.memory_floor.is_none();
        let in_force = task.record.limits.memory.at().unwrap_or(Bytes(u64::MAX));
        // What was given on top of what is reserved stays, and comes back when others need it.
        let wanted = match request.memory < before.memory {
            true => (in_force > request.memory).then_some(request.memory),
            false => (in_force < request.memory).then_some(request.memory),
        };
        if !follows && request.memory < before.memory {
            return Err(NodeError::Precondition(format!(
                "the memory of `{id}` is limited to what its owner or an operator said, and not to what is reserved"
            )));
        }
        if let Some(memory) = wanted.filter(|_| follows) {
            let change = LimitsChange { memory: Some(Limit::At(memory)), ..LimitsChange::default() };
            self.call_off(id);
            self.change(id, &change, &Cause::new(Actor::Broker(directive.epoch), reason))?;
        }
        failpoint::hit("resize-before-record");
        let state_dir = self.config.state_dir.clone();
        let task = self.task_mut(id)?;
        if let Some(assignment) = &mut task.record.assignment {
            assignment.generation = directive.generation;
            assignment.resized = (request != assignment.spec.profile.demand).then_some(request);
            task.record.save(&state_dir)?;
        }
        self.look_at_memory();
        self.assigned(id)
    }

    /// The broker has recorded how it ended.
    pub fn forget_assigned(&mut self, directive: &DirectiveId) -> Result<(), NodeError> {
        self.heed(directive)?;
        let Some(task) = self.tasks.get_mut(&directive.execution.task) else { return Ok(()) };
        if task.record.execution != directive.execution || task.is_running() {
            return Ok(());
        }
        // It stays, with its log, as any ended task of this node; but it is reported no more.
        task.record.assignment = None;
        task.unsaved = task.record.save(&self.config.state_dir).is_err();
        Ok(())
    }

    /// The broker's policies, in place of those before.
    pub fn set_policies(&mut self, revision: u64, policies: Vec<Policy>) {
        self.policies = policies;
        self.policies_revision = revision;
        self.adjustment.forget_policies();
        // What may be lent to a task depends on them.
        for id in self.assigned_ids() {
            let is_open = |task: &super::Task| task.is_running() && task.target.is_some();
            if !self.task(&id).is_ok_and(is_open) {
                continue;
            }
            if let Err(error) = self.enrol(&id) {
                tracing::warn!(task = %id, error = %launch::chain(&error), "cannot lend by the new policies");
            }
        }
    }

    /// Tells the broker, if one listens. What is lost is in the inventory of the next meeting.
    pub(super) fn tell(&mut self, news: News) {
        if let Some(sender) = &self.news
            && sender.try_send(news).is_err()
        {
            // Gone, or so far behind that it had better start anew.
            self.news = None;
        }
    }

    pub(super) fn tell_task(&mut self, id: &TaskId) {
        if self.news.is_none() || self.tasks.get(id).is_none_or(|task| task.record.assignment.is_none()) {
            return;
        }
        // One that is only being started does not run yet.
        if self.tasks.get(id).is_some_and(|task| task.is_running() && task.started.is_none()) {
            return;
        }
        match self.assigned(id) {
            Ok(assigned) => self.tell(News::Task(Box::new(assigned))),
            Err(error) => tracing::warn!(task = %id, error = %launch::chain(&error), "cannot report a task"),
        }
    }

    /// Notes, durably, that a task ends because this node evicts it.
    pub(super) fn mark_evicted(&mut self, id: &TaskId) -> Result<(), NodeError> {
        let state_dir = self.config.state_dir.clone();
        let task = self.task_mut(id)?;
        if let Some(assignment) = &mut task.record.assignment {
            assignment.evicted = true;
            task.record.save(&state_dir)?;
        }
        Ok(())
    }

    pub(super) fn tell_decision(&mut self, execution: &ExecutionId, kind: DecisionKind, reason: String) {
        tracing::info!(%execution, %kind, reason, "decided");
        self.counts.decided(kind);
        let decision = Decision { at: now(), by: self.config.node.clone(), kind, reason, nodes: Vec::new() };
        self.tell(News::Decision { execution: execution.clone(), decision });
    }

    /// Once a second: how the node and its tasks are.
    pub(super) fn tell_all(&mut self) {
        if self.news.is_none() {
            return;
        }
        self.tell(News::Node {
            cpu_utilisation_permille: self.cpu_utilisation_permille,
            policies_revision: self.policies_revision,
        });
        for id in self.assigned_ids() {
            if self.task(&id).is_ok_and(super::Task::is_running) {
                self.tell_task(&id);
            }
        }
    }
}

/// A task starts with its request; from there the node's adjustment moves CPU. Memory is limited to the explicit limit, else
/// to the request, and so is that of its card. Of the network its request is guaranteed to it where the node `divides` that, else it is its limit.
fn first_grant(spec: &TaskSpec, cards: CardSet, divides: bool) -> Limits {
    let demand = &spec.profile.demand;
    Limits {
        cpu: Limit::At(demand.cpu),
        cpu_weight: spec.limits.cpu_weight.or(Weight::new(weight(spec.profile.priority))),
        memory: match spec.limits.memory {
            Limit::Unlimited => Limit::At(demand.memory),
            limit => limit,
        },
        net_egress: match demand.network {
            Some(request) if !divides => Limit::At(request),
            _ => spec.limits.net_egress,
        },
        storage_io: spec.limits.storage_io,
        storage_io_weight: spec.limits.storage_io_weight,
        storage_io_latency: spec.limits.storage_io_latency,
        reclaim_idle: spec.limits.reclaim_idle,
        net_egress_guarantee: demand.network.filter(|_| divides),
        net_egress_weight: spec
            .limits
            .net_egress_weight
            .or(Weight::new(weight(spec.profile.priority)))
            .filter(|_| divides),
        net_ingress: spec.limits.net_ingress,
        gpu_cards: (!cards.is_empty()).then_some(cards),
        gpu_memory: match demand.gpu_memory {
            Some(request) if spec.gpus.count == 0 => Limit::At(request),
            _ => spec.limits.gpu_memory,
        },
        gpu_power: spec.limits.gpu_power,
    }
}

/// `cpu.weight` of a priority: what decides while a CPU is contended.
const fn weight(priority: Priority) -> u32 {
    match priority {
        Priority::High => 400,
        Priority::Medium => 200,
        Priority::Low => 100,
    }
}
