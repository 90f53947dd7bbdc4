//! What leaves the node's uplinks: exact bytes on the wire, by task, and what no task owns.

use aya_ebpf::{helpers::generated::bpf_skb_cgroup_id, macros::classifier, programs::TcContext};
use shaper_common::wire::wire_packets;

use crate::maps::{UPLINK_STAT, slot_of};

/// TCX_NEXT, and TC_ACT_UNSPEC of a direct-action filter: no verdict, the next one decides.
const NEXT: i32 = -1;

/// Counts every frame that leaves, forwarded ones and those of raw sockets included.
#[classifier]
pub fn uplink_egress(ctx: TcContext) -> i32 {
    // SAFETY: plain fields of the context; the helper answers 0 for a frame without a socket.
    unsafe {
        let skb = ctx.skb.skb;
        let slot = slot_of(bpf_skb_cgroup_id(skb));
        if let Some(stat) = UPLINK_STAT.get_ptr_mut(slot) {
            (*stat).bytes += (*skb).wire_len as u64;
            (*stat).packets += wire_packets((*skb).gso_segs as u64);
        }
    }
    NEXT
}
