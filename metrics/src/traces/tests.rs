use clap::Parser;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use tokio::{net::TcpListener, sync::mpsc};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};
use tower::{Layer, Service, ServiceExt, service_fn};

use super::*;

/// A collector, as the published protocol has it.
struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[derive(Parser)]
struct Daemon {
    #[command(flatten)]
    traces: Options,
}

fn parsed(arguments: &[&str]) -> Result<Options, String> {
    let parsed = Daemon::try_parse_from([&["daemon"], arguments].concat());
    parsed.map(|daemon| daemon.traces).map_err(|error| error.to_string())
}

#[test]
fn traces_go_to_a_collector_on_this_machine_alone() {
    for good in ["http://127.0.0.1:4317", "http://localhost:4317", "http://[::1]:4317/"] {
        assert!(parsed(&["--otlp", good]).unwrap().otlp.is_some(), "{good}");
    }
    for (bad, why) in [
        ("http://collector:4317", "anybody could read"),
        ("http://10.0.0.7:4317", "anybody could read"),
        ("https://127.0.0.1:4317", "not http://"),
        ("127.0.0.1:4317", "not http://"),
        ("", "empty"),
    ] {
        let error = parsed(&["--otlp", bad]).unwrap_err();
        assert!(error.contains(why) && error.contains("run an OpenTelemetry collector"), "{bad}: {error}");
    }
    for bad in ["-0.1", "1.1", "NaN", "much"] {
        let error = parsed(&["--otlp", "http://[::1]:1", &format!("--otlp-ratio={bad}")]).unwrap_err();
        assert!(error.contains("from 0 to 1"), "{bad}: {error}");
    }
    assert!(parsed(&["--otlp-ratio", "0.5"]).is_err());
}

/// All in one: a process has one tracer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_and_lives_of_tasks_are_sent_as_they_were() {
    Period { name: "before".to_owned(), ..Period::default() }.tell();
    assert!(!are_wanted());

    let (sender, mut received) = mpsc::unbounded_channel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(Collector(sender)))
        .serve_with_incoming(TcpIncoming::from(listener));
    let server = tokio::spawn(server);
    let options = parsed(&["--otlp", &format!("http://{address}")]).unwrap();
    let traces = options.begin("shaper-broker", Some("n1")).unwrap();
    assert!(are_wanted());
    assert!(matches!(options.begin("again", None), Err(TracesError::Twice)));

    let part = |name: &str, from, to| Period { name: name.to_owned(), from, to, ..Period::default() };
    Period {
        about: vec![KeyValue::new("shaper.task.id", "t1")],
        failure: Some("exit code 3".to_owned()),
        moments: vec![Moment { at: 2_000, name: "placed".to_owned(), about: Vec::new() }],
        parts: vec![part("waits", 1_000, 2_000), part("runs on n1", 2_000, 9_000)],
        ..part("task t1", 1_000, 9_000)
    }
    .tell();
    let asked = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let refuse = service_fn(|_: http::Request<()>| async {
        let answer = http::Response::builder().header("grpc-status", "7").header("grpc-message", "no");
        Ok::<_, std::convert::Infallible>(answer.body(()).unwrap())
    });
    let request = http::Request::builder()
        .uri("http://broker/shaper.v1.Broker/SubmitTask")
        .header("traceparent", asked)
        .body(())
        .unwrap();
    let mut service = Requests.layer(refuse);
    service.ready().await.unwrap().call(request).await.unwrap();
    // It sends what there is before it goes, and waits for that.
    tokio::task::spawn_blocking(move || drop(traces)).await.unwrap();
    server.abort();

    let mut spans: Vec<Span> = Vec::new();
    let mut services = Vec::new();
    while let Some(request) = received.recv().await {
        for of in request.resource_spans {
            services.extend(of.resource.into_iter().flat_map(|it| it.attributes));
            spans.extend(of.scope_spans.into_iter().flat_map(|it| it.spans));
        }
    }
    let services: Vec<_> = services.iter().map(|it| format!("{}={:?}", it.key, it.value)).collect();
    let has = |key: &str, value: &str| services.iter().any(|it| it.starts_with(key) && it.contains(value));
    assert!(has("service.name", "shaper-broker") && has("shaper.node", "n1"), "{services:?}");
    let span = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    assert_eq!(spans.len(), 4, "{spans:?}");
    let (task, waits, runs) = (span("task t1"), span("waits"), span("runs on n1"));
    assert_eq!((task.start_time_unix_nano, task.end_time_unix_nano), (1_000, 9_000));
    assert_eq!((runs.start_time_unix_nano, runs.end_time_unix_nano), (2_000, 9_000));
    assert!(
        [waits, runs]
            .iter()
            .all(|part| part.trace_id == task.trace_id && part.parent_span_id == task.span_id)
    );
    assert!(task.parent_span_id.is_empty());
    assert_eq!((task.events[0].name.as_str(), task.events[0].time_unix_nano), ("placed", 2_000));
    assert_eq!(task.status.as_ref().unwrap().message, "exit code 3");
    assert_eq!(task.attributes[0].key, "shaper.task.id");
    let asked_for = span("shaper.v1.Broker/SubmitTask");
    let hex: String = asked_for.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(asked.contains(&hex), "{hex}");
    assert_eq!(asked_for.status.as_ref().unwrap().message, "no");
    assert!(asked_for.attributes.iter().any(|it| it.key == "rpc.method"));
}
