//! Wires the agent together.

use std::{
    fs,
    io::{self, IsTerminal},
    os::unix::fs::{FileTypeExt, PermissionsExt, chown},
    path::Path,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};
use shaper_agent::{
    actor::{self, Handle},
    caller::{Admission, Caller, PeerStream},
    config::{Config, OnExit, Options},
    launch,
    node::Node,
    service::AgentService,
    session,
};
use shaper_proto::v1::agent_server::AgentServer;
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

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
    /// Without a running agent: lifts every limit and removes all that an agent made in the kernel
    Release(Release),
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
        Some(Command::Release(release)) => release_all(release.options),
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
    let listener = bind(config)?;
    let (connections, incoming) = mpsc::channel::<io::Result<PeerStream>>(16);
    let admission = Admission::new(CONNECTIONS_PER_USER);
    let accept = tokio::spawn(async move {
        loop {
            let connection = listener.accept().await;
            match connection.and_then(|(stream, _)| PeerStream::identify(stream, &admission)) {
                Ok(Some(stream)) => {
                    if connections.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
                // This user has as many as one may have: hung up on.
                Ok(None) => {}
                // One caller that went away, or too many open files: the next may do better.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                }
            }
        }
    });
    let ticks = tokio::spawn(actor::tick(handle.clone()));
    let session = config.broker.clone().map(|broker| tokio::spawn(session::keep(broker, handle.clone())));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tracing::info!(node = config.node, socket = %config.socket.display(), "ready");
    let server = Server::builder()
        .concurrency_limit_per_connection(64)
        .add_service(AgentServer::new(AgentService::new(handle)).max_decoding_message_size(1 << 20))
        .serve_with_incoming(ReceiverStream::new(incoming));
    // Not a graceful shutdown: a stream that follows a log would hold it up for ever. A request that
    // is cut off has been carried out or not, as after any lost connection.
    let served = tokio::select! {
        served = server => served.map_err(Error::from),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    accept.abort();
    ticks.abort();
    if let Some(session) = session {
        session.abort();
    }
    let _ = fs::remove_file(&config.socket);
    served
}

/// Connections that one user other than root may have at once.
const CONNECTIONS_PER_USER: usize = 64;

/// Makes the socket, which nobody can connect to before it has its mode and group.
fn bind(config: &Config) -> Result<UnixListener, Error> {
    let socket = &config.socket;
    let directory = socket.parent().ok_or("the socket has no directory")?;
    fs::create_dir_all(directory).map_err(|error| format!("cannot make {}: {error}", directory.display()))?;
    match fs::symlink_metadata(socket) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(format!("--listen {}: it exists, and is not a socket", socket.display()).into());
        }
        Ok(_) => fs::remove_file(socket)
            .map_err(|error| format!("cannot replace {}: {error}", socket.display()))?,
        Err(_) => {}
    }
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(socket);
    rustix::process::umask(mask);
    let listener = listener.map_err(|error| format!("cannot listen on {}: {error}", socket.display()))?;
    give(socket, config.socket_gid)
        .map_err(|error| format!("cannot open {} to its group: {error}", socket.display()))?;
    Ok(listener)
}

fn give(socket: &Path, group: u32) -> io::Result<()> {
    chown(socket, None, Some(group))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o660))
}
