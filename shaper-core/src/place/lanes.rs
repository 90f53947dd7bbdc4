//! What is free at up to 64 places, one lane for each resource, in sixteen bits each: enough to leave out
//! almost everything that does not fit, and so small that 64 places are compared in some tens of instructions:
//! those of vectors that any x86-64 and aarch64 has.
//!
//! The numbers are rounded down to a unit of their resource, a power of two. `free >= wanted` implies that it
//! holds in such units, too, so what is left out never fits; what is left is compared exactly by the caller.

use wide::i16x8;

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

/// 64 places, lane by lane.
#[derive(Clone, Debug)]
pub(super) struct Lanes<const N: usize = LANES> {
    of: [Column; N],
}

impl<const N: usize> Lanes<N> {
    pub(super) const EMPTY: Lanes<N> = Lanes { of: [const { Column::of(-1) }; N] };

    pub(super) fn set(&mut self, place: usize, amounts: &[i16; N]) {
        for (lane, amount) in self.of.iter_mut().zip(amounts) {
            lane.replace(place, *amount);
        }
    }

    /// Writes a lane of a place, and keeps the most of all places right: it is looked for only where it goes. Whether it is
    /// another than before.
    pub(super) fn set_and_raise(
        &mut self,
        most: &mut [i16; N],
        lane: usize,
        place: usize,
        amount: i16,
    ) -> bool {
        let before = self.of[lane].replace(place, amount);
        let most = &mut most[lane];
        if before < *most && amount <= *most {
            return false;
        }
        let now = if amount >= *most { amount } else { self.of[lane].most() };
        std::mem::replace(most, now) != now
    }

    pub(super) fn get(&self, place: usize) -> [i16; N] {
        self.of.each_ref().map(|lane| lane.get(place))
    }

    pub(super) fn lane(&self, lane: usize) -> &Column {
        &self.of[lane]
    }

    /// Leaves out the places where, by these numbers, there is not so much.
    pub(super) fn narrow(&self, wanted: &[i16; N], enough: &mut Enough) {
        for (lane, wanted) in self.of.iter().zip(wanted) {
            if *wanted > 0 {
                enough.narrow(lane, *wanted);
            }
        }
    }

    /// The places where, by these numbers, there may be so much: one bit for each.
    pub(super) fn mask(&self, wanted: &[i16; N]) -> u64 {
        let mut enough = Enough::everywhere();
        self.narrow(wanted, &mut enough);
        enough.mask()
    }
}

/// Where there is enough of all that has been compared.
pub(super) struct Enough([Row; WIDTH / 8]);

impl Enough {
    pub(super) fn everywhere() -> Enough {
        Enough([Row::ZERO; WIDTH / 8])
    }

    /// Leaves out the places with less than this.
    pub(super) fn narrow(&mut self, column: &Column, wanted: i16) {
        let wanted = Row::splat(wanted);
        for (short, has) in self.0.iter_mut().zip(&column.0) {
            *short |= has.simd_lt(wanted);
        }
    }

    /// One bit for each place.
    pub(super) fn mask(&self) -> u64 {
        !self.0.iter().rev().fold(0, |mask, short| mask << 8 | u64::from(short.to_bitmask()))
    }
}

/// Amounts side by side in one vector, of eight lanes, of which the last has nothing.
pub(super) type Row = i16x8;

pub(super) const NO_ROW: Row = Row::new([-1, -1, -1, -1, -1, -1, -1, 0]);

pub(super) fn row(amounts: &Amounts) -> Row {
    let [a, b, c, d, e, f, g] = *amounts;
    Row::new([a, b, c, d, e, f, g, 0])
}

/// In which lanes two rows are not the same: one bit for each.
pub(super) fn difference(a: Row, b: Row) -> u64 {
    u64::from(!a.simd_eq(b).to_bitmask() & 0xff)
}

/// Raises each lane to what the other has: in which that was more.
pub(super) fn raise(most: &mut Row, other: Row) -> u64 {
    let before = std::mem::replace(most, most.max(other));
    difference(before, *most)
}

/// 64 places, place by place: a place is written with one write, and compared with one instruction.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    of: [Row; WIDTH],
}

impl Rows {
    pub(super) const EMPTY: Rows = Rows { of: [NO_ROW; WIDTH] };

    /// Writes a place, and returns what was there.
    pub(super) fn replace(&mut self, place: usize, row: Row) -> Row {
        std::mem::replace(&mut self.of[place], row)
    }

    pub(super) fn get(&self, place: usize) -> Row {
        self.of[place]
    }

    /// The most of each resource at any place.
    pub(super) fn most(&self) -> Row {
        self.of.iter().fold(NO_ROW, |most, row| most.max(*row))
    }

    pub(super) fn fits(&self, place: usize, wanted: Row) -> bool {
        !self.of[place].simd_lt(wanted).any()
    }
}

/// A number at each of 64 places.
#[derive(Clone, Debug)]
pub(super) struct Column([Row; WIDTH / 8]);

impl Column {
    pub(super) const fn of(value: i16) -> Column {
        Column([Row::splat(value); WIDTH / 8])
    }

    pub(super) fn get(&self, place: usize) -> i16 {
        self.0[place / 8].as_array()[place % 8]
    }

    pub(super) fn replace(&mut self, place: usize, value: i16) -> i16 {
        std::mem::replace(&mut self.0[place / 8].as_mut_array()[place % 8], value)
    }

    /// The places with more than `least`.
    pub(super) fn above(&self, least: i16) -> u64 {
        let least = Row::splat(least);
        self.0.iter().rev().fold(0, |mask, it| mask << 8 | u64::from(it.simd_gt(least).to_bitmask()))
    }

    /// The most at any place.
    pub(super) fn most(&self) -> i16 {
        self.0.iter().fold(Row::splat(i16::MIN), |most, it| most.max(*it)).reduce_max()
    }

    /// The most of the places at which `other` is more than `least`; without any −1.
    pub(super) fn most_where_above(&self, other: &Column, least: i16) -> i16 {
        let (least, nothing) = (Row::splat(least), Row::splat(-1));
        let pairs = self.0.iter().zip(&other.0);
        pairs
            .fold(nothing, |most, (it, other)| most.max(other.simd_gt(least).select(*it, nothing)))
            .reduce_max()
    }

    /// The most of those of which these bits are the value; without any 0.
    pub(super) fn most_with(&self, bits: i16, value: i16) -> i16 {
        let (bits, value) = (Row::splat(bits), Row::splat(value));
        let with = |it: Row| (it & bits).simd_eq(value) & it;
        self.0.iter().fold(Row::ZERO, |most, it| most.max(with(*it))).reduce_max()
    }
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
            let (mut lanes, mut rows) = (Lanes::EMPTY, Rows::EMPTY);
            for (place, free) in free.iter().enumerate() {
                lanes.set(place, free);
                prop_assert_eq!(&lanes.get(place), free);
                prop_assert_eq!(rows.replace(place, row(free)), NO_ROW);
                prop_assert_eq!(rows.get(place), row(free));
            }
            let mask = lanes.mask(&wanted);
            for (place, free) in free.iter().enumerate() {
                let fits = free.iter().zip(&wanted).all(|(free, wanted)| *wanted == 0 || free >= wanted);
                prop_assert_eq!(mask >> place & 1 == 1, fits, "place {}", place);
                // A place in which nobody is has less than nothing, of whatever is not asked for, too.
                let has_all = free.iter().zip(&wanted).all(|(free, wanted)| free >= wanted);
                prop_assert_eq!(rows.fits(place, row(&wanted)), has_all, "place {}", place);
            }
            let most = rows.most().to_array();
            for lane in 0..LANES {
                let expected = free.iter().map(|free| free[lane]).max().unwrap_or(-1);
                prop_assert_eq!((lanes.lane(lane).most(), most[lane]), (expected, expected));
            }
        }

        #[test]
        fn a_column_is_what_its_places_are(
            values in prop::collection::vec((0i16..9, 0i16..9), WIDTH),
            least in 0i16..9,
        ) {
            let (mut column, mut other) = (Column::of(0), Column::of(0));
            for (place, (value, beside)) in values.iter().enumerate() {
                prop_assert_eq!((column.replace(place, *value), other.replace(place, *beside)), (0, 0));
                prop_assert_eq!(column.get(place), *value);
            }
            let most = |of: &dyn Fn(i16) -> bool| values.iter().filter(|it| of(it.1)).map(|it| it.0).max();
            prop_assert_eq!(column.most_where_above(&other, least), most(&|it| it > least).unwrap_or(-1));
            let with = values.iter().map(|it| it.0).filter(|it| it & 3 == least & 3).max();
            prop_assert_eq!(column.most_with(3, least & 3), with.unwrap_or(0));
            for (place, (value, _)) in values.iter().enumerate() {
                prop_assert_eq!(column.above(least) >> place & 1 == 1, *value > least);
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
