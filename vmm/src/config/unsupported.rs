//! A key that Firecracker knows and Samepage does not support yet.

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Serialize, Serializer};
use std::fmt;

/// Remembers whether the key asked for something: `null`, `[]` and `{}` do not.
///
/// Kept as a fact, not as a value: it cannot be acted on, and validation refuses it by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unsupported {
    asked: bool,
}

impl Unsupported {
    /// The key is not there.
    pub const ABSENT: Unsupported = Unsupported { asked: false };

    /// Whether nothing was asked for.
    pub fn is_absent(&self) -> bool {
        !self.asked
    }
}

impl Serialize for Unsupported {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_none()
    }
}

impl<'de> Deserialize<'de> for Unsupported {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unsupported, D::Error> {
        deserializer
            .deserialize_any(AnyVisitor)
            .map(|asked| Unsupported { asked })
    }
}

struct AnyVisitor;

impl<'de> Visitor<'de> for AnyVisitor {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_bool<E>(self, _: bool) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_str<E>(self, _: &str) -> Result<bool, E> {
        Ok(true)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
        let mut asked = false;
        while seq.next_element::<IgnoredAny>()?.is_some() {
            asked = true;
        }
        Ok(asked)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let mut asked = false;
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            asked = true;
        }
        Ok(asked)
    }
}
