//! Who merges a VM's memory: the key `merge` of `samepage`.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

/// Who merges a VM's memory. In JSON `true` or `false`, as before there was a choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum MergeMode {
    /// `true`: the engine of its merge domain.
    #[default]
    On,
    /// `false`: nobody, the VM keeps its memory to itself.
    Off,
}

impl Serialize for MergeMode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            MergeMode::On => serializer.serialize_bool(true),
            MergeMode::Off => serializer.serialize_bool(false),
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
        f.write_str("merge to be true or false")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<MergeMode, E> {
        Ok(if value { MergeMode::On } else { MergeMode::Off })
    }
}
