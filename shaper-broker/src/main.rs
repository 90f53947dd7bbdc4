//! Wires the broker together.

use std::{
    fs,
    io::{self, IsTerminal},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use shaper_broker::{
    actor::{self, Actor, Handle},
    config::{Config, Options, StoreKind},
    service::BrokerService,
    session::SessionService,
    store::{Store, memory::Memory, redb::Redb},
};
use shaper_identity::{
    Role,
    serve::{self, Guard, Incoming, Limits, Tcp},
};
use shaper_proto::{
    FILE_DESCRIPTOR_SET, peer,
    v1::{agent_session_server::AgentSessionServer, broker_server::BrokerServer},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt;
use tonic::transport::Server;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The largest message that is read.
const MAX_MESSAGE: usize = 1 << 20;
/// A peer that does not answer a ping for this long is gone, be it only stopped.
const KEEPALIVE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let ansi = io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).init();
    match serve(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shaper-broker: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn serve(options: Options) -> Result<(), Error> {
    let config = options.check()?;
    let _lock = config.lock_state()?;
    let store: Box<dyn Store> = match config.store {
        StoreKind::Memory => Box::new(Memory::default()),
        StoreKind::Redb => Box::new(Redb::open(&config.store_file())?),
    };
    let (handle, actor) = Actor::open(store)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let actor = std::thread::Builder::new().name("broker".into()).spawn(move || actor.run())?;

    let served = runtime.block_on(listen(&config, handle.clone()));
    // First, so that sessions that break off now are not taken for nodes that are lost.
    runtime.block_on(handle.stop());
    actor.join().map_err(|_| "the broker's thread panicked")??;
    served
}

/// Serves the listeners until SIGTERM or SIGINT, or until the broker's thread has ended.
async fn listen(config: &Config, handle: Handle) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut incoming: Incoming = Box::pin(tokio_stream::empty());
    let mut helpers = Vec::new();
    if let Some(socket) = &config.socket {
        let (local, accept) = serve::local(peer::bind(socket, config.socket_gid)?);
        incoming = local;
        helpers.push(accept);
    }
    let (access, follower) = serve::follow_access(config.identities.as_deref())?;
    helpers.extend(follower);
    if let Some((address, directory)) = &config.tcp {
        let tcp = Tcp::bind(*address, directory, Role::Broker, access.clone()).await?;
        tracing::info!(address = %tcp.address()?, "listening for those who have a certificate");
        let (certified, accept) = tcp.incoming();
        incoming = Box::pin(incoming.merge(certified));
        helpers.push(accept);
    }
    let ticks = tokio::spawn(actor::tick(handle.clone()));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<BrokerServer<BrokerService>>().await;
    health.set_serving::<AgentSessionServer<SessionService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let broker = BrokerServer::new(BrokerService::new(handle.clone())).max_decoding_message_size(MAX_MESSAGE);
    let sessions =
        AgentSessionServer::new(SessionService::new(handle.clone())).max_decoding_message_size(MAX_MESSAGE);
    let socket = config.socket.as_ref().map(|socket| socket.display().to_string());
    tracing::info!(socket, "ready");
    let server = Server::builder()
        .layer(Guard::new(access, Limits::BROKER))
        .concurrency_limit_per_connection(64)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(broker)
        .add_service(sessions)
        .add_service(health_service)
        .add_service(reflection)
        .serve_with_incoming(incoming);
    // Not a graceful shutdown: sessions and watches never end by themselves. A request that is cut off
    // has been carried out or not, as after any lost connection.
    let served = tokio::select! {
        served = server => served.map_err(Error::from),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        () = handle.ended() => Ok(()),
    };
    handle.stop().await;
    ticks.abort();
    for helper in helpers {
        helper.abort();
    }
    if let Some(socket) = &config.socket {
        // Whoever comes next makes its own.
        let _ = fs::remove_file(socket);
    }
    served
}
