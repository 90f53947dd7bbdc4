//! The executor on the controllers of this machine: v1, on a hybrid host.

use std::path::PathBuf;

use shaper_agent::{
    actuate::{Target, Wish},
    kernel::{
        cgroup::{Cgroup, block::IoLimits},
        hierarchy::{Hierarchies, place_of},
        v1::V1Group,
    },
};
use shaper_core::{
    id::BlockDevice,
    limits::Limit,
    units::{Bytes, BytesPerSec, Iops, Millicores, Weight},
};
use shaper_tests::{
    cgroup::{TestCgroup, read, unique_name, write},
    knobs::{self, assert_turned_and_restored, grant},
};

/// Directories that go with this.
struct Removed([PathBuf; 3]);

impl Drop for Removed {
    fn drop(&mut self) {
        for directory in &self.0 {
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// A group of its own of a v1 controller.
fn v1_group(hierarchies: &Hierarchies, controller: &str) -> V1Group {
    let found = hierarchies.v1.iter().find(|(name, _)| name == controller);
    let (_, mount) = found.unwrap_or_else(|| panic!("this machine has no v1 hierarchy of {controller}"));
    let path = place_of("self", Some(controller)).expect("the controller is there").join(unique_name());
    V1Group::make(mount, controller, &path).expect("a group can be made")
}

/// The first disk that sysfs names.
fn any_disk() -> BlockDevice {
    let devices = std::fs::read_dir("/sys/dev/block").expect("sysfs is mounted");
    let is_whole = |path: &PathBuf| !path.join("partition").exists();
    let disk = devices
        .map(|entry| entry.expect("it can be listed").path())
        .find(is_whole)
        .expect("this machine has a block device");
    let name = disk.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.parse().ok()).expect("its name is its number")
}

#[test]
fn every_knob_of_v1_is_turned_and_comes_back() {
    let hierarchies = Hierarchies::detect().unwrap().unwrap();
    let group = TestCgroup::new();
    let groups = ["cpu", "memory", "blkio"].map(|controller| v1_group(&hierarchies, controller));
    let removed = Removed([0, 1, 2].map(|index: usize| groups[index].directory().to_owned()));
    let [cpu, memory, io] = &removed.0;
    let [v1_cpu, v1_memory, v1_io] = groups.map(Some);
    let cgroup = Cgroup::open(&hierarchies.v2, group.path()).unwrap();
    let target = Target { v1_cpu, v1_memory, v1_io, ..knobs::target(cgroup) };
    write(cpu, "cpu.shares", "333");
    write(memory, "memory.limit_in_bytes", "104857600");
    let files = || {
        let cpu =
            ["cpu.cfs_quota_us", "cpu.cfs_burst_us", "cpu.idle", "cpu.shares"].map(|file| read(cpu, file));
        let rates = ["read_bps_device", "write_bps_device", "read_iops_device", "write_iops_device"];
        let io = rates.map(|file| read(io, &format!("blkio.throttle.{file}")));
        format!("{cpu:?} {} {io:?}", read(memory, "memory.limit_in_bytes"))
    };
    let limits = IoLimits {
        read: Limit::At(BytesPerSec(1 << 20)),
        write_operations: Limit::At(Iops(50)),
        ..IoLimits::default()
    };
    let wishes = [
        Wish::Cpu(Limit::At(Millicores(300))),
        Wish::CpuIdle,
        Wish::Memory(Limit::At(Bytes((64 << 20) + 5))),
        Wish::IoMax(any_disk(), limits),
    ];
    assert_turned_and_restored(&target, &wishes, files);
    for wish in wishes {
        assert_turned_and_restored(&target, &[wish], files);
    }
    // A quota takes its burst along, up and down.
    for (limit, quota) in [(500, "50000"), (50, "5000"), (1500, "150000")] {
        grant(&target, &[Wish::Cpu(Limit::At(Millicores(limit)))]).unwrap();
        assert_eq!(["cpu.cfs_quota_us", "cpu.cfs_burst_us"].map(|file| read(cpu, file)), [quota, quota]);
    }
    // A weight in place of being idle.
    grant(&target, &[Wish::CpuIdle]).unwrap();
    grant(&target, &[Wish::CpuWeight(Weight::new(50).unwrap())]).unwrap();
    assert_eq!(["cpu.idle", "cpu.shares"].map(|file| read(cpu, file)), ["0", "512"]);
    // v1 has nothing like memory.high.
    let refused = grant(&target, &[Wish::MemoryHigh(Limit::Unlimited)]).unwrap_err().to_string();
    assert!(refused.contains("memory_high: no controller of this host reaches"), "{refused}");
}
