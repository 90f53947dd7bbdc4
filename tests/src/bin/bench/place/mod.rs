//! Placement: how fast, and how well it packs.

mod churn;
mod data;
mod packing;
mod preempting;
mod replay;
mod streams;
mod waiting;

pub(crate) use churn::measure as churn;
pub(crate) use data::Random;
pub(crate) use packing::measure as packing;
pub(crate) use preempting::measure as preempting;
pub(crate) use replay::measure as replay;
pub(crate) use waiting::measure as waiting;
