//! The columns of the table, and what each shows of a task.

use shaper_core::{
    snapshot::{DeviceUsage, NodeSnapshot},
    units::Bytes,
};

use super::figures::{IoTotal, Reading, Way, nanos, or_unknown, p99, permille, quantiles, stall};
use crate::{
    args::SortKey,
    output::{self, Column},
    show::{compact, received, used},
};

/// A column, and what it takes to do without it.
pub(super) struct Field {
    pub(super) column: Column,
    pub(super) cell: fn(&Reading<'_>) -> String,
    /// Where there is no room for all, those with the least go first.
    pub(super) importance: u8,
    /// Room that it has in any case, so that columns do not jump from second to second.
    pub(super) width: usize,
    /// Whether what it counts is trouble wherever it is not 0.
    pub(super) is_trouble: bool,
}

const fn number(
    title: &'static str,
    importance: u8,
    width: usize,
    cell: fn(&Reading<'_>) -> String,
) -> Field {
    Field { column: Column::Number(title), cell, importance, width, is_trouble: false }
}

const fn trouble(
    title: &'static str,
    importance: u8,
    width: usize,
    cell: fn(&Reading<'_>) -> String,
) -> Field {
    Field { is_trouble: true, ..number(title, importance, width, cell) }
}

const TASK: Field = Field {
    column: Column::Text("TASK"),
    cell: |reading| reading.task.task_id.to_string(),
    importance: u8::MAX,
    width: 8,
    is_trouble: false,
};

static USUAL: [Field; 15] = [
    TASK,
    number("CPU", 100, 8, |reading| used(reading.cpu_now(), &reading.task.limits.cpu)),
    trouble("THROTTLED", 80, 9, |reading| or_unknown(reading.throttled(), permille)),
    number("RUNQ P50/P99", 85, 12, |reading| quantiles(reading.run_queue())),
    number("PREEMPT/S", 60, 9, |reading| count(reading.preemptions_by_others())),
    number("MEMORY", 95, 13, |reading| {
        used(reading.memory(|memory| Some(memory.now)), &reading.task.limits.memory)
    }),
    trouble("MEM PSI", 70, 11, |reading| stall(reading.memory(|memory| memory.pressure))),
    number("READ/S", 75, 8, |reading| io(reading, Way::In, bytes)),
    number("WRITE/S", 74, 8, |reading| io(reading, Way::Out, bytes)),
    number("IOPS R/W", 50, 9, |reading| both(reading, |io| io.operations_per_sec.to_string())),
    number("IO P99 R/W", 65, 11, |reading| both(reading, |io| p99(io.latency))),
    number("NET OUT", 72, 14, |reading| used(reading.net_now(Way::Out), &reading.task.limits.net_egress)),
    number("NET IN", 71, 8, |reading| {
        or_unknown(reading.net_now(Way::In), |now| received(now, &reading.task.limits.net_ingress))
    }),
    number("RTT P99", 40, 7, |reading| p99(reading.round_trip())),
    trouble("RETRANS", 45, 7, |reading| count(reading.task.network.retransmits)),
];

/// For a broad terminal.
static ADDED: [Field; 13] = [
    number("SWITCH/S", 30, 8, |reading| count(reading.switches())),
    number("ANY PREEMPT/S", 29, 13, |reading| count(reading.preemptions())),
    trouble("CPU PSI", 35, 11, |reading| stall(reading.task.cpu.pressure)),
    trouble("IO PSI", 34, 11, |reading| stall(reading.task.io_pressure)),
    number("PEAK", 28, 8, |reading| or_unknown(reading.memory(|memory| memory.peak), compact)),
    trouble("OOM KILLS", 33, 9, |reading| count(reading.memory(|memory| memory.oom_kills))),
    number("PACKETS/S OUT/IN", 27, 16, |reading| {
        let packets = |way| reading.packets(way);
        or_unknown(packets(Way::Out).zip(packets(Way::In)), |(out, into)| format!("{out}/{into}"))
    }),
    trouble("DROPS", 32, 5, |reading| count(reading.task.network.drops)),
    number("ECN CE OUT/IN", 26, 13, |reading| {
        let network = &reading.task.network;
        let marks = (network.egress.congestion_marks, network.ingress.congestion_marks);
        or_unknown(reading.traffic(marks), |(out, into)| format!("{out}/{into}"))
    }),
    number("WEIGHT", 25, 6, |reading| {
        or_unknown(reading.task.limits.cpu_weight, |weight| weight.to_string())
    }),
    number("UID", 24, 5, |reading| reading.task.owner.uid.to_string()),
    number("ATTEMPT", 23, 7, |reading| reading.task.attempt.to_string()),
    number("FILES READ", 22, 10, |reading| format!("{} ago", nanos(reading.task.files_age_ns))),
];

/// The columns there are.
pub(super) fn fields(wide: bool) -> Vec<&'static Field> {
    USUAL.iter().chain(if wide { ADDED.as_slice() } else { &[] }).collect()
}

pub(super) fn count(count: Option<u64>) -> String {
    or_unknown(count, |count| count.to_string())
}

fn bytes(io: IoTotal) -> String {
    compact(Bytes(io.bytes_per_sec))
}

fn io(reading: &Reading<'_>, way: Way, shown: impl Fn(IoTotal) -> String) -> String {
    or_unknown(reading.io(way), shown)
}

/// Read and written; one word where it says all of both.
fn both(reading: &Reading<'_>, shown: impl Fn(IoTotal) -> String) -> String {
    let [read, written] = [Way::In, Way::Out].map(|way| io(reading, way, &shown));
    let is_word = !read.contains(|letter: char| letter.is_ascii_digit());
    if read == written && is_word { read } else { format!("{read}/{written}") }
}

/// The table as text.
pub(super) fn table(snapshot: &NodeSnapshot, key: SortKey, wide: bool) -> String {
    let fields = fields(wide);
    let columns: Vec<Column> = fields.iter().map(|field| field.column).collect();
    let rows = Reading::sorted(snapshot, key)
        .into_iter()
        .map(|reading| fields.iter().map(|field| (field.cell)(&reading)).collect::<Vec<_>>());
    output::table_of(&columns, rows)
}

const DEVICE_COLUMNS: [Column; 9] = [
    Column::Text("DEVICE"),
    Column::Number("READ/S"),
    Column::Number("WRITE/S"),
    Column::Number("IOPS R/W"),
    Column::Number("READ P50/P99"),
    Column::Number("WRITE P50/P99"),
    Column::Number("READ IN ALL"),
    Column::Number("WRITTEN IN ALL"),
    Column::Number("OPERATIONS R/W"),
];

/// The devices of all tasks; empty where no task has used one.
pub(super) fn all_devices(snapshot: &NodeSnapshot, key: SortKey) -> String {
    let readings = Reading::sorted(snapshot, key);
    if readings.iter().all(|reading| reading.task.io.is_empty()) {
        return String::new();
    }
    let columns: Vec<Column> = std::iter::once(TASK.column).chain(DEVICE_COLUMNS).collect();
    let rows = readings.iter().flat_map(|reading| {
        reading.task.io.iter().map(|device| {
            let mut row = vec![reading.task.task_id.to_string()];
            row.extend(device_row(reading, device));
            row
        })
    });
    output::table_of(&columns, rows)
}

fn device_row(reading: &Reading<'_>, usage: &DeviceUsage) -> [String; 9] {
    let DeviceUsage { device, name, stacked, read, write } = usage;
    let mut name = if name.is_empty() { device.clone() } else { format!("{name} ({device})") };
    if *stacked {
        name += " on others";
    }
    let (reading_now, writing_now) = (reading.io_of(read), reading.io_of(write));
    let rate = |io: Option<IoTotal>| or_unknown(io, bytes);
    [
        name,
        rate(reading_now),
        rate(writing_now),
        or_unknown(reading_now.zip(writing_now), |(read, write)| {
            format!("{}/{}", read.operations_per_sec, write.operations_per_sec)
        }),
        quantiles(reading.delay(read.latency)),
        quantiles(reading.delay(write.latency)),
        compact(Bytes(read.bytes)),
        compact(Bytes(write.bytes)),
        format!("{}/{}", read.operations, write.operations),
    ]
}
