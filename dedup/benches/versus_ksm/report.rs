//! Medians over the rounds, ratios, and the JSON.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::measure::Figures;

/// Figures of all rounds: workload, engine, key.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rounds: BTreeMap<&'static str, BTreeMap<&'static str, BTreeMap<String, Vec<f64>>>>,
}

impl Report {
    pub(crate) fn add(&mut self, workload: &'static str, engine: &'static str, figures: Figures) {
        let engines = self.rounds.entry(workload).or_default();
        let all = engines.entry(engine).or_default();
        for (key, figure) in figures {
            all.entry(key).or_default().push(figure);
        }
    }

    fn median(&self, workload: &str, engine: &str, key: &str) -> Option<f64> {
        let mut rounds = self.rounds.get(workload)?.get(engine)?.get(key)?.clone();
        rounds.sort_by(f64::total_cmp);
        Some(rounds[rounds.len() / 2])
    }

    fn keys(&self, workload: &str) -> Vec<String> {
        let engines = self
            .rounds
            .get(workload)
            .and_then(|engines| engines.get("samepage"));
        engines
            .map(|keys| keys.keys().cloned().collect())
            .unwrap_or_default()
    }

    pub(crate) fn print(&self, workload: &str) {
        for key in self.keys(workload) {
            let [ours, ksm, off] =
                ["samepage", "ksm", "off"].map(|engine| self.median(workload, engine, &key));
            let show = |figure: Option<f64>| figure.map_or("-".to_owned(), |f| format!("{f:.6}"));
            let ratio = ours.zip(ksm).map(|(ours, ksm)| ours / ksm);
            println!(
                "{workload:16} {key:26} ours {:>16}  ksm {:>16}  off {:>10}  ratio {:>10}",
                show(ours),
                show(ksm),
                show(off),
                show(ratio)
            );
        }
    }

    /// `{"workloads": {NAME: {"samepage": {...}, "ksm": {...}, "ratio": {...}}}}`
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let mut workloads = Map::new();
        for (&workload, engines) in &self.rounds {
            let mut entry = Map::new();
            for &engine in engines.keys() {
                let mut figures = Map::new();
                for key in self.keys(workload) {
                    insert(&mut figures, &key, self.median(workload, engine, &key));
                }
                entry.insert(engine.to_owned(), Value::Object(figures));
            }
            let mut ratios = Map::new();
            for key in self.keys(workload) {
                let pair = self
                    .median(workload, "samepage", &key)
                    .zip(self.median(workload, "ksm", &key));
                insert(&mut ratios, &key, pair.map(|(ours, ksm)| ours / ksm));
            }
            entry.insert("ratio".to_owned(), Value::Object(ratios));
            workloads.insert(workload.to_owned(), Value::Object(entry));
        }
        let text = serde_json::to_string_pretty(&json!({ "workloads": workloads }))?;
        fs::write(path, text + "\n")
    }
}

/// Puts `a.b` under `a`, as an object.
fn insert(figures: &mut Map<String, Value>, key: &str, figure: Option<f64>) {
    let value = figure.map_or(Value::Null, Value::from);
    match key.split_once('.') {
        Some((outer, inner)) => {
            let entry = figures.entry(outer.to_owned()).or_insert_with(|| json!({}));
            if let Some(object) = entry.as_object_mut() {
                object.insert(inner.to_owned(), value);
            }
        }
        None => {
            figures.insert(key.to_owned(), value);
        }
    }
}
