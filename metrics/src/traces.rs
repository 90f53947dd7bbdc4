//! Traces, by OTLP over gRPC, to an OpenTelemetry collector on this machine, where one is named: of requests, of whole lives
//! of tasks, of changes. Where none is named nothing of it runs and nothing is kept.
//!
//! Names are those of OpenTelemetry's semantic conventions where there are any; the others begin with `shaper.`.

mod requests;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{OnceLock, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use http::Uri;
pub use opentelemetry::KeyValue;
use opentelemetry::{
    Context,
    trace::{Event, Span as _, SpanKind, Status, TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracer, SdkTracerProvider},
};
use tokio::sync::oneshot;

pub use self::requests::{Requests, Traced};

/// How long a collector may take for what it is sent, and how long the end of a daemon waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where traces go.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "traces_options")]
pub struct Options {
    /// Where traces go by OTLP over gRPC: an OpenTelemetry collector on this machine, such as http://127.0.0.1:4317. It sees
    /// tasks of all users, and sends them on as it is told to [default: nowhere]
    #[arg(long, value_name = "URL", value_parser = collector)]
    pub otlp: Option<Uri>,
    /// Of how many traces this part is sent, from 0 to 1. Who asks with a trace of its own has decided that [default: 1]
    #[arg(long, value_name = "PART", value_parser = part, requires = "otlp")]
    pub otlp_ratio: Option<f64>,
}

fn collector(text: &str) -> Result<Uri, String> {
    let remedy = "run an OpenTelemetry collector on this machine, which can send traces on over TLS, and say \
                  http://127.0.0.1:4317";
    let uri: Uri = text.parse().map_err(|error| format!("{error}: {remedy}"))?;
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let is_here = host == "localhost"
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    match uri.scheme_str() {
        Some("http") if is_here => Ok(uri),
        Some("http") => {
            Err(format!("on the way to another machine anybody could read who runs what: {remedy}"))
        }
        _ => Err(format!("this is not http://: {remedy}")),
    }
}

fn part(text: &str) -> Result<f64, &'static str> {
    let part: Option<f64> = text.parse().ok();
    part.filter(|part| (0.0..=1.0).contains(part)).ok_or("use a number from 0 to 1")
}

/// Why there are no traces.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The exporter.
    #[error("--otlp: cannot make an exporter")]
    Exporter(#[from] ExporterBuildError),
    /// Its thread.
    #[error("--otlp: cannot start a thread")]
    Thread(#[from] io::Error),
    /// A second time in one process.
    #[error("traces have begun already")]
    Twice,
}

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Whether traces go anywhere.
pub fn are_wanted() -> bool {
    TRACER.get().is_some()
}

/// Sends traces while it is there; the last ones when it goes.
#[must_use]
#[derive(Debug, Default)]
pub struct Traces(Option<Sending>);

#[derive(Debug)]
struct Sending {
    provider: SdkTracerProvider,
    /// Of the thread on which the connection to the collector lives.
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Options {
    /// Begins to send the traces of a daemon. `node`: on which node, if that has a name.
    pub fn begin(&self, service: &'static str, node: Option<&str>) -> Result<Traces, TracesError> {
        let Some(collector) = &self.otlp else { return Ok(Traces::default()) };
        let about = [
            Some(KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))),
            node.map(|node| KeyValue::new("shaper.node", node.to_owned())),
        ];
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attributes(about.into_iter().flatten())
            .build();
        let ratio = self.otlp_ratio.unwrap_or(1.0);
        let (collector, (ready, is_ready)) = (collector.to_string(), mpsc::channel());
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::Builder::new().name("traces".to_owned()).spawn(move || {
            runtime.block_on(async {
                // A connection is made when there is something to send, and again when it was lost.
                let exporter = SpanExporter::builder()
                    .with_tonic()
                    .with_endpoint(collector)
                    .with_timeout(PATIENCE)
                    .build();
                if ready.send(exporter).is_ok() {
                    let _ = stopped.await;
                }
            });
        })?;
        // The thread has sent it, or has panicked.
        let exporter = is_ready.recv().map_err(io::Error::other)??;
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(resource)
            .build();
        TRACER.set(provider.tracer("shaper")).map_err(|_| TracesError::Twice)?;
        Ok(Traces(Some(Sending { provider, stop, thread })))
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        let Some(Sending { provider, stop, thread }) = self.0.take() else { return };
        if let Err(error) = provider.shutdown_with_timeout(PATIENCE) {
            tracing::warn!(%error, "the collector did not take the last traces");
        }
        let _ = stop.send(());
        // If it has panicked, that was said.
        let _ = thread.join();
    }
}

/// What happened at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// When, ns since 1970.
    pub at: u64,
    /// What.
    pub name: String,
    /// More about it.
    pub about: Vec<KeyValue>,
}

/// Something that is over, with its parts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Period {
    /// What.
    pub name: String,
    /// ns since 1970.
    pub from: u64,
    /// ns since 1970.
    pub to: u64,
    /// If it failed: how.
    pub failure: Option<String>,
    /// More about it.
    pub about: Vec<KeyValue>,
    /// What happened in it.
    pub moments: Vec<Moment>,
    /// What it was made of.
    pub parts: Vec<Period>,
}

fn time(nanos: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(nanos)
}

impl Period {
    /// Sends it as a trace of its own, if traces are wanted.
    pub fn tell(self) {
        if let Some(tracer) = TRACER.get() {
            self.tell_within(tracer, &Context::new());
        }
    }

    fn tell_within(self, tracer: &SdkTracer, parent: &Context) {
        let Period { name, from, to, failure, about, moments, parts } = self;
        let moments =
            moments.into_iter().map(|Moment { at, name, about }| Event::new(name, time(at), about, 0));
        let builder = tracer
            .span_builder(name)
            .with_kind(SpanKind::Internal)
            .with_start_time(time(from))
            .with_attributes(about)
            .with_events(moments.collect());
        let mut span = builder.start_with_context(tracer, parent);
        if let Some(failure) = failure {
            span.set_status(Status::error(failure));
        }
        let within = parent.with_remote_span_context(span.span_context().clone());
        for part in parts {
            part.tell_within(tracer, &within);
        }
        span.end_with_timestamp(time(to.max(from)));
    }
}
