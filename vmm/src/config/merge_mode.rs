//! Who merges a VM's memory: the key `merge` of `samepage`.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Unexpected, Visitor};
use serde::{Serialize, Serializer};

/// The string that the key takes.
const KSM: &str = "ksm";

/// Who merges a VM's memory. In JSON `true`, `false` or `"ksm"`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum MergeMode {
    /// `true`: the engine of its merge domain.
    #[default]
    On,
    /// `false`: nobody, the VM keeps its memory to itself.
    Off,
    /// `"ksm"`: kernel KSM, with all memory of the host that is mergeable, whatever process and
    /// merge domain it belongs to.
    Ksm,
}

impl fmt::Display for MergeMode {
    /// As on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MergeMode::On => "on",
            MergeMode::Off => "off",
            MergeMode::Ksm => KSM,
        })
    }
}

impl Serialize for MergeMode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            MergeMode::On => serializer.serialize_bool(true),
            MergeMode::Off => serializer.serialize_bool(false),
            MergeMode::Ksm => serializer.serialize_str(KSM),
        }
    }
}

impl<'de> Deserialize<'de> for MergeMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<MergeMode, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

/// Names the field in its errors: serde's own name only the value.
struct MergeVisitor;

impl Visitor<'_> for MergeVisitor {
    type Value = MergeMode;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("merge to be true, false or \"ksm\"")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<MergeMode, E> {
        Ok(if value { MergeMode::On } else { MergeMode::Off })
    }
    fn visit_str<E: de::Error>(self, value: &str) -> Result<MergeMode, E> {
        match value {
            KSM => Ok(MergeMode::Ksm),
            _ => Err(E::invalid_value(Unexpected::Str(value), &self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_was_read() {
        for (json, mode, word) in [
            ("true", MergeMode::On, "on"),
            ("false", MergeMode::Off, "off"),
            ("\"ksm\"", MergeMode::Ksm, "ksm"),
        ] {
            assert_eq!(serde_json::from_str::<MergeMode>(json).unwrap(), mode);
            assert_eq!(serde_json::to_string(&mode).unwrap(), json);
            assert_eq!(mode.to_string(), word);
        }
    }

    #[test]
    fn anything_else_is_refused_with_the_field_the_value_and_what_is_allowed() {
        for (json, named) in [
            ("\"KSM\"", "\"KSM\""),
            ("\"true\"", "\"true\""),
            ("\"\"", "\"\""),
            ("1", "`1`"),
            ("0.5", "`0.5`"),
            ("null", "null"),
            ("[true]", "sequence"),
            ("{}", "map"),
        ] {
            let error = serde_json::from_str::<MergeMode>(json).unwrap_err();
            let error = error.to_string();
            let allowed = "expected merge to be true, false or \"ksm\"";
            assert!(error.contains(named) && error.contains(allowed), "{error}");
        }
    }
}
