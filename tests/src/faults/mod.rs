//! Faults of every kind upon a cluster of several brokers, drawn at random, and whether all that was promised was kept:
//! `cargo xtask soak broker` in full, a little with all the other tests.
//!
//! Three members of etcd, three brokers and the agents are in network namespaces of their own. Clients submit more than the
//! nodes can hold, look after it and cancel some, while [`plan`] draws what breaks next: processes are killed and stopped,
//! cables pulled, answers lost, clocks set wrong, nodes started anew, for less and for more than a lease, several at a time. What
//! everybody observes goes into one [`history`], and [`verdict`] judges it knowing nothing else.
//!
//! The agents are fake ones ([`fake`], on a [`machine`] that is only pretended, so that each start and end is known to be where
//! it was), or real ones, with real tasks, whose life the kernel tells ([`kernel`]).
//!
//! A clock that jumps: the broker adds to its wall clock what a file says (`shaper_proto::failpoint::clock_skew`), for the
//! machine's own is everybody's, and a time namespace has none.

mod brokers;
mod clients;
mod fake;
mod figures;
mod history;
mod kernel;
mod machine;
mod members;
mod plan;
mod switch;
mod verdict;
mod world;

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use shaper_core::spec::Credentials;
use shaper_identity::pki::Authority;
use shaper_proto::v1;
use tempfile::TempDir;

use self::{
    brokers::{BROKERS, Brokers},
    clients::{Clients, Recipe},
    figures::{Beside, Failover, failovers, percentile},
    history::{Amount, Entry, Finals, History, Seen},
    machine::Machine,
    plan::{Fault, Strike},
    switch::{Lan, Switch},
    world::{Agents, World},
};
use crate::{
    NOBODY,
    agent::Options,
    bins::binary,
    checker::Runs,
    net::Netns,
    random::{Random, seed},
    soak,
};

/// The shortest that brokers take. So that there are many in a run.
const LEASE: Duration = Duration::from_secs(2);
/// Of tasks that are run again when their node is lost: shorter than some of the silences of agents.
const TASK_LEASE_SECONDS: &str = "10";
/// What is aimed at: above the lease.
const ABOVE_LEASE: Duration = Duration::from_millis(500);
/// Faults upon one cluster; then comes another.
const ROUND: u32 = 100;
/// So many faults leave etcd alone, and so many do not, and so on.
const PHASE: u32 = 10;
/// Of the longest failovers, so many are told in detail.
const SLOWEST: usize = 3;
/// Once nothing is broken any more, everything must have come to its end by then.
const SETTLE: Duration = Duration::from_secs(150);
const PAUSE: Duration = Duration::from_millis(200);
/// A certificate is good for so long.
const VALID: Duration = Duration::from_secs(24 * 3600);

const FAKE_AGENTS: usize = 4;
const REAL_AGENTS: usize = 2;
/// What a node has, and what tasks ask for of it: seldom does all fit.
const FAKE_NODE: Amount = Amount { millicores: 2000, bytes: 8 << 30 };
const REAL_NODE: Amount = Amount { millicores: 1000, bytes: 1 << 30 };
const APPETITES: [u64; 6] = [200, 350, 500, 700, 1100, 1600];
const SMALL_APPETITES: [u64; 4] = [100, 250, 400, 700];
const MEMORY: u64 = 64 << 20;
/// The longest that a task runs.
const RUNS_MILLIS: u64 = 2_500;
/// Codes with which tasks end.
const CODES: u64 = 4;

/// What was counted and measured.
#[derive(Default)]
struct Figures {
    faults: BTreeMap<Fault, u32>,
    failovers: Vec<Failover>,
    acknowledged: usize,
    reads: usize,
    directives: usize,
    /// Started attempts, and those that came to their end by themselves.
    ended: usize,
    /// Times that a broker took over the store.
    reigns: usize,
}

/// What a round leaves to be judged.
struct Round {
    entries: Vec<Entry>,
    nodes: BTreeMap<String, Amount>,
    finals: Finals,
    faults: BTreeMap<Fault, u32>,
    /// What was seen to be wrong besides.
    wrong: Vec<String>,
}

/// So many faults upon clusters with fake agents: nothing of what was promised is broken.
pub fn assert_all_is_kept_by_fake_agents(faults: u32) {
    soak_by("fake", faults, fake_round);
}

/// So many faults upon clusters with real agents: nothing of what was promised is broken.
pub fn assert_all_is_kept_by_real_agents(faults: u32) {
    soak_by("real", faults, real_round);
}

fn soak_by(kind: &str, faults: u32, round: fn(&Path, &mut Random, u32) -> Round) {
    let seed = seed();
    println!("soak: {kind} agents, seed {seed} (SHAPER_SEED repeats which faults are drawn)");
    let mut figures = Figures::default();
    let mut left = faults;
    let mut random = Random(seed);
    while left > 0 {
        let now = left.min(ROUND);
        left -= now;
        let directory = tempfile::Builder::new().prefix("shaper-faults-").tempdir();
        let directory = directory.expect("a temporary directory can be made");
        // Tasks of any user find what is in it.
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("it is ours");
        let round = round(directory.path(), &mut Random(random.next()), now);
        judge(&round, directory, seed);
        figures.add(round);
    }
    figures.print(kind, faults);
}

/// Fails where something may not have happened, and keeps what was observed then.
fn judge(round: &Round, directory: TempDir, seed: u64) {
    let mut found = round.wrong.clone();
    found.extend(verdict::violations(&round.entries, &round.nodes, &round.finals));
    if found.is_empty() {
        return;
    }
    let directory = directory.keep();
    let lines = round.entries.iter().map(|Entry { at, seen }| format!("{at:?} {seen:?}\n"));
    let kept = fs::write(directory.join("history"), lines.collect::<String>());
    kept.expect("a file can be made");
    panic!("{found:#?}\nSHAPER_SEED={seed}; what was observed, and the logs, are in {}", directory.display());
}

/// Lets it all happen: what the tasks have become in the end, or what is still under way when it should not.
fn suffer(
    world: &mut World<'_>,
    history: &History,
    random: &mut Random,
    faults: u32,
    recipe: &Arc<Recipe>,
) -> (Finals, Vec<String>) {
    let clients = Clients::start(&world.brokers.all, history, random, recipe);
    // What breaks before anything was there breaks nothing.
    let has_end = history.wait_for_end(SETTLE);
    assert!(has_end, "no task has come to its end within {SETTLE:?}, and nothing is broken");
    let mut done = 0;
    while done < faults {
        let strike = Strike::draw(random);
        if strike.fault.is_of_etcd() && (done / PHASE).is_multiple_of(2) {
            continue;
        }
        world.pass(strike.after);
        done += u32::from(world.strike(&strike));
    }
    world.pass(2 * LEASE);
    world.mend_all();
    clients.finish();
    settle(&world.brokers, history)
}

/// Waits until every task is over.
fn settle(brokers: &Brokers, history: &History) -> (Finals, Vec<String>) {
    let asked = history.demands();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a thread can wait for IO");
    let until = Instant::now() + SETTLE;
    loop {
        let tasks = runtime.block_on(last_tasks(brokers));
        let told = |task: &v1::ClusterTask| {
            let id = task.spec.as_ref().and_then(|spec| spec.profile.as_ref()).map(|it| it.task_id.clone());
            (id.unwrap_or_default(), clients::told(task))
        };
        let finals: Option<Finals> = tasks.as_ref().map(|tasks| tasks.iter().map(told).collect());
        let is_over = |finals: &Finals| finals.values().all(|told| told.place.is_over());
        match finals {
            Some(finals) if is_over(&finals) => return (finals, Vec::new()),
            finals if Instant::now() > until => {
                let under_way = tasks.iter().flatten().filter(|task| !clients::told(task).place.is_over());
                let wrong = under_way.map(|task| format!("not over within {SETTLE:?}: {task:?}")).collect();
                let nobody =
                    vec![format!("nobody tells within {SETTLE:?} what became of {} tasks", asked.len())];
                return match finals {
                    Some(finals) => (finals, wrong),
                    None => (Finals::default(), nobody),
                };
            }
            _ => thread::sleep(PAUSE),
        }
    }
}

async fn last_tasks(brokers: &Brokers) -> Option<Vec<v1::ClusterTask>> {
    let (mut client, _) = brokers.all[brokers.leader()?].client().await?;
    tokio::time::timeout(SETTLE / 10, brokers::all_tasks(&mut client)).await.ok().flatten()
}

/// Certificates of the brokers and of that many nodes.
fn issue(directory: &Path, nodes: usize) -> PathBuf {
    let identities = directory.join("pki");
    let authority = Authority::create(&directory.join("ca"), "cluster.local");
    let authority = authority.expect("an authority can be made");
    fs::create_dir(&identities).expect("a directory can be made");
    let issue = |role: &str, name: String, hosts: &[String]| {
        let identity = format!("spiffe://cluster.local/{role}/{name}").parse().expect("it is an identity");
        let issued = authority.issue(&identities.join(name), &identity, hosts, VALID);
        issued.expect("a certificate can be made");
    };
    for number in 0..BROKERS {
        issue("broker", brokers::name(number), &[brokers::address(Lan::Agents, number)]);
    }
    for number in 0..nodes {
        issue("node", node_name(number), &[]);
    }
    identities
}

fn node_name(number: usize) -> String {
    format!("n{number}")
}

fn fake_round(directory: &Path, random: &mut Random, faults: u32) -> Round {
    let history = History::begin();
    let identities = issue(directory, FAKE_AGENTS);
    let time = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build();
    let time = time.expect("threads can be started");
    let agents = |switch: &Switch| {
        let agent = |number: usize| {
            let name = node_name(number);
            let machine = Machine::new(&name, FAKE_NODE, &history, Random(random.next()), time.handle());
            fake::Agent::start(switch, number, machine, identities.join(&name), &brokers::addresses())
        };
        Agents::Fake((0..FAKE_AGENTS).map(agent).collect())
    };
    let mut world = World::start(directory, &identities, &history, agents);
    let recipe: Arc<Recipe> = Arc::new(|id: &str, random: &mut Random| {
        let demand = Amount { millicores: *random.of(&APPETITES), bytes: MEMORY };
        let time = Duration::from_millis(random.below(RUNS_MILLIS));
        let command = machine::command(time, random.below(CODES) as u8);
        (clients::spec(id, demand, command, random), demand)
    });
    let (finals, wrong) = suffer(&mut world, &history, random, faults, &recipe);
    let nodes = (0..FAKE_AGENTS).map(|number| (node_name(number), FAKE_NODE)).collect();
    Round { entries: history.entries(), nodes, finals, faults: world.counts.clone(), wrong }
}

fn real_round(directory: &Path, random: &mut Random, faults: u32) -> Round {
    let history = History::begin();
    let identities = issue(directory, REAL_AGENTS);
    let networks: Vec<Netns> = (0..REAL_AGENTS).map(|_| Netns::new()).collect();
    let brokers: Vec<_> = brokers::addresses().iter().map(|it| format!("https://{it}")).collect();
    let runs = directory.join("runs");
    fs::write(&runs, "").expect("a file can be made");
    fs::set_permissions(&runs, Permissions::from_mode(0o666)).expect("it is ours");
    let load = directory.join("test-load");
    fs::copy(binary("test-load"), &load).expect("test-load can be copied");
    let mut nodes = Vec::new();
    let agents = |switch: &Switch| {
        let started = networks.iter().enumerate().map(|(number, network)| {
            let name = node_name(number);
            let plug = switch.connect(network, &name, Lan::Agents, fake::FIRST + number as u8);
            let capacity = format!("cpu={}m,memory={}", REAL_NODE.millicores, REAL_NODE.bytes);
            let identity = identities.join(&name).display().to_string();
            let options = Options::default().within(network);
            let options = options.with(&["--node", &name, "--broker", &brokers.join(",")]);
            let agent = options.with(&["--tls-dir", &identity, "--capacity", &capacity]).start();
            nodes.push(kernel::Node {
                name,
                cgroups: agent.cgroup_root(),
                epoch: agent.state_dir().join("epoch.json"),
                has: REAL_NODE,
            });
            (agent, plug)
        });
        Agents::Real(started.collect())
    };
    let mut world = World::start(directory, &identities, &history, agents);
    let watch = kernel::Watch::begin(nodes, runs.clone(), history.clone());
    let recipe: Arc<Recipe> = {
        let (load, runs) = (load.display().to_string(), runs.display().to_string());
        Arc::new(move |id: &str, random: &mut Random| {
            let demand = Amount { millicores: *random.of(&SMALL_APPETITES), bytes: MEMORY };
            let time = random.below(RUNS_MILLIS).to_string();
            let words = [&load, "witness", &runs, "for", &time, &code_of(id).to_string()];
            let command = words.map(str::to_owned).to_vec();
            let run_as = Credentials { uid: NOBODY, gid: NOBODY, groups: Vec::new() };
            let spec = clients::spec(id, demand, command, random);
            (v1::TaskSpec { run_as: Some(run_as.into()), ..spec }, demand)
        })
    };
    let (finals, mut wrong) = suffer(&mut world, &history, random, faults, &recipe);
    wrong.extend(watch.end());
    kernel::note_ends(&Runs::read(&runs), &history, code_of);
    Round { entries: history.entries(), nodes: BTreeMap::new(), finals, faults: world.counts.clone(), wrong }
}

/// The code with which a task ends that really runs.
fn code_of(task: &str) -> i32 {
    let number = task.rsplit('-').next().and_then(|number| number.parse::<u64>().ok());
    (number.unwrap_or(0) % CODES) as i32
}

impl Figures {
    fn add(&mut self, round: Round) {
        let count = |is: fn(&Seen) -> bool| round.entries.iter().filter(|entry| is(&entry.seen)).count();
        self.acknowledged += count(|seen| matches!(seen, Seen::Acknowledged { .. }));
        self.reads += count(|seen| matches!(seen, Seen::Read { .. }));
        self.directives += count(|seen| matches!(seen, Seen::Accepted { .. }));
        self.ended += count(|seen| matches!(seen, Seen::Over { .. }));
        self.reigns += count(|seen| matches!(seen, Seen::Took { .. }));
        self.failovers.extend(failovers(&round.entries, BROKERS));
        for (fault, times) in round.faults {
            *self.faults.entry(fault).or_default() += times;
        }
    }

    fn print(&self, kind: &str, faults: u32) {
        for (fault, times) in &self.faults {
            println!("soak: {times:4} x {fault:?}");
        }
        let Figures { acknowledged, reads, directives, ended, reigns, .. } = self;
        println!(
            "soak: {kind} agents: {acknowledged} acknowledgements, {reads} reads, {directives} directives, {ended} ends of \
             attempts, {reigns} reigns of brokers"
        );
        assert!(*acknowledged > 0 && *ended > 0 && *reigns > 0, "nothing happened");
        println!("soak: {kind} agents: {faults} faults, and all that was promised was kept");
        let mut alone = None;
        for beside in Beside::ALL {
            let mut of = self.failovers.iter().filter(|it| it.beside == beside).collect::<Vec<_>>();
            of.sort_unstable_by_key(|failover| failover.took);
            let took: Vec<_> = of.iter().map(|failover| failover.took).collect();
            let at =
                |percent| percentile(&took, percent).map_or("-".to_owned(), |took| format!("{took:.2?}"));
            let (count, what) = (took.len(), beside.text());
            let figure = format!(
                "failover {what}: {count} times, p50 {}, p99 {}, max {} (lease {LEASE:?})",
                at(50),
                at(99),
                at(100)
            );
            for Failover { took, fault, at, .. } in of.iter().rev().take(SLOWEST) {
                println!("soak: {took:.2?} after {fault}, at {at:.1?}");
            }
            match beside {
                Beside::Nothing => alone = Some((figure, took.last().copied())),
                Beside::OneMember | Beside::More => println!("soak: {figure}"),
            }
        }
        if let Some((figure, max)) = alone {
            soak::aim(&figure, max.is_none_or(|max| max <= LEASE + ABOVE_LEASE));
        }
    }
}
