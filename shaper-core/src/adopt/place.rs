//! What the path of a cgroup says about who made it, and for what. A path is from the mount point of cgroup v2 on.
//!
//! | who | systemd's driver | cgroupfs driver |
//! |---|---|---|
//! | Docker | `system.slice/docker-ID.scope` | `docker/ID` |
//! | Podman | `machine.slice/libpod-ID.scope` | `libpod_parent/libpod-ID` |
//! | kubelet, a pod | `kubepods.slice/kubepods-QOS.slice/kubepods-QOS-podUID.slice` | `kubepods/QOS/podUID` |
//! | containerd, CRI-O | `…/cri-containerd-ID.scope`, `…/crio-ID.scope` | `…/ID`, `…/crio-ID` |
//! | Slurm | `system.slice/slurmstepd.scope/job_JOB/step_STEP` | `slurm/uid_UID/job_JOB/step_STEP` |
//!
//! A pod of the class Guaranteed has no `QOS`; in systemd's names the `-` of a UID are `_`.

use std::fmt;

/// What a path says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// The path, without a slash at either end.
    pub path: &'a str,
    /// Its last component.
    pub name: &'a str,
    /// That, where it is a unit of systemd's.
    pub unit: Option<&'a str>,
    /// The container whose cgroup it is.
    pub container: Option<Container<'a>>,
    /// The pod whose cgroup it is, or that a container is in.
    pub pod: Option<Pod>,
    /// The step of a job whose cgroup it is.
    pub step: Option<Step<'a>>,
}

/// Who runs a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// Docker.
    Docker,
    /// Podman.
    Podman,
    /// containerd, for the kubelet.
    Containerd,
    /// CRI-O.
    Crio,
}

impl Runtime {
    /// Their names in documents.
    pub const NAMES: [&'static str; 4] = ["docker", "podman", "containerd", "crio"];

    /// By its name.
    pub fn parse(name: &str) -> Option<Runtime> {
        [Runtime::Docker, Runtime::Podman, Runtime::Containerd, Runtime::Crio]
            .into_iter()
            .find(|runtime| runtime.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Docker => "docker",
            Runtime::Podman => "podman",
            Runtime::Containerd => "containerd",
            Runtime::Crio => "crio",
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Container<'a> {
    /// Who runs it; `None`: the path does not say.
    pub runtime: Option<Runtime>,
    /// Its id: 64 hexadecimal digits.
    pub id: &'a str,
}

/// Kubernetes' class of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    /// Its limits are its requests.
    Guaranteed,
    /// It requests something.
    Burstable,
    /// It requests nothing.
    BestEffort,
}

impl Qos {
    /// Their names in documents: as Kubernetes has them in cgroup paths.
    pub const NAMES: [&'static str; 3] = ["guaranteed", "burstable", "besteffort"];

    /// By its name.
    pub fn parse(name: &str) -> Option<Qos> {
        match name {
            "guaranteed" => Some(Qos::Guaranteed),
            "burstable" => Some(Qos::Burstable),
            "besteffort" => Some(Qos::BestEffort),
            _ => None,
        }
    }
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its UID, as the API has it; of a static pod, the digest of its manifest.
    pub uid: String,
    /// Its class.
    pub qos: Qos,
}

/// A step of one of Slurm's jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    /// The number of the job.
    pub job: &'a str,
    /// The number of the step, or `batch`, `extern`, `interactive`.
    pub step: &'a str,
}

/// Digits of a container's id.
const CONTAINER_ID: usize = 64;
/// Characters of a UUID, and of the digest that a static pod has in its place.
const UID_LENGTHS: [usize; 2] = [36, 32];

impl<'a> Place<'a> {
    /// What a path says.
    pub fn of(path: &'a str) -> Place<'a> {
        let path = path.trim_matches('/');
        let components: Vec<&str> = path.split('/').collect();
        let (name, above) = match components.split_last() {
            Some((name, above)) => (*name, above),
            None => ("", &[][..]),
        };
        let pod = (1..=components.len()).rev().find_map(|end| pod(&components[..end]));
        let is_unit = [".service", ".scope", ".slice"].iter().any(|suffix| name.ends_with(suffix));
        Place {
            path,
            name,
            unit: is_unit.then_some(name),
            container: container(name, above),
            pod,
            step: step(name, above),
        }
    }

    /// Whether it is the cgroup of a pod, rather than one in it.
    pub fn is_pod(&self) -> bool {
        let components: Vec<&str> = self.path.split('/').collect();
        pod(&components).is_some()
    }
}

/// The pod whose cgroup that is.
fn pod(components: &[&str]) -> Option<Pod> {
    let (name, above) = components.split_last()?;
    let (classes, uid) = match name.strip_suffix(".slice") {
        Some(slice) => {
            let (classes, last) = slice.rsplit_once('-')?;
            let classes: Vec<&str> = classes.split('-').collect();
            (classes, last.strip_prefix("pod")?.replace('_', "-"))
        }
        None => (above.to_vec(), name.strip_prefix("pod")?.to_owned()),
    };
    let qos = match classes.as_slice() {
        [.., "kubepods"] => Qos::Guaranteed,
        [.., "kubepods", class] => Qos::parse(class)?,
        _ => return None,
    };
    let is_uid = UID_LENGTHS.contains(&uid.len()) && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    is_uid.then_some(Pod { uid, qos })
}

fn is_id(text: &str) -> bool {
    text.len() == CONTAINER_ID && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn container<'a>(name: &'a str, above: &[&str]) -> Option<Container<'a>> {
    const SCOPES: [(&str, Runtime); 4] = [
        ("docker-", Runtime::Docker),
        ("libpod-", Runtime::Podman),
        ("cri-containerd-", Runtime::Containerd),
        ("crio-", Runtime::Crio),
    ];
    let named = |text: &'a str| {
        let of = |(prefix, runtime)| Some((text.strip_prefix(prefix).filter(|id| is_id(id))?, runtime));
        SCOPES.into_iter().find_map(of)
    };
    if let Some(scope) = name.strip_suffix(".scope") {
        return named(scope).map(|(id, runtime)| Container { runtime: Some(runtime), id });
    }
    let parent = above.last()?;
    match named(name) {
        Some((id, runtime @ Runtime::Podman)) if *parent == "libpod_parent" => {
            Some(Container { runtime: Some(runtime), id })
        }
        Some((id, runtime @ Runtime::Crio)) if pod(above).is_some() => {
            Some(Container { runtime: Some(runtime), id })
        }
        _ if !is_id(name) => None,
        _ if *parent == "docker" => Some(Container { runtime: Some(Runtime::Docker), id: name }),
        _ if pod(above).is_some() => Some(Container { runtime: None, id: name }),
        _ => None,
    }
}

fn step<'a>(name: &'a str, above: &[&'a str]) -> Option<Step<'a>> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let step = name.strip_prefix("step_")?;
    let (job, above) = above.split_last()?;
    let job = job.strip_prefix("job_").filter(|job| is_number(job))?;
    let is_step = is_number(step) || ["batch", "extern", "interactive"].contains(&step);
    let root = above.iter().any(|part| part.ends_with("slurmstepd.scope") || part.starts_with("slurm"));
    (is_step && root).then_some(Step { job, step })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "4f0c2b1e9d8a7f6e5d4c3b2a190807060504030201000f0e0d0c0b0a09080706";
    const UID: &str = "0f3a1c52-7d1e-4c55-9a3b-2f1e0d9c8b7a";

    fn with(path: &str) -> String {
        path.replace("ID", ID).replace("U_U", &UID.replace('-', "_")).replace("UUU", UID)
    }

    #[test]
    fn containers_are_known_by_their_paths() {
        for (path, runtime) in [
            ("system.slice/docker-ID.scope", Some(Runtime::Docker)),
            ("/docker/ID", Some(Runtime::Docker)),
            ("my.slice/docker-ID.scope/", Some(Runtime::Docker)),
            ("machine.slice/libpod-ID.scope", Some(Runtime::Podman)),
            ("libpod_parent/libpod-ID", Some(Runtime::Podman)),
            (
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_U.slice/cri-containerd-ID.scope",
                Some(Runtime::Containerd),
            ),
            ("kubepods.slice/kubepods-podU_U.slice/crio-ID.scope", Some(Runtime::Crio)),
            ("kubepods/besteffort/podUUU/ID", None),
            ("kubepods/podUUU/crio-ID", Some(Runtime::Crio)),
        ] {
            let path = with(path);
            let place = Place::of(&path);
            assert_eq!(place.container, Some(Container { runtime, id: ID }), "{path}");
            assert_eq!(place.pod.is_some(), path.contains("kubepods"), "{path}");
            assert!(!place.is_pod(), "{path}");
        }
        for path in [
            "system.slice/docker-ID.scope/init",
            "system.slice/docker.service",
            "machine.slice/libpod-conmon-ID.scope",
            "other/ID",
            "ID",
            "docker",
            "other/libpod-ID",
            "system.slice/docker-0123.scope",
        ] {
            assert_eq!(Place::of(&with(path)).container, None, "{path}");
        }
    }

    #[test]
    fn pods_are_known_with_their_class() {
        for (path, qos) in [
            ("kubepods.slice/kubepods-podU_U.slice", Qos::Guaranteed),
            ("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_U.slice", Qos::Burstable),
            (
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort-podU_U.slice",
                Qos::BestEffort,
            ),
            ("kubepods/podUUU", Qos::Guaranteed),
            ("kubepods/burstable/podUUU", Qos::Burstable),
            ("kubelet/kubepods/besteffort/podUUU", Qos::BestEffort),
        ] {
            let path = with(path);
            let place = Place::of(&path);
            assert_eq!(place.pod, Some(Pod { uid: UID.into(), qos }), "{path}");
            assert!(place.is_pod(), "{path}");
        }
        let fixed = "kubepods/burstable/pod0123456789abcdef0123456789abcdef";
        assert!(Place::of(fixed).is_pod());
        for path in
            ["kubepods/urgent/podUUU", "podUUU", "kubepods.slice", "a-podU_U.slice", "kubepods/pod..-.."]
        {
            assert_eq!(Place::of(&with(path)).pod, None, "{path}");
        }
    }

    #[test]
    fn steps_of_slurm_and_units() {
        for (path, expected) in [
            ("system.slice/slurmstepd.scope/job_12/step_0", Some(("12", "0"))),
            ("system.slice/node1_slurmstepd.scope/job_12/step_batch", Some(("12", "batch"))),
            ("slurm/uid_1000/job_3/step_extern", Some(("3", "extern"))),
            ("system.slice/slurmstepd.scope/job_12/step_0/user", None),
            ("system.slice/slurmstepd.scope/job_12", None),
            ("user.slice/job_1/step_0", None),
        ] {
            let step = Place::of(path).step.map(|Step { job, step }| (job, step));
            assert_eq!(step, expected, "{path}");
        }
        assert_eq!(Place::of("system.slice/nginx.service").unit, Some("nginx.service"));
        assert_eq!(Place::of("system.slice/nginx.service/worker").unit, None);
        assert_eq!(Place::of("").name, "");
    }

    proptest! {
        #[test]
        fn no_path_panics_and_a_name_is_its_end(
            path in "(/|[a-z_-]{0,6}|docker-|libpod-|kubepods|pod|\\.scope|\\.slice|job_1|step_0|[0-9a-f]{64}){0,8}"
        ) {
            let place = Place::of(&path);
            prop_assert!(path.contains(place.path) && place.path.ends_with(place.name));
            if let Some(container) = place.container {
                prop_assert!(is_id(container.id) && place.name.contains(container.id));
            }
            let _ = place.is_pod();
        }
    }
}
