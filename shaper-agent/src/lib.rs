//! The agent of one node: it turns decisions into cgroup files and BPF maps, and keeps what it did
//! undoable. `main.rs` only wires; [`kernel`] holds facts and application, [`actuate`] is the one
//! place that changes a limit, [`node`] owns the tasks.

pub mod actor;
pub mod actuate;
pub mod adoption;
pub mod calibrate;
pub mod config;
pub mod contact;
pub mod containers;
pub mod durable;
#[doc(hidden)]
pub mod fuzz;
pub mod gpu;
pub mod ground;
pub mod kernel;
pub mod launch;
pub mod lease;
pub mod ledger;
pub mod manager;
pub mod meter;
pub mod metrics;
pub mod node;
pub mod open_files;
pub mod opener;
pub mod reclaim;
pub mod record;
pub mod service;
pub mod session;
pub mod waiter;
pub mod warden;
