//! The clock of what a task may send: a ceiling for traffic that no socket paces.
//!
//! For a clock, *due* is the time at which all that it has let through is paid for at the ceiling (the generic cell
//! rate algorithm's theoretical arrival time). A packet moves it on by what it costs, and one that finds it too far
//! in the future is held back. A clock never lags behind now by more than its credit: that is the burst that a task
//! has after silence. One word, moved by atomic additions: no lock, no division, exact on any number of CPUs.
//!
//! A slot has four of them, because its traffic is of two kinds ([`crate::pace`] paces the sockets of TCP):
//!
//! - **datagrams** (everything but TCP) are held back at once when their clock is beyond now. TCP's packets move this
//!   clock as well, but only as fast as half of the ceiling, and the pacing of TCP counts datagrams up to half of the
//!   ceiling, too: where both want more than that each has half, and what one of them leaves the other has.
//! - **TCP** is held back by its own clock, which runs a little faster than the ceiling ([`STREAM_GAIN`]) and has
//!   [`stream_slack`]: a sender that lets itself be paced never meets it, and one that does not never gets past it.
//!
//! What is held back is dropped; there is no queue. Before that comes to pass, when three quarters of the credit are used,
//! datagrams that can carry a congestion mark (ECN) get one.

/// A clock counts ticks, of 1/64 ns: a frame of 60 bytes takes 1.2 ns at 400 Gbit/s. In 64 bits it runs for nine years.
const TICK_SHIFT: u32 = 6;
/// Prices are ns per byte in units of 2⁻²⁰: within 0.005 % up to 400 Gbit/s.
const PRICE_SHIFT: u32 = 20;

/// How long the credit is after silence, ns …
const CREDIT_NS: u64 = 20_000_000;
/// … or so many bytes, whichever lasts longer: two full frames.
const CREDIT_BYTES: u64 = 2 * 1514;

/// How far TCP may be ahead of its clock, ns …
const STREAM_SLACK_NS: u64 = 200_000_000;
/// … or so many bytes, whichever lasts longer: sixteen of the largest buffers that TCP hands down at once.
const STREAM_SLACK_BYTES: u64 = 16 * 65_536;

/// TCP's own clock runs faster than the ceiling by one part in so many.
const STREAM_GAIN: u64 = 64;

/// A TCP packet of at most so many bytes on the wire is control, not data, and is never held back: without it neither
/// side would learn anything.
pub const CONTROL_BYTES: u64 = 120;

/// For so long after a datagram TCP's packets move the clock of the datagrams, ns.
pub const DATAGRAMS_NS: u64 = 1_000_000_000;

/// The lowest ceiling that a clock knows, bytes a second: lower ones count as this.
const RATE_MIN: u64 = 1 << 10;
/// More bytes at once count as so many: with [`RATE_MIN`] every product stays below 2⁶⁰.
const BYTES_MAX: u64 = 1 << 20;

/// What a byte costs at a ceiling of `rate` bytes a second, ns · 2²⁰.
#[inline(always)]
pub const fn price(rate: u64) -> u64 {
    (1_000_000_000 << PRICE_SHIFT) / if rate < RATE_MIN { RATE_MIN } else { rate }
}

/// What `bytes` cost at a `price`, ticks.
#[inline(always)]
pub const fn cost(bytes: u64, price: u64) -> u64 {
    let bytes = if bytes > BYTES_MAX { BYTES_MAX } else { bytes };
    (bytes * price) >> (PRICE_SHIFT - TICK_SHIFT)
}

/// The same for TCP's own clock.
#[inline(always)]
pub const fn stream_cost(cost: u64) -> u64 {
    cost - cost / (STREAM_GAIN + 1)
}

/// A time of `CLOCK_MONOTONIC`, or a length, in ticks.
#[inline(always)]
pub const fn ticks(ns: u64) -> u64 {
    ns << TICK_SHIFT
}

/// Whether of the credit, which lies between `floor` and `now`, three quarters are used.
#[inline(always)]
pub const fn is_nearly_due(due: u64, floor: u64, now: u64) -> bool {
    let used = due.saturating_sub(floor);
    used > (now - floor) / 4 * 3
}

/// The credit at a `price`, ticks.
#[inline(always)]
pub const fn credit(price: u64) -> u64 {
    longer(ticks(CREDIT_NS), cost(CREDIT_BYTES, price))
}

/// How far TCP may be ahead at a `price`, ticks.
#[inline(always)]
pub const fn stream_slack(price: u64) -> u64 {
    longer(ticks(STREAM_SLACK_NS), cost(STREAM_SLACK_BYTES, price))
}

#[inline(always)]
const fn longer(a: u64, b: u64) -> u64 {
    if a > b { a } else { b }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = ticks(1_000_000_000);

    /// One clock, as the program moves it.
    struct Clock {
        due: u64,
        price: u64,
    }

    impl Clock {
        fn lets_through(&mut self, now: u64, bytes: u64) -> bool {
            self.due = self.due.max(now - credit(self.price));
            let passes = self.due <= now;
            if passes {
                self.due += cost(bytes, self.price);
            }
            passes
        }
    }

    #[test]
    fn a_byte_costs_its_time() {
        // 1 Gbit/s: a frame of 1514 bytes takes 12.112 µs.
        assert_eq!(cost(1514, price(125_000_000)), ticks(12_112));
        assert_eq!(cost(65_536, price(16_000)), ticks(65_536 * 62_500));
        assert_eq!(stream_cost(65_000), 64_000);
        assert_eq!(price(0), price(RATE_MIN));
        assert_eq!(cost(u64::MAX, price(0)), BYTES_MAX * SECOND / RATE_MIN);
    }

    #[test]
    fn congestion_is_told_of_when_a_quarter_of_the_credit_is_left() {
        assert!(!is_nearly_due(1_000, 1_000, 2_000));
        assert!(!is_nearly_due(1_750, 1_000, 2_000));
        assert!(is_nearly_due(1_751, 1_000, 2_000));
        // It was due long ago: another CPU has moved it on meanwhile.
        assert!(!is_nearly_due(0, 1_000, 2_000));
    }

    #[test]
    fn low_rates_have_room_for_whole_packets() {
        assert_eq!(credit(price(125_000_000)), ticks(CREDIT_NS));
        assert_eq!(credit(price(125_000)), ticks(3028 * 8_000));
        assert_eq!(stream_slack(price(125_000_000)), ticks(STREAM_SLACK_NS));
        assert_eq!(stream_slack(price(125_000)), ticks((16 << 16) * 8_000));
    }

    proptest! {
        #[test]
        fn whoever_offers_more_has_the_ceiling_and_not_more(
            rate in 16_000_u64..10_000_000_000,
            size in 60_u64..65_000,
            overload in 1.5_f64..20.0,
        ) {
            let mut clock = Clock { due: 0, price: price(rate) };
            let of_one = cost(size, clock.price);
            let gap = (of_one as f64 / overload) as u64 + 1;
            let length = 5_000 * of_one;
            let start = 100 * SECOND;
            let (mut now, mut passed) = (start, 0);
            while now < start + length {
                if clock.lets_through(now, size) {
                    passed += size;
                }
                now += gap;
            }
            let to_bytes = |ticks: u64| rate as f64 * ticks as f64 / SECOND as f64;
            // What is beyond is the credit, and the packet that is under way when the time is over.
            let most = 1.001 * to_bytes(length + credit(clock.price)) + size as f64;
            prop_assert!(passed as f64 <= most, "{passed} of {most}");
            // What comes up to one gap late is not lost while that is within the credit.
            let late = gap.saturating_sub(credit(clock.price)) as f64 / of_one as f64;
            prop_assert!(passed as f64 >= 0.999 * to_bytes(length) / (1.0 + late), "{passed} of {}", to_bytes(length));
        }

        #[test]
        fn whoever_stays_below_loses_nothing(rate in 16_000_u64..10_000_000_000, size in 60_u64..65_000) {
            let mut clock = Clock { due: 0, price: price(rate) };
            let gap = cost(size, clock.price) + 1;
            for packet in 0..1_000 {
                prop_assert!(clock.lets_through(100 * SECOND + packet * gap, size));
            }
        }
    }
}
