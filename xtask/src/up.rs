//! `cargo xtask up`: a broker and an agent of this tree, left running, with every path of their own below
//! `target/up`; `cargo xtask up --down` releases everything and stops them.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args as ClapArgs;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::{bins, ebpf, process, workspace};

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// Release everything and stop them
    #[arg(long)]
    down: bool,
}

const DAEMONS: [&str; 2] = ["shaper-broker", "shaper-agent"];

pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = workspace::root().join("target/up");
    if args.down { down(&folder) } else { up(&folder) }
}

fn up(folder: &Path) -> Result<()> {
    for name in DAEMONS {
        if let Some(pid) = running(folder, name)? {
            bail!("{name} runs already, pid {}; stop it with `cargo xtask up --down`", pid.as_raw_nonzero());
        }
    }
    let object = ebpf::build()?.programs;
    let bins = bins::build()?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let (broker, agent) = (folder.join("broker.sock"), folder.join("agent.sock"));

    let mut command = Command::new(bins.bin("shaper-broker"));
    command.arg("--listen").arg(&broker).arg("--state-dir").arg(folder.join("broker"));
    start(folder, "shaper-broker", &mut command, &broker)?;
    let mut command = Command::new(bins.bin("shaper-agent"));
    command.arg("--listen").arg(&agent).arg("--state-dir").arg(folder.join("agent"));
    command.arg("--broker").arg(&broker).arg("--bpf-object").arg(&object).args(["--on-exit", "release"]);
    start(folder, "shaper-agent", &mut command, &agent)?;

    println!("a broker and an agent run; their logs are in {}", folder.display());
    println!("export SHAPER_BROKER={} SHAPER_SOCKET={}", broker.display(), agent.display());
    println!("export PATH={}:$PATH", bins.path().display());
    println!("stop them with `cargo xtask up --down`");
    Ok(())
}

fn start(folder: &Path, name: &str, command: &mut Command, socket: &Path) -> Result<()> {
    let log = folder.join(format!("{name}.log"));
    let log_file = fs::File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    // A process group of its own: Ctrl-C in this terminal is not for it.
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log_file)
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let pid_file = pid_file(folder, name);
    fs::write(&pid_file, child.id().to_string())
        .with_context(|| format!("cannot write {}", pid_file.display()))?;
    process::wait_until_ready(&mut child, socket, &log).with_context(|| format!("{name} is not ready"))
}

fn down(folder: &Path) -> Result<()> {
    // The agent first: what it tells about the end of its tasks is still heard.
    for name in DAEMONS.iter().rev() {
        let Some(pid) = running(folder, name)? else {
            println!("{name} does not run");
            continue;
        };
        kill_process(pid, Signal::TERM).with_context(|| format!("cannot stop {name}"))?;
        let begun = Instant::now();
        while test_kill_process(pid).is_ok() {
            if begun.elapsed() > process::READY {
                bail!("{name}, pid {}, does not end", pid.as_raw_nonzero());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let pid_file = pid_file(folder, name);
        fs::remove_file(&pid_file).with_context(|| format!("cannot remove {}", pid_file.display()))?;
        println!("{name} is stopped");
    }
    Ok(())
}

fn pid_file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.pid"))
}

/// The process that the pid file names, if it still is that program.
fn running(folder: &Path, name: &str) -> Result<Option<Pid>> {
    let Ok(text) = fs::read_to_string(pid_file(folder, name)) else { return Ok(None) };
    let pid: i32 =
        text.trim().parse().with_context(|| format!("{} holds no pid", pid_file(folder, name).display()))?;
    let program = fs::read_link(format!("/proc/{pid}/exe"));
    let is_it = program
        .is_ok_and(|path| path.file_name().is_some_and(|found| found.to_string_lossy().starts_with(name)));
    Ok(Pid::from_raw(pid).filter(|_| is_it))
}
