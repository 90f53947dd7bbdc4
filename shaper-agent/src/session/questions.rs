//! What the broker is asked in one session, and what waits for its answers.

use std::{sync::Arc, time::Duration};

use shaper_proto::v1::{self, directive};
use tokio::{sync::watch, time::Instant};

use crate::contact::Contact;

/// The question that Hello asks, and Welcome answers.
pub(super) const HELLO: u64 = 0;

/// See the module. Times are of the clock of [`crate::contact`].
pub(super) struct Questions {
    contact: Arc<Contact>,
    pace: watch::Receiver<Option<Duration>>,
    /// The one that is not answered yet.
    open: Option<Question>,
    /// When it, or the one before, was asked: for the pace.
    asked: Instant,
    numbers: u64,
    /// Directives that can be carried out, and starts that need to know that the broker is there.
    waiting: Vec<v1::Directive>,
}

struct Question {
    number: u64,
    asked_at: u64,
}

impl Questions {
    /// Hello is about to be said.
    pub(super) fn begin(contact: Arc<Contact>, now: u64) -> Questions {
        Questions {
            pace: contact.pace(),
            contact,
            open: Some(Question { number: HELLO, asked_at: now }),
            asked: Instant::now(),
            numbers: HELLO,
            waiting: Vec::new(),
        }
    }

    /// Returns when the broker is to be asked.
    pub(super) async fn due(&mut self) {
        // One at a time: a broker that is behind is not asked more.
        if self.open.is_some() {
            return std::future::pending().await;
        }
        while self.waiting.is_empty() {
            let pace = *self.pace.borrow_and_update();
            let asked = self.asked;
            let elapsed = async {
                match pace {
                    Some(pace) => tokio::time::sleep_until(asked + pace).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = elapsed => return,
                changed = self.pace.changed() => if changed.is_err() { return std::future::pending().await },
            }
        }
    }

    /// The next question.
    pub(super) fn ask(&mut self, now: u64) -> v1::Contact {
        self.numbers += 1;
        self.asked = Instant::now();
        self.open = Some(Question { number: self.numbers, asked_at: now });
        v1::Contact { number: self.numbers }
    }

    /// The broker was there after this question.
    pub(super) fn answered(&mut self, number: u64) {
        if let Some(Question { asked_at, .. }) = self.open.take_if(|open| open.number == number) {
            self.contact.note(asked_at);
        }
    }

    /// A directive came.
    pub(super) fn take(&mut self, directive: v1::Directive) {
        self.waiting.push(directive);
    }

    /// The start that waits, if this directive ends what it would start.
    pub(super) fn called_off(&mut self, directive: &v1::Directive) -> Option<v1::Directive> {
        if !matches!(directive.kind, Some(directive::Kind::Stop(_))) {
            return None;
        }
        let is_of_it = |start: &v1::Directive| {
            (&start.task_id, start.attempt) == (&directive.task_id, directive.attempt)
        };
        let place = self.waiting.iter().position(is_of_it)?;
        Some(self.waiting.remove(place))
    }

    /// What can be carried out now. A start whose task has a lease waits until half of that is left at least: it would else
    /// begin for nothing.
    pub(super) fn ready(&mut self, now: u64) -> Vec<v1::Directive> {
        let waits = |directive: &v1::Directive| match &directive.kind {
            Some(directive::Kind::LeasedStart(start)) => {
                let half = Duration::from_secs(start.task_lease_seconds.into()) / 2;
                self.contact.until(half) <= now
            }
            _ => false,
        };
        self.waiting.extract_if(.., |directive| !waits(directive)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn begin(now: u64) -> (Questions, Arc<Contact>, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let contact = Arc::new(Contact::begin(directory.path(), "boot").unwrap());
        (Questions::begin(contact.clone(), now), contact, directory)
    }

    fn directive(task: &str, kind: directive::Kind) -> v1::Directive {
        v1::Directive { task_id: task.into(), attempt: 1, kind: Some(kind), ..v1::Directive::default() }
    }

    fn leased(task: &str) -> v1::Directive {
        let start = v1::LeasedStart { task_lease_seconds: 10, ..v1::LeasedStart::default() };
        directive(task, directive::Kind::LeasedStart(start))
    }

    fn heard(contact: &Contact) -> u64 {
        contact.until(Duration::ZERO)
    }

    #[test]
    fn what_counts_is_when_it_was_asked_and_only_of_the_question_that_is_open() {
        let (mut questions, contact, _directory) = begin(7);
        questions.answered(1);
        assert_eq!(heard(&contact), 0, "nobody asked that");
        questions.answered(HELLO);
        assert_eq!(heard(&contact), 7);
        assert_eq!(questions.ask(20).number, 1);
        questions.answered(HELLO);
        assert_eq!(heard(&contact), 7, "answered before");
        questions.answered(1);
        questions.answered(1);
        assert_eq!(heard(&contact), 20);
        assert_eq!(questions.ask(30).number, 2);
    }

    #[test]
    fn a_start_with_a_lease_waits_for_an_answer_and_nothing_else_does() {
        let (mut questions, _contact, _directory) = begin(0);
        questions.answered(HELLO);
        questions.take(leased("a"));
        assert_eq!(questions.ready(4 * SECOND).len(), 1, "more than half is left");
        questions.take(leased("b"));
        questions.take(directive("c", directive::Kind::Forget(true)));
        questions.take(directive("d", directive::Kind::Start(v1::Start::default())));
        let ready = questions.ready(6 * SECOND);
        assert_eq!(ready.iter().map(|it| it.task_id.as_str()).collect::<Vec<_>>(), ["c", "d"]);
        let number = questions.ask(6 * SECOND).number;
        assert!(questions.ready(7 * SECOND).is_empty());
        questions.answered(number);
        assert_eq!(questions.ready(7 * SECOND), [leased("b")]);
    }

    #[test]
    fn a_start_that_waits_is_called_off_by_a_stop() {
        let (mut questions, _contact, _directory) = begin(0);
        questions.take(leased("a"));
        let stop = |task| directive(task, directive::Kind::Stop(v1::Stop::default()));
        assert_eq!(questions.called_off(&directive("a", directive::Kind::Forget(true))), None);
        assert_eq!(questions.called_off(&stop("b")), None);
        assert_eq!(questions.called_off(&stop("a")), Some(leased("a")));
        assert_eq!(questions.called_off(&stop("a")), None);
    }

    #[tokio::test]
    async fn the_broker_is_asked_at_the_pace_of_the_shortest_lease_or_at_once_for_a_start() {
        let (mut questions, contact, _directory) = begin(0);
        let is_due = async |questions: &mut Questions| {
            tokio::time::timeout(Duration::ZERO, questions.due()).await.is_ok()
        };
        contact.keep(Some(Duration::from_nanos(10)));
        assert!(!is_due(&mut questions).await, "Hello is not answered");
        questions.answered(HELLO);
        questions.due().await;
        let number = questions.ask(1).number;
        assert!(!is_due(&mut questions).await, "one at a time");
        questions.answered(number);
        questions.due().await;
        contact.keep(None);
        assert!(!is_due(&mut questions).await, "nobody needs it");
        questions.take(leased("a"));
        assert!(is_due(&mut questions).await);
    }
}
