//! The web page of a cluster that is at work: how long the broker takes for each kind of page, asked by several browsers that
//! page through all there is. Its agents are fakes, whose tasks do not end and tell what they use.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpListener as Reserved},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use shaper_proto::v1::{self, broker_client::BrokerClient};
use tokio::net::TcpStream;

use super::{
    agents::{Agents, Tasks},
    clients::{self, Marks},
    rig::Rig,
};
use crate::{
    Plan,
    report::{Report, quantile},
};

/// What the goal is stated for.
const TASKS: u64 = 10_000;
const NODES: usize = 1000;
/// With `--quick`.
const PART: u64 = 10;
/// Who look at once, one request at a time each.
const BROWSERS: usize = 4;
/// The goal: of the broker's time, with every kind of page.
const GOAL: f64 = 50.0;

/// By the first component of a path: milliseconds from the request to the last byte of its page …
type Times = BTreeMap<&'static str, Vec<f64>>;
/// … and bytes of the largest.
type Sizes = BTreeMap<&'static str, usize>;

#[derive(Default)]
struct Seen {
    times: Times,
    sizes: Sizes,
}

/// Somebody who has opened the page.
struct Browser {
    to: http1::SendRequest<Empty<Bytes>>,
    host: String,
    cookie: String,
}

impl Browser {
    async fn connect(address: SocketAddr) -> Result<http1::SendRequest<Empty<Bytes>>> {
        let stream = TcpStream::connect(address).await.context("cannot connect to the page")?;
        let (to, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(to)
    }

    /// By a code of its own, as `shaper ui` prints it.
    async fn open(rig: &Rig, address: SocketAddr) -> Result<Browser> {
        let mut client = BrokerClient::new(rig.connect().await?);
        let url = client.open_ui(v1::OpenUiRequest::default()).await?.into_inner().url;
        let path = url.split_once("://").and_then(|(_, rest)| rest.split_once('/'));
        let (host, path) = path.with_context(|| format!("{url} is no address"))?;
        let mut to = Browser::connect(address).await?;
        let request = Request::get(format!("/{path}")).header(header::HOST, host).body(Empty::new())?;
        let answer = to.send_request(request).await?;
        let cookie = answer.headers().get(header::SET_COOKIE).context("the code opens nothing")?;
        let cookie = cookie.to_str()?.split(';').next().unwrap_or_default().to_owned();
        Ok(Browser { to, host: host.to_owned(), cookie })
    }

    async fn get(&mut self, path: &str) -> Result<String> {
        let request = Request::get(path)
            .header(header::HOST, &self.host)
            .header(header::COOKIE, &self.cookie)
            .body(Empty::new())?;
        self.to.ready().await?;
        let answer = self.to.send_request(request).await?;
        ensure!(answer.status() == StatusCode::OK, "{path}: {}", answer.status());
        let body = answer.into_body().collect().await?.to_bytes();
        Ok(String::from_utf8(body.to_vec())?)
    }

    /// Pages through everything, over and over. `first`: which of a kind it looks at in detail.
    async fn look(
        mut self,
        first: u64,
        (tasks, nodes): (u64, usize),
        until: Instant,
        seen: &Mutex<Seen>,
    ) -> Result<()> {
        let mut number = first;
        loop {
            let (task, node) = (number % tasks, number % nodes as u64);
            let details = [
                ("overview", "/".to_owned()),
                ("a task", format!("/tasks/bench-{task}")),
                ("use of a task", format!("/tasks/bench-{task}/usage")),
                ("a node", format!("/nodes/node-{node}")),
                ("events", "/events".to_owned()),
                ("policies", "/policies".to_owned()),
            ];
            for (kind, path) in details {
                self.timed(kind, &path, seen).await?;
            }
            for (kind, path) in [
                ("tasks", "/tasks"),
                ("tasks, filtered", "/tasks?phase=running&priority=medium"),
                ("nodes", "/nodes"),
            ] {
                let mut path = path.to_owned();
                loop {
                    let text = self.timed(kind, &path, seen).await?;
                    if Instant::now() > until {
                        return Ok(());
                    }
                    let next =
                        text.split("rel=\"next\" href=\"").nth(1).and_then(|rest| rest.split('"').next());
                    let Some(next) = next else { break };
                    path = next.replace("&amp;", "&");
                }
            }
            number += BROWSERS as u64;
        }
    }

    async fn timed(&mut self, kind: &'static str, path: &str, seen: &Mutex<Seen>) -> Result<String> {
        let start = Instant::now();
        let text = self.get(path).await?;
        let took = start.elapsed().as_secs_f64() * 1e3;
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.times.entry(kind).or_default().push(took);
        let largest = seen.sizes.entry(kind).or_default();
        *largest = (*largest).max(text.len());
        Ok(text)
    }
}

/// Ten thousand tasks on a thousand nodes.
pub(crate) fn web(plan: Plan, report: &mut Report) -> Result<()> {
    let part = if plan.is_quick { PART } else { 1 };
    let (tasks, nodes) = (TASKS / part, NODES / part as usize);
    // Free a moment ago.
    let address = Reserved::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let rig = Rig::start(&["--web", &format!("tcp://{address}")])?;
    let marks = Arc::new(Marks::default());
    let seen = Arc::new(Mutex::new(Seen::default()));
    rig.runtime.block_on(async {
        let agents = Agents::attach_with(&rig, nodes, &marks, Tasks::Stay).await?;
        let filled = async {
            clients::submit(rig.connect().await?, &marks, tasks).await?;
            agents.run(tasks).await
        };
        tokio::select! {
            filled = filled => filled?,
            failed = agents.failed() => return Err(failed),
        }
        // What the agents said of their first tasks is worked off first.
        Browser::open(&rig, address).await?.get("/").await?;
        let until = Instant::now() + plan.steady.min(Duration::from_secs(30));
        let mut browsers = tokio::task::JoinSet::new();
        for number in 0..BROWSERS {
            let (browser, seen) = (Browser::open(&rig, address).await?, seen.clone());
            // Of those that there are.
            let first = number as u64 * (nodes as u64 / BROWSERS as u64);
            browsers.spawn(async move { browser.look(first, (tasks, nodes), until, &seen).await });
        }
        let looked = async {
            while let Some(browser) = browsers.join_next().await {
                browser??;
            }
            anyhow::Ok(())
        };
        tokio::select! {
            looked = looked => looked,
            failed = agents.failed() => Err(failed),
        }
    })?;
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let what = format!("web, {tasks} tasks on {nodes} nodes, {BROWSERS} browsers");
    let all: Vec<f64> = seen.times.values().flatten().copied().collect();
    if all.is_empty() {
        bail!("nothing was looked at");
    }
    report.tell(&format!("{what}: pages"), all.len() as f64, "");
    report.at_most(GOAL, &format!("{what}: a page, p99"), quantile(&all, 990), "ms");
    for (kind, times) in &seen.times {
        report.at_most(GOAL, &format!("{what}: {kind}, p99"), quantile(times, 990), "ms");
        report.tell(&format!("{what}: {kind}, p50"), quantile(times, 500), "ms");
        report.tell(&format!("{what}: {kind}, the largest"), seen.sizes[kind] as f64 / 1024.0, "KiB");
    }
    report.tell(&format!("{what}: memory of the broker"), rig.memory()? as f64 / f64::from(1 << 20), "MiB");
    Ok(())
}
