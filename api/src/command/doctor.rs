//! `samepage doctor`: whether this host is fit for Samepage.

use std::process::ExitCode;

use crate::cli::DoctorArgs;
use crate::command::{CommandError, print, to_pretty_json};
use crate::doctor::host::Host;
use crate::doctor::{Report, Status, examine};

/// Widths of the columns before the text.
const STATUS_COLUMNS: usize = 7;
const NAME_COLUMNS: usize = 20;

/// Looks at the host, and says what is missing or slow and how to mend it.
///
/// # Errors
/// If nobody reads what it says.
pub async fn doctor(args: &DoctorArgs) -> Result<ExitCode, CommandError> {
    let examined = tokio::task::spawn_blocking(|| examine(&Host::own())).await;
    let report =
        examined.map_err(|error| CommandError::Other(format!("looking at the host: {error}")))?;
    let text = if args.json {
        to_pretty_json(&report)?
    } else {
        to_text(&report)
    };
    print(&text)?;
    Ok(exit_code(report.status))
}

/// The exit status that `doctor --help` documents.
fn exit_code(status: Status) -> ExitCode {
    ExitCode::from(match status {
        Status::Ok => 0,
        Status::Warning => 3,
        Status::Missing => 4,
    })
}

fn to_text(report: &Report) -> String {
    let mut lines = Vec::new();
    for check in &report.checks {
        let (status, name) = (check.status.name(), &check.name);
        lines.push(format!(
            "{status:<STATUS_COLUMNS$}  {name:<NAME_COLUMNS$}  {}",
            check.found
        ));
        if let Some(mend) = &check.mend {
            let blank = "";
            lines.push(format!(
                "{blank:<STATUS_COLUMNS$}  {blank:<NAME_COLUMNS$}  To mend it: {mend}"
            ));
        }
    }
    lines.push(String::new());
    lines.push(summary(report));
    lines.join("\n") + "\n"
}

fn summary(report: &Report) -> String {
    let count = |status| {
        let same = report.checks.iter().filter(|check| check.status == status);
        same.count()
    };
    match report.status {
        Status::Ok => "Samepage can run here, and nothing is in its way.".to_owned(),
        Status::Warning => format!(
            "Samepage can run here. Warnings: {}.",
            count(Status::Warning)
        ),
        Status::Missing => format!(
            "Samepage cannot run here. Missing: {}. Warnings: {}.",
            count(Status::Missing),
            count(Status::Warning)
        ),
    }
}
