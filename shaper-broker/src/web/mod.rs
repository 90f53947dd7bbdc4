//! The web page: what the cluster does and why, for people. It shows, and changes nothing.
//!
//! A request passes `guard` (which names, which sites), then `door` (who), then becomes a page: [`pages`] look at the state
//! on the broker's thread, copy out a page full of it at most, and write markup elsewhere. Who looks is held to the rules of
//! gRPC: the same table of calls, the same bounds of submitters.

mod assets;
mod door;
mod guard;
mod html;
mod live;
mod options;
mod pages;
mod query;
mod serve;
#[cfg(test)]
mod tests;
mod usage;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{Path, RawQuery, Request, State},
    response::Response,
    routing::get,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::sync::{Semaphore, watch};

pub use self::{
    door::{CODE_SECONDS, Door, DoorError, Pass, Viewer},
    options::{Config, Options, OptionsError},
    serve::{ListenError, Listener},
};
use self::{
    html::Html,
    pages::{Page, Trouble},
    query::Query,
};
use crate::{
    actor::{ActorError, Handle, View},
    reactor,
    standing::Standing,
};

/// How long the broker's thread may take to answer: what it does for others comes first.
const PATIENCE: Duration = Duration::from_secs(5);
/// Looks at the state at once.
const LOOKS: usize = 2;

/// What the pages are made of.
pub struct Site {
    broker: Handle,
    standing: watch::Receiver<Standing>,
    door: Arc<Door>,
    /// Under which names it is found.
    hosts: Vec<String>,
    /// Streams at once.
    streams: Arc<Semaphore>,
    /// Looks at the state at once: what the broker's thread has to do comes first.
    looks: Arc<Semaphore>,
}

/// What of a page somebody asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// Of which task or node.
    name: String,
    query: Query,
}

impl Site {
    /// Of a broker.
    pub fn new(
        broker: Handle,
        standing: watch::Receiver<Standing>,
        door: Arc<Door>,
        hosts: Vec<String>,
    ) -> Site {
        let (streams, looks) = (Semaphore::new(live::STREAMS), Semaphore::new(LOOKS));
        Site { broker, standing, door, hosts, streams: Arc::new(streams), looks: Arc::new(looks) }
    }

    /// All of its addresses.
    pub fn router(self) -> Router {
        let site = Arc::new(self);
        Router::new()
            .route("/", get(page::<pages::Overview>))
            .route("/tasks", get(page::<pages::Tasks>))
            .route("/tasks/{name}", get(page::<pages::TaskPage>))
            .route("/tasks/{name}/usage", get(usage::usage))
            .route("/nodes", get(page::<pages::Nodes>))
            .route("/nodes/{name}", get(page::<pages::NodePage>))
            .route("/policies", get(page::<pages::Policies>))
            .route("/events", get(page::<pages::Events>))
            .route("/scale", get(page::<pages::Scale>))
            .route("/live", get(live::live))
            .route("/open", get(open))
            .route("/assets/{hash}/{name}", get(asset))
            .fallback(nothing)
            .layer(axum::middleware::from_fn_with_state(Arc::clone(&site), guarded))
            .with_state(site)
    }

    /// Who asks; else what is answered instead.
    fn viewer(&self, headers: &HeaderMap) -> Result<Viewer, Trouble> {
        self.door.viewer(headers, Instant::now()).ok_or(Trouble::Stranger)
    }

    /// Looks at the state.
    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&View<'_>) -> Result<T, Trouble> + Send + 'static,
    ) -> Result<T, Trouble> {
        if let Standing::Standby(leader) = &*self.standing.borrow() {
            return Err(Trouble::Standby(leader.clone()));
        }
        let looked = async {
            // Nobody closes it.
            let permit = Arc::clone(&self.looks).acquire_owned().await.map_err(|_| ActorError::Stopped)?;
            let look = move |view: &View<'_>| {
                // Also of a look that nobody waits for any more, until it is over.
                let _permit = permit;
                look(view)
            };
            self.broker.read_in_turn(look).await
        };
        match tokio::time::timeout(PATIENCE, looked).await {
            Ok(Ok(looked)) => looked,
            Ok(Err(ActorError::Stopped)) => Err(Trouble::Ending),
            Ok(Err(ActorError::Busy)) | Err(_) => Err(Trouble::Busy),
        }
    }
}

/// Nothing passes unchecked, and nothing leaves without the headers.
async fn guarded(State(site): State<Arc<Site>>, request: Request, next: axum::middleware::Next) -> Response {
    let mut response = match guard::check(&request, &site.hosts) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            // Not louder: whoever sends such requests would write the log.
            tracing::debug!(reason = %refusal, "a request for the web page was refused");
            text(refusal.status(), format!("{refusal}\n"))
        }
    };
    guard::harden(response.headers_mut());
    response
}

fn text(status: StatusCode, text: String) -> Response {
    answer(status, HeaderValue::from_static("text/plain; charset=utf-8"), Body::from(text))
}

fn answer(status: StatusCode, content_type: HeaderValue, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

fn markup(status: StatusCode, html: Html) -> Response {
    answer(status, HeaderValue::from_static("text/html; charset=utf-8"), Body::from(html.into_string()))
}

async fn page<P: Page + Send + 'static>(
    State(site): State<Arc<Site>>,
    name: Option<Path<String>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let viewer = match site.viewer(&headers) {
        Ok(viewer) => viewer,
        Err(trouble) => return pages::trouble(&trouble, None),
    };
    let name = name.map(|Path(name)| name).unwrap_or_default();
    let wanted = Wanted { name, query: Query::parse(&query.unwrap_or_default()) };
    let who = viewer.clone();
    match site.look(move |view| P::look(view, &viewer, &wanted).map(|page| (page, view.now))).await {
        Ok((page, now)) => markup(StatusCode::OK, pages::whole(&page, &who, now)),
        Err(trouble) => pages::trouble(&trouble, Some(&who)),
    }
}

/// Takes the code for a cookie.
async fn open(State(site): State<Arc<Site>>, request: Request) -> Response {
    // What only looks whether there is something uses nothing up.
    if request.method() == Method::HEAD {
        return text(StatusCode::OK, String::new());
    }
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let cookie = query.get("code").and_then(|code| site.door.enter(code, Instant::now()));
    let Some(cookie) = cookie.and_then(|cookie| HeaderValue::try_from(cookie).ok()) else {
        return pages::trouble(&Trouble::Code, None);
    };
    let mut response = text(StatusCode::SEE_OTHER, String::new());
    response.headers_mut().insert(header::SET_COOKIE, cookie);
    response.headers_mut().insert(header::LOCATION, HeaderValue::from_static("/"));
    response
}

async fn asset(request: Request) -> Response {
    assets::at(request.uri().path())
        .unwrap_or_else(|| text(StatusCode::NOT_FOUND, "there is nothing here\n".into()))
}

async fn nothing(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    match site.viewer(&headers) {
        Ok(viewer) => pages::trouble(&Trouble::NoPage, Some(&viewer)),
        Err(trouble) => pages::trouble(&trouble, None),
    }
}

/// What of the state is another than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Beat {
    epoch: u64,
    revision: u64,
    policies: u64,
    noted: u64,
}

impl Beat {
    fn of(state: &reactor::State) -> Beat {
        let reactor::State { epoch, revision, policies_revision, .. } = *state;
        Beat { epoch, revision, policies: policies_revision, noted: state.shown.noted() }
    }
}
