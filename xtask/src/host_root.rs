//! The VM's root in the profile `systemd`: this machine's own, by 9p and read-only, with two layers over it. One is in the
//! initramfs and holds what makes systemd run the tests; the other is empty memory and takes what is written.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::deb;
use crate::initramfs::{self, Contents};
use crate::kernels::Kernel;
use crate::modules;
use crate::runtimes;

/// The argument with which `vm-init` goes over to that root.
pub(crate) const ARGUMENT: &str = "--host-root";

const SYSTEMD: &str = "/usr/lib/systemd/systemd";

const DBUS: &str = "/usr/bin/dbus-daemon";

/// Nothing but the tests: what is enabled on this machine is not started.
const TARGET: &str = "\
[Unit]
Description=The tests of the VM
DefaultDependencies=no
Requires=shaper-vm.service
";

/// The bus that systemd is asked over, without what it would have started before.
const BUS: [&str; 2] = ["dbus.service", "dbus.socket"];
const WITHOUT_DEFAULTS: &str = "\
[Unit]
DefaultDependencies=no
";

const SERVICE: &str = "\
[Unit]
Description=The tests
DefaultDependencies=no
Wants=dbus.service
After=dbus.service
SuccessAction=poweroff-immediate
FailureAction=poweroff-immediate

[Service]
Type=exec
ExecStart=/usr/sbin/shaper-vm-init --service
StandardOutput=tty
StandardError=inherit
TTYPath=/dev/ttyS0
";

/// Fails if this machine's root cannot be a VM's.
pub(crate) fn check() -> Result<()> {
    for (program, package) in [(SYSTEMD, "systemd"), (DBUS, "dbus")] {
        if !Path::new(program).exists() {
            bail!(
                "there is no {program} here for the VM (as root: apt-get install {package}, which does not make systemd \
                 this machine's PID 1)"
            );
        }
    }
    Ok(())
}

/// Writes the initramfs that runs those tests of `contents` whose names begin with what is in `filter`.
pub(crate) fn write(kernel: &Kernel, contents: &Contents, filter: &[String], to: &Path) -> Result<()> {
    let mut archive = initramfs::create(to)?;
    initramfs::add_program(&mut archive, &contents.init(), "/init")?;
    initramfs::add_modules(&mut archive, kernel, modules::HOST_ROOT)
        .context("the profile systemd needs Debian's full build of a kernel, or one like it")?;
    archive.copy(&contents.init(), "/over/usr/sbin/shaper-vm-init")?;
    archive.file("/over/etc/shaper-vm", 0o644, settings(contents, filter)?.as_bytes())?;
    archive.file("/over/etc/fstab", 0o644, b"")?;
    archive.file("/over/etc/systemd/system/shaper-vm.target", 0o644, TARGET.as_bytes())?;
    archive.file("/over/etc/systemd/system/shaper-vm.service", 0o644, SERVICE.as_bytes())?;
    for unit in BUS {
        let drop_in = format!("/over/etc/systemd/system/{unit}.d/shaper-vm.conf");
        archive.file(&drop_in, 0o644, WITHOUT_DEFAULTS.as_bytes())?;
    }
    archive.finish().map(drop)
}

/// What `vm-init --service` reads, a line each: the tests, the folder of binaries, the kernel programs, container runtimes,
/// packages, all where this machine has them, then arguments of the tests.
fn settings(contents: &Contents, filter: &[String]) -> Result<String> {
    let mut lines = Vec::new();
    let runtimes = runtimes::fetch()?;
    let packages = deb::for_tests(&contents.bins, &contents.bpf_object)?;
    for path in [&contents.program, contents.bins.path(), &contents.bpf_object, &runtimes, &packages] {
        let path = path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?;
        lines.push(path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?.to_owned());
    }
    lines.extend(filters(filter));
    if let Some(line) = lines.iter().find(|line| line.contains('\n')) {
        bail!("the VM's settings have a line for each, and {line:?} is two");
    }
    Ok(lines.join("\n") + "\n")
}

/// The tests of this profile are those of one module. libtest runs what matches any of its filters.
fn filters(given: &[String]) -> Vec<String> {
    const MODULE: &str = "systemd::";
    let within = |filter: &String| match filter.strip_prefix(MODULE) {
        None if filter.starts_with('-') => filter.clone(),
        None => format!("{MODULE}{filter}"),
        Some(_) => filter.clone(),
    };
    let mut filters: Vec<_> = given.iter().map(within).collect();
    if filters.iter().all(|filter| filter.starts_with('-')) {
        filters.push(MODULE.to_owned());
    }
    filters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_filter_reaches_other_modules() {
        let filters = |given: &[&str]| filters(&given.iter().map(|&f| f.to_owned()).collect::<Vec<_>>());
        assert_eq!(filters(&[]), ["systemd::"]);
        assert_eq!(filters(&["--nocapture"]), ["--nocapture", "systemd::"]);
        assert_eq!(filters(&["an_agent", "systemd::a"]), ["systemd::an_agent", "systemd::a"]);
    }
}
