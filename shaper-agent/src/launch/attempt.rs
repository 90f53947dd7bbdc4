//! The directory of one attempt: its files, and the lock that says whether it has a supervisor.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{CWD, FlockOperation, Mode, OFlags},
    io::Errno,
};

use super::spec::{Exit, LaunchSpec, Started, Supervisor};
use crate::durable;

/// Mode of all files here. The directory is the agent's, 0700; so is what is in it.
const MODE: u32 = 0o600;

/// Two blocks of most file systems: one for the content, one for a directory that has to grow.
const RESERVE: usize = 8 << 10;

/// Paths of an attempt.
#[derive(Clone, Debug)]
pub(super) struct AttemptDir(PathBuf);

impl AttemptDir {
    pub(super) fn new(path: &Path) -> AttemptDir {
        AttemptDir(path.to_owned())
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn spec_path(&self) -> PathBuf {
        self.0.join("launch.json")
    }

    fn supervisor_path(&self) -> PathBuf {
        self.0.join("supervisor.json")
    }

    fn started_path(&self) -> PathBuf {
        self.0.join("started.json")
    }

    fn exit_path(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    fn reserve_path(&self) -> PathBuf {
        self.0.join("exit.reserve")
    }

    pub(super) fn lock_path(&self) -> PathBuf {
        self.0.join("supervisor.lock")
    }

    pub(super) fn spec(&self) -> Result<Option<LaunchSpec>, durable::Error> {
        durable::read_json(&self.spec_path())
    }

    pub(super) fn supervisor(&self) -> Result<Option<Supervisor>, durable::Error> {
        durable::read_json(&self.supervisor_path())
    }

    pub(super) fn started(&self) -> Result<Option<Started>, durable::Error> {
        durable::read_json(&self.started_path())
    }

    pub(super) fn exit(&self) -> Result<Option<Exit>, durable::Error> {
        durable::read_json(&self.exit_path())
    }

    pub(super) fn write_spec(&self, spec: &LaunchSpec) -> Result<(), durable::Error> {
        durable::write_json(&self.spec_path(), spec, MODE)
    }

    pub(super) fn write_supervisor(&self, supervisor: &Supervisor) -> Result<(), durable::Error> {
        durable::write_json(&self.supervisor_path(), supervisor, MODE)
    }

    pub(super) fn write_started(&self, started: &Started) -> Result<(), durable::Error> {
        durable::write_json(&self.started_path(), started, MODE)
    }

    pub(super) fn write_exit(&self, exit: &Exit) -> Result<(), durable::Error> {
        durable::write_json(&self.exit_path(), exit, MODE)
    }

    /// Sets aside what `exit.json` will need: the task's own log may fill the disk.
    pub(super) fn reserve(&self) -> Result<(), durable::Error> {
        durable::write(&self.reserve_path(), &[0; RESERVE], MODE)
    }

    /// Gives back what was set aside.
    pub(super) fn release_reserve(&self) {
        // One that is gone is given back, and nobody can do more about any other reason.
        let _ = std::fs::remove_file(self.reserve_path());
    }

    /// Takes the supervisor's lock for as long as the descriptor lives. `None`: another has it.
    ///
    /// [`probe`](AttemptDir::probe) holds the lock shared for a moment, which must not look like a
    /// supervisor: whoever is refused the exclusive lock asks for the shared one, and only a
    /// supervisor denies that.
    pub(super) fn lock(&self) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(CWD, self.lock_path(), flags, Mode::from_raw_mode(MODE))?;
        loop {
            if flock(&lock, FlockOperation::NonBlockingLockExclusive)? {
                return Ok(Some(lock));
            }
            if !flock(&lock, FlockOperation::NonBlockingLockShared)? {
                return Ok(None);
            }
            flock(&lock, FlockOperation::NonBlockingUnlock)?;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether a supervisor holds the lock. While the descriptor of [`Probe::Free`] lives, none can
    /// take it.
    pub(super) fn probe(&self) -> io::Result<Probe> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = match rustix::fs::openat(CWD, self.lock_path(), flags, Mode::empty()) {
            Ok(lock) => lock,
            Err(Errno::NOENT) => return Ok(Probe::Absent),
            Err(errno) => return Err(errno.into()),
        };
        let free = flock(&lock, FlockOperation::NonBlockingLockShared)?;
        Ok(if free { Probe::Free(lock) } else { Probe::Held })
    }
}

/// What [`AttemptDir::probe`] found.
pub(super) enum Probe {
    /// No supervisor has ever asked for the lock.
    Absent,
    /// Nobody has it, and nobody gets it before this is dropped.
    Free(#[expect(dead_code, reason = "held for its lock")] OwnedFd),
    /// A supervisor has it.
    Held,
}

fn flock(lock: &OwnedFd, operation: FlockOperation) -> io::Result<bool> {
    loop {
        match rustix::fs::flock(lock, operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Field 22 of `/proc/<pid>/stat`: clock ticks from boot to the start of the process.
pub(super) fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

pub(crate) fn parse_start_time(stat: &[u8]) -> Option<u64> {
    // The second field is the program's name in parentheses, which may contain both of these and
    // any other byte. State, the third, comes after the last.
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let stat = b"7 (a) R 1 (\xff) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 8192 1 2";
        assert_eq!(parse_start_time(stat), Some(4711));
        assert_eq!(parse_start_time(b"7 (a"), None);
        assert_eq!(start_time(std::process::id()).unwrap(), start_time(std::process::id()).unwrap());
    }

    #[test]
    fn one_has_the_lock_and_a_probe_is_not_one() {
        let directory = tempfile::tempdir().unwrap();
        let attempt = AttemptDir::new(directory.path());
        assert!(matches!(attempt.probe().unwrap(), Probe::Absent));
        let held = attempt.lock().unwrap().unwrap();
        assert!(matches!(attempt.probe().unwrap(), Probe::Held));
        assert!(attempt.lock().unwrap().is_none());
        drop(held);

        let probe = attempt.probe().unwrap();
        assert!(matches!(probe, Probe::Free(_)));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| attempt.lock().unwrap());
            assert!(matches!(attempt.probe().unwrap(), Probe::Free(_)));
            drop(probe);
            assert!(waiting.join().unwrap().is_some(), "a probe was taken for a supervisor");
        });
    }
}
