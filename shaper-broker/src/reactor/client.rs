//! What clients ask for: tasks, their end, policies.

use std::sync::Arc;

use shaper_core::{
    id::TaskId,
    spec::{Credentials, DecisionKind, OnNodeLost, Policy, TaskSpec},
};

use super::{
    Denied, Effect, Invalid, Phase, Refusal, Reply, Row, Taken, Turn,
    query::{self, is_operator},
    state::{Cancel, PolicyRow, Submission, Task, TaskRow},
};

const MAX_POLICIES: usize = 1_000;
/// Of a user other than root.
const MAX_POLICIES_EACH: usize = 50;

impl Turn<'_> {
    pub(super) fn submit(&mut self, caller: Credentials, spec: TaskSpec) {
        let id = spec.profile.task_id.clone();
        let accepted = self.accept(caller, spec);
        self.answer = Some(accepted.map(|()| Reply::Task(id)));
    }

    fn accept(&mut self, caller: Credentials, spec: TaskSpec) -> Result<(), Refusal> {
        let id = spec.profile.task_id.clone();
        check(&spec).map_err(Refusal::Invalid)?;
        if !may_run_as(&caller, &spec) {
            return Err(Refusal::Denied(Denied::RunAs));
        }
        if let Some(row) = self.state.tasks.get(&id) {
            let Submission { spec: before, owner, .. } = &*row.task.submission;
            return match (owner.uid == caller.uid, *before == spec) {
                (true, true) => Ok(()),
                (true, false) => Err(Refusal::Exists(id, Taken::OtherSpec)),
                (false, _) => Err(Refusal::Exists(id, Taken::OtherUser)),
            };
        }
        let limit = self.state.bounds.open_tasks;
        if self.state.open_tasks() >= limit {
            return Err(Refusal::Full {
                what: "unfinished tasks",
                limit,
                remedy: "wait until some have ended",
            });
        }
        let sequence = self.state.next_sequence;
        let task_lease_seconds = match spec.on_node_lost {
            OnNodeLost::Wait => None,
            OnNodeLost::Rerun => Some(self.state.bounds.task_lease_seconds),
        };
        let submission =
            Submission { spec, owner: caller, submitted_at: self.now, sequence, task_lease_seconds };
        let task = Task {
            submission: Arc::new(submission),
            phase: Phase::Pending { reason: String::new(), scale_out_asked: false },
            attempt: 0,
            node: None,
            acknowledged: false,
            evicted: false,
            lost: false,
            generation: 0,
            start_generation: 0,
            cancel: None,
            preempted: None,
            retries_used: 0,
            setbacks: 0,
            avoid: Vec::new(),
            on_node: None,
            holders: Vec::new(),
            revision: 0,
        };
        self.state.next_sequence += 1;
        self.rows.push(Row::Submission { sequence, task: id.clone() });
        let phase = task.phase.clone();
        self.state.tasks.insert(id.clone(), Box::new(TaskRow { task, decisions: Default::default() }));
        self.move_to(&id, phase);
        Ok(())
    }

    pub(super) fn cancel(&mut self, caller: &Credentials, id: &TaskId, grace_millis: u64) {
        let visible = query::task(self.state, caller, id).map(|row| row.task.phase.clone());
        let reason = format!("by uid {}", caller.uid);
        match visible {
            Ok(Phase::Pending { .. } | Phase::Nominated { .. }) => {
                self.move_to(id, Phase::Cancelled);
                self.decide(id, DecisionKind::Cancelled, reason, Vec::new());
            }
            Ok(Phase::Starting { .. } | Phase::Running { .. }) => self.ask_to_stop(id, grace_millis, reason),
            Ok(Phase::Ended { .. } | Phase::Cancelled) => {}
            Err(refusal) => {
                self.answer = Some(Err(refusal));
                return;
            }
        }
        self.answer = Some(Ok(Reply::Task(id.clone())));
    }

    /// A second wish counts if it is more urgent than the first.
    fn ask_to_stop(&mut self, id: &TaskId, grace_millis: u64, reason: String) {
        let cancel = self.state.tasks.get(id).and_then(|row| row.task.cancel);
        if cancel.is_some_and(|cancel| cancel.grace_millis <= grace_millis) {
            return;
        }
        let Some(TaskRow { task, .. }) = self.change(id) else { return };
        task.generation += 1;
        task.cancel = Some(Cancel { grace_millis, generation: task.generation });
        if cancel.is_none() {
            self.decide(
                id,
                DecisionKind::Cancelled,
                format!("{reason}; asked its node to end it"),
                Vec::new(),
            );
        }
        self.direct_stop(id);
    }

    pub(super) fn apply_policy(&mut self, caller: &Credentials, within: &[String], policy: Policy) {
        let name = policy.policy_name.clone();
        let applied = self.accept_policy(caller, within, policy);
        self.answer = Some(applied.map(|()| Reply::Policy(name)));
    }

    /// A policy covers, shrinks and evicts tasks of its own namespace alone; so who may set it is a matter of that namespace.
    fn accept_policy(
        &mut self,
        caller: &Credentials,
        within: &[String],
        policy: Policy,
    ) -> Result<(), Refusal> {
        let is_theirs = |namespace: &String| is_operator(caller) || within.contains(namespace);
        if !is_theirs(&policy.namespace) {
            return Err(Refusal::Denied(Denied::Policies(policy.namespace)));
        }
        let name = policy.policy_name.clone();
        check_name("policy_name", &name).map_err(Refusal::Invalid)?;
        check_name("namespace", &policy.namespace).map_err(Refusal::Invalid)?;
        match self.state.policies.get(&name) {
            Some(PolicyRow { policy: Policy { namespace, .. }, uid, .. })
                if !is_operator(caller) && (*uid != caller.uid || !is_theirs(namespace)) =>
            {
                let (namespace, uid) = (namespace.clone(), *uid);
                return Err(Refusal::Denied(Denied::PolicyOfOthers { name, namespace, uid }));
            }
            Some(row) if row.policy == policy => return Ok(()),
            None if !is_operator(caller) && self.state.policies_of(caller.uid) >= MAX_POLICIES_EACH => {
                let remedy = "replace one of yours that is no longer needed";
                return Err(Refusal::Full { what: "policies of a user", limit: MAX_POLICIES_EACH, remedy });
            }
            None if self.state.policies.len() >= MAX_POLICIES => {
                let remedy = "replace one that is no longer needed";
                return Err(Refusal::Full { what: "policies", limit: MAX_POLICIES, remedy });
            }
            _ => {}
        }
        self.state.policies_revision += 1;
        let row = PolicyRow { policy, uid: caller.uid, revision: self.state.policies_revision };
        self.state.policies.insert(name.clone(), row);
        self.rows.push(Row::Policy(name));
        // Room may be made by it.
        self.look_at_all = true;
        let sessions: Vec<_> = self.state.sessions.keys().copied().collect();
        for session in sessions {
            let policies = self.policies_for(session);
            self.effects.push(policies);
        }
        Ok(())
    }

    pub(super) fn policies_for(&self, session: super::SessionId) -> Effect {
        let policies = self.state.policies.values().map(|row| row.policy.clone()).collect();
        Effect::Policies(session, self.state.policies_revision, policies)
    }
}

fn check(spec: &TaskSpec) -> Result<(), Invalid> {
    if spec.command.first().is_none_or(String::is_empty) {
        return Err(Invalid::NoCommand);
    }
    if !spec.cwd.starts_with('/') {
        return Err(Invalid::Cwd(spec.cwd.clone()));
    }
    check_name("name", &spec.name)?;
    check_name("namespace", &spec.namespace)
}

/// A name that can be part of a key.
fn check_name(what: &'static str, name: &str) -> Result<(), Invalid> {
    let fits = (1..=255).contains(&name.len());
    if fits && !name.chars().any(|character| character == '/' || character.is_control()) {
        return Ok(());
    }
    let name = name.chars().take(64).flat_map(char::escape_default).collect();
    Err(Invalid::Name { what, name })
}

/// The operator may name anybody; others themselves, with groups that they have.
fn may_run_as(caller: &Credentials, spec: &TaskSpec) -> bool {
    let Some(wanted) = &spec.run_as else { return true };
    let has = |group: &u32| *group == caller.gid || caller.groups.contains(group);
    is_operator(caller) || wanted.uid == caller.uid && has(&wanted.gid) && wanted.groups.iter().all(has)
}
