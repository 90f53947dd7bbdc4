//! Traffic of every managed socket, both ways, as bytes on the wire.

use aya_ebpf::{helpers::generated::bpf_skb_cgroup_id, macros::cgroup_skb, programs::SkBuffContext};
use shaper_common::{
    abi::{PACE_ON, PacketCount, SLOT_FIRST},
    wire::{wire_bytes, wire_packets},
};

use crate::{
    atomic,
    maps::{NET_STAT, PACE, slot_of},
};

/// cgroup_skb: let the packet pass.
const PASS: i32 = 1;

/// Index of the loopback device, in every network namespace.
const LOOPBACK: u32 = 1;
const IPPROTO_TCP: u8 = 6;
const UDP_HEADER: u64 = 8;
const IPV6_HEADER: u64 = 40;

/// Counts what leaves, and charges it to the pacing loop.
#[cgroup_skb(egress)]
pub fn net_egress(ctx: SkBuffContext) -> i32 {
    // SAFETY: the context is an skb; a socket is attached to it at this hook.
    let slot = slot_of(unsafe { bpf_skb_cgroup_id(ctx.skb.skb) });
    if slot < SLOT_FIRST {
        return PASS;
    }
    let (bytes, packets) = on_the_wire(&ctx);
    if let Some(stat) = NET_STAT.get_ptr_mut(slot) {
        // SAFETY: this CPU's value.
        unsafe { count(&mut (*stat).egress, bytes, packets) };
    }
    if let Some(pace) = PACE.get_ptr_mut(slot) {
        // SAFETY: a field of the context; a live map value, whose `sent` is only ever changed atomically.
        unsafe {
            if (*ctx.skb.skb).ifindex != LOOPBACK && atomic::load(&raw const (*pace).mode) == PACE_ON {
                atomic::fetch_add(&raw mut (*pace).sent, bytes);
            }
        }
    }
    PASS
}

/// Counts what arrives.
#[cgroup_skb(ingress)]
pub fn net_ingress(ctx: SkBuffContext) -> i32 {
    // SAFETY: as above.
    let slot = slot_of(unsafe { bpf_skb_cgroup_id(ctx.skb.skb) });
    if slot < SLOT_FIRST {
        return PASS;
    }
    let (bytes, packets) = on_the_wire(&ctx);
    if let Some(stat) = NET_STAT.get_ptr_mut(slot) {
        // SAFETY: this CPU's value.
        unsafe { count(&mut (*stat).ingress, bytes, packets) };
    }
    PASS
}

#[inline(always)]
fn count(into: &mut PacketCount, bytes: u64, packets: u64) {
    into.bytes += bytes;
    into.packets += packets;
}

/// Bytes and packets that this buffer is, or will become, on the wire.
#[inline(always)]
fn on_the_wire(ctx: &SkBuffContext) -> (u64, u64) {
    // SAFETY: plain fields of the context.
    let (len, segments) = unsafe { ((*ctx.skb.skb).len as u64, (*ctx.skb.skb).gso_segs as u64) };
    let headers = if segments > 1 { headers(ctx) } else { 0 };
    (wire_bytes(len, segments, headers), wire_packets(segments))
}

/// Length of the network and transport headers of a segmented buffer. (IPv6 extension headers do
/// not occur in one: the kernel does not segment behind them.)
#[inline(always)]
fn headers(ctx: &SkBuffContext) -> u64 {
    let byte = |offset: u64| ctx.load::<u8>(offset as usize).unwrap_or(0);
    let first = byte(0);
    let (network, protocol) =
        if first >> 4 == 4 { ((first as u64 & 15) * 4, byte(9)) } else { (IPV6_HEADER, byte(6)) };
    let transport = if protocol == IPPROTO_TCP { (byte(network + 12) >> 4) as u64 * 4 } else { UDP_HEADER };
    network + transport
}
