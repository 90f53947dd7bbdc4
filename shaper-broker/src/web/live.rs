//! News, as server-sent events: that something is another than before, no more often than every two seconds. A page that is
//! told so asks for itself again, and so sees what it may.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::State,
    response::Response,
};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;

use super::{Beat, Site, answer, pages, text};

/// Streams at once, …
pub(super) const STREAMS: usize = 64;
/// … and of one identity: a tab that is seen has one, and a browser makes no more than six connections.
pub(super) const STREAMS_EACH: usize = 4;
/// How often the state is looked at.
const EVERY: Duration = Duration::from_secs(2);
/// After so many looks a page is told, too: what tasks use changes without a word.
const ANYWAY: u32 = 3;
/// How long a stream lasts: a browser comes back by itself.
const LONGEST: Duration = Duration::from_secs(9 * 60);

pub(super) async fn live(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    let viewer = match site.viewer(&headers) {
        Ok(viewer) => viewer,
        Err(trouble) => return pages::trouble(&trouble, None),
    };
    let permits = Arc::clone(&site.streams).try_acquire_owned().ok();
    let Some(permits) = permits.zip(site.door.stream(&viewer.who, STREAMS_EACH)) else {
        let many = "too many pages are open at once; those that are stay as they were loaded\n";
        return text(StatusCode::SERVICE_UNAVAILABLE, many.into());
    };
    let (sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    tokio::spawn(async move {
        let _permits = permits;
        // Whoever went away is not told.
        let _ = tokio::time::timeout(LONGEST, tell(&site, &headers, &sender)).await;
    });
    let body = Body::from_stream(ReceiverStream::new(receiver));
    answer(StatusCode::OK, HeaderValue::from_static("text/event-stream"), body)
}

async fn tell(site: &Site, headers: &HeaderMap, sender: &mpsc::Sender<Result<Bytes, Infallible>>) {
    let (mut before, mut quiet) = (None, 0);
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = sender.closed() => return,
        }
        // The session may be over meanwhile, or the broker not lead any more.
        if site.viewer(headers).is_err() {
            return;
        }
        let Ok(beat) = site.look(|view| Ok(Beat::of(view.state))).await else { return };
        quiet += 1;
        if before == Some(beat) && quiet < ANYWAY {
            continue;
        }
        let is_first = before.is_none();
        (before, quiet) = (Some(beat), 0);
        let event: &'static [u8] =
            if is_first { b"event: begin\ndata:\n\n" } else { b"event: news\ndata:\n\n" };
        if sender.send(Ok(Bytes::from_static(event))).await.is_err() {
            return;
        }
    }
}
