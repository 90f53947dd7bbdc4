//! TCP egress ceiling by closed-loop pacing (`shaper_common::pace`): no qdisc, no queue.
//!
//! Everything happens when an acknowledgement gives an RTT sample, on whichever socket of the task
//! that is: the epoch is closed if it is over, the socket is counted, and follows its share.

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_setsockopt, bpf_sk_storage_get, bpf_skc_to_tcp_sock},
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use aya_log_ebpf::debug;
use core::{ffi::c_void, ptr};
use shaper_common::{
    abi::{PACE_OFF, PACE_ON, Pace, SLOT_AGENT, SocketState},
    hist,
    pace::{self, ACTIVE_MAX, Epoch, Loop},
};

use crate::{
    atomic,
    kernel::TcpSock,
    maps::{PACE, ROUND_TRIP, SOCKET_STATE, record},
    slots,
};

const ACTIVE_ESTABLISHED: u32 = 4;
const PASSIVE_ESTABLISHED: u32 = 5;
const RTT: u32 = 12;
/// BPF_SOCK_OPS_RTT_CB_FLAG
const RTT_CALLBACK: u32 = 1 << 3;

const SOL_SOCKET: i32 = 1;
const SO_MAX_PACING_RATE: i32 = 47;
/// SOL_TCP option that sets a socket's callback flags (kernel ≥ 6.12).
const TCP_BPF_SOCK_OPS_CB_FLAGS: i32 = 1008;
const SOL_TCP: i32 = 6;
/// `SO_MAX_PACING_RATE` takes 32 bits; this value means none.
const UNPACED: u32 = u32::MAX;

/// Sockets of managed cgroups ask for a callback at each RTT sample, and follow their task's share.
#[sock_ops]
pub fn pace_tcp(ctx: SockOpsContext) -> u32 {
    let op = ctx.op();
    if op != RTT && op != ACTIVE_ESTABLISHED && op != PASSIVE_ESTABLISHED {
        return 1;
    }
    // SAFETY: a field of the context; the verifier demands the null checks.
    let (sk, socket) = unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if sk.is_null() {
            return 1;
        }
        let tcp = bpf_skc_to_tcp_sock(sk.cast());
        if tcp.is_null() {
            return 1;
        }
        (sk.cast::<c_void>(), TcpSock::from_ptr(tcp.cast()))
    };
    let Some(slot) = slot_of_socket(socket) else { return 1 };
    if op != RTT && socket.is_local() {
        // Never leaves the machine: no callbacks, no pacing.
        return 1;
    }
    if op != RTT {
        let _ = ctx.set_cb_flags((ctx.cb_flags() | RTT_CALLBACK) as i32);
        debug!(&ctx, "slot {} has a new connection", slot);
    }
    let Some(pace) = PACE.get_ptr_mut(slot) else { return 1 };
    // SAFETY: a live map value, and the context, which is what bpf_setsockopt takes here; acknowledgements are
    // handled one after the other on a CPU, with soft interrupts off.
    unsafe {
        if op == RTT {
            record(&ROUND_TRIP, slot, ((*ctx.ops).srtt_us >> 3) as u64 * 1000, hist::RTT_SHIFT);
        }
        if atomic::load(&raw const (*pace).mode) == PACE_ON {
            close_epoch_if_over(pace, ((*ctx.ops).srtt_us >> 3) as u64);
            count_as_active(sk, pace);
        }
        follow(ctx.as_ptr(), socket, pace);
    }
    1
}

/// The context of `iter/tcp`.
#[repr(C)]
pub struct TcpIterator {
    meta: *mut c_void,
    sk_common: *mut c_void,
    uid: u32,
}

/// Walks the TCP sockets of a network namespace once: sockets older than the management of their
/// cgroup join the loop (where the kernel lets an iterator set callback flags; where not, they get
/// the share of this moment and keep it until the next walk), and sockets of a task whose ceiling
/// was lifted are opened.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
pub extern "C" fn walk_tcp(ctx: *mut TcpIterator) -> i32 {
    // SAFETY: the verifier demands the null checks.
    let (tcp, socket) = unsafe {
        let sk = (*ctx).sk_common;
        if sk.is_null() {
            return 0;
        }
        let tcp = bpf_skc_to_tcp_sock(sk);
        if tcp.is_null() {
            return 0;
        }
        (tcp.cast::<c_void>(), TcpSock::from_ptr(tcp.cast()))
    };
    let Some(slot) = slot_of_socket(socket) else { return 0 };
    if socket.is_local() {
        return 0;
    }
    let mut flags = RTT_CALLBACK;
    // SAFETY: a socket that the iterator holds and has locked; four bytes of this stack.
    unsafe { bpf_setsockopt(tcp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, (&raw mut flags).cast(), 4) };
    if let Some(pace) = PACE.get_ptr_mut(slot) {
        // SAFETY: a live map value, and the socket, which is what bpf_setsockopt takes here.
        unsafe { follow(tcp, socket, pace) };
    }
    0
}

#[inline(always)]
fn slot_of_socket(socket: TcpSock) -> Option<u32> {
    let cgroup = socket.cgroup()?;
    let slot = slots::of(cgroup, cgroup.id());
    if slot < SLOT_AGENT { None } else { Some(slot) }
}

/// Brings one socket to what its task may send now. `target` is what `bpf_setsockopt` takes.
#[inline(always)]
unsafe fn follow(target: *mut c_void, socket: TcpSock, pace: *mut Pace) {
    unsafe {
        let mode = atomic::load(&raw const (*pace).mode);
        let current = socket.max_pacing_rate();
        let mut wanted = UNPACED;
        if mode == PACE_ON {
            let share = share(pace);
            if !pace::worth_changing(current, share) {
                return;
            }
            wanted = if share < UNPACED as u64 { share as u32 } else { UNPACED - 1 };
        } else if mode == PACE_OFF || current == u64::MAX {
            return;
        }
        bpf_setsockopt(target, SOL_SOCKET, SO_MAX_PACING_RATE, (&raw mut wanted).cast(), 4);
    }
}

#[inline(always)]
unsafe fn share(pace: *mut Pace) -> u64 {
    unsafe {
        let active = atomic::load(&raw const (*pace).active);
        let before = atomic::load(&raw const (*pace).active_before) as u64;
        let active = if active > before { active } else { before };
        pace::share(
            atomic::load(&raw const (*pace).rate),
            atomic::load(&raw const (*pace).gain) as u64,
            atomic::load(&raw const (*pace).aim) as u64,
            active,
        )
    }
}

/// The first acknowledgement after the end of an epoch closes it, for all sockets of the task.
#[inline(always)]
unsafe fn close_epoch_if_over(pace: *mut Pace, rtt_us: u64) {
    unsafe {
        let rate = atomic::load(&raw const (*pace).rate);
        let start = atomic::load(&raw const (*pace).epoch_start_ns);
        let now = bpf_ktime_get_ns();
        let elapsed_us = now.saturating_sub(start) / 1000;
        if elapsed_us < pace::epoch_us(share(pace), rtt_us)
            || !atomic::compare_exchange(&raw mut (*pace).epoch_start_ns, start, now)
        {
            return;
        }
        let active = atomic::swap(&raw mut (*pace).active, 0);
        let active = if active < ACTIVE_MAX { active } else { ACTIVE_MAX };
        let active_before = atomic::load(&raw const (*pace).active_before) as u64;
        let before = Loop {
            gain: atomic::load(&raw const (*pace).gain) as u64,
            aim: atomic::load(&raw const (*pace).aim) as u64,
            debt: atomic::load(&raw const (*pace).debt),
        };
        let sent = atomic::swap(&raw mut (*pace).sent, 0);
        let after = pace::close_epoch(before, rate, Epoch { elapsed_us, sent, active, active_before });
        atomic::store(&raw mut (*pace).gain, after.gain as u32);
        atomic::store(&raw mut (*pace).aim, after.aim as u32);
        atomic::store(&raw mut (*pace).debt, after.debt);
        atomic::store(&raw mut (*pace).active_before, pace::remember(active, active_before) as u32);
        atomic::fetch_add(&raw mut (*pace).epoch, 1);
    }
}

/// Counts the socket, once an epoch.
#[inline(always)]
unsafe fn count_as_active(sk: *mut c_void, pace: *mut Pace) {
    unsafe {
        let storage = (&raw const SOCKET_STATE).cast_mut().cast::<c_void>();
        let create = BPF_SK_STORAGE_GET_F_CREATE as u64;
        let state = bpf_sk_storage_get(storage, sk, ptr::null_mut(), create).cast::<SocketState>();
        if state.is_null() {
            return;
        }
        let epoch = atomic::load(&raw const (*pace).epoch);
        if (*state).epoch != epoch {
            (*state).epoch = epoch;
            atomic::fetch_add(&raw mut (*pace).active, 1);
        }
    }
}
