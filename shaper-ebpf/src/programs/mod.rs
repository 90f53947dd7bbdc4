//! The programs, a file per subject.

mod cpu;
mod device;
mod ingress;
mod io;
mod lifecycle;
mod net;
mod pacing;
mod uplink;
