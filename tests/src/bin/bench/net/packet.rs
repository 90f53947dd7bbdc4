//! What a packet costs in the program that counts and limits what is sent, where one task sends and where 1,000 do.

use std::{
    net::UdpSocket,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use aya::sys::{Stats, enable_stats};
use shaper_common::abi::SLOTS_MAX;
use shaper_core::units::BitsPerSec;
use shaper_tests::cgroup::TestCgroup;

use crate::{
    Plan,
    child::Load,
    kernel::{Compared, Kernel, compare},
    load::{join, serve},
    peer::{EMPTY_EGRESS, Peer},
    report::{Report, median},
    rig::{self, FAR},
};

const ACTIVE: usize = 1_000;
/// More than the loads send, so that all that a limit costs is the work of looking after it.
const LIMIT: BitsPerSec = BitsPerSec(30_000_000_000);

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let _clock = enable_stats(Stats::RunTime).context("cannot switch the kernel's clock for programs on")?;
    let cable = rig::quiet_cable()?;
    let (parent, one, far) = (TestCgroup::new(), TestCgroup::new(), TestCgroup::new());
    let groups: Vec<PathBuf> = (0..ACTIVE).map(|number| parent.make_child(&number.to_string())).collect();
    let place = |path: &Path| path.display().to_string();
    let cpu = rig::cpu().to_string();
    let _sink =
        Load::start(&["udp-sink", FAR, "--group", &place(far.path()), "--cpu", "0"], Some(&cable.far))?;
    let start = |sockets: usize, groups: &[String]| {
        let sockets = sockets.to_string();
        let groups = groups.iter().map(String::as_str);
        let arguments: Vec<&str> =
            ["--cpu", &cpu, "scatter", FAR, &sockets].into_iter().chain(groups).collect();
        // What it is comes first.
        let arguments = [&arguments[2..], &arguments[..2]].concat();
        Load::start(&arguments, Some(&cable.near))
    };
    let together = [place(one.path())];
    let apart: Vec<String> = groups.iter().map(|group| place(group)).collect();
    let mut alone = start(1, &together)?;
    let mut sockets = start(ACTIVE, &together)?;
    let mut tasks = start(ACTIVE, &apart)?;

    let mut kernel = Kernel::establish(SLOTS_MAX, &[])?;
    let mut slots = vec![kernel.manage(&[one.path()])?];
    for group in &groups {
        slots.push(kernel.manage(&[group])?);
    }
    for slot in &slots {
        kernel.bpf()?.limit_egress(*slot, Some(LIMIT), false)?;
    }
    let empty = Peer::attach(&[EMPTY_EGRESS])?;
    let (ours, empty) = (kernel.program("net_egress")?, empty.program(EMPTY_EGRESS).map(|id| (id, empty))?);
    let (mut by_alone, mut by_sockets, mut by_tasks) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        for (load, into) in
            [(&mut alone, &mut by_alone), (&mut sockets, &mut by_sockets), (&mut tasks, &mut by_tasks)]
        {
            into.push(compare(ours, empty.0, || load.run(plan.window).map(drop))?);
        }
    }
    for slot in slots {
        ensure!(kernel.bpf()?.counters(slot).egress.packets > 0, "slot {slot} has sent nothing");
    }
    let gross = |rounds: &[Compared]| rounds.iter().map(|round| round.gross).collect::<Vec<_>>();
    let [alone, sockets, tasks] = [by_alone, by_sockets, by_tasks].map(|rounds| {
        let net = median(&rounds.iter().map(|round| round.net).collect::<Vec<_>>());
        (gross(&rounds), net)
    });
    let metric = "net_egress with a limit, 64 bytes of UDP";
    let cost = median(&alone.0);
    report.judge(
        "≤ 200 ns",
        cost <= 200.0,
        &format!("{metric}: one active task, with the clock"),
        cost,
        "ns",
    );
    report.of(&alone.0);
    report.tell(&format!("{metric}: one active task, net"), alone.1, "ns");
    report.tell(&format!("{metric}: one task with 1,000 sockets, with the clock"), median(&sockets.0), "ns");
    report.of(&sockets.0);
    report.tell(&format!("{metric}: 1,000 active tasks, with the clock"), median(&tasks.0), "ns");
    report.of(&tasks.0);
    report.tell(&format!("{metric}: 1,000 active tasks, net"), tasks.1, "ns");
    let ratios = |under: &[f64]| tasks.0.iter().zip(under).map(|(many, one)| many / one).collect::<Vec<_>>();
    let by_one = ratios(&alone.0);
    let ratio = median(&by_one);
    report.judge("≤ 1.3", ratio <= 1.3, &format!("{metric}: 1,000 active tasks / one"), ratio, "");
    report.of(&by_one);
    let by_sockets = ratios(&sockets.0);
    let metric = format!("{metric}: 1,000 active tasks / one with 1,000 sockets");
    report.tell(&metric, median(&by_sockets), "");
    report.of(&by_sockets);
    Ok(())
}

/// Sends datagrams from so many sockets, in an order that no cache foresees. Each socket is of the next of the cgroups: that
/// in which it is made.
pub(super) fn scatter(address: &str, sockets: usize, groups: &[&str]) -> Result<()> {
    let mut made = Vec::new();
    for number in 0..sockets {
        if let Some(group) = groups.get(number % groups.len().max(1)) {
            join(Path::new(group))?;
        }
        let socket = UdpSocket::bind("0.0.0.0:0").context("cannot make a socket")?;
        socket.connect(address).with_context(|| format!("cannot connect to {address}"))?;
        made.push(socket);
    }
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    serve(|time| {
        let start = Instant::now();
        let mut sent = 0;
        while start.elapsed() < time {
            for _ in 0..16 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let socket = &made[random as usize % made.len()];
                socket.send(&[0; 64]).with_context(|| format!("cannot send to {address}"))?;
            }
            sent += 16;
        }
        Ok(sent)
    })
}
