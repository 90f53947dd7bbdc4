//! How right the counts are: against the kernel's own of a cgroup and of a device.

use std::fs;

use anyhow::{Context, Result};
use shaper_agent::kernel::bpf::Counters;
use shaper_common::abi::SLOTS;
use shaper_core::snapshot::UplinkUsage;
use shaper_tests::{
    cgroup::{TestCgroup, cpu_time},
    net::{DEVICE, Netns},
    time::{Window, happens},
};

use crate::{
    Plan,
    child::Load,
    cost::Traffic,
    kernel::Kernel,
    report::Report,
    rig::{self, device_bytes, know, quieten},
};

/// Percent.
const CPU_GOAL: f64 = 0.5;

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    cpu(plan, report)?;
    whole_frames(plan, report)?;
    segmented(plan, report)
}

fn cpu(plan: Plan, report: &mut Report) -> Result<()> {
    let mut kernel = Kernel::establish(SLOTS, &[])?;
    let group = TestCgroup::new();
    let cpu = rig::cpu().to_string();
    let mut hog =
        Load::start(&["spin", "--group", &group.path().display().to_string(), "--cpu", &cpu], None)?;
    let slot = kernel.manage(&[group.path()])?;
    // Read while it rests, so that both have counted all of it.
    let before = (kernel.bpf()?.counters(slot).cpu_ns, cpu_time(group.path()));
    hog.run(plan.hog)?;
    let after = (kernel.bpf()?.counters(slot).cpu_ns, cpu_time(group.path()));
    let (ours, theirs) = ((after.0 - before.0) as f64, (after.1 - before.1).as_nanos() as f64);
    let metric = "CPU time of a hog: off the cgroup's cpu.stat";
    report.at_most(CPU_GOAL, metric, 100.0 * (ours / theirs - 1.0).abs(), "%");
    Ok(())
}

/// All counts of what passes a device.
#[derive(Clone, Copy, PartialEq)]
struct Counts {
    /// Of the task's sockets.
    sockets: u64,
    /// Of what leaves the uplink: the task's, and all others'.
    uplink: u64,
    others: u64,
    /// The device's own.
    device: u64,
}

impl Counts {
    fn new(of_slot: &Counters, uplink: &UplinkUsage, device: u64) -> Counts {
        Counts {
            sockets: of_slot.egress.bytes,
            uplink: uplink.tasks.bytes,
            others: uplink.unmanaged.bytes + uplink.nobody.bytes,
            device,
        }
    }

    /// Bytes that the counts differ by from the device's since then: those of the uplink, those of the sockets.
    fn differences_since(&self, before: &Counts) -> (f64, f64) {
        let since = |field: fn(&Counts) -> u64| (field(self) - field(before)) as f64;
        let (device, others) = (since(|counts| counts.device), since(|counts| counts.others));
        (since(|counts| counts.uplink) + others - device, since(|counts| counts.sockets) + others - device)
    }
}

/// The counts once nothing passes any more.
fn at_rest(mut read: impl FnMut() -> Result<Counts>) -> Result<Counts> {
    /// What is on its way arrives by then, and an acknowledgement that is delayed.
    const REST: std::time::Duration = std::time::Duration::from_millis(200);
    let mut counts = read()?;
    let mut failed = None;
    happens(|| {
        Window::pass(REST);
        match read() {
            Ok(now) if now == counts => true,
            Ok(now) => {
                counts = now;
                false
            }
            Err(error) => {
                failed = Some(error);
                true
            }
        }
    });
    failed.map_or(Ok(counts), Err)
}

/// Establishes where `namespace` is this machine's network, so that the uplink is the device there.
fn establish_in(namespace: &Netns) -> Result<Kernel> {
    namespace.within(|| Kernel::establish(SLOTS, &[DEVICE]))
}

/// Without segmentation by the device, what the programs see is what passes it.
fn whole_frames(plan: Plan, report: &mut Report) -> Result<()> {
    let cable = rig::quiet_cable()?;
    for end in [&cable.near, &cable.far] {
        end.ip(&["link", "set", DEVICE, "gso_max_segs", "1"]);
    }
    let mut kernel = establish_in(&cable.near)?;
    let group = TestCgroup::new();
    let ends = ["near", "far"].map(|name| group.make_child(name));
    let slot = kernel.manage(&ends[..1])?;
    let [near, far] = ends.map(|group| group.display().to_string());
    for (kind, what) in [("udp", "64 bytes of UDP"), ("tcp", "TCP")] {
        let mut traffic = Traffic::start(kind, &cable, &near, &far)?;
        let mut read = || -> Result<Counts> {
            let sent = device_bytes(&cable.near, DEVICE)?.1;
            Ok(Counts::new(&kernel.bpf()?.counters(slot), &kernel.bpf()?.uplink_usage(), sent))
        };
        let before = at_rest(&mut read)?;
        traffic.sender.run(plan.window)?;
        let after = at_rest(&mut read)?;
        let (uplink, sockets) = after.differences_since(&before);
        report.exactly(0.0, &format!("{what}, whole frames: uplink's count - the device's"), uplink, "bytes");
        report.exactly(
            0.0,
            &format!("{what}, whole frames: sockets' count - the device's"),
            sockets,
            "bytes",
        );
        report.tell(
            &format!("{what}, whole frames: sent"),
            (after.device - before.device) as f64 / 1e6,
            "MB",
        );
    }
    Ok(())
}

/// A second cable from where the first ends, a router, whose device there takes no segments: what the task's device
/// sends as one buffer leaves the router as the frames that it stands for, and arrives so.
fn second_cable(router: &Netns) -> Result<Netns> {
    let last = Netns::new();
    router.connect(BEYOND, &last, DEVICE);
    quieten(router, BEYOND, 3)?;
    quieten(&last, DEVICE, 4)?;
    router.ip(&["address", "add", "10.98.0.1/24", "dev", BEYOND]);
    last.ip(&["address", "add", "10.98.0.2/24", "dev", DEVICE]);
    router.ip(&["link", "set", BEYOND, "gso_max_segs", "1"]);
    router.ip(&["link", "set", BEYOND, "up"]);
    last.ip(&["link", "set", DEVICE, "up"]);
    know(router, "10.98.0.2", BEYOND, 4);
    know(&last, "10.98.0.1", DEVICE, 3);
    last.ip(&["route", "add", "10.99.0.0/24", "via", "10.98.0.1"]);
    let forward = router.within(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1"));
    forward.context("cannot let a namespace forward")?;
    Ok(last)
}

const BEYOND: &str = "up1";
const LAST: &str = "10.98.0.2:5001";

/// With segmentation by a device: what the programs make of a buffer is what arrives.
fn segmented(plan: Plan, report: &mut Report) -> Result<()> {
    let cable = rig::quiet_cable()?;
    let last = second_cable(&cable.far)?;
    cable.near.ip(&["route", "add", "10.98.0.0/24", "via", "10.99.0.2"]);
    let mut kernel = establish_in(&cable.near)?;
    let group = TestCgroup::new();
    let ends = ["near", "far"].map(|name| group.make_child(name));
    let slot = kernel.manage(&ends[..1])?;
    let [near, far] = ends.map(|group| group.display().to_string());
    let mut traffic = Traffic::between("tcp", (&cable.near, &near), (&last, &far), LAST)?;
    let mut read = || -> Result<Counts> {
        let arrived = device_bytes(&last, DEVICE)?.0;
        Ok(Counts::new(&kernel.bpf()?.counters(slot), &kernel.bpf()?.uplink_usage(), arrived))
    };
    let before = at_rest(&mut read)?;
    let passed = device_bytes(&cable.near, DEVICE)?.1;
    traffic.sender.run(plan.window)?;
    let after = at_rest(&mut read)?;
    let passed = (device_bytes(&cable.near, DEVICE)?.1 - passed) as f64;
    let (uplink, sockets) = after.differences_since(&before);
    let arrived = (after.device - before.device) as f64;
    report.exactly(0.0, "TCP, segmented on its way: uplink's count - what arrives", uplink, "bytes");
    report.exactly(0.0, "TCP, segmented on its way: sockets' count - what arrives", sockets, "bytes");
    report.tell(
        "TCP, segmented on its way: the device's own count - what arrives",
        passed - arrived,
        "bytes",
    );
    report.tell("TCP, segmented on its way: arrived", arrived / 1e6, "MB");
    Ok(())
}
