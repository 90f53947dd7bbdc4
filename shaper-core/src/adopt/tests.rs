use super::*;
use crate::id::TaskId;

const ID: &str = "4f0c2b1e9d8a7f6e5d4c3b2a190807060504030201000f0e0d0c0b0a09080706";

fn rule(name: &str, select: Select, task: &str) -> Rule {
    let task = Template {
        name: task.parse().unwrap(),
        namespace: "default".parse().unwrap(),
        labels: BTreeMap::new(),
        container_labels: Vec::new(),
        limits: Limits::default(),
        writers: None,
    };
    Rule { name: name.parse().unwrap(), select, task }
}

fn roots() -> Facts {
    Facts { is_roots: true, ..Facts::default() }
}

fn docker(name: &str) -> Facts {
    let labels =
        BTreeMap::from([("team".to_owned(), "data".to_owned()), ("odd".to_owned(), "a b".to_owned())]);
    let container = ContainerFacts { name: name.into(), image: "registry/web:1".into(), labels };
    Facts { container: Some(container), ..roots() }
}

fn taken<'r>(choice: &Choice<'r>) -> Option<&'r str> {
    match choice {
        Choice::Taken(rule) => Some(rule.name.as_str()),
        _ => None,
    }
}

#[test]
fn the_first_rule_that_matches_decides() {
    let rules = [
        rule("special", Select::Unit("nginx.service".parse().unwrap()), "${unit}"),
        rule("units", Select::Unit("*.service".parse().unwrap()), "${unit}"),
        rule("all", Select::Cgroup("system.slice/**".parse().unwrap()), "${cgroup}"),
    ];
    for (path, expected) in [
        ("system.slice/nginx.service", Some("special")),
        ("system.slice/cron.service", Some("units")),
        ("system.slice/cron.service/a", Some("all")),
        ("user.slice", None),
    ] {
        assert_eq!(taken(&choose(&rules, &Place::of(path), &roots())), expected, "{path}");
    }
}

#[test]
fn a_rule_that_needs_to_know_more_is_not_passed_over() {
    let named = ContainerSelect { name: "web-*".parse().ok(), ..ContainerSelect::default() };
    let rules = [
        rule("web", Select::Container(named), "${container.name}"),
        rule("rest", Select::Container(ContainerSelect::default()), "c-${container.id}"),
    ];
    let path = format!("docker/{ID}");
    let place = Place::of(&path);
    assert_eq!(choose(&rules, &place, &roots()), Choice::AskContainer);
    assert_eq!(taken(&choose(&rules, &place, &docker("web-1"))), Some("web"));
    assert_eq!(taken(&choose(&rules, &place, &docker("db"))), Some("rest"));
    // Where nothing has to be known, nobody is asked.
    assert_eq!(taken(&choose(&rules[1..], &place, &roots())), Some("rest"));
    let pods = [rule("pods", Select::Pod(PodSelect::default()), "${pod.namespace}-${pod.name}")];
    let pod = "kubepods/burstable/pod0f3a1c52-7d1e-4c55-9a3b-2f1e0d9c8b7a";
    assert_eq!(choose(&pods, &Place::of(pod), &roots()), Choice::AskPod);
}

#[test]
fn names_that_others_than_root_could_have_made_are_no_evidence() {
    let anybody = Facts::default();
    let docker = ContainerSelect { runtime: Some(Runtime::Docker), ..ContainerSelect::default() };
    let rules = [
        rule("docker", Select::Container(docker), "c-${container.id}"),
        rule("units", Select::Unit("*".parse().unwrap()), "${unit}"),
        rule("pods", Select::Pod(PodSelect::default()), "${pod.uid}"),
        rule("steps", Select::Slurm("*".parse().unwrap()), "${slurm.job}"),
        rule("mine", Select::Cgroup("user.slice/*/job-*".parse().unwrap()), "${cgroup}"),
    ];
    let container = format!("user.slice/docker-{ID}.scope");
    let pod = "kubepods/pod0f3a1c52-7d1e-4c55-9a3b-2f1e0d9c8b7a";
    for forged in [container.as_str(), pod, "slurm/uid_1/job_1/step_0", "user.slice/a.service"] {
        assert_eq!(choose(&rules, &Place::of(forged), &anybody), Choice::Nobody, "{forged}");
        assert!(taken(&choose(&rules, &Place::of(forged), &roots())).is_some(), "{forged}");
    }
    // A path is what an operator wrote.
    assert_eq!(taken(&choose(&rules, &Place::of("user.slice/a/job-1"), &anybody)), Some("mine"));
    assert!(looks_below(&rules, "user.slice/a") && !looks_below(&rules, "other.slice"));
}

#[test]
fn a_name_is_always_one_of_a_task() {
    let place = Place::of("system.slice/systemd-fsck@dev-disk\\x2dby.service");
    let rule_of = |name: &str| rule("r", Select::Unit("*".parse().unwrap()), name);
    let filled = |name: &str| rule_of(name).workload(&place, &roots()).unwrap().name;
    assert_eq!(filled("u.${unit}").as_str(), "u.systemd-fsck-dev-disk-x2dby");
    let (one, other) = ("a".repeat(80) + "1.service", "a".repeat(80) + "2.service");
    let long = |path: &str| rule_of("${cgroup}").workload(&Place::of(path), &roots()).unwrap().name;
    assert_ne!(long(&one), long(&other));
    assert_eq!(long(&one).as_str().len(), 63);
    assert!(rule_of("${cgroup}").workload(&Place::of("---"), &roots()).is_err());
    assert_eq!("${unit".parse::<NameTemplate>(), Err(InvalidTemplate::Open));
    assert_eq!("${host}".parse::<NameTemplate>(), Err(InvalidTemplate::Unknown("host".into())));
    assert_eq!("a/b".parse::<NameTemplate>(), Err(InvalidTemplate::Letter('/')));
    assert_eq!("".parse::<NameTemplate>(), Err(InvalidTemplate::Empty));
    assert_eq!("a-${pod.uid}".parse::<NameTemplate>().unwrap().to_string(), "a-${pod.uid}");
}

#[test]
fn labels_of_a_container_reach_the_task_where_they_can() {
    let mut rule = rule("r", Select::Container(ContainerSelect::default()), "${container.name}");
    rule.task.container_labels = vec!["team".into(), "odd".into()];
    rule.task.labels = BTreeMap::from([("tier".into(), "front".into())]);
    let path = format!("docker/{ID}");
    let workload = rule.workload(&Place::of(&path), &docker("web")).unwrap();
    assert_eq!(workload.name, "web".parse::<TaskId>().unwrap());
    let expected = [("team".to_owned(), "data".to_owned()), ("tier".to_owned(), "front".to_owned())];
    assert_eq!(workload.labels, BTreeMap::from(expected));
}
