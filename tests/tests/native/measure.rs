//! What is measured can be trusted: wrong offsets, full tables, lost events and cgroups that come and go.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use rustix::process::{Pid, Signal, kill_process};
use shaper_core::{
    doctor::Availability,
    snapshot::{IoCount, Source, TaskSnapshot},
    task::Phase,
};
use shaper_tests::{
    agent::{Agent, Options},
    assert_close,
    cgroup::{TestCgroup, cpu_time, mounts, unique_name},
    net::{DEVICE, NetPair},
    process::pin,
    sink::Sink,
    time::{Window, eventually},
};

const SECOND: Duration = Duration::from_secs(1);

/// What the doctor says of a feature.
fn rung(agent: &Agent, feature: &str) -> Option<Availability> {
    let rungs = agent.shaper().doctor().rungs;
    rungs.into_iter().find(|rung| rung.feature == feature).map(|rung| rung.availability)
}

/// A snapshot whose whole interval lies after this call.
#[track_caller]
fn fresh(agent: &Agent, id: &str) -> TaskSnapshot {
    let seen = agent.shaper().usage_of(id).cpu.time_ns;
    let mut changes = 0;
    let mut last = seen;
    // Stock is taken once a second; a task that runs has another count each time.
    eventually("two more stocks were taken", || {
        let now = agent.shaper().usage_of(id).cpu.time_ns;
        changes += u32::from(std::mem::replace(&mut last, now) != now);
        changes >= 2
    });
    agent.shaper().usage_of(id)
}

#[test]
fn a_wrong_offset_of_a_number_is_found_out_and_cpu_time_comes_from_the_cgroup() {
    let agent = Options::default().skewed("OFF_TASK_PID", 8).start();
    let task = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    let found = rung(&agent, "self-test: CPU time");
    assert!(matches!(found, Some(Availability::Unusable { .. })), "{found:?}");
    assert_eq!(agent.shaper().top().sources.cpu, Source::CgroupFile);
    eventually("it has run", || cpu_time(&task.cgroup) > SECOND / 2);
    agent.assert_counted("hog", &task.cgroup, 0.0);
}

#[test]
fn a_wrong_offset_in_the_run_queue_leaves_only_its_delay_unmeasured() {
    let agent = Options::default().skewed("OFF_TASK_LAST_QUEUED", -8).start();
    agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    let found = rung(&agent, "self-test: run-queue delay");
    assert!(matches!(found, Some(Availability::Unusable { .. })), "{found:?}");
    let node = agent.shaper().top();
    assert_eq!((node.sources.cpu, node.sources.run_queue), (Source::Program, Source::None));
    assert_eq!(fresh(&agent, "hog").cpu.run_queue, None);
}

#[test]
fn a_latency_of_block_io_is_not_promised_where_it_is_not_measured() {
    // Where the time is thought to be there is another field, which the kernel does not let a program read like this.
    let agent = Options::default().skewed("OFF_REQUEST_START_TIME_NS", 16).start();
    let run = ["run", "--detach", "--user", "65534", "--io-latency", "5ms", "--", "/bin/true"];
    let answer = agent.shaper().call(&run);
    let found = rung(&agent, "program block_rq_complete");
    assert!(matches!(found, Some(Availability::Unusable { .. })), "{found:?}");
    assert_eq!(answer.code, shaper_tests::shaper::REFUSED, "{}", answer.stderr);
    assert!(
        answer.stderr.contains("the latency of block IO is not measured on this host"),
        "{}",
        answer.stderr
    );
}

#[test]
fn a_wrong_offset_of_a_pointer_is_refused_by_the_kernel() {
    let agent = Options::default().skewed("OFF_TASK_CGROUPS", 8).start();
    let answer = agent.shaper().call(&["run", "--detach", "--user", "65534", "--", "/bin/true"]);
    assert_ne!(answer.code, 0);
    assert!(answer.stderr.contains("cannot load the kernel program"), "{}", answer.stderr);
    assert_nothing_is_left(&agent);
}

/// What had to fail has left nothing in the kernel.
#[track_caller]
fn assert_nothing_is_left(agent: &Agent) {
    let (v2, v1) = mounts();
    let groups: Vec<_> = v1.iter().chain([&v2]).map(|mount| mount.join(agent.name())).collect();
    let left: Vec<_> =
        groups.iter().chain([&agent.bpffs_dir()]).filter(|path| path.exists()).cloned().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_kernel_without_btf_is_refused_with_what_it_needs() {
    let agent = Options::default().without_btf().start();
    let answer = agent.shaper().call(&["run", "--detach", "--user", "65534", "--", "/bin/true"]);
    assert_ne!(answer.code, 0);
    assert!(answer.stderr.contains("CONFIG_DEBUG_INFO_BTF"), "{}", answer.stderr);
    assert_nothing_is_left(&agent);
    let found = rung(&agent, "btf");
    assert!(matches!(found, Some(Availability::Missing { .. })), "{found:?}");
}

#[test]
fn with_right_offsets_nothing_is_distrusted_and_every_source_is_a_program() {
    let agent = Agent::start();
    agent.run("hog", &[], &["spin"]);
    let rungs = agent.shaper().doctor().rungs;
    let wrong: Vec<_> = rungs
        .iter()
        .filter(|rung| rung.feature.starts_with("self-test") || rung.feature.starts_with("program"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    let sources = agent.shaper().top().sources;
    for source in [sources.cpu, sources.run_queue, sources.io, sources.io_latency, sources.network] {
        assert_eq!(source, Source::Program, "{sources:?}");
    }
}

#[test]
fn a_hog_that_hardly_switches_is_counted_while_it_runs() {
    let agent = Agent::start();
    let task = agent.run("hog", &[], &["spin"]);
    pin(task.pid.expect("it runs"), 1);
    let usage = fresh(&agent, "hog");
    let before = cpu_time(&task.cgroup);
    let window = Window::pass(SECOND);
    let cores = (cpu_time(&task.cgroup) - before).as_secs_f64() / window.seconds();
    let counted = fresh(&agent, "hog").cpu.now.0 as f64 / 1000.0;
    assert!(counted > 0.8 * cores, "{counted} cores counted, {cores} by the kernel: {usage:?}");
}

#[test]
fn two_hogs_on_one_cpu_wait_for_each_other_and_are_said_to() {
    let agent = Agent::start();
    for id in ["one", "other"] {
        let task = agent.run(id, &[], &["spin"]);
        pin(task.pid.expect("it runs"), 1);
    }
    fresh(&agent, "one");
    for id in ["one", "other"] {
        let cpu = fresh(&agent, id).cpu;
        assert!(cpu.preemptions_by_others_per_sec > 0, "{id}: {cpu:?}");
        assert!(cpu.preemptions_per_sec >= cpu.preemptions_by_others_per_sec, "{id}: {cpu:?}");
        assert!(cpu.switches_per_sec >= cpu.preemptions_per_sec, "{id}: {cpu:?}");
        // A slice of the other is a few milliseconds long.
        let delay = cpu.run_queue.expect("it is measured");
        assert!(delay.count > 0 && delay.p99_ns > 500_000, "{id}: {cpu:?}");
        let by = agent.shaper().usage_of(id).preempted_by;
        assert!(by.is_some_and(|by| by.is_empty() || (by != id && ["one", "other"].contains(&by.as_str()))));
    }
}

#[test]
fn a_task_in_a_cgroup_below_counts_for_the_one_above() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &[]);
    let child = group.make_child("one");
    fs::create_dir(child.join("two")).unwrap();
    let mut hog = TestCgroup::run(&child.join("two"), None, &["spin"]);
    eventually("it is counted", || agent.shaper().get("service").usage.cpu_time_ns > 200_000_000);
    agent.assert_counted("service", group.path(), 5.0);
    hog.kill().and_then(|()| hog.wait()).unwrap();
}

#[test]
fn a_cgroup_that_is_removed_and_made_again_is_another_one() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    let path = group.make_child("service");
    agent.adopt("first", &path, &[]);
    let mut hog = TestCgroup::run(&path, None, &["spin"]);
    eventually("it is counted", || agent.shaper().get("first").usage.cpu_time_ns > 200_000_000);
    hog.kill().and_then(|()| hog.wait()).unwrap();
    eventually("the cgroup is empty and removed", || fs::remove_dir(&path).is_ok());
    // The kernel tells of it; nobody looks for it this often.
    eventually("its end is seen", || matches!(agent.shaper().get("first").phase, Phase::Ended { .. }));
    let counted = agent.shaper().get("first").usage.cpu_time_ns;

    fs::create_dir(&path).unwrap();
    let mut hog = TestCgroup::run(&path, None, &["spin"]);
    eventually("it runs", || cpu_time(&path) > SECOND / 5);
    assert_eq!(agent.shaper().get("first").usage.cpu_time_ns, counted, "the old one goes on counting");
    agent.adopt("second", &path, &[]);
    let used = agent.measure("second", SECOND);
    assert!(used.cores > 0.3, "{used:?}");
    let total = agent.shaper().get("second").usage.cpu_time_ns;
    assert!(total < 5_000_000_000, "it begins with what the old one had: {total} ns");
    hog.kill().and_then(|()| hog.wait()).unwrap();
}

/// The table has room for 32,768 cgroups that tasks make.
#[test]
fn seventy_thousand_cgroups_of_a_task_leave_its_limits_in_force_and_room_for_others() {
    const CHILDREN: usize = 70_000;
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    let group = TestCgroup::new();
    agent.adopt("hostile", group.path(), &["--net", "20mbit"]);
    for number in 0..CHILDREN {
        fs::create_dir(group.path().join(number.to_string())).unwrap();
    }
    let last = group.path().join((CHILDREN - 1).to_string());
    let without = agent.shaper().top().health.cgroups_without_entry;
    assert!(without > 30_000, "{without} cgroups have no entry");
    assert!(matches!(rung(&agent, "slot-table"), Some(Availability::Unusable { .. })));

    let mut hog = TestCgroup::run(&last, None, &["spin"]);
    let mut sender = TestCgroup::run(&last, Some(&network.near), &["send", &sink.address(), "2"]);
    sink.wait_for_flows(2);
    Window::pass(2 * SECOND);
    let before = cpu_time(&last);
    let used = agent.measure("hostile", 2 * SECOND);
    let cores = (cpu_time(&last) - before).as_secs_f64() / used.window.seconds();
    assert_close("cores counted, by the kernel's", used.cores, cores, 15.0);
    assert_close("sent", used.egress, 20e6, 5.0);
    assert_close("through the uplink", used.uplink, used.egress, 2.0);

    // Another one finds room, and so do the cgroups that it has.
    let other = TestCgroup::new();
    let mut quiet = TestCgroup::run(&other.make_child("child"), None, &["spin"]);
    agent.adopt("other", other.path(), &[]);
    assert!(agent.measure("other", SECOND).cores > 0.2);
    for child in [&mut hog, &mut sender, &mut quiet] {
        child.kill().and_then(|()| child.wait()).unwrap();
    }
}

#[test]
fn events_that_the_agent_is_too_slow_for_are_counted_and_found_by_looking() {
    // The ring has room for 8,192.
    const CHILDREN: usize = 9_000;
    let agent = Agent::start();
    let group = TestCgroup::new();
    let path = group.make_child("service");
    for number in 0..CHILDREN {
        fs::create_dir(path.join(number.to_string())).unwrap();
    }
    agent.adopt("service", &path, &[]);
    assert_eq!(agent.shaper().top().health.events_lost, 0);
    let pid = Pid::from_raw(agent.pid().cast_signed()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    for number in 0..CHILDREN {
        fs::remove_dir(path.join(number.to_string())).unwrap();
    }
    fs::remove_dir(&path).unwrap();
    kill_process(pid, Signal::CONT).unwrap();
    let lost = agent.shaper().top().health.events_lost;
    assert!(lost > 500, "{lost} events are said to be lost");
    eventually("the end is found", || matches!(agent.shaper().get("service").phase, Phase::Ended { .. }));
}

#[test]
fn the_kernel_warns_before_a_quota_is_used_up_and_only_while_there_is_one() {
    let agent = Agent::start();
    agent.run("free", &[], &["spin"]);
    let watched = || programs_attached("sched_stat_runt");
    let before = watched();
    agent.run("limited", &["--cpu", "0.3"], &["spin"]);
    assert_eq!(watched(), before + 1);
    // A quota is for 100 ms.
    eventually("it has been warned", || agent.shaper().usage_of("limited").quota_warnings > 5);
    assert_eq!(agent.shaper().usage_of("free").quota_warnings, 0);
    agent.shaper().set("limited", &["--cpu", "max"]);
    assert_eq!(watched(), before);
}

#[test]
fn what_a_queue_throws_away_is_counted_as_the_queue_counts_it() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    // A bucket that a flood of datagrams overflows.
    network.near.tc(&[
        "qdisc", "add", "dev", DEVICE, "root", "handle", "1:", "tbf", "rate", "1mbit", "burst", "3kb",
        "limit", "6kb",
    ]);
    let target = format!("{}:9", NetPair::FAR_V4);
    agent.run("flood", &[], &["datagrams", &target, "2000", "100", "0"]);
    let sent = || agent.shaper().usage_of("flood").network.egress.total.packets;
    // Neighbour discovery is nobody's.
    eventually("all are sent", || sent() >= 2000);
    let usage = agent.shaper().usage_of("flood").network;
    let queue = network.near.tc(&["-s", "qdisc", "show", "dev", DEVICE]);
    let dropped = queue.split("dropped ").nth(1).and_then(|rest| rest.split(',').next());
    let dropped: u64 = dropped.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{queue}"));
    assert!(dropped > 1000, "{queue}");
    assert_eq!(usage.drops, Some(dropped), "{queue}");
}

#[test]
fn a_congestion_mark_is_seen_in_packets_of_both_versions_of_ip() {
    const CE: &str = "3";
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    for (id, address) in [("v4", NetPair::FAR_V4), ("v6", NetPair::FAR_V6)] {
        let target = std::net::SocketAddr::new(address, 9).to_string();
        agent.run(id, &[], &["datagrams", &target, "50", "100", CE]);
        agent.run(&format!("{id}-unmarked"), &[], &["datagrams", &target, "50", "100", "2"]);
        let egress = |id: &str| agent.shaper().usage_of(id).network.egress;
        eventually("they are sent", || egress(id).total.packets >= 50);
        assert_eq!(egress(id).congestion_marks, 50, "{id}");
        let unmarked = format!("{id}-unmarked");
        eventually("they are sent", || egress(&unmarked).total.packets >= 50);
        assert_eq!(egress(&unmarked).congestion_marks, 0, "{id}");
    }
}

#[test]
fn what_tcp_sends_again_and_how_long_it_waits_are_measured() {
    let network = NetPair::new();
    let agent = Options::default().on(&network).start();
    network.near.tc(&[
        "qdisc", "add", "dev", DEVICE, "root", "handle", "1:", "tbf", "rate", "10mbit", "burst", "5kb",
        "limit", "20kb",
    ]);
    let sink = Sink::listen(&network.far, NetPair::FAR_V4);
    agent.run("upload", &[], &["send", &sink.address(), "4"]);
    sink.wait_for_flows(4);
    eventually("something is sent again", || {
        agent.shaper().usage_of("upload").network.retransmits.is_some_and(|count| count > 0)
    });
    // The tracepoint is for each buffer, the kernel's count for each segment; the count is of the whole namespace.
    let counted = agent.shaper().usage_of("upload").network.retransmits.unwrap_or(0);
    let segments = network.near.within(retransmitted_segments);
    assert!((1..=segments).contains(&counted), "{counted} counted, {segments} by the kernel");
    let network = fresh(&agent, "upload").network;
    let round_trip = network.round_trip.expect("programs measure it");
    // 20 KiB at 10 Mbit/s take 16 ms.
    assert!(round_trip.count > 0 && round_trip.p99_ns > 1_000_000, "{network:?}");
    assert!(round_trip.p50_ns <= round_trip.p99_ns && round_trip.p99_ns < 1_000_000_000, "{network:?}");
}

/// `RetransSegs` of the network namespace of this thread.
fn retransmitted_segments() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp").expect("/proc is mounted");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let found = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "RetransSegs");
    found.and_then(|(_, value)| value.parse().ok()).expect("it is counted")
}

/// A loop device over a file; dropping it detaches it.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Loop {
        let output =
            Command::new("losetup").args(["--find", "--show"]).arg(file).output().expect("losetup is there");
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Loop(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn what_lies_on_another_device_is_said_to_and_does_not_count_twice() {
    if !mounts().1.iter().any(|mount| mount.ends_with("blkio")) {
        return; // Where cgroup v2 has the controller, the VM's tests are about block IO.
    }
    let agent = Agent::start();
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique_name());
    fs::File::create(&file).and_then(|file| file.set_len(4 << 20)).unwrap();
    let device = Loop::over(&file);
    let before = fs::metadata(&device.0).unwrap().permissions();
    fs::set_permissions(&device.0, fs::Permissions::from_mode(0o666)).unwrap();
    let write = format!("{} write {} 1024 direct && exec {0} spin", agent.load(), device.0);
    let task =
        agent.shaper().start("writer", &["--user", "65534", "--cpu", "0.2"], &["/bin/sh", "-c", &write]);
    agent.ends_with_me(&task);
    eventually("it has written", || agent.shaper().ok(&["logs", "writer"]).contains("wrote"));
    let usage = fresh(&agent, "writer");
    fs::set_permissions(&device.0, before).unwrap();
    let name = device.0.trim_start_matches("/dev/").to_owned();
    drop(device);
    fs::remove_file(&file).unwrap();

    let on_loop = usage.io.iter().find(|io| io.name == name).unwrap_or_else(|| panic!("{usage:?}"));
    assert!(on_loop.stacked && on_loop.write.bytes >= 1 << 20, "{on_loop:?}");
    let below: Vec<_> = usage.io.iter().filter(|io| !io.stacked).collect();
    let written: u64 = below.iter().map(|io| io.write.bytes).sum();
    assert!(written <= (1 << 20) + (256 << 10), "{below:?}");
}

/// How many programs of that name are attached by a link.
fn programs_attached(name: &str) -> usize {
    let of_name: Vec<u32> = aya::programs::loaded_programs()
        .flatten()
        .filter(|program| program.name_as_str() == Some(name))
        .map(|program| program.id())
        .collect();
    aya::programs::loaded_links().flatten().filter(|link| of_name.contains(&link.program_id())).count()
}

/// Sums of what a task has read and written, over the devices at the bottom.
fn io(usage: &TaskSnapshot) -> [IoCount; 2] {
    let mut sums = [IoCount::default(); 2];
    for device in usage.io.iter().filter(|device| !device.stacked) {
        for (sum, count) in sums.iter_mut().zip([device.read, device.write]) {
            sum.bytes += count.bytes;
            sum.operations += count.operations;
        }
    }
    sums
}

/// On a hybrid host block IO is charged to a group of the v1 hierarchy, whose ids are numbers of their own.
#[test]
fn direct_writes_of_a_task_are_counted_by_its_v1_group() {
    if !mounts().1.iter().any(|mount| mount.ends_with("blkio")) {
        return; // cgroup v2 has the controller: vm.rs has the test.
    }
    let agent = Agent::start();
    // On a disk, where everybody may write: /tmp need not be on one.
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique_name());
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    let file = directory.join("file");
    let write =
        format!("{} write {} 1024 direct && exec {} spin", agent.load(), file.display(), agent.load());
    let task =
        agent.shaper().start("writer", &["--user", "65534", "--cpu", "0.2"], &["/bin/sh", "-c", &write]);
    agent.ends_with_me(&task);
    eventually("it has written", || agent.shaper().ok(&["logs", "writer"]).contains("wrote"));
    let [_, written] = io(&fresh(&agent, "writer"));
    fs::remove_dir_all(&directory).unwrap();

    // The v1 files count only where something is throttled, so there is nothing to compare with to the byte; and
    // what the file system writes of its own to bring the file to the disk is the task's.
    let of_file_system = written.bytes - (1 << 20);
    assert!(of_file_system <= 64 << 10, "{written:?}");
    assert!((256..=256 + 16 + 2).contains(&written.operations), "{written:?}");
}

#[test]
fn a_v1_group_with_the_number_of_a_v2_cgroup_is_not_taken_for_it() {
    let Some(mount) = mounts().1.into_iter().find(|mount| mount.ends_with("blkio")) else { return };
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.2"], &["spin"]);
    // The group of somebody else, in the v1 hierarchy, below the tests' own.
    let own = shaper_agent::kernel::hierarchy::place_of("self", Some("blkio")).unwrap();
    let foreign = mount.join(own).join(unique_name());
    fs::create_dir(&foreign).unwrap();
    let id = fs::metadata(&foreign).unwrap().ino();
    // As if a cgroup of the task's had the same number in the other hierarchy.
    let v2 = fs::metadata(&task.cgroup).unwrap().ino();
    let pin = fs::read_dir(agent.bpffs_dir()).unwrap().next().unwrap().unwrap().path();
    let pin = pin.join("maps/CGROUP_SLOT");
    let mut table: HashMap<_, u64, u64> =
        HashMap::try_from(Map::HashMap(MapData::from_pin(pin).unwrap())).unwrap();
    let entry = table.get(&v2, 0).unwrap();
    table.insert(id, entry, 0).unwrap();

    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique_name());
    let path = file.display().to_string();
    let mut writer = TestCgroup::run(&foreign, None, &["write", &path, "64", "direct"]);
    assert!(writer.wait().unwrap().success());
    fs::remove_file(&file).unwrap();
    let [_, written] = io(&fresh(&agent, "hog"));
    table.remove(&id).unwrap();
    fs::remove_dir(&foreign).unwrap();
    assert_eq!(written, IoCount::default());
}
