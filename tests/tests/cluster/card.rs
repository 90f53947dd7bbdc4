//! Two tasks of the broker's share a GPU card: one of high priority grows, and the other one gives back, or ends for it. What
//! NVIDIA's driver would say and do comes from `tests/fake-nvml`.

use serde_json::{Value, json};
use shaper_core::spec::DecisionKind;
use shaper_tests::{
    cards::FakeCards,
    cluster::{Cluster, Load, networks},
    time::eventually,
};

const NODE: &str = "cpu=2,memory=1Gi";
const GIB: u64 = 1 << 30;
/// A grace that tests can wait for.
const OPTIONS: [&str; 2] = ["--gpu-memory-grace", "2"];

const GOLD: &str =
    "policy_name: gold\npriority: high\nlimits: {gpu_memory_gb: 60}\nbehavior: {preemption_enabled: true}\n";
const BATCH: &str = "policy_name: batch\npriority: low\nlimits: {gpu_memory_gb: 60}\n";

fn spec(cluster: &Cluster, id: &str, priority: &str) -> String {
    let mut spec: Value =
        serde_json::from_str(&cluster.spec(id, 0.2, priority, Load::Until(0))).expect("it is JSON");
    spec["profile"]["resource_demand"]["gpu_memory_gb"] = json!(20);
    spec.to_string()
}

/// What a task may have of its card now, GiB.
fn grant(cluster: &Cluster, id: &str) -> Option<u64> {
    Some(cluster.agent("n1").shaper().get(id).limits.gpu_memory.at()?.0 / GIB)
}

fn reason(cluster: &Cluster, id: &str, kind: DecisionKind, by: &str) -> String {
    let decisions = cluster.broker.decisions(id);
    let found = decisions.iter().rfind(|it| it.kind == kind && it.by == by);
    found.map(|it| it.reason.clone()).unwrap_or_else(|| panic!("{by} has not {kind} `{id}`: {decisions:#?}"))
}

#[test]
fn on_a_shared_card_a_high_task_grows_and_a_low_one_gives_back_or_ends() {
    let networks = networks(1);
    let mut cluster = Cluster::start(&[], &[]);
    let line = FakeCards::line(1);
    let cards = FakeCards::new(&[&line[0]]);
    cluster.join_with_cards(&networks[0], NODE, &cards, &OPTIONS);
    let use_of = |tasks: &[(&str, u64)]| {
        let of = |(id, gib): &(&str, u64)| {
            let pid = cluster.agent("n1").shaper().get(id).pid.expect("it runs");
            format!("process card=GPU-0 pid={pid} memory={}", gib * GIB)
        };
        let lines: Vec<String> = line.iter().cloned().chain(tasks.iter().map(of)).collect();
        cards.say(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    };
    cluster.broker.apply(GOLD);
    cluster.broker.apply(BATCH);
    cluster.submit_spec("low", &spec(&cluster, "low", "low"));
    cluster.wait_until_runs("low");
    assert!(reason(&cluster, "low", DecisionKind::Placed, "broker").contains("card 0"));
    // What nobody else has of the card is lent to it, up to what its policy lets it have.
    eventually("the card is lent", || grant(&cluster, "low") == Some(60));
    use_of(&[("low", 40)]);
    cluster.submit_spec("high", &spec(&cluster, "high", "high"));
    cluster.wait_until_runs("high");
    // Of what the low one does not use, a little room aside, the high one has all.
    eventually("what is not used is lent to the high one", || {
        (grant(&cluster, "low"), grant(&cluster, "high")) == (Some(45), Some(35))
    });

    // It needs more. The low one frees in time what is beyond its request.
    use_of(&[("low", 40), ("high", 33)]);
    eventually("the low one is to give back", || grant(&cluster, "low") == Some(20));
    eventually("it is told", || {
        let notes = cluster.agent("n1").shaper().get("low").notes;
        notes.iter().any(|note| note.contains("unless it frees that it is ended in"))
    });
    use_of(&[("low", 15), ("high", 33)]);
    eventually("the high one has all that it may have", || grant(&cluster, "high") == Some(60));
    let why = reason(&cluster, "low", DecisionKind::Shrunk, "n1");
    assert!(
        why.contains("`high` of priority high uses 33 GiB of 35 GiB") && why.contains("by policy `gold`"),
        "{why}"
    );
    assert!(reason(&cluster, "high", DecisionKind::Grew, "n1").contains("→ 60 GiB"));
    assert_eq!(cluster.broker.task("low").attempt, 1, "it was not ended");

    // The high one needs less, and the low one is lent it. Then it does not free it when it should.
    use_of(&[("low", 15), ("high", 10)]);
    cluster.let_end("high");
    cluster.broker.wait_until("high", "over", |task| task.ended().is_some());
    eventually("the card is lent again", || grant(&cluster, "low") == Some(60));
    use_of(&[("low", 50)]);
    cluster.submit_spec("high2", &spec(&cluster, "high2", "high"));
    cluster.wait_until_runs("high2");
    eventually("it has what is left", || grant(&cluster, "high2") == Some(23));
    use_of(&[("low", 50), ("high2", 22)]);
    let evicted = |decisions: Vec<shaper_core::spec::Decision>| {
        decisions.iter().any(|it| it.kind == DecisionKind::Evicted && it.by == "n1")
    };
    eventually("the low one is evicted", || evicted(cluster.broker.decisions("low")));
    let why = reason(&cluster, "low", DecisionKind::Evicted, "n1");
    assert!(why.starts_with("it used 50 GiB of card 0 for 2 s, and may have 20 GiB"), "{why}");
    assert!(why.contains("`high2` of priority high") && why.contains("by policy `gold`"), "{why}");
    // It runs again where what it requests is left, and the high one has what is beyond that.
    let again = cluster.broker.wait_until("low", "run again", |task| task.runs() && task.attempt == 2);
    assert_eq!(again.node.as_deref(), Some("n1"));
    // What it had went with it.
    use_of(&[("low", 5), ("high2", 22)]);
    eventually("each has its part", || {
        (grant(&cluster, "low"), grant(&cluster, "high2")) == (Some(20), Some(60))
    });
}

#[test]
fn cards_are_given_out_whole_or_in_parts_and_who_finds_none_waits_with_the_reason() {
    let networks = networks(1);
    let mut cluster = Cluster::start(&[], &[]);
    let line = FakeCards::line(2);
    let cards = FakeCards::new(&line.iter().map(String::as_str).collect::<Vec<_>>());
    cluster.join_with_cards(&networks[0], NODE, &cards, &OPTIONS);
    let whole = |id: &str, count: u32| {
        let mut spec: Value =
            serde_json::from_str(&cluster.spec(id, 0.2, "medium", Load::Until(0))).expect("it is JSON");
        spec["gpus"] = json!(count);
        spec["gpu_model"] = json!("H100");
        spec.to_string()
    };
    let cards_of =
        |id: &str| cluster.agent("n1").shaper().get(id).limits.gpu_cards.map(|cards| cards.to_string());
    cluster.submit_spec("part", &spec(&cluster, "part", "medium"));
    cluster.wait_until_runs("part");
    cluster.submit_spec("whole", &whole("whole", 1));
    cluster.wait_until_runs("whole");
    assert_eq!((cards_of("part").as_deref(), cards_of("whole").as_deref()), (Some("0"), Some("1")));
    cluster.submit_spec("both", &whole("both", 2));
    let waits = cluster.broker.task("both");
    assert!(waits.is_pending(), "{waits:?}");
    let said = cluster.broker.shaper().ok(&["explain", "both"]);
    assert!(said.contains("gpus: 2 wanted, 0 of 2 free"), "{said}");
    cluster.let_end("part");
    cluster.let_end("whole");
    cluster.wait_until_runs("both");
    assert_eq!(cards_of("both").as_deref(), Some("0,1"));
}
