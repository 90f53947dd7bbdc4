//! What the agent is told, checked before anything is touched.

use std::{
    fmt, fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Parser, ValueEnum, value_parser};

use shaper_common::abi::{SLOT_FIRST, SLOTS, SLOTS_MAX};
use shaper_core::{
    spec::Capacity,
    units::{BitsPerSec, Bytes, Millicores, ParseQuantityError},
};
use shaper_identity::address::Address;
use shaper_proto::daemon::{self, OptionError, group_id, socket_path};

use crate::{
    adoption,
    containers::{Containers, Engine},
    gpu::{self, Library},
    kernel::hierarchy::Hierarchies,
    manager,
    opener::{self, Opener},
};

/// The agent of one node: measures and enforces the limits of its tasks.
///
/// Every path is an option, so that several agents can run on one machine.
#[derive(Clone, Debug, Parser)]
#[command(version, about)]
pub struct Options {
    /// Name of this node [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Where to listen: a path of a Unix socket, optionally as unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "/run/shaper/agent.sock")]
    pub listen: String,
    /// Group (name or id) whose members may connect; the socket has mode 0660
    #[arg(long, value_name = "GROUP", default_value = "0")]
    pub socket_group: String,
    /// Directory of the agent's state: tasks, their logs and exit codes
    #[arg(long, value_name = "DIR", default_value = "/var/lib/shaper")]
    pub state_dir: PathBuf,
    /// cgroup v2 directory for the agent and its tasks [default: `shaper` below the mount of cgroup v2]
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Directory below a BPF file system for the pins
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/shaper")]
    pub bpffs_dir: PathBuf,
    /// The kernel programs [default: shaper.bpf.o beside this program, else /usr/lib/shaper/shaper.bpf.o]
    #[arg(long, value_name = "FILE", env = "SHAPER_BPF_OBJECT")]
    pub bpf_object: Option<PathBuf>,
    /// Where tasks run: each in a transient unit of systemd's below shaper.slice, or all below --cgroup-root [default: units
    /// where systemd is PID 1]
    #[arg(long, value_enum, value_name = "units|cgroup-root")]
    pub tasks_in: Option<TasksIn>,
    /// The supervisor of tasks [default: shaper-launch beside this program]
    #[arg(long, value_name = "FILE")]
    pub launcher: Option<PathBuf>,
    /// What takes back what is lent when the agent cannot [default: shaper-warden beside this program]
    #[arg(long, value_name = "FILE")]
    pub warden: Option<PathBuf>,
    /// Socket of shaper-opener, which opens what takes CAP_SYS_ADMIN for an agent without it
    #[arg(long, value_name = "SOCKET", default_value = opener::SOCKET)]
    pub opener: PathBuf,
    /// CPU time that is lent for a moment to tasks that are about to reach their limit: off, auto (what nobody was
    /// promised), or a number of cores. A CPU limit is then a mean over 10 s
    #[arg(long, value_name = "off|auto|CORES", default_value = "auto", value_parser = burst_pool)]
    pub cpu_burst_pool: BurstPool,
    /// When somebody else changes a limit that shaper holds: hold (turn it back), yield (leave it to them) or report.
    /// In each case it is in the ledger, with who did it
    #[arg(long, value_enum, default_value_t = SecondWriter::Hold)]
    pub second_writer: SecondWriter,
    /// Takes away memory that tasks do not use, step by step, as long as they do not miss it: from all but those that
    /// were told otherwise (`shaper set --reclaim-idle=false`)
    #[arg(long)]
    pub reclaim_idle: bool,
    /// Device whose egress is counted by task; repeatable
    #[arg(long = "uplink", value_name = "DEVICE")]
    pub uplinks: Vec<String>,
    /// NVIDIA's library for GPU cards: auto (libnvidia-ml.so.1, if it is there), off, or where it is
    #[arg(long, value_name = "auto|off|FILE", default_value = "auto", value_parser = Library::parse)]
    pub nvml: Library,
    /// Where the kernel shows what NVIDIA's driver has
    #[arg(long, value_name = "DIR", default_value = "/proc/driver", hide = true)]
    pub proc_driver: PathBuf,
    /// Character device of a GPU card that NVML does not know, such as /dev/dri/renderD128; repeatable
    #[arg(long = "gpu-device", value_name = "DEVICE")]
    pub gpu_devices: Vec<PathBuf>,
    /// What becomes of a task that uses more memory of a GPU card than it may, where nothing but this agent's look at it holds
    /// it, or its part was made smaller: end (but what it adopted it only tells of), freeze or warn
    #[arg(long, value_enum, default_value_t = Exceeded::End)]
    pub gpu_memory_exceeded: Exceeded,
    /// How long it has to free what is too much
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = value_parser!(u32).range(1..=3600))]
    pub gpu_memory_grace: u32,
    /// The broker's socket, or https://HOST:PORT with --tls-dir: this node takes the broker's tasks. Of several brokers, of
    /// which one leads: all, separated by commas
    #[arg(long, value_name = "ADDRESSES", value_delimiter = ',')]
    pub broker: Vec<Address>,
    /// Directory with this node's certificate and key (identity.pem) and those whom it believes (ca.pem), as `shaper
    /// pki issue` makes it for spiffe://TRUST-DOMAIN/node/NAME. It is read with each connection
    #[arg(long, value_name = "DIR", env = "SHAPER_TLS_DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Where metrics are served.
    #[command(flatten)]
    pub metrics: shaper_metrics::listen::Options,
    /// Where traces go.
    #[command(flatten)]
    pub traces: shaper_metrics::traces::Options,
    /// What this node has for the broker's tasks, such as cpu=2,memory=4Gi,network=1gbit [default: the
    /// machine's CPUs and memory; the network is then not known]
    #[arg(long, value_name = "LIST")]
    pub capacity: Option<String>,
    /// Lets tasks run as uid 0. They have no capabilities, like every task, but uid 0 owns root's files and
    /// is this agent's operator: trust them as you trust root
    #[arg(long)]
    pub allow_root_tasks: bool,
    /// As whom tasks may run here, whoever asks for it, the broker included: such as 1000-1999,65534 [default: everybody
    /// but root]
    #[arg(long, value_name = "LIST", default_value = "1-4294967294", hide_default_value = true, value_parser = Uids::parse)]
    pub allowed_uids: Uids,
    /// How many tasks this node can hold at once. The kernel's tables for them take 0.7 MiB a CPU for each 1,000;
    /// takes effect where no earlier agent has left any (see `shaper release --all`)
    #[arg(long, value_name = "N", default_value_t = SLOTS - SLOT_FIRST)]
    pub max_tasks: u32,
    /// How many tasks a user other than root may have at once
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tasks_per_user: usize,
    /// What happens on SIGTERM: limits and tasks stay as they are, or everything is released
    #[arg(long, value_enum, default_value_t = OnExit::Keep)]
    pub on_exit: OnExit,
    /// Rules by which cgroups that others made (containers, pods, units) become tasks by themselves: see docs/containers.md.
    /// The file is read again when it changes
    #[arg(long, value_name = "FILE")]
    pub adopt: Option<PathBuf>,
    /// Where Docker answers …
    #[arg(long, value_name = "SOCKET", default_value = "/run/docker.sock")]
    pub docker: PathBuf,
    /// … and Podman: rules ask them for names, images and labels of containers
    #[arg(long, value_name = "SOCKET", default_value = "/run/podman/podman.sock")]
    pub podman: PathBuf,
    /// Who runs tasks with an image (`shaper submit --image`) on this node: docker (at --docker) or podman, optionally with the
    /// client's program [default: nobody]
    #[arg(long, value_name = "docker|podman[=PROGRAM]")]
    pub containers: Option<Engine>,
    /// Also logs what the kernel programs say (never per packet)
    #[arg(long)]
    pub debug_bpf: bool,
}

/// Where tasks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TasksIn {
    /// Each in a transient, delegated service of systemd's, which is the parent of its supervisor.
    Units,
    /// In a cgroup below the agent's own.
    CgroupRoot,
}

/// How much CPU time is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BurstPool {
    /// None.
    Off,
    /// What nobody was promised.
    Auto,
    /// Of that, at most so much.
    AtMost(Millicores),
}

/// Users, as ranges of their ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uids(Vec<RangeInclusive<u32>>);

impl Uids {
    fn parse(list: &str) -> Result<Uids, String> {
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            // The kernel takes the last number for nobody at all.
            (first <= last && last < u32::MAX).then_some(first..=last)
        };
        let ranges = list.split(',').map(|part| {
            range(part).ok_or_else(|| format!("`{part}` is no uid, and no range such as 1000-1999"))
        });
        let ranges = ranges.collect::<Result<Vec<_>, _>>()?;
        if ranges.iter().any(|range| range.contains(&0)) {
            return Err("0 is root: say --allow-root-tasks".to_owned());
        }
        Ok(Uids(ranges))
    }

    /// Whether this is one of them.
    pub fn contains(&self, uid: u32) -> bool {
        self.0.iter().any(|range| range.contains(&uid))
    }
}

impl fmt::Display for Uids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let range = |range: &RangeInclusive<u32>| match (range.start(), range.end()) {
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        f.write_str(&self.0.iter().map(range).collect::<Vec<_>>().join(","))
    }
}

fn burst_pool(text: &str) -> Result<BurstPool, ParseQuantityError> {
    match text {
        "off" => Ok(BurstPool::Off),
        "auto" => Ok(BurstPool::Auto),
        cores => Millicores::parse(cores).map(BurstPool::AtMost),
    }
}

/// What is done when somebody else changes a limit that shaper holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SecondWriter {
    /// It is turned back. What they wrote is what release puts back.
    Hold,
    /// It is theirs: shaper turns it no more until somebody asks it to.
    Yield,
    /// Nothing, but that the task's status says so.
    Report,
}

/// What becomes of a task that uses more memory of a GPU card than it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Exceeded {
    /// It is ended.
    End,
    /// Its processes stand still until it may have what it has.
    Freeze,
    /// Nothing, but that its status says so.
    Warn,
}

/// What a clean stop leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnExit {
    /// Everything: limits hold, tasks run, the next agent adopts them.
    Keep,
    /// Nothing: as `shaper release --all`.
    Release,
}

/// Why the options cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// One that the broker has as well.
    #[error(transparent)]
    Common(#[from] OptionError),
    /// A file that must be there.
    #[error("{option}: {path} is not there; {remedy}")]
    NoFile {
        /// The option.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// A path that must be absolute.
    #[error("{option}: {path} must be an absolute path")]
    Relative {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Over TCP the broker knows nodes by their certificates.
    #[error(
        "--broker {0} needs --tls-dir: over TCP both sides show a certificate. Make one where the authority is: shaper \
         pki issue --ca-dir CA spiffe://cluster.local/node/NAME DIR"
    )]
    NoCertificate(Address),
    /// Where metrics are served.
    #[error(transparent)]
    Metrics(#[from] shaper_metrics::listen::OptionsError),
    /// A card that is none.
    #[error(
        "--gpu-device: {path} cannot be a card: {source}; name a character device such as /dev/dri/renderD128"
    )]
    GpuDevice {
        /// What was named.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A capacity that is not one.
    #[error("--capacity: {0}; say, for example, cpu=2,memory=4Gi,network=1gbit")]
    Capacity(String),
    /// More tasks than the tables can be made for, or none.
    #[error("--max-tasks: {0} is not from 1 to {max}", max = SLOTS_MAX - SLOT_FIRST)]
    MaxTasks(u32),
    /// Rules that cannot be read.
    #[error("--adopt")]
    Adoption(#[source] adoption::RulesError),
    /// No cgroup v2.
    #[error("no cgroup v2 is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified")]
    NoCgroup2,
    /// A file or directory.
    #[error("cannot {verb} {path}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// The path.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
}

/// Where the broker is.
#[derive(Clone, Debug)]
pub enum Broker {
    /// At this socket.
    Socket(PathBuf),
    /// Over TCP.
    Tls {
        /// `HOST:PORT`.
        address: String,
        /// Our certificate, and whom we believe.
        directory: PathBuf,
    },
}

impl std::fmt::Display for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Broker::Socket(path) => write!(f, "{}", path.display()),
            Broker::Tls { address, .. } => write!(f, "https://{address}"),
        }
    }
}

/// Checked options.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the node.
    pub node: String,
    /// The socket.
    pub socket: PathBuf,
    /// Its group.
    pub socket_gid: u32,
    /// State.
    pub state_dir: PathBuf,
    /// The mounts.
    pub hierarchies: Hierarchies,
    /// Root of the agent's cgroups.
    pub cgroup_root: PathBuf,
    /// Pins.
    pub bpffs_dir: PathBuf,
    /// Kernel programs.
    pub bpf_object: PathBuf,
    /// Where tasks run.
    pub tasks_in: TasksIn,
    /// Supervisor.
    pub launcher: PathBuf,
    /// What takes loans back.
    pub warden: PathBuf,
    /// What opens for us what we may not.
    pub opener: Opener,
    /// What is lent of CPU time.
    pub cpu_burst_pool: BurstPool,
    /// When somebody else changes a limit.
    pub second_writer: SecondWriter,
    /// Whether idle memory is taken from tasks that were not told otherwise.
    pub reclaim_idle: bool,
    /// Counted devices.
    pub uplinks: Vec<String>,
    /// Who is asked for GPU cards.
    pub nvml: Library,
    /// Where the kernel shows what NVIDIA's driver has.
    pub proc_driver: PathBuf,
    /// Cards beside those.
    pub gpu_devices: Vec<PathBuf>,
    /// What becomes of a task with too much memory of a card …
    pub gpu_memory_exceeded: Exceeded,
    /// … after how long.
    pub gpu_memory_grace: Duration,
    /// Where the broker is, or those are of which one leads.
    pub brokers: Vec<Broker>,
    /// Where metrics are served.
    pub metrics: Option<shaper_metrics::listen::Config>,
    /// Where traces go.
    pub traces: shaper_metrics::traces::Options,
    /// What this node has.
    pub capacity: Capacity,
    /// Whether somebody said so.
    pub capacity_is_configured: bool,
    /// Whether tasks may run as root.
    pub allow_root_tasks: bool,
    /// As whom other tasks may run.
    pub allowed_uids: Uids,
    /// Tasks.
    pub max_tasks: u32,
    /// Tasks per user.
    pub max_tasks_per_user: usize,
    /// On SIGTERM.
    pub on_exit: OnExit,
    /// Rules of adoption, and whom they ask.
    pub adoption: Option<adoption::Config>,
    /// Who runs containers.
    pub containers: Option<Containers>,
    /// Messages of the programs.
    pub debug_bpf: bool,
}

impl Options {
    /// Checks everything; changes nothing.
    pub fn check(self) -> Result<Config, ConfigError> {
        let socket = socket_path(&self.listen)?;
        if !(1..=SLOTS_MAX - SLOT_FIRST).contains(&self.max_tasks) {
            return Err(ConfigError::MaxTasks(self.max_tasks));
        }
        let socket_gid = group_id(&self.socket_group)?;
        let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
        let beside = |name: &str| beside.as_ref().map(|directory| directory.join(name));
        let hierarchies = Hierarchies::detect()
            .map_err(|source| ConfigError::File {
                verb: "read",
                path: "/proc/self/mountinfo".into(),
                source,
            })?
            .ok_or(ConfigError::NoCgroup2)?;
        let bpf_object = self.bpf_object.unwrap_or_else(|| {
            let installed = PathBuf::from("/usr/lib/shaper/shaper.bpf.o");
            beside("shaper.bpf.o").filter(|path| path.exists()).unwrap_or(installed)
        });
        let launcher = self.launcher.or_else(|| beside("shaper-launch")).unwrap_or_default();
        let warden = self.warden.or_else(|| beside("shaper-warden")).unwrap_or_default();
        let cgroup_root = self.cgroup_root.unwrap_or_else(|| hierarchies.v2.join("shaper"));
        for (option, path) in [
            ("--state-dir", &self.state_dir),
            ("--cgroup-root", &cgroup_root),
            ("--bpffs-dir", &self.bpffs_dir),
        ] {
            if !path.is_absolute() {
                return Err(ConfigError::Relative { option, path: path.clone() });
            }
        }
        for (option, path, remedy) in [
            ("--bpf-object", &bpf_object, "build it with `cargo xtask build-ebpf`"),
            ("--launcher", &launcher, "it is built and installed with shaper-agent"),
            ("--warden", &warden, "it is built and installed with shaper-agent; or say --cpu-burst-pool off"),
        ] {
            let is_needed = option != "--warden" || self.cpu_burst_pool != BurstPool::Off;
            if is_needed && !path.is_file() {
                return Err(ConfigError::NoFile { option, path: path.clone(), remedy });
            }
        }
        for path in &self.gpu_devices {
            gpu::char_device(path).map_err(|source| ConfigError::GpuDevice { path: path.clone(), source })?;
        }
        let brokers = self.broker.into_iter().map(|address| match (address, &self.tls_dir) {
            (Address::Socket(path), _) => Ok(Broker::Socket(path)),
            (Address::Tls(address), Some(directory)) => {
                Ok(Broker::Tls { address, directory: directory.clone() })
            }
            (address, None) => Err(ConfigError::NoCertificate(address)),
        });
        let brokers = brokers.collect::<Result<_, _>>()?;
        let metrics = self.metrics.check(self.tls_dir.as_deref())?;
        let containers = self.containers.map(|engine| Containers::new(engine, &self.docker));
        let adoption = self.adopt.map(|file| adoption::Config {
            file,
            mount: hierarchies.v2.clone(),
            own: cgroup_root.clone(),
            docker: self.docker,
            podman: self.podman,
        });
        if let Some(adoption) = &adoption {
            adoption.read().map_err(ConfigError::Adoption)?;
        }
        let capacity_is_configured = self.capacity.is_some();
        let capacity = capacity(self.capacity.as_deref().unwrap_or_default())?;
        let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        Ok(Config {
            node: self.node.unwrap_or_else(host),
            socket,
            socket_gid,
            state_dir: self.state_dir,
            hierarchies,
            cgroup_root,
            bpffs_dir: self.bpffs_dir,
            bpf_object,
            tasks_in: self
                .tasks_in
                .unwrap_or_else(|| if manager::is_booted() { TasksIn::Units } else { TasksIn::CgroupRoot }),
            launcher,
            warden,
            opener: Opener::at(self.opener),
            cpu_burst_pool: self.cpu_burst_pool,
            second_writer: self.second_writer,
            reclaim_idle: self.reclaim_idle,
            uplinks: self.uplinks,
            nvml: self.nvml,
            proc_driver: self.proc_driver,
            gpu_devices: self.gpu_devices,
            gpu_memory_exceeded: self.gpu_memory_exceeded,
            gpu_memory_grace: Duration::from_secs(self.gpu_memory_grace.into()),
            brokers,
            metrics,
            traces: self.traces,
            capacity,
            capacity_is_configured,
            allow_root_tasks: self.allow_root_tasks,
            allowed_uids: self.allowed_uids,
            max_tasks: self.max_tasks,
            max_tasks_per_user: self.max_tasks_per_user,
            on_exit: self.on_exit,
            adoption,
            containers,
            debug_bpf: self.debug_bpf,
        })
    }
}

impl Config {
    /// Makes the state directory and locks it for the life of the returned file.
    pub fn lock_state(&self) -> Result<fs::File, OptionError> {
        daemon::lock_state(&self.state_dir, "agent")
    }
}

/// Reads `cpu=2,memory=4Gi,network=1gbit`; what is not named is the machine's.
fn capacity(list: &str) -> Result<Capacity, ConfigError> {
    let error = |text: String| ConfigError::Capacity(text);
    let system = rustix::system::sysinfo();
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    let mut capacity = Capacity {
        cpu: Millicores(cpus * 1000),
        memory: Bytes(system.totalram * u64::from(system.mem_unit)),
        gpu_memory: None,
        network: None,
        storage_io: None,
    };
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (name, value) =
            part.split_once('=').ok_or_else(|| error(format!("`{part}` is not NAME=VALUE")))?;
        let wrong = |wrong: ParseQuantityError| error(wrong.to_string());
        match name {
            "cpu" => capacity.cpu = Millicores::parse(value).map_err(wrong)?,
            "memory" => capacity.memory = Bytes::parse(value).map_err(wrong)?,
            "network" => capacity.network = Some(BitsPerSec::parse(value).map_err(wrong)?),
            _ => return Err(error(format!("`{name}` is not cpu, memory or network"))),
        }
    }
    Ok(capacity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_a_word_or_a_number_of_cores() {
        assert_eq!(burst_pool("off"), Ok(BurstPool::Off));
        assert_eq!(burst_pool("auto"), Ok(BurstPool::Auto));
        assert_eq!(burst_pool("1.5"), Ok(BurstPool::AtMost(Millicores(1500))));
        assert!(burst_pool("some").is_err() && burst_pool("0").is_err());
    }

    #[test]
    fn users_are_ranges_without_root() {
        let uids = Uids::parse("1000-1999,65534").unwrap();
        assert_eq!(uids.to_string(), "1000-1999,65534");
        let known: Vec<u32> = [0, 999, 1000, 1999, 2000, 65533, 65534, 65535, u32::MAX]
            .into_iter()
            .filter(|uid| uids.contains(*uid))
            .collect();
        assert_eq!(known, [1000, 1999, 65534]);
        for bad in ["", "x", "5-4", "0", "0-10", "1,", "1-4294967295", "-1", "1-2-3"] {
            assert!(Uids::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_capacity_is_read_and_what_is_no_capacity_is_refused() {
        let read = capacity("cpu=1.5,memory=2Gi,network=1gbit").unwrap();
        assert_eq!(
            (read.cpu.0, read.memory.0, read.network),
            (1500, 2 << 30, Some(BitsPerSec(1_000_000_000)))
        );
        assert!(capacity("").unwrap().cpu.0 >= 1000);
        for bad in ["cpu", "cpu=-1", "disk=3", "memory=lots"] {
            assert!(matches!(capacity(bad), Err(ConfigError::Capacity(_))), "{bad}");
        }
    }
}
