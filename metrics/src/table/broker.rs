//! What a broker has to say. One that stands by says nothing of the cluster.

use super::{Family, Unit, families};

families! {
    /// What is told of the cluster.
    BROKER:
    /// Which store.
    BROKER_INFO = Family::info("shaper_broker_info", "Where this broker keeps what it knows", &["store"]);
    /// Whether it leads.
    LEADS = Family::gauge("shaper_broker_leads", Unit::None, "Whether this broker leads; one alone does", &[]);
    /// Epoch.
    EPOCH = Family::gauge("shaper_broker_epoch", Unit::None, "The epoch of its directives", &[]);
    /// Tasks.
    TASKS = Family::gauge(
        "shaper_broker_tasks", Unit::None,
        "Tasks by where they are: pending, nominated (a place is being cleared), starting, running, over", &["phase"]);
    /// Waiting.
    WAITING = Family::gauge(
        "shaper_broker_waiting_tasks", Unit::None,
        "Tasks that are pending, by what they lack: nodes (none is connected), large-nodes (none could ever hold it), \
         room (now), backoff (it does not go back to a node for a while) or unknown (nobody has looked yet)",
        &["lack"]);
    /// For how long.
    WAITING_LONGEST = Family::gauge(
        "shaper_broker_waiting_longest_seconds", Unit::Seconds,
        "Since when the task has been submitted that was submitted first of those that are pending; 0 where none is", &[]);
    /// Nodes.
    NODES = Family::gauge("shaper_broker_nodes", Unit::None, "Nodes by state: connected, cordoned (of these) or lost", &["state"]);
    /// Sessions.
    SESSIONS = Family::gauge("shaper_broker_sessions", Unit::None, "Sessions of agents", &[]);
    /// Capacity: CPU.
    CPU = Family::gauge(
        "shaper_broker_capacity_cpu_cores", Unit::Cores, "CPU of the nodes that are connected", &[]);
    /// Reserved: CPU.
    CPU_RESERVED = Family::gauge(
        "shaper_broker_reserved_cpu_cores", Unit::Cores, "Of that, what is promised to tasks", &[]);
    /// Capacity: memory.
    MEMORY = Family::gauge(
        "shaper_broker_capacity_memory_bytes", Unit::Bytes, "Memory of the nodes that are connected", &[]);
    /// Reserved: memory.
    MEMORY_RESERVED = Family::gauge(
        "shaper_broker_reserved_memory_bytes", Unit::Bytes, "Of that, what is promised to tasks", &[]);
    /// Capacity: network.
    NETWORK = Family::gauge(
        "shaper_broker_capacity_network_bytes_per_second", Unit::BytesPerSecond,
        "Network of the nodes that are connected, as far as it is known", &[]);
    /// Reserved: network.
    NETWORK_RESERVED = Family::gauge(
        "shaper_broker_reserved_network_bytes_per_second", Unit::BytesPerSecond,
        "What is promised to tasks of the network of nodes that are connected", &[]);
    /// A node.
    NODE_CONNECTED = Family::gauge(
        "shaper_broker_node_connected", Unit::None, "Whether the agent of the node has a session", &["node"]);
    /// Its tasks.
    NODE_TASKS = Family::gauge("shaper_broker_node_tasks", Unit::None, "Tasks that are assigned to the node", &["node"]);
    /// Its capacity: CPU.
    NODE_CPU = Family::gauge("shaper_broker_node_capacity_cpu_cores", Unit::Cores, "CPU of the node", &["node"]);
    /// Its reserved CPU.
    NODE_CPU_RESERVED = Family::gauge(
        "shaper_broker_node_reserved_cpu_cores", Unit::Cores, "Of that, what is promised to tasks", &["node"]);
    /// Its CPU use.
    NODE_CPU_USED = Family::gauge(
        "shaper_broker_node_used_cpu_cores", Unit::Cores, "Of that, what is used, as its agent said last", &["node"]);
    /// Its capacity: memory.
    NODE_MEMORY = Family::gauge(
        "shaper_broker_node_capacity_memory_bytes", Unit::Bytes, "Memory of the node", &["node"]);
    /// Its reserved memory.
    NODE_MEMORY_RESERVED = Family::gauge(
        "shaper_broker_node_reserved_memory_bytes", Unit::Bytes, "Of that, what is promised to tasks", &["node"]);
    /// Nodes left out.
    NODE_SERIES_DROPPED = Family::counter(
        "shaper_broker_node_series_dropped_total", Unit::None,
        "Nodes whose series were left out, summed over scrapes: of more than 1,000, those are shown that came first", &[]);
    /// Decisions.
    DECISIONS = Family::counter(
        "shaper_broker_decisions_total", Unit::None,
        "What this broker decided about tasks since it leads, such as placed, pending, scale_out, evicted, lost", &["decision"]);
    /// Placement.
    PLACEMENT = Family::histogram(
        "shaper_broker_placement_seconds", Unit::Seconds,
        "From the submission of a task to its first node, by the broker's clock", &[]);
    /// Preemption.
    PREEMPTIONS = Family::counter(
        "shaper_broker_preemptions_total", Unit::None, "Tasks that were asked to end to make room for others", &[]);
    /// Commits.
    COMMIT = Family::histogram(
        "shaper_broker_commit_seconds", Unit::Seconds, "How long it took to make a transaction durable", &[]);
    /// Rows.
    ROWS = Family::counter(
        "shaper_broker_committed_rows_total", Unit::None, "Rows that were made durable", &[]);
    /// Size of a group of nodes.
    SCALE_TARGET = Family::gauge(
        "shaper_broker_scale_target_nodes", Unit::None,
        "Nodes that the provider of the group works towards, as far as is known", &["group"]);
    /// Its nodes.
    SCALE_NODES = Family::gauge(
        "shaper_broker_scale_nodes", Unit::None,
        "Nodes of the group: here, coming (asked for) or leaving", &["group", "state"]);
    /// Its bound.
    SCALE_MAX = Family::gauge("shaper_broker_scale_max_nodes", Unit::None, "The most nodes that the group may have", &["group"]);
    /// Its failures.
    SCALE_FAILURES = Family::gauge(
        "shaper_broker_scale_failures", Unit::None,
        "Failures in a row of the provider of the group; it is left alone for a while after each", &["group"]);
    /// Who waits for it.
    SCALE_WAITING = Family::gauge(
        "shaper_broker_scale_waiting_tasks", Unit::None, "Tasks that nodes of the group are asked for", &["group"]);
    /// Queue.
    QUEUE = Family::gauge(
        "shaper_broker_queued_requests", Unit::None, "Requests and reports that wait for the thread that decides", &[]);
    /// Policies.
    POLICIES = Family::gauge("shaper_broker_policies", Unit::None, "Policies", &[]);
    /// Their revision.
    POLICIES_REVISION = Family::gauge(
        "shaper_broker_policies_revision", Unit::None, "The latest revision of the policies", &[]);
}
