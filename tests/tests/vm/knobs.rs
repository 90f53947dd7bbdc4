//! The files of cgroup v2 by type, and the executor on them.

use std::{fs, path::Path};

use rustix::event::{PollFd, PollFlags, poll};
use shaper_agent::{
    actuate::Wish,
    kernel::{
        cgroup::{
            Cgroup, Contents, File,
            block::{self, IoLimits},
            cpu::{self, CpuSet, CpuShare},
            groups::{self, GroupType},
            memory::{self, Reclaimed, Reclaimer},
            pressure::{self, Stall, Trigger},
        },
        hierarchy::Hierarchies,
    },
};
use shaper_core::{
    id::BlockDevice,
    limits::Limit,
    units::{Bytes, BytesPerSec, Iops, Micros, Millicores, Weight},
};
use shaper_tests::{
    cgroup::{TestCgroup, read, write},
    disk::Disk,
    kernel_is_at_least,
    knobs::{assert_turned_and_restored, grant, target},
    time::eventually,
};

/// A cgroup with every controller, below one of the test's own.
fn child(group: &TestCgroup) -> Cgroup {
    write(group.path(), "cgroup.subtree_control", "+cpu +memory +io +cpuset");
    let path = group.make_child("task");
    let hierarchies = Hierarchies::detect().expect("/proc is mounted").expect("cgroup v2 is mounted");
    Cgroup::open(&hierarchies.v2, &path).expect("it was just made")
}

fn texts(path: &Path, files: &[&str]) -> String {
    files.iter().map(|file| format!("{file}: {}\n", read(path, file))).collect()
}

fn number(disk: &Disk) -> BlockDevice {
    disk.number().parse().expect("it is two numbers")
}

#[test]
fn every_file_of_a_cgroup_at_work_is_understood() {
    let disk = Disk::format_and_mount();
    let group = TestCgroup::new();
    let cgroup = child(&group);
    cgroup.set(cpu::MAX, &cpu::CpuMax::of(Limit::At(Millicores(500)))).unwrap();
    let path = disk.file("file").display().to_string();
    let mut load = TestCgroup::run(cgroup.path(), None, &["write", &path, "1024", "direct"]);
    assert!(load.wait().unwrap().success());
    let mut hog = TestCgroup::run(cgroup.path(), None, &["spin"]);

    fn understood<R: Contents + std::fmt::Debug, W>(cgroup: &Cgroup, file: File<R, W>) -> R {
        cgroup.get(file).unwrap_or_else(|error| panic!("{file:?}: {error}"))
    }
    eventually("it is throttled", || understood(&cgroup, cpu::STAT).throttled_periods.unwrap() > 0);
    let stat = understood(&cgroup, cpu::STAT);
    assert!(stat.usage.0 > 0 && stat.throttled.unwrap().0 > 0 && stat.bursts.is_some(), "{stat:?}");
    assert_eq!(understood(&cgroup, cpu::MAX_BURST), Micros(0));
    assert_eq!(cgroup.cpu_share().unwrap(), CpuShare::At(Weight::DEFAULT));
    assert_eq!(understood(&cgroup, cpu::CPUS), CpuSet::default());
    assert!(understood(&cgroup, cpu::CPUS_EFFECTIVE).contains(0));
    for file in [memory::MAX, memory::HIGH, memory::SWAP_MAX] {
        assert_eq!(understood(&cgroup, file), Limit::Unlimited);
    }
    for file in [memory::LOW, memory::MIN] {
        assert_eq!(understood(&cgroup, file), Limit::At(Bytes(0)));
    }
    for file in [memory::CURRENT, memory::PEAK] {
        assert!(understood(&cgroup, file).0 > 0, "{file:?}");
    }
    understood(&cgroup, memory::SWAP_CURRENT);
    assert_eq!(understood(&cgroup, memory::EVENTS).oom_group_kill, Some(0));
    assert_eq!(understood(&cgroup, memory::EVENTS_LOCAL).oom_kill, 0);
    // The kernel sums it up every two seconds.
    eventually("its memory is counted", || understood(&cgroup, memory::STAT).anon.0 > 0);
    assert!(understood(&cgroup, block::MAX).is_empty());
    assert!(understood(&cgroup, block::STAT)[&number(&disk)].written >= 1 << 20);
    for file in [pressure::CPU, pressure::MEMORY, pressure::IO] {
        understood(&cgroup, file);
    }
    // Throttled was what wrote; the hog may be on its way.
    eventually("the hog is in it", || understood(&cgroup, groups::EVENTS).populated);
    assert!(!understood(&cgroup, groups::EVENTS).frozen);
    assert_eq!(understood(&cgroup, groups::PROCESSES).0, [hog.id()]);
    assert!(understood(&cgroup, groups::CONTROLLERS).contains("memory"));
    assert_eq!(understood(&cgroup, groups::SUBTREE_CONTROL).0, [""; 0]);
    assert_eq!(understood(&cgroup, groups::MAX_DESCENDANTS), Limit::Unlimited);
    assert_eq!(understood(&cgroup, groups::STAT).descendants, 0);
    assert_eq!(understood(&cgroup, groups::TYPE), GroupType::Domain);

    cgroup.set(groups::FREEZE, &true).unwrap();
    eventually("it is frozen", || understood(&cgroup, groups::EVENTS).frozen);
    cgroup.set(groups::FREEZE, &false).unwrap();
    cgroup.kill().unwrap();
    assert!(!hog.wait().unwrap().success());
}

#[test]
fn the_files_of_io_cost_are_understood_and_written() {
    let disk = Disk::format_and_mount();
    let mount = Hierarchies::detect().unwrap().unwrap().v2;
    let root = Cgroup::open(&mount, &mount).unwrap();
    if !kernel_is_at_least(6, 12) && !root.has(block::COST_QOS) {
        return;
    }
    // The model of a device is there once anything was said of it.
    let device = number(&disk);
    fs::write(mount.join("io.cost.qos"), format!("{device} enable=0")).unwrap();
    let qos = root.get(block::COST_QOS).unwrap()[&device];
    let own =
        block::CostQos { control: block::Control::User, enable: true, read_latency: Micros(75_000), ..qos };
    root.set(block::COST_QOS, &block::OfDevice(device, own)).unwrap();
    assert_eq!(root.get(block::COST_QOS).unwrap()[&device], own);
    let model = root.get(block::COST_MODEL).unwrap()[&device];
    let own = block::CostModel { control: block::Control::User, random: [Iops(5000), Iops(6000)], ..model };
    root.set(block::COST_MODEL, &block::OfDevice(device, own)).unwrap();
    assert_eq!(root.get(block::COST_MODEL).unwrap()[&device], own);
    for (file, back) in [("io.cost.model", "ctrl=auto"), ("io.cost.qos", "enable=0 ctrl=auto")] {
        fs::write(mount.join(file), format!("{device} {back}")).unwrap();
    }
    assert_eq!(root.get(block::COST_QOS).unwrap()[&device], qos);
}

#[test]
fn an_empty_cgroup_has_nothing_to_give_and_a_full_one_has() {
    let disk = Disk::format_and_mount();
    let group = TestCgroup::new();
    let cgroup = child(&group);
    let reclaimer = Reclaimer::open(&cgroup).unwrap().expect("memory.reclaim is there since 5.19");
    assert_eq!(reclaimer.reclaim(Bytes(64 << 20)).unwrap(), Reclaimed::Partly);
    let path = disk.file("cached").display().to_string();
    let mut load = TestCgroup::run(cgroup.path(), None, &["write", &path, "4096", "buffered"]);
    assert!(load.wait().unwrap().success());
    let before = cgroup.get(memory::STAT).unwrap().file.0;
    assert!(before >= 4 << 20, "{before}");
    eventually("a mebibyte of page cache is given up", || {
        reclaimer.reclaim(Bytes(1 << 20)).unwrap() == Reclaimed::All
    });
    let after = cgroup.get(memory::STAT).unwrap().file.0;
    assert!(after < before, "{before} -> {after}");
}

#[test]
fn the_kernel_tells_of_pressure_and_of_the_end_of_the_cgroup() {
    let group = TestCgroup::new();
    let cgroup = child(&group);
    cgroup.set(cpu::MAX, &cpu::CpuMax::of(Limit::At(Millicores(50)))).unwrap();
    let trigger = Trigger { stall: Stall::Some, time: Micros(50_000), window: Micros(2_000_000) };
    let fd = cgroup.watch_pressure(pressure::CPU, &trigger).unwrap().expect("this kernel counts pressure");
    let mut hog = TestCgroup::run(cgroup.path(), None, &["spin"]);
    let mut fds = [PollFd::new(&fd, PollFlags::PRI)];
    let wait = |fds: &mut [PollFd<'_>]| {
        let timeout = rustix::time::Timespec { tv_sec: 30, tv_nsec: 0 };
        assert_eq!(poll(fds, Some(&timeout)).unwrap(), 1, "nothing is told");
        fds[0].revents()
    };
    assert!(wait(&mut fds).contains(PollFlags::PRI));
    cgroup.kill().unwrap();
    hog.wait().unwrap();
    eventually("it is empty", || !cgroup.is_populated().unwrap());
    cgroup.remove().unwrap();
    eventually("its end is told", || wait(&mut fds).contains(PollFlags::ERR));
    assert!(cgroup.get(cpu::MAX).is_err_and(|error| error.is_gone()));
}

#[test]
fn a_quota_takes_its_burst_along_in_any_order() {
    let group = TestCgroup::new();
    let target = target(child(&group));
    let files = || ["cpu.max", "cpu.max.burst"].map(|file| read(target.cgroup.path(), file));
    for (limit, expected) in [
        (Limit::At(Millicores(500)), ["50000 100000", "50000"]),
        (Limit::At(Millicores(50)), ["5000 100000", "5000"]),
        (Limit::At(Millicores(1500)), ["150000 100000", "150000"]),
        (Limit::Unlimited, ["max 100000", "0"]),
    ] {
        grant(&target, &[Wish::Cpu(limit)]).unwrap();
        assert_eq!(files(), expected);
    }
    // A burst of somebody's own, in another period, comes back.
    write(target.cgroup.path(), "cpu.max", "40000 50000");
    write(target.cgroup.path(), "cpu.max.burst", "10000");
    let wishes = [Wish::Cpu(Limit::At(Millicores(50)))];
    assert_turned_and_restored(&target, &wishes, || files().join(", "));
}

#[test]
fn every_knob_is_turned_and_comes_back() {
    let disk = Disk::format_and_mount();
    let group = TestCgroup::new();
    let target = target(child(&group));
    let path = target.cgroup.path();
    write(path, "memory.high", "104857600");
    write(path, "memory.low", "4096");
    write(path, "cpu.weight", "250");
    write(path, "io.max", &format!("{} riops=77", disk.number()));
    let device = number(&disk);
    let limits = IoLimits {
        read: Limit::At(BytesPerSec(1 << 20)),
        write_operations: Limit::At(Iops(50)),
        ..IoLimits::default()
    };
    let mib = |mib: u64| Limit::At(Bytes(mib << 20));
    let mut wishes = vec![
        Wish::Cpu(Limit::At(Millicores(300))),
        Wish::CpuIdle,
        Wish::Memory(mib(64)),
        Wish::MemoryHigh(Limit::At(Bytes((50 << 20) + 123))),
        Wish::MemoryLow(mib(20)),
        Wish::IoMax(device, limits),
    ];
    let mut files = vec![
        "cpu.max",
        "cpu.max.burst",
        "cpu.idle",
        "cpu.weight",
        "memory.max",
        "memory.high",
        "memory.low",
        "io.max",
    ];
    if target.cgroup.has(block::WEIGHT) {
        wishes.push(Wish::IoWeight(Weight::new(300).unwrap()));
        files.push("io.weight");
    } else {
        assert!(!kernel_is_at_least(6, 12), "6.12 has io.cost");
    }
    assert_turned_and_restored(&target, &wishes, || texts(path, &files));
    // Each by itself, too.
    for wish in wishes {
        assert_turned_and_restored(&target, &[wish], || texts(path, &files));
    }
    // A weight in place of being idle, and back.
    grant(&target, &[Wish::CpuIdle]).unwrap();
    let wishes = [Wish::CpuWeight(Weight::new(20).unwrap())];
    assert_turned_and_restored(&target, &wishes, || read(path, "cpu.idle"));
}
