//! The programs, a file per subject.

mod cpu;
mod io;
mod lifecycle;
mod net;
mod pacing;
mod uplink;
