//! Offsets of fields in structs, from BTF: the running kernel's, for the kernel programs' globals,
//! and a built object's, for the check that both sides mean the same layout.
//!
//! Format: Documentation/bpf/btf.rst of the kernel.

use std::{collections::HashMap, path::Path};

const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// Why a field was not found.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The kernel offers no BTF.
    #[error("cannot read {path}: the kernel needs CONFIG_DEBUG_INFO_BTF=y")]
    Read {
        /// Where it was looked for.
        path: String,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The data is not BTF, or ends early.
    #[error("malformed BTF at byte {0}")]
    Malformed(usize),
    /// No struct of that name.
    #[error("the kernel's BTF has no struct {0}")]
    NoStruct(String),
    /// The struct has no such field.
    #[error("the kernel's struct {0} has no field {1}")]
    NoField(String, String),
}

/// Parsed BTF.
pub struct Btf {
    data: Vec<u8>,
    strings: usize,
    /// Position of each type's record, by type id; id 0 is void.
    types: Vec<usize>,
    structs: HashMap<String, u32>,
}

impl Btf {
    /// The running kernel's.
    pub fn of_kernel() -> Result<Btf, BtfError> {
        let path = Path::new("/sys/kernel/btf/vmlinux");
        let data = std::fs::read(path)
            .map_err(|source| BtfError::Read { path: path.display().to_string(), source })?;
        Btf::parse(data)
    }

    /// Parses the contents of a `.BTF` section.
    pub fn parse(data: Vec<u8>) -> Result<Btf, BtfError> {
        let mut btf = Btf { data, strings: 0, types: vec![0], structs: HashMap::new() };
        if btf.u32(0)? & 0xffff != 0xeb9f {
            return Err(BtfError::Malformed(0));
        }
        let header = btf.u32(4)? as usize;
        let types = header + btf.u32(8)? as usize;
        let end = types + btf.u32(12)? as usize;
        btf.strings = header + btf.u32(16)? as usize;
        let mut at = types;
        while at < end {
            let info = btf.u32(at + 4)?;
            let count = (info & 0xffff) as usize;
            let extra = match kind(info) {
                KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                KIND_ARRAY => 12,
                KIND_ENUM | KIND_FUNC_PROTO => count * 8,
                KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => count * 12,
                _ => 0,
            };
            if kind(info) == KIND_STRUCT {
                let name = btf.name(at)?.to_owned();
                let id = btf.types.len() as u32;
                btf.structs.entry(name).or_insert(id);
            }
            btf.types.push(at);
            at += 12 + extra;
        }
        Ok(btf)
    }

    /// Offset in bytes of the field that `path` leads to from `name`: one name per level, members of
    /// anonymous structs and unions are found without naming those.
    pub fn offset_of(&self, name: &str, path: &[&str]) -> Result<u64, BtfError> {
        let mut id = *self.structs.get(name).ok_or_else(|| BtfError::NoStruct(name.to_owned()))?;
        let mut offset = 0;
        for field in path {
            let (bits, field_type) =
                self.member(id, field)?.ok_or_else(|| BtfError::NoField(name.to_owned(), path.join(".")))?;
            offset += bits / 8;
            id = field_type;
        }
        Ok(u64::from(offset))
    }

    /// Size of a struct in bytes.
    pub fn size_of(&self, name: &str) -> Result<u64, BtfError> {
        let id = self.structs.get(name).ok_or_else(|| BtfError::NoStruct(name.to_owned()))?;
        Ok(u64::from(self.u32(self.record(*id)? + 8)?))
    }

    /// Bit offset and type of a member, looking through anonymous ones.
    fn member(&self, id: u32, wanted: &str) -> Result<Option<(u32, u32)>, BtfError> {
        let at = self.record(id)?;
        let info = self.u32(at + 4)?;
        if kind(info) != KIND_STRUCT && kind(info) != KIND_UNION {
            return Ok(None);
        }
        let has_bitfields = info >> 31 == 1;
        for index in 0..(info & 0xffff) as usize {
            let member = at + 12 + index * 12;
            let name = self.name(member)?;
            let field_type = self.strip(self.u32(member + 4)?)?;
            let mut bits = self.u32(member + 8)?;
            if has_bitfields {
                bits &= 0x00ff_ffff;
            }
            if name == wanted {
                return Ok(Some((bits, field_type)));
            }
            if name.is_empty()
                && let Some((inner, inner_type)) = self.member(field_type, wanted)?
            {
                return Ok(Some((bits + inner, inner_type)));
            }
        }
        Ok(None)
    }

    /// The type behind typedefs and qualifiers.
    fn strip(&self, mut id: u32) -> Result<u32, BtfError> {
        loop {
            let at = self.record(id)?;
            match kind(self.u32(at + 4)?) {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG if id != 0 => {
                    id = self.u32(at + 8)?;
                }
                _ => return Ok(id),
            }
        }
    }

    fn record(&self, id: u32) -> Result<usize, BtfError> {
        self.types.get(id as usize).copied().ok_or(BtfError::Malformed(self.data.len()))
    }

    fn name(&self, at: usize) -> Result<&str, BtfError> {
        let start = self.strings + self.u32(at)? as usize;
        let rest = self.data.get(start..).ok_or(BtfError::Malformed(start))?;
        let end = rest.iter().position(|byte| *byte == 0).ok_or(BtfError::Malformed(start))?;
        std::str::from_utf8(&rest[..end]).map_err(|_| BtfError::Malformed(start))
    }

    fn u32(&self, at: usize) -> Result<u32, BtfError> {
        let bytes = self.data.get(at..at + 4).ok_or(BtfError::Malformed(at))?;
        Ok(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

fn kind(info: u32) -> u32 {
    info >> 24 & 31
}

/// The globals of `shaper-ebpf/src/kernel.rs`, each with the field whose offset it holds.
pub const OFFSETS: &[(&str, &str, &[&str])] = &[
    ("OFF_TASK_CGROUPS", "task_struct", &["cgroups"]),
    ("OFF_TASK_PID", "task_struct", &["pid"]),
    ("OFF_TASK_LAST_QUEUED", "task_struct", &["sched_info", "last_queued"]),
    ("OFF_TASK_CFS_RQ", "task_struct", &["se", "cfs_rq"]),
    ("OFF_CFS_RQ_RQ", "cfs_rq", &["rq"]),
    ("OFF_RQ_CLOCK", "rq", &["clock"]),
    ("OFF_TASK_EXEC_RUNTIME", "task_struct", &["se", "sum_exec_runtime"]),
    ("OFF_TASK_EXEC_RUNTIME_BEFORE", "task_struct", &["se", "prev_sum_exec_runtime"]),
    ("OFF_CSS_SET_DFL_CGRP", "css_set", &["dfl_cgrp"]),
    ("OFF_CGROUP_KN", "cgroup", &["kn"]),
    ("OFF_CGROUP_ROOT", "cgroup", &["root"]),
    ("OFF_CGROUP_SELF_PARENT", "cgroup", &["self", "parent"]),
    ("OFF_CGROUP_ROOT_HIERARCHY_ID", "cgroup_root", &["hierarchy_id"]),
    ("OFF_CSS_CGROUP", "cgroup_subsys_state", &["cgroup"]),
    ("OFF_KERNFS_NODE_ID", "kernfs_node", &["id"]),
    ("OFF_SK_BUFF_SK", "sk_buff", &["sk"]),
    ("OFF_SOCK_STATE", "sock", &["__sk_common", "skc_state"]),
    ("OFF_TCP_SOCK_CGROUP", "tcp_sock", &["inet_conn", "icsk_inet", "sk", "sk_cgrp_data", "cgroup"]),
    ("OFF_TCP_SOCK_MAX_PACING_RATE", "tcp_sock", &["inet_conn", "icsk_inet", "sk", "sk_max_pacing_rate"]),
    ("OFF_TCP_SOCK_FAMILY", "tcp_sock", &["inet_conn", "icsk_inet", "sk", "__sk_common", "skc_family"]),
    ("OFF_TCP_SOCK_DADDR", "tcp_sock", &["inet_conn", "icsk_inet", "sk", "__sk_common", "skc_daddr"]),
    ("OFF_TCP_SOCK_RCV_SADDR", "tcp_sock", &["inet_conn", "icsk_inet", "sk", "__sk_common", "skc_rcv_saddr"]),
    ("OFF_TCP_SOCK_V6_DADDR", "tcp_sock", &["inet_conn", "icsk_inet", "sk", "__sk_common", "skc_v6_daddr"]),
    (
        "OFF_TCP_SOCK_V6_RCV_SADDR",
        "tcp_sock",
        &["inet_conn", "icsk_inet", "sk", "__sk_common", "skc_v6_rcv_saddr"],
    ),
];

/// Those by which `programs/cpu.rs` keeps in step with the periods of a quota; all, or none.
pub const QUOTA_OFFSETS: &[(&str, &str, &[&str])] = &[
    ("OFF_TASK_GROUP", "task_struct", &["sched_task_group"]),
    ("OFF_TASK_GROUP_PARENT", "task_group", &["parent"]),
    ("OFF_TASK_GROUP_QUOTA", "task_group", &["cfs_bandwidth", "quota"]),
    ("OFF_TASK_GROUP_DUE", "task_group", &["cfs_bandwidth", "period_timer", "node", "expires"]),
];

/// Those of `programs/io.rs`: a kernel without block IO accounting by cgroup lacks some.
pub const IO_OFFSETS: &[(&str, &str, &[&str])] = &[
    ("OFF_REQUEST_BIO", "request", &["bio"]),
    ("OFF_REQUEST_DATA_LEN", "request", &["__data_len"]),
    ("OFF_REQUEST_CMD_FLAGS", "request", &["cmd_flags"]),
    ("OFF_REQUEST_START_TIME_NS", "request", &["start_time_ns"]),
    ("OFF_REQUEST_QUEUE", "request", &["q"]),
    ("OFF_REQUEST_QUEUE_DISK", "request_queue", &["disk"]),
    ("OFF_GENDISK_MAJOR", "gendisk", &["major"]),
    ("OFF_GENDISK_FIRST_MINOR", "gendisk", &["first_minor"]),
    ("OFF_BIO_NEXT", "bio", &["bi_next"]),
    ("OFF_BIO_BLKG", "bio", &["bi_blkg"]),
    ("OFF_BLKG_BLKCG", "blkcg_gq", &["blkcg"]),
    ("OFF_BLKCG_CGROUP", "blkcg", &["css", "cgroup"]),
];

/// Those of `programs/io.rs` that tell more where they are; a name, a struct, and the places that kernels have had it at.
pub const IO_EXTRAS: &[(&str, &str, &[&[&str]])] = &[
    ("OFF_REQUEST_ALLOC_TIME_NS", "request", &[&["alloc_time_ns"]]),
    ("OFF_BIO_ISSUE", "bio", &[&["bi_issue", "value"], &["issue_time_ns"]]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_every_field_that_the_programs_read() {
        let btf = Btf::of_kernel().expect("this kernel has BTF");
        for (global, name, path) in OFFSETS.iter().chain(QUOTA_OFFSETS).chain(IO_OFFSETS) {
            btf.offset_of(name, path).unwrap_or_else(|error| panic!("{global}: {error}"));
        }
        assert!(btf.size_of("task_struct").unwrap() > 1000);
    }

    #[test]
    fn a_missing_field_and_a_torn_file_are_told_apart() {
        let btf = Btf::of_kernel().expect("this kernel has BTF");
        assert!(matches!(btf.offset_of("task_struct", &["no_such"]), Err(BtfError::NoField(..))));
        assert!(matches!(btf.offset_of("no_such", &["pid"]), Err(BtfError::NoStruct(_))));
        assert!(matches!(Btf::parse(vec![0; 64]), Err(BtfError::Malformed(0))));
        let mut data = std::fs::read("/sys/kernel/btf/vmlinux").unwrap();
        data.truncate(100_000);
        assert!(matches!(Btf::parse(data), Err(BtfError::Malformed(_))));
    }
}
