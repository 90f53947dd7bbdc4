//! The dashboards: of the cluster, of a node, of a task. In queries `OF` stands for what was chosen at the top, and `I` for the
//! interval that Grafana finds right for what is shown.

use serde_json::Value;

use super::panel::{Panel, Unit, Variable, board};

const JOB_BROKER: Variable = Variable { name: "job", values: "label_values(shaper_broker_leads, job)" };
const JOB_AGENT: Variable = Variable { name: "job", values: "label_values(shaper_agent_info, job)" };
const INSTANCE: Variable =
    Variable { name: "instance", values: "label_values(shaper_agent_info{job=~\"$job\"}, instance)" };
const NAMESPACE: Variable =
    Variable { name: "namespace", values: "label_values(shaper_task_info{job=~\"$job\"}, namespace)" };
const TASK: Variable = Variable {
    name: "task",
    values: "label_values(shaper_task_info{job=~\"$job\", namespace=~\"$namespace\"}, task)",
};

/// The broker's view.
pub(super) fn cluster() -> Value {
    use Unit::{Bytes, BytesPerSecond, Cores, Count, PerSecond, Seconds};
    let panels = [
        Panel::number(
            "Brokers that lead",
            "One does. None: nothing is placed. The runbook has what to do.",
            Count,
            ("sum(shaper_broker_leads{OF})", "lead"),
        ),
        Panel::number(
            "Nodes connected",
            "Nodes whose agents have a session. Tasks on others run on.",
            Count,
            ("sum(shaper_broker_nodes{OF, state=\"connected\"})", "connected"),
        ),
        Panel::number(
            "Nodes lost",
            "Nodes that are known and not connected.",
            Count,
            ("sum(shaper_broker_nodes{OF, state=\"lost\"})", "lost"),
        ),
        Panel::number(
            "Tasks running",
            "As their nodes said.",
            Count,
            ("sum(shaper_broker_tasks{OF, phase=\"running\"})", "running"),
        ),
        Panel::number(
            "Tasks waiting",
            "On no node yet.",
            Count,
            ("sum(shaper_broker_tasks{OF, phase=\"pending\"})", "waiting"),
        ),
        Panel::number(
            "Placement, p99 of the last hour",
            "From submission to the first node.",
            Seconds,
            (
                "histogram_quantile(0.99, sum by (le) (increase(shaper_broker_placement_seconds_bucket{OF}[1h])))",
                "p99",
            ),
        ),
        Panel::graph(
            "Tasks by phase",
            "Tasks that are over are remembered for a while (--keep-ended), and left out here.",
            Count,
            &[("sum by (phase) (shaper_broker_tasks{OF, phase!=\"over\"})", "{{phase}}")],
        ),
        Panel::graph(
            "Waiting for",
            "What tasks that wait lack: large-nodes means that no node could ever hold them.",
            Count,
            &[("sum by (lack) (shaper_broker_waiting_tasks{OF})", "{{lack}}")],
        ),
        Panel::graph(
            "Waiting for so long",
            "Since the submission of the task that was submitted first of those that wait.",
            Seconds,
            &[("max(shaper_broker_waiting_longest_seconds{OF})", "the first")],
        ),
        Panel::graph(
            "Decisions",
            "What the broker and the agents decided about tasks.",
            PerSecond,
            &[("sum by (decision) (rate(shaper_broker_decisions_total{OF}[I]))", "{{decision}}")],
        ),
        Panel::graph(
            "CPU",
            "What connected nodes have, and what of it is promised.",
            Cores,
            &[
                ("sum(shaper_broker_capacity_cpu_cores{OF})", "capacity"),
                ("sum(shaper_broker_reserved_cpu_cores{OF})", "reserved"),
                ("sum(shaper_broker_node_used_cpu_cores{OF})", "used"),
            ],
        ),
        Panel::graph(
            "Memory",
            "What connected nodes have, and what of it is promised.",
            Bytes,
            &[
                ("sum(shaper_broker_capacity_memory_bytes{OF})", "capacity"),
                ("sum(shaper_broker_reserved_memory_bytes{OF})", "reserved"),
            ],
        ),
        Panel::graph(
            "Network",
            "Of nodes whose network is known.",
            BytesPerSecond,
            &[
                ("sum(shaper_broker_capacity_network_bytes_per_second{OF})", "capacity"),
                ("sum(shaper_broker_reserved_network_bytes_per_second{OF})", "reserved"),
            ],
        ),
        Panel::graph(
            "CPU reserved by node",
            "Share of each node's CPU that is promised.",
            Unit::Share,
            &[(
                "shaper_broker_node_reserved_cpu_cores{OF} / shaper_broker_node_capacity_cpu_cores{OF}",
                "{{node}}",
            )],
        ),
        Panel::graph(
            "CPU used by node",
            "Share of each node's CPU that is used, as its agent says.",
            Unit::Share,
            &[(
                "shaper_broker_node_used_cpu_cores{OF} / shaper_broker_node_capacity_cpu_cores{OF}",
                "{{node}}",
            )],
        ),
        Panel::graph(
            "Memory reserved by node",
            "Share of each node's memory that is promised.",
            Unit::Share,
            &[(
                "shaper_broker_node_reserved_memory_bytes{OF} / shaper_broker_node_capacity_memory_bytes{OF}",
                "{{node}}",
            )],
        ),
        Panel::graph(
            "Tasks by node",
            "Tasks that are assigned to each node; 0 of a node that is not connected can be more in truth.",
            Count,
            &[("shaper_broker_node_tasks{OF}", "{{node}}")],
        ),
        Panel::graph(
            "Preemptions",
            "Tasks that were asked to end to make room.",
            PerSecond,
            &[("sum(rate(shaper_broker_preemptions_total{OF}[I]))", "asked to end")],
        ),
        Panel::graph(
            "Commits",
            "How long it takes to make a decision durable. Each answer waits for one.",
            Seconds,
            &[
                (
                    "histogram_quantile(0.5, sum by (le) (rate(shaper_broker_commit_seconds_bucket{OF}[I])))",
                    "p50",
                ),
                (
                    "histogram_quantile(0.99, sum by (le) (rate(shaper_broker_commit_seconds_bucket{OF}[I])))",
                    "p99",
                ),
            ],
        ),
        Panel::graph(
            "Rows",
            "Rows that are made durable.",
            PerSecond,
            &[("sum(rate(shaper_broker_committed_rows_total{OF}[I]))", "rows")],
        ),
        Panel::graph(
            "Requests that wait",
            "For the thread that decides. At 1,024 clients are refused.",
            Count,
            &[("sum(shaper_broker_queued_requests{OF})", "waiting")],
        ),
        Panel::graph(
            "CPU of the brokers",
            "Of each process.",
            Cores,
            &[("rate(process_cpu_seconds_total{OF}[I])", "{{instance}}")],
        ),
        Panel::graph(
            "Memory of the brokers",
            "Of each process.",
            Bytes,
            &[("process_resident_memory_bytes{OF}", "{{instance}}")],
        ),
        Panel::graph(
            "Policies",
            "How many there are, and the latest revision: it grows with each change.",
            Count,
            &[
                ("sum(shaper_broker_policies{OF})", "policies"),
                ("max(shaper_broker_policies_revision{OF})", "revision"),
            ],
        ),
        Panel::graph(
            "Epoch and sessions",
            "The epoch grows when a broker takes over.",
            Count,
            &[("max(shaper_broker_epoch{OF})", "epoch"), ("sum(shaper_broker_sessions{OF})", "sessions")],
        ),
    ];
    board(
        "shaper-cluster",
        "shaper: cluster",
        "Tasks, nodes and the brokers that bring them together.",
        "job=~\"$job\"",
        &[JOB_BROKER],
        &panels,
    )
}

/// An agent's view of its machine, and of itself.
pub(super) fn node() -> Value {
    use Unit::{Bytes, BytesPerSecond, Cores, Count, PerSecond, Seconds, Share};
    let panels = [
        Panel::number("Agents", "Those that answer.", Count, ("count(shaper_agent_info{OF})", "agents")),
        Panel::number(
            "Tasks running",
            "On these nodes.",
            Count,
            ("sum(shaper_agent_tasks{OF, phase=\"running\"})", "running"),
        ),
        Panel::number(
            "Sessions with the broker",
            "Without one, limits hold and tasks run on.",
            Count,
            ("sum(shaper_agent_broker_connected{OF})", "connected"),
        ),
        Panel::number(
            "Features missing",
            "What the kernels lack of what shaper uses: `shaper doctor` says what that means.",
            Count,
            ("sum(1 - shaper_agent_feature_available{OF})", "missing"),
        ),
        Panel::number(
            "Knobs that differ",
            "Knobs that hold what somebody else wrote.",
            Count,
            ("sum(shaper_task_knobs_differing{OF})", "differ"),
        ),
        Panel::number(
            "Tasks without series",
            "Left out of scrapes in the last hour: more than 1,000 run.",
            Count,
            ("sum(increase(shaper_agent_task_series_dropped_total{OF}[1h]))", "left out"),
        ),
        Panel::graph(
            "CPU",
            "What everything on the machine uses, what its tasks use, and what there is.",
            Cores,
            &[
                ("shaper_machine_cpu_used_cores{OF}", "{{instance}} machine"),
                ("sum by (instance) (rate(shaper_task_cpu_seconds_total{OF}[I]))", "{{instance}} tasks"),
                ("shaper_machine_cpus{OF}", "{{instance}} CPUs"),
                ("shaper_agent_capacity_cpu_cores{OF}", "{{instance}} for the broker"),
            ],
        ),
        Panel::graph(
            "Memory",
            "What could be had without swapping, what tasks have, and what there is.",
            Bytes,
            &[
                ("shaper_machine_memory_available_bytes{OF}", "{{instance}} available"),
                ("sum by (instance) (shaper_task_memory_bytes{OF})", "{{instance}} tasks"),
                ("shaper_machine_memory_bytes{OF}", "{{instance}} machine"),
                ("shaper_agent_capacity_memory_bytes{OF}", "{{instance}} for the broker"),
            ],
        ),
        Panel::graph(
            "Pressure",
            "Share of the time in which something waited for a resource (some), or all of it (full).",
            Share,
            &[(
                "rate(shaper_machine_pressure_stalled_seconds_total{OF}[I])",
                "{{instance}} {{resource}} {{kind}}",
            )],
        ),
        Panel::graph(
            "Uplinks",
            "What left the machine, and for whom.",
            BytesPerSecond,
            &[("rate(shaper_agent_uplink_sent_bytes_total{OF}[I])", "{{instance}} {{whose}}")],
        ),
        Panel::graph(
            "CPU that is lent",
            "To tasks that are about to reach their limit, and what can be.",
            Cores,
            &[
                ("shaper_agent_cpu_pool_lent_cores{OF}", "{{instance}} lent"),
                ("shaper_agent_cpu_pool_size_cores{OF}", "{{instance}} pool"),
            ],
        ),
        Panel::graph(
            "Decisions",
            "What the agents decided by themselves.",
            PerSecond,
            &[("sum by (decision) (rate(shaper_agent_decisions_total{OF}[I]))", "{{decision}}")],
        ),
        Panel::graph(
            "Second writers",
            "Changes by somebody else of what shaper holds.",
            PerSecond,
            &[(
                "sum by (instance, policy) (rate(shaper_agent_second_writes_total{OF}[I]))",
                "{{instance}} {{policy}}",
            )],
        ),
        Panel::graph(
            "Entries of the ledger",
            "Each is a change of a limit.",
            PerSecond,
            &[("rate(shaper_agent_ledger_entries_total{OF}[I])", "{{instance}}")],
        ),
        Panel::graph(
            "The loop, p99",
            "How long a turn takes; there are ten a second.",
            Seconds,
            &[(
                "histogram_quantile(0.99, sum by (le, instance) (rate(shaper_agent_tick_seconds_bucket{OF}[I])))",
                "{{instance}}",
            )],
        ),
        Panel::graph(
            "CPU of the agents",
            "What it costs to have shaper on a node.",
            Cores,
            &[("rate(process_cpu_seconds_total{OF}[I])", "{{instance}}")],
        ),
        Panel::graph(
            "Memory of the agents",
            "What it costs to have shaper on a node.",
            Bytes,
            &[("process_resident_memory_bytes{OF}", "{{instance}}")],
        ),
        Panel::graph(
            "Measurement lost",
            "Events that came too fast, runs of programs that were left out, and block IO without a task.",
            PerSecond,
            &[
                ("rate(shaper_agent_events_lost_total{OF}[I])", "{{instance}} events"),
                ("rate(shaper_agent_program_runs_missed_total{OF}[I])", "{{instance}} runs"),
                ("rate(shaper_agent_io_uncounted_total{OF}[I])", "{{instance}} block IO"),
            ],
        ),
        Panel::graph(
            "Adjustments that failed",
            "Decisions that could not be carried out: the log says which, and why.",
            PerSecond,
            &[("rate(shaper_agent_adjustments_failed_total{OF}[I])", "{{instance}}")],
        ),
    ];
    board(
        "shaper-node",
        "shaper: node",
        "What a machine has, what its tasks use, and what its agent does.",
        "job=~\"$job\", instance=~\"$instance\"",
        &[JOB_AGENT, INSTANCE],
        &panels,
    )
}

/// What tasks use, against what they may.
pub(super) fn task() -> Value {
    use Unit::{Bytes, BytesPerSecond, Cores, Count, PerSecond, Seconds, Share};
    let panels = [
        Panel::graph(
            "CPU",
            "What it uses, what it may now, and what it was promised (of the broker's tasks).",
            Cores,
            &[
                ("rate(shaper_task_cpu_seconds_total{OF}[I])", "{{task}} used"),
                ("shaper_task_limit_cpu_cores{OF}", "{{task}} limit"),
                ("shaper_task_request_cpu_cores{OF}", "{{task}} promised"),
            ],
        ),
        Panel::graph(
            "Throttled",
            "Share of the time in which its CPU limit stopped it.",
            Share,
            &[("rate(shaper_task_cpu_throttled_seconds_total{OF}[I])", "{{task}}")],
        ),
        Panel::graph(
            "Waiting for a CPU, p99",
            "Once its threads could run: others were on the CPUs.",
            Seconds,
            &[(
                "histogram_quantile(0.99, sum by (le, task) (rate(shaper_task_cpu_run_queue_delay_seconds_bucket{OF}[I])))",
                "{{task}}",
            )],
        ),
        Panel::graph(
            "Memory",
            "What is charged to it, the most that ever was, what it may, and what it was promised.",
            Bytes,
            &[
                ("shaper_task_memory_bytes{OF}", "{{task}} used"),
                ("shaper_task_memory_peak_bytes{OF}", "{{task}} peak"),
                ("shaper_task_limit_memory_bytes{OF}", "{{task}} limit"),
                ("shaper_task_request_memory_bytes{OF}", "{{task}} promised"),
            ],
        ),
        Panel::graph(
            "Pressure",
            "Share of the time in which some of it, or all of it (full), waited for a resource.",
            Share,
            &[("rate(shaper_task_pressure_stalled_seconds_total{OF}[I])", "{{task}} {{resource}} {{kind}}")],
        ),
        Panel::graph(
            "Killed for want of memory",
            "Processes that the kernel killed, in the last hour.",
            Count,
            &[("increase(shaper_task_oom_kills_total{OF}[1h])", "{{task}}")],
        ),
        Panel::graph(
            "Network",
            "What it sends and receives, and what it may. One bit is an eighth of a byte.",
            BytesPerSecond,
            &[
                ("rate(shaper_task_network_bytes_total{OF}[I])", "{{task}} {{direction}}"),
                ("shaper_task_limit_network_bytes_per_second{OF}", "{{task}} {{direction}} limit"),
            ],
        ),
        Panel::graph(
            "Held back",
            "What was beyond its ceiling: TCP sends it again, all else is lost.",
            BytesPerSecond,
            &[("rate(shaper_task_network_held_bytes_total{OF}[I])", "{{task}} {{transport}}")],
        ),
        Panel::graph(
            "Sent again",
            "TCP segments.",
            PerSecond,
            &[("rate(shaper_task_network_retransmitted_segments_total{OF}[I])", "{{task}}")],
        ),
        Panel::graph(
            "Block IO, bytes",
            "On devices that lie on no other.",
            BytesPerSecond,
            &[("rate(shaper_task_io_bytes_total{OF}[I])", "{{task}} {{direction}}")],
        ),
        Panel::graph(
            "Block IO, operations",
            "On devices that lie on no other.",
            PerSecond,
            &[("rate(shaper_task_io_operations_total{OF}[I])", "{{task}} {{direction}}")],
        ),
        Panel::graph(
            "CPU that it is lent",
            "Beyond its limit, for a moment.",
            Cores,
            &[("shaper_task_cpu_lent_cores{OF}", "{{task}}")],
        ),
        Panel::graph(
            "Knobs that differ",
            "Knobs of it that hold what somebody else wrote.",
            Count,
            &[("shaper_task_knobs_differing{OF}", "{{task}}")],
        ),
        Panel::graph(
            "Attempts",
            "Which attempt of it runs, on which node: a line that ends is an attempt that ended.",
            Count,
            &[("shaper_task_info{OF}", "{{task}} attempt {{attempt}} on {{instance}}")],
        ),
    ];
    board(
        "shaper-task",
        "shaper: task",
        "What tasks use, against what they may and were promised.",
        "job=~\"$job\", task=~\"$task\"",
        &[JOB_AGENT, NAMESPACE, TASK],
        &panels,
    )
}
