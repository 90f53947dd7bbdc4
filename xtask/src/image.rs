//! `cargo xtask image`: one OCI image of all daemons and the command, in an archive that runtimes and registries' tools take.
//! It has the programs, the kernel programs, the libraries that those need, and no shell.

mod layer;
mod layout;

use std::collections::BTreeMap;
use std::env;
use std::env::consts::ARCH;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use self::layer::Layer;
use crate::bins::{self, BinDir};
use crate::{ebpf, initramfs, process, workspace};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Of the dev profile's programs, ten times as large
    #[arg(long)]
    debug: bool,
    /// The archive [default: target/shaper-image.tar]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");
const REPOSITORY: &str = env!("CARGO_PKG_REPOSITORY");
/// As packages install them (docs/operating.md).
const DAEMONS: &str = "usr/lib/shaper";
const COMMAND: (&str, &str) = ("shaper", "usr/bin");
/// The broker's user: a number that no other image's user is likely to have.
pub(crate) const BROKER: u32 = 10_001;

pub(crate) fn run(args: &Args) -> Result<()> {
    let bins = if args.debug { bins::build()? } else { bins::build_shipped()? };
    let object = ebpf::build()?.programs;
    let out = args.out.clone().unwrap_or_else(|| workspace::target().join("shaper-image.tar"));
    let layer = contents(&bins, &object)?;
    let about = About { architecture: architecture(ARCH)?, created: created()?, labels: labels() };
    let digest = layout::write(&layer, &about, &out)?;
    println!("{} ({digest})", out.display());
    println!("load it: skopeo copy oci-archive:{} docker://REGISTRY/shaper:{VERSION}", out.display());
    println!("         ctr -n k8s.io images import --base-name REGISTRY/shaper {}", out.display());
    println!("         podman load -i {}", out.display());
    Ok(())
}

/// What is said of an image.
pub(crate) struct About {
    architecture: &'static str,
    /// Of everything in it.
    created: OffsetDateTime,
    labels: BTreeMap<&'static str, String>,
}

impl About {
    fn seconds(&self) -> u64 {
        self.created.unix_timestamp().unsigned_abs()
    }

    fn created(&self) -> Result<String> {
        self.created.format(&Rfc3339).context("SOURCE_DATE_EPOCH is no time that can be written")
    }
}

fn contents(bins: &BinDir, object: &Path) -> Result<Layer> {
    let mut layer = Layer::default();
    for name in bins::SHIPPED {
        let program = bins.bin(name);
        let folder = if name == COMMAND.0 { COMMAND.1 } else { DAEMONS };
        layer.copy(&program, &format!("{folder}/{name}"), 0o755)?;
        for library in initramfs::libraries_of(&program)? {
            layer.copy(Path::new(&library), library.trim_start_matches('/'), 0o755)?;
        }
    }
    layer.copy(object, &format!("{DAEMONS}/shaper.bpf.o"), 0o644)?;
    let broker = format!("shaper-broker:x:{BROKER}");
    let passwd = format!(
        "root:x:0:0:root:/:/nonexistent\n{broker}:{BROKER}:shaper's broker:/var/lib/shaper-broker:/nonexistent\n"
    );
    layer.file("etc/passwd", 0o644, passwd.into_bytes())?;
    layer.file("etc/group", 0o644, format!("root:x:0:\n{broker}:\n").into_bytes())?;
    // Without it names are not looked up in /etc/hosts, which a kubelet writes.
    layer.file("etc/nsswitch.conf", 0o644, b"hosts: files dns\n".to_vec())?;
    let licence = workspace::root().join("LICENSE");
    layer.copy(&licence, "usr/share/doc/shaper/copyright", 0o644)?;
    Ok(layer)
}

fn labels() -> BTreeMap<&'static str, String> {
    let mut labels = BTreeMap::from([
        ("org.opencontainers.image.title", "shaper".to_owned()),
        (
            "org.opencontainers.image.description",
            "Reshapes the resources of running tasks on cluster nodes".to_owned(),
        ),
        ("org.opencontainers.image.version", VERSION.to_owned()),
        ("org.opencontainers.image.source", REPOSITORY.to_owned()),
        ("org.opencontainers.image.licenses", env!("CARGO_PKG_LICENSE").to_owned()),
    ]);
    // In a tarball there is none.
    let mut git = std::process::Command::new("git");
    git.args(["rev-parse", "HEAD"]).current_dir(workspace::root());
    if let Ok(revision) = process::read(&mut git) {
        labels.insert("org.opencontainers.image.revision", revision.trim().to_owned());
    }
    labels
}

/// When it was made: 1970, unless <https://reproducible-builds.org/specs/source-date-epoch/> is set.
fn created() -> Result<OffsetDateTime> {
    let seconds = match env::var("SOURCE_DATE_EPOCH") {
        Ok(seconds) => seconds
            .parse::<u32>()
            .context("SOURCE_DATE_EPOCH has to be seconds since 1970, such as `git log -1 --format=%ct`")?,
        Err(_) => 0,
    };
    OffsetDateTime::from_unix_timestamp(seconds.into()).context("SOURCE_DATE_EPOCH is no time")
}

/// What Go calls it, and with Go the image format.
fn architecture(of_rust: &str) -> Result<&'static str> {
    match of_rust {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("images are made on x86_64 and aarch64, and this is {other}"),
    }
}

/// Replaces `to` when `write` has made the whole of it.
fn whole(to: &Path, write: impl FnOnce(&mut fs::File) -> Result<()>) -> Result<()> {
    let partial = to.with_extension("partial");
    let mut file =
        fs::File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    write(&mut file)?;
    fs::rename(&partial, to).with_context(|| format!("cannot move {} into place", partial.display()))
}
