//! The set of policies and its revisions.

use std::collections::BTreeMap;

use shaper_core::{
    policy::{PolicyLimits, Rule, Setting},
    spec::{Policy, Priority},
    units::Millicores,
};

use super::{
    policies::{Gift, PolicyChange, Preview, REVISIONS, preview},
    tests::{Broker, OPERATOR, USER, spec},
    *,
};

fn policy(name: &str, limit: Option<u64>) -> Policy {
    Policy {
        policy_name: name.into(),
        priority: Priority::Low,
        namespace: "default".into(),
        demand: None,
        eviction_threshold_permille: None,
        preemption_enabled: false,
        window_millis: 10_000,
        selector: Default::default(),
        limits: PolicyLimits { cpu: limit.map(Millicores), gpu_memory: None },
        floors: Default::default(),
    }
}

/// A broker, and what it has stored.
struct Kept {
    broker: Broker,
    rows: BTreeMap<String, Vec<u8>>,
    now: u64,
}

impl Kept {
    fn new() -> Kept {
        Kept { broker: Broker::new(), rows: BTreeMap::new(), now: 0 }
    }

    fn ask(&mut self, event: Event) -> Result<Answer, Refusal> {
        self.now += 1;
        let state = &mut self.broker.state;
        let Outcome { rows, effects } = on_event(state, event, self.now);
        for RowChange { key, value } in rows.iter().map(|row| state.row(row)) {
            match value {
                Some(value) => drop(self.rows.insert(key, value)),
                None => drop(self.rows.remove(&key)),
            }
        }
        let rows = self.rows.iter().map(|(key, value)| (key.as_bytes(), value.as_slice()));
        let again = State::load(rows).unwrap();
        assert_eq!((&again.policies, &again.policy_revisions), (&state.policies, &state.policy_revisions));
        assert_eq!(again.policies_revision, state.policies_revision);
        let answer = effects.into_iter().find_map(|effect| match effect {
            Effect::Answer(answer) => Some(answer),
            _ => None,
        });
        answer.unwrap()
    }

    fn apply(&mut self, policy: Policy) {
        let policy = Box::new(policy);
        self.ask(Event::ApplyPolicy { caller: OPERATOR, within: Vec::new(), policy }).unwrap();
    }

    fn delete(&mut self, name: &str) -> Result<Answer, Refusal> {
        self.ask(Event::DeletePolicy { caller: OPERATOR, within: Vec::new(), name: name.into() })
    }

    fn roll_back(&mut self, revision: u64) -> Result<Answer, Refusal> {
        self.ask(Event::RollBackPolicies { caller: OPERATOR, revision })
    }

    fn set(&self) -> Vec<Policy> {
        self.broker.state.policies.values().map(|row| row.policy.clone()).collect()
    }
}

#[test]
fn every_change_is_a_revision_and_can_be_undone() {
    let mut kept = Kept::new();
    let session = kept.broker.node("n1", 4000);
    kept.apply(policy("a", None));
    kept.apply(policy("b", None));
    kept.apply(policy("a", Some(1_000)));
    kept.apply(policy("a", Some(1_000)));
    let Answer::Policies(deleted) = kept.delete("b").unwrap() else { panic!("another answer") };
    let expected = PolicyRevision {
        revision: 4,
        at: 5,
        uid: 0,
        rolled_back_to: None,
        changes: vec![PolicyChange { name: "b".into(), before: Some((policy("b", None), 0)), after: None }],
    };
    assert_eq!(*deleted, expected, "the same again was no change");
    assert_eq!(kept.delete("b"), Err(Refusal::NoSuchPolicy("b".into())));

    let effects = kept.broker.on(Event::RollBackPolicies { caller: OPERATOR, revision: 2 });
    assert_eq!(kept.set(), [policy("a", None), policy("b", None)]);
    assert!(effects.contains(&Effect::Policies(session, 5, kept.set())));
    let change = &kept.broker.state.policy_revisions[&5];
    assert_eq!((change.rolled_back_to, change.changes.len()), (Some(2), 2));

    kept.broker.on(Event::RollBackPolicies { caller: OPERATOR, revision: 4 });
    assert_eq!(kept.set(), [policy("a", Some(1_000))], "to go back can be undone");
    kept.broker.on(Event::RollBackPolicies { caller: OPERATOR, revision: 0 });
    assert_eq!(kept.set(), []);
    let latest = kept.broker.state.policies_revision;
    assert_eq!(latest, 7);
    let unknown = Refusal::NoSuchRevision { revision: 8, oldest: 0, latest };
    let effects = kept.broker.on(Event::RollBackPolicies { caller: OPERATOR, revision: 8 });
    assert!(effects.contains(&Effect::Answer(Err(unknown))));
}

#[test]
fn the_history_is_bounded_and_outlives_the_policies() {
    let mut kept = Kept::new();
    kept.apply(policy("a", None));
    for limit in 1..=u64::try_from(REVISIONS).unwrap() {
        kept.apply(policy("a", Some(1_000 + limit)));
    }
    let revisions = &kept.broker.state.policy_revisions;
    assert_eq!((revisions.len(), revisions.first_key_value().map(|(first, _)| *first)), (REVISIONS, Some(2)));
    let gone = Refusal::NoSuchRevision { revision: 0, oldest: 1, latest: 201 };
    assert_eq!(kept.roll_back(0), Err(gone));
    kept.delete("a").unwrap();
    // `ask` has compared what is stored: the number of the set does not go back with its last policy.
    assert_eq!(kept.broker.state.policies_revision, 202);
    kept.roll_back(201).unwrap();
    assert_eq!(kept.set(), [policy("a", Some(1_000 + 200))]);
}

#[test]
fn to_delete_and_to_go_back_is_for_those_who_may() {
    let mut kept = Kept::new();
    kept.apply(policy("a", None));
    let own = Policy { namespace: "etl".into(), ..policy("own", None) };
    let within = || vec!["etl".to_owned()];
    let apply = Event::ApplyPolicy { caller: USER, within: within(), policy: Box::new(own.clone()) };
    kept.ask(apply).unwrap();
    let delete = |within, name: &str| Event::DeletePolicy { caller: USER, within, name: name.into() };
    for (within, name, namespace, uid) in [
        (within(), "a", "default", 0),
        (vec!["default".into()], "a", "default", 0),
        (vec![], "own", "etl", 1000),
    ] {
        let (policy, namespace) = (name.to_owned(), namespace.to_owned());
        let denied = Denied::PolicyOfOthers { name: policy, namespace, uid };
        assert_eq!(kept.ask(delete(within, name)), Err(Refusal::Denied(denied)));
    }
    let back = Event::RollBackPolicies { caller: USER, revision: 0 };
    assert_eq!(kept.ask(back), Err(Refusal::Denied(Denied::RollBack)));
    kept.ask(delete(within(), "own")).unwrap();
    // It is theirs again.
    kept.roll_back(2).unwrap();
    assert_eq!(kept.broker.state.policies["own"].uid, USER.uid);
    kept.ask(delete(within(), "own")).unwrap();
}

#[test]
fn a_preview_says_who_gets_what_and_changes_nothing() {
    let mut kept = Kept::new();
    kept.apply(policy("all", Some(3_000)));
    kept.broker.node("n1", 1_000);
    kept.broker.submit(spec("runs", 1_000, Priority::Low, 0));
    kept.broker.submit(spec("waits", 1_000, Priority::Low, 0));
    kept.broker.submit(spec("high", 1_000, Priority::High, 0));
    kept.broker.submit(TaskSpec { name: "etl".into(), ..spec("other", 1_000, Priority::Low, 0) });
    let mut named = policy("sleepers", Some(2_000));
    named.selector.name = "sl*".parse().ok();
    let state = &kept.broker.state;
    let seen = |caller: &Credentials, within: &[String], policies: &[Policy]| {
        preview(state, caller, within, policies, |_| true)
    };
    let gift = Gift {
        setting: Setting::CpuLimit,
        by: ("sleepers".into(), "at most 2 cores".into()),
        overruled: vec![("all".into(), "at most 3 cores".into(), Rule::Name)],
    };
    let expected = |task: &str, node: Option<&str>| Preview {
        task: task.parse().unwrap(),
        node: node.map(Into::into),
        settings: vec![gift.clone()],
    };
    let named = [named];
    let found = seen(&OPERATOR, &[], &named);
    assert_eq!(found, Ok(vec![expected("runs", Some("n1")), expected("waits", None)]));
    assert_eq!(kept.set(), [policy("all", Some(3_000))]);

    let denied = Refusal::Denied(Denied::Policies("default".into()));
    assert_eq!(seen(&USER, &[], &named), Err(denied), "as it would be refused");
    let somebody = Credentials { uid: 7, gid: 7, groups: Vec::new() };
    assert_eq!(seen(&somebody, &["default".into()], &named), Ok(vec![]), "others do not see the tasks");
}
