//! A store in etcd, which brokers on several machines reach.
//!
//! Below the prefix are `row/<key>`, a row; `schema`, the number of what the rows mean; `owner`, who writes; `leader`, who may
//! ([`leader`]); and, while a large transaction is under way, `staged/<number>` and `sealed`.
//!
//! **One owner.** Whoever opens the store writes `owner`, and each transaction of his compares that it is as he wrote it
//! last, and writes it anew, with a mark of its own. That does three things. An earlier owner can write nothing. A transaction
//! whose answer was lost is sent again, and finds its own mark if it happened; one that arrives late, after others of the
//! same owner, does not happen. And each transaction has a revision, also the empty one.
//!
//! **Large transactions.** etcd takes 128 operations and 1.5 MiB at once. What is larger is cut into chunks. Each is put into
//! a row `staged/`; then `sealed` is written, by which the whole transaction has happened; then the chunks are carried
//! out, one by one. Who opens the store finishes what is sealed, and drops what is only staged. Who only looks ([`look`])
//! reads all of it at one revision, and counts as written what is sealed.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read},
    time::Duration,
};

use etcd_client::{
    Compare as EtcdCompare, CompareOp, Error, GetOptions, KeyValue, Txn as EtcdTxn, TxnOp, TxnOpResponse,
};
use tokio::runtime::Runtime;

use super::{Compare, Limits, Op, SCHEMA, Store, StoreError, Txn, Versioned};
use crate::failpoint;

mod chunk;
mod cluster;
mod leader;
mod look;
#[cfg(test)]
mod tests;

use chunk::Write;
use cluster::Cluster;
pub use cluster::{Access, Place, PlaceError};
pub use leader::Leadership;

/// For this long a call is tried with one member after the other. Longer than a cluster takes to have a leader again.
const PATIENCE: Duration = Duration::from_secs(15);
/// What etcd takes in one transaction: operations, and comparisons.
const MAX_OPS: usize = 128;
/// What it takes in bytes (`--max-request-bytes`), less what a transaction needs besides its writes.
const MAX_BYTES: usize = (3 << 19) - (64 << 10);
/// What a write needs besides its key and value, at most.
const WRITE_OVERHEAD: usize = 32;
/// Rows that are read at once.
const PAGE: i64 = 1000;

/// What else must hold for each write: the row of the leader is still the one that this process made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The row.
    key: Vec<u8>,
    /// When it was made.
    create_revision: i64,
}

/// Rows in etcd.
pub struct Etcd {
    runtime: Runtime,
    cluster: RefCell<Cluster>,
    fence: Option<Fence>,
    /// Of this opening of the store, and of no other.
    id: String,
    /// Marks that were used.
    marks: u64,
    /// When this owner last wrote `owner`.
    owned_at: i64,
    limits: Limits,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd").field("cluster", &self.cluster).field("id", &self.id).finish_non_exhaustive()
    }
}

/// What became of one transaction of etcd.
enum Step {
    /// It happened, at this revision.
    Done(i64),
    /// It did not: when the keys that were compared were written.
    Differs(Vec<Option<u64>>),
}

impl Etcd {
    /// Takes over the rows at a place: whoever had them cannot write any more.
    pub fn open(place: Place, fence: Option<Fence>) -> Result<Etcd, StoreError> {
        let mut store = Etcd::at(place, fence)?;
        store.check_schema()?;
        store.claim()?;
        store.recover()?;
        Ok(store)
    }

    /// A way to the rows at a place, by which nothing can be written before they are taken over.
    fn at(place: Place, fence: Option<Fence>) -> Result<Etcd, StoreError> {
        let io = |source| StoreError::Threads { source };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("etcd")
            .enable_all()
            .build()
            .map_err(io)?;
        let overhead = place.key("row/").len() + WRITE_OVERHEAD;
        // One for `owner`, and one to remove what was staged.
        let limits = Limits { writes: MAX_OPS - 2, bytes: MAX_BYTES - (MAX_OPS - 2) * overhead };
        let cluster = RefCell::new(Cluster::new(place));
        Ok(Etcd { runtime, cluster, fence, id: unique().map_err(io)?, marks: 0, owned_at: 0, limits })
    }

    fn key(&self, name: &str) -> Vec<u8> {
        self.cluster.borrow().place.key(name)
    }

    fn row_key(&self, key: &[u8]) -> Vec<u8> {
        [&self.key("row/"), key].concat()
    }

    fn place(&self) -> String {
        self.cluster.borrow().place.to_string()
    }

    fn damaged(&self, what: &'static str) -> StoreError {
        StoreError::Damaged { place: self.place(), what }
    }

    fn check_schema(&self) -> Result<(), StoreError> {
        let Some(row) = self.read(self.key("schema"))? else { return Ok(()) };
        self.known_schema(row.value()).map(drop)
    }

    /// The schema that a value of `schema` says, unless it is newer than this program.
    fn known_schema(&self, value: &[u8]) -> Result<u64, StoreError> {
        let found = str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        let found: u64 = found.ok_or_else(|| self.damaged("its schema is no number"))?;
        if found > SCHEMA {
            return Err(StoreError::NewerSchema { place: self.place(), found, known: SCHEMA });
        }
        Ok(found)
    }

    /// Becomes the owner, if nobody else does at the same time.
    fn claim(&mut self) -> Result<(), StoreError> {
        self.owned_at = self.read(self.key("owner"))?.map_or(0, |row| row.mod_revision());
        let schema = TxnOp::put(self.key("schema"), SCHEMA.to_string(), None);
        // Of a key that is not there, etcd takes the revision to be 0.
        match self.step(&[], vec![schema])? {
            Step::Done(_) => Ok(()),
            Step::Differs(_) => Err(self.damaged("nothing was compared, and something differs")),
        }
    }

    /// Finishes or drops what an owner before left unfinished.
    fn recover(&mut self) -> Result<(), StoreError> {
        let staged = self.read_range(self.key("staged/"))?;
        if self.read(self.key("sealed"))?.is_some() {
            tracing::info!(chunks = staged.len(), "finishing a transaction that was begun by another broker");
            for row in &staged {
                let chunk = chunk::decode(row.value());
                let chunk = chunk.ok_or_else(|| self.damaged("what was staged cannot be read"))?;
                self.carry_out(chunk, row.key())?;
            }
            self.always(vec![TxnOp::delete(self.key("sealed"), None)])?;
        } else {
            for row in &staged {
                self.always(vec![TxnOp::delete(row.key(), None)])?;
            }
        }
        Ok(())
    }

    /// The writes of a chunk, together with the removal of the row in which it was staged.
    fn carry_out(&mut self, chunk: Vec<Write>, staged: &[u8]) -> Result<i64, StoreError> {
        let mut ops = self.ops(chunk);
        ops.push(TxnOp::delete(staged, None));
        self.always(ops)
    }

    fn ops(&self, writes: Vec<Write>) -> Vec<TxnOp> {
        let op = |(key, value): Write| match value {
            Some(value) => TxnOp::put(self.row_key(&key), value, None),
            None => TxnOp::delete(self.row_key(&key), None),
        };
        writes.into_iter().map(op).collect()
    }

    /// One transaction that depends on nothing but that this is the owner.
    fn always(&mut self, ops: Vec<TxnOp>) -> Result<i64, StoreError> {
        match self.step(&[], ops)? {
            Step::Done(revision) => Ok(revision),
            Step::Differs(_) => Err(self.damaged("nothing was compared, and something differs")),
        }
    }

    /// One transaction of etcd, once, however often it has to be sent.
    fn step(&mut self, compares: &[Compare], mut ops: Vec<TxnOp>) -> Result<Step, StoreError> {
        self.marks += 1;
        let mark = format!("{}/{}", self.id, self.marks);
        let owner = self.key("owner");
        let mut when = vec![EtcdCompare::mod_revision(owner.clone(), CompareOp::Equal, self.owned_at)];
        let mut otherwise = vec![TxnOp::get(owner.clone(), None)];
        if let Some(Fence { key, create_revision }) = &self.fence {
            when.push(EtcdCompare::create_revision(key.clone(), CompareOp::Equal, *create_revision));
            otherwise.push(TxnOp::get(key.clone(), None));
        }
        for compare in compares {
            let key = self.row_key(compare.key());
            when.push(match compare {
                Compare::Absent { .. } => EtcdCompare::create_revision(key.clone(), CompareOp::Equal, 0),
                Compare::WrittenAt { revision, .. } => {
                    // 0 would mean that it is not there, and nothing is written at what etcd cannot count to.
                    let revision = i64::try_from(*revision).ok().filter(|revision| *revision > 0);
                    EtcdCompare::mod_revision(key.clone(), CompareOp::Equal, revision.unwrap_or(i64::MAX))
                }
            });
            otherwise.push(TxnOp::get(key, Some(GetOptions::new().with_keys_only())));
        }
        ops.push(TxnOp::put(owner, mark.clone(), None));
        let txn = EtcdTxn::new().when(when).and_then(ops).or_else(otherwise);
        let send = |mut client: etcd_client::Client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        };
        let answer = self.runtime.block_on(self.cluster.get_mut().call(PATIENCE, send))?;
        if answer.succeeded() {
            let revision = answer.header().map(etcd_client::ResponseHeader::revision);
            self.owned_at = revision.ok_or_else(|| self.damaged("an answer of etcd's has no revision"))?;
            return Ok(Step::Done(self.owned_at));
        }
        let found: Vec<_> = answer.op_responses().into_iter().map(first_row).collect();
        let mut found = found.into_iter();
        let owner = found.next().flatten();
        if let Some(row) = owner.as_ref().filter(|row| row.value() == mark.as_bytes()) {
            tracing::info!(mark, "a transaction whose answer was lost had happened");
            self.owned_at = row.mod_revision();
            return Ok(Step::Done(self.owned_at));
        }
        if owner.map_or(0, |row| row.mod_revision()) != self.owned_at {
            return Err(StoreError::TakenOver { place: self.place() });
        }
        if let Some(fence) = &self.fence
            && found.next().flatten().map(|row| row.create_revision()) != Some(fence.create_revision)
        {
            return Err(StoreError::NotLeader { place: self.place() });
        }
        Ok(Step::Differs(found.map(|row| row.map(|row| revision_of(&row))).collect()))
    }

    /// The row of a key of etcd's.
    fn read(&self, key: Vec<u8>) -> Result<Option<KeyValue>, StoreError> {
        let get = |mut client: etcd_client::Client| {
            let key = key.clone();
            async move { client.get(key, None).await }
        };
        let mut answer = self.runtime.block_on(self.cluster.borrow_mut().call(PATIENCE, get))?;
        Ok(answer.take_kvs().pop())
    }

    /// The rows whose key of etcd's has this prefix, all as they were at one revision.
    fn read_range(&self, prefix: Vec<u8>) -> Result<Vec<KeyValue>, StoreError> {
        let end = end_of(&prefix);
        let (mut rows, mut from, mut at) = (Vec::new(), prefix, 0);
        loop {
            let page = |client: etcd_client::Client| {
                let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE).with_revision(at);
                let from = from.clone();
                async move { Cluster::of_large_answers(&client).get(from, Some(options)).await }
            };
            let mut answer = self.runtime.block_on(self.cluster.borrow_mut().call(PATIENCE, page))?;
            at = if at == 0 { answer.header().map_or(0, etcd_client::ResponseHeader::revision) } else { at };
            let more = answer.more();
            rows.extend(answer.take_kvs());
            let Some(last) = rows.last().filter(|_| more) else { return Ok(rows) };
            // The least key above it.
            from = [last.key(), &[0]].concat();
        }
    }

    /// A transaction that is more than etcd takes at once.
    fn large(&mut self, compares: &[Compare], chunks: Vec<Vec<Write>>) -> Result<Txn, StoreError> {
        let name = |number: usize| format!("staged/{number:08}");
        for (number, chunk) in chunks.iter().enumerate() {
            self.always(vec![TxnOp::put(self.key(&name(number)), chunk::encode(chunk), None)])?;
            failpoint::hit("chunk-staged");
        }
        let seal = TxnOp::put(self.key("sealed"), chunks.len().to_string(), None);
        if let Step::Differs(found) = self.step(compares, vec![seal])? {
            for number in 0..chunks.len() {
                self.always(vec![TxnOp::delete(self.key(&name(number)), None)])?;
            }
            return self.conflict(compares, found);
        }
        failpoint::hit("chunks-sealed");
        for (number, chunk) in chunks.into_iter().enumerate() {
            let staged = self.key(&name(number));
            self.carry_out(chunk, &staged)?;
            failpoint::hit("chunk-carried-out");
        }
        let revision = self.always(vec![TxnOp::delete(self.key("sealed"), None)])?;
        Ok(Txn::Committed { revision: revision.cast_unsigned() })
    }

    fn conflict(&self, compares: &[Compare], found: Vec<Option<u64>>) -> Result<Txn, StoreError> {
        let differs = |(compare, found): &(&Compare, Option<u64>)| !compare.holds(*found);
        match compares.iter().zip(found).find(differs) {
            Some((compare, _)) => Ok(Txn::Conflict { key: compare.key().to_vec() }),
            None => Err(self.damaged("a transaction was refused, and nothing differs")),
        }
    }
}

impl Store for Etcd {
    fn get(&self, key: &[u8]) -> Result<Option<Versioned>, StoreError> {
        let row = self.read(self.row_key(key))?;
        Ok(row.map(|row| Versioned { revision: revision_of(&row), value: row.into_key_value().1 }))
    }

    fn range(&self, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Versioned)>, StoreError> {
        let own = self.key("row/").len();
        let versioned = |row: KeyValue| {
            let revision = revision_of(&row);
            let (key, value) = row.into_key_value();
            (key[own..].to_vec(), Versioned { value, revision })
        };
        Ok(self.read_range(self.row_key(prefix))?.into_iter().map(versioned).collect())
    }

    fn txn(&mut self, compares: &[Compare], ops: &[Op]) -> Result<Txn, StoreError> {
        // etcd refuses a key that is written twice.
        let writes: BTreeMap<&[u8], Option<&[u8]>> = ops.iter().map(Op::write).collect();
        if compares.len() > MAX_OPS - 2 {
            return Err(StoreError::TooLarge {
                what: format!("{} comparisons", compares.len()),
                limit: MAX_OPS - 2,
            });
        }
        let mut chunks = chunk::cut(writes, self.limits)?;
        if chunks.len() > 1 {
            return self.large(compares, chunks);
        }
        let ops = self.ops(chunks.pop().unwrap_or_default());
        match self.step(compares, ops)? {
            Step::Done(revision) => Ok(Txn::Committed { revision: revision.cast_unsigned() }),
            Step::Differs(found) => self.conflict(compares, found),
        }
    }

    fn confirm(&mut self) -> Result<(), StoreError> {
        self.always(Vec::new()).map(drop)
    }

    fn limits(&self) -> Limits {
        self.limits
    }
}

fn revision_of(row: &KeyValue) -> u64 {
    row.mod_revision().cast_unsigned()
}

fn first_row(response: TxnOpResponse) -> Option<KeyValue> {
    match response {
        TxnOpResponse::Get(mut found) => found.take_kvs().pop(),
        _ => None,
    }
}

/// The least key above all that have this prefix, which has a byte below 255: it begins with ours.
fn end_of(prefix: &[u8]) -> Vec<u8> {
    let kept = prefix.iter().rposition(|byte| *byte < u8::MAX).map_or(0, |last| last + 1);
    let mut end = prefix[..kept].to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// A name that nobody else has.
fn unique() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// An error of the library, whatever it is about.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct EtcdError(Box<Error>);

impl From<Error> for EtcdError {
    fn from(error: Error) -> EtcdError {
        EtcdError(Box::new(error))
    }
}
