//! What is measured is what the kernel's own files say.

use shaper_core::snapshot::{Source, TaskSnapshot};
use shaper_tests::{
    agent::Agent,
    cgroup::{TestCgroup, cpu_time, read, write},
    disk::Disk,
    time::{eventually, happens},
};

use super::SECOND;

/// (bytes read, reads, bytes written, writes) on the disk.
fn counted(usage: &TaskSnapshot, disk: &Disk) -> [u64; 4] {
    let device = usage.io.iter().find(|device| device.device == disk.number());
    let of = |device: &shaper_core::snapshot::DeviceUsage| {
        [device.read.bytes, device.read.operations, device.write.bytes, device.write.operations]
    };
    device.map_or([0; 4], of)
}

#[test]
fn block_io_is_that_of_io_stat_to_the_byte_and_operation_written_back_or_not() {
    let disk = Disk::format_and_mount();
    let agent = Agent::start();
    let group = TestCgroup::new();
    // +memory: what is written later is charged to the group that the memory was charged to.
    write(group.path(), "cgroup.subtree_control", "+io +memory");
    agent.adopt("service", group.path(), &[]);
    let sources = agent.shaper().top().sources;
    assert_eq!((sources.io, sources.io_latency), (Source::Program, Source::Program));

    let [direct, buffered] = ["direct", "buffered"].map(|way| disk.file(way).display().to_string());
    for (number, load) in [
        ["write", &direct, "1024", "direct"].as_slice(),
        &["write", &buffered, "4096", "buffered"],
        &["read", &direct],
        &["read", &buffered],
    ]
    .into_iter()
    .enumerate()
    {
        let child = group.make_child(&number.to_string());
        let mut process = TestCgroup::run(&child, None, load);
        assert!(process.wait().unwrap().success(), "{load:?}");
        let kernel = ["rbytes", "rios", "wbytes", "wios"].map(|count| disk.io_stat(group.path(), count));
        let mut found = [0; 4];
        let same = happens(|| {
            found = counted(&agent.shaper().usage_of("service"), &disk);
            found == kernel
        });
        assert!(
            same,
            "after {load:?}: {found:?} counted, {kernel:?} in io.stat: {}",
            read(group.path(), "io.stat")
        );
    }
    let usage = agent.shaper().usage_of("service");
    assert!(counted(&usage, &disk)[2] >= 5 << 20, "{usage:?}");
    assert_eq!(agent.shaper().top().health.io_uncounted, 0);
}

#[test]
fn cpu_time_is_that_of_cpu_stat() {
    let agent = Agent::start();
    let task = agent.run("hog", &["--cpu", "0.5"], &["spin"]);
    eventually("it has run", || cpu_time(&task.cgroup) > 2 * SECOND);
    // The file is brought up to date at ticks; a reading between two of it.
    agent.assert_counted("hog", &task.cgroup, 2.0);
}

#[test]
fn waiting_for_memory_rings_and_is_read_at_once() {
    let agent = Agent::start();
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &[]);
    write(group.path(), "memory.high", &(16 << 20).to_string());
    let mut eater = TestCgroup::run(group.path(), None, &["eat", "256"]);
    eventually("the kernel tells of it", || agent.shaper().usage_of("service").pressure_alarms > 0);
    let memory = agent.shaper().usage_of("service").memory.expect("v2 has the controller");
    // (The alarm comes before the totals are brought up to date.)
    let pressure = memory.pressure.expect("Debian's kernels count it");
    assert!(pressure.some_total_us > 0, "{memory:?}");
    assert!(memory.now.0 > 0 && memory.oom_kills == Some(0), "{memory:?}");
    eater.kill().and_then(|()| eater.wait()).unwrap();
}
