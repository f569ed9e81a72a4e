//! The monitor: signatures first, bodies follow.

use std::time::Instant;

use crate::config::VmConfig;
use crate::console::Console;
use crate::error::MonitorError;
use crate::id::{MergeDomain, VmId};
use crate::info::VmInfo;
use crate::state::EndReason;

/// One merge domain: its VMs, its merge engine, its event loop.
#[derive(Debug)]
pub struct Monitor {
    domain: MergeDomain,
    engine: dedup::Engine,
}

impl Monitor {
    /// Starts the monitor's threads; opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`MonitorError::Host`] when KVM or a thread is not to be had.
    pub fn new(domain: MergeDomain, settings: dedup::Settings) -> Result<Monitor, MonitorError> {
        let host = |error: dedup::EngineError| MonitorError::Host {
            what: "merge engine",
            error: Box::new(error),
        };
        Ok(Monitor {
            domain,
            engine: dedup::Engine::new(settings).map_err(host)?,
        })
    }

    /// The domain.
    pub fn domain(&self) -> &MergeDomain {
        &self.domain
    }

    /// The merge engine.
    pub fn engine(&self) -> &dedup::Engine {
        &self.engine
    }

    /// Adds a VM.
    pub fn create(&self, _id: VmId, _config: VmConfig) -> Result<(), MonitorError> {
        unimplemented!()
    }

    /// Runs a VM.
    pub fn start(&self, _id: &VmId) -> Result<(), MonitorError> {
        unimplemented!()
    }

    /// Stands a VM's vCPUs still.
    pub fn pause(&self, _id: &VmId) -> Result<(), MonitorError> {
        unimplemented!()
    }

    /// Lets them run again.
    pub fn resume(&self, _id: &VmId) -> Result<(), MonitorError> {
        unimplemented!()
    }

    /// Stops a VM; returns when its memory was handed over.
    pub fn stop(&self, _id: &VmId) -> Result<(), MonitorError> {
        unimplemented!()
    }

    /// Presses ctrl-alt-del.
    pub fn send_ctrl_alt_del(&self, _id: &VmId) -> Result<(), MonitorError> {
        unimplemented!()
    }

    /// Forgets a VM that does not run.
    pub fn delete(&self, _id: &VmId) -> Result<(), MonitorError> {
        unimplemented!()
    }

    /// All VMs by id.
    pub fn list(&self) -> Vec<VmInfo> {
        unimplemented!()
    }

    /// One VM.
    pub fn info(&self, _id: &VmId) -> Result<VmInfo, MonitorError> {
        unimplemented!()
    }

    /// A VM's configuration.
    pub fn config(&self, _id: &VmId) -> Result<VmConfig, MonitorError> {
        unimplemented!()
    }

    /// A VM's merge counters; zeros when it is not merged or has ended.
    pub fn merge_stats(&self, _id: &VmId) -> Result<dedup::RegionStats, MonitorError> {
        unimplemented!()
    }

    /// A VM's console.
    pub fn console(&self, _id: &VmId) -> Result<Console, MonitorError> {
        unimplemented!()
    }

    /// Waits for a VM's end; `None` when it has not ended by `deadline` or there is no such VM.
    pub fn wait_ended(&self, _id: &VmId, _deadline: Instant) -> Option<EndReason> {
        unimplemented!()
    }
}
