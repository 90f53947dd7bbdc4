//! What is known of a task: the shape in which the agent reports it and every client shows it.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    document::fits_label,
    id::{ExecutionId, InvalidTaskId, TaskId},
    idle,
    limits::{Limit, Limits},
    shrink,
    spec::DEFAULT_NAMESPACE,
    units::Bytes,
};

/// Nanoseconds since the Unix epoch.
pub type UnixNanos = u64;

/// Whom a task belongs to: the peer that submitted it, as the kernel named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// How a task came under management.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// shaper started it.
    Launched {
        /// Program and arguments.
        command: Vec<String>,
    },
    /// It ran before; shaper was asked to manage its cgroup.
    Adopted,
    /// A process had itself put into a cgroup of its own, to go on there as this command (`shaper exec`).
    Entered {
        /// Program and arguments, as that process said.
        command: Vec<String>,
    },
}

/// What a task is an execution of: the key under which history can be kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// What is executed, such as the name of a function.
    pub name: TaskId,
    /// In which namespace.
    pub namespace: TaskId,
    /// Labels; `framework` says whose name it is.
    pub labels: BTreeMap<String, String>,
}

/// Most labels of a workload.
const LABELS_MAX: usize = 32;

/// Why a workload was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWorkload {
    /// The name or the namespace.
    #[error("as the {field} of a workload: {source}")]
    Name {
        /// Which of them.
        field: &'static str,
        /// What is wrong with it.
        source: InvalidTaskId,
    },
    /// A label.
    #[error(
        "`{}` cannot be in a label: use up to 63 characters out of a-z, A-Z, 0-9, `-`, `_`, `.` and `/`; a name has \
         at least one", .0.escape_default()
    )]
    Label(String),
    /// Too many of them.
    #[error("{0} labels are too many: {LABELS_MAX} is the most")]
    Labels(usize),
}

impl Workload {
    /// Checks what somebody says; an empty namespace is the usual one.
    pub fn new(
        name: &str,
        namespace: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Workload, InvalidWorkload> {
        let namespace = if namespace.is_empty() { DEFAULT_NAMESPACE } else { namespace };
        let named =
            |field, text: &str| text.parse().map_err(|source| InvalidWorkload::Name { field, source });
        if labels.len() > LABELS_MAX {
            return Err(InvalidWorkload::Labels(labels.len()));
        }
        for (name, value) in &labels {
            for (text, fits) in [(name, fits_label(name) && !name.is_empty()), (value, fits_label(value))] {
                if !fits {
                    return Err(InvalidWorkload::Label(text.chars().take(64).collect()));
                }
            }
        }
        Ok(Workload { name: named("name", name)?, namespace: named("namespace", namespace)?, labels })
    }
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It never ran: the stage at which its start failed, and why.
    NotStarted {
        /// What was being done.
        stage: String,
        /// What went wrong.
        error: String,
        /// The code that a shell would report: 127 for a command that was not found, else 126.
        code: i32,
    },
    /// Nobody saw how it ended: its supervisor was killed, or it never had one.
    Unknown,
}

impl ExitStatus {
    /// The code that a shell would report: 128 + n for signal n; 125 when nobody saw it.
    pub fn shell_code(&self) -> i32 {
        match self {
            ExitStatus::Code(code) => *code,
            // Whoever tells of it may say anything.
            ExitStatus::Signal(signal) => signal.saturating_add(128),
            ExitStatus::NotStarted { code, .. } => *code,
            ExitStatus::Unknown => 125,
        }
    }
}

/// Where a task is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its processes run.
    Running,
    /// Its main process has ended.
    Ended {
        /// How.
        status: ExitStatus,
        /// When.
        at: UnixNanos,
    },
}

/// What enforces one limit of a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enforcement {
    /// `cpu`, `cpu_weight`, `memory` or `net_egress`.
    pub resource: String,
    /// The mechanism, by its usual name, such as `cpu.max` or `tcp-pacing`.
    pub mechanism: String,
    /// What the mechanism holds now, as read back from it.
    pub in_force: String,
}

/// Packets and bytes on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes on the wire.
    pub bytes: u64,
    /// Packets on the wire.
    pub packets: u64,
}

/// What a task has used since it came under management, counted in the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// When this was read: `CLOCK_MONOTONIC`, ns. Two reports give exact rates.
    pub at_monotonic_ns: u64,
    /// CPU time, ns.
    pub cpu_time_ns: u64,
    /// Sent by its sockets.
    pub egress: Traffic,
    /// Received by its sockets.
    pub ingress: Traffic,
    /// Of what it sent: what left through the node's uplinks.
    pub uplink_egress: Traffic,
    /// Memory charged to it now, or the most that ever was once it has ended, bytes; `None` where no memory
    /// controller is.
    pub memory_bytes: Option<u64>,
    /// CPU over the last sample, millicores.
    pub cpu_now_millicores: u64,
    /// Sent over the last sample, bits a second on the wire.
    pub egress_now_bps: u64,
    /// Received over the last sample, bits a second on the wire.
    pub ingress_now_bps: u64,
    /// What it may send now, bits a second on the wire, where the node divides its network.
    #[serde(default)]
    pub egress_granted_bps: Option<u64>,
    /// How long its CPU limit stopped it in all, ns; where a group has threads on several CPUs, each counts.
    #[serde(default)]
    pub cpu_throttled_ns: Option<u64>,
}

/// What is remembered of it when the kernel has killed processes of a task for want of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OomKill {
    /// When that was noticed last.
    pub at: UnixNanos,
    /// The memory limit then.
    pub limit: Limit<Bytes>,
    /// The most that had been in use, where the kernel counts it: what it wanted is more.
    pub peak: Option<Bytes>,
    /// How many processes, in all.
    pub kills: u64,
}

impl fmt::Display for OomKill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OomKill { at: _, limit, peak, kills } = self;
        write!(f, "killed by OOM at {limit}")?;
        if let Some(peak) = peak {
            write!(f, ", peak {peak}")?;
        }
        if *kills > 1 {
            write!(f, ", {kills} processes in all")?;
        }
        f.write_str(": it needs a higher memory limit")
    }
}

/// A task as the agent reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskStatus {
    /// Its id.
    pub task_id: TaskId,
    /// Which run of it this is.
    pub attempt: u32,
    /// Whom it belongs to.
    pub owner: Owner,
    /// User and group that its processes run as.
    pub runs_as: Owner,
    /// How it came under management.
    pub origin: Origin,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its main process, while it runs.
    pub pid: Option<u32>,
    /// Its cgroup in the v2 hierarchy.
    pub cgroup: String,
    /// When it came under management.
    pub created_at: UnixNanos,
    /// What it may use.
    pub limits: Limits,
    /// What holds each limit, as read back.
    pub enforcement: Vec<Enforcement>,
    /// What it has used.
    pub usage: Usage,
    /// Its memory limit on its way below use, or how the last such ended.
    pub shrink: Option<shrink::Status>,
    /// What idle memory was taken from it; `None` where that is not done.
    pub idle: Option<idle::Status>,
    /// Whether the kernel has killed for want of memory.
    pub oom_kill: Option<OomKill>,
    /// What its reader ought to know: degradations, with their reason.
    pub notes: Vec<String>,
    /// What it is an execution of, where somebody has said.
    #[serde(default)]
    pub workload: Option<Workload>,
    /// The rule by which it was adopted; `None`: somebody asked for it.
    #[serde(default)]
    pub adopted_by: Option<TaskId>,
}

impl TaskStatus {
    /// The run that this is.
    pub fn execution(&self) -> ExecutionId {
        ExecutionId { task: self.task_id.clone(), attempt: self.attempt }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shells_code_is_one_whatever_a_node_says() {
        assert_eq!(ExitStatus::Signal(9).shell_code(), 137);
        assert_eq!(ExitStatus::Signal(i32::MAX).shell_code(), i32::MAX);
        assert_eq!(ExitStatus::Unknown.shell_code(), 125);
    }

    fn labels(name: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(name.to_owned(), value.to_owned())])
    }

    #[test]
    fn a_workload_has_names_that_are_safe_anywhere() {
        let workload = Workload::new("etl.load", "", labels("framework", "ray")).unwrap();
        assert_eq!((workload.name.as_str(), workload.namespace.as_str()), ("etl.load", DEFAULT_NAMESPACE));
        for (name, namespace) in [("", "a"), ("../a", "a"), ("a", "a/b"), ("a\n", "a")] {
            let refused = Workload::new(name, namespace, BTreeMap::new());
            assert!(matches!(refused, Err(InvalidWorkload::Name { .. })), "{refused:?}");
        }
        for (name, value) in [("", "ray"), ("a b", "ray"), ("a", "\u{1b}[2J")] {
            let refused = Workload::new("a", "", labels(name, value));
            assert!(matches!(refused, Err(InvalidWorkload::Label(_))), "{refused:?}");
        }
        let many = (0..=LABELS_MAX).map(|number| (format!("l{number}"), String::new())).collect();
        assert_eq!(Workload::new("a", "", many), Err(InvalidWorkload::Labels(LABELS_MAX + 1)));
    }
}
