//! The files of one task's CPU quota, held open: what is lent must be in force within a tick.

use std::path::PathBuf;

use shaper_core::{limits::Limit, units::Micros};

use super::{ActuateError, Knob, Target, Value};
use crate::{
    kernel::{
        cgroup::{
            Open,
            cpu::{self, Bandwidth, BandwidthStep, CpuMax},
        },
        v1::{self, V1Limit},
    },
    lease::{Kind, Lease},
};

/// The quota of a task, open.
pub struct QuotaFile {
    directory: PathBuf,
    inode: u64,
    quota: Quota,
    /// What may be saved (`cpu.max.burst`, 5.14).
    burst: Option<Open<Micros>>,
}

enum Quota {
    V2(Open<CpuMax>),
    V1(Open<V1Limit<Micros>>),
}

impl QuotaFile {
    /// Opens that of a task; `None` where nothing enforces one.
    pub fn open(target: &Target) -> Result<Option<QuotaFile>, ActuateError> {
        let cgroup = &target.cgroup;
        if let Some(max) = cgroup.open_file_to_write(cpu::MAX)? {
            return Ok(Some(QuotaFile {
                directory: cgroup.path().to_owned(),
                inode: cgroup.id(),
                quota: Quota::V2(max),
                burst: cgroup.open_file_to_write(cpu::MAX_BURST)?,
            }));
        }
        let Some(group) = &target.v1_cpu else { return Ok(None) };
        let Some(quota) = group.open_file_to_write(v1::CPU_QUOTA)? else { return Ok(None) };
        Ok(Some(QuotaFile {
            directory: group.directory().to_owned(),
            inode: group.id()?,
            quota: Quota::V1(quota),
            burst: group.open_file_to_write(v1::CPU_BURST)?,
        }))
    }

    /// What the kernel lets the task save now.
    pub fn saving(&self) -> Result<Micros, ActuateError> {
        Ok(self.burst.as_ref().map(Open::read).transpose()?.unwrap_or_default())
    }

    /// How this is noted, for a quota to be written back.
    pub fn lease(&self, quota: Micros) -> Lease {
        let kind = match self.quota {
            Quota::V2(_) => Kind::V2,
            Quota::V1(_) => Kind::V1,
        };
        Lease { cgroup: self.directory.clone(), inode: self.inode, kind, quota }
    }

    fn read(&self) -> Result<Bandwidth, ActuateError> {
        let max = match &self.quota {
            Quota::V2(file) => file.read()?,
            // A limit of ours has the usual period.
            Quota::V1(file) => CpuMax { quota: file.read()?.0, period: CpuMax::PERIOD },
        };
        Ok(Bandwidth { max, burst: self.burst.as_ref().map(Open::read).transpose()? })
    }

    /// Puts a quota in force, with what may be saved of it, and reads them back.
    pub(super) fn set(&self, quota: Micros, saving: Micros) -> Result<(), ActuateError> {
        let max = CpuMax { quota: Limit::At(quota), period: CpuMax::PERIOD };
        let to = Bandwidth { max, burst: self.burst.is_some().then_some(saving) };
        for step in to.steps(&self.read()?) {
            match (step, &self.quota, &self.burst) {
                (BandwidthStep::Max(max), Quota::V2(file), _) => file.write(&max)?,
                (BandwidthStep::Max(max), Quota::V1(file), _) => file.write(&V1Limit(max.quota))?,
                (BandwidthStep::Burst(burst), _, Some(file)) => file.write(&burst)?,
                (BandwidthStep::Burst(_), _, None) => {}
            }
        }
        let reads = self.read()?;
        if reads == to {
            return Ok(());
        }
        let [wrote, reads] = [to, reads].map(|bandwidth| Box::new(Value::Bandwidth(bandwidth)));
        Err(ActuateError::ReadBack { knob: Knob::Cpu, wrote, reads })
    }
}
