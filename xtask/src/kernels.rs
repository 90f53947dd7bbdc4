//! Kernels for the VM: Debian's, fetched once by apt, unpacked and never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fmt};

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
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
            format!("no Linux {series} for the VM (bring one with `--kernel-image FILE --modules DIR`)")
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
    // From 7.0 on it is beside its modules.
    let images = [folder.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
    let image = images.into_iter().find(|image| image.is_file());
    let image = image.with_context(|| format!("there is no kernel {release} in it"))?;
    Ok(Kernel { series: series.to_owned(), release, image, modules })
}

/// Fetches the newest package of `series` and unpacks it to `folder`, which appears when it is complete.
fn fetch(series: &str, folder: &Path) -> Result<()> {
    if process::find("apt-get").is_none() {
        bail!("there is no apt-get here");
    }
    let (apt, package) = find(series)?;
    eprintln!("fetching {package} into {}: a kernel for the VM, which is not installed", folder.display());

    let partial = folder.with_file_name(format!("{series}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let mut packages = parts(&package, &apt.depends(&package)?);
    packages.push(package);
    apt.download(&packages, &partial)?;
    for deb in entries(&partial)? {
        process::run(Command::new("dpkg").arg("-x").arg(&deb).arg(&partial))?;
        fs::remove_file(&deb).with_context(|| format!("cannot remove {}", deb.display()))?;
    }

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

/// The newest package of `series`, and the sources that have it: this machine's, or else a suite beside them.
fn find(series: &str) -> Result<(Apt, String)> {
    let machine = Apt::of_machine();
    let mut package = newest_package(&machine, series)?;
    if package.is_none() && setup::apt_update()? {
        package = newest_package(&machine, series)?;
    }
    if let Some(package) = package {
        return Ok((machine, package));
    }
    let suite = suite(series);
    let beside = Apt::of_suite(suite)?;
    let package = newest_package(&beside, series)?;
    let package = package.with_context(|| format!("neither this machine's apt nor {suite} has one"))?;
    Ok((beside, package))
}

/// The suite of Debian with the newest kernel of `series`.
fn suite(series: &str) -> &'static str {
    match series {
        "6.1" => "bookworm",
        "6.12" => "trixie",
        _ => "trixie-backports",
    }
}

fn newest_package(apt: &Apt, series: &str) -> Result<Option<String>> {
    let found =
        apt.search(&format!("^linux-image-{}\\.[0-9]+.*-cloud-amd64$", series.replace('.', "\\.")))?;
    Ok(newest(series, &found))
}

/// The packages of the same release that a kernel's package needs: from 7.0 on, the image and the modules are in such.
fn parts(package: &str, depends: &str) -> Vec<String> {
    let release = package.trim_start_matches("linux-image");
    let needed = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    needed.filter(|name| name.ends_with(release)).map(str::to_owned).collect()
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

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).and_then(|entries| {
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()
    });
    entries.with_context(|| format!("cannot list {}", folder.display()))
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    match entries(folder)?.as_slice() {
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
    fn a_kernel_in_several_packages_is_fetched_whole() {
        let depends = "\
linux-image-7.3.4+deb13-cloud-amd64
 |Depends: initramfs-tools
  Depends: linux-binary-7.3.4+deb13-cloud-amd64
  Depends: linux-modules-7.3.4+deb13-cloud-amd64
  Suggests: linux-doc-7.3
";
        let expected = ["linux-binary-7.3.4+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64"];
        assert_eq!(parts("linux-image-7.3.4+deb13-cloud-amd64", depends), expected);
        let depends = "linux-image-6.1.0-56-cloud-amd64\n  Depends: kmod\n  Depends: linux-base\n";
        assert!(parts("linux-image-6.1.0-56-cloud-amd64", depends).is_empty());
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
