//! The most of what is below a leaf or a group.

use super::{
    super::lanes::{self, Row},
    Tier, Wanted,
};

pub(super) const TIERS: usize = 8;

/// CPU and memory: the lanes of which the most is known by tier.
pub(super) const BESIDE: usize = 2;

/// By tier plus one, in which lanes a node of that is: those of its tier and the lower ones. Nobody, with 0, is in none.
pub(super) const AT_LEAST: [Row; TIERS + 1] = {
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
pub(super) fn by_tier(tier: usize, amount: i16) -> Row {
    AT_LEAST[tier].select(Row::splat(amount), Row::splat(-1))
}

/// The most of what is below.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summary {
    /// Of the lanes that are known by tier, no limit.
    pub(super) most: Row,
    /// By tier, the most that is free at those that have at least that.
    pub(super) beside: [Row; BESIDE],
    /// The classes of those.
    pub(super) classes: [u64; TIERS],
}

/// What of a summary is not as it was: lanes and tiers, one bit for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) most: u64,
    pub(super) beside: [u64; BESIDE],
    pub(super) classes: u64,
}

impl Changed {
    pub(super) const ALL: Changed = {
        let tiers = (1 << TIERS) - 1;
        Changed { most: (1 << lanes::LANES) - 1, beside: [tiers; BESIDE], classes: tiers }
    };

    pub(super) fn is_any(&self) -> bool {
        self.most | self.beside[0] | self.beside[1] | self.classes != 0
    }

    pub(super) fn and(self, other: Changed) -> Changed {
        Changed {
            most: self.most | other.most,
            beside: [self.beside[0] | other.beside[0], self.beside[1] | other.beside[1]],
            classes: self.classes | other.classes,
        }
    }
}

/// Nobody's.
pub(super) const VOID: Summary = Summary {
    most: Row::new([i16::MAX, i16::MAX, -1, -1, -1, -1, -1, 0]),
    beside: [Row::splat(-1); BESIDE],
    classes: [0; TIERS],
};

impl Summary {
    pub(super) fn may_hold(&self, wanted: &Wanted) -> bool {
        let tier = wanted.tier.number();
        (0..BESIDE).all(|lane| self.beside[lane].as_array()[tier] >= wanted.amounts.as_array()[lane])
            && !self.most.simd_lt(wanted.amounts).any()
            && wanted.classes.is_none_or(|classes| classes & self.classes[tier] != 0)
    }

    /// Raises it to what an entry has.
    pub(super) fn raise(&mut self, free: Row, class: u8, tier: Tier) -> Changed {
        let mut changed = Changed { most: lanes::raise(&mut self.most, free), ..Changed::default() };
        for (lane, beside) in self.beside.iter_mut().enumerate() {
            changed.beside[lane] = lanes::raise(beside, by_tier(tier.number() + 1, free.as_array()[lane]));
        }
        for (tier, classes) in self.classes[..=tier.number()].iter_mut().enumerate() {
            changed.classes |= (!*classes >> class & 1) << tier;
            *classes |= 1 << class;
        }
        changed
    }
}
