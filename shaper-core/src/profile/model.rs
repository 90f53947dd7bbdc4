//! What is used next, given what is used now: counts that fade.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::{Prices, Sample};
use crate::task::UnixNanos;

/// Buckets of use: each ends 5 % above the one before it, the first at the least limit. 500 reach 4 × 10¹⁰ times as far.
pub(super) const BUCKETS: usize = 500;
const STEP: f64 = 1.05;
/// Buckets in a level: a level ends 22 % above the one before it.
const LEVEL: u16 = 4;
/// Counts of one model, of 8 bytes each.
const CELLS: usize = 256;
/// What was never seen weighs as if it had been seen for so long, h.
const UNSEEN_HOURS: f64 = 0.5;
/// And half of it is that use goes up by so many buckets: a fifth.
const UNSEEN_STEP: u16 = 4;
/// Counts are made small again once an hour weighs so much.
const HEAVY: f64 = 1e12;

/// Where the buckets end, in least limits.
static ENDS: LazyLock<[f64; BUCKETS]> = LazyLock::new(|| {
    let mut end = 1.0;
    std::array::from_fn(|_| {
        let this = end;
        end *= STEP;
        this
    })
});

/// The bucket that `value`, in least limits, lies in.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded just before")]
pub(super) fn bucket(value: f64) -> u16 {
    if value.is_nan() || value <= 1.0 {
        return 0;
    }
    let near = (value.ln() / STEP.ln()).floor().clamp(0.0, (BUCKETS - 1) as f64) as u16;
    // The logarithm may be off by a hair at an edge; the table is what counts.
    let near = if ENDS[usize::from(near)] < value { near + 1 } else { near };
    near.min(BUCKETS as u16 - 1)
}

/// How often a use followed a level.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cell {
    level: u16,
    bucket: u16,
    weight: f32,
}

impl Cell {
    fn key(&self) -> (u16, u16) {
        (self.level, self.bucket)
    }
}

/// What one resource of one kind of task was seen to do. At most 2 KiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Kept", into = "Kept")]
pub struct Model {
    /// By level, then by bucket.
    cells: Vec<Cell>,
    /// What an hour that is seen now weighs. It grows, instead of everything else fading.
    hour: f64,
    /// When the last sample ended.
    seen_at: UnixNanos,
}

impl Default for Model {
    fn default() -> Model {
        Model { cells: Vec::new(), hour: 1.0, seen_at: 0 }
    }
}

/// A model as it is kept: cells as (level, bucket, weight).
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    cells: Vec<(u16, u16, f32)>,
    hour: f64,
    seen_at: UnixNanos,
}

/// What was kept is not a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a model of use: its counts are out of order or out of bounds")]
pub struct NotAModel;

impl From<Model> for Kept {
    fn from(Model { cells, hour, seen_at }: Model) -> Kept {
        let cells = cells.into_iter().map(|Cell { level, bucket, weight }| (level, bucket, weight)).collect();
        Kept { cells, hour, seen_at }
    }
}

impl TryFrom<Kept> for Model {
    type Error = NotAModel;

    fn try_from(Kept { cells, hour, seen_at }: Kept) -> Result<Model, NotAModel> {
        let cells: Vec<Cell> =
            cells.into_iter().map(|(level, bucket, weight)| Cell { level, bucket, weight }).collect();
        let are_in_order = cells.is_sorted_by(|one, next| one.key() < next.key());
        let is_sound =
            |cell: &Cell| usize::from(cell.bucket) < BUCKETS && cell.weight.is_finite() && cell.weight > 0.0;
        let is_model = are_in_order && cells.len() <= CELLS && cells.iter().all(is_sound);
        if is_model && hour.is_finite() && hour >= 1.0 {
            Ok(Model { cells, hour, seen_at })
        } else {
            Err(NotAModel)
        }
    }
}

/// What is to be expected of a limit, until the next sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Expected {
    /// How likely use is above it.
    pub touched: f64,
    /// How much use is expected above it, as a share of the mean use.
    pub unserved: f64,
    /// How much of it is expected to be unused, as a share of it.
    pub unused: f64,
}

/// The distribution of the next use, by bucket.
pub(super) struct Outlook {
    weights: [f64; BUCKETS],
    /// No bucket above has any weight.
    top: usize,
    total: f64,
}

impl Model {
    /// How many hours it has seen, as they count by now.
    pub fn hours(&self) -> f64 {
        self.cells.iter().map(|cell| f64::from(cell.weight)).sum::<f64>() / self.hour
    }

    /// What it takes of the heap.
    pub fn bytes(&self) -> usize {
        self.cells.capacity() * size_of::<Cell>()
    }

    /// Nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// Lets what was seen fade for a sample.
    pub(super) fn fade_for(&mut self, sample: &Sample, half_life: f64) {
        let passed = if self.seen_at == 0 { sample.hours() } else { hours_between(self.seen_at, sample.at) };
        self.fade(passed.min(sample.hours()), half_life);
        self.seen_at = self.seen_at.max(sample.at);
    }

    /// When the last sample ended; 0 if there was none.
    pub fn seen_at(&self) -> UnixNanos {
        self.seen_at
    }

    /// Lets what was seen fade for `hours`.
    pub(super) fn fade(&mut self, hours: f64, half_life: f64) {
        self.hour *= (hours / half_life).exp2();
        if self.hour > HEAVY {
            for cell in &mut self.cells {
                cell.weight = narrowed(f64::from(cell.weight) / self.hour);
            }
            self.hour = 1.0;
            self.cells.retain(|cell| cell.weight > 0.0);
        }
    }

    /// Books that for `hours` use was in `bucket` after it had been at the level of `recent`.
    pub(super) fn learn(&mut self, recent: u16, bucket: u16, hours: f64) {
        let (level, weight) = (recent / LEVEL, narrowed(hours * self.hour));
        if weight <= 0.0 {
            return;
        }
        match self.cells.binary_search_by_key(&(level, bucket), Cell::key) {
            Ok(at) => self.cells[at].weight += weight,
            Err(_) => {
                if self.cells.len() >= CELLS {
                    self.forget_one();
                }
                let cell = Cell { level, bucket, weight };
                let at = self.cells.partition_point(|other| other.key() < cell.key());
                self.cells.insert(at, cell);
            }
        }
    }

    /// Makes room: the lightest count becomes part of the next higher use after the same level, or else of the one before it.
    fn forget_one(&mut self) {
        let lightest =
            (0..self.cells.len()).min_by(|&a, &b| self.cells[a].weight.total_cmp(&self.cells[b].weight));
        let Some(at) = lightest else { return };
        let gone = self.cells.remove(at);
        let is_next = self.cells.get(at).is_some_and(|next| next.level == gone.level);
        let heir = if is_next { at } else { at.saturating_sub(1) };
        if let Some(heir) = self.cells.get_mut(heir) {
            heir.weight += gone.weight;
        }
    }

    /// What is used next after `recent`, or at any time. Nothing, where nothing was seen.
    pub(super) fn outlook(&self, recent: Option<u16>) -> Option<Outlook> {
        if self.is_empty() {
            return None;
        }
        let mut weights = [0.0; BUCKETS];
        let mut all = 0.0;
        for cell in &self.cells {
            weights[usize::from(cell.bucket)] += f64::from(cell.weight);
            all += f64::from(cell.weight);
        }
        if let Some(recent) = recent {
            let unseen = UNSEEN_HOURS * self.hour / 2.0;
            let part = unseen / all;
            weights.iter_mut().for_each(|weight| *weight *= part);
            let up = usize::from(recent.saturating_add(UNSEEN_STEP)).min(BUCKETS - 1);
            weights[up] += unseen;
            let level = recent / LEVEL;
            let from = self.cells.partition_point(|cell| cell.level < level);
            for cell in self.cells[from..].iter().take_while(|cell| cell.level == level) {
                weights[usize::from(cell.bucket)] += f64::from(cell.weight);
            }
        }
        let top = weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0);
        let total = weights[..=top].iter().sum();
        Some(Outlook { weights, top, total })
    }
}

impl Outlook {
    /// The limit that costs least for a task that uses `mean` on average, and what it costs. All in least limits.
    pub(super) fn cheapest(&self, mean: f64, prices: &Prices) -> (f64, f64) {
        let total_use = self.total_use();
        let (mut above, mut use_above) = (0.0, 0.0);
        let mut best = (ENDS[self.top], f64::INFINITY);
        for index in (0..=self.top).rev() {
            let cost = prices.cost(&self.of(ENDS[index], mean, total_use, above, use_above));
            if cost < best.1 {
                best = (ENDS[index], cost);
            }
            above += self.weights[index];
            use_above += self.weights[index] * middle(index);
        }
        best
    }

    /// What is to be expected of `limit` for a task that uses `mean` on average. All in least limits.
    pub(super) fn expected(&self, limit: f64, mean: f64) -> Expected {
        let (mut above, mut use_above) = (0.0, 0.0);
        for index in (0..=self.top).rev().take_while(|&index| middle(index) > limit) {
            above += self.weights[index];
            use_above += self.weights[index] * middle(index);
        }
        self.of(limit, mean, self.total_use(), above, use_above)
    }

    /// The same, where `above` of the weight is above the limit, and uses `use_above`.
    fn of(&self, limit: f64, mean: f64, total_use: f64, above: f64, use_above: f64) -> Expected {
        let unused = (self.total - above) - (total_use - use_above) / limit;
        Expected {
            touched: above / self.total,
            unserved: (use_above - limit * above).max(0.0) / mean / self.total,
            unused: unused.max(0.0) / self.total,
        }
    }

    /// What may be used next, and how much each weighs.
    #[cfg(test)]
    pub(super) fn uses(&self) -> Vec<(f64, f64)> {
        (0..=self.top).map(|index| (middle(index), self.weights[index])).collect()
    }

    /// The mean use, in least limits.
    pub(super) fn mean(&self) -> f64 {
        self.total_use() / self.total
    }

    fn total_use(&self) -> f64 {
        (0..=self.top).map(|index| self.weights[index] * middle(index)).sum()
    }
}

/// What a use in bucket `index` counts as: the middle of it.
fn middle(index: usize) -> f64 {
    let from = if index == 0 { 0.0 } else { ENDS[index - 1] };
    f64::midpoint(from, ENDS[index])
}

#[expect(clippy::cast_precision_loss, reason = "fading needs no precision")]
fn hours_between(from: UnixNanos, to: UnixNanos) -> f64 {
    to.saturating_sub(from) as f64 / 3.6e12
}

#[expect(clippy::cast_possible_truncation, reason = "a weight of seven digits is enough")]
fn narrowed(weight: f64) -> f32 {
    weight as f32
}
