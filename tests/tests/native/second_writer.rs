//! Others who turn the knobs that shaper holds: here in the v1 hierarchies.

use shaper_tests::second_writer;

#[test]
fn what_others_change_is_turned_back_where_limits_are_held() {
    second_writer::assert_held();
}

#[test]
fn what_others_change_is_left_to_them_where_that_is_the_policy() {
    second_writer::assert_yielded();
}

#[test]
fn what_others_change_is_reported_where_that_is_the_policy() {
    second_writer::assert_reported();
}
