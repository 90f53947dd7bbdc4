//! The thread that asks the library. A call into a driver may take long or never end: nobody waits for this thread, not
//! even its end.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use super::{Library, LibraryState, Reading, nvml::Loaded};
use crate::kernel::mapped::monotonic_ns;

/// How often the cards are read.
pub const PERIOD: Duration = Duration::from_secs(1);
/// How often a library that is not there, or does not work, is looked for: a driver may be installed at any time.
const RETRY: Duration = Duration::from_secs(30);
/// A reading that is older than so many periods is told as what it is.
const LATE: u32 = 5;

/// Who asks the library. Dropping this ends it, once the call that it is in returns.
pub struct Reader {
    latest: Arc<Mutex<Arc<Reading>>>,
    began_ns: u64,
    // Closed when this is dropped.
    _stop: mpsc::Sender<()>,
}

impl Reader {
    /// Begins to ask.
    pub fn start(library: Library) -> io::Result<Reader> {
        let nothing =
            Reading { at_ns: 0, library: LibraryState::Unasked, cards: Vec::new(), unknown: Vec::new() };
        let latest = Arc::new(Mutex::new(Arc::new(nothing)));
        let (stop, stopped) = mpsc::channel();
        let shared = Arc::clone(&latest);
        thread::Builder::new().name("gpu".into()).spawn(move || ask(&library, &shared, &stopped))?;
        Ok(Reader { latest, began_ns: monotonic_ns(), _stop: stop })
    }

    /// What it said last.
    pub fn latest(&self) -> Arc<Reading> {
        Arc::clone(&self.latest.lock().unwrap_or_else(PoisonError::into_inner))
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

fn ask(library: &Library, latest: &Mutex<Arc<Reading>>, stopped: &mpsc::Receiver<()>) {
    let mut loaded: Option<Loaded> = None;
    loop {
        let reading = read(library, &mut loaded);
        *latest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(reading);
        let pause = if loaded.is_some() { PERIOD } else { RETRY };
        match stopped.recv_timeout(pause) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn read(library: &Library, loaded: &mut Option<Loaded>) -> Reading {
    let silent = |library| Reading { at_ns: monotonic_ns(), library, cards: Vec::new(), unknown: Vec::new() };
    let open = match loaded {
        Some(open) => open,
        None => match Loaded::load(library) {
            Ok(open) => loaded.insert(open),
            Err(state) => return silent(state),
        },
    };
    match open.read() {
        Ok((cards, unknown)) => Reading { at_ns: monotonic_ns(), library: open.state(), cards, unknown },
        // It is begun with anew.
        Err(error) => {
            *loaded = None;
            silent(LibraryState::Failing { reason: error.to_string() })
        }
    }
}
