//! What is shown of what takes long: on a terminal alone, on standard error, and gone when it is over.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is over before that is not shown.
const SOON: Duration = Duration::from_millis(300);
/// How often it is drawn, though nothing is new.
const EVERY: Duration = Duration::from_millis(200);

/// A bar, until it is dropped.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Of something that is done when `total` of it are.
    pub(crate) fn of(what: &str, total: u64) -> Progress {
        Progress::with(what, Some(total), "{msg} [{bar:30}] {pos} of {len}, {elapsed}")
    }

    /// Of bytes.
    pub(crate) fn of_bytes(what: &str) -> Progress {
        Progress::with(what, Some(0), "{msg} [{bar:30}] {binary_bytes} of {binary_total_bytes}, {elapsed}")
    }

    /// Of something of which nobody knows how much there is.
    pub(crate) fn of_time(what: &str) -> Progress {
        Progress::with(what, None, "{spinner} {msg}, {elapsed}")
    }

    fn with(what: &str, total: Option<u64>, template: &str) -> Progress {
        // Nothing is drawn where standard error is no terminal.
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("=> "));
        bar.set_message(what.to_owned());
        let soon = bar.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SOON).await;
            if !soon.is_finished() {
                soon.enable_steady_tick(EVERY);
            }
        });
        Progress(bar)
    }

    /// Whether anybody sees it.
    pub(crate) fn is_seen(&self) -> bool {
        !self.0.is_hidden()
    }

    /// So much is done, of so much.
    pub(crate) fn at(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
