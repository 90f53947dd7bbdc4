//! What the broker is told, checked before anything is touched.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use shaper_core::{
    document::{self, DocumentError},
    scale::Scaling,
};
use shaper_proto::daemon::{self, OptionError, group_id, socket_path};

use crate::{
    reactor::Bounds,
    store::etcd::{Access, Place, PlaceError},
    upkeep,
};

/// The broker of a cluster: places tasks on nodes, and remembers what became of them.
#[derive(Clone, Debug, Parser)]
#[command(version, about)]
pub struct Options {
    /// Where to listen: a path of a Unix socket, optionally as unix:PATH, or tcp://ADDRESS:PORT; repeatable, once of
    /// each kind. Over TCP everybody shows a certificate (`shaper pki`)
    #[arg(long, value_name = "ADDRESS", default_value = "/run/shaper/broker.sock")]
    pub listen: Vec<String>,
    /// Group (name or id) whose members may connect; the socket has mode 0660
    #[arg(long, value_name = "GROUP", default_value = "0")]
    pub socket_group: String,
    /// Directory with the broker's certificate and key (identity.pem) and those whom it believes (ca.pem), as `shaper
    /// pki issue` makes it. It is looked at with each connection: to replace the files is enough
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// File that says as whom submitters' tasks run, where, and how urgently, and who is not believed any more. It is
    /// looked at each second. Without it no submitter may do anything
    #[arg(long, value_name = "FILE")]
    pub identities: Option<PathBuf>,
    /// Where metrics are served.
    #[command(flatten)]
    pub metrics: shaper_metrics::listen::Options,
    /// Where traces go.
    #[command(flatten)]
    pub traces: shaper_metrics::traces::Options,
    /// Where the web page is served.
    #[command(flatten)]
    pub web: crate::web::Options,
    /// Tasks that have not ended; more are refused
    #[arg(long, value_name = "TASKS", default_value_t = Bounds::default().open_tasks)]
    pub max_open_tasks: usize,
    /// Tasks that have ended and are remembered. Of more than these the first are forgotten, and their ids are free; but not
    /// before their node has forgotten them
    #[arg(long, value_name = "TASKS", default_value_t = Bounds::default().ended_tasks, value_parser = keep_ended)]
    pub keep_ended: usize,
    /// A task with `on_node_lost: rerun` is ended on its node when the broker was not heard of there for so long, and placed
    /// again half as long after that. Holds for tasks that are submitted from now on
    #[arg(long, value_name = "SECONDS", default_value_t = Bounds::default().task_lease_seconds,
          value_parser = clap::value_parser!(u32).range(5..=86_400))]
    pub task_lease_seconds: u32,
    /// File of the groups of nodes that are started and ended as tasks need them (docs/scaling.md)
    #[arg(long, value_name = "FILE")]
    pub scale: Option<PathBuf>,
    /// Where the broker's state is.
    #[command(flatten)]
    pub store: StoreOptions,
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What is done instead of serving.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Check, copy, restore or show what a broker keeps
    #[command(subcommand)]
    Store(upkeep::Command),
    /// For packages: prints the manual page of this program
    #[command(hide = true)]
    Man,
}

/// Where the broker's state is. Said before or after a subcommand.
#[derive(Clone, Debug, Args)]
pub struct StoreOptions {
    /// Directory of the broker's state: store.redb
    #[arg(long, global = true, value_name = "DIR", default_value = "/var/lib/shaper-broker")]
    pub state_dir: PathBuf,
    /// Where tasks, nodes and policies are kept
    #[arg(long, global = true, value_enum, default_value_t = StoreKind::Redb)]
    pub store: StoreKind,
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdOptions,
}

/// With fewer, one could be forgotten before those who watch it were told that it has ended.
const FEWEST_ENDED: usize = 4096;

fn keep_ended(text: &str) -> Result<usize, String> {
    let expected = || format!("expected a number of tasks, at least {FEWEST_ENDED}");
    text.parse().ok().filter(|tasks| *tasks >= FEWEST_ENDED).ok_or_else(expected)
}

/// With `--store etcd`.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "With --store etcd")]
pub struct EtcdOptions {
    /// The members of the etcd cluster, separated by commas
    #[arg(
        long,
        global = true,
        value_name = "URLS",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379"
    )]
    pub etcd_endpoints: Vec<String>,
    /// Before all keys, so that several clusters can share one etcd
    #[arg(long, global = true, value_name = "PREFIX", default_value = "/shaper/")]
    pub etcd_prefix: String,
    /// The authority that signed etcd's certificates
    #[arg(long, global = true, value_name = "FILE")]
    pub etcd_cacert: Option<PathBuf>,
    /// A certificate to show to etcd
    #[arg(long, global = true, value_name = "FILE", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, global = true, value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// Speak plain http also with other machines
    #[arg(long, global = true)]
    pub etcd_insecure: bool,
    /// A user of etcd's
    #[arg(long, global = true, value_name = "NAME", requires = "etcd_password_file")]
    pub etcd_user: Option<String>,
    /// File with that user's password
    #[arg(long, global = true, value_name = "FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
    /// Of several brokers one leads. If it is not heard of for so long, another does
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(2..=60))]
    pub lease_seconds: u64,
    /// Where this broker is found when it leads: what the others answer to those who ask them [default: the first --listen]
    #[arg(long, global = true, value_name = "ADDRESS")]
    pub advertise: Option<String>,
}

/// Checked.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// Where the rows are.
    pub place: Place,
    /// How long a leader may be silent.
    pub lease: Duration,
    /// Where this broker is found.
    pub advertise: String,
}

impl EtcdOptions {
    fn check(self, listen: &[String]) -> Result<EtcdConfig, PlaceError> {
        let place = Place::check(Access {
            endpoints: self.etcd_endpoints,
            prefix: self.etcd_prefix,
            insecure: self.etcd_insecure,
            ca: self.etcd_cacert,
            identity: self.etcd_cert.zip(self.etcd_key),
            user: self.etcd_user.zip(self.etcd_password_file),
        })?;
        let advertise = self.advertise.or_else(|| listen.first().cloned()).unwrap_or_default();
        Ok(EtcdConfig { place, lease: Duration::from_secs(self.lease_seconds), advertise })
    }
}

/// Where rows are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoreKind {
    /// Nowhere: they end with the process.
    Memory,
    /// In one file in the state directory.
    Redb,
    /// In etcd. Several brokers may be started: one leads, the others stand by.
    Etcd,
}

/// Why the options cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// One that the agent has as well.
    #[error(transparent)]
    Common(#[from] OptionError),
    /// Over TCP anybody could call.
    #[error(
        "--listen {0} needs --tls-dir: over TCP, loopback included, callers are known by their certificates alone. Make \
         them: shaper pki init --ca-dir CA; shaper pki issue --ca-dir CA --host HOST spiffe://cluster.local/broker/b DIR"
    )]
    NoCertificate(String),
    /// Where metrics are served.
    #[error(transparent)]
    Metrics(#[from] shaper_metrics::listen::OptionsError),
    /// Where the web page is served.
    #[error(transparent)]
    Web(#[from] crate::web::OptionsError),
    /// Not an address.
    #[error("--listen {0}: say an address and a port, such as tcp://127.0.0.1:7070 or tcp://[::]:7070")]
    NotAnAddress(String),
    /// Two of a kind.
    #[error("--listen {0}: there is another of that kind already")]
    Twice(String),
    /// The groups of nodes.
    #[error(transparent)]
    Scale(#[from] DocumentError),
    /// A file that cannot be read.
    #[error("cannot read {path}, which --scale names")]
    ScaleFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Of etcd.
    #[error(transparent)]
    Etcd(#[from] PlaceError),
    /// A path that must be absolute.
    #[error("--state-dir: {0} must be an absolute path")]
    Relative(PathBuf),
}

/// Checked options.
#[derive(Clone, Debug)]
pub struct Config {
    /// The socket.
    pub socket: Option<PathBuf>,
    /// Over TCP: where, and whose certificate.
    pub tcp: Option<(SocketAddr, PathBuf)>,
    /// The configuration of identities.
    pub identities: Option<PathBuf>,
    /// Its group.
    pub socket_gid: u32,
    /// Where metrics are served.
    pub metrics: Option<shaper_metrics::listen::Config>,
    /// Where traces go.
    pub traces: shaper_metrics::traces::Options,
    /// Where the web page is served.
    pub web: Option<crate::web::Config>,
    /// How much there may be.
    pub bounds: Bounds,
    /// The groups of nodes that are started and ended.
    pub scaling: Option<Scaling>,
    /// State.
    pub store: StoreConfig,
}

/// Where a broker's state is.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The directory, also of what is kept elsewhere.
    pub state_dir: PathBuf,
    /// Where rows are kept.
    pub rows: Stores,
}

/// Where rows are kept, with what that takes.
#[derive(Clone, Debug)]
pub enum Stores {
    /// Nowhere.
    Memory,
    /// In the file of [`StoreConfig::file`].
    Redb,
    /// There.
    Etcd(Box<EtcdConfig>),
}

impl StoreOptions {
    /// Checks everything; changes nothing. `listen` is where the broker is found unless something else is said.
    pub fn check(self, listen: &[String]) -> Result<StoreConfig, ConfigError> {
        let StoreOptions { state_dir, store, etcd } = self;
        let rows = match store {
            StoreKind::Memory => Stores::Memory,
            StoreKind::Redb => Stores::Redb,
            StoreKind::Etcd => Stores::Etcd(Box::new(etcd.check(listen)?)),
        };
        if !state_dir.is_absolute() {
            return Err(ConfigError::Relative(state_dir));
        }
        Ok(StoreConfig { state_dir, rows })
    }
}

impl Options {
    /// Checks everything; changes nothing.
    pub fn check(self) -> Result<Config, ConfigError> {
        let Options {
            listen,
            socket_group,
            tls_dir,
            identities,
            metrics,
            traces,
            web,
            max_open_tasks,
            keep_ended,
            task_lease_seconds,
            scale,
            store,
            command: _,
        } = self;
        let bounds = Bounds { open_tasks: max_open_tasks, ended_tasks: keep_ended, task_lease_seconds };
        let store = store.check(&listen)?;
        let (mut socket, mut tcp) = (None, None);
        for address in listen {
            let is_first = match address.strip_prefix("tcp://") {
                Some(at) => {
                    let at: SocketAddr =
                        at.parse().map_err(|_| ConfigError::NotAnAddress(address.clone()))?;
                    let directory =
                        tls_dir.clone().ok_or_else(|| ConfigError::NoCertificate(address.clone()))?;
                    tcp.replace((at, directory)).is_none()
                }
                None => socket.replace(socket_path(&address)?).is_none(),
            };
            if !is_first {
                return Err(ConfigError::Twice(address));
            }
        }
        let socket_gid = group_id(&socket_group)?;
        let metrics = metrics.check(tls_dir.as_deref())?;
        let web = web.check(tls_dir.as_deref())?;
        let scaling = scale.map(read_scaling).transpose()?;
        Ok(Config { socket, tcp, identities, socket_gid, metrics, traces, web, bounds, scaling, store })
    }
}

fn read_scaling(path: PathBuf) -> Result<Scaling, ConfigError> {
    match fs::read(&path) {
        Ok(text) => Ok(document::scaling(&path.display().to_string(), text)?),
        Err(source) => Err(ConfigError::ScaleFile { path, source }),
    }
}

impl StoreConfig {
    /// Makes the state directory and locks it for the life of the returned file.
    pub fn lock_state(&self) -> Result<fs::File, OptionError> {
        daemon::lock_state(&self.state_dir, "broker")
    }

    /// The file of the store.
    pub fn file(&self) -> PathBuf {
        self.state_dir.join("store.redb")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(arguments: &[&str]) -> Result<Config, ConfigError> {
        let arguments = ["shaper-broker"].iter().chain(arguments);
        Options::try_parse_from(arguments).expect("clap takes it").check()
    }

    #[test]
    fn tcp_without_certificates_is_refused_with_the_remedy_also_on_loopback() {
        for address in ["tcp://127.0.0.1:0", "tcp://[::1]:7070", "tcp://0.0.0.0:7070"] {
            let error = check(&["--listen", address]).unwrap_err().to_string();
            assert!(error.contains("--tls-dir") && error.contains("shaper pki init"), "{error}");
            let config = check(&["--listen", address, "--tls-dir", "/tls"]).unwrap();
            assert!(config.tcp.is_some() && config.socket.is_none(), "{config:?}");
        }
        let both =
            check(&["--listen", "tcp://127.0.0.1:1", "--listen", "/b.sock", "--tls-dir", "/tls"]).unwrap();
        assert!(both.tcp.is_some() && both.socket.is_some(), "{both:?}");
    }

    #[test]
    fn what_is_no_address_is_not_listened_on() {
        for bad in ["tcp://localhost", "tcp://localhost:1", "tcp://127.0.0.1", "tcp://:1"] {
            let bad = check(&["--listen", bad, "--tls-dir", "/tls"]);
            assert!(matches!(bad, Err(ConfigError::NotAnAddress(_))), "{bad:?}");
        }
        for bad in ["127.0.0.1:7070", "http://127.0.0.1:7070", "relative"] {
            assert!(matches!(check(&["--listen", bad]), Err(ConfigError::Common(_))), "{bad}");
        }
        let twice = check(&["--listen", "/a", "--listen", "/b"]);
        assert!(matches!(twice, Err(ConfigError::Twice(_))), "{twice:?}");
    }
}
