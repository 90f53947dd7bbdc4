//! A collector of traces, by the published protocol (OTLP over gRPC), that keeps what comes.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::Span,
};
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use crate::time::eventually;

#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Span>>>);

impl Spans {
    fn lock(&self) -> MutexGuard<'_, Vec<Span>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let of_resources = request.into_inner().resource_spans.into_iter();
        let spans = of_resources.flat_map(|it| it.scope_spans).flat_map(|it| it.spans);
        self.lock().extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// The collector, on loopback.
pub struct Collector {
    address: SocketAddr,
    spans: Spans,
    /// It ends with this.
    _runtime: Runtime,
}

impl Collector {
    /// Starts it.
    pub fn start() -> Collector {
        let runtime = Runtime::new().expect("threads can be started");
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = listener.expect("loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        let spans = Spans::default();
        let service = TraceServiceServer::new(spans.clone());
        runtime
            .spawn(Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener)));
        Collector { address, spans, _runtime: runtime }
    }

    /// For `--otlp`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The first span that is as wanted, once it is here.
    pub fn span(&self, what: &str, is_it: impl Fn(&Span) -> bool) -> Span {
        let find = || self.spans.lock().iter().find(|span| is_it(span)).cloned();
        eventually(what, || find().is_some());
        find().expect("it was there")
    }

    /// Its parts, in the order of their beginnings.
    pub fn parts(&self, of: &Span) -> Vec<Span> {
        let is_part = |span: &&Span| span.trace_id == of.trace_id && span.parent_span_id == of.span_id;
        let mut parts: Vec<_> = self.spans.lock().iter().filter(is_part).cloned().collect();
        parts.sort_by_key(|span| span.start_time_unix_nano);
        parts
    }
}

/// A text among attributes.
pub fn attribute<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    let found = attributes.iter().find(|it| it.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}
