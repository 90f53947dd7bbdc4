//! Tasks that wait, in the order in which they are placed: by priority, then by submission.
//!
//! Tasks that ask for the same stand in one *line*: when the first of a line fits nowhere, none of it does. So what a
//! change costs depends on how many kinds of task wait, and not on how many tasks. Those that avoid a node for a while
//! stand alone.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use shaper_core::{
    id::TaskId,
    spec::{Demand, Priority},
};

use super::state::Task;

/// A waiting task's place in the queue.
pub(super) type Place = (Reverse<Priority>, u64, TaskId);

pub(super) fn place_of(task: &Task) -> Place {
    (Reverse(task.priority()), task.sequence(), task.id().clone())
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
    lines: HashMap<Demand, Line>,
    /// Those that avoid a node.
    alone: BTreeSet<Place>,
    len: usize,
}

/// The first of lines, each with what its line asks for, and those that stand alone.
pub(super) type Heads = BTreeMap<Place, Option<Demand>>;

impl Waiting {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn insert(&mut self, task: &Task) {
        let place = place_of(task);
        let tasks = match task.avoid.is_empty() {
            true => &mut self.lines.entry(*task.demand()).or_default().tasks,
            false => &mut self.alone,
        };
        self.len += usize::from(tasks.insert(place));
    }

    pub(super) fn remove(&mut self, task: &Task) {
        let place = place_of(task);
        let removed = match task.avoid.is_empty() {
            true => {
                let Some(line) = self.lines.get_mut(task.demand()) else { return };
                let removed = line.tasks.remove(&place);
                if line.tasks.is_empty() {
                    self.lines.remove(task.demand());
                }
                removed
            }
            false => self.alone.remove(&place),
        };
        self.len -= usize::from(removed);
    }

    /// Those that avoid a node, first of all the first.
    pub(super) fn alone(&self) -> impl Iterator<Item = &TaskId> {
        self.alone.iter().map(|(_, _, id)| id)
    }

    /// What the line of tasks that ask for this lacks, if it is known to lack something.
    pub(super) fn lack(&self, demand: &Demand) -> Option<Lack> {
        self.lines.get(demand).and_then(|line| line.lack)
    }

    /// Says what a line lacks. Those of its tasks that have been told otherwise.
    pub(super) fn lacks(&mut self, demand: &Demand, lack: Lack) -> Vec<TaskId> {
        match self.lines.get_mut(demand) {
            Some(line) if line.lack != Some(lack) => {
                line.lack = Some(lack);
                line.tasks.iter().map(|(_, _, id)| id.clone()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The first of each line that `may` have come to fit, and all that stand alone.
    pub(super) fn heads(&self, may: impl Fn(&Demand, Option<Lack>) -> bool) -> Heads {
        let lines = self.lines.iter().filter(|(demand, line)| may(demand, line.lack));
        let firsts = lines.filter_map(|(demand, line)| Some((line.tasks.first()?, demand)));
        let firsts = firsts.map(|(place, demand)| (place.clone(), Some(*demand)));
        firsts.chain(self.alone.iter().map(|place| (place.clone(), None))).collect()
    }

    /// The first of a line.
    pub(super) fn first(&self, demand: &Demand) -> Option<&Place> {
        self.lines.get(demand)?.tasks.first()
    }

    /// All of them, in order.
    #[cfg(test)]
    pub(super) fn in_order(&self) -> Vec<Place> {
        let places: BTreeSet<_> =
            self.lines.values().flat_map(|line| &line.tasks).chain(&self.alone).collect();
        places.into_iter().cloned().collect()
    }
}
