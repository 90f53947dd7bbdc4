//! A broker and its agents, each of them real, with what tasks of theirs need.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::json;
use tempfile::TempDir;

use crate::{
    NOBODY,
    agent::{Agent, Options},
    bins::binary,
    broker::{Broker, ClusterTask},
    cards::FakeCards,
    cut::Cut,
    net::Netns,
    shaper::parse,
    time::eventually,
};

/// One broker, and agents `n1`, `n2` … with a cable each.
pub struct Cluster<'a> {
    /// By their order: `n1` is the first.
    pub agents: Vec<Agent<'a>>,
    /// From each agent to the broker.
    pub cuts: Vec<Cut>,
    /// The broker.
    pub broker: Broker,
    directory: TempDir,
    submitted: RefCell<BTreeMap<String, String>>,
}

/// What a task does.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// Uses one CPU for ever.
    Spin,
    /// Runs until [`Cluster::let_end`], then exits with this code.
    Until(u8),
}

/// The memory that every task asks for, GiB.
pub const MEMORY_GB: f64 = 0.0625;

/// So many namespaces, for as many agents.
pub fn networks(count: usize) -> Vec<Netns> {
    (0..count).map(|_| Netns::new()).collect()
}

impl<'a> Cluster<'a> {
    /// An agent in each of the networks, with that capacity each; all are connected.
    pub fn start(networks: &'a [Netns], capacities: &[&str]) -> Cluster<'a> {
        Cluster::with(Broker::start(), networks, capacities, None)
    }

    /// The same, of agents with those options besides.
    pub fn start_with(networks: &'a [Netns], capacities: &[&str], options: &[&str]) -> Cluster<'a> {
        let mut cluster = Cluster::with(Broker::start(), &[], &[], None);
        for (network, capacity) in networks.iter().zip(capacities) {
            cluster.join_as(network, capacity, Options::default().with(options));
        }
        cluster
    }

    /// The same, of this broker.
    pub fn start_of(broker: Broker, networks: &'a [Netns], capacities: &[&str]) -> Cluster<'a> {
        Cluster::with(broker, networks, capacities, None)
    }

    /// The same, with agents that abort at that place.
    pub fn start_to_die_at(
        networks: &'a [Netns],
        capacities: &[&str],
        failpoint: Option<&str>,
    ) -> Cluster<'a> {
        Cluster::with(Broker::start(), networks, capacities, failpoint)
    }

    fn with(
        broker: Broker,
        networks: &'a [Netns],
        capacities: &[&str],
        failpoint: Option<&str>,
    ) -> Cluster<'a> {
        let directory = tempfile::Builder::new().prefix("shaper-test-cluster-").tempdir();
        let directory = directory.expect("a temporary directory can be made");
        let path = directory.path();
        fs::set_permissions(path, Permissions::from_mode(0o755)).expect("it is ours");
        fs::copy(binary("test-load"), path.join("test-load")).expect("test-load can be copied");
        fs::write(path.join("runs"), "").expect("a file can be made");
        fs::set_permissions(path.join("runs"), Permissions::from_mode(0o666)).expect("it is ours");

        let (agents, cuts, submitted) = (Vec::new(), Vec::new(), RefCell::default());
        let mut cluster = Cluster { agents, cuts, broker, directory, submitted };
        for (network, capacity) in networks.iter().zip(capacities) {
            cluster.join_to_die_at(network, capacity, failpoint);
        }
        cluster
    }

    /// One more agent, with a network of its own; it is connected.
    pub fn join(&mut self, network: &'a Netns, capacity: &str) {
        self.join_to_die_at(network, capacity, None);
    }

    /// One more, with these GPU cards; it has found them, and offers them.
    pub fn join_with_cards(
        &mut self,
        network: &'a Netns,
        capacity: &str,
        cards: &FakeCards,
        options: &[&str],
    ) {
        let options = Options::default().with_cards(cards).with(options);
        let name = self.join_as(network, capacity, options);
        eventually("the cards are offered", || {
            let node = self.broker.nodes().into_iter().find(|node| node.name == name);
            node.is_some_and(|node| node.connected && node.capacity.gpu_memory.is_some())
        });
    }

    fn join_to_die_at(&mut self, network: &'a Netns, capacity: &str, failpoint: Option<&str>) {
        let mut options = Options::default();
        if let Some(place) = failpoint {
            options = options.dies_at(place);
        }
        self.join_as(network, capacity, options);
    }

    fn join_as(&mut self, network: &'a Netns, capacity: &str, options: Options<'a>) -> String {
        let name = format!("n{}", self.agents.len() + 1);
        let cut = Cut::new(&self.path().join(format!("{name}.sock")), &self.broker.socket());
        let at_broker = cut.socket().display().to_string();
        let options = options.within(network);
        let options = options.with(&["--node", &name, "--broker", &at_broker, "--capacity", capacity]);
        self.agents.push(options.start());
        self.cuts.push(cut);
        self.broker.wait_for_node(&name, true);
        name
    }

    /// The agent of a node.
    pub fn agent(&self, node: &str) -> &Agent<'a> {
        &self.agents[number(node)]
    }

    /// Where tasks note that they run: see `test-load witness`.
    pub fn runs(&self) -> PathBuf {
        self.directory.path().join("runs")
    }

    /// The spec of a task of nobody's.
    pub fn spec(&self, id: &str, cores: f64, priority: &str, load: Load) -> String {
        let at = |name: &str| self.directory.path().join(name).display().to_string();
        let mut command = vec![at("test-load"), "witness".into(), at("runs")];
        match load {
            Load::Spin => command.push("spin".into()),
            Load::Until(code) => command.extend(["until".into(), at(&gate(id)), code.to_string()]),
        }
        let demand = json!({"cpu_cores": cores, "memory_gb": MEMORY_GB});
        json!({
            "profile": {"task_id": id, "resource_demand": demand, "priority": priority},
            "command": command,
            "cwd": "/",
            "run_as": {"uid": NOBODY, "gid": NOBODY},
        })
        .to_string()
    }

    /// Submits a task of nobody's, which must be acknowledged.
    #[track_caller]
    pub fn submit(&self, id: &str, cores: f64, priority: &str, load: Load) -> ClusterTask {
        self.submit_spec(id, &self.spec(id, cores, priority, load))
    }

    /// Submits a spec, which must be acknowledged.
    #[track_caller]
    pub fn submit_spec(&self, id: &str, spec: &str) -> ClusterTask {
        let answer = self.broker.shaper().call_with(&["submit", "--output", "json", "-"], spec.as_bytes());
        assert_eq!(answer.code, 0, "{spec}: {}", answer.stderr);
        self.acknowledged(id, spec);
        parse(&answer.stdout)
    }

    /// That task was acknowledged: it must not be lost.
    pub fn acknowledged(&self, id: &str, spec: &str) {
        self.submitted.borrow_mut().insert(id.to_owned(), spec.to_owned());
    }

    /// All that were.
    pub fn all_acknowledged(&self) -> Vec<String> {
        self.submitted.borrow().keys().cloned().collect()
    }

    /// Lets a task end by itself.
    pub fn let_end(&self, id: &str) {
        fs::write(self.directory.path().join(gate(id)), "").expect("a file can be made");
    }

    /// Waits until a task runs, as a process.
    #[track_caller]
    pub fn wait_until_runs(&self, id: &str) -> ClusterTask {
        // An agent also reports a task as running while its process is still being started.
        let has_process =
            |task: &ClusterTask| task.on_node.as_ref().is_some_and(|status| status.pid.is_some());
        self.broker.wait_until(id, "running", |task| task.runs() && has_process(task))
    }

    /// Waits until a task runs, and lets those of its node win against what else this machine does.
    #[track_caller]
    pub fn wait_until_counts(&self, id: &str) -> ClusterTask {
        let task = self.wait_until_runs(id);
        let agent = self.agent(task.node.as_deref().expect("what runs is on a node"));
        agent.outweigh_others(agent.shaper().get(id).pid.expect("it runs"));
        task
    }

    /// Where the agents' cgroups are.
    pub fn cgroup_roots(&self) -> Vec<PathBuf> {
        self.agents.iter().map(Agent::cgroup_root).collect()
    }

    /// The directory of it all.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

fn gate(id: &str) -> String {
    format!("end-{id}")
}

fn number(node: &str) -> usize {
    let number = node.strip_prefix('n').and_then(|number| number.parse::<usize>().ok());
    number.unwrap_or_else(|| panic!("{node} is no node of a cluster")) - 1
}
