//! The agent dies again and again, on cgroup v2.

use shaper_tests::{kills, soak};

/// In a soak.
const DEATHS: u32 = 50;

#[test]
fn wherever_the_agent_dies_nothing_is_lost_and_nothing_is_left() {
    kills::assert_nothing_is_lost(soak::times(DEATHS));
}
