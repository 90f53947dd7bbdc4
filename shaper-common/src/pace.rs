//! Closed-loop pacing of a task's TCP sockets.
//!
//! Every socket of a task gets the same `SO_MAX_PACING_RATE`, the *share*. Nobody counts sockets
//! (idle ones would count too): once an epoch the loop compares what the task really put on the
//! wire with what it may, and scales the share. Headers, retransmissions, sockets that need less
//! than their share and a change of the ceiling all come out right, because only the outcome is
//! measured.
//!
//! What a task sent beyond its ceiling becomes a *debt* that the next [`DEBT_HORIZON_US`] save
//! again, so a start with many sockets, which the loop cannot foresee, is exact over a second.
//!
//! The loop has no clock and no state of its own: the kernel program passes both.

/// Shortest epoch, µs.
pub const EPOCH_MIN_US: u64 = 10_000;
/// Longest time that an epoch is taken to have lasted, µs. A task that was silent for longer has
/// earned nothing by it.
pub const EPOCH_MAX_US: u64 = 1_000_000;
/// Within this time a debt is saved again, µs.
pub const DEBT_HORIZON_US: u64 = 150_000;
/// The debt is stored with this added, so that the kernel needs no signed arithmetic.
pub const DEBT_BIAS: u64 = 1 << 62;
/// A share below two segments in a retransmission timeout of 200 ms would stall a flow, and with
/// it the acknowledgements that drive the loop. Bytes a second.
pub const SHARE_MIN: u64 = 2 * 1514 * 5;
/// Largest ceiling, bytes a second (400 Gbit/s): keeps every product below 2⁶³.
pub const RATE_MAX: u64 = 50_000_000_000;

/// The loop's state between epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loop {
    /// What each socket may send, bytes a second.
    pub share: u64,
    /// Bytes beyond the ceiling, plus [`DEBT_BIAS`].
    pub debt: u64,
}

/// Length of an epoch at a ceiling of `rate` bytes a second, µs: long enough to hold four full frames.
#[inline(always)]
pub const fn epoch_us(rate: u64) -> u64 {
    let four_frames = 4 * 1514 * 1_000_000 / if rate == 0 { 1 } else { rate };
    if four_frames > EPOCH_MAX_US {
        EPOCH_MAX_US
    } else if four_frames > EPOCH_MIN_US {
        four_frames
    } else {
        EPOCH_MIN_US
    }
}

/// Where the loop starts for a ceiling of `rate` bytes a second. Pacing counts payload while the
/// ceiling counts the wire, so the first share is 15/16 of it.
#[inline(always)]
pub const fn start(rate: u64) -> Loop {
    Loop { share: bound(rate - rate / 16, rate), debt: DEBT_BIAS }
}

/// Closes an epoch: `sent` bytes left in `elapsed_us` under a ceiling of `rate` bytes a second.
#[inline(always)]
pub const fn close_epoch(before: Loop, rate: u64, sent: u64, elapsed_us: u64) -> Loop {
    let rate = if rate > RATE_MAX { RATE_MAX } else { rate };
    let elapsed = if elapsed_us == 0 {
        1
    } else if elapsed_us > EPOCH_MAX_US {
        EPOCH_MAX_US
    } else {
        elapsed_us
    };
    let allowed = rate * elapsed / 1_000_000;

    // Debt within [−2 epochs, +1 s] of the ceiling: a little credit makes the mean exact, much
    // credit would be a burst; a debt of more than a second is more than anybody can mean.
    let credit = rate * (2 * EPOCH_MIN_US) / 1_000_000;
    let mut debt = (before.debt + sent).saturating_sub(allowed);
    if debt < DEBT_BIAS - credit {
        debt = DEBT_BIAS - credit;
    }
    if debt > DEBT_BIAS + rate {
        debt = DEBT_BIAS + rate;
    }

    // Aim below the ceiling while there is a debt, above it while there is credit.
    let target = if debt >= DEBT_BIAS {
        let back = (debt - DEBT_BIAS) * 1_000_000 / DEBT_HORIZON_US;
        let least = rate / 4;
        if back + least > rate { least } else { rate - back }
    } else {
        rate + (DEBT_BIAS - debt) * 1_000_000 / DEBT_HORIZON_US
    };

    let measured = sent * 1_000_000 / elapsed;
    let share = if measured == 0 {
        before.share * 2
    } else {
        // 16-bit fixed point. Growth is damped, for the task may only have been pausing; a gross
        // excess is answered at once and in full.
        let factor = (target << 16) / measured;
        let factor = if factor > 2 << 16 {
            3 << 15
        } else if factor > 1 << 15 {
            (factor + (1 << 16)) / 2
        } else if factor < 1 << 12 {
            1 << 12
        } else {
            factor
        };
        scale(before.share, factor)
    };
    Loop { share: bound(share, rate), debt }
}

/// Whether a socket's pacing rate is far enough from the share to be worth a change (1/64).
#[inline(always)]
pub const fn worth_changing(current: u64, share: u64) -> bool {
    let distance = current.abs_diff(share);
    distance > share / 64
}

/// `value × factor / 2¹⁶` without overflow for values up to [`RATE_MAX`] and factors up to 2¹⁷.
#[inline(always)]
const fn scale(value: u64, factor: u64) -> u64 {
    (value >> 8) * factor / 256 + (value & 255) * factor / 65536
}

/// A share is at most the whole ceiling, and at least what keeps a flow alive.
#[inline(always)]
const fn bound(share: u64, rate: u64) -> u64 {
    let low = if rate / 4096 > SHARE_MIN { rate / 4096 } else { SHARE_MIN };
    if share > rate {
        if rate < SHARE_MIN { SHARE_MIN } else { rate }
    } else if share < low {
        low
    } else {
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `flows` greedy senders, each sending its pacing rate × 1514/1448 (headers), which follows
    /// the share one epoch late. Returns the bytes sent in each second.
    fn simulate(rate: u64, flows: u64, seconds: u64) -> Vec<u64> {
        let epoch = epoch_us(rate);
        let (mut state, mut pacing) = (start(rate), start(rate).share);
        let mut per_second = Vec::new();
        for _ in 0..seconds {
            let mut total = 0;
            for _ in 0..1_000_000 / epoch {
                let sent = flows * pacing * 1514 / 1448 * epoch / 1_000_000;
                total += sent;
                pacing = state.share;
                state = close_epoch(state, rate, sent, epoch);
            }
            per_second.push(total * 1_000_000 / (1_000_000 / epoch * epoch));
        }
        per_second
    }

    #[test]
    fn eight_flows_that_start_at_once_are_within_five_percent_in_the_first_second() {
        for rate in [1_250_000, 12_500_000, 125_000_000, 625_000_000] {
            let seconds = simulate(rate, 8, 3);
            let ratio = |bytes: u64| bytes as f64 / rate as f64;
            assert!(ratio(seconds[0]) < 1.05, "{rate}: {seconds:?}");
            assert!((ratio(seconds[2]) - 1.0).abs() < 0.01, "{rate}: {seconds:?}");
        }
    }

    #[test]
    fn a_silent_task_earns_no_burst() {
        let rate = 12_500_000;
        let mut state = start(rate);
        for _ in 0..1000 {
            state = close_epoch(state, rate, 0, EPOCH_MIN_US);
        }
        assert_eq!(state.share, rate);
        assert!(DEBT_BIAS - state.debt <= rate / 50);
    }

    #[test]
    fn a_lowered_ceiling_is_obeyed_within_three_epochs() {
        let (before, after) = (125_000_000, 12_500_000);
        let mut state = start(before);
        let mut pacing = state.share;
        let mut sent = 0;
        for _ in 0..3 {
            sent = pacing * EPOCH_MIN_US / 1_000_000;
            pacing = state.share;
            state = close_epoch(state, after, sent, EPOCH_MIN_US);
        }
        let _ = sent;
        assert!(state.share <= after, "{state:?}");
    }

    #[test]
    fn an_epoch_holds_four_frames() {
        assert_eq!(epoch_us(125_000_000), EPOCH_MIN_US);
        assert_eq!(epoch_us(125_000), 48_448);
        assert_eq!(epoch_us(0), EPOCH_MAX_US);
    }

    proptest! {
        #[test]
        fn the_share_stays_in_its_bounds_and_nothing_overflows(
            rate in 1_000u64..=RATE_MAX, share in 0u64..=RATE_MAX, debt in 0u64..=u64::MAX >> 8,
            sent in 0u64..=RATE_MAX, elapsed in 0u64..=u64::MAX >> 1,
        ) {
            let before = Loop { share: share.min(rate), debt: DEBT_BIAS - (debt >> 3).min(DEBT_BIAS) };
            let after = close_epoch(before, rate, sent, elapsed);
            prop_assert!(after.share <= rate.max(SHARE_MIN));
            prop_assert!(after.share >= SHARE_MIN);
            prop_assert!(after.debt <= DEBT_BIAS + rate);
        }

        #[test]
        fn any_number_of_greedy_flows_converges_to_the_ceiling(
            rate in 1_250_000u64..=1_250_000_000, flows in 1u64..=32,
        ) {
            let seconds = simulate(rate, flows, 4);
            let ratio = seconds[3] as f64 / rate as f64;
            prop_assert!((ratio - 1.0).abs() < 0.02, "{flows} flows: {ratio}");
        }
    }
}
