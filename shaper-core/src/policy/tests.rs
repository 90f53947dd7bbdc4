use proptest::{collection::btree_map, prelude::*, sample::select};

use super::*;
use crate::units::Bytes;

fn policy(name: &str) -> Policy {
    Policy {
        policy_name: name.into(),
        priority: Priority::High,
        namespace: "default".into(),
        demand: None,
        eviction_threshold_permille: Some(900),
        preemption_enabled: false,
        window_millis: 10_000,
        selector: Selector::default(),
        limits: PolicyLimits::default(),
        floors: Default::default(),
    }
}

fn selecting(name: &str, pattern: Option<&str>, labels: &[(&str, &str)]) -> Policy {
    let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let name_pattern = pattern.map(|pattern| pattern.parse().unwrap());
    Policy { selector: Selector { labels, name: name_pattern }, ..policy(name) }
}

fn labels(of: &[(&str, &str)]) -> BTreeMap<String, String> {
    of.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// The name of the winner, and the others with their rules.
fn evicting(policies: &[Policy], subject: &Subject<'_>) -> Option<(String, Vec<(String, Rule)>)> {
    let given = resolve(policies, subject).into_iter().find(|given| given.setting == Setting::Eviction)?;
    let overruled = given.overruled.iter().map(|other| (other.policy.policy_name.clone(), other.rule));
    Some((given.policy.policy_name.clone(), overruled.collect()))
}

#[test]
fn the_more_specific_one_wins_and_the_others_are_told_why() {
    let labels = labels(&[("team", "data"), ("tier", "gold")]);
    let subject =
        Subject { priority: Priority::High, namespace: "default", name: "etl-nightly", labels: &labels };
    let mut policies = vec![
        policy("b-all"),
        policy("a-all"),
        selecting("gold", None, &[("team", "data"), ("tier", "gold")]),
        selecting("data", None, &[("team", "data")]),
        selecting("etl", Some("etl-*"), &[]),
        selecting("etl-n", Some("etl-n*"), &[]),
        selecting("this", Some("etl-nightly"), &[]),
        selecting("another", Some("etl"), &[("team", "data"), ("tier", "gold")]),
        selecting("silver", None, &[("tier", "silver")]),
        Policy { namespace: "batch".into(), ..policy("elsewhere") },
        Policy { priority: Priority::Low, ..policy("low") },
        Policy { eviction_threshold_permille: None, ..selecting("quiet", Some("etl-nightly"), &[]) },
    ];
    let expected = [
        ("etl-n", Rule::Name),
        ("etl", Rule::Name),
        ("gold", Rule::Name),
        ("data", Rule::Name),
        ("a-all", Rule::Name),
        ("b-all", Rule::Name),
    ];
    let expected = expected.map(|(name, rule)| (name.to_owned(), rule)).to_vec();
    assert_eq!(evicting(&policies, &subject), Some(("this".into(), expected)));

    let mut rules = Vec::new();
    while let Some((winner, overruled)) = evicting(&policies, &subject) {
        rules.extend(overruled.first().map(|(_, rule)| *rule));
        policies.retain(|policy| policy.policy_name != winner);
    }
    assert_eq!(rules, [Rule::Name, Rule::Pattern, Rule::Name, Rule::Labels, Rule::Labels, Rule::PolicyName]);
}

static NONE: BTreeMap<String, String> = BTreeMap::new();

#[test]
fn each_setting_is_decided_by_itself() {
    let capped = Policy {
        limits: PolicyLimits { cpu: Some(Millicores(2_500)), gpu_memory: None },
        eviction_threshold_permille: None,
        ..selecting("capped", Some("web*"), &[])
    };
    let policies = [policy("all"), capped];
    let subject = |name| Subject { priority: Priority::High, namespace: "default", name, labels: &NONE };
    let given = |name| -> Vec<_> {
        let given = resolve(&policies, &subject(name));
        given.into_iter().map(|given| (given.setting, given.policy.policy_name.as_str())).collect()
    };
    assert_eq!(given("web-1"), [(Setting::Eviction, "all"), (Setting::CpuLimit, "capped")]);
    assert_eq!(given("db"), [(Setting::Eviction, "all")]);
}

#[test]
fn a_limit_is_the_lower_one_and_never_below_the_request() {
    let spec = |own: Limit<Millicores>| TaskSpec {
        profile: crate::spec::Profile {
            task_id: "t".parse().unwrap(),
            demand: crate::spec::Demand {
                cpu: Millicores(1_000),
                memory: Bytes(1 << 30),
                gpu_memory: None,
                network: None,
                storage_io: None,
            },
            priority: Priority::High,
            estimated_runtime_seconds: None,
        },
        command: vec!["true".into()],
        env: BTreeMap::new(),
        cwd: "/".into(),
        name: "true".into(),
        namespace: "default".into(),
        labels: BTreeMap::new(),
        limits: crate::limits::Limits { cpu: own, ..Default::default() },
        run_as: None,
        retries: 0,
        on_node_lost: Default::default(),
        gpus: Default::default(),
        image: None,
    };
    let limit = |own: Option<u64>, policy: Option<u64>| {
        let effective = Effective { cpu: policy.map(Millicores), ..Effective::default() };
        let own = own.map_or(Limit::Unlimited, |own| Limit::At(Millicores(own)));
        effective.cpu_limit(&spec(own)).at().map(|limit| limit.0)
    };
    assert_eq!(limit(None, None), None);
    assert_eq!(limit(Some(4_000), None), Some(4_000));
    assert_eq!(limit(None, Some(2_500)), Some(2_500));
    assert_eq!(limit(Some(4_000), Some(2_500)), Some(2_500));
    assert_eq!(limit(Some(2_000), Some(2_500)), Some(2_000));
    assert_eq!(limit(None, Some(500)), Some(1_000));

    let policies = [Policy {
        limits: PolicyLimits { cpu: Some(Millicores(3_000)), gpu_memory: Some(Bytes(5)) },
        preemption_enabled: true,
        ..policy("p")
    }];
    let effective = Effective::of(&policies, &spec(Limit::Unlimited));
    let expected = Effective {
        eviction: Some("p".into()),
        preemption: Some("p".into()),
        cpu: Some(Millicores(3_000)),
        gpu_memory: Some(Bytes(5)),
    };
    assert_eq!(effective, expected);

    let gpu_memory = |request: Option<u64>, own: Option<u64>, policy: Option<u64>| {
        let mut spec = spec(Limit::Unlimited);
        spec.profile.demand.gpu_memory = request.map(Bytes);
        spec.limits.gpu_memory = own.map_or(Limit::Unlimited, |own| Limit::At(Bytes(own)));
        let effective = Effective { gpu_memory: policy.map(Bytes), ..Effective::default() };
        effective.gpu_memory_limit(&spec).at().map(|limit| limit.0)
    };
    assert_eq!(gpu_memory(None, None, None), None);
    assert_eq!(gpu_memory(Some(4), None, None), Some(4), "nobody says more");
    assert_eq!(gpu_memory(Some(4), Some(8), None), Some(8));
    assert_eq!(gpu_memory(Some(4), None, Some(6)), Some(6));
    assert_eq!(gpu_memory(Some(4), Some(8), Some(6)), Some(6));
    assert_eq!(gpu_memory(Some(4), None, Some(2)), Some(4));
    assert_eq!(gpu_memory(None, None, Some(6)), Some(6));
}

#[test]
fn what_a_pattern_is() {
    for bad in ["", "a b", "a/b", "ä", "a\n", "?", "x".repeat(64).as_str()] {
        assert_eq!(bad.parse::<NamePattern>(), Err(InvalidPattern), "{bad:?}");
    }
    let matches = |pattern: &str, name: &str| pattern.parse::<NamePattern>().unwrap().matches(name);
    for (pattern, name, expected) in [
        ("etl", "etl", true),
        ("etl", "etl-1", false),
        ("etl*", "etl", true),
        ("*etl", "my-etl", true),
        ("a*a", "a", false),
        ("a*a", "aa", true),
        ("*b*", "abc", true),
        ("a*b*c", "a-b-b-c", true),
        ("a*bc*c", "abc", false),
        ("*", "", true),
        ("**", "käse/x", true),
    ] {
        assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
    }
}

/// The same, letter by letter.
fn reference(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (Some((b'*', rest)), _) => {
            reference(rest, name) || !name.is_empty() && reference(pattern, &name[1..])
        }
        (Some((letter, rest)), Some((first, others))) => letter == first && reference(rest, others),
        (None, None) => true,
        _ => false,
    }
}

fn any_labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map(select(vec!["a", "b", "c"]), select(vec!["x", "y"]), 0..3)
        .prop_map(|labels| labels.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let name = prop::option::of(select(vec!["e", "et", "e*", "*t", "*", "et*", "x*"]));
    let priority = select(vec![Priority::Low, Priority::High]);
    let namespace = select(vec!["default", "batch"]);
    let limit = prop::option::of(1_000..3_000u64);
    (name, any_labels(), priority, namespace, prop::option::of(1..1_000u32), limit).prop_map(
        |(name, labels, priority, namespace, eviction_threshold_permille, limit)| Policy {
            priority,
            namespace: namespace.into(),
            eviction_threshold_permille,
            selector: Selector { labels, name: name.map(|name| name.parse().unwrap()) },
            limits: PolicyLimits { cpu: limit.map(Millicores), gpu_memory: None },
            ..policy("")
        },
    )
}

/// Policies of different names, and the same in another order.
fn any_set() -> impl Strategy<Value = (Vec<Policy>, Vec<Policy>)> {
    prop::collection::vec(any_policy(), 0..8).prop_flat_map(|policies| {
        let named = |(index, policy)| Policy { policy_name: format!("p{index}"), ..policy };
        let policies: Vec<Policy> = policies.into_iter().enumerate().map(named).collect();
        (Just(policies.clone()), Just(policies).prop_shuffle())
    })
}

proptest! {
    #[test]
    fn a_pattern_matches_what_it_says(pattern in "[ab*]{1,6}", name in "[ab]{0,7}") {
        let found = pattern.parse::<NamePattern>().unwrap().matches(&name);
        prop_assert_eq!(found, reference(pattern.as_bytes(), name.as_bytes()));
    }

    #[test]
    fn neither_the_order_of_a_set_matters_nor_a_policy_that_is_not_for_the_task(
        (policies, shuffled) in any_set(),
        name in "[et]{0,3}",
        labels in any_labels(),
    ) {
        let subject = Subject { priority: Priority::High, namespace: "default", name: &name, labels: &labels };
        let given = resolve(&policies, &subject);
        prop_assert_eq!(&given, &resolve(&shuffled, &subject));

        let covering: Vec<Policy> = policies.iter().filter(|it| it.covers(&subject)).cloned().collect();
        prop_assert_eq!(&given, &resolve(&covering, &subject));

        for setting in Setting::ALL {
            let wanting: Vec<&Policy> = covering.iter().filter(|it| setting.is_in(it)).collect();
            let found = given.iter().find(|given| given.setting == setting);
            prop_assert_eq!(found.map_or(0, |given| given.overruled.len() + 1), wanting.len());
            prop_assert!(wanting.iter().all(|policy| setting.shown(policy).is_some()));
            // Whoever wins against all of them together wins against each.
            if let Some(given) = found {
                for Overruled { policy, rule } in &given.overruled {
                    let pair = resolve([*policy, given.policy], &subject);
                    let again = pair.iter().find(|given| given.setting == setting).unwrap();
                    prop_assert_eq!(again.policy, given.policy);
                    prop_assert_eq!(again.overruled[0].rule, *rule);
                }
            }
        }
    }
}
