//! Bytes on the wire.
//!
//! shaper counts what a link of Ethernet frames carries: the IP packet plus a 14-byte Ethernet
//! header, without preamble, FCS and inter-frame gap; this is what `tc` qdiscs count too
//! (`skb->wire_len`). At a cgroup hook a packet has no Ethernet header yet, and a segmented
//! buffer (GSO) has its network and transport headers once, though each segment will carry them.

/// Length of an Ethernet header, bytes.
pub const ETH_HLEN: u64 = 14;

/// Bytes on the wire of a packet seen at a cgroup hook.
///
/// `len`: length of the buffer from the network header on; `segments`: how many packets it will
/// become (0 and 1 mean one); `headers`: length of its network and transport headers, which every
/// segment repeats.
#[inline(always)]
pub const fn wire_bytes(len: u64, segments: u64, headers: u64) -> u64 {
    if segments > 1 { len + (segments - 1) * headers + segments * ETH_HLEN } else { len + ETH_HLEN }
}

/// Packets on the wire of a buffer with that many segments.
#[inline(always)]
pub const fn wire_packets(segments: u64) -> u64 {
    if segments > 1 { segments } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_packet_gains_its_ethernet_header() {
        assert_eq!(wire_bytes(60, 0, 40), 74);
        assert_eq!(wire_bytes(1500, 1, 52), 1514);
        assert_eq!(wire_packets(0), 1);
    }

    #[test]
    fn a_segmented_buffer_counts_as_the_frames_that_leave() {
        // 44 segments of 1448 bytes behind 52 bytes of headers: 44 frames of 1514 bytes.
        assert_eq!(wire_bytes(52 + 44 * 1448, 44, 52), 44 * 1514);
        assert_eq!(wire_packets(44), 44);
    }
}
