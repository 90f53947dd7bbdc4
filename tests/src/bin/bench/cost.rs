//! What an event costs in our programs, by the kernel's own clock for programs.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use aya::sys::{Stats, enable_stats};
use shaper_common::abi::SLOTS;
use shaper_tests::{
    cgroup::TestCgroup,
    net::{NetPair, Netns},
};

use crate::{
    Plan,
    child::Load,
    kernel::{Compared, Kernel, compare},
    peer::{EMPTY_BLOCK, EMPTY_EGRESS, EMPTY_INGRESS, EMPTY_SWITCH, Peer},
    report::{Report, median},
    rig::{self, FAR, IoGroup, OnDisk},
};

/// Nanoseconds.
const SWITCH_GOAL: f64 = 80.0;
const BLOCK_GOAL: f64 = 150.0;
const PACKET_GOAL: f64 = 140.0;

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let _clock = enable_stats(Stats::RunTime).context("cannot switch the kernel's clock for programs on")?;
    let mut kernel = Kernel::establish(SLOTS, &[])?;
    switches(plan, report, &mut kernel)?;
    reads(plan, report, &mut kernel)?;
    packets(plan, report, &mut kernel)
}

/// The median of each figure over rounds of `compared`.
struct Medians {
    gross: f64,
    net: f64,
}

impl Medians {
    fn over(plan: Plan, mut round: impl FnMut() -> Result<Compared>) -> Result<Medians> {
        let rounds = (0..plan.rounds).map(|_| round()).collect::<Result<Vec<_>>>()?;
        let of = |figure: fn(&Compared) -> f64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
        Ok(Medians { gross: of(|round| round.gross), net: of(|round| round.net) })
    }
}

fn switches(plan: Plan, report: &mut Report, kernel: &mut Kernel) -> Result<()> {
    let empty = Peer::attach(&[EMPTY_SWITCH])?;
    let (ours, empty) = (kernel.program("sched_switch")?, empty.program(EMPTY_SWITCH).map(|id| (id, empty))?);
    let group = TestCgroup::new();
    let cpu = rig::cpu().to_string();

    let one = group.make_child("one");
    let pair = group.make_child("pair");
    let apart = ["0", "1"].map(|name| group.make_child(&format!("pair/{name}")));
    let place = |group: &PathBuf| group.display().to_string();
    let together = Load::start(&["ring", "2", "--group", &place(&one), "--cpu", &cpu], None)?;
    let arguments = ["ring", "2", &place(&pair), "--group", &place(&apart[0]), "--cpu", &cpu];
    let between = Load::start(&arguments, None)?;
    let slot = kernel.manage(&[one])?;
    let mut slots = vec![slot];
    for group in &apart {
        slots.push(kernel.manage(&[group])?);
    }
    let cost_of =
        |mut load: Load| Medians::over(plan, || compare(ours, empty.0, || load.run(plan.window).map(drop)));
    let (together, between) = (cost_of(together)?, cost_of(between)?);
    for slot in slots {
        ensure!(kernel.bpf()?.counters(slot).switches > 1000, "the ping-pong was not counted as slot {slot}");
    }
    report.at_most(SWITCH_GOAL, "sched_switch, net: ping-pong in one cgroup", together.net, "ns");
    report.at_most(SWITCH_GOAL, "sched_switch, net: ping-pong between two cgroups", between.net, "ns");
    report.tell("sched_switch, with the clock: ping-pong in one cgroup", together.gross, "ns");
    Ok(())
}

fn reads(plan: Plan, report: &mut Report, kernel: &mut Kernel) -> Result<()> {
    const METRIC: &str = "block_rq_complete, net: 4 KiB direct reads";
    if let Some((_, why)) = kernel.bpf()?.without().iter().find(|(name, _)| *name == "block_rq_complete") {
        let why = why.clone();
        report.skip(METRIC, &why);
        return Ok(());
    }
    let group = TestCgroup::new();
    let io_group = IoGroup::make()?;
    let file = OnDisk::make()?;
    let slot = kernel.manage(&[group.path()])?;
    if let Some(io_group) = &io_group {
        kernel.bpf()?.join_v1(slot, io_group.id()?)?;
    }
    let mut readers = Vec::new();
    for _ in 0..READERS {
        let Ok(reader) = reader(&file, &group, io_group.as_ref()) else {
            report.skip(METRIC, "no direct reads of a file beside this program");
            return Ok(());
        };
        readers.push(reader);
    }
    let empty = Peer::attach(&[EMPTY_BLOCK])?;
    let (ours, empty) =
        (kernel.program("block_rq_complete")?, empty.program(EMPTY_BLOCK).map(|id| (id, empty))?);
    rig::settle_disk(file.path())?;
    for (count, what) in [(1, "one reader, the CPU idles between"), (READERS, "8 readers, the CPU is busy")] {
        let mut run = || Load::run_all(&mut readers[..count], plan.window);
        let cost = Medians::over(plan, || compare(ours, empty.0, &mut run))?;
        report.at_most(BLOCK_GOAL, &format!("{METRIC}, {what}"), cost.net, "ns");
    }
    let counted = kernel.bpf()?.block_io()?;
    let counted = counted.iter().filter(|(key, _)| key.slot == slot).map(|(_, stat)| stat.operations);
    ensure!(counted.sum::<u64>() > 100, "the reads were not counted");
    Ok(())
}

/// Readers at once, so that a CPU does not rest.
const READERS: usize = 8;

/// A process that reads from the disk, in these groups.
pub(crate) fn reader(file: &OnDisk, group: &TestCgroup, io_group: Option<&IoGroup>) -> Result<Load> {
    let place = |group: &std::path::Path| group.display().to_string();
    let cpu = rig::cpu().to_string();
    let (file, group) = (place(file.path()), place(group.path()));
    let mut arguments = vec!["read", &file, "--cpu", &cpu, "--group", &group];
    let io_group = io_group.map(|group| place(group.directory()));
    if let Some(io_group) = &io_group {
        arguments.extend(["--group", io_group]);
    }
    Load::start(&arguments, None)
}

/// A sender and a receiver, in cgroups of their own, at the ends of a cable.
pub(crate) struct Traffic {
    pub(crate) sender: Load,
    _receiver: Load,
}

impl Traffic {
    /// `kind` is `udp` or `tcp`.
    pub(crate) fn start(kind: &str, cable: &NetPair, near: &str, far: &str) -> Result<Traffic> {
        Traffic::between(kind, (&cable.near, near), (&cable.far, far), FAR)
    }

    /// From a namespace and cgroup to another, which has that address.
    pub(crate) fn between(
        kind: &str,
        (near, near_group): (&Netns, &str),
        (far, far_group): (&Netns, &str),
        address: &str,
    ) -> Result<Traffic> {
        let (send, sink, cpu) = (format!("{kind}-send"), format!("{kind}-sink"), rig::cpu().to_string());
        let receiver = Load::start(&[&sink, address, "--group", far_group, "--cpu", "0"], Some(far))?;
        let sender = Load::start(&[&send, address, "--group", near_group, "--cpu", &cpu], Some(near))?;
        Ok(Traffic { sender, _receiver: receiver })
    }
}

fn packets(plan: Plan, report: &mut Report, kernel: &mut Kernel) -> Result<()> {
    let cable = rig::quiet_cable()?;
    let group = TestCgroup::new();
    let ends = ["near", "far"].map(|name| group.make_child(name));
    let slots = [kernel.manage(&ends[..1])?, kernel.manage(&ends[1..])?];
    let [near, far] = ends.map(|group| group.display().to_string());
    let empty = Peer::attach(&[EMPTY_EGRESS, EMPTY_INGRESS])?;
    let mut datagrams = 0;
    for (kind, what) in [("udp", "64 bytes of UDP"), ("tcp", "bulk TCP")] {
        let mut traffic = Traffic::start(kind, &cable, &near, &far)?;
        let (mut out, mut back) = (Vec::new(), Vec::new());
        let programs = [("net_egress", EMPTY_EGRESS), ("net_ingress", EMPTY_INGRESS)];
        let mut ids = Vec::new();
        for (ours, nothing) in programs {
            ids.push((kernel.program(ours)?, empty.program(nothing)?));
        }
        for _ in 0..plan.rounds {
            let mut ingress = None;
            let mut sent = 0;
            let egress = compare(ids[0].0, ids[0].1, || {
                let send = || traffic.sender.run(plan.window).map(|done| sent = done.count);
                ingress = Some(compare(ids[1].0, ids[1].1, send)?);
                Ok(())
            })?;
            if kind == "udp" {
                datagrams += sent;
            }
            out.push(egress);
            back.extend(ingress);
        }
        for (name, rounds) in [("net_egress", out), ("net_ingress", back)] {
            let of = |figure: fn(&Compared) -> f64| median(&rounds.iter().map(figure).collect::<Vec<_>>());
            let metric = |kind| format!("{name}, {kind}: {what}");
            report.at_most(PACKET_GOAL, &metric("with the clock"), of(|round| round.gross), "ns");
            report.tell(&metric("net"), of(|round| round.net), "ns");
        }
    }
    let counted = |kernel: &mut Kernel, slot| kernel.bpf().map(|bpf| bpf.counters(slot));
    ensure!(counted(kernel, slots[0])?.egress.packets > datagrams, "what was sent was not counted");
    ensure!(counted(kernel, slots[1])?.ingress.packets > 1000, "what was received was not counted");
    Ok(())
}
