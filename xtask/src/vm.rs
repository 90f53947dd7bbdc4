//! Runs the VM tests: `tests/tests/vm` of shaper-tests, on Debian kernels in QEMU.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::iter;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::initramfs::{self, Contents};
use crate::kernels::{self, Build, Kernel};
use crate::qemu::{self, Accel, Disk, End, Machine};
use crate::setup::{self, Need};
use crate::support::{self, Features};
use crate::tally::Tally;
use crate::{bins, ebpf, host_root, test, workspace};

/// The kernels that are tested, in this order: the default one, the floor, and the newest.
pub(crate) const SERIES: [&str; 3] = ["6.12", "6.1", "6.18"];

/// What a machine is besides its kernel.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub(crate) enum Profile {
    /// Nothing but the tests and what they start
    Bare,
    /// This machine's own root, unwritable, with systemd as PID 1; the tests of the module `systemd`
    Systemd,
}

impl Profile {
    /// The kernels that are tested with it.
    pub(crate) fn series(self) -> &'static [&'static str] {
        match self {
            Self::Bare => &SERIES,
            Self::Systemd => &SERIES[..1],
        }
    }

    fn build(self) -> Build {
        match self {
            Self::Bare => Build::Cloud,
            Self::Systemd => Build::Full,
        }
    }
}

/// What is run on each kernel.
pub(crate) struct Job<'a> {
    pub(crate) contents: &'a Contents,
    pub(crate) profile: Profile,
    /// For one machine.
    pub(crate) timeout: Duration,
    /// Whether other machines run beside it: then each line that it prints says whose it is.
    pub(crate) beside: bool,
    /// Whether what fails is tried once more, in a machine of its own, and counts as failed only if it fails there too.
    pub(crate) again: bool,
    pub(crate) filter: &'a [String],
}

/// What the kernels have, of those that have said so.
pub(crate) fn features(verdicts: &[Verdict]) -> Vec<(String, Features)> {
    let of_kernel = |verdict: &Verdict| (verdict.series.clone(), verdict.features.clone());
    verdicts.iter().filter(|verdict| !verdict.features.is_empty()).map(of_kernel).collect()
}

/// What PID 1 (`tests/src/bin/vm-init.rs`) prints: that it runs, then uptime and kernel release …
const UP: &str = "shaper-vm: up ";
/// … what its kernel has …
const FEATURE: &str = "shaper-vm: feature ";
/// … what its tests have measured, for `cargo xtask bench io` …
const FIGURE: &str = "shaper-vm: figure ";
/// … and how the tests ended, then their exit code.
const EXIT: &str = "shaper-vm: exit ";

/// libtest's: the filters are whole names.
const EXACT: &str = "--exact";

/// How many of the console's last lines are repeated when a machine ends without a verdict.
const TAIL: usize = 30;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What the machine is besides its kernel
    #[arg(long, value_enum, default_value_t = Profile::Bare)]
    profile: Profile,
    /// A series of Debian's kernels; may be given more than once [default: 6.12, 6.1 and 6.18; for systemd 6.12]
    #[arg(long, value_name = "SERIES")]
    kernel: Vec<String>,
    /// Boot this kernel in place of Debian's
    #[arg(long, value_name = "FILE", requires = "modules", conflicts_with = "kernel")]
    kernel_image: Option<PathBuf>,
    /// The modules of --kernel-image: its /lib/modules/RELEASE, after depmod
    #[arg(long, value_name = "DIR", requires = "kernel_image")]
    modules: Option<PathBuf>,
    /// Write what each kernel has into docs/kernel-support.md, rather than compare
    #[arg(long)]
    write_table: bool,
    /// Seconds until a machine is given up
    #[arg(long, default_value_t = DEFAULT_TIMEOUT.as_secs())]
    timeout: u64,
    /// Arguments for the test binary, such as a part of a test's name
    #[arg(last = true, value_name = "FILTER")]
    filter: Vec<String>,
}

pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1200);

/// How the tests went on one kernel.
pub(crate) struct Verdict {
    pub(crate) series: String,
    /// The release that ran, and how; none if it never came to that.
    machine: Option<(String, Accel)>,
    failure: Option<String>,
    /// The names of the tests that failed, where libtest came to say them.
    failed: Vec<String>,
    pub(crate) tally: Tally,
    boot: Option<Duration>,
    pub(crate) total: Duration,
    features: Features,
    /// A JSON object each.
    pub(crate) figures: Vec<String>,
}

impl Verdict {
    /// What is to be said of both, where `second` tried again what had failed in this one.
    fn followed_by(self, second: Self) -> Self {
        let mut tally = second.tally;
        tally.second_try = tally.passed;
        tally.passed += self.tally.passed;
        let mut features = self.features;
        features.extend(second.features);
        Self {
            failure: second.failure,
            failed: second.failed,
            tally,
            total: self.total + second.total,
            features,
            figures: self.figures.into_iter().chain(second.figures).collect(),
            ..self
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm {}", self.series)?;
        if let Some((release, accel)) = &self.machine {
            write!(f, " ({release}, {accel})")?;
        }
        match &self.failure {
            None => write!(f, ": ok, {}", self.tally)?,
            Some(failure) => write!(f, ": FAILED ({failure}), {}", self.tally)?,
        }
        if let Some(boot) = self.boot {
            write!(f, ", {:.1} s boot", boot.as_secs_f64())?;
        }
        write!(f, ", {:.0} s", self.total.as_secs_f64())
    }
}

/// Builds what goes into a machine.
pub(crate) fn contents() -> Result<Contents> {
    Ok(Contents {
        bins: bins::build()?,
        program: bins::build_tests(test::VM_TARGET)?,
        bpf_object: ebpf::build()?.programs,
    })
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let contents = contents()?;
    let job = Job {
        contents: &contents,
        profile: args.profile,
        timeout: Duration::from_secs(args.timeout),
        beside: false,
        again: false,
        filter: &args.filter,
    };
    let verdicts = match (&args.kernel_image, &args.modules) {
        (Some(image), Some(modules)) => {
            prepare(job.profile)?;
            vec![job.run_kernel(&kernels::given(image, modules)?)?]
        }
        _ if args.kernel.is_empty() => job.run_series(args.profile.series())?,
        _ => job.run_series(&args.kernel)?,
    };
    let mut tally = Tally::default();
    for verdict in &verdicts {
        tally += verdict.tally;
    }
    if args.profile == Profile::Bare && args.kernel_image.is_none() {
        let mut found = features(&verdicts);
        found.push(support::of_this_machine(&contents.bins)?);
        support::compare(&found, args.write_table)?;
    }
    println!("{tally}");
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Job<'_> {
    /// Runs it on each series in turn. A series that cannot be run is a failed one, and the next has its turn.
    pub(crate) fn run_series(&self, series: &[impl AsRef<str>]) -> Result<Vec<Verdict>> {
        prepare(self.profile)?;
        let run = |series: &str| {
            let start = Instant::now();
            let kernel = kernels::debian(series, self.profile.build());
            kernel.and_then(|kernel| self.run_kernel(&kernel)).unwrap_or_else(|error| {
                let verdict = Verdict {
                    series: series.to_owned(),
                    machine: None,
                    failure: Some(format!("{error:#}")),
                    failed: Vec::new(),
                    tally: Tally::FAILURE,
                    boot: None,
                    total: start.elapsed(),
                    features: Features::new(),
                    figures: Vec::new(),
                };
                println!("{verdict}");
                verdict
            })
        };
        Ok(series.iter().map(|series| run(series.as_ref())).collect())
    }

    fn run_kernel(&self, kernel: &Kernel) -> Result<Verdict> {
        let first = self.boot(kernel, "")?;
        if !self.again || first.failed.is_empty() {
            return Ok(first);
        }
        println!("vm {kernel}: once more, in another machine: {}", first.failed.join(", "));
        let filter: Vec<String> = iter::once(EXACT.to_owned()).chain(first.failed.iter().cloned()).collect();
        let second = Job { filter: &filter, ..*self }.boot(kernel, "-again")?;
        Ok(first.followed_by(second))
    }

    /// Boots it once; `suffix` tells the files of this run from those of another.
    fn boot(&self, kernel: &Kernel, suffix: &str) -> Result<Verdict> {
        if std::env::consts::ARCH != "x86_64" {
            bail!("the VM runs this machine's own binaries, on x86_64 so far");
        }
        let accel = qemu::accel(kernel, &self.contents.init())?;
        let folder = workspace::target().join("vm");
        let initrd = folder.join(format!("{}.cpio", kernel.release));
        let log = folder.join(format!("{}{suffix}.log", kernel.release));
        let host_root = [host_root::ARGUMENT.to_owned()];
        let init_args = match self.profile {
            Profile::Bare => {
                initramfs::write(kernel, self.contents, &initrd)?;
                self.filter
            }
            Profile::Systemd => {
                host_root::write(kernel, self.contents, self.filter, &initrd)?;
                &host_root
            }
        };
        let disk = Disk::create(folder.join(format!("{}.img", kernel.release)))?;

        println!("vm {kernel}, {accel}: booting");
        let log_file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let machine = Machine {
            kernel,
            initrd: &initrd,
            disk: Some(&disk),
            host_root: self.profile == Profile::Systemd,
            accel,
            init_args,
        };
        let start = Instant::now();
        let mut transcript = Transcript::default();
        let label = if self.beside { format!("{} | ", kernel.series) } else { String::new() };
        let shown = Both(Labelled::new(label, io::stdout()), log_file);
        let end = machine.boot(self.timeout, shown, Stdio::inherit(), |line| {
            transcript.read(line, start);
            ControlFlow::Continue(())
        })?;

        let failure = transcript.failure(&end, self.timeout);
        if transcript.exit.is_none() {
            if !self.beside {
                println!(); // the console may have stopped within a line
            }
            eprintln!("the last lines of {}:", log.display());
            for line in &transcript.tail {
                eprintln!("  {line}");
            }
        }
        let mut tally = transcript.tally;
        if failure.is_some() && tally.failed == 0 {
            tally += Tally::FAILURE;
        }
        let verdict = Verdict {
            series: kernel.series.clone(),
            machine: Some((kernel.release.clone(), accel)),
            failed: if transcript.exit.is_some() { transcript.failed } else { Vec::new() },
            failure,
            tally,
            boot: transcript.up,
            total: start.elapsed(),
            features: transcript.features,
            figures: transcript.figures,
        };
        println!("{verdict}");
        Ok(verdict)
    }
}

/// Has everything here that machines of these series need. A series that cannot be had is told of when it is run.
pub(crate) fn prepare_series(series: &[&str]) -> Result<()> {
    prepare(Profile::Bare)?;
    for series in series {
        let _ = kernels::debian(series, Profile::Bare.build());
    }
    Ok(())
}

pub(crate) fn prepare(profile: Profile) -> Result<()> {
    setup::ensure(Need::Vm)?;
    setup::ensure(Need::Native)?; // the guest has this machine's ip and tc
    if profile == Profile::Systemd {
        host_root::check()?;
    }
    let folder = workspace::target().join("vm");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))
}

/// Whether PID 1 prints in this line that it runs.
pub(crate) fn is_up(line: &str) -> bool {
    line.contains(UP)
}

/// What the console has told.
#[derive(Default)]
pub(crate) struct Transcript {
    /// When PID 1 ran, since the start of QEMU.
    up: Option<Duration>,
    /// The exit code of the tests.
    exit: Option<i32>,
    panic: bool,
    tally: Tally,
    /// The names in the list of failures that is being read, or was read last.
    failed: Vec<String>,
    in_failures: bool,
    features: Features,
    figures: Vec<String>,
    tail: VecDeque<String>,
}

impl Transcript {
    pub(crate) fn read(&mut self, line: &str, start: Instant) {
        if self.up.is_none() && is_up(line) {
            self.up = Some(start.elapsed());
        } else if let Some((_, found)) = line.split_once(FEATURE) {
            self.features.extend(support::feature(found));
        } else if let Some((_, figure)) = line.split_once(FIGURE) {
            self.figures.push(figure.trim().to_owned());
        } else if let Some((_, code)) = line.split_once(EXIT) {
            self.exit = code.trim().parse().ok();
        } else if let Some(tally) = Tally::of_libtest(line) {
            self.tally += tally;
            self.in_failures = false;
        } else if line.trim_end() == "failures:" {
            // libtest prints what failed tests have printed below such a line, and then their names below another.
            self.failed.clear();
            self.in_failures = true;
        } else if self.in_failures
            && let Some(name) = line.trim_end().strip_prefix("    ")
            && !name.contains(' ')
        {
            self.failed.push(name.to_owned());
        }
        self.panic |= line.contains("Kernel panic - not syncing");
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
    }

    /// Why the run is not good, if it is not.
    pub(crate) fn failure(&self, end: &End, timeout: Duration) -> Option<String> {
        match (self.exit, end) {
            _ if self.panic => Some("kernel panic".to_owned()),
            (Some(0), End::Exited(_)) => None,
            (_, End::DeadlinePassed) => Some(format!("not done after {} s", timeout.as_secs())),
            (Some(code), _) => Some(format!("what ran exited with {code}")),
            (None, End::Exited(status)) if !status.success() => Some(format!("QEMU ended with {status}")),
            (None, _) => Some("the machine ended without a verdict".to_owned()),
        }
    }
}

/// Begins each line with a label, and then writes it in one go, so that it is whole among those of others; without a label all
/// is written as it comes.
struct Labelled<W: Write> {
    label: String,
    line: Vec<u8>,
    to: W,
}

impl<W: Write> Labelled<W> {
    fn new(label: String, to: W) -> Self {
        Self { line: label.clone().into(), label, to }
    }
}

impl<W: Write> Write for Labelled<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.label.is_empty() {
            self.to.write_all(data)?;
            return Ok(data.len());
        }
        for part in data.split_inclusive(|&byte| byte == b'\n') {
            self.line.extend(part);
            if part.ends_with(b"\n") {
                self.to.write_all(&self.line)?;
                self.line.truncate(self.label.len());
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl<W: Write> Drop for Labelled<W> {
    /// The last line may have no end.
    fn drop(&mut self) {
        if self.line.len() > self.label.len() {
            self.line.push(b'\n');
            let _ = self.to.write_all(&self.line);
        }
    }
}

/// Writes to two places at once.
pub(crate) struct Both<A, B>(pub(crate) A, pub(crate) B);

impl<A: Write, B: Write> Write for Both<A, B> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write_all(data)?;
        self.1.write_all(data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        self.1.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn transcript(lines: &[&str]) -> Transcript {
        let mut transcript = Transcript::default();
        for line in lines {
            transcript.read(line, Instant::now());
        }
        transcript
    }

    fn failure(lines: &[&str], end: End) -> Option<String> {
        transcript(lines).failure(&end, Duration::from_secs(9))
    }

    const RESULT: &str =
        "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s";

    #[test]
    fn a_verdict_and_a_clean_end_are_success() {
        let lines = ["shaper-vm: up 1.50 6.1.0-56-cloud-amd64", RESULT, "shaper-vm: exit 0"];
        assert_eq!(failure(&lines, End::Exited(ExitStatus::from_raw(0))), None);
        let transcript = transcript(&lines);
        assert_eq!(transcript.tally, Tally { passed: 3, ..Tally::default() });
        assert!(transcript.failed.is_empty());
        assert!(transcript.up.is_some());
    }

    #[test]
    fn everything_else_is_a_failure_with_its_reason() {
        let exited = |code: i32| End::Exited(ExitStatus::from_raw(code << 8));
        let failed = |lines: &[&str], end| failure(lines, end).unwrap();
        assert_eq!(failed(&["shaper-vm: exit 101"], exited(0)), "what ran exited with 101");
        assert_eq!(failed(&[RESULT], exited(0)), "the machine ended without a verdict");
        assert_eq!(failed(&[RESULT], End::DeadlinePassed), "not done after 9 s");
        assert_eq!(failed(&["shaper-vm: exit 0"], End::DeadlinePassed), "not done after 9 s");
        assert!(failed(&[], exited(1)).starts_with("QEMU ended with"));
        let panic = "[    1.0] Kernel panic - not syncing: Attempted to kill init!";
        assert_eq!(failed(&[panic, "shaper-vm: exit 0"], exited(0)), "kernel panic");
    }

    #[test]
    fn the_names_of_what_failed_are_in_the_last_list() {
        let lines = [
            "test cpu::one ... FAILED",
            "test two ... FAILED",
            "",
            "failures:",
            "",
            "---- cpu::one stdout ----",
            "    something",
            "",
            "failures:",
            "    cpu::one\r",
            "    two",
            "",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s",
            "shaper-vm: exit 101",
        ];
        assert_eq!(transcript(&lines).failed, ["cpu::one", "two"]);
    }

    #[test]
    fn lines_of_several_machines_stay_whole_and_say_whose_they_are() {
        let mut shown = Vec::new();
        let mut one = Labelled::new("6.1 | ".to_owned(), &mut shown);
        one.write_all(b"test a ... ").unwrap();
        one.write_all(b"ok\n\ntest b").unwrap();
        drop(one);
        assert_eq!(String::from_utf8(shown).unwrap(), "6.1 | test a ... ok\n6.1 | \n6.1 | test b\n");
        let mut shown = Vec::new();
        Labelled::new(String::new(), &mut shown).write_all(b"test b").unwrap();
        assert_eq!(shown, b"test b");
    }

    #[test]
    fn what_passes_at_a_second_try_has_passed_and_is_told() {
        let verdict = |failed: &[&str], tally| Verdict {
            series: "6.1".into(),
            machine: None,
            failure: (!failed.is_empty()).then(|| "what ran exited with 101".to_owned()),
            failed: failed.iter().map(|&name| name.to_owned()).collect(),
            tally,
            boot: None,
            total: Duration::from_secs(40),
            features: Features::new(),
            figures: Vec::new(),
        };
        let first = || verdict(&["a", "b"], Tally { passed: 10, failed: 2, second_try: 0 });
        let both = first().followed_by(verdict(&[], Tally { passed: 2, ..Tally::default() }));
        assert_eq!(both.to_string(), "vm 6.1: ok, 12 passed (2 at a second try), 0 failed, 80 s");
        let both = first().followed_by(verdict(&["b"], Tally { passed: 1, failed: 1, second_try: 0 }));
        assert!(
            both.to_string()
                .contains("FAILED (what ran exited with 101), 11 passed (1 at a second try), 1 failed")
        );
    }

    #[test]
    fn the_verdict_is_one_line() {
        let mut verdict = Verdict {
            series: "6.1".into(),
            machine: Some(("6.1.0-56-cloud-amd64".into(), Accel::Tcg)),
            failure: None,
            failed: Vec::new(),
            tally: Tally { passed: 12, ..Tally::default() },
            boot: Some(Duration::from_millis(3_210)),
            total: Duration::from_millis(41_400),
            features: Features::new(),
            figures: Vec::new(),
        };
        let line = "vm 6.1 (6.1.0-56-cloud-amd64, tcg): ok, 12 passed, 0 failed, 3.2 s boot, 41 s";
        assert_eq!(verdict.to_string(), line);
        verdict.failure = Some("kernel panic".into());
        assert!(verdict.to_string().contains("): FAILED (kernel panic), 12 passed"));
    }
}
