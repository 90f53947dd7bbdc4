//! What unlimited traffic loses where an agent counts it, against none at all, in pairs.

use std::time::Duration;

use anyhow::Result;
use shaper_tests::{cgroup::cpu_time, statistics::Ratio};

use super::bed::Bed;
use crate::{
    Plan,
    cost::Traffic,
    report::{Report, median},
};

/// Of one turn.
struct Turn {
    /// Datagrams a second.
    datagrams: f64,
    /// CPU time of both ends for 10⁹ bytes by TCP.
    cpu_per_gb: f64,
    gbits: f64,
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let (pairs, window) =
        if plan.is_quick { (2, Duration::from_millis(300)) } else { (16, Duration::from_secs(1)) };
    let bed = Bed::make()?;
    let [near, far] = [&bed.task, &bed.far].map(|group| group.display().to_string());
    let mut udp = Traffic::start("udp", &bed.pair, &near, &far)?;
    let mut tcp = Traffic::start("tcp", &bed.pair, &near, &far)?;
    let mut turn = |is_attached: bool| -> Result<Turn> {
        // Both ends are on this machine, and so is what counting costs there.
        let _agent = is_attached.then(|| bed.agent(&[&bed.far], None));
        // The change leaves work behind.
        udp.sender.run(window / 4)?;
        let datagrams = udp.sender.run(window)?.rate();
        tcp.sender.run(window / 4)?;
        let used = || (cpu_time(&bed.task) + cpu_time(&bed.far)).as_secs_f64();
        let before = used();
        let done = tcp.sender.run(window)?;
        let cpu = used() - before;
        Ok(Turn { datagrams, cpu_per_gb: cpu / (done.count as f64 / 1e9), gbits: done.rate() * 8.0 / 1e9 })
    };
    let (mut attached, mut without) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        for is_attached in [pair % 2 == 0, pair % 2 == 1] {
            let turns = if is_attached { &mut attached } else { &mut without };
            turns.push(turn(is_attached)?);
        }
    }
    let pairs = |figure: fn(&Turn) -> f64| -> Vec<(f64, f64)> {
        attached.iter().zip(&without).map(|(with, without)| (figure(with), figure(without))).collect()
    };
    let less: Vec<(f64, f64)> =
        pairs(|turn| turn.cpu_per_gb).into_iter().map(|(with, without)| (without, with)).collect();
    let metric = "unlimited, bulk TCP: CPU per GB, not attached / attached";
    interval(report, "≥ 0.97 bulk", 0.97, metric, &Ratio::of_pairs(&less));
    let throughput = Ratio::of_pairs(&pairs(|turn| turn.gbits));
    report.tell("unlimited, bulk TCP: throughput, attached / not", throughput.mean, "");
    let metric = "unlimited, 64-byte UDP: packets a second, attached / not";
    interval(report, "≥ 0.95 64-byte UDP", 0.95, metric, &Ratio::of_pairs(&pairs(|turn| turn.datagrams)));
    let of = |figure: fn(&Turn) -> f64| without.iter().map(figure).collect::<Vec<_>>();
    for (metric, values, unit) in [
        ("unlimited, bulk TCP: not attached", of(|turn| turn.gbits), "Gbit/s"),
        ("unlimited, bulk TCP: CPU per GB, not attached", of(|turn| turn.cpu_per_gb), "s"),
        ("unlimited, 64-byte UDP: not attached", of(|turn| turn.datagrams / 1e3), "kpkt/s"),
    ] {
        report.tell(metric, median(&values), unit);
        report.of(&values);
    }
    Ok(())
}

fn interval(report: &mut Report, goal: &str, least: f64, metric: &str, ratio: &Ratio) {
    report.judge(goal, ratio.mean >= least, metric, ratio.mean, "");
    report.tell(&format!("{metric}: lower end of the 95 % interval"), ratio.low, "");
    report.tell(&format!("{metric}: upper end of the 95 % interval"), ratio.high, "");
}
