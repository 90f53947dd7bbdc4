//! Room for a task that fits nowhere, at the expense of lower ones
//! ([decision 0028](../../../docs/decisions/0028-a-place-is-cleared-and-promised.md)).
//!
//! A task may have room made for it by a policy with `preemption_enabled` that covers it: if there are several, by the one
//! that comes first (`shaper_core::policy`). Its victims are of a lower
//! priority and, unless the policy is the operator's, of its own namespace. They keep what they have until their node says
//! that they have ended. Until then the task is *nominated*: its place is booked beyond what the node has, so nobody else
//! takes it, and it starts when the books fit again. Whoever ended for it waits again, through no fault of its own.

use std::collections::{BTreeSet, HashMap};

use shaper_core::{
    gpu::CardSet,
    id::TaskId,
    place::{self, Preemption, Residents},
    spec::DecisionKind,
    task::UnixNanos,
};

use super::{
    DirectiveKind, Phase, State, Turn, places,
    state::{Avoid, Node, Setback, TaskRow},
    waiting::{Kind, Permit},
};

/// Between SIGTERM and SIGKILL.
const GRACE_MILLIS: u64 = 10_000;
/// A node that would not end a victim is left alone for so long.
const AFTER_REFUSAL: UnixNanos = 60_000_000_000;

/// Where a task goes, once these are gone.
struct Plan {
    node: String,
    cards: CardSet,
    victims: Vec<TaskId>,
    policy: String,
}

/// The cheapest way to make room for a task, on those of the connected nodes that `may`.
fn plan(state: &State, id: &TaskId, now: UnixNanos, may: impl Fn(&Node) -> bool) -> Option<Plan> {
    let task = &state.tasks.get(id)?.task;
    let Permit { policy, below, namespace } = Kind::of(&state.policies, task).permit?;
    let shuns = |node: &Node| task.avoid.iter().any(|avoid| avoid.node == node.row.name && avoid.holds(now));
    let suits = |node: &Node| places::suits(task.needs(), &node.row);
    let (mut residents, mut ids) = (Residents::default(), HashMap::new());
    for node in state.connected().filter(|node| !shuns(node) && suits(node) && may(node)) {
        for TaskRow { task: victim, .. } in
            node.tasks.iter().filter_map(|id| state.tasks.get(id)).map(Box::as_ref)
        {
            let is_theirs = namespace.as_ref().is_none_or(|namespace| victim.spec().namespace == *namespace);
            let ends_anyway = victim.cancel.is_some() || victim.preempted.is_some();
            if victim.priority() < below && is_theirs && !ends_anyway {
                let since = victim.on_node.as_ref().map_or(now, |status| status.created_at);
                let number = victim.sequence();
                ids.insert(number, victim.id());
                residents.start(state.places.resident(number, &node.row, victim, since));
            }
        }
    }
    let Preemption { at, victims, .. } = state.places.make_room(&mut residents, task, now)?;
    let node = state.registered.get(at.node.0 as usize)?.clone()?;
    let victims = victims.iter().filter_map(|number| ids.get(number).map(|id| (*id).clone())).collect();
    Some(Plan { node, cards: CardSet::from_bits(at.gpus.into()), victims, policy })
}

impl State {
    /// Whether what a node has without those that are nominated leaves room for a task, and on the cards that it is promised.
    fn has_room(&self, node: &Node, id: &TaskId) -> bool {
        let task = |id: &TaskId| self.tasks.get(id).map(|row| &row.task);
        let mut books = Node::new(node.row.clone());
        for task in node.tasks.iter().filter_map(task) {
            books.take(task.booked(), task.cards);
        }
        task(id).is_some_and(|task| place::fits_with(task.booked(), task.cards, &books.candidate()))
    }
}

impl Turn<'_> {
    /// Makes room for a task that fits nowhere, if a policy lets it and lower ones are there. Where it could not before,
    /// only those nodes are looked at where something was given back since.
    pub(super) fn make_room(&mut self, id: &TaskId) -> bool {
        let Some(row) = self.state.tasks.get(id) else { return false };
        let priority = row.task.priority();
        let (everywhere, freed) = (self.looks_everywhere(id), &self.freed);
        let may = |node: &Node| everywhere || freed.contains(&node.row.name);
        let Some(Plan { node, cards, victims, policy }) = plan(self.state, id, self.now, may) else {
            return false;
        };
        let names = victims.iter().map(|victim| format!("`{victim}`")).collect::<Vec<_>>().join(", ");
        self.move_with(id, Phase::Nominated { node: node.clone() }, cards);
        let reason = format!("{node} is cleared for it by policy `{policy}`: asked to end {names}");
        self.decide(id, DecisionKind::Pending, reason, Vec::new());
        for victim in victims {
            let Some(TaskRow { task, .. }) = self.change(&victim) else { continue };
            task.generation += 1;
            task.preempted = Some(task.generation);
            self.state.tally.preemptions += 1;
            let reason = format!(
                "to make room for `{id}` of priority {priority}, by policy `{policy}`: asked {node} to end it"
            );
            self.decide(&victim, DecisionKind::Evicted, reason, Vec::new());
            self.direct_preemption(&victim);
        }
        true
    }

    /// Asks the node of a victim to end it.
    pub(super) fn direct_preemption(&mut self, victim: &TaskId) {
        let task = self.state.tasks.get(victim).map(|row| &row.task);
        let node = task.and_then(|task| self.state.nodes.get(task.phase.node()?));
        let drains = node.and_then(|node| node.row.cordon.as_ref()).is_some_and(|cordon| cordon.drains);
        let reason = match drains {
            true => "its node is drained".to_owned(),
            false => "it makes room for a task of a higher priority".to_owned(),
        };
        self.direct_assigned(victim, DirectiveKind::Stop { grace_millis: GRACE_MILLIS, reason });
    }

    /// Starts those for whom there is room now.
    pub(super) fn start_nominees(&mut self) {
        let State { nodes, .. } = &*self.state;
        let looked_at: Vec<&Node> = match self.look_at_all {
            true => nodes.values().collect(),
            false => self.freed.iter().filter_map(|name| nodes.get(name)).collect(),
        };
        let with_nominees = looked_at.into_iter().filter(|node| !node.nominees.is_empty());
        let names: Vec<_> = with_nominees.map(|node| node.row.name.clone()).collect();
        for name in names {
            let nominees = self.state.nodes.get(&name).map(|node| node.nominees.clone()).unwrap_or_default();
            for (_, _, id) in nominees {
                let node = self.state.nodes.get(&name).filter(|node| node.takes_work());
                if node.is_some_and(|node| self.state.has_room(node, &id)) {
                    self.assign(&id, name.clone(), None);
                }
            }
        }
    }

    /// Nobody is promised a place on a node any more; they wait again.
    pub(super) fn withdraw(&mut self, node: &str) {
        let nominees = self.state.nodes.get(node).map(|node| node.nominees.clone()).unwrap_or_default();
        for (_, _, id) in nominees {
            self.place_again(&id);
        }
    }

    /// A node will not end a victim: no place there is cleared for anybody.
    pub(super) fn victim_stays(&mut self, victim: &TaskId, node: &str) {
        if let Some(row) = self.change(victim) {
            row.task.preempted = None;
        }
        self.break_promises(node, &format!("{node} does not end `{victim}`"));
    }

    /// No place on a node is cleared for anybody.
    fn break_promises(&mut self, node: &str, why: &str) {
        let nominees: BTreeSet<_> =
            self.state.nodes.get(node).map(|node| node.nominees.clone()).unwrap_or_default();
        for (_, _, id) in nominees {
            self.break_promise(&id, node, why);
        }
    }

    /// No place on a node is cleared for one that is nominated there.
    pub(super) fn break_promise(&mut self, id: &TaskId, node: &str, why: &str) {
        let (since, until) = (self.now, self.now.saturating_add(AFTER_REFUSAL));
        self.state.leave(id);
        if let Some(row) = self.change(id) {
            let avoid = Avoid { node: node.to_owned(), why: Setback::Refused, since, until };
            row.task.avoid.push(avoid);
        }
        let entered = self.state.enter(id);
        debug_assert!(entered, "the node of `{id}` is there");
        self.decide(id, DecisionKind::Pending, why, Vec::new());
        self.place_again(id);
    }
}
