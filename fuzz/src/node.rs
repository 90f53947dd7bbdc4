//! What the agent and the supervisors of tasks write down and find again, perhaps damaged.

use shaper_agent::{
    actuate::Values,
    fuzz,
    launch::spec::{Exit, LaunchSpec, Started, Supervisor},
    record::{Before, Record},
};
use shaper_core::id::ExecutionId;

use crate::json;

fn execution(execution: &ExecutionId) {
    assert_eq!(execution.to_string().parse().as_ref(), Ok(execution));
}

fn values(values: &Values) {
    for (knob, value) in values {
        assert_eq!(knob.to_string().parse().as_ref(), Ok(knob));
        let _ = value.to_string();
    }
}

/// Files of JSON in the state directory. The first byte says which.
pub fn record(data: &[u8]) {
    let Some((which, data)) = data.split_first() else { return };
    match which % 7 {
        0 => {
            if let Some(record) = json::<Record>(data) {
                execution(&record.execution);
                values(&record.standing);
                values(&record.baseline);
            }
        }
        1 => {
            if let Some(spec) = json::<LaunchSpec>(data) {
                execution(&spec.execution);
            }
        }
        2 => drop((json::<Supervisor>(data), json::<Started>(data))),
        3 => {
            if let Some(exit) = json::<Exit>(data) {
                let _ = exit.status.code();
            }
        }
        4 => {
            if let Some(before) = json::<Before>(data) {
                values(&before.standing);
            }
        }
        5 => drop(json::<shaper_agent::node::cluster::Assignment>(data)),
        _ => {
            if let Some(written) = fuzz::calibration(data) {
                assert_eq!(fuzz::calibration(&written).as_ref(), Some(&written));
            }
        }
    }
}

/// A file of the ledger.
pub fn ledger(data: &[u8]) {
    let (decided, told, written) = fuzz::ledger(data);
    assert!(told.len() <= data.len() && decided.len() <= data.len());
    // What was not understood is not missed.
    assert_eq!(fuzz::ledger(&written), (decided.clone(), told.clone(), written));
    decided.keys().for_each(execution);
    told.iter().for_each(|entry| execution(&entry.execution));
}
