//! What the programs have counted, read out of the maps.

use std::{
    collections::BTreeMap,
    mem::offset_of,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, SeqCst},
    },
};

use aya::maps::IterableMap;
use rustix::thread::CpuSet;
use shaper_common::{
    abi::{
        Budget, Control, CpuCount, CpuStat, CpuState, IoKey, IoStat, SLOT_AGENT, SLOT_FIRST, SLOT_NOBODY,
        SLOT_UNMANAGED,
    },
    hist::Histogram,
};
use shaper_core::{snapshot::UplinkUsage, task::Traffic};

use super::{Bpf, BpfError};
use crate::kernel::{
    mapped::{Mapped, monotonic_ns},
    sys,
};

/// Counters of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// `CLOCK_MONOTONIC` ns of the reading.
    pub at_ns: u64,
    /// CPU time, ns, with the interval that is running.
    pub cpu_ns: u64,
    /// Times that one of its threads was switched out.
    pub switches: u64,
    /// Of them: while it could have gone on, for another thread.
    pub preemptions: u64,
    /// Of those: for one of another slot.
    pub preemptions_by_others: u64,
    /// Time that its threads waited for a CPU, ns.
    pub wait_ns: u64,
    /// Sent.
    pub egress: Traffic,
    /// Received.
    pub ingress: Traffic,
    /// Packets sent with a congestion mark.
    pub egress_marks: u64,
    /// Packets received with one.
    pub ingress_marks: u64,
    /// TCP segments sent again.
    pub retransmits: u64,
    /// Thrown away on their way out.
    pub drops: u64,
    /// What it may send now, bytes a second; `None`: the node does not divide its network.
    pub granted: Option<u64>,
    /// Of TCP: beyond the ceiling and held back.
    pub streams_held: Traffic,
    /// The same of all else.
    pub datagrams_held: Traffic,
    /// Sent through the uplinks.
    pub uplink_egress: Traffic,
    /// The slot that last took a CPU from it; 0 if none has.
    pub preempted_by: u32,
}

/// How long things took in a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histograms {
    /// Waits for a CPU.
    pub run_queue: Histogram,
    /// Round trips of TCP.
    pub round_trip: Histogram,
}

/// The part of the maps that concerns quotas, for another thread than the node's.
#[derive(Clone)]
pub struct QuotaWatch {
    pub(super) budget: Arc<Mapped<Budget>>,
    pub(super) cpu_state: Arc<Mapped<CpuState>>,
    pub(super) cpu_stat: Arc<Mapped<CpuStat>>,
    pub(super) cpus: usize,
    pub(super) slots: u32,
}

impl QuotaWatch {
    /// CPU time that a slot has used, with what is running, ns.
    pub fn cpu_ns(&self, slot: u32) -> u64 {
        cpu_time(&self.cpu_state, &self.cpu_stat, self.cpus, self.slots, slot).1
    }

    /// The quota of a slot that is watched was written, by which the kernel has filled it up: warns of so much used since then.
    pub fn filled_up(&self, slot: u32, warn_ns: u64) {
        let word = |offset| self.budget.word(slot as usize, offset);
        word(offset_of!(Budget, warn_ns)).store(warn_ns, SeqCst);
        word(offset_of!(Budget, used_ns)).store(0, SeqCst);
    }
}

/// When, and how much CPU time a slot had used by then, with what is running.
fn cpu_time(
    state: &Mapped<CpuState>,
    stat: &Mapped<CpuStat>,
    cpus: usize,
    slots: u32,
    slot: u32,
) -> (u64, u64) {
    // A switch between the two reads would lose an interval, or count it twice: then they are read again.
    // Where tasks switch faster than we read, the intervals at stake are as short as that.
    const TRIES: usize = 8;
    const RUN_NS: usize = offset_of!(CpuStat, count) + offset_of!(CpuCount, run_ns);
    let states = || -> Vec<CpuState> { (0..cpus).map(|cpu| state.read(cpu)).collect() };
    let concerns = |before: &CpuState, after: &CpuState| {
        // (A queue's clock may stand still from one switch to the next.)
        let same = |state: &CpuState| (state.since_ns, state.runtime_ns, state.pid);
        (before.slot == slot || after.slot == slot) && same(before) != same(after)
    };
    let mut tries = 0;
    loop {
        tries += 1;
        let before = states();
        let index = |cpu: usize| cpu * slots as usize + slot as usize;
        let closed: u64 = (0..cpus).map(|cpu| stat.word(index(cpu), RUN_NS).load(Relaxed)).sum();
        let after = states();
        let at_ns = monotonic_ns();
        let torn = before.iter().zip(&after).any(|(before, after)| concerns(before, after));
        if torn && tries < TRIES {
            continue;
        }
        // A task that has not been switched out since is charged up to now.
        let runs = |cpu: &&CpuState| cpu.slot == slot && cpu.pid != 0 && cpu.since_ns != 0;
        let open: u64 = after.iter().filter(runs).map(|cpu| at_ns.saturating_sub(cpu.since_ns)).sum();
        return (at_ns, closed + open);
    }
}

impl Bpf {
    /// The slots that were active since the look before: nothing has changed in the others, and they need not be read.
    /// What is active from now on is seen by the next look.
    pub fn look(&self) -> Vec<u32> {
        let epoch = self.control.half(0, offset_of!(Control, epoch)).fetch_add(1, SeqCst) + 1;
        let running: Vec<u32> =
            self.cpu_states().iter().filter(|cpu| cpu.pid != 0).map(|cpu| cpu.slot).collect();
        let is_active = |slot: &u32| {
            let marked = self.activity.half(*slot as usize, 0).load(Relaxed);
            // A program that began before the last look marks with the epoch of then.
            epoch.wrapping_sub(marked) <= 2 || running.contains(slot)
        };
        (SLOT_AGENT..self.slots).filter(is_active).collect()
    }

    /// The counters of a slot.
    pub fn counters(&self, slot: u32) -> Counters {
        let (at_ns, cpu_ns) = self.cpu_time(slot);
        let mut sum = Counters { at_ns, cpu_ns, ..Counters::default() };
        for cpu in 0..self.cpus {
            let index = self.index(cpu, slot);
            let stat: CpuCount = self.cpu_stat.part(index, offset_of!(CpuStat, count));
            sum.switches = sum.switches.wrapping_add(stat.switches);
            sum.preemptions = sum.preemptions.wrapping_add(stat.preemptions);
            sum.preemptions_by_others = sum.preemptions_by_others.wrapping_add(stat.preemptions_by_others);
            sum.wait_ns = sum.wait_ns.wrapping_add(stat.wait_ns);
            if stat.preempted_by != SLOT_NOBODY {
                sum.preempted_by = stat.preempted_by;
            }
            let net = self.net_stat.read(index);
            sum.egress.bytes += net.egress.bytes;
            sum.egress.packets += net.egress.packets;
            sum.ingress.bytes += net.ingress.bytes;
            sum.ingress.packets += net.ingress.packets;
            sum.egress_marks += net.egress_marks;
            sum.ingress_marks += net.ingress_marks;
            sum.retransmits += net.retransmits;
            sum.drops += net.drops;
        }
        sum.uplink_egress = self.uplink_traffic(slot);
        (sum.streams_held, sum.datagrams_held) = self.pace.held(slot);
        sum.granted = self.pace.granted(slot);
        sum
    }

    fn uplink_traffic(&self, slot: u32) -> Traffic {
        let mut sum = Traffic::default();
        for cpu in 0..self.cpus {
            let count = self.uplink_stat.read(self.index(cpu, slot));
            sum.bytes += count.bytes;
            sum.packets += count.packets;
        }
        sum
    }

    /// How long things took in a slot, since it is one.
    pub fn histograms(&self, slot: u32) -> Histograms {
        let mut sum = Histograms::default();
        for cpu in 0..self.cpus {
            sum.run_queue.add(&self.cpu_stat.part(self.index(cpu, slot), offset_of!(CpuStat, waits)));
            sum.round_trip.add(&self.round_trip.read(self.index(cpu, slot)));
        }
        sum
    }

    /// Block IO of every slot, by device and direction.
    pub fn block_io(&self) -> Result<BTreeMap<IoKey, IoStat>, BpfError> {
        let mut all = BTreeMap::new();
        let size = size_of::<IoStat>();
        sys::for_each_entry(
            self.io_stat.map().fd().as_fd(),
            size_of::<IoKey>(),
            size * self.cpus,
            |key, value| {
                let half = |from: &[u8], at: usize| {
                    u32::from_ne_bytes(from[at..][..4].try_into().unwrap_or_default())
                };
                let key = IoKey { slot: half(key, 0), device: half(key, 4), direction: half(key, 8) };
                let mut sum = IoStat::default();
                for of_cpu in value.chunks_exact(size) {
                    let word =
                        |at: usize| u64::from_ne_bytes(of_cpu[at..][..8].try_into().unwrap_or_default());
                    let mut latency = Histogram::default();
                    for (bucket, count) in latency.counts.iter_mut().enumerate() {
                        *count = half(of_cpu, offset_of!(IoStat, latency) + 4 * bucket);
                    }
                    sum.latency.add(&latency);
                    sum.bytes += word(offset_of!(IoStat, bytes));
                    sum.operations += word(offset_of!(IoStat, operations));
                    sum.latency_ns += word(offset_of!(IoStat, latency_ns));
                    sum.untimed += word(offset_of!(IoStat, untimed));
                }
                all.insert(key, sum);
            },
        )
        .map_err(|source| BpfError::Entries { map: "IO_STAT", source })?;
        Ok(all)
    }

    /// What has left through the uplinks.
    pub fn uplink_usage(&self) -> UplinkUsage {
        let mut tasks = Traffic::default();
        for slot in SLOT_FIRST..self.slots {
            let count = self.uplink_traffic(slot);
            tasks.bytes += count.bytes;
            tasks.packets += count.packets;
        }
        let [unmanaged, nobody] = [SLOT_UNMANAGED, SLOT_NOBODY].map(|slot| self.uplink_traffic(slot));
        UplinkUsage { tasks, unmanaged, nobody }
    }

    /// What the programs tell about themselves.
    pub fn control(&self) -> Control {
        self.control.read(0)
    }

    /// The agent's words of a budget; a window begins with the next tick.
    pub(super) fn write_budget(&self, slot: u32, limit: Option<(u64, u64)>) {
        let (warn, period) = limit.unwrap_or((0, 0));
        let word = |offset| self.budget.word(slot as usize, offset);
        word(offset_of!(Budget, period_ns)).store(period, SeqCst);
        word(offset_of!(Budget, warn_ns)).store(warn, SeqCst);
    }

    fn index(&self, cpu: usize, slot: u32) -> usize {
        cpu * self.slots as usize + slot as usize
    }

    pub(super) fn cpu_states(&self) -> Vec<CpuState> {
        (0..self.cpus).map(|cpu| self.cpu_state.read(cpu)).collect()
    }

    /// When, and how much CPU time a slot had used by then, with what is running.
    fn cpu_time(&self, slot: u32) -> (u64, u64) {
        cpu_time(&self.cpu_state, &self.cpu_stat, self.cpus, self.slots, slot)
    }

    /// Has every CPU switch whose state `concerns`: what runs there is looked up anew. The calling thread goes there
    /// for an instant.
    pub(super) fn switch_cpus(&self, concerns: impl Fn(&CpuState) -> bool) {
        let states = self.cpu_states();
        let concerned: Vec<usize> =
            (0..self.cpus).filter(|cpu| states[*cpu].pid != 0 && concerns(&states[*cpu])).collect();
        if concerned.is_empty() {
            return;
        }
        let visit = || -> rustix::io::Result<()> {
            let home = rustix::thread::sched_getaffinity(None)?;
            for cpu in concerned {
                let mut there = CpuSet::new();
                there.set(cpu);
                // Where we may not go, or not any more, its task is looked up when it is next switched to.
                let _ = rustix::thread::sched_setaffinity(None, &there);
            }
            rustix::thread::sched_setaffinity(None, &home)
        };
        if let Err(error) = visit() {
            tracing::warn!(%error, "cannot visit the CPUs: what runs is charged to its new slot once it has switched");
        }
    }
}
