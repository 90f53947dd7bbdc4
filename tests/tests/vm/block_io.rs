//! The ceiling of block IO: one number for reads and writes, over all devices.

use std::{fs, path::Path, process::Child};

use shaper_tests::{
    agent::Agent,
    assert_close,
    cgroup::{TestCgroup, read, write},
    disk::Disk,
    figures::tell,
    time::{Window, eventually},
};

use super::SECOND;

/// A device without a medium, of the kernel's.
const NULL: &str = "/dev/nullb0";

/// What ends with the test, or before.
struct Churn(Child);

impl Churn {
    fn start(group: &str, path: &str, way: &str) -> Churn {
        Churn(TestCgroup::run(Path::new(group), None, &["churn", path, way]))
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads and writes on all devices, by the kernel's own count.
fn operations(group: &str) -> u64 {
    let stat = read(group, "io.stat");
    let fields = stat.split_whitespace();
    let counts =
        fields.filter_map(|field| field.strip_prefix("rios=").or_else(|| field.strip_prefix("wios=")));
    counts.map(|count| count.parse::<u64>().expect("io.stat has numbers")).sum()
}

#[track_caller]
fn assert_rate(what: &str, group: &str, limit: f64) {
    // A change of what is wanted is seen within a second, and paid for within another.
    Window::pass(3 * SECOND);
    let before = operations(group);
    let window = Window::pass(8 * SECOND);
    let rate = (operations(group) - before) as f64 / window.seconds();
    let off = (rate / limit - 1.0) * 100.0;
    tell(&format!("--io {limit}, {what}: off by"), off, "%", "<= 3", off.abs() <= 3.0);
    assert_close(what, rate, limit, 3.0);
}

#[test]
fn a_ceiling_holds_over_reads_and_writes_of_two_devices_wherever_they_go() {
    let disk = Disk::format_and_mount();
    let file = disk.file("file").display().to_string();
    fs::write(&file, vec![1; 4 << 20]).expect("there is room");
    let agent = Agent::start();
    let task = agent.run("task", &["--io", "400"], &["tick", "6000", "0"]);
    let group = task.cgroup.as_str();
    let of_null = Churn::start(group, NULL, "read");
    assert_rate("reads of one device", group, 400.0);

    let writes = Churn::start(group, &file, "write");
    let reads = Churn::start(group, &file, "read");
    assert_rate("reads and writes of two devices", group, 400.0);

    drop((of_null, reads));
    agent.shaper().set("task", &["--io", "250"]);
    assert_rate("writes of the other device, after a change", group, 250.0);
    drop(writes);

    agent.shaper().set("task", &["--io", "max"]);
    assert_eq!(read(group, "io.max"), "");
    agent.shaper().set("task", &["--io", "100"]);
    let limits = read(group, "io.max");
    assert!(limits.lines().count() >= 2 && limits.contains("riops="), "{limits}");
    agent.shaper().ok(&["release", "task"]);
    eventually("its cgroup is gone", || !Path::new(group).exists());
}

#[test]
fn the_limits_of_bytes_of_an_adopted_cgroup_stay_and_the_ceiling_holds_over_a_restart() {
    let disk = Disk::format_and_mount();
    let group = TestCgroup::new();
    // What it has itself, by whoever made it.
    write(group.path(), "io.max", &format!("{} rbps=1048576", disk.number()));
    let own = read(group.path(), "io.max");
    let mut agent = Agent::start();
    agent.adopt("service", group.path(), &["--io", "400"]);
    let limits = || read(group.path(), "io.max");
    let of_disk = || limits().lines().find(|line| line.starts_with(disk.number())).map(str::to_owned);
    let line = of_disk().expect("the disk is limited");
    assert!(line.contains("rbps=1048576 wbps=max") && !line.contains("iops=max"), "{line}");

    // Between two readings by the next agent nothing is done, so nothing is divided anew.
    let before = limits();
    agent.kill9();
    assert_eq!(limits(), before);
    agent.restart();
    assert_eq!(limits(), before);
    agent.shaper().ok(&["release", "service"]);
    assert_eq!(limits(), own);
}
