//! Processes that are nobody's children here: tasks.

use std::{
    fs,
    os::fd::OwnedFd,
    process::{Child, Command},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
    thread::{CpuSet, sched_setaffinity},
};

use crate::time::PATIENCE;

/// Processes of a test's own, which end with this.
pub struct Children(pub Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended is waited for all the same.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Lets the first thread of a process run on one CPU only.
pub fn pin(pid: u32, cpu: usize) {
    let mut there = CpuSet::new();
    there.set(cpu);
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process has a number");
    sched_setaffinity(Some(pid), &there).expect("it runs");
}

/// Starts `command` as the process `pid`, which must be free. Other work of this machine may take the number first: then it
/// is tried again.
pub fn spawn_as(pid: u32, command: &mut Command) -> Child {
    for _ in 0..1000 {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string())
            .expect("this kernel takes it, of root");
        let mut child = command.spawn().expect("it can be started");
        if child.id() == pid {
            return child;
        }
        let _ = child.kill();
        child.wait().expect("a child can be waited for");
    }
    panic!("the number {pid} was taken each time");
}

/// A process, which cannot be mistaken for a later one of the same id.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    /// The process `pid`, which must be there.
    pub fn open(pid: u32) -> Process {
        let raw = Pid::from_raw(pid.cast_signed()).expect("a process id is positive");
        let pidfd = pidfd_open(raw, PidfdFlags::empty());
        Process { pid, pidfd: pidfd.unwrap_or_else(|error| panic!("process {pid}: {error}")) }
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        !self.has_ended_within(Duration::ZERO)
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait_for_end(&self) {
        assert!(self.has_ended_within(PATIENCE), "process {} has not ended within {PATIENCE:?}", self.pid);
    }

    fn has_ended_within(&self, time: Duration) -> bool {
        let time = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() };
        let ended = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&time));
        ended.expect("a pidfd can be polled") > 0
    }

    /// Ends it. One that has ended is fine.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Sends it a signal. One that has ended is fine.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// The process that it would be reaped by: of a task, its supervisor.
    pub fn parent(&self) -> Process {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("the process is there");
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        Process::open(parent.and_then(|pid| pid.trim().parse().ok()).expect("a process has a parent"))
    }

    /// The cgroup in every hierarchy, as `/proc` shows it.
    pub fn cgroups(&self) -> String {
        fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).expect("the process is there")
    }

    /// CPU time of its main thread so far, by the scheduler's own count.
    pub fn cpu_time(&self) -> Duration {
        let text = fs::read_to_string(format!("/proc/{}/schedstat", self.pid)).expect("the process is there");
        let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
        Duration::from_nanos(nanos.expect("schedstat begins with a time"))
    }
}
