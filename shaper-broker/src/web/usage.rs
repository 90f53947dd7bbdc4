//! What a task used over time, for its chart.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, State},
    response::Response,
};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Serialize;
use shaper_core::{
    limits::Limit,
    task::UnixNanos,
    units::{BitsPerSec, Bytes, Millicores},
};

use super::{Site, answer, pages, text};
use crate::{
    actor::View,
    reactor::{query, shown::Sample},
    service::own,
    web::{Viewer, pages::Trouble},
};

/// Columns of equal length, as the chart wants them. What is not known is absent, never 0.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(super) struct Usage {
    /// Seconds since 1970.
    at: Vec<f64>,
    /// Cores: used, and in force.
    cpu: Vec<f64>,
    cpu_limit: Vec<Option<f64>>,
    /// Bytes.
    memory: Vec<Option<u64>>,
    memory_limit: Vec<Option<u64>>,
    /// Bits a second.
    sent: Vec<u64>,
    received: Vec<u64>,
    net_limit: Vec<Option<u64>>,
    net_granted: Vec<Option<u64>>,
    /// Of the time its CPU limit stopped it.
    throttled: Vec<Option<f64>>,
    /// What was reserved for it.
    request_cpu: Vec<f64>,
    request_memory: Vec<u64>,
    request_network: Vec<Option<u64>>,
    decisions: Vec<Mark>,
}

/// A decision.
#[derive(Debug, PartialEq, Serialize)]
struct Mark {
    at: f64,
    kind: String,
    by: String,
    reason: String,
}

fn seconds(at: UnixNanos) -> f64 {
    // Milliseconds are as exact as a chart is.
    (at / 1_000_000) as f64 / 1e3
}

fn limit<T, N>(limit: Limit<T>, number: impl Fn(T) -> N) -> Option<N> {
    match limit {
        Limit::Unlimited => None,
        Limit::At(value) => Some(number(value)),
    }
}

impl Usage {
    pub(super) fn of(view: &View<'_>, viewer: &Viewer, name: &str) -> Result<Usage, Trouble> {
        let id = name.parse().map_err(|_| Trouble::NoTask(name.to_owned()))?;
        own(view, &viewer.caller, viewer.grant.as_ref(), &id)?;
        let cores = |cpu: Millicores| cpu.0 as f64 / 1e3;
        let mut usage = Usage::default();
        for sample in view.state.shown.samples(&id) {
            let Sample { at, cpu, memory, sent, received, throttled_permille, request, .. } = *sample;
            usage.at.push(seconds(at));
            usage.cpu.push(cores(cpu));
            usage.cpu_limit.push(limit(sample.cpu_limit, cores));
            usage.memory.push(memory.map(|Bytes(memory)| memory));
            usage.memory_limit.push(limit(sample.memory_limit, |Bytes(memory)| memory));
            usage.sent.push(sent.0);
            usage.received.push(received.0);
            usage.net_limit.push(limit(sample.net_limit, |BitsPerSec(rate)| rate));
            usage.net_granted.push(sample.net_granted.map(|BitsPerSec(rate)| rate));
            usage.request_cpu.push(cores(request.cpu));
            usage.request_memory.push(request.memory.0);
            usage.request_network.push(request.network.map(|network| network.0));
            usage.throttled.push(throttled_permille.map(|permille| permille as f64 / 1e3));
        }
        if viewer.may("ExplainTask") {
            let row = query::task(view.state, &viewer.caller, &id)?;
            usage.decisions = row
                .decisions
                .iter()
                .map(|it| Mark {
                    at: seconds(it.at),
                    kind: it.kind.to_string(),
                    by: it.by.clone(),
                    reason: it.reason.clone(),
                })
                .collect();
        }
        Ok(usage)
    }
}

pub(super) async fn usage(
    State(site): State<Arc<Site>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    let viewer = match site.viewer(&headers) {
        Ok(viewer) => viewer,
        Err(trouble) => return pages::trouble(&trouble, None),
    };
    match site.look(move |view| Usage::of(view, &viewer, &name)).await {
        Ok(usage) => match serde_json::to_vec(&usage) {
            Ok(json) => {
                answer(StatusCode::OK, HeaderValue::from_static("application/json"), Body::from(json))
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        Err(trouble) => pages::trouble(&trouble, None),
    }
}
