//! The ceiling of a slot, for what no socket paces (`shaper_common::clock`).

use aya_ebpf::helpers::bpf_ktime_get_ns;
use shaper_common::{
    abi::{Clock, PacketCount},
    clock,
};

use crate::{atomic, maps::PACE, pool};

/// How a packet is held to its ceiling.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP, which is paced as well.
    Stream,
    /// All else.
    Datagram,
}

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves.
    Pass,
    /// It leaves, with a congestion mark if it can carry one: soon others will not leave.
    Mark,
    /// It is dropped.
    Hold,
}

/// What becomes of a packet of `bytes` on the wire now. If it leaves, it is charged.
///
/// # Safety
/// `clock` is the live map value of `slot`, and has a price.
#[inline(always)]
pub unsafe fn verdict(slot: u32, clock: *mut Clock, kind: Kind, bytes: u64, packets: u64) -> Verdict {
    // SAFETY: the caller's promise. All words are changed atomically; a clock that is read while another CPU moves it is
    // as good as one read just before or after.
    unsafe {
        let now_ns = bpf_ktime_get_ns();
        let share = pool::keep_up(slot, now_ns);
        let price = atomic::load(&raw const (*clock).price);
        let now = clock::ticks(now_ns);
        let floor = now.saturating_sub(atomic::load(&raw const (*clock).credit));
        let cost = clock::cost(bytes, price);
        match kind {
            Kind::Stream => {
                let slack = atomic::load(&raw const (*clock).stream_slack);
                let due = charge(&raw mut (*clock).streams_due, floor, clock::stream_cost(cost));
                if due > now + slack && bytes > clock::CONTROL_BYTES {
                    give_back(&raw mut (*clock).streams_due, clock::stream_cost(cost));
                    hold(&raw mut (*clock).streams_held, bytes, packets);
                    return Verdict::Hold;
                }
                let datagram_at = atomic::load(&raw const (*clock).datagram_at);
                if now.saturating_sub(datagram_at) < clock::ticks(clock::DATAGRAMS_NS)
                    && claims(&raw mut (*clock).streams_half, floor, now, cost)
                {
                    charge(&raw mut (*clock).datagrams_due, floor, cost);
                }
                count_for_pacing(slot, bytes);
                pool::note(share, bytes);
                Verdict::Pass
            }
            Kind::Datagram => {
                let due = charge(&raw mut (*clock).datagrams_due, floor, cost);
                atomic::store(&raw mut (*clock).datagram_at, now);
                if due > now {
                    give_back(&raw mut (*clock).datagrams_due, cost);
                    hold(&raw mut (*clock).datagrams_held, bytes, packets);
                    return Verdict::Hold;
                }
                if claims(&raw mut (*clock).datagrams_half, floor, now, cost) {
                    charge(&raw mut (*clock).streams_due, floor, clock::stream_cost(cost));
                    count_for_pacing(slot, bytes);
                }
                pool::note(share, bytes);
                if clock::is_nearly_due(due, floor, now) { Verdict::Mark } else { Verdict::Pass }
            }
        }
    }
}

/// So many credits a claim may be ahead of its clock.
const CLAIM_CREDITS: u64 = 4;

/// Moves a clock on; returns when it was due before, and not before `floor`.
#[inline(always)]
unsafe fn charge(clock: *mut u64, floor: u64, cost: u64) -> u64 {
    // SAFETY: a word of a live map value.
    unsafe {
        let due = atomic::load(clock);
        if due < floor {
            atomic::compare_exchange(clock, due, floor);
        }
        atomic::fetch_add(clock, cost)
    }
}

#[inline(always)]
unsafe fn give_back(clock: *mut u64, cost: u64) {
    // SAFETY: a word of a live map value.
    unsafe { atomic::fetch_add(clock, cost.wrapping_neg()) };
}

/// Whether what costs so much is within half of the ceiling, give or take a few of its credits: what TCP sends comes in large
/// pieces. Then it is charged to that.
#[inline(always)]
unsafe fn claims(half: *mut u64, floor: u64, now: u64, cost: u64) -> bool {
    // SAFETY: a word of a live map value.
    unsafe {
        if atomic::load(half) > now + CLAIM_CREDITS * (now - floor) {
            return false;
        }
        charge(half, floor, 2 * cost);
        true
    }
}

/// The pacing of TCP makes room for it.
#[inline(always)]
unsafe fn count_for_pacing(slot: u32, bytes: u64) {
    if let Some(pace) = PACE.get_ptr_mut(slot) {
        // SAFETY: a live map value, whose `sent` is only ever changed atomically.
        unsafe { atomic::fetch_add(&raw mut (*pace).sent, bytes) };
    }
}

#[inline(always)]
unsafe fn hold(held: *mut PacketCount, bytes: u64, packets: u64) {
    // SAFETY: in a live map value.
    unsafe {
        atomic::fetch_add(&raw mut (*held).bytes, bytes);
        atomic::fetch_add(&raw mut (*held).packets, packets);
    }
}
