//! The broker's configuration of identities: as whom a submitter's tasks run, where, and how urgently; and who is
//! no longer believed.
//!
//! ```yaml
//! identities:
//!   - id: spiffe://cluster.local/submitter/etl
//!     uid: 1500
//!     gid: 1500
//!     namespaces: [etl]
//!     max_priority: medium
//! revoked:
//!   - spiffe://cluster.local/node/n3
//! revoked_serials:
//!   - 3fa9c0
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use shaper_core::spec::{Policy, Priority, TaskSpec};

use crate::{
    Identity, Role,
    files::{self, FileError},
    name::Holder,
};

/// A file is no longer than this.
const LONGEST: u64 = 4 << 20;

/// What a submitter may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Who owns its tasks, and as whom they run.
    pub uid: u32,
    /// Their group.
    pub gid: u32,
    /// Other groups that they may have.
    pub groups: Vec<u32>,
    /// Where they may be, exactly.
    pub namespaces: Vec<String>,
    /// How urgent they may be.
    pub max_priority: Priority,
}

/// A rule that something broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// Not theirs.
    #[error("namespace `{wanted}` is not among those of this identity ({})", .allowed.join(", "))]
    Namespace {
        /// What was asked for.
        wanted: String,
        /// What would do.
        allowed: Vec<String>,
    },
    /// More urgent than it may be.
    #[error("priority {wanted} is above {most}, which is the most that this identity may claim")]
    Priority {
        /// What was asked for.
        wanted: String,
        /// What would do.
        most: String,
    },
    /// Somebody else.
    #[error("uid {wanted} is not the uid of this identity, {uid}; leave run_as out")]
    Uid {
        /// What was asked for.
        wanted: u32,
        /// What would do.
        uid: u32,
    },
    /// A group that they do not have.
    #[error("gid {0} is not a group of this identity; leave run_as out")]
    Gid(u32),
}

impl Breach {
    /// As a program knows it.
    pub fn rule(&self) -> &'static str {
        match self {
            Breach::Namespace { .. } => "NAMESPACE_NOT_OF_IDENTITY",
            Breach::Priority { .. } => "PRIORITY_ABOVE_MAXIMUM",
            Breach::Uid { .. } => "UID_NOT_OF_IDENTITY",
            Breach::Gid(_) => "GID_NOT_OF_IDENTITY",
        }
    }
}

fn priority_name(priority: Priority) -> &'static str {
    match priority {
        Priority::Low => "low",
        Priority::Medium => "medium",
        Priority::High => "high",
    }
}

impl Grant {
    /// Whether something in this namespace is theirs.
    pub fn covers(&self, namespace: &str) -> Result<(), Breach> {
        if self.namespaces.iter().any(|own| own == namespace) {
            return Ok(());
        }
        Err(Breach::Namespace {
            wanted: namespace.chars().take(255).collect(),
            allowed: self.namespaces.clone(),
        })
    }

    fn reaches(&self, wanted: Priority) -> Result<(), Breach> {
        if wanted > self.max_priority {
            let most = priority_name(self.max_priority).to_owned();
            return Err(Breach::Priority { wanted: priority_name(wanted).to_owned(), most });
        }
        Ok(())
    }

    /// Whether they may set this.
    pub fn permits_policy(&self, policy: &Policy) -> Result<(), Breach> {
        self.covers(&policy.namespace)?;
        self.reaches(policy.priority)
    }

    /// Whether they may submit this.
    pub fn permits(&self, spec: &TaskSpec) -> Result<(), Breach> {
        self.covers(&spec.namespace)?;
        self.reaches(spec.profile.priority)?;
        let Some(run_as) = &spec.run_as else { return Ok(()) };
        if run_as.uid != self.uid {
            return Err(Breach::Uid { wanted: run_as.uid, uid: self.uid });
        }
        let is_theirs = |gid: &&u32| **gid == self.gid || self.groups.contains(gid);
        match std::iter::once(&run_as.gid).chain(&run_as.groups).find(|gid| !is_theirs(gid)) {
            Some(gid) => Err(Breach::Gid(*gid)),
            None => Ok(()),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    identities: Vec<Entry>,
    #[serde(default)]
    revoked: Vec<Identity>,
    #[serde(default)]
    revoked_serials: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    id: Identity,
    uid: u32,
    gid: u32,
    #[serde(default)]
    groups: Vec<u32>,
    namespaces: Vec<String>,
    max_priority: Priority,
}

/// Why a configuration does not do.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not of the form.
    #[error("{}: {reason}", path.display())]
    Form {
        /// Which.
        path: PathBuf,
        /// Where, and what was expected.
        reason: String,
    },
    /// An entry that cannot be.
    #[error("{}: {id}: {reason}", path.display())]
    Entry {
        /// Which.
        path: PathBuf,
        /// Whose.
        id: Box<Identity>,
        /// Why.
        reason: &'static str,
    },
}

/// All of it. The empty one grants nothing to anybody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    grants: BTreeMap<Identity, Arc<Grant>>,
    revoked: BTreeSet<Identity>,
    revoked_serials: BTreeSet<String>,
}

impl Access {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Access, AccessError> {
        Access::parse(&files::read(path, LONGEST)?, path)
    }

    /// Reads a text; `path` is its name in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Access, AccessError> {
        let form =
            |error: serde_yaml::Error| AccessError::Form { path: path.to_owned(), reason: error.to_string() };
        let Document { identities, revoked, revoked_serials } = serde_yaml::from_str(text).map_err(form)?;
        let mut access = Access {
            revoked: revoked.into_iter().collect(),
            revoked_serials: revoked_serials
                .iter()
                .map(|serial| serial.to_ascii_lowercase().trim_start_matches('0').to_owned())
                .collect(),
            ..Access::default()
        };
        for Entry { id, uid, gid, groups, namespaces, max_priority } in identities {
            let no = |reason| {
                let id = Box::new(id.clone());
                Err(AccessError::Entry { path: path.to_owned(), id, reason })
            };
            if id.role() != Role::Submitter {
                return no(
                    "only submitters have an entry; what the other roles may do is fixed (docs/authorization.md)",
                );
            }
            if uid == 0 || gid == 0 || groups.contains(&0) {
                return no(
                    "nobody submits as uid or gid 0; who needs to is an operator: give them that role",
                );
            }
            if namespaces.is_empty() {
                return no("without namespaces it may do nothing; name some, or remove the entry");
            }
            let grant = Grant { uid, gid, groups, namespaces, max_priority };
            if access.grants.contains_key(&id) {
                return no("it is there twice");
            }
            access.grants.insert(id, Arc::new(grant));
        }
        Ok(access)
    }

    /// What a submitter may: `None` for whoever is not named, letter by letter.
    pub fn grant(&self, identity: &Identity) -> Option<&Arc<Grant>> {
        self.grants.get(identity)
    }

    /// Why a holder of a certificate is not believed any more.
    pub fn distrust(&self, holder: &Holder, now: i64) -> Option<&'static str> {
        if holder.not_after <= now {
            Some("its certificate has expired; renew it: shaper pki rotate")
        } else if self.revoked.contains(&holder.identity)
            || self.revoked_serials.contains(holder.serial.trim_start_matches('0'))
        {
            Some("it was revoked")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "identities:\n  - id: spiffe://d/submitter/etl\n    uid: 1500\n    gid: 1500\n    groups: [7]\n    \
                        namespaces: [etl, etl.b]\n    max_priority: medium\nrevoked: [spiffe://d/node/n3]\n\
                        revoked_serials: [\"0A1b\"]\n";

    fn access(text: &str) -> Result<Access, AccessError> {
        Access::parse(text, Path::new("access.yaml"))
    }

    fn holder(identity: &str) -> Holder {
        Holder {
            identity: identity.parse().unwrap(),
            serial: "0a1c".into(),
            not_after: 100,
            hosts: Vec::new(),
        }
    }

    #[test]
    fn who_is_not_named_exactly_has_nothing() {
        let access = access(TEXT).unwrap();
        let grant = access.grant(&"spiffe://d/submitter/etl".parse().unwrap()).unwrap();
        assert_eq!((grant.uid, grant.max_priority), (1500, Priority::Medium));
        for other in [
            "spiffe://d/submitter/etl2",
            "spiffe://d/submitter/et",
            "spiffe://d/reader/etl",
            "spiffe://e/submitter/etl",
        ] {
            assert_eq!(access.grant(&other.parse().unwrap()), None, "{other}");
        }
        assert!(grant.covers("etl").is_ok() && grant.covers("etl.b").is_ok());
        for other in ["", "et", "etl.", "etl.c", "ETL", "default"] {
            assert!(grant.covers(other).is_err(), "{other}");
        }
        assert_eq!(Access::default().grant(&"spiffe://d/submitter/etl".parse().unwrap()), None);
    }

    #[test]
    fn nobody_is_made_root_and_every_mistake_is_told() {
        for (from, to, told) in [
            ("uid: 1500", "uid: 0", "uid or gid 0"),
            ("gid: 1500", "gid: 0", "uid or gid 0"),
            ("[7]", "[0]", "uid or gid 0"),
            ("submitter/etl", "operator/etl", "only submitters"),
            ("[etl, etl.b]", "[]", "without namespaces"),
            ("max_priority: medium", "max_priority: highest", "unknown variant"),
            ("uid: 1500", "uuid: 1500", "unknown field"),
            ("spiffe://d/node/n3", "node/n3", "spiffe://"),
        ] {
            let error = access(&TEXT.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(told) && error.contains("access.yaml"), "{to}: {error}");
        }
    }

    #[test]
    fn the_expired_and_the_revoked_are_not_believed() {
        let access = access(TEXT).unwrap();
        assert_eq!(access.distrust(&holder("spiffe://d/node/n1"), 99), None);
        assert!(access.distrust(&holder("spiffe://d/node/n1"), 100).is_some());
        assert!(access.distrust(&holder("spiffe://d/node/n3"), 0).is_some());
        let serial = Holder { serial: "0a1b".into(), ..holder("spiffe://d/node/n1") };
        assert!(access.distrust(&serial, 0).is_some());
    }
}
