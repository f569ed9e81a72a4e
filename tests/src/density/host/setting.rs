//! One host setting: its file, reading and writing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::HostError;

/// Where the host's files are: `/`, or a directory with copies of them for tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root(PathBuf);

impl Root {
    /// The running host.
    pub fn host() -> Root {
        Root(PathBuf::from("/"))
    }

    /// A directory that stands for `/`.
    pub fn at(directory: &Path) -> Root {
        Root(directory.to_owned())
    }

    /// Where a file of the host is, by its absolute path there.
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.0.join(absolute.trim_start_matches('/'))
    }
}

/// A setting of the host that the benchmark changes, or that its figures depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Setting {
    /// Whether `ksmd` runs: 0 no, 1 yes, 2 no, and what was merged is unmerged.
    KsmRun,
    /// What finds `pages_to_scan`: `none`, or `scan-time`.
    KsmAdvisorMode,
    /// Seconds that a scan is to take under the advisor.
    KsmAdvisorTargetScanTime,
    /// Most of a CPU that the advisor lets `ksmd` take, in percent.
    KsmAdvisorMaxCpu,
    /// Least that the advisor chooses.
    KsmAdvisorMinPagesToScan,
    /// Most that the advisor chooses.
    KsmAdvisorMaxPagesToScan,
    /// Pages of a batch.
    KsmPagesToScan,
    /// Pause between batches.
    KsmSleepMillisecs,
    /// Whether zeros are mapped to the kernel's zero page.
    KsmUseZeroPages,
    /// Whether pages that did not merge are scanned less often.
    KsmSmartScan,
    /// Whether pages of different NUMA nodes are merged.
    KsmMergeAcrossNodes,
    /// Most mappings of one merged page.
    KsmMaxPageSharing,
    /// Who gets huge pages.
    ThpEnabled,
    /// Who waits for a huge page.
    ThpDefrag,
    /// Who gets huge pages in tmpfs and memfds. Never changed, only told.
    ThpShmemEnabled,
    /// Most mappings of a process.
    MaxMapCount,
}

impl Setting {
    /// All of them. Those that others depend on come first.
    pub const ALL: [Setting; 16] = [
        Setting::KsmRun,
        Setting::KsmAdvisorMode,
        Setting::KsmAdvisorTargetScanTime,
        Setting::KsmAdvisorMaxCpu,
        Setting::KsmAdvisorMinPagesToScan,
        Setting::KsmAdvisorMaxPagesToScan,
        Setting::KsmPagesToScan,
        Setting::KsmSleepMillisecs,
        Setting::KsmUseZeroPages,
        Setting::KsmSmartScan,
        Setting::KsmMergeAcrossNodes,
        Setting::KsmMaxPageSharing,
        Setting::ThpEnabled,
        Setting::ThpDefrag,
        Setting::ThpShmemEnabled,
        Setting::MaxMapCount,
    ];

    /// Its absolute path.
    pub fn path(self) -> &'static str {
        match self {
            Setting::KsmRun => "/sys/kernel/mm/ksm/run",
            Setting::KsmAdvisorMode => "/sys/kernel/mm/ksm/advisor_mode",
            Setting::KsmAdvisorTargetScanTime => "/sys/kernel/mm/ksm/advisor_target_scan_time",
            Setting::KsmAdvisorMaxCpu => "/sys/kernel/mm/ksm/advisor_max_cpu",
            Setting::KsmAdvisorMinPagesToScan => "/sys/kernel/mm/ksm/advisor_min_pages_to_scan",
            Setting::KsmAdvisorMaxPagesToScan => "/sys/kernel/mm/ksm/advisor_max_pages_to_scan",
            Setting::KsmPagesToScan => "/sys/kernel/mm/ksm/pages_to_scan",
            Setting::KsmSleepMillisecs => "/sys/kernel/mm/ksm/sleep_millisecs",
            Setting::KsmUseZeroPages => "/sys/kernel/mm/ksm/use_zero_pages",
            Setting::KsmSmartScan => "/sys/kernel/mm/ksm/smart_scan",
            Setting::KsmMergeAcrossNodes => "/sys/kernel/mm/ksm/merge_across_nodes",
            Setting::KsmMaxPageSharing => "/sys/kernel/mm/ksm/max_page_sharing",
            Setting::ThpEnabled => "/sys/kernel/mm/transparent_hugepage/enabled",
            Setting::ThpDefrag => "/sys/kernel/mm/transparent_hugepage/defrag",
            Setting::ThpShmemEnabled => "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
            Setting::MaxMapCount => "/proc/sys/vm/max_map_count",
        }
    }

    /// What it is now; none if this kernel does not have it.
    ///
    /// # Errors
    /// If its file cannot be read.
    pub fn read(self, root: &Root) -> Result<Option<String>, HostError> {
        let path = root.path(self.path());
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(chosen(&text).to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(HostError::io("read", &path)(error)),
        }
    }

    /// Changes it, and makes sure that the kernel kept the value.
    ///
    /// # Errors
    /// If the kernel lacks it, does not take the value, or changed it.
    pub(crate) fn write(self, root: &Root, value: &str) -> Result<(), HostError> {
        let path = root.path(self.path());
        let found = self.read(root)?.ok_or_else(|| HostError::Missing {
            path: path.clone(),
            value: value.to_owned(),
        })?;
        // `run` does something each time: 2 unmerges what was merged since it was last written.
        if found == value && self != Setting::KsmRun {
            return Ok(());
        }
        fs::write(&path, value).map_err(|source| HostError::Set {
            path: path.clone(),
            value: value.to_owned(),
            source,
        })?;
        let found = self.read(root)?.unwrap_or_default();
        if found == value {
            return Ok(());
        }
        Err(HostError::NotKept {
            path,
            value: value.to_owned(),
            found,
        })
    }
}

/// A choice is shown as `[none] scan-time`, any other value by itself.
fn chosen(text: &str) -> &str {
    let bracketed = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or(text, |(chosen, _)| chosen).trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_or_the_number_is_the_value() {
        assert_eq!(chosen("always defer [madvise] never\n"), "madvise");
        assert_eq!(chosen("65530\n"), "65530");
    }

    #[test]
    fn a_setting_that_this_kernel_lacks_is_named_with_the_value() {
        let empty = tempfile::tempdir().unwrap();
        let root = Root::at(empty.path());
        assert_eq!(Setting::KsmSmartScan.read(&root).unwrap(), None);
        let error = Setting::KsmSmartScan.write(&root, "1").unwrap_err();
        let message = error.to_string();
        assert!(message.contains("mm/ksm/smart_scan"), "{message}");
        assert!(message.contains("\"1\""), "{message}");
    }
}
