//! A workload as words of a kernel command line.
//!
//! `... pageload seed=7 shared=70 zero=10 private=20 hot_pages=64 layout=runs write=hot
//! begin=filled writes_per_pass=64 passes=0 pace_ms=1000 probe_us=0 ...`; what is left out has its default.

use core::fmt;

use crate::workload::{Begin, Layout, Workload, WorkloadError, WriteMode};

/// The word that the options follow; what stands before it is for others.
const MARK: &str = "pageload";

/// Words a monitor adds to any kernel's command line after the user's, for a root drive. Options of
/// drivers (`virtio_mmio.device=...`) are known by the dot in their name.
const KERNEL_WORDS: [&str; 4] = ["root", "ro", "rw", "console"];

/// Why a command line is no workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParseError<'a> {
    /// No option has this name.
    UnknownOption(&'a str),
    /// The option stands without `=value`.
    NoValue(&'a str),
    /// The value is not one that the option can have.
    BadValue {
        /// The option.
        name: &'a str,
        /// What was given.
        value: &'a str,
        /// What can be given.
        allowed: &'static str,
    },
    /// Each value is right, together they are not.
    Invalid(WorkloadError),
}

impl fmt::Display for ParseError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ParseError::UnknownOption(name) => write!(f, "{name}: no such pageload option"),
            ParseError::NoValue(name) => write!(f, "{name}: has no value"),
            ParseError::BadValue {
                name,
                value,
                allowed,
            } => {
                write!(f, "{name}: '{value}' is not {allowed}")
            }
            ParseError::Invalid(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for ParseError<'_> {}

impl Workload {
    /// Reads the words after `pageload`, each `name=value`; none at all means the defaults.
    ///
    /// Words for the kernel (a dot in their name, or one of `root`, `ro`, `rw`, `console`) are passed
    /// over, because monitors append such.
    ///
    /// # Errors
    /// [`ParseError`] names the option and its value.
    pub fn parse(command_line: &str) -> Result<Workload, ParseError<'_>> {
        let mut workload = Workload::default();
        let words = command_line.split_ascii_whitespace();
        for word in words.skip_while(|&word| word != MARK).skip(1) {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word, None),
            };
            if !name.contains('.') && !KERNEL_WORDS.contains(&name) {
                workload.set(name, value.ok_or(ParseError::NoValue(name))?)?;
            }
        }
        workload.validate().map_err(ParseError::Invalid)?;
        Ok(workload)
    }

    fn set<'a>(&mut self, name: &'a str, value: &'a str) -> Result<(), ParseError<'a>> {
        match name {
            "seed" => self.seed = number(name, value)?,
            "shared" => self.shared = percentage(name, value)?,
            "zero" => self.zero = percentage(name, value)?,
            "private" => self.private = percentage(name, value)?,
            "hot_pages" => self.hot_pages = number(name, value)?,
            "layout" => self.layout = Layout::named(name, value)?,
            "begin" => self.begin = Begin::named(name, value)?,
            "write" => self.write = WriteMode::named(name, value)?,
            "writes_per_pass" => self.writes_per_pass = number(name, value)?,
            "passes" => self.passes = number(name, value)?,
            "pace_ms" => self.pace_ms = number(name, value)?,
            "probe_us" => self.probe_us = number(name, value)?,
            _ => return Err(ParseError::UnknownOption(name)),
        }
        Ok(())
    }
}

fn number<'a>(name: &'a str, value: &'a str) -> Result<u64, ParseError<'a>> {
    let allowed = "a whole number below 2^64";
    value.parse().map_err(|_| ParseError::BadValue {
        name,
        value,
        allowed,
    })
}

fn percentage<'a>(name: &'a str, value: &'a str) -> Result<u8, ParseError<'a>> {
    match value.parse() {
        Ok(percent @ 0..=100) => Ok(percent),
        _ => Err(ParseError::BadValue {
            name,
            value,
            allowed: "a percentage from 0 to 100",
        }),
    }
}

impl Layout {
    fn named<'a>(name: &'a str, value: &'a str) -> Result<Layout, ParseError<'a>> {
        let allowed = "one of same, runs, shuffled";
        match value {
            "same" => Ok(Layout::Same),
            "runs" => Ok(Layout::Runs),
            "shuffled" => Ok(Layout::Shuffled),
            _ => Err(ParseError::BadValue {
                name,
                value,
                allowed,
            }),
        }
    }
}

impl WriteMode {
    fn named<'a>(name: &'a str, value: &'a str) -> Result<WriteMode, ParseError<'a>> {
        let allowed = "one of none, hot, merged, broken, wave";
        match value {
            "none" => Ok(WriteMode::None),
            "hot" => Ok(WriteMode::Hot),
            "merged" => Ok(WriteMode::Merged),
            "broken" => Ok(WriteMode::Broken),
            "wave" => Ok(WriteMode::Wave),
            _ => Err(ParseError::BadValue {
                name,
                value,
                allowed,
            }),
        }
    }
}

impl Begin {
    fn named<'a>(name: &'a str, value: &'a str) -> Result<Begin, ParseError<'a>> {
        let allowed = "one of filled, input";
        match value {
            "filled" => Ok(Begin::Filled),
            "input" => Ok(Begin::Input),
            _ => Err(ParseError::BadValue {
                name,
                value,
                allowed,
            }),
        }
    }
}

impl fmt::Display for Begin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Begin::Filled => "filled",
            Begin::Input => "input",
        })
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Same => "same",
            Layout::Runs => "runs",
            Layout::Shuffled => "shuffled",
        })
    }
}

impl fmt::Display for WriteMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WriteMode::None => "none",
            WriteMode::Hot => "hot",
            WriteMode::Merged => "merged",
            WriteMode::Broken => "broken",
            WriteMode::Wave => "wave",
        })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Workload {
            seed,
            shared,
            zero,
            private,
            hot_pages,
            ..
        } = self;
        let Workload {
            layout,
            write,
            begin,
            writes_per_pass,
            passes,
            pace_ms,
            probe_us,
            ..
        } = self;
        write!(
            f,
            "{MARK} seed={seed} shared={shared} zero={zero} private={private} "
        )?;
        write!(
            f,
            "hot_pages={hot_pages} layout={layout} write={write} begin={begin} "
        )?;
        write!(
            f,
            "writes_per_pass={writes_per_pass} passes={passes} pace_ms={pace_ms} \
             probe_us={probe_us}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn command_lines_without_options_mean_the_defaults() {
        for line in ["", "console=ttyS0 quiet", "pageload", "panic=1 pageload "] {
            assert_eq!(Workload::parse(line), Ok(Workload::default()), "{line}");
        }
    }

    #[test]
    fn words_of_others_are_passed_over() {
        let line =
            "quiet=maybe pageload seed=9 root=/dev/vda ro virtio_mmio.device=4K@0xd0000000:5";
        assert_eq!(Workload::parse(line).unwrap().seed, 9);
    }

    #[test]
    fn errors_name_the_option_and_the_value() {
        let cases = [
            (
                "pageload seed=x",
                "seed: 'x' is not a whole number below 2^64",
            ),
            (
                "pageload zero=101",
                "zero: '101' is not a percentage from 0 to 100",
            ),
            (
                "pageload layout=odd",
                "layout: 'odd' is not one of same, runs, shuffled",
            ),
            (
                "pageload write=all",
                "write: 'all' is not one of none, hot, merged, broken, wave",
            ),
            (
                "pageload begin=now",
                "begin: 'now' is not one of filled, input",
            ),
            ("pageload speed=1", "speed: no such pageload option"),
            ("pageload passes", "passes: has no value"),
            (
                "pageload shared=80",
                "shared + zero + private: 110 percent, must be 100",
            ),
            (
                "pageload probe_us=500",
                "probe_us: 500 needs write=merged and shared above 0",
            ),
            (
                "pageload probe_us=500 write=merged shared=0 private=90",
                "probe_us: 500 needs write=merged and shared above 0",
            ),
        ];
        for (line, message) in cases {
            assert_eq!(Workload::parse(line).unwrap_err().to_string(), message);
        }
    }

    prop_compose! {
        fn any_workload()(
            seed: u64, shared in 0u8..=100, rest in 0u8..=100, hot_pages: u64, passes: u64,
            pace_ms: u64, writes_per_pass: u64, any_probe_us: u64,
            layout in prop_oneof![Just(Layout::Same), Just(Layout::Runs), Just(Layout::Shuffled)],
            write in prop_oneof![
                Just(WriteMode::None), Just(WriteMode::Hot), Just(WriteMode::Merged),
                Just(WriteMode::Broken), Just(WriteMode::Wave)
            ],
            begin in prop_oneof![Just(Begin::Filled), Just(Begin::Input)],
        ) -> Workload {
            let zero = rest % (101 - shared);
            let private = 100 - shared - zero;
            let can_probe = write == WriteMode::Merged && shared > 0;
            let probe_us = if can_probe { any_probe_us } else { 0 };
            Workload {
                seed, shared, zero, private, hot_pages, layout, write, begin, writes_per_pass, passes,
                pace_ms, probe_us,
            }
        }
    }

    proptest! {
        #[test]
        fn formatted_workloads_parse_to_themselves(workload in any_workload()) {
            let line = std::format!("quiet {workload} virtio_mmio.device=4K@0xd0000000:5");
            prop_assert_eq!(Workload::parse(&line), Ok(workload));
        }

        #[test]
        fn no_command_line_panics(line in "(pageload )?.{0,60}") {
            let _ = Workload::parse(&line);
        }
    }
}
