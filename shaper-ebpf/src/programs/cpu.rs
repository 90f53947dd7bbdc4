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
        let next = Task::from_ptr(ctx.arg(2));
        let Some(cpu) = CPU_STATE.get_ptr_mut(0) else { return 0 };
        let now = bpf_ktime_get_ns();
        if (*cpu).since_ns != 0 && (*cpu).idle == 0 {
            if let Some(stat) = CPU_STAT.get_ptr_mut((*cpu).slot) {
                (*stat).run_ns += now - (*cpu).since_ns;
                (*stat).switches += 1;
            }
        }
        (*cpu).cgroup_id = next.cgroup().id();
        (*cpu).slot = slot_of((*cpu).cgroup_id);
        (*cpu).idle = next.is_idle() as u32;
        (*cpu).since_ns = now;
    }
    0
}
