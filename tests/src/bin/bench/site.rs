//! A node for a benchmark: the agent as it is shipped, with tasks whose commands are loads of this program.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use shaper_core::{snapshot::CpuPool, task::TaskStatus};
use shaper_tests::{
    agent::{Agent, Options},
    cgroup::{cpu_time, read},
    time::{Window, eventually},
};

use crate::pulse;

/// Such a node.
pub(crate) struct Site {
    pub(crate) agent: Agent<'static>,
    program: String,
}

/// The CPUs of the VM.
pub(crate) const ALL_CPUS: &str = "0,1";
pub(crate) const CPUS: f64 = 2.0;

impl Site {
    /// Starts the agent with these options. Natively, other work moves every figure, and some hosts have no `cpu.max`.
    pub(crate) fn start(options: &[&str]) -> Result<Site> {
        ensure!(std::env::var_os("SHAPER_VM").is_some(), "this is measured in the VM: `cargo xtask bench`");
        let program = std::env::current_exe().context("cannot find this program")?;
        // They note what they do in the agent's directory.
        let agent = Options::default().with(&["--allow-root-tasks"]).with(options).start();
        Ok(Site { agent, program: program.display().to_string() })
    }

    /// Starts a load as a task.
    pub(crate) fn run(&self, id: &str, limits: &[&str], load: &[&str]) -> TaskStatus {
        let command = [&[self.program.as_str(), "load"], load].concat();
        let task = self.agent.shaper().start(id, &[&["--user", "0"], limits].concat(), &command);
        self.agent.ends_with_me(&task);
        task
    }

    /// Starts a task that takes all it can get, on all CPUs.
    pub(crate) fn hogs(&self, id: &str, limits: &[&str]) -> TaskStatus {
        let task = self.run(id, limits, &["hogs", ALL_CPUS]);
        eventually("the hogs run", || cpu_time(&task.cgroup) > Duration::from_millis(10));
        task
    }

    /// Ends a task.
    pub(crate) fn end(&self, task: &TaskStatus) {
        let process = self.agent.process(task);
        process.kill();
        process.wait_for_end();
    }

    /// A file for what a task notes.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.agent.directory().join(name)
    }

    /// What the agent says of its loans.
    pub(crate) fn pool(&self) -> Result<CpuPool> {
        self.agent.shaper().top().cpu_pool.context("the agent lends nothing")
    }

    /// Somebody who notes in a file when the quota of a cgroup is written, before anybody else has the CPU.
    pub(crate) fn observe(&self, group: &Path, file: &Path) -> Result<Observer> {
        let mut command = Command::new("chrt");
        command.args(["-f", "10", &self.program, "load", "observe"]).arg(file).arg(group.join("cpu.max"));
        let child = command.stdin(Stdio::null()).spawn().context("cannot start chrt")?;
        let observer = Observer(child);
        eventually("the observer is ready", || pulse::records(file).is_ok_and(|all| !all.is_empty()));
        Ok(observer)
    }
}

/// Ends when it is dropped.
pub(crate) struct Observer(Child);

impl Drop for Observer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// While this lives, the machine has its first CPU only. QEMU runs CPUs whose clock counts instructions by turns on one
/// thread, and lets go of one only when its next timer is due, up to a tick later: so late begins a process that is woken on
/// another CPU, and so long each CPU stands still whenever both work.
pub(crate) struct OneCpu;

impl OneCpu {
    const SWITCH: &str = "/sys/devices/system/cpu/cpu1/online";

    pub(crate) fn begin() -> Result<OneCpu> {
        fs::write(OneCpu::SWITCH, "0").with_context(|| format!("cannot write 0 to {}", OneCpu::SWITCH))?;
        Ok(OneCpu)
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Err(error) = fs::write(OneCpu::SWITCH, "1") {
            crate::say(&format!("cannot write 1 to {}: {error}", OneCpu::SWITCH));
        }
    }
}

/// Cores that a cgroup uses while `time` passes, by the kernel's count.
pub(crate) fn cores(groups: &[&str], time: Duration) -> Vec<f64> {
    let used = || groups.iter().map(|group| cpu_time(group).as_secs_f64()).collect::<Vec<_>>();
    let before = used();
    let window = Window::pass(time);
    used().iter().zip(before).map(|(after, before)| (after - before) / window.seconds()).collect()
}

/// How long a cgroup was kept from the CPU by its quota so far, ms.
pub(crate) fn throttled_ms(group: &str) -> Result<f64> {
    let stat = read(group, "cpu.stat");
    let micros = stat.lines().find_map(|line| line.strip_prefix("throttled_usec "));
    let micros = micros.and_then(|micros| micros.parse::<f64>().ok());
    Ok(micros.with_context(|| format!("no throttled_usec in cpu.stat of {group}"))? / 1000.0)
}
