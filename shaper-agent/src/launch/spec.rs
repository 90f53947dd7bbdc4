//! What is asked of a supervisor, and what it records. These files outlive the agent that wrote or
//! will read them, so a field may be added with a default, never renamed or removed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use shaper_core::id::ExecutionId;

/// `launch.json`: one attempt of a task, written by the agent before it starts the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// Which attempt of which task.
    pub execution: ExecutionId,
    /// The program and its arguments. A program without a `/` is looked for in the `PATH` of `env`.
    pub command: Vec<String>,
    /// The whole environment; nothing is inherited.
    pub env: Vec<(String, String)>,
    /// Working directory, entered with the task's credentials.
    pub cwd: PathBuf,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The task's cgroup v2 directory, in which it is born …
    pub cgroup: PathBuf,
    /// … unless it is in this one, below that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub birthplace: Option<PathBuf>,
    /// It is a program of the node's own, which keeps what the supervisor may do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_trusted: bool,
    /// What the supervisor runs once the task is over, with the task's environment and as itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub afterwards: Vec<String>,
    /// cgroup v1 directories that the task enters before it has its own credentials.
    pub join: Vec<PathBuf>,
    /// cgroup directories, of v2 and v1, that the supervisor itself enters before anything else.
    #[serde(default)]
    pub supervisor_groups: Vec<PathBuf>,
    /// Size at which a log segment ends; the newest two are kept.
    #[serde(default = "default_log_segment_bytes")]
    pub log_segment_bytes: u64,
    /// How long the task goes on without the broker; `None`: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
}

/// How long a task goes on without the broker. The supervisor ends it then, with all that is in its cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// The file that says when the broker was last heard of ([`crate::contact`]).
    pub contact: PathBuf,
    /// How long from there.
    pub seconds: u32,
}

/// [`LaunchSpec::log_segment_bytes`] when nobody asks for another.
pub const DEFAULT_LOG_SEGMENT_BYTES: u64 = 16 << 20;

fn default_log_segment_bytes() -> u64 {
    DEFAULT_LOG_SEGMENT_BYTES
}

/// `supervisor.json`: who supervises the attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Supervisor {
    /// Its process id.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`, which tells it from a later process of the same id.
    pub start_time: u64,
}

/// `started.json`: the task has a process. On the disk before that process may execute anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Started {
    /// Process id of the task's main process.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
    /// When, in Unix nanoseconds.
    pub at: u64,
}

/// `exit.json`: how the attempt ended. Final.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exit {
    /// How the main process ended.
    pub status: ExitStatus,
    /// When, in Unix nanoseconds.
    pub at: u64,
    /// What the main process and the children that it waited for used.
    pub usage: Usage,
    /// It was ended, or not started, because its [`Lease`] was over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lease_over: bool,
}

/// How a main process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// The program was never executed.
    NotStarted {
        /// The step that failed.
        stage: String,
        /// What failed, why, and what to do about it.
        error: String,
        /// The kernel's reason, when the kernel refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        errno: Option<i32>,
    },
}

/// The stage of [`ExitStatus::NotStarted`] in which the program itself is executed.
pub(super) const STAGE_EXEC: &str = "exec";

impl ExitStatus {
    /// The status as a shell would give it: 128 + n for a signal, 127 for a program that does not
    /// exist, 126 for one that could not be started.
    pub fn code(&self) -> i32 {
        match self {
            ExitStatus::Code(code) => *code,
            ExitStatus::Signal(signal) => 128 + signal,
            ExitStatus::NotStarted { stage, errno: Some(libc::ENOENT), error: _ } if stage == STAGE_EXEC => {
                127
            }
            ExitStatus::NotStarted { .. } => 126,
        }
    }
}

/// Resources used, as `wait4` reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// CPU time in user mode, in microseconds.
    pub user_us: u64,
    /// CPU time in the kernel, in microseconds.
    pub system_us: u64,
    /// Largest resident set of any one of the processes, in bytes.
    pub max_rss_bytes: u64,
}

/// The one line on the supervisor's standard output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Readiness {
    /// The program runs.
    Started(Started),
    /// It does not, and will not by this supervisor.
    Failed(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_a_shell() {
        let not_started = |stage: &str, errno| ExitStatus::NotStarted {
            stage: stage.into(),
            error: String::new(),
            errno: Some(errno),
        };
        assert_eq!(ExitStatus::Code(3).code(), 3);
        assert_eq!(ExitStatus::Signal(9).code(), 137);
        assert_eq!(not_started("exec", libc::ENOENT).code(), 127);
        assert_eq!(not_started("exec", libc::EACCES).code(), 126);
        assert_eq!(not_started("chdir", libc::ENOENT).code(), 126);
    }

    #[test]
    fn the_files_keep_their_form() {
        let exit = r#"{"status":{"code":3},"at":7,"usage":{"user_us":1,"system_us":2,"max_rss_bytes":4096}}"#;
        let value: Exit = serde_json::from_str(exit).unwrap();
        assert_eq!(value.status, ExitStatus::Code(3));
        assert_eq!(serde_json::to_string(&value).unwrap(), exit);

        let older = r#"{"not_started":{"stage":"chdir","error":"no"}}"#;
        assert_eq!(serde_json::from_str::<ExitStatus>(older).unwrap().code(), 126);
        assert!(serde_json::from_str::<Supervisor>(r#"{"pid":1,"start_time":2,"more":3}"#).is_err());

        let line = r#"{"started":{"pid":1,"start_time":2,"at":3}}"#;
        let started = Started { pid: 1, start_time: 2, at: 3 };
        assert_eq!(serde_json::from_str::<Readiness>(line).unwrap(), Readiness::Started(started));
    }
}
