//! GPU cards in the simulation: which nodes have, which tasks ask for, and what holds of them at every moment.

use shaper_core::place::{CardBooks, MAX_GPUS};

use super::{CardSet, Cluster, NODES, Task, TaskId, number};

/// The cards of each node, which are of a model of its number: one bit for each.
pub(super) const CARDS: [u64; NODES] = [0b11, 0b1, 0];
/// Memory of a card, in GiB.
pub(super) const CARD: u64 = 80;
/// What a task asks for of cards: GiB of a card, so many to itself, and their model.
pub(super) fn gpus(task: usize) -> (u64, u32, &'static str) {
    match task {
        6 | 7 => (50, 0, ""),
        8 => (0, 2, ""),
        9 => (20, 1, "model 1"),
        10 => (30, 0, "model"),
        _ => (0, 0, ""),
    }
}

impl Cluster {
    /// No card has more taken of it than it has, and none that is somebody's own is another's, too.
    pub(super) fn check_cards(&self) {
        let is_sound = |tasks: &[(&TaskId, CardSet)], what: &str| {
            for card in 0..MAX_GPUS as u32 {
                let here = tasks.iter().filter(|(_, cards)| cards.contains(card));
                let here: Vec<_> = here.map(|(id, _)| gpus(number(id))).collect();
                let is_own = here.iter().any(|(_, count, _)| *count > 0);
                let memory: u64 = here.iter().map(|(gib, ..)| gib).sum();
                assert!(!is_own || here.len() == 1, "card {card} of {what} is the own of one of {tasks:?}");
                assert!(memory <= CARD, "of card {card} of {what} {tasks:?} have {memory} GiB");
            }
        };
        for agent in &self.agents {
            let live: Vec<_> = agent.live().map(|it| (&it.task, agent.granted[it])).collect();
            is_sound(&live, &agent.name);
        }
        for node in self.state.nodes.values() {
            let task = |id: &TaskId| &self.state.tasks[id].task;
            let mut books = CardBooks::default();
            let nominees: Vec<_> = node.nominees.iter().map(|(_, _, id)| task(id)).collect();
            let tasks: Vec<_> = node.tasks.iter().map(task).collect();
            for task in tasks.iter().chain(&nominees) {
                let (gib, count, _) = gpus(number(task.id()));
                let cards = if count > 0 { count } else { u32::from(gib > 0) };
                assert_eq!(task.cards.len(), cards, "{}", task.id());
                books.take(task.booked(), task.cards);
            }
            assert_eq!(node.cards, books, "{}", node.row.name);
            fn of(task: &Task) -> (&TaskId, CardSet) {
                (task.id(), task.cards)
            }
            is_sound(&tasks.iter().map(|it| of(it)).collect::<Vec<_>>(), &node.row.name);
            let stays = |task: &&&Task| task.preempted.is_none() && task.cancel.is_none();
            let then: Vec<_> = tasks.iter().filter(stays).chain(&nominees).map(|it| of(it)).collect();
            is_sound(&then, &format!("{}, once others are gone,", node.row.name));
        }
    }
}
