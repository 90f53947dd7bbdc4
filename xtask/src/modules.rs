//! Kernel modules: which ones the tests want, and in what order they go in.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// What the VM's tests may use. One that a kernel has built in needs no loading.
const WANTED: &[&str] = &[
    // devices
    "veth",
    "dummy",
    "ifb",
    "loop",
    "null_blk",
    "dm_delay",
    // queueing disciplines
    "sch_fq",
    "sch_fq_codel",
    "sch_cake",
    "sch_htb",
    "sch_ingress",
    "sch_netem",
    "sch_prio",
    "sch_tbf",
    // classifiers and actions
    "cls_bpf",
    "cls_flower",
    "cls_matchall",
    "cls_u32",
    "act_bpf",
    "act_mirred",
    "act_police",
    // sockets
    "inet_diag",
    "tcp_bbr",
    "tcp_diag",
    // a machine of QEMU's, and what is on its disk
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "ext4",
    // disks of scsi_debug
    "sd_mod",
    // swap in memory, and its compressors where they are not built in
    "lzo_rle",
    "lz4",
    "zram",
];

/// What a test inserts by itself, with parameters of its own: a disk of these is there for that test alone.
const ON_DEMAND: &[&str] = &["scsi_debug"];

/// What a machine needs besides whose root is this machine's.
pub(crate) const HOST_ROOT: &[&str] = &["9pnet_virtio", "9p", "overlay"];

/// The modules of one kernel, as depmod describes them.
struct Index {
    folder: PathBuf,
    /// By module name: its file, then those it needs, nearest first; all relative to `folder`.
    files: HashMap<String, Vec<String>>,
    builtin: HashSet<String>,
}

impl Index {
    fn read(folder: &Path) -> Result<Self> {
        let read = |name| {
            let file = folder.join(name);
            fs::read_to_string(&file).with_context(|| format!("cannot read {}; run depmod", file.display()))
        };
        Ok(Self::parse(folder, &read("modules.dep")?, &read("modules.builtin")?))
    }

    fn parse(folder: &Path, dependencies: &str, builtin: &str) -> Self {
        let files = dependencies.lines().filter_map(|line| line.split_once(':')).map(|(file, needs)| {
            let files = std::iter::once(file).chain(needs.split_whitespace()).map(str::to_owned).collect();
            (name_of(file), files)
        });
        Self {
            folder: folder.to_owned(),
            files: files.collect(),
            builtin: builtin.lines().map(name_of).collect(),
        }
    }

    /// The files to insert for `wanted`, each after those it needs, and the names that this kernel does not know.
    fn resolve<'a>(&self, wanted: &[&'a str]) -> (Vec<PathBuf>, Vec<&'a str>) {
        let (mut order, mut unknown) = (Vec::new(), Vec::new());
        for &name in wanted.iter().filter(|name| !self.builtin.contains(**name)) {
            let Some(files) = self.files.get(name) else {
                unknown.push(name);
                continue;
            };
            for file in files.iter().rev().map(|file| self.folder.join(file)) {
                if !order.contains(&file) {
                    order.push(file);
                }
            }
        }
        (order, unknown)
    }
}

/// A module ready to be inserted.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) data: Vec<u8>,
    /// Whether it is inserted at the start, and not by a test.
    pub(crate) at_start: bool,
}

/// The modules that tests want of the kernel whose `/lib/modules/RELEASE` is `folder`, after the `required` ones, in the
/// order to insert them.
pub(crate) fn wanted(folder: &Path, required: &[&str]) -> Result<Vec<Module>> {
    let index = Index::read(folder)?;
    let (_, absent) = index.resolve(required);
    if !absent.is_empty() {
        bail!("the kernel of {} has no {}", folder.display(), absent.join(" "));
    }
    let (order, unknown) = index.resolve(&[required, WANTED, ON_DEMAND].concat());
    if !unknown.is_empty() {
        eprintln!("not in this kernel: {}", unknown.join(" "));
    }
    order
        .iter()
        .map(|file| {
            let name = name_of(&file.to_string_lossy());
            Ok(Module { data: decompress(file)?, at_start: !ON_DEMAND.contains(&name.as_str()), name })
        })
        .collect()
}

fn decompress(file: &Path) -> Result<Vec<u8>> {
    let tool = match file.extension().and_then(|e| e.to_str()) {
        Some("ko") => return fs::read(file).with_context(|| format!("cannot read {}", file.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{} is compressed in an unknown way", file.display()),
    };
    let mut command = Command::new(tool);
    let output = process::output(command.arg("-dc").arg(file))?;
    if !output.status.success() {
        bail!("`{}` failed: {}", process::shown(&command), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is the module `virtio_rng`.
fn name_of(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split('.').next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/drivers/net/veth.ko.xz:
kernel/drivers/md/dm-delay.ko.xz: kernel/drivers/md/dm-mod.ko.xz kernel/drivers/dax/dax.ko.xz
kernel/drivers/md/dm-mod.ko.xz: kernel/drivers/dax/dax.ko.xz
kernel/drivers/dax/dax.ko.xz:
";

    fn resolve<'a>(wanted: &[&'a str]) -> (Vec<String>, Vec<&'a str>) {
        let index = Index::parse(Path::new("/m"), DEPENDENCIES, "kernel/net/sched/sch_fq_codel.ko\n");
        let (order, unknown) = index.resolve(wanted);
        (order.iter().map(|file| name_of(&file.to_string_lossy())).collect(), unknown)
    }

    #[test]
    fn what_a_module_needs_goes_in_before_it_and_once() {
        let (order, unknown) = resolve(&["dm_delay", "veth", "dm_mod"]);
        assert_eq!(order, ["dax", "dm_mod", "dm_delay", "veth"]);
        assert!(unknown.is_empty());
    }

    #[test]
    fn built_in_modules_are_left_out_and_unknown_ones_reported() {
        assert_eq!(resolve(&["sch_fq_codel", "sch_nope"]), (vec![], vec!["sch_nope"]));
    }
}
