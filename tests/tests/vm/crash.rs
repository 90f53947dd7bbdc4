//! The agent is killed at each step of a change, and of a release: what was decided is in force when it is back, and
//! the baseline once it has let go.

use shaper_core::{
    ledger::{Kind, Outcome},
    limits::{Limit, Limits},
    units::{Bytes, Millicores, Weight},
};
use shaper_tests::{
    agent::Agent,
    cgroup::{TestCgroup, read, write},
};

const FILES: [&str; 4] = ["cpu.max", "cpu.max.burst", "cpu.weight", "memory.max"];
const BASELINE: [&str; 4] = ["30000 100000", "10000", "77", "104857600"];

/// What the files say under these limits.
fn expected(limits: &Limits) -> [String; 4] {
    let quota = limits.cpu.at().map_or(0, |Millicores(milli)| milli * 100);
    let weight = limits.cpu_weight.map_or(0, Weight::get);
    let memory = limits.memory.at().map_or(0, |Bytes(bytes)| bytes);
    [format!("{quota} 100000"), quota.to_string(), weight.to_string(), memory.to_string()]
}

#[test]
fn whereever_it_dies_what_was_decided_is_in_force_and_the_baseline_comes_back() {
    let mut agent = Agent::start();
    let group = TestCgroup::new();
    let files = || FILES.map(|file| read(group.path(), file));
    let id = "service";
    let old = Limits {
        cpu: Limit::At(Millicores(500)),
        cpu_weight: Weight::new(200),
        memory: Limit::At(Bytes(200 << 20)),
        ..Limits::default()
    };
    let new = Limits {
        cpu: Limit::At(Millicores(200)),
        cpu_weight: Weight::new(300),
        memory: Limit::At(Bytes(220 << 20)),
        ..Limits::default()
    };
    let set = ["set", id, "--cpu", "0.2", "--cpu-weight", "300", "--memory", "220Mi"];
    for (place, decides, releases) in [
        ("change-before-record", false, false),
        ("change-after-record", true, false),
        ("ledger-after-intent", true, true),
        ("actuate-before-write:2", true, true),
        ("actuate-after-write", true, true),
        ("actuate-after-write:3", true, true),
        ("change-after-effect", true, true),
        ("ledger-after-outcome", true, true),
    ] {
        for (file, value) in FILES.iter().zip(BASELINE) {
            write(group.path(), file, value);
        }
        agent.adopt(id, group.path(), &["--cpu", "0.5", "--cpu-weight", "200", "--memory", "200Mi"]);
        assert_eq!(files(), expected(&old), "{place}");

        agent.kill9();
        agent.restart_to_die_at(place);
        assert_eq!(files(), expected(&old), "{place}");
        assert_ne!(agent.shaper().call(&set).code, 0, "{place}");
        agent.wait_for_abort();
        agent.restart();
        let decided = if decides { new } else { old };
        assert_eq!(agent.shaper().get(id).limits, decided, "{place}");
        assert_eq!(files(), expected(&decided), "{place}");
        let entries = agent.shaper().ledger(id);
        let known = entries.iter().rfind(|entry| entry.kind == Kind::Standing).unwrap();
        match place {
            "change-before-record" | "change-after-record" => assert_ne!(known.cause.reason, "set"),
            "ledger-after-outcome" => assert_eq!(known.outcome, Outcome::Done),
            _ => assert_eq!((known.cause.reason.as_str(), &known.outcome), ("set", &Outcome::Unknown)),
        }

        agent.kill9();
        agent.restart_to_die_at(place);
        let answer = agent.shaper().call(&["release", id]);
        if releases {
            assert_ne!(answer.code, 0, "{place}");
            agent.wait_for_abort();
            agent.restart();
            // It was not let go: it is limited as before.
            assert_eq!(files(), expected(&decided), "{place}");
            agent.shaper().ok(&["release", id]);
        }
        assert_eq!(files(), BASELINE, "{place}");
        if !releases {
            agent.kill9();
            agent.restart();
        }
    }
}
