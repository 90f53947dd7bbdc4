//! shaper's vocabulary and its decisions. Pure: nothing here does IO, reads a clock or draws a
//! random number; observations and time are arguments. `clippy.toml` in this folder holds it to that.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod adjust;
pub mod adopt;
pub mod burst;
pub mod doctor;
pub mod document;
pub mod gpu;
pub mod id;
pub mod idle;
pub mod io;
pub mod ledger;
pub mod limits;
pub mod place;
pub mod policy;
pub mod profile;
pub mod queue;
pub mod scale;
pub mod share;
pub mod shrink;
pub mod snapshot;
pub mod spec;
pub mod task;
pub mod units;
