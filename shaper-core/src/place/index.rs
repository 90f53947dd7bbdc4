//! Nodes in an order of their own, found by what they have free.
//!
//! The order does not depend on the task (see [`Order`](super::scorer::Order)), so that the best node of a task is the first that it fits on. A
//! *leaf* has up to 64 nodes whose keys lie between two bounds; leaves are in order, and the nodes within one
//! are not, so that a node that changes is written where it stands or moves with one write. A *group* is up to
//! 64 leaves, and knows of each the most that is free there of every resource, and of which classes its nodes
//! are; the same is known of each group. A search goes down only where the most would suffice. It ends at the
//! first leaf with a node that fits, and takes the first such node of that leaf; where nothing fits it has
//! compared at most all leaves, 64 nodes in one go.
//!
//! What is known of a leaf is at least what there is: it may be too much for a while ([`FEW_LEAVES`]), never too little.
//!
//! What a change costs is the lines of the cache that it touches, so of a node the index keeps 50 bytes, in five lines. CPU and memory
//! are there twice, by node and by resource, for there are two questions: whether a node has all, and how much any has. What is
//! rarely needed, a node's exact key, is asked for ([`Keys`]).

mod group;
mod leaf;
mod summary;

use self::{
    group::{Group, not_behind},
    leaf::Leaf,
    summary::{BESIDE, Changed, Summary, VOID},
};
use super::{
    exact::Key,
    lanes::{self, Row, WIDTH},
};

/// When a leaf or a group has so few left it looks for a neighbour to join …
const FEW: usize = 20;
/// … that leaves the two with no more than this.
const JOINED: usize = 44;

/// With so few leaves, what a leaf has no more is found out by the first search that comes there in vain: a change costs a
/// quarter less, and no search is long. With more of them it is found out at once, or those that look for what is
/// rare would come to many leaves in vain. Tests have both.
const FEW_LEAVES: usize = if cfg!(test) { 4 } else { 512 };

/// What is asked for: as far as the lanes know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) amounts: Row,
    /// Which classes will do, folded into 64 bits; `None`: all.
    pub(super) classes: Option<u64>,
    /// What it wants of GPUs.
    pub(super) tier: Tier,
    /// Whether it wants more than CPU, memory and what every node of the tier has.
    has_more: bool,
}

impl Wanted {
    pub(super) fn new(amounts: Row, classes: Option<u64>, tier: Tier) -> Wanted {
        let more = amounts.simd_gt(tier.has()).to_bitmask() >> BESIDE;
        Wanted { amounts, classes, tier, has_more: more != 0 }
    }
}

/// Roughly, what a node has free of GPUs. Of the nodes with at least a certain tier, a leaf and a group know the most
/// that is free of CPU and of memory, and the classes. So a search for GPUs does not go where those with CPU have none,
/// nor one for a model where that is taken and only others are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tier(u8);

impl Tier {
    /// That of a node which has so many thousandths of one GPU free, and so many whole ones.
    pub(super) fn of(share: u64, whole: u64) -> Tier {
        Tier(match (whole, share) {
            (8.., _) => 7,
            (4.., _) => 6,
            (2.., _) => 5,
            (_, 1000..) | (1, _) => 4,
            (_, 750..) => 3,
            (_, 500..) => 2,
            (_, 250..) => 1,
            _ => 0,
        })
    }

    /// From this on a GPU is free of which nobody has a part.
    const ALL_OF_ONE: Tier = Tier(4);

    /// What every node of this tier has of what the lanes have.
    fn has(self) -> Row {
        let (share, whole) =
            [(0, 0), (250, 0), (500, 0), (750, 0), (1000, 0), (1000, 2), (1000, 4), (1000, 8)][self.number()];
        Row::new([0, 0, 0, 0, 0, share, whole, 0])
    }

    fn number(self) -> usize {
        usize::from(self.0)
    }
}

/// What of a node the index has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) free: Row,
    /// The bit of its class, by number.
    pub(super) class: u8,
    pub(super) tier: Tier,
}

/// The keys of the nodes that are in an index, as they are now.
pub(super) trait Keys {
    fn key(&self, node: u32) -> Key;
}

impl<F: Fn(u32) -> Key> Keys for F {
    fn key(&self, node: u32) -> Key {
        self(node)
    }
}

/// Where a node is.
#[derive(Clone, Copy, Debug)]
struct Seat {
    leaf: u32,
    place: u8,
}

/// The index.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    leaves: Vec<Leaf>,
    /// Leaves that are not in use.
    spare: Vec<u32>,
    groups: Vec<Group>,
    /// The groups in order, and what is known of each.
    order: Vec<u32>,
    /// Digits of the first bound of each.
    firsts: Vec<u64>,
    summaries: Vec<Summary>,
    spare_groups: Vec<u32>,
    /// By node.
    seats: Vec<Option<Seat>>,
}

/// How a search went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Groups, leaves of groups and leaves' nodes that were compared, 64 at once.
    pub compared: u32,
    /// Nodes that were looked at one by one.
    pub looked_at: u32,
}

impl Index {
    /// The first node in order that `accepts`, of those that may have what is wanted.
    pub(super) fn first(
        &mut self,
        wanted: &Wanted,
        keys: &impl Keys,
        walk: &mut Walk,
        mut accepts: impl FnMut(u32) -> bool,
    ) -> Option<u32> {
        for at in 0..self.order.len() {
            if !self.summaries[at].may_hold(wanted) {
                continue;
            }
            let number = self.order[at] as usize;
            walk.compared += 1;
            for place in lanes::each(self.groups[number].mask(wanted)) {
                let leaf = self.groups[number].leaves[place];
                let leaf = &mut self.leaves[leaf as usize];
                walk.compared += 1;
                let mut found = leaf.mask(wanted);
                if found == 0 {
                    let changed = leaf.settle(wanted);
                    let leaf = self.groups[number].leaves[place];
                    self.tell(leaf, changed);
                    continue;
                }
                while found != 0 {
                    let place = leaf.first_of(found, keys);
                    let (_, node) = leaf.nodes[place];
                    walk.looked_at += 1;
                    if accepts(node) {
                        return Some(node);
                    }
                    found &= !(1 << place);
                }
            }
        }
        None
    }

    /// Puts a node where it belongs, from wherever it was. `keys` has its new key, too.
    pub(super) fn set(&mut self, entry: &Entry, keys: &impl Keys) {
        let node = entry.key.node as usize;
        if self.seats.len() <= node {
            self.seats.resize(node + 1, None);
        }
        let mut at = None;
        if let Some(seat) = self.seats[node] {
            let leaf = &self.leaves[seat.leaf as usize];
            let belongs = if leaf.surely_has(&entry.key) { seat.leaf } else { self.leaf_for(&entry.key) };
            if belongs == seat.leaf {
                let (at_once, leaf) = (self.has_many(), &mut self.leaves[seat.leaf as usize]);
                let (gone, more) = leaf.put(usize::from(seat.place), entry);
                let less = leaf.forget(&gone, at_once);
                self.tell(seat.leaf, more.and(less));
                return;
            }
            // Unless leaves were joined.
            at = (!self.remove(entry.key.node)).then_some(belongs);
        }
        let mut at = at.unwrap_or_else(|| self.leaf_for(&entry.key));
        if self.leaves[at as usize].used == u64::MAX {
            self.split(at, keys);
            at = self.leaf_for(&entry.key);
        }
        let leaf = &mut self.leaves[at as usize];
        let (place, changed) = leaf.push(entry);
        self.seats[node] = Some(Seat { leaf: at, place });
        self.tell(at, changed);
    }

    /// Takes a node out. Whether leaves are others than before.
    pub(super) fn remove(&mut self, node: u32) -> bool {
        let Some(seat) = self.seats.get_mut(node as usize).and_then(Option::take) else { return false };
        let (at_once, leaf) = (self.has_many(), &mut self.leaves[seat.leaf as usize]);
        let gone = leaf.take_out(usize::from(seat.place));
        let changed = leaf.forget(&gone, at_once);
        let is_few = leaf.length() < FEW;
        self.tell(seat.leaf, changed);
        if is_few {
            self.join(seat.leaf);
        }
        is_few
    }

    /// The leaf that a key belongs to. The first of all is made when there is none.
    fn leaf_for(&mut self, key: &Key) -> u32 {
        if self.order.is_empty() {
            let group = self.new_group(0);
            let leaf = self.new_leaf(group);
            self.groups[group as usize].insert(0, leaf, *key, &VOID);
            self.order.push(group);
            self.firsts.push(key.digits);
            self.summaries.push(VOID);
        }
        // The last whose bound is not behind the key.
        let groups = &self.groups;
        let bound = |at: usize| groups[self.order[at + 1] as usize].bounds[0];
        let at = not_behind(key, &self.firsts[1..], bound);
        let group = &groups[self.order[at] as usize];
        group.leaves[group.place_for(key)]
    }

    fn has_many(&self) -> bool {
        self.leaves.len() > FEW_LEAVES
    }

    /// Tells the group above what has become of a leaf.
    fn tell(&mut self, leaf: u32, changed: Changed) {
        if changed.is_any() {
            let leaf = &self.leaves[leaf as usize];
            if self.groups[leaf.group as usize].note(usize::from(leaf.at), &leaf.known, changed) {
                self.tell_of_group(leaf.group);
            }
        }
    }

    fn tell_of_group(&mut self, group: u32) {
        let group = &self.groups[group as usize];
        self.summaries[group.at as usize] = group.summary;
    }

    /// After leaves of a group have moved.
    fn renumber_leaves(&mut self, group: u32) {
        let it = &self.groups[group as usize];
        for (at, leaf) in (0..).zip(&it.leaves[..it.length]) {
            let leaf = &mut self.leaves[*leaf as usize];
            (leaf.group, leaf.at) = (group, at);
        }
    }

    /// After groups have moved.
    fn renumber_groups(&mut self) {
        self.firsts.clear();
        for (at, group) in (0..).zip(&self.order) {
            let group = &mut self.groups[*group as usize];
            group.at = at;
            self.firsts.push(group.digits[0]);
        }
    }

    fn new_leaf(&mut self, group: u32) -> u32 {
        if let Some(leaf) = self.spare.pop() {
            self.leaves[leaf as usize] = Leaf::new(group);
            return leaf;
        }
        self.leaves.push(Leaf::new(group));
        (self.leaves.len() - 1) as u32
    }

    fn new_group(&mut self, at: u32) -> u32 {
        if let Some(group) = self.spare_groups.pop() {
            self.groups[group as usize] = Group::new(at);
            return group;
        }
        self.groups.push(Group::new(at));
        (self.groups.len() - 1) as u32
    }

    /// Divides a full leaf in the middle of its keys.
    fn split(&mut self, full: u32, keys: &impl Keys) {
        let mut number = self.leaves[full as usize].group;
        if self.groups[number as usize].length == WIDTH {
            self.split_group(number);
            number = self.leaves[full as usize].group;
        }
        let old = &self.leaves[full as usize];
        let mut entries: Vec<Entry> =
            lanes::each(old.used).map(|place| old.entry(place, keys.key(old.nodes[place].1))).collect();
        entries.sort_by(|a, b| {
            if a.key.is_before(&b.key) { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater }
        });
        let second = entries.split_off(entries.len() / 2);
        let Some(bound) = second.first().map(|entry| entry.key) else { return };
        let (from, to, at) = (old.from, old.to, old.at);
        let new = self.new_leaf(number);
        for (leaf, entries, from, to) in
            [(full, &entries, from, bound.digits.max(1)), (new, &second, bound.digits, to)]
        {
            let mut fresh = Leaf::new(number);
            (fresh.from, fresh.to, fresh.at) = (from, to, at);
            for entry in entries {
                let (place, _) = fresh.push(entry);
                self.seats[entry.key.node as usize] = Some(Seat { leaf, place });
            }
            self.leaves[leaf as usize] = fresh;
        }
        let summary = self.leaves[new as usize].known;
        self.groups[number as usize].insert(usize::from(at) + 1, new, bound, &summary);
        self.renumber_leaves(number);
        self.tell(full, Changed::ALL);
        self.tell_of_group(number);
    }

    fn split_group(&mut self, full: u32) {
        let new = self.new_group(0);
        let mut second = Group::new(0);
        let first = &mut self.groups[full as usize];
        while first.length > WIDTH / 2 {
            let last = first.length - 1;
            let (leaf, bound, summary) = (first.leaves[last], first.bounds[last], first.noted(last));
            first.remove(last);
            second.insert(0, leaf, bound, &summary);
        }
        let at = first.at as usize;
        self.groups[new as usize] = second;
        self.order.insert(at + 1, new);
        self.summaries.insert(at + 1, VOID);
        self.renumber_groups();
        self.renumber_leaves(new);
        self.tell_of_group(full);
        self.tell_of_group(new);
    }

    /// Joins a leaf with a neighbour of its group if the two have room in one. An empty one that has none is let go
    /// with its group, but for the last.
    fn join(&mut self, leaf: u32) {
        let Leaf { group: number, at, .. } = self.leaves[leaf as usize];
        let group = &self.groups[number as usize];
        let (place, length) = (usize::from(at), self.leaves[leaf as usize].length());
        let fits = |other: usize| self.leaves[group.leaves[other] as usize].length() + length <= JOINED;
        let left = if place + 1 < group.length && fits(place + 1) {
            place
        } else if place > 0 && fits(place - 1) {
            place - 1
        } else {
            if length == 0 && group.length == 1 {
                self.drop_group(number, leaf);
            }
            return;
        };
        let (stays, goes) = (group.leaves[left], group.leaves[left + 1]);
        let other = self.leaves[goes as usize].clone();
        for place in lanes::each(other.used) {
            let (digits, node) = other.nodes[place];
            // Where it goes, its exact key is not asked for.
            let entry = other.entry(place, Key::rough(digits, node));
            let (place, _) = self.leaves[stays as usize].push(&entry);
            self.seats[node as usize] = Some(Seat { leaf: stays, place });
        }
        self.leaves[stays as usize].to = other.to;
        self.groups[number as usize].remove(left + 1);
        self.spare.push(goes);
        self.renumber_leaves(number);
        self.tell(stays, Changed::ALL);
        self.tell_of_group(number);
    }

    /// Lets go of a group whose only leaf is empty. Its range of keys becomes its neighbour's.
    fn drop_group(&mut self, group: u32, leaf: u32) {
        if self.order.len() == 1 {
            return;
        }
        let at = self.groups[group as usize].at as usize;
        let (from, to) = (self.leaves[leaf as usize].from, self.leaves[leaf as usize].to);
        if at > 0 {
            let before = &self.groups[self.order[at - 1] as usize];
            self.leaves[before.leaves[before.length - 1] as usize].to = to;
        } else {
            let after = &self.groups[self.order[1] as usize];
            self.leaves[after.leaves[0] as usize].from = from;
        }
        self.order.remove(at);
        self.summaries.remove(at);
        self.renumber_groups();
        self.spare.push(leaf);
        self.spare_groups.push(group);
    }
}
