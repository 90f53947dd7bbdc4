//! Which waiting task goes where, and why another waits.

use std::{collections::BTreeSet, time::Duration};

use shaper_core::{
    gpu::CardSet,
    id::TaskId,
    place::{self, Candidate, Needs},
    spec::DecisionKind,
    task::UnixNanos,
};

use super::{
    Effect, Phase, State, Turn, query, reshape,
    state::{Avoid, Node, Setback, TaskRow},
    waiting::{Lack, Place, place_of},
};

const SECOND: UnixNanos = 1_000_000_000;
/// A task does not go back to a node for 1 s, 2 s, 4 s … and not for longer than this.
const MAX_BACKOFF: UnixNanos = 60 * SECOND;

/// Why everything waits before the first node is there.
pub(super) const NO_NODE: &str = "no node is connected";

/// When something is to be decided that no event will cause. The shell sends a Tick then.
pub fn next_wakeup(state: &State) -> Option<UnixNanos> {
    let waiting = state.waiting.alone().filter_map(|id| state.tasks.get(id));
    let backoffs = waiting.flat_map(|row| &row.task.avoid).map(|avoid| avoid.until);
    backoffs.chain(reshape::next_look(state)).min()
}

/// Why a task waits. The text has no numbers that change while nothing else does: a task that goes on
/// waiting for the same reason is not written again.
enum Waits {
    For(Lack),
    Backoff(Avoid),
}

impl Waits {
    fn reason(&self) -> String {
        match self {
            Waits::For(Lack::Nodes) => NO_NODE.to_owned(),
            Waits::For(Lack::LargeNodes) => {
                "no connected node could hold it, even if it were empty".to_owned()
            }
            Waits::For(Lack::Room) => "no connected node has room for it now".to_owned(),
            Waits::Backoff(Avoid { node, why, since, until }) => format!(
                "{node} {}, and it does not go back there for {} s; no other node fits",
                why.done_to_it(),
                until.saturating_sub(*since) / SECOND
            ),
        }
    }

    /// Whether more nodes would help: not when it only waits for a backoff to pass.
    fn wants_nodes(&self) -> bool {
        matches!(self, Waits::For(_))
    }
}

enum Found {
    Node(String, CardSet),
    None(Waits),
}

fn best_of<'a>(needs: Needs<'_>, nodes: impl Iterator<Item = &'a Node>) -> Option<&'a Node> {
    let nodes: Vec<&Node> = nodes.collect();
    let candidates: Vec<Candidate<'_>> = nodes.iter().map(|node| node.candidate()).collect();
    nodes.get(place::best(needs, &candidates)?).copied()
}

fn look(state: &mut State, id: &TaskId, now: UnixNanos) -> Option<Found> {
    let State { tasks, places, nodes, registered, .. } = state;
    let task = &tasks.get(id)?.task;
    let shunned: BTreeSet<usize> = task
        .avoid
        .iter()
        .filter(|avoid| avoid.holds(now))
        .filter_map(|avoid| nodes.get(&avoid.node))
        .map(|node| node.row.order as usize)
        .collect();
    let best = places.best(task.needs(), |node| !shunned.contains(&node));
    let best = best.and_then(|(number, cards)| Some((registered.get(number)?.clone()?, cards)));
    #[cfg(test)]
    assert_eq!(best, plain(state, id, &shunned), "the index and the formula disagree about `{id}`");
    if let Some((node, cards)) = best {
        return Some(Found::Node(node, cards));
    }
    let task = &state.tasks.get(id)?.task;
    let of_shunned =
        shunned.iter().filter_map(|number| state.nodes.get(state.registered.get(*number)?.as_ref()?));
    let would_fit = best_of(task.needs(), of_shunned.filter(|node| node.takes_work()));
    if let Some(node) = would_fit
        && let Some(avoid) = task.avoid.iter().find(|avoid| avoid.node == node.row.name && avoid.holds(now))
    {
        return Some(Found::None(Waits::Backoff(avoid.clone())));
    }
    let could_ever = |node: &Node| place::could_ever_hold(task.needs(), &node.candidate());
    Some(Found::None(Waits::For(if state.places.open == 0 {
        Lack::Nodes
    } else if state.connected().any(could_ever) {
        Lack::Room
    } else {
        Lack::LargeNodes
    })))
}

/// The node that the formula names when every node is looked at, and the task's cards there.
#[cfg(test)]
fn plain(state: &State, id: &TaskId, shunned: &BTreeSet<usize>) -> Option<(String, CardSet)> {
    let nodes = state.connected().filter(|node| !shunned.contains(&(node.row.order as usize)));
    let needs = state.tasks.get(id)?.task.needs();
    best_of(needs, nodes).map(|node| (node.row.name.clone(), node.candidate().cards_for(needs)))
}

impl Turn<'_> {
    /// Places what can be placed: by priority, then in the order of submission. Looks only at tasks for
    /// which something may have changed.
    pub(super) fn schedule(&mut self) {
        self.start_nominees();
        if self.look_at_all || self.look_for_slack || !self.freed.is_empty() {
            self.look_at_lines();
            return self.restore_requests();
        }
        let now = self.now;
        let tasks = &self.state.tasks;
        let is_over = |id: &&TaskId| {
            tasks.get(*id).is_some_and(|row| row.task.avoid.iter().any(|avoid| !avoid.holds(now)))
        };
        let over = self.state.waiting.alone().filter(is_over);
        let rows = self.began_to_wait.iter().chain(over).filter_map(|id| tasks.get(id));
        let due: BTreeSet<Place> = rows.map(|row| place_of(&row.task)).collect();
        for (_, _, id) in due {
            // Of others in its line it is known that they fit nowhere.
            let task = self.state.tasks.get(&id).map(|row| &row.task).filter(|task| task.avoid.is_empty());
            match task.and_then(|task| self.state.waiting.lack_of(task.id())) {
                Some(lack) => self.wait(&id, &Waits::For(lack)),
                None => {
                    if let Some(lack) = self.place(&id) {
                        self.state.waiting.lacks_as_the_first(&id, lack);
                    }
                }
            }
        }
    }

    /// The first of each line that may fit now, and then the next of those that did.
    fn look_at_lines(&mut self) {
        let State { waiting, places, nodes, .. } = &*self.state;
        let fits = |needs: Needs<'_>| {
            let mut freed = self.freed.iter().filter_map(|name| nodes.get(name));
            freed.any(|node| places.fits(&node.row, needs))
        };
        let mut heads = waiting.heads(|kind, lack| {
            self.look_at_all
                || lack.is_none()
                || fits(kind.needs())
                || kind.permit.is_some()
                || self.look_for_slack && lack == Some(Lack::Room)
        });
        let newcomers = std::mem::take(&mut self.began_to_wait);
        while let Some(((_, _, id), line)) = heads.pop_first() {
            let lack = self.place(&id);
            let Some(kind) = line else { continue };
            match lack {
                Some(lack) => {
                    for id in self.state.waiting.lacks(&kind, lack) {
                        self.wait(&id, &Waits::For(lack));
                    }
                }
                None => {
                    let next = self.state.waiting.first(&kind).filter(|next| next.2 != id).cloned();
                    heads.extend(next.map(|place| (place, Some(kind))));
                }
            }
        }
        // Those whose line was not looked at.
        for id in newcomers {
            let waits =
                self.state.tasks.get(&id).filter(|row| matches!(row.task.phase, Phase::Pending { .. }));
            let lack = waits.and_then(|row| self.state.waiting.lack_of(row.task.id()));
            if let Some(lack) = lack {
                self.wait(&id, &Waits::For(lack));
            }
        }
    }

    /// Whether all nodes are looked at for room that could be made for a task, and not only those where something was given
    /// back: if it was not looked for before. Where less may be reserved for others, one that stands alone waits for the next look at
    /// what is used, since nobody is to end before that.
    pub(super) fn looks_everywhere(&self, id: &TaskId) -> bool {
        let stands_alone = self.state.tasks.get(id).is_some_and(|row| !row.task.avoid.is_empty());
        let is_first = self.state.waiting.lack_of(id).is_none();
        let waits = stands_alone && reshape::has_floors(self.state);
        self.look_at_all || self.look_for_slack || is_first && !waits
    }

    /// Places a task; what it lacks if it fits nowhere.
    fn place(&mut self, id: &TaskId) -> Option<Lack> {
        let now = self.now;
        let is_over = |row: &TaskRow| row.task.avoid.iter().any(|avoid| !avoid.holds(now));
        if self.state.tasks.get(id).is_some_and(|row| is_over(row)) {
            self.state.leave(id);
            if let Some(row) = self.change(id) {
                row.task.avoid.retain(|avoid| avoid.holds(now));
            }
            let entered = self.state.enter(id);
            debug_assert!(entered, "a task that waits is on no node");
        }
        match look(self.state, id, now)? {
            Found::Node(node, cards) => {
                self.assign(id, node, Some(cards));
                None
            }
            // In this order: nobody ends where less of what nobody uses is enough.
            Found::None(Waits::For(Lack::Room)) if self.lower_others(id) || self.make_room(id) => None,
            Found::None(waits) => {
                self.wait(id, &waits);
                match waits {
                    Waits::For(lack) => Some(lack),
                    Waits::Backoff(_) => None,
                }
            }
        }
    }

    /// Puts a task on a node, with these cards; with those that it was promised, if it was nominated there.
    pub(super) fn assign(&mut self, id: &TaskId, node: String, cards: Option<CardSet>) {
        let now = self.now;
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        // Where it was nominated, nothing was chosen now.
        let (verdicts, cleared) = match task.phase {
            Phase::Nominated { .. } => (Vec::new(), ", which was cleared for it"),
            _ => (query::considered(self.state, task, Some(&node), self.now), ""),
        };
        let cards = cards.unwrap_or(task.cards);
        self.move_with(id, Phase::Starting { node: node.clone() }, cards);
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
        let waited = (task.attempt == 1).then(|| now.saturating_sub(task.submission.submitted_at));
        let with = match cards.len() {
            0 => String::new(),
            1 => format!(", card {cards}"),
            _ => format!(", cards {cards}"),
        };
        let reason = format!("attempt {} on {node}{with}{cleared}", task.attempt);
        if let Some(waited) = waited {
            self.state.tally.placement.add(Duration::from_nanos(waited));
        }
        self.state.hold(id, &node);
        self.decide(id, DecisionKind::Placed, reason, verdicts);
        self.direct_start(id);
    }

    /// Says why it waits, if that is new, and asks once for more nodes.
    fn wait(&mut self, id: &TaskId, waits: &Waits) {
        let Some(TaskRow { task, .. }) = self.state.tasks.get(id).map(Box::as_ref) else { return };
        let Phase::Pending { reason: before, scale_out_asked } = &task.phase else { return };
        let (reason, asked) = (waits.reason(), *scale_out_asked);
        let is_new = *before != reason;
        let asks = waits.wants_nodes() && !asked;
        if is_new {
            let verdicts = query::considered(self.state, task, None, self.now);
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
