//! What stands before the services: it knows who asks, looks the call up in the one table, and writes down refusals.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use shaper_proto::peer::{Caller, LocalPeer, PeerProcess};
use tokio::sync::watch;
use tonic::{Code, Request, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tower::{Layer, Service};

use super::{
    Peer,
    limits::{Counted, Limits, Meter, Permit},
};
use crate::{
    Identity, Role,
    access::{Access, Grant},
    table::{self, Asker, Call, Verdict},
    tls::now,
};

/// Who asks, as the services see it. It is there on every request that came through a [`Guard`].
#[derive(Clone, Debug)]
pub struct Asking {
    /// For messages and the log.
    pub who: String,
    /// As which user. Nodes and brokers are none.
    pub caller: Option<Caller>,
    /// Of somebody on a Unix socket: the process that connected, where the kernel says so.
    pub process: Option<Arc<PeerProcess>>,
    /// Of a submitter: its bounds.
    pub grant: Option<Arc<Grant>>,
    /// Of a node: which.
    pub node: Option<String>,
    /// What a certificate says.
    pub identity: Option<Identity>,
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

fn refusal(code: Code, reason: &'static str, who: &str, call: &str, text: String) -> Status {
    let about = HashMap::from([("who".to_owned(), who.to_owned()), ("call".to_owned(), call.to_owned())]);
    Status::with_error_details(code, text, ErrorDetails::with_error_info(reason, "shaper", about))
}

/// A layer that lets through what the table allows.
#[derive(Clone)]
pub struct Guard {
    access: watch::Receiver<Arc<Access>>,
    meter: Meter,
}

/// A call that is let through.
struct Admitted {
    asking: Asking,
    call: &'static Call,
    permit: Option<Permit>,
}

impl Guard {
    /// With the configuration of identities, and what each of them may ask for.
    pub fn new(access: watch::Receiver<Arc<Access>>, limits: Limits) -> Guard {
        Guard { access, meter: Meter::new(limits) }
    }

    fn judge(&self, peer: &Peer, path: &str) -> Result<Admitted, (String, Status)> {
        let access = Arc::clone(&self.access.borrow());
        let (asker, asking) = match peer {
            Peer::Local(LocalPeer { caller, process }) => {
                let asker = if caller.is_operator() { Asker::Root } else { Asker::User };
                let who = format!("uid {}", caller.uid);
                let (caller, process) = (Some(caller.clone()), process.clone());
                (asker, Asking { who, caller, process, grant: None, node: None, identity: None })
            }
            Peer::Certified(holder) => {
                let (role, who) = (holder.identity.role(), holder.identity.to_string());
                let identity = Some(holder.identity.clone());
                let mut asking =
                    Asking { who, caller: None, process: None, grant: None, node: None, identity };
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
                    Role::Broker | Role::Authority => {}
                }
                (Asker::Role(role), asking)
            }
            Peer::Stranger(from) => {
                let who = format!("a stranger at {from}");
                let nobody =
                    Asking { who, caller: None, process: None, grant: None, node: None, identity: None };
                (Asker::Stranger, nobody)
            }
        };
        let no = |reason, text: String| {
            let status = refusal(Code::PermissionDenied, reason, &asking.who, path, text);
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
        let permit = match asker {
            Asker::Root => None,
            _ => match self.meter.admit(&asking.who, call.is_long, Instant::now()) {
                Ok(permit) => Some(permit),
                Err(excess) => {
                    let text = format!("{} {excess}", asking.who);
                    let status = refusal(Code::ResourceExhausted, excess.rule(), &asking.who, path, text);
                    return Err((asking.who, status));
                }
            },
        };
        if call.changes {
            tracing::info!(target: "audit", who = asking.who, call = path, "let through");
        }
        Ok(Admitted { asking, call, permit })
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
    type Response = http::Response<Counted<B>>;
    type Error = S::Error;
    type Future = Answer<Counted<B>, S::Error>;

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
                let status = refusal(Code::PermissionDenied, "BROWSER", "a browser", &path, text);
                Err(("a browser".to_owned(), status))
            }
            Some(peer) => self.guard.judge(&peer, &path),
            None => {
                let status = Status::unauthenticated("the connection does not say who calls");
                Err(("nobody".to_owned(), status))
            }
        };
        match judged {
            Ok(Admitted { asking, call, permit }) => {
                let who = asking.who.clone();
                request.extensions_mut().insert(asking);
                let answer = self.inner.call(request);
                let deadline = (!call.is_long).then(|| self.guard.meter.deadline());
                Box::pin(async move {
                    let answer = match deadline {
                        None => answer.await?,
                        Some(deadline) => match tokio::time::timeout(deadline, answer).await {
                            Ok(answer) => answer?,
                            Err(_) => {
                                let text = format!(
                                    "no answer within {} s; what was asked for may still be done: look before you ask again",
                                    deadline.as_secs()
                                );
                                tracing::warn!(target: "audit", who, call = path, "not answered in time");
                                return Ok(Status::deadline_exceeded(text).into_http());
                            }
                        },
                    };
                    // What the service itself refused: somebody else's task, another node's name.
                    if let Some(status) = Status::from_header_map(answer.headers())
                        && status.code() == Code::PermissionDenied
                    {
                        log_refusal(&who, &path, status.message());
                    }
                    Ok(answer.map(|body| Counted::new(body, permit)))
                })
            }
            Err((who, status)) => {
                log_refusal(&who, &path, status.message());
                Box::pin(async move { Ok(status.into_http()) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use super::*;

    fn request(path: &str) -> http::Request<()> {
        let mut request = http::Request::new(());
        *request.uri_mut() = path.parse().unwrap();
        request.extensions_mut().insert(Peer::Local(LocalPeer { caller: root(), process: None }));
        request
    }

    #[tokio::test]
    async fn a_call_that_is_not_answered_is_given_up_and_one_that_may_last_is_not() {
        let deadline = Duration::from_millis(1);
        let limits = Limits { deadline, ..Limits::BROKER };
        let guard = Guard::new(watch::channel(Arc::default()).1, limits);
        let mut silent = guard.layer(tower::service_fn(|_: http::Request<()>| {
            std::future::pending::<Result<http::Response<()>, Infallible>>()
        }));
        let answer = silent.call(request("/shaper.v1.Broker/ListNodes")).await.unwrap();
        let status = Status::from_header_map(answer.headers()).unwrap();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        let watch = silent.call(request("/shaper.v1.Broker/WatchClusterTasks"));
        assert!(tokio::time::timeout(20 * deadline, watch).await.is_err());
    }
}
