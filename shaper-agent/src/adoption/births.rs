//! Containers that were made and are not started yet (`shaper-runtime` asks for them): which rule takes one is judged while its
//! runtime waits, and nobody else does.

use std::{fs, io, sync::Arc};

use shaper_core::adopt::{Place, Rule};
use tokio::sync::watch;

use super::{
    Config, InForce,
    ask::{Answer, Of, Sources},
    tree,
};
use crate::node::Found;

/// Judges them. Clones share the rules.
#[derive(Clone, Debug)]
pub struct Births {
    config: Config,
    rules: watch::Receiver<InForce>,
}

/// Why nobody can say what becomes of one.
#[derive(Debug, thiserror::Error)]
pub enum Unjudged {
    /// Where it is.
    #[error("cannot tell the cgroup of process {pid}")]
    Place {
        /// Its first process.
        pid: u32,
        /// What went wrong.
        source: io::Error,
    },
    /// It is in none of cgroup v2.
    #[error("process {0} is in no cgroup of its own: the runtime has to use cgroup v2")]
    NoCgroup(u32),
    /// What rules have to know is not known.
    #[error("cannot say now which rule takes cgroup {cgroup}: {why}")]
    NotYet {
        /// The cgroup, or one above.
        cgroup: String,
        /// What is in the way.
        why: String,
    },
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
}

impl Births {
    pub(super) fn new(config: Config, rules: watch::Receiver<InForce>) -> Births {
        Births { config, rules }
    }

    /// What becomes of the container whose first process that is, and whether that is the container's own; `None`: no rule
    /// takes it. What is taken may be a cgroup above, which others are in as well: a pod's.
    pub async fn judge(&self, pid: u32) -> Result<Option<(Found, bool)>, Unjudged> {
        let path = cgroup_of(pid)?;
        if tree::is_the_agents(&self.config, &path) {
            return Ok(None);
        }
        let mut rules = self.rules.clone();
        let in_force = rules.wait_for(Option::is_some).await.map(|in_force| in_force.clone());
        let rules: Arc<[Rule]> = in_force.map_err(|_| Unjudged::Ending)?.unwrap_or_default();
        let mut sources = Sources::new(&self.config, Of::Starting);
        // From the top: what is taken is taken whole.
        let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
        for end in ends {
            let above = &path[..end];
            match sources.judge(&rules, above).await {
                Answer::Nobody => {}
                Answer::Taken(found) => return Ok(Some((*found, is_own(above, &path)))),
                Answer::NotYet(why) => {
                    let why =
                        why.map_or_else(|| "its runtime has not heard of it".to_owned(), |(_, why)| why);
                    return Err(Unjudged::NotYet { cgroup: above.to_owned(), why });
                }
            }
        }
        Ok(None)
    }
}

/// Whether a cgroup is that of a container whose first process is there. Below systemd's scope crun makes another, of that name
/// (crun(1), `run.oci.systemd.subgroup`), for what it runs. A pod's is nobody's own.
fn is_own(cgroup: &str, there: &str) -> bool {
    matches!(there.strip_prefix(cgroup), Some("" | "/container")) && !Place::of(cgroup).is_pod()
}

/// From the mount point of cgroup v2 on.
fn cgroup_of(pid: u32) -> Result<String, Unjudged> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .map_err(|source| Unjudged::Place { pid, source })?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    // `..`: it is outside of this process's cgroup namespace.
    if path.is_empty() || path.split('/').any(|part| part == "..") {
        return Err(Unjudged::NoCgroup(pid));
    }
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_own_cgroup_is_told_from_one_that_it_is_in() {
        assert!(is_own("a/b", "a/b") && is_own("a/b.scope", "a/b.scope/container"));
        let pod = "kubepods/burstable/pod0f3a1c52-7d1e-4c55-9a3b-2f1e0d9c8b7a";
        assert!(!is_own(pod, &format!("{pod}/container")));
        assert!(!is_own("a", "a/b") && !is_own("a/b", "a/b/container/x") && !is_own("a/b", "a/bc"));
    }
}
