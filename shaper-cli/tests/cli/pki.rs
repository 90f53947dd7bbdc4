//! Certificates, made and replaced without asking anybody.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use crate::host::texts;

fn pki(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shaper"));
    command.arg("pki").args(arguments).current_dir(directory).output().unwrap()
}

fn done(directory: &Path, arguments: &[&str]) -> String {
    let output = pki(directory, arguments);
    let (stdout, stderr, code) = texts(&output);
    assert_eq!((stderr, code), ("", Some(0)), "{arguments:?}");
    stdout.to_owned()
}

#[test]
fn a_certificate_is_made_shown_and_replaced() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let told = done(root, &["init", "--ca-dir", "ca", "--trust-domain", "lab"]);
    assert!(told.contains("spiffe://lab/broker/b"), "{told}");
    let node = "spiffe://lab/node/n1";
    done(root, &["issue", "--ca-dir", "ca", "--host", "n1.lan", "--host", "::1", "--days", "2", node, "n1"]);
    let shown = done(root, &["show", "n1"]);
    assert!(shown.contains(node) && shown.contains("n1.lan, ::1"), "{shown}");
    let two_days = ["good for 1 days and 23 hours more", "good for 2 days and 0 hours more"];
    assert!(two_days.iter().any(|validity| shown.contains(validity)), "{shown}");
    let before = fs::read_to_string(root.join("n1/identity.pem")).unwrap();
    done(root, &["rotate", "--ca-dir", "ca", "--days", "30", "n1"]);
    let after = fs::read_to_string(root.join("n1/identity.pem")).unwrap();
    assert_ne!(before.lines().nth(1), after.lines().nth(1), "the key is another");
    let shown = done(root, &["show", "n1"]);
    assert!(shown.contains(node) && shown.contains("n1.lan, ::1"), "{shown}");
    assert!(
        ["good for 29 days", "good for 30 days"].iter().any(|validity| shown.contains(validity)),
        "{shown}"
    );
}

#[test]
fn nothing_is_overwritten_and_no_name_is_made_up() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    done(root, &["init", "--ca-dir", "ca"]);
    let node = "spiffe://cluster.local/node/n1";
    done(root, &["issue", "--ca-dir", "ca", node, "n1"]);
    let key = fs::read(root.join("ca/ca.key")).unwrap();
    for (arguments, told) in [
        (&["init", "--ca-dir", "ca"][..], "ca/ca.key is there already"),
        (&["init", "--ca-dir", "other", "--trust-domain", "Not/One"], "the trust domain"),
        (&["issue", "--ca-dir", "ca", node, "n1"], "n1/identity.pem is there already"),
        (&["issue", "--ca-dir", "ca", "spiffe://cluster.local/root/n1", "x"], "`root` is no role"),
        (&["issue", "--ca-dir", "ca", "--host", "a/b", node, "x"], "neither a host name nor an address"),
        (&["issue", "--ca-dir", "none", node, "x"], "cannot read none/ca.pem"),
        (&["rotate", "--ca-dir", "ca", "none"], "none/identity.pem"),
    ] {
        let output = pki(root, arguments);
        let (stdout, stderr, code) = texts(&output);
        assert_eq!((stdout, code), ("", Some(2)), "{arguments:?}: {stderr}");
        assert!(stderr.contains(told), "{arguments:?}: {stderr}");
    }
    assert_eq!(fs::read(root.join("ca/ca.key")).unwrap(), key);
    assert!(!root.join("x").exists() && !root.join("other").exists());
}
