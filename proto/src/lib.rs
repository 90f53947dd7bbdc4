//! shaper's gRPC API: the wire types generated from `shaper/v1/*.proto`, and [`convert`], the only
//! place where they become domain types and back.
#![cfg_attr(not(feature = "server"), forbid(unsafe_code))]
#![cfg_attr(feature = "server", deny(unsafe_code))]

pub mod convert;
#[cfg(feature = "server")]
pub mod daemon;
pub mod failpoint;
#[cfg(feature = "server")]
pub mod notify;
#[cfg(feature = "server")]
pub mod peer;

/// The compiled protos, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shaper.v1.bin"));

/// Generated from `shaper/v1`.
#[allow(clippy::allow_attributes_without_reason, unreachable_pub, reason = "generated code")]
#[allow(clippy::large_enum_variant, clippy::unwrap_used, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("shaper.v1");
}

/// Protocols of others: how nodes are asked for.
#[allow(clippy::allow_attributes_without_reason, unreachable_pub, missing_docs, reason = "generated code")]
#[allow(clippy::large_enum_variant, clippy::unwrap_used, reason = "generated code")]
pub mod scale {
    /// Generated from `scale/externalgrpc.proto`: the provider of nodes that the broker calls.
    pub mod externalgrpc {
        tonic::include_proto!("clusterautoscaler.cloudprovider.v1.externalgrpc");
    }
    /// Generated from `scale/keda.proto`: what KEDA calls.
    pub mod keda {
        tonic::include_proto!("externalscaler");
    }
    /// Generated from `scale/node.proto`: what an empty node has.
    pub mod kubernetes {
        tonic::include_proto!("kubernetes");
    }
}
