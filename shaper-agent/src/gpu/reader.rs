//! The thread that asks the library. A call into a driver may take long or never end: nobody waits for this thread longer than
//! [`PATIENCE`], not even for its end.

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use shaper_core::units::Milliwatts;

use super::{
    CardError, Library, LibraryState, MemoryLimit, Reading, Xid,
    nvml::{self, Loaded},
};
use crate::kernel::mapped::monotonic_ns;

/// How often the cards are read.
pub const PERIOD: Duration = Duration::from_secs(1);
/// How often a library that is not there, or does not work, is looked for: a driver may be installed at any time.
const RETRY: Duration = Duration::from_secs(30);
/// A reading that is older than so many periods is told as what it is.
const LATE: u32 = 5;
/// How long who wants something of the library waits for it; not again before it has answered.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the library is asked to do, for a card by its id.
#[derive(Clone, Debug)]
pub enum Call {
    /// What a cgroup may have of its memory.
    MemoryLimit {
        /// The card.
        card: String,
        /// The cgroup.
        cgroup: PathBuf,
    },
    /// The same, from now on.
    SetMemoryLimit {
        /// The card.
        card: String,
        /// The cgroup.
        cgroup: PathBuf,
        /// How much.
        limit: MemoryLimit,
    },
    /// The power that it may draw.
    Power {
        /// The card.
        card: String,
    },
    /// The same, from now on.
    SetPower {
        /// The card.
        card: String,
        /// How much.
        power: Milliwatts,
    },
}

/// What it answers.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It is done.
    Done,
    /// A limit of memory.
    MemoryLimit(MemoryLimit),
    /// A power.
    Power(Milliwatts),
}

/// Of what the thread is to ask.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Which library.
    pub library: Library,
    /// A cgroup that is there, for which limits can be asked.
    pub own_cgroup: PathBuf,
    /// Where the kernel shows what NVIDIA's driver has: `/proc/driver`.
    pub proc_driver: PathBuf,
}

struct Request {
    number: u32,
    call: Call,
    /// Nobody waits for it any more.
    is_abandoned: Arc<AtomicBool>,
    answer: mpsc::SyncSender<Result<Answer, CardError>>,
}

/// Who may ask.
#[derive(Clone)]
pub struct Asker {
    requests: mpsc::Sender<Request>,
    /// Since when the thread has not answered somebody, `CLOCK_MONOTONIC` ns; 0: it answers.
    silent_since_ns: Arc<AtomicU64>,
}

impl Asker {
    /// Asks, and waits for a while.
    pub fn ask(&self, number: u32, call: Call) -> Result<Answer, CardError> {
        let silent_since = self.silent_since_ns.load(Ordering::Acquire);
        if silent_since > 0 {
            let silent = Duration::from_nanos(monotonic_ns().saturating_sub(silent_since));
            return Err(CardError::Silent(silent.as_secs()));
        }
        let (answer, answered) = mpsc::sync_channel(1);
        let is_abandoned = Arc::new(AtomicBool::new(false));
        let request = Request { number, call, is_abandoned: Arc::clone(&is_abandoned), answer };
        let since = monotonic_ns();
        self.requests.send(request).map_err(|_| CardError::Silent(0))?;
        answered.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            is_abandoned.store(true, Ordering::Release);
            self.silent_since_ns.store(since, Ordering::Release);
            Err(CardError::Silent(PATIENCE.as_secs()))
        })
    }
}

/// Who asks the library. Dropping this, and all who may ask, ends it, once the call that it is in returns.
pub struct Reader {
    latest: Arc<Mutex<Arc<Reading>>>,
    began_ns: u64,
    asker: Asker,
    errors: Arc<Mutex<VecDeque<Xid>>>,
}

impl Reader {
    /// Begins to ask.
    pub fn start(asked: Asked) -> io::Result<Reader> {
        let nothing =
            Reading { at_ns: 0, library: LibraryState::Unasked, cards: Vec::new(), unknown: Vec::new() };
        let latest = Arc::new(Mutex::new(Arc::new(nothing)));
        let (requests, requested) = mpsc::channel();
        let asker = Asker { requests, silent_since_ns: Arc::default() };
        let errors = Arc::default();
        let thread = Thread {
            asked,
            loaded: None,
            latest: Arc::clone(&latest),
            silent_since_ns: Arc::clone(&asker.silent_since_ns),
            errors: Arc::clone(&errors),
        };
        thread::Builder::new().name("gpu".into()).spawn(move || thread.run(&requested))?;
        Ok(Reader { latest, began_ns: monotonic_ns(), asker, errors })
    }

    /// What it said last.
    pub fn latest(&self) -> Arc<Reading> {
        Arc::clone(&self.latest.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whom to ask.
    pub fn asker(&self) -> Asker {
        self.asker.clone()
    }

    /// The errors that the driver told of since this was asked last.
    pub fn take_errors(&self) -> Vec<Xid> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }

    /// For how long it has not answered, if that is long.
    pub fn silent_for(&self, now_ns: u64) -> Option<Duration> {
        let reading = self.latest();
        let rests = !matches!(reading.library, LibraryState::Ready { .. } | LibraryState::Unasked);
        let patience = if rests { RETRY + PERIOD * LATE } else { PERIOD * LATE };
        let since = Duration::from_nanos(now_ns.saturating_sub(reading.at_ns.max(self.began_ns)));
        (since > patience).then_some(since)
    }
}

struct Thread {
    asked: Asked,
    loaded: Option<Loaded>,
    latest: Arc<Mutex<Arc<Reading>>>,
    silent_since_ns: Arc<AtomicU64>,
    errors: Arc<Mutex<VecDeque<Xid>>>,
}

impl Thread {
    fn run(mut self, requests: &mpsc::Receiver<Request>) {
        loop {
            let reading = self.read();
            *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(reading);
            self.silent_since_ns.store(0, Ordering::Release);
            let next = Instant::now() + if self.loaded.is_some() { PERIOD } else { RETRY };
            loop {
                match requests.recv_timeout(next.saturating_duration_since(Instant::now())) {
                    Ok(request) => self.serve(request),
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }

    fn serve(&mut self, Request { number, call, is_abandoned, answer }: Request) {
        if !is_abandoned.load(Ordering::Acquire) {
            let done = match &self.loaded {
                Some(loaded) => loaded.serve(number, call),
                None => Err(CardError::Unsupported { card: number, why: "there is no NVML".into() }),
            };
            // Whoever has gone meanwhile compares what is in force by and by.
            let _ = answer.send(done);
        }
        self.silent_since_ns.store(0, Ordering::Release);
    }

    fn read(&mut self) -> Reading {
        let silent =
            |library| Reading { at_ns: monotonic_ns(), library, cards: Vec::new(), unknown: Vec::new() };
        let open = match &mut self.loaded {
            Some(open) => open,
            None => match Loaded::load(&self.asked) {
                Ok(open) => {
                    let errors = Arc::clone(&self.errors);
                    if let Err(error) = open.listen(move |xid| nvml::note(&errors, xid)) {
                        tracing::warn!(%error, "nobody listens for errors of GPU cards");
                    }
                    self.loaded.insert(open)
                }
                Err(state) => return silent(state),
            },
        };
        match open.read() {
            Ok((cards, unknown)) => Reading { at_ns: monotonic_ns(), library: open.state(), cards, unknown },
            // It is begun with anew.
            Err(error) => {
                self.loaded = None;
                silent(LibraryState::Failing { reason: error.to_string() })
            }
        }
    }
}
