//! The demo's agent, and the `shaper` command in front of it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{self as this_process, Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::network::Network;
use crate::bins::BinDir;
use crate::process;

/// What the broker's part of the demo adds.
pub(super) struct Membership<'a> {
    /// The broker's socket.
    pub(super) broker: &'a Path,
    /// What the node has for the broker's tasks.
    pub(super) capacity: &'a str,
}

pub(super) struct Node {
    broker: Option<PathBuf>,
    shaper: PathBuf,
    agent: Child,
    folder: PathBuf,
    socket: PathBuf,
    cgroup_root: PathBuf,
    bpffs_dir: PathBuf,
}

impl Node {
    /// Starts an agent in the node's network namespace, with paths of its own for everything.
    pub(super) fn start(
        bins: &BinDir,
        object: &Path,
        network: &Network,
        membership: Option<Membership<'_>>,
    ) -> Result<Node> {
        let name = format!("shaper-demo-{}", this_process::id());
        let folder = folder("agent")?;
        let socket = folder.join("agent.sock");
        let cgroup_root = cgroup2()?.join(&name);
        let bpffs_dir = Path::new("/sys/fs/bpf").join(&name);
        let log = folder.join("agent.log");
        let log_file = fs::File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let agent = Command::new("nsenter")
            .arg(format!("--net={}", network.node().display()))
            .arg("--")
            .arg(bins.bin("shaper-agent"))
            .arg("--listen")
            .arg(&socket)
            .arg("--state-dir")
            .arg(folder.join("state"))
            .arg("--cgroup-root")
            .arg(&cgroup_root)
            .arg("--bpffs-dir")
            .arg(&bpffs_dir)
            .arg("--bpf-object")
            .arg(object)
            .args(["--uplink", network.uplink(), "--node", "demo", "--on-exit", "release"])
            .args(membership.iter().flat_map(|with| {
                [Path::new("--broker"), with.broker, Path::new("--capacity"), Path::new(with.capacity)]
            }))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .context("cannot start the agent")?;
        let broker = membership.map(|with| with.broker.to_owned());
        let mut node =
            Node { broker, shaper: bins.bin("shaper"), agent, folder, socket, cgroup_root, bpffs_dir };
        process::wait_until_ready(&mut node.agent, &node.socket, &log)?;
        Ok(node)
    }

    pub(super) fn cgroup_root(&self) -> &Path {
        &self.cgroup_root
    }

    /// Runs `shaper` against the agent and returns what it printed.
    pub(super) fn shaper(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.shaper);
        process::read(command.env("SHAPER_SOCKET", &self.socket).env("SHAPER_BROKER", "").args(args))
    }

    /// Runs `shaper` against the broker, with `input` on its standard input.
    pub(super) fn at_broker(&self, args: &[&str], input: &str) -> Result<String> {
        let broker = self.broker.as_deref().context("this agent has no broker")?;
        let input_file = self.folder.join("input");
        fs::write(&input_file, input).with_context(|| format!("cannot write {}", input_file.display()))?;
        let input =
            fs::File::open(&input_file).with_context(|| format!("cannot open {}", input_file.display()))?;
        let mut command = Command::new(&self.shaper);
        process::read(
            command.env("SHAPER_SOCKET", &self.socket).env("SHAPER_BROKER", broker).stdin(input).args(args),
        )
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.shaper(args)?;
        serde_json::from_str(&text).with_context(|| format!("`shaper {}` printed no JSON", args.join(" ")))
    }

    pub(super) fn describe(&self, task: &str) -> Result<Value> {
        self.json(&["describe", task, "-o", "json"])
    }

    /// Every task, in one reading.
    pub(super) fn statuses(&self) -> Result<Vec<Value>> {
        match self.json(&["get", "tasks", "-o", "json"])? {
            Value::Array(tasks) => Ok(tasks),
            other => bail!("`shaper get tasks` printed {other}"),
        }
    }

    pub(super) fn release_all(&self) -> Result<Vec<String>> {
        Ok(self.shaper(&["release", "--all"])?.lines().map(str::to_owned).collect())
    }

    /// Fails when something that the agent made is still there.
    pub(super) fn check_nothing_is_left(&self) -> Result<()> {
        let mut left = Vec::new();
        let name = self.cgroup_root.file_name().context("the cgroup root has no name")?;
        for path in [&self.cgroup_root, &self.bpffs_dir] {
            left.extend(path.exists().then(|| path.clone()));
        }
        for controller in fs::read_dir("/sys/fs/cgroup").context("cannot list /sys/fs/cgroup")?.flatten() {
            left.extend(find_folder(&controller.path(), name, 6));
        }
        if left.is_empty() { Ok(()) } else { bail!("left behind: {left:?}") }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The agent releases everything on SIGTERM; nsenter has become the agent.
        stop(&mut self.agent, &self.folder);
    }
}

/// The demo's broker.
pub(super) struct Broker {
    process: Child,
    folder: PathBuf,
    socket: PathBuf,
}

impl Broker {
    pub(super) fn start(bins: &BinDir) -> Result<Broker> {
        let folder = folder("broker")?;
        let socket = folder.join("broker.sock");
        let log = folder.join("broker.log");
        let log_file = fs::File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let process = Command::new(bins.bin("shaper-broker"))
            .arg("--listen")
            .arg(&socket)
            .arg("--state-dir")
            .arg(folder.join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .context("cannot start the broker")?;
        let mut broker = Broker { process, folder, socket };
        process::wait_until_ready(&mut broker.process, &broker.socket, &log)?;
        Ok(broker)
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        stop(&mut self.process, &self.folder);
    }
}

/// A folder of this demo's own.
fn folder(part: &str) -> Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("shaper-demo-{}", this_process::id())).join(part);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

fn stop(process: &mut Child, folder: &Path) {
    let stopped = rustix::process::Pid::from_raw(process.id() as i32)
        .map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
    if !matches!(stopped, Some(Ok(()))) || process.wait().is_err() {
        eprintln!("demo: cannot stop process {}", process.id());
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            eprintln!("demo: cannot remove {}: {error}", folder.display());
        }
        _ => {}
    }
    // The last one takes the parent along.
    let _ = folder.parent().map(fs::remove_dir);
}

/// The folder `name` at most `depth` levels below `folder`.
fn find_folder(folder: &Path, name: &std::ffi::OsStr, depth: usize) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    for entry in folders {
        if entry.file_name() == name {
            return Some(entry.path());
        }
        if depth > 0
            && let Some(found) = find_folder(&entry.path(), name, depth - 1)
        {
            return Some(found);
        }
    }
    None
}

/// Where cgroup v2 is mounted.
fn cgroup2() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' '));
    let mount = fields.find_map(|mut fields| {
        let mount_point = fields.nth(1)?;
        (fields.next() == Some("cgroup2")).then(|| PathBuf::from(mount_point))
    });
    mount.context("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}
