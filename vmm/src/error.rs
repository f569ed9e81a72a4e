//! Errors of the monitor's API, and the kinds a front door needs to tell apart.

use crate::admission::{NoRoom, UnmergeNoRoom};
use crate::config::ConfigError;
use crate::id::VmId;
use crate::start::StartError;
use crate::state::{IllegalStep, VmState};

/// What went wrong with a request to a [`Monitor`](crate::Monitor).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// No VM has this id.
    #[error("vm {0}: not found")]
    NotFound(VmId),
    /// A VM has this id already.
    #[error("vm {0}: there is a vm of this id already")]
    DuplicateId(VmId),
    /// Start of a VM that was started before.
    #[error("vm {id}: already started, it is {state}")]
    AlreadyStarted {
        /// The VM.
        id: VmId,
        /// Its state.
        state: VmState,
    },
    /// Deletion of a VM that still runs.
    #[error("vm {0}: still running, stop it first")]
    StillRunning(VmId),
    /// The VM is not in a state that allows this.
    #[error("vm {id}: {step}")]
    IllegalStep {
        /// The VM.
        id: VmId,
        /// What was asked, and the state that forbids it.
        #[source]
        step: IllegalStep,
    },
    /// The VM does not run, so there is nobody to ask.
    #[error("vm {id}: is not running, it is {state}")]
    NotRunning {
        /// The VM.
        id: VmId,
        /// Its state.
        state: VmState,
    },
    /// The VM is on its way out: nothing but waiting for its end makes sense.
    #[error("vm {0}: is ending")]
    Ending(VmId),
    /// A pause that was taken back by another order before the vCPUs stood still.
    #[error("vm {0}: the pause was superseded by another order")]
    Superseded(VmId),
    /// A configuration value makes no sense.
    #[error("vm {id}: {error}")]
    Config {
        /// The VM.
        id: VmId,
        /// The value.
        #[source]
        error: ConfigError,
    },
    /// The VM names another merge domain than the monitor's.
    #[error("vm {id}: merge_domain {wanted:?} is not this monitor's domain {domain:?}")]
    WrongDomain {
        /// The VM.
        id: VmId,
        /// The domain it names.
        wanted: String,
        /// The domain of the monitor.
        domain: String,
    },
    /// The VM could not be created or started.
    #[error("vm {id}: {error}")]
    Start {
        /// The VM.
        id: VmId,
        /// Why.
        #[source]
        error: StartError,
    },
    /// Starting the VM would promise more memory than its merge domain is to promise.
    #[error("vm {id}: {error}")]
    NoRoom {
        /// The VM.
        id: VmId,
        /// What is missing.
        #[source]
        error: NoRoom,
    },
    /// Unmerging would take more memory than is left, or did.
    #[error("cannot unmerge: {0}")]
    UnmergeNoRoom(UnmergeNoRoom),
    /// An unmerge that was taken back by another order.
    #[error("the unmerge was superseded by another order")]
    UnmergeSuperseded,
    /// A budget that VMs would be ended for at once.
    #[error(
        "memory_budget {budget_bytes}: the merge domain holds {use_bytes} bytes, and vms would be \
         ended at once; {least_bytes} bytes ends none, \"force\": true sets it anyway"
    )]
    BudgetBelowUse {
        /// What was asked for.
        budget_bytes: u64,
        /// What the domain holds.
        use_bytes: u64,
        /// The least budget that ends no VM.
        least_bytes: u64,
    },
    /// This VM has no keyboard controller that could deliver the keys.
    #[error("vm {0}: ctrl-alt-del needs a guest that listens to its keyboard controller")]
    NoKeyboard(VmId),
    /// The VM has no network interface of this id.
    #[error("vm {id}: iface_id {iface_id:?}: there is no such network interface")]
    NoInterface {
        /// The VM.
        id: VmId,
        /// What was asked for.
        iface_id: String,
    },
    /// The VM was given no balloon.
    #[error("vm {0}: balloon: there is none")]
    NoBalloon(VmId),
    /// The VM's guest is not asked for statistics.
    #[error("vm {0}: balloon.stats_polling_interval_s: 0, so there are no statistics")]
    NoBalloonStatistics(VmId),
    /// Statistics are there from the start, or never.
    #[error("vm {0}: balloon.stats_polling_interval_s: cannot become 0, or be changed from 0")]
    BalloonStatisticsSwitched(VmId),
    /// The VM keeps its memory to itself, so there is nothing to merge.
    #[error("vm {0}: merge is false, its memory is not merged")]
    NotMerged(VmId),
    /// Kernel KSM merges the VM's memory, which nobody can ask to do it now.
    #[error("vm {0}: merge is \"ksm\", kernel KSM merges its memory at its own pace")]
    MergedByKernel(VmId),
    /// Its memory could not be merged now.
    #[error("vm {id}: cannot merge now: {error}")]
    MergeNow {
        /// The VM.
        id: VmId,
        /// Why.
        #[source]
        error: dedup::MergeNowError,
    },
    /// The host refused something the monitor itself needs.
    #[error("{what}: {error}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        error: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Whose fault an error is. A front door maps it to a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No such VM.
    NotFound,
    /// The VM is not in a state that allows this.
    Conflict,
    /// Something of the host that it needs is in use by another VM or program.
    InUse,
    /// There is not enough memory for it now.
    NoRoom,
    /// The request can never work as it is.
    InvalidInput,
    /// The host or the monitor failed.
    Internal,
}

impl MonitorError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            MonitorError::NotFound(_) => ErrorKind::NotFound,
            MonitorError::DuplicateId(_)
            | MonitorError::AlreadyStarted { .. }
            | MonitorError::StillRunning(_)
            | MonitorError::IllegalStep { .. }
            | MonitorError::NotRunning { .. }
            | MonitorError::Ending(_)
            | MonitorError::Superseded(_)
            | MonitorError::NoKeyboard(_)
            | MonitorError::NotMerged(_)
            | MonitorError::MergedByKernel(_)
            | MonitorError::MergeNow { .. } => ErrorKind::Conflict,
            MonitorError::Config { .. }
            | MonitorError::NoInterface { .. }
            | MonitorError::NoBalloon(_)
            | MonitorError::NoBalloonStatistics(_)
            | MonitorError::BalloonStatisticsSwitched(_)
            | MonitorError::WrongDomain { .. } => ErrorKind::InvalidInput,
            MonitorError::UnmergeSuperseded => ErrorKind::Conflict,
            MonitorError::NoRoom { .. }
            | MonitorError::UnmergeNoRoom(_)
            | MonitorError::BudgetBelowUse { .. } => ErrorKind::NoRoom,
            MonitorError::Start { error, .. } => error.kind(),
            MonitorError::Host { .. } => ErrorKind::Internal,
        }
    }
}
