//! Signs certificates for those who join. It holds the authority's key, so that the broker need not: run it where that key is
//! safe, and only while somebody joins, if you like.

use std::{
    io::{self, IsTerminal},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, CommandFactory, Parser, Subcommand};
use shaper_broker::enrolment::EnrolmentService;
use shaper_identity::{
    Identity, Role,
    pki::Authority,
    serve::{self, Guard, Limits, Tcp},
};
use shaper_proto::v1::enrolment_server::EnrolmentServer;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;

/// The authority of a cluster: gives certificates to those who have a token (`shaper pki token`, `shaper pki join`), and new
/// ones to those who have one (`shaper pki renew`).
#[derive(Clone, Debug, Args)]
struct Options {
    /// Directory with ca.pem and ca.key, as `shaper pki init` makes it. Open tokens and this server's own certificate
    /// are kept there, too
    #[arg(long, value_name = "DIR")]
    ca_dir: PathBuf,
    /// Where to listen: tcp://ADDRESS:PORT
    #[arg(long, value_name = "ADDRESS", value_parser = tcp)]
    listen: SocketAddr,
    /// Whose names these are
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    trust_domain: String,
    /// How many days a certificate is good for
    #[arg(long, value_name = "N", default_value_t = 90, value_parser = clap::value_parser!(u64).range(1..=825))]
    days: u64,
    /// File that says who is not believed any more (`revoked`), as the broker has it
    #[arg(long, value_name = "FILE")]
    identities: Option<PathBuf>,
}

#[derive(Debug, Parser)]
#[command(
    name = "shaper-authority",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(flatten)]
    options: Option<Options>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// For packages: prints the manual page of this program
    #[command(hide = true)]
    Man,
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The largest message that is read: a request for a certificate takes less than 1 KiB.
const MAX_MESSAGE: usize = 64 << 10;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The own certificate is made anew at each start and each day.
const OWN: Duration = Duration::from_secs(7 * 24 * 60 * 60);

fn tcp(text: &str) -> Result<SocketAddr, String> {
    let address = text.strip_prefix("tcp://").and_then(|address| address.parse().ok());
    address.ok_or_else(|| {
        "say an address and a port, such as tcp://127.0.0.1:7071 or tcp://[::]:7071".to_owned()
    })
}

/// An error and its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let ansi = io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).init();
    let Arguments { options: Some(options), command: None } = Arguments::parse() else {
        // The command can be nothing else.
        let page = clap_mangen::Man::new(Arguments::command()).section("8").render(&mut io::stdout().lock());
        return if page.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.map_err(Error::from).and_then(|runtime| runtime.block_on(serve(options)));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shaper-authority: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn serve(options: Options) -> Result<(), Error> {
    let Options { ca_dir, listen, trust_domain, days, identities } = options;
    let _lock = shaper_proto::daemon::lock_state(&ca_dir, "authority")?;
    let service = EnrolmentService::open(&ca_dir, &trust_domain, DAY * u32::try_from(days)?)?;
    let own = ca_dir.join("authority");
    let identity = Identity::new(&trust_domain, Role::Authority, "a")?;
    let renew = move |ca_dir: PathBuf, own: PathBuf| {
        let identity = identity.clone();
        async move {
            let issue = move || Authority::load(&ca_dir)?.issue(&own, &identity, &[], OWN);
            tokio::task::spawn_blocking(issue).await.map_err(Error::from)?.map_err(Error::from)
        }
    };
    renew(ca_dir.clone(), own.clone()).await?;
    let (access, follower) = serve::follow_access(identities.as_deref())?;
    let tcp = Tcp::bind(listen, &own, Role::Authority, access.clone()).await?;
    tracing::info!(address = %tcp.address()?, "listening for those who want a certificate");
    let (incoming, accept) = tcp.incoming();
    let renewals = tokio::spawn(async move {
        let mut days = tokio::time::interval(DAY);
        days.tick().await;
        loop {
            days.tick().await;
            if let Err(error) = renew(ca_dir.clone(), own.clone()).await {
                tracing::error!(error = chain(error.as_ref()), "cannot renew the own certificate");
            }
        }
    });
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let server = Server::builder()
        .layer(Guard::new(access, Limits::AUTHORITY))
        .concurrency_limit_per_connection(8)
        .add_service(EnrolmentServer::new(service).max_decoding_message_size(MAX_MESSAGE))
        .serve_with_incoming(incoming);
    let served = tokio::select! {
        served = server => served.map_err(Error::from),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    for helper in [Some(accept), Some(renewals), follower].into_iter().flatten() {
        helper.abort();
    }
    served
}
