//! The balloons of a monitor's VMs.

use std::sync::Arc;

use super::Monitor;
use crate::config::{BalloonConfig, BalloonPatch};
use crate::error::MonitorError;
use crate::id::VmId;
use crate::virtio::{BalloonCounts, BalloonStatistics};

impl Monitor {
    /// A VM's balloon as configured, with what is absent filled in.
    ///
    /// # Errors
    /// [`MonitorError::NoBalloon`], also where the VM has one that nobody asked for.
    pub fn balloon(&self, id: &VmId) -> Result<BalloonConfig, MonitorError> {
        self.find(id)?.balloon()
    }

    /// What a VM's guest told of its memory last.
    ///
    /// # Errors
    /// [`MonitorError::NoBalloon`], [`MonitorError::NoBalloonStatistics`],
    /// [`MonitorError::NotRunning`].
    pub fn balloon_statistics(&self, id: &VmId) -> Result<BalloonStatistics, MonitorError> {
        self.find(id)?.balloon_statistics()
    }

    /// What a VM's balloon has done. Goes on counting while the VM is started, runs and ends.
    ///
    /// # Errors
    /// [`MonitorError::NotFound`].
    pub fn balloon_counts(&self, id: &VmId) -> Result<Arc<BalloonCounts>, MonitorError> {
        Ok(self.find(id)?.balloon_counts())
    }

    /// Changes the balloon of a VM that runs, or was not started yet.
    ///
    /// # Errors
    /// [`MonitorError::NoBalloon`], [`MonitorError::Config`] for more than the VM's memory,
    /// [`MonitorError::BalloonStatisticsSwitched`], [`MonitorError::NotRunning`] when the VM has ended.
    pub fn patch_balloon(&self, id: &VmId, patch: BalloonPatch) -> Result<(), MonitorError> {
        self.find(id)?.patch_balloon(patch)
    }
}
