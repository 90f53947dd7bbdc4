//! What loans are worth to a bursty service, and what they cost others: with no limit, a plain quota, a quota with the
//! kernel's own burst, and a limit of shaper's, by turns on one node under one agent, beside the same hogs and a
//! neighbour that was promised something. Only the service's limit differs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shaper_core::task::TaskStatus;
use shaper_tests::{
    burst::Means,
    cgroup::{cpu_time, read, write},
    time::{Window, monotonic_ns},
};

use crate::{
    Plan,
    pulse::{self, Pattern, Record},
    report::{Report, median, quantile},
    say,
    site::{ALL_CPUS, CPUS, Site, throttled_ms},
};

/// Limit of the service, and the same in a period, µs.
const CEILING: f64 = 0.3;
const GRANT_US: u64 = 30_000;
/// What the neighbour was promised, and the same in a period, µs. It takes all of it.
const PROMISED: f64 = 0.5;
const PROMISED_US: u64 = 50_000;
/// Of its CPUs the node lends at most this, less what others were promised.
const LENDABLE: f64 = 0.95;
/// Nothing is lent before a task has rested for a window.
const EARNED: Duration = Duration::from_secs(11);
const SETTLED: Duration = Duration::from_secs(1);
/// Of the service, the most there is: with less it waits for the others most of the time, whatever its limit.
const WEIGHT: &str = "10000";
const LOOK: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Unlimited,
    Plain,
    KernelBurst,
    Shaper,
}

const KINDS: [(Kind, &str); 4] = [
    (Kind::Unlimited, "no limit"),
    (Kind::Plain, "plain cpu.max"),
    (Kind::KernelBurst, "cpu.max with burst"),
    (Kind::Shaper, "shaper"),
];

/// (name, [`Pattern`]). All need less than the limit on average, and more than it in some periods.
const SERVICES: &[(&str, &str)] = &[
    // Each tenth request is long: what comes at once is a little more than the quota.
    ("service", "2:20000:1000:10:12000"),
    // Each fiftieth is longer than the quota, and than what the kernel lets a task save.
    ("service with long requests", "2:20000:1000:50:40000"),
];

/// How a service fared.
struct Run {
    /// How long each request took, ms.
    latencies: Vec<f64>,
    throttled_ms: f64,
    cores: f64,
    neighbour: f64,
    /// The largest mean over any 10 s, in cores, from the service's first second on.
    worst_mean: f64,
    /// The most that was in force beyond limits, in cores, of all tasks together.
    most_lent: f64,
    /// The same as the agent said it, and its largest excess over the pool of that moment.
    most_told: f64,
    excess: f64,
}

pub(crate) fn measure(plan: Plan, report: &mut Report) -> Result<()> {
    let services = if plan.is_quick { &SERVICES[..1] } else { SERVICES };
    let site = Site::start(&[])?;
    site.hogs("hogs", &[]);
    let neighbour = site.run("neighbour", &["--cpu", &PROMISED.to_string()], &["hogs", ALL_CPUS]);
    for (name, pattern) in services {
        report.tell(&format!("{name}: what its requests need"), Pattern::demand(pattern)?, "cores");
        let mut rounds: Vec<Vec<Run>> = KINDS.iter().map(|_| Vec::new()).collect();
        for round in 0..plan.service_rounds {
            for ((kind, kind_name), runs) in KINDS.iter().zip(&mut rounds) {
                let id = format!("{}-{round}-{}", name.replace(' ', "-"), kind_name.replace([' ', '.'], "-"));
                let run = once(&site, plan, &neighbour, &id, *kind, pattern)?;
                say(&format!(
                    "{id}: p50 {:.1} ms, p99 {:.1} ms, {:.1} ms throttled, {:.3} cores, the neighbour {:.3}",
                    quantile(&run.latencies, 500),
                    quantile(&run.latencies, 990),
                    run.throttled_ms,
                    run.cores,
                    run.neighbour
                ));
                runs.push(run);
            }
        }
        tell(report, name, &rounds);
    }
    Ok(())
}

fn once(site: &Site, plan: Plan, neighbour: &TaskStatus, id: &str, kind: Kind, pattern: &str) -> Result<Run> {
    let done = site.file(id);
    let limit = CEILING.to_string();
    let weight = ["--cpu-weight", WEIGHT];
    let limits: &[&str] = if kind == Kind::Shaper { &["--cpu", &limit] } else { &[] };
    let task = site.run(id, &[&weight, limits].concat(), &["requests", &done.display().to_string(), pattern]);
    let group = task.cgroup.as_str();
    let quota = format!("{GRANT_US} 100000");
    let burst = match kind {
        Kind::Unlimited | Kind::Shaper => None,
        Kind::Plain => Some(0),
        Kind::KernelBurst => Some(GRANT_US),
    };
    if let Some(burst) = burst {
        write(group, "cpu.max", &quota);
        write(group, "cpu.max.burst", &burst.to_string());
    }
    let expected = if kind == Kind::Unlimited { "max 100000" } else { &quota };
    ensure!(read(group, "cpu.max") == expected, "cpu.max of {id} is {}", read(group, "cpu.max"));

    let mut watched = Watched::default();
    watched.pass(site, kind, &task, neighbour, if kind == Kind::Shaper { EARNED } else { SETTLED }, false)?;
    let read = || -> Result<(f64, f64, f64)> {
        let cores = |group: &str| cpu_time(group).as_secs_f64();
        Ok((throttled_ms(group)?, cores(group), cores(&neighbour.cgroup)))
    };
    let (from, before) = (monotonic_ns(), read()?);
    watched.pass(site, kind, &task, neighbour, plan.service, true)?;
    let (window, after) = (Window { from, to: monotonic_ns() }, read()?);
    site.end(&task);
    let is_in = |(due, _): &Record| (window.from..window.to).contains(due);
    let latencies: Vec<f64> = pulse::records(&done)?
        .into_iter()
        .filter(is_in)
        .map(|(due, done)| (done - due) as f64 / 1e6)
        .collect();
    ensure!(!latencies.is_empty(), "{id} has answered no request");
    Ok(Run {
        latencies,
        throttled_ms: after.0 - before.0,
        cores: (after.1 - before.1) / window.seconds(),
        neighbour: (after.2 - before.2) / window.seconds(),
        worst_mean: watched.means.worst(),
        most_lent: watched.most_lent,
        most_told: watched.most_told,
        excess: watched.excess,
    })
}

/// What is looked at while a service runs.
#[derive(Default)]
struct Watched {
    means: Means,
    most_lent: f64,
    most_told: f64,
    excess: f64,
}

impl Watched {
    fn pass(
        &mut self,
        site: &Site,
        kind: Kind,
        service: &TaskStatus,
        neighbour: &TaskStatus,
        time: Duration,
        is_measured: bool,
    ) -> Result<()> {
        let end = monotonic_ns() + time.as_nanos() as u64;
        let mut looks = 0;
        while monotonic_ns() < end {
            self.means.look(&service.cgroup);
            // With every kind of limit, and not while the service is measured: asking takes a tenth of a second of CPU time.
            let pool = if !is_measured && looks % 50 == 0 { Some(site.pool()?) } else { None };
            if kind == Kind::Shaper {
                let lent = beyond(&service.cgroup, GRANT_US)? + beyond(&neighbour.cgroup, PROMISED_US)?;
                self.most_lent = self.most_lent.max(lent);
                if let Some(pool) = pool {
                    let (lent, size) = (pool.lent.0 as f64 / 1000.0, pool.size.0 as f64 / 1000.0);
                    self.most_told = self.most_told.max(lent);
                    self.excess = self.excess.max(lent - size);
                }
            }
            looks += 1;
            Window::pass(LOOK);
        }
        Ok(())
    }
}

/// What is in force beyond a limit, in cores.
pub(crate) fn beyond(group: &str, grant_us: u64) -> Result<f64> {
    let text = read(group, "cpu.max");
    let quota: Option<u64> = text.split(' ').next().and_then(|quota| quota.parse().ok());
    let quota = quota.with_context(|| format!("cpu.max of {group} is {text}"))?;
    Ok(quota.saturating_sub(grant_us) as f64 / 100_000.0)
}

fn tell(report: &mut Report, name: &str, rounds: &[Vec<Run>]) {
    let of = |kind: Kind, field: &dyn Fn(&Run) -> f64| -> Vec<f64> {
        let at = KINDS.iter().position(|(each, _)| *each == kind).unwrap_or_default();
        rounds[at].iter().map(field).collect()
    };
    let p99 = |run: &Run| quantile(&run.latencies, 990);
    let ratios = |over: &[f64], under: &[f64]| -> Vec<f64> {
        over.iter().zip(under).map(|(over, under)| over / under).collect()
    };
    for (kind, kind_name) in KINDS {
        for (what, thousandths) in [("p50", 500), ("p99", 990)] {
            let values = of(kind, &|run| quantile(&run.latencies, thousandths));
            report.tell(&format!("{name}, {kind_name}: {what} of a request"), median(&values), "ms");
            report.of(&values);
        }
        let values = of(kind, &|run| run.throttled_ms / 10.0);
        report.tell(
            &format!("{name}, {kind_name}: kept from the CPU by its quota, all rounds"),
            values.iter().sum::<f64>() * 10.0,
            "ms",
        );
        let values = of(kind, &|run| run.cores);
        report.tell(&format!("{name}, {kind_name}: uses"), median(&values), "cores");
        report.of(&values);
    }
    let [unlimited, plain, burst, shaper] = KINDS.map(|(kind, _)| of(kind, &p99));
    for (goal, other, under) in [
        (Some(1.2), "no limit", &unlimited),
        (Some(0.3), "plain cpu.max", &plain),
        (None, "cpu.max with burst", &burst),
    ] {
        let (metric, values) = (format!("{name}: p99, shaper / {other}"), ratios(&shaper, under));
        match goal {
            Some(goal) => report.at_most(goal, &metric, median(&values), ""),
            None => report.tell(&metric, median(&values), ""),
        }
        report.of(&values);
    }
    let throttled = |kind| of(kind, &|run| run.throttled_ms).iter().sum::<f64>();
    let part = 100.0 * throttled(Kind::Shaper) / throttled(Kind::Plain);
    report.at_most(1.0, &format!("{name}: throttled time, shaper / plain cpu.max"), part, "%");
    let by_burst = throttled(Kind::KernelBurst);
    if by_burst > 0.0 {
        let part = 100.0 * throttled(Kind::Shaper) / by_burst;
        report.tell(&format!("{name}: throttled time, shaper / cpu.max with burst"), part, "%");
    }

    let most = |values: Vec<f64>| values.into_iter().fold(f64::NEG_INFINITY, f64::max);
    let worst = most(of(Kind::Shaper, &|run| run.worst_mean)) / CEILING;
    report.at_most(1.01, &format!("{name}: worst mean over 10 s / ceiling"), worst, "");
    for (kind, kind_name) in KINDS {
        let off = of(kind, &|run| (run.neighbour / PROMISED - 1.0) * 100.0);
        let worst = off.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(f64::NAN);
        let metric = format!("{name}, {kind_name}: the neighbour's share off its grant, worst round");
        match kind {
            Kind::Shaper => report.within(3.0, &metric, worst, "%"),
            _ => report.tell(&metric, worst, "%"),
        }
    }
    report.tell(
        &format!("{name}: most lent, by the agent"),
        most(of(Kind::Shaper, &|run| run.most_told)),
        "cores",
    );
    report.at_most(
        0.0,
        &format!("{name}: most lent beyond the pool, by the agent"),
        most(of(Kind::Shaper, &|run| run.excess)),
        "cores",
    );
    // Seen without the agent: what is in force beyond limits, against what is left of the CPUs by what others are promised.
    let metric = format!("{name}: most lent, by the cgroups' files");
    report.at_most(
        CPUS * LENDABLE - PROMISED,
        &metric,
        most(of(Kind::Shaper, &|run| run.most_lent)),
        "cores",
    );
}
