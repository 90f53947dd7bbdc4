//! What a container waits for: how much longer it starts behind `shaper-runtime`, and how soon many are adopted that are made at
//! once. Both on this machine's hierarchies, with a limit of the network for each.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use shaper_tests::{
    agent::{Agent, Options},
    cgroup::TestCgroup,
    process::Children,
    runtimes::{Bundle, Driver, Oci, Shim},
    time::happens,
};
use tempfile::TempDir;

use crate::{
    Plan,
    report::{Report, median, quantile},
    say,
};

/// Times what runc takes.
const START_GOAL: f64 = 1.1;
/// Containers that are made at once, and within how many seconds they are to be adopted.
const MANY: usize = 500;
const ADOPT_GOAL: f64 = 1.0;

/// An agent with a rule for the cgroups of a pattern.
fn node(pattern: &str, more: &[&str]) -> Result<(TempDir, Agent<'static>)> {
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let file = directory.path().join("rules.yaml");
    let rules = format!(
        "rules: [{{name: bench, select: {{cgroup: \"{pattern}\"}}, task: {{limits: {{net: 100mbit}}}}}}]"
    );
    fs::write(&file, rules).context("cannot write the rules")?;
    let file = file.display().to_string();
    let agent = Options::default().with(&[&["--adopt", &file][..], more].concat()).start();
    Ok((directory, agent))
}

pub(crate) fn start(plan: Plan, report: &mut Report) -> Result<()> {
    say("containers behind shaper-runtime, and of runc alone");
    let bundle = Bundle::new(Driver::Cgroupfs).running(&["/bin/busybox", "true"]);
    let (_rules, agent) = node(&bundle.cgroup().display().to_string(), &[])?;
    let shim = Shim::new("runc", &agent.socket(), "closed");
    let (plain, behind) = (Oci::plain("runc"), shim.oci());
    // The first one loads the kernel programs, and files into memory.
    bundle.time(&behind);
    bundle.time(&plain);
    let (mut ratios, mut more) = (Vec::new(), Vec::new());
    let per_round = if plan.is_quick { 5 } else { 20 };
    for _ in 0..plan.rounds {
        let (mut alone, mut with) = (Vec::new(), Vec::new());
        for _ in 0..per_round {
            alone.push(bundle.time(&plain).as_secs_f64() * 1e3);
            with.push(bundle.time(&behind).as_secs_f64() * 1e3);
        }
        ratios.push(median(&with) / median(&alone));
        more.push(median(&with) - median(&alone));
    }
    ensure!(agent.shaper().tasks().iter().any(|task| task.adopted_by.is_some()), "nothing was adopted");
    report.at_most(
        START_GOAL,
        "a container of runc from start to end, behind shaper-runtime",
        median(&ratios),
        "x runc",
    );
    report.of(&ratios);
    report.tell("the same, longer by", median(&more), "ms");
    report.of(&more);
    Ok(())
}

pub(crate) fn adopt(plan: Plan, report: &mut Report) -> Result<()> {
    say(&format!("{MANY} containers that are made at once"));
    let mut times = Vec::new();
    for _ in 0..plan.rounds.min(5) {
        times.push(adopt_many()?);
    }
    let what = format!(
        "{MANY} cgroups with a process each, from the first that is made to the last that is adopted"
    );
    report.at_most(ADOPT_GOAL, &what, median(&times), "s");
    report.of(&times);
    report.tell("the same, the slowest round", quantile(&times, 1000), "s");
    Ok(())
}

/// How long it takes, in seconds.
fn adopt_many() -> Result<f64> {
    let group = TestCgroup::new();
    let name = group.path().file_name().context("it has a name")?.to_string_lossy().into_owned();
    let most = (2 * MANY).to_string();
    let (_rules, agent) = node(&format!("{name}/job-*"), &["--max-tasks", &most])?;
    let mut sleepers = Children(Vec::new());
    for _ in 0..MANY {
        let child = Command::new("/bin/sleep").arg("3600").stdin(Stdio::null()).spawn();
        sleepers.0.push(child.context("cannot start sleep")?);
    }
    // One that is there before: the kernel programs are loaded by it.
    make(group.path(), "job-first", None)?;
    ensure!(happens(|| agent.shaper().tasks().len() == 1), "the agent adopts nothing: {}", agent.said());
    let start = Instant::now();
    for (number, child) in sleepers.0.iter().enumerate() {
        make(group.path(), &format!("job-{number}"), Some(child.id()))?;
    }
    // To be asked for all of its tasks again and again would keep the agent busy: their records are looked for, and then it is asked.
    let records = agent.state_dir().join("tasks");
    happens(|| fs::read_dir(&records).is_ok_and(|tasks| tasks.count() > MANY));
    let adopted = happens(|| agent.shaper().tasks().len() == MANY + 1);
    let took = start.elapsed().as_secs_f64();
    ensure!(adopted, "{} of {MANY} are adopted: {}", agent.shaper().tasks().len() - 1, agent.said());
    Ok(took)
}

/// Makes a cgroup, and moves a process there.
fn make(above: &Path, name: &str, pid: Option<u32>) -> Result<()> {
    let path = above.join(name);
    fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
    if let Some(pid) = pid {
        fs::write(path.join("cgroup.procs"), pid.to_string()).context("cannot move a process")?;
    }
    Ok(())
}
