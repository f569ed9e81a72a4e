//! Small changes to a VM's configuration, for the fuzz target `config_file`.
//!
//! libFuzzer changes bytes, and next to nothing that it makes of a configuration is JSON with keys
//! that a configuration has. So a configuration's tree is changed here, along its schema in the
//! OpenAPI document, which a test holds to the code. What comes out is a configuration most of the
//! time, with some values that none may have.
//!
//! Rejected: a tree by the `arbitrary` crate from the fuzzer's bytes. Seeds and findings would be no
//! configurations that a human can read, or send to a server.

use std::sync::OnceLock;

use fastrand::Rng;
use serde_json::{Map, Value, json};

/// The schema of a configuration in the OpenAPI document.
const ROOT: &str = "#/components/schemas/VmConfig";
/// Most changes at once.
const CHANGES_MAX: u32 = 4;
/// How deep a tree is made anew. A schema that names itself would have no end.
const DEPTH_MAX: u32 = 6;
/// Most times that a text is repeated.
const REPEATS_MAX: usize = 300;
/// Most elements of an array that is made anew; above the most disks that a VM may have.
const ELEMENTS_MAX: usize = 24;
/// Keys that are accepted if they ask for nothing, and so stand in no schema.
const EMPTY_KEYS: [&str; 10] = [
    "cpu-config",
    "mmds-config",
    "logger",
    "metrics",
    "pmem",
    "memory-hotplug",
    "serial",
    "cpu_template",
    "rate_limiter",
    "socket",
];
/// Pieces of texts that something in a configuration is particular about.
const PIECES: [&str; 22] = [
    "",
    "a",
    "root=",
    "ro",
    "rw",
    " ",
    "--",
    "\"",
    ":",
    "/",
    ".",
    "-",
    "_",
    "\0",
    "é",
    "=",
    "T2",
    "2M",
    "builtin:pageload",
    "02:00:00:00:00:01",
    "0eaa91a0-01",
    "virtio_mmio.device=",
];
/// Numbers at which something ends.
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    32,
    33,
    67,
    68,
    65_535,
    65_536,
    1 << 20,
    (1 << 20) + 1,
    1 << 32,
    1 << 63,
    u64::MAX,
];

/// `text` with a few changes that `seed` decides, or `None` if it is no JSON, or would be longer than
/// `bytes_max`.
pub fn mutate(text: &[u8], seed: u32, bytes_max: usize) -> Option<Vec<u8>> {
    let mut config: Value = serde_json::from_slice(text).ok()?;
    let mut texts = Vec::new();
    note_texts(&config, &mut texts);
    let mut mutator = Mutator {
        document: document(),
        texts,
        rng: Rng::with_seed(seed.into()),
    };
    let root = json!({ "$ref": ROOT });
    for _ in 0..mutator.rng.u32(1..=CHANGES_MAX) {
        mutator.change(&mut config, &root);
    }
    let changed = serde_json::to_vec(&config).ok()?;
    (changed.len() <= bytes_max).then_some(changed)
}

#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
fn document() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| serde_json::from_str(crate::OPENAPI_JSON).expect("a document"))
}

/// Texts that stand somewhere in `value`: names that meet are a case of their own.
fn note_texts(value: &Value, texts: &mut Vec<String>) {
    match value {
        Value::String(text) => texts.push(text.clone()),
        Value::Array(elements) => elements.iter().for_each(|one| note_texts(one, texts)),
        Value::Object(fields) => fields.values().for_each(|one| note_texts(one, texts)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

struct Mutator {
    document: &'static Value,
    texts: Vec<String>,
    rng: Rng,
}

impl Mutator {
    fn one_in(&mut self, times: u32) -> bool {
        self.rng.u32(0..times) == 0
    }

    fn pick<'p, T: ?Sized>(&mut self, things: &[&'p T]) -> Option<&'p T> {
        self.rng.choice(things).copied()
    }

    /// The schema that a reference leads to, or one of several that a value may follow.
    fn resolve<'s>(&mut self, schema: &'s Value) -> &'s Value {
        let target = schema["$ref"].as_str().and_then(|text| text.get(1..));
        let named = target.and_then(|path| self.document.pointer(path));
        let schema = named.unwrap_or(schema);
        let choices = schema["oneOf"].as_array();
        choices
            .and_then(|choices| self.rng.choice(choices))
            .unwrap_or(schema)
    }

    /// Changes something in `value`, which should follow `schema`.
    fn change(&mut self, value: &mut Value, schema: &Value) {
        let schema = self.resolve(schema);
        if self.one_in(40) {
            *value = self.junk();
            return;
        }
        match value {
            Value::Object(fields) if !fields.is_empty() && !self.one_in(4) => {
                let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
                let Some(key) = self.pick(&keys).map(str::to_owned) else {
                    return;
                };
                if let Some(field) = fields.get_mut(&key) {
                    self.change(field, &schema["properties"][&key]);
                }
            }
            Value::Array(elements) if !elements.is_empty() && !self.one_in(3) => {
                let place = self.rng.usize(0..elements.len());
                self.change(&mut elements[place], &schema["items"]);
            }
            Value::Object(fields) => self.change_fields(fields, schema),
            Value::Array(elements) => self.change_elements(elements, schema),
            Value::String(text) if !self.one_in(3) => *text = self.near_text(text),
            Value::Number(number) if !self.one_in(3) => {
                let near = number.as_u64().map(|number| self.near_number(number));
                *value = near.map_or_else(|| self.number(schema), Value::from);
            }
            _ => *value = self.fresh(schema, 0),
        }
    }

    fn change_fields(&mut self, fields: &mut Map<String, Value>, schema: &Value) {
        match self.rng.u32(0..8) {
            0 => {
                let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
                if let Some(key) = self.pick(&keys).map(str::to_owned) {
                    fields.remove(&key);
                }
            }
            1 => {
                let key = self.pick(&EMPTY_KEYS).unwrap_or_default();
                let empty = [json!(null), json!({}), json!([]), json!(""), json!(false)];
                let value = self.rng.choice(empty).unwrap_or_default();
                fields.insert(key.to_owned(), value);
            }
            _ => {
                let properties = schema["properties"].as_object();
                let known = properties.and_then(|properties| self.rng.choice(properties));
                if let Some((key, schema)) = known {
                    let value = self.fresh(schema, 0);
                    fields.insert(key.clone(), value);
                }
            }
        }
    }

    fn change_elements(&mut self, elements: &mut Vec<Value>, schema: &Value) {
        let place = self.rng.usize(0..=elements.len());
        match self.rng.u32(0..8) {
            0 if place < elements.len() => drop(elements.remove(place)),
            1 if place < elements.len() => elements.swap(0, place),
            2 | 3 if place < elements.len() => elements.push(elements[place].clone()),
            4 => {
                let most = self.rng.usize(0..ELEMENTS_MAX);
                elements.resize_with(most, || self.fresh(&schema["items"], 0));
            }
            _ => elements.insert(place, self.fresh(&schema["items"], 0)),
        }
    }

    /// A value that follows `schema`, unless its numbers or texts do not.
    fn fresh(&mut self, schema: &Value, depth: u32) -> Value {
        let schema = self.resolve(schema);
        if depth > DEPTH_MAX {
            return Value::Null;
        }
        if let Some(word) = schema["enum"]
            .as_array()
            .and_then(|all| self.rng.choice(all))
        {
            return word.clone();
        }
        match schema["type"].as_str() {
            Some("object") => self.object(schema, depth),
            Some("array") => {
                let count = self.rng.usize(0..3);
                let element = || self.fresh(&schema["items"], depth + 1);
                Value::Array(std::iter::repeat_with(element).take(count).collect())
            }
            Some("boolean") => self.rng.bool().into(),
            Some("integer") => self.number(schema),
            Some("string") => self.text().into(),
            _ => self.junk(),
        }
    }

    fn object(&mut self, schema: &Value, depth: u32) -> Value {
        let required: Vec<&str> = schema["required"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let mut fields = Map::new();
        for (key, schema) in schema["properties"].as_object().into_iter().flatten() {
            if required.contains(&key.as_str()) || self.one_in(3) {
                fields.insert(key.clone(), self.fresh(schema, depth + 1));
            }
        }
        Value::Object(fields)
    }

    fn number(&mut self, schema: &Value) -> Value {
        let ends = [schema["minimum"].as_u64(), schema["maximum"].as_u64()];
        match (self.rng.choice(ends).flatten(), self.rng.u32(0..6)) {
            (Some(end), 0..3) => self.near_number(end).into(),
            (_, 3) => (-self.rng.i64(0..=i64::from(i32::MAX) + 1)).into(),
            _ => self.rng.choice(NUMBERS).unwrap_or_default().into(),
        }
    }

    fn near_number(&mut self, number: u64) -> u64 {
        match self.rng.u32(0..4) {
            0 => number.wrapping_add(1),
            1 => number.wrapping_sub(1),
            2 => number ^ (1 << self.rng.u32(0..64)),
            _ => number,
        }
    }

    fn text(&mut self) -> String {
        let known = self.rng.choice(&self.texts).cloned();
        match known {
            Some(text) if !self.one_in(3) => text,
            _ => self.pick(&PIECES).unwrap_or_default().to_owned(),
        }
    }

    fn near_text(&mut self, text: &str) -> String {
        let piece = self.pick(&PIECES).unwrap_or_default();
        let mut characters: Vec<char> = text.chars().collect();
        let place = self.rng.usize(0..=characters.len());
        match self.rng.u32(0..5) {
            0 => characters.truncate(place),
            1 if place < characters.len() => drop(characters.remove(place)),
            2 => {
                let repeated = piece.repeat(self.rng.usize(0..REPEATS_MAX));
                characters.extend(repeated.chars());
            }
            3 => return self.text(),
            _ => drop(characters.splice(place..place, piece.chars())),
        }
        characters.into_iter().collect()
    }

    /// What no schema asks for.
    fn junk(&mut self) -> Value {
        let junk = [
            json!(null),
            json!(true),
            json!(-1),
            json!(0.5),
            json!(u64::MAX),
            json!("junk"),
            json!([[]]),
            json!({ "junk": {} }),
        ];
        self.rng.choice(junk).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use vmm::VmConfig;

    use super::*;

    /// Names of all fields in `value`, with those that they lie in.
    fn fields(value: &Value, path: &str, names: &mut BTreeSet<String>) {
        match value {
            Value::Object(all) => {
                for (key, value) in all {
                    let path = format!("{path}/{key}");
                    fields(value, &path, names);
                    names.insert(path);
                }
            }
            Value::Array(all) => all.iter().for_each(|one| fields(one, path, names)),
            _ => {}
        }
    }

    #[test]
    fn changes_lead_from_the_least_configuration_to_every_field_of_a_valid_one() {
        let mut known = vec![br#"{"boot-source": {"kernel_image_path": "k"}}"#.to_vec()];
        let mut names = BTreeSet::new();
        for seed in 0..20_000_u32 {
            let parent = &known[usize::try_from(seed).unwrap() * 7919 % known.len()];
            let Some(child) = mutate(parent, seed, 4096) else {
                continue;
            };
            let Ok(config) = serde_json::from_slice::<VmConfig>(&child) else {
                continue;
            };
            let before = names.len();
            if config.validate().is_ok() {
                fields(&serde_json::from_slice(&child).unwrap(), "", &mut names);
            }
            if names.len() > before {
                known.push(child);
            }
        }
        for name in [
            "/boot-source/initrd_path",
            "/drives/partuuid",
            "/drives/samepage/lock",
            "/machine-config/huge_pages",
            "/network-interfaces/rx_rate_limiter/ops/one_time_burst",
            "/entropy/rate_limiter/bandwidth/size",
            "/samepage/oom_priority",
            "/balloon/amount_mib",
            "/vsock/uds_path",
        ] {
            assert!(names.contains(name), "{name} is not in {names:#?}");
        }
    }

    #[test]
    fn one_seed_makes_one_change_and_what_is_no_json_is_left_to_others() {
        let text = br#"{"boot-source": {"kernel_image_path": "k", "boot_args": "quiet"}}"#;
        assert_eq!(mutate(text, 1, 4096), mutate(text, 1, 4096));
        let others: BTreeSet<_> = (0..100).map(|seed| mutate(text, seed, 4096)).collect();
        assert!(others.len() > 50, "{}", others.len());
        assert_eq!(mutate(&text[1..], 1, 4096), None);
        assert_eq!(mutate(text, 1, 3), None);
    }
}
