//! What an agent has to say. Counters of a task begin anew with each attempt of it, and with each agent.

use super::{Family, Unit, families};

/// What tells one task from another. Whose namespace and name are not known, as of one that was started on its node, has
/// them empty.
const TASK: &[&str] = &["task", "namespace", "name"];
const TASK_DIRECTION: &[&str] = &["task", "namespace", "name", "direction"];

families! {
    /// What is told of each task that runs.
    TASKS:
    /// Which it is.
    TASK_INFO = Family::info(
        "shaper_task_info", "A task that runs: which attempt of it, whose it is, and how it came here (launched, entered or adopted)",
        &["task", "namespace", "name", "attempt", "uid", "origin"]);
    /// CPU time.
    TASK_CPU = Family::counter(
        "shaper_task_cpu_seconds_total", Unit::Seconds, "CPU time", TASK);
    /// Throttled time.
    TASK_THROTTLED = Family::counter(
        "shaper_task_cpu_throttled_seconds_total", Unit::Seconds, "Time for which its CPU limit stopped it", TASK);
    /// Waiting for a CPU.
    TASK_RUN_QUEUE = Family::histogram(
        "shaper_task_cpu_run_queue_delay_seconds", Unit::Seconds,
        "How long its threads waited for a CPU once they could run, since this agent began; the sum is reckoned from the \
         middle of buckets that are a quarter wide",
        TASK);
    /// Loans in force.
    TASK_LENT = Family::gauge(
        "shaper_task_cpu_lent_cores", Unit::Cores, "CPU that it is lent now beyond its limit", TASK);
    /// Loans.
    TASK_LOANS = Family::counter(
        "shaper_task_cpu_loans_total", Unit::None, "How often it was lent CPU time", TASK);
    /// Quota warnings.
    TASK_QUOTA_WARNINGS = Family::counter(
        "shaper_task_cpu_quota_warnings_total", Unit::None,
        "How often the kernel told that its CPU quota was about to be used up", TASK);
    /// Memory.
    TASK_MEMORY = Family::gauge(
        "shaper_task_memory_bytes", Unit::Bytes, "Memory that is charged to it", TASK);
    /// The most of it.
    TASK_MEMORY_PEAK = Family::gauge(
        "shaper_task_memory_peak_bytes", Unit::Bytes, "The most memory that ever was charged to it", TASK);
    /// Kills.
    TASK_OOM_KILLS = Family::counter(
        "shaper_task_oom_kills_total", Unit::None, "Processes of it that the kernel killed for want of memory", TASK);
    /// GPU memory.
    TASK_GPU_MEMORY = Family::gauge(
        "shaper_task_gpu_memory_bytes", Unit::Bytes, "Memory of a GPU card that its processes have, as the driver says",
        &["task", "namespace", "name", "card"]);
    /// Its limit.
    TASK_GPU_MEMORY_LIMIT = Family::gauge(
        "shaper_task_gpu_memory_limit_bytes", Unit::Bytes,
        "Memory of a GPU card that it may have, and what holds it to that: dmem, nvml-cgroup, mig, mps or watchdog",
        &["task", "namespace", "name", "card", "enforced_by"]);
    /// Idle memory.
    TASK_RECLAIMED = Family::counter(
        "shaper_task_memory_idle_reclaimed_bytes_total", Unit::Bytes,
        "Memory that was taken away because it was idle, since this agent began", TASK);
    /// Stalls.
    TASK_STALLED = Family::counter(
        "shaper_task_pressure_stalled_seconds_total", Unit::Seconds,
        "Time in which some of it, or all of it (full), waited for a resource: cpu, memory or io, by the kernel's pressure \
         stall information",
        &["task", "namespace", "name", "resource", "kind"]);
    /// Alarms.
    TASK_ALARMS = Family::counter(
        "shaper_task_pressure_alarms_total", Unit::None,
        "How often the kernel told that it waited for memory or block IO for a tenth of the time", TASK);
    /// Traffic, bytes.
    TASK_NETWORK = Family::counter(
        "shaper_task_network_bytes_total", Unit::Bytes, "Bytes on the wire that its sockets sent (egress) or received (ingress)",
        TASK_DIRECTION);
    /// Traffic, packets.
    TASK_PACKETS = Family::counter(
        "shaper_task_network_packets_total", Unit::None, "Packets that its sockets sent (egress) or received (ingress)",
        TASK_DIRECTION);
    /// Drops.
    TASK_DROPS = Family::counter(
        "shaper_task_network_dropped_buffers_total", Unit::None,
        "Buffers of its sockets that the kernel threw away on their way out, those held back included", TASK);
    /// Held back.
    TASK_HELD = Family::counter(
        "shaper_task_network_held_bytes_total", Unit::Bytes,
        "What was beyond its ceiling and held back: of TCP, which sends it again, and of all else (other), which is lost",
        &["task", "namespace", "name", "transport"]);
    /// Sent again.
    TASK_RETRANSMITS = Family::counter(
        "shaper_task_network_retransmitted_segments_total", Unit::None, "TCP segments that were sent again", TASK);
    /// Block IO, bytes.
    TASK_IO = Family::counter(
        "shaper_task_io_bytes_total", Unit::Bytes, "Block IO, read or write, on devices that lie on no other", TASK_DIRECTION);
    /// Block IO, operations.
    TASK_IO_OPERATIONS = Family::counter(
        "shaper_task_io_operations_total", Unit::None,
        "Operations of block IO, read or write, on devices that lie on no other", TASK_DIRECTION);
    /// CPU limit.
    TASK_LIMIT_CPU = Family::gauge(
        "shaper_task_limit_cpu_cores", Unit::Cores,
        "CPU that it may use now: its limit, or what it is granted; not there where it has none", TASK);
    /// Memory limit.
    TASK_LIMIT_MEMORY = Family::gauge(
        "shaper_task_limit_memory_bytes", Unit::Bytes, "Memory that it may use now; not there where it has no limit", TASK);
    /// Network limit.
    TASK_LIMIT_NETWORK = Family::gauge(
        "shaper_task_limit_network_bytes_per_second", Unit::BytesPerSecond,
        "What it may send (egress) or receive (ingress) at most; not there where it has no limit", TASK_DIRECTION);
    /// Network grant.
    TASK_GRANT_NETWORK = Family::gauge(
        "shaper_task_grant_network_bytes_per_second", Unit::BytesPerSecond,
        "What it may send now, where the node divides its network", TASK);
    /// IO limit.
    TASK_LIMIT_IO = Family::gauge(
        "shaper_task_limit_io_operations_per_second", Unit::OperationsPerSecond,
        "Block IO that it may do at most; not there where it has no limit", TASK);
    /// CPU request.
    TASK_REQUEST_CPU = Family::gauge(
        "shaper_task_request_cpu_cores", Unit::Cores, "CPU that it was promised; of the broker's tasks", TASK);
    /// Memory request.
    TASK_REQUEST_MEMORY = Family::gauge(
        "shaper_task_request_memory_bytes", Unit::Bytes, "Memory that it was promised; of the broker's tasks", TASK);
    /// Differences.
    TASK_DIFFERS = Family::gauge(
        "shaper_task_knobs_differing", Unit::None,
        "Knobs of it that hold what somebody else wrote, and not what shaper decided", TASK);
}

families! {
    /// What is told of the node.
    NODE:
    /// Which node.
    AGENT_INFO = Family::info(
        "shaper_agent_info", "The node: its name, its kernel, and where its controllers are", &["node", "kernel", "cgroups"]);
    /// Tasks.
    AGENT_TASKS = Family::gauge(
        "shaper_agent_tasks", Unit::None, "Tasks that are here, by where they are in their life: running or ended", &["phase"]);
    /// Tasks left out.
    AGENT_SERIES_DROPPED = Family::counter(
        "shaper_agent_task_series_dropped_total", Unit::None,
        "Tasks whose series were left out, summed over scrapes: of more than 1,000 that run, those are shown that use most", &[]);
    /// CPUs.
    MACHINE_CPUS = Family::gauge("shaper_machine_cpus", Unit::None, "CPUs of the machine that are online", &[]);
    /// CPU in use.
    MACHINE_CPU_USED = Family::gauge(
        "shaper_machine_cpu_used_cores", Unit::Cores, "CPU that everything on the machine used over the last second", &[]);
    /// Memory.
    MACHINE_MEMORY = Family::gauge("shaper_machine_memory_bytes", Unit::Bytes, "Memory of the machine", &[]);
    /// Memory that is free.
    MACHINE_MEMORY_AVAILABLE = Family::gauge(
        "shaper_machine_memory_available_bytes", Unit::Bytes, "Memory of the machine that could be had without swapping", &[]);
    /// GPU cards.
    MACHINE_GPU = Family::info(
        "shaper_machine_gpu_info", "A GPU card: its number here, its UUID or device, and its model", &["card", "id", "model"]);
    /// Whether they can be read.
    MACHINE_GPU_READABLE = Family::gauge(
        "shaper_machine_gpu_readable", Unit::None, "Whether the driver tells of the card; not, if it was lost", &["card"]);
    /// Their memory.
    MACHINE_GPU_MEMORY = Family::gauge(
        "shaper_machine_gpu_memory_bytes", Unit::Bytes, "Memory of the card", &["card"]);
    /// What of it is used.
    MACHINE_GPU_MEMORY_USED = Family::gauge(
        "shaper_machine_gpu_memory_used_bytes", Unit::Bytes, "Of that, what is in use, by whomever", &["card"]);
    /// How busy they are.
    MACHINE_GPU_BUSY = Family::gauge(
        "shaper_machine_gpu_busy_ratio", Unit::None, "Part of the last moments in which the card was busy, from 0 to 1", &["card"]);
    /// How hot.
    MACHINE_GPU_TEMPERATURE = Family::gauge(
        "shaper_machine_gpu_temperature_celsius", Unit::None, "Temperature of the card", &["card"]);
    /// Errors.
    MACHINE_GPU_ERRORS = Family::counter(
        "shaper_machine_gpu_errors_total", Unit::None,
        "Errors (XID) of the card that the driver told of since this agent began", &["card"]);
    /// Stalls.
    MACHINE_STALLED = Family::counter(
        "shaper_machine_pressure_stalled_seconds_total", Unit::Seconds,
        "Time in which something on the machine, or all of it (full), waited for a resource: cpu, memory or io",
        &["resource", "kind"]);
    /// Capacity: CPU.
    AGENT_CPU = Family::gauge(
        "shaper_agent_capacity_cpu_cores", Unit::Cores, "CPU that the node has for the broker's tasks", &[]);
    /// Capacity: memory.
    AGENT_MEMORY = Family::gauge(
        "shaper_agent_capacity_memory_bytes", Unit::Bytes, "Memory that the node has for the broker's tasks", &[]);
    /// Capacity: network.
    AGENT_NETWORK = Family::gauge(
        "shaper_agent_capacity_network_bytes_per_second", Unit::BytesPerSecond,
        "Network that the node has for the broker's tasks; not there where nobody has said it", &[]);
    /// Loans: how much there is.
    AGENT_POOL = Family::gauge(
        "shaper_agent_cpu_pool_size_cores", Unit::Cores,
        "CPU that can be lent to tasks that are about to reach their limit", &[]);
    /// Loans: how much is lent.
    AGENT_POOL_LENT = Family::gauge(
        "shaper_agent_cpu_pool_lent_cores", Unit::Cores, "CPU that is lent now", &[]);
    /// Uplinks.
    AGENT_UPLINKS = Family::counter(
        "shaper_agent_uplink_sent_bytes_total", Unit::Bytes,
        "What left through the uplinks: for tasks, for what is not managed, and without a socket (nobody)", &["whose"]);
    /// The broker.
    AGENT_CONNECTED = Family::gauge(
        "shaper_agent_broker_connected", Unit::None, "Whether there is a session with the broker; not there where none is wanted",
        &[]);
    /// Policies.
    AGENT_POLICIES = Family::gauge(
        "shaper_agent_policies_revision", Unit::None, "The revision of the policies that are in force here", &[]);
    /// Decisions.
    AGENT_DECISIONS = Family::counter(
        "shaper_agent_decisions_total", Unit::None,
        "What was decided about tasks here: grew, shrunk, reclaimed, evicted", &["decision"]);
    /// What failed.
    AGENT_FAILURES = Family::counter(
        "shaper_agent_adjustments_failed_total", Unit::None, "Decisions of the fast loop that could not be carried out", &[]);
    /// Second writers.
    AGENT_SECOND_WRITES = Family::counter(
        "shaper_agent_second_writes_total", Unit::None,
        "Changes by somebody else of knobs that shaper holds, and what is done about them: hold, yield or report", &["policy"]);
    /// Ledger.
    AGENT_LEDGER = Family::counter(
        "shaper_agent_ledger_entries_total", Unit::None, "Entries of the ledger of this node, since it was begun", &[]);
    /// The loop.
    AGENT_TICK = Family::histogram(
        "shaper_agent_tick_seconds", Unit::Seconds, "How long each turn of the agent's loop took; there are ten a second", &[]);
    /// Stocks.
    AGENT_STOCKS = Family::counter(
        "shaper_agent_stocks_total", Unit::None, "How often all that runs was measured; once a second", &[]);
    /// Features.
    AGENT_FEATURE = Family::gauge(
        "shaper_agent_feature_available", Unit::None,
        "Whether the kernel has what shaper uses, as `shaper doctor` says it", &["feature"]);
    /// Sources.
    AGENT_SOURCE = Family::gauge(
        "shaper_agent_measured_by", Unit::None,
        "Which source measures what here: program, cgroup-file or none. Always 1", &["measure", "source"]);
    /// Whether anything is attached.
    AGENT_ATTACHED = Family::gauge(
        "shaper_agent_programs_attached", Unit::None,
        "Whether the kernel programs are attached; they are from the first task on", &[]);
    /// What is not.
    AGENT_LEFT_OUT = Family::gauge(
        "shaper_agent_program_left_out", Unit::None,
        "A kernel program that could not be attached, or a measurement that failed its test (self-test). Always 1", &["program"]);
    /// Lost events.
    AGENT_EVENTS_LOST = Family::counter(
        "shaper_agent_events_lost_total", Unit::None, "Events of the kernel that came faster than they were read", &[]);
    /// Missed runs.
    AGENT_RUNS_MISSED = Family::counter(
        "shaper_agent_program_runs_missed_total", Unit::None,
        "Times that a kernel program did not run because it ran already on that CPU", &[]);
    /// IO without a task.
    AGENT_IO_UNCOUNTED = Family::counter(
        "shaper_agent_io_uncounted_total", Unit::None, "Operations of block IO that the table had no room for", &[]);
    /// Cgroups without an entry.
    AGENT_WITHOUT_ENTRY = Family::gauge(
        "shaper_agent_cgroups_without_entry", Unit::None, "Cgroups below managed ones that the table had no room for", &[]);
}
