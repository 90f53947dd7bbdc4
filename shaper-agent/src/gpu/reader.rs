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

use super::{
    CardError, Library, LibraryState, Reading, Xid,
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

/// Something to be done with the library, if there is one, by the thread that has it.
type Work = Box<dyn FnOnce(Option<&Loaded>) + Send>;

/// Who may have something done.
#[derive(Clone)]
pub struct Asker {
    work: mpsc::Sender<Work>,
    /// Since when the thread has not answered somebody, `CLOCK_MONOTONIC` ns; 0: it answers.
    silent_since_ns: Arc<AtomicU64>,
}

impl Asker {
    /// Has something done for a card of that number, and waits for a while.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        number: u32,
        call: impl FnOnce(&Loaded) -> Result<T, CardError> + Send + 'static,
    ) -> Result<T, CardError> {
        let silent_since = self.silent_since_ns.load(Ordering::Acquire);
        if silent_since > 0 {
            let silent = Duration::from_nanos(monotonic_ns().saturating_sub(silent_since));
            return Err(CardError::Silent(silent.as_secs()));
        }
        let (answer, answered) = mpsc::sync_channel(1);
        let is_abandoned = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&is_abandoned);
        let work = move |loaded: Option<&Loaded>| {
            // Whoever has gone meanwhile was told that it is not done.
            if !seen.load(Ordering::Acquire) {
                let without = || Err(CardError::Unsupported { card: number, why: "there is no NVML".into() });
                let _ = answer.send(loaded.map_or_else(without, call));
            }
        };
        let since = monotonic_ns();
        self.work.send(Box::new(work)).map_err(|_| CardError::Silent(0))?;
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
        let (work, to_do) = mpsc::channel();
        let asker = Asker { work, silent_since_ns: Arc::default() };
        let errors = Arc::default();
        let thread = Thread {
            asked,
            loaded: None,
            latest: Arc::clone(&latest),
            silent_since_ns: Arc::clone(&asker.silent_since_ns),
            errors: Arc::clone(&errors),
        };
        thread::Builder::new().name("gpu".into()).spawn(move || thread.run(&to_do))?;
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
    fn run(mut self, to_do: &mpsc::Receiver<Work>) {
        loop {
            let reading = self.read();
            *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(reading);
            self.silent_since_ns.store(0, Ordering::Release);
            let next = Instant::now() + if self.loaded.is_some() { PERIOD } else { RETRY };
            loop {
                match to_do.recv_timeout(next.saturating_duration_since(Instant::now())) {
                    Ok(work) => {
                        work(self.loaded.as_ref());
                        self.silent_since_ns.store(0, Ordering::Release);
                    }
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
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
