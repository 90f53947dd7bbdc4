//! Cgroups that others made become tasks by rules: the file of rules, the hierarchy as it changes ([`tree`]), and what has to
//! be asked of others ([`ask`]). What is decided is `shaper_core::adopt`'s; what is done is the node's
//! (`Node::adopt_found`), by its queue. Nothing here writes to a cgroup, and nobody waits for an answer but this.

mod ask;
mod births;
mod making;
mod tree;

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use shaper_core::{
    adopt::{Choice, Facts, Place, Rule, choose},
    document::{self, DocumentError},
    id::TaskId,
};
use tokio::{sync::watch, time::Instant};

pub(crate) use self::ask::ask;
pub use self::births::{Births, Unjudged};
use self::{
    ask::{Answer, Obstacle, Of, Sources},
    making::InTheMaking,
    tree::Tree,
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
const BATCH: usize = 4;
/// How long it is put off at most to try one again.
const AGAIN_AT_LAST: Duration = Duration::from_secs(300);
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

/// The rules in force; `None`: they were not read yet.
type InForce = Option<Arc<[Rule]>>;

/// Who adopts by the rules, and who judges by them what is about to be started.
pub fn begin(config: Config, handle: Handle) -> (Births, impl Future<Output = ()>) {
    let (in_force, rules) = watch::channel(None);
    (Births::new(config.clone(), rules), keep(config, in_force, handle))
}

/// Adopts by the rules for as long as the node lives.
async fn keep(config: Config, in_force: watch::Sender<InForce>, handle: Handle) {
    let tree = Tree::new(&config.mount, &config.own);
    let sources = Sources::new(&config, Of::Any);
    let rules = Arc::from([]);
    let mut keeper = Keeper {
        config,
        handle,
        rules,
        in_force,
        version: None,
        fault: None,
        tree,
        sources,
        waiting: BTreeMap::new(),
        making: InTheMaking::default(),
    };
    loop {
        keeper.again().await;
        let next = Instant::now() + AGAIN;
        loop {
            let look = keeper.making.next_look();
            tokio::select! {
                seen = keeper.tree.changed(&keeper.rules) => {
                    let made = keeper.making.keep_back(&keeper.config.mount, seen);
                    keeper.take(made).await;
                }
                () = tokio::time::sleep_until(look.unwrap_or(next)), if look.is_some() => {
                    let made = keeper.making.made(&keeper.config.mount);
                    keeper.take(made).await;
                }
                () = tokio::time::sleep_until(next) => break,
            }
        }
    }
}

/// A cgroup of which something is not known yet, or which the node could not adopt.
struct Waits {
    /// When it is tried again.
    next: Instant,
    /// How long that was put off.
    pause: Duration,
    /// What was said to be in its way.
    said: Vec<Obstacle>,
}

struct Keeper {
    config: Config,
    handle: Handle,
    rules: Arc<[Rule]>,
    /// The same, for others.
    in_force: watch::Sender<InForce>,
    /// Of the file that was read last.
    version: Option<Version>,
    /// What was last said to be wrong with it, unless it was read since.
    fault: Option<String>,
    tree: Tree,
    sources: Sources,
    /// By path.
    waiting: BTreeMap<String, Waits>,
    /// What runtimes are at work on.
    making: InTheMaking,
}

impl Keeper {
    async fn again(&mut self) {
        // Before it is read: what is written while it is read is read the next time.
        let version = Version::of(&self.config.file);
        if version.is_none() || version != self.version {
            match self.config.read() {
                Ok(rules) => {
                    if self.version.is_some() {
                        tracing::info!(rules = rules.len(), "the rules of adoption have changed");
                    }
                    (self.version, self.fault) = (version, None);
                    self.rules = rules.into();
                    self.in_force.send_replace(Some(Arc::clone(&self.rules)));
                    self.waiting.clear();
                    self.tree.miss();
                }
                Err(error) => {
                    // What is in it stays wrong until it is written; whether it can be read may change by itself.
                    let stays = matches!(error, RulesError::Document(_));
                    let error = launch::chain(&error);
                    if self.fault.as_ref() != Some(&error) {
                        tracing::error!(
                            error,
                            "the rules of adoption stay as they were: the file cannot be used"
                        );
                    }
                    self.fault = Some(error);
                    if stays {
                        self.version = version;
                    }
                }
            }
        }
        let now = Instant::now();
        let mut seen = Vec::new();
        if self.tree.misses_some() {
            seen = self.tree.look_through(&self.rules);
            seen.retain(|path| !self.making.has(path));
            let there: HashSet<&str> = seen.iter().map(String::as_str).collect();
            self.waiting.retain(|path, _| there.contains(path.as_str()));
            seen.retain(|path| self.waiting.get(path).is_none_or(|waits| waits.next <= now));
        } else {
            let due = self.waiting.iter().filter(|(_, waits)| waits.next <= now);
            seen.extend(due.map(|(path, _)| path.clone()));
        }
        self.take(seen).await;
    }

    /// Adopts what a rule takes, of these: first what paths alone decide.
    async fn take(&mut self, mut seen: Vec<String>) {
        // Each before what is below it.
        seen.sort();
        seen.dedup();
        let mut taken = HashSet::new();
        let mut open = HashSet::new();
        let mut later = Vec::new();
        let mut found = Vec::new();
        for path in seen {
            if is_below(&path, |above| taken.contains(above)) {
                self.waiting.remove(&path);
            } else if matches!(by_path(&self.rules, &path, true), Choice::AskContainer | Choice::AskPod)
                || is_below(&path, |above| open.contains(above) || self.waiting.contains_key(above))
            {
                open.insert(path.clone());
                later.push(path);
            } else if let Some(task) = self.judge(&path).await {
                taken.insert(path.clone());
                found.push((path, task));
            }
        }
        let mut adopted = self.adopt(found).await;
        for path in later {
            if is_below(&path, |above| taken.contains(above)) {
                self.waiting.remove(&path);
            } else if is_below(&path, |above| self.waiting.contains_key(above)) {
                // What is above may be taken, and this with it.
                self.wait(path, AGAIN, None);
            } else if let Some(task) = self.judge(&path).await {
                taken.insert(path.clone());
                adopted.extend(self.adopt(vec![(path, task)]).await);
            }
        }
        if !adopted.is_empty() {
            self.handle.tell(move |node| node.join_found(&adopted)).await;
        }
    }

    /// What a cgroup becomes, if that is known.
    async fn judge(&mut self, path: &str) -> Option<Found> {
        match self.sources.judge(&self.rules, path).await {
            Answer::Nobody => drop(self.waiting.remove(path)),
            Answer::NotYet(why) => self.wait(path.to_owned(), AGAIN_AT_LAST, why),
            Answer::Taken(task) => return Some(*task),
        }
        None
    }

    /// Hands them to the node; the tasks that came of it.
    async fn adopt(&mut self, mut found: Vec<(String, Found)>) -> Vec<TaskId> {
        let mut adopted = Vec::new();
        while !found.is_empty() {
            let rest = found.split_off(found.len().min(BATCH));
            let batch = std::mem::replace(&mut found, rest);
            let (paths, tasks): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
            let (reply, answer) = tokio::sync::oneshot::channel();
            self.handle
                .tell(move |node| {
                    // Nobody listens once the agent ends.
                    let _ = reply.send(node.adopt_found(tasks));
                })
                .await;
            let Ok(results) = answer.await else { break };
            for (path, result) in paths.into_iter().zip(results) {
                match result {
                    Err(why) => self.wait(path, AGAIN_AT_LAST, Some((Obstacle::Refused, why))),
                    Ok(id) => {
                        self.waiting.remove(&path);
                        adopted.extend(id);
                    }
                }
            }
        }
        adopted
    }

    /// Has a cgroup tried again, each time after twice as long, up to `most`; says once what kind of thing is in its way.
    fn wait(&mut self, path: String, most: Duration, why: Option<(Obstacle, String)>) {
        if !self.config.mount.join(&path).exists() {
            self.waiting.remove(&path);
            return;
        }
        if self.waiting.len() >= WAITING_MAX && !self.waiting.contains_key(&path) {
            self.tree.miss();
            return;
        }
        let now = Instant::now();
        let first = Waits { next: now, pause: Duration::ZERO, said: Vec::new() };
        let waits = self.waiting.entry(path.clone()).or_insert(first);
        waits.pause = (waits.pause * 2).clamp(AGAIN, most.max(AGAIN));
        waits.next = now + waits.pause;
        if let Some((kind, why)) = why
            && !waits.said.contains(&kind)
        {
            waits.said.push(kind);
            tracing::warn!(
                cgroup = path,
                why,
                "a rule takes a cgroup that cannot be adopted now; it is tried again"
            );
        }
    }
}

/// Whether one of those that a path is below is such.
fn is_below(path: &str, is_such: impl Fn(&str) -> bool) -> bool {
    path.match_indices('/').any(|(end, _)| is_such(&path[..end]))
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
            let mut tree = Tree::new(&mount, &config.own);
            let mut sources = Sources::new(&config, Of::Any);
            let mut lines = Vec::new();
            let mut seen = tree.look_through(&rules);
            seen.sort();
            let mut taken = HashSet::new();
            for path in seen {
                if is_below(&path, |above| taken.contains(above)) {
                    continue;
                }
                let line = match sources.judge(&rules, &path).await {
                    Answer::Nobody => continue,
                    Answer::NotYet(why) => {
                        let why = why.map_or_else(|| "not known yet".into(), |(_, why)| why);
                        format!("?\t?\t{path}\t{why}")
                    }
                    Answer::Taken(found) => format!("{}\t{}\t{path}", found.rule, found.workload.name),
                };
                taken.insert(path);
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    const NOBODY: u32 = 65_534;

    fn rules() -> Vec<Rule> {
        let text = "rules: [{name: units, select: {unit: \"*.service\"}}, {name: mine, select: {cgroup: user/mine-*}}]";
        document::adoption_rules("r.yaml", text).unwrap()
    }

    #[tokio::test]
    async fn what_is_made_in_a_directory_that_was_given_away_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let mount = directory.path().to_owned();
        let none = mount.join("none");
        let config = Config {
            file: none.clone(),
            mount: mount.clone(),
            own: none.clone(),
            docker: none.clone(),
            podman: none.clone(),
        };
        let (rules, mut tree, mut sources) =
            (rules(), Tree::new(&mount, &none), Sources::new(&config, Of::Any));
        assert!(tree.look_through(&rules).is_empty() && !tree.misses_some());
        fs::create_dir(mount.join("user")).unwrap();
        assert_eq!(tree.changed(&rules).await, ["user"]);
        fs::create_dir(mount.join("user/a.service")).unwrap();
        assert_eq!(tree.changed(&rules).await, ["user/a.service"]);
        assert!(matches!(sources.judge(&rules, "user/a.service").await, Answer::Taken(_)));
        chown(mount.join("user"), Some(NOBODY), Some(NOBODY)).unwrap();
        for name in ["b.service", "mine-1"] {
            fs::create_dir(mount.join("user").join(name)).unwrap();
        }
        assert_eq!(tree.changed(&rules).await, ["user/b.service", "user/mine-1"]);
        assert!(matches!(sources.judge(&rules, "user/b.service").await, Answer::Nobody));
        assert!(matches!(sources.judge(&rules, "user/mine-1").await, Answer::Taken(_)));
    }

    #[test]
    fn what_is_below_is_told_by_whole_components() {
        assert!(is_below("a/b/c", |above| above == "a") && is_below("a/b/c", |above| above == "a/b"));
        assert!(!is_below("ab/c", |above| above == "a") && !is_below("a", |above| above == "a"));
    }
}
