//! Carries runs out, one after the other.
//!
//! | module | holds |
//! |---|---|
//! | [`mod@carry_out`] | one run, from the host's settings to what was found |
//! | [`error`] | why a run came to no good end |
//! | [`progress`] | what is shown meanwhile |
//! | [`record`] | what a run has found so far |
//! | [`rest`] | when memory is at rest |
//! | [`sampling`] | a look at the server each second |
//! | [`server`] | the server of one run |
//! | [`stage`] | what a workload has in hand |
//! | [`stop`] | signals that end the benchmark |
//! | [`wait`] | waiting for a condition, with a deadline |
//! | [`watch`] | what guests say |

mod carry_out;
mod error;
mod progress;
mod record;
mod rest;
mod sampling;
mod server;
mod stage;
mod stop;
mod wait;
mod watch;

pub(crate) use carry_out::{Ended, carry_out};
pub(crate) use error::RunError;
pub(crate) use progress::Progress;
pub(crate) use record::{GuestIndex, Record};
pub(crate) use stage::Stage;
pub(crate) use stop::StopSignals;
pub(crate) use wait::poll_until;
