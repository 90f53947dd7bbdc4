//! A store that ends with the process: for tests, and for trying shaper out.

use std::collections::BTreeMap;

use super::{Compare, Op, Store, StoreError, Txn, Versioned};

/// Rows in memory.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    rows: BTreeMap<Vec<u8>, Versioned>,
    revision: u64,
}

impl Store for Memory {
    fn get(&self, key: &[u8]) -> Result<Option<Versioned>, StoreError> {
        Ok(self.rows.get(key).cloned())
    }

    fn range(&self, prefix: &[u8]) -> Result<Vec<(Vec<u8>, Versioned)>, StoreError> {
        let rows = self.rows.range(prefix.to_vec()..).take_while(|(key, _)| key.starts_with(prefix));
        Ok(rows.map(|(key, row)| (key.clone(), row.clone())).collect())
    }

    fn txn(&mut self, compares: &[Compare], ops: &[Op]) -> Result<Txn, StoreError> {
        let written_at = |key: &[u8]| self.rows.get(key).map(|row| row.revision);
        if let Some(conflict) = compares.iter().find(|it| !it.holds(written_at(it.key()))) {
            return Ok(Txn::Conflict { key: conflict.key().to_vec() });
        }
        self.revision += 1;
        for op in ops {
            match op {
                Op::Put { key, value } => {
                    let row = Versioned { value: value.clone(), revision: self.revision };
                    self.rows.insert(key.clone(), row);
                }
                Op::Delete { key } => {
                    self.rows.remove(key);
                }
            }
        }
        Ok(Txn::Committed { revision: self.revision })
    }
}
