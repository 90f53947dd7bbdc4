//! Cgroups that others made become tasks by rules: the file of rules, the hierarchy as it changes ([`tree`]), and what has to
//! be asked of others ([`ask`]). What is decided is `shaper_core::adopt`'s; what is done is the node's
//! (`Node::adopt_found`), by its queue. Nothing here writes to a cgroup, and nobody waits for an answer but this.

mod ask;
mod tree;

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use shaper_core::{
    adopt::{Choice, Facts, Place, Rule, choose},
    document::{self, DocumentError},
};
use tokio::time::Instant;

use self::{
    ask::{Answer, Sources},
    tree::{Seen, Tree},
};
use crate::{actor::Handle, launch, node::Found};

/// What the rules are, and where they apply.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file.
    pub file: PathBuf,
    /// Mount point of cgroup v2.
    pub mount: PathBuf,
    /// The agent's own cgroups, of which none is adopted.
    pub own: PathBuf,
    /// Docker's socket.
    pub docker: PathBuf,
    /// Podman's socket.
    pub podman: PathBuf,
}

/// Why rules cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The file.
    #[error("cannot read {path}; is it the file of rules?")]
    File {
        /// Which.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// What is in it.
    #[error("{0}")]
    Document(Box<DocumentError>),
}

/// How often what could not be adopted or asked is tried again, the file is compared, and the hierarchy is looked through
/// where the kernel could not tell of all changes.
const AGAIN: Duration = Duration::from_secs(5);
/// Cgroups that are handed to the node at once: between, it does its other work.
const BATCH: usize = 32;
/// Cgroups that wait for something; more are found again by the next look through all.
const WAITING_MAX: usize = 4096;

impl Config {
    /// Reads the rules.
    pub fn read(&self) -> Result<Vec<Rule>, RulesError> {
        read(&self.file)
    }
}

fn read(path: &Path) -> Result<Vec<Rule>, RulesError> {
    let failed = |source| RulesError::File { path: path.to_owned(), source };
    let mut text = Vec::new();
    let most = u64::try_from(document::MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    File::open(path).map_err(failed)?.take(most).read_to_end(&mut text).map_err(failed)?;
    document::adoption_rules(&path.display().to_string(), text)
        .map_err(|error| RulesError::Document(Box::new(error)))
}

/// The same file as before: what has changed of one that has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

impl Version {
    fn of(path: &Path) -> Option<Version> {
        use std::os::unix::fs::MetadataExt;
        let found = fs::metadata(path).ok()?;
        Some(Version {
            inode: found.ino(),
            length: found.size(),
            changed: (found.mtime(), found.mtime_nsec()),
        })
    }
}

/// Adopts by the rules for as long as the node lives.
pub async fn keep(config: Config, handle: Handle) {
    let (rules, version) = (config.read(), Version::of(&config.file));
    let rules = match rules {
        Ok(rules) => rules,
        // It was read a moment ago, when the agent was started.
        Err(error) => {
            tracing::error!(error = %launch::chain(&error), "no cgroup is adopted until the rules can be read");
            Vec::new()
        }
    };
    let tree = match Tree::new(&config.mount, &config.own) {
        Ok(tree) => tree,
        Err(error) => {
            tracing::error!(%error, "cannot be told of new cgroups: none is adopted by a rule");
            return;
        }
    };
    let sources = Sources::new(&config);
    let mut keeper = Keeper {
        config,
        handle,
        rules: rules.into(),
        version,
        tree,
        sources,
        waiting: BTreeMap::new(),
        said: HashMap::new(),
    };
    keeper.look_through().await;
    loop {
        let next = Instant::now() + AGAIN;
        loop {
            tokio::select! {
                seen = keeper.tree.changed(&keeper.rules) => match seen {
                    Ok(Some(seen)) => keeper.take(seen).await,
                    Ok(None) => keeper.look_through().await,
                    Err(error) => {
                        tracing::error!(%error, "cannot be told of new cgroups any more: they are looked for");
                        tokio::time::sleep_until(next).await;
                        break;
                    }
                },
                () = tokio::time::sleep_until(next) => break,
            }
        }
        keeper.again().await;
    }
}

struct Keeper {
    config: Config,
    handle: Handle,
    rules: Arc<[Rule]>,
    version: Option<Version>,
    tree: Tree,
    sources: Sources,
    /// Cgroups of which something is not known yet, or which the node could not adopt.
    waiting: BTreeMap<String, bool>,
    /// What was in the way of a cgroup when that was last said.
    said: HashMap<String, String>,
}

impl Keeper {
    /// Looks at the whole hierarchy.
    async fn look_through(&mut self) {
        self.waiting.clear();
        let seen = self.tree.look_through(&self.rules);
        let there: std::collections::HashSet<&str> = seen.iter().map(|seen| seen.path.as_str()).collect();
        self.said.retain(|path, _| there.contains(path.as_str()));
        self.take(seen).await;
    }

    async fn again(&mut self) {
        let version = Version::of(&self.config.file);
        if version != self.version {
            self.version = version;
            match self.config.read() {
                Ok(rules) => {
                    tracing::info!(rules = rules.len(), "the rules of adoption have changed");
                    self.rules = rules.into();
                    return self.look_through().await;
                }
                Err(error) => {
                    let error = launch::chain(&error);
                    tracing::error!(
                        error,
                        "the rules of adoption stay as they were: the file cannot be used"
                    );
                }
            }
        }
        if self.tree.misses_some() {
            return self.look_through().await;
        }
        let waiting = std::mem::take(&mut self.waiting);
        let seen = waiting.into_iter().map(|(path, is_roots)| Seen { path, is_roots }).collect();
        self.take(seen).await;
    }

    /// Adopts what a rule takes, of these.
    async fn take(&mut self, seen: Vec<Seen>) {
        let mut found = Vec::new();
        for Seen { path, is_roots } in seen {
            match self.sources.judge(&self.rules, &path, is_roots).await {
                Answer::Nobody => {}
                Answer::NotYet(why) => self.wait(path, is_roots, why),
                Answer::Taken(task) => {
                    let cgroup = self.config.mount.join(&path);
                    found.push((path, is_roots, Found { cgroup, ..*task }));
                }
            }
        }
        while !found.is_empty() {
            let rest = found.split_off(found.len().min(BATCH));
            let batch = std::mem::replace(&mut found, rest);
            let (keys, tasks): (Vec<_>, Vec<_>) =
                batch.into_iter().map(|(path, is_roots, task)| ((path, is_roots), task)).unzip();
            let (reply, answer) = tokio::sync::oneshot::channel();
            self.handle
                .tell(move |node| {
                    // Nobody listens once the agent ends.
                    let _ = reply.send(node.adopt_found(tasks));
                })
                .await;
            let Ok(results) = answer.await else { return };
            for ((path, is_roots), (_, refused)) in keys.into_iter().zip(results) {
                match refused {
                    Some(why) => self.wait(path, is_roots, Some(why)),
                    None => drop(self.said.remove(&path)),
                }
            }
        }
    }

    fn wait(&mut self, path: String, is_roots: bool, why: Option<String>) {
        if let Some(why) = why
            && self.said.get(&path) != Some(&why)
        {
            tracing::warn!(
                cgroup = path,
                why,
                "a rule takes a cgroup that cannot be adopted now; it is tried again"
            );
            if self.said.len() < WAITING_MAX {
                self.said.insert(path.clone(), why);
            }
        }
        if self.waiting.len() < WAITING_MAX && self.config.mount.join(&path).exists() {
            self.waiting.insert(path, is_roots);
        }
    }
}

/// Which cgroups the rules of a file would adopt now.
#[derive(Clone, Debug, clap::Args)]
pub struct Check {
    /// The file of rules
    #[arg(long, value_name = "FILE")]
    check: PathBuf,
    /// Where Docker answers …
    #[arg(long, value_name = "SOCKET", default_value = "/run/docker.sock")]
    docker: PathBuf,
    /// … and Podman
    #[arg(long, value_name = "SOCKET", default_value = "/run/podman/podman.sock")]
    podman: PathBuf,
    /// The agent's own cgroups [default: `shaper` below the mount of cgroup v2]
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
}

/// Why a file cannot be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The rules.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// No cgroup v2.
    #[error("no cgroup v2 is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup/unified")]
    NoCgroup2,
    /// The hierarchy.
    #[error("cannot look at the hierarchy")]
    Io(#[from] io::Error),
}

impl Check {
    /// A line for each cgroup. Nothing is adopted.
    pub fn run(&self) -> Result<Vec<String>, CheckError> {
        let rules = read(&self.check)?;
        let mount = crate::kernel::hierarchy::Hierarchies::detect()?.ok_or(CheckError::NoCgroup2)?.v2;
        let own = self.cgroup_root.clone().unwrap_or_else(|| mount.join("shaper"));
        let config = Config {
            file: self.check.clone(),
            mount: mount.clone(),
            own,
            docker: self.docker.clone(),
            podman: self.podman.clone(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut tree = Tree::new(&mount, &config.own)?;
            let mut sources = Sources::new(&config);
            let mut lines = Vec::new();
            for Seen { path, is_roots } in tree.look_through(&rules) {
                let line = match sources.judge(&rules, &path, is_roots).await {
                    Answer::Nobody => continue,
                    Answer::NotYet(why) => {
                        format!("?\t?\t{path}\t{}", why.unwrap_or_else(|| "not known yet".into()))
                    }
                    Answer::Taken(found) => format!("{}\t{}\t{path}", found.rule, found.workload.name),
                };
                lines.push(line);
            }
            Ok(lines)
        })
    }
}

/// What the path alone decides.
fn by_path<'r>(rules: &'r [Rule], path: &str, is_roots: bool) -> Choice<'r> {
    choose(rules, &Place::of(path), &Facts { is_roots, ..Facts::default() })
}
