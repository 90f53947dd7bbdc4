use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    limits::{Limit, Limits},
    policy::{PolicyFloors, PolicyLimits, Selector},
    spec::{Credentials, DEFAULT_WINDOW_MILLIS, Demand, OnNodeLost, Priority, TaskSpec},
    units::{BitsPerSec, Bytes, Iops, Micros, Millicores, Weight},
};

const PROFILE: &str = r#"{
  "task_id": "etl-1",
  "resource_demand": {
    "cpu_cores": 4,
    "memory_gb": 8,
    "gpu_memory_gb": 2,
    "network_bandwidth_mbps": 100,
    "storage_io_ops": 500
  },
  "priority": "high",
  "estimated_runtime_seconds": 3600
}
"#;

const POLICY: &str = "\
policy_name: \"high_priority_tasks\"
priority: \"high\"
resource_demand:
  cpu_cores: 8
  memory_gb: 16
behavior:
  eviction_threshold: 0.9
  preemption_enabled: true
";

const GIB: u64 = 1 << 30;

fn etl() -> Profile {
    Profile {
        task_id: "etl-1".parse().unwrap(),
        demand: Demand {
            cpu: Millicores(4000),
            memory: Bytes(8 * GIB),
            gpu_memory: Some(Bytes(2 * GIB)),
            network: Some(BitsPerSec(100_000_000)),
            storage_io: Some(Iops(500)),
        },
        priority: Priority::High,
        estimated_runtime_seconds: Some(3600),
    }
}

/// The error, and its place and path in short.
fn refused<T: std::fmt::Debug>(read: Result<T, DocumentError>) -> (String, String) {
    let error = read.unwrap_err();
    let place = format!("{}:{}:{}", error.line, error.column, error.path);
    (place, error.to_string())
}

#[test]
fn a_profile_as_json_and_as_yaml() {
    assert_eq!(profile("p.json", PROFILE), Ok(etl()));
    let compact: String = PROFILE.split_whitespace().collect();
    assert_eq!(profile("p.json", &compact), Ok(etl()));
    assert_eq!(profile("p.json", PROFILE.replace("  ", "\t")), Ok(etl()));
    assert_eq!(profile("p.json", PROFILE.replace('\n', "\r\n")), Ok(etl()));
    assert_eq!(profile("p.json", format!("\u{feff}{PROFILE}")), Ok(etl()));
    let yaml = "task_id: etl-1 # the first\nresource_demand:\n  cpu_cores: 4\n  memory_gb: 8\n  gpu_memory_gb: 2\n  \
                network_bandwidth_mbps: 100\n  storage_io_ops: 500\npriority: high\nestimated_runtime_seconds: 3600\n";
    assert_eq!(profile("p.yaml", yaml), Ok(etl()));
}

#[test]
fn what_a_profile_need_not_say() {
    let least = r#"{"task_id":"a","resource_demand":{"cpu_cores":0.01,"memory_gb":0.5},"priority":"low"}"#;
    let expected = Profile {
        task_id: "a".parse().unwrap(),
        demand: Demand {
            cpu: Millicores(10),
            memory: Bytes(GIB / 2),
            gpu_memory: None,
            network: None,
            storage_io: None,
        },
        priority: Priority::Low,
        estimated_runtime_seconds: None,
    };
    assert_eq!(profile("p", least), Ok(expected.clone()));
    assert_eq!(profile("p", profile_to_json(&expected)), Ok(expected));
}

#[test]
fn a_profile_is_written_with_the_names_that_are_read() {
    assert_eq!(format!("{}\n", profile_to_json(&etl())), PROFILE);
    serde_json::from_str::<serde_json::Value>(&profile_to_json(&etl())).unwrap();
}

#[test]
fn numbers_are_what_is_written() {
    let demand = |field: &str, number: &str| {
        let text = PROFILE.replace(&format!("\"{field}\": 4"), &format!("\"{field}\": {number}"));
        profile("p", text).map(|profile| profile.demand.cpu)
    };
    for (number, cpu) in
        [("0.3", 300), ("0.30000000000000004", 300), ("1e1", 10_000), ("1000000", 1_000_000_000)]
    {
        assert_eq!(demand("cpu_cores", number), Ok(Millicores(cpu)), "{number}");
    }
    for bad in [
        "-4",
        "0",
        "0.0099",
        "1000000.001",
        "1e400",
        "NaN",
        "Infinity",
        "-Infinity",
        ".nan",
        ".inf",
        "-.inf",
        "\"4\"",
        "null",
        "true",
        "[]",
        "{}",
        "0x10",
        "0755",
        "1_000",
        "+5",
        ".5",
        "5.",
        "4 cores",
        "''",
        "!!int \"4\"",
        "123456789012345678901234567890123456789012345678901234567890",
    ] {
        let (place, shown) = refused(demand("cpu_cores", bad));
        let expected = if bad.starts_with("!!") { "4:24:" } else { "4:18:" };
        assert_eq!(place, format!("{expected}resource_demand.cpu_cores"), "{shown}");
        assert!(shown.contains("must be a number of cores from 0.01 to 1000000, and is "), "{shown}");
        assert!(shown.contains("\nhelp: "), "{shown}");
    }
}

#[test]
fn the_error_is_rendered_as_rustc_does() {
    let text = PROFILE.replace("\"cpu_cores\": 4", "\"cpu_cores\": -4.5");
    let expected = "\
profile.json:4:18: resource_demand.cpu_cores: must be a number of cores from 0.01 to 1000000, and is -4.5
  |
4 |     \"cpu_cores\": -4.5,
  |                  ^^^^
help: write cores as a plain number, such as 4 or 0.5";
    assert_eq!(profile("profile.json", text).unwrap_err().to_string(), expected);
}

#[test]
fn what_is_refused_is_pointed_at() {
    let cases: &[(&str, &str, &str, &[&str])] = &[
        // What to replace, by what, where that is at fault, and what is said.
        (
            "cpu_cores",
            "cpu_core",
            "4:5:resource_demand.cpu_core",
            &["no field of that name", "did you mean `cpu_cores`?"],
        ),
        ("storage_io_ops", "disk", "8:5:resource_demand.disk", &["the fields are cpu_cores, memory_gb"]),
        (
            "\"priority\": \"high\",",
            "",
            "1:1:priority",
            &["is missing", "add it, such as `\"priority\": \"medium\"`"],
        ),
        ("\"memory_gb\": 8,", "", "3:3:resource_demand.memory_gb", &["is missing", "`\"memory_gb\": 8`"]),
        ("\"high\"", "\"urgent\"", "10:15:priority", &["one of high, medium, low", "the text `urgent`"]),
        ("\"high\"", "\"High\"", "10:15:priority", &["did you mean `high`?"]),
        ("\"high\"", "1", "10:15:priority", &["put it in quotes: \"1\""]),
        (
            "\"etl-1\"",
            "\"../../x\"",
            "2:14:task_id",
            &["`../../x` is not a task id", "use 1 to 63 characters"],
        ),
        ("\"etl-1\"", "7", "2:14:task_id", &["must be a task id, and is 7", "\"7\""]),
        ("\"etl-1\"", "\"\\u001b[2J\"", "2:14:task_id", &["`\\u{1b}[2J` is not a task id"]),
        ("\"etl-1\"", "null", "2:14:task_id", &["and is null", "give it a value"]),
        ("500", "0", "8:23:resource_demand.storage_io_ops", &["from 1 to 1000000000"]),
        ("500", "1.5", "8:23:resource_demand.storage_io_ops", &["a whole number"]),
        ("100", "0.1", "7:31:resource_demand.network_bandwidth_mbps", &["from 0.128 to 400000"]),
        ("3600", "-1", "11:32:estimated_runtime_seconds", &["a whole number"]),
        (
            "\"gpu_memory_gb\": 2",
            "\"gpu_memory_gb\": 0",
            "6:22:resource_demand.gpu_memory_gb",
            &["above 0", "leave the field out"],
        ),
        (
            "\"priority\"",
            "\"task_id\": \"b\",\n  \"priority\"",
            "10:3:task_id",
            &["is there twice; first in line 2"],
        ),
        ("4,", "4", "5:16:", &["not valid YAML or JSON", "check the quotes, commas"]),
        ("4,", "*x,", "4:18:", &["anchors (`&`) and aliases (`*`) are not taken"]),
        ("4,", "&x 4,", "4:18:", &["anchors (`&`) and aliases (`*`) are not taken"]),
        ("4,", "!cores 4,", "4:25:", &["this tag is not known"]),
        (
            "{\n    \"cpu",
            "{\n    \"<<\": {},\n    \"cpu",
            "4:5:resource_demand.<<",
            &["no field of that name"],
        ),
    ];
    for (old, new, place, said) in cases {
        let text = PROFILE.replacen(old, new, 1);
        let (found, shown) = refused(profile("p.json", &text));
        assert_eq!(found, *place, "{shown}");
        for said in *said {
            assert!(shown.contains(said), "{shown}");
        }
    }
}

#[test]
fn what_is_no_document_is_refused() {
    for (text, said) in [
        ("", "the document is empty"),
        ("# nothing\n", "the document is empty"),
        ("null", "the document is empty"),
        ("[1]", "must be a task profile: a mapping of fields, and is a list"),
        ("hello", "and is the text `hello`"),
        ("{\"a\": 1}\n---\n{}", "another document begins here"),
        ("a: 1\n\u{1}", "not valid YAML or JSON"),
        ("{1: 2}", "must be a name, and is 1"),
        ("{[a]: 2}", "must be a name, and is a list"),
        ("<<: {task_id: a}", "merge keys"),
        ("{\"task_id\": \"a\"", "not valid YAML or JSON"),
    ] {
        let (_, shown) = refused(profile("p", text));
        assert!(shown.contains(said), "{text:?}: {shown}");
        assert!(shown.contains("\nhelp: "), "{text:?}: {shown}");
    }
    let (place, shown) = refused(profile("p", b"task_id: a\nb: \xff".as_slice()));
    assert_eq!(
        (place.as_str(), shown.as_str()),
        ("2:4:", "p:2:4: the document is not UTF-8\nhelp: save it as UTF-8")
    );
}

#[test]
fn what_could_grow_is_refused_at_once() {
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: [*c,*c,*c,*c,*c,*c]\n";
    let (_, shown) = refused(policy("p", bomb));
    assert!(shown.contains("anchors (`&`) and aliases (`*`) are not taken"), "{shown}");
    let deep = format!("{}1{}", "[".repeat(400_000), "]".repeat(400_000));
    let (_, shown) = refused(policy("p", deep));
    assert!(shown.contains("nested too deeply"), "{shown}");
    let blocks: String = (0..400).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect();
    let (_, shown) = refused(policy("p", blocks));
    assert!(shown.contains("nested too deeply"), "{shown}");
    let many = format!("[{}]", "1,".repeat(400_000));
    let (_, shown) = refused(policy("p", many));
    assert!(shown.contains("too many values"), "{shown}");
    let (place, shown) = refused(policy("p", "x".repeat(MAX_BYTES + 1)));
    assert_eq!(place, "1:1:");
    assert!(shown.contains("longer than 1 MiB") && shown.contains("\nhelp: "), "{shown}");
    for long in ["\"x\"", "1", "1.5", "\"\\u0041\""] {
        let long = long.replace(['x', '1'], &"1".repeat(MAX_BYTES - 100));
        for text in
            [format!("{{\"task_id\": {long}}}"), format!("{{{long}: 1}}"), format!("priority: {long}")]
        {
            for refused in all(&text).into_iter().filter_map(Result::err) {
                let shown = refused.to_string();
                assert!(shown.len() < 1000, "{}", shown.len());
            }
        }
    }
}

#[test]
fn a_policy_as_it_is_given() {
    let expected = Policy {
        policy_name: "high_priority_tasks".into(),
        priority: Priority::High,
        namespace: "default".into(),
        demand: Some(Demand {
            cpu: Millicores(8000),
            memory: Bytes(16 * GIB),
            gpu_memory: None,
            network: None,
            storage_io: None,
        }),
        eviction_threshold_permille: Some(900),
        preemption_enabled: true,
        window_millis: DEFAULT_WINDOW_MILLIS,
        selector: Selector::default(),
        limits: PolicyLimits::default(),
        floors: Default::default(),
    };
    assert_eq!(policy("p.yaml", POLICY), Ok(expected.clone()));
    let flow = "policy_name: \"high_priority_tasks\"\npriority: \"high\"\nresource_demand: {cpu_cores: 8, memory_gb: 16}\n\
                behavior: {eviction_threshold: 0.9, preemption_enabled: true}\n";
    assert_eq!(policy("p.yaml", flow), Ok(expected.clone()));
    let json = r#"{"policy_name":"high_priority_tasks","priority":"high","resource_demand":{"cpu_cores":8,"memory_gb":16},
        "behavior":{"eviction_threshold":0.9,"preemption_enabled":true}}"#;
    assert_eq!(policy("p.json", json), Ok(expected.clone()));
    let grown = format!("{POLICY}  window_seconds: 2.5\nnamespace: batch\n");
    let expected = Policy { window_millis: 2500, namespace: "batch".into(), ..expected };
    assert_eq!(policy("p.yaml", grown), Ok(expected.clone()));
    let selector = "selector: {labels: {team: data, tier: ''}, name: 'etl-*'}\nlimits: {cpu: 250m}\n\
                    floors: {cpu: 0.5, memory_gb: 0.25}\n";
    let labels = BTreeMap::from([("team".into(), "data".into()), ("tier".into(), "".into())]);
    let expected = Policy {
        window_millis: DEFAULT_WINDOW_MILLIS,
        namespace: "default".into(),
        selector: Selector { labels, name: "etl-*".parse().ok() },
        limits: PolicyLimits { cpu: Some(Millicores(250)), gpu_memory: None },
        floors: PolicyFloors { cpu: Some(Millicores(500)), memory: Some(Bytes(GIB / 4)) },
        ..expected
    };
    assert_eq!(policy("p.yaml", format!("{POLICY}{selector}")), Ok(expected));
    let least = Policy {
        policy_name: "x".into(),
        priority: Priority::Low,
        namespace: "default".into(),
        demand: None,
        eviction_threshold_permille: None,
        preemption_enabled: false,
        window_millis: DEFAULT_WINDOW_MILLIS,
        selector: Selector::default(),
        limits: PolicyLimits::default(),
        floors: Default::default(),
    };
    assert_eq!(policy("p.yaml", "policy_name: x\npriority: low\n"), Ok(least));
}

#[test]
fn a_policy_that_is_wrong_is_pointed_at() {
    for (old, new, place, said) in [
        (
            "0.9",
            "0",
            "7:23:behavior.eviction_threshold",
            "a share of the node above 0, and at most 1, and is 0",
        ),
        ("0.9", "1.0001", "7:23:behavior.eviction_threshold", "help: write a share such as 0.9"),
        ("0.9", "90%", "7:23:behavior.eviction_threshold", "and is the text `90%`"),
        ("true", "yes", "8:23:behavior.preemption_enabled", "must be true or false, and is the text `yes`"),
        ("\"high_priority_tasks\"", "../x", "1:14:policy_name", "`../x` is not a policy name"),
        (
            "  preemption_enabled",
            "  preemtion_enabled",
            "8:3:behavior.preemtion_enabled",
            "did you mean `preemption_enabled`?",
        ),
        ("  cpu_cores: 8\n", "", "3:1:resource_demand.cpu_cores", "is missing"),
        ("priority: \"high\"\n", "", "1:1:priority", "is missing"),
        ("behavior:", "behaviour:", "6:1:behaviour", "did you mean `behavior`?"),
    ] {
        let (found, shown) = refused(policy("p.yaml", POLICY.replacen(old, new, 1)));
        assert_eq!(found, place, "{shown}");
        assert!(shown.contains(said), "{shown}");
    }
    for (window, fits) in [("0.5", true), ("3600", true), ("0.4", false), ("3601", false), ("10s", false)] {
        let read = policy("p.yaml", format!("{POLICY}  window_seconds: {window}\n"));
        assert_eq!(read.is_ok(), fits, "{read:?}");
    }
}

const TASK: &str = "\
profile: {task_id: etl-1, resource_demand: {cpu_cores: 1, memory_gb: 2}, priority: low}
command: [/usr/bin/python3, etl.py]
env: {MODE: fast}
cwd: /srv/etl
labels: {team: data}
limits: {cpu_cores: 2, memory_gb: 2, network_bandwidth_mbps: 10, storage_io_ops: 300, cpu_weight: 200, network_ingress_mbps: 20,
         storage_io_weight: 150, storage_io_latency_ms: 2.5, reclaim_idle: true, network_weight: 300}
run_as: {uid: 1000, gid: 100, groups: [4, 24]}
retries: 3
on_node_lost: rerun
";

#[test]
fn a_task_spec() {
    let map = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
    let draft = task("t.yaml", TASK).unwrap();
    let expected = TaskSpec {
        profile: draft.profile.clone(),
        command: vec!["/usr/bin/python3".into(), "etl.py".into()],
        env: map("MODE", "fast"),
        cwd: "/srv/etl".into(),
        name: "python3".into(),
        namespace: "default".into(),
        labels: map("team", "data"),
        limits: Limits {
            cpu: Limit::At(Millicores(2000)),
            cpu_weight: Weight::new(200),
            memory: Limit::At(Bytes(2 * GIB)),
            net_egress: Limit::At(BitsPerSec(10_000_000)),
            storage_io: Limit::At(Iops(300)),
            storage_io_weight: Weight::new(150),
            storage_io_latency: Limit::At(Micros(2500)),
            reclaim_idle: Some(true),
            net_egress_guarantee: None,
            net_egress_weight: Weight::new(300),
            net_ingress: Limit::At(BitsPerSec(20_000_000)),
            gpu_cards: None,
            gpu_memory: Limit::Unlimited,
            gpu_power: Limit::Unlimited,
        },
        run_as: Some(Credentials { uid: 1000, gid: 100, groups: vec![4, 24] }),
        retries: 3,
        on_node_lost: OnNodeLost::Rerun,
        gpus: Default::default(),
        image: None,
    };
    assert_eq!(draft.complete("/elsewhere"), Ok(expected));
    let json = format!(r#"{{"profile": {PROFILE}, "command": ["true"], "name": "n", "namespace": "batch"}}"#);
    let spec = task("t.json", json).unwrap().complete("/here").unwrap();
    assert_eq!((spec.profile, spec.cwd.as_str()), (etl(), "/here"));
    assert_eq!((spec.name.as_str(), spec.namespace.as_str()), ("n", "batch"));
}

#[test]
fn an_image_has_a_command_and_a_directory_of_its_own() {
    let json = format!(r#"{{"profile": {PROFILE}, "image": "docker.io/library/redis:7"}}"#);
    let spec = task("t.json", json).unwrap().complete("/here").unwrap();
    assert_eq!(spec.image.as_ref().map(ToString::to_string).as_deref(), Some("docker.io/library/redis:7"));
    assert_eq!((spec.name.as_str(), spec.cwd.as_str(), &spec.command[..]), ("redis", "", &[][..]));
    let json = format!(
        r#"{{"profile": {PROFILE}, "image": "redis", "command": ["redis-server", "x"], "cwd": "/data", "name": "cache"}}"#
    );
    let spec = task("t.json", json).unwrap().complete("/here").unwrap();
    assert_eq!((spec.name.as_str(), spec.cwd.as_str()), ("cache", "/data"));
    assert_eq!(spec.command, ["redis-server", "x"]);
    let json = format!(r#"{{"profile": {PROFILE}, "image": "--privileged"}}"#);
    let (_, shown) = refused(task("t.json", json));
    assert!(shown.contains("is not a reference to an image"), "{shown}");
}

#[test]
fn a_bare_profile_is_a_draft() {
    let draft = task("p.json", PROFILE).unwrap();
    assert_eq!((&draft.profile, &draft.command), (&etl(), &None));
    assert_eq!(draft.complete("/"), Err(NoCommand));
    let (place, shown) = refused(task("p.json", PROFILE.replace("\"high\"", "\"urgent\"")));
    assert_eq!(place, "10:15:priority", "{shown}");
    let (_, shown) = refused(task("t.yaml", "command: [a]"));
    assert!(shown.starts_with("t.yaml:1:1: profile: is missing, and a task spec must have it"), "{shown}");
}

#[test]
fn a_task_spec_that_is_wrong_is_pointed_at() {
    for (old, new, place, said) in [
        (
            "{cpu_cores: 2,",
            "{cpu_cores: 0.5,",
            "6:21:limits.cpu_cores",
            "is below the request, which is 1 cores",
        ),
        ("2, memory_gb: 2", "2, memory_gb: 1", "6:35:limits.memory_gb", "raise the limit, lower the request"),
        ("cpu_weight: 200", "cpu_weight: 0", "6:99:limits.cpu_weight", "from 1 to 10000"),
        ("latency_ms: 2.5", "latency_ms: 0.01", "7:57:limits.storage_io_latency_ms", "from 0.1 to 500"),
        ("priority: low", "priority: lo", "1:84:profile.priority", "did you mean `low`?"),
        ("etl.py]", "7]", "2:29:command[1]", "put it in quotes: \"7\""),
        ("[/usr/bin/python3, etl.py]", "[]", "2:10:command", "is empty"),
        ("[/usr/bin/python3, etl.py]", "python3 etl.py", "2:10:command", "must be a list"),
        ("[/usr/bin/python3, etl.py]", "[\"a\\0b\"]", "2:11:command[0]", "NUL"),
        ("[/usr/bin/python3, etl.py]", "[/usr/bin/]", "2:11:command[0]", "is not the name of a program"),
        ("fast", "8080", "3:13:env.MODE", "put it in quotes: \"8080\""),
        ("MODE", "A=B", "3:12:env.A=B", "is not the name of a variable"),
        ("/srv/etl", "srv", "4:6:cwd", "is not an absolute path"),
        ("data", "\"a b\"", "5:16:labels.team", "cannot be in a label"),
        ("uid: 1000, ", "", "8:1:run_as.uid", "is missing"),
        ("1000", "root", "8:15:run_as.uid", "a user id"),
        ("[4, 24]", "[4, -1]", "8:43:run_as.groups[1]", "a group id"),
        ("retries: 3", "retries: 1001", "9:10:retries", "from 0 to 1000"),
        ("retries", "retrys", "9:1:retrys", "did you mean `retries`?"),
        ("rerun", "run", "10:15:on_node_lost", "wait"),
    ] {
        let (found, shown) = refused(task("t.yaml", TASK.replacen(old, new, 1)));
        assert_eq!(found, place, "{shown}");
        assert!(shown.contains(said), "{shown}");
    }
}

fn demands() -> impl Strategy<Value = Demand> {
    let memory = || 1u64..=1 << 53;
    (
        10u64..=1_000_000_000,
        memory(),
        proptest::option::of(memory()),
        proptest::option::of(128_000u64..=400_000_000_000),
        proptest::option::of(1u64..=1_000_000_000),
    )
        .prop_map(|(cpu, memory, gpu_memory, network, storage_io)| Demand {
            cpu: Millicores(cpu),
            memory: Bytes(memory),
            gpu_memory: gpu_memory.map(Bytes),
            network: network.map(BitsPerSec),
            storage_io: storage_io.map(Iops),
        })
}

fn all(text: &str) -> [Result<(), DocumentError>; 3] {
    [profile("f", text).map(drop), policy("f", text).map(drop), task("f", text).map(drop)]
}

/// A document with some of it replaced by what may break it.
fn broken() -> impl Strategy<Value = String> {
    let document = prop_oneof![Just(PROFILE), Just(POLICY), Just(TASK)];
    let piece = prop_oneof![
        "[\\PC\t\n\r\u{0}-\u{8}]{0,6}",
        "[-&*!|>%@`{}\\[\\]:,#?\"' \n0-9.e]{0,8}",
        Just("\u{feff}".to_owned()),
        Just("---\n".to_owned()),
    ];
    (document, any::<prop::sample::Index>(), any::<prop::sample::Index>(), piece).prop_map(
        |(document, from, length, piece)| {
            let from = from.index(document.len());
            let to = (from + length.index(12)).min(document.len());
            format!("{}{piece}{}", &document[..from], &document[to..])
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        id in "[a-z0-9]([a-zA-Z0-9._-]{0,61}[a-z0-9])?",
        demand in demands(),
        priority in prop_oneof![Just(Priority::Low), Just(Priority::Medium), Just(Priority::High)],
        estimated_runtime_seconds in proptest::option::of(0u64..=3_153_600_000),
    ) {
        let written = Profile { task_id: id.parse().unwrap(), demand, priority, estimated_runtime_seconds };
        let json = profile_to_json(&written);
        prop_assert_eq!(profile("p.json", &json), Ok(written.clone()));
        prop_assert_eq!(task("p.json", &json).map(|draft| draft.profile), Ok(written));
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(&value["task_id"], &serde_json::Value::from(id));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let _ = all(&text);
    }

    #[test]
    fn no_broken_document_panics(text in broken()) {
        for refused in all(&text).into_iter().filter_map(Result::err) {
            let shown = refused.to_string();
            prop_assert!(refused.line >= 1 && refused.column >= 1);
            prop_assert!(shown.lines().count() <= 5, "{shown}");
            prop_assert!(!shown.chars().any(|letter| letter.is_control() && letter != '\n'), "{shown:?}");
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = profile("f", &bytes);
    }
}
