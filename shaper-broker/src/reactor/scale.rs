//! Groups of nodes that are started and ended as tasks need them
//! ([decision 0033](../../../docs/decisions/0033-nodes-are-asked-for-by-the-size-of-their-group.md)).
//!
//! Once a second the broker looks at the tasks that fit nowhere, and for which no room can be made: `shaper_core::scale` says
//! how many nodes more would hold them, and what each group is asked. What is asked is durable before it is asked, and is a
//! size, so that a broker that takes over asks again without harm. Its provider's answer comes back as an event.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};
use shaper_core::{
    gpu::CardRequest,
    scale::{
        Facts, Fate, Group, Nanos, Observed, Order, OrderKind, Outcome, Room, Scaling, Standing, WANTS,
        Wanted, pack, template,
    },
    spec::{Capacity, Decision, DecisionKind, Demand},
    task::UnixNanos,
};

use super::{
    Effect, Row, State, Task, Turn, leaving,
    state::{Cordon, Node},
    waiting::Stranded,
};

/// By whom a node is cordoned that is to be given back.
const SCALE_IN: &str = "scale-in";
const SECOND: Nanos = 1_000_000_000;
/// Nodes of a group that are looked at, whether they could be emptied.
const LOOKED_AT: usize = 4;

/// Something about groups.
#[derive(Clone, Debug, PartialEq)]
pub enum ScaleEvent {
    /// A second has passed.
    Look,
    /// A provider said what a new node of a group has.
    Template {
        /// The group.
        group: String,
        /// What it has.
        capacity: Capacity,
    },
    /// A provider said how a group is, or could not.
    Observed {
        /// The group.
        group: String,
        /// How it is.
        observed: Result<Observed, String>,
    },
    /// An order was carried out, or not.
    Done {
        /// The group.
        group: String,
        /// Of the order.
        number: u64,
        /// What came of it.
        outcome: Outcome,
    },
}

/// What is kept of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleRow {
    /// Its name.
    pub name: String,
    /// How it stands.
    pub standing: Standing,
}

/// For whom a group is as large as it is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// The size that it is to have.
    pub target: u32,
    /// Tasks that wait for its nodes.
    pub tasks: u64,
    /// What they ask for, thousandths of a core.
    pub millicores: u64,
    /// What they ask for, bytes.
    pub memory: u64,
}

/// What tasks ask a node for: amounts, and GPU cards.
pub type Asked = (Demand, CardRequest);

/// What becomes of the tasks of a kind that fit nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// How many there are.
    pub tasks: usize,
    /// What becomes of them.
    pub text: String,
}

/// All groups.
#[derive(Clone, Debug, Default)]
pub struct Scale {
    /// As the operator configured them.
    pub scaling: Scaling,
    /// How each stands: rows.
    pub standings: BTreeMap<String, Standing>,
    /// What providers said of new nodes.
    templates: BTreeMap<String, Capacity>,
    /// Since when there have been tasks that fit nowhere, by what they ask for.
    since: HashMap<Asked, UnixNanos>,
    /// Nodes on which nothing runs, and since when.
    pub idle: BTreeMap<String, UnixNanos>,
    /// What becomes of the tasks that fit nowhere.
    pub told: HashMap<Asked, Told>,
    /// For whom each group is asked for.
    wishes: BTreeMap<String, Wish>,
    /// Groups whose order this broker has sent on.
    sent: BTreeSet<String>,
}

/// A group as clients see it.
#[derive(Clone, Debug)]
pub struct GroupView<'a> {
    /// As configured.
    pub group: &'a Group,
    /// How it stands.
    pub standing: &'a Standing,
    /// What a new node has, as far as is known.
    pub capacity: Option<Capacity>,
    /// Nodes on which nothing runs, and since when.
    pub idle: Vec<(&'a str, UnixNanos)>,
}

/// A node all of whose tasks have room elsewhere, and what it would cost to move them. Nobody does that but an operator who
/// drains it: then it is given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emptiable {
    /// Which.
    pub node: String,
    /// How many tasks it has.
    pub tasks: usize,
    /// CPU time that they have used there, in nanoseconds: lost, of those that do not keep what they have done.
    pub cpu_ns: u64,
    /// Where they would go.
    pub goes_to: BTreeSet<String>,
}

impl Scale {
    /// The row of a group.
    pub fn row(&self, name: &str) -> Option<ScaleRow> {
        let standing = self.standings.get(name)?.clone();
        Some(ScaleRow { name: name.to_owned(), standing })
    }

    /// The group of a node: the first that matches its name.
    fn group_of(&self, node: &str) -> Option<&Group> {
        self.scaling.groups.iter().find(|group| group.nodes.matches(node))
    }

    /// Whether a node was asked to be ended.
    pub(super) fn gives_back(&self, node: &str) -> bool {
        let is_ordered = |standing: &Standing| {
            let order = standing.order.as_ref().map(|order| &order.kind);
            matches!(order, Some(OrderKind::Remove { node: removed }) if removed == node)
        };
        self.standings.values().any(|it| it.leaving.contains_key(node) || is_ordered(it))
    }

    /// What is wished of each group, by name.
    pub fn wishes(&self) -> BTreeMap<String, Wish> {
        self.scaling
            .groups
            .iter()
            .map(|group| {
                let standing = self.standings.get(&group.name);
                let ordered = standing.and_then(|it| it.order.as_ref()).map(|order| order.target);
                let target = ordered.or(standing.and_then(|it| it.target)).unwrap_or(group.min);
                let wish = self.wishes.get(&group.name).copied().unwrap_or_default();
                (group.name.clone(), Wish { target, ..wish })
            })
            .collect()
    }

    /// The latest word about a task that waits, if nodes are asked for at all.
    pub(super) fn explain(&self, task: &Task, now: UnixNanos) -> Option<Decision> {
        if self.scaling.groups.is_empty() {
            return None;
        }
        let reason = match self.told.get(&(*task.demand(), task.spec().gpus.clone())) {
            Some(told) => format!("of {} tasks that ask for this, {}", told.tasks, told.text),
            None => {
                let seconds = self.scaling.settle as f64 / SECOND as f64;
                format!("nodes are asked for once it has fitted nowhere for {seconds} s")
            }
        };
        let (by, kind) = ("broker".to_owned(), DecisionKind::ScaleOut);
        Some(Decision { at: now, by, kind, reason, nodes: Vec::new() })
    }
}

impl State {
    /// The groups, as configured.
    pub fn scale_groups(&self) -> impl Iterator<Item = GroupView<'_>> {
        let scale = &self.scale;
        scale.scaling.groups.iter().filter_map(move |group| {
            let standing = scale.standings.get(&group.name)?;
            let idle = scale
                .idle
                .iter()
                .filter(move |(node, _)| scale.group_of(node).is_some_and(|of| of.name == group.name));
            let idle = idle.map(|(node, since)| (node.as_str(), *since)).collect();
            Some(GroupView { group, standing, capacity: self.template(group), idle })
        })
    }

    /// Of the nodes of a group with the least reserved the one whose tasks have room elsewhere and have done the least, if
    /// the group may become smaller. For each task of theirs all nodes are looked at.
    pub fn emptiable(&self, view: &GroupView<'_>) -> Option<Emptiable> {
        let GroupView { group, standing, idle, .. } = view;
        group.idle?;
        if !idle.is_empty()
            || self.waiting.len() > 0
            || standing.registered <= group.min
            || !standing.leaving.is_empty()
        {
            return None;
        }
        let has_tasks =
            |node: &&Node| node.takes_work() && !node.tasks.is_empty() && node.nominees.is_empty();
        let mut members: Vec<&Node> = self.members(group).filter(has_tasks).collect();
        members.sort_by_key(|node| node.reserved.cpu.0 * 1000 / node.row.capacity.cpu.0.max(1));
        let emptiable = members.into_iter().take(LOOKED_AT).filter_map(|node| {
            let leaving = leaving(self, node);
            let goes_to = leaving.iter().map(|task| task.goes_to.clone()).collect::<Option<BTreeSet<_>>>()?;
            let cpu_ns = leaving.iter().map(|task| task.cpu_ns).sum();
            Some(Emptiable { node: node.row.name.clone(), tasks: leaving.len(), cpu_ns, goes_to })
        });
        emptiable.min_by_key(|it| it.cpu_ns)
    }

    fn members<'a>(&'a self, group: &'a Group) -> impl Iterator<Item = &'a Node> {
        let is_of =
            |node: &&Node| self.scale.group_of(&node.row.name).is_some_and(|of| of.name == group.name);
        self.nodes_in_order().filter(is_of)
    }

    fn template(&self, group: &Group) -> Option<Capacity> {
        let said = group.capacity.or_else(|| self.scale.templates.get(&group.name).copied())?;
        Some(template(&said, self.members(group).map(|node| node.row.capacity)))
    }
}

impl Turn<'_> {
    pub(super) fn scale(&mut self, event: ScaleEvent) {
        let now = self.now;
        match event {
            ScaleEvent::Look => self.look_at_groups(),
            ScaleEvent::Template { group, capacity } => {
                self.state.scale.templates.insert(group, capacity);
            }
            ScaleEvent::Observed { group, observed } => {
                if self.group_standing(&group).is_some_and(|standing| standing.observe(observed, now)) {
                    self.rows.push(Row::Scale(group));
                }
            }
            ScaleEvent::Done { group, number, outcome } => {
                if self
                    .group_standing(&group)
                    .and_then(|standing| standing.settle(number, outcome, now))
                    .is_some()
                {
                    self.state.scale.sent.remove(&group);
                    self.rows.push(Row::Scale(group));
                }
            }
        }
    }

    /// How a group stands that is configured.
    fn group_standing(&mut self, name: &str) -> Option<&mut Standing> {
        let scale = &mut self.state.scale;
        let is_there = scale.scaling.groups.iter().any(|group| group.name == name);
        is_there.then(|| scale.standings.entry(name.to_owned()).or_default())
    }

    fn look_at_groups(&mut self) {
        let groups = self.state.scale.scaling.groups.clone();
        if groups.is_empty() {
            return;
        }
        self.forget_those_that_left(&groups);
        // A broker that has just begun has not looked at those that it found waiting.
        self.look_at_all |= self.state.lacks().unknown > 0;
        self.note_idle_nodes();
        let stranded = self.stranded_for_long();
        let rooms: Vec<_> = groups.iter().map(|group| self.room(group)).collect();
        let kinds: Vec<_> =
            stranded.iter().map(|it| (it.needs(), it.tasks.min(u32::MAX as usize) as u32)).collect();
        let packing = pack(&rooms, &kinds);
        self.tell(&groups, &stranded, &packing.fates, &packing.more);
        for (number, group) in groups.iter().enumerate() {
            let wants = stranded.iter().zip(&packing.fates).filter_map(|(stranded, fate)| {
                let tasks = fate.new.iter().find(|(at, _)| *at == number)?.1;
                let first = stranded.first.iter().map(|(_, _, id)| id.clone()).collect();
                Some(Wanted { tasks, demand: stranded.demand, first })
            });
            let wants = wants.take(WANTS).collect();
            self.ask(group, packing.more[number], wants);
        }
    }

    /// Nodes that their provider has ended are not there any more.
    fn forget_those_that_left(&mut self, groups: &[Group]) {
        for group in groups {
            let leaving = self.state.scale.standings.get(&group.name).map(|it| it.leaving.clone());
            for node in leaving.unwrap_or_default().into_keys() {
                let row = self.state.nodes.get(&node);
                if row.is_some_and(|it| it.session.is_none() && it.tasks.is_empty()) {
                    self.forget_node(&node);
                } else if row.is_some() {
                    continue;
                }
                if self.group_standing(&group.name).is_some_and(|standing| standing.left(&node)) {
                    self.rows.push(Row::Scale(group.name.clone()));
                }
            }
        }
    }

    fn note_idle_nodes(&mut self) {
        let State { scale, nodes, .. } = &mut *self.state;
        // One that was drained is not wanted any more; one that is cordoned is kept for something.
        let may_go = |node: &Node| node.takes_work() || node.row.cordon.as_ref().is_some_and(|it| it.drains);
        let is_idle = |node: &Node| {
            node.session.is_some() && may_go(node) && node.tasks.is_empty() && node.nominees.is_empty()
        };
        scale.idle.retain(|name, _| nodes.get(name).is_some_and(is_idle));
        for node in nodes.values().filter(|node| is_idle(node)) {
            if !scale.idle.contains_key(&node.row.name) && scale.group_of(&node.row.name).is_some() {
                scale.idle.insert(node.row.name.clone(), self.now);
            }
        }
    }

    /// Tasks that have fitted nowhere for as long as it takes.
    fn stranded_for_long(&mut self) -> Vec<Stranded> {
        let (now, State { scale, waiting, .. }) = (self.now, &mut *self.state);
        let stranded = waiting.stranded(WANTS);
        let mut before = std::mem::take(&mut scale.since);
        scale.since = stranded
            .iter()
            .map(Stranded::asked)
            .map(|asked| {
                let since = before.remove(&asked).unwrap_or(now);
                (asked, since)
            })
            .collect();
        let (since, settle) = (&scale.since, scale.scaling.settle);
        let is_old =
            |it: &Stranded| since.get(&it.asked()).is_some_and(|at| now.saturating_sub(*at) >= settle);
        stranded.into_iter().filter(is_old).collect()
    }

    /// What a group has room for.
    fn room(&mut self, group: &Group) -> Room {
        let now = self.now;
        let capacity = self.state.template(group);
        let members = self.state.members(group).count() as u32;
        let Some(standing) = self.group_standing(&group.name) else {
            return Room { capacity, coming: 0, more: 0, resting: None };
        };
        let registered = members.saturating_sub(standing.leaving.len() as u32);
        let ordered = match &standing.order {
            Some(Order { kind: OrderKind::Grow { by, .. }, .. }) => *by,
            _ => 0,
        };
        let coming = standing.coming(registered) + ordered;
        let more = standing.may_grow(group, registered).saturating_sub(ordered);
        Room { capacity, coming, more, resting: standing.resting(now) }
    }

    /// Keeps what becomes of those that wait.
    fn tell(&mut self, groups: &[Group], stranded: &[Stranded], fates: &[Fate], more: &[u32]) {
        let scale = &mut self.state.scale;
        scale.told.clear();
        scale.wishes.clear();
        let name = |at: usize| groups.get(at).map_or("", |group| group.name.as_str());
        for (stranded, fate) in stranded.iter().zip(fates) {
            let mut parts = Vec::new();
            for (at, tasks) in &fate.coming {
                parts.push(format!("{tasks} fit on nodes of `{}` that are coming", name(*at)));
            }
            for (at, tasks) in &fate.new {
                let nodes = more.get(*at).copied().unwrap_or_default();
                parts.push(format!(
                    "{tasks} would fit on more nodes of `{}`, of which {nodes} are wanted",
                    name(*at)
                ));
            }
            if fate.left > 0 {
                let why = fate.obstacles.iter().map(|(at, why)| format!("`{}`: {why}", name(*at)));
                let why = why.collect::<Vec<_>>().join("; ");
                parts.push(format!("{} fit on no node that could be asked for ({why})", fate.left));
            }
            for (at, tasks) in fate.coming.iter().chain(&fate.new) {
                let wish = scale.wishes.entry(name(*at).to_owned()).or_default();
                let tasks = u64::from(*tasks);
                wish.tasks += tasks;
                wish.millicores = wish.millicores.saturating_add(stranded.demand.cpu.0.saturating_mul(tasks));
                wish.memory = wish.memory.saturating_add(stranded.demand.memory.0.saturating_mul(tasks));
            }
            scale.told.insert(stranded.asked(), Told { tasks: stranded.tasks, text: parts.join("; ") });
        }
    }

    /// Asks a group for what it is to do next, if anything.
    fn ask(&mut self, group: &Group, more: u32, wants: Vec<Wanted>) {
        let now = self.now;
        let names: Vec<_> = self.state.members(group).map(|node| node.row.name.clone()).collect();
        let all_idle = &self.state.scale.idle;
        let idle = names.iter().filter_map(|name| Some((name.clone(), *all_idle.get(name)?))).collect();
        let Some(standing) = self.group_standing(&group.name) else { return };
        let here = names.iter().filter(|name| !standing.leaving.contains_key(*name));
        let registered = here.count() as u32;
        let mut is_new = false;
        if !group.provider.tells() && standing.target.is_none() {
            standing.assume(registered, now);
            is_new = true;
        }
        let (order, changed) = standing.next(group, Facts { registered, more, wants, idle }, now);
        let open = standing.order.clone();
        let leaving = standing.leaving.clone();
        if let Some(order) = order.or(open).filter(|_| !self.state.scale.sent.contains(&group.name)) {
            self.state.scale.sent.insert(group.name.clone());
            if let OrderKind::Remove { node } = &order.kind
                && self.state.nodes.get(node).is_some_and(|node| node.row.cordon.is_none())
            {
                let cordon = Cordon { at: now, by: SCALE_IN.to_owned(), drains: false };
                self.set_cordon(node, Some(cordon));
            }
            self.effects.push(Effect::Scale { group: group.name.clone(), order: Box::new(order) });
        }
        if changed || is_new {
            self.rows.push(Row::Scale(group.name.clone()));
        }
        // What is not given back after all takes tasks again.
        let goes = |name: &String| {
            let order = self.state.scale.standings.get(&group.name).and_then(|it| it.order.as_ref());
            leaving.contains_key(name)
                || matches!(order, Some(Order { kind: OrderKind::Remove { node }, .. }) if node == name)
        };
        let is_cordoned = |name: &&String| {
            let node = self.state.nodes.get(*name);
            node.and_then(|node| node.row.cordon.as_ref()).is_some_and(|cordon| cordon.by == SCALE_IN)
        };
        let stay: Vec<_> = names.iter().filter(is_cordoned).filter(|name| !goes(name)).cloned().collect();
        for node in stay {
            self.set_cordon(&node, None);
        }
    }
}

/// An order in words.
pub fn order_text(order: &Order) -> String {
    match &order.kind {
        OrderKind::Grow { by, wants } => {
            let tasks: u64 = wants.iter().map(|want| u64::from(want.tasks)).sum();
            match tasks {
                0 => format!("{by} more, for its least size"),
                tasks => format!("{by} more, for {tasks} tasks"),
            }
        }
        OrderKind::Withdraw { nodes } => format!("{nodes} that did not come are not wanted any more"),
        OrderKind::Remove { node } => format!("{node} is to end: nothing ran there for long"),
    }
}
