//! A look at the rows, which takes nothing over: the owner goes on.

use std::collections::BTreeMap;

use etcd_client::KeyValue;

use super::{Etcd, Place, chunk};
use crate::store::{SCHEMA, Snapshot, StoreError};

impl Etcd {
    /// All rows at a place, as most members had them at one revision.
    pub fn look(place: Place) -> Result<Snapshot, StoreError> {
        let store = Etcd::at(place, None)?;
        let found = store.read_range(store.key(""))?.into_iter().map(KeyValue::into_key_value);
        let mut found: BTreeMap<Vec<u8>, Vec<u8>> = found.collect();
        let schema = found.remove(&store.key("schema"));
        let schema = schema.map_or(Ok(SCHEMA), |value| store.known_schema(&value))?;
        let leader = found.remove(&store.key("leader"));
        let leader = leader.map(|value| String::from_utf8_lossy(&value).into_owned());
        let mut rows: BTreeMap<_, _> = below(&found, &store.key("row/")).into_iter().collect();
        // A transaction that is written in parts has happened once it is sealed.
        if found.contains_key(&store.key("sealed")) {
            for (_, staged) in below(&found, &store.key("staged/")) {
                let writes = chunk::decode(&staged);
                let writes = writes.ok_or_else(|| store.damaged("what was staged cannot be read"))?;
                for (key, value) in writes {
                    match value {
                        Some(value) => rows.insert(key, value),
                        None => rows.remove(&key),
                    };
                }
            }
        }
        Ok(Snapshot { place: store.place(), schema, rows: rows.into_iter().collect(), leader })
    }
}

/// What is below a prefix, without it.
fn below(found: &BTreeMap<Vec<u8>, Vec<u8>>, prefix: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let own = found.range(prefix.to_vec()..);
    own.map_while(|(key, value)| Some((key.strip_prefix(prefix)?.to_vec(), value.clone()))).collect()
}
