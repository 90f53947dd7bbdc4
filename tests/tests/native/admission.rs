//! Who may open which GPU card: with ordinary character devices that stand for cards, in this kernel.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use shaper_tests::{
    NOBODY,
    agent::{Agent, Options},
    cards::{FakeCards, open_in},
    cgroup::TestCgroup,
    shaper::{Answer, in_force},
    time::eventually,
};

/// Two devices that nothing of this machine needs.
const CARD_0: &str = "/dev/full";
const CARD_1: &str = "/dev/random";
const NO_CARD: &str = "/dev/null";

fn agent<'a>() -> Agent<'a> {
    Options::default().with(&["--nvml", "off", "--gpu-device", CARD_0, "--gpu-device", CARD_1]).start()
}

/// Which of the two cards, and of what is none, can be opened from within a cgroup. The others get EPERM.
#[track_caller]
fn opened_in(group: &Path) -> Vec<&'static str> {
    let opens = |path: &&'static str| {
        let said = open_in(group, path);
        assert!(said.is_empty() || said.contains("Operation not permitted"), "{path}: {said}");
        said.is_empty()
    };
    [CARD_0, CARD_1, NO_CARD].into_iter().filter(opens).collect()
}

fn run(agent: &Agent, options: &[&str], script: &str) -> Answer {
    let user = format!("{NOBODY}:{NOBODY}");
    let command = ["--", "/bin/sh", "-c", script];
    agent.shaper().call(&[&["run", "--user", &user], options, &command].concat())
}

#[test]
fn a_launched_task_opens_the_cards_that_it_was_granted_and_no_others() {
    let agent = agent();
    for (options, path, may) in [
        (&["--cards", "0"][..], CARD_0, true),
        (&["--cards", "0"], CARD_1, false),
        (&["--cards", "0"], NO_CARD, true),
        (&["--cards", "none"], CARD_0, false),
        // Nobody granted it anything.
        (&[], CARD_0, false),
        (&["--gpus", "2"], CARD_1, true),
    ] {
        let answer = run(&agent, options, &format!(": < {path}"));
        assert_eq!(answer.code == 0, may, "{options:?}, {path}: {answer:?}");
        assert!(may || answer.stderr.contains("Operation not permitted"), "{answer:?}");
    }
    // What is not shaper's is left alone.
    let group = TestCgroup::new();
    assert_eq!(opened_in(group.path()), [CARD_0, CARD_1, NO_CARD]);
}

#[test]
fn the_cards_of_a_running_task_change_and_what_was_refused_is_told() {
    let agent = agent();
    let task = agent.run("training", &["--cards", "0"], &["tick", "600", "0"]);
    let group = Path::new(&task.cgroup);
    assert_eq!(in_force(&task, "gpu_cards"), ("cgroup-device", "0"));
    assert_eq!(opened_in(group), [CARD_0, NO_CARD]);
    let told = agent.shaper().get("training");
    let expected = "0; 1 opens of others refused, the last of card 1";
    assert_eq!(in_force(&told, "gpu_cards"), ("cgroup-device", expected));
    agent.shaper().set("training", &["--cards", "1"]);
    assert_eq!(opened_in(group), [CARD_1, NO_CARD]);

    let said = agent.shaper().refused(&["run", "--user", "65534", "--cards", "1", "--", "/bin/true"]);
    assert!(said.contains("card 1 is granted to task `training`"), "{said}");
    let said = agent.shaper().refused(&["set", "training", "--cards", "7"]);
    assert!(said.contains("this node has no card 7; it has 0,1"), "{said}");
    agent.shaper().set("training", &["--cards", "none"]);
    assert_eq!(opened_in(group), [NO_CARD]);
}

#[test]
fn cgroups_below_inherit_it_survives_the_agent_and_a_release_opens_again() {
    let mut agent = agent();
    let group = TestCgroup::new();
    let older = group.make_child("older");
    // Nobody has said which cards it may open.
    agent.adopt("service", group.path(), &[]);
    assert_eq!(opened_in(group.path()), [CARD_0, CARD_1, NO_CARD]);
    agent.shaper().set("service", &["--cards", "1"]);
    let younger = group.make_child("younger");
    let of_all = || [group.path(), &older, &younger].map(opened_in);
    let granted = [(); 3].map(|()| vec![CARD_1, NO_CARD]);
    assert_eq!(of_all(), granted);
    agent.kill9();
    assert_eq!(of_all(), granted, "without an agent");
    agent.restart();
    assert_eq!(of_all(), granted, "with the next one");
    assert_eq!(in_force(&agent.shaper().get("service"), "gpu_cards").0, "cgroup-device");
    let said = agent.shaper().ok(&["release", "service"]);
    assert!(said.contains("gpu_cards is `as found` again"), "{said}");
    assert_eq!(of_all(), [(); 3].map(|()| vec![CARD_0, CARD_1, NO_CARD]), "released");
}

#[test]
fn a_card_that_was_open_before_stays_open_and_that_is_said() {
    let agent = agent();
    let group = TestCgroup::new();
    let script = "echo $$ > \"$0\"/cgroup.procs && exec 3< \"$1\" && echo open && exec sleep 600";
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).arg(group.path()).arg(CARD_1).stdout(Stdio::piped());
    let mut holder = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "open\n");
    agent.adopt("service", group.path(), &["--cards", "0"]);
    assert_eq!(opened_in(group.path()), [CARD_0, NO_CARD]);
    let told = || agent.shaper().get("service").notes;
    let expected = format!("card 1 was opened before the grant by process {},", holder.id());
    assert!(told().iter().any(|note| note.starts_with(&expected)), "{:?}", told());
    holder.kill().and_then(|()| holder.wait()).unwrap();
    assert!(told().iter().all(|note| !note.contains("before the grant")), "{:?}", told());
}

#[test]
fn cards_that_the_library_knows_are_given_out_whole_and_cuda_is_told_which() {
    let cards = FakeCards::new(&[]);
    let line = FakeCards::line(3);
    cards.say(&line.iter().map(String::as_str).collect::<Vec<_>>());
    let agent = Options::default().with_cards(&cards).start();
    eventually("the cards are found", || agent.shaper().top().gpus.len() == 3);
    agent.run("first", &["--gpus", "2", "--gpu-model", "H100"], &["tick", "600", "0"]);
    let given = agent.shaper().get("first").limits.gpu_cards.map(|cards| cards.to_string());
    assert_eq!(given.as_deref(), Some("0,1"));
    for (options, why) in [
        (&["--gpus", "2"][..], "of the 3 GPU cards of this node 1 are free, and 2 are wanted"),
        (&["--gpus", "1", "--gpu-model", "A100"], "0 are free of a model `A100`"),
    ] {
        let answer = run(&agent, options, ":");
        assert!(answer.code != 0 && answer.stderr.contains(why), "{answer:?}");
    }
    // There is no driver behind these devices: past the admission, the kernel says so.
    let node = |number: u32| {
        let path = agent.directory().join(format!("nvidia{number}"));
        let mut made = Command::new("mknod");
        made.args(["-m", "666"]).arg(&path).args(["c", "195"]).arg(number.to_string());
        assert!(made.status().unwrap().success());
        path.display().to_string()
    };
    let (granted, other) = (node(2), node(0));
    let answer = run(&agent, &["--gpus", "1"], &format!("echo $CUDA_VISIBLE_DEVICES; : < {granted}"));
    assert_eq!(answer.stdout, "GPU-2\n");
    assert!(answer.stderr.contains("No such device or address"), "{answer:?}");
    let answer = run(&agent, &["--gpus", "1"], &format!(": < {other}"));
    assert!(answer.stderr.contains("Operation not permitted"), "{answer:?}");
}
