//! What clients may see. The operator sees everything; others their own tasks, and all nodes.

use shaper_core::{
    id::TaskId,
    place::{self, Candidate},
    spec::{Credentials, Decision, DecisionKind, NodeVerdict, Priority},
    task::UnixNanos,
};

use super::{
    Phase, Refusal, State, Task,
    history::{History, Measured},
    learn::{self, Kind},
    state::{Node, NodeRow, TaskRow, VERDICTS},
};

/// uid 0.
pub fn is_operator(caller: &Credentials) -> bool {
    caller.uid == 0
}

/// Whether a task of `owner` is the caller's to see and to act on.
pub fn may_see(caller: &Credentials, owner: &Credentials) -> bool {
    is_operator(caller) || caller.uid == owner.uid
}

/// One task.
pub fn task<'a>(state: &'a State, caller: &Credentials, id: &TaskId) -> Result<&'a TaskRow, Refusal> {
    let row = state.tasks.get(id).filter(|row| may_see(caller, row.task.owner()));
    row.map(Box::as_ref).ok_or_else(|| Refusal::NoSuchTask(id.clone()))
}

/// The caller's tasks.
pub fn tasks<'a>(state: &'a State, caller: &'a Credentials) -> impl Iterator<Item = &'a Task> {
    state.tasks.values().map(|row| &row.task).filter(|task| may_see(caller, task.owner()))
}

/// The decisions about a task. The latest of a task that waits judges the nodes as they are now.
pub fn explain(
    state: &State,
    caller: &Credentials,
    id: &TaskId,
    now: UnixNanos,
) -> Result<Vec<Decision>, Refusal> {
    let TaskRow { task, decisions } = task(state, caller, id)?;
    let mut decisions: Vec<_> = decisions.iter().cloned().collect();
    let latest = decisions.iter_mut().rfind(|decision| decision.kind == DecisionKind::Pending);
    if let (Phase::Pending { .. }, Some(latest)) = (&task.phase, latest) {
        latest.nodes = verdicts(state, task, now);
        decisions.extend(state.scale.explain(task, now));
    }
    Ok(decisions)
}

/// How every node that answers stands to a task now.
fn verdicts(state: &State, task: &Task, now: UnixNanos) -> Vec<NodeVerdict> {
    let nodes = state.nodes_in_order().filter(|node| node.session.is_some());
    nodes.map(|node| judge(node, task, now)).collect()
}

/// The same of a few: the chosen one, and the first.
pub(super) fn considered(
    state: &State,
    task: &Task,
    chosen: Option<&str>,
    now: UnixNanos,
) -> Vec<NodeVerdict> {
    let chosen = chosen.and_then(|name| state.nodes.get(name));
    let is_other = |node: &&Node| chosen.is_none_or(|chosen| chosen.row.name != node.row.name);
    let nodes = chosen.into_iter().chain(state.connected().filter(is_other)).take(VERDICTS);
    nodes.map(|node| judge(node, task, now)).collect()
}

fn judge(node: &Node, task: &Task, now: UnixNanos) -> NodeVerdict {
    let (node_row, node): (&NodeRow, Candidate<'_>) = (&node.row, node.candidate());
    let mut verdict = place::judge(task.needs(), task.priority(), &node);
    if let Some(avoid) = task.avoid.iter().find(|avoid| avoid.node == node.name && avoid.holds(now)) {
        let seconds = avoid.until.saturating_sub(now).div_ceil(1_000_000_000);
        verdict.score = None;
        verdict.lacking.push(format!("it {}; not again for {seconds} s", avoid.why.done_to_it()));
    }
    if let Some(cordon) = &node_row.cordon {
        verdict.score = None;
        verdict.lacking.push(format!("it takes no tasks: cordoned by {}", cordon.by));
    }
    verdict
}

/// The names of which something is known: for those who ran a task of theirs.
pub fn profiles<'a>(
    state: &'a State,
    caller: &'a Credentials,
) -> impl Iterator<Item = (&'a History, Option<&'a Kind>)> {
    let visible = state
        .histories
        .iter()
        .filter(|(_, history)| is_operator(caller) || history.users.contains(&caller.uid));
    visible.map(|(key, history)| (history, state.kinds.get(key)))
}

/// What finished tasks of this name used: for those who ran one.
pub fn profile(
    state: &State,
    caller: &Credentials,
    namespace: &str,
    name: &str,
    priority: Priority,
) -> Result<Measured, Refusal> {
    state
        .histories
        .get(&(namespace.to_owned(), name.to_owned()))
        .filter(|history| is_operator(caller) || history.users.contains(&caller.uid))
        .map(|history| learn::measured(history, state.kind(namespace, name), priority))
        .ok_or_else(|| Refusal::NoHistory { namespace: namespace.to_owned(), name: name.to_owned() })
}
