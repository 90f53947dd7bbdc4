//! CPU time, run-queue delay and preemption by slot, from `sched_switch` alone; and the warning before a quota is
//! used up.

use aya_ebpf::{
    helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use shaper_common::{
    abi::{Control, CpuState, EVENT_BUDGET, Event, SLOT_AGENT, SLOT_NOBODY},
    hist, period,
};

use crate::{
    atomic,
    kernel::Task,
    maps::{BUDGET, CPU_STAT, CPU_STATE, control_on_duty, count, first_of, tell, touch},
    slots,
};

/// `TASK_RUNNING`: the task that leaves could have gone on.
const RUNNING: u32 = 0;

/// The offset between the clock of a run queue and `CLOCK_MONOTONIC` is good for so long, ns: what is read of it all the
/// time costs as much as all else here, and meanwhile the two part by 2 µs at most (500 ppm).
const CLOCK_GOOD_NS: u64 = 4_000_000;

/// Charges the task that leaves the CPU, and remembers whose turn it is now.
#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    let Some(control) = control_on_duty() else { return 0 };
    // SAFETY: the arguments are (preempt, prev, next, prev_state) on every kernel since 5.18; the maps' values of
    // this CPU are written here only, and here preemption is off.
    unsafe {
        let (prev, next) = (Task::from_ptr(ctx.arg(1)), Task::from_ptr(ctx.arg(2)));
        let number = bpf_get_smp_processor_id() as u32;
        let first = first_of(number);
        let Some(cpu) = CPU_STATE.get_ptr_mut(number) else { return 0 };
        let clock = next.queue_clock();
        if clock.wrapping_sub((*cpu).clock_read_at_ns) > CLOCK_GOOD_NS {
            (*cpu).clock_offset_ns = bpf_ktime_get_ns().wrapping_sub(clock);
            (*cpu).clock_read_at_ns = clock;
        }
        let now = clock.wrapping_add((*cpu).clock_offset_ns);
        let (slot, pid) = ((*cpu).slot, (*cpu).pid);
        let (prev_pid, next_pid) = (prev.pid(), next.pid());
        // The idle task has no slot.
        let next_slot = if next_pid == 0 { SLOT_NOBODY } else { slot_of(control, number, cpu, next) };
        if prev_pid == pid {
            if pid != 0 {
                let could_go_on = ctx.arg::<u64>(0) & 0xff != 0 || ctx.arg::<u64>(3) as u32 == RUNNING;
                let ran = prev.runtime().saturating_sub((*cpu).runtime_ns);
                charge(first, slot, ran, could_go_on && next_pid != 0, next_slot);
            }
        } else if prev_pid != 0 && (*cpu).since_ns != 0 {
            // The switch to this task was not reported (docs/kernel-support.md): it has run for as long as
            // the scheduler says, and what was known to run before it for the rest. How long a CPU idled
            // nobody counts: then the interval is nobody's.
            let interval = now.saturating_sub((*cpu).since_ns);
            let ran = prev.ran_since_picked().min(interval);
            let cgroup = prev.cgroup();
            charge(first, slots::of(cgroup, cgroup.id()), ran, false, next_slot);
            if pid != 0 {
                charge(first, slot, interval - ran, false, next_slot);
            }
        }
        (*cpu).slot = next_slot;
        (*cpu).pid = next_pid;
        (*cpu).since_ns = now;
        (*cpu).runtime_ns = next.runtime();
        if next_slot >= SLOT_AGENT
            && let Some(stat) = CPU_STAT.get_ptr_mut(first + next_slot)
        {
            if let Some(waited) = next.waited(clock) {
                (*stat).count.wait_ns += waited;
                count(&raw mut (*stat).waits.counts, waited, hist::QUEUE_SHIFT);
            }
            let epoch = atomic::load(&raw const (*control).epoch);
            if (*stat).count.epoch != epoch {
                (*stat).count.epoch = epoch;
                touch(next_slot);
            }
        }
    }
    0
}

/// The slot of a task's cgroup.
///
/// # Safety
/// `cpu` is that of this CPU, which has this `number`, `control` the only value of its map, and preemption is off.
#[inline(always)]
unsafe fn slot_of(control: *const Control, number: u32, cpu: *mut CpuState, task: Task) -> u32 {
    // SAFETY: the caller's promise; live map values.
    unsafe {
        let Some(known) = slots::remembered(control, number, task.css_set()) else { return SLOT_NOBODY };
        // The agent looks here for what runs.
        (*cpu).cgroup_id = (*known).id;
        (*known).slot
    }
}

/// Adds a stretch of a task to its slot. `first` is where the entries of this CPU begin.
///
/// # Safety
/// Preemption is off.
#[inline(always)]
unsafe fn charge(first: u32, slot: u32, ns: u64, preempted: bool, by: u32) {
    if let Some(stat) = CPU_STAT.get_ptr_mut(first + slot) {
        // SAFETY: a live map value of this CPU, which nothing else writes meanwhile.
        unsafe {
            let count = &raw mut (*stat).count;
            (*count).run_ns += ns;
            (*count).switches += 1;
            if preempted {
                (*count).preemptions += 1;
                if by != slot {
                    (*count).preemptions_by_others += 1;
                    (*count).preempted_by = by;
                }
            }
        }
    }
}

/// Warns when a slot is about to use up its quota. Attached only while a managed cgroup has one: it runs at each
/// tick of every task.
#[btf_tracepoint(function = "sched_stat_runtime")]
pub fn sched_stat_runtime(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the arguments are (task, runtime, …) on every kernel.
    unsafe {
        let (task, ran) = (Task::from_ptr(ctx.arg(0)), ctx.arg::<u64>(1));
        let cgroup = task.cgroup();
        let slot = slots::of(cgroup, cgroup.id());
        if slot < SLOT_AGENT {
            return 0;
        }
        let Some(budget) = BUDGET.get_ptr_mut(slot) else { return 0 };
        let warn = atomic::load(&raw const (*budget).warn_ns);
        if warn == 0 {
            return 0;
        }
        let now = bpf_ktime_get_ns();
        let end = atomic::load(&raw const (*budget).end_ns);
        if now >= end {
            // In step with the kernel's own periods: what is used in one of them must not fall into two of ours.
            let due = task.quota_due_ns().unwrap_or(now);
            let next = period::end(due, atomic::load(&raw const (*budget).period_ns), now);
            if atomic::compare_exchange(&raw mut (*budget).end_ns, end, next) {
                atomic::swap(&raw mut (*budget).used_ns, 0);
            }
        }
        let before = atomic::fetch_add(&raw mut (*budget).used_ns, ran);
        // Of all that add, one crosses the line.
        if before < warn && before + ran >= warn {
            tell(&Event { at_ns: now, value: before + ran, kind: EVENT_BUDGET, slot });
        }
    }
    0
}
