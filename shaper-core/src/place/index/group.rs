//! Up to 64 leaves.

use super::{
    super::{
        exact::{Key, SURE, sure},
        lanes::{self, Enough, Lanes, Row, WIDTH},
    },
    Wanted,
    summary::{BESIDE, Changed, Summary, TIERS, VOID},
};

/// So few leaves' classes are compared one by one.
const SINGLY: u32 = 16;

#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) length: usize,
    /// In the order of all groups.
    pub(super) at: u32,
    lanes: Lanes<8>,
    /// By tier.
    beside: [Lanes<TIERS>; BESIDE],
    classes: [[u64; WIDTH]; TIERS],
    pub(super) leaves: [u32; WIDTH],
    pub(super) summary: Summary,
    /// Each leaf's first possible key; everything before it is in leaves before. Of the very first it is not looked at.
    pub(super) bounds: Vec<Key>,
    /// The digits of those.
    pub(super) digits: [u64; WIDTH],
}

impl Group {
    pub(super) fn new(at: u32) -> Group {
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
    pub(super) fn note(&mut self, place: usize, known: &Summary, changed: Changed) -> bool {
        let mut is_other = false;
        let Group { lanes, beside, classes, summary, .. } = self;
        let (most, amounts) = (summary.most.as_mut_array(), known.most.as_array());
        for lane in lanes::each(changed.most) {
            is_other |= lanes.set_and_raise(most, lane, place, amounts[lane]);
        }
        for (beside, lanes) in beside.iter_mut().enumerate() {
            let (most, amounts) = (summary.beside[beside].as_mut_array(), known.beside[beside].as_array());
            for tier in lanes::each(changed.beside[beside]) {
                is_other |= lanes.set_and_raise(most, tier, place, amounts[tier]);
            }
        }
        for tier in lanes::each(changed.classes) {
            let (row, all, known) = (&mut classes[tier], &mut summary.classes[tier], known.classes[tier]);
            let gone = std::mem::replace(&mut row[place], known) & !known;
            let now = if gone & *all == 0 { *all | known } else { row.iter().fold(0, |all, it| all | it) };
            is_other |= std::mem::replace(all, now) != now;
        }
        is_other
    }

    pub(super) fn noted(&self, place: usize) -> Summary {
        Summary {
            most: Row::new(self.lanes.get(place)),
            beside: self.beside.each_ref().map(|lanes| Row::new(lanes.get(place))),
            classes: self.classes.each_ref().map(|row| row[place]),
        }
    }

    /// The leaves that may have what is wanted.
    pub(super) fn mask(&self, wanted: &Wanted) -> u64 {
        let (tier, amounts) = (wanted.tier.number(), wanted.amounts.as_array());
        let mut enough = Enough::everywhere();
        for (lanes, wanted) in self.beside.iter().zip(amounts) {
            enough.narrow(lanes.lane(tier), *wanted);
        }
        if wanted.has_more {
            for (lane, wanted) in amounts.iter().enumerate().skip(BESIDE).filter(|(_, wanted)| **wanted > 0) {
                enough.narrow(self.lanes.lane(lane), *wanted);
            }
        }
        let mut leaves = lanes::first(self.length) & enough.mask();
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

    pub(super) fn insert(&mut self, place: usize, leaf: u32, bound: Key, summary: &Summary) {
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

    pub(super) fn remove(&mut self, place: usize) {
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
    pub(super) fn place_for(&self, key: &Key) -> usize {
        // The first bound is not looked at: what is before it belongs to the first leaf, too.
        not_behind(key, &self.digits[1..self.length], |at| self.bounds[at + 1])
    }
}

/// How many of these bounds, which are in order, are not behind a key.
pub(super) fn not_behind(key: &Key, digits: &[u64], bound: impl Fn(usize) -> Key) -> usize {
    let surely_before = key.digits.saturating_add(SURE);
    let mut count = digits.partition_point(|digits| *digits > surely_before);
    let is_behind = |at: usize| sure(key.digits, digits[at]).unwrap_or_else(|| key.is_before(&bound(at)));
    while count < digits.len() && !is_behind(count) {
        count += 1;
    }
    count
}
