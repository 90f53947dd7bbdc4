//! Others who turn the knobs that shaper holds: here in cgroup v2.

use shaper_tests::{
    agent::Agent,
    cgroup::{TestCgroup, read, write},
    second_writer::{self, of_others},
    time::eventually,
};

#[test]
fn what_others_change_is_dealt_with_by_the_policy() {
    second_writer::assert_held();
    second_writer::assert_yielded();
    second_writer::assert_reported();
}

#[test]
fn every_file_is_held_and_a_release_puts_back_what_others_asked_for_last() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    write(group.path(), "memory.max", "300M");
    let path = group.path().display().to_string();
    let limits = ["--cpu", "0.5", "--cpu-weight", "300", "--memory", "200Mi"];
    agent.shaper().ok(&[&["adopt", &path, "--id", "service"][..], &limits].concat());
    let files = ["cpu.max", "cpu.max.burst", "cpu.weight", "memory.max"];
    let held = || files.map(|file| read(group.path(), file));
    let decided = ["50000 100000", "50000", "300", "209715200"];
    assert_eq!(held(), decided);
    let theirs = [
        ("cpu.max.burst", "0"),
        ("cpu.max", "70000 100000"),
        ("cpu.idle", "1"),
        ("cpu.weight", "50"),
        ("memory.max", "524288000"),
    ];
    for (count, (file, value)) in theirs.into_iter().enumerate() {
        write(group.path(), file, value);
        eventually("it is in the ledger", || of_others(&agent.shaper(), "service").len() > count);
        eventually("it is held", || held() == decided);
    }
    agent.shaper().ok(&["release", "service"]);
    assert_eq!(held(), ["70000 100000", "0", "50", "524288000"]);
}
