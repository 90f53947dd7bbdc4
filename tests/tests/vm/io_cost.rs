//! What the kernel's own means of block IO are worth: io.max, and io.weight with a calibrated model.

use std::{fs, process::Command, time::Duration};

use shaper_agent::kernel::cgroup::{Contents, block};
use shaper_core::doctor::Availability;
use shaper_tests::{
    agent::Agent,
    assert_close,
    bins::binary,
    cgroup::{TestCgroup, mounts, read, write},
    figures::tell,
    slow_disk::SlowDisk,
    time::{Window, eventually},
};

use super::SECOND;

/// A count of a cgroup on a device, by the kernel.
fn io_stat(group: &str, disk: &SlowDisk, count: &str) -> u64 {
    let stat = read(group, "io.stat");
    let line = stat.lines().find(|line| line.starts_with(&format!("{} ", disk.number()))).unwrap_or_default();
    let found = line.split(' ').find_map(|word| word.strip_prefix(count)?.strip_prefix('=')?.parse().ok());
    found.unwrap_or(0)
}

fn rate(group: &str, disk: &SlowDisk, count: &str, time: Duration) -> f64 {
    let before = io_stat(group, disk, count);
    let window = Window::pass(time);
    (io_stat(group, disk, count) - before) as f64 / window.seconds()
}

/// The loads' pieces are of 4 KiB; what is let through in a slice of 100 ms is a two-hundredth of a window.
#[test]
fn io_max_is_exact_in_operations_and_bytes() {
    let disk = SlowDisk::new(Duration::from_millis(1), 16);
    let group = TestCgroup::new();
    write(group.path().parent().unwrap(), "cgroup.subtree_control", "+io");
    let path = group.path().display().to_string();
    for (way, limit, count, expected) in [
        ("read", "riops=200", "rios", 200.0),
        ("write", "wiops=200", "wios", 200.0),
        ("read", "rbps=1048576", "rbytes", 1_048_576.0),
        ("write", "wbps=1048576", "wbytes", 1_048_576.0),
    ] {
        let unlimited = "rbps=max wbps=max riops=max wiops=max";
        write(group.path(), "io.max", &format!("{} {unlimited}", disk.number()));
        write(group.path(), "io.max", &format!("{} {limit}", disk.number()));
        let mut load = TestCgroup::run(group.path(), None, &["churn", &disk.path(), way, "16"]);
        eventually("it is at work", || io_stat(&path, &disk, count) > 0);
        Window::pass(SECOND);
        let found = rate(&path, &disk, count, 20 * SECOND);
        load.kill().and_then(|()| load.wait()).unwrap();
        let off = (found / expected - 1.0) * 100.0;
        tell(&format!("io.max, {limit}: off by"), off, "%", "<= 1", off.abs() <= 1.0);
        assert_close(limit, found, expected, 1.0);
    }
}

fn calibrate(agent: &Agent<'_>, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(binary("shaper-agent"));
    command.args(["calibrate", "--state-dir"]).arg(agent.state_dir()).args(arguments);
    let output = command.output().expect("it can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    eprint!("{}", text(&output.stderr));
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn weights_divide_a_calibrated_device_and_a_release_puts_back_what_was_there() {
    let disk = SlowDisk::new(Duration::from_millis(10), 8);
    let agent = Agent::start();
    let root = mounts().0;
    let qos = || {
        let found = block::ByDevice::<block::CostQos>::from_text(&read(&root, "io.cost.qos"));
        found.expect("it is understood").get(&disk.number().parse().unwrap()).copied()
    };
    // Before, a weight means nothing, and nobody is told that it does.
    let said = agent.shaper().refused(&[
        "run",
        "--detach",
        "--user",
        "65534:65534",
        "--io-weight",
        "300",
        "--",
        "/bin/true",
    ]);
    assert!(said.contains("weights have no effect on") && said.contains("shaper-agent calibrate"), "{said}");
    agent.run("warm", &[], &["tick", "6000", "0"]);
    let rung = |name: &str| agent.shaper().doctor().rungs.into_iter().find(|rung| rung.feature == name);
    let none = rung("io-weight").expect("there is something to say");
    assert!(matches!(none.availability, Availability::Unusable { .. }));
    assert!(qos().is_none_or(|qos| !qos.enable));

    let dry = calibrate(&agent, &[&disk.path(), "--dry-run", "--seconds", "1"]).unwrap();
    assert!(dry.contains("ctrl=user model=linear rbps=") && dry.contains("--dry-run"), "{dry}");
    assert!(qos().is_none_or(|qos| !qos.enable));

    let done = calibrate(&agent, &[&disk.path(), "--seconds", "2"]).unwrap();
    println!("{done}");
    assert!(qos().is_some_and(|qos| qos.enable));
    let heavy = agent.run("heavy", &["--io-weight", "300"], &["churn", &disk.path(), "read", "32"]);
    let light = agent.run("light", &["--io-weight", "100"], &["churn", &disk.path(), "read", "32"]);
    assert_eq!(read(&heavy.cgroup, "io.weight"), "default 300");
    Window::pass(3 * SECOND);
    let before = [&heavy, &light].map(|task| io_stat(&task.cgroup, &disk, "rios"));
    let window = Window::pass(10 * SECOND);
    let after = [&heavy, &light].map(|task| io_stat(&task.cgroup, &disk, "rios"));
    let rates = [0, 1].map(|index| (after[index] - before[index]) as f64 / window.seconds());
    let ratio = rates[0] / rates[1];
    tell("io.weight 300 : 100, calibrated", ratio, ": 1", "3 +- 15 %", (ratio / 3.0 - 1.0).abs() <= 0.15);
    tell("the same, together", rates[0] + rates[1], "IOPS", "", true);
    assert_close("heavy by light", ratio, 3.0, 15.0);

    let said = calibrate(&agent, &[&disk.path()]).expect_err("it is in use");
    assert!(said.contains("is busy: others did"), "{said}");
    let said = calibrate(&agent, &["no-such-disk"]).expect_err("there is none");
    assert!(said.contains("there is no block device `no-such-disk`"), "{said}");

    agent.shaper().ok(&["release", "--all"]);
    assert!(qos().is_some_and(|qos| !qos.enable), "{}", read(&root, "io.cost.qos"));
    let notes = fs::read_dir(agent.state_dir()).unwrap().flatten().map(|entry| entry.file_name());
    assert!(notes.into_iter().all(|name| !name.to_string_lossy().starts_with("io-cost@")));
}
