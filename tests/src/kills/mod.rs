//! An agent that dies again and again while limits change: when it is back, every cgroup is at what was decided, and
//! every other one as it was found.
//!
//! Most deaths are at a failpoint: in the middle of a change, of a release or of a start, or of putting things right
//! after the death before. The others are a SIGKILL at a random moment, of an agent that works or of one that is only just
//! starting. What the agent was asked for in that moment may have been decided or not; everything else is known.

mod subject;

use std::{
    collections::BTreeMap,
    io::Read,
    os::fd::AsFd,
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use shaper_core::{limits::Limits, task::TaskStatus};

use self::subject::{Origin, State, Subject};
use crate::{
    agent::{Agent, Options},
    cgroup::{below, cpu_group, write},
    leftovers::Leftovers,
    process::Process,
    random::{Random, seed},
    shaper::parse,
    time::{PATIENCE, happens},
};

/// What the agent is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    Start,
    Set,
    /// For something that the kernel refuses half way.
    SetInVain,
    Release,
    ReleaseAll,
}

/// (place, how many times it may be passed before, what leads there)
const PLACES: &[(&str, u64, &[Ask])] = &[
    ("agent-before-record", 1, &[Ask::Start]),
    ("agent-after-record", 1, &[Ask::Start]),
    ("start-after-cgroup", 1, &[Ask::Start]),
    ("start-after-slot", 1, &[Ask::Start]),
    ("agent-before-spawn", 1, &[Ask::Start]),
    ("agent-after-spawn", 1, &[Ask::Start]),
    ("change-before-record", 1, &[Ask::Set, Ask::Start]),
    ("change-after-record", 1, &[Ask::Set, Ask::Start]),
    ("ledger-after-intent", 2, &[Ask::Set, Ask::Start, Ask::Release]),
    ("actuate-before-write", 4, &[Ask::Set, Ask::Start, Ask::Release, Ask::SetInVain]),
    ("actuate-after-write", 4, &[Ask::Set, Ask::Start, Ask::Release, Ask::SetInVain]),
    ("actuate-before-undo", 1, &[Ask::SetInVain]),
    ("change-after-effect", 2, &[Ask::Set, Ask::Start, Ask::Release, Ask::SetInVain]),
    ("ledger-after-outcome", 2, &[Ask::Set, Ask::Start, Ask::Release, Ask::SetInVain]),
    ("end-after-slot", 1, &[Ask::Release]),
    ("end-between-hierarchies", 2, &[Ask::Release]),
    ("release-before-forgetting", 1, &[Ask::Release]),
    ("release-without-tasks", 1, &[Ask::ReleaseAll]),
    ("release-without-programs", 1, &[Ask::ReleaseAll]),
];

/// How often an agent that does not meet its failpoint is asked for something.
const ASKED_MOST: u32 = 12;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Done,
    /// The agent answered, and was killed right then.
    DoneAtLast,
    Refused,
    /// The agent died before it answered.
    Lost,
}

impl Call {
    fn is_the_end(self) -> bool {
        matches!(self, Call::DoneAtLast | Call::Lost)
    }
}

/// How the agent is to die.
#[derive(Clone, Copy, Debug)]
enum Death {
    At(&'static str, u64, &'static [Ask]),
    /// By SIGKILL, so long after something was asked for.
    After(Duration),
    /// The same, so long after it was started.
    AfterStart(Duration),
}

struct World {
    agent: Agent<'static>,
    random: Random,
    subjects: Vec<Subject>,
    /// Where in the hierarchy of CPU limits a quota stands that those below cannot exceed.
    has_bound: bool,
    deaths: BTreeMap<String, u32>,
}

/// Has an agent die so often.
pub fn assert_nothing_is_lost(deaths: u32) {
    let seed = seed();
    println!("soak: seed {seed} (SHAPER_SEED repeats what is asked for)");
    // What is lent of a quota is not what is decided; its own tests are elsewhere.
    let agent = Options::default().with(&["--cpu-burst-pool", "off"]).start();
    let mut world = World::new(agent, Random(seed));
    world.agent.kill9();
    while world.deaths.values().sum::<u32>() < deaths {
        world.live_and_die();
    }
    world.end();
    for (how, times) in &world.deaths {
        println!("soak: {times:4} x {how}");
    }
    println!("soak: {deaths} deaths: what was decided was in force, and nothing else was changed or left");
}

impl World {
    fn new(agent: Agent<'static>, random: Random) -> World {
        let mut subjects = vec![Subject::launched(0), Subject::launched(1)];
        if Origin::can_be_adopted() {
            subjects.extend([Subject::adopted(2), Subject::adopted(3)]);
        }
        World { agent, random, subjects, has_bound: false, deaths: BTreeMap::new() }
    }

    /// Starts the agent, which is not there, sees that nothing was lost, and has it die once more.
    fn live_and_die(&mut self) {
        if self.random.once_in(8) {
            self.meddle();
        }
        match self.next_death() {
            Death::At(place, times, asks) => {
                if !self.agent.restart_to_die_at_or_before(&format!("{place}:{times}")) {
                    self.count(&format!("at {place}, as it started"));
                } else if self.is_as_decided() {
                    self.die_at(place, asks);
                } else {
                    self.agent.wait_for_abort();
                    self.count(&format!("at {place}, as it took away what was left"));
                }
            }
            Death::AfterStart(delay) => {
                self.agent.start_and_kill9_after(delay);
                self.count("SIGKILL, as it started");
            }
            Death::After(delay) => {
                self.agent.restart();
                self.assert_as_decided();
                self.die_after(delay);
            }
        }
    }

    fn next_death(&mut self) -> Death {
        match self.random.below(20) {
            0 => return Death::AfterStart(Duration::from_micros(self.random.below(300_000))),
            1..=3 => return Death::After(Duration::from_micros(self.random.below(40_000))),
            _ => {}
        }
        let possible: Vec<_> =
            PLACES.iter().filter(|(_, _, asks)| self.has_bound || *asks != [Ask::SetInVain]).collect();
        let (place, most, asks) = **self.random.of(&possible);
        Death::At(place, 1 + self.random.below(most), asks)
    }

    /// Asks until it has met its failpoint.
    fn die_at(&mut self, place: &'static str, asks: &[Ask]) {
        for _ in 0..ASKED_MOST {
            let ask = *self.random.of(asks);
            if self.ask(ask, None) == Call::Lost {
                self.agent.wait_for_abort();
                return self.count(&format!("at {place}"));
            }
        }
        self.agent.kill9();
    }

    /// Kills it at some moment of what it was asked for.
    fn die_after(&mut self, delay: Duration) {
        let ask = *self.random.of(&[Ask::Start, Ask::Set, Ask::Set, Ask::SetInVain, Ask::Release]);
        let call = self.ask(ask, Some(delay));
        self.agent.kill9();
        if call.is_the_end() {
            self.count("SIGKILL, at a random moment");
        }
    }

    fn count(&mut self, how: &str) {
        *self.deaths.entry(how.to_owned()).or_default() += 1;
    }

    /// Asks for something; it is killed after `kill`, if it has not answered before.
    fn ask(&mut self, ask: Ask, kill: Option<Duration>) -> Call {
        if ask == Ask::ReleaseAll {
            let call = self.call(&["release".into(), "--all".into()], kill);
            for subject in &mut self.subjects {
                subject.asked(State::Free, call);
            }
            // Its cgroups are gone, and the bound with them.
            self.has_bound = false;
            return call;
        }
        let wanted = |subject: &Subject| (subject.state() == State::Free) == (ask == Ask::Start);
        let fitting: Vec<usize> =
            (0..self.subjects.len()).filter(|&index| wanted(&self.subjects[index])).collect();
        if fitting.is_empty() {
            // The other way round, so that there is one the next time.
            return self.ask(if ask == Ask::Start { Ask::Release } else { Ask::Start }, kill);
        }
        let index = *self.random.of(&fitting);
        let subject = &self.subjects[index];
        let in_vain = ask == Ask::SetInVain && self.has_bound && subject.is_bounded();
        let before = match subject.state() {
            State::Held(limits) => limits,
            State::Free => Limits::default(),
        };
        let (arguments, after) = match ask {
            Ask::Start => subject.start(&self.agent, &mut self.random),
            Ask::SetInVain if in_vain => (subject.set_in_vain(), State::Held(before)),
            Ask::Set | Ask::SetInVain => subject.set(&before, &mut self.random),
            Ask::Release | Ask::ReleaseAll => (vec!["release".into(), subject.id()], State::Free),
        };
        let call = self.call(&arguments, kill);
        assert!(
            (call == Call::Refused) == in_vain || call.is_the_end(),
            "{arguments:?}: {call:?}, and the agent said: {}",
            self.agent.said()
        );
        self.subjects[index].asked(after, call);
        if call == Call::Done && ask == Ask::Start {
            self.subjects[index].has_started(&self.agent);
            self.set_bound(index);
        }
        if !call.is_the_end() {
            self.subjects[index].assert_as_decided(&self.agent);
        }
        call
    }

    /// Gives all tasks of the agent together a quota on a kernel that refuses one of theirs above it: v1's.
    fn set_bound(&mut self, index: usize) {
        let Some((group, true)) = self.subjects[index].pid().map(cpu_group) else { return };
        if let Some(root) = group.parent() {
            write(root, "cpu.cfs_quota_us", &subject::BOUND.to_string());
            self.has_bound = true;
        }
    }

    /// Somebody else writes while no agent looks.
    fn meddle(&mut self) {
        let held: Vec<usize> =
            (0..self.subjects.len()).filter(|&index| self.subjects[index].is_surely_launched()).collect();
        if !held.is_empty() {
            // At least as much as a burst that goes with what was decided.
            let index = *self.random.of(&held);
            self.subjects[index].write_quota(110_000 + 10_000 * self.random.below(4));
        }
    }

    fn call(&self, arguments: &[String], kill: Option<Duration>) -> Call {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = self.agent.shaper().command(&arguments);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut client = spawned.unwrap_or_else(|error| panic!("shaper {arguments:?}: {error}"));
        let call = self.outcome(&mut client, kill);
        // It would ask the next agent, too.
        let _ = client.kill();
        let _ = client.wait();
        call
    }

    /// Waits for an answer, or for the end of the agent.
    fn outcome(&self, client: &mut Child, mut kill: Option<Duration>) -> Call {
        let open = |pid: u32| {
            let pid = Pid::from_raw(pid.cast_signed()).expect("a process id is positive");
            pidfd_open(pid, PidfdFlags::empty()).expect("it is not reaped yet")
        };
        let (agent, client_fd) = (open(self.agent.pid()), open(client.id()));
        let mut is_killed = false;
        loop {
            let mut ended =
                [&client_fd, &agent].map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
            let time = kill.map(|time| Timespec {
                tv_sec: time.as_secs().cast_signed(),
                tv_nsec: time.subsec_nanos().into(),
            });
            let count = poll(&mut ended, time.as_ref()).expect("pidfds can be polled");
            if count == 0 {
                self.agent.signal_kill9();
                (kill, is_killed) = (None, true);
            } else if !ended[0].revents().is_empty() {
                let status = client.wait().expect("a child can be waited for");
                if status.success() {
                    return if is_killed { Call::DoneAtLast } else { Call::Done };
                }
                let mut said = String::new();
                let stderr = client.stderr.as_mut().expect("it is piped");
                stderr.read_to_string(&mut said).expect("a pipe can be read");
                if said.contains("the cpu controller of cgroup v1 refuses that") {
                    return Call::Refused;
                }
                // A connection ends a little before its process, and long before it on a busy machine.
                let soon = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
                let died = poll(&mut [PollFd::new(&agent, PollFlags::IN)], Some(&soon));
                assert!(died.expect("a pidfd can be polled") > 0, "the agent lives, but: {said}");
                return Call::Lost;
            } else {
                return Call::Lost;
            }
        }
    }

    fn assert_as_decided(&mut self) {
        assert!(self.is_as_decided(), "the agent has ended: {}", self.agent.said());
    }

    /// False: the agent has ended meanwhile.
    fn is_as_decided(&mut self) -> bool {
        let agent = Process::open(self.agent.pid());
        let answer = self.agent.shaper().call(&["get", "tasks", "--output", "json"]);
        if answer.code != 0 {
            agent.wait_for_end();
            return false;
        }
        let tasks: Vec<TaskStatus> = parse(&answer.stdout);
        for index in 0..self.subjects.len() {
            self.subjects[index].settle(&tasks, &self.agent);
            self.subjects[index].assert_as_decided(&self.agent);
            self.set_bound(index);
        }
        // Nothing is there but what is known.
        let mut known: Vec<String> = ["agent", "warden", "supervisors"].map(str::to_owned).into();
        known.extend(self.subjects.iter().filter_map(Subject::name_of_cgroup));
        let is_known = |group: &PathBuf| known.iter().any(|name| group.ends_with(name));
        let left = || -> Vec<PathBuf> {
            below(self.agent.name()).into_iter().filter(|group| !is_known(group)).collect()
        };
        // What had ended is taken away by the next tick, which may be the agent's last.
        let is_clean = happens(|| left().is_empty() || !agent.is_alive());
        assert!(is_clean, "{:?} are left; the agent said: {}", left(), self.agent.said());
        agent.is_alive()
    }

    fn end(&mut self) {
        self.agent.restart();
        self.assert_as_decided();
        for index in 0..self.subjects.len() {
            if self.subjects[index].state() == State::Free {
                self.ask(Ask::Start, None);
            }
        }
        let leftovers = Leftovers::of(&self.agent, None);
        assert_eq!(self.ask(Ask::ReleaseAll, None), Call::Done, "{}", self.agent.said());
        for subject in &mut self.subjects {
            subject.assert_as_decided(&self.agent);
        }
        leftovers.assert_none();
    }
}
