//! The kernel's side of the agent: facts and application. What is decided is decided elsewhere.

pub mod bpf;
pub mod btf;
pub mod cgroup;
pub mod disks;
pub mod features;
pub mod hierarchy;
pub mod ingress;
pub mod mapped;
mod netlink;
pub mod netns;
pub mod pace_table;
pub mod process;
pub mod qdisc;
mod sys;
pub mod v1;
pub mod writers;

pub(crate) use netlink::open as open_netlink;
pub(crate) use sys::{create_iterator as open_walk, leave_network};
