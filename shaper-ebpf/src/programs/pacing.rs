//! TCP egress ceiling by closed-loop pacing (`shaper_common::pace`): no qdisc, no queue.
//!
//! Everything happens when an acknowledgement gives an RTT sample, on whichever socket of the task
//! that is: the epoch is closed if it is over, the socket is counted, and follows its share.
//!
//! A program may have set a pacing rate of its own: then the lower of the two holds, and its own comes back when the ceiling
//! is lifted. What stands on a socket and is not what was written there last is its program's.

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
    maps::{CONTROL, PACE, ROUND_TRIP, SOCKET_STATE, record},
    pool, slots,
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
            close_epoch_if_over(slot, pace, ((*ctx.ops).srtt_us >> 3) as u64);
        }
        if let Some(state) = state_of(sk, pace) {
            count_as_active(state, pace);
            follow(ctx.as_ptr(), socket, pace, state);
        }
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
        unsafe {
            if let Some(state) = state_of(tcp, pace) {
                follow(tcp, socket, pace, state);
            }
        }
    }
    0
}

#[inline(always)]
fn slot_of_socket(socket: TcpSock) -> Option<u32> {
    let cgroup = socket.cgroup()?;
    let slot = slots::of(cgroup, cgroup.id());
    if slot < SLOT_AGENT { None } else { Some(slot) }
}

/// What is remembered of a socket. Nothing needs to be while its task has no ceiling and had none.
///
/// # Safety
/// `sk` is the socket, in a form that the helper takes here; `pace` a live map value.
#[inline(always)]
unsafe fn state_of(sk: *mut c_void, pace: *mut Pace) -> Option<*mut SocketState> {
    // SAFETY: the caller's promise.
    unsafe {
        if atomic::load(&raw const (*pace).mode) == PACE_OFF {
            return None;
        }
        let storage = (&raw const SOCKET_STATE).cast_mut().cast::<c_void>();
        let create = BPF_SK_STORAGE_GET_F_CREATE as u64;
        let state = bpf_sk_storage_get(storage, sk, ptr::null_mut(), create).cast::<SocketState>();
        if state.is_null() { None } else { Some(state) }
    }
}

/// Brings one socket to what its task may send now. `target` is what `bpf_setsockopt` takes.
///
/// # Safety
/// `pace` and `state` are live map values, and the state is the socket's.
#[inline(always)]
unsafe fn follow(target: *mut c_void, socket: TcpSock, pace: *mut Pace, state: *mut SocketState) {
    // SAFETY: the caller's promise. A socket's acknowledgements come one after the other, and its program sets options of it
    // while none does.
    unsafe {
        let current = socket.max_pacing_rate();
        let ours = (*state).ours;
        if ours == 0 || current != ours {
            // Another layout of ours had sockets, too, and its states are not known.
            let of_another_agent = ours == 0 && (*state).own == 0 && rates_are_ours();
            (*state).own = if of_another_agent { u64::MAX } else { current };
        }
        let own = (*state).own;
        let mode = atomic::load(&raw const (*pace).mode);
        let wanted = if mode == PACE_ON {
            let share = share(pace);
            let wanted = if own < share { own } else { share };
            if ours != 0 && current == ours && !pace::worth_changing(current, wanted) {
                return;
            }
            wanted
        } else if ours != 0 && current == ours || current != own {
            own
        } else {
            (*state).ours = 0;
            return;
        };
        let mut wanted = if wanted < UNPACED as u64 {
            wanted as u32
        } else if mode == PACE_ON {
            UNPACED - 1
        } else {
            UNPACED
        };
        (*state).ours = if mode == PACE_ON { wanted as u64 } else { 0 };
        bpf_setsockopt(target, SOL_SOCKET, SO_MAX_PACING_RATE, (&raw mut wanted).cast(), 4);
    }
}

#[inline(always)]
fn rates_are_ours() -> bool {
    match CONTROL.get_ptr(0) {
        // SAFETY: a word of a live map value.
        Some(control) => unsafe { atomic::load(&raw const (*control).rates_are_ours) != 0 },
        None => false,
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
unsafe fn close_epoch_if_over(slot: u32, pace: *mut Pace, rtt_us: u64) {
    unsafe {
        let start = atomic::load(&raw const (*pace).epoch_start_ns);
        let now = bpf_ktime_get_ns();
        let elapsed_us = now.saturating_sub(start) / 1000;
        if elapsed_us < pace::epoch_us(share(pace), rtt_us)
            || !atomic::compare_exchange(&raw mut (*pace).epoch_start_ns, start, now)
        {
            return;
        }
        // In a pool it has changed meanwhile.
        let rate = match pool::mean_rate(slot, elapsed_us, now) {
            Some(rate) if rate > 0 => rate,
            _ => atomic::load(&raw const (*pace).rate),
        };
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
unsafe fn count_as_active(state: *mut SocketState, pace: *mut Pace) {
    // SAFETY: live map values.
    unsafe {
        let epoch = atomic::load(&raw const (*pace).epoch);
        if atomic::load(&raw const (*pace).mode) == PACE_ON && (*state).epoch != epoch {
            (*state).epoch = epoch;
            atomic::fetch_add(&raw mut (*pace).active, 1);
        }
    }
}
