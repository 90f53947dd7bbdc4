//! What both daemons tell Prometheus. [`table`] has every metric with its type, unit, meaning and labels; an
//! [`Exposition`] is what a daemon has to say at one moment, by that table alone; [`listen`] is where it is fetched.
//!
//! [`traces`] go to OpenTelemetry.
//!
//! The table is also [docs/metrics.md](../../docs/metrics.md), which a test compares with it.
#![forbid(unsafe_code)]

mod durations;
pub mod listen;
mod process;
pub mod table;
mod text;
pub mod traces;

pub use self::{
    durations::Durations,
    process::{BUILD, build_and_process},
    table::{Family, Kind, Unit},
    text::{Exposition, Format, Value},
};
