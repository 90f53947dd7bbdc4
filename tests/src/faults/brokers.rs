//! The brokers: each with a network namespace, a socket for those who look on, and somebody who starts it again.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustix::process::Signal;
use shaper_proto::v1::{self, broker_client::BrokerClient};
use tokio::{net::UnixStream, runtime};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    LEASE, TASK_LEASE_SECONDS,
    history::{History, Seen},
    members,
    switch::{Lan, Plug, Switch},
};
use crate::{bins::binary, net::Netns, process::Process};

/// How many.
pub(super) const BROKERS: usize = 3;
/// The address of the first, on both networks.
const FIRST: u8 = 21;
const PORT: u16 = 7070;
/// Before one that has ended is started again: as its unit says.
const RESTART: Duration = Duration::from_secs(1);
/// The largest answer that is read: all tasks.
const MAX_ANSWER: usize = 64 << 20;

/// Of the broker of that number.
pub(super) fn address(lan: Lan, number: usize) -> String {
    lan.address(FIRST + number as u8)
}

/// What agents are told.
pub(super) fn addresses() -> Vec<String> {
    (0..BROKERS).map(|number| format!("{}:{PORT}", address(Lan::Agents, number))).collect()
}

/// One of them.
pub(super) struct Broker {
    number: usize,
    netns: Netns,
    /// To etcd, and to the agents.
    pub(super) plugs: [Plug; 2],
    directory: PathBuf,
    identity: PathBuf,
    history: History,
    run: Mutex<Run>,
    changed: Condvar,
    watcher: runtime::Handle,
}

#[derive(Default)]
struct Run {
    /// How many processes it has had.
    count: u32,
    process: Option<Process>,
    /// When it began to serve, if it does.
    serves: Option<Duration>,
    /// Not to be started for now.
    is_held: bool,
    is_over: bool,
}

/// All of them, until this is dropped.
pub(super) struct Brokers {
    pub(super) all: Vec<Arc<Broker>>,
    keepers: Vec<JoinHandle<()>>,
    _watchers: runtime::Runtime,
}

impl Brokers {
    /// Starts them. `identities` has a certificate of each: `b0` …
    pub(super) fn start(switch: &Switch, directory: &Path, identities: &Path, history: &History) -> Brokers {
        let watchers = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let watchers = watchers.expect("threads can be started");
        let broker = |number: usize| {
            let netns = Netns::new();
            let name = name(number);
            let plug = |lan| switch.connect(&netns, &name, lan, FIRST + number as u8);
            let plugs = [plug(Lan::Etcd), plug(Lan::Agents)];
            let directory = directory.join(&name);
            fs::create_dir(&directory).expect("a directory can be made");
            Arc::new(Broker {
                number,
                netns,
                plugs,
                directory,
                identity: identities.join(&name),
                history: history.clone(),
                run: Mutex::default(),
                changed: Condvar::new(),
                watcher: watchers.handle().clone(),
            })
        };
        let all: Vec<_> = (0..BROKERS).map(broker).collect();
        let keep = |broker: &Arc<Broker>| {
            let broker = broker.clone();
            thread::spawn(move || broker.keep())
        };
        let keepers = all.iter().map(keep).collect();
        Brokers { all, keepers, _watchers: watchers }
    }

    /// The one that said last that it serves, if it is still there.
    pub(super) fn leader(&self) -> Option<usize> {
        // One that is stopped does not know that another leads.
        (0..self.all.len())
            .filter_map(|number| Some((self.all[number].lock().serves?, number)))
            .max()
            .map(|(_, number)| number)
    }
}

impl Drop for Brokers {
    fn drop(&mut self) {
        for broker in &self.all {
            broker.lock().is_over = true;
            broker.changed.notify_all();
            broker.signal(Signal::KILL);
        }
        for keeper in self.keepers.drain(..) {
            let _ = keeper.join();
        }
    }
}

pub(super) fn name(number: usize) -> String {
    format!("b{number}")
}

impl Broker {
    fn lock(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("broker.sock")
    }

    /// Where the deviation of its clock is.
    fn clock(&self) -> PathBuf {
        self.directory.join("clock")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// Starts it whenever it is not there and not held.
    fn keep(self: Arc<Broker>) {
        let mut run = self.lock();
        loop {
            while run.is_held && !run.is_over {
                run = self.changed.wait(run).unwrap_or_else(PoisonError::into_inner);
            }
            if run.is_over {
                return;
            }
            let mut child = self.spawn();
            run.count += 1;
            run.process = Some(Process::open(child.id()));
            let by = self.title(run.count);
            drop(run);
            if let Some(said) = child.stderr.take() {
                self.listen(&by, said);
            }
            let _ = child.wait();
            run = self.lock();
            (run.process, run.serves) = (None, None);
            self.history.note(Seen::Gone { by });
            let waits = |run: &mut Run| !run.is_over;
            run = match self.changed.wait_timeout_while(run, RESTART, waits) {
                Ok((run, _)) => run,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    fn title(&self, count: u32) -> String {
        format!("{}.{count}", name(self.number))
    }

    fn spawn(&self) -> Child {
        let mut command = Command::new(binary("shaper-broker"));
        command.arg("--listen").arg(self.socket()).args(["--listen", &format!("tcp://0.0.0.0:{PORT}")]);
        command.arg("--tls-dir").arg(&self.identity).arg("--state-dir").arg(self.directory.join("state"));
        command.args(["--store", "etcd", "--etcd-insecure", "--etcd-endpoints", &members::endpoints()]);
        command.args(["--lease-seconds", &LEASE.as_secs().to_string()]);
        command.args(["--task-lease-seconds", TASK_LEASE_SECONDS]);
        command.args(["--advertise", &format!("https://{}:{PORT}", address(Lan::Agents, self.number))]);
        command.env("RUST_LOG", "info").env("NO_COLOR", "1").env("SHAPER_CLOCK", self.clock());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        self.netns.within(|| command.spawn()).expect("shaper-broker can be started")
    }

    /// Follows what it says, until its end.
    fn listen(self: &Arc<Broker>, by: &str, said: ChildStderr) {
        let mut log = File::options().create(true).append(true).open(self.log()).expect("a file can be made");
        for line in BufReader::new(said).lines().map_while(Result::ok) {
            let _ = writeln!(log, "{by} {:?} {line}", self.history.elapsed());
            if line.contains("took over the store")
                && let Some(epoch) = number_after(&line, "epoch=")
            {
                self.history.note(Seen::Took { by: by.to_owned(), epoch });
            }
            if line.contains(" ready ") {
                let (broker, by) = (self.clone(), by.to_owned());
                self.watcher.spawn(async move {
                    // It may end at any time.
                    let _ = broker.watch(by).await;
                });
            }
        }
    }

    /// Waits until it serves.
    async fn watch(&self, by: String) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut client = HealthClient::new(connect(&self.socket()).await?);
        let request = HealthCheckRequest { service: "shaper.v1.Broker".into() };
        let mut changes = client.watch(request).await?.into_inner();
        while let Some(now) = changes.message().await? {
            if now.status() == ServingStatus::Serving {
                self.history.note(Seen::Serves { by: by.clone() });
                let mut run = self.lock();
                if self.title(run.count) == by {
                    run.serves = Some(self.history.elapsed());
                }
            }
        }
        Ok(())
    }

    /// A connection to the process that is there now, and to no later one; and what that is called.
    pub(super) async fn client(&self) -> Option<(BrokerClient<Channel>, String)> {
        let count = self.alive()?;
        let channel = connect(&self.socket()).await.ok()?;
        // What listened then was that process.
        if self.alive() != Some(count) {
            return None;
        }
        let client = BrokerClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        Some((client, self.title(count)))
    }

    /// Which process there is.
    fn alive(&self) -> Option<u32> {
        let run = self.lock();
        run.process.as_ref().map(|_| run.count)
    }

    /// One that has ended is fine.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some(process) = &self.lock().process {
            process.signal(signal);
        }
    }

    /// SIGKILL; it is not started again until [`Broker::let_go`].
    pub(super) fn kill(&self) {
        self.lock().is_held = true;
        self.signal(Signal::KILL);
    }

    /// It may be started again.
    pub(super) fn let_go(&self) {
        self.lock().is_held = false;
        self.changed.notify_all();
    }

    /// Sets its wall clock off by so much.
    pub(super) fn set_clock(&self, seconds: i64) {
        let new = self.directory.join("clock.new");
        let written = fs::write(&new, seconds.to_string()).and_then(|()| fs::rename(&new, self.clock()));
        written.expect("a file can be made");
    }
}

fn number_after(line: &str, mark: &str) -> Option<u64> {
    let (_, rest) = line.split_once(mark)?;
    let digits = rest.split(|character: char| !character.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// A channel that is one connection: it does not connect again.
async fn connect(socket: &Path) -> Result<Channel, Box<dyn std::error::Error + Send + Sync>> {
    let stream = Arc::new(Mutex::new(Some(UnixStream::connect(socket).await?)));
    let connector = tower::service_fn(move |_| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move { stream.map(TokioIo::new).ok_or_else(|| std::io::Error::other("it is over")) }
    });
    Ok(Endpoint::from_static("http://broker").connect_with_connector(connector).await?)
}

/// Every task, as a broker tells it.
pub(super) async fn all_tasks(client: &mut BrokerClient<Channel>) -> Option<Vec<v1::ClusterTask>> {
    let answer = client.list_cluster_tasks(v1::ListClusterTasksRequest {}).await.ok()?;
    Some(answer.into_inner().tasks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_epoch_is_found_in_a_log() {
        let line = "INFO shaper_broker::actor: took over the store epoch=12 tasks=3 nodes=1";
        assert_eq!(number_after(line, "epoch="), Some(12));
        assert_eq!(number_after(line, "rows="), None);
    }
}
