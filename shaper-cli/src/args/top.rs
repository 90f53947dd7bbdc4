//! How `shaper top` is asked.

use clap::ValueEnum;

use super::TableFormat;

const TOP_AFTER_HELP: &str = "\
On a terminal the figures are drawn anew each second, and `?` names the keys. Elsewhere, use
--once or `-o json`; the latter without --once is an object a line for each snapshot, until
interrupted.

`-` stands for what nothing on this kernel can measure, and for every rate in the first second;
`none` for the delay of what did not happen. p50 and p99 are those of the last interval, PSI is
some/full of the last 10 s, RETRANS counts from the start of the task. IO is summed over the
devices, and its p99 is that of the slowest one; `-o wide` has the devices one by one, as the
detail of a task has them.

Examples:
  shaper top                            watch the tasks of this node
  shaper top --sort wait                first those that wait longest for a CPU
  shaper top --once -o wide             one table, with every column
  shaper top -o json | jq .cpu_now      a number a second

Exit codes: 0 done, 1 no agent, 2 refused or not on a terminal, 128+N ended by signal N.";

/// What tasks are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SortKey {
    /// CPU in use
    #[default]
    Cpu,
    /// Memory in use
    Memory,
    /// Bytes read and written a second
    Io,
    /// Bits sent and received a second
    Net,
    /// Run-queue delay, p99
    Wait,
    /// Name of the task
    Name,
}

#[derive(Debug, clap::Args)]
#[command(after_help = TOP_AFTER_HELP)]
pub(crate) struct Top {
    /// Print one table and end
    #[arg(long)]
    pub(crate) once: bool,
    /// What the tasks are sorted by, the most first
    #[arg(long, value_name = "KEY", default_value = "cpu", hide_possible_values = true)]
    #[arg(
        help = "What the tasks are sorted by, the most first: cpu, memory, io, net, wait (for a CPU) or name"
    )]
    pub(crate) sort: SortKey,
    /// How they are shown
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: TableFormat,
}
