//! The broker's own messages and their wire types; the vocabulary that it shares with others is in
//! `shaper_proto::convert`.

use shaper_core::{
    gpu::CardOffer,
    id::TaskId,
    policy::Rule,
    profile::Expected,
    spec::{Capacity, Decision, Demand, Policy, Priority},
    task::{Phase as RunPhase, TaskStatus, UnixNanos},
};
use shaper_proto::{
    convert::{self, WireError},
    v1,
};

use crate::{
    actor::ToAgent,
    reactor::{
        Directive, DirectiveKind, DirectiveOutcome, DirectiveResult, Event, Hello, Leaving, NodeTask, Phase,
        SessionId, State, Submission, Task,
        history::{Estimate, History},
        learn::{self, Kind},
        policies::{Gift, PolicyChange, PolicyRevision, Preview},
        scale::{Emptiable, GroupView, Told, order_text},
        state::{Node, PolicyRow},
    },
};

/// How much of a resource to request, and why.
pub fn estimate(estimate: Estimate) -> v1::ResourceEstimate {
    let Estimate { resource, request, hours, expected: Expected { touched, unserved, unused } } = estimate;
    v1::ResourceEstimate { resource: resource.name().into(), request, hours, touched, unserved, unused }
}

/// A name of which something is known.
pub fn profile_summary(history: &History, kind: Option<&Kind>) -> v1::ProfileSummary {
    let measured = learn::measured(history, kind, Priority::Medium);
    v1::ProfileSummary {
        namespace: history.namespace.clone(),
        name: history.name.clone(),
        executions: measured.executions,
        hours: measured.estimates.iter().map(|estimate| estimate.hours).fold(0.0, f64::max),
        demand: Some(measured.demand.into()),
        seen_at_unix_nanos: kind.map(Kind::seen_at).filter(|at| *at > 0),
    }
}

/// A task as clients see it, in an epoch.
pub fn cluster_task(epoch: u64, task: &Task) -> v1::ClusterTask {
    use v1::cluster_task::{Pending, Phase as Wire};
    let phase = match &task.phase {
        Phase::Pending { reason, .. } => Some(Wire::Pending(Pending { reason: reason.clone() })),
        Phase::Nominated { node } => {
            Some(Wire::Pending(Pending { reason: format!("{node} is being cleared for it") }))
        }
        Phase::Starting { node } => Some(Wire::StartingOn(node.clone())),
        Phase::Running { node } => Some(Wire::RunningOn(node.clone())),
        Phase::Ended { status, at } => {
            convert::exit(&RunPhase::Ended { status: status.clone(), at: *at }).map(Wire::Ended)
        }
        Phase::Cancelled => Some(Wire::Cancelled(true)),
    };
    v1::ClusterTask {
        spec: Some(task.spec().clone().into()),
        owner: Some(task.owner().clone().into()),
        attempt: task.attempt,
        phase,
        submitted_unix_nanos: task.submission.submitted_at,
        revision: task.revision,
        on_node: task.on_node.as_deref().cloned().map(Into::into),
        cancel_requested: task.cancel.is_some() || task.phase == Phase::Cancelled,
        node: task.node.clone().unwrap_or_default(),
        epoch,
        reserved: Some(*task.request()).filter(|request| request != task.demand()).map(Into::into),
        gpu_cards: convert::gpu::granted(task.cards),
    }
}

/// A node as clients see it.
pub fn node_status(node: &Node) -> v1::NodeStatus {
    v1::NodeStatus {
        name: node.row.name.clone(),
        connected: node.session.is_some(),
        capacity: Some(node.row.capacity.into()),
        reserved: Some(node.reserved_in_all().into()),
        cpu_utilisation_permille: node.cpu_utilisation_permille,
        agent_socket: node.row.agent_socket.clone(),
        boot_id: node.row.boot_id.clone(),
        cordoned_by: node.row.cordon.as_ref().map(|cordon| cordon.by.clone()).unwrap_or_default(),
        drains: node.row.cordon.as_ref().is_some_and(|cordon| cordon.drains),
        gpus: Some(&node.row.gpus).filter(|offer| !offer.cards.is_empty()).cloned().map(Into::into),
        gpu_cards_taken: convert::gpu::granted(node.cards.taken()),
    }
}

/// A task that is to go from a node as clients see it.
pub fn leaving_task(leaving: Leaving) -> v1::LeavingTask {
    let Leaving { task, priority, since, cpu_ns, goes_to } = leaving;
    v1::LeavingTask {
        task_id: task.into(),
        priority: v1::Priority::from(priority).into(),
        since_unix_nanos: since,
        cpu_nanos: cpu_ns,
        goes_to: goes_to.unwrap_or_default(),
    }
}

/// The groups of nodes that are started and ended as clients see them.
pub fn scale(state: &State, now: UnixNanos) -> v1::GetScaleResponse {
    let mut waits: Vec<_> = state.scale.told.iter().collect();
    waits.sort_by(|(_, a), (_, b)| b.tasks.cmp(&a.tasks).then_with(|| a.text.cmp(&b.text)));
    let waits = waits.into_iter().map(|((demand, _), Told { tasks, text })| v1::ScaleWait {
        demand: Some((*demand).into()),
        tasks: u32::try_from(*tasks).unwrap_or(u32::MAX),
        text: text.clone(),
    });
    let waits = waits.collect();
    let groups = state.scale_groups().map(|view| {
        let emptiable = state.emptiable(&view);
        scale_group(view, emptiable, now)
    });
    v1::GetScaleResponse { groups: groups.collect(), waits }
}

fn scale_group(view: GroupView<'_>, emptiable: Option<Emptiable>, now: UnixNanos) -> v1::ScaleGroup {
    let GroupView { group, standing, capacity, idle } = view;
    let order = standing.order.as_ref().map(|order| v1::ScaleOrder {
        number: order.number,
        unix_nanos: order.at,
        target: order.target,
        text: order_text(order),
    });
    let notes =
        standing.notes.iter().map(|note| v1::ScaleNote { unix_nanos: note.at, text: note.text.clone() });
    let idle =
        idle.into_iter().map(|(node, since)| v1::IdleNode { node: node.to_owned(), since_unix_nanos: since });
    v1::ScaleGroup {
        name: group.name.clone(),
        provider: group.provider.kind().to_owned(),
        nodes: group.nodes.to_string(),
        capacity: capacity.map(Into::into),
        min: group.min,
        max: group.max,
        target: standing.target,
        registered: standing.registered,
        coming: standing.coming(standing.registered),
        leaving: standing.leaving.keys().cloned().collect(),
        order,
        rests_until_unix_nanos: standing.resting(now),
        failures: standing.failures,
        problem: standing.problem.clone().unwrap_or_default(),
        notes: notes.collect(),
        idle: idle.collect(),
        emptiable: emptiable.map(|it| v1::EmptiableNode {
            node: it.node,
            tasks: u32::try_from(it.tasks).unwrap_or(u32::MAX),
            cpu_nanos: it.cpu_ns,
            goes_to: it.goes_to.into_iter().collect(),
        }),
    }
}

/// A policy as clients see it.
pub fn policy_status(row: &PolicyRow) -> v1::PolicyStatus {
    v1::PolicyStatus { policy: Some(row.policy.clone().into()), revision: row.revision }
}

/// A change of the set of policies as clients see it.
pub fn policy_revision(change: PolicyRevision) -> v1::PolicyRevision {
    let PolicyRevision { revision, at, uid, rolled_back_to, changes } = change;
    let policy = |of: Option<(Policy, u32)>| of.map(|(policy, _)| policy.into());
    let change = |PolicyChange { name, before, after }: PolicyChange| v1::PolicyChange {
        policy_name: name,
        before: policy(before),
        after: policy(after),
    };
    let changes = changes.into_iter().map(change).collect();
    v1::PolicyRevision { revision, unix_nanos: at, uid, rolled_back_to, changes }
}

/// What policies would give a task, as clients see it.
pub fn task_policies(Preview { task, node, settings }: Preview) -> v1::TaskPolicies {
    let overruled = |(policy, says, rule): (String, String, Rule)| v1::OverruledPolicy {
        policy,
        says,
        because_the_other: rule.to_string(),
    };
    let setting = |Gift { setting, by: (policy, says), overruled: others }: Gift| v1::PolicySetting {
        setting: setting.to_string(),
        policy,
        says,
        overruled: others.into_iter().map(overruled).collect(),
    };
    v1::TaskPolicies {
        task_id: task.into(),
        node: node.unwrap_or_default(),
        settings: settings.into_iter().map(setting).collect(),
    }
}

/// A message to an agent; a reason to end the session is none.
pub fn to_agent(message: ToAgent) -> Result<v1::BrokerMessage, String> {
    use v1::broker_message::Kind;
    let kind = match message {
        ToAgent::Welcome(epoch) => Kind::Welcome(v1::Welcome { epoch }),
        ToAgent::Policies(revision, policies) => {
            let policies = policies.into_iter().map(Into::into).collect();
            Kind::Policies(v1::PolicySet { revision, policies })
        }
        ToAgent::Contact(number) => Kind::Contact(v1::Contact { number }),
        ToAgent::Directive(it) => Kind::Directive(directive(*it)),
        ToAgent::Close(reason) => return Err(reason),
    };
    Ok(v1::BrokerMessage { kind: Some(kind) })
}

fn directive(directive: Directive) -> v1::Directive {
    use v1::directive::Kind;
    let Directive { execution, generation, epoch, kind } = directive;
    let kind = match kind {
        DirectiveKind::Start(submission, cards) => {
            let Submission { spec, owner, task_lease_seconds, .. } = &*submission;
            let start = v1::Start {
                spec: Some(spec.clone().into()),
                owner: Some(owner.clone().into()),
                gpu_cards: convert::gpu::granted(cards),
            };
            match *task_lease_seconds {
                None => Kind::Start(start),
                Some(task_lease_seconds) => {
                    Kind::LeasedStart(v1::LeasedStart { start: Some(start), task_lease_seconds })
                }
            }
        }
        DirectiveKind::Stop { grace_millis, reason } => Kind::Stop(v1::Stop { grace_millis, reason }),
        DirectiveKind::Resize { request, reason } => {
            Kind::Resize(v1::Resize { request: Some(request.into()), reason })
        }
        DirectiveKind::Forget => Kind::Forget(true),
    };
    v1::Directive {
        task_id: execution.task.into(),
        attempt: execution.attempt,
        generation,
        epoch,
        kind: Some(kind),
    }
}

fn node_task(wire: v1::NodeTask) -> Result<NodeTask, WireError> {
    let v1::NodeTask { task, generation, evicted, lease_over, request } = wire;
    let request = request.map(Demand::try_from).transpose()?;
    let status = TaskStatus::try_from(task.ok_or(WireError::Missing("task"))?)?;
    convert::execution(status.task_id.as_str(), status.attempt)?;
    Ok(NodeTask { status, generation, evicted, lease_over, request })
}

/// Epochs count starts of brokers: one beyond this comes from nothing that counts.
const MAX_EPOCH: u64 = 1 << 62;

/// What an agent says first.
pub fn hello(wire: v1::Hello) -> Result<Hello, WireError> {
    let v1::Hello { node, boot_id, capacity, inventory, highest_epoch, agent_socket, gpus, runs_containers } =
        wire;
    let expected =
        "a name: 1 to 63 letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit";
    let node = TaskId::try_from(node).map_err(|_| WireError::Invalid { field: "node", expected })?;
    if boot_id.is_empty() || boot_id.len() > 64 {
        return Err(WireError::Invalid { field: "boot_id", expected: "1 to 64 bytes" });
    }
    if highest_epoch >= MAX_EPOCH {
        let field = "highest_epoch";
        return Err(WireError::OutOfRange { field, value: highest_epoch, expected: "below 2^62" });
    }
    let gpus = gpus.map(CardOffer::try_from).transpose()?.unwrap_or_default();
    if gpus.model.len() > 255 || gpus.model.contains('\0') {
        return Err(WireError::Invalid { field: "gpus.model", expected: "at most 255 bytes without NUL" });
    }
    Ok(Hello {
        node: node.into(),
        boot_id,
        capacity: Capacity::try_from(capacity.ok_or(WireError::Missing("capacity"))?)?,
        inventory: inventory.into_iter().map(node_task).collect::<Result<_, _>>()?,
        highest_epoch,
        agent_socket,
        gpus,
        containers: runs_containers,
    })
}

/// What an agent says later.
pub fn event(session: SessionId, wire: v1::AgentMessage) -> Result<Event, WireError> {
    use v1::agent_message::Kind;
    Ok(match wire.kind.ok_or(WireError::Missing("kind"))? {
        Kind::Hello(_) => {
            return Err(WireError::Invalid { field: "hello", expected: "sent once, as the first message" });
        }
        Kind::Result(result) => Event::DirectiveResult { session, result: directive_result(result)? },
        Kind::Task(task) => Event::TaskReport { session, report: Box::new(node_task(task)?) },
        Kind::Report(v1::NodeReport { cpu_utilisation_permille, policies_revision: _ }) => {
            Event::NodeReport { session, cpu_utilisation_permille }
        }
        Kind::Contact(v1::Contact { number }) => Event::Contact { session, number },
        Kind::Decision(v1::TaskDecision { task_id, attempt, decision }) => Event::TaskDecision {
            session,
            execution: convert::execution(&task_id, attempt)?,
            decision: Box::new(Decision::try_from(decision.ok_or(WireError::Missing("decision"))?)?),
        },
    })
}

fn directive_result(wire: v1::DirectiveResult) -> Result<DirectiveResult, WireError> {
    use v1::directive_result::Outcome;
    let v1::DirectiveResult { task_id, attempt, generation, outcome } = wire;
    let outcome = match outcome.ok_or(WireError::Missing("outcome"))? {
        Outcome::Accepted(_) => DirectiveOutcome::Accepted,
        Outcome::Refused(why) => DirectiveOutcome::Refused(why),
        Outcome::Settled(task) => DirectiveOutcome::Settled(Box::new(node_task(task)?)),
    };
    Ok(DirectiveResult { execution: convert::execution(&task_id, attempt)?, generation, outcome })
}
