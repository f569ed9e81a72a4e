//! `samepage ps`: the server's VMs.

use crate::bytes::in_units;
use crate::cli::PsArgs;
use crate::client::Client;
use crate::command::{CommandError, print, to_pretty_json};
use crate::model::VmDescription;
use crate::table::Table;

/// Lists the VMs.
///
/// # Errors
/// If there is no server.
pub async fn ps(client: &Client, args: &PsArgs) -> Result<(), CommandError> {
    let vms = client.list_vms().await?;
    if args.json {
        return print(&to_pretty_json(&vms)?);
    }
    let mut table = Table::new(&["ID", "STATE", "DOMAIN", "MERGE", "VCPUS", "MEMORY"]);
    for vm in &vms {
        table.row(vec![
            vm.id.clone(),
            state(vm),
            vm.merge_domain.clone().unwrap_or_else(|| "-".to_owned()),
            vm.merge.to_string(),
            vm.vcpu_count.to_string(),
            in_units(i128::from(vm.mem_size_bytes)),
        ]);
    }
    print(&table.to_string())
}

fn state(vm: &VmDescription) -> String {
    match &vm.end_reason {
        Some(reason) => format!("{} ({reason})", vm.state),
        None => vm.state.clone(),
    }
}
