//! Whether a node takes tasks: nodes that are cordoned, drained, and removed.
//!
//! What a drained node has is asked to end, as the victims of preemption are, and waits again, through no fault of its own. A
//! node that is removed leaves a gap in the order of registration, which the next that registers fills; where there are too many
//! gaps, the nodes behind them move up.

use shaper_core::{
    id::TaskId,
    place::{self, Candidate},
    spec::{Credentials, DecisionKind, Priority},
    task::UnixNanos,
};

use super::{
    Denied, NodeWish, Refusal, Reply, Row, State, Turn,
    query::is_operator,
    state::{Cordon, Node, TaskRow},
};

/// Gaps in the order of registration that nobody minds.
const GAPS: usize = 64;

/// So many places there are in the order of registration, at most, for so many nodes.
pub(super) fn most_places(nodes: usize) -> usize {
    2 * nodes + GAPS + 1
}

/// A task that is to go from a node, what that costs, and where it could go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// Which.
    pub task: TaskId,
    /// Its priority.
    pub priority: Priority,
    /// Since when it has been there, as far as the node has said.
    pub since: Option<UnixNanos>,
    /// CPU time that it has used there, in nanoseconds: what is lost if it does not keep what it has done.
    pub cpu_ns: u64,
    /// The node that would take it now; `None`: it would wait.
    pub goes_to: Option<String>,
}

/// The tasks of a node, by priority, and where they could go, all together, if they had to.
pub fn leaving(state: &State, node: &Node) -> Vec<Leaving> {
    let rows = node.tasks.iter().filter_map(|id| state.tasks.get(id)).map(Box::as_ref);
    let mut rows: Vec<&TaskRow> = rows.collect();
    rows.sort_by_key(|row| (std::cmp::Reverse(row.task.priority()), row.task.sequence()));
    let mut others: Vec<Node> =
        state.connected().filter(|it| it.row.name != node.row.name).map(books).collect();
    let place = |TaskRow { task, .. }: &TaskRow| {
        let candidates: Vec<Candidate<'_>> = others.iter().map(Node::candidate).collect();
        let best = place::best(task.needs(), &candidates);
        let goes_to = best.and_then(|at| others.get_mut(at)).map(|other| {
            let cards = other.candidate().cards_for(task.needs());
            other.take(task.needs(), cards);
            other.row.name.clone()
        });
        let status = task.on_node.as_deref();
        Leaving {
            task: task.id().clone(),
            priority: task.priority(),
            since: status.map(|status| status.created_at),
            cpu_ns: status.map_or(0, |status| status.usage.cpu_time_ns),
            goes_to,
        }
    };
    rows.into_iter().map(place).collect()
}

/// What is reserved of a node, to be reckoned with.
fn books(node: &Node) -> Node {
    Node { reserved: node.reserved, cards: node.cards.clone(), ..Node::new(node.row.clone()) }
}

impl Turn<'_> {
    pub(super) fn cordon(&mut self, caller: &Credentials, name: &str, wish: NodeWish) {
        self.answer = Some(self.accept_cordon(caller, name, wish));
    }

    fn accept_cordon(&mut self, caller: &Credentials, name: &str, wish: NodeWish) -> Result<Reply, Refusal> {
        if !is_operator(caller) {
            return Err(Refusal::Denied(Denied::Nodes));
        }
        let Some(node) = self.state.nodes.get(name) else {
            return Err(Refusal::NoSuchNode(name.to_owned()));
        };
        if wish == NodeWish::Open && self.state.scale.gives_back(name) {
            let why = "is being given back to its provider, which ends it; start another under another name";
            return Err(Refusal::NodeInUse { node: name.to_owned(), why: why.to_owned() });
        }
        let leaves = if wish == NodeWish::Drained { leaving(self.state, node) } else { Vec::new() };
        let cordon = match wish {
            NodeWish::Open => None,
            NodeWish::Cordoned | NodeWish::Drained => Some(Cordon {
                at: self.now,
                by: format!("uid {}", caller.uid),
                drains: wish == NodeWish::Drained,
            }),
        };
        self.set_cordon(name, cordon);
        self.drain(name);
        Ok(Reply::Leaves(leaves))
    }

    /// Says whether a node takes tasks.
    pub(super) fn set_cordon(&mut self, name: &str, cordon: Option<Cordon>) {
        let Some(node) = self.state.nodes.get_mut(name) else { return };
        if node.row.cordon.is_none() && cordon.is_none() {
            return;
        }
        node.row.cordon = cordon;
        let closes = node.row.cordon.is_some();
        self.state.places.open(&node.row, node.takes_work());
        self.rows.push(Row::Node(name.to_owned()));
        if closes {
            self.withdraw(name);
        }
        self.look_at_all = true;
    }

    /// Asks the tasks of a node to end, if it is to be drained and there is an agent to ask.
    pub(super) fn drain(&mut self, name: &str) {
        let Some(node) = self.state.nodes.get(name) else { return };
        let Some(Cordon { by, .. }) = node.row.cordon.as_ref().filter(|cordon| cordon.drains) else { return };
        let by = by.clone();
        for id in node.tasks.clone() {
            let Some(row) = self.state.tasks.get(&id) else { continue };
            if row.task.cancel.is_some() || row.task.preempted.is_some() {
                continue;
            }
            let Some(TaskRow { task, .. }) = self.change(&id) else { continue };
            task.generation += 1;
            task.preempted = Some(task.generation);
            let reason =
                format!("{name} is drained by {by}: asked it to end the task, which is placed again");
            self.decide(&id, DecisionKind::Evicted, reason, Vec::new());
            self.direct_preemption(&id);
        }
    }

    pub(super) fn remove_node(&mut self, caller: &Credentials, name: &str) {
        self.answer = Some(self.accept_removal(caller, name));
    }

    fn accept_removal(&mut self, caller: &Credentials, name: &str) -> Result<Reply, Refusal> {
        if !is_operator(caller) {
            return Err(Refusal::Denied(Denied::Nodes));
        }
        let Some(node) = self.state.nodes.get(name) else {
            return Err(Refusal::NoSuchNode(name.to_owned()));
        };
        let why = match node.tasks.len() {
            _ if node.session.is_some() => "answers: stop its agent first".to_owned(),
            0 => {
                self.forget_node(name);
                return Ok(Reply::Leaves(Vec::new()));
            }
            tasks => format!(
                "still has {tasks} tasks, as far as is known: wait until it is back and drain it, or say that it is dead \
                 (`shaper node fence {name}`)"
            ),
        };
        Err(Refusal::NodeInUse { node: name.to_owned(), why })
    }

    /// A node without an agent and tasks is not there any more.
    pub(super) fn forget_node(&mut self, name: &str) {
        let held = self.state.nodes.get(name).map(|node| node.holds.clone()).unwrap_or_default();
        for id in &held {
            self.let_go(id, name);
        }
        let Some(node) = self.state.nodes.remove(name) else { return };
        debug_assert!(node.session.is_none() && node.tasks.is_empty() && node.nominees.is_empty(), "{name}");
        self.rows.push(Row::Node(name.to_owned()));
        let State { registered, nodes, .. } = &mut *self.state;
        if let Some(place) = registered.get_mut(node.row.order as usize) {
            *place = None;
        }
        while registered.last().is_some_and(Option::is_none) {
            registered.pop();
        }
        if registered.len() >= most_places(nodes.len()) {
            registered.retain(Option::is_some);
            for (order, name) in (0..).zip(registered.iter().flatten()) {
                if let Some(node) = nodes.get_mut(name).filter(|node| node.row.order != order) {
                    node.row.order = order;
                    self.rows.push(Row::Node(name.clone()));
                }
            }
        }
        self.state.find_places();
    }
}
