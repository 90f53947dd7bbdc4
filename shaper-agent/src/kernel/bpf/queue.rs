//! Limits on what slots receive: their classes in the queue, and what the kernel programs know of them.

use std::{os::fd::AsFd, sync::atomic::Ordering::SeqCst};

use aya::programs::SchedClassifier;
use shaper_core::units::BitsPerSec;

use super::{Bpf, BpfError, INGRESS_PROGRAM, failed, program};
use crate::kernel::ingress::{ClassState, IngressError, Queue};

impl Bpf {
    /// Sets or lifts the limit on what a slot receives. In force when this returns.
    pub fn limit_ingress(&mut self, slot: u32, limit: Option<BitsPerSec>) -> Result<(), BpfError> {
        let class = self.ingress_class.word(slot as usize, 0);
        match limit {
            Some(rate) => {
                let result = self.queue_up(slot, rate);
                if result.is_err() {
                    self.settle_ingress()?;
                }
                result
            }
            None if class.load(SeqCst) == 0 => Ok(()),
            None => {
                class.store(0, SeqCst);
                self.queue.lift(slot)?;
                self.settle_ingress()
            }
        }
    }

    fn queue_up(&mut self, slot: u32, rate: BitsPerSec) -> Result<(), BpfError> {
        if self.config.uplinks.is_empty() {
            return Err(IngressError::NoUplink.into());
        }
        let index = self.queue.make()?;
        self.queue.limit(index, slot, rate.bytes_per_sec())?;
        // Also where there are filters: the device may be another one than that which they know.
        self.feed_queue()?;
        self.ingress_class.word(slot as usize, 0).store(Queue::class(slot).into(), SeqCst);
        Ok(())
    }

    /// Has the uplinks' filters ask this agent's program.
    pub(super) fn feed_queue(&mut self) -> Result<(), BpfError> {
        if self.without.iter().any(|(name, _)| *name == INGRESS_PROGRAM) {
            return Err(IngressError::NoProgram.into());
        }
        let path = self.config.object.clone();
        let program: &mut SchedClassifier = program(&mut self.ebpf, INGRESS_PROGRAM, &path)?;
        let fd = program.fd().map_err(|source| failed("load", INGRESS_PROGRAM, source))?;
        let index = self.queue.make()?;
        self.queue.feed(index, &self.config.uplinks, &self.config.state_dir, fd.as_fd())?;
        Ok(())
    }

    /// Whether any slot has a limit of what it receives.
    pub(super) fn limits_ingress(&self) -> bool {
        (0..self.slots as usize).any(|slot| self.ingress_class.word(slot, 0).load(SeqCst) != 0)
    }

    /// Takes the queue of what arrives away where no slot has a limit any more.
    pub fn settle_ingress(&self) -> Result<(), BpfError> {
        if !self.limits_ingress() {
            self.queue.remove(&self.config.state_dir)?;
        }
        Ok(())
    }

    /// What holds what a slot receives, if anything does: its class, as the kernel has it.
    pub fn ingress(&self, slot: u32) -> Result<Option<ClassState>, BpfError> {
        if self.ingress_class.word(slot as usize, 0).load(SeqCst) == 0
            || !self.queue.is_fed(&self.config.uplinks)
        {
            return Ok(None);
        }
        Ok(self.queue.state(slot)?)
    }

    /// The device of that queue.
    pub fn ingress_device(&self) -> &str {
        self.queue.device()
    }
}
