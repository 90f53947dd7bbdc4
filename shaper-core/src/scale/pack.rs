//! How many nodes it takes.

use std::fmt;

use super::Amounts;
use crate::{
    gpu::{CardOffer, CardSet},
    place::{self, Candidate, NO_CARDS, NOTHING, Needs},
    spec::{Capacity, Demand, Priority},
    task::UnixNanos,
};

/// What a group has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What a new node of it has; `None`: nobody has said yet.
    pub capacity: Option<Capacity>,
    /// Nodes that were asked for and are not here yet.
    pub coming: u32,
    /// How many more may be asked for, at most.
    pub more: u32,
    /// Of those, why there are none: until when it is left alone.
    pub resting: Option<UnixNanos>,
}

/// How many nodes more of each group, and what becomes of each kind of task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// By group.
    pub more: Vec<u32>,
    /// By kind of task.
    pub fates: Vec<Fate>,
}

/// What becomes of the tasks of a kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// So many go on nodes that are coming, by group.
    pub coming: Vec<(usize, u32)>,
    /// So many go on nodes that are to be asked for, by group.
    pub new: Vec<(usize, u32)>,
    /// So many go nowhere.
    pub left: u32,
    /// Of those: why each group does not help.
    pub obstacles: Vec<(usize, Obstacle)>,
}

/// Why a group does not help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Its nodes are too small: what an empty one lacks.
    TooSmall(Vec<String>),
    /// It is as large as it may be.
    Full,
    /// It is left alone until then.
    Resting(UnixNanos),
    /// What its nodes have is not known.
    Unknown,
    /// How many GPU cards its nodes have, and of which model, nobody says.
    Cards,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::TooSmall(lacking) => write!(f, "its nodes are too small: {}", lacking.join("; ")),
            Obstacle::Full => f.write_str("it is as large as its `max` lets it be"),
            Obstacle::Resting(_) => f.write_str("it is left alone for a while after a failure"),
            Obstacle::Unknown => {
                f.write_str("what its nodes have is not known: say `capacity`, or let its provider tell it")
            }
            Obstacle::Cards => f.write_str(
                "no nodes are asked for by the number or the model of their GPU cards: start one yourself",
            ),
        }
    }
}

/// A node that is not here yet.
struct Bin {
    group: usize,
    free: Amounts,
    is_new: bool,
}

impl Bin {
    /// How many tasks of this demand still fit.
    fn fits(&self, demand: &[u64; 5]) -> u32 {
        let each = self.free.0.iter().zip(demand).filter(|(_, wanted)| **wanted > 0);
        let least = each.map(|(free, wanted)| free / wanted).min();
        u32::try_from(least.unwrap_or(u64::MAX)).unwrap_or(u32::MAX)
    }

    fn take(&mut self, demand: &[u64; 5], tasks: u32) {
        for (free, wanted) in self.free.0.iter_mut().zip(demand) {
            // What never runs out stays so.
            if *free != u64::MAX {
                *free = free.saturating_sub(wanted.saturating_mul(u64::from(tasks)));
            }
        }
    }
}

fn wanted(demand: &Demand) -> [u64; 5] {
    let Demand { cpu, memory, gpu_memory, network, storage_io } = *demand;
    [
        cpu.0,
        memory.0,
        gpu_memory.map_or(0, |it| it.0),
        network.map_or(0, |it| it.0),
        storage_io.map_or(0, |it| it.0),
    ]
}

/// Puts tasks, in the order in which they would be placed, on the nodes that are coming, and then on as few more as hold them,
/// of the first group that can. Each kind of task looks at each node once.
pub fn pack(rooms: &[Room], kinds: &[(Needs<'_>, u32)]) -> Packing {
    let mut bins: Vec<Bin> = Vec::new();
    for (group, room) in rooms.iter().enumerate() {
        if let Some(capacity) = &room.capacity {
            let free = Amounts::of(capacity);
            bins.extend((0..room.coming).map(|_| Bin { group, free, is_new: false }));
        }
    }
    let mut more = vec![0; rooms.len()];
    let mut fates = Vec::with_capacity(kinds.len());
    for (needs, tasks) in kinds {
        let (amounts, mut fate) = (wanted(needs.demand), Fate { left: *tasks, ..Fate::default() });
        for bin in bins.iter_mut().filter(|_| *needs.gpus == NO_CARDS) {
            let here = bin.fits(&amounts).min(fate.left);
            if here > 0 {
                bin.take(&amounts, here);
                fate.left -= here;
                add(if bin.is_new { &mut fate.new } else { &mut fate.coming }, bin.group, here);
            }
        }
        for (group, room) in rooms.iter().enumerate() {
            if fate.left == 0 {
                break;
            }
            let obstacle = match obstacle(room, more[group], *needs) {
                None => {
                    open(group, room, &amounts, (&mut bins, &mut more[group]), &mut fate);
                    (fate.left > 0).then_some(Obstacle::Full)
                }
                some => some,
            };
            fate.obstacles.extend(obstacle.map(|obstacle| (group, obstacle)));
        }
        fates.push(fate);
    }
    Packing { more, fates }
}

fn obstacle(room: &Room, asked: u32, needs: Needs<'_>) -> Option<Obstacle> {
    let Some(capacity) = &room.capacity else { return Some(Obstacle::Unknown) };
    if *needs.gpus != NO_CARDS {
        return Some(Obstacle::Cards);
    }
    // Where memory of a card is said, there is one card at least.
    let cards = CardSet::from_bits(u64::from(capacity.gpu_memory.is_some()));
    let offer = CardOffer { model: String::new(), cards };
    let empty = Candidate { offer: &offer, ..Candidate::plain("", capacity, &NOTHING) };
    let verdict = place::judge(needs, Priority::Medium, &empty);
    if !verdict.lacking.is_empty() {
        return Some(Obstacle::TooSmall(verdict.lacking));
    }
    match room.resting {
        Some(until) => Some(Obstacle::Resting(until)),
        None => (asked >= room.more).then_some(Obstacle::Full),
    }
}

/// Asks for nodes until all of the tasks have one, or the group is full.
fn open(
    group: usize,
    room: &Room,
    amounts: &[u64; 5],
    (bins, more): (&mut Vec<Bin>, &mut u32),
    fate: &mut Fate,
) {
    let Some(capacity) = &room.capacity else { return };
    while fate.left > 0 && *more < room.more {
        let mut bin = Bin { group, free: Amounts::of(capacity), is_new: true };
        let here = bin.fits(amounts).min(fate.left);
        if here == 0 {
            return;
        }
        bin.take(amounts, here);
        bins.push(bin);
        *more += 1;
        fate.left -= here;
        add(&mut fate.new, group, here);
    }
}

fn add(of: &mut Vec<(usize, u32)>, group: usize, tasks: u32) {
    match of.iter_mut().find(|(there, _)| *there == group) {
        Some((_, sum)) => *sum += tasks,
        None => of.push((group, tasks)),
    }
}
