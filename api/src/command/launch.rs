//! `samepage launch`: create a VM on the server and start it.

use crate::cli::LaunchArgs;
use crate::client::Client;
use crate::command::CommandError;
use crate::request::ActionType;
use crate::vm_args;

/// Creates the VM, and starts it unless told not to.
///
/// # Errors
/// If the arguments make no VM or the server refuses. A VM that does not start is deleted again:
/// either it runs afterwards or there is none.
pub async fn launch(client: &Client, args: &LaunchArgs) -> Result<(), CommandError> {
    let id = args.id.as_str();
    let config = match args.no_start {
        true => vm_args::to_config_of_any(&args.vm)?,
        false => vm_args::to_config(&args.vm)?,
    };
    client.create_vm(id, &config).await?;
    if args.no_start {
        return Ok(());
    }
    if let Err(error) = client.act(id, ActionType::InstanceStart).await {
        if let Err(left) = client.delete_vm(id).await {
            log::warn!("vm {id}: not started, and cannot be deleted: {left}");
        }
        return Err(error.into());
    }
    Ok(())
}
