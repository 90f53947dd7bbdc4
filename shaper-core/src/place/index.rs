//! Nodes in an order of their own, found by what they have free.
//!
//! The order does not depend on the task (see [`Order`](super::scorer::Order)), so that the best node of a task is the first that it fits on. A
//! *leaf* has up to 64 nodes whose keys lie between two bounds; leaves are in order, and the nodes within one
//! are not, so that a node that changes is written where it stands or moves with one write. A *group* is up to
//! 64 leaves, and knows of each the most that is free there of every resource, and of which classes its nodes
//! are; the same is known of each group. A search goes down only where the most would suffice. It ends at the
//! first leaf with a node that fits, and takes the first such node of that leaf; where nothing fits it has
//! compared at most all leaves, 64 nodes in one go.

use super::{
    exact::{Key, sure},
    lanes::{self, Amounts, LANES, Lanes, NOBODY, WIDTH},
};

/// When a leaf or a group has so few left it looks for a neighbour to join …
const FEW: usize = 20;
/// … that leaves the two with no more than this.
const JOINED: usize = 44;

/// What is asked for: as far as the lanes know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) amounts: Amounts,
    /// Which classes will do, folded into 64 bits; `None`: all.
    pub(super) classes: Option<u64>,
    /// What it wants of GPUs.
    pub(super) tier: Tier,
}

/// Roughly, what a node has free of GPUs: of the classes with a certain tier, a leaf and a group know that they have
/// them. So a search for one model of GPU does not go where that model is taken and only others are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tier(u8);

const TIERS: usize = 7;

impl Tier {
    /// That of a node which has so many thousandths of one GPU free, and so many whole ones.
    pub(super) fn of(share: u64, whole: u64) -> Tier {
        Tier(match (whole, share) {
            (8.., _) => 6,
            (4.., _) => 5,
            (2.., _) => 4,
            (_, 1000..) | (1, _) => 3,
            (_, 500..) => 2,
            (_, 250..) => 1,
            _ => 0,
        })
    }

    fn number(self) -> usize {
        usize::from(self.0)
    }
}

/// What of a node the index has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) free: Amounts,
    /// The bit of its class, by number.
    pub(super) class: u8,
    pub(super) tier: Tier,
}

#[derive(Clone, Debug)]
struct Leaf {
    length: usize,
    group: u32,
    /// Digits of this leaf's bound, and of the next one's: a key well between them belongs here. The very first
    /// leaf has `u64::MAX`, the very last 0, and no other has.
    from: u64,
    to: u64,
    lanes: Lanes,
    classes: [u64; WIDTH],
    tiers: [Tier; WIDTH],
    digits: [u64; WIDTH],
    nodes: [u32; WIDTH],
    /// Kept as entries change, so that nothing is summed up anew.
    summary: Summary,
    /// How many have a class and at least a tier.
    counts: [[u8; TIERS]; WIDTH],
}

#[derive(Clone, Debug)]
struct Group {
    length: usize,
    lanes: Lanes,
    /// By tier.
    classes: [[u64; WIDTH]; TIERS],
    leaves: [u32; WIDTH],
    summary: Summary,
    /// Each leaf's first possible key; everything before it is in leaves before. Of the very first it is not looked at.
    bounds: Vec<Key>,
}

/// The most of what is below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Summary {
    most: Amounts,
    /// The classes of those that have at least a tier.
    classes: [u64; TIERS],
}

const VOID: Summary = Summary { most: NOBODY, classes: [0; TIERS] };

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
    summaries: Vec<Summary>,
    spare_groups: Vec<u32>,
    /// By node.
    seats: Vec<Option<Seat>>,
    keys: Vec<Option<Key>>,
}

/// How a search went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Groups, leaves of groups and leaves' nodes that were compared, 64 at once.
    pub compared: u32,
    /// Nodes that were looked at one by one.
    pub looked_at: u32,
}

impl Leaf {
    fn new(group: u32) -> Leaf {
        Leaf {
            length: 0,
            group,
            from: u64::MAX,
            to: 0,
            lanes: Lanes::EMPTY,
            classes: [0; WIDTH],
            tiers: [Tier(0); WIDTH],
            digits: [0; WIDTH],
            nodes: [0; WIDTH],
            summary: VOID,
            counts: [[0; TIERS]; WIDTH],
        }
    }

    /// Writes an entry where none is, or another of the same node.
    fn put(&mut self, place: usize, entry: &Entry) {
        self.uncount(place);
        set_and_raise(&mut self.lanes, &mut self.summary.most, place, &entry.free);
        let class = usize::from(entry.class);
        for tier in 0..=entry.tier.number() {
            self.counts[class][tier] += 1;
            self.summary.classes[tier] |= 1 << class;
        }
        self.classes[place] = 1 << class;
        self.tiers[place] = entry.tier;
        self.digits[place] = entry.key.digits;
        self.nodes[place] = entry.key.node;
    }

    fn push(&mut self, entry: &Entry) {
        self.put(self.length, entry);
        self.length += 1;
    }

    fn uncount(&mut self, place: usize) {
        if self.classes[place] == 0 {
            return;
        }
        let class = self.classes[place].trailing_zeros() as usize;
        for tier in 0..=self.tiers[place].number() {
            self.counts[class][tier] -= 1;
            if self.counts[class][tier] == 0 {
                self.summary.classes[tier] &= !(1 << class);
            }
        }
    }

    /// The last takes the place of one that goes.
    fn take_out(&mut self, place: usize) {
        let last = self.length - 1;
        self.uncount(place);
        let of_last = self.lanes.get(last);
        if place != last {
            self.classes[place] = self.classes[last];
            self.tiers[place] = self.tiers[last];
            self.digits[place] = self.digits[last];
            self.nodes[place] = self.nodes[last];
            // The last is still there, so that what goes is the only one missed.
            set_and_raise(&mut self.lanes, &mut self.summary.most, place, &of_last);
        }
        set_and_raise(&mut self.lanes, &mut self.summary.most, last, &NOBODY);
        self.classes[last] = 0;
        self.length = last;
    }

    /// Whether a key surely lies between this leaf's bounds.
    fn surely_has(&self, key: &Key) -> bool {
        (self.from == u64::MAX || sure(self.from, key.digits) == Some(true))
            && (self.to == 0 || sure(key.digits, self.to) == Some(true))
    }
}

/// Writes a place, and keeps the most of all places right: only a lane whose most goes is looked through.
fn set_and_raise(lanes: &mut Lanes, most: &mut Amounts, place: usize, amounts: &Amounts) {
    let before = lanes.get(place);
    lanes.set(place, amounts);
    for lane in 0..LANES {
        if amounts[lane] >= most[lane] {
            most[lane] = amounts[lane];
        } else if before[lane] == most[lane] {
            most[lane] = lanes.most(lane);
        }
    }
}

impl Group {
    fn new() -> Group {
        Group {
            length: 0,
            lanes: Lanes::EMPTY,
            classes: [[0; WIDTH]; TIERS],
            leaves: [0; WIDTH],
            summary: VOID,
            bounds: Vec::new(),
        }
    }

    /// Writes what is known of a leaf. Whether anything is known of the group that was not.
    fn note(&mut self, place: usize, summary: &Summary) -> bool {
        let known = self.summary;
        set_and_raise(&mut self.lanes, &mut self.summary.most, place, &summary.most);
        for (tier, classes) in summary.classes.iter().enumerate() {
            let (row, all) = (&mut self.classes[tier], &mut self.summary.classes[tier]);
            let gone = row[place] & !classes;
            row[place] = *classes;
            if gone == 0 {
                *all |= classes;
            } else {
                *all = row.iter().fold(0, |all, classes| all | classes);
            }
        }
        known != self.summary
    }

    fn noted(&self, place: usize) -> Summary {
        Summary { most: self.lanes.get(place), classes: self.classes.each_ref().map(|row| row[place]) }
    }

    fn place_of(&self, leaf: u32) -> usize {
        self.leaves[..self.length].iter().position(|it| *it == leaf).unwrap_or(0)
    }

    fn insert(&mut self, place: usize, leaf: u32, bound: Key, summary: &Summary) {
        for to in (place + 1..=self.length).rev() {
            let from = self.noted(to - 1);
            self.note(to, &from);
            self.leaves[to] = self.leaves[to - 1];
        }
        self.length += 1;
        self.leaves[place] = leaf;
        self.bounds.insert(place, bound);
        self.note(place, summary);
    }

    fn remove(&mut self, place: usize) {
        for to in place..self.length - 1 {
            let from = self.noted(to + 1);
            self.note(to, &from);
            self.leaves[to] = self.leaves[to + 1];
        }
        self.length -= 1;
        self.bounds.remove(place);
        self.note(self.length, &VOID);
    }
}

impl Index {
    /// The first node in order that `accepts`, of those that may have what is wanted.
    pub(super) fn first(
        &self,
        wanted: &Wanted,
        walk: &mut Walk,
        mut accepts: impl FnMut(u32) -> bool,
    ) -> Option<u32> {
        for (group, summary) in self.order.iter().zip(&self.summaries) {
            if !lanes::may_hold(&summary.most, &wanted.amounts)
                || wanted.classes.is_some_and(|classes| classes & summary.classes[wanted.tier.number()] == 0)
            {
                continue;
            }
            let group = &self.groups[*group as usize];
            walk.compared += 1;
            let mut leaves = group.lanes.mask(&wanted.amounts) & lanes::first(group.length);
            if let Some(classes) = wanted.classes {
                leaves &= lanes::classes(&group.classes[wanted.tier.number()], classes);
            }
            for place in lanes::each(leaves) {
                let leaf = &self.leaves[group.leaves[place] as usize];
                walk.compared += 1;
                let mut found = leaf.lanes.mask(&wanted.amounts) & lanes::first(leaf.length);
                if let Some(classes) = wanted.classes {
                    found &= lanes::classes(&leaf.classes, classes);
                }
                while found != 0 {
                    let place = self.first_of(leaf, found);
                    walk.looked_at += 1;
                    if accepts(leaf.nodes[place]) {
                        return Some(leaf.nodes[place]);
                    }
                    found &= !(1 << place);
                }
            }
        }
        None
    }

    /// Of the places of a leaf, that with the node which comes first.
    fn first_of(&self, leaf: &Leaf, places: u64) -> usize {
        let mut places = lanes::each(places);
        let mut best = places.next().unwrap_or(0);
        for place in places {
            let is_before = sure(leaf.digits[place], leaf.digits[best]).unwrap_or_else(|| {
                let key = |place: usize| self.keys[leaf.nodes[place] as usize];
                key(place).zip(key(best)).is_some_and(|(key, best)| key.is_before(&best))
            });
            if is_before {
                best = place;
            }
        }
        best
    }

    /// Puts a node where it belongs, from wherever it was.
    pub(super) fn set(&mut self, entry: &Entry) {
        let node = entry.key.node as usize;
        if self.seats.len() <= node {
            self.seats.resize(node + 1, None);
            self.keys.resize(node + 1, None);
        }
        if let Some(seat) = self.seats[node] {
            let leaf = &mut self.leaves[seat.leaf as usize];
            if leaf.surely_has(&entry.key) || self.leaf_for(&entry.key) == seat.leaf {
                self.leaves[seat.leaf as usize].put(usize::from(seat.place), entry);
                self.keys[node] = Some(entry.key);
                self.refresh(seat.leaf);
                return;
            }
            self.remove(entry.key.node);
        }
        self.keys[node] = Some(entry.key);
        let mut at = self.leaf_for(&entry.key);
        if self.leaves[at as usize].length == WIDTH {
            self.split(at);
            at = self.leaf_for(&entry.key);
        }
        let leaf = &mut self.leaves[at as usize];
        self.seats[node] = Some(Seat { leaf: at, place: leaf.length as u8 });
        leaf.push(entry);
        self.refresh(at);
    }

    /// Takes a node out.
    pub(super) fn remove(&mut self, node: u32) {
        let Some(seat) = self.seats.get_mut(node as usize).and_then(Option::take) else { return };
        self.keys[node as usize] = None;
        let leaf = &mut self.leaves[seat.leaf as usize];
        let place = usize::from(seat.place);
        leaf.take_out(place);
        let last = leaf.length;
        if place != last {
            self.seats[leaf.nodes[place] as usize] = Some(seat);
        }
        self.refresh(seat.leaf);
        if last < FEW {
            self.join(seat.leaf);
        }
    }

    /// The leaf that a key belongs to. The first of all is made when there is none.
    fn leaf_for(&mut self, key: &Key) -> u32 {
        if self.order.is_empty() {
            let group = self.new_group();
            let leaf = self.new_leaf(group);
            self.groups[group as usize].insert(0, leaf, *key, &VOID);
            self.order.push(group);
            self.summaries.push(VOID);
        }
        // The last whose bound is not behind the key.
        let groups = &self.groups;
        let at = self.order[1..].partition_point(|group| !key.is_before(&groups[*group as usize].bounds[0]));
        let group = &groups[self.order[at] as usize];
        let place = group.bounds[1..].partition_point(|bound| !key.is_before(bound));
        group.leaves[place]
    }

    /// Tells the group above what has become of a leaf.
    fn refresh(&mut self, leaf: u32) {
        let Leaf { summary, group: number, .. } = self.leaves[leaf as usize];
        let group = &mut self.groups[number as usize];
        let place = group.place_of(leaf);
        if group.note(place, &summary) {
            self.tell_of_group(number);
        }
    }

    fn tell_of_group(&mut self, group: u32) {
        if let Some(at) = self.order.iter().position(|it| *it == group) {
            self.summaries[at] = self.groups[group as usize].summary;
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

    fn new_group(&mut self) -> u32 {
        if let Some(group) = self.spare_groups.pop() {
            self.groups[group as usize] = Group::new();
            return group;
        }
        self.groups.push(Group::new());
        (self.groups.len() - 1) as u32
    }

    fn entry(&self, leaf: &Leaf, place: usize) -> Option<Entry> {
        let key = self.keys[leaf.nodes[place] as usize]?;
        let class = leaf.classes[place].trailing_zeros() as u8;
        Some(Entry { key, free: leaf.lanes.get(place), class, tier: leaf.tiers[place] })
    }

    /// Divides a full leaf in the middle of its keys.
    fn split(&mut self, full: u32) {
        let mut number = self.leaves[full as usize].group;
        if self.groups[number as usize].length == WIDTH {
            self.split_group(number);
            number = self.leaves[full as usize].group;
        }
        let old = &self.leaves[full as usize];
        let mut entries: Vec<Entry> = (0..old.length).filter_map(|place| self.entry(old, place)).collect();
        entries.sort_by(|a, b| {
            if a.key.is_before(&b.key) { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater }
        });
        let second = entries.split_off(entries.len() / 2);
        let Some(bound) = second.first().map(|entry| entry.key) else { return };
        let (from, to) = (old.from, old.to);
        let new = self.new_leaf(number);
        for (leaf, entries, from, to) in
            [(full, &entries, from, bound.digits.max(1)), (new, &second, bound.digits, to)]
        {
            let mut fresh = Leaf::new(number);
            (fresh.from, fresh.to) = (from, to);
            for entry in entries {
                self.seats[entry.key.node as usize] = Some(Seat { leaf, place: fresh.length as u8 });
                fresh.push(entry);
            }
            self.leaves[leaf as usize] = fresh;
        }
        let summary = self.leaves[new as usize].summary;
        let group = &mut self.groups[number as usize];
        let place = group.place_of(full);
        group.insert(place + 1, new, bound, &summary);
        self.refresh(full);
        self.tell_of_group(number);
    }

    fn split_group(&mut self, full: u32) {
        let new = self.new_group();
        let mut second = Group::new();
        let first = &mut self.groups[full as usize];
        while first.length > WIDTH / 2 {
            let last = first.length - 1;
            let (leaf, bound, summary) = (first.leaves[last], first.bounds[last], first.noted(last));
            first.remove(last);
            second.insert(0, leaf, bound, &summary);
            self.leaves[leaf as usize].group = new;
        }
        self.groups[new as usize] = second;
        if let Some(at) = self.order.iter().position(|it| *it == full) {
            self.order.insert(at + 1, new);
            self.summaries.insert(at + 1, VOID);
        }
        self.tell_of_group(full);
        self.tell_of_group(new);
    }

    /// Joins a leaf with a neighbour of its group if the two have room in one. An empty one that has none is let go
    /// with its group, but for the last.
    fn join(&mut self, leaf: u32) {
        let number = self.leaves[leaf as usize].group;
        let group = &self.groups[number as usize];
        let (place, length) = (group.place_of(leaf), self.leaves[leaf as usize].length);
        let fits = |other: usize| self.leaves[group.leaves[other] as usize].length + length <= JOINED;
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
        for place in 0..other.length {
            let Some(entry) = self.entry(&other, place) else { continue };
            let leaf = &mut self.leaves[stays as usize];
            self.seats[entry.key.node as usize] = Some(Seat { leaf: stays, place: leaf.length as u8 });
            leaf.push(&entry);
        }
        self.leaves[stays as usize].to = other.to;
        self.groups[number as usize].remove(left + 1);
        self.spare.push(goes);
        self.refresh(stays);
        self.tell_of_group(number);
    }

    /// Lets go of a group whose only leaf is empty. Its range of keys becomes its neighbour's.
    fn drop_group(&mut self, group: u32, leaf: u32) {
        let Some(at) = self.order.iter().position(|it| *it == group) else { return };
        if self.order.len() == 1 {
            return;
        }
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
        self.spare.push(leaf);
        self.spare_groups.push(group);
    }
}
