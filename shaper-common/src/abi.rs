//! The layout of the maps. A change here that is not purely additive raises [`LAYOUT`], which is
//! part of the path under bpffs: agents of different layouts never share a map.

use crate::hist::Histogram;

/// Version of everything below; the pins live under `<bpffs-dir>/v<LAYOUT>/`.
pub const LAYOUT: u32 = 6;

/// Slots unless the agent is told otherwise: the managed cgroups that it can hold at once, plus the reserved
/// ones. Maps of one entry per slot and CPU hold it at `cpu * slots + slot`: each CPU writes pages of its own,
/// and the agent, which has the maps in its memory, reads without a system call.
pub const SLOTS: u32 = 1024;
/// The most slots that an agent can ask for.
pub const SLOTS_MAX: u32 = 16_384;
/// Entries of the table cgroup id → slot: managed cgroups and their descendants.
pub const CGROUPS: u32 = 65_536;
/// Of them: those that cgroups get when they are made below a managed one. The others are the agent's, so that
/// no task can leave it without room.
pub const CGROUPS_INHERITED: u64 = 32_768;
/// How deep a managed cgroup may lie below the root of the hierarchy: so many of its ancestors a packet is looked up by.
pub const LEVELS_MAX: u32 = 16;
/// Entries of the table of block IO: pairs of a slot and a device, times directions.
pub const IO_ENTRIES: u32 = 16_384;
/// Bytes of the ring of events.
pub const EVENT_BYTES: u32 = 256 << 10;

/// Traffic that no socket of this machine owns (forwarded, kernel) and CPU time of the idle task.
pub const SLOT_NOBODY: u32 = 0;
/// Everything in a cgroup that this agent does not manage.
pub const SLOT_UNMANAGED: u32 = 1;
/// The agent itself. From here on everything is counted of a slot.
pub const SLOT_AGENT: u32 = 2;
/// The first slot that a task can have.
pub const SLOT_FIRST: u32 = 3;

/// An entry of the table cgroup id → slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CgroupSlot {
    /// The slot.
    pub slot: u32,
    /// 1: the kernel made the entry, for a cgroup below a managed one; 0: the agent did.
    pub inherited: u32,
}

/// What all programs look at, and what they tell about themselves.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Grows with each look of the agent; what a slot's [`Activity`] is set to. Written by the agent.
    pub epoch: u32,
    /// Grows with each change of the agent's to the table of cgroups, and with each cgroup that is released: what CPUs
    /// remember of the table is void.
    pub generation: u32,
    /// Cgroups below managed ones that the table had no room for. Once this is not 0, a cgroup that is not
    /// in the table is looked up by its ancestors.
    pub without_entry: u64,
    /// Entries that are inherited now.
    pub inherited: u64,
    /// Events that the ring had no room for.
    pub events_lost: u64,
    /// Block IO that the table had no room for.
    pub io_uncounted: u64,
    /// Which of the tracing programs count: those that were loaded with this number. (Where a new agent replaces
    /// them, both are attached for an instant.) Written by the agent.
    pub instance: u32,
    /// Not 0: a pacing rate on a socket that is met for the first time is not its program's but an earlier agent's, of
    /// another layout. Written by the agent.
    pub rates_are_ours: u32,
}

/// When a slot was last active: [`Control::epoch`] of that moment. One word a slot, so that the agent sees in a few
/// cache lines which slots it has to read.
pub type Activity = u32;

/// What a CPU is running: written by `sched_switch` on that CPU only.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// `CLOCK_MONOTONIC`, ns, when the running task was switched in; 0 before the first switch.
    pub since_ns: u64,
    /// What the scheduler had counted of its CPU time by then, ns.
    pub runtime_ns: u64,
    /// The slot that its cgroup had at that moment.
    pub slot: u32,
    /// Its thread id; 0 is the CPU's idle task.
    pub pid: u32,
    /// The id of its cgroup; of the idle task's, what it was before.
    pub cgroup_id: u64,
    /// `CLOCK_MONOTONIC` less the clock of this CPU's run queue, ns …
    pub clock_offset_ns: u64,
    /// … and what the run queue's clock said when that was read.
    pub clock_read_at_ns: u64,
    /// Nothing.
    pub reserved: [u64; 2],
}

/// Cgroups that a CPU remembers the slots of: for switches each at a place that follows from where the kernel has the task's
/// `css_set`, for packets at one that follows from its id.
pub const REMEMBERED: u32 = 8192;
/// Two of them share a place, and a cache line.
pub const PAIRS: u32 = REMEMBERED / 2;

/// A cgroup that a CPU remembers the slot of. Not pinned: it is the programs' own business.
#[repr(C, align(32))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remembered {
    /// Where the kernel has it, as a distance from a fixed place; another may lie there once it was released, so that
    /// is the start of a new generation.
    pub cgroup: u64,
    /// Its id.
    pub id: u64,
    /// Its slot …
    pub slot: u32,
    /// … and [`Control::generation`] of then.
    pub generation: u32,
}

/// What is remembered at one place.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RememberedPair {
    /// The one that was put here last.
    pub newer: Remembered,
    /// The one before.
    pub older: Remembered,
}

/// CPU time of a slot, on one CPU. In one place with how long its tasks waited, so that a slot that has not been active
/// for a while is few lines of one page.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStat {
    /// The sums.
    pub count: CpuCount,
    /// How long its tasks waited in the run queue of this CPU.
    pub waits: Histogram,
}

/// The sums of [`CpuStat`].
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuCount {
    /// Time on the CPU as the scheduler counts it, ns, up to the last switch.
    pub run_ns: u64,
    /// Times that a task of the slot was switched out.
    pub switches: u64,
    /// Of them: while it could have gone on, for another task.
    pub preemptions: u64,
    /// Of those: for a task of another slot.
    pub preemptions_by_others: u64,
    /// Time that its tasks waited in the run queue of this CPU, ns.
    pub wait_ns: u64,
    /// The slot that preempted it last.
    pub preempted_by: u32,
    /// [`Control::epoch`] when this CPU last marked the slot as active.
    pub epoch: u32,
    /// Nothing.
    pub reserved: [u64; 2],
}

/// Use of a quota in its period: written by `sched_stat_runtime` on all CPUs.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// CPU time in a period from which on the agent is told, ns; 0: never. Written by the agent.
    pub warn_ns: u64,
    /// Length of a period, ns. Written by the agent.
    pub period_ns: u64,
    /// When the period ends, `CLOCK_MONOTONIC` ns ([`crate::period`]).
    pub end_ns: u64,
    /// CPU time used since the quota was filled up the last time: since the period began, or the quota was written, ns.
    /// The agent sets it to 0 when it has written the quota.
    pub used_ns: u64,
}

/// `Event::kind`: a slot is about to use up its CPU quota; the value is what it has used since that was filled up, ns.
pub const EVENT_BUDGET: u32 = 1;

/// `Event::kind`: a cgroup that the agent has given a slot was removed; the value is its id.
pub const EVENT_GONE: u32 = 2;

/// What the kernel programs tell at once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// What it says depends on the kind.
    pub value: u64,
    /// One of `EVENT_*`.
    pub kind: u32,
    /// Whom it is about.
    pub slot: u32,
}

/// Direction of block IO in [`IoKey`].
pub const IO_READ: u32 = 0;
/// Direction of block IO in [`IoKey`].
pub const IO_WRITE: u32 = 1;
/// Direction of block IO in [`IoKey`]: discards, which carry no data.
pub const IO_DISCARD: u32 = 2;

/// Whose block IO, on which device, in which direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IoKey {
    /// The slot of the cgroup that the request is charged to.
    pub slot: u32,
    /// The whole device, as the kernel numbers it inside: major << 20 | minor.
    pub device: u32,
    /// One of `IO_*`.
    pub direction: u32,
}

/// Block IO that has completed, on one CPU.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoStat {
    /// How long the operations took, from the start of the request on.
    pub latency: Histogram,
    /// Bytes.
    pub bytes: u64,
    /// Operations, counted as io.stat does: each bio of a merged request.
    pub operations: u64,
    /// Sum of the latencies, ns.
    pub latency_ns: u64,
    /// Requests without a time of start: the device's `iostats` are off.
    pub untimed: u64,
}

/// A count of packets, on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketCount {
    /// Bytes on the wire, as [`crate::wire`] defines them.
    pub bytes: u64,
    /// Packets on the wire: a segmented buffer counts as its segments.
    pub packets: u64,
}

/// Traffic of a slot, on one CPU.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStat {
    /// Sent by sockets of the slot (cgroup_skb egress).
    pub egress: PacketCount,
    /// Received by sockets of the slot (cgroup_skb ingress).
    pub ingress: PacketCount,
    /// Of what was sent: buffers with a congestion mark (ECN CE).
    pub egress_marks: u64,
    /// Of what was received, likewise.
    pub ingress_marks: u64,
    /// TCP segments that were sent again.
    pub retransmits: u64,
    /// Buffers on their way out that the kernel threw away, whole ones: before they become segments.
    pub drops: u64,
}

/// `Pace::mode`: the slot has no ceiling and its sockets are left alone.
pub const PACE_OFF: u32 = 0;
/// `Pace::mode`: the sockets of the slot are paced so that together they send `rate`.
pub const PACE_ON: u32 = 1;
/// `Pace::mode`: the ceiling was lifted; a socket that still carries our pacing rate is opened.
pub const PACE_OPEN: u32 = 2;

/// TCP pacing of a slot. One cache line, shared by all CPUs; the agent writes single fields
/// through a memory map (replacing the value would reset the loop and give away a burst).
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// Ceiling of the slot, bytes a second on the wire. Written by the agent.
    pub rate: u64,
    /// One of `PACE_*`. Written by the agent.
    pub mode: u32,
    /// Sockets that were active lately ([`crate::pace::remember`]).
    pub active_before: u32,
    /// [`crate::pace::Loop::gain`].
    pub gain: u32,
    /// [`crate::pace::Loop::aim`].
    pub aim: u32,
    /// [`crate::pace::Loop::debt`].
    pub debt: u64,
    /// Start of the epoch, `CLOCK_MONOTONIC` ns.
    pub epoch_start_ns: u64,
    /// Number of the epoch, from 1.
    pub epoch: u64,
    /// Bytes on the wire since the start of the epoch.
    pub sent: u64,
    /// Sockets active in this epoch so far.
    pub active: u64,
}

/// The clocks of a slot, see [`crate::clock`]: what no socket paces. Two cache lines, shared by all CPUs.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// [`crate::clock::price`] of the ceiling; 0: there is none. Written by the agent.
    pub price: u64,
    /// [`crate::clock::credit`]. Written by the agent.
    pub credit: u64,
    /// [`crate::clock::stream_slack`]. Written by the agent.
    pub stream_slack: u64,
    /// When the datagrams are due, ticks.
    pub datagrams_due: u64,
    /// When TCP is due, ticks.
    pub streams_due: u64,
    /// What datagrams have claimed of half of the ceiling, as a clock of its own …
    pub datagrams_half: u64,
    /// … and what TCP has.
    pub streams_half: u64,
    /// When a datagram was last seen, ticks.
    pub datagram_at: u64,
    /// What was held back, of datagrams …
    pub datagrams_held: PacketCount,
    /// … and of TCP.
    pub streams_held: PacketCount,
    /// Nothing.
    pub reserved: [u64; 4],
}

/// A pool: what the slots that are in it share ([`crate::pool`]). Slots look at it with the first packet of each window.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// Bytes a second. Written by the agent.
    pub capacity: u64,
    /// The last window that has begun: the claims of those after it are cleared.
    pub window: u64,
    /// [`crate::pool::trim`].
    pub trim: u64,
    /// Since when is counted what was sent, `CLOCK_MONOTONIC` ns …
    pub since_ns: u64,
    /// … and how much that was, bytes.
    pub sent: u64,
    /// In how many windows since then nobody wanted more.
    pub unwanted: u64,
    /// Nothing.
    pub reserved: [u64; 2],
}

/// The only pool that there is: what the tasks of the node send.
pub const POOL_EGRESS: u32 = 0;
/// Pools.
pub const POOLS: u32 = 1;

/// What was claimed of a pool in a window.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// Weights of the open claims.
    pub weights: u64,
    /// Guarantees of the open claims, bytes a second.
    pub guarantees: u64,
    /// What the settled ones use, bytes a second.
    pub settled: u64,
    /// Nothing.
    pub reserved: u64,
}

/// The share of a slot in a pool. Two cache lines: the first is looked at with each packet.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Not 0: it is in the pool. Written by the agent.
    pub is_in: u32,
    /// Its weight. Written by the agent.
    pub weight: u32,
    /// Its guarantee, bytes a second. Written by the agent.
    pub guarantee: u64,
    /// Its ceiling, bytes a second. Written by the agent.
    pub ceiling: u64,
    /// The window in which it was granted something last.
    pub window: u64,
    /// What it was granted, bytes a second.
    pub grant: u64,
    /// All that it ever sent, bytes.
    pub sent: u64,
    /// When it was last said what it wants, `CLOCK_MONOTONIC` ns …
    pub since_ns: u64,
    /// … and its allowance then …
    pub since_allowance: u64,
    /// … and what it had sent.
    pub since_sent: u64,
    /// What of it the pool knows.
    pub noted: u64,
    /// The last window for which it has claimed.
    pub claimed: u64,
    /// [`crate::pool::made`]: of which of them it claimed what there is.
    pub opens: u64,
    /// What it uses, bytes a second; the largest number: it wants what there is.
    pub claim: u64,
    /// All that it was ever allowed, bytes, up to …
    pub allowance: u64,
    /// … this time, `CLOCK_MONOTONIC` ns.
    pub allowance_at_ns: u64,
    /// The allowance when the last epoch of its pacing began.
    pub epoch_allowance: u64,
}

/// What a socket remembers, in its socket storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketState {
    /// The last epoch of its slot in which it was counted as active.
    pub epoch: u64,
    /// The pacing rate that we have set last, bytes a second; 0: none of ours is on it.
    pub ours: u64,
    /// The pacing rate that its program has set itself, bytes a second; `u64::MAX`: none.
    pub own: u64,
}

/// The slot of a socket, in its socket storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketSlot {
    /// The slot.
    pub slot: u32,
    /// [`Control::generation`] then: it is void under another.
    pub generation: u32,
}

/// Entries of the table of the GPU cards' devices: more than there are cards, for one that moved to another device.
pub const GOVERNED_DEVICES: u32 = 128;

/// A device as that table has it.
pub const fn device_key(major: u32, minor: u32) -> u64 {
    (major as u64) << 32 | minor as u64
}

/// Which GPU cards a slot may open. Written by the agent, but for what was refused.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// A bit for each card, by its number.
    pub granted: u64,
    /// Opens of others that were refused.
    pub refused: u64,
    /// 0: it opens what it likes.
    pub is_governed: u32,
    /// The card of the last open that was refused.
    pub refused_card: u32,
}

const _: () = {
    assert!(size_of::<Admission>() == 24);
    assert!(size_of::<CgroupSlot>() == 8);
    assert!(size_of::<Control>() == 64);
    assert!(size_of::<CpuState>() == 64);
    assert!(size_of::<Remembered>() == 32);
    assert!(size_of::<CpuCount>() == 64);
    assert!(size_of::<CpuStat>() == 320);
    assert!(size_of::<Budget>() == 64);
    assert!(size_of::<Event>() == 24);
    assert!(size_of::<IoKey>() == 12);
    assert!(size_of::<IoStat>() == 320);
    assert!(size_of::<PacketCount>() == 16);
    assert!(size_of::<NetStat>() == 64);
    assert!(size_of::<Pace>() == 64 && align_of::<Pace>() == 64);
    assert!(size_of::<Clock>() == 128 && align_of::<Clock>() == 64);
    assert!(size_of::<Pool>() == 64);
    assert!(size_of::<Claims>() == 32);
    assert!(size_of::<Share>() == 128 && align_of::<Share>() == 64);
    assert!(size_of::<SocketState>() == 24);
    assert!(size_of::<SocketSlot>() == 8);
};
