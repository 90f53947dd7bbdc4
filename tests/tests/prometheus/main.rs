//! A real Prometheus that scrapes real daemons: what the dashboards and the alerts ask for is there. `./x test --all`.

mod server;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use shaper_identity::pki::Authority;
use shaper_tests::{
    agent::Options,
    bins::tool,
    broker::Broker,
    scrape::of_address,
    time::{eventually, happens},
};

use server::Server;

const TOKEN: &str = "a-token-of-thirty-two-letters-or-more";

fn deployed(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

/// Runs promtool, which must be content; with that on its standard input.
#[track_caller]
fn promtool(arguments: &[&str], input: Option<&str>) {
    let mut command = Command::new(tool("promtool"));
    command.args(arguments).current_dir(deployed("prometheus"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool can be started");
    {
        use std::io::Write;
        let mut stdin = child.stdin.take().expect("it is piped");
        stdin.write_all(input.unwrap_or_default().as_bytes()).expect("promtool reads it");
    }
    let output = child.wait_with_output().expect("promtool ends");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "promtool {arguments:?}: {}{}",
        said(&output.stdout),
        said(&output.stderr)
    );
}

#[test]
fn alerts_fire_when_they_should_and_not_otherwise() {
    promtool(&["check", "rules", "--lint=all", "--lint-fatal", "rules.yml"], None);
    promtool(&["test", "rules", "rules.test.yml"], None);
}

/// Where a daemon said that its metrics are.
fn metrics_of(said: impl Fn() -> String) -> String {
    let address = |said: &str| {
        let rest = said.split("serving metrics address=").nth(1)?;
        rest.split_whitespace().next().map(str::to_owned)
    };
    eventually("it says where its metrics are", || address(&said()).is_some());
    address(&said()).expect("it was said")
}

/// The queries of all panels, with what Grafana would put into them.
fn queries() -> Vec<(String, String)> {
    let mut queries = Vec::new();
    for name in ["cluster.json", "node.json", "task.json"] {
        let text = fs::read_to_string(deployed("grafana").join(name)).expect("dashboards are there");
        let board: Value = serde_json::from_str(&text).expect("they are JSON");
        for panel in board["panels"].as_array().expect("they have panels") {
            for target in panel["targets"].as_array().expect("which ask for something") {
                let query = target["expr"].as_str().expect("by a query").replace("$__rate_interval", "10s");
                let query = ["job", "instance", "namespace", "task"]
                    .into_iter()
                    .fold(query, |query, name| query.replace(&format!("${name}"), ".*"));
                assert!(!query.contains('$'), "{query}");
                queries.push((format!("{name}: {}", panel["title"]), query));
            }
        }
    }
    queries
}

#[test]
fn every_panel_has_data() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let path = |name: &str| directory.path().join(name);
    fs::write(path("token"), TOKEN).expect("a file can be written");
    fs::set_permissions(path("token"), fs::Permissions::from_mode(0o600)).expect("it is ours");
    let token = path("token").display().to_string();
    let authority = Authority::create(&path("ca"), "cluster.local").expect("an authority can be made");
    let node = "spiffe://cluster.local/node/n1".parse().expect("it is an identity");
    let day = Duration::from_secs(86_400);
    authority.issue(&path("n1"), &node, &["127.0.0.1".to_owned()], day).expect("it can sign");
    fs::write(path("ca.pem"), authority.pem()).expect("a file can be written");

    let metrics = ["--metrics", "tcp://127.0.0.1:0", "--metrics-token-file", &token];
    let broker = Broker::start_with(&metrics);
    let (socket, tls) = (broker.socket().display().to_string(), path("n1").display().to_string());
    let of_node = ["--node", "n1", "--broker", &socket, "--tls-dir", &tls];
    let agent = Options::default()
        .with(&metrics)
        .with(&of_node)
        .with(&["--capacity", "cpu=2,memory=1Gi,network=1gbit"])
        .start();
    broker.wait_for_node("n1", true);

    // One of each kind: of the node's own, with limits, and of the broker's, with a promise.
    agent.run("own", &["--cpu", "0.3", "--memory", "64Mi", "--net", "8mbit"], &["spin"]);
    let spec = serde_json::json!({
        "profile": {"task_id": "promised", "priority": "medium", "resource_demand": {"cpu_cores": 0.25, "memory_gb": 0.0625}},
        "command": [agent.load(), "spin"],
        "cwd": "/",
        "run_as": {"uid": shaper_tests::NOBODY, "gid": shaper_tests::NOBODY},
    });
    let submitted = broker.shaper().call_with(&["submit", "-"], spec.to_string().as_bytes());
    assert_eq!(submitted.code, 0, "{}", submitted.stderr);
    broker.wait_until("promised", "running", |task| task.runs());

    let (of_broker, of_agent) = (metrics_of(|| broker.said()), metrics_of(|| agent.said()));
    let classic = of_address(&of_broker, &[&format!("Authorization: Bearer {TOKEN}")]);
    promtool(&["check", "metrics"], Some(&classic.body));
    let server = Server::start(directory.path(), &of_broker, &of_agent, &deployed("prometheus/rules.yml"));
    server.wait_for_targets();

    let queries = queries();
    assert!(queries.len() > 60, "{}", queries.len());
    let mut without: Vec<&(String, String)> = queries.iter().collect();
    let all_have = happens(|| {
        without.retain(|(_, query)| server.series(query) == 0);
        without.is_empty()
    });
    assert!(all_have, "without data: {without:#?}");
    assert!(server.rules_are_healthy(), "an alert cannot be evaluated");
    broker.shaper().ok(&["cancel", "promised", "--now"]);
    broker.wait_until("promised", "over", |task| !task.runs());
}
