//! Wires the agent together.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use clap::{Args, CommandFactory, Parser, Subcommand};
use shaper_agent::{
    actor::{self, Handle},
    adoption, calibrate,
    config::{Config, OnExit, Options},
    kernel::features,
    launch, metrics,
    node::Node,
    open_files,
    opener::Opener,
    service::AgentService,
    session,
};
use shaper_core::doctor::Availability;
use shaper_identity::serve::{self, Guard, Limits};
use shaper_metrics::{listen::Listener, traces};
use shaper_proto::{
    notify,
    peer::{self, Caller},
    v1::agent_server::AgentServer,
};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tower::util::option_layer;

#[derive(Parser)]
#[command(version, about = "The agent of one node: measures and enforces the limits of its tasks")]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Without a running agent: what this kernel has of what shaper uses, a line each: feature, tab, yes, no or
    /// unusable, tab, why
    Probe,
    /// With or without a running agent: measures what a block device can do, and has the kernel divide it by weight
    /// (io.cost). It only reads, unless it is told where it may write
    Calibrate(Box<calibrate::Options>),
    /// With or without a running agent: which cgroups the rules of a file would adopt now, a line each: rule, tab, task, tab,
    /// cgroup
    Adoption(adoption::Check),
    /// Without a running agent: lifts every limit and removes all that an agent made in the kernel
    Release(Box<Release>),
    /// For packages: prints the manual page of this program
    #[command(hide = true)]
    Man,
}

#[derive(Args)]
struct Release {
    /// Every task of this node; nothing less can be released without a running agent
    #[arg(long, required = true)]
    all: bool,
    #[command(flatten)]
    options: Options,
}

type Error = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let ansi = io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).init();
    let arguments = Arguments::parse();
    let result = match arguments.command {
        None => serve(arguments.options),
        Some(Command::Probe) => probe(),
        Some(Command::Calibrate(options)) => calibrate(&options),
        Some(Command::Adoption(check)) => adoption(&check),
        Some(Command::Release(release)) => release_all(release.options),
        Some(Command::Man) => man(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shaper-agent: {}", launch::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Root, as which this program runs.
fn operator() -> Caller {
    Caller { uid: 0, gid: 0, groups: Vec::new() }
}

fn probe() -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    for rung in features::probe(&Opener::default())? {
        let (state, why) = match rung.availability {
            Availability::Available => ("yes", String::new()),
            Availability::Missing { evidence } => ("no", evidence),
            Availability::Unusable { reason } => ("unusable", reason),
        };
        writeln!(stdout, "{}\t{state}\t{why}", rung.feature)?;
    }
    Ok(())
}

fn man() -> Result<(), Error> {
    Ok(clap_mangen::Man::new(Arguments::command()).section("8").render(&mut io::stdout().lock())?)
}

fn calibrate(options: &calibrate::Options) -> Result<(), Error> {
    let done = calibrate::run(options, &mut |what| eprintln!("shaper-agent: {what}"))?;
    print!("{done}");
    Ok(())
}

fn adoption(check: &adoption::Check) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    for line in check.run()? {
        writeln!(stdout, "{line}")?;
    }
    Ok(())
}

fn release_all(options: Options) -> Result<(), Error> {
    let config = options.check()?;
    let lock = config.lock_state()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _entered = runtime.enter();
    let (handle, _queue) = Handle::new();
    let mut node = Node::open(config, lock, handle, runtime.handle().clone())?;
    for line in node.release_all(&operator())? {
        println!("{line}");
    }
    Ok(())
}

fn serve(options: Options) -> Result<(), Error> {
    let config = options.check()?;
    let lock = config.lock_state()?;
    if let Err(error) = open_files::raise() {
        tracing::warn!(%error, "cannot raise the limit of open files: with many tasks some are not measured");
    }
    let _traces = config.traces.begin("shaper-agent", Some(&config.node))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (handle, queue) = Handle::new();
    let node = Node::open(config.clone(), lock, handle.clone(), runtime.handle().clone())?;
    let node = std::thread::Builder::new().name("node".into()).spawn(move || actor::run(node, queue))?;

    let served = runtime.block_on(listen(&config, handle.clone()));
    runtime.block_on(handle.tell(Node::stop));
    let mut node = node.join().map_err(|_| "the node's thread panicked")?;
    served?;
    if config.on_exit == OnExit::Release {
        for line in node.release_all(&operator())? {
            tracing::info!("{line}");
        }
    }
    Ok(())
}

/// Serves the socket until SIGTERM or SIGINT.
async fn listen(config: &Config, handle: Handle) -> Result<(), Error> {
    let (incoming, accept) = serve::local(peer::bind(&config.socket, config.socket_gid)?);
    // Nobody has a certificate on this socket.
    let (access, _) = serve::follow_access(None)?;
    let metrics = match &config.metrics {
        Some(metrics) => {
            let (node, opener, ladder) = (handle.clone(), config.opener.clone(), metrics::Ladder::default());
            let scrape = move || metrics::scrape(node.clone(), ladder.clone(), opener.clone());
            Some(tokio::spawn(Listener::bind(metrics).await?.serve(scrape)))
        }
        None => None,
    };
    let ticks = tokio::spawn(actor::tick(handle.clone()));
    let session = (!config.brokers.is_empty())
        .then(|| tokio::spawn(session::keep(config.brokers.clone(), handle.clone())));
    let (births, adoption) = match config.adoption.clone() {
        Some(config) => {
            let (births, keep) = adoption::begin(config, handle.clone());
            (Some(births), Some(tokio::spawn(keep)))
        }
        None => (None, None),
    };
    let containers = config.containers.clone().map(|containers| tokio::spawn(containers.watch()));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tracing::info!(node = config.node, socket = %config.socket.display(), "ready");
    notify::ready();
    let alive = handle.clone();
    let watchdog = tokio::spawn(notify::watchdog(move || {
        let node = alive.clone();
        async move { node.call(|_| ()).await.is_ok() }
    }));
    let server = Server::builder()
        .layer(option_layer(traces::are_wanted().then_some(traces::Requests)))
        .layer(Guard::new(access, Limits::AGENT))
        .concurrency_limit_per_connection(64)
        .add_service(AgentServer::new(AgentService::new(handle, births)).max_decoding_message_size(1 << 20))
        .serve_with_incoming(incoming);
    // Not a graceful shutdown: a stream that follows a log would hold it up for ever. A request that
    // is cut off has been carried out or not, as after any lost connection.
    let served = tokio::select! {
        served = server => served.map_err(Error::from),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    notify::stopping();
    watchdog.abort();
    accept.abort();
    ticks.abort();
    for helper in [session, metrics, adoption, containers].into_iter().flatten() {
        helper.abort();
    }
    let _ = fs::remove_file(&config.socket);
    served
}
