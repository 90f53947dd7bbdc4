//! What the broker is told, checked before anything is touched.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use clap::{Parser, ValueEnum};

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
    /// A listener that would be open to others.
    #[error(
        "--listen {0}: only a Unix socket is served; TCP is refused until callers can be identified on it \
         (127.0.0.1 belongs to every local user). Say --listen /run/shaper/broker.sock"
    )]
    NotAUnixSocket(String),
    /// No such group.
    #[error("--socket-group {0}: there is no such group")]
    NoGroup(String),
    /// A path that must be absolute.
    #[error("{option}: {path} must be an absolute path")]
    Relative {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Two brokers, one state.
    #[error("--state-dir {0} belongs to another broker that is running")]
    Locked(PathBuf),
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
            return Err(ConfigError::Relative { option: "--state-dir", path: state_dir });
        }
        Ok(Config { socket, socket_gid, state_dir, store })
    }
}

impl Config {
    /// Makes the state directory and locks it for the life of the returned file: one broker, one state.
    pub fn lock_state(&self) -> Result<fs::File, ConfigError> {
        let file = |verb, path: &Path| {
            let path = path.to_owned();
            move |source| ConfigError::File { verb, path, source }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.state_dir)
            .map_err(file("make", &self.state_dir))?;
        let path = self.state_dir.join("broker.lock");
        let lock = fs::File::create(&path).map_err(file("make", &path))?;
        match lock.try_lock() {
            Ok(()) => Ok(lock),
            Err(fs::TryLockError::WouldBlock) => Err(ConfigError::Locked(self.state_dir.clone())),
            Err(fs::TryLockError::Error(source)) => Err(file("lock", &path)(source)),
        }
    }

    /// The file of the store.
    pub fn store_file(&self) -> PathBuf {
        self.state_dir.join("store.redb")
    }
}

fn socket_path(listen: &str) -> Result<PathBuf, ConfigError> {
    let path = listen.strip_prefix("unix:").unwrap_or(listen);
    if path.starts_with('/') {
        Ok(PathBuf::from(path))
    } else {
        Err(ConfigError::NotAUnixSocket(listen.to_owned()))
    }
}

fn group_id(group: &str) -> Result<u32, ConfigError> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let error = |source| ConfigError::File { verb: "read", path: "/etc/group".into(), source };
    let groups = fs::read_to_string("/etc/group").map_err(error)?;
    groups
        .lines()
        .map(|line| line.split(':'))
        .find_map(|mut fields| {
            (fields.next() == Some(group)).then(|| fields.nth(1).and_then(|id| id.parse().ok())).flatten()
        })
        .ok_or_else(|| ConfigError::NoGroup(group.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_unix_socket_is_listened_on() {
        assert_eq!(socket_path("/run/x.sock").unwrap(), Path::new("/run/x.sock"));
        assert_eq!(socket_path("unix:/run/x.sock").unwrap(), Path::new("/run/x.sock"));
        for tcp in ["127.0.0.1:7070", "tcp://0.0.0.0:1", "[::1]:7070", "localhost:1", "unix:relative", ""] {
            let error = socket_path(tcp).unwrap_err().to_string();
            assert!(error.contains("only a Unix socket"), "{error}");
        }
    }

    #[test]
    fn groups_by_number_and_by_name() {
        assert_eq!(group_id("65534").unwrap(), 65534);
        assert_eq!(group_id("root").unwrap(), 0);
        assert!(matches!(group_id("no-such-group"), Err(ConfigError::NoGroup(_))));
    }
}
