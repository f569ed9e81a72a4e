//! `samepage demo`.
use std::process::ExitCode;

use crate::cli::DemoArgs;
use crate::command::CommandError;

/// STUB
pub async fn demo(_args: &DemoArgs) -> Result<ExitCode, CommandError> {
    Err(CommandError::Other("not yet".into()))
}
