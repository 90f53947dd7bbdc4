//! Container runtimes: the real ones, unpacked and not installed, each with a container that does nothing.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{cgroup::unique_name, time::happens};

/// What runs in a container.
const IDLE: [&str; 3] = ["/bin/busybox", "sleep", "6000"];

/// The folder that Debian's packages of them are unpacked in.
fn unpacked() -> PathBuf {
    env::var_os("SHAPER_RUNTIMES").expect("`cargo xtask vm --profile systemd` names the runtimes").into()
}

/// A command whose program, and what that starts, are looked up among the runtimes first.
fn command(program: &str) -> Command {
    let unpacked = unpacked();
    let folders = ["usr/bin", "usr/sbin"].map(|folder| unpacked.join(folder));
    let found = folders.iter().map(|folder| folder.join(program)).find(|path| path.exists());
    let mut command = Command::new(found.unwrap_or_else(|| panic!("there is no {program}")));
    let path = env::var_os("PATH").unwrap_or_default();
    let path = folders.into_iter().chain(env::split_paths(&path));
    command.env("PATH", env::join_paths(path).expect("they have no colon"));
    command
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

/// How runc makes cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// By itself.
    Cgroupfs,
    /// Through systemd, as a scope.
    Systemd,
}

/// A container that runc runs. Dropping it deletes it.
pub struct Runc {
    directory: TempDir,
    id: String,
    driver: Driver,
}

impl Runc {
    /// Runs one with those `linux.resources` (config-linux.md of the OCI runtime specification).
    pub fn run(driver: Driver, resources: &Value) -> Runc {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        make_root(&directory.path().join("rootfs"));
        let runc = Runc { directory, id: unique_name(), driver };
        say(command("runc").arg("spec").current_dir(runc.directory.path()));
        let path = runc.directory.path().join("config.json");
        let config = fs::read(&path).expect("runc has written it");
        let mut config: Value = serde_json::from_slice(&config).expect("runc has written it");
        config["process"]["args"] = json!(IDLE);
        config["process"]["terminal"] = json!(false);
        config["linux"]["resources"] = resources.clone();
        config["linux"]["cgroupsPath"] = match driver {
            Driver::Cgroupfs => json!(format!("/{}", runc.id)),
            Driver::Systemd => json!(format!("system.slice:shaper:{}", runc.id)),
        };
        fs::write(&path, config.to_string()).expect("it is ours");
        let mut run = runc.command();
        run.args(["run", "--detach", "--bundle"]).arg(runc.directory.path()).arg(&runc.id);
        // What it leaves running must not hold our pipes.
        let status = run.stdin(Stdio::null()).stdout(Stdio::null()).status();
        assert!(status.is_ok_and(|status| status.success()), "{run:?}");
        runc
    }

    fn command(&self) -> Command {
        let mut command = command("runc");
        command.arg("--root").arg(self.directory.path().join("state"));
        if self.driver == Driver::Systemd {
            command.arg("--systemd-cgroup");
        }
        command
    }

    /// Its cgroup, from the mount point on.
    pub fn cgroup(&self) -> PathBuf {
        match self.driver {
            Driver::Cgroupfs => self.id.clone().into(),
            Driver::Systemd => format!("system.slice/shaper-{}.scope", self.id).into(),
        }
    }

    /// `runc update`
    pub fn update(&self, options: &[&str]) {
        say(self.command().arg("update").args(options).arg(&self.id));
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        let deleted = self.command().args(["delete", "--force", &self.id]).status();
        if !deleted.is_ok_and(|status| status.success()) {
            eprintln!("cannot delete the container {}", self.id);
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
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let at = |name: &str| directory.path().join(name).display().to_string();
        let log = fs::File::create(at("log")).expect("it is ours");
        let daemon = command("dockerd")
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
        make_root(&docker.directory.path().join("rootfs"));
        let tar = docker.directory.path().join("image.tar");
        say(Command::new("tar")
            .arg("-C")
            .arg(docker.directory.path().join("rootfs"))
            .arg("-cf")
            .arg(&tar)
            .arg("."));
        say(docker.command().arg("import").arg(tar).arg("idle"));
        docker
    }

    fn said(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn command(&self) -> Command {
        let mut command = command("docker");
        command.arg("--host").arg(format!("unix://{}", self.directory.path().join("socket").display()));
        command
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
