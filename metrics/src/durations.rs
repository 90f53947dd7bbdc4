//! A histogram of durations that a daemon counts itself.

use std::time::Duration;

/// Where its buckets end, seconds: what is above the last is counted, too.
const BOUNDS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0];

/// How long something took, since the daemon began.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Durations {
    counts: [u64; BOUNDS.len() + 1],
    sum_seconds: f64,
}

impl Durations {
    /// Counts one more.
    pub fn add(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        self.counts[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum_seconds += seconds;
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum, seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_seconds
    }

    /// The buckets: where each ends, seconds, the last of them nowhere, and how many are in it.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        BOUNDS.into_iter().chain([f64::INFINITY]).zip(self.counts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_is_in_the_bucket_that_it_does_not_exceed() {
        let mut durations = Durations::default();
        for micros in [0, 100, 101, 300_000_000, 300_000_001] {
            durations.add(Duration::from_micros(micros));
        }
        let buckets = durations.buckets();
        assert_eq!(buckets[..2], [(0.0001, 2), (0.00025, 1)]);
        assert_eq!(buckets[15..], [(300.0, 1), (f64::INFINITY, 1)]);
        assert_eq!(durations.count(), 5);
        assert!((durations.sum_seconds() - 600.000_202).abs() < 1e-6, "{}", durations.sum_seconds());
    }
}
