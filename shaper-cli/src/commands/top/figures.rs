//! Quantities of a snapshot as text, and what of a snapshot may be read as a quantity at all.

use shaper_core::{
    snapshot::{
        CpuUsage, IoCount, Latency, MemoryUsage, NetUsage, NodeSnapshot, Pressure, Source, Sources,
        TaskSnapshot,
    },
    units::{BitsPerSec, Millicores},
};

use crate::args::SortKey;

/// What nothing on this kernel can measure, or not yet.
const UNKNOWN: &str = "-";
/// The delay of what did not happen.
const NEVER: &str = "none";

pub(super) fn or_unknown<T>(value: Option<T>, shown: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| UNKNOWN.into(), shown)
}

/// `850ns`, `1.2µs`, `12µs`, `3.4s`: two digits, which is as fine as the buckets are.
pub(super) fn nanos(nanos: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "µs")];
    let Some((unit, name)) = UNITS.into_iter().find(|(unit, _)| nanos >= *unit) else {
        return format!("{nanos}ns");
    };
    let (whole, tenth) = (nanos / unit, nanos % unit / (unit / 10));
    if whole >= 10 || tenth == 0 { format!("{whole}{name}") } else { format!("{whole}.{tenth}{name}") }
}

/// A total of time.
pub(super) fn seconds(nanos: u64) -> String {
    format!("{}.{:03} s", nanos / 1_000_000_000, nanos % 1_000_000_000 / 1_000_000)
}

pub(super) fn permille(permille: u32) -> String {
    format!("{}.{}%", permille / 10, permille % 10)
}

fn hundredths(hundredths: u32) -> String {
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

/// Some and full, `12.30/0.00%`.
pub(super) fn stall(pressure: Option<Pressure>) -> String {
    or_unknown(pressure, |Pressure { some_avg10, full_avg10, .. }| {
        format!("{}/{}%", hundredths(some_avg10), hundredths(full_avg10))
    })
}

/// The same in words.
pub(super) fn some_and_full(pressure: Option<Pressure>) -> String {
    pressure.map_or_else(
        || format!("PSI {UNKNOWN}"),
        |Pressure { some_avg10, full_avg10, .. }| {
            format!("PSI some {}% full {}%", hundredths(some_avg10), hundredths(full_avg10))
        },
    )
}

/// The median and the 99th percentile, `12µs/1.2ms`.
pub(super) fn quantiles(latency: Option<Latency>) -> String {
    or_unknown(latency, |Latency { count, p50_ns, p99_ns }| match count {
        0 => NEVER.into(),
        _ => format!("{}/{}", nanos(p50_ns), nanos(p99_ns)),
    })
}

/// The 99th percentile.
pub(super) fn p99(latency: Option<Latency>) -> String {
    or_unknown(latency, |Latency { count, p50_ns: _, p99_ns }| match count {
        0 => NEVER.into(),
        _ => nanos(p99_ns),
    })
}

/// A task in a snapshot, of which each figure is `None` where nobody measures it, or where it is a rate and
/// there has been no interval yet.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub(super) task: &'a TaskSnapshot,
    sources: &'a Sources,
    has_interval: bool,
}

/// Block IO of a task in one direction, all devices together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct IoTotal {
    pub(super) bytes_per_sec: u64,
    pub(super) operations_per_sec: u64,
    /// Of the slowest device: quantiles cannot be added.
    pub(super) latency: Option<Latency>,
}

/// Which way bytes go.
#[derive(Clone, Copy)]
pub(super) enum Way {
    In,
    Out,
}

impl<'a> Reading<'a> {
    pub(super) fn new(snapshot: &'a NodeSnapshot, task: &'a TaskSnapshot) -> Reading<'a> {
        Reading { task, sources: &snapshot.sources, has_interval: snapshot.interval_ns != 0 }
    }

    /// The tasks of a snapshot in the order of `key`: the most first, names from A on.
    pub(super) fn sorted(snapshot: &'a NodeSnapshot, key: SortKey) -> Vec<Reading<'a>> {
        let mut readings: Vec<_> = snapshot.tasks.iter().map(|task| Reading::new(snapshot, task)).collect();
        readings.sort_by(|a, b| {
            b.weight(key).cmp(&a.weight(key)).then_with(|| a.task.task_id.cmp(&b.task.task_id))
        });
        readings
    }

    /// What it is sorted by; less where it is not known.
    fn weight(&self, key: SortKey) -> Option<u64> {
        match key {
            SortKey::Cpu => self.cpu_now().map(|now| now.0),
            SortKey::Memory => self.task.memory.map(|memory| memory.now.0),
            SortKey::Io => {
                let bytes = |way| self.io(way).map(|io| io.bytes_per_sec);
                Some(bytes(Way::In)?.saturating_add(bytes(Way::Out)?))
            }
            SortKey::Net => {
                let bits = |way| self.net_now(way).map(|now| now.0);
                Some(bits(Way::In)?.saturating_add(bits(Way::Out)?))
            }
            SortKey::Wait => self.run_queue().map(|latency| latency.p99_ns),
            SortKey::Name => None,
        }
    }

    /// `value`, if it is of an interval and somebody measures it.
    fn rate<T>(&self, source: Source, value: T) -> Option<T> {
        (self.has_interval && source != Source::None).then_some(value)
    }

    /// What only a program can count: no file of a cgroup knows of switches.
    fn counted<T>(&self, value: T) -> Option<T> {
        (self.has_interval && self.sources.cpu == Source::Program).then_some(value)
    }

    fn cpu(&self) -> &'a CpuUsage {
        &self.task.cpu
    }

    fn network(&self) -> &'a NetUsage {
        &self.task.network
    }

    pub(super) fn cpu_time(&self) -> Option<u64> {
        (self.sources.cpu != Source::None).then_some(self.cpu().time_ns)
    }

    pub(super) fn cpu_now(&self) -> Option<Millicores> {
        self.rate(self.sources.cpu, self.cpu().now)
    }

    pub(super) fn throttled(&self) -> Option<u32> {
        self.cpu().throttled_permille.filter(|_| self.has_interval)
    }

    pub(super) fn run_queue(&self) -> Option<Latency> {
        self.cpu().run_queue.filter(|_| self.has_interval)
    }

    pub(super) fn switches(&self) -> Option<u64> {
        self.counted(self.cpu().switches_per_sec)
    }

    pub(super) fn preemptions(&self) -> Option<u64> {
        self.counted(self.cpu().preemptions_per_sec)
    }

    pub(super) fn preemptions_by_others(&self) -> Option<u64> {
        self.counted(self.cpu().preemptions_by_others_per_sec)
    }

    pub(super) fn memory<T>(&self, part: impl FnOnce(&MemoryUsage) -> Option<T>) -> Option<T> {
        self.task.memory.as_ref().and_then(part)
    }

    /// Of one device; reads come in.
    pub(super) fn io_of(&self, count: &IoCount) -> Option<IoTotal> {
        let IoCount { bytes: _, operations: _, bytes_per_sec, operations_per_sec, latency } = *count;
        self.rate(self.sources.io, IoTotal { bytes_per_sec, operations_per_sec, latency })
    }

    pub(super) fn io(&self, way: Way) -> Option<IoTotal> {
        // Where latencies are measured and no device was used, there was none.
        let nothing = self.rate(self.sources.io_latency, Latency::default());
        let start = self.rate(self.sources.io, IoTotal { latency: nothing, ..IoTotal::default() })?;
        // What lies on other devices is counted there.
        let counts = self.task.io.iter().filter(|device| !device.stacked).map(|device| match way {
            Way::In => &device.read,
            Way::Out => &device.write,
        });
        Some(counts.fold(start, |sum, count| IoTotal {
            bytes_per_sec: sum.bytes_per_sec.saturating_add(count.bytes_per_sec),
            operations_per_sec: sum.operations_per_sec.saturating_add(count.operations_per_sec),
            latency: sum.latency.into_iter().chain(count.latency).max_by_key(|latency| latency.p99_ns),
        }))
    }

    /// `value`, if somebody measures traffic.
    pub(super) fn traffic<T>(&self, value: T) -> Option<T> {
        (self.sources.network != Source::None).then_some(value)
    }

    pub(super) fn net_now(&self, way: Way) -> Option<BitsPerSec> {
        let NetUsage { egress, ingress, .. } = self.network();
        self.rate(self.sources.network, if matches!(way, Way::In) { ingress.now } else { egress.now })
    }

    pub(super) fn packets(&self, way: Way) -> Option<u64> {
        let NetUsage { egress, ingress, .. } = self.network();
        let count = if matches!(way, Way::In) { ingress } else { egress };
        self.rate(self.sources.network, count.packets_per_sec)
    }

    pub(super) fn round_trip(&self) -> Option<Latency> {
        self.network().round_trip.filter(|_| self.has_interval)
    }

    /// `latency`, if it is of an interval.
    pub(super) fn delay(&self, latency: Option<Latency>) -> Option<Latency> {
        latency.filter(|_| self.has_interval)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixture, *};

    #[test]
    fn a_delay_has_two_digits() {
        for (value, shown) in [
            (0, "0ns"),
            (999, "999ns"),
            (1_000, "1µs"),
            (1_250, "1.2µs"),
            (12_345, "12µs"),
            (1_230_000, "1.2ms"),
            (999_999_999, "999ms"),
            (3_450_000_000, "3.4s"),
        ] {
            assert_eq!(nanos(value), shown);
        }
    }

    #[test]
    fn not_measured_is_told_from_nothing() {
        assert_eq!((quantiles(None), p99(None), stall(None)), ("-".into(), "-".into(), "-".into()));
        let never = Some(Latency::default());
        assert_eq!((quantiles(never), p99(never)), ("none".into(), "none".into()));
        assert_eq!(stall(Some(Pressure::default())), "0.00/0.00%");
    }

    fn order(key: SortKey) -> Vec<String> {
        let snapshot = fixture::snapshot();
        Reading::sorted(&snapshot, key).iter().map(|reading| reading.task.task_id.to_string()).collect()
    }

    #[test]
    fn the_most_comes_first() {
        assert_eq!(order(SortKey::Cpu), ["etl", "web", "idle"]);
        assert_eq!(order(SortKey::Memory), ["web", "etl", "idle"]);
        assert_eq!(order(SortKey::Io), ["etl", "idle", "web"]);
        assert_eq!(order(SortKey::Net), ["web", "etl", "idle"]);
        assert_eq!(order(SortKey::Wait), ["web", "etl", "idle"]);
        assert_eq!(order(SortKey::Name), ["etl", "idle", "web"]);
    }

    #[test]
    fn io_is_summed_and_its_latency_is_the_slowest_devices() {
        let snapshot = fixture::snapshot();
        let etl = Reading::new(&snapshot, &snapshot.tasks[0]);
        let write = etl.io(Way::Out).unwrap();
        assert_eq!((write.bytes_per_sec, write.operations_per_sec), (4 << 20, 50));
        assert_eq!(write.latency.map(|latency| latency.p99_ns), Some(25_000_000));
        let idle = Reading::new(&snapshot, &snapshot.tasks[1]);
        assert_eq!(
            idle.io(Way::In),
            Some(IoTotal { latency: Some(Latency::default()), ..IoTotal::default() })
        );
    }

    #[test]
    fn what_no_source_has_is_not_zero() {
        let mut snapshot = fixture::snapshot();
        let Sources { cpu, io, network, .. } = &mut snapshot.sources;
        (*cpu, *io, *network) = (Source::CgroupFile, Source::None, Source::None);
        let etl = Reading::new(&snapshot, &snapshot.tasks[0]);
        assert_eq!((etl.cpu_now(), etl.preemptions_by_others()), (Some(Millicores(1980)), None));
        assert_eq!((etl.io(Way::In), etl.net_now(Way::Out)), (None, None));
        snapshot.sources.cpu = Source::None;
        assert_eq!(Reading::new(&snapshot, &snapshot.tasks[0]).cpu_now(), None);
    }
}
