//! Limits of the memory of GPU cards, rung by rung, and what else is done with cards. There is none on this machine: what
//! NVIDIA's driver would say and do comes from `tests/fake-nvml`.

use std::{fs, path::Path, process::Command};

use shaper_core::{
    gpu::Rung,
    task::{Phase, TaskStatus},
};
use shaper_tests::{
    agent::{Agent, Options},
    cards::FakeCards,
    cgroup::TestCgroup,
    shaper::in_force,
    time::eventually,
};

const GIB: u64 = 1 << 30;
/// A driver before r615.
const WITHOUT: [&str; 2] = ["without nvmlDeviceSetMemoryLimits_v1", "without nvmlDeviceGetMemoryLimits_v1"];
const GRACE: [&str; 2] = ["--gpu-memory-grace", "1"];
const LOAD: [&str; 3] = ["tick", "600", "0"];

/// Cards, and an agent that has found them.
fn with_cards<'a>(count: u32, more: &[&str], options: &[&str]) -> (FakeCards, Agent<'a>) {
    let cards = FakeCards::new(&[]);
    say(&cards, count, more);
    let agent = Options::default().with_cards(&cards).with(options).start();
    eventually("the cards are found", || agent.shaper().top().gpus.len() == count as usize);
    (cards, agent)
}

fn say(cards: &FakeCards, count: u32, more: &[&str]) {
    let line = FakeCards::line(count);
    cards.say(&line.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>());
}

/// What a process of a task has of a card, in GiB.
fn uses(task: &TaskStatus, card: &str, gib: u64) -> String {
    format!("process card={card} pid={} memory={}", task.pid.expect("it runs"), gib * GIB)
}

/// What the driver was told last of a cgroup: what is guaranteed to it, and its limit; GiB.
fn told(cards: &FakeCards, task: &TaskStatus) -> Option<(u64, u64)> {
    let text = fs::read_to_string(cards.directory().join("state.limits")).ok()?;
    let of_task = text.lines().rev().find(|line| line.split(' ').nth(1) == Some(task.cgroup.as_str()))?;
    let number = |place| of_task.split(' ').nth(place)?.parse::<u64>().ok();
    Some((number(2)? / GIB, number(3)? / GIB))
}

const NO_LIMIT: u64 = u64::MAX / GIB;

fn has_note(agent: &Agent, id: &str, text: &str) -> bool {
    agent.shaper().get(id).notes.iter().any(|note| note.contains(text))
}

fn runs(agent: &Agent, id: &str) -> bool {
    agent.shaper().get(id).phase == Phase::Running
}

#[test]
fn the_driver_holds_tasks_that_share_a_card_each_to_its_part() {
    let (cards, mut agent) = with_cards(2, &[], &GRACE);
    let first = agent.run("first", &["--gpu-memory", "20Gi"], &LOAD);
    assert_eq!(first.limits.gpu_cards.map(|it| it.to_string()).as_deref(), Some("0"));
    assert_eq!(in_force(&first, "gpu_memory:0"), ("nvml-cgroup", "20 GiB"));
    assert_eq!(told(&cards, &first), Some((20, 20)));
    // The next goes where there is enough left, and who finds no room is told how much there is.
    agent.run("second", &["--gpu-memory", "50Gi"], &LOAD);
    assert_eq!(in_force(&agent.shaper().get("second"), "gpu_cards").1, "0");
    let third = agent.run("third", &["--gpu-memory", "70Gi"], &LOAD);
    assert_eq!(in_force(&third, "gpu_cards").1, "1");
    let said = agent.shaper().refused(&["run", "--user", "65534", "--gpu-memory", "11Gi", "--", "/bin/true"]);
    assert!(said.contains("none has more than 10 GiB left"), "{said}");
    let said = agent.shaper().refused(&["set", "first", "--gpu-memory", "31Gi"]);
    assert!(said.contains("of 80 GiB 50 GiB are granted to other tasks and 30 GiB are left"), "{said}");
    for (options, why) in [
        (&["--cards", "0"][..], "a card has one task, or several that each have a part of its memory"),
        (&["--gpus", "1"], "0 are free"),
    ] {
        let said =
            agent.shaper().refused(&[&["run", "--user", "65534"], options, &["--", "/bin/true"]].concat());
        assert!(said.contains(why), "{said}");
    }
    let said = agent.shaper().refused(&["set", "first", "--gpu-memory", "max"]);
    assert!(said.contains("that each have a part of its memory"), "{said}");

    // It grows, and what holds it is told in status and snapshot.
    agent.shaper().set("first", &["--gpu-memory", "30Gi"]);
    assert_eq!(told(&cards, &first), Some((30, 30)));
    say(&cards, 2, &[&uses(&first, "GPU-0", 15)]);
    eventually("its use is seen", || {
        let of_card = agent.shaper().usage_of("first").gpu_memory;
        of_card.first().is_some_and(|it| it.used.0 == 15 * GIB)
    });
    let of_card = agent.shaper().usage_of("first").gpu_memory[0];
    assert_eq!(
        (of_card.limit.at().map(|it| it.0), of_card.enforced_by),
        (Some(30 * GIB), Some(Rung::NvmlCgroup))
    );

    // What was decided outlives the agent, in the driver and on disk.
    agent.kill9();
    assert_eq!(told(&cards, &first), Some((30, 30)));
    agent.restart();
    eventually("the next one holds it by the driver", || {
        in_force(&agent.shaper().get("first"), "gpu_memory:0") == ("nvml-cgroup", "30 GiB")
    });
    assert_eq!(told(&cards, &first), Some((30, 30)));

    // Below what it uses: it may allocate no more from then on, and ends if it does not free what is too much.
    agent.shaper().set("second", &["--gpu-memory", "20Gi"]);
    agent.shaper().set("first", &["--gpu-memory", "10Gi"]);
    assert_eq!(told(&cards, &first), Some((10, 10)));
    eventually("it is told", || {
        has_note(&agent, "first", "it uses 15 GiB of the memory of card 0, and may have 10 GiB")
    });
    eventually("it is ended", || !runs(&agent, "first"));
    assert!(has_note(&agent, "first", "it was ended: it used 15 GiB of card 0 for 1 s, and may have 10 GiB"));

    // Let go, it has no limit, as before.
    let second = agent.shaper().get("second");
    assert_eq!(told(&cards, &second), Some((20, 20)));
    let said = agent.shaper().ok(&["release", "second"]);
    assert!(said.contains("gpu_memory:0 is `max` again"), "{said}");
    assert_eq!(told(&cards, &second), Some((0, NO_LIMIT)));
}

#[test]
fn where_the_driver_does_not_hold_it_a_task_with_too_much_ends_is_frozen_or_told_of() {
    for (exceeded, ends, freezes) in [("end", true, false), ("freeze", false, true), ("warn", false, false)] {
        let options = [&GRACE[..], &["--gpu-memory-exceeded", exceeded]].concat();
        let (cards, agent) = with_cards(1, &WITHOUT, &options);
        let task = agent.run("training", &["--gpu-memory", "20Gi"], &LOAD);
        assert_eq!(in_force(&task, "gpu_memory:0"), ("watchdog", "20 GiB"));
        assert_eq!(told(&cards, &task), None);
        let group = TestCgroup::new();
        let mut sleeper = Command::new("/bin/sleep").arg("600").spawn().expect("sleep can be started");
        fs::write(group.path().join("cgroup.procs"), sleeper.id().to_string()).expect("it can be moved");
        agent.adopt("service", group.path(), &["--cards", "0", "--gpu-memory", "20Gi"]);
        let too_much = [
            uses(&task, "GPU-0", 21),
            format!("process card=GPU-0 pid={} memory={}", sleeper.id(), 22 * GIB),
        ];
        say(&cards, 1, &[&WITHOUT[..], &too_much.each_ref().map(String::as_str)].concat());
        eventually("both are told of", || {
            ["training", "service"]
                .iter()
                .all(|id| has_note(&agent, id, "of the memory of card 0, and may have 20 GiB"))
        });
        let is_frozen = |task: &TaskStatus| {
            fs::read_to_string(Path::new(&task.cgroup).join("cgroup.events"))
                .is_ok_and(|it| it.contains("frozen 1"))
        };
        if ends {
            eventually("it ends", || !runs(&agent, "training"));
        }
        if freezes {
            eventually("it is frozen", || {
                is_frozen(&task) && in_force(&agent.shaper().get("training"), "frozen").1 == "frozen"
            });
            // It may have what it has: it goes on.
            agent.shaper().set("training", &["--gpu-memory", "25Gi"]);
            eventually("it goes on", || !is_frozen(&task));
        }
        // What somebody else started is never ended.
        assert_eq!((runs(&agent, "training"), runs(&agent, "service")), (!ends, true), "{exceeded}");
        assert!(sleeper.try_wait().expect("it is ours").is_none());
        say(&cards, 1, &WITHOUT);
        eventually("it is told of no more", || !has_note(&agent, "service", "and may have"));
        sleeper.kill().and_then(|()| sleeper.wait()).expect("it is ours");
    }
}

#[test]
fn a_driver_that_refuses_or_learns_it_is_seen_to() {
    // It answers what the limits are, and lets nobody set any.
    let denied = ["denied nvmlDeviceSetMemoryLimits_v1"];
    let (cards, agent) = with_cards(1, &denied, &GRACE);
    let task = agent.run("training", &["--gpu-memory", "20Gi"], &LOAD);
    assert_eq!(in_force(&task, "gpu_memory:0"), ("watchdog", "20 GiB"));
    let too_much = uses(&task, "GPU-0", 21);
    say(&cards, 1, &[denied[0], &too_much]);
    eventually("it ends all the same", || !runs(&agent, "training"));

    // A newer driver: from then on that holds it.
    let (cards, agent) = with_cards(1, &WITHOUT, &[]);
    let task = agent.run("training", &["--gpu-memory", "20Gi"], &LOAD);
    assert_eq!(in_force(&task, "gpu_memory:0").0, "watchdog");
    say(&cards, 1, &[]);
    eventually("the driver holds it", || told(&cards, &task) == Some((20, 20)));
    eventually("and that is said", || {
        in_force(&agent.shaper().get("training"), "gpu_memory:0").0 == "nvml-cgroup"
    });
}

#[test]
fn a_card_that_is_lost_or_a_driver_that_hangs_refuses_and_holds_nothing_up() {
    let (cards, agent) = with_cards(2, &[], &[]);
    let group = TestCgroup::new();
    agent.adopt("service", group.path(), &["--cards", "1", "--gpu-memory", "20Gi"]);
    let line = FakeCards::line(2);
    let lost = format!("{} lost", line[1]);
    cards.say(&[&line[0], &lost]);
    eventually("a card is lost", || agent.shaper().top().gpus[1].trouble.is_some());
    let said = agent.shaper().refused(&["set", "service", "--gpu-memory", "30Gi"]);
    assert!(said.contains("card 1 is not there"), "{said}");
    // The rest of it is seen and changed all the same, and so are others.
    assert!(in_force(&agent.shaper().get("service"), "gpu_memory:1").1.contains("card 1 is not there"));
    agent.run("other", &["--gpu-memory", "20Gi"], &LOAD);
    agent.shaper().ok(&["release", "service"]);

    cards.say(&[&line[0], &lost, "stuck nvmlDeviceGetCount_v2"]);
    eventually("the driver hangs", || {
        let answer = agent.shaper().call(&["set", "other", "--gpu-memory", "30Gi"]);
        answer.code != 0 && answer.stderr.contains("NVML has not answered")
    });
    agent.run("third", &[], &["tick", "1", "0"]);
    assert_eq!(agent.shaper().wait("third"), 0);
    cards.say(&[&line[0], &line[1]]);
    eventually("it answers again", || {
        agent.shaper().call(&["set", "other", "--gpu-memory", "30Gi"]).code == 0
    });
}

#[test]
fn programs_of_the_mps_server_are_told_their_part() {
    let (_cards, agent) = with_cards(1, &WITHOUT, &[]);
    let pipes = agent.directory().join("mps");
    fs::create_dir(&pipes).expect("it is ours");
    let env = format!("CUDA_MPS_PIPE_DIRECTORY={}", pipes.display());
    let run = |id: &str| {
        let options = ["--user", "65534:65534", "--gpu-memory", "20Gi", "--env", &env];
        let script = ["/bin/sh", "-c", "echo limit=$CUDA_MPS_PINNED_DEVICE_MEM_LIMIT; exec sleep 600"];
        let task = agent.shaper().start(id, &options, &script);
        eventually("it has said something", || !agent.shaper().ok(&["logs", id]).is_empty());
        (in_force(&task, "gpu_memory:0").0.to_owned(), agent.shaper().ok(&["logs", id]))
    };
    assert_eq!(run("without"), ("watchdog".into(), "limit=\n".into()));
    let made = Command::new("mkfifo").arg(pipes.join("control")).status();
    assert!(made.expect("mkfifo can be started").success());
    assert_eq!(run("with"), ("mps".into(), "limit=0=20480M\n".into()));
    // More than it was told when it started, the server cannot hold it to.
    agent.shaper().set("with", &["--gpu-memory", "30Gi"]);
    assert_eq!(in_force(&agent.shaper().get("with"), "gpu_memory:0").0, "mps", "it has less than it may");
    agent.shaper().set("with", &["--gpu-memory", "10Gi"]);
    assert_eq!(in_force(&agent.shaper().get("with"), "gpu_memory:0").0, "watchdog");
}

#[test]
fn the_power_of_a_whole_card_is_limited_and_put_back() {
    let cards = FakeCards::new(&[]);
    let line: Vec<String> = FakeCards::line(2).iter().map(|card| format!("{card} power=700000")).collect();
    cards.say(&line.iter().map(String::as_str).collect::<Vec<_>>());
    let mut agent = Options::default().with_cards(&cards).start();
    eventually("the cards are found", || agent.shaper().top().gpus.len() == 2);
    let task = agent.run("training", &["--cards", "0", "--gpu-power", "300W"], &LOAD);
    assert_eq!(in_force(&task, "gpu_power:0"), ("nvml", "300 W"));
    let told = || fs::read_to_string(cards.directory().join("state.power")).unwrap_or_default();
    assert_eq!(told(), "GPU-0 300000\n");
    let said = agent.shaper().refused(&["set", "training", "--gpu-power", "100W"]);
    assert!(said.contains("the driver does not take that for card 0"), "{said}");
    assert_eq!(in_force(&agent.shaper().get("training"), "gpu_power:0"), ("nvml", "300 W"));
    agent.run("shares", &["--gpu-memory", "20Gi"], &LOAD);
    let said = agent.shaper().refused(&[
        "run",
        "--user",
        "65534",
        "--cards",
        "1",
        "--gpu-memory",
        "20Gi",
        "--gpu-power",
        "300W",
        "--",
        "/bin/true",
    ]);
    assert!(said.contains("would be slowed down with it"), "{said}");
    agent.kill9();
    agent.restart();
    eventually("the cards are found", || agent.shaper().top().gpus.len() == 2);
    agent.shaper().ok(&["cancel", "training", "--now"]);
    eventually("it is put back when the task has ended", || told().ends_with("GPU-0 700000\n"));
}

#[test]
fn an_error_of_a_card_is_told_to_whoever_has_it() {
    let (cards, agent) = with_cards(2, &[], &[]);
    agent.run("training", &["--cards", "1"], &LOAD);
    agent.run("other", &["--cards", "0"], &LOAD);
    say(&cards, 2, &["xid card=GPU-1 code=79"]);
    eventually("it is told", || {
        has_note(&agent, "training", "the driver told of an error (XID 79) of card 1")
    });
    assert!(!has_note(&agent, "other", "XID"));
}

#[test]
fn a_part_of_a_card_is_a_card() {
    let cards = FakeCards::new(&[]);
    let card = FakeCards::line(1).remove(0);
    let part = |number: u32, gpu: u32| {
        format!(
            "instance card=GPU-0 uuid=MIG-{number} name=Fake_H100_MIG_1g.10gb memory={} gi={gpu} ci=0",
            10 * GIB
        )
    };
    let parts = [part(0, 7), part(1, 8)];
    cards.say(&[&card, &parts[0], &parts[1]]);
    let proc_driver = cards.directory().join("driver");
    fs::create_dir_all(proc_driver.join("nvidia-caps")).expect("it is ours");
    let minors =
        "config 1\ngpu0/gi7/access 66\ngpu0/gi7/ci0/access 67\ngpu0/gi8/access 75\ngpu0/gi8/ci0/access 76\n";
    fs::write(proc_driver.join("nvidia-caps/mig-minors"), minors).expect("it is ours");
    let agent = Options::default()
        .with_cards(&cards)
        .with(&["--proc-driver", &proc_driver.display().to_string()])
        .start();
    eventually("the parts are found", || agent.shaper().top().gpus.len() == 2);
    let shown = agent.shaper().doctor().gpus;
    assert_eq!(
        shown[1], "1: Fake H100 MIG 1g.10gb (MIG-1, device 0:76, 10 GiB, parts held by mig)",
        "{shown:?}"
    );
    let task = agent.run("training", &["--gpus", "1"], &LOAD);
    assert_eq!(in_force(&task, "gpu_cards"), ("cgroup-device", "0"));
    let of_card = agent.shaper().usage_of("training").gpu_memory[0];
    assert_eq!((of_card.limit.at().map(|it| it.0), of_card.enforced_by), (Some(10 * GIB), Some(Rung::Mig)));
    let script = ["--", "/bin/sh", "-c", "echo $CUDA_VISIBLE_DEVICES"];
    let answer = agent.shaper().call(&[&["run", "--user", "65534", "--gpus", "1"][..], &script].concat());
    assert_eq!(answer.stdout, "MIG-1\n", "{answer:?}");
}
