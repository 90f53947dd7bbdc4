//! io.cost of a block device, at the root of cgroup v2: no limit of anybody's, but what weights are divided by.

use serde::{Deserialize, Serialize};
use shaper_core::{
    id::BlockDevice,
    units::{BytesPerSec, Iops, Micros},
};

use super::ActuateError;
use crate::kernel::cgroup::{
    Cgroup,
    block::{self, Control, CostModel, CostQos, OfDevice, PerTenThousand},
};

/// What io.cost has of a device. `None`: nothing, as before anybody wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// What the device can do.
    pub model: Option<CostModel>,
    /// Whether and how it is controlled.
    pub qos: Option<CostQos>,
}

/// What is in force on a device. `root`: the root of cgroup v2.
pub fn io_cost(root: &Cgroup, device: BlockDevice) -> Result<Cost, ActuateError> {
    Ok(Cost {
        model: root.get(block::COST_MODEL)?.get(&device).copied(),
        qos: root.get(block::COST_QOS)?.get(&device).copied(),
    })
}

/// Puts it in force, and reads it back. Nothing is that the kernel chooses the parameters, and does not use them.
pub fn set_io_cost(root: &Cgroup, device: BlockDevice, cost: &Cost) -> Result<(), ActuateError> {
    let Cost { model, qos } = *cost;
    let (model, qos) = (model.unwrap_or(UNKNOWN_MODEL), qos.unwrap_or(UNKNOWN_QOS));
    root.set(block::COST_MODEL, &OfDevice(device, model))?;
    root.set(block::COST_QOS, &OfDevice(device, qos))?;
    let reads = io_cost(root, device)?;
    // Parameters that the kernel chooses are not ours to compare.
    let model_is = |found: CostModel| {
        found.control == model.control && (model.control == Control::Auto || found == model)
    };
    let qos_is = |found: CostQos| {
        (found.control, found.enable) == (qos.control, qos.enable)
            && (qos.control == Control::Auto || found == qos)
    };
    if reads.model.is_some_and(model_is) && reads.qos.is_some_and(qos_is) {
        Ok(())
    } else {
        Err(ActuateError::NotKept {
            device,
            file: if reads.model.is_some_and(model_is) {
                block::COST_QOS.name()
            } else {
                block::COST_MODEL.name()
            },
        })
    }
}

const UNKNOWN_MODEL: CostModel = CostModel {
    control: Control::Auto,
    bytes: [BytesPerSec(0); 2],
    sequential: [Iops(0); 2],
    random: [Iops(0); 2],
};

const UNKNOWN_QOS: CostQos = CostQos {
    enable: false,
    control: Control::Auto,
    read_percentile: PerTenThousand(0),
    read_latency: Micros(0),
    write_percentile: PerTenThousand(0),
    write_latency: Micros(0),
    min: PerTenThousand(0),
    max: PerTenThousand(0),
};
