//! What the fuzz targets (`fuzz/`, `cargo xtask soak fuzz`) reach of the agent that is nobody else's: parsers of what tasks
//! and other tools have a say in. Nothing else may use this.

use std::collections::HashMap;

use serde::{Serialize, de::DeserializeOwned};
use shaper_core::{id::ExecutionId, ledger::Entry};

use crate::{
    calibrate::record::Before,
    launch::{attempt, log::LogRecord},
    ledger::{self, Decided},
    meter::machine,
};

/// What is in a file, and it as it would be written again.
fn rewritten<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> Option<(T, Vec<u8>)> {
    let value: T = serde_json::from_slice(bytes).ok()?;
    let written = serde_json::to_vec(&value).ok()?;
    Some((value, written))
}

/// A file of [`crate::calibrate`], as it would be written again.
pub fn calibration(bytes: &[u8]) -> Option<Vec<u8>> {
    rewritten::<Before>(bytes).map(|(_, written)| written)
}

/// A file of the ledger: what stands, what is told, and what was understood as it would be written again.
pub fn ledger(bytes: &[u8]) -> (HashMap<ExecutionId, Decided>, Vec<Entry>, Vec<u8>) {
    ledger::examine(bytes)
}

/// The start time in a `/proc/<pid>/stat`, in which a task chooses its own name.
pub fn start_time(stat: &[u8]) -> Option<u64> {
    attempt::parse_start_time(stat)
}

/// A line of a task's log, and as it would be written again.
pub fn log_line(line: &[u8]) -> Option<(LogRecord, Vec<u8>)> {
    let record = crate::launch::log::decode(line)?;
    let mut written = Vec::new();
    if let LogRecord::Output { at, stream, partial, content } = &record {
        crate::launch::log::encode(*at, *stream, *partial, content, &[], &mut written);
    }
    Some((record, written))
}

/// The CPUs, the busy time and the memory that `/proc/stat` and `/proc/meminfo` tell of.
pub fn machine(text: &str) -> (u32, u64, Option<u64>) {
    (machine::online(text), machine::busy_ns(text), machine::kib(text, "MemAvailable"))
}
