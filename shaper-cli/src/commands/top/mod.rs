//! `shaper top`: what a node and its tasks use. From a snapshot and the state of the view to text is pure; `screen`
//! alone knows of a terminal.

mod columns;
mod detail;
mod draw;
mod figures;
#[cfg(test)]
#[path = "../../../tests/cli/fake/snapshot.rs"]
mod fixture;
mod header;
mod screen;
mod topic;
mod view;

use std::{
    env,
    io::{self, IsTerminal as _},
    process::ExitCode,
};

use shaper_core::snapshot::NodeSnapshot;

use self::view::View;
use crate::{
    args::{SortKey, TableFormat, Top},
    error::Error,
    output,
    servers::Servers,
};

pub(super) async fn top(servers: &Servers, args: &Top) -> Result<ExitCode, Error> {
    let Top { once, sort, output } = *args;
    let wide = output == TableFormat::Wide;
    match (once, output) {
        (true, TableFormat::Json) => output::print_json(&servers.agent().await?.snapshot().await?)?,
        (true, TableFormat::Yaml) => output::print_yaml(&servers.agent().await?.snapshot().await?)?,
        (true, TableFormat::Table | TableFormat::Wide) => {
            let snapshot = servers.agent().await?.snapshot().await?;
            output::print(&text(&snapshot, sort, wide))?;
        }
        (false, TableFormat::Json) => {
            let mut snapshots = servers.agent().await?.watch_snapshots();
            loop {
                output::print_json_line(&snapshots.next().await?)?;
            }
        }
        (false, TableFormat::Yaml) => {
            let mut snapshots = servers.agent().await?.watch_snapshots();
            loop {
                output::print_yaml_document(&snapshots.next().await?)?;
            }
        }
        (false, TableFormat::Table | TableFormat::Wide) => {
            let is_dumb = env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
            if is_dumb || !io::stdout().is_terminal() {
                return Err(Error::NotATerminal);
            }
            return screen::run(servers.agent().await?, View::new(sort, wide)).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How broad what stands above a table is: to be read, and not broader than the table.
const PAGE: usize = 110;

/// All of a snapshot as one text.
fn text(snapshot: &NodeSnapshot, sort: SortKey, wide: bool) -> String {
    let mut topics = header::node(snapshot);
    topics.extend(header::alarm(&snapshot.health));
    let mut text = topic::lines(&topics, header::INDENT, PAGE).join("\n");
    text.push_str("\n\n");
    if snapshot.tasks.is_empty() {
        text.push_str("no tasks\n");
        return text;
    }
    text.push_str(&columns::table(snapshot, sort, wide));
    let devices = if wide { columns::all_devices(snapshot, sort) } else { String::new() };
    if !devices.is_empty() {
        text.push('\n');
        text.push_str(&devices);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_under_load() {
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  3 tasks
CPU      3.25 of 8 busy  PSI some 12.30% full 0.00%
Memory   12GiB of 32GiB in use  PSI some 0.00% full 0.00%
IO       PSI some 4.12% full 0.98%
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory, pressure from cgroup files: the kernel counts that itself

TASK       CPU  THROTTLED  RUNQ P50/P99  PREEMPT/S         MEMORY     MEM PSI  READ/S  WRITE/S  IOPS R/W  IO P99 R/W         NET OUT   NET IN  RTT P99  RETRANS
etl     1.98/2      12.3%    12µs/1.2ms         12  120MiB/512MiB  1.20/0.04%   12MiB     4MiB    120/50  800µs/25ms  9.8Mbit/10Mbit  128kbit    2.1ms        7
web   0.25/max       0.0%      5µs/42ms          3       3GiB/max  0.00/0.00%      0B       0B       0/0        none     250Mbit/max   30Mbit     none        0
idle     0/max       0.0%          none          0       1MiB/max  0.00/0.00%      0B       0B       0/0        none        0bit/max     0bit     none        0
";
        assert_eq!(text(&fixture::snapshot(), SortKey::Cpu, false), expected);
    }

    #[test]
    fn every_column_and_every_device() {
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  3 tasks
CPU      3.25 of 8 busy  PSI some 12.30% full 0.00%
Memory   12GiB of 32GiB in use  PSI some 0.00% full 0.00%
IO       PSI some 4.12% full 0.98%
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory, pressure from cgroup files: the kernel counts that itself

TASK       CPU  THROTTLED  RUNQ P50/P99  PREEMPT/S         MEMORY     MEM PSI  READ/S  WRITE/S  IOPS R/W  IO P99 R/W         NET OUT   NET IN  RTT P99  RETRANS  SWITCH/S  ANY PREEMPT/S      CPU PSI      IO PSI    PEAK  OOM KILLS  PACKETS/S OUT/IN  DROPS  ECN CE OUT/IN  WEIGHT   UID  ATTEMPT  FILES READ
web   0.25/max       0.0%      5µs/42ms          3       3GiB/max  0.00/0.00%      0B       0B       0/0        none     250Mbit/max   30Mbit     none        0         0              0   0.00/0.00%  0.00/0.00%    2MiB          0        25000/3000      0         250/30       -     0        1    9.5s ago
etl     1.98/2      12.3%    12µs/1.2ms         12  120MiB/512MiB  1.20/0.04%   12MiB     4MiB    120/50  800µs/25ms  9.8Mbit/10Mbit  128kbit    2.1ms        7      1200             30  25.10/0.00%  3.00/0.50%  256MiB          0            984/12      0            9/0     300  1000        2   120ms ago
idle     0/max       0.0%          none          0       1MiB/max  0.00/0.00%      0B       0B       0/0        none        0bit/max     0bit     none        0         0              0   0.00/0.00%  0.00/0.00%    2MiB          0               0/0      0            0/0       -     0        1    9.5s ago

TASK  DEVICE           READ/S  WRITE/S  IOPS R/W  READ P50/P99  WRITE P50/P99  READ IN ALL  WRITTEN IN ALL  OPERATIONS R/W
etl   nvme0n1 (259:0)   12MiB     3MiB    120/40    90µs/800µs    300µs/9.5ms        12GiB            3GiB    120000/40000
etl   8:0                  0B     1MiB      0/10          none       4ms/25ms           0B            1GiB         0/10000
";
        assert_eq!(text(&fixture::snapshot(), SortKey::Memory, true), expected);
    }

    #[test]
    fn a_node_that_measures_little() {
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  rates over 1.000 s  1 task
CPU      3.25 of 8 busy  PSI -
Memory   12GiB of 32GiB in use  PSI -
IO       PSI -
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory from cgroup files: the kernel counts that itself
         IO from cgroup files: no program for that runs here
         run queue, IO latency not measured: no program for that runs here
         pressure not measured: the kernel does not count that here  see `shaper doctor`
!!       MEASUREMENT DEGRADED  12 events lost: they came faster than they were read
         3 cgroups without an entry: the table is full, they are found by a walk
         5 IO operations not charged: the table is full

TASK     CPU  THROTTLED  RUNQ P50/P99  PREEMPT/S    MEMORY  MEM PSI  READ/S  WRITE/S  IOPS R/W  IO P99 R/W         NET OUT   NET IN  RTT P99  RETRANS
bare  1.98/2          -             -         12  -/512MiB        -   12MiB     3MiB    120/40           -  9.8Mbit/10Mbit  128kbit        -        -
";
        assert_eq!(text(&fixture::poor_snapshot(), SortKey::Cpu, false), expected);
    }

    #[test]
    fn the_first_second() {
        let first = NodeSnapshot { interval_ns: 0, ..fixture::snapshot() };
        let expected = "\
Node     n1  2025-11-24T06:58:00Z  the first second: no rates yet  3 tasks
CPU      - of 8 busy  PSI some 12.30% full 0.00%
Memory   12GiB of 32GiB in use  PSI some 0.00% full 0.00%
IO       PSI some 4.12% full 0.98%
Uplinks  5GiB sent in all  5GiB by tasks  40MiB by others  12KiB without a socket
Sources  memory, pressure from cgroup files: the kernel counts that itself

TASK    CPU  THROTTLED  RUNQ P50/P99  PREEMPT/S         MEMORY     MEM PSI  READ/S  WRITE/S  IOPS R/W  IO P99 R/W   NET OUT  NET IN  RTT P99  RETRANS
etl     -/2          -             -          -  120MiB/512MiB  1.20/0.04%       -        -         -           -  -/10Mbit       -        -        7
idle  -/max          -             -          -       1MiB/max  0.00/0.00%       -        -         -           -     -/max       -        -        0
web   -/max          -             -          -       3GiB/max  0.00/0.00%       -        -         -           -     -/max       -        -        0
";
        assert_eq!(text(&first, SortKey::Cpu, false), expected);
    }
}
