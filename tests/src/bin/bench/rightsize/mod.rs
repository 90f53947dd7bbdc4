//! Rightsizing: how well limits follow use, beside the rule of Kubernetes' Vertical Pod Autoscaler.

mod cost;
mod memory;
mod plot;
mod replay;
pub(crate) mod series;

pub(crate) use cost::measure as cost;
pub(crate) use memory::measure as memory;
pub(crate) use replay::measure as cpu;
