//! What leaves the node's uplinks: exact bytes on the wire, by task, and what no task owns; and the ceiling for frames that
//! a task makes itself.

use aya_ebpf::{macros::classifier, programs::TcContext};
use shaper_common::wire::wire_packets;

use crate::{
    atomic,
    maps::{CLOCK, UPLINK_STAT, of_slot},
    shaping::{self, Kind, Verdict},
    slots,
};

/// TCX_NEXT, and TC_ACT_UNSPEC of a direct-action filter: no verdict, the next one decides.
const NEXT: i32 = -1;
/// TC_ACT_SHOT
const DROP: i32 = 2;
/// Its packets meet no other hook.
const AF_PACKET: u32 = 17;

/// Counts every frame that leaves, forwarded ones and those of raw sockets included. Those of packet sockets, which no
/// hook of a cgroup sees, are held to the ceiling of their task here.
#[classifier]
pub fn uplink_egress(ctx: TcContext) -> i32 {
    // SAFETY: the context and plain fields of it; this CPU's value, and soft interrupts are off. The verifier demands the
    // null check.
    unsafe {
        let skb = ctx.skb.skb;
        let slot = slots::of_packet(skb);
        let (bytes, packets) = ((*skb).wire_len as u64, wire_packets((*skb).gso_segs as u64));
        let socket = (*skb).__bindgen_anon_2.sk;
        if !socket.is_null()
            && (*socket).family == AF_PACKET
            && let Some(clock) = CLOCK.get_ptr_mut(slot)
        {
            let price = atomic::load(&raw const (*clock).price);
            if price != 0 && shaping::verdict(slot, clock, Kind::Datagram, bytes, packets) == Verdict::Hold {
                return DROP;
            }
        }
        if let Some(stat) = of_slot(&UPLINK_STAT, slot) {
            (*stat).bytes += bytes;
            (*stat).packets += packets;
        }
    }
    NEXT
}
