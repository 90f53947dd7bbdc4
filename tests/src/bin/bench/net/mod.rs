//! How well the network is shaped, and what that costs: by a real agent, and by the qdiscs that do the same, in turns on
//! the same cable between two network namespaces.

mod attached;
mod bed;
mod ingress;
mod latency;
mod packet;
mod ping;
mod rates;
mod traffic;

use std::path::Path;

use anyhow::{Result, bail};
use shaper_core::units::BitsPerSec;

use crate::{Plan, report::Report};

pub(crate) use attached::measure as attached;
pub(crate) use ingress::measure as ingress;
pub(crate) use latency::measure as latency;
pub(crate) use packet::measure as packet;

const MBIT: u64 = 1_000_000;

/// Loads of this subject.
pub(crate) fn load(kind: &str, arguments: &[&str]) -> Result<()> {
    match (kind, arguments) {
        ("ping", [address, file, pause]) => ping::ping(address, Path::new(file), pause.parse()?),
        ("pong", [address]) => ping::pong(address),
        ("scatter", [address, sockets, groups @ ..]) => packet::scatter(address, sockets.parse()?, groups),
        _ => bail!("there is no load {kind} {arguments:?}"),
    }
}

/// Every load at a rate of so many Mbit/s. Where all is to be looked at quickly, two rates do.
pub(crate) fn at<const MBITS: u64>(plan: Plan, report: &mut Report) -> Result<()> {
    if plan.is_quick && plan.is_whole && ![10, 1000].contains(&MBITS) {
        return Ok(());
    }
    rates::measure(plan, report, BitsPerSec(MBITS * MBIT))
}
