//! Every page, with nothing and with everything, and who gets to see it.

use std::{path::Path, thread::JoinHandle};

use shaper_core::{
    spec::{Credentials, Priority, TaskSpec},
    task::{Phase as RunPhase, TaskStatus, Usage},
};
use shaper_identity::{Role, access::Access, name::Holder, table::Asker};
use tokio::sync::mpsc;
use tower::ServiceExt;

use super::*;
use crate::{
    actor::{self, Actor, FatalError, OUTBOX},
    reactor::{
        Bounds, Event, NodeTask,
        tests::{self as examples, OPERATOR, USER},
    },
    store::memory::Memory,
};

const PAGES: [&str; 7] =
    ["/", "/tasks", "/nodes", "/policies", "/events", "/scale", "/tasks?q=x&phase=running"];
const HOSTILE: &str = "<script>alert(\"1\")</script>'&";

/// A broker, and its page.
struct Cluster {
    broker: Handle,
    running: JoinHandle<Result<(), FatalError>>,
    router: Router,
    door: Arc<Door>,
    standing: watch::Sender<Standing>,
    _access: watch::Sender<Arc<Access>>,
}

/// An answer, read.
struct Got {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Cluster {
    fn start(access: Access) -> Cluster {
        let (broker, seat) = actor::prepare(Bounds::default());
        let actor = Actor::open(Box::new(Memory::default()), seat).unwrap();
        let running = std::thread::spawn(move || actor.run());
        let (standing, follower) = watch::channel(Standing::Leads);
        let (sender, access) = watch::channel(Arc::new(access));
        let door = Arc::new(Door::new("http://localhost:9780".into(), 9780, access));
        let site = Site::new(broker.clone(), follower, door.clone(), vec!["localhost".into()]);
        Cluster { broker, running, router: site.router(), door, standing, _access: sender }
    }

    async fn submit(&self, caller: &Credentials, spec: TaskSpec) {
        let event = Event::Submit { caller: caller.clone(), spec: Box::new(spec) };
        self.broker.ask(event).await.unwrap().unwrap();
    }

    /// A node with a task on it that has told what it uses, one that waits, one that is over, and a policy: with names that
    /// would be markup.
    async fn fill(&self) {
        let (outbox, _directives) = mpsc::channel(OUTBOX);
        let session =
            self.broker.connect(examples::hello("n1", "boot", 4000, Vec::new()), outbox).await.unwrap();
        let mut spec = examples::spec("runs", 1000, Priority::High, 0);
        spec.name = HOSTILE.replace('/', "");
        spec.command.push(HOSTILE.into());
        spec.labels.insert("label".into(), HOSTILE.into());
        self.submit(&USER, spec).await;
        for second in [1, 7, 13] {
            let usage = Usage {
                at_monotonic_ns: second * 1_000_000_000,
                cpu_time_ns: second * 500_000_000,
                memory_bytes: Some(1 << 20),
                ..Usage::default()
            };
            let notes = vec![HOSTILE.to_owned()];
            let status = TaskStatus { usage, notes, ..examples::status("runs", 1, RunPhase::Running) };
            let report = NodeTask { status, generation: 1, evicted: false, lease_over: false, request: None };
            self.broker.tell(vec![Event::TaskReport { session, report: Box::new(report) }]).await.unwrap();
        }
        let mut large = examples::spec("waits", 64_000, Priority::Low, 0);
        large.namespace = "<b>other".into();
        self.submit(&Credentials { uid: 1001, gid: 1001, groups: Vec::new() }, large).await;
        self.submit(&USER, examples::spec("over", 64_000, Priority::Low, 0)).await;
        let cancel = Event::Cancel { caller: USER, task: examples::id("over"), grace_millis: 0 };
        self.broker.ask(cancel).await.unwrap().unwrap();
        let mut policy = examples::policy("p<i>", Priority::High, true);
        policy.namespace = "default".into();
        let policy = Box::new(policy);
        let apply = Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy };
        self.broker.ask(apply).await.unwrap().unwrap();
    }

    async fn request(&self, path: &str, headers: &[(&str, &str)]) -> Got {
        let mut request = Request::builder().uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", "localhost:9780");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let text = axum::body::to_bytes(body, 16 << 20).await.unwrap();
        let text = String::from_utf8(text.to_vec()).unwrap();
        Got { status: parts.status, headers: parts.headers, text }
    }

    /// Opens the page as this one: the cookie.
    async fn enter(&self, pass: Pass) -> String {
        let url = self.door.invite(pass).unwrap();
        let got = self.request(url.trim_start_matches("http://localhost:9780"), &[]).await;
        assert_eq!(
            (got.status, &got.headers["location"]),
            (StatusCode::SEE_OTHER, &HeaderValue::from_static("/"))
        );
        let cookie = got.headers["set-cookie"].to_str().unwrap();
        cookie.split(';').next().unwrap().to_owned()
    }

    async fn as_root(&self) -> String {
        self.enter(Pass { who: "uid 0".into(), asker: Asker::Root, caller: OPERATOR, holder: None }).await
    }

    async fn get(&self, path: &str, cookie: &str) -> Got {
        self.request(path, &[("cookie", cookie)]).await
    }

    async fn stop(self) {
        self.broker.stop().await;
        self.running.join().unwrap().unwrap();
    }
}

#[tokio::test]
async fn web_pages_of_an_empty_cluster_say_how_to_fill_it() {
    let cluster = Cluster::start(Access::default());
    let cookie = cluster.as_root().await;
    for path in PAGES {
        let got = cluster.get(path, &cookie).await;
        assert_eq!(got.status, StatusCode::OK, "{path}: {}", got.text);
        assert!(got.text.contains("class=\"empty\"") && got.text.ends_with("</html>"), "{path}");
    }
    for (path, told) in [
        ("/tasks/none", "No such task"),
        ("/tasks/none/usage", "No such task"),
        ("/tasks/%3Cb%3E", "No such task"),
        ("/nodes/none", "No such node"),
        ("/nothing", "No such page"),
    ] {
        let got = cluster.get(path, &cookie).await;
        assert_eq!(got.status, StatusCode::NOT_FOUND, "{path}");
        assert!(got.text.contains(told) && !got.text.contains("<b>"), "{path}: {}", got.text);
    }
    cluster.stop().await;
}

#[tokio::test]
async fn web_pages_show_what_there_is_and_no_name_becomes_markup() {
    let cluster = Cluster::start(Access::default());
    cluster.fill().await;
    let cookie = cluster.as_root().await;
    for (path, shown) in [
        ("/", "/tasks/waits"),
        ("/tasks", "/nodes/n1"),
        ("/tasks?phase=cancelled", "/tasks/over"),
        ("/tasks/runs", "<td data-label=\"Used now\">"),
        ("/tasks/waits", "<li>n1: "),
        ("/nodes", "1 of 4 cores reserved"),
        ("/nodes/n1", "/tasks/runs"),
        ("/policies", "1 tasks that wait or run"),
        ("/events", "placed"),
        ("/scale", "shaper-broker --scale FILE"),
    ] {
        let got = cluster.get(path, &cookie).await;
        assert_eq!(got.status, StatusCode::OK, "{path}");
        assert!(got.text.contains(shown), "{path} has no {shown}: {}", got.text);
        // Of none of these a single letter may be left as it is.
        for markup in [
            "<script>alert",
            "<script&gt;alert",
            "script>alert",
            "alert(\"1",
            "<b>other",
            "<b&gt;other",
            "b>other",
            "p<i",
            "p&lt;i>",
            "'&amp;",
            "&#39;&<",
            "&#39;&\"",
        ] {
            assert!(!got.text.contains(markup), "{path} has {markup}");
        }
    }
    let filtered = cluster.get("/tasks?phase=running&priority=high&node=n1", &cookie).await.text;
    assert!(filtered.contains("/tasks/runs") && !filtered.contains("/tasks/waits"), "{filtered}");
    let usage = cluster.get("/tasks/runs/usage", &cookie).await;
    let usage: serde_json::Value = serde_json::from_str(&usage.text).unwrap();
    assert_eq!(usage["cpu"], serde_json::json!([0.5, 0.5]));
    assert_eq!(usage["memory"], serde_json::json!([1 << 20, 1 << 20]));
    assert_eq!(usage["decisions"][0]["kind"], "placed");
    cluster.stop().await;
}

#[tokio::test]
async fn web_dry_runs_show_what_would_change_and_what_is_wrong() {
    let cluster = Cluster::start(Access::default());
    cluster.fill().await;
    let cookie = cluster.as_root().await;
    let got = cluster.get("/policies?policy=%3Cscript%3E%3A%20%5B", &cookie).await;
    assert!(got.text.contains("role=\"alert\"") && !got.text.contains("<script>:"), "{}", got.text);
    let policy = "policy_name%3A+x%0Apriority%3A+high%0Abehavior%3A+%7Beviction_threshold%3A+0.9%7D";
    let got = cluster.get(&format!("/policies?policy={policy}"), &cookie).await;
    assert!(got.text.contains("It would cover 1 tasks"), "{}", got.text);
    let listed = cluster.get("/policies", &cookie).await;
    assert!(!listed.text.contains("<th scope=\"row\">x</th>"), "nothing is applied");
    cluster.stop().await;
}

#[tokio::test]
async fn web_nobody_gets_in_without_a_code_and_every_answer_has_the_headers() {
    let cluster = Cluster::start(Access::default());
    cluster.fill().await;
    let cookie = cluster.as_root().await;
    let headers = |got: &Got, path: &str| {
        let policy = got.headers["content-security-policy"].to_str().unwrap();
        for rule in ["default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"]
        {
            assert!(policy.contains(rule), "{path}: {policy}");
        }
        assert!(!policy.contains("unsafe"), "{path}: {policy}");
        assert_eq!(got.headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(got.headers["referrer-policy"], "no-referrer", "{path}");
    };
    for path in
        PAGES.into_iter().chain(["/tasks/runs", "/tasks/runs/usage", "/nodes/n1", "/live", "/nothing"])
    {
        for wrong in ["", "shaper-ui-9780=", "shaper-ui-9780=00", &cookie[..cookie.len() - 1]] {
            let got = cluster.get(path, wrong).await;
            assert_eq!(got.status, StatusCode::UNAUTHORIZED, "{path}: {}", got.text);
            assert!(got.text.contains("shaper ui") && !got.text.contains("runs"), "{path}");
            headers(&got, path);
        }
        let elsewhere = cluster.request(path, &[("cookie", &cookie), ("host", "evil.example")]).await;
        assert_eq!(elsewhere.status, StatusCode::MISDIRECTED_REQUEST, "{path}");
        headers(&elsewhere, path);
        let other = cluster.request(path, &[("cookie", &cookie), ("sec-fetch-site", "cross-site")]).await;
        assert_eq!(other.status, StatusCode::FORBIDDEN, "{path}");
        headers(&other, path);
    }
    for path in PAGES {
        let got = cluster.get(path, &cookie).await;
        headers(&got, path);
        assert_eq!(got.headers["cache-control"], "no-store", "{path}");
        for inline in ["style=", " onclick", "<script>", "javascript:"] {
            assert!(!got.text.contains(inline), "{path} has {inline}");
        }
    }
    headers(&cluster.request(assets::address("page.css"), &[]).await, "page.css");
    let used = cluster.request("/open?code=00", &[]).await;
    assert_eq!(used.status, StatusCode::UNAUTHORIZED);
    assert!(used.text.contains("shaper ui"), "{}", used.text);
    cluster.stop().await;
}

#[tokio::test]
async fn web_codes_work_once() {
    let cluster = Cluster::start(Access::default());
    let pass = Pass { who: "uid 0".into(), asker: Asker::Root, caller: OPERATOR, holder: None };
    let url = cluster.door.invite(pass).unwrap();
    let path = url.trim_start_matches("http://localhost:9780");
    assert_eq!(cluster.request(path, &[]).await.status, StatusCode::SEE_OTHER);
    let again = cluster.request(path, &[]).await;
    assert_eq!(again.status, StatusCode::UNAUTHORIZED);
    assert!(!again.headers.contains_key("set-cookie"));
    cluster.stop().await;
}

#[tokio::test]
async fn web_submitters_and_users_see_their_own_alone() {
    let identity = "spiffe://d/submitter/etl";
    let entry = format!(
        "identities:\n  - id: {identity}\n    uid: {}\n    gid: 1000\n    namespaces: [etl]\n    max_priority: high\n",
        USER.uid
    );
    let cluster = Cluster::start(Access::parse(&entry, Path::new("access.yaml")).unwrap());
    cluster.fill().await;
    let mut own = examples::spec("own", 1000, Priority::Low, 0);
    own.namespace = "etl".into();
    cluster.submit(&USER, own).await;
    let holder = Holder {
        identity: identity.parse().unwrap(),
        serial: "1".into(),
        not_after: i64::MAX,
        hosts: Vec::new(),
    };
    let asker = Asker::Role(Role::Submitter);
    let holder = Some(Arc::new(holder));
    // `runs` is of the same uid, in another namespace; `waits` of another uid.
    let submitter = cluster.enter(Pass { who: identity.into(), asker, caller: USER, holder }).await;
    let user = Pass { who: "uid 1000".into(), asker: Asker::User, caller: USER, holder: None };
    let user = cluster.enter(user).await;
    for (cookie, hidden, seen) in [
        (&submitter, vec!["runs", "waits", "over"], vec!["own"]),
        (&user, vec!["waits"], vec!["own", "runs"]),
    ] {
        for path in ["/", "/tasks", "/events", "/nodes/n1", "/policies"] {
            let got = cluster.get(path, cookie).await;
            assert_eq!(got.status, StatusCode::OK, "{path}");
            for task in &hidden {
                assert!(!got.text.contains(&format!("/tasks/{task}")), "{path} shows {task}");
            }
        }
        for task in hidden {
            for path in [format!("/tasks/{task}"), format!("/tasks/{task}/usage")] {
                assert_eq!(cluster.get(&path, cookie).await.status, StatusCode::NOT_FOUND, "{path}");
            }
        }
        for task in seen {
            assert_eq!(cluster.get(&format!("/tasks/{task}"), cookie).await.status, StatusCode::OK);
            assert!(cluster.get("/tasks", cookie).await.text.contains(&format!("/tasks/{task}")));
        }
    }
    let policies = cluster.get("/policies", &submitter).await.text;
    assert!(!policies.contains("p&lt;i&gt;"), "a policy of another namespace: {policies}");
    cluster.stop().await;
}

#[tokio::test]
async fn web_lists_are_paged_and_each_task_is_on_one_page() {
    let cluster = Cluster::start(Access::default());
    let cookie = cluster.as_root().await;
    for number in 0..120 {
        cluster.submit(&USER, examples::spec(&format!("t{number:03}"), 1000, Priority::Low, 0)).await;
    }
    let (mut path, mut found) = ("/tasks".to_owned(), Vec::new());
    loop {
        let text = cluster.get(&path, &cookie).await.text;
        let tasks = text.split("href=\"/tasks/").skip(1).filter_map(|rest| rest.split('"').next());
        found.extend(tasks.map(str::to_owned));
        let next = text.split("rel=\"next\" href=\"").nth(1).and_then(|rest| rest.split('"').next());
        let Some(next) = next else { break };
        path = next.replace("&amp;", "&");
    }
    let expected: Vec<_> = (0..120).rev().map(|number| format!("t{number:03}")).collect();
    assert_eq!(found, expected);
    cluster.stop().await;
}

#[tokio::test]
async fn web_of_a_broker_that_stands_by_says_which_leads() {
    let cluster = Cluster::start(Access::default());
    let cookie = cluster.as_root().await;
    cluster.standing.send_replace(Standing::Standby(Some("tcp://10.0.0.7:7070<".into())));
    let got = cluster.get("/tasks", &cookie).await;
    assert_eq!(got.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(got.text.contains("tcp://10.0.0.7:7070&lt;"), "{}", got.text);
    cluster.stop().await;
}

#[tokio::test]
async fn web_streams_begin_at_once_and_are_bounded() {
    let cluster = Cluster::start(Access::default());
    let cookie = cluster.as_root().await;
    let mut open = Vec::new();
    let refused = loop {
        let request = Request::builder().uri("/live").header("host", "localhost").header("cookie", &cookie);
        let response = cluster.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        if response.status() != StatusCode::OK {
            break response.status();
        }
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut stream = response.into_body().into_data_stream();
        let first = tokio_stream::StreamExt::next(&mut stream).await.unwrap().unwrap();
        assert_eq!(&first[..], b"event: begin\ndata:\n\n");
        open.push(stream);
    };
    assert_eq!((open.len(), refused), (live::STREAMS_EACH, StatusCode::SERVICE_UNAVAILABLE));
    cluster.stop().await;
}
