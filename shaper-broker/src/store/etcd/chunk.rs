//! A transaction in parts that etcd takes, and the bytes in which a part waits.

use std::collections::BTreeMap;

use crate::store::{Limits, StoreError};

/// A key, and its value unless it is removed.
pub(super) type Write = (Vec<u8>, Option<Vec<u8>>);

/// Parts within the limits, in the order of their keys.
pub(super) fn cut(
    writes: BTreeMap<&[u8], Option<&[u8]>>,
    limits: Limits,
) -> Result<Vec<Vec<Write>>, StoreError> {
    let (mut chunks, mut chunk, mut bytes) = (Vec::new(), Vec::new(), 0);
    for (key, value) in writes {
        let size = key.len() + value.map_or(0, <[u8]>::len);
        if size > limits.bytes {
            let what = format!("the row {} with {size} bytes", String::from_utf8_lossy(key));
            return Err(StoreError::TooLarge { what, limit: limits.bytes });
        }
        if chunk.len() == limits.writes || bytes + size > limits.bytes {
            chunks.push(std::mem::take(&mut chunk));
            bytes = 0;
        }
        bytes += size;
        chunk.push((key.to_vec(), value.map(<[u8]>::to_vec)));
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    Ok(chunks)
}

/// For each write: the length of the key in four bytes, the highest first, and the key; 0 for a removal, or 1, the length of
/// the value, and the value.
pub(super) fn encode(chunk: &[Write]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let put = |part: &[u8], bytes: &mut Vec<u8>| {
        let length = u32::try_from(part.len()).expect("a part is within the limit of a transaction");
        bytes.extend(length.to_be_bytes());
        bytes.extend(part);
    };
    for (key, value) in chunk {
        put(key, &mut bytes);
        bytes.push(u8::from(value.is_some()));
        if let Some(value) = value {
            put(value, &mut bytes);
        }
    }
    bytes
}

/// What [`encode`] made, and nothing else.
pub(super) fn decode(mut bytes: &[u8]) -> Option<Vec<Write>> {
    fn part(bytes: &mut &[u8]) -> Option<Vec<u8>> {
        let (length, rest) = bytes.split_first_chunk()?;
        let (part, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        *bytes = rest;
        Some(part.to_vec())
    }
    let mut chunk = Vec::new();
    while !bytes.is_empty() {
        let key = part(&mut bytes)?;
        let (kind, rest) = bytes.split_first()?;
        bytes = rest;
        let value = match kind {
            0 => None,
            1 => Some(part(&mut bytes)?),
            _ => return None,
        };
        chunk.push((key, value));
    }
    Some(chunk)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { writes: 3, bytes: 10 };

    fn sizes(writes: &[(&str, usize)]) -> Vec<usize> {
        let value = [7; 10];
        let writes = writes.iter().map(|(key, size)| (key.as_bytes(), Some(&value[..*size]))).collect();
        cut(writes, LIMITS).unwrap().iter().map(Vec::len).collect()
    }

    #[test]
    fn parts_are_as_large_as_the_limits_let_them() {
        assert!(sizes(&[]).is_empty());
        assert_eq!(sizes(&[("a", 0), ("b", 0), ("c", 0)]), [3]);
        assert_eq!(sizes(&[("a", 0), ("b", 0), ("c", 0), ("d", 0)]), [3, 1]);
        assert_eq!(sizes(&[("a", 4), ("b", 4)]), [2]);
        assert_eq!(sizes(&[("a", 4), ("b", 5)]), [1, 1]);
        assert_eq!(sizes(&[("a", 9), ("b", 9)]), [1, 1]);
        let error = cut([(&b"a"[..], Some(&[0; 10][..]))].into(), LIMITS).unwrap_err();
        assert!(matches!(error, StoreError::TooLarge { limit: 10, .. }), "{error}");
    }

    #[test]
    fn what_is_encoded_is_decoded_and_nothing_else() {
        let chunk = vec![(b"a".to_vec(), Some(vec![])), (vec![], None), (vec![0, 255], Some(vec![1; 300]))];
        let bytes = encode(&chunk);
        assert_eq!(decode(&bytes), Some(chunk.clone()));
        for cut in 0..bytes.len() {
            assert_ne!(decode(&bytes[..cut]).as_ref(), Some(&chunk), "cut at {cut}");
        }
        assert_eq!(decode(&[0, 0, 0, 0, 2]), None, "no such kind");
    }
}
