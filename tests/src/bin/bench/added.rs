//! What loads lose by being measured, without any clock in the kernel: they are run with our programs, with none, with
//! empty ones, and with the usual way of measuring, in turns.

use anyhow::Result;
use shaper_common::abi::SLOTS;
use shaper_tests::cgroup::TestCgroup;

use crate::{
    Plan,
    child::Load,
    cost::{Traffic, reader},
    kernel::Kernel,
    peer::{CLASSIC, EMPTY_SWITCH, Peer},
    report::{Report, median},
    rig::{self, IoGroup, OnDisk},
};

/// Of what the usual way adds.
const ADDED_GOAL: f64 = 0.25;

/// What the loads did in one turn: ping-pongs, reads, datagrams and bytes a second.
struct Turn {
    ping_pong_us: f64,
    reads: f64,
    udp: f64,
    tcp: f64,
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let cable = rig::quiet_cable()?;
    let group = TestCgroup::new();
    let io_group = IoGroup::make()?;
    let file = OnDisk::make()?;
    let far_group = group.make_child("far");
    let [near, far] = [group.path(), far_group.as_path()].map(|path| path.display().to_string());
    let cpu = rig::cpu().to_string();
    let mut ping_pong = Load::start(&["ring", "2", "--group", &near, "--cpu", &cpu], None)?;
    let mut reader = reader(&file, &group, io_group.as_ref()).ok();
    let mut udp = Traffic::start("udp", &cable, &near, &far)?;
    let mut tcp = Traffic::start("tcp", &cable, &near, &far)?;
    rig::settle_disk(file.path())?;

    let round_trip = |load: &mut Load| -> Result<f64> { Ok(1e6 / load.run(plan.window)?.rate()) };
    let mut turn = |ping_pong: &mut Load| -> Result<Turn> {
        Ok(Turn {
            ping_pong_us: round_trip(ping_pong)?,
            reads: reader
                .as_mut()
                .map_or(Ok(f64::NAN), |load| load.run(plan.window).map(|done| done.rate()))?,
            udp: udp.sender.run(plan.window)?.rate(),
            tcp: tcp.sender.run(plan.window)?.rate(),
        })
    };
    let warm_up = |load: &mut Load| load.run(plan.window / 4).map(drop);
    let (mut none, mut ours, mut empty, mut classic) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        // Each is run first for a moment without being looked at: the attachment leaves work behind.
        warm_up(&mut ping_pong)?;
        none.push(turn(&mut ping_pong)?);
        {
            let _attached = Peer::attach(&[EMPTY_SWITCH])?;
            warm_up(&mut ping_pong)?;
            empty.push(round_trip(&mut ping_pong)?);
        }
        {
            let mut kernel = Kernel::establish(SLOTS, &[])?;
            let slot = kernel.manage(&[group.path(), &far_group])?;
            if let Some(io_group) = &io_group {
                kernel.bpf()?.join_v1(slot, io_group.id()?)?;
            }
            warm_up(&mut ping_pong)?;
            ours.push(turn(&mut ping_pong)?);
        }
        {
            let _attached = Peer::attach(&CLASSIC)?;
            warm_up(&mut ping_pong)?;
            classic.push(round_trip(&mut ping_pong)?);
        }
    }

    let of = |turns: &[Turn], figure: fn(&Turn) -> f64| median(&turns.iter().map(figure).collect::<Vec<_>>());
    let trip = of(&none, |turn| turn.ping_pong_us);
    // Each against what it was without in the same round: the machine is not the same all the time.
    let added = |with: &[f64]| {
        let differences: Vec<f64> =
            with.iter().zip(&none).map(|(with, none)| with - none.ping_pong_us).collect();
        median(&differences)
    };
    let trips: Vec<f64> = ours.iter().map(|turn| turn.ping_pong_us).collect();
    let (by_empty, by_ours, by_classic) = (added(&empty), added(&trips), added(&classic));
    report.tell("ping-pong: round trip without programs", trip, "us");
    report.tell("ping-pong: added by an empty program", by_empty, "us");
    report.tell("ping-pong: added by ours", by_ours, "us");
    report.tell("ping-pong: added by the classic pair", by_classic, "us");
    report.tell("ping-pong: round trip with ours / without", (trip + by_ours) / trip, "");
    report.at_most(ADDED_GOAL, "ping-pong: added by ours / by the classic pair", by_ours / by_classic, "");
    let ratio = |figure: fn(&Turn) -> f64| {
        median(&ours.iter().zip(&none).map(|(ours, none)| figure(ours) / figure(none)).collect::<Vec<_>>())
    };
    if reader.is_some() {
        report.tell("4 KiB direct reads: with ours / without", ratio(|turn| turn.reads), "");
    } else {
        report.skip("4 KiB direct reads", "no direct reads of a file beside this program");
    }
    report.tell("bulk TCP: with ours / without", ratio(|turn| turn.tcp), "");
    report.tell("64 bytes of UDP: with ours / without", ratio(|turn| turn.udp), "");
    report.tell("64 bytes of UDP: without", of(&none, |turn| turn.udp) / 1e3, "kpkt/s");
    report.tell("bulk TCP: without", of(&none, |turn| turn.tcp) * 8.0 / 1e9, "Gbit/s");
    Ok(())
}
