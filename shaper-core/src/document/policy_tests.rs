//! Policies against the golden messages and the published schema.

#![expect(
    clippy::disallowed_methods,
    reason = "the tests read the documents, and regenerate what mirrors the code"
)]

use std::path::{Path, PathBuf};

use proptest::{prelude::*, sample::select};
use serde_json::{Value, json};

use super::{policy, policy_fields, policy_schema, schema::policy_table};

const REMEDY: &str =
    "look at the difference; to take it: SHAPER_REGENERATE=1 cargo nextest run -p shaper-core document";

fn folder(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Compares a file with what it is to be, or writes it.
fn mirrors(path: &Path, expected: &str) {
    if std::env::var_os("SHAPER_REGENERATE").is_some() {
        std::fs::write(path, expected).unwrap();
        return;
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(found, expected, "{}: {REMEDY}", path.display());
}

fn bad_policies() -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(folder("src/document/golden")).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn what_is_said_of_bad_policies() {
    let documents = bad_policies();
    assert!(documents.len() >= 30, "{}", documents.len());
    for (path, text) in documents {
        let error = policy("policy.yaml", &text).unwrap_err();
        let shown = format!("{error}\n");
        assert!(error.remedy.is_some() && shown.contains('^') && shown.contains(" | "), "{shown}");
        mirrors(&path.with_extension("txt"), &shown);
    }
}

#[test]
fn the_published_schema_is_that_of_the_parser() {
    mirrors(&folder("../docs/policy.schema.json"), &policy_schema());
    serde_json::from_str::<Value>(&policy_schema()).unwrap();
}

#[test]
fn the_fields_in_the_documentation_are_those_of_the_parser() {
    let path = folder("../docs/policies.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once("| field |").unwrap();
    let (_, after) = rest.split_once("\n\n").unwrap();
    mirrors(&path, &format!("{before}{}\n{after}", policy_table()));
}

#[test]
fn every_policy_in_the_documentation_is_one() {
    let text = std::fs::read_to_string(folder("../docs/policies.md")).unwrap();
    let mut blocks = 0;
    for block in text.split("```yaml\n").skip(1) {
        let (document, _) = block.split_once("```").unwrap();
        policy("docs/policies.md", document).map_err(|error| error.to_string()).unwrap();
        blocks += 1;
    }
    assert!(blocks >= 4, "{blocks}");
}

/// Whether a value fits a schema, as far as the schema of policies goes.
fn fits(schema: &Value, value: &Value) -> bool {
    for (keyword, wanted) in schema.as_object().unwrap() {
        let number = |value: &Value| value.as_f64().unwrap();
        let text_fits = |pattern: &Value, text: &str| {
            regex::Regex::new(pattern.as_str().unwrap()).unwrap().is_match(text)
        };
        let is = |kind: &Value| match kind.as_str().unwrap() {
            "object" => value.is_object(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "number" => value.is_number(),
            "integer" => value.is_number() && number(value).fract() == 0.0,
            other => panic!("{other}"),
        };
        let entries = || value.as_object().into_iter().flatten();
        let properties = schema.get("properties");
        let has_no_property = |name: &str| properties.is_none_or(|properties| properties.get(name).is_none());
        let holds = match keyword.as_str() {
            "$schema" | "title" | "description" | "examples" => true,
            "type" => wanted.as_array().map_or_else(|| is(wanted), |kinds| kinds.iter().any(is)),
            "enum" => wanted.as_array().unwrap().contains(value),
            "minimum" => !value.is_number() || number(value) >= number(wanted),
            "maximum" => !value.is_number() || number(value) <= number(wanted),
            "pattern" => value.as_str().is_none_or(|text| text_fits(wanted, text)),
            "required" => wanted
                .as_array()
                .unwrap()
                .iter()
                .all(|name| !value.is_object() || value.get(name.as_str().unwrap()).is_some()),
            "properties" => {
                entries().all(|(name, value)| wanted.get(name).is_none_or(|schema| fits(schema, value)))
            }
            "propertyNames" => entries().all(|(name, _)| fits(wanted, &Value::from(name.as_str()))),
            "additionalProperties" => {
                let mut others = entries().filter(|(name, _)| has_no_property(name));
                others.all(|(_, value)| match wanted {
                    Value::Bool(allowed) => *allowed,
                    schema => fits(schema, value),
                })
            }
            other => panic!("the check does not know the keyword {other}"),
        };
        if !holds {
            return false;
        }
    }
    true
}

/// A policy of which most fields are right, and some are not.
fn any_document() -> impl Strategy<Value = Value> {
    let names = vec![json!("web"), json!("a.b-c"), json!("../x"), json!(""), json!(7), json!("x".repeat(64))];
    let words = vec![json!("high"), json!("low"), json!("hgih"), json!(1), json!(null)];
    let patterns = vec![json!("etl-*"), json!("web"), json!(""), json!("a b"), json!(1)];
    let labels =
        vec![json!({}), json!({"team": "data", "a/b": ""}), json!({"a b": "c"}), json!({"a": 1}), json!([])];
    let cores = vec![
        json!(2.5),
        json!("250m"),
        json!("2.5"),
        json!(0),
        json!(1_000_001),
        json!("2 cores"),
        json!(null),
    ];
    let shares = vec![json!(0.9), json!(1), json!(0), json!(1.1), json!("0.9"), json!(true)];
    let windows = vec![json!(10), json!(0.5), json!(0.4), json!(3600), json!(3601)];
    let demands = vec![
        json!({"cpu_cores": 8, "memory_gb": 16}),
        json!({"cpu_cores": 8, "memory_gb": 16, "storage_io_ops": 500, "gpu_memory_gb": 0.5}),
        json!({"cpu_cores": 8}),
        json!({"cpu_cores": 8, "memory_gb": 16, "storage_io_ops": 0.5}),
        json!({"cpu_cores": 8, "memory_gb": 0}),
        json!(8),
    ];
    let field = |values: Vec<Value>| prop::option::weighted(0.6, select(values));
    let booleans = vec![json!(true), json!(false), json!("yes"), json!(1)];
    let head = (field(names.clone()), field(words), field(names), field(demands));
    let selector = (field(labels), field(patterns), prop::bool::weighted(0.1));
    let rest = (field(cores), field(shares), field(windows), field(booleans), prop::bool::weighted(0.1));
    (head, selector, rest).prop_map(|(head, selector, rest)| {
        let (policy_name, priority, namespace, demand) = head;
        let ((labels, name, is_odd_selector), (cpu, threshold, window, preempts, is_odd)) = (selector, rest);
        let object = |fields: Vec<(&str, Option<Value>)>| -> Option<Value> {
            let fields = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
            let fields: serde_json::Map<String, Value> = fields.collect();
            (!fields.is_empty()).then_some(Value::Object(fields))
        };
        let behavior = object(vec![
            ("eviction_threshold", threshold),
            ("window_seconds", window),
            ("preemption_enabled", preempts),
        ]);
        let selector = object(vec![
            ("labels", labels),
            ("name", name),
            ("matchLabels", is_odd_selector.then(|| json!({}))),
        ]);
        let fields = vec![
            ("policy_name", policy_name),
            ("priority", priority),
            ("namespace", namespace),
            ("resource_demand", demand),
            ("selector", selector),
            ("limits", object(vec![("cpu", cpu)])),
            ("behavior", behavior),
            ("mode", is_odd.then(|| json!("observe"))),
        ];
        object(fields).unwrap_or_else(|| json!({}))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn the_schema_takes_what_the_parser_takes_and_nothing_else(document in any_document()) {
        let schema: Value = serde_json::from_str(&policy_schema()).unwrap();
        let text = document.to_string();
        let read = policy("p.json", &text);
        prop_assert_eq!(fits(&schema, &document), read.is_ok(), "{} {:?}", text, read);
    }
}

#[test]
fn documents_that_are_right_and_wrong_in_each_field_are_told_apart() {
    let schema: Value = serde_json::from_str(&policy_schema()).unwrap();
    let whole = json!({
        "policy_name": "gold", "priority": "high", "namespace": "batch",
        "selector": {"labels": {"tier": "gold"}, "name": "etl-*"},
        "resource_demand": {"cpu_cores": 8, "memory_gb": 16},
        "limits": {"cpu": "2500m"},
        "behavior": {"eviction_threshold": 0.9, "preemption_enabled": true, "window_seconds": 2.5},
    });
    assert!(fits(&schema, &whole) && policy("p", whole.to_string()).is_ok());
    for pointer in [
        "/policy_name",
        "/priority",
        "/namespace",
        "/selector",
        "/selector/labels",
        "/selector/labels/tier",
        "/selector/name",
        "/resource_demand",
        "/resource_demand/cpu_cores",
        "/resource_demand/memory_gb",
        "/limits",
        "/limits/cpu",
        "/behavior",
        "/behavior/eviction_threshold",
        "/behavior/preemption_enabled",
        "/behavior/window_seconds",
    ] {
        let mut bad = whole.clone();
        *bad.pointer_mut(pointer).unwrap() = json!([{}]);
        assert!(!fits(&schema, &bad) && policy("p", bad.to_string()).is_err(), "{pointer}");
    }
}

#[test]
fn the_fields_of_a_policy_are_those_of_its_document() {
    let text = "policy_name: gold\npriority: high\nnamespace: batch\nselector: {labels: {team/a: data}, name: etl-*}\n\
                resource_demand: {cpu_cores: 8, memory_gb: 0.5}\nlimits: {cpu: 250m}\n\
                behavior: {eviction_threshold: 0.9, preemption_enabled: true, window_seconds: 2.5}\n";
    let fields = policy_fields(&policy("p", text).unwrap());
    let fields: Vec<String> = fields.iter().map(|(path, value)| format!("{path}={value}")).collect();
    let expected = [
        "priority=high",
        "namespace=batch",
        "selector.labels.team/a=data",
        "selector.name=etl-*",
        "resource_demand.cpu_cores=8",
        "resource_demand.memory_gb=0.5",
        "limits.cpu=0.25",
        "behavior.eviction_threshold=0.9",
        "behavior.preemption_enabled=true",
        "behavior.window_seconds=2.5",
    ];
    assert_eq!(fields, expected);
    let least = policy_fields(&policy("p", "policy_name: x\npriority: low\n").unwrap());
    assert_eq!(least, [("priority".to_owned(), "low".to_owned())]);
}
