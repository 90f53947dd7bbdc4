//! Where it is measured: two namespaces, cgroups, and by turns who shapes what leaves the near one.

use std::path::{Path, PathBuf};

use anyhow::Result;
use shaper_core::units::BitsPerSec;
use shaper_tests::{
    agent::{Agent, Options},
    cgroup::TestCgroup,
    net::{DEVICE, NetPair, Netns},
};

use crate::rig;

/// Who shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum By {
    /// A real agent, as it is shipped.
    Ours,
    /// With a burst of 5 ms and a latency of 50 ms.
    Tbf,
    /// One class, with what is usual.
    Htb,
    Nobody,
}

impl By {
    pub(super) fn name(self) -> &'static str {
        match self {
            By::Ours => "ours",
            By::Tbf => "TBF",
            By::Htb => "HTB",
            By::Nobody => "nobody",
        }
    }
}

pub(super) struct Bed {
    _groups: TestCgroup,
    /// Of the task that sends.
    pub(super) task: PathBuf,
    /// Of another task on the same device.
    pub(super) other: PathBuf,
    /// Of the receivers.
    pub(super) far: PathBuf,
    pub(super) pair: NetPair,
}

impl Bed {
    pub(super) fn make() -> Result<Bed> {
        let groups = TestCgroup::new();
        let [task, other, far] = ["task", "other", "far"].map(|name| groups.make_child(name));
        Ok(Bed { _groups: groups, task, other, far, pair: rig::quiet_cable()? })
    }

    /// Has the task limited, for as long as what is returned lives.
    pub(super) fn shape(&self, by: By, rate: BitsPerSec) -> InForce<'_> {
        let near = &self.pair.near;
        let rate_text = format!("{}bit", rate.0);
        match by {
            By::Ours => {
                let mbit = format!("{}mbit", rate.0 / super::MBIT);
                return InForce(Some(Means::Agent(self.agent(&[&self.other], Some(&mbit)))));
            }
            By::Tbf => {
                let burst = burst_bytes(rate).to_string();
                let root = ["qdisc", "add", "dev", DEVICE, "root", "tbf", "rate", &rate_text];
                near.tc(&[&root[..], &["burst", &burst, "latency", "50ms"]].concat());
            }
            By::Htb => {
                near.tc(&["qdisc", "add", "dev", DEVICE, "root", "handle", "1:", "htb", "default", "10"]);
                let class = ["class", "add", "dev", DEVICE, "parent", "1:", "classid", "1:10", "htb"];
                near.tc(&[&class[..], &["rate", &rate_text, "ceil", &rate_text]].concat());
            }
            By::Nobody => return InForce(None),
        }
        InForce(Some(Means::Qdisc(near)))
    }

    /// An agent at the near end that has adopted the task, and these groups without a limit.
    pub(super) fn agent(&self, others: &[&Path], limit: Option<&str>) -> Agent<'_> {
        let agent = Options::default().on(&self.pair).start();
        let limits: Vec<&str> = limit.into_iter().flat_map(|rate| ["--net", rate]).collect();
        agent.adopt("task", &self.task, &limits);
        for (number, group) in others.iter().enumerate() {
            agent.adopt(&format!("other-{number}"), group, &[]);
        }
        agent
    }
}

/// What passes in 5 ms, but two frames at least: less than one would never pass.
fn burst_bytes(rate: BitsPerSec) -> u64 {
    (rate.bytes_per_sec() / 200).max(2 * 1514)
}

/// A limit. Dropping it lifts it.
pub(super) struct InForce<'a>(Option<Means<'a>>);

enum Means<'a> {
    /// It releases everything when it is dropped.
    Agent(#[expect(dead_code, reason = "held for its end")] Agent<'a>),
    Qdisc(&'a Netns),
}

impl Drop for InForce<'_> {
    fn drop(&mut self) {
        if let Some(Means::Qdisc(near)) = &self.0
            && !std::thread::panicking()
        {
            near.tc(&["qdisc", "delete", "dev", DEVICE, "root"]);
        }
    }
}
