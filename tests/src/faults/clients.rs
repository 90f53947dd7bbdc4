//! Those who submit tasks, look after them and change their minds. What they get no answer to they ask again, of whichever
//! broker answers, with the same id.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use shaper_proto::v1::{self, broker_client::BrokerClient, cluster_task, exit};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status, transport::Channel};

use super::{
    brokers::{BROKERS, Broker},
    history::{Amount, History, How, Place, Seen, Told},
};
use crate::random::Random;

/// How many clients there are, and how many tasks each has under way.
pub(super) const CLIENTS: usize = 3;
const UNDER_WAY: usize = 7;
/// A call that is not answered by then is made again, of another.
const CALL: Duration = Duration::from_secs(2);
/// Between two rounds over what is under way.
const PAUSE: Duration = Duration::from_millis(150);
/// How often a task that cannot begin is placed again: as often as the broker takes.
const RETRIES: u32 = 1000;
/// Of so many looks at a task, one asks for its end; of so many submissions, one is made twice.
const CANCELS: u64 = 80;
const REPEATS: u64 = 8;
/// Between SIGTERM and SIGKILL.
const GRACE_MILLIS: u64 = 100;

/// What a task is made of: its command, and whom it runs as.
pub(super) type Recipe = dyn Fn(&str, &mut Random) -> (v1::TaskSpec, Amount) + Send + Sync;

/// All of them.
pub(super) struct Clients {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// Sets them to work.
    pub(super) fn start(
        brokers: &[Arc<Broker>],
        history: &History,
        random: &mut Random,
        recipe: &Arc<Recipe>,
    ) -> Clients {
        let over = Arc::new(AtomicBool::new(false));
        let client = |number: usize| {
            let client = Client {
                number,
                brokers: brokers.to_vec(),
                history: history.clone(),
                random: Random(random.next()),
                recipe: recipe.clone(),
                at: number % BROKERS,
                link: None,
            };
            let over = over.clone();
            thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.expect("a thread can wait for IO").block_on(client.work(&over));
            })
        };
        let threads = (0..CLIENTS).map(client).collect();
        Clients { over, threads }
    }

    /// Has them submit no more, and waits until each has the answers that it waits for.
    pub(super) fn finish(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join()
                && !thread::panicking()
            {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.end();
    }
}

struct Client {
    number: usize,
    brokers: Vec<Arc<Broker>>,
    history: History,
    random: Random,
    recipe: Arc<Recipe>,
    /// The broker that is asked.
    at: usize,
    link: Option<(BrokerClient<Channel>, String)>,
}

impl Client {
    async fn work(mut self, over: &AtomicBool) {
        let (mut count, mut under_way) = (0, Vec::new());
        while !over.load(Ordering::Relaxed) {
            while under_way.len() < UNDER_WAY && !over.load(Ordering::Relaxed) {
                let id = format!("c{}-{count}", self.number);
                count += 1;
                self.submit(&id, over).await;
                under_way.push(id);
            }
            let mut still = Vec::new();
            for id in under_way {
                if !self.look_after(&id).await {
                    still.push(id);
                }
            }
            under_way = still;
            sleep(PAUSE).await;
        }
    }

    /// Until it is acknowledged, or all is over.
    async fn submit(&mut self, id: &str, over: &AtomicBool) {
        let (spec, demand) = (self.recipe)(id, &mut self.random);
        self.history.note(Seen::Asked { task: id.to_owned(), demand });
        let mut wanted = 1 + u32::from(self.random.once_in(REPEATS));
        while wanted > 0 && !over.load(Ordering::Relaxed) {
            let request = v1::SubmitTaskRequest { spec: Some(spec.clone()) };
            let answer =
                self.call(async |client: &mut BrokerClient<Channel>| client.submit_task(request).await).await;
            match answer {
                Some((Ok(_), by)) => {
                    self.history.note(Seen::Acknowledged { task: id.to_owned(), by });
                    wanted -= 1;
                }
                Some((Err(status), by)) => panic!("{by} refuses {id}: {status}"),
                None => {}
            }
        }
    }

    /// Asks where a task is, and perhaps for its end: whether it is over.
    async fn look_after(&mut self, id: &str) -> bool {
        if self.random.once_in(CANCELS) {
            self.history.note(Seen::CancelAsked { task: id.to_owned() });
            let request = v1::CancelClusterTaskRequest { task_id: id.to_owned(), grace_millis: GRACE_MILLIS };
            // Whether it was heard is seen by what becomes of the task.
            self.call(async |client: &mut BrokerClient<Channel>| client.cancel_cluster_task(request).await)
                .await;
        }
        let since = self.history.len();
        let request = v1::GetClusterTaskRequest { task_id: id.to_owned() };
        let answer = self
            .call(async |client: &mut BrokerClient<Channel>| client.get_cluster_task(request).await)
            .await;
        let (told, by) = match answer {
            Some((Ok(task), by)) => (Some(told(&task)), by),
            Some((Err(status), by)) if status.code() == Code::NotFound => (None, by),
            Some((Err(status), by)) => panic!("{by} does not tell of {id}: {status}"),
            None => return false,
        };
        let is_over = told.as_ref().is_some_and(|told| told.place.is_over());
        self.history.note(Seen::Read { task: id.to_owned(), by, since, told });
        is_over
    }

    /// One call of the broker that answered last, or of another; `None`: nobody knows what became of it.
    async fn call<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut BrokerClient<Channel>) -> Result<tonic::Response<T>, Status>,
    ) -> Option<(Result<T, Status>, String)> {
        if self.link.is_none() {
            self.link = timeout(CALL, self.brokers[self.at].client()).await.ok().flatten();
        }
        if let Some((client, by)) = &mut self.link {
            let by = by.clone();
            match timeout(CALL, call(client)).await {
                Ok(Ok(answer)) => return Some((Ok(answer.into_inner()), by)),
                Ok(Err(status)) if is_an_answer(&status) => return Some((Err(status), by)),
                Ok(Err(_)) | Err(_) => {}
            }
        }
        self.link = None;
        self.at = (self.at + 1) % self.brokers.len();
        if self.at == self.number % BROKERS {
            sleep(PAUSE).await;
        }
        None
    }
}

/// Whether it is what a broker that leads says about a request, and not about itself or the way to it.
fn is_an_answer(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::NotFound
            | Code::AlreadyExists
            | Code::InvalidArgument
            | Code::PermissionDenied
            | Code::FailedPrecondition
    )
}

/// What a broker says of a task.
pub(super) fn told(task: &v1::ClusterTask) -> Told {
    use cluster_task::Phase;
    let place = match &task.phase {
        Some(Phase::Pending(_)) | None => Place::Waits,
        Some(Phase::StartingOn(node) | Phase::RunningOn(node)) => Place::On(node.clone()),
        Some(Phase::Ended(v1::Exit { status, .. })) => Place::Ended(match status {
            Some(exit::Status::Code(code)) => How::Code(*code),
            Some(exit::Status::Signal(signal)) => How::Signal(*signal),
            Some(exit::Status::NotStarted(_)) => How::NotStarted,
            Some(exit::Status::Unknown(_)) | None => How::Unknown,
        }),
        Some(Phase::Cancelled(_)) => Place::Cancelled,
    };
    Told { attempt: task.attempt, place }
}

/// A spec of this appetite.
pub(super) fn spec(id: &str, demand: Amount, command: Vec<String>, random: &mut Random) -> v1::TaskSpec {
    let priority = *random.of(&[v1::Priority::Low, v1::Priority::Medium, v1::Priority::High]);
    v1::TaskSpec {
        profile: Some(v1::TaskProfile {
            task_id: id.to_owned(),
            demand: Some(v1::ResourceDemand {
                cpu_millicores: demand.millicores,
                memory_bytes: demand.bytes,
                ..Default::default()
            }),
            priority: priority.into(),
            estimated_runtime_seconds: None,
        }),
        command,
        cwd: "/".to_owned(),
        name: "soak".to_owned(),
        namespace: "default".to_owned(),
        retries: RETRIES,
        on_node_lost: (*random.of(&[v1::OnNodeLost::Wait, v1::OnNodeLost::Rerun])).into(),
        ..Default::default()
    }
}
