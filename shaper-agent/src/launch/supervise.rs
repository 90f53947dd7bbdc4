//! The supervisor: one process and one thread for one attempt of a task.
//!
//! The order of what it makes durable is what a restarted agent relies on:
//! 1. the lock is taken, and an attempt that has started or ended is refused;
//! 2. `supervisor.json`: from here on the holder of the lock has a name;
//! 3. `started.json`, before the task's process may execute anything;
//! 4. `exit.json`, once the main process has ended and its output is on the disk.
//!
//! Nothing here ends the task but a lease that is over (`limit.rs`) and the stop of its unit, and nothing but the end of the
//! task ends the supervisor.

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::{CWD, Mode, OFlags},
    io::Errno,
    process::{Pid, Signal},
};

use super::{
    attempt::{self, AttemptDir},
    chain,
    child::{Gated, Output, Plan, StartError},
    hired,
    limit::Limit,
    log::{LogWriter, Stream},
    spec::{Exit, ExitStatus, LaunchSpec, Readiness, Started, Supervisor, Usage},
    time,
};
use crate::durable;

/// Why a supervisor did not do its work. The attempt's own failures are not here: they are in its
/// `exit.json`.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// Setting up this process failed.
    #[error("{operation} for the supervisor of {}", directory.display())]
    Setup {
        /// What failed.
        operation: &'static str,
        /// The attempt.
        directory: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another supervisor lives.
    #[error("{} already has a supervisor", directory.display())]
    Supervised {
        /// The attempt.
        directory: PathBuf,
    },
    /// At most one run per attempt, ever.
    #[error("{} has been run already; a new run takes a new attempt", directory.display())]
    AlreadyRun {
        /// The attempt.
        directory: PathBuf,
    },
    /// There is nothing to run.
    #[error("{} has no launch.json", directory.display())]
    NoSpec {
        /// The attempt.
        directory: PathBuf,
    },
    /// A state file could not be read or written.
    #[error("keep the state of the attempt")]
    State(#[from] durable::Error),
    /// Waiting for events failed, which leaves the task without a supervisor.
    #[error("wait for events of {}", directory.display())]
    Wait {
        /// The attempt.
        directory: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How often an `exit.json` that a full or failing disk refused is tried again.
const EXIT_RETRY: Duration = Duration::from_secs(1);
/// How long the start of a line waits for the rest of it before it is written as a partial record:
/// progress bars and prompts end in no newline.
const PARTIAL_WAIT: Duration = Duration::from_millis(500);
/// What is read from a pipe at once: all of it, at the default size.
const READ_BYTES: usize = 64 << 10;

/// How long a task whose unit is stopped has between the signal and the end of all that is in its cgroup.
const GRACE: Duration = Duration::from_secs(10);

/// Whose child a supervisor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// The agent's.
    Agent,
    /// systemd's, as the main process of a unit: it begins when the agent says so, and stopping the unit ends the task.
    Systemd,
}

/// Runs the attempt in `directory` to its end. For a process of its own with one thread: it changes
/// signal dispositions, the session and the standard descriptors.
pub fn supervise(directory: &Path, parent: Parent) -> Result<(), SuperviseError> {
    if parent == Parent::Systemd
        && !hired::is_wanted().map_err(|source| SuperviseError::Setup {
            operation: "hear from the agent",
            directory: directory.to_owned(),
            source,
        })?
    {
        return Ok(());
    }
    match prepare(directory, parent) {
        Ok(Some(task)) => {
            tell(&Readiness::Started(task.started));
            task.run()
        }
        Ok(None) => Ok(()),
        Err(error) => {
            tell(&Readiness::Failed(chain(&error)));
            Err(error)
        }
    }
}

/// The readiness line. An agent that is gone reads `started.json` when it is back. Afterwards the
/// agent's descriptors are let go.
fn tell(readiness: &Readiness) {
    let written = serde_json::to_vec(readiness).map(|mut line| {
        line.push(b'\n');
        let mut stdout = io::stdout().lock();
        stdout.write_all(&line).and_then(|()| stdout.flush())
    });
    // Whatever went wrong, nobody is left to hear about it.
    drop(written);
    if let Ok(null) = rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        for standard in [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO] {
            // SAFETY: replaces a descriptor that std treats as always open by another open one.
            unsafe { libc::dup2(null.as_raw_fd(), standard) };
        }
    }
}

/// Everything up to a running program. `None`: it does not run, and `exit.json` says why.
fn prepare(directory: &Path, parent: Parent) -> Result<Option<Task>, SuperviseError> {
    let setup = |operation| {
        let directory = directory.to_owned();
        move |source: io::Error| SuperviseError::Setup { operation, directory, source }
    };
    let absolute = std::path::absolute(directory).map_err(setup("resolve the path"))?;
    detach(parent).map_err(setup("detach from the agent"))?;
    let attempt = AttemptDir::new(&absolute);
    let lock = attempt.lock().map_err(setup("take supervisor.lock"))?;
    let lock = lock.ok_or_else(|| SuperviseError::Supervised { directory: directory.to_owned() })?;
    if attempt.started()?.is_some() || attempt.exit()?.is_some() {
        return Err(SuperviseError::AlreadyRun { directory: directory.to_owned() });
    }
    durable::sweep(attempt.path())?;
    let pid = std::process::id();
    let start_time = attempt::start_time(pid).map_err(setup("read the start time"))?;
    attempt.write_supervisor(&Supervisor { pid, start_time })?;
    let spec = attempt.spec()?.ok_or_else(|| SuperviseError::NoSpec { directory: directory.to_owned() })?;
    for group in &spec.supervisor_groups {
        // Out of the agent's own group, whose weight is not for what a task makes us do.
        std::fs::write(group.join("cgroup.procs"), pid.to_string())
            .map_err(setup("enter the supervisors' group"))?;
    }
    // Orphans of the task come here instead of to PID 1, and are reaped.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|errno| setup("become the subreaper")(errno.into()))?;
    let signals = signals(parent).map_err(setup("make a signalfd"))?;

    match start(&attempt, &spec, &lock) {
        Ok((gated, output, log, events, started, limit)) => {
            drop(gated);
            let kill = spec.cgroup.join("cgroup.kill");
            let task = Task::new(attempt, lock, signals, output, log, (events, kill), started);
            Ok(Some(Task { limit, afterwards: afterwards(&spec), ..task }))
        }
        Err(error) => {
            let message = chain(&error);
            let status = ExitStatus::NotStarted {
                stage: error.stage().into(),
                error: message.clone(),
                errno: error.errno(),
            };
            let lease_over = matches!(error, StartError::LeaseOver { .. });
            record(&attempt, &Exit { status, at: time::now(), usage: Usage::default(), lease_over })?;
            tell(&Readiness::Failed(message));
            Ok(None)
        }
    }
}

fn afterwards(spec: &LaunchSpec) -> Option<Command> {
    let (program, arguments) = spec.afterwards.split_first()?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(spec.env.iter().cloned());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Some(command)
}

type Running = (Gated, Output, LogWriter, File, Started, Option<Arc<Limit>>);

fn start(attempt: &AttemptDir, spec: &LaunchSpec, lock: &OwnedFd) -> Result<Running, StartError> {
    attempt.reserve().map_err(StartError::Record)?;
    let plan = Plan::new(spec)?;
    let events_path = spec.cgroup.join("cgroup.events");
    let prepare = |operation, path: &Path, source| StartError::Prepare {
        operation,
        object: path.display().to_string(),
        source,
    };
    let events = File::open(&events_path).map_err(|source| prepare("open", &events_path, source))?;
    let log = LogWriter::create(attempt.path(), spec.log_segment_bytes)
        .map_err(|error| prepare("begin the log in", attempt.path(), io::Error::other(error)))?;

    let (gated, output) = plan.spawn(lock.as_fd())?;
    let opened = attempt::start_time(gated.pid)
        .map_err(|source| prepare("read the start time of", Path::new("the child"), source))
        .and_then(|start_time| {
            let started = Started { pid: gated.pid, start_time, at: time::now() };
            attempt.write_started(&started).map_err(StartError::Record)?;
            let limit = spec.lease.as_ref().map(|lease| {
                Limit::watch(lease, &spec.cgroup).map_err(|source| prepare("watch", &lease.contact, source))
            });
            let limit = limit.transpose()?;
            // Later than all that may have taken its time.
            if let Some(limit) = limit.as_ref().filter(|limit| limit.is_over()) {
                return Err(StartError::LeaseOver { seconds: limit.lease().as_secs() });
            }
            gated.open(&plan)?;
            Ok((started, limit))
        });
    match opened {
        Ok((started, limit)) => Ok((gated, output, log, events, started, limit)),
        Err(error) => {
            gated.end();
            Err(error)
        }
    }
}

/// Cuts what ties this process to the agent.
fn detach(parent: Parent) -> io::Result<()> {
    // A descriptor that leaked from the agent, such as its listening socket or a lock, would be
    // held as long as the task runs. Nothing above 2 is ours yet.
    // SAFETY: no owner of a descriptor above 2 exists: this runs first, on the only thread.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, 0) };
    if closed < 0 {
        return Err(io::Error::last_os_error());
    }
    match rustix::process::setsid() {
        // EPERM: a shell's job control made it a group leader. It ignores the signals of that.
        Ok(_) | Err(Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    // Whoever wants the task to end kills its cgroup, or stops its unit. SIGXFSZ: a file size limit costs log lines.
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE, libc::SIGXFSZ] {
        if (signal, parent) == (libc::SIGTERM, Parent::Systemd) {
            continue;
        }
        // SAFETY: SIG_IGN runs no code.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    // A file system that somebody works in cannot be unmounted.
    Ok(rustix::process::chdir("/")?)
}

/// Blocks SIGCHLD, and SIGTERM where it is listened to, and makes a descriptor of them.
fn signals(parent: Parent) -> io::Result<OwnedFd> {
    // SAFETY: `set` is initialized by sigemptyset before it is used; no other thread has a mask.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if parent == Parent::Systemd {
            libc::sigaddset(&raw mut set, libc::SIGTERM);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            ..0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

struct Pipe {
    stream: Stream,
    /// `None` once every writer is gone.
    read: Option<OwnedFd>,
}

/// A running task.
struct Task {
    attempt: AttemptDir,
    /// Held, not used: its descriptor is the lock.
    _lock: OwnedFd,
    started: Started,
    signals: OwnedFd,
    /// `cgroup.events` of the task's group …
    events: File,
    /// … and `cgroup.kill`.
    kill: PathBuf,
    /// Since when it is to end.
    ending_since: Option<Instant>,
    /// How long it goes on without the broker.
    limit: Option<Arc<Limit>>,
    /// What is run once it is over.
    afterwards: Option<Command>,
    populated: bool,
    pipes: [Pipe; 2],
    log: LogWriter,
    partial_since: Option<Instant>,
    /// Set when the main process is reaped.
    exit: Option<Exit>,
    /// `exit.json` is on the disk.
    recorded: bool,
    buffer: Vec<u8>,
}

impl Task {
    fn new(
        attempt: AttemptDir,
        lock: OwnedFd,
        signals: OwnedFd,
        output: Output,
        log: LogWriter,
        (events, kill): (File, PathBuf),
        started: Started,
    ) -> Task {
        let Output { stdout, stderr } = output;
        Task {
            attempt,
            _lock: lock,
            started,
            signals,
            events,
            kill,
            ending_since: None,
            limit: None,
            afterwards: None,
            populated: true,
            pipes: [
                Pipe { stream: Stream::Stdout, read: Some(stdout) },
                Pipe { stream: Stream::Stderr, read: Some(stderr) },
            ],
            log,
            partial_since: None,
            exit: None,
            recorded: false,
            buffer: vec![0; READ_BYTES],
        }
    }

    fn run(mut self) -> Result<(), SuperviseError> {
        // Arms POLLPRI: the kernel reports a change since the last read.
        self.read_events();
        loop {
            if self.exit.is_some() && !self.recorded {
                self.record_exit();
            }
            let silent = self.pipes.iter().all(|pipe| pipe.read.is_none());
            // What the main process left has a lease, too.
            let has_nothing_to_do = silent && self.limit.is_none();
            if self.recorded && (has_nothing_to_do || !self.populated) {
                break;
            }
            let ready = self.wait().map_err(|source| SuperviseError::Wait {
                directory: self.attempt.path().to_owned(),
                source,
            })?;
            for index in 0..self.pipes.len() {
                if ready.pipes[index] {
                    self.pump(index, READ_BYTES);
                }
            }
            self.write_old_partials();
            if ready.events {
                self.read_events();
            }
            if ready.signals {
                self.take_signals();
            }
            if self.ending_since.is_some_and(|since| since.elapsed() >= GRACE) {
                self.ending_since = None;
                // A group that is gone has nobody in it.
                let _ = std::fs::write(&self.kill, "1");
            }
        }
        // The last of the group may have written before it ended.
        self.drain();
        // A failure costs log on a power loss; there is nothing left to do about it.
        let _ = self.log.sync(time::now());
        if let Some(mut afterwards) = self.afterwards {
            // Nothing may be left of the task, which is an error to some; the exit is recorded, and nobody waits.
            let _ = afterwards.status();
        }
        Ok(())
    }

    fn wait(&self) -> io::Result<Ready> {
        let mut fds = Vec::with_capacity(4);
        fds.push(PollFd::new(&self.signals, PollFlags::IN));
        if self.populated {
            fds.push(PollFd::new(&self.events, PollFlags::PRI));
        }
        let first_pipe = fds.len();
        for read in self.pipes.iter().filter_map(|pipe| pipe.read.as_ref()) {
            fds.push(PollFd::new(read, PollFlags::IN));
        }
        let partial = self.partial_since.map(|since| PARTIAL_WAIT.saturating_sub(since.elapsed()));
        let retry = (self.exit.is_some() && !self.recorded).then_some(EXIT_RETRY);
        let grace = self.ending_since.map(|since| GRACE.saturating_sub(since.elapsed()));
        let timeout = partial.into_iter().chain(retry).chain(grace).min();
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs().cast_signed(),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut polled = fds[first_pipe..].iter().map(|fd| !fd.revents().is_empty());
        let pipes =
            [0, 1].map(|index: usize| self.pipes[index].read.is_some() && polled.next() == Some(true));
        Ok(Ready {
            signals: !fds[0].revents().is_empty(),
            events: self.populated && !fds[1].revents().is_empty(),
            pipes,
        })
    }

    /// Reads at most `most` bytes of one stream into the log, once.
    fn pump(&mut self, index: usize, most: usize) -> usize {
        let Pipe { stream, read } = &mut self.pipes[index];
        let Some(fd) = read else { return 0 };
        let most = most.min(self.buffer.len());
        let got = match rustix::io::retry_on_intr(|| rustix::io::read(&*fd, &mut self.buffer[..most])) {
            Ok(got) => got,
            Err(Errno::AGAIN) => return 0,
            // A pipe has no other errors; one that has is of no more use.
            Err(_) => 0,
        };
        if got == 0 {
            *read = None;
            self.log.flush_partial(time::now(), *stream);
        } else {
            self.log.append(time::now(), *stream, &self.buffer[..got]);
        }
        self.partial_since = self.log.has_partial().then(|| self.partial_since.unwrap_or_else(Instant::now));
        got
    }

    /// Takes what is in the pipes now. Not until they are empty, which a process in the background
    /// can put off for ever.
    fn drain(&mut self) {
        for index in 0..self.pipes.len() {
            let Some(fd) = &self.pipes[index].read else { continue };
            let mut left =
                rustix::io::ioctl_fionread(fd).map_or(0, |bytes| usize::try_from(bytes).unwrap_or(0));
            while left > 0 {
                match self.pump(index, left) {
                    0 => break,
                    got => left -= got,
                }
            }
        }
        self.write_partials();
    }

    fn write_partials(&mut self) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.log.flush_partial(time::now(), stream);
        }
        self.partial_since = None;
    }

    fn write_old_partials(&mut self) {
        if self.partial_since.is_some_and(|since| since.elapsed() >= PARTIAL_WAIT) {
            self.write_partials();
        }
    }

    fn read_events(&mut self) {
        let mut text = [0; 256];
        // ENODEV: the group has been removed, so it was empty.
        self.populated = match self.events.read_at(&mut text, 0) {
            Ok(got) => text[..got].split(|byte| *byte == b'\n').any(|line| line == b"populated 1"),
            Err(_) => false,
        };
    }

    /// Ends the task if it was asked for, and reaps every child that has ended: the main process, and orphans.
    fn take_signals(&mut self) {
        let mut signal = [0_u8; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.signals, &mut signal).is_ok() {
            // `ssi_signo` is the first field.
            let [first, second, third, fourth, ..] = signal;
            if u32::from_ne_bytes([first, second, third, fourth]) == libc::SIGTERM.cast_unsigned() {
                self.begin_end();
            }
        }
        // One SIGCHLD may stand for many children, so the signal itself says nothing.
        while let Some((pid, status, usage)) = wait_any() {
            if pid == self.started.pid && self.exit.is_none() {
                // The end that a lease brings; others may have come just before.
                let is_killed = status == ExitStatus::Signal(libc::SIGKILL);
                let lease_over = is_killed && self.limit.as_ref().is_some_and(|limit| limit.has_ended());
                self.exit = Some(Exit { status, at: time::now(), usage, lease_over });
            }
        }
    }

    /// The unit is stopped: the task has some time to end by itself.
    fn begin_end(&mut self) {
        self.ending_since = Some(Instant::now());
        // Not reaped yet, so the id is its own. Once the main process is over, the agent ends the others.
        let main = self.exit.is_none().then(|| Pid::from_raw(self.started.pid.cast_signed())).flatten();
        if let Some(main) = main {
            let _ = rustix::process::kill_process(main, Signal::TERM);
        }
    }

    /// Makes the output so far and then the exit durable. What fails is tried again: the exit must
    /// not be lost to a disk that is full for a while.
    fn record_exit(&mut self) {
        let Some(exit) = &self.exit else { return };
        let exit = exit.clone();
        self.drain();
        // Output that cannot be synced must not hold up the exit.
        let _ = self.log.sync(time::now());
        self.recorded = record(&self.attempt, &exit).is_ok()
            // The attempt has been deleted: there is nowhere to record it, and nobody to ask.
            || matches!(self.attempt.path().try_exists(), Ok(false));
    }
}

/// Writes `exit.json`, on a full disk into the room that was kept for it.
fn record(attempt: &AttemptDir, exit: &Exit) -> Result<(), durable::Error> {
    let first = attempt.write_exit(exit);
    attempt.release_reserve();
    first.or_else(|_| attempt.write_exit(exit))
}

struct Ready {
    signals: bool,
    events: bool,
    pipes: [bool; 2],
}

/// One child that has ended, if there is one.
fn wait_any() -> Option<(u32, ExitStatus, Usage)> {
    let mut status = 0;
    // SAFETY: all-zero bytes are a valid `rusage`; both pointers are writable during the call.
    let (pid, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage), usage)
    };
    let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0)?;
    let status = if libc::WIFSIGNALED(status) {
        ExitStatus::Signal(libc::WTERMSIG(status))
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status))
    };
    let micros = |time: libc::timeval| {
        u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(time.tv_usec).unwrap_or(0)
    };
    let usage = Usage {
        user_us: micros(usage.ru_utime),
        system_us: micros(usage.ru_stime),
        // In KiB.
        max_rss_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) << 10,
    };
    Some((pid, status, usage))
}
