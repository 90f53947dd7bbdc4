//! Faults upon a cluster of several brokers: a little of `cargo xtask soak broker`.

use shaper_tests::{faults, soak};

/// In a soak, and with all the other tests.
const WITH_FAKE_AGENTS: (u32, u32) = (950, 12);
const WITH_REAL_AGENTS: (u32, u32) = (50, 3);

#[test]
fn with_fake_agents_nothing_is_lost_doubled_or_overcommitted() {
    let (whole, usual) = WITH_FAKE_AGENTS;
    faults::assert_all_is_kept_by_fake_agents(soak::times_or(whole, usual));
}

#[test]
fn with_real_agents_nothing_is_lost_doubled_or_overcommitted() {
    let (whole, usual) = WITH_REAL_AGENTS;
    faults::assert_all_is_kept_by_real_agents(soak::times_or(whole, usual));
}
