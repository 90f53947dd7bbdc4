//! Wires the broker together.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, IsTerminal},
    process::ExitCode,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use clap::{CommandFactory, Parser};
use shaper_broker::{
    actor::{self, Actor, FatalError, Handle, Seat},
    config::{Command, Config, EtcdConfig, Options, Stores},
    metrics,
    scale::{self, Keda},
    service::BrokerService,
    session::SessionService,
    standing::{Gate, Standing},
    store::{
        Store, StoreError,
        etcd::{Etcd, Leadership},
        memory::Memory,
        redb::Redb,
    },
    upkeep, web,
};
use shaper_core::scale::{Order, Scaling};
use shaper_identity::{
    Role,
    serve::{self, Guard, Incoming, Limits, Tcp},
};
use shaper_metrics::{listen::Listener, traces};
use shaper_proto::{
    FILE_DESCRIPTOR_SET, notify, peer,
    scale::keda::external_scaler_server::ExternalScalerServer,
    v1::{agent_session_server::AgentSessionServer, broker_server::BrokerServer},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};
use tokio_stream::StreamExt;
use tonic::{service::interceptor::InterceptedService, transport::Server};
use tonic_health::server::HealthReporter;
use tower::util::option_layer;

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
    let mut options = Options::parse();
    let done = match options.command.take() {
        None => serve(options).map(|()| ExitCode::SUCCESS),
        Some(Command::Store(command)) => tend(command, options),
        Some(Command::Man) => man(),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("shaper-broker: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// The thread that decides makes and drops many small things, which others read: glibc's allocator took a quarter of its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// An error and its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn man() -> Result<ExitCode, Error> {
    clap_mangen::Man::new(Options::command()).section("8").render(&mut io::stdout().lock())?;
    Ok(ExitCode::SUCCESS)
}

/// Does something with the store instead of serving.
fn tend(command: upkeep::Command, options: Options) -> Result<ExitCode, Error> {
    let store = options.store.check(&options.listen)?;
    let whole = upkeep::run(command, &store, &mut io::stdin().lock(), &mut io::stdout().lock())?;
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn serve(options: Options) -> Result<(), Error> {
    let config = options.check()?;
    let _lock = config.store.lock_state()?;
    let _traces = config.traces.begin("shaper-broker", None)?;
    let (handle, mut seat) = actor::prepare(config.bounds);
    let scaling = config.scaling.clone().unwrap_or_default();
    let scales = Scales { orders: seat.scale(scaling.clone()), scaling };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (standing, follower) = watch::channel(Standing::Standby(None));
    let mut reign = Reign::default();
    let mut alone = |open: Open, seat: Seat, scales: Scales| {
        runtime.block_on(reign.begin(open, seat))?;
        standing.send_replace(Standing::Leads);
        runtime.block_on(listen(&config, handle.clone(), follower.clone(), scales))
    };
    let served = match &config.store.rows {
        Stores::Memory => alone(Box::new(|| Ok(Box::new(Memory::default()))), seat, scales),
        Stores::Redb => {
            let file = config.store.file();
            alone(Box::new(move || Ok(Box::new(Redb::open(&file)?))), seat, scales)
        }
        Stores::Etcd(etcd) => {
            let served = runtime.block_on(async {
                tokio::select! {
                    served = listen(&config, handle.clone(), follower, scales) => Ok(served),
                    lost = reign.over(etcd, seat, &standing) => Err(lost),
                }
            });
            match served {
                Ok(served) => served,
                // Whatever the thread still tries is refused.
                Err(lost) => return reign.outcome(lost),
            }
        }
    };
    // First, so that sessions that break off now are not taken for nodes that are lost.
    runtime.block_on(handle.stop());
    let ended = reign.join();
    if let Some(leadership) = reign.leadership.take() {
        runtime.block_on(leadership.resign());
    }
    ended?;
    served
}

/// Opens a store.
type Open = Box<dyn FnOnce() -> Result<Box<dyn Store>, StoreError> + Send>;

/// The broker's thread, and by what right it decides.
#[derive(Default)]
struct Reign {
    thread: Option<JoinHandle<Result<(), FatalError>>>,
    /// Where there may be others.
    leadership: Option<Leadership>,
}

impl Reign {
    /// Starts the thread; returns when it has taken over the store.
    async fn begin(&mut self, open: Open, seat: Seat) -> Result<(), Error> {
        let (ready, is_ready) = oneshot::channel();
        let work = move || {
            let actor = Actor::open(open()?, seat)?;
            // Who waits for it may have been told to end.
            let _ = ready.send(());
            actor.run()
        };
        self.thread = Some(thread::Builder::new().name("broker".into()).spawn(work)?);
        match is_ready.await {
            Ok(()) => Ok(()),
            Err(_) => self.join(),
        }
    }

    /// Waits to lead, begins, and returns when it is over.
    async fn over(&mut self, etcd: &EtcdConfig, seat: Seat, standing: &watch::Sender<Standing>) -> Error {
        let EtcdConfig { place, lease, advertise } = etcd.clone();
        let stand_by = |leader: &str| {
            standing.send_replace(Standing::Standby(Some(leader.to_owned())));
            tracing::info!(leader, "standing by");
        };
        let mut leadership = match Leadership::win(place.clone(), &advertise, lease, stand_by).await {
            Ok(leadership) => leadership,
            Err(error) => return error.into(),
        };
        let fence = leadership.fence();
        let open = Box::new(move || Ok(Box::new(Etcd::open(place, Some(fence))?) as Box<dyn Store>));
        // Renewed also while the rows are read.
        let begun = tokio::select! {
            begun = self.begin(open, seat) => begun,
            lost = leadership.keep() => Err(lost.into()),
        };
        if let Err(error) = begun {
            return error;
        }
        standing.send_replace(Standing::Leads);
        tracing::info!("leading");
        self.leadership.insert(leadership).keep().await.into()
    }

    /// Ends with the thread.
    fn join(&mut self) -> Result<(), Error> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        Ok(thread.join().map_err(|_| "the broker's thread panicked")??)
    }

    /// Why it is over: what the thread says if it has ended, else this.
    fn outcome(mut self, lost: Error) -> Result<(), Error> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join()?;
        }
        Err(lost)
    }
}

/// What has nodes started and ended.
struct Scales {
    scaling: Scaling,
    orders: mpsc::UnboundedReceiver<(String, Order)>,
}

/// Serves the listeners until SIGTERM or SIGINT, or until the broker's thread has ended.
async fn listen(
    config: &Config,
    handle: Handle,
    mut standing: watch::Receiver<Standing>,
    Scales { scaling, orders }: Scales,
) -> Result<(), Error> {
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
    if let Some(wanted) = &config.metrics {
        let (broker, standing, left_out) = (handle.clone(), standing.clone(), Arc::default());
        let store = metrics::store(&config.store.rows);
        let scrape =
            move || metrics::scrape(broker.clone(), standing.borrow().clone(), store, Arc::clone(&left_out));
        helpers.push(tokio::spawn(Listener::bind(wanted).await?.serve(scrape)));
    }
    let (wishes, keda) = watch::channel(BTreeMap::new());
    if !scaling.groups.is_empty() {
        helpers.push(tokio::spawn(scale::run(handle.clone(), scaling, orders, standing.clone(), wishes)));
    }
    let mut door = None;
    if let Some(wanted) = &config.web {
        let listener = web::Listener::bind(wanted).await?;
        let opened = Arc::new(web::Door::new(listener.origin(), listener.port(), access.clone()));
        let site = web::Site::new(handle.clone(), standing.clone(), opened.clone(), listener.hosts());
        helpers.push(tokio::spawn(listener.serve(site.router())));
        door = Some(opened);
    }
    let ticks = tokio::spawn(actor::tick(handle.clone()));
    let (decides, stands) = (handle.clone(), standing.clone());
    let watchdog = notify::watchdog(move || {
        // One that stands by has no thread that could hang.
        let (broker, leads) = (decides.clone(), *stands.borrow() == Standing::Leads);
        async move { !leads || broker.read(|_| ()).await.is_ok() }
    });
    helpers.push(tokio::spawn(watchdog));
    let (health, health_service) = tonic_health::server::health_reporter();
    let gate = Gate(standing.clone());
    tell(&health, &standing.borrow_and_update().clone()).await;
    helpers.push(tokio::spawn(async move {
        while standing.changed().await.is_ok() {
            let now = standing.borrow_and_update().clone();
            tell(&health, &now).await;
        }
    }));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let broker = BrokerService::new(handle.clone()).with_door(door);
    let broker = BrokerServer::new(broker).max_decoding_message_size(MAX_MESSAGE);
    let sessions =
        AgentSessionServer::new(SessionService::new(handle.clone())).max_decoding_message_size(MAX_MESSAGE);
    let broker = InterceptedService::new(broker, gate.clone());
    let sessions = InterceptedService::new(sessions, gate.clone());
    let keda = InterceptedService::new(ExternalScalerServer::new(Keda::new(keda)), gate);
    let socket = config.socket.as_ref().map(|socket| socket.display().to_string());
    tracing::info!(socket, "ready");
    notify::ready();
    let server = Server::builder()
        .layer(option_layer(traces::are_wanted().then_some(traces::Requests)))
        .layer(Guard::new(access, Limits::BROKER))
        .concurrency_limit_per_connection(64)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(broker)
        .add_service(sessions)
        .add_service(keda)
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
    notify::stopping();
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

/// Says of both services whether they are served.
async fn tell(health: &HealthReporter, standing: &Standing) {
    match standing {
        Standing::Leads => {
            health.set_serving::<BrokerServer<BrokerService>>().await;
            health.set_serving::<AgentSessionServer<SessionService>>().await;
        }
        Standing::Standby(_) => {
            health.set_not_serving::<BrokerServer<BrokerService>>().await;
            health.set_not_serving::<AgentSessionServer<SessionService>>().await;
        }
    }
}
