//! What a scaling document may say.

use super::scaling;
use crate::scale::{Group, Provider};

const GOOD: &str = r#"
settle_seconds: 5
groups:
  - name: workers
    nodes: "worker-*"
    capacity: {cpu_cores: 8, memory_gb: 32, network_bandwidth_mbps: 1000}
    max: 10
    idle_seconds: 600
    provider: {externalgrpc: {address: "http://127.0.0.1:8086", group: asg-1}}
  - name: spare
    nodes: spare-*
    capacity: {cpu_cores: 2, memory_gb: 4}
    min: 1
    max: 1
    provider: {exec: {command: [/usr/local/bin/scale, spare]}}
"#;

#[test]
fn groups_are_read_with_their_defaults() {
    let read = scaling("scale.yaml", GOOD).unwrap();
    assert_eq!(read.settle, 5_000_000_000);
    let [workers, spare] = &read.groups[..] else { panic!("{read:?}") };
    let Group { cooldown, provision, idle, timeout, .. } = workers;
    let seconds = 1_000_000_000;
    assert_eq!(
        (*cooldown, *provision, *idle, *timeout),
        (30 * seconds, 900 * seconds, Some(600 * seconds), 60 * seconds)
    );
    assert_eq!((workers.min, workers.max, spare.min, spare.max), (0, 10, 1, 1));
    assert_eq!((workers.provider.kind(), workers.provider.tells()), ("externalgrpc", true));
    let capacity = workers.capacity.unwrap();
    assert_eq!((capacity.cpu.0, capacity.network.unwrap().0), (8000, 1_000_000_000));
    assert!(workers.nodes.matches("worker-7") && !workers.nodes.matches("spare-7"));
    let command = vec!["/usr/local/bin/scale".to_owned(), "spare".to_owned()];
    assert_eq!((&spare.provider, spare.idle), (&Provider::Exec { command }, None));
}

/// What is wrong with a document, and what it says to that.
const BAD: &[(&str, &str, &str)] = &[
    ("    max: 10\n", "", "groups[0].max: is missing"),
    ("max: 10", "max: 0", "must be at least 1, and at least `min`"),
    ("min: 1\n", "min: 2\n", "which is 2"),
    ("name: spare", "name: workers", "there is a group `workers` already"),
    ("worker-*\"", "worker *\"", "no pattern of names"),
    ("http://127", "ftp://127", "is no URL of http or https"),
    ("http://127", "https://127", "needs `ca`"),
    ("group: asg-1", "group: asg-1, ca: /ca.pem", "is plain http, and certificates are named"),
    ("/usr/local/bin/scale", "scale", "must begin with the absolute path of a program"),
    ("idle_seconds: 600", "idle_second: 600", "did you mean `idle_seconds`?"),
    (
        "exec: {command: [/usr/local/bin/scale, spare]}",
        "keda: {}, exec: {command: [/x]}",
        "must name one provider",
    ),
    ("    capacity: {cpu_cores: 2, memory_gb: 4}\n", "", "its provider, exec, cannot say what a node has"),
];

#[test]
fn what_cannot_be_is_refused_with_the_remedy() {
    for (good, bad, says) in BAD {
        assert!(GOOD.contains(good), "{good}");
        let error = scaling("scale.yaml", GOOD.replacen(good, bad, 1)).unwrap_err().to_string();
        assert!(error.contains(says), "{bad}: {error}");
    }
    let error = scaling("scale.yaml", "groups: []").unwrap_err().to_string();
    assert!(error.contains("leave --scale out"), "{error}");
}
