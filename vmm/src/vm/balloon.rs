//! What is told of a VM's balloon, and changed of it.

use std::sync::Arc;

use super::Vm;
use crate::config::{BalloonConfig, BalloonPatch, VmConfig};
use crate::error::MonitorError;
use crate::state::VmState;
use crate::virtio::{BalloonCounts, BalloonStatistics};

impl Vm {
    /// The balloon as configured, with what is absent filled in.
    pub(crate) fn balloon(&self) -> Result<BalloonConfig, MonitorError> {
        let config = self.config();
        let balloon = config.balloon;
        let balloon = balloon.map(|balloon| balloon.resolved(config.samepage.merge));
        balloon.ok_or_else(|| MonitorError::NoBalloon(self.id.clone()))
    }

    /// What the guest told of its memory.
    pub(crate) fn balloon_statistics(&self) -> Result<BalloonStatistics, MonitorError> {
        if self.balloon()?.stats_polling_interval_s == 0 {
            return Err(MonitorError::NoBalloonStatistics(self.id.clone()));
        }
        let cell = self.lock();
        let balloon = cell.machine.as_ref().and_then(|machine| machine.balloon());
        let statistics = balloon.map(|balloon| balloon.statistics());
        statistics.ok_or_else(|| MonitorError::NotRunning {
            id: self.id.clone(),
            state: cell.state.clone(),
        })
    }

    /// What it has done.
    pub(crate) fn balloon_counts(&self) -> Arc<BalloonCounts> {
        self.balloon_counts.clone()
    }

    /// Changes the balloon of a VM that runs, or is to.
    pub(crate) fn patch_balloon(&self, patch: BalloonPatch) -> Result<(), MonitorError> {
        let id = || self.id.clone();
        let cell = self.lock();
        let is_to_run = cell.state == VmState::NotStarted && cell.starting.is_none();
        if cell.machine.is_none() && !is_to_run {
            let state = cell.state.clone();
            return Err(MonitorError::NotRunning { id: id(), state });
        }
        // Lock order: cell -> configuration.
        let mut current = self.lock_config();
        let mut config = VmConfig::clone(&current);
        let Some(balloon) = &mut config.balloon else {
            return Err(MonitorError::NoBalloon(id()));
        };
        let was_polled = balloon.stats_polling_interval_s > 0;
        balloon.update(patch);
        if was_polled != (balloon.stats_polling_interval_s > 0) {
            return Err(MonitorError::BalloonStatisticsSwitched(id()));
        }
        config
            .validate()
            .map_err(|error| MonitorError::Config { id: id(), error })?;
        *current = Arc::new(config);
        // Lock order: cell -> balloon.
        let balloon = cell.machine.as_ref().and_then(|machine| machine.balloon());
        if let Some(balloon) = balloon {
            balloon.update(patch);
        }
        Ok(())
    }
}
