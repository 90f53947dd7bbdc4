//! What the broker is told, checked before anything is touched.

use std::{fs, path::PathBuf};

use clap::{Parser, ValueEnum};
use shaper_proto::daemon::{self, OptionError, group_id, socket_path};

/// The broker of a cluster: places tasks on nodes, and remembers what became of them.
#[derive(Clone, Debug, Parser)]
#[command(version, about)]
pub struct Options {
    /// Where to listen: a path of a Unix socket, optionally as unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "/run/shaper/broker.sock")]
    pub listen: String,
    /// Group (name or id) whose members may connect; the socket has mode 0660
    #[arg(long, value_name = "GROUP", default_value = "0")]
    pub socket_group: String,
    /// Directory of the broker's state: store.redb
    #[arg(long, value_name = "DIR", default_value = "/var/lib/shaper-broker")]
    pub state_dir: PathBuf,
    /// Where tasks, nodes and policies are kept
    #[arg(long, value_enum, default_value_t = StoreKind::Redb)]
    pub store: StoreKind,
}

/// Where rows are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoreKind {
    /// Nowhere: they end with the process.
    Memory,
    /// In one file in the state directory.
    Redb,
}

/// Why the options cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// One that the agent has as well.
    #[error(transparent)]
    Common(#[from] OptionError),
    /// A path that must be absolute.
    #[error("--state-dir: {0} must be an absolute path")]
    Relative(PathBuf),
}

/// Checked options.
#[derive(Clone, Debug)]
pub struct Config {
    /// The socket.
    pub socket: PathBuf,
    /// Its group.
    pub socket_gid: u32,
    /// State.
    pub state_dir: PathBuf,
    /// Where rows are kept.
    pub store: StoreKind,
}

impl Options {
    /// Checks everything; changes nothing.
    pub fn check(self) -> Result<Config, ConfigError> {
        let Options { listen, socket_group, state_dir, store } = self;
        let socket = socket_path(&listen)?;
        let socket_gid = group_id(&socket_group)?;
        if !state_dir.is_absolute() {
            return Err(ConfigError::Relative(state_dir));
        }
        Ok(Config { socket, socket_gid, state_dir, store })
    }
}

impl Config {
    /// Makes the state directory and locks it for the life of the returned file.
    pub fn lock_state(&self) -> Result<fs::File, OptionError> {
        daemon::lock_state(&self.state_dir, "broker")
    }

    /// The file of the store.
    pub fn store_file(&self) -> PathBuf {
        self.state_dir.join("store.redb")
    }
}
