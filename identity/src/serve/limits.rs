//! How much one identity may ask for: so often, so much at once, and how long an answer may take. One who asks too much keeps
//! nobody else waiting. root on the Unix socket is not counted: it could end the daemon.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http_body::{Body, Frame, SizeHint};

/// What each identity may.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Calls a second, as a mean; so many at once after a second of rest.
    pub calls_per_second: u32,
    /// Calls that are being answered.
    pub calls_at_once: usize,
    /// Calls that last as long as they please: streams, and those that wait.
    pub long_calls_at_once: usize,
    /// How long an answer to any other may take.
    pub deadline: Duration,
}

impl Limits {
    /// An agent's: whoever asks is a person or a tool, and its thread has tasks to look after.
    pub const AGENT: Limits = Limits {
        calls_per_second: 500,
        calls_at_once: 64,
        long_calls_at_once: 64,
        deadline: Duration::from_secs(60),
    };
    /// A broker's.
    pub const BROKER: Limits = Limits {
        calls_per_second: 10_000,
        calls_at_once: 1024,
        long_calls_at_once: 64,
        deadline: Duration::from_secs(30),
    };
    /// An authority's: who wants more certificates than this wants too many.
    pub const AUTHORITY: Limits = Limits {
        calls_per_second: 10,
        calls_at_once: 8,
        long_calls_at_once: 8,
        deadline: Duration::from_secs(10),
    };
}

/// Identities that are remembered; those at rest are forgotten first.
const REMEMBERED: usize = 4096;

/// What was exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Excess {
    /// Too often.
    #[error(
        "asks more often than {0} times a second: slow down, and use the streaming call where there is one"
    )]
    Rate(u32),
    /// Too much at once.
    #[error("has {0} calls open already: wait for their answers")]
    AtOnce(usize),
    /// Too much for long.
    #[error("already follows or waits for {0} things: end one of them first")]
    Long(usize),
}

impl Excess {
    /// As a program knows it.
    pub fn rule(&self) -> &'static str {
        match self {
            Excess::Rate(_) => "CALLS_PER_SECOND",
            Excess::AtOnce(_) => "CALLS_AT_ONCE",
            Excess::Long(_) => "LONG_CALLS_AT_ONCE",
        }
    }
}

#[derive(Debug)]
struct Usage {
    calls: usize,
    long_calls: usize,
    /// Calls that may be made now.
    left: f64,
    counted_at: Instant,
}

type Users = Mutex<HashMap<String, Usage>>;

/// The counts are whole whatever befell another thread.
fn lock(users: &Users) -> MutexGuard<'_, HashMap<String, Usage>> {
    users.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who asks for how much at the moment.
#[derive(Clone, Debug)]
pub(super) struct Meter {
    limits: Limits,
    users: Arc<Users>,
}

/// A call, until it is answered.
#[derive(Debug)]
pub(super) struct Permit {
    who: String,
    is_long: bool,
    users: Arc<Users>,
}

impl Meter {
    pub(super) fn new(limits: Limits) -> Meter {
        Meter { limits, users: Arc::default() }
    }

    pub(super) fn deadline(&self) -> Duration {
        self.limits.deadline
    }

    /// Counts a call, or says why it may not be made.
    pub(super) fn admit(&self, who: &str, is_long: bool, now: Instant) -> Result<Permit, Excess> {
        let limits = self.limits;
        let most = f64::from(limits.calls_per_second);
        let mut users = lock(&self.users);
        if users.len() >= REMEMBERED {
            let is_at_rest = |user: &Usage| {
                user.calls + user.long_calls == 0 && now - user.counted_at > Duration::from_secs(1)
            };
            users.retain(|_, user| !is_at_rest(user));
        }
        let new = || Usage { calls: 0, long_calls: 0, left: most, counted_at: now };
        let user = users.entry(who.to_owned()).or_insert_with(new);
        user.left = most.min(user.left + (now - user.counted_at).as_secs_f64() * most);
        user.counted_at = now;
        if user.left < 1.0 {
            return Err(Excess::Rate(limits.calls_per_second));
        }
        let (count, most, excess): (_, _, fn(usize) -> Excess) = if is_long {
            (&mut user.long_calls, limits.long_calls_at_once, Excess::Long)
        } else {
            (&mut user.calls, limits.calls_at_once, Excess::AtOnce)
        };
        if *count >= most {
            return Err(excess(most));
        }
        *count += 1;
        user.left -= 1.0;
        Ok(Permit { who: who.to_owned(), is_long, users: Arc::clone(&self.users) })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(user) = lock(&self.users).get_mut(&self.who) {
            let count = if self.is_long { &mut user.long_calls } else { &mut user.calls };
            *count -= 1;
        }
    }
}

/// An answer, whose call counts until all of it was sent or nobody wants it any more.
#[derive(Debug, Default)]
pub struct Counted<B> {
    body: B,
    _permit: Option<Permit>,
}

impl<B> Counted<B> {
    pub(super) fn new(body: B, permit: Option<Permit>) -> Counted<B> {
        Counted { body, _permit: permit }
    }
}

impl<B: Body + Unpin> Body for Counted<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEW: Limits = Limits {
        calls_per_second: 10,
        calls_at_once: 2,
        long_calls_at_once: 1,
        deadline: Duration::from_secs(1),
    };

    #[test]
    fn one_who_asks_too_much_is_told_and_nobody_else_is_held_up() {
        let (meter, mut now) = (Meter::new(FEW), Instant::now());
        let first = meter.admit("a", false, now).unwrap();
        let _second = meter.admit("a", false, now).unwrap();
        assert_eq!(meter.admit("a", false, now).unwrap_err(), Excess::AtOnce(2));
        let _long = meter.admit("a", true, now).unwrap();
        assert_eq!(meter.admit("a", true, now).unwrap_err(), Excess::Long(1));
        assert!(meter.admit("b", false, now).is_ok() && meter.admit("b", true, now).is_ok());
        drop(first);
        // Of ten in the first second three were made; what was refused does not count.
        for _ in 0..7 {
            meter.admit("a", false, now).unwrap();
        }
        assert_eq!(meter.admit("a", false, now).unwrap_err(), Excess::Rate(10));
        now += Duration::from_millis(100);
        meter.admit("a", false, now).unwrap();
        assert_eq!(meter.admit("a", false, now).unwrap_err(), Excess::Rate(10));
        now += Duration::from_secs(3600);
        let made = (0..20).filter(|_| meter.admit("a", false, now).is_ok()).count();
        assert_eq!(made, 10);
    }

    #[test]
    fn those_at_rest_are_forgotten_and_the_others_are_not() {
        let (meter, mut now) = (Meter::new(FEW), Instant::now());
        let busy = meter.admit("busy", true, now).unwrap();
        for name in 0..REMEMBERED {
            meter.admit(&name.to_string(), false, now).unwrap();
        }
        now += Duration::from_secs(2);
        let _one_more = meter.admit("one more", false, now).unwrap();
        assert_eq!(lock(&meter.users).len(), 2);
        assert_eq!(meter.admit("busy", true, now).unwrap_err(), Excess::Long(1));
        drop(busy);
        assert!(meter.admit("busy", true, now).is_ok());
    }
}
