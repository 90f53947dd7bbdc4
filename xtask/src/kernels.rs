//! Kernels for the VM: Debian's, fetched once by this machine's own apt, unpacked and never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fmt};

use anyhow::{Context, Result, bail};

use crate::{process, setup, workspace};

/// A kernel to boot.
pub(crate) struct Kernel {
    /// What was asked for, such as `6.12`.
    pub(crate) series: String,
    /// What `uname -r` says in it.
    pub(crate) release: String,
    pub(crate) image: PathBuf,
    /// Its `/lib/modules/RELEASE`.
    pub(crate) modules: PathBuf,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.series, self.release)
    }
}

/// A kernel that the caller brings.
pub(crate) fn given(image: &Path, modules: &Path) -> Result<Kernel> {
    let absolute =
        |path: &Path| path.canonicalize().with_context(|| format!("cannot find {}", path.display()));
    let (image, modules) = (absolute(image)?, absolute(modules)?);
    let release = file_name(&modules)?;
    let series = release.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
    Ok(Kernel { series, release, image, modules })
}

/// The newest of Debian's kernels in `series`, from the cache or from apt.
pub(crate) fn debian(series: &str) -> Result<Kernel> {
    let folder = cache().join(series);
    if !folder.exists() {
        fetch(series, &folder).with_context(|| {
            format!(
                "no Linux {series} for the VM (bring one with `--kernel-image FILE --modules DIR`, or add Debian \
                 sources that have linux-image-{series}…-cloud-amd64)"
            )
        })?;
    }
    unpacked(series, &folder)
        .with_context(|| format!("{} is incomplete; remove it to have it fetched again", folder.display()))
}

fn cache() -> PathBuf {
    match env::var_os("SHAPER_VM_CACHE") {
        Some(folder) => folder.into(),
        None => workspace::target().join("vm/kernels"),
    }
}

/// The kernel in a folder that `fetch` made.
fn unpacked(series: &str, folder: &Path) -> Result<Kernel> {
    let modules = only_entry(&folder.join("lib/modules"))?;
    let release = file_name(&modules)?;
    let image = folder.join("boot").join(format!("vmlinuz-{release}"));
    if !image.is_file() {
        bail!("there is no {}", image.display());
    }
    Ok(Kernel { series: series.to_owned(), release, image, modules })
}

/// Fetches the newest package of `series` and unpacks it to `folder`, which appears when it is complete.
fn fetch(series: &str, folder: &Path) -> Result<()> {
    if process::find("apt-get").is_none() {
        bail!("there is no apt-get here");
    }
    let package = match newest_package(series)? {
        Some(package) => package,
        None if setup::apt_update()? => {
            newest_package(series)?.with_context(|| format!("apt knows no cloud kernel {series}"))?
        }
        None => bail!("apt knows no cloud kernel {series} (as root: apt-get update)"),
    };
    eprintln!("fetching {package} into {}: a kernel for the VM, which is not installed", folder.display());

    let partial = folder.with_file_name(format!("{series}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let mut download = Command::new("apt-get");
    download.args(["download", "-q"]).arg(&package).current_dir(&partial);
    if setup::is_root() {
        download.args(["-o", "APT::Sandbox::User=root"]); // apt's own user cannot write to our folder
    }
    process::run(&mut download)?;
    let deb = only_entry(&partial)?;
    process::run(Command::new("dpkg").arg("-x").arg(&deb).arg(&partial))?;
    fs::remove_file(&deb).with_context(|| format!("cannot remove {}", deb.display()))?;

    // Debian moves modules from /lib to /usr/lib, and kmod looks in one of them: serve both.
    if !partial.join("lib").exists() {
        link("usr/lib", &partial.join("lib"))?;
    } else if !partial.join("usr/lib").exists() {
        fs::create_dir_all(partial.join("usr")).context("cannot create usr")?;
        link("../lib", &partial.join("usr/lib"))?;
    }
    let release = file_name(&only_entry(&partial.join("lib/modules"))?)?;
    process::run(Command::new(tool("depmod")).arg("-b").arg(&partial).arg(&release))?;
    fs::rename(&partial, folder).with_context(|| format!("cannot move {} into place", partial.display()))
}

/// A tool that a user's PATH may not lead to.
fn tool(name: &str) -> PathBuf {
    process::find(name).unwrap_or_else(|| name.into())
}

fn newest_package(series: &str) -> Result<Option<String>> {
    let pattern = format!("^linux-image-{}\\.[0-9]+.*-cloud-amd64$", series.replace('.', "\\."));
    let found = process::read(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
    Ok(newest(series, &found))
}

/// The package with the greatest version in what `apt-cache search` printed.
fn newest(series: &str, found: &str) -> Option<String> {
    let prefix = format!("linux-image-{series}.");
    found
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with(&prefix) && name.ends_with("-cloud-amd64") && !name.contains("-rt-"))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

/// The numbers in a version, for comparison: `6.12.117+deb12` is newer than `6.12.12`.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).and_then(|entries| {
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()
    });
    match entries.with_context(|| format!("cannot list {}", folder.display()))?.as_slice() {
        [entry] => Ok(entry.clone()),
        entries => bail!("{} has {} entries where one is expected", folder.display(), entries.len()),
    }
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).with_context(|| format!("{} has no usable name", path.display()))
}

fn link(points_to: &str, at: &Path) -> Result<()> {
    std::os::unix::fs::symlink(points_to, at).with_context(|| format!("cannot create {}", at.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_is_chosen_by_number() {
        let found = "\
linux-image-6.12.9+deb12-cloud-amd64 - Linux 6.12 for x86-64 cloud (signed)
linux-image-6.12.117+deb12-cloud-amd64 - Linux 6.12 for x86-64 cloud (signed)
linux-image-6.12.117+deb12-rt-cloud-amd64 - none such
linux-image-6.12.118+deb12-cloud-amd64-dbg - Debug symbols
linux-image-6.12-cloud-amd64 - Linux for x86-64 cloud (meta-package)
";
        assert_eq!(newest("6.12", found).as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(newest("6.1", found), None);

        let found = "linux-image-6.1.0-9-cloud-amd64 - x\nlinux-image-6.1.0-56-cloud-amd64 - x\n";
        assert_eq!(newest("6.1", found).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
    }

    #[test]
    fn a_given_kernel_is_named_by_its_modules() {
        let folder = tempfile::tempdir().unwrap();
        let (image, modules) = (folder.path().join("bzImage"), folder.path().join("6.18.5-cloud"));
        assert!(given(&image, &modules).is_err());
        fs::write(&image, "").unwrap();
        fs::create_dir(&modules).unwrap();
        let kernel = given(&image, &modules).unwrap();
        assert_eq!(kernel.to_string(), "6.18 (6.18.5-cloud)");
    }
}
