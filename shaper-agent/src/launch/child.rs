//! The task's process from its birth in the cgroup to `execve`.
//!
//! Everything that allocates, opens or looks something up happens in [`Plan::new`], before the
//! process exists. After `clone3` the child runs [`Plan::run`], which makes system calls on what the
//! plan holds and nothing else: no allocation, no lock, no unwinding.

use std::{
    ffi::{CStr, CString, NulError, OsStr, c_char, c_int, c_long, c_uint, c_ulong},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    ptr,
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    pipe::PipeFlags,
    process::{Signal, WaitId, WaitIdOptions},
};

use super::spec::{LaunchSpec, STAGE_EXEC};

#[cfg(not(target_pointer_width = "64"))]
compile_error!("the raw system calls here have the argument layout and the uid width of 64-bit Linux");

/// Where programs are looked for when the task's environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// Why there is no program running. Each becomes `ExitStatus::NotStarted`.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// The specification asks for what no process can have.
    #[error("{field} of launch.json {problem}")]
    Spec { field: &'static str, problem: &'static str },
    /// A string for the kernel has a NUL in it.
    #[error("{field} of launch.json")]
    Nul { field: &'static str, source: NulError },
    /// Something the child will need could not be had.
    #[error("{operation} {object}")]
    Prepare { operation: &'static str, object: String, source: io::Error },
    /// The kernel would not make the process.
    #[error("clone3 into cgroup {}: {}", cgroup.display(), clone_remedy(source))]
    Clone { cgroup: PathBuf, source: io::Error },
    /// The child gave up on its way to the program.
    #[error("{what}{}", child_remedy(*stage, source))]
    Child { stage: Stage, what: String, source: io::Error },
    /// What must be on the disk before anything may run could not be put there.
    #[error("record the attempt, before which nothing may run")]
    Record(#[source] crate::durable::Error),
    /// It is too late to begin.
    #[error("the broker was not heard of for {seconds} s, which is the task's lease, and places it again")]
    LeaseOver { seconds: u64 },
}

impl StartError {
    /// Name of the step, as `exit.json` has it.
    pub(super) fn stage(&self) -> &'static str {
        match self {
            StartError::Spec { .. } | StartError::Nul { .. } => "spec",
            StartError::Prepare { .. } => "prepare",
            StartError::Clone { .. } => "clone",
            StartError::Child { stage, .. } => stage.name(),
            StartError::Record(_) => "record",
            StartError::LeaseOver { .. } => "lease",
        }
    }

    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            StartError::Spec { .. }
            | StartError::Nul { .. }
            | StartError::Record(_)
            | StartError::LeaseOver { .. } => None,
            StartError::Prepare { source, .. }
            | StartError::Clone { source, .. }
            | StartError::Child { source, .. } => source.raw_os_error(),
        }
    }
}

fn clone_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::E2BIG | libc::EINVAL) => {
            "starting a process in a cgroup takes Linux 5.7, and a seccomp filter that lets clone3 through"
        }
        Some(libc::EBUSY) => {
            "the group has controllers enabled for children, so only a leaf below it can hold processes"
        }
        Some(libc::ENODEV | libc::ENOENT) => "the group has been removed; create it and start a new attempt",
        Some(libc::EOPNOTSUPP) => "the group is `domain invalid`: its parent is threaded",
        Some(libc::EAGAIN) => "a limit on processes is reached: pids.max of the group or of one above it",
        Some(libc::EACCES | libc::EPERM) => {
            "the supervisor must be root and outside any cgroup namespace below"
        }
        Some(libc::EBADF) => "not a cgroup v2 directory",
        _ => "no process was made",
    }
}

fn child_remedy(stage: Stage, error: &io::Error) -> &'static str {
    match (stage, error.raw_os_error()) {
        (Stage::Exec, Some(libc::ENOENT)) => {
            "; the program, or the interpreter or loader that it names, does not exist"
        }
        (Stage::Exec, Some(libc::EACCES)) => {
            "; the task's user may not execute it, or it is not a file, or it is mounted noexec"
        }
        (Stage::Exec, Some(libc::ENOEXEC)) => "; a script must begin with `#!` and its interpreter",
        (Stage::Exec, Some(libc::E2BIG)) => "; arguments and environment are too long together",
        (Stage::Chdir, Some(libc::EACCES)) => "; the task's user may not enter it",
        (Stage::Securebits | Stage::Bounding, Some(libc::EPERM)) => "; the supervisor needs CAP_SETPCAP",
        (Stage::Setgroups | Stage::Setresgid, Some(libc::EPERM)) => "; the supervisor needs CAP_SETGID",
        (Stage::Setresuid, Some(libc::EPERM)) => "; the supervisor needs CAP_SETUID",
        _ => "",
    }
}

/// Steps of the child, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Stage {
    JoinV1,
    Setsid,
    Signals,
    Stdio,
    OomScore,
    NoNewPrivs,
    Securebits,
    Bounding,
    Ambient,
    Setgroups,
    Setresgid,
    Setresuid,
    Capset,
    Keyring,
    Chdir,
    CloseRange,
    Exec,
}

impl Stage {
    const ALL: [Stage; 17] = [
        Stage::JoinV1,
        Stage::Setsid,
        Stage::Signals,
        Stage::Stdio,
        Stage::OomScore,
        Stage::NoNewPrivs,
        Stage::Securebits,
        Stage::Bounding,
        Stage::Ambient,
        Stage::Setgroups,
        Stage::Setresgid,
        Stage::Setresuid,
        Stage::Capset,
        Stage::Keyring,
        Stage::Chdir,
        Stage::CloseRange,
        Stage::Exec,
    ];

    fn name(self) -> &'static str {
        match self {
            Stage::JoinV1 => "join-v1",
            Stage::Setsid => "setsid",
            Stage::Signals => "signals",
            Stage::Stdio => "stdio",
            Stage::OomScore => "oom-score-adj",
            Stage::NoNewPrivs => "no-new-privs",
            Stage::Securebits => "securebits",
            Stage::Bounding => "bounding-set",
            Stage::Ambient => "ambient-set",
            Stage::Setgroups => "setgroups",
            Stage::Setresgid => "setresgid",
            Stage::Setresuid => "setresuid",
            Stage::Capset => "capset",
            Stage::Keyring => "keyring",
            Stage::Chdir => "chdir",
            Stage::CloseRange => "close-range",
            Stage::Exec => STAGE_EXEC,
        }
    }
}

/// What the child says through the report pipe when it gives up. Three words, written at once, so
/// that a reader gets all or nothing.
const REPORT_BYTES: usize = 12;

/// A NULL-terminated array of C strings, as `execve` takes it.
struct StringArray {
    pointers: Vec<*const c_char>,
    _strings: Vec<CString>,
}

impl StringArray {
    fn new(strings: Vec<CString>) -> StringArray {
        // The strings' heap memory stays in place when the vector of them moves.
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect();
        StringArray { pointers, _strings: strings }
    }
}

/// All that the child needs, made before it exists.
pub(super) struct Plan {
    argv: StringArray,
    envp: StringArray,
    /// Paths of the program to try, in this order.
    programs: Vec<CString>,
    cwd: CString,
    uid: libc::uid_t,
    gid: libc::gid_t,
    groups: Vec<libc::gid_t>,
    cgroup: OwnedFd,
    join: Vec<OwnedFd>,
    null: OwnedFd,
    oom_score_adj: i32,
    /// For messages: what `programs` and the descriptors above came from.
    program: String,
    spec: LaunchSpec,
}

/// A child that waits at its gate: in the cgroup, but with nothing of the task done yet. When this
/// goes away, be it with the whole supervisor, the gate closes for good and the child exits.
pub(super) struct Gated {
    pub(super) pid: u32,
    pidfd: OwnedFd,
    gate: OwnedFd,
    report: OwnedFd,
}

/// The supervisor's ends of the task's output, in order of descriptor 1 and 2.
pub(super) struct Output {
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

impl Plan {
    pub(super) fn new(spec: &LaunchSpec) -> Result<Plan, StartError> {
        let spec_error = |field, problem| Err(StartError::Spec { field, problem });
        let c_string = |field, text: &OsStr| {
            CString::new(text.as_bytes()).map_err(|source| StartError::Nul { field, source })
        };
        let Some(program) = spec.command.first().filter(|program| !program.is_empty()) else {
            return spec_error("command", "names no program");
        };
        if spec.env.iter().any(|(name, _)| name.is_empty() || name.contains('=')) {
            return spec_error("env", "has a name that is empty or contains `=`");
        }
        let paths = [&spec.cwd, &spec.cgroup].into_iter().chain(&spec.join).chain(&spec.birthplace);
        let absolute = paths.into_iter().all(|path| path.is_absolute());
        if !absolute {
            return spec_error("cwd, cgroup or join", "is not an absolute path");
        }
        if spec.uid == u32::MAX || spec.gid == u32::MAX {
            // -1 means "leave it as it is", which is root.
            return spec_error("uid or gid", "is 4294967295, which is no user");
        }

        let mut argv = Vec::with_capacity(spec.command.len());
        for argument in &spec.command {
            argv.push(c_string("command", argument.as_ref())?);
        }
        let mut envp = Vec::with_capacity(spec.env.len());
        for (name, value) in &spec.env {
            envp.push(c_string("env", format!("{name}={value}").as_ref())?);
        }
        let programs =
            candidates(program, &spec.env).into_iter().map(|path| c_string("command", path.as_os_str()));

        let birthplace = spec.birthplace.as_ref().unwrap_or(&spec.cgroup);
        let cgroup = open(birthplace, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut join = Vec::with_capacity(spec.join.len());
        for group in &spec.join {
            join.push(open(&group.join("cgroup.procs"), OFlags::WRONLY)?);
        }
        Ok(Plan {
            argv: StringArray::new(argv),
            envp: StringArray::new(envp),
            programs: programs.collect::<Result<_, _>>()?,
            cwd: c_string("cwd", spec.cwd.as_os_str())?,
            uid: spec.uid,
            gid: spec.gid,
            groups: spec.groups.clone(),
            cgroup,
            join,
            null: open(Path::new("/dev/null"), OFlags::RDONLY)?,
            oom_score_adj: oom_score_adj()?,
            program: program.clone(),
            spec: spec.clone(),
        })
    }

    /// Makes the child. `not_for_child` it closes before anything else: as long as it held the
    /// supervisor's lock, a dead supervisor would look alive.
    pub(super) fn spawn(&self, not_for_child: BorrowedFd<'_>) -> Result<(Gated, Output), StartError> {
        let (stdout, stdout_child) = self.output_pipe("stdout")?;
        let (stderr, stderr_child) = self.output_pipe("stderr")?;
        let (gate_child, gate) = pipe("gate")?;
        let (report, report_child) = pipe("report")?;
        let ends = ChildEnds {
            close: [not_for_child.as_raw_fd(), gate.as_raw_fd()],
            gate: gate_child.as_raw_fd(),
            report: report_child.as_raw_fd(),
            stdio: [self.null.as_raw_fd(), stdout_child.as_raw_fd(), stderr_child.as_raw_fd()],
        };
        // SAFETY: the child only runs `Plan::run`, which is async-signal-safe and never returns;
        // this process has one thread, so no lock is held by a thread that the child lacks.
        match unsafe { clone_into_cgroup(self.cgroup.as_fd()) } {
            Ok(None) => self.run(&ends),
            Ok(Some((pid, pidfd))) => Ok((Gated { pid, pidfd, gate, report }, Output { stdout, stderr })),
            Err(source) => Err(StartError::Clone { cgroup: self.spec.cgroup.clone(), source }),
        }
    }

    /// A pipe for the task's output: the end to read does not block, and the task owns the pipe,
    /// because a program that opens `/dev/stdout` opens the pipe anew, as its user.
    fn output_pipe(&self, name: &'static str) -> Result<(OwnedFd, OwnedFd), StartError> {
        let (read, write) = pipe(name)?;
        let failed = |operation| {
            move |errno: Errno| StartError::Prepare {
                operation,
                object: format!("{name} pipe"),
                source: errno.into(),
            }
        };
        rustix::fs::fcntl_setfl(&read, OFlags::NONBLOCK).map_err(failed("make non-blocking the"))?;
        let (uid, gid) = (rustix::fs::Uid::from_raw(self.uid), rustix::fs::Gid::from_raw(self.gid));
        rustix::fs::fchown(&write, Some(uid), Some(gid)).map_err(failed("give the task its"))?;
        Ok((read, write))
    }

    /// The child's side. Runs in a copy of the supervisor that has one thread and whose memory
    /// nobody else sees.
    fn run(&self, ends: &ChildEnds) -> ! {
        match self.prepare_and_exec(ends) {
            Ok(never) => match never {},
            Err((stage, errno, index)) => {
                let mut report = [0; REPORT_BYTES];
                report[..4].copy_from_slice(&(stage as u32).to_ne_bytes());
                report[4..8].copy_from_slice(&errno.to_ne_bytes());
                report[8..].copy_from_slice(&index.to_ne_bytes());
                // SAFETY: `report` is readable for its length. A report that cannot be written has
                // no reader: the supervisor is dead.
                unsafe { libc::write(ends.report, report.as_ptr().cast(), report.len()) };
                exit_now()
            }
        }
    }

    fn prepare_and_exec(&self, ends: &ChildEnds) -> Result<std::convert::Infallible, (Stage, i32, u32)> {
        for fd in ends.close {
            // SAFETY: these are the child's copies, which nothing in it uses again. In the
            // supervisor the descriptors stay open.
            unsafe { libc::close(fd) };
        }
        wait_at_gate(ends.gate);

        for (index, group) in self.join.iter().enumerate() {
            // "0" is the process that writes.
            // SAFETY: writes one byte of a static string.
            let written = unsafe { libc::write(group.as_raw_fd(), c"0".as_ptr().cast(), 1) };
            check(Stage::JoinV1, written as c_long)
                .map_err(|(stage, errno, _)| (stage, errno, index as u32))?;
        }
        // SAFETY: no memory is involved.
        check(Stage::Setsid, unsafe { libc::setsid() }.into())?;
        default_signals()?;
        for (target, source) in ends.stdio.into_iter().enumerate() {
            // SAFETY: no memory is involved. `source` is above 2: std opens 0 to 2 before `main`
            // when they are closed, so what was opened since cannot be one of them.
            check(Stage::Stdio, unsafe { libc::dup2(source, target as c_int) }.into())?;
        }
        if self.oom_score_adj != 0 {
            let reset = reset_oom_score();
            // What protects the agent must not protect the task. The other way, the task is merely
            // killed first, and to lower the value takes CAP_SYS_RESOURCE.
            if self.oom_score_adj < 0 {
                reset?;
            }
        }
        if !self.spec.is_trusted {
            self.drop_privileges()?;
        }
        // SAFETY: no memory is involved; umask cannot fail.
        unsafe { libc::umask(0o022) };
        // SAFETY: `cwd` is a C string. As the task's user, so that its permissions count.
        check(Stage::Chdir, unsafe { libc::chdir(self.cwd.as_ptr()) }.into())?;
        // Everything here is opened CLOEXEC; this also covers what a library may have opened.
        // SAFETY: no memory is involved.
        check(Stage::CloseRange, unsafe {
            libc::syscall(libc::SYS_close_range, 3 as c_uint, c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
        })?;
        Err(self.exec())
    }

    /// Ends with the task's ids, no capability in any set, and no way to get one: not by a setuid
    /// program, not by file capabilities, not by being uid 0.
    ///
    /// glibc's wrappers of the set*id family signal other threads to follow. There are none, and
    /// its records are of another process: hence the bare system calls.
    fn drop_privileges(&self) -> Result<(), (Stage, i32, u32)> {
        // SAFETY: integers only.
        check(Stage::NoNewPrivs, unsafe { prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0) })?;
        // SAFETY: integers only. NOROOT: an exec by uid 0 gives nothing.
        check(Stage::Securebits, unsafe { prctl(libc::PR_SET_SECUREBITS, SECUREBITS as c_ulong, 0) })?;
        for capability in 0..64 {
            // SAFETY: integers only. EINVAL is the first number that is not a capability.
            if unsafe { prctl(libc::PR_CAPBSET_READ, capability, 0) } < 0 {
                break;
            }
            // SAFETY: integers only.
            check(Stage::Bounding, unsafe { prctl(libc::PR_CAPBSET_DROP, capability, 0) })?;
        }
        // SAFETY: integers only.
        check(Stage::Ambient, unsafe {
            prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong, 0)
        })?;
        // SAFETY: `groups` is readable for its length.
        check(Stage::Setgroups, unsafe {
            libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr())
        })?;
        let (uid, gid) = (self.uid, self.gid);
        // SAFETY: integers only.
        check(Stage::Setresgid, unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
        // SAFETY: integers only.
        check(Stage::Setresuid, unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
        // For uid 0 the kernel has kept the sets so far; inheritable ones it keeps for everybody.
        // SAFETY: header and sets have the layout of version 3, and live until the call is over.
        check(Stage::Capset, unsafe {
            libc::syscall(libc::SYS_capset, &raw const CAP_HEADER, &raw const NO_CAPABILITIES)
        })?;
        // The agent's session keyring would stay in the task's possession, whatever its uid.
        // SAFETY: a null name asks for a new anonymous keyring.
        let keyring =
            unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, ptr::null::<c_char>()) };
        match check(Stage::Keyring, keyring) {
            // No keyrings in this kernel, or a seccomp filter that denies them to the task as well.
            Ok(()) | Err((_, libc::ENOSYS | libc::EPERM, _)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Tries the programs as `execvpe` does: what does not exist is passed over, what may not be
    /// executed is passed over and remembered. Unlike it, does not hand a file that the kernel
    /// cannot execute to a shell.
    fn exec(&self) -> (Stage, i32, u32) {
        let mut errno = libc::ENOENT;
        for program in &self.programs {
            // SAFETY: a C string and two NULL-terminated arrays of C strings, all owned by `self`.
            unsafe {
                libc::execve(program.as_ptr(), self.argv.pointers.as_ptr(), self.envp.pointers.as_ptr());
            }
            match last_errno() {
                libc::EACCES => errno = libc::EACCES,
                libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ENODEV | libc::ETIMEDOUT => {}
                other => {
                    errno = other;
                    break;
                }
            }
        }
        (Stage::Exec, errno, 0)
    }

    fn describe(&self, stage: Stage, index: u32) -> String {
        match stage {
            Stage::JoinV1 => match self.spec.join.get(index as usize) {
                Some(group) => format!("join cgroup v1 group {}", group.display()),
                None => "join a cgroup v1 group".into(),
            },
            Stage::Setgroups => format!("set the supplementary groups to {:?}", self.groups),
            Stage::Setresgid => format!("become gid {}", self.gid),
            Stage::Setresuid => format!("become uid {}", self.uid),
            Stage::Chdir => format!("enter the working directory {}", self.spec.cwd.display()),
            Stage::Exec if self.program.contains('/') => format!("execute {}", self.program),
            Stage::Exec => format!("execute {} from PATH={}", self.program, search_path(&self.spec.env)),
            Stage::OomScore => "reset oom_score_adj".into(),
            Stage::Setsid
            | Stage::Signals
            | Stage::Stdio
            | Stage::NoNewPrivs
            | Stage::Securebits
            | Stage::Bounding
            | Stage::Ambient
            | Stage::Capset
            | Stage::Keyring
            | Stage::CloseRange => format!("prepare the process ({})", stage.name()),
        }
    }
}

impl Gated {
    /// Lets the child go on, and returns once the program runs, or why it does not. A child that is
    /// killed in between counts as started: its status says the rest.
    pub(super) fn open(&self, plan: &Plan) -> Result<(), StartError> {
        let failed =
            |operation, source| StartError::Prepare { operation, object: "the child".into(), source };
        match rustix::io::retry_on_intr(|| rustix::io::write(&self.gate, &[1])) {
            // EPIPE: the child is dead already.
            Ok(_) | Err(Errno::PIPE) => {}
            Err(errno) => return Err(failed("open the gate of", errno.into())),
        }
        let mut report = [0; REPORT_BYTES];
        let got = rustix::io::retry_on_intr(|| rustix::io::read(&self.report, &mut report))
            .map_err(|errno| failed("read the report of", errno.into()))?;
        if got < REPORT_BYTES {
            return Ok(());
        }
        let word = |at: usize| [report[at], report[at + 1], report[at + 2], report[at + 3]];
        let stage = u32::from_ne_bytes(word(0));
        // An unknown number cannot come from `run`; were it to, the last step is the likeliest.
        let stage = Stage::ALL.into_iter().find(|known| *known as u32 == stage).unwrap_or(Stage::Exec);
        Err(StartError::Child {
            stage,
            what: plan.describe(stage, u32::from_ne_bytes(word(8))),
            source: io::Error::from_raw_os_error(i32::from_ne_bytes(word(4))),
        })
    }

    /// Ends a child that runs no program, so that its cgroup can be removed on return. By signal,
    /// because in a frozen cgroup it would not see the gate close.
    pub(super) fn end(self) {
        // Neither fails on a child that is not yet reaped.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = rustix::io::retry_on_intr(|| {
            rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED)
        });
    }
}

/// Descriptors of the child, as numbers: their owners are in the supervisor.
struct ChildEnds {
    close: [RawFd; 2],
    gate: RawFd,
    report: RawFd,
    stdio: [RawFd; 3],
}

/// `struct clone_args` up to `cgroup`, CLONE_ARGS_SIZE_VER2.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88);

const CLONE_PIDFD: u64 = 0x1000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `fork` into a cgroup. `None` in the child.
///
/// # Safety
///
/// The child is a copy of this thread alone. It may only do what is async-signal-safe, and must
/// end in `execve` or `_exit`.
unsafe fn clone_into_cgroup(cgroup: BorrowedFd<'_>) -> io::Result<Option<(u32, OwnedFd)>> {
    let mut pidfd: c_int = -1;
    let mut args = CloneArgs {
        flags: CLONE_PIDFD | CLONE_INTO_CGROUP,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: `args` has the kernel's layout and says its size; `pidfd` outlives the call. Without
    // CLONE_VM and a stack, the child returns here on its own copy of this one. The rest is the
    // caller's promise.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match pid {
        0 => Ok(None),
        ..0 => Err(io::Error::last_os_error()),
        // SAFETY: on success the kernel has put a new descriptor there, which nobody else owns.
        1.. => Ok(Some((pid as u32, unsafe { OwnedFd::from_raw_fd(pidfd) }))),
    }
}

/// Returns once the supervisor has recorded the start. If it died instead, so does the child.
fn wait_at_gate(gate: RawFd) {
    let mut byte = 0_u8;
    loop {
        // SAFETY: one byte is writable there.
        match unsafe { libc::read(gate, (&raw mut byte).cast(), 1) } {
            1 => return,
            -1 if last_errno() == libc::EINTR => {}
            _ => exit_now(),
        }
    }
}

/// Every signal back to its default, none blocked: dispositions "ignored" and the mask would
/// outlive `execve`. Not through libc, which keeps two of the signals to itself.
fn default_signals() -> Result<(), (Stage, i32, u32)> {
    const SIGNALS: c_int = 64;
    const SET_BYTES: usize = 8;
    /// `struct kernel_sigaction` with SIG_DFL, no flags and an empty mask.
    static DEFAULT: [u64; 4] = [0; 4];
    for signal in 1..=SIGNALS {
        if signal != libc::SIGKILL && signal != libc::SIGSTOP {
            // SAFETY: the new action is at least as long as the kernel's structure, and the old
            // one is not asked for.
            check(Stage::Signals, unsafe {
                libc::syscall(
                    libc::SYS_rt_sigaction,
                    signal,
                    &raw const DEFAULT,
                    ptr::null::<u64>(),
                    SET_BYTES,
                )
            })?;
        }
    }
    // SAFETY: as above; the set is 8 bytes.
    check(Stage::Signals, unsafe {
        let (empty, old) = (&raw const DEFAULT, ptr::null::<u64>());
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, empty, old, SET_BYTES)
    })
}

const OOM_SCORE_ADJ: &CStr = c"/proc/self/oom_score_adj";

fn reset_oom_score() -> Result<(), (Stage, i32, u32)> {
    // SAFETY: a C string. Opened here, because in the supervisor `self` is another.
    let fd = unsafe { libc::open(OOM_SCORE_ADJ.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    check(Stage::OomScore, fd.into())?;
    // SAFETY: writes one byte of a static string.
    check(Stage::OomScore, unsafe { libc::write(fd, c"0".as_ptr().cast(), 1) } as c_long)
}

fn check(stage: Stage, result: c_long) -> Result<(), (Stage, i32, u32)> {
    if result < 0 { Err((stage, last_errno(), 0)) } else { Ok(()) }
}

fn last_errno() -> i32 {
    // SAFETY: the location is this thread's, always.
    unsafe { *libc::__errno_location() }
}

fn exit_now() -> ! {
    // SAFETY: runs no handler and no destructor: they belong to the supervisor. The status is of
    // no interest, the report was the message.
    unsafe { libc::_exit(127) }
}

/// # Safety
///
/// `option` must take integers, not pointers.
unsafe fn prctl(option: c_int, first: c_ulong, second: c_ulong) -> c_long {
    // SAFETY: integers only, by the caller's promise; all five arguments are given because some
    // options insist on zeros.
    unsafe { libc::prctl(option, first, second, 0 as c_ulong, 0 as c_ulong) }.into()
}

const SECUREBITS: c_int = libc::SECBIT_NOROOT
    | libc::SECBIT_NOROOT_LOCKED
    | libc::SECBIT_KEEP_CAPS_LOCKED
    | libc::SECBIT_NO_CAP_AMBIENT_RAISE
    | libc::SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;

const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;

/// `struct __user_cap_header_struct`: _LINUX_CAPABILITY_VERSION_3, this process.
static CAP_HEADER: [u32; 2] = [0x2008_0522, 0];
/// Two `struct __user_cap_data_struct`: effective, permitted, inheritable.
static NO_CAPABILITIES: [u32; 6] = [0; 6];

fn pipe(name: &'static str) -> Result<(OwnedFd, OwnedFd), StartError> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| StartError::Prepare {
        operation: "make the",
        object: format!("{name} pipe"),
        source: errno.into(),
    })
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, StartError> {
    rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        StartError::Prepare { operation: "open", object: path.display().to_string(), source: errno.into() }
    })
}

fn oom_score_adj() -> Result<i32, StartError> {
    let failed = |source| StartError::Prepare {
        operation: "read",
        object: OOM_SCORE_ADJ.to_string_lossy().into_owned(),
        source,
    };
    let text = File::open(OsStr::from_bytes(OOM_SCORE_ADJ.to_bytes()))
        .and_then(io::read_to_string)
        .map_err(failed)?;
    text.trim().parse().map_err(|_| failed(io::ErrorKind::InvalidData.into()))
}

fn search_path(env: &[(String, String)]) -> &str {
    // The first, which is the one that `getenv` finds.
    env.iter().find(|(name, _)| name == "PATH").map_or(DEFAULT_PATH, |(_, path)| path)
}

/// Where `program` may be. An empty element of PATH is the working directory.
fn candidates(program: &str, env: &[(String, String)]) -> Vec<PathBuf> {
    if program.contains('/') {
        return vec![program.into()];
    }
    search_path(env).split(':').map(|directory| Path::new(directory).join(program)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_in_the_tasks_path() {
        let env = |path: &str| vec![("HOME".into(), "/".into()), ("PATH".into(), path.into())];
        let found = |program, env: &[(String, String)]| {
            candidates(program, env).iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(found("sh", &env("/a:/b/")), ["/a/sh", "/b/sh"]);
        assert_eq!(found("sh", &env(":/b")), ["sh", "/b/sh"]);
        assert_eq!(found("./sh", &env("/a")), ["./sh"]);
        assert_eq!(found("sh", &[]), ["/usr/local/bin/sh", "/usr/bin/sh", "/bin/sh"]);
    }

    #[test]
    fn a_specification_that_no_process_can_have_is_refused() {
        let good = LaunchSpec {
            execution: "t.1".parse().unwrap(),
            command: vec!["/bin/true".into()],
            env: vec![],
            cwd: "/".into(),
            uid: 1,
            gid: 1,
            groups: vec![],
            cgroup: "/sys/fs/cgroup".into(),
            join: vec![],
            birthplace: None,
            is_trusted: false,
            afterwards: Vec::new(),
            supervisor_groups: Vec::new(),
            log_segment_bytes: 1,
            lease: None,
        };
        let stage = |spec: LaunchSpec| Plan::new(&spec).err().map(|error| error.stage());
        assert_eq!(stage(good.clone()), None);
        for bad in [
            LaunchSpec { command: vec![], ..good.clone() },
            LaunchSpec { command: vec!["".into()], ..good.clone() },
            LaunchSpec { command: vec!["a\0b".into()], ..good.clone() },
            LaunchSpec { env: vec![("A=B".into(), "".into())], ..good.clone() },
            LaunchSpec { env: vec![("A".into(), "\0".into())], ..good.clone() },
            LaunchSpec { cwd: "relative".into(), ..good.clone() },
            LaunchSpec { uid: u32::MAX, ..good.clone() },
        ] {
            assert_eq!(stage(bad.clone()), Some("spec"), "{bad:?}");
        }
    }
}
