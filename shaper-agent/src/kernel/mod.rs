//! The kernel's side of the agent: facts and application. What is decided is decided elsewhere.

pub mod bpf;
pub mod btf;
pub mod cgroup;
pub mod disks;
pub mod features;
pub mod hierarchy;
pub mod mapped;
pub mod netns;
pub mod pace_table;
pub mod qdisc;
pub mod sched_ext;
#[cfg(feature = "scx")]
pub mod scx;
mod sys;
pub mod v1;
pub mod writers;
