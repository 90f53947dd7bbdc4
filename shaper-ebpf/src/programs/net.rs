//! Traffic of every managed socket, both ways, as bytes on the wire, and what TCP had to send again; and the ceiling of what
//! leaves, for what no socket paces.

use aya_ebpf::{
    helpers::generated::{bpf_sk_fullsock, bpf_skb_ecn_set_ce, bpf_skc_to_tcp_sock},
    macros::{btf_tracepoint, cgroup_skb},
    programs::{BtfTracePointContext, SkBuffContext},
};
use shaper_common::{
    abi::{Clock, SLOT_AGENT},
    wire::{wire_bytes, wire_packets},
};

use crate::{
    atomic,
    kernel::{self, TcpSock},
    maps::{CLOCK, NET_STAT, class_of_slot, is_on_duty, of_slot, touch},
    shaping::{self, Kind, Verdict},
    slots,
};

/// cgroup_skb: let the packet pass.
const PASS: i32 = 1;
/// cgroup_skb/egress: drop it, as a full queue would: TCP slows down, and the sender of a datagram is told nothing. (With 0
/// it would have an EPERM.)
const DROP: i32 = 2;

/// Index of the loopback device, in every network namespace.
const LOOPBACK: u32 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const UDP_HEADER: u64 = 8;
const IPV6_HEADER: u64 = 40;
/// ECN field of a packet that met congestion.
const CE: u8 = 3;

/// Counts what leaves, and charges it to the pacing loop and to the clocks; holds back what is beyond them.
#[cgroup_skb(egress)]
pub fn net_egress(ctx: SkBuffContext) -> i32 {
    // SAFETY: the context is an skb; a socket is attached to it at this hook.
    let slot = unsafe { slots::of_packet(ctx.skb.skb) };
    if slot < SLOT_AGENT {
        return PASS;
    }
    let mut seen = look_at(&ctx);
    touch(slot);
    remember(&ctx, slot);
    if let Some(clock) = CLOCK.get_ptr_mut(slot) {
        // SAFETY: a word of a live map value, and a field of the context.
        let (price, device) = unsafe { (atomic::load(&raw const (*clock).price), (*ctx.skb.skb).ifindex) };
        if price != 0 && device != LOOPBACK {
            match verdict(&ctx, slot, clock, &seen) {
                Verdict::Pass => {}
                // SAFETY: the context.
                Verdict::Mark => seen.marked |= unsafe { bpf_skb_ecn_set_ce(ctx.skb.skb) } == 1,
                Verdict::Hold => return DROP,
            }
        }
    }
    if let Some(stat) = of_slot(&NET_STAT, slot) {
        // SAFETY: aligned words of a live map value. Here a packet may come in between: the count of a
        // process that sends can be interrupted by one that acknowledges.
        unsafe {
            atomic::fetch_add(&raw mut (*stat).egress.bytes, seen.bytes);
            atomic::fetch_add(&raw mut (*stat).egress.packets, seen.packets);
            if seen.marked {
                atomic::fetch_add(&raw mut (*stat).egress_marks, 1);
            }
        }
    }
    PASS
}

/// Of a slot with a ceiling.
#[inline(always)]
fn verdict(ctx: &SkBuffContext, slot: u32, clock: *mut Clock, seen: &Seen) -> Verdict {
    // SAFETY: the context; a live map value.
    unsafe {
        let kind = if is_tcp(ctx) { Kind::Stream } else { Kind::Datagram };
        shaping::verdict(slot, clock, kind, seen.bytes, seen.packets)
    }
}

/// Whether a socket of TCP sends it. (What a packet says of itself proves nothing: a raw socket writes its own headers.)
///
/// # Safety
/// `ctx` is the context of the program.
#[inline(always)]
unsafe fn is_tcp(ctx: &SkBuffContext) -> bool {
    // SAFETY: the caller's promise; the verifier demands the null checks.
    unsafe {
        let socket = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return false;
        }
        let socket = bpf_sk_fullsock(socket);
        !socket.is_null() && (*socket).protocol == TCP as u32
    }
}

/// Counts what arrives.
#[cgroup_skb(ingress)]
pub fn net_ingress(ctx: SkBuffContext) -> i32 {
    // SAFETY: as above.
    let slot = unsafe { slots::of_packet(ctx.skb.skb) };
    if slot < SLOT_AGENT {
        return PASS;
    }
    let seen = look_at(&ctx);
    if let Some(stat) = of_slot(&NET_STAT, slot) {
        // SAFETY: this CPU's value; packets arrive one after the other, with soft interrupts off.
        unsafe {
            (*stat).ingress.bytes += seen.bytes;
            (*stat).ingress.packets += seen.packets;
            (*stat).ingress_marks += seen.marked as u64;
        }
    }
    touch(slot);
    remember(&ctx, slot);
    PASS
}

/// Has a socket of UDP know its slot, where what arrives for that is limited: `uplink_ingress` asks it.
#[inline(always)]
fn remember(ctx: &SkBuffContext, slot: u32) {
    if class_of_slot(slot) == 0 {
        return;
    }
    // SAFETY: the context; the verifier demands the null checks.
    unsafe {
        let socket = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return;
        }
        let socket = bpf_sk_fullsock(socket);
        if !socket.is_null() && (*socket).protocol == UDP as u32 {
            slots::remember(socket, slot);
        }
    }
}

/// Counts what TCP sends again.
#[btf_tracepoint(function = "tcp_retransmit_skb")]
pub fn tcp_retransmit_skb(ctx: BtfTracePointContext) -> i32 {
    if !is_on_duty() {
        return 0;
    }
    // SAFETY: the arguments are (socket, buffer, …) on every kernel; the verifier demands the null check.
    let cgroup = unsafe {
        let tcp = bpf_skc_to_tcp_sock(ctx.arg(0));
        if tcp.is_null() {
            return 0;
        }
        TcpSock::from_ptr(tcp.cast()).cgroup()
    };
    let Some(cgroup) = cgroup else { return 0 };
    let slot = slots::of(cgroup, cgroup.id());
    if slot < SLOT_AGENT {
        return 0;
    }
    if let Some(stat) = of_slot(&NET_STAT, slot) {
        // SAFETY: an aligned word of a live map value.
        unsafe { atomic::fetch_add(&raw mut (*stat).retransmits, 1) };
    }
    0
}

/// Counts what is thrown away on its way out. (What arrives belongs to no socket yet when it is.)
#[btf_tracepoint(function = "kfree_skb")]
pub fn kfree_skb(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the arguments are (buffer, location, reason, …) on every kernel since 5.17.
    let (cgroup, reason) = unsafe { (kernel::cgroup_of_buffer(ctx.arg(0)), ctx.arg::<u64>(2) as u32) };
    // 0: no drop after all; 1: consumed.
    if reason < 2 || !is_on_duty() {
        return 0;
    }
    let Some(cgroup) = cgroup else { return 0 };
    let slot = slots::of(cgroup, cgroup.id());
    if slot < SLOT_AGENT {
        return 0;
    }
    if let Some(stat) = of_slot(&NET_STAT, slot) {
        // SAFETY: an aligned word of a live map value.
        unsafe { atomic::fetch_add(&raw mut (*stat).drops, 1) };
    }
    0
}

/// What a buffer is, or will become, on the wire.
struct Seen {
    bytes: u64,
    packets: u64,
    marked: bool,
}

#[inline(always)]
fn look_at(ctx: &SkBuffContext) -> Seen {
    // SAFETY: plain fields of the context.
    let (len, segments) = unsafe { ((*ctx.skb.skb).len as u64, (*ctx.skb.skb).gso_segs as u64) };
    let first_two = first_two_bytes(ctx);
    let is_v4 = first_two[0] >> 4 == 4;
    // IPv4 has the type of service in its second byte, IPv6 the traffic class across the first two.
    let ecn = if is_v4 { first_two[1] & 3 } else { first_two[1] >> 4 & 3 };
    let headers = if segments > 1 { headers(ctx, first_two[0]) } else { 0 };
    Seen { bytes: wire_bytes(len, segments, headers), packets: wire_packets(segments), marked: ecn == CE }
}

/// Of the network header, with which the buffer begins at these hooks; 0 if they are not at hand.
#[inline(always)]
fn first_two_bytes(ctx: &SkBuffContext) -> [u8; 2] {
    // SAFETY: fields of the context, which the verifier knows as the bounds of the packet; it is read within them.
    unsafe {
        let (data, end) = ((*ctx.skb.skb).data as usize, (*ctx.skb.skb).data_end as usize);
        if data + 2 > end {
            return [0, 0];
        }
        [*(data as *const u8), *((data + 1) as *const u8)]
    }
}

/// Length of the network and transport headers of a segmented buffer. (IPv6 extension headers do
/// not occur in one: the kernel does not segment behind them.)
#[inline(always)]
fn headers(ctx: &SkBuffContext, first: u8) -> u64 {
    let is_v4 = first >> 4 == 4;
    let network = if is_v4 { (first as u64 & 15) * 4 } else { IPV6_HEADER };
    // SAFETY: as in `first_two_bytes`.
    unsafe {
        let (data, end) = ((*ctx.skb.skb).data as usize, (*ctx.skb.skb).data_end as usize);
        let transport = data + network as usize;
        // Where a driver left them elsewhere, they are copied.
        if data + 10 > end || transport + 13 > end {
            return copied_headers(ctx, is_v4, network);
        }
        let protocol = *((data + if is_v4 { 9 } else { 6 }) as *const u8);
        network + transport_header(protocol, || *((transport + 12) as *const u8))
    }
}

/// The same of headers that are not at hand.
#[inline(never)]
fn copied_headers(ctx: &SkBuffContext, is_v4: bool, network: u64) -> u64 {
    let byte = |offset: u64| ctx.load::<u8>(offset as usize).unwrap_or(0);
    network + transport_header(byte(if is_v4 { 9 } else { 6 }), || byte(network + 12))
}

/// `data_offset` reads the byte of a TCP header that says how long that is.
#[inline(always)]
fn transport_header(protocol: u8, data_offset: impl FnOnce() -> u8) -> u64 {
    if protocol == TCP { (data_offset() >> 4) as u64 * 4 } else { UDP_HEADER }
}
