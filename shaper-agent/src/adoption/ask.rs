//! What rules have to know beyond a path: Docker and Podman are asked for a container by their API, and the kubelet's
//! directories of logs, `NAMESPACE_NAME_UID`, say whose a pod is.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, de::DeserializeOwned};
use shaper_core::adopt::{Choice, ContainerFacts, Facts, Place, PodFacts, Rule, Runtime, choose};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{Config, tree};
use crate::node::Found;

/// Where the kubelet has the logs of pods.
const POD_LOGS: &str = "/var/log/pods";
/// How long an answer may take, with the connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long nobody asks again where nobody took the connection.
const SILENCE: Duration = Duration::from_secs(4);
/// Bytes of an answer.
const ANSWER_MAX: u64 = 1 << 20;

/// Whom to ask.
pub(super) struct Sources {
    mount: PathBuf,
    docker: PathBuf,
    podman: PathBuf,
    of: Of,
    /// Who could not be reached, until when nobody asks again, and what was said.
    silent: HashMap<PathBuf, (Instant, String)>,
}

/// What is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// Any container.
    Any,
    /// One that its runtime is starting, and waits for us to: Docker and Podman answer nothing about it that takes its lock.
    Starting,
}

/// What kind of thing is in the way of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// Somebody who knows more does not say it.
    Asked,
    /// What the rule makes of it cannot be a task's name.
    Named,
    /// The node refuses it.
    Refused,
}

/// What comes of a cgroup.
pub(super) enum Answer {
    /// No rule takes it.
    Nobody,
    /// That cannot be said now, and why, if somebody ought to know.
    NotYet(Option<(Obstacle, String)>),
    /// It becomes this.
    Taken(Box<Found>),
}

impl Sources {
    pub(super) fn new(config: &Config, of: Of) -> Sources {
        Sources {
            mount: config.mount.clone(),
            docker: config.docker.clone(),
            podman: config.podman.clone(),
            of,
            silent: HashMap::new(),
        }
    }

    /// Which rule takes a cgroup; others are asked only where a rule needs it.
    pub(super) async fn judge(&mut self, rules: &[Rule], path: &str) -> Answer {
        let place = Place::of(path);
        let mut facts = Facts { is_roots: true, ..Facts::default() };
        loop {
            let choice = choose(rules, &place, &facts);
            if matches!(choice, Choice::Nobody) {
                return Answer::Nobody;
            }
            // First what it is, then whose is what it is in, and that last of all: a directory may be given away at any time.
            let Some(cgroup_id) = tree::id(&self.mount, path) else { return Answer::Nobody };
            if facts.is_roots && choice.believes_a_name() && !tree::is_roots_alone(&self.mount, path) {
                facts.is_roots = false;
                continue;
            }
            match choice {
                Choice::Nobody => return Answer::Nobody,
                Choice::Taken(rule) => {
                    return taken(rule, &place, &facts, (self.mount.join(path), cgroup_id));
                }
                Choice::AskContainer => match self.container(&place).await {
                    Ok(Some(known)) => facts.container = Some(known),
                    // Its runtime has not heard of it: it is about to, or somebody else made this.
                    Ok(None) => return Answer::NotYet(None),
                    Err(why) => return Answer::NotYet(Some((Obstacle::Asked, why))),
                },
                Choice::AskPod => match pod(Path::new(POD_LOGS), &place) {
                    Ok(Some(known)) => facts.pod = Some(known),
                    Ok(None) => return Answer::NotYet(None),
                    Err(error) => {
                        let why = format!("cannot list {POD_LOGS}: {error}");
                        return Answer::NotYet(Some((Obstacle::Asked, why)));
                    }
                },
            }
        }
    }

    async fn container(&mut self, place: &Place<'_>) -> Result<Option<ContainerFacts>, String> {
        let Some(container) = place.container else { return Ok(None) };
        let socket = match container.runtime {
            Some(Runtime::Podman) => self.podman.clone(),
            _ => self.docker.clone(),
        };
        // Who does not answer keeps those waiting whom nobody has to ask: once for all of them is enough.
        if let Some((until, why)) = self.silent.get(&socket)
            && *until > Instant::now()
        {
            return Err(why.clone());
        }
        let mut is_connected = false;
        let asked = match (self.of, container.runtime) {
            (Of::Any, _) => inspect(&socket, container.id, &mut is_connected).await,
            (Of::Starting, Some(Runtime::Podman)) => {
                return Err(
                    "Podman says nothing of a container while it starts it: select it by what its path tells"
                        .into(),
                );
            }
            (Of::Starting, _) => find(&socket, container.id, &mut is_connected).await,
        };
        asked.map_err(|error| {
            let why = format!("cannot ask at {}: {error}", socket.display());
            // One that answers, but not about this container, may about others.
            if !is_connected {
                self.silent.insert(socket, (Instant::now() + SILENCE, why.clone()));
            }
            why
        })
    }
}

fn taken(rule: &Rule, place: &Place<'_>, facts: &Facts, (cgroup, cgroup_id): (PathBuf, u64)) -> Answer {
    match rule.workload(place, facts) {
        Ok(workload) => Answer::Taken(Box::new(Found {
            cgroup,
            cgroup_id,
            rule: rule.name.clone(),
            workload,
            limits: rule.task.limits,
            writers: rule.task.writers,
        })),
        Err(error) => Answer::NotYet(Some((Obstacle::Named, format!("rule {}: {error}", rule.name)))),
    }
}

/// Whose that pod is, by the directories there.
fn pod(logs: &Path, place: &Place<'_>) -> io::Result<Option<PodFacts>> {
    let Some(pod) = &place.pod else { return Ok(None) };
    let entries = match fs::read_dir(logs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    for entry in entries {
        let name = entry?.file_name();
        // Neither a namespace nor a name has a `_`.
        let mut parts = name.to_str().unwrap_or_default().splitn(3, '_');
        if let (Some(namespace), Some(name), Some(uid)) = (parts.next(), parts.next(), parts.next())
            && uid == pod.uid
        {
            return Ok(Some(PodFacts { namespace: namespace.to_owned(), name: name.to_owned() }));
        }
    }
    Ok(None)
}

/// What Docker's API says of a container, as far as it is of use here; Podman's says the same.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    id: String,
    name: String,
    config: InspectedConfig,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedConfig {
    #[serde(default)]
    image: String,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

/// Of a list of Docker's.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    id: String,
    #[serde(default)]
    names: Vec<String>,
    #[serde(default)]
    image: String,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

/// Asks for a container; `None`: there is none of that id. Says whether somebody took the connection.
async fn inspect(socket: &Path, id: &str, is_connected: &mut bool) -> io::Result<Option<ContainerFacts>> {
    let asked: Option<Inspected> = ask(socket, &format!("/containers/{id}/json"), is_connected).await?;
    let Some(Inspected { id: found, name, config }) = asked else { return Ok(None) };
    if found != id {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is about another container"));
    }
    let InspectedConfig { image, labels } = config;
    let name = name.trim_start_matches('/').to_owned();
    Ok(Some(ContainerFacts { name, image, labels: labels.unwrap_or_default() }))
}

/// The same by Docker's list, which is made without the lock that whoever starts the container holds. Of an image whose name
/// another has since, it has the id.
async fn find(socket: &Path, id: &str, is_connected: &mut bool) -> io::Result<Option<ContainerFacts>> {
    // An id is digits and letters: {"id":["…"]}.
    let path = format!("/containers/json?all=1&filters=%7B%22id%22%3A%5B%22{id}%22%5D%7D");
    let listed: Option<Vec<Listed>> = ask(socket, &path, is_connected).await?;
    let found = listed.unwrap_or_default().into_iter().find(|listed| listed.id == id);
    Ok(found.map(|Listed { id: _, names, image, labels }| {
        let name = names.iter().map(|name| name.trim_start_matches('/')).find(|name| !name.contains('/'));
        ContainerFacts {
            name: name.unwrap_or_default().to_owned(),
            image,
            labels: labels.unwrap_or_default(),
        }
    }))
}

/// What is there, read as JSON, within our patience.
pub(crate) async fn ask<T: DeserializeOwned>(
    socket: &Path,
    path: &str,
    is_connected: &mut bool,
) -> io::Result<Option<T>> {
    let asked = tokio::time::timeout(PATIENCE, get(socket, path, is_connected));
    let body = asked.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let invalid = |error: serde_json::Error| io::Error::new(io::ErrorKind::InvalidData, error);
    body.map(|body| serde_json::from_slice(&body).map_err(invalid)).transpose()
}

/// The body of what is there; `None`: nothing. HTTP/1.0, so that the answer is whole when the connection ends.
async fn get(socket: &Path, path: &str, is_connected: &mut bool) -> io::Result<Option<Vec<u8>>> {
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let mut stream = UnixStream::connect(socket).await?;
    *is_connected = true;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX + 1).read_to_end(&mut answer).await?;
    if answer.len() as u64 > ANSWER_MAX {
        return Err(invalid("the answer is too long"));
    }
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.ok_or_else(|| invalid("the answer has no head"))?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let status = head.split_ascii_whitespace().nth(1).unwrap_or_default();
    match status {
        "200" => Ok(Some(answer.split_off(end + 4))),
        "404" => Ok(None),
        other => Err(invalid(&format!("the answer is {}", other.escape_default()))),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixListener,
        thread,
    };

    use super::*;

    const ID: &str = "4f0c2b1e9d8a7f6e5d4c3b2a190807060504030201000f0e0d0c0b0a09080706";

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn whoever_takes_no_connection_or_says_nothing_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut is_connected = false;
        let error = block_on(inspect(&socket, ID, &mut is_connected)).unwrap_err();
        assert_eq!((error.kind(), is_connected), (io::ErrorKind::TimedOut, true));
        // That connection is still in the queue, which is full with it: nobody accepts.
        rustix::net::listen(&listener, 0).unwrap();
        let mut is_connected = false;
        assert!(block_on(inspect(&socket, ID, &mut is_connected)).is_err());
        assert!(!is_connected);
    }

    /// What is made of an answer.
    fn answered(answer: &str) -> (String, io::Result<Option<ContainerFacts>>) {
        asked(answer, Of::Any)
    }

    fn asked(answer: &str, of: Of) -> (String, io::Result<Option<ContainerFacts>>) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let answer = answer.to_owned();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            let read = stream.read(&mut buffer).unwrap();
            // Who is told too much does not listen to the end.
            let _ = stream.write_all(answer.as_bytes());
            String::from_utf8_lossy(&buffer[..read]).into_owned()
        });
        let mut is_connected = false;
        let found = match of {
            Of::Any => block_on(inspect(&socket, ID, &mut is_connected)),
            Of::Starting => block_on(find(&socket, ID, &mut is_connected)),
        };
        assert!(is_connected);
        (server.join().unwrap(), found)
    }

    #[test]
    fn a_container_is_asked_for_by_its_id() {
        let body = format!(
            r#"{{"Id":"{ID}","Name":"/web","State":{{}},"Config":{{"Image":"registry/web:1","Labels":{{"team":"data"}}}}}}"#
        );
        let (asked, found) =
            answered(&format!("HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{body}"));
        assert!(asked.starts_with(&format!("GET /containers/{ID}/json HTTP/1.0\r\n")), "{asked}");
        let found = found.unwrap().unwrap();
        assert_eq!((found.name.as_str(), found.image.as_str()), ("web", "registry/web:1"));
        assert_eq!(found.labels["team"], "data");
        assert_eq!(answered("HTTP/1.0 404 Not Found\r\n\r\n{}").1.unwrap(), None);
        for bad in [
            "",
            "HTTP/1.0 500 No\r\n\r\n",
            "HTTP/1.0 200 OK\r\n\r\n{",
            &format!("HTTP/1.0 200 OK\r\n\r\n{}", body.replace("4f0c", "ffff")),
        ] {
            assert!(answered(bad).1.is_err(), "{bad}");
        }
        let endless = format!("HTTP/1.0 200 OK\r\n\r\n{}", " ".repeat(ANSWER_MAX as usize + 1));
        assert!(answered(&endless).1.is_err());
    }

    #[test]
    fn one_that_is_being_started_is_looked_up_in_the_list() {
        let body = format!(
            r#"[{{"Id":"{}","Names":["/other"]}},
                {{"Id":"{ID}","Names":["/db/alias","/web"],"Image":"registry/web:1","Labels":{{"team":"data"}}}}]"#,
            ID.replace("4f0c", "ffff")
        );
        let (said, found) = asked(&format!("HTTP/1.0 200 OK\r\n\r\n{body}"), Of::Starting);
        assert!(said.starts_with("GET /containers/json?all=1&filters=%7B%22id%22%3A%5B%224f0c"), "{said}");
        let found = found.unwrap().unwrap();
        assert_eq!((found.name.as_str(), found.image.as_str()), ("web", "registry/web:1"));
        assert_eq!(found.labels["team"], "data");
        assert_eq!(asked("HTTP/1.0 200 OK\r\n\r\n[]", Of::Starting).1.unwrap(), None);
        assert!(asked("HTTP/1.0 200 OK\r\n\r\n{}", Of::Starting).1.is_err());
    }

    #[test]
    fn a_pod_is_known_by_its_directory_of_logs() {
        let logs = tempfile::tempdir().unwrap();
        let path = "kubepods/burstable/pod0f3a1c52-7d1e-4c55-9a3b-2f1e0d9c8b7a";
        let place = Place::of(path);
        assert_eq!(pod(logs.path(), &place).unwrap(), None);
        for name in ["batch_etl-1_0f3a1c52-7d1e-4c55-9a3b-2f1e0d9c8b7a", "odd", "a_b_c"] {
            fs::create_dir(logs.path().join(name)).unwrap();
        }
        let expected = PodFacts { namespace: "batch".into(), name: "etl-1".into() };
        assert_eq!(pod(logs.path(), &place).unwrap(), Some(expected));
        assert_eq!(pod(&logs.path().join("absent"), &place).unwrap(), None);
    }
}
