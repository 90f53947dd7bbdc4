//! GPU cards. There is none on this machine: what NVIDIA's library would say comes from `tests/fake-nvml`.

use shaper_core::{doctor::Availability, gpu::CardUsage};
use shaper_tests::{
    agent::{Agent, Options},
    cards::{FakeCards, MEMORY},
    scrape::{Series, of_socket},
    time::eventually,
};

const GIB: u64 = 1 << 30;

fn lines(cards: &[String], more: &[&str]) -> Vec<String> {
    cards.iter().cloned().chain(more.iter().map(|&line| line.to_owned())).collect()
}

fn say(cards: &FakeCards, lines: &[String]) {
    cards.say(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

fn two_cards() -> (FakeCards, Vec<String>) {
    let two = FakeCards::line(2);
    let cards = FakeCards::new(&[]);
    say(&cards, &two);
    (cards, two)
}

/// The cards, once there are so many.
fn cards_of(agent: &Agent, count: usize) -> Vec<CardUsage> {
    eventually("the cards are found", || agent.shaper().top().gpus.len() == count);
    agent.shaper().top().gpus
}

fn nvml(agent: &Agent) -> Availability {
    let rungs = agent.shaper().doctor().rungs;
    rungs.into_iter().find(|rung| rung.feature == "nvml").expect("a row").availability
}

#[test]
fn cards_are_found_and_each_task_s_memory_is_summed_by_card() {
    let (cards, two) = two_cards();
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let metrics = directory.path().join("metrics.sock");
    let agent =
        Options::default().with_cards(&cards).with(&["--metrics", &metrics.display().to_string()]).start();
    let task = agent.run("training", &[], &["tick", "600", "0"]);
    let found = cards_of(&agent, 2);
    let shown: Vec<_> =
        found.iter().map(|it| (it.card.number, it.card.id.as_str(), it.card.model.as_str())).collect();
    assert_eq!(shown, [(0, "GPU-0", "Fake H100"), (1, "GPU-1", "Fake H100")]);
    assert_eq!((found[1].card.device.major, found[1].card.device.minor), (195, 1));
    assert_eq!(found[0].memory.map(|it| it.0), Some(MEMORY));
    assert_eq!((found[0].busy_percent, found[0].temperature_celsius), (Some(40), Some(51)));
    assert_eq!(nvml(&agent), Availability::Available);
    let shown = agent.shaper().doctor().gpus;
    assert_eq!(
        shown[0], "0: Fake H100 (GPU-0, device 195:0, 80 GiB, parts held by nvml-cgroup)",
        "{shown:?}"
    );

    let (pid, other) = (task.pid.expect("it runs"), std::process::id());
    let uses = [
        format!("process card=GPU-1 pid={pid} memory={}", 3 * GIB),
        // Of a process that is no task's, and of one that has ended.
        format!("process card=GPU-1 pid={other} memory={}", 5 * GIB),
        format!("process card=GPU-0 pid={} memory={GIB}", i32::MAX),
    ];
    say(&cards, &lines(&two, &uses.each_ref().map(String::as_str)));
    eventually("the memory is seen", || !agent.shaper().usage_of("training").gpu_memory.is_empty());
    let used: Vec<_> = agent
        .shaper()
        .usage_of("training")
        .gpu_memory
        .iter()
        .map(|it| (it.number, it.used.0, it.processes))
        .collect();
    assert_eq!(used, [(1, 3 * GIB, 1)]);
    assert_eq!(agent.shaper().top().gpus[1].memory_used.map(|it| it.0), Some(8 * GIB));
    let series = Series::of(&of_socket(&metrics, &[]));
    for (name, value) in [
        ("shaper_machine_gpu_info{card=\"1\",id=\"GPU-1\",model=\"Fake H100\"}", 1.0),
        ("shaper_machine_gpu_readable{card=\"1\"}", 1.0),
        ("shaper_machine_gpu_memory_bytes{card=\"1\"}", MEMORY as f64),
        ("shaper_machine_gpu_memory_used_bytes{card=\"1\"}", (8 * GIB) as f64),
        ("shaper_machine_gpu_busy_ratio{card=\"1\"}", 0.4),
        ("shaper_machine_gpu_temperature_celsius{card=\"1\"}", 51.0),
        (
            "shaper_task_gpu_memory_bytes{task=\"training\",namespace=\"\",name=\"\",card=\"1\"}",
            (3 * GIB) as f64,
        ),
    ] {
        assert_eq!(series.get(name), value, "{name}");
    }
    say(&cards, &two);
    eventually("it is given back", || agent.shaper().usage_of("training").gpu_memory.is_empty());
}

#[test]
fn a_card_that_is_lost_or_a_library_that_hangs_is_told_of_and_holds_nothing_up() {
    let (cards, two) = two_cards();
    let mut agent = Options::default().with_cards(&cards).start();
    cards_of(&agent, 2);
    say(&cards, &[two[0].clone(), format!("{} lost", two[1])]);
    let trouble = |agent: &Agent, number: usize| agent.shaper().top().gpus[number].trouble.clone();
    eventually("a card is lost", || trouble(&agent, 1).is_some());
    let text = trouble(&agent, 1).unwrap_or_default();
    assert!(text.contains("fell off the bus"), "{text}");
    assert_eq!(trouble(&agent, 0), None);
    // It keeps its number, for a new agent to whom the library names only the other.
    agent.kill9();
    say(&cards, &two[1..]);
    agent.restart();
    eventually("the other is read", || trouble(&agent, 1).is_none());
    let shown: Vec<_> =
        agent.shaper().top().gpus.into_iter().map(|it| (it.card.number, it.card.id)).collect();
    assert_eq!(shown, [(0, "GPU-0".into()), (1, "GPU-1".into())]);
    assert!(trouble(&agent, 0).is_some_and(|why| why.contains("not found now")));

    say(&cards, &lines(&two, &["stuck nvmlDeviceGetCount_v2"]));
    eventually(
        "the silence is noticed",
        || matches!(nvml(&agent), Availability::Unusable { reason } if reason.contains("has not answered")),
    );
    agent.run("another", &[], &["tick", "1", "0"]);
    assert_eq!(agent.shaper().wait("another"), 0);
    say(&cards, &two);
    eventually("it answers again", || nvml(&agent) == Availability::Available);
}

#[test]
fn where_there_is_no_library_doctor_says_so_and_devices_can_be_named() {
    let agent = Options::default().with(&["--gpu-device", "/dev/full"]).start();
    eventually(
        "it was looked for",
        || matches!(nvml(&agent), Availability::Missing { evidence } if evidence.contains("libnvidia-ml.so.1")),
    );
    let named = cards_of(&agent, 1);
    assert_eq!((named[0].card.id.as_str(), named[0].card.device.to_string().as_str()), ("/dev/full", "1:7"));
    assert_eq!((named[0].memory, &named[0].trouble), (None, &None));
    let agent = Options::default().with(&["--nvml", "off"]).start();
    assert!(agent.shaper().doctor().rungs.iter().all(|rung| rung.feature != "nvml"));
}
