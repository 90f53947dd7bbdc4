//! What leaves the node's uplinks: exact bytes on the wire, by task, and what no task owns.

use aya_ebpf::{macros::classifier, programs::TcContext};
use shaper_common::wire::wire_packets;

use crate::{
    maps::{UPLINK_STAT, of_slot},
    slots,
};

/// TCX_NEXT, and TC_ACT_UNSPEC of a direct-action filter: no verdict, the next one decides.
const NEXT: i32 = -1;

/// Counts every frame that leaves, forwarded ones and those of raw sockets included.
#[classifier]
pub fn uplink_egress(ctx: TcContext) -> i32 {
    // SAFETY: the context and plain fields of it; this CPU's value, and soft interrupts are off.
    unsafe {
        let skb = ctx.skb.skb;
        let slot = slots::of_packet(skb);
        if let Some(stat) = of_slot(&UPLINK_STAT, slot) {
            (*stat).bytes += (*skb).wire_len as u64;
            (*stat).packets += wire_packets((*skb).gso_segs as u64);
        }
    }
    NEXT
}
