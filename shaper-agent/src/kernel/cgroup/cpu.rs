//! The files of the cpu and cpuset controllers (Documentation/admin-guide/cgroup-v2.rst).

use serde::{Deserialize, Serialize};
use shaper_core::{
    limits::Limit,
    units::{Micros, Millicores, Weight},
};

use super::{
    Cgroup, CgroupError,
    file::{Contents, File, Flat, Malformed, ReadOnly, Setting, number},
};

/// CPU time in each period.
pub const MAX: File<CpuMax> = File::new("cpu.max");
/// What of an unused quota is kept for the next periods (5.14).
pub const MAX_BURST: File<Micros> = File::new("cpu.max.burst");
/// Share of a contended CPU; of a cgroup that is `cpu.idle` it says nothing, and may not be written.
pub const WEIGHT: File<Weight> = File::new("cpu.weight");
/// Whether it runs only where nobody else would (5.15). 0 after 1 leaves `cpu.weight` at 100.
pub const IDLE: File<bool> = File::new("cpu.idle");
/// The CPUs that it asks for.
pub const CPUS: File<CpuSet> = File::new("cpuset.cpus");
/// The CPUs that it has.
pub const CPUS_EFFECTIVE: File<CpuSet, ReadOnly> = File::new("cpuset.cpus.effective");
/// What was used and denied.
pub const STAT: File<CpuStat, ReadOnly> = File::new("cpu.stat");

/// `cpu.max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuMax {
    /// CPU time in each period.
    pub quota: Limit<Micros>,
    /// Length of a period.
    pub period: Micros,
}

impl CpuMax {
    /// The kernel's own period, and the one with which bursty services fare best.
    pub const PERIOD: Micros = Micros(100_000);

    /// The quota that amounts to so many cores in the usual period.
    pub fn of(limit: Limit<Millicores>) -> CpuMax {
        let quota = limit.map(|Millicores(milli)| Micros(milli.saturating_mul(Self::PERIOD.0) / 1000));
        CpuMax { quota, period: Self::PERIOD }
    }

    /// How many cores it amounts to, rounded down.
    pub fn cores(&self) -> Limit<Millicores> {
        self.quota.map(|Micros(quota)| {
            let milli = u128::from(quota) * 1000 / u128::from(self.period.0.max(1));
            Millicores(u64::try_from(milli).unwrap_or(u64::MAX))
        })
    }
}

impl Contents for CpuMax {
    fn from_text(text: &str) -> Result<CpuMax, Malformed> {
        let (quota, period) = text.split_once(' ').ok_or_else(|| Malformed::new(text))?;
        Ok(CpuMax { quota: Contents::from_text(quota)?, period: Contents::from_text(period)? })
    }
}

impl Setting for CpuMax {
    fn text(&self) -> String {
        format!("{} {}", self.quota.text(), self.period.text())
    }
}

/// `cpu.weight` and `cpu.idle`: a cgroup has a weight or is idle, and forgets its weight when it becomes so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuShare {
    /// Below every weight.
    Idle,
    /// This weight.
    At(Weight),
}

/// `cpu.max` and `cpu.max.burst`: the kernel takes neither that would make the burst exceed the quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Quota and period.
    pub max: CpuMax,
    /// Burst; `None` where the kernel has none.
    pub burst: Option<Micros>,
}

impl Bandwidth {
    /// The order in which the values of `from` become these: a burst that shrinks goes first, one that grows last.
    /// In any other order a write is refused with EINVAL, and lost.
    pub fn steps(&self, from: &Bandwidth) -> Vec<BandwidthStep> {
        let max = (self.max != from.max).then_some(BandwidthStep::Max(self.max));
        let burst = match (from.burst, self.burst) {
            (Some(from), Some(to)) if from != to => Some((to < from, BandwidthStep::Burst(to))),
            _ => None,
        };
        match burst {
            Some((true, burst)) => [Some(burst), max].into_iter().flatten().collect(),
            Some((false, burst)) => [max, Some(burst)].into_iter().flatten().collect(),
            None => max.into_iter().collect(),
        }
    }
}

/// One write on the way to a [`Bandwidth`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BandwidthStep {
    /// `cpu.max`
    Max(CpuMax),
    /// `cpu.max.burst`
    Burst(Micros),
}

impl Cgroup {
    /// `cpu.max` with its burst.
    pub fn bandwidth(&self) -> Result<Bandwidth, CgroupError> {
        Ok(Bandwidth { max: self.get(MAX)?, burst: self.find(MAX_BURST)? })
    }

    /// Sets both, in the order that the kernel takes. Whoever needs to be sure reads them back.
    pub fn set_bandwidth(&self, to: &Bandwidth) -> Result<(), CgroupError> {
        for step in to.steps(&self.bandwidth()?) {
            match step {
                BandwidthStep::Max(max) => self.set(MAX, &max)?,
                BandwidthStep::Burst(burst) => self.set(MAX_BURST, &burst)?,
            }
        }
        Ok(())
    }
}

impl Cgroup {
    /// Its weight, or that it is idle.
    pub fn cpu_share(&self) -> Result<CpuShare, CgroupError> {
        match self.find(IDLE)? {
            Some(true) => Ok(CpuShare::Idle),
            _ => Ok(CpuShare::At(self.get(WEIGHT)?)),
        }
    }

    /// Sets either.
    pub fn set_cpu_share(&self, share: CpuShare) -> Result<(), CgroupError> {
        match share {
            CpuShare::Idle => self.set(IDLE, &true),
            CpuShare::At(weight) => {
                if self.find(IDLE)? == Some(true) {
                    self.set(IDLE, &false)?;
                }
                self.set(WEIGHT, &weight)
            }
        }
    }
}

/// `cpu.stat`. What only the cpu controller counts is `None` without it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStat {
    /// CPU time used.
    pub usage: Micros,
    /// Periods in which there was something to run.
    pub periods: Option<u64>,
    /// Periods in which the quota was used up.
    pub throttled_periods: Option<u64>,
    /// How long it was stopped by its quota; the sum over CPUs.
    pub throttled: Option<Micros>,
    /// Periods in which more than the quota was used (5.14).
    pub bursts: Option<u64>,
    /// How much more, in all of them.
    pub burst: Option<Micros>,
}

impl Contents for CpuStat {
    fn from_text(text: &str) -> Result<CpuStat, Malformed> {
        let flat = Flat::new(text);
        Ok(CpuStat {
            usage: Micros(flat.get("usage_usec")?),
            periods: flat.find("nr_periods")?,
            throttled_periods: flat.find("nr_throttled")?,
            throttled: flat.find("throttled_usec")?.map(Micros),
            bursts: flat.find("nr_bursts")?,
            burst: flat.find("burst_usec")?.map(Micros),
        })
    }
}

/// CPUs, as a sorted list of ranges that do not touch; none: as the cgroup above.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuSet(Vec<(u32, u32)>);

impl CpuSet {
    /// These CPUs.
    pub fn new(cpus: impl IntoIterator<Item = u32>) -> CpuSet {
        CpuSet::merged(cpus.into_iter().map(|cpu| (cpu, cpu)).collect())
    }

    fn merged(mut ranges: Vec<(u32, u32)>) -> CpuSet {
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        CpuSet(merged)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|(first, last)| u64::from(last - first) + 1).sum()
    }

    /// Whether `cpu` is one of them.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&cpu))
    }
}

impl Contents for CpuSet {
    fn from_text(text: &str) -> Result<CpuSet, Malformed> {
        let range = |text: &str| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let range = (number(first)?, number(last)?);
            if range.0 <= range.1 { Ok(range) } else { Err(Malformed::new(text)) }
        };
        let ranges = text.split(',').filter(|_| !text.is_empty()).map(range);
        Ok(CpuSet::merged(ranges.collect::<Result<_, _>>()?))
    }
}

impl Setting for CpuSet {
    fn text(&self) -> String {
        let range = |(first, last): &(u32, u32)| {
            if first == last { first.to_string() } else { format!("{first}-{last}") }
        };
        let text = self.0.iter().map(range).collect::<Vec<_>>().join(",");
        // An empty write would not reach the kernel's parser.
        if text.is_empty() { "\n".into() } else { text }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::file::survives, *};

    #[test]
    fn the_quota_is_a_number_or_max() {
        let max = |quota| CpuMax { quota, period: Micros(100_000) };
        assert_eq!(CpuMax::from_text("max 100000"), Ok(max(Limit::Unlimited)));
        assert_eq!(CpuMax::from_text("50000 100000"), Ok(max(Limit::At(Micros(50_000)))));
        for (broken, named) in
            [("", ""), ("50000", "50000"), ("50000 max", "max"), ("1 2 3", "2 3"), ("-1 5", "-1")]
        {
            assert_eq!(CpuMax::from_text(broken), Err(Malformed::new(named)), "{broken}");
        }
        assert_eq!(CpuMax::of(Limit::At(Millicores(250))).text(), "25000 100000");
        assert_eq!(CpuMax::of(Limit::Unlimited).text(), "max 100000");
        let odd = CpuMax { quota: Limit::At(Micros(20_000)), period: Micros(50_000) };
        assert_eq!(odd.cores(), Limit::At(Millicores(400)));
    }

    #[test]
    fn cpu_stat_with_and_without_the_controller() {
        // 6.12, cpu controller enabled.
        let text = "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\nnice_usec 0\n\
                    core_sched.force_idle_usec 0\nnr_periods 40\nnr_throttled 3\nthrottled_usec 55000\nnr_bursts 2\n\
                    burst_usec 1500";
        let expected = CpuStat {
            usage: Micros(1_234_567),
            periods: Some(40),
            throttled_periods: Some(3),
            throttled: Some(Micros(55_000)),
            bursts: Some(2),
            burst: Some(Micros(1500)),
        };
        assert_eq!(CpuStat::from_text(text), Ok(expected));
        let without = "usage_usec 7\nuser_usec 7\nsystem_usec 0";
        assert_eq!(CpuStat::from_text(without), Ok(CpuStat { usage: Micros(7), ..CpuStat::default() }));
        assert!(CpuStat::from_text("user_usec 7").is_err());
        assert_eq!(CpuStat::from_text("usage_usec 7\nnr_periods -1"), Err(Malformed::new("-1")));
    }

    #[test]
    fn cpus_are_ranges() {
        let set = CpuSet::from_text("0-3,8,10-11").unwrap();
        assert_eq!((set.count(), set.contains(2), set.contains(9)), (7, true, false));
        assert_eq!(set, CpuSet::new([11, 10, 8, 3, 2, 1, 0]));
        assert_eq!(CpuSet::from_text("0-1,2"), Ok(CpuSet::new([0, 1, 2])));
        assert_eq!(CpuSet::from_text(""), Ok(CpuSet::default()));
        for broken in ["3-1", "0-", "-1", "a", "0,,1", "0 1"] {
            assert!(CpuSet::from_text(broken).is_err(), "{broken}");
        }
    }

    /// The rule of the kernel: no write may leave a burst above the quota.
    fn kernel_takes(state: &mut Bandwidth, step: BandwidthStep) -> bool {
        let mut next = *state;
        match step {
            BandwidthStep::Max(max) => next.max = max,
            BandwidthStep::Burst(burst) => next.burst = Some(burst),
        }
        let allowed = next.max.quota.at().is_none_or(|quota| next.burst.is_none_or(|burst| burst <= quota));
        if allowed {
            *state = next;
        }
        allowed
    }

    fn bandwidth() -> impl Strategy<Value = Bandwidth> {
        (prop::option::of(1000u64..1_000_000), 0u64..1_000_000, 1000u64..=1_000_000).prop_map(
            |(quota, burst, period)| Bandwidth {
                max: CpuMax {
                    quota: quota.map_or(Limit::Unlimited, |quota| Limit::At(Micros(quota))),
                    period: Micros(period),
                },
                burst: Some(Micros(quota.map_or(burst, |quota| burst.min(quota)))),
            },
        )
    }

    proptest! {
        #[test]
        fn any_bandwidth_is_reached_from_any_other(from in bandwidth(), to in bandwidth()) {
            let mut state = from;
            for step in to.steps(&from) {
                prop_assert!(kernel_takes(&mut state, step), "{from:?} -> {to:?}: {step:?}");
            }
            prop_assert_eq!(state, to);
            prop_assert!(to.steps(&to).is_empty());
        }

        #[test]
        fn what_is_written_is_read(bandwidth in bandwidth(), cpus in prop::collection::vec(0u32..512, 1..40)) {
            survives(&bandwidth.max);
            survives(&CpuSet::new(cpus));
        }

        #[test]
        fn no_text_panics(text in "[ -~\n]{0,64}") {
            let _ = (CpuMax::from_text(&text), CpuSet::from_text(&text), CpuStat::from_text(&text));
        }
    }
}
