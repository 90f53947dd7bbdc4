//! What clients ask for: tasks and their end.

use std::sync::Arc;

use shaper_core::{
    gpu::CardSet,
    id::TaskId,
    spec::{Credentials, DecisionKind, OnNodeLost, TaskSpec},
};

use super::{
    Denied, Invalid, Phase, Refusal, Reply, Row, Taken, Turn,
    query::{self, is_operator},
    state::{Cancel, Submission, Task, TaskRow},
};

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
            resized: None,
            cards: CardSet::NONE,
        };
        self.state.next_sequence += 1;
        self.state.shown.list(sequence, id.clone());
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
}

fn check(spec: &TaskSpec) -> Result<(), Invalid> {
    // An image has a command and a directory of its own.
    let is_the_images = |is_left_out: bool| is_left_out && spec.image.is_some();
    let has_program = spec.command.first().is_some_and(|program| !program.is_empty());
    if !(has_program || is_the_images(spec.command.is_empty())) {
        return Err(Invalid::NoCommand);
    }
    if !(spec.cwd.starts_with('/') || is_the_images(spec.cwd.is_empty())) {
        return Err(Invalid::Cwd(spec.cwd.clone()));
    }
    check_name("name", &spec.name)?;
    check_name("namespace", &spec.namespace)
}

/// A name that can be part of a key.
pub(super) fn check_name(what: &'static str, name: &str) -> Result<(), Invalid> {
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
