//! CPU time, run-queue delay and preemption by slot, from `sched_switch` alone; and the warning before a quota is
//! used up.

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};
use shaper_common::{
    abi::{CpuState, EVENT_BUDGET, Event, SLOT_AGENT, SLOT_NOBODY},
    hist,
};

use crate::{
    atomic,
    kernel::Task,
    maps::{BUDGET, CPU_STAT, CPU_STATE, CPU_WAIT, SWITCH_MEMORY, is_on_duty, of_slot, record, tell, touch},
    slots,
};

/// `TASK_RUNNING`: the task that leaves could have gone on.
const RUNNING: u32 = 0;

/// Charges the task that leaves the CPU, and remembers whose turn it is now.
#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    if !is_on_duty() {
        return 0;
    }
    // SAFETY: the arguments are (preempt, prev, next, prev_state) on every kernel since 5.18; the maps' values of
    // this CPU are written here only, and here preemption is off.
    unsafe {
        let (prev, next) = (Task::from_ptr(ctx.arg(1)), Task::from_ptr(ctx.arg(2)));
        let Some(cpu) = CPU_STATE.get_ptr_mut(aya_ebpf::helpers::bpf_get_smp_processor_id() as u32) else {
            return 0;
        };
        let now = bpf_ktime_get_ns();
        let (slot, pid) = ((*cpu).slot, (*cpu).pid);
        let next_pid = next.pid();
        // The idle task has no slot; what was known of the last cgroup stays known while a CPU idles.
        let next_slot = if next_pid == 0 { SLOT_NOBODY } else { slot_of(cpu, next) };
        if (*cpu).since_ns != 0 {
            let interval = now - (*cpu).since_ns;
            if prev.pid() == pid {
                if pid != 0 {
                    let could_go_on = ctx.arg::<u64>(0) & 0xff != 0 || ctx.arg::<u64>(3) as u32 == RUNNING;
                    charge(slot, interval, could_go_on && next_pid != 0, next_slot);
                }
            } else if prev.pid() != 0 {
                // The switch to this task was not reported (docs/kernel-support.md): it has run for as long as
                // the scheduler says, and what was known to run before it for the rest. How long a CPU idled
                // nobody counts: then the interval is nobody's.
                let ran = prev.ran_since_picked().min(interval);
                let cgroup = prev.cgroup();
                charge(slots::of(cgroup, cgroup.id()), ran, false, next_slot);
                if pid != 0 {
                    charge(slot, interval - ran, false, next_slot);
                }
            }
        }
        (*cpu).slot = next_slot;
        (*cpu).pid = next_pid;
        (*cpu).since_ns = now;
        if next_slot >= SLOT_AGENT {
            if let Some(waited) = next.waited() {
                if let Some(stat) = of_slot(&CPU_STAT, next_slot) {
                    (*stat).wait_ns += waited;
                }
                record(&CPU_WAIT, next_slot, waited, hist::QUEUE_SHIFT);
            }
            touch(next_slot);
        }
    }
    0
}

/// The slot of a task's cgroup.
///
/// # Safety
/// `cpu` is this CPU's, and preemption is off.
#[inline(always)]
unsafe fn slot_of(cpu: *mut CpuState, task: Task) -> u32 {
    // SAFETY: the caller's promise; live map values.
    unsafe {
        let known = slots::remembered(&SWITCH_MEMORY, task.cgroup(), &raw mut (*cpu).cgroup);
        let Some(known) = known else { return SLOT_NOBODY };
        // The agent looks here for what runs.
        (*cpu).cgroup_id = (*known).id;
        (*cpu).cgroup_slot = (*known).slot;
        (*cpu).generation = (*known).generation;
        (*known).slot
    }
}

/// Adds a stretch of a task to its slot.
///
/// # Safety
/// Preemption is off.
#[inline(always)]
unsafe fn charge(slot: u32, ns: u64, preempted: bool, by: u32) {
    if let Some(stat) = of_slot(&CPU_STAT, slot) {
        // SAFETY: a live map value of this CPU, which nothing else writes meanwhile.
        unsafe {
            (*stat).run_ns += ns;
            (*stat).switches += 1;
            if preempted {
                (*stat).preemptions += 1;
                if by != slot {
                    (*stat).preemptions_by_others += 1;
                    (*stat).preempted_by = by;
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
        let start = atomic::load(&raw const (*budget).start_ns);
        let window = atomic::load(&raw const (*budget).window_ns);
        if now.saturating_sub(start) >= window
            && atomic::compare_exchange(&raw mut (*budget).start_ns, start, now)
        {
            atomic::swap(&raw mut (*budget).used_ns, 0);
        }
        let before = atomic::fetch_add(&raw mut (*budget).used_ns, ran);
        // Of all that add, one crosses the line.
        if before < warn && before + ran >= warn {
            tell(&Event { at_ns: now, value: before + ran, kind: EVENT_BUDGET, slot });
        }
    }
    0
}
