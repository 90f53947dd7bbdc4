//! The cgroups that the agent works in: a root of its own in every hierarchy that it uses, with the
//! agent in a child of high weight, so that what it shapes cannot starve it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use shaper_core::{id::ExecutionId, limits::Limit, units::Weight};
use shaper_proto::failpoint;

use crate::{
    durable,
    kernel::{
        cgroup::{
            Cgroup, CgroupError, cpu,
            groups::{self, Enable},
        },
        hierarchy::{Hierarchies, place_of},
        v1::{self, Shares, V1Error, V1Group},
    },
};

/// What went wrong with the agent's cgroups.
#[derive(Debug, thiserror::Error)]
pub enum GroundError {
    /// v2.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// v1.
    #[error(transparent)]
    V1(#[from] V1Error),
    /// The note of where the agent came from.
    #[error(transparent)]
    Note(#[from] durable::Error),
    /// /proc, or a v1 directory.
    #[error("cannot {verb} {path}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The cgroup root is at an impossible place.
    #[error(
        "--cgroup-root {path} must be a directory below {mount}, the mount of cgroup v2, whose parent exists"
    )]
    Place {
        /// The root.
        path: PathBuf,
        /// The mount.
        mount: PathBuf,
    },
}

/// Where the agent was before it moved into its own cgroups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Origin {
    /// The boot in which that was.
    boot_id: String,
    /// From the mount point on.
    v2: PathBuf,
    /// Controller and path from its mount point on.
    v1: Vec<(String, PathBuf)>,
}

/// The agent's cgroups.
pub struct Ground {
    hierarchies: Hierarchies,
    root: Cgroup,
    name: String,
    origin: Origin,
    note: PathBuf,
}

const AGENT: &str = "agent";
const SUPERVISORS: &str = "supervisors";
const WARDEN: &str = "warden";
/// The two of a unit.
const SUPERVISOR: &str = "supervisor";
pub(crate) const TASK: &str = "task";
const CLIENT: &str = "client";
/// A task has no business making cgroups by the thousand; its slots would run out.
const DESCENDANTS: u32 = 64;
const AGENT_WEIGHT: Weight = Weight::MAX;

impl Ground {
    /// Makes the cgroups, or finds them, and moves this process into its own.
    pub fn establish(
        hierarchies: &Hierarchies,
        root: &Path,
        state_dir: &Path,
        boot_id: &str,
    ) -> Result<Ground, GroundError> {
        let place = || GroundError::Place { path: root.to_owned(), mount: hierarchies.v2.clone() };
        let (Some(parent), Some(name)) = (root.parent(), root.file_name().and_then(|name| name.to_str()))
        else {
            return Err(place());
        };
        if !parent.starts_with(&hierarchies.v2) || !parent.is_dir() {
            return Err(place());
        }
        let note = state_dir.join("origin.json");
        let origin = match durable::read_json::<Origin>(&note)? {
            Some(origin) if origin.boot_id == boot_id => origin,
            _ => {
                let origin = Origin::of_this_process(hierarchies, boot_id)?;
                durable::write_json(&note, &origin, 0o600)?;
                origin
            }
        };
        let parent = Cgroup::open(&hierarchies.v2, parent)?;
        let (root, _) = parent.make_child(name)?;
        let (agent, _) = root.make_child(AGENT)?;
        // First: the parent may be this process's own cgroup, as where systemd has delegated one, and a cgroup with
        // processes hands no controller down.
        agent.add(std::process::id())?;
        enable_controllers(&parent)?;
        enable_controllers(&root)?;
        let ground = Ground { hierarchies: hierarchies.clone(), root, name: name.into(), origin, note };
        if agent.has(cpu::WEIGHT) {
            agent.set(cpu::WEIGHT, &AGENT_WEIGHT)?;
        }
        if let Some(group) = ground.v1_group("cpu", AGENT)? {
            group.set(v1::CPU_SHARES, &Shares::of(AGENT_WEIGHT))?;
            group.add(std::process::id())?;
        }
        if let Some(group) = ground.v1_group("blkio", AGENT)? {
            group.add(std::process::id())?;
        }
        Ok(ground)
    }

    /// The agent's own cgroup, and its group of the v1 controller for block IO.
    pub fn agent(&self) -> Result<(Cgroup, Option<V1Group>), GroundError> {
        let (cgroup, _) = self.root.make_child(AGENT)?;
        Ok((cgroup, self.v1_group("blkio", AGENT)?))
    }

    /// The cgroup of `shaper-warden`, and its group of the v1 controller for CPUs: of the agent's weight, but not the agent's,
    /// so that what stops the agent as a group does not stop it.
    pub fn warden(&self) -> Result<(Cgroup, Option<V1Group>), GroundError> {
        let (cgroup, _) = self.root.make_child(WARDEN)?;
        if cgroup.has(cpu::WEIGHT) {
            cgroup.set(cpu::WEIGHT, &AGENT_WEIGHT)?;
        }
        let group = self.v1_group("cpu", WARDEN)?;
        if let Some(group) = &group {
            group.set(v1::CPU_SHARES, &Shares::of(AGENT_WEIGHT))?;
        }
        Ok((cgroup, group))
    }

    /// The cgroup of an execution, made if it is not there.
    pub fn make_task(&self, execution: &ExecutionId) -> Result<Cgroup, GroundError> {
        let (cgroup, _) = self.root.make_child(&execution.to_string())?;
        cgroup.set(groups::MAX_DESCENDANTS, &Limit::At(DESCENDANTS))?;
        Ok(cgroup)
    }

    /// Divides the cgroup of a unit, which systemd has made and leaves to us: one for its main process, the supervisor, and
    /// the one that is returned, for the task, since only that one is limited.
    pub fn divide_unit(&self, unit: &Path, supervisor: u32) -> Result<Cgroup, GroundError> {
        let unit = Cgroup::open(&self.hierarchies.v2, unit)?;
        let (group, _) = unit.make_child(SUPERVISOR)?;
        group.add(supervisor)?;
        enable_controllers(&unit)?;
        let (cgroup, _) = unit.make_child(TASK)?;
        cgroup.set(groups::MAX_DESCENDANTS, &Limit::At(DESCENDANTS))?;
        Ok(cgroup)
    }

    /// The cgroup of a task that is that of a slice, which systemd has made.
    pub fn open_slice(&self, slice: &Path) -> Result<Cgroup, GroundError> {
        let cgroup = Cgroup::open(&self.hierarchies.v2, slice)?;
        cgroup.set(groups::MAX_DESCENDANTS, &Limit::At(DESCENDANTS))?;
        Ok(cgroup)
    }

    /// Where in a task's cgroup the client is that runs a container beside it.
    pub fn make_client(&self, task: &Cgroup) -> Result<PathBuf, GroundError> {
        Ok(task.make_child(CLIENT)?.0.path().to_owned())
    }

    /// Lets the cgroup of a task in a unit go, which may be repeated; `is_over`: nothing runs in it, so that it is removed. The
    /// unit goes with its last process.
    pub fn leave_unit<'a>(
        &self,
        cgroup: &Cgroup,
        v1: impl IntoIterator<Item = &'a V1Group>,
        is_over: bool,
    ) -> Result<(), GroundError> {
        for group in v1 {
            self.dissolve_v1(group)?;
        }
        failpoint::hit("end-between-hierarchies");
        if is_over {
            Ok(cgroup.remove()?)
        } else {
            Ok(cgroup.set(groups::MAX_DESCENDANTS, &Limit::Unlimited)?)
        }
    }

    /// The group of an execution, or of the agent, in the hierarchy of a v1 controller, made if it is
    /// not there; `None` where v2 has the controller or nobody has.
    pub fn v1_group(&self, controller: &str, name: &str) -> Result<Option<V1Group>, GroundError> {
        let Some((mount, root)) = self.v1_root(controller) else { return Ok(None) };
        V1Group::make(mount, controller, &root)?;
        Ok(Some(V1Group::make(mount, controller, &root.join(name))?))
    }

    fn v1_root(&self, controller: &str) -> Option<(&Path, PathBuf)> {
        let (_, mount) = self.hierarchies.v1.iter().find(|(name, _)| name == controller)?;
        let (_, origin) = self.origin.v1.iter().find(|(name, _)| name == controller)?;
        Some((mount, origin.join(&self.name)))
    }

    /// Where supervisors run: beside the agent, at the weight of everybody.
    pub fn supervisors(&self) -> Result<Vec<PathBuf>, GroundError> {
        let (cgroup, _) = self.root.make_child(SUPERVISORS)?;
        let mut groups = vec![cgroup.path().to_owned()];
        groups.extend(self.v1_group("cpu", SUPERVISORS)?.map(|group| group.directory().to_owned()));
        Ok(groups)
    }

    /// Moves what runs in an execution's cgroups out of ours, and removes them. May be repeated, as long as the one of v2 is
    /// there: it goes last.
    pub fn dissolve<'a>(
        &self,
        cgroup: &Cgroup,
        v1: impl IntoIterator<Item = &'a V1Group>,
    ) -> Result<(), GroundError> {
        for group in v1 {
            self.dissolve_v1(group)?;
        }
        failpoint::hit("end-between-hierarchies");
        cgroup.evacuate(&self.outside()?)?;
        Ok(cgroup.remove()?)
    }

    fn dissolve_v1(&self, group: &V1Group) -> Result<(), GroundError> {
        if !group.exists() {
            return Ok(());
        }
        if let Some((mount, root)) = self.v1_root(group.controller()) {
            let origin = root.parent().unwrap_or(Path::new(""));
            group.evacuate(&V1Group::at(mount, group.controller(), nearest(mount, origin)))?;
        }
        let path = group.directory().to_owned();
        group.remove().map_err(|source| GroundError::File { verb: "remove", path, source })
    }

    /// Where released tasks go on: the nearest cgroup above ours that may hold processes. Not where the
    /// agent came from: that may be its unit, and ends with it.
    fn outside(&self) -> Result<Cgroup, GroundError> {
        let above = self.root.path().parent().unwrap_or(&self.hierarchies.v2);
        self.nearest_for_processes(above)
    }

    /// The cgroup at `path`, or the nearest one above it that is still there and may hold processes.
    fn nearest_for_processes(&self, path: &Path) -> Result<Cgroup, GroundError> {
        let mount = &self.hierarchies.v2;
        for ancestor in path.ancestors().take_while(|ancestor| ancestor.starts_with(mount)) {
            match Cgroup::open(mount, ancestor) {
                Ok(cgroup) if cgroup.may_hold_processes() => return Ok(cgroup),
                Ok(_) => {}
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Cgroup::open(mount, mount)?)
    }

    /// Moves everything out of our cgroups, the agent to where it came from, and removes them.
    pub fn remove(&self) -> Result<Vec<String>, GroundError> {
        let mut done = Vec::new();
        let home = self.nearest_for_processes(&self.hierarchies.v2.join(&self.origin.v2))?;
        home.add(std::process::id())?;
        self.root.evacuate(&self.outside()?)?;
        for (controller, _) in &self.hierarchies.v1 {
            let Some((mount, root)) = self.v1_root(controller) else { continue };
            let directory = mount.join(&root);
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(GroundError::File { verb: "list", path: directory, source }),
            };
            for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
                self.dissolve_v1(&V1Group::at(mount, controller, &root.join(entry.file_name())))?;
            }
            self.dissolve_v1(&V1Group::at(mount, controller, &root))?;
            done.push(format!("{}: removed", directory.display()));
        }
        self.root.remove()?;
        done.push(format!("{}: removed", self.root.path().display()));
        let path = self.note.clone();
        fs::remove_file(&path).map_err(|source| GroundError::File { verb: "remove", path, source })?;
        Ok(done)
    }
}

impl Origin {
    fn of_this_process(hierarchies: &Hierarchies, boot_id: &str) -> Result<Origin, GroundError> {
        let place = |controller: Option<&str>| {
            place_of("self", controller).map_err(|source| GroundError::File {
                verb: "read",
                path: "/proc/self/cgroup".into(),
                source,
            })
        };
        let mut v1 = Vec::new();
        for (controller, _) in &hierarchies.v1 {
            v1.push((controller.clone(), place(Some(controller))?));
        }
        Ok(Origin { boot_id: boot_id.to_owned(), v2: place(None)?, v1 })
    }
}

/// `path` below `mount`, or its nearest ancestor that is still there.
fn nearest<'a>(mount: &Path, path: &'a Path) -> &'a Path {
    path.ancestors().find(|ancestor| mount.join(ancestor).is_dir()).unwrap_or(Path::new(""))
}

/// Hands the controllers that shaper uses down to the children of a cgroup, those that it has itself.
fn enable_controllers(cgroup: &Cgroup) -> Result<(), GroundError> {
    let available = cgroup.get(groups::CONTROLLERS)?;
    let enabled = cgroup.get(groups::SUBTREE_CONTROL)?;
    for controller in ["cpu", "memory", "io"] {
        if available.contains(controller) && !enabled.contains(controller) {
            cgroup.set(groups::SUBTREE_CONTROL, &Enable(controller))?;
        }
    }
    Ok(())
}
