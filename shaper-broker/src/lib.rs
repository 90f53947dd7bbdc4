//! The broker of a cluster. [`reactor`] decides, pure and alone; [`store`] keeps rows; [`actor`] owns
//! both in one thread and lets nothing out that is not durable; [`service`] and [`session`] are the two
//! sides that gRPC shows, to clients and to agents.
//!
//! The broker cannot name a cgroup, a BPF map or a process: what happens on a node is its agent's.
#![forbid(unsafe_code)]

pub mod actor;
pub mod config;
pub mod enrolment;
mod life;
pub mod metrics;
pub mod reactor;
mod ready;
pub mod scale;
pub mod service;
pub mod session;
pub mod standing;
pub mod store;
pub mod upkeep;
pub mod web;
pub mod wire;

pub(crate) use shaper_proto::failpoint;
