//! Making room: arrivals of high priority on a cluster that is full of others, of the shapes that kube-scheduler's own
//! benchmark of preemption has (nodes of 4 cores, tasks of 0.9, arrivals of 3).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use shaper_core::{
    place::{Cluster, Constraint, GpuRequest, Gpus, NodeSpec, Request, Resident, Residents, Scorer, Scoring},
    spec::{Capacity, Demand, Priority},
    units::{Bytes, Millicores},
};

use crate::{Plan, report::Report};

const NODES: usize = 5_000;
const TASKS: u64 = 20_000;
const ARRIVALS: u64 = 5_000;

pub(crate) fn measure(_: Plan, report: &mut Report) -> Result<()> {
    let mut cluster = Cluster::default();
    let any = cluster.constraint(&Constraint::default());
    for number in 0..NODES {
        cluster.add(NodeSpec {
            name: format!("node-{number}"),
            capacity: Capacity {
                cpu: Millicores(4000),
                memory: Bytes(32 << 30),
                gpu_memory: None,
                network: None,
                storage_io: None,
            },
            gpus: Gpus::default(),
            labels: BTreeMap::new(),
            taints: BTreeSet::new(),
        })?;
    }
    let request = |cpu: u64, priority| Request {
        demand: Demand {
            cpu: Millicores(cpu),
            memory: Bytes(500 << 20),
            gpu_memory: None,
            network: None,
            storage_io: None,
        },
        gpu: GpuRequest::None,
        constraint: any,
        priority,
    };
    let seed = Scoring::of(Scorer::Seed);
    let mut residents = Residents::default();
    for task in 0..TASKS {
        let request = request(900, Priority::Low);
        let at = cluster.decide(&request, &seed).context("the cluster is full too early")?;
        if !cluster.allocate(&request, at) {
            bail!("what was decided was not there");
        }
        residents.start(Resident { task, request, at, since: task });
    }
    let (mut victims, mut longest) = (0, 0.0f64);
    let start = Instant::now();
    for task in TASKS..TASKS + ARRIVALS {
        let before = Instant::now();
        let request = request(3000, Priority::High);
        if cluster.decide(&request, &seed).is_some() {
            bail!("there is room without preemption");
        }
        let found =
            residents.preempt(&cluster, &request, task, |_| true).context("nobody can be preempted")?;
        cluster.adopt(&request, found.at);
        for victim in &found.victims {
            let gone = residents.stop(*victim).context("a victim that does not run")?;
            cluster.release(&gone.request, gone.at);
        }
        victims += found.victims.len();
        residents.start(Resident { task, request, at: found.at, since: task });
        longest = longest.max(before.elapsed().as_secs_f64() * 1e6);
    }
    let rate = ARRIVALS as f64 / start.elapsed().as_secs_f64();
    report.at_least(
        5e4,
        "5,000 nodes, 20,000 tasks, 5,000 arrivals that each preempt, carried out",
        rate,
        "/s",
    );
    report.tell("the longest of them", longest, "us");
    report.exactly(
        3.0,
        "victims for an arrival (3 of a node's 4 have to go)",
        victims as f64 / ARRIVALS as f64,
        "",
    );
    Ok(())
}
