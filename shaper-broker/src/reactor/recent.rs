//! What a running task has used at most, lately: what it could not do without.
//!
//! CPU is a mean over five seconds, memory what was in use at a report. The last one to two minutes count.

use shaper_core::{
    task::Usage,
    units::{Bytes, Millicores},
};

const SECOND: u64 = 1_000_000_000;
/// Over which CPU use is averaged.
const WINDOW: u64 = 5 * SECOND;
/// So many windows are to be seen before anything is said.
const WINDOWS: u32 = 2;
/// Uses of so long are kept together, and those before them.
const KEPT: u64 = 60 * SECOND;

#[derive(Clone, Copy, Debug, Default)]
struct Peak {
    cpu: u64,
    memory: u64,
}

/// Of one attempt of a task. Times are its node's monotonic ones.
#[derive(Clone, Debug)]
pub(super) struct Recent {
    /// CPU time that it had used, and when, at the beginning of the window.
    since: (u64, u64),
    windows: u32,
    peaks: [Peak; 2],
    turned_at: u64,
    /// Whether its memory is measured.
    knows_memory: bool,
}

impl Recent {
    pub(super) fn begin(usage: &Usage) -> Recent {
        let at = usage.at_monotonic_ns;
        let mut recent = Recent {
            since: (usage.cpu_time_ns, at),
            windows: 0,
            peaks: [Peak::default(); 2],
            turned_at: at,
            knows_memory: false,
        };
        recent.see(usage);
        recent
    }

    /// The next report.
    pub(super) fn see(&mut self, usage: &Usage) {
        let at = usage.at_monotonic_ns;
        if at.saturating_sub(self.turned_at) >= KEPT {
            self.peaks = [Peak::default(), self.peaks[0]];
            self.turned_at = at;
        }
        let [peak, _] = &mut self.peaks;
        if let Some(memory) = usage.memory_bytes {
            self.knows_memory = true;
            peak.memory = peak.memory.max(memory);
        }
        let (used, since) = self.since;
        let over = at.saturating_sub(since);
        if over >= WINDOW {
            let cpu = u128::from(usage.cpu_time_ns.saturating_sub(used)) * 1000 / u128::from(over);
            peak.cpu = peak.cpu.max(u64::try_from(cpu).unwrap_or(u64::MAX));
            self.since = (usage.cpu_time_ns, at);
            self.windows = self.windows.saturating_add(1);
        }
    }

    /// The most CPU and memory; `None`: it is too early to say, or nobody measures it.
    pub(super) fn most(&self) -> Option<(Millicores, Option<Bytes>)> {
        let [now, before] = &self.peaks;
        let memory = self.knows_memory.then_some(Bytes(now.memory.max(before.memory)));
        (self.windows >= WINDOWS).then_some((Millicores(now.cpu.max(before.cpu)), memory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(second: u64, cpu_time_ns: u64, memory: u64) -> Usage {
        let at_monotonic_ns = second * SECOND;
        Usage { at_monotonic_ns, cpu_time_ns, memory_bytes: Some(memory), ..Usage::default() }
    }

    #[test]
    fn the_most_of_the_last_minutes_counts_and_nothing_of_before() {
        let mut recent = Recent::begin(&usage(0, 0, 7));
        let (mut used, mut most) = (0, Vec::new());
        for second in 1..=240 {
            // Two cores in seconds 21 to 30, a tenth of one besides.
            used += if (21..=30).contains(&second) { 2 * SECOND } else { SECOND / 10 };
            recent.see(&usage(second, used, if second == 25 { 900 } else { 7 }));
            most.push(recent.most());
        }
        let most = |second: usize| most[second - 1];
        assert_eq!(most(9), None, "it is too early");
        assert_eq!(most(10), Some((Millicores(100), Some(Bytes(7)))));
        assert_eq!(most(30), Some((Millicores(2000), Some(Bytes(900)))));
        assert_eq!(most(119), Some((Millicores(2000), Some(Bytes(900)))));
        assert_eq!(most(120), Some((Millicores(100), Some(Bytes(7)))));
    }

    #[test]
    fn what_nobody_measures_is_not_taken_for_nothing() {
        let at = |second| Usage { memory_bytes: None, ..usage(second, 0, 0) };
        let mut recent = Recent::begin(&at(0));
        (1..20).for_each(|second| recent.see(&at(second)));
        assert_eq!(recent.most(), Some((Millicores(0), None)));
    }
}
