//! The manifests of deploy/kubernetes: rendered as `kubectl apply -k` renders them, against Kubernetes' own schemas and against
//! what our programs know. What stands for an API server takes them in the stage `commands` (`tests/kubernetes`): there is no
//! real one to be had here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::bins::BinDir;
use crate::tally::Tally;
use crate::test::Stage;
use crate::{process, venv, workspace};

const FOLDER: &str = "deploy/kubernetes";
const REQUIREMENTS: &str = "deploy/kubernetes/requirements.txt";
/// Against which schemas: the oldest and the newest that kubernetes-validate brings.
const VERSIONS: [&str; 2] = ["1.32.0", "1.37.0"];
/// What `kubectl apply -k` takes.
const KUSTOMIZATIONS: [&str; 5] = [".", "agent", "broker", "etcd", "metrics"];
/// What is applied as it is.
const PLAIN: [&str; 1] = ["metrics/join.yaml"];
/// Starts the program that is its first argument.
const NSENTER: &str = "shaper-nsenter";

/// The folder with kubectl, and with Python that has what the manifests are tried with.
pub(crate) fn tools() -> Result<PathBuf> {
    let python = venv::python("kubernetes", REQUIREMENTS, &[], "forty megabytes")?;
    Ok(python.parent().context("the environment is in no folder")?.to_owned())
}

/// Renders all of them, and checks them.
pub(crate) fn test(bins: &BinDir) -> Result<Stage> {
    let start = Instant::now();
    let tools = tools()?;
    let mut tally = Tally::default();
    let mut count = |what: &str, checked: Result<()>| match checked {
        Ok(()) => {
            println!("kubernetes: {what}: ok");
            tally += Tally { passed: 1, ..Tally::default() };
        }
        Err(error) => {
            println!("kubernetes: {what}: FAILED: {error:#}");
            tally += Tally::FAILURE;
        }
    };
    for (name, file) in rendered(&tools)? {
        for version in VERSIONS {
            let mut validate = Command::new(tools.join("kubernetes-validate"));
            validate.args(["--strict", "--quiet", "--kubernetes-version", version]).arg(&file);
            // What is wrong it says on its standard output.
            count(&format!("{name}, {version}"), process::run(&mut validate));
        }
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let documents = documents(&text)?;
        count(&format!("{name}, options"), unknown_options(&documents, bins));
        for (rules, text) in documents.iter().filter_map(|document| rules(document)) {
            count(&format!("{name}, {rules}"), adoption(bins, text));
        }
    }
    Ok(Stage { name: "kubernetes".to_owned(), tally: Some(tally), took: start.elapsed() })
}

/// Files below `target` with what is applied, each by its name.
fn rendered(tools: &Path) -> Result<BTreeMap<&'static str, PathBuf>> {
    let folder = workspace::root().join(FOLDER);
    let mut files: BTreeMap<_, _> = PLAIN.into_iter().map(|name| (name, folder.join(name))).collect();
    for name in KUSTOMIZATIONS {
        let mut kubectl = Command::new(tools.join("kubectl"));
        let text = process::read(kubectl.arg("kustomize").arg(folder.join(name)))?;
        let shown = if name == "." { "all" } else { name };
        let file = workspace::target().join(format!("kubernetes/rendered-{shown}.yaml"));
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        files.insert(name, file);
    }
    Ok(files)
}

/// The documents of a stream.
fn documents(text: &str) -> Result<Vec<Value>> {
    serde_yaml::from_multiple(text).context("cannot read a rendered manifest")
}

/// The pod that an object has made.
fn pod(document: &Value) -> Option<&Value> {
    document.pointer("/spec/template/spec")
}

/// All containers of an object's pods.
fn containers(document: &Value) -> impl Iterator<Item = &Value> {
    let of = |list: &str| pod(document).and_then(|pod| pod.get(list)?.as_array()).into_iter().flatten();
    of("initContainers").chain(of("containers"))
}

fn words(list: Option<&Value>) -> Vec<&str> {
    list.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Each command line of a container: its own, and those of its probes.
fn command_lines(container: &Value) -> Vec<Vec<&str>> {
    let mut lines = vec![[words(container.get("command")), words(container.get("args"))].concat()];
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        lines.push(words(container.pointer(&format!("/{probe}/exec/command"))));
    }
    lines.retain(|line| !line.is_empty());
    lines
}

/// The program that a command line starts in the end, its subcommands, and its options by their names.
fn parsed<'l>(line: &[&'l str]) -> Result<(&'l str, Vec<&'l str>, Vec<&'l str>)> {
    let base = |path: &'l str| path.rsplit('/').next().unwrap_or(path);
    let mut words = line.iter().copied().skip_while(|word| base(word) == NSENTER);
    let program = words.next().map(base).context("a command line without a program")?;
    let rest: Vec<_> = words.collect();
    let end =
        rest.iter().position(|word| word.starts_with('-') || word.starts_with('/')).unwrap_or(rest.len());
    let options = rest.iter().filter(|word| word.starts_with('-'));
    let options = options.map(|word| word.split_once('=').map_or(*word, |(name, _)| name)).collect();
    Ok((program, rest[..end].to_vec(), options))
}

/// Whether clap's help has an option of this very name.
fn has_option(help: &str, option: &str) -> bool {
    let mut rest = help;
    while let Some((_, behind)) = rest.split_once(option) {
        if !behind.starts_with(|next: char| next == '-' || next.is_alphanumeric()) {
            return true;
        }
        rest = behind;
    }
    false
}

fn unknown_options(documents: &[Value], bins: &BinDir) -> Result<()> {
    let mut unknown = BTreeSet::new();
    for line in documents.iter().flat_map(containers).flat_map(command_lines) {
        let (program, subcommands, options) = parsed(&line)?;
        let help = process::read(Command::new(bins.bin(program)).args(&subcommands).arg("--help"))?;
        let of_it = options.into_iter().filter(|option| !has_option(&help, option));
        unknown.extend(of_it.map(|option| format!("{program} {} has no {option}", subcommands.join(" "))));
    }
    if unknown.is_empty() { Ok(()) } else { bail!("{}", unknown.into_iter().collect::<Vec<_>>().join("; ")) }
}

/// The rules of adoption in a ConfigMap.
fn rules(document: &Value) -> Option<(&'static str, &str)> {
    const KEY: &str = "adopt.yaml";
    Some((KEY, document.get("data")?.get(KEY)?.as_str()?))
}

/// Whether the agent takes these rules.
fn adoption(bins: &BinDir, rules: &str) -> Result<()> {
    let file = workspace::target().join("kubernetes/adopt.yaml");
    fs::write(&file, rules).with_context(|| format!("cannot write {}", file.display()))?;
    process::read(Command::new(bins.bin("shaper-agent")).args(["adoption", "--check"]).arg(&file)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image;

    fn manifest(name: &str) -> Vec<Value> {
        documents(&fs::read_to_string(workspace::root().join(FOLDER).join(name)).unwrap()).unwrap()
    }

    fn of_kind(name: &str, kind: &str) -> Value {
        manifest(name).into_iter().find(|document| document["kind"] == kind).unwrap()
    }

    fn container<'d>(document: &'d Value, name: &str) -> &'d Value {
        containers(document).find(|container| container["name"] == name).unwrap()
    }

    /// What a unit's bounding set has, without `CAP_`.
    fn of_unit(name: &str) -> BTreeSet<String> {
        let unit = fs::read_to_string(workspace::root().join("packaging/systemd").join(name)).unwrap();
        let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
        line.split_whitespace().map(|word| word.trim_start_matches("CAP_").to_owned()).collect()
    }

    fn added(container: &Value) -> BTreeSet<String> {
        let capabilities = &container["securityContext"]["capabilities"];
        assert_eq!(words(capabilities.get("drop")), ["ALL"]);
        words(capabilities.get("add")).into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn containers_have_the_capabilities_of_the_units() {
        let agents = of_kind("agent/agent.yaml", "DaemonSet");
        let agent = container(&agents, "agent");
        // What the program has that starts the agent, and lets go of.
        let nsenter = fs::read_to_string(workspace::root().join("shaper-nsenter/src/main.rs")).unwrap();
        let mut expected = of_unit("shaper-agent.service");
        for dropped in ["SYS_ADMIN", "SETPCAP"] {
            assert!(nsenter.contains(&format!("CapabilitySet::{dropped}")), "{dropped}");
            assert!(expected.insert(dropped.to_owned()), "{dropped}");
        }
        assert!(words(agent.get("command"))[0].ends_with(NSENTER));
        assert_eq!(added(agent), expected);
        assert_eq!(added(container(&agents, "opener")), of_unit("shaper-opener.service"));

        let broker = of_kind("broker/broker.yaml", "StatefulSet");
        assert_eq!(added(container(&broker, "broker")), of_unit("shaper-broker.service"));
        assert_eq!(pod(&broker).unwrap()["securityContext"]["runAsUser"], image::BROKER);
        for container in containers(&agents).chain(containers(&broker)) {
            assert_ne!(container["securityContext"]["privileged"], true);
            assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
        }
    }

    #[test]
    fn the_agents_pods_are_of_the_class_guaranteed() {
        let agents = of_kind("agent/agent.yaml", "DaemonSet");
        for container in containers(&agents) {
            let resources = &container["resources"];
            assert!(resources["limits"]["cpu"].is_string() && resources["limits"]["memory"].is_string());
            assert_eq!(resources["requests"], resources["limits"], "{}", container["name"]);
        }
    }

    #[test]
    fn what_is_mounted_is_there_and_of_this_version() {
        for (file, kind) in [("agent/agent.yaml", "DaemonSet"), ("broker/broker.yaml", "StatefulSet")] {
            let document = of_kind(file, kind);
            let named = |list: Option<&Value>| -> BTreeSet<String> {
                let list = list.and_then(Value::as_array).into_iter().flatten();
                list.map(|item| {
                    item["name"].as_str().or(item["metadata"]["name"].as_str()).unwrap().to_owned()
                })
                .collect()
            };
            let mut volumes = named(pod(&document).unwrap().get("volumes"));
            volumes.extend(named(document.pointer("/spec/volumeClaimTemplates")));
            let mounted: BTreeSet<_> =
                containers(&document).flat_map(|container| named(container.get("volumeMounts"))).collect();
            assert_eq!(mounted, volumes, "{file}");
        }
        for name in ["agent", "broker"] {
            let kustomization = of_kind(&format!("{name}/kustomization.yaml"), "Kustomization");
            assert_eq!(kustomization["images"][0]["newTag"], env!("CARGO_PKG_VERSION"));
        }
    }

    #[test]
    fn command_lines_are_taken_apart() {
        let line =
            ["/usr/lib/shaper/shaper-nsenter", "/usr/lib/shaper/shaper-agent", "--adopt=/a/b", "--debug-bpf"];
        assert_eq!(parsed(&line).unwrap(), ("shaper-agent", vec![], vec!["--adopt", "--debug-bpf"]));
        let line = ["/usr/bin/shaper", "pki", "renew", "--before-days=30", "/var/lib"];
        assert_eq!(parsed(&line).unwrap(), ("shaper", vec!["pki", "renew"], vec!["--before-days"]));
        let help = "  --store-dir <DIR>\n  -s, --store <STORE>\n";
        assert!(has_option(help, "--store") && has_option(help, "--store-dir") && has_option(help, "-s"));
        assert!(!has_option(help, "--stor") && !has_option("  --store-dir", "--store"));
    }
}
