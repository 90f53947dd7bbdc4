//! Which waiting task goes where, and why another waits.

use std::collections::BTreeSet;

use shaper_core::{
    id::TaskId,
    place::{self, Candidate},
    spec::{DecisionKind, NodeVerdict},
    task::UnixNanos,
};

use super::{
    Effect, Phase, State, Turn, query,
    state::{Avoid, Node, Place, Setback, Task, TaskRow},
};

const SECOND: UnixNanos = 1_000_000_000;
/// A task does not go back to a node for 1 s, 2 s, 4 s … and not for longer than this.
const MAX_BACKOFF: UnixNanos = 60 * SECOND;

/// When something is to be decided that no event will cause. The shell sends a Tick then.
pub fn next_wakeup(state: &State) -> Option<UnixNanos> {
    let waiting = state.backing_off.iter().filter_map(|id| state.tasks.get(id));
    waiting.flat_map(|row| &row.task.avoid).map(|avoid| avoid.until).min()
}

/// Why a task waits. The text has no numbers that change while nothing else does: a task that goes on
/// waiting for the same reason is not written again.
enum Waits {
    NoNodes,
    NoneCouldEver,
    NoRoom,
    Backoff(Avoid),
}

impl Waits {
    fn reason(&self) -> String {
        match self {
            Waits::NoNodes => "no node is connected".to_owned(),
            Waits::NoneCouldEver => "no connected node could hold it, even if it were empty".to_owned(),
            Waits::NoRoom => "no connected node has room for it now".to_owned(),
            Waits::Backoff(Avoid { node, why, since, until }) => format!(
                "{node} {}, and it does not go back there for {} s; no other node fits",
                why.done_to_it(),
                until.saturating_sub(*since) / SECOND
            ),
        }
    }

    /// Whether more nodes would help: not when it only waits for a backoff to pass.
    fn wants_nodes(&self) -> bool {
        !matches!(self, Waits::Backoff(_))
    }
}

enum Found {
    Node(String),
    None(Waits),
}

fn best_of(task: &Task, nodes: &[&Node]) -> Option<usize> {
    let candidates: Vec<Candidate<'_>> = nodes.iter().map(|node| node.candidate()).collect();
    place::best(task.demand(), &candidates)
}

fn look(state: &State, task: &Task, now: UnixNanos) -> Found {
    let avoided = |node: &Node| task.avoid.iter().find(|it| it.node == node.row.name && it.holds(now));
    let (shunned, open): (Vec<&Node>, Vec<&Node>) =
        state.connected().partition(|node| avoided(node).is_some());
    if let Some(node) = best_of(task, &open).and_then(|index| open.get(index)) {
        return Found::Node(node.row.name.clone());
    }
    let would_fit = best_of(task, &shunned).and_then(|index| shunned.get(index));
    if let Some(avoid) = would_fit.and_then(|node| avoided(node)) {
        return Found::None(Waits::Backoff(avoid.clone()));
    }
    let mut connected = state.connected().peekable();
    Found::None(if connected.peek().is_none() {
        Waits::NoNodes
    } else if connected.any(|node| place::could_ever_hold(task.demand(), &node.row.capacity)) {
        Waits::NoRoom
    } else {
        Waits::NoneCouldEver
    })
}

impl Turn<'_> {
    /// Places what can be placed: by priority, then in the order of submission. Looks only at tasks for
    /// which something may have changed.
    pub(super) fn schedule(&mut self) {
        let now = self.now;
        let due: BTreeSet<Place> = if self.look_at_all {
            self.state.queue.clone()
        } else {
            let tasks = &self.state.tasks;
            let backoff_is_over = |id: &&TaskId| {
                tasks.get(*id).is_some_and(|row| row.task.avoid.iter().any(|avoid| !avoid.holds(now)))
            };
            let over = self.state.backing_off.iter().filter(backoff_is_over);
            let rows = self.began_to_wait.iter().chain(over).filter_map(|id| tasks.get(id));
            rows.map(|row| row.task.place_in_queue()).collect()
        };
        for (_, _, id) in due {
            self.place(&id);
        }
    }

    fn place(&mut self, id: &TaskId) {
        let now = self.now;
        let Some(row) = self.state.tasks.get_mut(id) else { return };
        if row.task.avoid.iter().any(|avoid| !avoid.holds(now)) {
            row.task.avoid.retain(|avoid| avoid.holds(now));
            if row.task.avoid.is_empty() {
                self.state.backing_off.remove(id);
            }
            self.tasks.insert(id.clone());
        }
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id) else { return };
        match look(self.state, task, now) {
            Found::Node(node) => {
                let verdicts = query::verdicts(self.state, task, now);
                self.assign(id, node, verdicts);
            }
            Found::None(waits) => self.wait(id, &waits),
        }
    }

    fn assign(&mut self, id: &TaskId, node: String, verdicts: Vec<NodeVerdict>) {
        self.move_to(id, Phase::Starting { node: node.clone() });
        let Some(row) = self.change(id) else { return };
        let task = &mut row.task;
        task.attempt += 1;
        task.generation += 1;
        task.start_generation = task.generation;
        task.node = Some(node.clone());
        task.acknowledged = false;
        task.evicted = false;
        task.lost = false;
        task.on_node = None;
        let reason = format!("attempt {} on {node}", task.attempt);
        self.decide(id, DecisionKind::Placed, reason, verdicts);
        self.direct_start(id);
    }

    /// Says why it waits, if that is new, and asks once for more nodes.
    fn wait(&mut self, id: &TaskId, waits: &Waits) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id) else { return };
        let Phase::Pending { reason: before, scale_out_asked } = &task.phase else { return };
        let (reason, asked) = (waits.reason(), *scale_out_asked);
        let is_new = *before != reason;
        let asks = waits.wants_nodes() && !asked;
        if is_new {
            let verdicts = query::verdicts(self.state, task, self.now);
            self.decide(id, DecisionKind::Pending, reason.clone(), verdicts);
        }
        if asks {
            self.decide(id, DecisionKind::ScaleOut, reason.clone(), Vec::new());
            self.effects.push(Effect::ScaleOut { task: id.clone(), reason: reason.clone() });
        }
        if (is_new || asks)
            && let Some(row) = self.change(id)
        {
            row.task.phase = Phase::Pending { reason, scale_out_asked: asks || asked };
        }
    }

    /// The task waits again, and does not go back to that node for a while.
    pub(super) fn set_back(&mut self, id: &TaskId, why: Setback) {
        let now = self.now;
        let Some(row) = self.change(id) else { return };
        let task = &mut row.task;
        let backoff = SECOND.checked_shl(task.setbacks).filter(|it| it >> task.setbacks == SECOND);
        let backoff = backoff.unwrap_or(MAX_BACKOFF).min(MAX_BACKOFF);
        task.setbacks = task.setbacks.saturating_add(1);
        task.avoid.retain(|avoid| avoid.holds(now));
        if let Some(node) = task.phase.node().map(str::to_owned) {
            task.avoid.push(Avoid { node, why, since: now, until: now.saturating_add(backoff) });
        }
        self.place_again(id);
    }

    /// The task waits again.
    pub(super) fn place_again(&mut self, id: &TaskId) {
        self.move_to(id, Phase::Pending { reason: String::new(), scale_out_asked: false });
    }
}
