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
//! What a change costs is the lines of the cache that it touches, so of a node the index keeps 40 bytes, in six lines. CPU and memory
//! are there twice, by node and by resource, for there are two questions: whether a node has all, and how much any has. What is
//! rarely needed, a node's exact key, is asked for ([`Keys`]).

use super::{
    exact::{Key, SURE, sure},
    lanes::{self, Column, Lanes, NO_ROW, Row, Rows, WIDTH},
};

/// When a leaf or a group has so few left it looks for a neighbour to join …
const FEW: usize = 20;
/// … that leaves the two with no more than this.
const JOINED: usize = 44;

/// With so few leaves, what a leaf has no more is found out by the first search that comes there in vain: a change costs a
/// quarter less, and no search is long. With more of them it is found out at once, or those that look for what is
/// rare would come to many leaves in vain. Tests have both.
const FEW_LEAVES: usize = if cfg!(test) { 4 } else { 512 };

/// So few places are compared one by one.
const SINGLY: u32 = 16;

/// What is asked for: as far as the lanes know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) amounts: Row,
    /// Which classes will do, folded into 64 bits; `None`: all.
    pub(super) classes: Option<u64>,
    /// What it wants of GPUs.
    pub(super) tier: Tier,
}

/// Roughly, what a node has free of GPUs. Of the nodes with at least a certain tier, a leaf and a group know the most
/// that is free of CPU and of memory, and the classes. So a search for GPUs does not go where those with CPU have none,
/// nor one for a model where that is taken and only others are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tier(u8);

const TIERS: usize = 8;

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

/// CPU and memory: the lanes of which the most is known by tier.
const BESIDE: usize = 2;

/// By tier plus one, in which lanes a node of that is: those of its tier and the lower ones. Nobody, with 0, is in none.
const AT_LEAST: [Row; TIERS + 1] = {
    let mut rows = [[0; TIERS]; TIERS + 1];
    let mut tier = 1;
    while tier <= TIERS {
        rows[tier] = rows[tier - 1];
        rows[tier][tier - 1] = -1;
        tier += 1;
    }
    let mut table = [Row::ZERO; TIERS + 1];
    while tier > 0 {
        tier -= 1;
        table[tier] = Row::new(rows[tier]);
    }
    table
};

/// So much in each lane that a node of this tier, plus one, is in.
fn by_tier(tier: usize, amount: i16) -> Row {
    AT_LEAST[tier].select(Row::splat(amount), Row::splat(-1))
}

/// The most of what is below.
#[derive(Clone, Copy, Debug)]
struct Summary {
    most: Row,
    /// By tier, the most that is free at those that have at least that.
    beside: [Row; BESIDE],
    /// The classes of those.
    classes: [u64; TIERS],
}

/// What of a summary is not as it was: lanes and tiers, one bit for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Changed {
    most: u64,
    beside: [u64; BESIDE],
    classes: u64,
}

impl Changed {
    const ALL: Changed = {
        let tiers = (1 << TIERS) - 1;
        Changed { most: (1 << lanes::LANES) - 1, beside: [tiers; BESIDE], classes: tiers }
    };
}

const VOID: Summary = Summary { most: NO_ROW, beside: [Row::splat(-1); BESIDE], classes: [0; TIERS] };

impl Summary {
    fn may_hold(&self, wanted: &Wanted) -> bool {
        let tier = wanted.tier.number();
        (0..BESIDE).all(|lane| self.beside[lane].as_array()[tier] >= wanted.amounts.as_array()[lane])
            && !self.most.simd_lt(wanted.amounts).any()
            && wanted.classes.is_none_or(|classes| classes & self.classes[tier] != 0)
    }

    fn difference(&self, before: &Summary) -> Changed {
        let mut classes = 0;
        for (tier, (now, before)) in self.classes.iter().zip(&before.classes).enumerate() {
            classes |= u64::from(now != before) << tier;
        }
        Changed {
            most: lanes::difference(self.most, before.most),
            beside: std::array::from_fn(|lane| lanes::difference(self.beside[lane], before.beside[lane])),
            classes,
        }
    }
}

/// An entry that was at a place.
struct Gone {
    class: u8,
    /// One more than its tier; 0: nobody was there.
    tier: usize,
    free: Row,
}

#[derive(Clone, Debug)]
#[repr(align(64))]
struct Leaf {
    /// The places that somebody has.
    used: u64,
    /// Digits of this leaf's bound, and of the next one's: a key well between them belongs here. The very first
    /// leaf has `u64::MAX`, the very last 0, and no other has.
    from: u64,
    to: u64,
    group: u32,
    /// In its group.
    at: u8,
    /// At least what there is: what becomes less is found out when a search comes here in vain.
    known: Summary,
    /// For which tiers it may be less, one bit for each.
    lowered: u8,
    classes: Column,
    /// 0 where nobody is, else one more than the tier.
    tiers: Column,
    /// CPU and memory again, to find the most by tier.
    columns: [Column; BESIDE],
    rows: Rows,
    /// Digits of its key, and the node.
    nodes: [(u64, u32); WIDTH],
}

#[derive(Clone, Debug)]
struct Group {
    length: usize,
    /// In the order of all groups.
    at: u32,
    lanes: Lanes<8>,
    /// By tier.
    beside: [Lanes<TIERS>; BESIDE],
    classes: [[u64; WIDTH]; TIERS],
    leaves: [u32; WIDTH],
    summary: Summary,
    /// Each leaf's first possible key; everything before it is in leaves before. Of the very first it is not looked at.
    bounds: Vec<Key>,
    /// The digits of those.
    digits: [u64; WIDTH],
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

impl Leaf {
    fn new(group: u32) -> Leaf {
        Leaf {
            used: 0,
            from: u64::MAX,
            to: 0,
            group,
            at: 0,
            known: VOID,
            lowered: 0,
            classes: Column::of(0),
            tiers: Column::of(0),
            columns: [const { Column::of(-1) }; BESIDE],
            rows: Rows::EMPTY,
            nodes: [(0, 0); WIDTH],
        }
    }

    fn length(&self) -> usize {
        self.used.count_ones() as usize
    }

    /// Of a place that somebody has.
    fn entry(&self, place: usize, key: Key) -> Entry {
        let (class, tier) = (self.classes.get(place) as u8, Tier((self.tiers.get(place) - 1).max(0) as u8));
        Entry { key, free: self.rows.get(place), class, tier }
    }

    /// Writes an entry where nobody is, or another of the same node: what was there before.
    fn put(&mut self, place: usize, entry: &Entry) -> Gone {
        let Entry { key, free, class, tier } = *entry;
        self.nodes[place] = (key.digits, key.node);
        self.used |= 1 << place;
        let gone = Gone {
            class: self.classes.replace(place, class.into()) as u8,
            tier: self.tiers.replace(place, i16::from(tier.0) + 1) as usize,
            free: self.rows.replace(place, free),
        };
        for (lane, column) in self.columns.iter_mut().enumerate() {
            column.replace(place, free.as_array()[lane]);
        }
        self.known.most = self.known.most.max(free);
        for (lane, beside) in self.known.beside.iter_mut().enumerate() {
            *beside = beside.max(by_tier(tier.number() + 1, free.as_array()[lane]));
        }
        for classes in &mut self.known.classes[..=tier.number()] {
            *classes |= 1 << class;
        }
        gone
    }

    /// Puts an entry at a place that nobody has. There is one.
    fn push(&mut self, entry: &Entry) -> u8 {
        let place = self.used.trailing_ones();
        self.put(place as usize, entry);
        place as u8
    }

    fn take_out(&mut self, place: usize) -> Gone {
        self.used &= !(1 << place);
        Gone {
            class: self.classes.get(place) as u8,
            tier: self.tiers.replace(place, 0) as usize,
            free: self.rows.replace(place, NO_ROW),
        }
    }

    /// Takes what an entry added out of what is known; or leaves that to a search that comes here in vain.
    fn forget(&mut self, gone: &Gone, at_once: bool) {
        if !at_once {
            self.lowered |= ((1u16 << gone.tier) - 1) as u8;
            return;
        }
        if gone.free.simd_eq(self.known.most).any() {
            self.known.most = self.rows.most();
        }
        let left = self.tiers.most_where(&self.classes, gone.class.into()) as usize;
        for classes in &mut self.known.classes[left.min(gone.tier)..gone.tier] {
            *classes &= !(1 << gone.class);
        }
        for (lane, column) in self.columns.iter().enumerate() {
            let had = by_tier(gone.tier, gone.free.as_array()[lane]);
            let lost = (self.known.beside[lane].simd_eq(had) & AT_LEAST[gone.tier]).to_bitmask();
            for tier in lanes::each(lost.into()) {
                self.known.beside[lane].as_mut_array()[tier] =
                    column.most_where_above(&self.tiers, tier as i16);
            }
        }
    }

    /// Finds out anew what is known for a tier, if it may be less than is known.
    fn settle(&mut self, tier: Tier) {
        let (bit, number) = (1 << tier.0, tier.number());
        if self.lowered & bit == 0 {
            return;
        }
        self.lowered &= !bit;
        self.known.most = self.rows.most();
        for (beside, column) in self.known.beside.iter_mut().zip(&self.columns) {
            beside.as_mut_array()[number] = column.most_where_above(&self.tiers, tier.0.into());
        }
        let with_tier = lanes::each(self.tiers.above(tier.0.into()));
        self.known.classes[number] = with_tier.fold(0, |all, place| all | 1 << self.classes.get(place));
    }

    /// The places that may have what is wanted.
    fn mask(&self, wanted: &Wanted) -> u64 {
        let mut found = self.used;
        if wanted.tier > Tier(0) || wanted.classes.is_some() {
            // Two lines of the cache that often leave out nearly all.
            found &= self.tiers.above(wanted.tier.0.into());
            if let Some(classes) = wanted.classes {
                for place in lanes::each(found) {
                    found &= !(u64::from(classes >> self.classes.get(place) & 1 == 0) << place);
                }
            }
            if found.count_ones() <= SINGLY {
                let fits = |place: &usize| self.rows.fits(*place, wanted.amounts);
                return lanes::each(found).filter(fits).fold(0, |mask, place| mask | 1 << place);
            }
        }
        found & self.rows.mask(wanted.amounts)
    }

    /// Whether a key surely lies between this leaf's bounds.
    fn surely_has(&self, key: &Key) -> bool {
        (self.from == u64::MAX || sure(self.from, key.digits) == Some(true))
            && (self.to == 0 || sure(key.digits, self.to) == Some(true))
    }
}

impl Group {
    fn new(at: u32) -> Group {
        Group {
            length: 0,
            at,
            lanes: Lanes::EMPTY,
            beside: [const { Lanes::EMPTY }; BESIDE],
            classes: [[0; WIDTH]; TIERS],
            leaves: [0; WIDTH],
            summary: VOID,
            bounds: Vec::new(),
            digits: [0; WIDTH],
        }
    }

    /// Writes what is known of a leaf, as far as that has changed. Whether anything is known of the group that was not.
    fn note(&mut self, place: usize, summary: &Summary, changed: Changed) -> bool {
        let known = self.summary;
        let amounts = summary.most.as_array();
        for lane in lanes::each(changed.most) {
            self.lanes.set_and_raise(self.summary.most.as_mut_array(), lane, place, amounts[lane]);
        }
        for (beside, lanes) in self.beside.iter_mut().enumerate() {
            let (most, amounts) =
                (self.summary.beside[beside].as_mut_array(), summary.beside[beside].as_array());
            for tier in lanes::each(changed.beside[beside]) {
                lanes.set_and_raise(most, tier, place, amounts[tier]);
            }
        }
        for tier in lanes::each(changed.classes) {
            let classes = summary.classes[tier];
            let (row, all) = (&mut self.classes[tier], &mut self.summary.classes[tier]);
            let gone = std::mem::replace(&mut row[place], classes) & !classes;
            if gone == 0 {
                *all |= classes;
            } else {
                *all = row.iter().fold(0, |all, classes| all | classes);
            }
        }
        self.summary.difference(&known) != Changed::default()
    }

    fn noted(&self, place: usize) -> Summary {
        Summary {
            most: Row::new(self.lanes.get(place)),
            beside: self.beside.each_ref().map(|lanes| Row::new(lanes.get(place))),
            classes: self.classes.each_ref().map(|row| row[place]),
        }
    }

    fn mask(&self, wanted: &Wanted) -> u64 {
        let tier = wanted.tier.number();
        let (mut amounts, mut leaves) = (wanted.amounts.to_array(), lanes::first(self.length));
        for (amount, lanes) in amounts.iter_mut().zip(&self.beside) {
            let mut by_tier = [0; TIERS];
            // The most of those that have the GPUs is at most that of all, which then need not be looked at.
            by_tier[tier] = std::mem::take(amount);
            leaves &= lanes.mask(&by_tier);
        }
        leaves &= self.lanes.mask(&amounts);
        if let Some(classes) = wanted.classes {
            let row = &self.classes[tier];
            if leaves.count_ones() > SINGLY {
                return leaves & lanes::classes(row, classes);
            }
            for place in lanes::each(leaves) {
                leaves &= !(u64::from(row[place] & classes == 0) << place);
            }
        }
        leaves
    }

    fn insert(&mut self, place: usize, leaf: u32, bound: Key, summary: &Summary) {
        for to in (place + 1..=self.length).rev() {
            let from = self.noted(to - 1);
            self.note(to, &from, Changed::ALL);
            self.leaves[to] = self.leaves[to - 1];
            self.digits[to] = self.digits[to - 1];
        }
        self.length += 1;
        self.leaves[place] = leaf;
        self.digits[place] = bound.digits;
        self.bounds.insert(place, bound);
        self.note(place, summary, Changed::ALL);
    }

    fn remove(&mut self, place: usize) {
        for to in place..self.length - 1 {
            let from = self.noted(to + 1);
            self.note(to, &from, Changed::ALL);
            self.leaves[to] = self.leaves[to + 1];
            self.digits[to] = self.digits[to + 1];
        }
        self.length -= 1;
        self.bounds.remove(place);
        self.note(self.length, &VOID, Changed::ALL);
    }

    /// The leaf that a key belongs to.
    fn place_for(&self, key: &Key) -> usize {
        // The first bound is not looked at: what is before it belongs to the first leaf, too.
        not_behind(key, &self.digits[1..self.length], |at| self.bounds[at + 1])
    }
}

/// How many of these bounds, which are in order, are not behind a key.
fn not_behind(key: &Key, digits: &[u64], bound: impl Fn(usize) -> Key) -> usize {
    let surely_before = key.digits.saturating_add(SURE);
    let mut count = digits.partition_point(|digits| *digits > surely_before);
    let is_behind = |at: usize| sure(key.digits, digits[at]).unwrap_or_else(|| key.is_before(&bound(at)));
    while count < digits.len() && !is_behind(count) {
        count += 1;
    }
    count
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
                    let known = leaf.known;
                    leaf.settle(wanted.tier);
                    let leaf = self.groups[number].leaves[place];
                    self.refresh(leaf, &known);
                    continue;
                }
                while found != 0 {
                    let place = first_of(leaf, found, keys);
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
                let known = leaf.known;
                let gone = leaf.put(usize::from(seat.place), entry);
                leaf.forget(&gone, at_once);
                self.refresh(seat.leaf, &known);
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
        let known = leaf.known;
        let place = leaf.push(entry);
        self.seats[node] = Some(Seat { leaf: at, place });
        self.refresh(at, &known);
    }

    /// Takes a node out. Whether leaves are others than before.
    pub(super) fn remove(&mut self, node: u32) -> bool {
        let Some(seat) = self.seats.get_mut(node as usize).and_then(Option::take) else { return false };
        let (at_once, leaf) = (self.has_many(), &mut self.leaves[seat.leaf as usize]);
        let known = leaf.known;
        let gone = leaf.take_out(usize::from(seat.place));
        leaf.forget(&gone, at_once);
        let is_few = leaf.length() < FEW;
        if at_once {
            self.refresh(seat.leaf, &known);
        }
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

    /// Tells the group above what has become of a leaf of which this was known.
    fn refresh(&mut self, leaf: u32, known: &Summary) {
        let leaf = &self.leaves[leaf as usize];
        let changed = leaf.known.difference(known);
        if changed != Changed::default() {
            self.note(leaf.group, usize::from(leaf.at), leaf.known, changed);
        }
    }

    /// The same, of all that is known of it.
    fn refresh_all_of(&mut self, leaf: u32) {
        let leaf = &self.leaves[leaf as usize];
        self.note(leaf.group, usize::from(leaf.at), leaf.known, Changed::ALL);
    }

    fn note(&mut self, group: u32, place: usize, known: Summary, changed: Changed) {
        if self.groups[group as usize].note(place, &known, changed) {
            self.tell_of_group(group);
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
                let place = fresh.push(entry);
                self.seats[entry.key.node as usize] = Some(Seat { leaf, place });
            }
            self.leaves[leaf as usize] = fresh;
        }
        let summary = self.leaves[new as usize].known;
        self.groups[number as usize].insert(usize::from(at) + 1, new, bound, &summary);
        self.renumber_leaves(number);
        self.refresh_all_of(full);
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
            let place = self.leaves[stays as usize].push(&entry);
            self.seats[node as usize] = Some(Seat { leaf: stays, place });
        }
        self.leaves[stays as usize].to = other.to;
        self.groups[number as usize].remove(left + 1);
        self.spare.push(goes);
        self.renumber_leaves(number);
        self.refresh_all_of(stays);
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

/// Of the places of a leaf, that with the node which comes first.
fn first_of(leaf: &Leaf, places: u64, keys: &impl Keys) -> usize {
    let most = lanes::each(places).fold(0, |most, place| leaf.nodes[place].0.max(most));
    let may_be_first = |place: &usize| sure(most, leaf.nodes[*place].0).is_none();
    let mut nearly = lanes::each(places).filter(may_be_first);
    let mut best = nearly.next().unwrap_or(0);
    for place in nearly {
        let key = |place: usize| keys.key(leaf.nodes[place].1);
        if key(place).is_before(&key(best)) {
            best = place;
        }
    }
    best
}
