//! Providers, each told by what a real one hears: over sockets, with the published protocols.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Mutex},
};

use http::{Request as HttpRequest, Response as HttpResponse};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use prost::Message;
use shaper_core::{
    place::NOTHING,
    scale::{OrderKind, Wanted},
    spec::Demand,
    units::{Bytes, Millicores},
};
use shaper_proto::scale::{
    externalgrpc::{
        self as wire,
        cloud_provider_server::{CloudProvider, CloudProviderServer},
        instance_status::InstanceState,
    },
    keda::{
        GetMetricsRequest, ScaledObjectRef, external_scaler_client::ExternalScalerClient,
        external_scaler_server::ExternalScalerServer,
    },
    kubernetes,
};
use tokio::net::TcpListener;
use tokio_stream::{StreamExt, wrappers::TcpListenerStream};
use tonic::{Code, Request, Response, Status, transport::Server};

use super::*;

fn group(provider: Provider) -> Group {
    Group {
        name: "workers".into(),
        nodes: "w*".parse().unwrap(),
        capacity: Some(Capacity { cpu: Millicores(4000), memory: Bytes(1 << 34), ..NOTHING }),
        min: 0,
        max: 9,
        cooldown: 0,
        provision: 60_000_000_000,
        idle: None,
        timeout: 10_000_000_000,
        provider,
    }
}

fn grow(target: u32) -> Order {
    let demand = Demand {
        cpu: Millicores(1500),
        memory: Bytes(1 << 30),
        gpu_memory: None,
        network: None,
        storage_io: None,
    };
    let wants = vec![Wanted { tasks: 2, demand, first: vec!["etl-1".parse().unwrap()] }];
    Order { number: 7, at: 1_700_000_000_000_000_000, target, kind: OrderKind::Grow { by: 1, wants } }
}

fn withdraw(target: u32) -> Order {
    Order { kind: OrderKind::Withdraw { nodes: 1 }, ..grow(target) }
}

fn remove(node: &str) -> Order {
    Order { kind: OrderKind::Remove { node: node.into() }, ..grow(0) }
}

/// A provider with nodes `w1`, `w2` …, and what it was called.
#[derive(Clone, Debug, Default)]
struct Nodes {
    target: i32,
    calls: Vec<String>,
    fails: BTreeMap<&'static str, Code>,
    template: Option<kubernetes::Node>,
    broken: bool,
}

#[derive(Clone, Default)]
struct Pool(Arc<Mutex<Nodes>>);

impl Pool {
    /// Notes a call, which fails if it is to.
    fn called(&self, name: &'static str, what: impl std::fmt::Display) -> Result<(), Status> {
        let mut nodes = self.0.lock().unwrap();
        nodes.calls.push(format!("{name} {what}").trim().to_owned());
        match nodes.fails.get(name) {
            Some(code) => Err(Status::new(*code, "not today")),
            None => Ok(()),
        }
    }

    fn calls(&self) -> Vec<String> {
        let calls = std::mem::take(&mut self.0.lock().unwrap().calls);
        calls
            .into_iter()
            .filter(|call| !call.starts_with("Refresh") && !call.starts_with("TargetSize"))
            .collect()
    }

    fn target(&self, change: i32) -> i32 {
        let mut nodes = self.0.lock().unwrap();
        nodes.target += change;
        nodes.target
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl CloudProvider for Pool {
    async fn node_group_for_node(
        &self,
        request: Request<wire::NodeGroupForNodeRequest>,
    ) -> Answer<wire::NodeGroupForNodeResponse> {
        let node = request.into_inner().node.unwrap_or_default();
        self.called("ForNode", &node.name)?;
        let id = if node.name.starts_with('w') { "asg-1" } else { "" }.to_owned();
        let group = wire::NodeGroup { id };
        Ok(Response::new(wire::NodeGroupForNodeResponse { node_group: Some(group) }))
    }

    async fn refresh(&self, _: Request<wire::RefreshRequest>) -> Answer<wire::RefreshResponse> {
        self.called("Refresh", "")?;
        Ok(Response::new(wire::RefreshResponse {}))
    }

    async fn node_group_target_size(
        &self,
        request: Request<wire::NodeGroupTargetSizeRequest>,
    ) -> Answer<wire::NodeGroupTargetSizeResponse> {
        self.called("TargetSize", request.into_inner().id)?;
        Ok(Response::new(wire::NodeGroupTargetSizeResponse { target_size: self.target(0) }))
    }

    async fn node_group_increase_size(
        &self,
        request: Request<wire::NodeGroupIncreaseSizeRequest>,
    ) -> Answer<wire::NodeGroupIncreaseSizeResponse> {
        let delta = request.into_inner().delta;
        self.called("IncreaseSize", delta)?;
        self.target(delta);
        Ok(Response::new(wire::NodeGroupIncreaseSizeResponse {}))
    }

    async fn node_group_delete_nodes(
        &self,
        request: Request<wire::NodeGroupDeleteNodesRequest>,
    ) -> Answer<wire::NodeGroupDeleteNodesResponse> {
        let nodes = request.into_inner().nodes;
        let names: Vec<_> = nodes.iter().map(|node| format!("{}={}", node.name, node.provider_id)).collect();
        self.called("DeleteNodes", names.join(","))?;
        self.target(-1);
        Ok(Response::new(wire::NodeGroupDeleteNodesResponse {}))
    }

    async fn node_group_decrease_target_size(
        &self,
        request: Request<wire::NodeGroupDecreaseTargetSizeRequest>,
    ) -> Answer<wire::NodeGroupDecreaseTargetSizeResponse> {
        let delta = request.into_inner().delta;
        self.called("DecreaseTargetSize", delta)?;
        self.target(delta);
        Ok(Response::new(wire::NodeGroupDecreaseTargetSizeResponse {}))
    }

    async fn node_group_nodes(
        &self,
        _: Request<wire::NodeGroupNodesRequest>,
    ) -> Answer<wire::NodeGroupNodesResponse> {
        let nodes = self.0.lock().unwrap().clone();
        let instances = (1..=nodes.target).map(|number| {
            let error_code = if nodes.broken { "OUT_OF_STOCK".to_owned() } else { String::new() };
            let error = wire::InstanceErrorInfo {
                error_code,
                error_message: "none left".into(),
                instance_error_class: 1,
            };
            let state =
                if nodes.broken { InstanceState::InstanceCreating } else { InstanceState::InstanceRunning };
            let status = wire::InstanceStatus { instance_state: state.into(), error_info: Some(error) };
            wire::Instance { id: format!("test:///w{number}"), status: Some(status) }
        });
        Ok(Response::new(wire::NodeGroupNodesResponse { instances: instances.collect() }))
    }

    async fn node_group_template_node_info(
        &self,
        _: Request<wire::NodeGroupTemplateNodeInfoRequest>,
    ) -> Answer<wire::NodeGroupTemplateNodeInfoResponse> {
        let template = self.0.lock().unwrap().template.clone();
        let template = template.ok_or_else(|| Status::unimplemented("no templates"))?;
        Ok(Response::new(wire::NodeGroupTemplateNodeInfoResponse { node_bytes: template.encode_to_vec() }))
    }
}

/// The provider on a port of its own, and a driver for it.
async fn external() -> (Pool, ExternalGrpc) {
    let pool = Pool::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server = Server::builder().add_service(CloudProviderServer::new(pool.clone()));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (pool, ExternalGrpc::new(&address, "asg-1", None, None))
}

#[tokio::test]
async fn a_size_is_asked_for_by_what_is_missing_to_it() {
    let (pool, mut driver) = external().await;
    pool.target(1);
    assert_eq!(driver.carry_out(&grow(3)).await, Ok(3));
    assert_eq!(pool.calls(), ["IncreaseSize 2"]);
    // The answer was lost, and a broker asks again.
    assert_eq!(driver.carry_out(&grow(3)).await, Ok(3));
    assert_eq!(pool.calls(), [""; 0]);
    assert_eq!(driver.carry_out(&withdraw(2)).await, Ok(2));
    assert_eq!(pool.calls(), ["DecreaseTargetSize -1"]);
    assert_eq!(driver.carry_out(&remove("w2")).await, Ok(1));
    assert_eq!(pool.calls(), ["ForNode w2", "DeleteNodes w2=test:///w2"]);
    let again = Order { target: 1, ..remove("w2") };
    assert_eq!(driver.carry_out(&again).await, Ok(1));
    assert_eq!(pool.calls(), [""; 0], "it was ended, and the answer was lost");
}

#[tokio::test]
async fn a_node_of_another_group_is_not_ended() {
    let (pool, mut driver) = external().await;
    pool.target(2);
    let why = driver.carry_out(&remove("db-1")).await.unwrap_err();
    assert!(why.contains("db-1 is of the group none, and not of `asg-1`"), "{why}");
    assert_eq!(pool.calls(), ["ForNode db-1"]);
}

#[tokio::test]
async fn what_a_provider_cannot_do_is_told() {
    let (pool, mut driver) = external().await;
    for call in ["IncreaseSize", "DecreaseTargetSize"] {
        pool.0.lock().unwrap().fails.insert(call, Code::Unimplemented);
    }
    assert_eq!(
        driver.carry_out(&grow(3)).await.unwrap_err(),
        "NodeGroupIncreaseSize: not today (Unimplemented)"
    );
    pool.target(3);
    assert_eq!(
        driver.carry_out(&withdraw(2)).await.unwrap_err(),
        "NodeGroupDecreaseTargetSize: not today (Unimplemented)"
    );
    assert_eq!(driver.observe().await, Ok(Observed { target: 3, errors: Vec::new() }));
    pool.0.lock().unwrap().broken = true;
    let errors = driver.observe().await.unwrap().errors;
    assert_eq!((errors.len(), errors[0].as_str()), (3, "test:///w1: none left (OUT_OF_STOCK)"));
    pool.target(-5);
    assert!(driver.observe().await.unwrap_err().contains("works towards -2 nodes"));
    let mut nobody = ExternalGrpc::new("http://127.0.0.1:9", "asg-1", None, None);
    assert!(nobody.observe().await.unwrap_err().starts_with("Refresh: "));
}

#[tokio::test]
async fn a_template_says_what_a_node_has_if_there_is_one() {
    let (pool, mut driver) = external().await;
    assert_eq!(driver.template().await, Ok(None), "that call is optional");
    let quantity = |text: &str| kubernetes::Quantity { string: text.into() };
    let capacity = [("cpu".into(), quantity("8")), ("memory".into(), quantity("32Gi"))].into();
    let allocatable = [("cpu".into(), quantity("7500m"))].into();
    let status = kubernetes::NodeStatus { capacity, allocatable };
    pool.0.lock().unwrap().template = Some(kubernetes::Node { status: Some(status) });
    let capacity = driver.template().await.unwrap().unwrap();
    assert_eq!((capacity.cpu.0, capacity.memory.0), (7500, 32 << 30));
    pool.0.lock().unwrap().template = Some(kubernetes::Node::default());
    assert_eq!(driver.template().await.unwrap_err(), "its provider's template has no cpu");
}

/// What a server was sent: the headers and the body.
type Heard = Arc<Mutex<Vec<(http::HeaderMap, String)>>>;

/// A server that answers with these, one after the other.
async fn server(answers: &[u16]) -> (SocketAddr, Heard) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, heard) = (listener.local_addr().unwrap(), Heard::default());
    let (answers, heard_by) = (answers.to_vec(), heard.clone());
    tokio::spawn(async move {
        for answer in answers {
            let (stream, _) = listener.accept().await.unwrap();
            let heard = heard_by.clone();
            let service = service_fn(move |request: HttpRequest<Incoming>| {
                let heard = heard.clone();
                async move {
                    let (head, body) = request.into_parts();
                    let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
                    heard.lock().unwrap().push((head.headers, body));
                    let answer = HttpResponse::builder().status(answer).body(Full::new("a word".into()));
                    Ok::<_, std::convert::Infallible>(
                        answer.unwrap() as HttpResponse<Full<hyper::body::Bytes>>
                    )
                }
            });
            // The client goes when it has its answer.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
    });
    (address, heard)
}

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn webhook(address: SocketAddr, directory: &Path, secret: &str) -> Webhook {
    let file = directory.join("secret");
    std::fs::write(&file, secret).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    Webhook::new(&format!("http://{address}/scale?x=1"), file.to_str().unwrap(), None)
}

#[tokio::test]
async fn an_event_is_signed_and_sent_again_with_the_same_id_until_it_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let (address, heard) = server(&[503, 429, 204]).await;
    let webhook = webhook(address, directory.path(), SECRET);
    webhook.carry_out(&group(Provider::Keda), &grow(3)).await.unwrap();
    let heard = heard.lock().unwrap().clone();
    let ids: Vec<_> = heard.iter().map(|(headers, _)| headers["webhook-id"].to_str().unwrap()).collect();
    assert_eq!(ids, ["workers-7-1700000000000000000"; 3]);
    let (headers, body) = &heard[0];
    assert_eq!(headers["content-type"], "application/cloudevents+json");
    assert_eq!(headers["host"], address.to_string().as_str());
    let event: serde_json::Value = serde_json::from_str(body).unwrap();
    let expected = serde_json::json!({
        "specversion": "1.0", "id": ids[0], "source": "shaper-broker", "type": "dev.shaper.scale.v1",
        "subject": "workers", "time": "2023-11-14T22:13:20Z", "datacontenttype": "application/json",
        "data": {
            "group": "workers", "number": 7, "action": "grow", "target": 3, "node": null,
            "reason": "1 more, for 2 tasks",
            "wants": [{"tasks": 2, "first": ["etl-1"], "demand": {
                "cpu_cores": 1.5, "memory_bytes": 1 << 30, "gpu_memory_bytes": null, "network_bps": null, "storage_iops": null,
            }}],
        },
    });
    assert_eq!(event, expected);
    let text = |name: &str| headers[name].to_str().unwrap().to_owned();
    let (secret, timestamp) = (webhook.secret().unwrap(), text("webhook-timestamp").parse().unwrap());
    assert_eq!(text("webhook-signature"), webhook::signature(&secret, ids[0], timestamp, body));
    // As Python's hmac and base64 reckon it.
    let expected = "v1,PQDD9gbSO9Fw8AJN8mbVZDUF9F3eZvRSZrkwC5DX9hc=";
    assert_eq!(webhook::signature(&secret, "workers-7-1", 1_700_000_000, "{\"a\":1}"), expected);
}

#[tokio::test]
async fn what_a_server_refuses_is_not_sent_again() {
    let directory = tempfile::tempdir().unwrap();
    let (address, heard) = server(&[403]).await;
    let webhook = webhook(address, directory.path(), SECRET);
    let why = webhook.carry_out(&group(Provider::Keda), &grow(3)).await.unwrap_err();
    assert_eq!(why, "the server answered 403 Forbidden: a word");
    assert_eq!(heard.lock().unwrap().len(), 1);
    let short = self::webhook(address, directory.path(), "short");
    let why = short.carry_out(&group(Provider::Keda), &grow(3)).await.unwrap_err();
    assert!(why.ends_with("the secret has 5 bytes; make it at least 16"), "{why}");
}

#[tokio::test]
async fn a_program_reads_the_order_and_its_failure_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let (told, program) = (directory.path().join("told"), directory.path().join("scale"));
    std::fs::write(
        &program,
        format!(
            "#!/bin/sh\n[ $1 = ok ] || {{ echo no such group >&2; exit 3; }}\ncat > {}\n",
            told.display()
        ),
    )
    .unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    let command = |word: &str| Exec::new(&[program.to_str().unwrap().to_owned(), word.to_owned()]);
    command("ok").carry_out(&group(Provider::Keda), &remove("w2")).await.unwrap();
    let order: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&told).unwrap()).unwrap();
    assert_eq!((&order["action"], &order["node"]), (&"remove".into(), &"w2".into()));
    let why = command("bad").carry_out(&group(Provider::Keda), &grow(3)).await.unwrap_err();
    assert!(why.ends_with("failed (exit status: 3): no such group"), "{why}");
    let why = Exec::new(&["/nowhere".into()]).carry_out(&group(Provider::Keda), &grow(3)).await.unwrap_err();
    assert!(why.starts_with("cannot start /nowhere"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_does_not_answer_is_not_waited_for() {
    let never = std::future::pending::<Result<(), String>>();
    assert_eq!(
        within(Duration::from_secs(7), never).await.unwrap_err(),
        "its provider did not answer within 7 s"
    );
    assert_eq!(words("a\nb"), "a b");
    assert_eq!(words(&"x".repeat(500)).len(), MOST_WORDS + " …".len());
}

#[tokio::test]
async fn keda_hears_how_many_there_are_to_be_and_when_that_changes() {
    let (wishes, follower) = watch::channel(BTreeMap::new());
    let wish = |target: u32| {
        let wish = Wish { target, tasks: 5, millicores: 7500, memory: 1 << 30 };
        wishes.send_replace([("workers".to_owned(), wish)].into());
    };
    wish(0);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server = Server::builder().add_service(ExternalScalerServer::new(Keda::new(follower)));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let mut client = ExternalScalerClient::connect(address).await.unwrap();
    let object = |metadata: &[(&str, &str)]| ScaledObjectRef {
        name: "agents".into(),
        namespace: "shaper".into(),
        scaler_metadata: metadata
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
    };
    let nodes = object(&[("group", "workers")]);
    let mut stream = client.stream_is_active(nodes.clone()).await.unwrap().into_inner();
    assert!(!stream.next().await.unwrap().unwrap().result);
    wish(3);
    assert!(stream.next().await.unwrap().unwrap().result);
    assert!(client.is_active(nodes.clone()).await.unwrap().into_inner().result);
    let spec = client.get_metric_spec(nodes.clone()).await.unwrap().into_inner().metric_specs.remove(0);
    assert_eq!(
        (spec.metric_name.as_str(), spec.target_size, spec.target_size_float),
        ("nodes-workers", 1, 1.0)
    );
    let cores = object(&[("group", "workers"), ("metric", "pending_cpu_cores"), ("targetSize", "2.5")]);
    let spec = client.get_metric_spec(cores.clone()).await.unwrap().into_inner().metric_specs.remove(0);
    assert_eq!((spec.target_size, spec.target_size_float), (3, 2.5));
    for (object, value) in [(nodes, 3.0), (cores, 7.5)] {
        let request = GetMetricsRequest { scaled_object_ref: Some(object), metric_name: String::new() };
        let values = client.get_metrics(request).await.unwrap().into_inner().metric_values;
        assert_eq!(values[0].metric_value_float, value);
    }
    for (bad, says) in [
        (object(&[]), "`group` in the trigger's metadata must be one of: workers"),
        (object(&[("group", "workers"), ("metric", "x")]), "must be one of: nodes, pending_tasks"),
        (object(&[("group", "workers"), ("targetSize", "0")]), "must be a number above 0"),
    ] {
        let status = client.is_active(bad).await.unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains(says), "{status}");
    }
}
