//! A process's memory as the kernel accounts it.

use crate::command::CommandError;

/// Proportional set size of a process in bytes: its resident pages, those shared with other
/// processes in parts (`/proc/PID/smaps_rollup`). A pool page that many guest pages are mapped to
/// counts once.
///
/// # Errors
/// If there is no such process or it is not ours to look at.
pub(super) fn of_process(pid: u32) -> Result<u64, CommandError> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).map_err(CommandError::os(&path))?;
    parse(&text).ok_or_else(|| CommandError::Other(format!("{path}: has no Pss")))
}

fn parse(rollup: &str) -> Option<u64> {
    let value = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pss_is_read_and_not_its_parts() {
        let rollup = "5600-7fff ---p 0 00:00 0 [rollup]\nRss: 900 kB\nPss:     123 kB\n\
                      Pss_Dirty: 7 kB\nPss_Anon: 8 kB\n";
        assert_eq!(parse(rollup), Some(123 * 1024));
        assert_eq!(parse("Rss: 1 kB\n"), None);
    }

    #[test]
    fn own_process_has_memory() {
        assert!(of_process(std::process::id()).unwrap() > 0);
    }
}
