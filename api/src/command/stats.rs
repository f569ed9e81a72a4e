//! `samepage stats`: what is shared, and what that saves.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::Duration;

use dedup::{AdvisorMode, Run};

use crate::bytes::in_units;
use crate::cli::StatsArgs;
use crate::client::Client;
use crate::command::{CommandError, print, to_pretty_json};
use crate::model::{Domain, DomainReply, VmMerge};
use crate::table::Table;

/// Clears a terminal and puts the cursor into its corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Shows the counters once, or again and again.
///
/// # Errors
/// If there is no server or no VM of this id.
pub async fn stats(client: &Client, args: &StatsArgs) -> Result<(), CommandError> {
    let Some(seconds) = args.watch else {
        return print(&snapshot(client, args).await?);
    };
    let clears = std::io::stdout().is_terminal() && !args.json;
    loop {
        let text = snapshot(client, args).await?;
        if clears {
            print(&format!("{CLEAR}{text}"))?;
        } else {
            print(&text)?;
        }
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    }
}

async fn snapshot(client: &Client, args: &StatsArgs) -> Result<String, CommandError> {
    if let Some(id) = &args.id {
        let merge = client.vm_merge(id.as_str()).await?;
        return if args.json {
            json(&merge, args)
        } else {
            Ok(vm_table(std::iter::once((id.as_str(), &merge))))
        };
    }
    let replies = client.list_domains().await?;
    if args.json {
        return json(&replies, args);
    }
    let (mut domains, mut silent) = (BTreeMap::new(), String::new());
    for (name, reply) in replies {
        match reply {
            DomainReply::Told(domain) => {
                domains.insert(name, *domain);
            }
            // Writing to a string cannot fail.
            DomainReply::Silent(fault) => {
                let _ = writeln!(silent, "{}", fault.fault_message);
            }
        }
    }
    Ok(domain_tables(&domains) + &silent)
}

/// Indented once, a line each time when watched.
fn json(value: &impl serde::Serialize, args: &StatsArgs) -> Result<String, CommandError> {
    if args.watch.is_none() {
        return to_pretty_json(value);
    }
    serde_json::to_string(value)
        .map(|line| line + "\n")
        .map_err(|error| CommandError::Other(format!("no json form: {error}")))
}

fn domain_tables(domains: &BTreeMap<String, Domain>) -> String {
    let mut table = Table::new(&[
        "DOMAIN", "RUN", "VMS", "SHARED", "SHARING", "ZERO", "UNSHARED", "VOLATILE", "SCANS",
        "POOL", "SAVED", "USE", "LIMIT", "WORST",
    ]);
    for (name, domain) in domains {
        let (stats, memory) = (&domain.stats, &domain.memory);
        table.row(vec![
            name.clone(),
            run_name(domain.run),
            domain.vms.len().to_string(),
            stats.pages_shared.to_string(),
            stats.pages_sharing.to_string(),
            stats.pages_zero.to_string(),
            stats.pages_unshared.to_string(),
            stats.pages_volatile.to_string(),
            stats.full_scans.to_string(),
            in_units(i128::from(stats.pool_bytes)),
            in_units(i128::from(stats.saved_bytes)),
            in_units(i128::from(memory.use_bytes)),
            memory
                .limit_bytes
                .map_or_else(|| "-".to_owned(), |bytes| in_units(i128::from(bytes))),
            in_units(i128::from(memory.worst_case_bytes)),
        ]);
    }
    let mut text = table.to_string();
    // Writing to a string cannot fail.
    for (name, domain) in domains {
        if let Some(bytes) = domain.memory.unmerge_missing_bytes {
            let missing = in_units(i128::from(bytes));
            let _ = writeln!(
                text,
                "{name}: the last unmerge was short of {missing} of memory"
            );
        }
    }
    let _ = write!(text, "\n{}", pace_table(domains));
    if domains.values().any(|domain| domain.ksm.is_some()) {
        let _ = write!(text, "\n{}", ksm_table(domains));
    }
    let vms: Vec<(&str, &VmMerge)> = domains
        .values()
        .flat_map(|domain| domain.vms.iter().map(|(id, merge)| (id.as_str(), merge)))
        .collect();
    if !vms.is_empty() {
        let _ = write!(text, "\n{}", vm_table(vms));
    }
    text
}

fn pace_table(domains: &BTreeMap<String, Domain>) -> Table {
    let mut table = Table::new(&[
        "DOMAIN", "ADVISOR", "BATCH", "SLEEP", "TARGET", "MAX CPU", "CPU TIME", "SCANNED",
        "SKIPPED",
    ]);
    for (name, domain) in domains {
        let (pace, stats) = (&domain.pace, &domain.stats);
        let (advisor, target) = match pace.advisor_mode {
            AdvisorMode::None => ("none", "-".to_owned()),
            AdvisorMode::ScanTime => ("scan-time", format!("{} ms", pace.target_scan_time_ms)),
        };
        table.row(vec![
            name.clone(),
            advisor.to_owned(),
            pace.pages_to_scan.to_string(),
            format!("{} ms", pace.sleep_millisecs),
            target,
            format!("{} %", pace.max_cpu_percent),
            format!("{} ms", stats.worker_cpu_us / 1000),
            stats.pages_scanned.to_string(),
            stats.pages_skipped.to_string(),
        ]);
    }
    table
}

/// Only for domains that have VMs which kernel KSM merges.
fn ksm_table(domains: &BTreeMap<String, Domain>) -> Table {
    let mut table = Table::new(&[
        "DOMAIN",
        "KSM RUN",
        "MERGING",
        "SERVER MERGING",
        "ZERO",
        "RMAP ITEMS",
        "PROFIT",
    ]);
    for (name, domain) in domains {
        let Some(ksm) = &domain.ksm else {
            continue;
        };
        let process = ksm.process.unwrap_or_default();
        let profit = process.profit_bytes;
        table.row(vec![
            name.clone(),
            ksm.run.map_or_else(unknown, run_name),
            count(ksm.pages_merging),
            count(process.merging_pages),
            count(process.zero_pages),
            count(process.rmap_items),
            profit.map_or_else(unknown, |bytes| in_units(i128::from(bytes))),
        ]);
    }
    table
}

fn run_name(run: Run) -> String {
    format!("{run:?}").to_lowercase()
}

/// A figure that the kernel does not tell.
fn unknown() -> String {
    "?".to_owned()
}

fn count(pages: Option<u64>) -> String {
    pages.map_or_else(unknown, |pages| pages.to_string())
}

/// With a column for kernel KSM if it merges one of them.
fn vm_table<'a>(vms: impl IntoIterator<Item = (&'a str, &'a VmMerge)>) -> String {
    let vms: Vec<(&str, &VmMerge)> = vms.into_iter().collect();
    let has_ksm = vms.iter().any(|(_, merge)| merge.ksm.is_some());
    let mut heads = vec![
        "VM", "MERGING", "ZERO", "UNSHARED", "VOLATILE", "VMAS", "SAVED",
    ];
    if has_ksm {
        heads.extend(["KSM RUN", "KSM MERGING"]);
    }
    let mut table = Table::new(&heads);
    for (id, merge) in vms {
        let stats = &merge.stats;
        let mut row = vec![
            id.to_owned(),
            stats.pages_merging.to_string(),
            stats.pages_zero.to_string(),
            stats.pages_unshared.to_string(),
            stats.pages_volatile.to_string(),
            stats.vmas.to_string(),
            in_units(i128::from(stats.profit_bytes)),
        ];
        if let Some(ksm) = &merge.ksm {
            row.push(ksm.run.map_or_else(unknown, run_name));
            row.push(count(ksm.pages_merging));
        } else if has_ksm {
            row.extend(["-".to_owned(), "-".to_owned()]);
        }
        table.row(row);
    }
    table.to_string()
}
