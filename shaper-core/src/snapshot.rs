//! What a node and its tasks use now, as measured: one reading, complete and typed.
//!
//! Totals count from when a task came under management; rates and quantiles are of the interval that the
//! snapshot names. A field is `None` where nothing on this kernel can measure it, never 0.

use serde::{Deserialize, Serialize};

use crate::{
    gpu::{CardMemory, CardUsage},
    id::TaskId,
    limits::Limits,
    task::{Owner, Traffic, UnixNanos, Workload},
    units::{BitsPerSec, Bytes, Millicores},
};

/// Who says so: every figure of a snapshot comes from one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A kernel program of shaper's.
    Program,
    /// A file of the task's cgroup.
    CgroupFile,
    /// Nobody can say it here.
    None,
}

/// Where the figures of each kind come from on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// CPU time and switches.
    pub cpu: Source,
    /// Run-queue delay.
    pub run_queue: Source,
    /// Memory in use.
    pub memory: Source,
    /// Block IO: bytes and operations.
    pub io: Source,
    /// Block IO: latency.
    pub io_latency: Source,
    /// Traffic.
    pub network: Source,
    /// Pressure stall information.
    pub pressure: Source,
}

/// How long something took, over the interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// How often it happened.
    pub count: u64,
    /// The median, ns; the upper end of a bucket that is a fifth wide.
    pub p50_ns: u64,
    /// The 99th percentile, ns, likewise.
    pub p99_ns: u64,
}

/// Share of the time in which tasks waited for a resource, in hundredths of a per cent, averaged over ten
/// seconds: the kernel's pressure stall information.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pressure {
    /// At least one task waited.
    pub some_avg10: u32,
    /// All of them did.
    pub full_avg10: u32,
    /// Time in which at least one waited, since the cgroup exists, µs.
    pub some_total_us: u64,
    /// Time in which all of them did, µs.
    pub full_total_us: u64,
}

/// CPU of a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuUsage {
    /// Time on a CPU, ns, with what is running now.
    pub time_ns: u64,
    /// Used over the interval.
    pub now: Millicores,
    /// Switches away from it, a second.
    pub switches_per_sec: u64,
    /// Switches away from it while it wanted to go on, a second.
    pub preemptions_per_sec: u64,
    /// Of those: in favour of another task or of what is not managed.
    pub preemptions_by_others_per_sec: u64,
    /// Part of the interval in which its limit stopped it, in thousandths.
    pub throttled_permille: Option<u32>,
    /// How long its threads waited for a CPU once they could run.
    pub run_queue: Option<Latency>,
    /// Its pressure.
    pub pressure: Option<Pressure>,
    /// What it is lent now beyond its limit ([`crate::burst`]).
    pub lent: Millicores,
    /// How often it was lent something.
    pub loans: u64,
}

/// CPU time that a node lends to tasks that are about to reach their limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuPool {
    /// How much there is.
    pub size: Millicores,
    /// Of it: what is lent.
    pub lent: Millicores,
    /// Whether somebody is there to take it back if the agent cannot. Nothing is lent otherwise.
    pub has_warden: bool,
    /// From the kernel's warning to the raised quota read back, since the agent began.
    pub latency: Latency,
}

/// Memory of a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUsage {
    /// Charged to it now.
    pub now: Bytes,
    /// The most that ever was, where the kernel counts it.
    pub peak: Option<Bytes>,
    /// Processes that the kernel killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Taken away because it was idle ([`crate::idle`]), since the agent began; `None` where that is not done.
    pub idle_reclaimed: Option<Bytes>,
    /// Its pressure.
    pub pressure: Option<Pressure>,
}

/// One direction of block IO.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoCount {
    /// Bytes.
    pub bytes: u64,
    /// Operations, as the device saw them.
    pub operations: u64,
    /// Bytes a second over the interval.
    pub bytes_per_sec: u64,
    /// Operations a second over the interval.
    pub operations_per_sec: u64,
    /// From the request's start to its completion; what `io.max` holds back is not in it.
    pub latency: Option<Latency>,
}

/// Block IO of a task on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceUsage {
    /// `MAJOR:MINOR`.
    pub device: String,
    /// Its name, such as `nvme0n1`; empty where it is gone.
    pub name: String,
    /// It lies on other devices (a loop, device mapper or RAID device): the same IO is counted on those as well.
    pub stacked: bool,
    /// Read.
    pub read: IoCount,
    /// Written, when it reached the device: by whom the pages were made dirty, not by who wrote them back.
    pub write: IoCount,
}

/// One direction of traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCount {
    /// Bytes and packets on the wire.
    pub total: Traffic,
    /// Bits a second over the interval.
    pub now: BitsPerSec,
    /// Packets a second over the interval.
    pub packets_per_sec: u64,
    /// Packets that carried a congestion mark (ECN CE), in all.
    pub congestion_marks: u64,
}

/// Network of a task's sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetUsage {
    /// Sent.
    pub egress: NetCount,
    /// Received.
    pub ingress: NetCount,
    /// Of what was sent: what left through the node's uplinks.
    pub uplink_egress: Traffic,
    /// What it may send now, where the node divides its network.
    #[serde(default)]
    pub granted: Option<BitsPerSec>,
    /// Of TCP: what was beyond its ceiling and held back, in all. Its senders wait and send it again.
    pub streams_held: Traffic,
    /// The same of all else, which is lost.
    pub datagrams_held: Traffic,
    /// Buffers of its sockets that the kernel threw away on their way out, those held back included, in all: a buffer that
    /// would have become several segments counts once.
    pub drops: Option<u64>,
    /// TCP segments that were sent again, in all.
    pub retransmits: Option<u64>,
    /// Round-trip times of TCP, as acknowledgements show them.
    pub round_trip: Option<Latency>,
}

/// What one task uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskSnapshot {
    /// Its id.
    pub task_id: TaskId,
    /// Which run of it this is.
    pub attempt: u32,
    /// Whom it belongs to.
    pub owner: Owner,
    /// What it is an execution of, where somebody has said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// What it may use.
    pub limits: Limits,
    /// CPU.
    pub cpu: CpuUsage,
    /// Memory; `None` where no controller counts it.
    pub memory: Option<MemoryUsage>,
    /// Block IO by device, those that it has used.
    pub io: Vec<DeviceUsage>,
    /// Its IO pressure.
    pub io_pressure: Option<Pressure>,
    /// Network.
    pub network: NetUsage,
    /// What it has of the memory of GPU cards, those of which it has any.
    #[serde(default)]
    pub gpu_memory: Vec<CardMemory>,
    /// Who took a CPU from it last: another task by its id, or the empty text for what is not managed.
    pub preempted_by: Option<String>,
    /// How often the kernel has told that its CPU quota was about to be used up.
    pub quota_warnings: u64,
    /// How often the kernel has told that it waited for memory or block IO for a tenth of the time, over two seconds.
    pub pressure_alarms: u64,
    /// How long ago its cgroup's files were read, ns: those of a task that does nothing are read less often.
    pub files_age_ns: u64,
}

/// What an uplink sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkUsage {
    /// For tasks.
    pub tasks: Traffic,
    /// For sockets in cgroups that shaper does not manage.
    pub unmanaged: Traffic,
    /// Without a socket: forwarded, or the kernel's own.
    pub nobody: Traffic,
}

/// How far the measurement itself can be trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Events from the kernel that were lost because they came faster than they were read.
    pub events_lost: u64,
    /// Cgroups below managed ones that the table had no room for: they are found by a walk to their ancestors.
    pub cgroups_without_entry: u64,
    /// Times that a program was left out because it ran already on that CPU: something was not counted then.
    pub runs_missed: u64,
    /// Block IO that could not be charged to its task because the table was full.
    pub io_uncounted: u64,
    /// CPU time of the agent itself, ns.
    pub agent_cpu_ns: u64,
    /// Resident memory of the agent itself.
    pub agent_memory: Bytes,
}

/// What a node and its tasks use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSnapshot {
    /// Its name.
    pub node: String,
    /// When this was read.
    pub at: UnixNanos,
    /// The interval behind every rate and quantile, ns; 0 in the first snapshot, which has none.
    pub interval_ns: u64,
    /// CPUs that are online.
    pub cpus: u32,
    /// CPU that everything on the machine used.
    pub cpu_now: Millicores,
    /// Memory of the machine.
    pub memory: Bytes,
    /// Of it: what could be had without swapping.
    pub memory_available: Bytes,
    /// Pressure on the machine: CPU, memory, IO.
    pub cpu_pressure: Option<Pressure>,
    /// Likewise.
    pub memory_pressure: Option<Pressure>,
    /// Likewise.
    pub io_pressure: Option<Pressure>,
    /// What left through the uplinks together.
    pub uplinks: UplinkUsage,
    /// Who measures what.
    pub sources: Sources,
    /// The measurement's own state.
    pub health: Health,
    /// What is lent of CPU time; `None` where nothing is.
    pub cpu_pool: Option<CpuPool>,
    /// The GPU cards, by number.
    #[serde(default)]
    pub gpus: Vec<CardUsage>,
    /// The caller's tasks, by id.
    pub tasks: Vec<TaskSnapshot>,
}
