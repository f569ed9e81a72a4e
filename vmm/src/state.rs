//! A VM's life: its states, what ended it, and which steps are legal. Pure.
//!
//! ```text
//! NotStarted --start--> Running <--pause/resume--> Paused
//!                          \                        /
//!                           `------- end ----------'--> Ended(reason)
//! ```
//!
//! `Ended` is final and published only when the VM's memory was handed over.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a VM is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Created; holds no guest memory and no thread.
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still; memory and devices are kept.
    Paused,
    /// Over; nothing of it is left but this record and its console's history.
    Ended(EndReason),
}

/// Why a VM ended. The first reason wins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The guest powered off (pvpanic shutdown event, or a system event of KVM).
    GuestShutdown,
    /// The guest asked for a reset (i8042 command 0xfe). A microVM does not come back by itself.
    GuestReset,
    /// The guest's kernel panicked (pvpanic).
    GuestPanic,
    /// A fault while delivering a double fault: the CPU shut down.
    TripleFault,
    /// KVM could not execute an instruction.
    EmulationFailure {
        /// Address of the instruction (guest virtual).
        rip: u64,
        /// Its bytes, as many as KVM or the guest's page tables gave (at most 15).
        bytes: Vec<u8>,
    },
    /// The monitor could not go on with this VM.
    Error(String),
    /// The guard ended it, so that its merge domain keeps within its memory.
    OomVictim,
    /// The operator stopped it.
    Stopped,
}

impl EndReason {
    /// The reason's name in `snake_case`, without its values.
    pub fn name(&self) -> &'static str {
        match self {
            EndReason::GuestShutdown => "guest_shutdown",
            EndReason::GuestReset => "guest_reset",
            EndReason::GuestPanic => "guest_panic",
            EndReason::TripleFault => "triple_fault",
            EndReason::EmulationFailure { .. } => "emulation_failure",
            EndReason::Error(_) => "error",
            EndReason::OomVictim => "oom_victim",
            EndReason::Stopped => "stopped",
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EndReason::GuestShutdown => f.write_str("the guest shut down"),
            EndReason::GuestReset => f.write_str("the guest asked for a reset"),
            EndReason::GuestPanic => f.write_str("the guest's kernel panicked"),
            EndReason::TripleFault => f.write_str("the guest triple-faulted"),
            EndReason::EmulationFailure { rip, bytes } => {
                write!(f, "kvm cannot execute the instruction at {rip:#x}:")?;
                if bytes.is_empty() {
                    f.write_str(" (bytes not readable)")?;
                }
                bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
            }
            EndReason::Error(text) => write!(f, "error: {text}"),
            EndReason::OomVictim => {
                f.write_str("ended by the guard: its merge domain ran out of memory")
            }
            EndReason::Stopped => f.write_str("stopped by request"),
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmState::NotStarted => f.write_str("not started"),
            VmState::Running => f.write_str("running"),
            VmState::Paused => f.write_str("paused"),
            VmState::Ended(reason) => write!(f, "ended ({reason})"),
        }
    }
}

/// What may happen to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Load and run it.
    Start,
    /// Stand its vCPUs still.
    Pause,
    /// Let them run again.
    Resume,
    /// It is over.
    End(EndReason),
}

impl Step {
    /// The step as a verb, for messages.
    pub fn verb(&self) -> &'static str {
        match self {
            Step::Start => "start",
            Step::Pause => "pause",
            Step::Resume => "resume",
            Step::End(_) => "stop",
        }
    }
}

/// A step that the state does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {} a vm that is {from}", step.verb())]
pub struct IllegalStep {
    /// The state the VM was in.
    pub from: VmState,
    /// What was asked.
    pub step: Step,
}

impl VmState {
    /// The state after `step`.
    ///
    /// Pausing a paused VM and resuming a running one change nothing and are legal, as with
    /// Firecracker: a client that lost a reply may ask again.
    ///
    /// # Errors
    /// [`IllegalStep`] when this state does not allow `step`.
    pub fn after(&self, step: Step) -> Result<VmState, IllegalStep> {
        match (self, step) {
            (VmState::NotStarted, Step::Start) => Ok(VmState::Running),
            (VmState::Running | VmState::Paused, Step::Pause) => Ok(VmState::Paused),
            (VmState::Running | VmState::Paused, Step::Resume) => Ok(VmState::Running),
            (VmState::Running | VmState::Paused, Step::End(reason)) => Ok(VmState::Ended(reason)),
            (from, step) => Err(IllegalStep {
                from: from.clone(),
                step,
            }),
        }
    }

    /// Whether the VM holds memory and threads.
    pub fn is_alive(&self) -> bool {
        matches!(self, VmState::Running | VmState::Paused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_state() -> [VmState; 4] {
        let ended = VmState::Ended(EndReason::Stopped);
        [
            VmState::NotStarted,
            VmState::Running,
            VmState::Paused,
            ended,
        ]
    }

    #[test]
    fn a_life_goes_from_start_over_pauses_to_its_end() {
        let state = VmState::NotStarted.after(Step::Start).unwrap();
        let state = state.after(Step::Pause).unwrap();
        let state = state.after(Step::Resume).unwrap();
        let state = state.after(Step::End(EndReason::GuestReset)).unwrap();
        assert_eq!(state, VmState::Ended(EndReason::GuestReset));
    }

    #[test]
    fn only_a_vm_that_was_never_started_can_be_started() {
        for state in every_state() {
            let startable = state == VmState::NotStarted;
            assert_eq!(state.after(Step::Start).is_ok(), startable, "{state}");
        }
    }

    #[test]
    fn nothing_follows_the_end_and_nothing_but_start_precedes_it() {
        for step in [Step::Pause, Step::Resume, Step::End(EndReason::TripleFault)] {
            for state in every_state() {
                let legal = state.after(step.clone()).is_ok();
                assert_eq!(legal, state.is_alive(), "{} {state}", step.verb());
            }
        }
    }

    #[test]
    fn an_emulation_failure_shows_address_and_bytes() {
        let reason = EndReason::EmulationFailure {
            rip: 0x1234,
            bytes: vec![0x0f, 0xb8],
        };
        assert!(reason.to_string().ends_with("0x1234: 0f b8"), "{reason}");
    }

    #[test]
    fn names_on_the_wire_are_the_names_of_the_reasons() {
        let json = serde_json::to_string(&EndReason::GuestReset).unwrap();
        assert_eq!(json, format!("\"{}\"", EndReason::GuestReset.name()));
        let json = serde_json::to_string(&EndReason::OomVictim).unwrap();
        assert_eq!(json, format!("\"{}\"", EndReason::OomVictim.name()));
        let error = EndReason::Error("x".to_owned());
        assert_eq!(serde_json::to_string(&error).unwrap(), r#"{"error":"x"}"#);
    }
}
