//! Closed-loop pacing of a task's TCP sockets.
//!
//! Every socket of a task gets the same `SO_MAX_PACING_RATE`, the *share*: the ceiling, divided by
//! the number of *active* sockets, times a *gain* and an *aim*.
//!
//! - **Active** is a socket that had an acknowledgement in this epoch or lately. Counting established
//!   sockets would halve the rate for each idle one; counting active ones answers a start of many flows
//!   at once, before the loop has measured anything.
//! - The **gain** closes the loop: once an epoch, what the task really put on the wire is compared
//!   with what was aimed at. Headers, retransmissions, and sockets that need less than their share come
//!   out right, because only the outcome is measured. It is slow: it learns what stays.
//! - The **aim** is fast: what a task sent beyond its ceiling becomes a **debt** that is saved again
//!   within [`DEBT_HORIZON_US`], so the burst with which TCP begins (ten unpaced segments a flow) is made
//!   good within the first second. The two are kept apart, or the gain would learn the debt.
//!
//! The loop has no clock and no state of its own: the kernel program passes both.

/// Shortest epoch, µs.
pub const EPOCH_MIN_US: u64 = 10_000;
/// Longest that the loop waits for an epoch to end, µs. (It may last longer: it ends with an
/// acknowledgement.)
pub const EPOCH_MAX_US: u64 = 2_000_000;
/// A longer epoch is taken as one of this length at the same rate, µs: keeps every product below 2⁶³.
const ELAPSED_MAX_US: u64 = 100_000_000;
/// Within about this time a debt is saved again, µs.
pub const DEBT_HORIZON_US: u64 = 500_000;
/// The debt is stored with this added, so that the kernel needs no signed arithmetic.
pub const DEBT_BIAS: u64 = 1 << 62;
/// A share below two segments in a retransmission timeout of 200 ms would stall a flow, and with
/// it the acknowledgements that drive the loop. Bytes a second.
pub const SHARE_MIN: u64 = 2 * FRAME * 5;
/// Largest ceiling, bytes a second (400 Gbit/s): keeps every product below 2⁶³.
pub const RATE_MAX: u64 = 50_000_000_000;
/// A gain of one.
pub const GAIN_ONE: u64 = 1 << 16;
/// Where the loop starts: pacing counts payload while the ceiling counts the wire.
pub const GAIN_START: u64 = GAIN_ONE - GAIN_ONE / 16;
/// More sockets than this are taken as this many.
pub const ACTIVE_MAX: u64 = 1 << 15;

/// A full Ethernet frame, bytes.
const FRAME: u64 = 1514;
/// The largest buffer that TCP hands down at once, bytes.
const BURST_MAX: u64 = 65_536;
const GAIN_MIN: u64 = GAIN_ONE / 64;
/// What one epoch may say at most: half too much, or half too little.
const FACTOR_MIN: u64 = GAIN_ONE / 2;
const FACTOR_MAX: u64 = 3 * GAIN_ONE / 2;
/// A debt is remembered up to what the ceiling lets through in this time, µs: more was sent before the loop
/// could act, and saving it again would be a second disturbance.
const DEBT_MAX_US: u64 = 150_000;
/// Bounds of the credit, likewise.
const CREDIT_MIN_US: u64 = 20_000;
const CREDIT_MAX_US: u64 = 100_000;

/// The loop's state between epochs. See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loop {
    /// In 1/65536.
    pub gain: u64,
    /// In 1/65536 of the ceiling.
    pub aim: u64,
    /// Bytes beyond the ceiling, plus [`DEBT_BIAS`].
    pub debt: u64,
}

/// Where the loop starts.
pub const START: Loop = Loop { gain: GAIN_START, aim: GAIN_ONE, debt: DEBT_BIAS };

/// What one epoch was like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// Its length, µs.
    pub elapsed_us: u64,
    /// Bytes on the wire in it.
    pub sent: u64,
    /// Sockets that were active in it.
    pub active: u64,
    /// For how many the share was made when it began: [`remember`] of the epochs before.
    pub active_before: u64,
}

/// Length of an epoch in which each socket may send `share` bytes a second, µs: a socket sends a largest
/// burst in it, so that none is missed when the active ones are counted, and what was measured is no
/// accident. (On a path of less than half a millisecond Linux sends up to 64 KiB at once however low the
/// pacing rate is: `tcp_tso_rtt_log`.) And no less than two round trips, `rtt_us` each, so that the effect
/// of the last change is what is measured.
#[inline(always)]
pub const fn epoch_us(share: u64, rtt_us: u64) -> u64 {
    let burst = BURST_MAX * 1_000_000 / at_least_one(share);
    let longest = max(max(burst, 2 * rtt_us), EPOCH_MIN_US);
    if longest > EPOCH_MAX_US { EPOCH_MAX_US } else { longest }
}

/// What each of `active` sockets may send, bytes a second.
#[inline(always)]
pub const fn share(rate: u64, gain: u64, aim: u64, active: u64) -> u64 {
    let share = scale(scale(rate, aim), gain) / at_least_one(active);
    if share < SHARE_MIN {
        SHARE_MIN
    } else if share > rate {
        rate
    } else {
        share
    }
}

/// How many sockets the next epoch reckons with: those that were active in this one, or a quarter fewer
/// than before, if that is more. A socket that was silent by accident does not make the others faster.
#[inline(always)]
pub const fn remember(active: u64, active_before: u64) -> u64 {
    max(active, active_before - max(active_before / 4, if active_before > 0 { 1 } else { 0 }))
}

/// Closes an epoch under a ceiling of `rate` bytes a second.
#[inline(always)]
pub const fn close_epoch(before: Loop, rate: u64, epoch: Epoch) -> Loop {
    let rate = if rate > RATE_MAX { RATE_MAX } else { rate };
    let (elapsed, sent) = if epoch.elapsed_us > ELAPSED_MAX_US {
        (ELAPSED_MAX_US, epoch.sent / (epoch.elapsed_us / ELAPSED_MAX_US))
    } else {
        (at_least_one(epoch.elapsed_us), epoch.sent)
    };
    // More than any link carries in that time.
    let most = RATE_MAX * elapsed / 1_000_000;
    let sent = if sent > most { most } else { sent };
    let debt = owe(before.debt, rate, sent, elapsed);
    let aim = aim(debt, rate, elapsed);

    if sent == 0 {
        return Loop { gain: GAIN_START, aim, debt };
    }
    // Many sockets that joined changed the share meanwhile; what was sent says nothing about the gain.
    if epoch.active > 2 * epoch.active_before {
        return Loop { gain: before.gain, aim, debt };
    }
    // Those for whom the share was made and who were silent are not missed: there will be fewer next time.
    let shared = at_least_one(max(epoch.active, epoch.active_before));
    let expected = scale(rate, before.aim) * at_least_one(epoch.active) / shared;
    // 16-bit fixed point, damped: sockets follow one after the other.
    let factor = (expected << 16) / at_least_one(sent * 1_000_000 / elapsed);
    let factor = if factor > FACTOR_MAX {
        FACTOR_MAX
    } else if factor < FACTOR_MIN {
        FACTOR_MIN
    } else {
        factor
    };
    let gain = scale(before.gain, (factor + 3 * GAIN_ONE) / 4);
    let most = at_least_one(epoch.active) << 16;
    let gain = if gain > most {
        most
    } else if gain < GAIN_MIN {
        GAIN_MIN
    } else {
        gain
    };
    Loop { gain, aim, debt }
}

/// Whether a socket's pacing rate is far enough from the share to be worth a change (1/64).
#[inline(always)]
pub const fn worth_changing(current: u64, share: u64) -> bool {
    current.abs_diff(share) > share / 64
}

/// The debt after an epoch, within bounds. The credit is a quarter of the epoch (bursts fall into one or the
/// next by accident, and what is not remembered is lost for good), but 20 ms of the ceiling after a silent
/// one, and 100 ms at most: much credit would be a burst.
#[inline(always)]
const fn owe(debt: u64, rate: u64, sent: u64, elapsed_us: u64) -> u64 {
    let debt = (debt + sent).saturating_sub(rate * elapsed_us / 1_000_000);
    let quarter = max(elapsed_us / 4, CREDIT_MIN_US);
    let credit_us = if sent == 0 {
        CREDIT_MIN_US
    } else if quarter > CREDIT_MAX_US {
        CREDIT_MAX_US
    } else {
        quarter
    };
    let least = DEBT_BIAS - rate * credit_us / 1_000_000;
    if debt < least {
        least
    } else {
        let most = DEBT_BIAS + rate * DEBT_MAX_US / 1_000_000;
        if debt > most { most } else { debt }
    }
}

/// What to aim at until the next epoch ends, in 1/65536 of the ceiling: below it while there is a debt (at
/// its largest 30 % below), a little above while there is credit. Over epochs that are long against the
/// horizon, half of it at a time.
#[inline(always)]
const fn aim(debt: u64, rate: u64, epoch_us: u64) -> u64 {
    let horizon = max(DEBT_HORIZON_US, 2 * epoch_us);
    let whole = at_least_one(rate * horizon / 1_000_000);
    if debt >= DEBT_BIAS {
        GAIN_ONE - ((debt - DEBT_BIAS) << 16) / whole
    } else {
        GAIN_ONE + ((DEBT_BIAS - debt) << 16) / whole
    }
}

/// `value × factor / 2¹⁶` without overflow for values up to [`RATE_MAX`] and factors up to 2²².
#[inline(always)]
const fn scale(value: u64, factor: u64) -> u64 {
    (value >> 16) * factor + (((value & 0xffff) * factor) >> 16)
}

#[inline(always)]
const fn max(one: u64, other: u64) -> u64 {
    if one > other { one } else { other }
}

#[inline(always)]
const fn at_least_one(value: u64) -> u64 {
    max(value, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{cmp::Reverse, collections::BinaryHeap};

    /// The kernel program and `flows` greedy TCP senders, in bursts, as Linux paces: the first ten
    /// segments of a flow leave at once, then two frames or a millisecond's worth at the pacing rate,
    /// and more than that on a short path (12 frames were seen); each burst is acknowledged after `rtt_us`, and the acknowledgement runs the loop and sets the
    /// flow's rate. Each flow starts at the time given, µs. Returns the bytes of each second.
    struct Model {
        rate: u64,
        rtt_us: u64,
        state: Loop,
        epoch: u64,
        epoch_start: u64,
        sent: u64,
        active: u64,
        active_before: u64,
        /// From this time on, this ceiling.
        lower: Option<(u64, u64)>,
    }

    #[derive(Clone, Copy)]
    struct Flow {
        pacing: u64,
        epoch: u64,
        bursts: u64,
    }

    impl Model {
        fn new(rate: u64, rtt_us: u64) -> Model {
            Model {
                rate,
                rtt_us,
                state: START,
                epoch: 1,
                epoch_start: 0,
                sent: 0,
                active: 0,
                active_before: 0,
                lower: None,
            }
        }

        fn share(&self) -> u64 {
            share(self.rate, self.state.gain, self.state.aim, self.active.max(self.active_before))
        }

        fn acknowledged(&mut self, flow: &mut Flow, now: u64) {
            if let Some((at, rate)) = self.lower
                && now >= at
            {
                (self.rate, self.state.debt, self.lower) = (rate, DEBT_BIAS, None);
            }
            let elapsed_us = now - self.epoch_start;
            if elapsed_us >= epoch_us(self.share(), self.rtt_us) {
                let epoch = Epoch {
                    elapsed_us,
                    sent: self.sent,
                    active: self.active,
                    active_before: self.active_before,
                };
                self.state = close_epoch(self.state, self.rate, epoch);
                (self.epoch, self.epoch_start, self.sent) = (self.epoch + 1, now, 0);
                (self.active_before, self.active) = (remember(self.active, self.active_before), 0);
            }
            if flow.epoch != self.epoch {
                flow.epoch = self.epoch;
                self.active += 1;
            }
            let share = self.share();
            if worth_changing(flow.pacing, share) {
                flow.pacing = share;
            }
        }

        fn run(&mut self, starts: &[u64], seconds: u64) -> Vec<u64> {
            let mut per_second = vec![0; seconds as usize];
            let first = share(self.rate, self.state.gain, self.state.aim, 1);
            let mut flows: Vec<Flow> =
                starts.iter().map(|_| Flow { pacing: first, epoch: 0, bursts: 0 }).collect();
            // (time, acknowledgement before sending, flow)
            let mut events: BinaryHeap<Reverse<(u64, bool, usize)>> =
                starts.iter().enumerate().map(|(index, start)| Reverse((*start, false, index))).collect();
            while let Some(Reverse((now, sends, index))) = events.pop() {
                if now >= seconds * 1_000_000 {
                    break;
                }
                let mut flow = flows[index];
                if flow.bursts == 0 {
                    self.acknowledged(&mut flow, now);
                }
                if sends || flow.bursts == 0 {
                    let short_path = (BURST_MAX >> (self.rtt_us / 512).min(63)) / FRAME;
                    let frames = (flow.pacing / 1000 / FRAME + short_path).clamp(2, 12);
                    let frames = if flow.bursts == 0 { 10 } else { frames };
                    let bytes = frames * FRAME;
                    self.sent += bytes;
                    per_second[(now / 1_000_000) as usize] += bytes;
                    flow.bursts += 1;
                    let wait =
                        if flow.bursts == 1 { 1 } else { bytes * 1448 / 1514 * 1_000_000 / flow.pacing };
                    events.push(Reverse((now + self.rtt_us, false, index)));
                    events.push(Reverse((now + wait.max(1), true, index)));
                } else {
                    self.acknowledged(&mut flow, now);
                }
                flows[index] = flow;
            }
            per_second
        }
    }

    fn ratios(rate: u64, seconds: &[u64]) -> Vec<f64> {
        seconds.iter().map(|bytes| *bytes as f64 / rate as f64).collect()
    }

    #[test]
    fn flows_that_start_at_once_are_made_good_within_the_second() {
        for (rate, flows) in
            [(1_250_000, 8), (12_500_000, 1), (12_500_000, 8), (125_000_000, 8), (625_000_000, 8)]
        {
            let seconds = Model::new(rate, 50).run(&vec![0; flows], 4);
            let ratios = ratios(rate, &seconds);
            // Ten frames a flow leave unpaced, and the next burst is on its way before any answer.
            let unpaced = (flows as u64 * 22 * FRAME) as f64 / rate as f64;
            assert!(ratios[0] < 1.03 + unpaced, "{rate} × {flows}: {ratios:?}");
            // Bursts of eight flows in step are 11 % of a second at 10 Mbit/s.
            let two = (ratios[2] + ratios[3]) / 2.0;
            assert!((two - 1.0).abs() < 0.015, "{rate} × {flows}: {ratios:?}");
        }
    }

    #[test]
    fn seven_flows_that_join_one_do_not_disturb_the_rate() {
        for rtt_us in [50, 5_000, 40_000] {
            let rate = 12_500_000;
            let starts = [0, 1_000_000, 1_000_100, 1_010_000, 1_015_000, 1_020_000, 1_500_000, 1_900_000];
            let ratios = ratios(rate, &Model::new(rate, rtt_us).run(&starts, 5));
            for ratio in &ratios[1..] {
                assert!((ratio - 1.0).abs() < 0.05, "RTT {rtt_us} µs: {ratios:?}");
            }
        }
    }

    #[test]
    fn a_lower_ceiling_is_kept_after_a_second_without_swinging() {
        for flows in [1, 8] {
            let mut model = Model::new(6_250_000, 50);
            model.lower = Some((2_000_000, 2_500_000));
            let seconds = model.run(&vec![0; flows], 8);
            let ratios = ratios(2_500_000, &seconds[2..]);
            // The second after the change, and each of the others.
            assert!((ratios[0] - 1.0).abs() < 0.15, "{flows}: {ratios:?}");
            for ratio in &ratios[1..] {
                assert!((ratio - 1.0).abs() < 0.06, "{flows}: {ratios:?}");
            }
            let mean = ratios[1..].iter().sum::<f64>() / 5.0;
            assert!((mean - 1.0).abs() < 0.01, "{flows}: {ratios:?}");
        }
    }

    #[test]
    fn a_silent_task_earns_no_burst() {
        let rate = 12_500_000;
        let silent = Epoch { elapsed_us: EPOCH_MIN_US, sent: 0, active: 0, active_before: 0 };
        let mut state = START;
        for _ in 0..1000 {
            state = close_epoch(state, rate, silent);
        }
        assert_eq!(state.gain, GAIN_START);
        assert!(DEBT_BIAS - state.debt <= rate / 50);
    }

    #[test]
    fn a_task_that_rarely_hears_back_and_stays_below_its_ceiling_is_not_slowed() {
        // 40 % of the ceiling, and one acknowledgement a minute.
        let rate = 12_500_000;
        let epoch = Epoch { elapsed_us: 60_000_000, sent: rate * 60 * 2 / 5, active: 1, active_before: 1 };
        let mut state = START;
        for _ in 0..5 {
            state = close_epoch(state, rate, epoch);
        }
        assert!(state.gain >= GAIN_ONE && state.debt <= DEBT_BIAS, "{state:?}");
    }

    #[test]
    fn an_epoch_holds_a_largest_burst_of_every_flow() {
        assert_eq!(epoch_us(125_000_000, 50), EPOCH_MIN_US);
        assert_eq!(epoch_us(1_250_000 / 8, 50), 419_430);
        assert_eq!(epoch_us(125_000_000, 40_000), 80_000);
        assert_eq!(epoch_us(0, 0), EPOCH_MAX_US);
    }

    proptest! {
        #[test]
        fn every_bound_holds_and_nothing_overflows(
            rate in 1_000u64..=RATE_MAX, gain in GAIN_MIN..=ACTIVE_MAX << 16, debt in 0u64..=RATE_MAX,
            sent in 0u64..=RATE_MAX, elapsed_us in 0u64..=u64::MAX >> 1, active in 0u64..=64,
            active_before in 0u64..=ACTIVE_MAX,
        ) {
            let before = Loop { gain, aim: GAIN_ONE, debt: DEBT_BIAS + debt };
            let after = close_epoch(before, rate, Epoch { elapsed_us, sent, active, active_before });
            prop_assert!(after.gain >= GAIN_MIN);
            prop_assert!(after.debt <= DEBT_BIAS + rate * DEBT_MAX_US / 1_000_000 && after.debt >= DEBT_BIAS - rate / 10);
            prop_assert!(after.aim > GAIN_ONE / 2 && after.aim < 2 * GAIN_ONE);
            let share = share(rate, after.gain, after.aim, active);
            prop_assert!(share >= SHARE_MIN && share <= rate.max(SHARE_MIN));
        }

        #[test]
        fn any_number_of_greedy_flows_converges_to_the_ceiling(
            rate in 1_250_000u64..=250_000_000, flows in 1usize..=16, rtt_us in 20u64..=30_000,
        ) {
            let ratios = ratios(rate, &Model::new(rate, rtt_us).run(&vec![0; flows], 5));
            prop_assert!((ratios[4] - 1.0).abs() < 0.02, "{flows} flows: {ratios:?}");
        }
    }
}
