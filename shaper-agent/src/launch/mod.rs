//! Running a task outside the agent.
//!
//! User code is never a child of the agent: it would lose its output and exit status with it. The
//! agent writes `launch.json` into a directory of the attempt and [`spawn`]s `shaper-launch` on it, a
//! supervisor that starts the task in its cgroup, keeps its log, and records its exit. An agent that is
//! restarted, upgraded or killed finds them again with [`attach`].
//!
//! Where systemd is PID 1, it is the parent of supervisors: each is the main process of a transient unit ([`Hired`]).
//! Elsewhere the supervisor is the agent's child when it starts, so a task inherits the agent's resource
//! limits, mount namespace and scheduling policy (not its cgroups, session, signals, descriptors,
//! credentials or oom_score_adj).

pub(crate) mod attempt;
mod child;
mod hired;
mod limit;
pub mod log;
pub mod spec;
mod supervise;
mod time;

use std::{
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    process::{Pid, PidfdFlags, WaitId, WaitIdOptions},
};
use tokio::io::{Interest, unix::AsyncFd};

use self::{
    attempt::{AttemptDir, Probe},
    spec::{Exit, LaunchSpec, Readiness, Started, Supervisor, Usage},
};
pub use self::{
    hired::Hired,
    supervise::{Parent, SuperviseError, supervise},
};
use crate::{durable, open_files};

/// Writes `launch.json`, for [`spawn`]. The directory exists, 0700.
pub fn prepare(attempt_dir: &Path, spec: &LaunchSpec) -> Result<(), durable::Error> {
    AttemptDir::new(attempt_dir).write_spec(spec)
}

/// A supervisor that was started.
#[derive(Debug)]
pub struct Spawned {
    /// Process id of the supervisor.
    pub pid: u32,
    /// Field 22 of its `/proc/<pid>/stat`.
    pub start_time: u64,
    /// For [`ended`], which the agent must await: the supervisor is its child and has to be reaped.
    pub pidfd: OwnedFd,
    /// The program runs, or what is wrong. In the second case [`attach`] says whether the attempt
    /// has ended by that, or belongs to another supervisor.
    pub started: Result<Started, String>,
}

/// Why it is not known whether a task was started. [`attach`] can tell.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// There is no supervisor.
    #[error("start {}", binary.display())]
    Start {
        /// The supervisor's program.
        binary: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It died before it said anything.
    #[error("the supervisor of {} ended early: {status}", directory.display())]
    Died {
        /// The attempt.
        directory: PathBuf,
        /// How.
        status: ExitStatus,
    },
    /// The same, of one that is not the agent's child: nobody here can say how.
    #[error(
        "the supervisor of {} ended early; the journal of its unit may say why", directory.display()
    )]
    Left {
        /// The attempt.
        directory: PathBuf,
    },
    /// It has said nothing yet, and goes on: a slow disk, a frozen cgroup, or a working directory
    /// that does not answer.
    #[error("the supervisor of {} is not ready after {after:?}; its task may still start", directory.display())]
    NotReady {
        /// The attempt.
        directory: PathBuf,
        /// The deadline that passed.
        after: Duration,
        /// For [`ended`].
        pidfd: OwnedFd,
    },
    /// It said something else than the agent expects: not the agent's version.
    #[error("the supervisor of {} answered {line:?}", directory.display())]
    Protocol {
        /// The attempt.
        directory: PathBuf,
        /// What it said.
        line: String,
        /// Where that is wrong.
        source: serde_json::Error,
        /// For [`ended`].
        pidfd: OwnedFd,
    },
    /// A system call of the agent failed.
    #[error("{operation} the supervisor of {}", directory.display())]
    Io {
        /// What was done.
        operation: &'static str,
        /// The attempt.
        directory: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A readiness line is a few numbers or one error.
const MAX_READINESS: usize = 64 << 10;

/// Starts the supervisor of the attempt in `attempt_dir` and waits at most `deadline` for the word
/// that its program runs. Blocks: for a thread that may.
pub fn spawn(binary: &Path, attempt_dir: &Path, deadline: Duration) -> Result<Spawned, SpawnError> {
    let io_error = |operation| {
        move |source: io::Error| SpawnError::Io { operation, directory: attempt_dir.to_owned(), source }
    };
    let mut command = Command::new(binary);
    open_files::restore_in(&mut command);
    let mut child = command
        .arg(attempt_dir)
        // Of the agent's environment the supervisor needs nothing, and it is not the task's either.
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|source| SpawnError::Start { binary: binary.to_owned(), source })?;
    let pid = child.id();
    // The child is not reaped yet, so its pid is its own in both of these.
    let pidfd = open_pidfd(pid).map_err(|errno| io_error("open a pidfd of")(errno.into()))?;
    let start_time = attempt::start_time(pid).map_err(io_error("read the start time of"))?;

    let heard = match child.stdout.take() {
        Some(mut stdout) => hear(&mut stdout, deadline).map_err(io_error("read from"))?,
        None => Heard::End,
    };
    match spawned(heard, pid, start_time, pidfd, attempt_dir, deadline) {
        Some(spawned) => spawned,
        None => {
            let status = child.wait().map_err(io_error("wait for"))?;
            Err(SpawnError::Died { directory: attempt_dir.to_owned(), status })
        }
    }
}

/// What a supervisor has come to by what it said; `None`: it has ended.
fn spawned(
    heard: Heard,
    pid: u32,
    start_time: u64,
    pidfd: OwnedFd,
    attempt_dir: &Path,
    deadline: Duration,
) -> Option<Result<Spawned, SpawnError>> {
    let directory = attempt_dir.to_owned();
    let line = match heard {
        Heard::Line(line) => line,
        Heard::End => return None,
        Heard::Nothing => return Some(Err(SpawnError::NotReady { directory, after: deadline, pidfd })),
    };
    Some(match serde_json::from_slice(&line) {
        Ok(Readiness::Started(started)) => Ok(Spawned { pid, start_time, pidfd, started: Ok(started) }),
        Ok(Readiness::Failed(error)) => Ok(Spawned { pid, start_time, pidfd, started: Err(error) }),
        Err(source) => {
            let line = String::from_utf8_lossy(&line).into_owned();
            Err(SpawnError::Protocol { directory, line, source, pidfd })
        }
    })
}

enum Heard {
    Line(Vec<u8>),
    End,
    Nothing,
}

/// Reads one line.
fn hear(from: &mut (impl Read + AsFd), deadline: Duration) -> io::Result<Heard> {
    let begun = Instant::now();
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    while line.len() < MAX_READINESS {
        let left = deadline.saturating_sub(begun.elapsed());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(Heard::Nothing),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match from.read(&mut buffer) {
            Ok(0) => return Ok(Heard::End),
            Ok(got) => line.extend_from_slice(&buffer[..got]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if line.last() == Some(&b'\n') {
            break;
        }
    }
    Ok(Heard::Line(line))
}

/// Waits until the process behind `pidfd` has ended, and reaps it if it is a child.
pub async fn ended(pidfd: OwnedFd) -> io::Result<()> {
    // Readable from the end of the process on, for good.
    async_fd(pidfd.as_fd(), Interest::READABLE)?.readable().await?.retain_ready();
    match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    {
        // ECHILD: an earlier agent was its parent.
        Ok(_) | Err(Errno::CHILD) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// `fd` in tokio's reactor, to wait until it can be read, or whatever `interest` is in.
pub(crate) fn async_fd(fd: BorrowedFd<'_>, interest: Interest) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: a `BorrowedFd` is one open descriptor, the same one for all its life, and the
    // `AsyncFd` cannot outlive it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// What an attempt has come to.
#[derive(Debug)]
pub enum Attachment {
    /// A supervisor has it, and its program runs or is about to. The pidfd is for [`ended`], after
    /// which `attach` says more.
    Running(OwnedFd, Supervisor),
    /// Its main process has ended. The supervisor may live on for the log of others in the cgroup.
    Ended(Exit),
    /// It was started, and its supervisor died before it recorded an exit, or the machine did. What
    /// is left of it is in its cgroup.
    Lost,
    /// It has no supervisor and nothing was run. A supervisor that was spawned a moment ago may
    /// still start it; [`abandon`] makes sure that none does.
    NeverStarted,
}

/// Why it is not known what an attempt has come to.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A state file could not be read or written.
    #[error("read the state of an attempt")]
    State(#[from] durable::Error),
    /// A system call failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody holds the lock and does not say who, for longer than a start takes.
    #[error(
        "{} is held, but supervisor.json names no living process: a disk that does not answer, \
         or a child that was born into a frozen cgroup and lost its supervisor; kill the cgroup",
        path.display()
    )]
    Unsettled {
        /// The lock.
        path: PathBuf,
    },
}

/// How long a supervisor may hold the lock before `supervisor.json` is there: one small fsync.
const SETTLE: Duration = Duration::from_secs(5);

/// Finds out what the attempt in `attempt_dir` has come to. Blocks for five seconds at worst, and only
/// while a supervisor is starting.
///
/// No order of events makes a live supervisor look dead. `started.json` is read before
/// `supervisor.json`, which is written before it and never after it: so if there is a start, the
/// supervisor named is the one that made it, and no other will ever run the attempt. That it is
/// dead is concluded from the free lock, or from a pidfd that is not that process; and `exit.json`
/// is looked for once more after that.
pub fn attach(attempt_dir: &Path) -> Result<Attachment, AttachError> {
    let attempt = AttemptDir::new(attempt_dir);
    let begun = Instant::now();
    loop {
        if let Some(exit) = attempt.exit()? {
            return Ok(Attachment::Ended(exit));
        }
        let started = attempt.started()?;
        let lock = attempt.probe().map_err(|source| AttachError::Io {
            operation: "probe the lock",
            path: attempt.lock_path(),
            source,
        })?;
        if let Probe::Held = lock {
            let supervisor = attempt.supervisor()?;
            if let Some(supervisor) = supervisor
                && let Some(pidfd) = verified_pidfd(supervisor)?
            {
                return Ok(Attachment::Running(pidfd, supervisor));
            }
            if started.is_none() {
                if begun.elapsed() > SETTLE {
                    return Err(AttachError::Unsettled { path: attempt.lock_path() });
                }
                // There is no event for "has named itself" that is cheaper than to look again.
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            // Started, and the supervisor is dead: what holds the lock is a child of it that has
            // not got far enough to close its copy.
        }
        // While `lock` lives, the files do not change, save in the case above.
        return Ok(match (attempt.exit()?, attempt.started()?) {
            (Some(exit), _) => Attachment::Ended(exit),
            (None, Some(_)) => Attachment::Lost,
            (None, None) => Attachment::NeverStarted,
        });
    }
}

/// Makes sure that an attempt which was never started never will be, and records why. Whatever
/// else it has come to, it stays, and is returned. This is for an agent that was restarted between
/// [`prepare`] and the answer of [`spawn`], before it says "never started" to anyone.
pub fn abandon(attempt_dir: &Path, reason: &str) -> Result<Attachment, AttachError> {
    let attempt = AttemptDir::new(attempt_dir);
    let lock = attempt.lock().map_err(|source| AttachError::Io {
        operation: "take the lock",
        path: attempt.lock_path(),
        source,
    })?;
    // With the lock, no supervisor gets past its first step; the next one finds `exit.json`.
    let Some(lock) = lock else { return attach(attempt_dir) };
    if attempt.started()?.is_none() && attempt.exit()?.is_none() {
        let status =
            spec::ExitStatus::NotStarted { stage: "abandoned".into(), error: reason.to_owned(), errno: None };
        let exit = Exit { status, at: time::now(), usage: Usage::default(), lease_over: false };
        attempt.write_exit(&exit)?;
    }
    drop(lock);
    attach(attempt_dir)
}

/// Writes down the main process of an attempt that nobody supervises.
pub fn note_started(attempt_dir: &Path, started: &Started) -> Result<(), durable::Error> {
    AttemptDir::new(attempt_dir).write_started(started)
}

/// The main process of an attempt, and a pidfd of it while it lives; `None` if none was started.
pub fn main_process(attempt_dir: &Path) -> Result<Option<(Started, Option<OwnedFd>)>, AttachError> {
    let Some(started) = AttemptDir::new(attempt_dir).started()? else { return Ok(None) };
    let process = Supervisor { pid: started.pid, start_time: started.start_time };
    Ok(Some((started, verified_pidfd(process)?)))
}

/// Waits until the exit of an attempt is recorded, or no supervisor is left to record it.
pub async fn recorded(attempt_dir: &Path) -> Result<(), AttachError> {
    // Where inotify instances have run out, it is looked at instead: an exit must not depend on them.
    const LOOK: Duration = Duration::from_millis(100);
    let reader = log::LogReader::open(attempt_dir, 0).ok();
    loop {
        let Attachment::Running(supervisor, _) = attach(attempt_dir)? else { return Ok(()) };
        let changed = async {
            match &reader {
                // Watches from its first call on, and returns from that at once.
                Some(reader) if reader.changed().await.is_ok() => {}
                _ => tokio::time::sleep(LOOK).await,
            }
        };
        tokio::select! {
            () = changed => {}
            over = ended(supervisor) => over.map_err(|source| AttachError::Io {
                operation: "wait for the supervisor of",
                path: attempt_dir.to_owned(),
                source,
            })?,
        }
    }
}

/// A pidfd of exactly this supervisor, if it lives.
fn verified_pidfd(supervisor: Supervisor) -> Result<Option<OwnedFd>, AttachError> {
    let path = || PathBuf::from(format!("/proc/{}/stat", supervisor.pid));
    let pidfd = match open_pidfd(supervisor.pid) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(None),
        Err(errno) => {
            return Err(AttachError::Io {
                operation: "open a pidfd beside",
                path: path(),
                source: errno.into(),
            });
        }
    };
    // Checked after the pidfd is open. The supervisor had this pid before, when it wrote its file;
    // if it has it now, it had it in between.
    match attempt::start_time(supervisor.pid) {
        Ok(start_time) => Ok((start_time == supervisor.start_time).then_some(pidfd)),
        // ESRCH comes from a file that was opened before the process was reaped.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(None)
        }
        Err(source) => Err(AttachError::Io { operation: "read", path: path(), source }),
    }
}

/// A pidfd of a child that is not reaped yet.
pub(crate) fn pidfd(child: u32) -> io::Result<OwnedFd> {
    Ok(open_pidfd(child)?)
}

fn open_pidfd(pid: u32) -> rustix::io::Result<OwnedFd> {
    // 0 and what is no pid_t name no process.
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty())
}

/// An error and its sources on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
