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

/// Which of Debian's builds of a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Build {
    /// For virtual machines: a quarter of the size, without 9p.
    Cloud,
    /// With everything.
    Full,
}

impl Build {
    /// How the names of its packages end, behind the version.
    fn suffix(self) -> &'static str {
        match self {
            Self::Cloud => "-cloud-amd64",
            Self::Full => "-amd64",
        }
    }

    /// What is between a version and the suffix in the names of other builds.
    fn others(self) -> &'static [&'static str] {
        match self {
            Self::Cloud => &["-rt"],
            Self::Full => &["-rt", "-cloud"],
        }
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
pub(crate) fn debian(series: &str, build: Build) -> Result<Kernel> {
    let folder = cache().join(match build {
        Build::Cloud => series.to_owned(),
        Build::Full => format!("{series}-full"),
    });
    if !folder.exists() {
        fetch(series, build, &folder).with_context(|| {
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
fn fetch(series: &str, build: Build, folder: &Path) -> Result<()> {
    if process::find("apt-get").is_none() {
        bail!("there is no apt-get here");
    }
    let (apt, package) = find(series, build)?;
    eprintln!("fetching {package} into {}: a kernel for the VM, which is not installed", folder.display());

    let mut partial = folder.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
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
fn find(series: &str, build: Build) -> Result<(Apt, String)> {
    let machine = Apt::of_machine();
    let mut package = newest_package(&machine, series, build)?;
    if package.is_none() && setup::apt_update()? {
        package = newest_package(&machine, series, build)?;
    }
    if let Some(package) = package {
        return Ok((machine, package));
    }
    let suite = suite(series);
    let beside = Apt::of_suite(suite)?;
    let package = newest_package(&beside, series, build)?;
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

fn newest_package(apt: &Apt, series: &str, build: Build) -> Result<Option<String>> {
    let (series_pattern, suffix) = (series.replace('.', "\\."), build.suffix());
    let found = apt.search(&format!("^linux-image-{series_pattern}\\.[0-9]+.*{suffix}$"))?;
    Ok(newest(series, build, &found))
}

/// The packages of the same release that a kernel's package needs: from 7.0 on, the image and the modules are in such.
fn parts(package: &str, depends: &str) -> Vec<String> {
    let release = package.trim_start_matches("linux-image");
    let needed = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    needed.filter(|name| name.ends_with(release)).map(str::to_owned).collect()
}

/// The package with the greatest version in what `apt-cache search` printed.
fn newest(series: &str, build: Build, found: &str) -> Option<String> {
    let prefix = format!("linux-image-{series}.");
    found
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter_map(|name| Some((name, name.strip_prefix(&prefix)?.strip_suffix(build.suffix())?)))
        .filter(|(_, version)| !build.others().iter().any(|other| version.ends_with(other)))
        .max_by_key(|(_, version)| numbers(version))
        .map(|(name, _)| name.to_owned())
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
linux-image-6.12.118+deb12-rt-cloud-amd64 - none such
linux-image-6.12.119+deb12-rt-amd64 - Linux 6.12 for 64-bit PCs (signed), PREEMPT_RT
linux-image-6.12.116+deb12-amd64 - Linux 6.12 for 64-bit PCs (signed)
linux-image-6.12.118+deb12-cloud-amd64-dbg - Debug symbols
linux-image-6.12-cloud-amd64 - Linux for x86-64 cloud (meta-package)
";
        assert_eq!(
            newest("6.12", Build::Cloud, found).as_deref(),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(newest("6.12", Build::Full, found).as_deref(), Some("linux-image-6.12.116+deb12-amd64"));
        assert_eq!(newest("6.1", Build::Cloud, found), None);

        let found = "linux-image-6.1.0-9-cloud-amd64 - x\nlinux-image-6.1.0-56-cloud-amd64 - x\n";
        assert_eq!(newest("6.1", Build::Cloud, found).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
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
