//! One who asks too much is told so, and keeps nobody else out.

use std::{
    io::{ErrorKind, Read},
    net::{Ipv4Addr, SocketAddr},
};

use shaper_identity::{Role, serve::Limits};
use shaper_proto::v1::{self, broker_client::BrokerClient};
use tokio::net::TcpSocket;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::harness::{Broker, call};

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_is_not_read() {
    let broker = Broker::start();
    let mut operator = BrokerClient::new(broker.connect(Role::Operator, "o").await);
    let submit = |bytes: usize| {
        let spec = v1::TaskSpec { command: vec!["x".repeat(bytes)], ..Default::default() };
        v1::SubmitTaskRequest { spec: Some(spec) }
    };
    let small = operator.submit_task(submit(1 << 10)).await.unwrap_err();
    assert_eq!(small.code(), Code::InvalidArgument, "read, and no task: {small:?}");
    let large = operator.submit_task(submit(2 << 20)).await.unwrap_err();
    assert_eq!(large.code(), Code::OutOfRange, "{large:?}");
}

async fn watch(channel: &Channel) -> Result<Streaming<v1::ClusterTask>, Status> {
    let request = v1::WatchClusterTasksRequest::default();
    Ok(BrokerClient::new(channel.clone()).watch_cluster_tasks(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_counted_by_identity_until_they_end() {
    let broker = Broker::start();
    let material = broker.material(Role::Reader, "r");
    let (one, other) =
        (broker.connect_with(&material).await.unwrap(), broker.connect_with(&material).await.unwrap());
    let mut watches = Vec::new();
    for number in 0..Limits::BROKER.long_calls_at_once {
        watches.push(watch(if number % 2 == 0 { &one } else { &other }).await.unwrap());
    }
    let status = watch(&one).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("spiffe://lab/reader/r already follows"), "{status:?}");
    broker.says(&["audit", "refused", "spiffe://lab/reader/r", "already follows"]).await;
    // Short calls, and those of others, are not held up.
    call(&one, "/shaper.v1.Broker/ListNodes").await.unwrap();
    let neighbour = broker.connect(Role::Reader, "s").await;
    drop(watch(&neighbour).await.unwrap());
    // One that ends makes room, as soon as the server knows of it.
    drop(watches.pop());
    let again = async {
        while watch(&one).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::PATIENCE, again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_counted_by_identity() {
    let broker = Broker::start();
    let material = broker.material(Role::Node, "n1");
    let mut connections = Vec::new();
    loop {
        let connected = broker.connect_with(&material).await;
        let answered = match &connected {
            Ok(channel) => call(channel, "/grpc.health.v1.Health/Check").await,
            Err(error) => Err(Status::unavailable(error.to_string())),
        };
        if answered.is_err() {
            break;
        }
        connections.push(connected.unwrap());
        assert!(connections.len() <= 64);
    }
    assert_eq!(connections.len(), 64);
    broker.says(&["audit", "refused a connection", "spiffe://lab/node/n1 has 64 connections already"]).await;
    let neighbour = broker.connect(Role::Node, "n2").await;
    call(&neighbour, "/grpc.health.v1.Health/Check").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_connects_and_says_nothing_keeps_nobody_out() {
    let broker = Broker::start();
    let address: SocketAddr = broker.address.parse().unwrap();
    let mut silent = Vec::new();
    for _ in 0..100 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, 2), 0).into()).unwrap();
        silent.push(socket.connect(address).await.unwrap().into_std().unwrap());
    }
    // Connections are accepted in their order: this one after all of those.
    let reader = broker.connect(Role::Reader, "r").await;
    call(&reader, "/shaper.v1.Broker/ListNodes").await.unwrap();
    let is_open = |stream: &mut std::net::TcpStream| match stream.read(&mut [0]) {
        Ok(_) => false,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    };
    let open = silent.iter_mut().filter_map(|stream| is_open(stream).then_some(())).count();
    assert_eq!(open, 32, "of one address no more may be silent at once");
}
