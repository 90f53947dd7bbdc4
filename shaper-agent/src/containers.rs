//! Containers as tasks: what a task's image is run by.
//!
//! The main process of such a task is a client of Docker's or Podman's, which its supervisor starts in a cgroup of its own
//! below the task's. The container is told to be in the task's cgroup too (`--cgroup-parent`), so it is born within
//! limits that are in force already, and all that is done to tasks is done to it: it is measured, resized, killed and told
//! of as any other. Its output is the client's, and so is its exit code. Docker with systemd's cgroups takes only a slice for
//! a parent: there the task's cgroup is that of one.
//!
//! The client is told what every task is held to: the task's user and groups, no capabilities, no new privileges. It is
//! root's, and nothing that a task says is an option of it: an image's reference cannot be taken for one
//! ([`shaper_core::spec::Image`]), what follows it is the container's, and the environment is in a file.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use shaper_core::spec::Image;
use shaper_proto::peer::Caller;

use crate::adoption;

/// Of Docker it is asked so often how it makes cgroups, until it has said so …
const ASK_EVERY: Duration = Duration::from_secs(2);
/// … and then whether that is still so.
const ASK_AGAIN_EVERY: Duration = Duration::from_secs(30);
/// Where the client looks for its helpers: nothing of a task's environment is the client's.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Who runs containers, as the option names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    kind: Kind,
    program: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Docker,
    Podman,
}

impl FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Engine, String> {
        let (name, program) = text.split_once('=').unwrap_or((text, text));
        let kind = match name {
            "docker" => Kind::Docker,
            "podman" => Kind::Podman,
            _ => return Err("docker or podman, or either with =PROGRAM".into()),
        };
        if program.is_empty() {
            return Err("no program after `=`".into());
        }
        Ok(Engine { kind, program: program.into() })
    }
}

/// Where containers' cgroups are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// In any cgroup.
    Path,
    /// In a slice of systemd's.
    Slice,
}

/// What Docker says of itself, as far as it is of use here.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    #[serde(default)]
    cgroup_driver: String,
    #[serde(default)]
    cgroup_version: String,
}

/// Who runs containers here.
#[derive(Clone, Debug)]
pub struct Containers {
    engine: Engine,
    socket: PathBuf,
    /// What is known of where they are to be, or why nothing is.
    parent: Arc<Mutex<Result<Parent, String>>>,
}

/// A container that is to be run.
pub struct Order<'a> {
    /// Its name, of which there is one only.
    pub name: &'a str,
    /// The task.
    pub task: &'a str,
    /// Its image.
    pub image: &'a Image,
    /// What the image is given.
    pub command: &'a [String],
    /// Its working directory; empty: the image's.
    pub cwd: &'a Path,
    /// Whom it runs as.
    pub run_as: &'a Caller,
    /// The cgroup for it, from the mount point on, or the slice.
    pub parent: &'a Path,
    /// The file with its environment.
    pub env_file: &'a Path,
}

impl Containers {
    /// Of an engine; `docker`: where Docker answers.
    pub fn new(engine: Engine, docker: &Path) -> Containers {
        let parent = match engine.kind {
            Kind::Podman => Ok(Parent::Path),
            Kind::Docker => Err("Docker has not said yet how it makes cgroups".into()),
        };
        Containers { engine, socket: docker.to_owned(), parent: Arc::new(Mutex::new(parent)) }
    }

    /// Keeps itself up to date on how cgroups are made, for good.
    pub async fn watch(self) {
        if self.engine.kind == Kind::Podman {
            return;
        }
        loop {
            let mut is_there = false;
            let asked = adoption::ask::<Info>(&self.socket, "/info", &mut is_there).await;
            let asked = asked
                .map_err(|error| format!("Docker does not answer at {}: {error}", self.socket.display()));
            let pause = {
                let mut parent = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
                learn(&mut parent, asked, is_there);
                if parent.is_ok() { ASK_AGAIN_EVERY } else { ASK_EVERY }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Where the cgroups of containers are to be; or why none can be run.
    pub fn parent(&self) -> Result<Parent, String> {
        self.parent.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The command of the client that runs a container, stays with it and passes signals on.
    pub fn run(&self, order: &Order<'_>) -> Vec<String> {
        let Order { name, task, image, command, cwd, run_as, parent, env_file } = order;
        let Caller { uid, gid, groups } = run_as;
        let mut words = self.words();
        let mut say = |word: String| words.push(word);
        for word in ["run", "--rm", "--network=host", "--cap-drop=ALL", "--security-opt=no-new-privileges"] {
            say(word.into());
        }
        // The supervisor keeps the log. A limit on processes is none that anybody asked for.
        for word in ["--log-driver=none", "--pids-limit=-1"] {
            say(word.into());
        }
        if self.engine.kind == Kind::Podman {
            // What holds its output is the client's, not one more cgroup.
            say("--cgroups=no-conmon".into());
        }
        say(format!("--name={name}"));
        say(format!("--label=shaper.task={task}"));
        say(format!("--cgroup-parent={}", parent.display()));
        say(format!("--user={uid}:{gid}"));
        for group in groups.iter().filter(|group| *group != gid) {
            say(format!("--group-add={group}"));
        }
        if !cwd.as_os_str().is_empty() {
            say(format!("--workdir={}", cwd.display()));
        }
        say(format!("--env-file={}", env_file.display()));
        say(image.to_string());
        words.extend(command.iter().cloned());
        words
    }

    /// The command that removes what is left of it.
    pub fn remove(&self, name: &str) -> Vec<String> {
        let mut words = self.words();
        words.extend(["rm".into(), "--force".into()]);
        if self.engine.kind == Kind::Podman {
            words.push("--ignore".into());
        }
        words.push(name.into());
        words
    }

    /// The environment of both.
    pub fn env() -> Vec<(String, String)> {
        // Where the registries' passwords are.
        [("PATH", PATH), ("HOME", "/root")].map(|(name, value)| (name.into(), value.into())).into()
    }

    fn words(&self) -> Vec<String> {
        let program = self.engine.program.display().to_string();
        match self.engine.kind {
            Kind::Docker => vec![program, "--host".into(), format!("unix://{}", self.socket.display())],
            Kind::Podman => vec![program, "--cgroup-manager=cgroupfs".into()],
        }
    }
}

/// What is known after Docker was asked. One that is there and slow is the one that was asked before: how it makes cgroups
/// changes only with its restart. `is_there`: it took the connection.
fn learn(known: &mut Result<Parent, String>, asked: Result<Option<Info>, String>, is_there: bool) {
    match asked {
        Ok(info) => *known = parent_of(&info.unwrap_or_default()),
        Err(_) if is_there && known.is_ok() => {}
        Err(why) => *known = Err(why),
    }
}

fn parent_of(info: &Info) -> Result<Parent, String> {
    match (info.cgroup_version.as_str(), info.cgroup_driver.as_str()) {
        ("2", "systemd") => Ok(Parent::Slice),
        ("2", "cgroupfs") => Ok(Parent::Path),
        (version, driver) => Err(format!(
            "Docker makes cgroups of version `{}` by driver `{}`: it has to be version 2, by systemd or cgroupfs",
            version.escape_debug(),
            driver.escape_debug()
        )),
    }
}

/// What cannot be in a file of variables, each a line: the name of the variable that has it.
pub fn not_for_a_file(env: &[(String, String)]) -> Option<&str> {
    let is_name = |name: &str| {
        let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        name.bytes().all(is_inner) && !name.starts_with(|first: char| first.is_ascii_digit())
    };
    let fits = |(name, value): &&(String, String)| is_name(name) && !value.contains(char::is_control);
    env.iter().find(|variable| !fits(variable)).map(|(name, _)| name.as_str())
}

/// Such a file.
pub fn env_file(env: &[(String, String)]) -> String {
    env.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers(engine: &str) -> Containers {
        Containers::new(engine.parse().unwrap(), Path::new("/run/docker.sock"))
    }

    fn words(containers: &Containers) -> Vec<String> {
        containers.run(&Order {
            name: "shaper-web.1",
            task: "web",
            image: &"redis:7".parse().unwrap(),
            command: &["--privileged".into(), "x".into()],
            cwd: Path::new(""),
            run_as: &Caller { uid: 7, gid: 8, groups: vec![8, 9] },
            parent: Path::new("/shaper/web.1"),
            env_file: Path::new("/var/lib/shaper/env"),
        })
    }

    #[test]
    fn what_a_task_says_is_no_option() {
        for engine in ["docker", "podman=/opt/podman"] {
            let words = words(&containers(engine));
            let image = words.iter().position(|word| word == "redis:7").unwrap();
            assert_eq!(words[image + 1..], ["--privileged", "x"]);
            let options = &words[..image];
            for option in [
                "--cap-drop=ALL",
                "--security-opt=no-new-privileges",
                "--user=7:8",
                "--group-add=9",
                "--cgroup-parent=/shaper/web.1",
                "--name=shaper-web.1",
            ] {
                assert!(options.iter().any(|word| word == option), "{option}: {options:?}");
            }
            assert!(
                !options.iter().any(|word| word.contains("workdir") || word == "--group-add=8"),
                "{options:?}"
            );
        }
    }

    #[test]
    fn engines_have_names() {
        assert_eq!(words(&containers("podman=/opt/podman"))[0], "/opt/podman");
        assert_eq!(
            containers("docker").remove("x"),
            ["docker", "--host", "unix:///run/docker.sock", "rm", "--force", "x"]
        );
        for wrong in ["", "containerd", "docker=", "=docker"] {
            assert!(wrong.parse::<Engine>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn docker_is_asked_before_it_is_believed() {
        assert!(containers("docker").parent().is_err());
        assert_eq!(containers("podman").parent(), Ok(Parent::Path));
        let of = |version: &str, driver: &str| {
            parent_of(&Info { cgroup_version: version.into(), cgroup_driver: driver.into() })
        };
        assert_eq!(of("2", "systemd"), Ok(Parent::Slice));
        assert_eq!(of("2", "cgroupfs"), Ok(Parent::Path));
        for (version, driver) in [("1", "cgroupfs"), ("2", "none"), ("", "")] {
            assert!(of(version, driver).is_err(), "{version} {driver}");
        }
    }

    #[test]
    fn a_docker_that_is_slow_is_believed_and_one_that_is_gone_is_not() {
        let says = |driver: &str| Info { cgroup_version: "2".into(), cgroup_driver: driver.into() };
        let slow = || Err("timed out".to_owned());
        let mut known = Err("not asked".to_owned());
        learn(&mut known, slow(), true);
        assert_eq!(known, Err("timed out".into()));
        learn(&mut known, Ok(Some(says("systemd"))), true);
        learn(&mut known, slow(), true);
        assert_eq!(known, Ok(Parent::Slice));
        learn(&mut known, Ok(Some(says("cgroupfs"))), true);
        assert_eq!(known, Ok(Parent::Path));
        learn(&mut known, Ok(None), true);
        assert!(known.is_err());
        learn(&mut known, Ok(Some(says("cgroupfs"))), true);
        learn(&mut known, Err("no such file".into()), false);
        assert_eq!(known, Err("no such file".into()));
    }

    #[test]
    fn variables_are_lines() {
        let variable = |name: &str, value: &str| [(name.to_owned(), value.to_owned())];
        assert_eq!(env_file(&variable("A", "b=c \"d\" #")), "A=b=c \"d\" #\n");
        assert_eq!(not_for_a_file(&variable("A_b.c", "x y")), None);
        for (name, value) in
            [("A", "b\nC=d"), ("#A", "x"), ("A B", "x"), ("A\n", "x"), ("1", "x"), ("A", "\r")]
        {
            assert_eq!(not_for_a_file(&variable(name, value)), Some(name), "{value:?}");
        }
    }
}
