//! What stands before the services: it knows who asks, looks the call up in the one table, and writes down refusals.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use shaper_proto::peer::Caller;
use tokio::sync::watch;
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tower::{Layer, Service};

use super::Peer;
use crate::{
    Role,
    access::{Access, Grant},
    table::{self, Asker, Verdict},
    tls::now,
};

/// Who asks, as the services see it. It is there on every request that came through a [`Guard`].
#[derive(Clone, Debug)]
pub struct Asking {
    /// For messages and the log.
    pub who: String,
    /// As which user. Nodes and brokers are none.
    pub caller: Option<Caller>,
    /// Of a submitter: its bounds.
    pub grant: Option<Arc<Grant>>,
    /// Of a node: which.
    pub node: Option<String>,
}

impl Asking {
    /// Who asks this.
    pub fn of<T>(request: &Request<T>) -> Result<&Asking, Status> {
        let asking = request.extensions().get::<Asking>();
        asking.ok_or_else(|| Status::unauthenticated("nobody knows who asks"))
    }
}

/// uid 0, for those who may see all. What they may change is in the table.
fn root() -> Caller {
    Caller { uid: 0, gid: 0, groups: Vec::new() }
}

fn refusal(reason: &'static str, who: &str, call: &str, text: String) -> Status {
    let about = HashMap::from([("who".to_owned(), who.to_owned()), ("call".to_owned(), call.to_owned())]);
    Status::with_error_details(
        Code::PermissionDenied,
        text,
        ErrorDetails::with_error_info(reason, "shaper", about),
    )
}

/// A layer that lets through what the table allows.
#[derive(Clone)]
pub struct Guard {
    access: watch::Receiver<Arc<Access>>,
}

impl Guard {
    /// With the configuration of identities.
    pub fn new(access: watch::Receiver<Arc<Access>>) -> Guard {
        Guard { access }
    }

    fn judge(&self, peer: &Peer, path: &str) -> Result<Asking, (String, Status)> {
        let access = Arc::clone(&self.access.borrow());
        let (asker, asking) = match peer {
            Peer::Local(caller) => {
                let asker = if caller.is_operator() { Asker::Root } else { Asker::User };
                let who = format!("uid {}", caller.uid);
                (asker, Asking { who, caller: Some(caller.clone()), grant: None, node: None })
            }
            Peer::Certified(holder) => {
                let (role, who) = (holder.identity.role(), holder.identity.to_string());
                let mut asking = Asking { who, caller: None, grant: None, node: None };
                match role {
                    Role::Operator | Role::Reader => asking.caller = Some(root()),
                    Role::Node => asking.node = Some(holder.identity.name().to_owned()),
                    Role::Submitter => {
                        asking.grant = access.grant(&holder.identity).cloned();
                        asking.caller = asking.grant.as_ref().map(|grant| Caller {
                            uid: grant.uid,
                            gid: grant.gid,
                            groups: grant.groups.clone(),
                        });
                    }
                    Role::Broker => {}
                }
                (Asker::Role(role), asking)
            }
        };
        let no = |reason, text: String| {
            let status = refusal(reason, &asking.who, path, text);
            Err((asking.who.clone(), status))
        };
        if let Peer::Certified(holder) = peer {
            if let Some(why) = access.distrust(holder, now()) {
                return no("NOT_BELIEVED", format!("{} is not believed: {why}", asking.who));
            }
            if holder.identity.role() == Role::Submitter && asking.grant.is_none() {
                let who = &asking.who;
                let text = format!(
                    "{who} may do nothing: it has no entry in the broker's configuration of identities (--identities)"
                );
                return no("NO_ENTRY", text);
            }
        }
        let Some(call) = table::call(path) else {
            return no("NO_SUCH_CALL", format!("{} may not call {path}: nobody may", asking.who));
        };
        if call.verdict(asker) == Verdict::Refused {
            let (who, may) = (&asking.who, call.who_may());
            return no("CALL_NOT_OF_ROLE", format!("{who} ({asker}) may not call {path}; these may: {may}"));
        }
        if call.changes {
            tracing::info!(target: "audit", who = asking.who, call = path, "let through");
        }
        Ok(asking)
    }
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: self.clone(), inner }
    }
}

/// A service behind a [`Guard`].
#[derive(Clone)]
pub struct Guarded<S> {
    guard: Guard,
    inner: S,
}

type Answer<B, E> = Pin<Box<dyn Future<Output = Result<http::Response<B>, E>> + Send>>;

fn log_refusal(who: &str, call: &str, reason: &str) {
    tracing::warn!(target: "audit", who, call, reason, "refused");
}

impl<S, A, B> Service<http::Request<A>> for Guarded<S>
where
    S: Service<http::Request<A>, Response = http::Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Default + Send + 'static,
{
    type Response = http::Response<B>;
    type Error = S::Error;
    type Future = Answer<B, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<A>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let peer = request.extensions().get::<Peer>().cloned();
        let judged = match peer {
            // A browser sends an Origin, and has no business here.
            _ if request.headers().contains_key(http::header::ORIGIN) => {
                let text = "a request with an Origin is one of a browser's, and is not served".to_owned();
                Err(("a browser".to_owned(), refusal("BROWSER", "a browser", &path, text)))
            }
            Some(peer) => self.guard.judge(&peer, &path),
            None => {
                let status = Status::unauthenticated("the connection does not say who calls");
                Err(("nobody".to_owned(), status))
            }
        };
        match judged {
            Ok(asking) => {
                let who = asking.who.clone();
                request.extensions_mut().insert(asking);
                let answer = self.inner.call(request);
                Box::pin(async move {
                    let answer = answer.await?;
                    // What the service itself refused: somebody else's task, another node's name.
                    if let Some(status) = Status::from_header_map(answer.headers())
                        && status.code() == Code::PermissionDenied
                    {
                        log_refusal(&who, &path, status.message());
                    }
                    Ok(answer)
                })
            }
            Err((who, status)) => {
                log_refusal(&who, &path, status.message());
                Box::pin(async move { Ok(status.into_http()) })
            }
        }
    }
}
