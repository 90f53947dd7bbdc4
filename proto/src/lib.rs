//! shaper's gRPC API: the wire types generated from `shaper/v1/*.proto`, and [`convert`], the only
//! place where they become domain types and back.
#![forbid(unsafe_code)]

pub mod convert;

/// Generated from `shaper/v1`.
#[allow(
    clippy::allow_attributes_without_reason,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("shaper.v1");
}
