//! What a container asks for itself: annotations of its OCI configuration, `shaper/limit.cpu: 500m`.

use std::collections::BTreeMap;

use crate::{
    limits::{Limit, Limits},
    units::{BitsPerSec, Bytes, Iops, Millicores, ParseQuantityError},
};

/// What the names of ours begin with.
pub const PREFIX: &str = "shaper/";

const NAMES: &str =
    "shaper/limit.cpu, shaper/limit.memory, shaper/limit.net, shaper/limit.net_in, shaper/limit.io";

/// Why an annotation says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAnnotation {
    /// Its name.
    #[error("there is no annotation `{}`; there are {NAMES}", .0.escape_debug())]
    Name(String),
    /// Its value.
    #[error("annotation {name}: {source}")]
    Value {
        /// Of which.
        name: String,
        /// What it is not.
        source: ParseQuantityError,
    },
}

/// The ceilings that a container has asked for; of annotations that are not ours nothing is said.
pub fn annotated(annotations: &BTreeMap<String, String>) -> Result<Limits, InvalidAnnotation> {
    let mut limits = Limits::default();
    for (name, value) in annotations.iter().filter(|(name, _)| name.starts_with(PREFIX)) {
        let parsed = match name.trim_start_matches(PREFIX) {
            "limit.cpu" => Millicores::parse(value).map(|at| limits.cpu = Limit::At(at)),
            "limit.memory" => Bytes::parse(value).map(|at| limits.memory = Limit::At(at)),
            "limit.net" => BitsPerSec::parse(value).map(|at| limits.net_egress = Limit::At(at)),
            "limit.net_in" => BitsPerSec::parse(value).map(|at| limits.net_ingress = Limit::At(at)),
            "limit.io" => Iops::parse(value).map(|at| limits.storage_io = Limit::At(at)),
            _ => return Err(InvalidAnnotation::Name(name.clone())),
        };
        parsed.map_err(|source| InvalidAnnotation::Value { name: name.clone(), source })?;
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(annotations: &[(&str, &str)]) -> Result<Limits, InvalidAnnotation> {
        annotated(&annotations.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
    }

    #[test]
    fn ceilings_are_read_and_what_is_others_is_let_be() {
        let limits = said(&[
            ("io.kubernetes.cri.container-name", "web"),
            ("shaper/limit.cpu", "500m"),
            ("shaper/limit.io", "300"),
            ("shaper/limit.memory", "512Mi"),
            ("shaper/limit.net", "100mbit"),
            ("shaper/limit.net_in", "1gbit"),
        ]);
        let expected = Limits {
            cpu: Limit::At(Millicores(500)),
            memory: Limit::At(Bytes(512 << 20)),
            net_egress: Limit::At(BitsPerSec(100_000_000)),
            net_ingress: Limit::At(BitsPerSec(1_000_000_000)),
            storage_io: Limit::At(Iops(300)),
            ..Limits::default()
        };
        assert_eq!(limits, Ok(expected));
    }

    #[test]
    fn what_cannot_be_meant_is_told() {
        let error = said(&[("shaper/limit.cpus", "1")]).unwrap_err().to_string();
        assert!(error.contains("`shaper/limit.cpus`") && error.contains("shaper/limit.net_in"), "{error}");
        let error = said(&[("shaper/limit.memory", "much")]).unwrap_err().to_string();
        assert!(error.starts_with("annotation shaper/limit.memory: ") && error.contains("512Mi"), "{error}");
        assert!(said(&[("shaper/cards", "all")]).is_err());
    }
}
