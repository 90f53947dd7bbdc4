//! The terminal: takes it, draws what comes, and gives it back, however this ends.

use std::{
    env, io,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ratatui::{
    DefaultTerminal,
    crossterm::{
        event::{self, Event},
        terminal,
    },
};
use shaper_core::snapshot::NodeSnapshot;
use tokio::{
    runtime::Handle,
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};

use super::{
    draw::{Theme, draw},
    view::{Flow, Link, View},
};
use crate::{client::Client, error::Error, exit};

/// Without news for this long, the figures are called old: three times what is between two snapshots.
const SILENCE: Duration = Duration::from_secs(3);
/// How long the terminal may take to be given back; it may be one that nobody reads any more.
const FAREWELL: Duration = Duration::from_secs(1);

/// Shows what comes until somebody ends it.
pub(super) async fn run(client: Client, view: View) -> Result<ExitCode, Error> {
    // Before the terminal is taken: no signal may end this without giving it back.
    let mut signals = Signals::install()?;
    let (stop, stopped) = oneshot::channel();
    // A thread of its own: a write to the terminal may hang, and a worker that hangs may be the one that hears of
    // signals, time and the agent.
    let runtime = Handle::current();
    let mut shown = tokio::task::spawn_blocking(move || runtime.block_on(show(client, view, stopped)));
    let signal = tokio::select! {
        outcome = &mut shown => return match outcome {
            Ok(outcome) => outcome.map(|()| ExitCode::SUCCESS),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        },
        signal = signals.next() => signal,
    };
    // Where it has ended by itself meanwhile, nobody listens.
    let _ = stop.send(());
    if tokio::time::timeout(FAREWELL, shown).await.is_err() {
        // At least the line discipline is what it was. More cannot be done, and nobody would see it.
        let _ = terminal::disable_raw_mode();
    }
    Ok(exit::of_shell_code(128 + signal.as_raw_value()))
}

async fn show(client: Client, mut view: View, mut stopped: oneshot::Receiver<()>) -> Result<(), Error> {
    let theme = Theme { colours: env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) };
    let mut screen = Screen::take()?;
    let mut events = events()?;
    let (sender, mut news) = watch::channel(News { snapshot: None, away: false, heard: Instant::now() });
    let reading = read(&client, &sender);
    tokio::pin!(reading);
    loop {
        let link = news.borrow().link(Instant::now());
        view.link = link;
        screen.draw(&mut view, theme)?;
        let due = news.borrow().due(link);
        tokio::select! {
            event = events.recv() => match event {
                Some(Ok(Event::Key(key))) => match view.key(key) {
                    Flow::Stay => {}
                    Flow::Repaint => screen.clear()?,
                    Flow::Quit => return Ok(()),
                },
                // To draw again is all that a new size takes.
                Some(Ok(_)) => {}
                Some(Err(source)) => return Err(Error::Terminal { operation: "read keys from", source }),
                None => return Ok(()),
            },
            Ok(()) = news.changed() => {
                let snapshot = news.borrow_and_update().snapshot.clone();
                if let Some(snapshot) = snapshot {
                    view.update(snapshot);
                }
            }
            Err(error) = &mut reading => return Err(error),
            () = tokio::time::sleep_until(due.into()) => {}
            _ = &mut stopped => return Ok(()),
        }
    }
}

/// The last that was heard of the agent.
struct News {
    snapshot: Option<Arc<NodeSnapshot>>,
    /// Since `heard`, or since an attempt to reach it after that.
    away: bool,
    heard: Instant,
}

impl News {
    fn link(&self, now: Instant) -> Link {
        let silent = now.saturating_duration_since(self.heard);
        match self.snapshot {
            _ if self.away => Link::Away(silent),
            _ if silent >= SILENCE => Link::Silent(silent),
            None => Link::Waiting,
            Some(_) => Link::Fresh,
        }
    }

    /// When the link is to be shown again, if nothing happens: the seconds of a silence are counted.
    fn due(&self, link: Link) -> Instant {
        match link {
            Link::Waiting | Link::Fresh => self.heard + SILENCE,
            Link::Silent(time) | Link::Away(time) => self.heard + Duration::from_secs(time.as_secs() + 1),
        }
    }
}

/// Tells what it hears of the agent until that is a refusal.
async fn read(client: &Client, news: &watch::Sender<News>) -> Result<(), Error> {
    let mut snapshots = client.watch_snapshots();
    loop {
        match snapshots.attempt().await? {
            Some(snapshot) => {
                let snapshot = Some(Arc::new(snapshot));
                news.send_replace(News { snapshot, away: false, heard: Instant::now() });
            }
            None => news.send_modify(|news| news.away = true),
        }
    }
}

/// Keys and sizes of the terminal, as they come. A thread waits for them, since crossterm blocks; it ends with us.
fn events() -> Result<mpsc::Receiver<io::Result<Event>>, Error> {
    let (sender, receiver) = mpsc::channel(16);
    let read = move || {
        loop {
            let event = event::read();
            let failed = event.is_err();
            if sender.blocking_send(event).is_err() || failed {
                return;
            }
        }
    };
    let spawned = thread::Builder::new().name("terminal".into()).spawn(read);
    spawned.map_err(|source| Error::Terminal { operation: "read keys from", source })?;
    Ok(receiver)
}

/// The terminal while it is ours; dropped, it is what it was. A panic gives it back before its message.
struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    fn take() -> Result<Screen, Error> {
        ratatui::try_init().map(|terminal| Screen { terminal }).map_err(|source| {
            // It may have come half of the way.
            let _ = ratatui::try_restore();
            Error::Terminal { operation: "take over", source }
        })
    }

    fn draw(&mut self, view: &mut View, theme: Theme) -> Result<(), Error> {
        let drawn = self.terminal.draw(|frame| draw(frame, view, theme));
        drawn.map(drop).map_err(|source| Error::Terminal { operation: "draw on", source })
    }

    fn clear(&mut self) -> Result<(), Error> {
        self.terminal.clear().map_err(|source| Error::Terminal { operation: "clear", source })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Where it fails, the terminal is gone, and nothing is left to be given back.
        let _ = self.terminal.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// The signals by which others ask for an end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn install() -> Result<Signals, Error> {
        let install = |kind| signal(kind).map_err(Error::Signals);
        Ok(Signals {
            interrupt: install(SignalKind::interrupt())?,
            terminate: install(SignalKind::terminate())?,
            hangup: install(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.hangup.recv() => SignalKind::hangup(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_is_noticed_and_its_seconds_are_counted() {
        let heard = Instant::now();
        let news = News { snapshot: None, away: false, heard };
        let after = |millis| heard + Duration::from_millis(millis);
        assert_eq!((news.link(after(2_999)), news.due(Link::Waiting)), (Link::Waiting, after(3_000)));
        let silent = news.link(after(4_200));
        assert_eq!((silent, news.due(silent)), (Link::Silent(Duration::from_millis(4_200)), after(5_000)));
        let news = News { away: true, ..news };
        let away = news.link(after(0));
        assert_eq!((away, news.due(away)), (Link::Away(Duration::ZERO), after(1_000)));
    }
}
