//! One program for all targets: what there is to fuzz differs, what must be linked for it does not. `SHAPER_FUZZ` names the
//! target, which has a folder of that name in `seeds/`; `cargo xtask soak fuzz` builds and runs them.
//!
//! Every target asks the same of what it reads: it does not panic, overflow or take long; what is accepted keeps the promises
//! of its type; and what is accepted and written again is accepted again, and is the same.
#![no_main]

mod broker;
mod cgroup;
mod documents;
mod identity;
mod node;
mod wire;

use std::sync::OnceLock;

type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
    ("task", documents::task),
    ("policy", documents::policy),
    ("scale", documents::scale),
    ("wire", wire::wire),
    ("cgroup", cgroup::cgroup),
    ("proc", cgroup::proc),
    ("rows", broker::rows),
    ("reactor", broker::reactor),
    ("backup", broker::backup),
    ("certificate", identity::certificate),
    ("identities", identity::identities),
    ("token", identity::token),
    ("record", node::record),
    ("ledger", node::ledger),
];

static TARGET: OnceLock<Target> = OnceLock::new();

fn choose() {
    let name = std::env::var("SHAPER_FUZZ").unwrap_or_default();
    let Some((_, target)) = TARGETS.iter().find(|(known, _)| *known == name) else {
        let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
        eprintln!("SHAPER_FUZZ=`{name}` is no target: there are {}", names.join(", "));
        std::process::exit(2);
    };
    let _ = TARGET.set(*target);
}

libfuzzer_sys::fuzz_target!(init: choose(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        target(data);
    }
});

/// What JSON says, with what it is as it is written again; and that is the same.
fn json<T: serde::de::DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug>(
    data: &[u8],
) -> Option<T> {
    let value: T = serde_json::from_slice(data).ok()?;
    let written = serde_json::to_vec(&value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&written).expect("what was written can be read");
    assert_eq!(again, value);
    Some(value)
}
