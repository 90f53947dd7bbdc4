//! The way to a cluster over TCP as the README shows it: an authority, a token, a node that joins.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use shaper_tests::{
    bins::binary,
    shaper::{REFUSED, Shaper},
};
use tempfile::TempDir;

/// A daemon that listens over TCP, until it is dropped.
struct Daemon {
    child: Child,
    address: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(name: &str, directory: &Path, arguments: &[&str]) -> Daemon {
        let mut command = Command::new(binary(name));
        command.args(["--listen", "tcp://127.0.0.1:0"]).args(arguments).current_dir(directory);
        let child = command.env("NO_COLOR", "1").stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{name}: {error}"));
        let log = child.stderr.take().expect("it was asked for");
        let mut lines = BufReader::new(log).lines().map_while(Result::ok);
        let address = lines.find_map(|line| {
            let (_, address) = line.split_once("certificate address=")?;
            Some(format!("https://{}", address.trim()))
        });
        let address = address.unwrap_or_else(|| panic!("{name} does not listen"));
        // Its log must be read, or it would wait.
        thread::spawn(move || lines.for_each(drop));
        Daemon { child, address }
    }
}

#[test]
fn a_node_joins_by_a_token_and_then_renews_its_certificate() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let [ca, ann, broker, n1, n2, state] = ["ca", "ann", "broker", "n1", "n2", "state"].map(at);
    let pki = Shaper::new(&binary("shaper"), &PathBuf::from("/nonexistent"), 0);
    let said = pki.ok(&["pki", "init", "--ca-dir", &ca]);
    assert!(said.contains("made an authority of cluster.local"), "{said}");
    pki.ok(&["pki", "issue", "--ca-dir", &ca, "spiffe://cluster.local/operator/ann", &ann]);
    pki.ok(&["pki", "issue", "--ca-dir", &ca, "spiffe://cluster.local/broker/b", &broker]);
    let authority = Daemon::start("shaper-authority", directory.path(), &["--ca-dir", &ca]);
    let to_authority = |command: &'static str| ["pki", command, "--authority", authority.address.as_str()];

    let node = "spiffe://cluster.local/node/n1";
    let token = pki.ok(&[&to_authority("token")[..], &["--tls-dir", &ann, node]].concat());
    let join = |directory: &str| {
        pki.call_with(&[&to_authority("join")[..], &[directory]].concat(), token.as_bytes())
    };
    let joined = join(&n1);
    assert!(
        joined.code == 0 && joined.stdout.contains("joined as spiffe://cluster.local/node/n1"),
        "{joined:?}"
    );
    let again = join(&n2);
    assert!(again.code == REFUSED && again.stderr.contains("was used before"), "{again:?}");
    let into_the_same = join(&n1);
    assert!(
        into_the_same.code == REFUSED && into_the_same.stderr.contains("is there already"),
        "{into_the_same:?}"
    );

    let shown = || pki.ok(&["pki", "show", &n1]);
    let first = shown();
    assert!(first.contains(node) && first.contains("good for"), "{first}");
    let said = pki.ok(&[&to_authority("renew")[..], &["--before-days", "30", &n1]].concat());
    assert!(said.contains("left the certificate"), "{said}");
    let serial = |text: &str| text.lines().find(|line| line.starts_with("serial")).map(str::to_owned);
    assert_eq!(serial(&shown()), serial(&first));
    let said = pki.ok(&[&to_authority("renew")[..], &[&n1]].concat());
    assert!(said.contains("replaced the certificate"), "{said}");
    assert_ne!(serial(&shown()), serial(&first));

    // Who has joined is known to the broker, and may do what a node may.
    let socket = at("b.sock");
    let arguments = ["--listen", &socket, "--store", "memory", "--state-dir", &state, "--tls-dir", &broker];
    let broker = Daemon::start("shaper-broker", directory.path(), &arguments);
    let ask = |tls: &str| pki.call(&["--broker", &broker.address, "--tls-dir", tls, "get", "nodes"]);
    let as_operator = ask(&ann);
    assert_eq!(as_operator.code, 0, "{as_operator:?}");
    let as_node = ask(&n1);
    let known = as_node.stderr.contains("spiffe://cluster.local/node/n1 (node) may not call");
    assert!(as_node.code == REFUSED && known, "{as_node:?}");
}
