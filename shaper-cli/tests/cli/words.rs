//! What the command line brings for people's shells: contexts, completions, manual pages, and lists for scripts.

use std::process::Output;

use crate::{
    fake::broker::{self, spec},
    host::{Host, texts},
};

/// Without what the environment says of servers.
fn shaper(host: &Host, args: &[&str]) -> Output {
    host.command(args).env_remove("SHAPER_SOCKET").env_remove("SHAPER_BROKER").output().unwrap()
}

#[test]
fn a_context_stands_for_addresses_until_others_are_said() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    let socket = host.broker_socket().display().to_string();
    let nothing =
        "shaper: name at least one of --broker, --socket and --tls-dir, which the context is to keep\n";
    assert_eq!(texts(&shaper(&host, &["context", "set", "lab"])), ("", nothing, Some(2)));
    assert_eq!(texts(&shaper(&host, &["context", "set", "lab", "--broker", &socket])), ("", "", Some(0)));

    // Named, and then the current one.
    let tasks = ["get", "tasks", "-o", "name"];
    let named = shaper(&host, &[&["--context", "lab"][..], &tasks].concat());
    assert_eq!(texts(&named), ("etl\n", "", Some(0)));
    assert_eq!(texts(&shaper(&host, &["context", "use", "lab"])), ("", "", Some(0)));
    assert_eq!(texts(&shaper(&host, &tasks)), ("etl\n", "", Some(0)));
    let list = shaper(&host, &["context", "list"]);
    let expected = format!(
        "CURRENT  NAME  BROKER{0}  SOCKET  CERTIFICATE\n*        lab   {socket}  -       -\n",
        " ".repeat(socket.len() - "BROKER".len())
    );
    assert_eq!(texts(&list), (expected.as_str(), "", Some(0)));

    // What is said counts.
    let elsewhere = shaper(&host, &[&["--broker", "/nowhere.sock"][..], &tasks].concat());
    assert_eq!(elsewhere.status.code(), Some(1), "{elsewhere:?}");
    let unknown = shaper(&host, &[&["--context", "prod"][..], &tasks].concat());
    assert_eq!(texts(&unknown), ("", "shaper: there is no context `prod`; there are: lab\n", Some(2)));
    assert_eq!(texts(&shaper(&host, &["context", "delete", "lab"])), ("", "", Some(0)));
    assert_eq!(texts(&shaper(&host, &["context", "list"])).2, Some(0));
    assert_ne!(shaper(&host, &tasks).status.code(), Some(0));
}

#[test]
fn who_has_no_home_has_no_contexts() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    for home in ["/dev/null", "/nonexistent", ""] {
        let mut command = host.command(&["get", "tasks", "-o", "name"]);
        let output = command.env_remove("XDG_CONFIG_HOME").env("HOME", home).output().unwrap();
        assert_eq!(texts(&output), ("etl\n", "", Some(0)), "{home}");
    }
}

#[test]
fn lists_are_yaml_or_names_where_scripts_want_them() {
    let host = Host::new();
    let _broker = host.start_broker();
    host.cluster.add(broker::task(spec("etl")));
    host.cluster.add(broker::task(spec("web")));
    assert_eq!(texts(&host.shaper(&["get", "tasks", "-o", "name"])), ("etl\nweb\n", "", Some(0)));
    assert_eq!(texts(&host.shaper(&["get", "policies", "-o", "name"])), ("", "", Some(0)));
    let yaml = host.shaper(&["get", "tasks", "-o", "yaml"]);
    let yaml: serde_json::Value = serde_yaml::from_str(texts(&yaml).0).unwrap();
    let json = host.shaper(&["get", "tasks", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(yaml, json);
    assert_eq!(yaml[1]["spec"]["profile"]["task_id"], "web");
}

#[test]
fn shells_and_manuals_know_every_command() {
    let host = Host::new();
    for (shell, sign) in [("bash", "complete -F"), ("zsh", "#compdef shaper"), ("fish", "complete -c shaper")]
    {
        let output = host.shaper(&["completions", shell]);
        let (text, said, code) = texts(&output);
        assert_eq!((said, code), ("", Some(0)));
        assert!(text.contains(sign) && text.contains("rollback"), "{shell}");
    }
    let directory = host.file("man", "");
    std::fs::remove_file(&directory).unwrap();
    assert_eq!(texts(&host.shaper(&["man", &directory])), ("", "", Some(0)));
    let page = |name: &str| std::fs::read_to_string(format!("{directory}/{name}.1")).unwrap();
    assert!(page("shaper").contains("Exit codes"));
    assert!(page("shaper-policy-rollback").contains("revision"));
}
