//! The periods of a CPU quota, as the kernel has them.

/// When the period ends that `now` is in, if the timer that fills the quota up is due at `due`. The timer goes on only while
/// the quota is in use, but always in steps of `period`: it may be long past.
pub fn end(due: u64, period: u64, now: u64) -> u64 {
    if period == 0 {
        return now;
    }
    let ahead = match due.checked_sub(now) {
        Some(ahead) => ahead % period,
        None => (period - (now - due) % period) % period,
    };
    now + if ahead == 0 { period } else { ahead }
}

#[cfg(test)]
mod tests {
    use super::end;

    #[test]
    fn a_period_ends_when_its_timer_is_due_or_would_be() {
        for (due, now, expected) in [
            (1_050, 1_000, 1_050),
            // Due now: the quota is filled up, and the next period has begun.
            (1_000, 1_000, 1_100),
            (1_000, 1_001, 1_100),
            (1_000, 1_100, 1_200),
            // It was idle for long.
            (1_000, 987_654, 987_700),
            (0, 42, 100),
            // It is never due later than in a period, but whatever is read must do no harm.
            (5_030, 1_000, 1_030),
        ] {
            assert_eq!(end(due, 100, now), expected, "due at {due}, now {now}");
        }
        assert_eq!(end(1_000, 0, 7), 7);
    }
}
