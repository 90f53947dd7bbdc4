//! The web page in Chromium, with a real broker and real agents behind it: `./x test --all`.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use shaper_tests::{
    broker::Broker,
    cluster::{Cluster, Load, networks},
};

const NODE: &str = "cpu=8,memory=16Gi,network=1gbit";
/// What is looked at closely: it uses some CPU, and is cancelled.
const TASK: &str = "etl-1";
/// Tasks beside it; more of them for pictures.
const TASKS: usize = 11;

const POLICIES: [&str; 2] = [
    "policy_name: services\npriority: high\nbehavior: {eviction_threshold: 0.9, preemption_enabled: true}\n",
    "policy_name: batch\npriority: low\nselector: {name: \"etl-*\"}\nlimits: {cpu: 0.3}\nfloors: {cpu: 0.05}\n",
];

/// The program and what it needs, as xtask puts them there.
fn program() -> PathBuf {
    let folder = env::var_os("SHAPER_BROWSER")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/browser"), PathBuf::from);
    let program = folder.join("page.mjs");
    assert!(program.is_file(), "{}: `./x test --all` makes it", program.display());
    program
}

#[test]
fn the_page_works_in_a_browser() {
    let networks = networks(3);
    let broker = Broker::start_with(&["--web", "tcp://127.0.0.1:0"]);
    let cluster = Cluster::start_of(broker, &networks, &[NODE; 3]);
    POLICIES.iter().for_each(|policy| cluster.broker.apply(policy));
    let submit = |id: &str, name: &str, cores: f64, priority: &str, load: Load| {
        let spec = cluster.spec(id, cores, priority, load);
        let mut spec: Value = serde_json::from_str(&spec).expect("it is JSON");
        spec["name"] = json!(name);
        if let Load::Until(_) = load {
            // Of programs that wait for a file a user may have 128.
            spec["command"] = json!(["/bin/sleep", "3600"]);
        }
        cluster.submit_spec(id, &spec.to_string());
    };
    submit(TASK, "etl-nightly", 0.1, "low", Load::Spin);
    let count = env::var("SHAPER_TASKS").ok().and_then(|count| count.parse().ok()).unwrap_or(TASKS);
    for number in 0..count {
        let (kind, cores, priority) =
            [("web", 0.1, "high"), ("train", 0.2, "medium"), ("etl", 0.1, "low")][number % 3];
        submit(&format!("{kind}-{}", number / 3 + 2), kind, cores, priority, Load::Until(0));
    }
    // One waits for a node that there is not.
    submit("simulation", "simulation", 32.0, "medium", Load::Until(0));
    cluster.wait_until_runs(TASK);
    cluster.wait_until_runs(&format!("web-{}", (count - 1) / 3 + 2));

    let shaper = cluster.broker.shaper();
    let address = shaper.ok(&["ui"]);
    let (socket, command) = (cluster.broker.socket(), cluster.broker.directory().join("shaper"));
    let cancel = format!("SHAPER_BROKER={} {} cancel {TASK} --now", socket.display(), command.display());
    let mut node = Command::new("node");
    node.arg(program()).arg(address.trim()).env("SHAPER_TASK", TASK).env("SHAPER_CANCEL", cancel);
    let output = node.stderr(Stdio::inherit()).output().expect("node can be started");
    assert!(output.status.success(), "{}: what was wrong is above", output.status);
    let measured = String::from_utf8_lossy(&output.stdout);
    println!("{}", measured.trim());
}
