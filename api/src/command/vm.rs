//! `samepage pause`, `resume`, `stop`, `merge` and `rm`.

use crate::cli::{IdArgs, MergeArgs, RmArgs};
use crate::client::Client;
use crate::command::{CommandError, print, to_pretty_json};
use crate::request::{ActionType, DesiredState};

/// Pauses or resumes a VM; one that is in that state already stays in it.
///
/// # Errors
/// If there is none of this id or it does not run.
pub async fn set_state(
    client: &Client,
    args: &IdArgs,
    state: DesiredState,
) -> Result<(), CommandError> {
    client.set_vm_state(args.id.as_str(), state).await?;
    Ok(())
}

/// Ends a VM at once.
///
/// # Errors
/// If there is none of this id or it does not run.
pub async fn stop(client: &Client, args: &IdArgs) -> Result<(), CommandError> {
    client
        .act(args.id.as_str(), ActionType::InstanceStop)
        .await?;
    Ok(())
}

/// Merges a VM's memory now.
///
/// # Errors
/// If there is none of this id, it does not run, or its memory is not merged.
pub async fn merge(client: &Client, args: &MergeArgs) -> Result<(), CommandError> {
    let merged = client.merge_now(args.id.as_str()).await?;
    if args.json {
        return print(&to_pretty_json(&merged)?);
    }
    print(&format!(
        "{}: {} pages merging and {} zero ({:+}), {} still changing; {} scanned in {} ms\n",
        args.id,
        merged.pages_merging,
        merged.pages_zero,
        merged.pages_gained,
        merged.pages_volatile,
        merged.pages_scanned,
        merged.duration_us / 1000,
    ))
}

/// Deletes a VM, with `--force` also one that runs.
///
/// # Errors
/// If there is none of this id, or it runs and `--force` was not given.
pub async fn rm(client: &Client, args: &RmArgs) -> Result<(), CommandError> {
    let id = args.id.as_str();
    if args.force && is_alive(client, id).await? {
        let stopped = client.act(id, ActionType::InstanceStop).await;
        // It may have ended by itself since we looked: then the refusal to stop is no failure.
        if stopped.is_err() && is_alive(client, id).await? {
            stopped?;
        }
    }
    client.delete_vm(id).await?;
    Ok(())
}

async fn is_alive(client: &Client, id: &str) -> Result<bool, CommandError> {
    let state = client.describe_vm(id).await?.state;
    Ok(state == "Running" || state == "Paused")
}
