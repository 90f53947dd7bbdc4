//! CPU time by slot, from `sched_switch` alone.

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::btf_tracepoint, programs::BtfTracePointContext};

use crate::{
    kernel::Task,
    maps::{CPU_STAT, CPU_STATE, slot_of},
};

/// Charges the task that leaves the CPU, and remembers whose turn it is now.
#[btf_tracepoint(function = "sched_switch")]
pub fn sched_switch(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the arguments are (preempt, prev, next, …) on every kernel; the maps' values of this
    // CPU are written here only, and here preemption is off.
    unsafe {
        let (prev, next) = (Task::from_ptr(ctx.arg(1)), Task::from_ptr(ctx.arg(2)));
        let Some(cpu) = CPU_STATE.get_ptr_mut(0) else { return 0 };
        let now = bpf_ktime_get_ns();
        if (*cpu).since_ns != 0 {
            let interval = now - (*cpu).since_ns;
            if prev.pid() == (*cpu).pid {
                charge((*cpu).pid, (*cpu).slot, interval);
            } else if prev.pid() != 0 {
                // The switch to this task was not reported (docs/kernel-support.md): it has run for as long as
                // the scheduler says, and what was known to run before it for the rest. How long a CPU idled
                // nobody counts: then the interval is nobody's.
                let ran = prev.ran_since_picked().min(interval);
                charge(prev.pid(), slot_of(prev.cgroup().id()), ran);
                charge((*cpu).pid, (*cpu).slot, interval - ran);
            }
        }
        (*cpu).slot = slot_of(next.cgroup().id());
        (*cpu).pid = next.pid();
        (*cpu).since_ns = now;
    }
    0
}

/// Adds a stretch of a task to its slot; the idle task has none.
///
/// # Safety
/// Preemption is off.
#[inline(always)]
unsafe fn charge(pid: u32, slot: u32, ns: u64) {
    if pid == 0 {
        return;
    }
    if let Some(stat) = CPU_STAT.get_ptr_mut(slot) {
        // SAFETY: a live map value of this CPU, which nothing else writes meanwhile.
        unsafe {
            (*stat).run_ns += ns;
            (*stat).switches += 1;
        }
    }
}
