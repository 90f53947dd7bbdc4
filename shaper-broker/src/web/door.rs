//! Who gets in. A code of `shaper ui` opens the page once; a cookie stands for it from then on. The broker keeps hashes of
//! both. What somebody may see is asked anew with each request, of the configuration of identities as it is then.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use http::{HeaderMap, header};
use ring::rand::{SecureRandom, SystemRandom};
use shaper_core::spec::Credentials;
use shaper_identity::{
    Role,
    access::{Access, Grant},
    name::Holder,
    table::{self, Asker, Verdict},
    tls,
    token::fingerprint,
};
use tokio::sync::watch;

use crate::{
    reactor::{Task, query},
    service::covers,
};

/// How long a code works.
pub const CODE_SECONDS: u64 = 120;
/// Codes that are open at once, and of one identity: beyond it, the oldest of its own goes.
const CODES: usize = 1024;
const CODES_EACH: usize = 8;
/// How long a session lasts.
const SESSION: Duration = Duration::from_secs(12 * 60 * 60);
/// Sessions at once, and of one identity, likewise.
const SESSIONS: usize = 1024;
const SESSIONS_EACH: usize = 16;
/// Cookies of its name that are looked at, of one request.
const COOKIES: usize = 8;
/// Bytes of a secret.
const SECRET: usize = 32;

/// Why nobody is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DoorError {
    /// The kernel gave no random bytes.
    #[error("the kernel gives no random bytes")]
    NoRandom,
    /// Too many at once.
    #[error("too many others are about to open the page; try again in two minutes")]
    Full,
}

/// As whom somebody asked for the page.
#[derive(Clone, Debug)]
pub struct Pass {
    /// For messages and the log.
    pub who: String,
    /// In which column of the table.
    pub asker: Asker,
    /// As which user.
    pub caller: Credentials,
    /// The certificate that was shown, over TCP.
    pub holder: Option<Arc<Holder>>,
}

impl Pass {
    /// What this one may see now; nothing, if it is not believed any more.
    fn viewer(&self, access: &Access) -> Option<Viewer> {
        let mut viewer =
            Viewer { who: self.who.clone(), asker: self.asker, caller: self.caller.clone(), grant: None };
        if let Some(holder) = &self.holder {
            if access.distrust(holder, tls::now()).is_some() {
                return None;
            }
            if holder.identity.role() == Role::Submitter {
                let grant = access.grant(&holder.identity)?;
                let Grant { uid, gid, groups, .. } = &**grant;
                viewer.caller = Credentials { uid: *uid, gid: *gid, groups: groups.clone() };
                viewer.grant = Some(Arc::clone(grant));
            }
        }
        Some(viewer)
    }
}

/// Who looks at the page, held to the same rules as a caller of gRPC.
#[derive(Clone, Debug)]
pub struct Viewer {
    /// For the page.
    pub who: String,
    asker: Asker,
    /// As which user.
    pub caller: Credentials,
    /// Of a submitter: its bounds.
    pub grant: Option<Arc<Grant>>,
}

impl Viewer {
    /// Whether the table allows this call of the broker.
    pub fn may(&self, call: &str) -> bool {
        let path = format!("/shaper.v1.Broker/{call}");
        table::call(&path).is_some_and(|call| call.verdict(self.asker) != Verdict::Refused)
    }

    /// Whether it may see a task.
    pub fn sees(&self, task: &Task) -> bool {
        query::may_see(&self.caller, task.owner()) && covers(self.grant.as_ref(), task)
    }

    /// Whether it may see all tasks.
    pub fn sees_all(&self) -> bool {
        query::is_operator(&self.caller) && self.grant.is_none()
    }
}

/// What a secret stands for, and until when.
struct Kept {
    hash: String,
    pass: Pass,
    until: Instant,
}

/// Secrets of one sort: bounded, and each kept only as its hash.
struct Secrets {
    kept: VecDeque<Kept>,
    most: usize,
    each: usize,
}

impl Secrets {
    fn new(most: usize, each: usize) -> Secrets {
        Secrets { kept: VecDeque::new(), most, each }
    }

    fn add(&mut self, pass: Pass, until: Instant, now: Instant) -> Result<String, DoorError> {
        self.kept.retain(|kept| kept.until > now);
        let own = self.kept.iter().filter(|kept| kept.pass.who == pass.who).count();
        if own >= self.each
            && let Some(oldest) = self.kept.iter().position(|kept| kept.pass.who == pass.who)
        {
            self.kept.remove(oldest);
        }
        if self.kept.len() >= self.most {
            return Err(DoorError::Full);
        }
        let mut secret = [0; SECRET];
        SystemRandom::new().fill(&mut secret).map_err(|_| DoorError::NoRandom)?;
        let secret: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        self.kept.push_back(Kept { hash: fingerprint(secret.as_bytes()), pass, until });
        Ok(secret)
    }

    /// Hashes are compared: how long that takes says nothing of the secret.
    fn place(&self, secret: &str, now: Instant) -> Option<usize> {
        let hash = fingerprint(secret.as_bytes());
        self.kept.iter().position(|kept| kept.hash == hash && kept.until > now)
    }
}

struct Book {
    codes: Secrets,
    sessions: Secrets,
    /// Streams that are open, by whose they are.
    streams: HashMap<String, usize>,
}

/// The way in.
pub struct Door {
    /// What a code is put behind.
    origin: String,
    /// The name of the cookie: browsers tell no ports of one host apart.
    cookie: String,
    is_secure: bool,
    access: watch::Receiver<Arc<Access>>,
    book: Mutex<Book>,
}

impl Door {
    /// To a page at `origin`, such as `http://127.0.0.1:9780`.
    pub fn new(origin: String, port: u16, access: watch::Receiver<Arc<Access>>) -> Door {
        let book = Book {
            codes: Secrets::new(CODES, CODES_EACH),
            sessions: Secrets::new(SESSIONS, SESSIONS_EACH),
            streams: HashMap::new(),
        };
        let is_secure = origin.starts_with("https:");
        Door { origin, cookie: format!("shaper-ui-{port}"), is_secure, access, book: Mutex::new(book) }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An address that opens the page once.
    pub fn invite(&self, pass: Pass) -> Result<String, DoorError> {
        let now = Instant::now();
        let code = self.book().codes.add(pass, now + Duration::from_secs(CODE_SECONDS), now)?;
        Ok(format!("{}/open?code={code}", self.origin))
    }

    /// Takes a code for a session: what `Set-Cookie` is to say. `None`: unknown, used, expired, or of one who is not believed.
    pub fn enter(&self, code: &str, now: Instant) -> Option<String> {
        let mut book = self.book();
        let place = book.codes.place(code, now)?;
        let pass = book.codes.kept.get(place)?.pass.clone();
        let who = pass.viewer(&self.access.borrow())?.who;
        // Where there is no room the code still works, later.
        let secret = book.sessions.add(pass, now + SESSION, now).ok()?;
        book.codes.kept.remove(place);
        tracing::info!(target: "audit", who, "opened the web page");
        let secure = if self.is_secure { "; Secure" } else { "" };
        let seconds = SESSION.as_secs();
        Some(format!(
            "{}={secret}; HttpOnly; SameSite=Strict; Path=/; Max-Age={seconds}{secure}",
            self.cookie
        ))
    }

    /// Who shows a cookie of ours.
    pub fn viewer(&self, headers: &HeaderMap, now: Instant) -> Option<Viewer> {
        let book = self.book();
        // Another server of this host may have set one of the same name.
        let place = self.shown(headers).find_map(|secret| book.sessions.place(secret, now))?;
        book.sessions.kept.get(place)?.pass.viewer(&self.access.borrow())
    }

    fn shown<'a>(&self, headers: &'a HeaderMap) -> impl Iterator<Item = &'a str> {
        let cookies = headers.get_all(header::COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
        let ours = cookies
            .flat_map(|cookies| cookies.split(';'))
            .filter_map(|cookie| cookie.trim().strip_prefix(self.cookie.as_str())?.strip_prefix('='));
        ours.take(COOKIES)
    }

    /// One more stream of an identity; `None`: it has `most` already.
    pub(super) fn stream(self: &Arc<Self>, who: &str, most: usize) -> Option<StreamPermit> {
        let mut book = self.book();
        let open = book.streams.entry(who.to_owned()).or_default();
        if *open >= most {
            return None;
        }
        *open += 1;
        Some(StreamPermit { door: Arc::clone(self), who: who.to_owned() })
    }
}

/// A stream that is open.
pub(super) struct StreamPermit {
    door: Arc<Door>,
    who: String,
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut book = self.door.book();
        if let Some(open) = book.streams.get_mut(&self.who) {
            *open -= 1;
            if *open == 0 {
                book.streams.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn pass(who: &str) -> Pass {
        let caller = Credentials { uid: 1000, gid: 1000, groups: Vec::new() };
        Pass { who: who.into(), asker: Asker::User, caller, holder: None }
    }

    fn door(access: Access) -> (watch::Sender<Arc<Access>>, Door) {
        let (sender, access) = watch::channel(Arc::new(access));
        (sender, Door::new("http://127.0.0.1:9780".into(), 9780, access))
    }

    fn code(url: &str) -> &str {
        url.split_once("code=").unwrap().1
    }

    fn cookie(set: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let pair = format!("other=1; {}", set.split(';').next().unwrap());
        headers.insert(header::COOKIE, pair.parse().unwrap());
        headers
    }

    #[test]
    fn web_codes_open_once_and_sessions_end() {
        let (_access, door) = door(Access::default());
        let url = door.invite(pass("uid 1000")).unwrap();
        let now = Instant::now();
        assert_eq!(code(&url).len(), 2 * SECRET);
        assert_eq!(door.enter(&code(&url)[1..], now), None);
        let set = door.enter(code(&url), now).unwrap();
        assert!(set.contains("HttpOnly; SameSite=Strict; Path=/; Max-Age=43200"), "{set}");
        assert_eq!(door.enter(code(&url), now), None, "a code works once");
        assert_eq!(door.viewer(&cookie(&set), now).unwrap().who, "uid 1000");
        assert!(door.viewer(&cookie("shaper-ui-9780=00"), now).is_none());
        assert!(door.viewer(&cookie(&set.replace("9780", "9781")), now).is_none());
        assert!(door.viewer(&cookie(&set), now + SESSION).is_none(), "twelve hours later it is over");
        let late = door.invite(pass("uid 1000")).unwrap();
        assert_eq!(door.enter(code(&late), Instant::now() + Duration::from_secs(CODE_SECONDS)), None);
    }

    #[test]
    fn web_sessions_are_bounded_and_no_identity_takes_another_ones_place() {
        let (_access, door) = door(Access::default());
        let now = Instant::now();
        let enter = |who: &str| door.enter(code(&door.invite(pass(who)).unwrap()), now).unwrap();
        let quiet = enter("uid 7");
        let first = enter("uid 8");
        for _ in 0..SESSIONS_EACH {
            enter("uid 8");
        }
        assert!(door.viewer(&cookie(&first), now).is_none(), "the oldest of its own went");
        assert!(door.viewer(&cookie(&quiet), now).is_some());
        let codes: Vec<_> = (0..=CODES_EACH).map(|_| door.invite(pass("uid 9")).unwrap()).collect();
        assert_eq!(door.enter(code(&codes[0]), now), None);
        assert!(door.enter(code(&codes[1]), now).is_some());
    }

    #[test]
    fn web_sessions_end_when_their_identity_is_not_believed_any_more() {
        let entry = "identities:\n  - id: spiffe://d/submitter/etl\n    uid: 1500\n    gid: 1500\n    namespaces: [etl]\n    \
                     max_priority: medium\n";
        let access = |text: &str| Access::parse(text, Path::new("access.yaml")).unwrap();
        let (sender, door) = door(access(entry));
        let identity = "spiffe://d/submitter/etl";
        let holder = Holder {
            identity: identity.parse().unwrap(),
            serial: "1".into(),
            not_after: i64::MAX,
            hosts: Vec::new(),
        };
        let asker = Asker::Role(Role::Submitter);
        let url = door.invite(Pass { asker, holder: Some(Arc::new(holder)), ..pass(identity) }).unwrap();
        let now = Instant::now();
        let set = door.enter(code(&url), now).unwrap();
        let viewer = door.viewer(&cookie(&set), now).unwrap();
        assert_eq!(viewer.caller.uid, 1500);
        assert!(!viewer.sees_all() && viewer.may("ListClusterTasks") && !viewer.may("FenceNode"));
        sender.send_replace(Arc::new(access(&format!("{entry}revoked: [{identity}]\n"))));
        assert!(door.viewer(&cookie(&set), now).is_none());
        sender.send_replace(Arc::default());
        assert!(door.viewer(&cookie(&set), now).is_none(), "it has no entry any more");
    }
}
