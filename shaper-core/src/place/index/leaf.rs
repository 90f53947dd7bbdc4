//! Up to 64 nodes whose keys lie between two bounds.

use super::{
    super::{
        exact::{Key, sure},
        lanes::{self, Column, Enough, NO_ROW, Row, Rows, WIDTH},
    },
    Entry, Keys, Tier, Wanted,
    summary::{AT_LEAST, BESIDE, Changed, Summary, TIERS, VOID, by_tier},
};

/// So few places are compared one by one.
const SINGLY: u32 = 16;

/// Bits of a tag that are the class; above them is one more than the tier. Where nobody is a tag is 0.
const CLASS_BITS: u32 = 6;
const CLASS: i16 = (1 << CLASS_BITS) - 1;

fn tag(class: u8, tier: Tier) -> i16 {
    (i16::from(tier.0) + 1) << CLASS_BITS | i16::from(class)
}

/// The most that a tag of less than this tier is.
fn below(tier: usize) -> i16 {
    ((tier as i16 + 1) << CLASS_BITS) - 1
}

/// The lanes whose most a leaf knows without regard to tiers.
const IN_MOST: u64 = (1 << lanes::LANES) - (1 << BESIDE);
/// That of the share of one GPU.
const SHARE: u64 = 1 << 5;

/// What an entry that was at a place had.
pub(super) struct Gone {
    class: u8,
    /// One more than its tier; 0: nobody was there.
    tier: usize,
    free: Row,
}

#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Leaf {
    /// The places that somebody has.
    pub(super) used: u64,
    /// Digits of this leaf's bound, and of the next one's: a key well between them belongs here. The very first
    /// leaf has `u64::MAX`, the very last 0, and no other has.
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) group: u32,
    /// In its group.
    pub(super) at: u8,
    /// For which tiers less may be there than is known, one bit for each; of classes; and of any lane.
    lowered: u8,
    lowered_classes: u8,
    is_lowered: bool,
    /// The lanes that never run out at any node.
    endless: u64,
    /// At least what there is.
    pub(super) known: Summary,
    /// Classes and tiers.
    tags: Column,
    /// CPU and memory again, to find the most by tier.
    columns: [Column; BESIDE],
    rows: Rows,
    /// Digits of its key, and the node.
    pub(super) nodes: [(u64, u32); WIDTH],
}

impl Leaf {
    pub(super) fn new(group: u32) -> Leaf {
        Leaf {
            used: 0,
            from: u64::MAX,
            to: 0,
            group,
            at: 0,
            lowered: 0,
            lowered_classes: 0,
            is_lowered: false,
            endless: u64::MAX,
            known: VOID,
            tags: Column::of(0),
            columns: [const { Column::of(-1) }; BESIDE],
            rows: Rows::EMPTY,
            nodes: [(0, 0); WIDTH],
        }
    }

    pub(super) fn length(&self) -> usize {
        self.used.count_ones() as usize
    }

    /// Of a place that somebody has.
    pub(super) fn entry(&self, place: usize, key: Key) -> Entry {
        let tag = self.tags.get(place);
        let (class, tier) = ((tag & CLASS) as u8, Tier(((tag >> CLASS_BITS) - 1).max(0) as u8));
        Entry { key, free: self.rows.get(place), class, tier }
    }

    fn gone(tag: i16, free: Row) -> Gone {
        Gone { class: (tag & CLASS) as u8, tier: (tag >> CLASS_BITS) as usize, free }
    }

    /// Writes an entry where nobody is, or another of the same node: what was there before.
    pub(super) fn put(&mut self, place: usize, entry: &Entry) -> (Gone, Changed) {
        let Entry { key, free, class, tier } = *entry;
        self.nodes[place] = (key.digits, key.node);
        self.used |= 1 << place;
        let gone = Leaf::gone(self.tags.replace(place, tag(class, tier)), self.rows.replace(place, free));
        for (lane, column) in self.columns.iter_mut().enumerate() {
            column.replace(place, free.as_array()[lane]);
        }
        self.endless &= !lanes::difference(free, Row::splat(i16::MAX));
        (gone, self.known.raise(free, class, tier))
    }

    /// Puts an entry at a place that nobody has. There is one.
    pub(super) fn push(&mut self, entry: &Entry) -> (u8, Changed) {
        let place = self.used.trailing_ones();
        let (_, changed) = self.put(place as usize, entry);
        (place as u8, changed)
    }

    pub(super) fn take_out(&mut self, place: usize) -> Gone {
        self.used &= !(1 << place);
        Leaf::gone(self.tags.replace(place, 0), self.rows.replace(place, NO_ROW))
    }

    /// Takes what an entry added out of what is known; or leaves that to a search that comes here in vain.
    pub(super) fn forget(&mut self, gone: &Gone, at_once: bool) -> Changed {
        if !at_once {
            let tiers = ((1u16 << gone.tier) - 1) as u8;
            self.lowered |= tiers;
            self.lowered_classes |= tiers;
            self.is_lowered = true;
            return Changed::default();
        }
        if self.used == 0 {
            (self.known, self.endless) = (VOID, u64::MAX);
            return Changed::ALL;
        }
        let mut changed = Changed::default();
        let mut lost = !lanes::difference(gone.free, self.known.most) & IN_MOST & !self.endless;
        if lost == SHARE && self.tags.above(below(Tier::ALL_OF_ONE.number())) != 0 {
            // The others' is as much as there can be.
            lost = 0;
        }
        if lost != 0 {
            changed.most = self.find_most();
        }
        let left = self.tags.most_with(CLASS, gone.class.into()) as usize >> CLASS_BITS;
        for tier in left.min(gone.tier)..gone.tier {
            self.known.classes[tier] &= !(1 << gone.class);
            changed.classes |= 1 << tier;
        }
        for (lane, column) in self.columns.iter().enumerate() {
            let had = by_tier(gone.tier, gone.free.as_array()[lane]);
            let lost = (self.known.beside[lane].simd_eq(had) & AT_LEAST[gone.tier]).to_bitmask();
            changed.beside[lane] = lost.into();
            for tier in lanes::each(lost.into()) {
                self.known.beside[lane].as_mut_array()[tier] =
                    column.most_where_above(&self.tags, below(tier));
            }
        }
        changed
    }

    /// Finds out anew what is known for what is wanted, as far as it may be less than is known.
    pub(super) fn settle(&mut self, wanted: &Wanted) -> Changed {
        let (bit, tier) = (1 << wanted.tier.0, wanted.tier.number());
        let mut changed = Changed::default();
        if std::mem::take(&mut self.is_lowered) {
            changed.most = self.find_most();
        }
        if self.lowered & bit != 0 {
            self.lowered &= !bit;
            for (lane, column) in self.columns.iter().enumerate() {
                self.known.beside[lane].as_mut_array()[tier] =
                    column.most_where_above(&self.tags, below(tier));
                changed.beside[lane] = bit.into();
            }
        }
        if wanted.classes.is_some() && self.lowered_classes & bit != 0 {
            self.lowered_classes &= !bit;
            let with_tier = lanes::each(self.tags.above(below(tier)));
            self.known.classes[tier] =
                with_tier.fold(0, |all, place| all | 1 << (self.tags.get(place) & CLASS));
            changed.classes = bit.into();
        }
        changed
    }

    /// Finds out the most of each lane: which have less now.
    fn find_most(&mut self) -> u64 {
        let most = VOID.most.max(self.rows.most());
        let changed = lanes::difference(most, self.known.most);
        self.known.most = most;
        changed
    }

    /// The places that may have what is wanted.
    pub(super) fn mask(&self, wanted: &Wanted) -> u64 {
        let mut found = self.used;
        let by_rows = |found| {
            lanes::each(found)
                .filter(|place| self.rows.fits(*place, wanted.amounts))
                .fold(0, |all, it| all | 1 << it)
        };
        if wanted.tier > Tier(0) || wanted.classes.is_some() {
            // Two lines of the cache that often leave out nearly all.
            found &= self.tags.above(below(wanted.tier.number()));
            if let Some(classes) = wanted.classes {
                for place in lanes::each(found) {
                    found &= !(u64::from(classes >> (self.tags.get(place) & CLASS) & 1 == 0) << place);
                }
            }
            if found.count_ones() <= SINGLY {
                return by_rows(found);
            }
        }
        let mut enough = Enough::everywhere();
        for (column, wanted) in self.columns.iter().zip(wanted.amounts.as_array()) {
            enough.narrow(column, *wanted);
        }
        found &= enough.mask();
        if wanted.has_more { by_rows(found) } else { found }
    }

    /// Whether a key surely lies between this leaf's bounds.
    pub(super) fn surely_has(&self, key: &Key) -> bool {
        (self.from == u64::MAX || sure(self.from, key.digits) == Some(true))
            && (self.to == 0 || sure(key.digits, self.to) == Some(true))
    }

    /// Of these places, that with the node which comes first.
    pub(super) fn first_of(&self, places: u64, keys: &impl Keys) -> usize {
        let most = lanes::each(places).fold(0, |most, place| self.nodes[place].0.max(most));
        let may_be_first = |place: &usize| sure(most, self.nodes[*place].0).is_none();
        let mut nearly = lanes::each(places).filter(may_be_first);
        let mut best = nearly.next().unwrap_or(0);
        for place in nearly {
            let key = |place: usize| keys.key(self.nodes[place].1);
            if key(place).is_before(&key(best)) {
                best = place;
            }
        }
        best
    }
}

const _: () = assert!(TIERS << CLASS_BITS | CLASS as usize <= i16::MAX as usize);
