//! The agent dies again and again, on the controllers of this machine: v1, on a hybrid host.

use shaper_tests::{kills, soak};

/// In a soak.
const DEATHS: u32 = 950;

#[test]
fn wherever_the_agent_dies_nothing_is_lost_and_nothing_is_left() {
    kills::assert_nothing_is_lost(soak::times(DEATHS));
}
