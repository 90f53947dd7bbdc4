//! A span for each request: which call, how long until its answer began, and whether that was an error.

use std::{
    pin::Pin,
    task::{self, Poll},
};

use http::{HeaderMap, Request, Response};
use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, TextMapPropagator},
    trace::{Span as _, SpanKind, Status, Tracer},
};
use opentelemetry_sdk::{propagation::TraceContextPropagator, trace::SdkTracer};
use tower::{Layer, Service};

use super::TRACER;

/// A layer of a gRPC server. What asks with a `traceparent` (W3C Trace Context) has its trace go on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Requests;

impl<S> Layer<S> for Requests {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced { inner }
    }
}

/// A service whose requests are traced, where traces are wanted.
#[derive(Clone, Debug)]
pub struct Traced<S> {
    inner: S,
}

type Answer<R, E> = Pin<Box<dyn Future<Output = Result<R, E>> + Send>>;

impl<S, A, B> Service<Request<A>> for Traced<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Answer<Response<B>, S::Error>;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let span = TRACER.get().map(|tracer| begin(tracer, request.uri().path(), request.headers()));
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            if let (Some(mut span), Ok(answer)) = (span, &answer) {
                let text = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
                // Absent where messages follow: then what comes of them is not known yet.
                if let Some(code) = text("grpc-status").and_then(|code| code.parse::<i64>().ok()) {
                    span.set_attribute(KeyValue::new("rpc.grpc.status_code", code));
                    if code != 0 {
                        span.set_status(Status::error(text("grpc-message").unwrap_or_default().to_owned()));
                    }
                }
                span.end();
            }
            answer
        })
    }
}

fn begin(tracer: &SdkTracer, path: &str, headers: &HeaderMap) -> opentelemetry_sdk::trace::Span {
    let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
    let name = path.trim_start_matches('/');
    let (service, method) = name.split_once('/').unwrap_or((name, ""));
    let about = [("rpc.system", "grpc"), ("rpc.service", service), ("rpc.method", method)];
    let about = about.map(|(key, value)| KeyValue::new(key, value.to_owned()));
    let builder = tracer.span_builder(name.to_owned()).with_kind(SpanKind::Server).with_attributes(about);
    builder.start_with_context(tracer, &parent)
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
