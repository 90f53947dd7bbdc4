//! Takes guards away, one at a time, where nobody else sees it, and sees that the test of each fails: a test that passes
//! without what it is for shows nothing. docs/threat-model.md says what each guard is against.

use std::env;
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::tally::Tally;
use crate::{bins, ebpf, process, setup, soak, workspace};

/// What is taken away, and the test that must fail then. Where one guard stands behind another, both are.
struct Guard {
    name: &'static str,
    cuts: &'static [Cut],
    test: Test,
}

/// What stands in a file once, and what it becomes.
struct Cut {
    file: &'static str,
    stands: &'static str,
    becomes: &'static str,
}

/// A unit test or one of a package's own, or of the agent on this machine's kernel.
enum Test {
    Of { target: &'static [&'static str], name: &'static str },
    Native(&'static str),
}

const fn authorization(name: &'static str) -> Test {
    Test::Of { target: &["--test", "authorization"], name }
}

const fn unit(name: &'static str) -> Test {
    Test::Of { target: &["--lib"], name }
}

#[rustfmt::skip]
const GUARDS: &[Guard] = &[
    Guard { name: "tcp-needs-certificates", cuts: &[Cut { file: "shaper-broker/src/config.rs",
        stands: "tls_dir.clone().ok_or_else(|| ConfigError::NoCertificate(address.clone()))?",
        becomes: "tls_dir.clone().unwrap_or_default()" }],
        test: authorization("tcp_without_certificates_or_with_those_of_another_role_is_not_served") },
    Guard { name: "metrics-need-a-token", cuts: &[Cut { file: "metrics/src/listen/options.rs",
        stands: "metrics_token_file.ok_or_else(|| OptionsError::NoToken(wanted.clone()))?",
        becomes: "metrics_token_file.unwrap_or_default()" }],
        test: unit("listen::options::tests::tcp_takes_a_token_and_a_certificate_off_loopback") },
    Guard { name: "metrics-by-token", cuts: &[Cut { file: "metrics/src/listen.rs",
        stands: "&& !token.is_in(request.headers()).await",
        becomes: "&& !token.is_in(request.headers()).await && request.uri().path().is_empty()" }],
        test: unit("listen::tests::nobody_else_gets_anything_and_is_counted") },
    Guard { name: "no-browsers", cuts: &[Cut { file: "identity/src/serve/guard.rs",
        stands: "_ if request.headers().contains_key(http::header::ORIGIN) =>",
        becomes: "_ if request.uri().path().is_empty() =>" }],
        test: authorization("a_browser_is_not_served") },
    Guard { name: "names-are-no-paths", cuts: &[Cut { file: "shaper-core/src/id.rs",
        stands: r#"let inner = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);"#,
        becomes: "let inner = |byte: &u8| *byte != 0;\n        let edge = |byte: Option<&u8>| byte.is_some();" }],
        test: authorization("bounds::a_name_is_no_path") },
    Guard { name: "exact-namespaces", cuts: &[Cut { file: "identity/src/access.rs",
        stands: "self.namespaces.iter().any(|own| own == namespace)",
        becomes: "self.namespaces.iter().any(|own| namespace.starts_with(own.as_str()))" }],
        test: unit("access::tests::who_is_not_named_exactly_has_nothing") },
    Guard { name: "default-deny", cuts: &[Cut { file: "identity/src/serve/guard.rs",
        stands: "if call.verdict(asker) == Verdict::Refused {",
        becomes: "if call.verdict(asker) == Verdict::Refused && path.is_empty() {" }],
        test: authorization("every_role_may_make_the_calls_that_the_table_says") },
    Guard { name: "own-uid", cuts: &[Cut { file: "identity/src/access.rs",
        stands: "if run_as.uid != self.uid {",
        becomes: "if run_as.uid == u32::MAX {" }],
        test: authorization("bounds::a_submitter_stays_within_its_bounds") },
    Guard { name: "highest-priority", cuts: &[Cut { file: "identity/src/access.rs",
        stands: "if wanted > self.max_priority {",
        becomes: "if wanted < self.max_priority && wanted > self.max_priority {" }],
        test: authorization("bounds::a_submitter_stays_within_its_bounds") },
    Guard { name: "policies-of-a-namespace", cuts: &[Cut { file: "shaper-broker/src/reactor/policies.rs",
        stands: "if is_operator(caller) || *uid == caller.uid && within.contains(namespace) {",
        becomes: "if is_operator(caller) || *uid != u32::MAX || within.contains(namespace) {" }],
        test: authorization("bounds::a_submitters_policies_stay_in_its_namespaces") },
    Guard { name: "own-node", cuts: &[Cut { file: "shaper-broker/src/session.rs",
        stands: "node.filter(|certified| *certified != name)",
        becomes: "node.filter(|certified| certified.is_empty())" }],
        test: authorization("a_node_is_the_one_that_its_certificate_names") },
    Guard { name: "streams-end", cuts: &[Cut { file: "identity/src/serve/connection.rs",
        stands: "if let Err(error) = certified.poll_trust(context) {",
        becomes: "if let Err(error) = certified.poll_trust(context)\n                    && error.kind() == io::ErrorKind::Other\n                {" }],
        test: authorization("a_stream_ends_with_the_belief_in_its_reader") },
    Guard { name: "one-use", cuts: &[Cut { file: "identity/src/token.rs",
        stands: "self.open.remove(id).map(|open| open.identity)",
        becomes: "self.open.get(id).map(|open| open.identity.clone())" }],
        test: authorization("enrolment::a_token_makes_a_node_once_and_also_after_a_restart") },
    Guard { name: "message-size", cuts: &[Cut { file: "shaper-broker/src/main.rs",
        stands: "const MAX_MESSAGE: usize = 1 << 20;",
        becomes: "const MAX_MESSAGE: usize = 1 << 30;" }],
        test: authorization("limits::a_message_that_is_too_large_is_not_read") },
    Guard { name: "calls-counted", cuts: &[Cut { file: "identity/src/serve/limits.rs",
        stands: "if *count >= most {",
        becomes: "if *count > most.saturating_mul(1000) {" }],
        test: authorization("limits::streams_are_counted_by_identity_until_they_end") },
    Guard { name: "silence-counted", cuts: &[Cut { file: "identity/src/serve/mod.rs",
        stands: "const HANDSHAKES_EACH: usize = 32;",
        becomes: "const HANDSHAKES_EACH: usize = 512;" }],
        test: authorization("limits::who_connects_and_says_nothing_keeps_nobody_out") },
    Guard { name: "beneath-the-root", cuts: &[Cut { file: "shaper-agent/src/kernel/cgroup/mod.rs",
        stands: "ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;",
        becomes: "ResolveFlags::empty();" }],
        test: unit("kernel::cgroup::tests::a_symbolic_link_is_not_followed") },
    Guard { name: "file-system-type", cuts: &[Cut { file: "shaper-agent/src/kernel/cgroup/mod.rs",
        stands: "if file_system.f_type as i64 != CGROUP2_SUPER_MAGIC {",
        becomes: "if file_system.f_type as i64 == 0 {" }],
        test: unit("kernel::cgroup::tests::what_leaves_the_mount_or_is_no_cgroup_is_refused") },
    Guard { name: "no-leaked-descriptors", cuts: &[Cut { file: "shaper-agent/src/launch/child.rs",
        stands: "libc::syscall(libc::SYS_close_range, 3 as c_uint, c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)",
        becomes: "libc::syscall(libc::SYS_close_range, c_uint::MAX - 1, c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)" },
        Cut { file: "shaper-agent/src/launch/supervise.rs",
        stands: "libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, 0)",
        becomes: "libc::syscall(libc::SYS_close_range, libc::c_uint::MAX - 1, libc::c_uint::MAX, 0)" }],
        test: Test::Native("identity::a_task_has_no_descriptor_but_its_own_three") },
    Guard { name: "allowed-uids", cuts: &[Cut { file: "shaper-agent/src/node/start.rs",
        stands: "if run_as.uid != 0 && !self.config.allowed_uids.contains(run_as.uid) {",
        becomes: "if run_as.uid == u32::MAX {" }],
        test: Test::Native("identity::tasks_run_as_those_users_alone_that_the_node_allows") },
    Guard { name: "socket-mode", cuts: &[Cut { file: "proto/src/peer.rs",
        stands: "fs::set_permissions(socket, fs::Permissions::from_mode(0o660))",
        becomes: "fs::set_permissions(socket, fs::Permissions::from_mode(0o666))" }],
        test: Test::Native("identity::nobody_cannot_connect_without_access_to_the_socket") },
    Guard { name: "pins-0700", cuts: &[Cut { file: "shaper-agent/src/kernel/bpf/attach.rs",
        stands: "fs::set_permissions(directory, fs::Permissions::from_mode(0o700))",
        becomes: "fs::set_permissions(directory, fs::Permissions::from_mode(0o755))" }],
        test: Test::Native("identity::neither_state_nor_pins_nor_socket_are_open_to_others") },
    Guard { name: "pins-rechecked", cuts: &[Cut { file: "shaper-agent/src/node/adopt.rs",
        stands: "None => false,",
        becomes: "None => true,"}, Cut { file: "shaper-agent/src/node/adopt.rs",
        stands: "Some(ids) => ids.as_ref().is_none_or(|ids| ids.contains(&id)),",
        becomes: "Some(ids) => ids.as_ref().is_none_or(|ids| ids.contains(&id)) || id != 0,"}],
        test: Test::Native("restart::what_was_written_into_the_pinned_maps_meanwhile_is_put_right") },
    Guard { name: "web-by-code", cuts: &[Cut { file: "shaper-broker/src/web/door.rs",
        stands: "self.kept.iter().position(|kept| kept.hash == hash && kept.until > now)",
        becomes: "self.kept.iter().position(|kept| (kept.hash == hash || !hash.is_empty()) && kept.until > now)" }],
        test: unit("web::tests::web_nobody_gets_in_without_a_code_and_every_answer_has_the_headers") },
    Guard { name: "web-codes-once", cuts: &[Cut { file: "shaper-broker/src/web/door.rs",
        stands: "book.codes.kept.remove(place);",
        becomes: "book.codes.kept.get(place);" }],
        test: unit("web::tests::web_codes_work_once") },
    Guard { name: "web-own-name", cuts: &[Cut { file: "shaper-broker/src/web/guard.rs",
        stands: "if !hosts.contains(&named) ||",
        becomes: "if !hosts.contains(&named) && named.is_empty() ||" }],
        test: unit("web::guard::tests::web_requests_name_a_host_of_the_list") },
    Guard { name: "web-own-site", cuts: &[Cut { file: "shaper-broker/src/web/guard.rs",
        stands: "if site.is_some_and(|site| site != b\"same-origin\" && site != b\"none\") {",
        becomes: "if site.is_some_and(<[u8]>::is_empty) {" }],
        test: unit("web::guard::tests::web_requests_of_other_sites_and_those_that_would_change_something_are_refused") },
    Guard { name: "web-own-tasks", cuts: &[Cut { file: "shaper-broker/src/web/door.rs",
        stands: "query::may_see(&self.caller, task.owner()) && covers(self.grant.as_ref(), task)",
        becomes: "query::may_see(&self.caller, task.owner()) || covers(self.grant.as_ref(), task)" }],
        test: unit("web::tests::web_submitters_and_users_see_their_own_alone") },
    Guard { name: "web-sessions-end", cuts: &[Cut { file: "shaper-broker/src/web/door.rs",
        stands: "if access.distrust(holder, tls::now()).is_some() {",
        becomes: "if access.distrust(holder, tls::now()).is_some() && self.who.is_empty() {" }],
        test: unit("web::door::tests::web_sessions_end_when_their_identity_is_not_believed_any_more") },
    Guard { name: "web-no-markup", cuts: &[Cut { file: "shaper-broker/src/web/html.rs",
        stands: "'<' => self.0.push_str(\"&lt;\"),",
        becomes: "'<' => self.0.push('<')," }],
        test: unit("web::tests::web_pages_show_what_there_is_and_no_name_becomes_markup") },
    Guard { name: "who-asks-is-moved", cuts: &[Cut { file: "shaper-agent/src/kernel/process.rs",
        stands: "seize(process.pid)?;\n            if number_of(process.pidfd.as_fd())? != Some(process.pid) {",
        becomes: "seize(process.pid)?;\n            if number_of(process.pidfd.as_fd())?.is_some_and(|number| number == 0) {" }],
        test: unit("kernel::process::tests::a_number_that_is_anothers_now_is_not_taken_for_it") },
    Guard { name: "tasks-stay-in-their-limits", cuts: &[Cut { file: "shaper-agent/src/node/enter.rs",
        stands: "held.filter(|(_, task)| cgroup.starts_with(&task.record.cgroup))",
        becomes: "held.filter(|(_, task)| cgroup.starts_with(&task.record.cgroup) && cgroup.as_os_str().is_empty())" }],
        test: Test::Native("enter::who_is_in_a_task_does_not_leave_its_limits") },
    Guard { name: "names-of-root", cuts: &[Cut { file: "shaper-agent/src/adoption/tree.rs",
        stands: "found.is_dir() && found.uid() == 0 &&",
        becomes: "found.is_dir() && found.uid() != u32::MAX &&" }],
        test: Test::Native("adoption::a_name_that_anybody_could_have_made_is_not_believed") },
];

/// Where this tree is another: in a mount namespace of this process and of what it starts, an overlay lies upon it. What is
/// built already is there, as it is; whatever is written goes into a folder of its own, which ends with this.
struct Overlay {
    /// `upper`, with every file that git knows, as it was at the beginning, and whatever is written; and `work`, the kernel's.
    folder: PathBuf,
}

impl Overlay {
    fn lay() -> Result<Overlay> {
        let root = workspace::root();
        let overlay =
            Overlay { folder: env::temp_dir().join(format!("shaper-guards-{}", std::process::id())) };
        let (upper, work) = (overlay.folder.join("upper"), overlay.folder.join("work"));
        for folder in [&upper, &work] {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let listed = process::read(Command::new("git").current_dir(root).args(["ls-files", "-z"]))?;
        let there = listed.split('\0').filter(|name| root.join(name).is_file());
        // With their times, by which cargo knows that they are what was built.
        let mut copy = Command::new("cp");
        copy.current_dir(root).args(["-a", "--parents", "--"]).args(there).arg(&upper);
        process::run(&mut copy)?;
        let options =
            format!("lowerdir={},upperdir={},workdir={}", root.display(), upper.display(), work.display());
        mount("overlay", root, "overlay", MountFlags::empty(), &*CString::new(options)?).with_context(|| {
            let root = root.display();
            format!(
                "cannot lay an overlay upon {root}; remedy: a kernel with overlayfs, and TMPDIR where it can write"
            )
        })?;
        Ok(overlay)
    }

    /// Puts one text in the place of another, which must stand there once.
    fn rewrite(&self, file: &str, from: &str, to: &str) -> Result<()> {
        let path = workspace::root().join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if text.matches(from).count() != 1 {
            bail!("`{from}` does not stand once in {file}");
        }
        fs::write(&path, text.replacen(from, to, 1))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether its test passes without a guard.
    fn passes_without(&self, Guard { name, cuts, test }: &Guard, bpf_object: &Path) -> Result<bool> {
        for Cut { file, stands, becomes } in *cuts {
            self.rewrite(file, stands, becomes).with_context(|| format!("guard `{name}`"))?;
        }
        let passed = passes(test, bpf_object);
        for Cut { file, stands, becomes } in *cuts {
            self.rewrite(file, becomes, stands).with_context(|| format!("guard `{name}`"))?;
        }
        passed
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // If it stays, it ends with this process.
        let _ = unmount(workspace::root(), UnmountFlags::DETACH);
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("cannot remove {}: {error}", self.folder.display());
        }
    }
}

/// Whether a test passes. What cannot be built is an error: it shows nothing.
fn passes(test: &Test, bpf_object: &Path) -> Result<bool> {
    // Of the whole workspace, so that what was built for other tests will do.
    let cargo = |arguments: &[&str]| {
        let mut cargo = process::cargo();
        cargo.args(arguments).args(["--quiet", "--locked", "--workspace", "--exclude", "xtask"]);
        cargo.env("SHAPER_BPF_OBJECT", bpf_object);
        cargo.env("SHAPER_BIN_DIR", workspace::target().join("debug"));
        cargo
    };
    let (target, name) = match test {
        Test::Of { target, name } => (*target, name),
        Test::Native(name) => {
            let programs = bins::SHIPPED.iter().chain(&["test-load"]).flat_map(|name| ["--bin", name]);
            process::run(cargo(&["build"]).args(programs))?;
            (&["--test", "native"][..], name)
        }
    };
    let arguments = [&["test"], target].concat();
    process::run(cargo(&arguments).arg("--no-run"))?;
    let output = process::output(cargo(&arguments).args(["--", "--exact", name]))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let tally = text.lines().filter_map(Tally::of_libtest).fold(Tally::default(), |mut sum, tally| {
        sum += tally;
        sum
    });
    match (tally.passed, tally.failed) {
        (1, 0) => Ok(true),
        (0, 1) => Ok(false),
        _ => bail!("`{name}` is not one test, or did not run:\n{text}"),
    }
}

/// Set in the environment of the one that has a mount namespace.
const APART: &str = "SHAPER_GUARDS_APART";

/// Of the guards, the first `part` of `whole` of those whose names have one of the texts in `only`, or of all.
pub(crate) fn run(part: u32, whole: u32, only: &[String]) -> Result<ExitCode> {
    if env::var_os(APART).is_some() {
        return look(part, whole, only).map(soak::concluded);
    }
    setup::ensure(setup::Need::Native)?;
    let mut apart = Command::new("unshare");
    apart.args(["--mount", "--propagation", "private"]).arg(env::current_exe()?).args(["soak", "guards"]);
    apart.args([format!("--fraction={part}/{whole}")]).env(APART, "1");
    apart.args(only.iter().map(|text| format!("--only={text}")));
    let status = apart.status().context("cannot start unshare, of util-linux")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn look(part: u32, whole: u32, only: &[String]) -> Result<Tally> {
    let bpf_object = ebpf::build()?.programs;
    let is_wanted =
        |guard: &&Guard| only.is_empty() || only.iter().any(|text| guard.name.contains(text.as_str()));
    let guards: Vec<_> = GUARDS.iter().filter(is_wanted).collect();
    let most = (guards.len() * part as usize).div_ceil(whole as usize);
    let guards = &guards[..most];
    let overlay = Overlay::lay()?;
    // First with all of them, which is one build for many.
    let with = guards.iter().map(|guard| passes(&guard.test, &bpf_object)).collect::<Result<Vec<_>>>()?;
    let mut tally = Tally::default();
    for (guard, with) in guards.iter().zip(with) {
        let (start, without) = (Instant::now(), overlay.passes_without(guard, &bpf_object)?);
        let verdict = match (with, without) {
            (true, false) => "its test passes with it and fails without",
            (false, _) => "its test FAILS with it",
            (true, true) => "its test PASSES without it",
        };
        println!("soak: guard {}: {verdict} ({} s)", guard.name, start.elapsed().as_secs());
        tally += if with && !without { Tally { passed: 1, ..Tally::default() } } else { Tally::FAILURE };
    }
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guard_stands_where_it_is_said_and_is_in_the_threat_model() {
        let model = fs::read_to_string(workspace::root().join("docs/threat-model.md")).unwrap();
        for Guard { name, cuts, .. } in GUARDS {
            for Cut { file, stands, becomes } in *cuts {
                let text = fs::read_to_string(workspace::root().join(file)).unwrap();
                let times = |what| text.matches(what).count();
                assert_eq!((times(*stands), times(*becomes)), (1, 0), "{name}: {file}");
            }
            assert!(model.contains(&format!("`{name}`")), "{name}");
        }
    }
}
