//! One of several brokers leads: it made the row `leader`, which hangs on a lease that it renews. The others watch that row.
//!
//! With each renewal the leader writes the row anew, so that the others see that it is there. When they have not seen that for
//! as long as the lease, they remove the row, if it still is as they saw it last: etcd itself ends a lease up to half a second late,
//! and gives each its full length again when its members elect another of theirs.
//!
//! A leader that cannot renew the lease knows by its own clock when it may be over, and stops then; etcd, and those who watch,
//! count from a later moment. Should it not notice, as a process that is stopped does not, its writes compare the row
//! ([`Fence`]) and do not happen. The two do not depend on each other.

use std::{error::Error, time::Duration};

use etcd_client::{
    Compare, CompareOp, EventType, KeyValue, LeaseGrantOptions, PutOptions, Txn, TxnOp, WatchOptions,
};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    Fence, PATIENCE, Place,
    cluster::{CALL, Cluster},
    first_row,
};
use crate::store::StoreError;

/// Before a watch that broke off is begun again.
const PAUSE: Duration = Duration::from_millis(100);
/// How often a lease is renewed in its time.
const RENEWALS: u32 = 3;

/// A lease, and the row that hangs on it.
#[derive(Debug)]
pub struct Leadership {
    cluster: Cluster,
    me: String,
    lease: i64,
    length: Duration,
    /// When it was last asked to be renewed, of those requests that were answered.
    renewed_at: Instant,
    fence: Fence,
}

impl Leadership {
    /// Waits for as long as another leads, and then leads. `me` is what others are told to ask. `tell` learns of each leader.
    pub async fn win(
        place: Place,
        me: &str,
        length: Duration,
        mut tell: impl FnMut(&str),
    ) -> Result<Leadership, StoreError> {
        let key = place.key("leader");
        let mut cluster = Cluster::new(place);
        let mut heard: Option<Heard> = None;
        loop {
            let get = |mut client: etcd_client::Client| {
                let key = key.clone();
                async move { client.get(key, None).await }
            };
            // Who listens for a leader cannot wait long for a member of etcd.
            let patience = heard.as_ref().map_or(PATIENCE, Heard::patience);
            let mut answer = match cluster.call(patience, get).await {
                // A broker that stands by has nothing to lose by waiting.
                Err(StoreError::Unreachable { endpoints, source }) => {
                    tracing::warn!(endpoints, %source, "etcd does not answer; waiting for it");
                    continue;
                }
                answer => answer?,
            };
            if let Some(row) = answer.take_kvs().pop() {
                let heard = match &mut heard {
                    Some(heard) if heard.made_at == row.create_revision() => heard,
                    heard => {
                        tell(&String::from_utf8_lossy(row.value()));
                        heard.insert(Heard::of(&mut cluster, &row, length).await)
                    }
                };
                heard.hear(row.mod_revision());
                let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
                heard.wait_until_gone(&mut cluster, &key, revision + 1).await;
                continue;
            }
            heard = None;
            let renewed_at = Instant::now();
            if let Some((lease, create_revision)) = stand(&mut cluster, &key, me, length).await? {
                let fence = Fence { key, create_revision };
                let me = me.to_owned();
                return Ok(Leadership { cluster, me, lease, length, renewed_at, fence });
            }
        }
    }

    /// What each write is to depend on.
    pub fn fence(&self) -> Fence {
        self.fence.clone()
    }

    #[cfg(test)]
    pub(super) fn lease(&self) -> i64 {
        self.lease
    }

    /// Renews the lease for as long as that can be done; returns when it may be over.
    pub async fn keep(&mut self) -> StoreError {
        loop {
            sleep_until(self.renewed_at + self.length / RENEWALS).await;
            let asked_at = Instant::now();
            match self.renew(self.renewed_at + self.length).await {
                // By the clock of the request: etcd, and those who watch, count from when they had it.
                Ok(()) => self.renewed_at = asked_at,
                Err(error) => {
                    let why = error.source().map(ToString::to_string);
                    tracing::warn!(why, "the lease cannot be renewed: {error}");
                    return StoreError::NotLeader { place: self.cluster.place.to_string() };
                }
            }
        }
    }

    /// Renews the lease and writes the row, by then.
    async fn renew(&mut self, until: Instant) -> Result<(), StoreError> {
        let left = || until.saturating_duration_since(Instant::now());
        let lease = self.lease;
        let renew = |mut client: etcd_client::Client| async move { client.lease_keep_alive(lease).await };
        self.cluster.call(left(), renew).await?;
        let Fence { key, create_revision } = &self.fence;
        let still = Compare::create_revision(key.clone(), CompareOp::Equal, *create_revision);
        let put = TxnOp::put(key.clone(), self.me.clone(), Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new().when([still]).and_then([put]);
        let write = |mut client: etcd_client::Client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        };
        if self.cluster.call(left(), write).await?.succeeded() {
            return Ok(());
        }
        Err(StoreError::NotLeader { place: self.cluster.place.to_string() })
    }

    /// Lets another lead at once.
    pub async fn resign(mut self) {
        revoke(&mut self.cluster, self.lease).await;
    }
}

/// Tries to make the row: its lease, and when it was made.
async fn stand(
    cluster: &mut Cluster,
    key: &[u8],
    me: &str,
    length: Duration,
) -> Result<Option<(i64, i64)>, StoreError> {
    let seconds = i64::try_from(length.as_secs()).unwrap_or(i64::MAX);
    // One of which the answer was lost ends by itself.
    let grant = |mut client: etcd_client::Client| async move {
        client.lease_grant(seconds, None::<LeaseGrantOptions>).await
    };
    let lease = cluster.call(PATIENCE, grant).await?.id();
    let txn = Txn::new()
        .when([Compare::create_revision(key, CompareOp::Equal, 0)])
        .and_then([TxnOp::put(key, me, Some(PutOptions::new().with_lease(lease)))])
        .or_else([TxnOp::get(key, None)]);
    let send = |mut client: etcd_client::Client| {
        let txn = txn.clone();
        async move { client.txn(txn).await }
    };
    let answer = cluster.call(PATIENCE, send).await?;
    let create_revision = if answer.succeeded() {
        answer.header().map(etcd_client::ResponseHeader::revision)
    } else {
        // Sent twice, it finds what it made.
        let row = answer.op_responses().into_iter().next().and_then(first_row);
        row.filter(|row| row.lease() == lease).map(|row| row.create_revision())
    };
    let Some(create_revision) = create_revision else {
        revoke(cluster, lease).await;
        return Ok(None);
    };
    Ok(Some((lease, create_revision)))
}

/// Ends a lease early. If that fails it ends by itself.
async fn revoke(cluster: &mut Cluster, lease: i64) {
    let revoke = |mut client: etcd_client::Client| async move { client.lease_revoke(lease).await };
    if let Err(error) = cluster.call(CALL, revoke).await {
        tracing::warn!(%error, "a lease ends by itself");
    }
}

/// What a broker that stands by has heard of the leader.
#[derive(Debug)]
struct Heard {
    /// When the leader's row was made.
    made_at: i64,
    /// Of the lease that it hangs on: for so long the leader may be silent.
    length: Duration,
    /// When it was written last, as far as is known here.
    written_at: i64,
    /// When that was heard.
    at: Instant,
}

impl Heard {
    /// `ours` is how long our own leases are.
    async fn of(cluster: &mut Cluster, row: &KeyValue, ours: Duration) -> Heard {
        let lease = row.lease();
        let ask =
            |mut client: etcd_client::Client| async move { client.lease_time_to_live(lease, None).await };
        let length = match cluster.call(CALL.min(ours), ask).await.map(|answer| answer.granted_ttl()) {
            Ok(seconds @ 1..) => Duration::from_secs(seconds.unsigned_abs()),
            // It is over, and the row will go with it.
            Ok(_) => Duration::MAX,
            Err(_) => ours,
        };
        Heard { made_at: row.create_revision(), length, written_at: 0, at: Instant::now() }
    }

    /// How long all members of etcd together are waited for.
    fn patience(&self) -> Duration {
        PATIENCE.min(self.length / 2)
    }

    /// The leader has written its row.
    fn hear(&mut self, revision: i64) {
        if revision > self.written_at {
            (self.written_at, self.at) = (revision, Instant::now());
        }
    }

    /// Returns when the row was deleted at this revision or later, or when it is to be looked at again.
    async fn wait_until_gone(&mut self, cluster: &mut Cluster, key: &[u8], revision: i64) {
        let watch = async {
            let options = WatchOptions::new().with_start_revision(revision);
            cluster.client().await?.watch(key, Some(options)).await
        };
        let broke_off = match timeout(CALL.min(self.patience()), watch).await {
            Ok(Ok(mut stream)) => loop {
                let silent = self.at.elapsed();
                if silent >= self.length {
                    return self.depose(cluster, key).await;
                }
                // Halfway it is asked whether it is the member of etcd that is silent.
                let half = self.length / 2;
                let next = if silent < half { half - silent } else { self.length - silent };
                match timeout(next, stream.message()).await {
                    Ok(Ok(Some(message))) if message.canceled() => break message.cancel_reason().to_owned(),
                    Ok(Ok(Some(message))) => {
                        for event in message.events() {
                            match (event.event_type(), event.kv()) {
                                (EventType::Delete, _) => return,
                                (EventType::Put, Some(row)) => self.hear(row.mod_revision()),
                                (EventType::Put, None) => {}
                            }
                        }
                    }
                    Ok(Ok(None)) => break "the member of etcd ended it".to_owned(),
                    Ok(Err(error)) => break error.to_string(),
                    Err(_) if silent < half => return cluster.pass_over(),
                    Err(_) => {}
                }
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        tracing::warn!(endpoint = cluster.endpoint(), broke_off, "the leader cannot be watched");
        cluster.pass_over();
        sleep(PAUSE).await;
    }

    /// Removes the leader's row, unless it was written meanwhile.
    async fn depose(&self, cluster: &mut Cluster, key: &[u8]) {
        let as_heard = Compare::mod_revision(key, CompareOp::Equal, self.written_at);
        let txn = Txn::new().when([as_heard]).and_then([TxnOp::delete(key, None)]);
        let send = |mut client: etcd_client::Client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        };
        match cluster.call(self.patience(), send).await {
            Ok(answer) if answer.succeeded() => {
                tracing::warn!(silent = ?self.at.elapsed(), "nothing was heard of the leader; its row is removed");
            }
            // It was written, or another has removed it.
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "nothing is heard of the leader, and etcd does not answer"),
        }
    }
}
