//! What is free at up to 64 places, one lane for each resource, in sixteen bits each: enough to leave out
//! almost everything that does not fit, and so small that 64 places are compared in some tens of instructions
//! (the loops below become vector instructions on any x86-64 or aarch64).
//!
//! The numbers are rounded down to a unit of their resource, a power of two. `free >= wanted` implies that it
//! holds in such units, too, so what is left out never fits; what is left is compared exactly by the caller.

/// Places side by side.
pub(super) const WIDTH: usize = 64;
/// CPU, memory, network, block IO, memory of one GPU, share of one GPU, whole GPUs.
pub(super) const LANES: usize = 7;

/// An amount of each resource, in the units of [`Units`].
pub(super) type Amounts = [i16; LANES];

/// Less than nothing: no place is as empty as one that is not there.
pub(super) const NOBODY: Amounts = [-1; LANES];

/// How far each resource is shifted to fit into fifteen bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Units([u32; LANES]);

impl Units {
    /// Units in which these amounts fit, if those before were too small.
    pub(super) fn to_hold(self, amounts: &[u64; LANES]) -> Units {
        let mut units = self;
        for (unit, amount) in units.0.iter_mut().zip(amounts) {
            // What is not known never runs out, and needs no unit.
            if *amount != u64::MAX {
                *unit = (*unit).max((u64::BITS - amount.leading_zeros()).saturating_sub(15));
            }
        }
        units
    }

    pub(super) fn round(&self, amounts: &[u64; LANES]) -> Amounts {
        let mut rounded = [0; LANES];
        for ((rounded, amount), unit) in rounded.iter_mut().zip(amounts).zip(self.0) {
            *rounded = i16::try_from(amount >> unit).unwrap_or(i16::MAX);
        }
        rounded
    }
}

/// 64 places.
#[derive(Clone, Debug)]
pub(super) struct Lanes {
    of: [[i16; WIDTH]; LANES],
}

impl Lanes {
    pub(super) const EMPTY: Lanes = Lanes { of: [[-1; WIDTH]; LANES] };

    pub(super) fn set(&mut self, place: usize, amounts: &Amounts) {
        for (lane, amount) in self.of.iter_mut().zip(amounts) {
            lane[place] = *amount;
        }
    }

    pub(super) fn get(&self, place: usize) -> Amounts {
        self.of.each_ref().map(|lane| lane[place])
    }

    /// The most of one resource at any place.
    pub(super) fn most(&self, lane: usize) -> i16 {
        // Side by side, so that all but the last few steps are vectors.
        let mut most = [i16::MIN; 8];
        for chunk in self.of[lane].as_chunks::<8>().0 {
            for (most, value) in most.iter_mut().zip(chunk) {
                *most = (*most).max(*value);
            }
        }
        most.into_iter().fold(i16::MIN, i16::max)
    }

    /// The places where, by these numbers, there may be so much: one bit for each.
    pub(super) fn mask(&self, wanted: &Amounts) -> u64 {
        let mut short = [0i16; WIDTH];
        for (lane, wanted) in self.of.iter().zip(wanted) {
            if *wanted > 0 {
                for (short, free) in short.iter_mut().zip(lane) {
                    *short |= if free < wanted { -1 } else { 0 };
                }
            }
        }
        let mut fits = [0u8; WIDTH];
        for (fits, short) in fits.iter_mut().zip(short) {
            *fits = (short + 1) as u8;
        }
        gather(&fits)
    }
}

/// Whether there may be so much where the most is this.
pub(super) fn may_hold(most: &Amounts, wanted: &Amounts) -> bool {
    let mut short = false;
    for (most, wanted) in most.iter().zip(wanted) {
        short |= most < wanted;
    }
    !short
}

/// The places that have any of the wanted classes.
pub(super) fn classes(of: &[u64; WIDTH], wanted: u64) -> u64 {
    let mut bytes = [0u8; WIDTH];
    for (byte, classes) in bytes.iter_mut().zip(of) {
        *byte = u8::from(classes & wanted != 0);
    }
    gather(&bytes)
}

/// One bit for each byte that is 1; the others are 0.
fn gather(bytes: &[u8; WIDTH]) -> u64 {
    let mut mask = 0;
    for (index, eight) in bytes.as_chunks::<8>().0.iter().enumerate() {
        // Gathers the lowest bits of eight bytes: the i-th, at bit 8i, is moved to bit 56 + i.
        mask |= (u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * index);
    }
    mask
}

/// The first so many places.
pub(super) fn first(places: usize) -> u64 {
    if places >= WIDTH { u64::MAX } else { (1 << places) - 1 }
}

/// The places of a mask, in order.
pub(super) fn each(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_mask_is_what_is_compared_one_by_one(
            free in prop::collection::vec(prop::array::uniform7(-1i16..20), WIDTH),
            wanted in prop::array::uniform7(0i16..20),
        ) {
            let mut lanes = Lanes::EMPTY;
            for (place, free) in free.iter().enumerate() {
                lanes.set(place, free);
                prop_assert_eq!(&lanes.get(place), free);
            }
            let mask = lanes.mask(&wanted);
            for (place, free) in free.iter().enumerate() {
                let fits = free.iter().zip(&wanted).all(|(free, wanted)| *wanted == 0 || free >= wanted);
                prop_assert_eq!(mask >> place & 1 == 1, fits, "place {}", place);
            }
            for lane in 0..LANES {
                prop_assert_eq!(lanes.most(lane), free.iter().map(|free| free[lane]).max().unwrap_or(-1));
            }
        }

        #[test]
        fn what_fits_exactly_fits_when_rounded(a in prop::array::uniform7(any::<u64>()), b in prop::array::uniform7(any::<u64>())) {
            let units = Units::default().to_hold(&a.map(|it| it >> 8));
            let (rounded, other) = (units.round(&a), units.round(&b));
            for lane in 0..LANES {
                prop_assert!(a[lane] < b[lane] || rounded[lane] >= other[lane]);
            }
        }
    }
}
