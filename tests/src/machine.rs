//! What the whole machine does.

use std::{fs, time::Duration};

/// CPU time that it has used so far, with what interrupts took of a CPU that was idle: counted in ticks.
pub fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/stat").expect("/proc is mounted");
    let ticks = busy_ticks(&text).unwrap_or_else(|| panic!("/proc/stat begins with no sums: {text}"));
    Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// User, nice, system, interrupts of both kinds.
fn busy_ticks(text: &str) -> Option<u64> {
    let counts = text.lines().next()?.strip_prefix("cpu ")?;
    let counts: Vec<u64> = counts.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    [0, 1, 2, 5, 6].into_iter().map(|field| counts.get(field)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_idle_time_nor_that_of_other_machines_counts() {
        let text = "cpu  1 20 300 4000 50000 600000 7000000 80000000 900000000 0\ncpu0 1 1 1 1 1 1 1\n";
        assert_eq!(busy_ticks(text), Some(7_600_321));
        assert_eq!(busy_ticks("cpu  1 2 3\n"), None);
        assert_eq!(busy_ticks("cpu0 1 2 3 4 5 6 7\n"), None);
    }
}
