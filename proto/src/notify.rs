//! What a daemon tells the service manager, where it was started by one that asks (sd_notify(3)): that it is ready, and then
//! again and again that it is alive. Behind the feature `server`.

use std::future::Future;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

/// It serves.
pub fn ready() {
    tell(NotifyState::Ready);
}

/// It is about to end, because it was told to.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

/// Says so as long as `alive`, twice in the time after which it would be ended (`WatchdogSec=`). A check that does not return
/// says nothing, and so it should.
pub async fn watchdog<Check>(alive: impl Fn() -> Check + Send)
where
    Check: Future<Output = bool> + Send,
{
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut turns = interval((limit / 2).max(std::time::Duration::from_millis(1)));
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        if alive().await {
            tell(NotifyState::Watchdog);
        }
    }
}

fn tell(what: NotifyState<'_>) {
    // Without a service manager that asks, this does nothing.
    if let Err(error) = sd_notify::notify(&[what]) {
        tracing::warn!(%error, "cannot tell the service manager that this runs, or ends");
    }
}
