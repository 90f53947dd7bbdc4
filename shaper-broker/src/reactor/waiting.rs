//! Tasks that wait, in the order in which they are placed: by priority, then by submission.
//!
//! Tasks of one [`Kind`] stand in one *line*: when the first of a line fits nowhere, none of it does. So what a
//! change costs depends on how many kinds of task wait, and not on how many tasks. Those that avoid a node for a while
//! stand alone.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    ops::Bound,
};

use shaper_core::{
    gpu::CardRequest,
    id::TaskId,
    place::Needs,
    policy::{self, Subject},
    spec::{Demand, Priority},
};

use super::{
    scale::Asked,
    state::{PolicyRow, Task},
};

/// A waiting task's place in the queue.
pub(super) type Place = (Reverse<Priority>, u64, TaskId);

pub(super) fn place_of(task: &Task) -> Place {
    (Reverse(task.priority()), task.sequence(), task.id().clone())
}

/// What decides whether a task finds a place, or may have room made for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    /// What it asks for.
    pub(super) demand: Demand,
    /// And of GPU cards.
    pub(super) gpus: CardRequest,
    /// Whether it has an image.
    pub(super) container: bool,
    /// By which lower ones may end for it.
    pub(super) permit: Option<Permit>,
}

/// A policy, and whom it lets end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Permit {
    /// Its name.
    pub(super) policy: String,
    /// Only those of a lower priority than this …
    pub(super) below: Priority,
    /// … and of this namespace; `None`: of any.
    pub(super) namespace: Option<String>,
}

impl Kind {
    pub(super) fn of(policies: &BTreeMap<String, PolicyRow>, task: &Task) -> Kind {
        let below = task.priority();
        let rows = policies.values().map(|row| &row.policy).filter(|_| below > Priority::Low);
        let permit = policy::permit(rows, &Subject::of(task.spec())).map(|policy| {
            let is_operators = policies.get(&policy.policy_name).is_some_and(|row| row.uid == 0);
            let namespace = (!is_operators).then(|| policy.namespace.clone());
            Permit { policy: policy.policy_name.clone(), below, namespace }
        });
        let Needs { demand, gpus, container } = task.needs();
        Kind { demand: *demand, gpus: gpus.clone(), container, permit }
    }

    pub(super) fn needs(&self) -> Needs<'_> {
        Needs { demand: &self.demand, gpus: &self.gpus, container: self.container }
    }
}

/// Why a line waits: what all of its tasks were told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// No node is connected.
    Nodes,
    /// No connected node is large enough.
    LargeNodes,
    /// There is no room now.
    Room,
}

#[derive(Clone, Debug, Default)]
struct Line {
    tasks: BTreeSet<Place>,
    /// Nothing that fits nowhere fits before something is given back, or a node comes.
    lack: Option<Lack>,
}

/// All tasks that wait.
#[derive(Clone, Debug, Default)]
pub(super) struct Waiting {
    lines: HashMap<Kind, Line>,
    /// Of those that stand in lines.
    kinds: HashMap<TaskId, Kind>,
    /// Those that avoid a node.
    alone: BTreeSet<Place>,
    len: usize,
}

/// Tasks that ask for the same and fit nowhere.
#[derive(Clone, Debug)]
pub(super) struct Stranded {
    pub(super) demand: Demand,
    pub(super) gpus: CardRequest,
    pub(super) tasks: usize,
    /// The first of them.
    pub(super) first: Vec<Place>,
}

impl Stranded {
    /// What each of them asks for.
    pub(super) fn asked(&self) -> Asked {
        (self.demand, self.gpus.clone())
    }

    /// Likewise. A node that is made to measure is taken to run containers.
    pub(super) fn needs(&self) -> Needs<'_> {
        Needs { gpus: &self.gpus, ..Needs::of(&self.demand) }
    }
}

/// The first of lines, each with the kind of its line, and those that stand alone.
pub(super) type Heads = BTreeMap<Place, Option<Kind>>;

/// How many tasks wait for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lacks {
    /// For a node.
    pub nodes: usize,
    /// For a larger one than there is.
    pub large_nodes: usize,
    /// For room.
    pub room: usize,
    /// Until they may go back to a node.
    pub backoff: usize,
    /// Nobody has looked.
    pub unknown: usize,
}

impl Waiting {
    /// What they wait for.
    pub(super) fn lacks_of_all(&self) -> Lacks {
        let mut lacks = Lacks { backoff: self.alone.len(), ..Lacks::default() };
        for line in self.lines.values() {
            let lack = match line.lack {
                Some(Lack::Nodes) => &mut lacks.nodes,
                Some(Lack::LargeNodes) => &mut lacks.large_nodes,
                Some(Lack::Room) => &mut lacks.room,
                None => &mut lacks.unknown,
            };
            *lack += line.tasks.len();
        }
        lacks
    }

    /// That which was submitted first: looks at a few of each line.
    pub(super) fn oldest(&self) -> Option<&TaskId> {
        let queues = self.lines.values().map(|line| &line.tasks).chain([&self.alone]);
        let firsts = queues.flat_map(|queue| {
            // Within a priority they are in the order of submission.
            std::iter::successors(queue.first(), |(priority, _, id)| {
                let behind = Bound::Excluded((*priority, u64::MAX, id.clone()));
                queue.range((behind, Bound::Unbounded)).next()
            })
        });
        firsts.min_by_key(|(_, sequence, _)| *sequence).map(|(_, _, id)| id)
    }

    /// Whether there are some that wait for room, or of which that is not known.
    pub(super) fn may_lack_room(&self) -> bool {
        let may = |line: &Line| matches!(line.lack, None | Some(Lack::Room));
        self.lines.values().any(may) || !self.alone.is_empty()
    }

    /// Those that fit nowhere, by what they ask for, in the order of the first of each.
    pub(super) fn stranded(&self, named: usize) -> Vec<Stranded> {
        let mut by_needs: HashMap<(Demand, &CardRequest), Stranded> = HashMap::new();
        for (kind, line) in self.lines.iter().filter(|(_, line)| line.lack.is_some()) {
            let Some(first) = line.tasks.first() else { continue };
            let of_line = line.tasks.iter().take(named).cloned();
            match by_needs.entry((kind.demand, &kind.gpus)) {
                Entry::Vacant(place) => {
                    let (tasks, first) = (line.tasks.len(), of_line.collect());
                    let (demand, gpus) = (kind.demand, kind.gpus.clone());
                    place.insert(Stranded { demand, gpus, tasks, first });
                }
                Entry::Occupied(mut there) => {
                    let there = there.get_mut();
                    there.tasks += line.tasks.len();
                    there.first.extend(of_line);
                    there.first.sort_unstable();
                    there.first.truncate(named);
                }
            }
            debug_assert!(by_needs[&(kind.demand, &kind.gpus)].first.first() <= Some(first));
        }
        let mut stranded: Vec<_> = by_needs.into_values().collect();
        stranded.sort_unstable_by(|a, b| a.first.cmp(&b.first));
        stranded
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn insert(&mut self, task: &Task, policies: &BTreeMap<String, PolicyRow>) {
        let place = place_of(task);
        let inserted = if task.avoid.is_empty() {
            let kind = Kind::of(policies, task);
            self.kinds.insert(task.id().clone(), kind.clone());
            self.lines.entry(kind).or_default().tasks.insert(place)
        } else {
            self.alone.insert(place)
        };
        self.len += usize::from(inserted);
    }

    pub(super) fn remove(&mut self, task: &Task) {
        let place = place_of(task);
        let removed = match self.kinds.remove(task.id()) {
            Some(kind) => {
                let Some(line) = self.lines.get_mut(&kind) else { return };
                let removed = line.tasks.remove(&place);
                if line.tasks.is_empty() {
                    self.lines.remove(&kind);
                }
                removed
            }
            None => self.alone.remove(&place),
        };
        self.len -= usize::from(removed);
    }

    /// What the line of a task lacks, if it stands in one that is known to lack something.
    pub(super) fn lack_of(&self, id: &TaskId) -> Option<Lack> {
        self.lines.get(self.kinds.get(id)?)?.lack
    }

    /// Those that avoid a node, first of all the first.
    pub(super) fn alone(&self) -> impl Iterator<Item = &TaskId> {
        self.alone.iter().map(|(_, _, id)| id)
    }

    /// Says what a line lacks. Those of its tasks that have been told otherwise.
    pub(super) fn lacks(&mut self, kind: &Kind, lack: Lack) -> Vec<TaskId> {
        match self.lines.get_mut(kind) {
            Some(line) if line.lack != Some(lack) => {
                line.lack = Some(lack);
                line.tasks.iter().map(|(_, _, id)| id.clone()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Says what the line of a task lacks, as the first of it that was looked at does. For whom others may have to go, each is
    /// looked at.
    pub(super) fn lacks_as_the_first(&mut self, id: &TaskId, lack: Lack) {
        if let Some(kind) = self.kinds.get(id)
            && kind.permit.is_none()
            && let Some(line) = self.lines.get_mut(kind)
        {
            line.lack = Some(lack);
        }
    }

    /// The first of each line that `may` have come to fit, and all that stand alone.
    pub(super) fn heads(&self, may: impl Fn(&Kind, Option<Lack>) -> bool) -> Heads {
        let lines = self.lines.iter().filter(|(kind, line)| may(kind, line.lack));
        let firsts = lines.filter_map(|(kind, line)| Some((line.tasks.first()?, kind)));
        let firsts = firsts.map(|(place, kind)| (place.clone(), Some(kind.clone())));
        firsts.chain(self.alone.iter().map(|place| (place.clone(), None))).collect()
    }

    /// The first of a line.
    pub(super) fn first(&self, kind: &Kind) -> Option<&Place> {
        self.lines.get(kind)?.tasks.first()
    }

    /// All of them, in order.
    pub(super) fn in_order(&self) -> Vec<Place> {
        let places: BTreeSet<_> =
            self.lines.values().flat_map(|line| &line.tasks).chain(&self.alone).collect();
        places.into_iter().cloned().collect()
    }
}
