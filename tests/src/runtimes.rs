//! Container runtimes: the real ones, unpacked and not installed, each with a container that does nothing.

use std::{
    env,
    env::consts::ARCH,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{bins::binary, cgroup::unique_name, time::happens};

/// What runs in a container.
const IDLE: [&str; 3] = ["/bin/busybox", "sleep", "6000"];

/// The folder that Debian's packages of them are unpacked in.
fn unpacked() -> PathBuf {
    env::var_os("SHAPER_RUNTIMES").expect("`cargo xtask` names the runtimes").into()
}

/// A command whose program, and what that starts, are looked up among the runtimes first.
fn command(program: &str) -> Command {
    let folders = ["usr/bin", "usr/sbin"].map(|folder| unpacked().join(folder));
    let found = folders.iter().map(|folder| folder.join(program)).find(|path| path.exists());
    with_unpacked(Command::new(found.unwrap_or_else(|| panic!("there is no {program}"))))
}

/// What it starts is looked up among the runtimes first, and their libraries too.
fn with_unpacked(mut command: Command) -> Command {
    let unpacked = unpacked();
    let path = env::var_os("PATH").unwrap_or_default();
    let programs = ["usr/bin", "usr/sbin"].map(|folder| unpacked.join(folder));
    let programs = programs.into_iter().chain(env::split_paths(&path));
    command.env("PATH", env::join_paths(programs).expect("they have no colon"));
    command.env("LD_LIBRARY_PATH", libraries());
    command
}

/// Where their libraries are.
fn libraries() -> OsString {
    let folders = ["usr/lib", "lib"].map(|folder| unpacked().join(folder).join(format!("{ARCH}-linux-gnu")));
    env::join_paths(folders).expect("they have no colon")
}

#[track_caller]
fn say(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}", said.trim());
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A root with busybox.
fn make_root(at: &Path) {
    fs::create_dir_all(at.join("bin")).expect("it is ours");
    fs::copy("/bin/busybox", at.join("bin/busybox")).expect("busybox is installed");
}

/// How a runtime makes cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// By itself.
    Cgroupfs,
    /// Through systemd, as a scope.
    Systemd,
}

/// An OCI runtime: its program and what it is always told.
#[derive(Clone, Debug)]
pub struct Oci(Vec<OsString>);

impl Oci {
    /// One of those that are unpacked.
    pub fn plain(program: &str) -> Oci {
        Oci(vec![command(program).get_program().to_owned()])
    }

    fn command(&self) -> Command {
        let mut command = with_unpacked(Command::new(&self.0[0]));
        command.args(&self.0[1..]);
        command
    }
}

/// An emulated machine loads kernel programs for seconds.
const PATIENCE: &str = "patience_seconds: 60\n";

/// `shaper-runtime` in front of another runtime.
pub struct Shim {
    directory: TempDir,
    runtime: PathBuf,
}

impl Shim {
    /// It asks the agent there; `fail`: `open` or `closed`.
    pub fn new(program: &str, agent: &Path, fail: &str) -> Shim {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let Oci(words) = Oci::plain(program);
        let shim = Shim { directory, runtime: words[0].clone().into() };
        shim.asks(agent, fail);
        shim
    }

    /// It asks another agent from now on.
    pub fn asks(&self, agent: &Path, fail: &str) {
        let (runtime, agent) = (self.runtime.display(), agent.display());
        fs::write(self.file(), format!("runtime: {runtime}\nagent: {agent}\nfail: {fail}\n{PATIENCE}"))
            .expect("it is ours");
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("runtime.yaml")
    }

    fn option(&self) -> String {
        format!("--shaper-config={}", self.file().display())
    }

    /// As a runtime.
    pub fn oci(&self) -> Oci {
        Oci(vec![binary("shaper-runtime").into(), self.option().into()])
    }

    /// As a program, for those that give it no arguments of their own.
    pub fn program(&self) -> PathBuf {
        let path = self.directory.path().join("shaper-runtime");
        let mut command = with_unpacked(Command::new(binary("shaper-runtime")));
        write_program(&path, command.arg(self.option()));
        path
    }
}

/// Writes a program that is a command with more arguments: who starts it may have an environment of his own.
fn write_program(path: &Path, command: &Command) {
    let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    let variables = variables.map(|(name, value)| format!("{}='{}'", name.display(), value.display()));
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let words = words.map(|word| format!("'{}'", word.display()));
    let line = variables.chain(["exec".to_owned()]).chain(words).collect::<Vec<_>>().join(" ");
    fs::write(path, format!("#!/bin/sh\n{line} \"$@\"\n")).expect("it is ours");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it is ours");
}

/// An image of busybox, as those take it who import one.
fn image(directory: &Path) -> PathBuf {
    let (root, tar) = (directory.join("rootfs"), directory.join("image.tar"));
    make_root(&root);
    say(Command::new("tar").arg("-C").arg(root).arg("-cf").arg(&tar).arg("."));
    tar
}

/// A container that is to be run by an OCI runtime.
pub struct Bundle {
    directory: TempDir,
    id: String,
    driver: Driver,
    config: Value,
}

impl Bundle {
    /// One that does nothing.
    pub fn new(driver: Driver) -> Bundle {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        make_root(&directory.path().join("rootfs"));
        say(command("runc").arg("spec").current_dir(directory.path()));
        let config = fs::read(directory.path().join("config.json")).expect("runc has written it");
        let mut config: Value = serde_json::from_slice(&config).expect("runc has written it");
        let id = unique_name();
        config["process"]["args"] = json!(IDLE);
        config["process"]["terminal"] = json!(false);
        config["linux"]["cgroupsPath"] = match driver {
            Driver::Cgroupfs => json!(format!("/{id}")),
            Driver::Systemd => json!(format!("system.slice:shaper:{id}")),
        };
        Bundle { directory, id, driver, config }
    }

    /// With those `linux.resources` (config-linux.md of the OCI runtime specification).
    #[must_use]
    pub fn with_resources(mut self, resources: &Value) -> Bundle {
        self.config["linux"]["resources"] = resources.clone();
        self
    }

    /// With annotations.
    #[must_use]
    pub fn annotated(mut self, annotations: &Value) -> Bundle {
        self.config["annotations"] = annotations.clone();
        self
    }

    /// Running something else.
    #[must_use]
    pub fn running(mut self, words: &[&str]) -> Bundle {
        self.config["process"]["args"] = json!(words);
        self
    }

    /// With another configuration.
    #[must_use]
    pub fn changed(mut self, change: impl FnOnce(&mut Value)) -> Bundle {
        change(&mut self.config);
        self
    }

    /// Its cgroup, from the mount point on.
    pub fn cgroup(&self) -> PathBuf {
        match self.driver {
            Driver::Cgroupfs => self.id.clone().into(),
            Driver::Systemd => format!("system.slice/shaper-{}.scope", self.id).into(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Runs it, beside its caller.
    #[track_caller]
    pub fn run(self, oci: &Oci) -> Container {
        self.write();
        let container = Container { bundle: self, oci: oci.clone() };
        let mut run = container.command();
        run.args(["run", "--detach", "--bundle"]).arg(container.bundle.path()).arg(&container.bundle.id);
        // What it leaves running must not hold our pipes.
        let status = run.stdin(Stdio::null()).stdout(Stdio::null()).status();
        assert!(status.is_ok_and(|status| status.success()), "{run:?}");
        container
    }

    /// How long it takes to run it to its end, once more.
    pub fn time(&self, oci: &Oci) -> Duration {
        self.write();
        let mut run = oci.command();
        run.arg("--root").arg(self.path().join("state"));
        run.args(["run", "--bundle"]).arg(self.path()).arg(&self.id).stdin(Stdio::null());
        let start = Instant::now();
        say(&mut run);
        start.elapsed()
    }

    /// Runs it to its end; what came of it.
    pub fn output(self, oci: &Oci) -> Output {
        self.write();
        let container = Container { bundle: self, oci: oci.clone() };
        let mut run = container.command();
        run.args(["run", "--bundle"]).arg(container.bundle.path()).arg(&container.bundle.id);
        let output = run.stdin(Stdio::null()).output();
        output.unwrap_or_else(|error| panic!("{run:?}: {error}"))
    }

    fn write(&self) {
        fs::write(self.path().join("config.json"), self.config.to_string()).expect("it is ours");
    }
}

/// A container that an OCI runtime runs. Dropping it deletes it.
pub struct Container {
    bundle: Bundle,
    oci: Oci,
}

impl Container {
    fn command(&self) -> Command {
        let mut command = self.oci.command();
        command.arg("--root").arg(self.bundle.path().join("state"));
        if self.bundle.driver == Driver::Systemd {
            command.arg("--systemd-cgroup");
        }
        command
    }

    /// Its cgroup, from the mount point on.
    pub fn cgroup(&self) -> PathBuf {
        self.bundle.cgroup()
    }

    /// `runc update`
    pub fn update(&self, options: &[&str]) {
        say(self.command().arg("update").args(options).arg(&self.bundle.id));
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let deleted = self.command().args(["delete", "--force", &self.bundle.id]).status();
        if !deleted.is_ok_and(|status| status.success()) {
            eprintln!("cannot delete the container {}", self.bundle.id);
        }
    }
}

/// dockerd with a place of its own, without a network. Dropping it ends it, with its containers.
pub struct Docker {
    daemon: Child,
    directory: TempDir,
}

impl Docker {
    /// Starts it, and imports an image.
    pub fn start() -> Docker {
        Docker::start_with(&json!({}))
    }

    /// Where `--runtime shaper` is that.
    pub fn start_before(shim: &Shim) -> Docker {
        let runtime = json!({ "path": binary("shaper-runtime"), "runtimeArgs": [shim.option()] });
        Docker::start_with(&json!({ "runtimes": { "shaper": runtime } }))
    }

    /// With settings (`daemon.json`).
    fn start_with(settings: &Value) -> Docker {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let at = |name: &str| directory.path().join(name).display().to_string();
        let log = fs::File::create(at("log")).expect("it is ours");
        fs::write(at("daemon.json"), settings.to_string()).expect("it is ours");
        let daemon = command("dockerd")
            .args(["--config-file", &at("daemon.json")])
            .args(["--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"])
            .args(["--data-root", &at("data"), "--exec-root", &at("exec"), "--pidfile", &at("pid")])
            .args(["--host", &format!("unix://{}", at("socket"))])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("it is open"))
            .stderr(log)
            .spawn()
            .expect("dockerd can be started");
        let mut docker = Docker { daemon, directory };
        let answers = |docker: &mut Docker| {
            assert!(docker.daemon.try_wait().expect("it is ours").is_none(), "dockerd: {}", docker.said());
            docker.command().arg("version").output().is_ok_and(|output| output.status.success())
        };
        // An emulated machine takes its time.
        let answered = (0..4).any(|_| happens(|| answers(&mut docker)));
        assert!(answered, "dockerd: {}", docker.said());
        let tar = image(docker.directory.path());
        say(docker.command().arg("import").arg(tar).arg("idle"));
        docker
    }

    /// What tells an agent that it runs its tasks' containers.
    pub fn options(&self) -> Vec<String> {
        let program = self.directory.path().join("docker");
        write_program(&program, &command("docker"));
        let socket = self.socket().display().to_string();
        vec![format!("--containers=docker={}", program.display()), format!("--docker={socket}")]
    }

    /// Its containers, those that have ended included.
    pub fn containers(&self) -> String {
        self.ok(&["ps", "--all", "--quiet"])
    }

    fn said(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Where it answers.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn command(&self) -> Command {
        let mut command = command("docker");
        command.arg("--host").arg(format!("unix://{}", self.socket().display()));
        command
    }

    /// What `docker` says on standard error; it must not succeed.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.command().args(arguments).output().expect("it can be started");
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// What `docker` prints; it must succeed.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        say(self.command().args(arguments))
    }

    /// Runs a container; its id.
    #[track_caller]
    pub fn run(&self, options: &[&str]) -> String {
        self.ok(&[&["run", "--detach", "--network", "none"], options, &["idle"], &IDLE].concat())
    }

    /// The cgroup of a container, from the mount point on.
    pub fn cgroup(&self, id: &str) -> PathBuf {
        match self.ok(&["info", "--format", "{{.CgroupDriver}}"]).as_str() {
            "systemd" => format!("system.slice/docker-{id}.scope").into(),
            _ => format!("docker/{id}").into(),
        }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let containers = self.command().args(["ps", "--all", "--quiet"]).output();
        if let Ok(containers) = containers {
            let ids = String::from_utf8_lossy(&containers.stdout);
            let _ = self.command().args(["rm", "--force"]).args(ids.split_whitespace()).output();
        }
        let pid = rustix::process::Pid::from_child(&self.daemon);
        // SIGTERM: its containerd is to end as well.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        if let Err(error) = self.daemon.wait() {
            eprintln!("cannot wait for dockerd: {error}");
        }
    }
}

/// Podman with a place of its own. Dropping it removes its containers.
pub struct Podman {
    directory: TempDir,
    runtime: PathBuf,
}

impl Podman {
    /// One whose containers that runtime runs.
    pub fn before(shim: &Shim) -> Podman {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        make_root(&directory.path().join("rootfs"));
        Podman { directory, runtime: shim.program() }
    }

    /// One with crun, and an image: `localhost/idle`.
    pub fn with_image() -> Podman {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let tar = image(directory.path());
        let home = directory.path().join(".config/containers");
        fs::create_dir_all(&home).expect("it is ours");
        fs::write(home.join("policy.json"), r#"{"default": [{"type": "insecureAcceptAnything"}]}"#)
            .expect("it is ours");
        // What starts it passes no environment on.
        let runtime = directory.path().join("crun");
        write_program(&runtime, &command("crun"));
        let podman = Podman { directory, runtime };
        say(podman.command().arg("import").arg(tar).arg("localhost/idle"));
        podman
    }

    /// What tells an agent that it runs its tasks' containers.
    pub fn options(&self) -> Vec<String> {
        let program = self.directory.path().join("podman");
        write_program(&program, &self.command());
        vec![format!("--containers=podman={}", program.display())]
    }

    /// Its containers, those that have ended included.
    pub fn containers(&self) -> String {
        say(self.command().args(["ps", "--all", "--quiet"]))
    }

    fn command(&self) -> Command {
        let at = |name: &str| self.directory.path().join(name);
        let mut command = command("podman");
        // What Debian says about networks and registries is not there, and not needed.
        fs::write(at("containers.conf"), "").expect("it is ours");
        command.env("CONTAINERS_CONF", at("containers.conf")).env("HOME", self.directory.path());
        command.arg("--root").arg(at("root")).arg("--runroot").arg(at("run")).arg("--tmpdir").arg(at("tmp"));
        command.arg("--conmon").arg(unpacked().join("usr/bin/conmon")).arg("--runtime").arg(&self.runtime);
        command.args(["--storage-driver", "vfs", "--events-backend", "none", "--cgroup-manager", "systemd"]);
        command
    }

    /// A container of busybox.
    fn container(&self, options: &[&str], words: &[&str]) -> Command {
        let mut command = self.command();
        command.args(["run", "--network", "none"]).args(options);
        command.arg("--rootfs").arg(self.directory.path().join("rootfs")).args(words);
        command
    }

    /// Runs one: its id, or what it prints.
    #[track_caller]
    pub fn run(&self, options: &[&str], words: &[&str]) -> String {
        say(&mut self.container(options, words))
    }

    /// What `podman` says on standard error; the container must not be started.
    #[track_caller]
    pub fn refused(&self, options: &[&str], words: &[&str]) -> String {
        let output = self.container(options, words).output().expect("it can be started");
        assert!(!output.status.success(), "{options:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The cgroup of a container, from the mount point on.
    pub fn cgroup(&self, id: &str) -> PathBuf {
        format!("machine.slice/libpod-{id}.scope").into()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.command().args(["rm", "--all", "--force", "--time", "0"]).output();
    }
}

/// containerd with a place of its own. Dropping it ends it, with its containers.
pub struct Containerd {
    daemon: Child,
    directory: TempDir,
    runtime: PathBuf,
}

impl Containerd {
    /// One whose containers that runtime runs.
    pub fn before(shim: &Shim) -> Containerd {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        make_root(&directory.path().join("rootfs"));
        let at = |name: &str| directory.path().join(name);
        fs::write(at("config.toml"), "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n")
            .expect("it is ours");
        let log = fs::File::create(at("log")).expect("it is ours");
        let daemon = command("containerd")
            .arg("--config")
            .arg(at("config.toml"))
            .arg("--root")
            .arg(at("root"))
            .arg("--state")
            .arg(at("state"))
            .arg("--address")
            .arg(at("socket"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("it is open"))
            .stderr(log)
            .spawn()
            .expect("containerd can be started");
        let containerd = Containerd { daemon, directory, runtime: shim.program() };
        let answers =
            || containerd.command().arg("version").output().is_ok_and(|output| output.status.success());
        let answered = (0..4).any(|_| happens(answers));
        let log = containerd.directory.path().join("log");
        assert!(answered, "containerd: {}", fs::read_to_string(log).unwrap_or_default());
        containerd
    }

    fn command(&self) -> Command {
        let mut command = command("ctr");
        command.arg("--address").arg(self.directory.path().join("socket"));
        command
    }

    /// What `ctr` prints; it must succeed.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        say(self.command().args(arguments))
    }

    /// Runs a container of busybox of that id; what it prints.
    #[track_caller]
    pub fn run(&self, id: &str, options: &[&str], words: &[&str]) -> String {
        let root = self.directory.path().join("rootfs").display().to_string();
        let runtime = self.runtime.display().to_string();
        let fixed = ["run", "--runc-binary", &runtime];
        self.ok(&[&fixed[..], options, &["--rootfs", &root, id], words].concat())
    }

    /// The cgroup of a container, from the mount point on.
    pub fn cgroup(&self, id: &str) -> PathBuf {
        format!("default/{id}").into()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let tasks = self.command().args(["tasks", "ls", "--quiet"]).output();
        if let Ok(tasks) = tasks {
            for id in String::from_utf8_lossy(&tasks.stdout).split_whitespace() {
                let _ = self.command().args(["tasks", "kill", "--signal", "SIGKILL", id]).output();
                let _ = self.command().args(["tasks", "delete", "--force", id]).output();
                let _ = self.command().args(["containers", "delete", id]).output();
            }
        }
        let pid = rustix::process::Pid::from_child(&self.daemon);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        if let Err(error) = self.daemon.wait() {
            eprintln!("cannot wait for containerd: {error}");
        }
    }
}
