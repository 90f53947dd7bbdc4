//! The demo's agent, and the `shaper` command in front of it.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{self as this_process, Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::network::Network;
use crate::bins::BinDir;
use crate::process;

pub(super) struct Node {
    shaper: PathBuf,
    agent: Child,
    folder: PathBuf,
    socket: PathBuf,
    cgroup_root: PathBuf,
    bpffs_dir: PathBuf,
}

const READY: Duration = Duration::from_secs(30);

impl Node {
    /// Starts an agent in the node's network namespace, with paths of its own for everything.
    pub(super) fn start(bins: &BinDir, object: &Path, network: &Network) -> Result<Node> {
        let name = format!("shaper-demo-{}", this_process::id());
        let folder = std::env::temp_dir().join(&name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
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
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .context("cannot start the agent")?;
        let mut node = Node { shaper: bins.bin("shaper"), agent, folder, socket, cgroup_root, bpffs_dir };
        node.wait_until_ready(&log)?;
        Ok(node)
    }

    fn wait_until_ready(&mut self, log: &Path) -> Result<()> {
        let start = Instant::now();
        loop {
            if UnixStream::connect(&self.socket).is_ok() {
                return Ok(());
            }
            let ended = self.agent.try_wait().context("cannot wait for the agent")?;
            if ended.is_some() || start.elapsed() > READY {
                bail!("the agent did not start:\n{}", fs::read_to_string(log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(super) fn cgroup_root(&self) -> &Path {
        &self.cgroup_root
    }

    /// Runs `shaper` and returns what it printed.
    pub(super) fn shaper(&self, args: &[&str]) -> Result<String> {
        process::read(Command::new(&self.shaper).env("SHAPER_SOCKET", &self.socket).args(args))
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
        let stopped = rustix::process::Pid::from_raw(self.agent.id() as i32)
            .map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        if !matches!(stopped, Some(Ok(()))) || self.agent.wait().is_err() {
            eprintln!("demo: cannot stop the agent, pid {}", self.agent.id());
        }
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                eprintln!("demo: cannot remove {}: {error}", self.folder.display());
            }
            _ => {}
        }
    }
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
