//! What the kernel programs are measured against (`cargo xtask bench measure`): programs that do nothing, and run-queue
//! delay as tools usually measure it. No agent loads this object.
//!
//! The usual way, that of bcc's and libbpf-tools' runqlat: a task that becomes ready is noted with the time, in a hash
//! by thread; the switch to it takes the note out. What is known of a cgroup is in a hash by its id, for each CPU.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
#[allow(dead_code, reason = "shared with the programs that are measured")]
mod kernel;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        helpers::bpf_ktime_get_ns,
        macros::{btf_tracepoint, cgroup_skb, map},
        maps::{HashMap, PerCpuArray, PerCpuHashMap},
        programs::{BtfTracePointContext, SkBuffContext},
    };

    use crate::kernel::Task;

    /// Attached, called, and nothing else.
    #[btf_tracepoint(function = "sched_switch")]
    pub fn empty_switch(_: BtfTracePointContext) -> i32 {
        0
    }

    #[btf_tracepoint(function = "block_rq_complete")]
    pub fn empty_block(_: BtfTracePointContext) -> i32 {
        0
    }

    #[cgroup_skb(egress)]
    pub fn empty_egress(_: SkBuffContext) -> i32 {
        1
    }

    #[cgroup_skb(ingress)]
    pub fn empty_ingress(_: SkBuffContext) -> i32 {
        1
    }

    /// Use of a cgroup, on one CPU.
    #[repr(C)]
    pub struct Usage {
        run_ns: u64,
        switches: u64,
        wait_ns: u64,
        waits: [u32; 32],
    }

    static NOTHING: Usage = Usage { run_ns: 0, switches: 0, wait_ns: 0, waits: [0; 32] };
    /// `TASK_RUNNING`: the task that leaves waits from now on.
    const RUNNING: u32 = 0;

    /// When each task became ready, by thread.
    #[map]
    static READY: HashMap<u32, u64> = HashMap::with_max_entries(65_536, 0);
    /// When the running task was switched in.
    #[map]
    static SINCE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
    /// By cgroup.
    #[map]
    static USAGE: PerCpuHashMap<u64, Usage> = PerCpuHashMap::with_max_entries(16_384, 0);

    #[btf_tracepoint(function = "sched_wakeup")]
    pub fn classic_wakeup(ctx: BtfTracePointContext) -> i32 {
        // SAFETY: the argument is the task.
        note(unsafe { Task::from_ptr(ctx.arg(0)) }, now())
    }

    #[btf_tracepoint(function = "sched_wakeup_new")]
    pub fn classic_wakeup_new(ctx: BtfTracePointContext) -> i32 {
        // SAFETY: the argument is the task.
        note(unsafe { Task::from_ptr(ctx.arg(0)) }, now())
    }

    #[btf_tracepoint(function = "sched_switch")]
    pub fn classic_switch(ctx: BtfTracePointContext) -> i32 {
        // SAFETY: the arguments are (preempt, prev, next, prev_state) on every kernel since 5.18; the maps' values of
        // this CPU are written here only, and here preemption is off.
        unsafe {
            let (prev, next) = (Task::from_ptr(ctx.arg(1)), Task::from_ptr(ctx.arg(2)));
            let Some(since) = SINCE.get_ptr_mut(0) else { return 0 };
            let now = now();
            if prev.pid() != 0 {
                if ctx.arg::<u64>(3) as u32 == RUNNING {
                    note(prev, now);
                }
                if *since != 0
                    && let Some(usage) = usage(prev)
                {
                    (*usage).run_ns += now - *since;
                    (*usage).switches += 1;
                }
            }
            *since = now;
            let pid = next.pid();
            if pid != 0
                && let Some(ready) = READY.get(pid)
            {
                let waited = now - *ready;
                let _ = READY.remove(pid);
                if let Some(usage) = usage(next) {
                    (*usage).wait_ns += waited;
                    // Powers of two of microseconds.
                    let bucket = (64 - (waited >> 10).leading_zeros()) & 31;
                    (*usage).waits[bucket as usize] += 1;
                }
            }
        }
        0
    }

    #[inline(always)]
    fn now() -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn note(task: Task, now: u64) -> i32 {
        let _ = READY.insert(task.pid(), now, 0);
        0
    }

    #[inline(always)]
    fn usage(task: Task) -> Option<*mut Usage> {
        let id = task.cgroup().id();
        if let Some(usage) = USAGE.get_ptr_mut(id) {
            return Some(usage);
        }
        let _ = USAGE.insert(id, &NOTHING, 0);
        USAGE.get_ptr_mut(id)
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Unreachable: the programs have no panicking operation, and the verifier refuses a loop.
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this crate holds kernel programs; build them with `cargo xtask build-ebpf`");
}
