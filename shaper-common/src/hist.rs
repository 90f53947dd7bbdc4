//! Histograms of durations: fixed buckets, four to a doubling, so that a quantile is known within a fifth.
//!
//! A duration is first shifted to a unit of its own (`QUEUE_SHIFT`, `IO_SHIFT`, `RTT_SHIFT`). Values 0 to 3 have a
//! bucket each; from there on each doubling is cut in four. The last bucket holds everything above.
//! Counters wrap at 32 bits: the reader takes differences, oftener than 2^32 events.

/// Buckets of a histogram.
pub const BUCKETS: usize = 64;

/// Run-queue delay is counted in units of 1,024 ns: from 1 µs to 134 ms.
pub const QUEUE_SHIFT: u32 = 10;
/// Block IO latency in units of 4,096 ns: from 4 µs to 537 ms.
pub const IO_SHIFT: u32 = 12;
/// Round-trip time likewise.
pub const RTT_SHIFT: u32 = 12;

/// One histogram, as it lies in a map.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// How many fell into each bucket, modulo 2^32.
    pub counts: [u32; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: [0; BUCKETS] }
    }
}

const _: () = assert!(size_of::<Histogram>() == 4 * BUCKETS);

/// Above this, everything is in the last bucket.
const LAST: u64 = (1 << 17) - 1;

/// The bucket of a duration, ns.
#[inline(always)]
pub fn index(ns: u64, shift: u32) -> usize {
    let units = ns >> shift;
    if units < 4 {
        return units as usize;
    }
    let units = if units < LAST { units as u32 } else { LAST as u32 };
    let top = log2(units);
    ((top - 1) * 4 + (units >> (top - 2) & 3)) as usize & (BUCKETS - 1)
}

/// Position of the highest bit; `value` is from 1 to 2^17 - 1. (BPF has no instruction for it.)
#[inline(always)]
fn log2(mut value: u32) -> u32 {
    let mut top = 0;
    if value >= 1 << 16 {
        return 16;
    }
    if value >= 1 << 8 {
        value >>= 8;
        top += 8;
    }
    if value >= 1 << 4 {
        value >>= 4;
        top += 4;
    }
    if value >= 1 << 2 {
        value >>= 2;
        top += 2;
    }
    top + (value >> 1)
}

/// Where a bucket ends, ns (not included); of the last one, where it begins to be all that is above.
pub const fn upper_ns(bucket: usize, shift: u32) -> u64 {
    let next = bucket as u64 + 1;
    let units = if next < 4 { next } else { (4 + next % 4) << (next / 4 - 1) };
    units << shift
}

impl Histogram {
    /// What was added since `before`.
    pub fn since(&self, before: &Histogram) -> Histogram {
        let mut counts = self.counts;
        for (now, before) in counts.iter_mut().zip(before.counts) {
            *now = now.wrapping_sub(before);
        }
        Histogram { counts }
    }

    /// Adds another one, such as another CPU's.
    pub fn add(&mut self, other: &Histogram) {
        for (sum, count) in self.counts.iter_mut().zip(other.counts) {
            *sum = sum.wrapping_add(count);
        }
    }

    /// How many durations it holds.
    pub fn total(&self) -> u64 {
        let mut total = 0;
        for count in self.counts {
            total += count as u64;
        }
        total
    }

    /// The end of the bucket in which the quantile `permille` lies, ns; 0 of an empty one.
    pub fn quantile_ns(&self, permille: u64, shift: u32) -> u64 {
        let total = self.total();
        if total == 0 {
            return 0;
        }
        let rank = (total * permille).div_ceil(1000);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += *count as u64;
            if seen >= rank {
                return upper_ns(bucket, shift);
            }
        }
        upper_ns(BUCKETS - 1, shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_lies_below_the_end_of_its_bucket_and_not_below_the_one_before() {
        for units in 0..200_000_u64 {
            let bucket = index(units << 10, 10);
            assert!(bucket < BUCKETS);
            if bucket < BUCKETS - 1 {
                assert!(units << 10 < upper_ns(bucket, 10), "{units} in {bucket}");
            }
            if bucket > 0 {
                assert!(units << 10 >= upper_ns(bucket - 1, 10), "{units} in {bucket}");
            }
        }
        assert_eq!(index(u64::MAX, 10), BUCKETS - 1);
        assert_eq!(index(1023, 10), 0);
    }

    #[test]
    fn a_bucket_is_at_most_a_quarter_of_where_it_begins() {
        for bucket in 4..BUCKETS {
            let (from, to) = (upper_ns(bucket - 1, 0), upper_ns(bucket, 0));
            assert!((to - from) * 4 <= from, "{bucket}: {from} to {to}");
        }
    }

    #[test]
    fn quantiles_come_from_the_ranks() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile_ns(500, 10), 0);
        for _ in 0..99 {
            histogram.counts[index(10_000, 10)] += 1;
        }
        histogram.counts[index(5_000_000, 10)] += 1;
        assert_eq!(histogram.quantile_ns(990, 10), upper_ns(index(10_000, 10), 10));
        assert_eq!(histogram.quantile_ns(991, 10), upper_ns(index(5_000_000, 10), 10));
        assert!((10_000..12_500).contains(&histogram.quantile_ns(500, 10)));
    }

    #[test]
    fn differences_survive_the_wrap() {
        let (mut before, mut now) = (Histogram::default(), Histogram::default());
        before.counts[3] = u32::MAX;
        now.counts[3] = 4;
        assert_eq!(now.since(&before).counts[3], 5);
    }
}
