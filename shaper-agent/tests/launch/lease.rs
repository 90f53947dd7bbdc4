//! Tasks that end when the broker was not heard of for their lease.

use shaper_agent::{
    contact::{Contact, boottime_ns},
    launch::spec::{ExitStatus, LaunchSpec, Lease},
};

use super::{Fixture, wait};

/// A task with a lease of a second, and the agent's side of it.
fn leased(fixture: &Fixture, script: &str) -> (LaunchSpec, Contact) {
    let contact = Contact::begin(fixture.path(), "boot").unwrap();
    let lease = Lease { contact: contact.path().to_owned(), seconds: 1 };
    (LaunchSpec { lease: Some(lease), ..fixture.shell(script) }, contact)
}

/// What a supervisor may take to start, also on a loaded machine: its lease begins after that.
const START_NS: u64 = 5_000_000_000;
/// Longer than any of these tests takes.
const AN_HOUR_NS: u64 = 3_600_000_000_000;

#[test]
fn a_task_whose_lease_is_over_is_ended_with_all_that_it_started() {
    let fixture = Fixture::new();
    let (spec, contact) = leased(&fixture, "sleep 1000 & sleep 1000");
    contact.note(boottime_ns() + START_NS);
    let supervisor = fixture.start(&spec);
    wait(&supervisor.pidfd);
    let exit = fixture.exit();
    assert_eq!((exit.status, exit.lease_over), (ExitStatus::Signal(libc::SIGKILL), true));
    assert!(!fixture.populated());
}

#[test]
fn what_a_task_left_has_its_lease_too() {
    let fixture = Fixture::new();
    let (spec, contact) = leased(&fixture, "sleep 1000 > /dev/null 2>&1 & exit 3");
    contact.note(boottime_ns() + START_NS);
    let supervisor = fixture.start(&spec);
    wait(&supervisor.pidfd);
    let exit = fixture.exit();
    assert_eq!((exit.status, exit.lease_over), (ExitStatus::Code(3), false), "it ended by itself");
    assert!(!fixture.populated());
}

#[test]
fn a_task_goes_on_while_the_broker_is_heard_of() {
    let fixture = Fixture::new();
    // It takes longer than the start and the lease.
    let (spec, contact) = leased(&fixture, "sleep 7");
    contact.note(boottime_ns() + START_NS);
    fixture.start(&spec);
    contact.note(boottime_ns() + AN_HOUR_NS);
    let exit = fixture.await_exit();
    assert_eq!((exit.status, exit.lease_over), (ExitStatus::Code(0), false));
}

#[test]
fn a_task_that_is_killed_before_its_lease_is_over_was_not_ended_by_that() {
    let fixture = Fixture::new();
    let (spec, contact) = leased(&fixture, "kill -9 $$");
    contact.note(boottime_ns() + AN_HOUR_NS);
    let (exit, _) = fixture.run(&spec);
    assert_eq!((exit.status, exit.lease_over), (ExitStatus::Signal(libc::SIGKILL), false));
}

#[test]
fn a_task_whose_lease_is_over_before_it_begins_does_not() {
    let fixture = Fixture::new();
    let (spec, _contact) = leased(&fixture, "touch $DIR/ran");
    fixture.fails(&spec, "lease", 126, "was not heard of for 1 s");
    assert!(fixture.exit().lease_over);
    assert!(!fixture.path().join("ran").exists());
}
