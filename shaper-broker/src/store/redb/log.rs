//! What was written of late, as it is in the log: one record a transaction.
//!
//! A record is its operations one after the other, each the length of the key, the length of the value plus one (0: the key
//! is removed), both as eight bytes, the lowest first, then the key and the value.

use std::{collections::HashMap, ops::Range};

use crate::store::Op;

/// A transaction.
#[derive(Debug)]
pub(super) struct Record {
    /// Its revision.
    pub(super) revision: u64,
    /// Its operations.
    pub(super) bytes: Vec<u8>,
}

/// Why a record cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut;

const LENGTH: usize = size_of::<u64>();

/// How many bytes the record of these has.
pub(super) fn length(ops: &[Op]) -> usize {
    let length = |op: &Op| {
        let (key, value) = op.write();
        2 * LENGTH + key.len() + value.map_or(0, <[u8]>::len)
    };
    ops.iter().map(length).sum()
}

impl Record {
    pub(super) fn of(revision: u64, ops: &[Op]) -> Record {
        let mut bytes = Vec::with_capacity(length(ops));
        for op in ops {
            let (key, value) = op.write();
            bytes.extend((key.len() as u64).to_le_bytes());
            bytes.extend(value.map_or(0, |value| value.len() as u64 + 1).to_le_bytes());
            bytes.extend(key);
            bytes.extend(value.unwrap_or_default());
        }
        Record { revision, bytes }
    }

    fn value(&self, range: Option<&Range<usize>>) -> Option<&[u8]> {
        range.and_then(|range| self.bytes.get(range.clone()))
    }
}

/// Takes the parts of a record off its front.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, length: u64) -> Result<Range<usize>, Cut> {
        let end = usize::try_from(length).ok().and_then(|length| self.at.checked_add(length)).ok_or(Cut)?;
        if end > self.bytes.len() {
            return Err(Cut);
        }
        Ok(std::mem::replace(&mut self.at, end)..end)
    }

    fn number(&mut self) -> Result<u64, Cut> {
        let range = self.take(LENGTH as u64)?;
        self.bytes[range].try_into().map(u64::from_le_bytes).map_err(|_| Cut)
    }

    /// The key and the value of the next operation.
    fn next(&mut self) -> Result<(Range<usize>, Option<Range<usize>>), Cut> {
        let (key, value) = (self.number()?, self.number()?);
        let key = self.take(key)?;
        Ok((key, value.checked_sub(1).map(|length| self.take(length)).transpose()?))
    }
}

/// Where the last write of a key is.
#[derive(Debug)]
struct At {
    record: usize,
    /// In its bytes; `None`: the key was removed.
    value: Option<Range<usize>>,
}

/// A row as it was last written here: when, and what; `None`: it was removed.
pub(super) type Written<'a> = (u64, Option<&'a [u8]>);

/// Transactions one after the other, while they are added to.
#[derive(Debug, Default)]
pub(super) struct Recent {
    records: Vec<Record>,
    latest: HashMap<Box<[u8]>, At>,
    bytes: usize,
}

impl Recent {
    /// Adds the next one.
    pub(super) fn add(&mut self, record: Record) -> Result<(), Cut> {
        let mut reader = Reader { bytes: &record.bytes, at: 0 };
        while reader.at < record.bytes.len() {
            let (key, value) = reader.next()?;
            let at = At { record: self.records.len(), value };
            match self.latest.get_mut(&record.bytes[key.clone()]) {
                Some(known) => *known = at,
                None => drop(self.latest.insert(record.bytes[key].into(), at)),
            }
        }
        self.bytes += record.bytes.len();
        self.records.push(record);
        Ok(())
    }

    /// Of all records.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.latest.contains_key(key)
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<Written<'_>> {
        self.latest.get(key).map(|at| written(&self.records, at))
    }

    /// In no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], Written<'_>)> {
        self.latest.iter().map(|(key, at)| (key.as_ref(), written(&self.records, at)))
    }

    /// From here on nothing is added.
    pub(super) fn freeze(self) -> Frozen {
        let mut latest: Vec<_> = self.latest.into_iter().collect();
        latest.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Frozen { records: self.records, latest, settled: 0 }
    }
}

/// Transactions that nothing is added to any more, on their way from the log into the rows.
#[derive(Debug)]
pub(super) struct Frozen {
    records: Vec<Record>,
    /// In the order of the keys.
    latest: Vec<(Box<[u8]>, At)>,
    /// How many of these are in the rows.
    settled: usize,
}

impl Frozen {
    pub(super) fn get(&self, key: &[u8]) -> Option<Written<'_>> {
        let at = self.latest.binary_search_by(|(known, _)| known.as_ref().cmp(key)).ok()?;
        self.latest.get(at).map(|(_, at)| written(&self.records, at))
    }

    /// In the order of the keys.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], Written<'_>)> {
        self.latest.iter().map(|(key, at)| (key.as_ref(), written(&self.records, at)))
    }

    /// The next that are to go into the rows, in the order of the keys.
    pub(super) fn next(&self, most: usize) -> impl ExactSizeIterator<Item = (&[u8], Written<'_>)> {
        let end = self.settled.saturating_add(most).min(self.latest.len());
        self.latest[self.settled..end].iter().map(|(key, at)| (key.as_ref(), written(&self.records, at)))
    }

    /// So many more are in the rows.
    pub(super) fn settle(&mut self, some: usize) {
        self.settled += some;
    }

    /// How many are not in the rows yet.
    pub(super) fn left(&self) -> usize {
        self.latest.len() - self.settled
    }

    /// The latest transaction.
    pub(super) fn last(&self) -> Option<u64> {
        self.records.last().map(|record| record.revision)
    }
}

fn written<'a>(records: &'a [Record], at: &At) -> Written<'a> {
    let record = &records[at.record];
    (record.revision, record.value(at.value.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops() -> Vec<Op> {
        let put = |key: &[u8], value: &[u8]| Op::Put { key: key.into(), value: value.into() };
        vec![put(b"b", b"1"), put(b"a", b""), Op::Delete { key: b"b".into() }, put(b"", b"of the empty key")]
    }

    #[test]
    fn of_several_writes_of_a_key_the_last_is_found() {
        let mut recent = Recent::default();
        recent.add(Record::of(7, &ops())).unwrap();
        recent.add(Record::of(8, &[])).unwrap();
        recent.add(Record::of(9, &[Op::Put { key: b"a".into(), value: b"2".into() }])).unwrap();
        let expected = |key: &[u8]| match key {
            b"a" => Some((9, Some(&b"2"[..]))),
            b"b" => Some((7, None)),
            b"" => Some((7, Some(&b"of the empty key"[..]))),
            _ => None,
        };
        let keys: [&[u8]; 4] = [b"", b"a", b"b", b"c"];
        for key in keys {
            assert_eq!(recent.get(key), expected(key), "{key:?}");
        }
        let mut frozen = recent.freeze();
        for key in keys {
            assert_eq!(frozen.get(key), expected(key), "{key:?}");
        }
        let order: Vec<_> = frozen.next(2).map(|(key, _)| key.to_vec()).collect();
        assert_eq!(order, [b"".to_vec(), b"a".to_vec()]);
        frozen.settle(2);
        assert_eq!((frozen.next(9).len(), frozen.left(), frozen.last()), (1, 1, Some(9)));
    }

    #[test]
    fn a_record_that_is_cut_is_an_error() {
        let whole = Record::of(1, &ops());
        let mut starts = vec![0];
        let mut reader = Reader { bytes: &whole.bytes, at: 0 };
        while reader.at < whole.bytes.len() {
            reader.next().unwrap();
            starts.push(reader.at);
        }
        for length in 0..whole.bytes.len() {
            let cut = Record { revision: 1, bytes: whole.bytes[..length].to_vec() };
            assert_eq!(Recent::default().add(cut).is_ok(), starts.contains(&length), "of {length} bytes");
        }
        let endless = Record { revision: 1, bytes: vec![255; 64] };
        assert_eq!(Recent::default().add(endless), Err(Cut));
    }
}
