//! What both daemons do with their options. Behind the feature `server`.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, fcntl_lock},
    io::Errno,
};

/// Why an option cannot be.
#[derive(Debug, thiserror::Error)]
pub enum OptionError {
    /// A listener that would be open to others.
    #[error(
        "`{0}` is not the path of a Unix socket; over plain TCP nobody knows who calls (127.0.0.1 belongs to every \
         local user). Say, for example, /run/shaper/agent.sock; a broker serves tcp://ADDRESS:PORT as well, with \
         certificates (--tls-dir), and agents and clients reach it there at https://HOST:PORT"
    )]
    NotAUnixSocket(String),
    /// No such group.
    #[error("--socket-group {0}: there is no such group")]
    NoGroup(String),
    /// Two daemons, one state.
    #[error("--state-dir {} belongs to another {daemon} that is running", directory.display())]
    Locked {
        /// What runs.
        daemon: &'static str,
        /// Whose state it is.
        directory: PathBuf,
    },
    /// A file or directory.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The path.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OptionError {
    let path = path.to_owned();
    move |source| OptionError::File { verb, path, source }
}

/// The path of a socket that is named `PATH` or `unix:PATH`.
pub fn socket_path(address: &str) -> Result<PathBuf, OptionError> {
    let path = address.strip_prefix("unix:").unwrap_or(address);
    if path.starts_with('/') {
        Ok(PathBuf::from(path))
    } else {
        Err(OptionError::NotAUnixSocket(address.to_owned()))
    }
}

/// The id of a group that is given by its id, or by its name in /etc/group.
pub fn group_id(group: &str) -> Result<u32, OptionError> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let path = Path::new("/etc/group");
    let groups = fs::read_to_string(path).map_err(failed("read", path))?;
    groups
        .lines()
        .map(|line| line.split(':'))
        .find_map(|mut fields| {
            (fields.next() == Some(group)).then(|| fields.nth(1).and_then(|id| id.parse().ok())).flatten()
        })
        .ok_or_else(|| OptionError::NoGroup(group.to_owned()))
}

/// Makes the state directory and locks it for the life of the returned file: one `daemon`, one state.
pub fn lock_state(directory: &Path, daemon: &'static str) -> Result<fs::File, OptionError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(failed("make", directory))?;
    let path = directory.join(format!("{daemon}.lock"));
    let lock = fs::File::create(&path).map_err(failed("make", &path))?;
    // A record lock is of the process. A lock of the open file would be held by a child, too, that this process was about
    // to start when it was killed, until that has become another program: and the next daemon would not start.
    match fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::AGAIN | Errno::ACCESS) => {
            Err(OptionError::Locked { daemon, directory: directory.to_owned() })
        }
        Err(errno) => Err(failed("lock", &path)(errno.into())),
    }
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
            assert!(error.contains("not the path of a Unix socket"), "{error}");
        }
    }

    #[test]
    fn a_child_that_outlives_its_daemon_does_not_keep_the_next_one_out() {
        let directory = std::env::temp_dir().join(format!("shaper-test-lock-{}", std::process::id()));
        let lock = lock_state(&directory, "agent").unwrap();
        rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty()).unwrap();
        // It has the open file until its input ends.
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        drop(lock);
        let next = lock_state(&directory, "agent");
        drop(child.stdin.take());
        child.wait().unwrap();
        fs::remove_dir_all(&directory).unwrap();
        next.unwrap();
    }

    #[test]
    fn groups_by_number_and_by_name() {
        assert_eq!(group_id("65534").unwrap(), 65534);
        assert_eq!(group_id("root").unwrap(), 0);
        assert!(matches!(group_id("no-such-group"), Err(OptionError::NoGroup(_))));
    }
}
