//! A broker with an authority, and connections to it.

use std::{
    fs,
    io::{BufRead, BufReader},
    ops::Deref,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use shaper_identity::{
    Identity, Role,
    pki::Authority,
    tls::{self, ClientConfig, Material},
};
use tempfile::TempDir;
use tokio::sync::watch;
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A broker with an authority, a Unix socket and a port of its own.
pub(crate) struct Broker {
    directory: TempDir,
    pub(crate) authority: Authority,
    daemon: Daemon,
}

impl Deref for Broker {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

/// A program that listens over TCP, until it is dropped.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) address: String,
    log: watch::Receiver<String>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn identity(role: Role, name: &str) -> Identity {
    Identity::new("lab", role, name).unwrap()
}

impl Daemon {
    /// Starts it, and returns once it has said where it listens.
    pub(crate) fn start(mut command: Command) -> Daemon {
        let mut child =
            command.env("RUST_LOG", "info").env("NO_COLOR", "1").stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address =
            lines.find_map(|line| Some(line.split_once("certificate address=")?.1.trim().to_owned()));
        let address = address.expect("it says where it listens");
        let (kept, log) = watch::channel(String::new());
        std::thread::spawn(move || {
            for line in lines {
                kept.send_modify(|log| {
                    log.push_str(&line);
                    log.push('\n');
                });
            }
        });
        Daemon { child, address, log }
    }

    /// Waits for a line of the log.
    pub(crate) async fn says(&self, wanted: &[&str]) {
        let said = |log: &String| log.lines().any(|line| wanted.iter().all(|wanted| line.contains(wanted)));
        let mut log = self.log.clone();
        let is_said = tokio::time::timeout(PATIENCE, log.wait_for(said)).await.is_ok_and(|said| said.is_ok());
        assert!(is_said, "no line has {wanted:?}:\n{}", *self.log.borrow());
    }
}

/// A connection to who listens there, if both sides believe each other.
pub(crate) async fn connect_to(
    address: &str,
    config: Arc<ClientConfig>,
) -> Result<Channel, tonic::transport::Error> {
    let address = address.to_owned();
    let connector = tower::service_fn(move |_| {
        let (address, config) = (address.clone(), Arc::clone(&config));
        async move { tls::connect(&address, config).await }
    });
    Endpoint::from_static("http://daemon").connect_with_connector(connector).await
}

impl Broker {
    pub(crate) fn start() -> Broker {
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        let authority = Authority::create(&at("ca"), "lab").unwrap();
        authority.issue(&at("tls"), &identity(Role::Broker, "b"), &["localhost".into()], DAY).unwrap();
        let etl = "identities:\n  - id: spiffe://lab/submitter/etl\n    uid: 1500\n    gid: 1500\n    namespaces: [etl]\n    \
                   max_priority: medium\n";
        fs::write(at("identities.yaml"), etl).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_shaper-broker"));
        command.args(["--listen", "tcp://127.0.0.1:0", "--store", "memory"]);
        command.arg("--listen").arg(at("b.sock")).arg("--state-dir").arg(at("state"));
        command.arg("--tls-dir").arg(at("tls")).arg("--identities").arg(at("identities.yaml"));
        let daemon = Daemon::start(command);
        Broker { directory, authority, daemon }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn material(&self, role: Role, name: &str) -> Material {
        let at = self.path(&format!("{role}-{name}"));
        self.authority.issue(&at, &identity(role, name), &[], DAY).unwrap();
        Material::load(&at).unwrap()
    }

    pub(crate) async fn connect_with(&self, material: &Material) -> Result<Channel, tonic::transport::Error> {
        connect_to(&self.address, material.client(&[Role::Broker]).unwrap()).await
    }

    pub(crate) async fn connect(&self, role: Role, name: &str) -> Channel {
        self.connect_with(&self.material(role, name)).await.unwrap()
    }

    pub(crate) async fn connect_locally(&self) -> Channel {
        let path = self.path("b.sock");
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://broker").connect_with_connector(connector).await.unwrap()
    }

    /// On the Unix socket, as the kernel sees a user other than root.
    pub(crate) async fn connect_as(&self, uid: u32) -> Channel {
        let path = self.path("b.sock");
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            // The kernel takes the credentials of the thread that connects; this one ends as somebody else.
            let connect = move || {
                let uid = rustix::process::Uid::from_raw(uid);
                rustix::thread::set_thread_res_uid(uid, uid, uid)?;
                let stream = std::os::unix::net::UnixStream::connect(path)?;
                stream.set_nonblocking(true)?;
                Ok::<_, std::io::Error>(stream)
            };
            async move {
                let stream = std::thread::spawn(connect).join().expect("it does not panic")?;
                tokio::net::UnixStream::from_std(stream).map(TokioIo::new)
            }
        });
        Endpoint::from_static("http://broker").connect_with_connector(connector).await.unwrap()
    }
}

/// Makes a call with an empty message, and says how it was answered.
pub(crate) async fn call(channel: &Channel, path: &'static str) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let messages = Request::new(tokio_stream::once(()));
    let answer = client.streaming(messages, PathAndQuery::from_static(path), codec).await?;
    // A refusal may also come at the end of an answer that has begun.
    let mut answer = answer.into_inner();
    match tokio::time::timeout(Duration::from_millis(200), answer.message()).await {
        Ok(message) => message.map(|_| ()),
        Err(_) => Ok(()),
    }
}
