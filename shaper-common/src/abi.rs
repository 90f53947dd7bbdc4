//! The layout of the maps. A change here that is not purely additive raises [`LAYOUT`], which is
//! part of the path under bpffs: agents of different layouts never share a map.

/// Version of everything below; the pins live under `<bpffs-dir>/v<LAYOUT>/`.
pub const LAYOUT: u32 = 1;

/// Number of slots: the managed cgroups that one agent can hold at once, plus the reserved ones.
pub const SLOTS: u32 = 1024;
/// Entries of the table cgroup id → slot: managed cgroups and their descendants.
pub const CGROUPS: u32 = 16_384;

/// Traffic that no socket of this machine owns (forwarded, kernel) and CPU time of the idle task.
pub const SLOT_NOBODY: u32 = 0;
/// Everything in a cgroup that this agent does not manage.
pub const SLOT_UNMANAGED: u32 = 1;
/// The first slot that a task can have.
pub const SLOT_FIRST: u32 = 2;

/// What a CPU is running: written by `sched_switch` on that CPU only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// `CLOCK_MONOTONIC`, ns, when the running task was switched in; 0 before the first switch.
    pub since_ns: u64,
    /// The slot that its cgroup had at that moment.
    pub slot: u32,
    /// Its thread id; 0 is the CPU's idle task.
    pub pid: u32,
}

/// CPU time of a slot, on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStat {
    /// Time on the CPU, ns, up to the last switch.
    pub run_ns: u64,
    /// Times that a task of the slot was switched out.
    pub switches: u64,
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
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStat {
    /// Sent by sockets of the slot (cgroup_skb egress).
    pub egress: PacketCount,
    /// Received by sockets of the slot (cgroup_skb ingress).
    pub ingress: PacketCount,
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

/// What a socket remembers, in its socket storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketState {
    /// The last epoch of its slot in which it was counted as active.
    pub epoch: u64,
}

const _: () = {
    assert!(size_of::<CpuState>() == 16);
    assert!(size_of::<CpuStat>() == 16);
    assert!(size_of::<PacketCount>() == 16);
    assert!(size_of::<NetStat>() == 32);
    assert!(size_of::<Pace>() == 64 && align_of::<Pace>() == 64);
    assert!(size_of::<SocketState>() == 8);
};
