//! Those who submit: one stream, or many calls.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use shaper_proto::v1::{self, broker_client::BrokerClient, submit_outcome::Outcome};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Specs in one message of a stream, at most.
const TOGETHER: u64 = 32;
/// Between two messages at a given rate.
const BEAT: Duration = Duration::from_millis(1);

/// What is known of each task: when it was submitted, answered and released. A task's number is in its id.
pub(super) struct Marks {
    start: Instant,
    next: AtomicU64,
    pub(super) released: AtomicU64,
    /// From this number on latencies count.
    counted_from: AtomicU64,
    pub(super) is_over: AtomicBool,
    submitted: Mutex<Vec<u64>>,
    answers: Mutex<Vec<f64>>,
    lives: Mutex<Vec<f64>>,
}

impl Default for Marks {
    fn default() -> Marks {
        Marks {
            start: Instant::now(),
            next: AtomicU64::new(0),
            released: AtomicU64::new(0),
            counted_from: AtomicU64::new(u64::MAX),
            is_over: AtomicBool::new(false),
            submitted: Mutex::default(),
            answers: Mutex::default(),
            lives: Mutex::default(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Marks {
    /// From here on latencies count.
    pub(super) fn begin(&self) {
        self.counted_from.store(self.next.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Numbers for so many tasks that are submitted now.
    fn submit(&self, tasks: u64) -> std::ops::Range<u64> {
        let mut submitted = lock(&self.submitted);
        let first = self.next.fetch_add(tasks, Ordering::Relaxed);
        let now = self.start.elapsed().as_nanos() as u64;
        submitted.resize((first + tasks) as usize, now);
        first..first + tasks
    }

    fn since_submission(&self, numbers: impl Iterator<Item = u64>, into: &Mutex<Vec<f64>>) {
        let (now, from) = (self.start.elapsed().as_nanos() as u64, self.counted_from.load(Ordering::Relaxed));
        let submitted = lock(&self.submitted);
        let counted = numbers.filter(|number| *number >= from);
        let millis = counted.filter_map(|number| Some((now - submitted.get(number as usize)?) as f64 / 1e6));
        lock(into).extend(millis);
    }

    fn answered(&self, numbers: impl Iterator<Item = u64>) {
        self.since_submission(numbers, &self.answers);
    }

    /// Tasks that the broker has told to forget.
    pub(super) fn release(&self, ids: &[String]) {
        self.released.fetch_add(ids.len() as u64, Ordering::Relaxed);
        let numbers = ids.iter().filter_map(|id| id.strip_prefix("bench-")?.parse().ok());
        self.since_submission(numbers, &self.lives);
    }

    /// Milliseconds until the answer, and until the release.
    pub(super) fn latencies(&self) -> (Vec<f64>, Vec<f64>) {
        (lock(&self.answers).clone(), lock(&self.lives).clone())
    }
}

/// A task that asks for little, as a client would say it.
fn spec(number: u64) -> v1::TaskSpec {
    let demand = v1::ResourceDemand { cpu_millicores: 100, memory_bytes: 64 << 20, ..Default::default() };
    v1::TaskSpec {
        profile: Some(v1::TaskProfile {
            task_id: format!("bench-{number}"),
            demand: Some(demand),
            priority: v1::Priority::Medium.into(),
            estimated_runtime_seconds: Some(60),
        }),
        command: vec!["python3".into(), "-m".into(), "etl.load".into(), format!("--shard={number}")],
        env: vec!["PATH=/usr/local/bin:/usr/bin:/bin".into(), "LANG=C.UTF-8".into()],
        cwd: "/srv/etl".into(),
        name: "etl.load".into(),
        namespace: "default".into(),
        ..Default::default()
    }
}

/// Submits by one stream until the measurement is over: so many ahead of their outcomes, and at a rate, if there is one.
pub(super) async fn stream(channel: Channel, marks: Arc<Marks>, ahead: u64, rate: Option<u64>) -> Result<()> {
    let (to, requests) = mpsc::channel(64);
    let mut outcomes =
        BrokerClient::new(channel).submit_tasks(ReceiverStream::new(requests)).await?.into_inner();
    let room = Arc::new(Semaphore::new(ahead as usize));
    let submit = {
        let (marks, room) = (marks.clone(), room.clone());
        async move {
            let mut beat = tokio::time::interval(BEAT);
            let mut due = 0.0;
            loop {
                let tasks = match rate {
                    None => TOGETHER,
                    Some(rate) => {
                        beat.tick().await;
                        due += rate as f64 * BEAT.as_secs_f64();
                        let tasks = due as u64;
                        due -= tasks as f64;
                        tasks
                    }
                };
                let permits = room.acquire_many(tasks as u32).await.context("the stream has ended")?;
                permits.forget();
                let specs = marks.submit(tasks).map(spec).collect();
                if to.send(v1::SubmitTasksRequest { specs }).await.is_err() {
                    bail!("the broker does not read any more");
                }
            }
        }
    };
    let hear = async {
        while let Some(response) = outcomes.message().await? {
            let mut numbers = Vec::with_capacity(response.outcomes.len());
            for outcome in response.outcomes {
                match outcome.outcome {
                    Some(Outcome::Revision(_)) => {}
                    other => bail!("{} was refused: {other:?}", outcome.task_id),
                }
                let number = outcome.task_id.strip_prefix("bench-").and_then(|number| number.parse().ok());
                numbers.push(number.context("a task of another's")?);
            }
            room.add_permits(numbers.len());
            marks.answered(numbers.into_iter());
        }
        bail!("the broker has ended the stream")
    };
    tokio::try_join!(submit, hear).map(|((), ())| ())
}

/// Submits so many by one stream; returns when all are taken.
pub(super) async fn submit(channel: Channel, marks: &Marks, tasks: u64) -> Result<()> {
    let specs: Vec<v1::TaskSpec> = marks.submit(tasks).map(spec).collect();
    let messages: Vec<_> = specs
        .chunks(TOGETHER as usize)
        .map(|specs| v1::SubmitTasksRequest { specs: specs.to_vec() })
        .collect();
    let mut outcomes =
        BrokerClient::new(channel).submit_tasks(tokio_stream::iter(messages)).await?.into_inner();
    let mut taken = 0;
    while let Some(response) = outcomes.message().await? {
        for outcome in response.outcomes {
            match outcome.outcome {
                Some(Outcome::Revision(_)) => taken += 1,
                other => bail!("{} was refused: {other:?}", outcome.task_id),
            }
        }
    }
    ensure!(taken == tasks, "{taken} of {tasks} tasks were taken");
    Ok(())
}

/// Submits by so many calls at a time.
pub(super) async fn unary(channels: Vec<Channel>, marks: Arc<Marks>, calls: usize) -> Result<()> {
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..calls {
        let mut client = BrokerClient::new(channels[number % channels.len()].clone());
        let marks = marks.clone();
        callers.spawn(async move {
            while !marks.is_over.load(Ordering::Relaxed) {
                let number = marks.submit(1).start;
                client.submit_task(v1::SubmitTaskRequest { spec: Some(spec(number)) }).await?;
                marks.answered(std::iter::once(number));
            }
            anyhow::Ok(())
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller??;
    }
    bail!("the callers have ended")
}
