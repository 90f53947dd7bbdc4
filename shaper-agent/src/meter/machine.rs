//! What the whole machine uses, and the agent itself.

use shaper_core::snapshot::Pressure;

use super::files::read_to_string;
use crate::kernel::{cgroup::Contents, mapped::monotonic_ns};

/// The machine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// CPUs that are online.
    pub cpus: u32,
    /// Busy time of all CPUs, ns.
    pub busy_ns: u64,
    /// Memory, bytes.
    pub memory: u64,
    /// Of it: what could be had without swapping.
    pub memory_available: u64,
    /// Pressure on CPU, memory and IO; `None` where the kernel does not count it.
    pub pressure: [Option<Pressure>; 3],
    /// CPU time of this process, ns.
    pub agent_cpu_ns: u64,
    /// Its resident memory, bytes.
    pub agent_memory: u64,
}

impl Machine {
    /// Reads it; what cannot be read is 0.
    pub fn read() -> Machine {
        let stat = read_to_string("/proc/stat").unwrap_or_default();
        let memory = read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = |name| kib(&memory, name).unwrap_or(0);
        let status = read_to_string("/proc/self/statm").unwrap_or_default();
        let pages = status.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
        let agent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Machine {
            at_ns: monotonic_ns(),
            cpus: online(&stat),
            busy_ns: busy_ns(&stat),
            memory: kib("MemTotal"),
            memory_available: kib("MemAvailable"),
            pressure: ["cpu", "memory", "io"].map(|resource| {
                Pressure::from_text(&read_to_string(&format!("/proc/pressure/{resource}"))?).ok()
            }),
            agent_cpu_ns: agent.tv_sec as u64 * 1_000_000_000 + agent.tv_nsec as u64,
            agent_memory: pages * rustix::param::page_size() as u64,
        }
    }
}

/// A size in `/proc/meminfo`, bytes.
pub(crate) fn kib(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// Swap that is free, bytes; 0 where there is none.
pub fn swap_free() -> u64 {
    read_to_string("/proc/meminfo").and_then(|text| kib(&text, "SwapFree")).unwrap_or(0)
}

pub(crate) fn online(stat: &str) -> u32 {
    let is_cpu = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|letter: char| letter.is_ascii_digit()))
    };
    stat.lines().filter(is_cpu).count() as u32
}

/// Busy time of all CPUs in `/proc/stat`, ns: all but idle, iowait and (counted in user) guest time.
pub fn busy_ns(stat: &str) -> u64 {
    const TICK_NS: u64 = 10_000_000; // USER_HZ is 100 on every architecture that matters.
    let fields = stat.lines().find_map(|line| line.strip_prefix("cpu "));
    let ticks = fields.into_iter().flat_map(str::split_whitespace).enumerate();
    let busy = ticks.filter(|(index, _)| matches!(index, 0..=2 | 5..=7));
    let ticks = busy.filter_map(|(_, ticks)| ticks.parse::<u64>().ok());
    ticks.fold(0, u64::saturating_add).saturating_mul(TICK_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_leaves_idle_and_guest_out() {
        let stat = "cpu  10 20 30 1000 500 1 2 3 99 98\ncpu0 1 1 1 1\ncpu1 1 1\nctxt 5\n";
        assert_eq!(busy_ns(stat), 66 * 10_000_000);
        assert_eq!(online(stat), 2);
    }

    #[test]
    fn this_machine_has_cpus_and_memory() {
        let machine = Machine::read();
        assert!(machine.cpus > 0 && machine.busy_ns > 0 && machine.agent_memory > 0);
        assert!(machine.memory > machine.memory_available && machine.memory_available > 0);
    }
}
