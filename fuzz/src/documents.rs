//! What people write: profiles, task specs, policies.

use std::fmt::Debug;

use shaper_core::{
    document::{self, DocumentError, MAX_RETRIES, MAX_RUNTIME_SECONDS},
    limits::Limits,
    spec::{Demand, Policy, Profile, TaskSpec},
    units::{BitsPerSec, Iops, Micros, Millicores},
};
use shaper_proto::{convert::WireError, v1};

/// Where a document is at fault is within it, and said in a text that a terminal can show.
fn refused(data: &[u8], error: &DocumentError) {
    let shown = error.to_string();
    assert!(shown.len() < 16 << 10, "{} bytes of error", shown.len());
    assert!(!shown.contains('\u{1b}'), "an escape sequence in {shown:?}");
    let lines = data.iter().filter(|byte| matches!(byte, b'\n' | b'\r')).count() + 1;
    assert!((1..=lines + 1).contains(&(error.line as usize)) && error.column > 0, "{lines} lines: {shown}");
}

fn demand(demand: &Demand) {
    assert!(demand.cpu >= Millicores::MIN && demand.memory.0 > 0);
    assert!(demand.gpu_memory.is_none_or(|memory| memory.0 > 0));
    assert!(demand.network.is_none_or(|it| (BitsPerSec::MIN..=BitsPerSec::MAX).contains(&it)));
    assert!(demand.storage_io.is_none_or(|it| it.0 > 0 && it <= Iops::MAX));
}

fn limits(limits: &Limits) {
    assert!(limits.cpu.at().is_none_or(|cpu| cpu >= Millicores::MIN));
    assert!(limits.memory.at().is_none_or(|memory| memory.0 > 0));
    assert!(limits.net_egress.at().is_none_or(|it| (BitsPerSec::MIN..=BitsPerSec::MAX).contains(&it)));
    assert!(limits.storage_io.at().is_none_or(|it| it.0 > 0 && it <= Iops::MAX));
    let latency = limits.storage_io_latency.at();
    assert!(latency.is_none_or(|it| (Micros::LATENCY_MIN..=Micros::LATENCY_MAX).contains(&it)));
}

/// What a document may say, a client may send, and it arrives as it is.
fn travels<D, W>(value: &D)
where
    D: Clone + PartialEq + Debug + TryFrom<W, Error = WireError>,
    W: From<D>,
{
    assert_eq!(D::try_from(W::from(value.clone())).as_ref(), Ok(value));
}

fn profile(profile: &Profile) {
    demand(&profile.demand);
    assert!(profile.estimated_runtime_seconds.is_none_or(|seconds| seconds <= MAX_RUNTIME_SECONDS));
    let text = document::profile_to_json(profile);
    assert_eq!(document::profile("written", &text).as_ref(), Ok(profile), "{text}");
    travels::<Profile, v1::TaskProfile>(profile);
}

/// Task specs, and profiles, which are drafts of one.
pub fn task(data: &[u8]) {
    match document::profile("f", data) {
        Ok(found) => profile(&found),
        Err(error) => refused(data, &error),
    }
    let draft = match document::task("f", data) {
        Ok(draft) => draft,
        Err(error) => return refused(data, &error),
    };
    profile(&draft.profile);
    limits(&draft.limits);
    assert!(draft.retries <= MAX_RETRIES);
    assert!(draft.cwd.as_ref().is_none_or(|cwd| cwd.starts_with('/')));
    if let Ok(spec) = draft.complete("/") {
        travels::<TaskSpec, v1::TaskSpec>(&spec);
    }
}

/// Policies.
pub fn policy(data: &[u8]) {
    let policy = match document::policy("f", data) {
        Ok(policy) => policy,
        Err(error) => return refused(data, &error),
    };
    if let Some(found) = &policy.demand {
        demand(found);
    }
    assert!(policy.eviction_threshold_permille.is_none_or(|permille| (1..=1000).contains(&permille)));
    assert!((500..=3_600_000).contains(&policy.window_millis));
    assert!(policy.limits.cpu.is_none_or(|cpu| cpu >= Millicores::MIN));
    assert!(!document::policy_fields(&policy).is_empty());
    travels::<Policy, v1::Policy>(&policy);
}

/// Groups of nodes that are started and ended.
pub fn scale(data: &[u8]) {
    let scaling = match document::scaling("f", data) {
        Ok(scaling) => scaling,
        Err(error) => return refused(data, &error),
    };
    assert!(!scaling.groups.is_empty());
    for group in &scaling.groups {
        assert!(group.min <= group.max && group.max > 0 && group.timeout > 0, "{group:?}");
        assert!(group.capacity.is_some() || group.provider.tells(), "{group:?}");
    }
}
