//! One of several brokers leads: it made the row `leader`, which hangs on a lease that it renews. The others watch that row.
//!
//! A leader that cannot renew the lease knows by its own clock when it may be over, and stops then; etcd counts from a later
//! moment. Should it not notice, as a process that is stopped does not, its writes compare the row ([`Fence`]) and do not
//! happen. The two do not depend on each other.

use std::{error::Error, time::Duration};

use etcd_client::{Compare, CompareOp, EventType, LeaseGrantOptions, PutOptions, Txn, TxnOp, WatchOptions};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    Fence, PATIENCE, Place,
    cluster::{CALL, Cluster},
    first_row,
};
use crate::store::StoreError;

/// Before a watch that broke off is begun again.
const PAUSE: Duration = Duration::from_millis(100);

/// A lease, and the row that hangs on it.
#[derive(Debug)]
pub struct Leadership {
    cluster: Cluster,
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
        loop {
            let get = |mut client: etcd_client::Client| {
                let key = key.clone();
                async move { client.get(key, None).await }
            };
            let mut answer = match cluster.call(PATIENCE, get).await {
                // A broker that stands by has nothing to lose by waiting.
                Err(StoreError::Unreachable { endpoints, source }) => {
                    tracing::warn!(endpoints, %source, "etcd does not answer; waiting for it");
                    continue;
                }
                answer => answer?,
            };
            if let Some(row) = answer.take_kvs().pop() {
                tell(&String::from_utf8_lossy(row.value()));
                let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
                wait_until_gone(&mut cluster, &key, revision + 1).await;
                continue;
            }
            let renewed_at = Instant::now();
            if let Some((lease, create_revision)) = stand(&mut cluster, &key, me, length).await? {
                let fence = Fence { key, create_revision };
                return Ok(Leadership { cluster, lease, length, renewed_at, fence });
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
        let lease = self.lease;
        loop {
            sleep_until(self.renewed_at + self.length / 3).await;
            let asked_at = Instant::now();
            let left = (self.renewed_at + self.length).saturating_duration_since(asked_at);
            let renew = |mut client: etcd_client::Client| async move { client.lease_keep_alive(lease).await };
            match self.cluster.call(left, renew).await {
                // By the clock of the request: etcd counts from when it had it.
                Ok(_) => self.renewed_at = asked_at,
                Err(error) => {
                    let why = error.source().map(ToString::to_string);
                    tracing::warn!(why, "the lease cannot be renewed: {error}");
                    return StoreError::NotLeader { place: self.cluster.place.to_string() };
                }
            }
        }
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

/// Returns when the row was deleted at this revision or later, or when that cannot be watched any more: look again.
async fn wait_until_gone(cluster: &mut Cluster, key: &[u8], revision: i64) {
    let watch = async {
        let options = WatchOptions::new().with_start_revision(revision);
        cluster.client().await?.watch(key, Some(options)).await
    };
    let broke_off = match timeout(CALL, watch).await {
        Ok(Ok(mut stream)) => loop {
            match stream.message().await {
                Ok(Some(message)) if message.canceled() => break message.cancel_reason().to_owned(),
                Ok(Some(message)) => {
                    if message.events().iter().any(|event| event.event_type() == EventType::Delete) {
                        return;
                    }
                }
                Ok(None) => break "the member of etcd ended it".to_owned(),
                Err(error) => break error.to_string(),
            }
        },
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer".to_owned(),
    };
    tracing::warn!(endpoint = cluster.endpoint(), broke_off, "the leader cannot be watched");
    cluster.pass_over();
    sleep(PAUSE).await;
}
