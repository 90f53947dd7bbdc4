//! The programs, a file per subject.

mod cpu;
mod lifecycle;
mod net;
mod pacing;
mod uplink;
