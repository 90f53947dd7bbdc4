//! Nodes that do not answer: what an operator says of one, and tasks that are run again without anybody's word
//! ([decision 0025](../../../docs/decisions/0025-who-says-that-a-node-is-dead.md)).
//!
//! A task with a lease is ended on its node when the broker was not heard of there for so long. What counts there is when the
//! agent *asked*, of the latest question that was answered. This broker answers in a session that it has, while it owns the
//! rows; another one answered, if at all, before this one owned them. So every lease counts from `contact_at` of its node
//! or from before, and the attempt is over one lease later. The broker waits half as long again.

use std::collections::{BTreeMap, BTreeSet};

use shaper_core::{
    id::TaskId,
    spec::{Credentials, DecisionKind},
};

use super::{Denied, Effect, Refusal, Reply, SessionId, State, Turn, query::is_operator};

/// The tasks that have a lease, by their nodes.
#[derive(Clone, Debug, Default)]
pub(super) struct Leases {
    /// Of a node: first those with the shortest lease, in seconds.
    by_node: BTreeMap<String, BTreeSet<(u32, TaskId)>>,
    /// Before this uptime no task is to be placed again.
    look_at: Option<u64>,
}

impl Leases {
    pub(super) fn add(&mut self, node: &str, seconds: u32, id: &TaskId, uptime: u64) {
        self.by_node.entry(node.to_owned()).or_default().insert((seconds, id.clone()));
        let due = uptime.saturating_add(patience(seconds));
        self.look_at = Some(self.look_at.map_or(due, |at| at.min(due)));
    }

    pub(super) fn remove(&mut self, node: &str, seconds: u32, id: &TaskId) {
        let Some(of_node) = self.by_node.get_mut(node) else { return };
        of_node.remove(&(seconds, id.clone()));
        if of_node.is_empty() {
            self.by_node.remove(node);
        }
        if self.by_node.is_empty() {
            self.look_at = None;
        }
    }
}

/// How many nanoseconds after the last contact with its node a task with this lease is placed again.
fn patience(lease_seconds: u32) -> u64 {
    const LEASE_AND_A_HALF: u64 = 1_500_000_000;
    u64::from(lease_seconds) * LEASE_AND_A_HALF
}

/// The uptime at which a look is due whether tasks of silent nodes are to be placed again. The shell sends a Tick then.
pub fn next_rerun(state: &State) -> Option<u64> {
    state.leases.look_at
}

impl Turn<'_> {
    /// An agent asks whether the broker is there.
    pub(super) fn contact(&mut self, session: SessionId, number: u64) {
        let node = self.state.sessions.get(&session).and_then(|name| self.state.nodes.get_mut(name));
        if let Some(node) = node {
            node.contact_at = self.state.uptime;
            self.effects.push(Effect::Contact(session, number));
        }
    }

    /// Places again what must have been ended by now on nodes that did not ask for too long.
    pub(super) fn rerun(&mut self) {
        let State { uptime, nodes, leases, .. } = &mut *self.state;
        if leases.look_at.is_none_or(|at| at > *uptime) {
            return;
        }
        leases.look_at = None;
        let mut due = Vec::new();
        for (name, tasks) in &leases.by_node {
            let contact_at = nodes.get(name).map_or(0, |node| node.contact_at);
            for (seconds, id) in tasks {
                let at = contact_at.saturating_add(patience(*seconds));
                if at > *uptime {
                    leases.look_at = Some(leases.look_at.map_or(at, |first| first.min(at)));
                    break;
                }
                due.push((name.clone(), *seconds, id.clone()));
            }
        }
        for (node, seconds, id) in due {
            if let Some(session) = self.state.nodes.get(&node).and_then(|node| node.session) {
                // The connection is there, and nobody at the other end.
                let reason = format!("node {node} has not asked in time whether the broker is there");
                self.effects.push(Effect::Close(session, reason));
                self.gone(session);
            }
            let reason = format!(
                "{node} was not heard of for one and a half times the lease of {seconds} s, after which it ends the task"
            );
            self.take_from_lost(&id, &reason);
        }
    }

    /// The latest attempt is over with its node, through no fault of the task's: no retry is used.
    pub(super) fn take_from_lost(&mut self, id: &TaskId, reason: &str) {
        let is_to_end = self.state.tasks.get(id).is_some_and(|row| row.task.cancel.is_some());
        let next = if is_to_end { "" } else { "; to be placed again" };
        self.decide(id, DecisionKind::Lost, format!("{reason}{next}"), Vec::new());
        if is_to_end { self.cancelled(id) } else { self.place_again(id) }
    }

    /// An operator says that a node is dead.
    pub(super) fn fence(&mut self, caller: &Credentials, name: &str) {
        self.answer = Some(self.accept_fence(caller, name));
    }

    fn accept_fence(&mut self, caller: &Credentials, name: &str) -> Result<Reply, Refusal> {
        if !is_operator(caller) {
            return Err(Refusal::Denied(Denied::Fence));
        }
        let Some(node) = self.state.nodes.get(name) else {
            return Err(Refusal::NoSuchNode(name.to_owned()));
        };
        if node.session.is_some() {
            return Err(Refusal::NodeAnswers(name.to_owned()));
        }
        let tasks: Vec<_> = node.tasks.iter().cloned().collect();
        for id in &tasks {
            let attempt = self.state.tasks.get(id).map_or(0, |row| row.task.attempt);
            let reason =
                format!("uid {} says that {name} is dead, and attempt {attempt} with it", caller.uid);
            self.take_from_lost(id, &reason);
        }
        Ok(Reply::Fenced(tasks))
    }
}
