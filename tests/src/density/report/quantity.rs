//! What is counted: the name, the unit and the direction of each figure.

use serde::{Deserialize, Serialize};

/// The unit of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// 2^20 bytes.
    Mib,
    /// 2^30 bytes, held for a second.
    GibSeconds,
    /// Seconds.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// Microseconds.
    Microseconds,
    /// Hundredths of what the figure's name says.
    Percent,
    /// Hundredths of one CPU's time.
    PercentOfCore,
    /// CPU seconds for 2^30 bytes.
    SecondsPerGib,
    /// A number of things.
    Count,
    /// A number of things in each second.
    PerSecond,
}

/// Which of two values of a figure is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// The smaller.
    Less,
    /// The larger.
    More,
    /// Neither: it explains other figures.
    Neither,
}

/// Declares the figures in the order in which tables have them.
macro_rules! quantities {
    ($($variant:ident $name:literal $unit:ident $better:ident),+ $(,)?) => {
        /// What a figure counts.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Quantity {
            $(#[doc = $name] $variant),+
        }

        impl Quantity {
            /// All of them, in the order in which tables have them.
            pub const ALL: &[Quantity] = &[$(Quantity::$variant),+];

            /// Its name in tables, without the unit.
            pub fn name(self) -> &'static str {
                match self { $(Quantity::$variant => $name),+ }
            }

            /// Its unit.
            pub fn unit(self) -> Unit {
                match self { $(Quantity::$variant => Unit::$unit),+ }
            }

            /// Which of two values is the better one.
            pub fn better(self) -> Better {
                match self { $(Quantity::$variant => Better::$better),+ }
            }
        }
    };
}

quantities! {
    Held "guests ready at once, most" Count More,
    FitRest "guests that the limit would hold, by memory at rest (computed)" Count More,
    FitPeak "guests that the limit would hold, by the peak (computed)" Count More,
    GoingOn "guests that lived to the end" Count More,
    Refused "guests refused" Count Neither,
    Ended "guests ended" Count Neither,
    OomKills "processes that the OOM killer ended" Count Less,
    RestUsage "memory of the group at rest" Mib Less,
    RestUsageEach "memory at rest for each guest" Mib Less,
    RestAnonShmem "anonymous and pool at rest" Mib Less,
    RestAnon "anonymous at rest" Mib Neither,
    RestShmem "pool at rest" Mib Neither,
    RestKernel "kernel memory at rest" Mib Less,
    RestFile "page cache at rest" Mib Neither,
    SavedOfOff "less memory at rest than without merging" Percent More,
    Peak "peak of the group" Mib Less,
    BootPeak "peak while booting" Mib Less,
    MeanUsage "memory of the group, mean of the run" Mib Less,
    MemorySeconds "memory over time" GibSeconds Less,
    AvailableFall "fall of MemAvailable at rest" Mib Less,
    RestPss "PSS of the server at rest" Mib Neither,
    PssOfGroup "PSS of anonymous and pool" Percent Neither,
    LastReady "until the last guest is ready" Seconds Less,
    ReadyP50 "from launch to ready, p50" Seconds Less,
    ReadyP99 "from launch to ready, p99" Seconds Less,
    LaunchSum "accepting all launches" Seconds Less,
    LaunchP50 "accepting a launch, p50" Milliseconds Less,
    LaunchP99 "accepting a launch, p99" Milliseconds Less,
    MergeCpu "CPU for merging until at rest" Seconds Less,
    MergeCpuPerGib "CPU for merging, for memory given back" SecondsPerGib Less,
    RestMergeCpu "CPU for merging at rest" PercentOfCore Less,
    RestServerCpu "CPU of the server at rest" PercentOfCore Less,
    VcpuCpu "CPU of vCPUs until at rest" Seconds Neither,
    GivenBack "given back, as the engine says" Mib More,
    Kept "kept for it" Mib Neither,
    Ideal "an ideal engine would give back" Mib Neither,
    ShareReached "given back, of the ideal" Percent More,
    SamePlace "shareable at the same guest page number" Mib Neither,
    Elsewhere "shareable elsewhere only" Mib Neither,
    ElsewhereRuns "mappings that the latter need" Count Neither,
    Zeros "pages of zeros" Mib Neither,
    RestVmas "mappings of the server at rest" Count Less,
    VmasEach "mappings for each guest" Count Less,
    MostVmas "mappings of the server, most" Count Less,
    ContextSwitches "context switches" PerSecond Less,
    MmapWriteLocks "mmap lock taken to write" Count Less,
    MmapWaited "waited for the mmap lock" Seconds Less,
    RoundRate "rounds of work" PerSecond More,
    Progress "rounds of work, of those without merging" Percent More,
    SharedP50 "write to a shared page, p50" Microseconds Less,
    SharedP99 "write to a shared page, p99" Microseconds Less,
    SharedP999 "write to a shared page, p99.9" Microseconds Less,
    SharedMax "write to a shared page, most" Microseconds Less,
    ExitP50 "exit to the monitor, p50" Microseconds Less,
    ExitP99 "exit to the monitor, p99" Microseconds Less,
    ExitP999 "exit to the monitor, p99.9" Microseconds Less,
    ExitMax "exit to the monitor, most" Microseconds Less,
    BusyVcpus "vCPUs busy beside the probe" Count Neither,
    Errors "errors of guests or harness" Count Less,
}

/// The figures that a reader compares first; a table of these stands above the one of all.
const KEY: &[Quantity] = &[
    Quantity::Held,
    Quantity::FitRest,
    Quantity::FitPeak,
    Quantity::GoingOn,
    Quantity::OomKills,
    Quantity::RestUsage,
    Quantity::RestAnonShmem,
    Quantity::RestKernel,
    Quantity::Peak,
    Quantity::MemorySeconds,
    Quantity::LastReady,
    Quantity::LaunchSum,
    Quantity::ReadyP99,
    Quantity::MergeCpu,
    Quantity::RestMergeCpu,
    Quantity::ShareReached,
    Quantity::RestVmas,
    Quantity::Progress,
    Quantity::SharedP50,
    Quantity::SharedP99,
    Quantity::SharedP999,
    Quantity::SharedMax,
    Quantity::Errors,
];

impl Quantity {
    /// Whether a reader compares it first.
    pub fn is_key(self) -> bool {
        KEY.contains(&self)
    }

    /// Its name with its unit, as the first cell of a table's row.
    pub fn label(self) -> String {
        match self.unit().suffix() {
            "" => self.name().to_owned(),
            suffix => format!("{}, {suffix}", self.name()),
        }
    }
}

impl Unit {
    /// What follows a value; empty for counts.
    pub fn suffix(self) -> &'static str {
        match self {
            Unit::Mib => "MiB",
            Unit::GibSeconds => "GiB s",
            Unit::Seconds => "s",
            Unit::Milliseconds => "ms",
            Unit::Microseconds => "us",
            Unit::Percent => "%",
            Unit::PercentOfCore => "% of a core",
            Unit::SecondsPerGib => "s/GiB",
            Unit::Count => "",
            Unit::PerSecond => "1/s",
        }
    }
}

/// A value as tables have it: three digits that count, thousands set off, no digits behind a count.
pub fn number(value: f64, unit: Unit) -> String {
    if unit == Unit::Count || value.abs() >= 99.95 {
        return grouped(value);
    }
    let decimals = match value.abs() {
        0.0 => 0,
        small if small < 0.095 => 3,
        small if small < 9.995 => 2,
        _ => 1,
    };
    format!("{value:.decimals$}")
}

/// A value without decimals, in groups of three digits.
fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 && digits != "0" {
        text.insert(0, '-');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn numbers_have_the_digits_that_count() {
        assert_eq!(number(45_705.0, Unit::Count), "45,705");
        assert_eq!(number(1_234_567.4, Unit::Seconds), "1,234,567");
        assert_eq!(number(-1_234.0, Unit::Mib), "-1,234");
        assert_eq!(number(99.96, Unit::Mib), "100");
        assert_eq!(number(42.34, Unit::Mib), "42.3");
        assert_eq!(number(3.256, Unit::Seconds), "3.26");
        assert_eq!(number(0.0284, Unit::PercentOfCore), "0.028");
        assert_eq!(number(0.0, Unit::Percent), "0");
        assert_eq!(number(-0.2, Unit::Count), "0");
    }

    #[test]
    fn every_figure_has_a_label_of_its_own() {
        let labels: BTreeSet<String> = Quantity::ALL.iter().map(|one| one.label()).collect();
        assert_eq!(labels.len(), Quantity::ALL.len());
        assert!(labels.contains("CPU for merging until at rest, s"));
        assert!(labels.contains("guests refused"));
    }
}
