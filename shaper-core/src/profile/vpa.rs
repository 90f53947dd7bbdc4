//! The rule of Kubernetes' Vertical Pod Autoscaler, for comparison.
//!
//! A histogram of use whose samples count half after a day; the target is its 90th percentile and 15 % more. The
//! constants are the defaults of the recommender (kubernetes/autoscaler, `vertical-pod-autoscaler`, docs/flags.md and
//! `pkg/recommender/model/aggregations_config.go`): CPU buckets from 0.01 core and memory buckets from 10 MB, each 5 % wider than the one before;
//! a percentile is the end of its bucket. Samples weigh alike here: there they weigh as much as the container's CPU request, which in
//! recorded use is not known.

use super::{Resource, Sample};

const GROWTH: f64 = 0.05;
const HALF_LIFE_HOURS: f64 = 24.0;
const PERCENTILE: f64 = 0.9;
const MARGIN: f64 = 1.15;
const CPU_FIRST: f64 = 10.0;
const CPU_MOST: f64 = 1_000_000.0;
const MEMORY_FIRST: f64 = 1e7;
const MEMORY_MOST: f64 = 1e12;
/// Weights are made small again once a sample weighs so much.
const HEAVY: f64 = 1e60;

/// A histogram of the use of one container.
#[derive(Clone, Debug)]
pub struct Recommender {
    /// How wide the first bucket is.
    first: f64,
    weights: Vec<f64>,
    total: f64,
    /// What a sample of now weighs.
    now: f64,
    percentile: f64,
    margin: f64,
}

impl Recommender {
    /// An empty one, with the defaults.
    pub fn new(resource: Resource) -> Recommender {
        Self::with(resource, PERCENTILE, MARGIN)
    }

    /// An empty one with another percentile, 0 to 1, and another margin, at least 1.
    pub fn with(resource: Resource, percentile: f64, margin: f64) -> Recommender {
        let (first, most) = match resource {
            Resource::Memory | Resource::GpuMemory => (MEMORY_FIRST, MEMORY_MOST),
            _ => (CPU_FIRST, CPU_MOST),
        };
        let mut recommender =
            Recommender { first, weights: Vec::new(), total: 0.0, now: 1.0, percentile, margin };
        recommender.weights = vec![0.0; recommender.bucket(most) + 1];
        recommender
    }

    /// Books a sample.
    #[expect(clippy::cast_precision_loss, reason = "a figure of five per cent's precision")]
    pub fn observe(&mut self, sample: &Sample) {
        self.now *= (sample.hours() / HALF_LIFE_HOURS).exp2();
        if self.now > HEAVY {
            self.weights.iter_mut().for_each(|weight| *weight /= self.now);
            self.total /= self.now;
            self.now = 1.0;
        }
        let bucket = self.bucket(sample.used as f64).min(self.weights.len() - 1);
        self.weights[bucket] += self.now;
        self.total += self.now;
    }

    /// The target, in the unit of the resource; nothing before the first sample.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and saturating is right"
    )]
    pub fn target(&self) -> Option<u64> {
        if self.total <= 0.0 {
            return None;
        }
        let mut below = 0.0;
        let bucket = self.weights.iter().position(|weight| {
            below += weight;
            below >= self.percentile * self.total
        });
        let bucket = bucket.unwrap_or(self.weights.len() - 1);
        Some((self.start(bucket + 1) * self.margin).ceil() as u64)
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and saturating is right"
    )]
    fn bucket(&self, value: f64) -> usize {
        if value < self.first {
            return 0;
        }
        ((value * GROWTH / self.first).ln_1p() / (1.0 + GROWTH).ln()) as usize
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "below a thousand")]
    fn start(&self, bucket: usize) -> f64 {
        self.first * ((1.0 + GROWTH).powi(bucket as i32) - 1.0) / GROWTH
    }
}
