//! Nodes that do not answer: what an operator says of one
//! ([decision 0025](../../../docs/decisions/0025-who-says-that-a-node-is-dead.md)).

use shaper_core::spec::{Credentials, DecisionKind};

use super::{Denied, Refusal, Reply, Turn, query::is_operator};

impl Turn<'_> {
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
            let Some(task) = self.state.tasks.get(id).map(|row| &row.task) else { continue };
            let (attempt, is_to_end) = (task.attempt, task.cancel.is_some());
            let next = if is_to_end { "" } else { "; to be placed again" };
            let reason =
                format!("uid {} says that {name} is dead, and attempt {attempt} with it{next}", caller.uid);
            self.decide(id, DecisionKind::Lost, reason, Vec::new());
            // Through no fault of the task's: no retry is used.
            if is_to_end { self.cancelled(id) } else { self.place_again(id) }
        }
        Ok(Reply::Fenced(tasks))
    }
}
