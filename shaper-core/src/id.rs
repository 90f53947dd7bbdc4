//! Identifiers. A [`TaskId`] becomes part of paths, cgroup names and log lines, so what it may
//! contain is decided once, here.

use std::{fmt, num::NonZeroU32, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a valid task id: 1 to 63 characters out of a-z, A-Z, 0-9, `-`, `_` and `.`, \
     beginning and ending with a letter or digit"
)]
pub struct InvalidTaskId(String);

/// Name of a task, unique on a node. At most 63 characters, safe as one component of a path. A clone shares the text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct TaskId(Arc<str>);

impl TaskId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TaskId {
    type Err = InvalidTaskId;

    fn from_str(name: &str) -> Result<TaskId, InvalidTaskId> {
        let bytes = name.as_bytes();
        let inner = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let valid = bytes.len() <= 63 && edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(inner);
        if valid {
            Ok(TaskId(name.into()))
        } else {
            let mut shown: String = name.chars().take(64).flat_map(char::escape_default).collect();
            if shown.len() < name.len() {
                shown.push('…');
            }
            Err(InvalidTaskId(shown))
        }
    }
}

impl TryFrom<String> for TaskId {
    type Error = InvalidTaskId;

    fn try_from(name: String) -> Result<TaskId, InvalidTaskId> {
        name.parse()
    }
}

impl From<TaskId> for String {
    fn from(id: TaskId) -> String {
        id.as_str().to_owned()
    }
}

impl Serialize for TaskId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// One run of a task: at most one attempt of a task is ever alive.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExecutionId {
    /// The task.
    pub task: TaskId,
    /// Which run of it, from 1.
    #[serde(deserialize_with = "attempt")]
    pub attempt: u32,
}

fn attempt<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    NonZeroU32::deserialize(deserializer).map(NonZeroU32::get)
}

impl fmt::Display for ExecutionId {
    /// `task.attempt`: the name of its cgroup.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.task, self.attempt)
    }
}

impl FromStr for ExecutionId {
    type Err = InvalidTaskId;

    fn from_str(text: &str) -> Result<ExecutionId, InvalidTaskId> {
        let error = || InvalidTaskId(text.to_owned());
        let (task, attempt) = text.rsplit_once('.').ok_or_else(error)?;
        let attempt = attempt.parse().ok().filter(|attempt| *attempt > 0).ok_or_else(error)?;
        Ok(ExecutionId { task: task.parse()?, attempt })
    }
}

/// A block device, by number. Shown as in `/sys/dev/block` and in cgroup files: `8:16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BlockDevice {
    /// Its driver.
    pub major: u32,
    /// Which one of the driver's.
    pub minor: u32,
}

impl BlockDevice {
    /// From the kernel's own form, major << 20 | minor.
    pub fn from_kernel(number: u32) -> BlockDevice {
        BlockDevice { major: number >> 20, minor: number & 0xf_ffff }
    }
}

impl fmt::Display for BlockDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Why a block device was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the number of a block device, such as 8:16 (see `lsblk`)")]
pub struct InvalidBlockDevice(String);

impl FromStr for BlockDevice {
    type Err = InvalidBlockDevice;

    fn from_str(text: &str) -> Result<BlockDevice, InvalidBlockDevice> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            if digits { text.parse().ok() } else { None }
        };
        text.split_once(':')
            .and_then(|(major, minor)| Some(BlockDevice { major: number(major)?, minor: number(minor)? }))
            .ok_or_else(|| InvalidBlockDevice(text.to_owned()))
    }
}

impl TryFrom<String> for BlockDevice {
    type Error = InvalidBlockDevice;

    fn try_from(text: String) -> Result<BlockDevice, InvalidBlockDevice> {
        text.parse()
    }
}

impl From<BlockDevice> for String {
    fn from(device: BlockDevice) -> String {
        device.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_could_leave_its_place_is_refused() {
        for bad in ["", ".", "..", "../../x", "a/b", "-rf", "a\0b", "a b", "ä", "a.", &"x".repeat(64)] {
            assert!(bad.parse::<TaskId>().is_err(), "{bad:?}");
        }
        for good in ["a", "web-1", "etl.load_v2", &"x".repeat(63)] {
            assert!(good.parse::<TaskId>().is_ok(), "{good:?}");
        }
        assert!(serde_json::from_str::<TaskId>("\"../x\"").is_err());
    }

    #[test]
    fn an_execution_reads_back_even_when_the_task_ends_like_one() {
        let id = ExecutionId { task: "model.7".parse().unwrap(), attempt: 3 };
        assert_eq!(id.to_string(), "model.7.3");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn there_is_no_attempt_before_the_first() {
        assert!("a.0".parse::<ExecutionId>().is_err());
        assert!(serde_json::from_str::<ExecutionId>(r#"{"task":"a","attempt":0}"#).is_err());
        let first: ExecutionId = serde_json::from_str(r#"{"task":"a","attempt":1}"#).unwrap();
        assert_eq!(serde_json::to_string(&first).unwrap(), r#"{"task":"a","attempt":1}"#);
    }

    proptest! {
        #[test]
        fn an_accepted_name_is_one_plain_path_component(name in ".{0,70}") {
            if let Ok(id) = name.parse::<TaskId>() {
                let path = std::path::Path::new("/base").join(id.as_str());
                prop_assert_eq!(path.parent(), Some(std::path::Path::new("/base")));
                prop_assert_eq!(path.components().count(), 3);
            }
        }
    }

    #[test]
    fn block_devices_are_two_numbers() {
        let device = BlockDevice { major: 8, minor: 16 };
        assert_eq!(BlockDevice::from_kernel(8 << 20 | 16), device);
        assert_eq!(device.to_string().parse(), Ok(device));
        for bad in ["", "8", "8:", ":1", "8:-1", "+8:1", "8:1:1", "a:b"] {
            assert!(bad.parse::<BlockDevice>().is_err(), "{bad}");
        }
    }
}
