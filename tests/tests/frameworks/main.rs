//! The Python package against real frameworks, and a real agent: `cargo xtask test --all`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use shaper_tests::{agent::Options, leftovers::Leftovers};

/// Python with the frameworks and the package, as xtask makes it.
fn python() -> PathBuf {
    let named = env::var_os("SHAPER_PYTHON").map(PathBuf::from);
    let python = named.unwrap_or_else(|| root().join("target/python/bin/python"));
    assert!(python.is_file(), "{}: `cargo xtask test --all` makes it", python.display());
    python
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("this is where it was built")
}

/// A process of the package's folder; what it prints is shown.
#[track_caller]
fn succeeds(command: &mut Command) {
    let status = command.current_dir(root().join("python")).status();
    let status = status.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// Runs these tests with an agent of their own, of which nothing is left.
#[track_caller]
fn with_an_agent(tests: &[&str]) {
    // A limit is to hold over the few seconds that are measured.
    let agent = Options::default().with(&["--cpu-burst-pool", "off"]).start();
    let mut pytest = Command::new(python());
    pytest.args(["-m", "pytest", "-q", "-s", "-m", "frameworks"]).args(tests);
    pytest.env("SHAPER_SOCKET", agent.socket()).env("SHAPER_BROKER", "");
    pytest.env("SHAPER_CLI", agent.directory().join("shaper"));
    succeeds(&mut pytest);
    let leftovers = Leftovers::of(&agent, None);
    agent.shaper().ok(&["release", "--all"]);
    leftovers.assert_none();
}

#[test]
fn ray() {
    with_an_agent(&["tests/test_ray.py"]);
}

#[test]
fn dask() {
    with_an_agent(&["tests/test_dask.py", "tests/test_dask_alone.py"]);
}

#[test]
fn the_package_by_itself() {
    succeeds(Command::new(python()).args(["-m", "pytest", "-q", "-m", "not frameworks"]));
    succeeds(Command::new(python()).args(["-m", "mypy"]));
}
