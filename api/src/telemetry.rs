//! What Firecracker's `/logger` and `/metrics` write of each VM: lines of text and of JSON, to a file or
//! a named pipe that its client names.
//!
//! Nothing here waits for a reader, and nothing for storage that hangs. A line that does not fit into a
//! pipe, or into the queue of a file that is not written, is lost and counted.
//!
//! # Locks
//! `vms` is held to look a VM up. `state` of a VM is held while a line of it is written, which is as long
//! as [`crate::spool`] waits. Neither is held while a file is opened or closed.

mod counts;
mod sink;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm::VmId;
use vmm::virtio::{BalloonCounts, VsockCounts};

use crate::fault::Fault;
use crate::request::Request;
use counts::Counts;
use sink::{OpenSinks, Sink};

/// How often metrics are written without being asked for, as in Firecracker.
const FLUSH_INTERVAL: Duration = Duration::from_secs(60);

/// The body of `PUT /vms/{id}/logger`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// File or named pipe; what was set before stays if it is absent.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// The least important lines that are written; Info when absent.
    #[serde(default)]
    pub level: Option<Level>,
    /// Whether lines say their level.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Whether lines say which part of the program they are of.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Only lines of this part of the program, by the beginning of its name.
    #[serde(default)]
    pub module: Option<String>,
}

/// How important a line is. Firecracker takes any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub enum Level {
    /// Nothing is written.
    Off,
    /// Requests that failed.
    Error,
    /// No line of ours.
    Warning,
    /// Requests.
    #[default]
    Info,
    /// No line of ours.
    Debug,
    /// No line of ours.
    Trace,
}

impl TryFrom<String> for Level {
    type Error = String;

    fn try_from(name: String) -> Result<Level, String> {
        match name.to_ascii_lowercase().as_str() {
            "off" => Ok(Level::Off),
            "error" => Ok(Level::Error),
            "warn" | "warning" => Ok(Level::Warning),
            "info" => Ok(Level::Info),
            "debug" => Ok(Level::Debug),
            "trace" => Ok(Level::Trace),
            _ => Err(format!(
                "level {name:?}: is not Off, Error, Warning, Info, Debug or Trace"
            )),
        }
    }
}

/// The body of `PUT /vms/{id}/metrics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// File or named pipe.
    pub metrics_path: PathBuf,
    /// Whether each line has the VM's id.
    #[serde(default)]
    pub emit_id: bool,
}

/// Logs and metrics of all VMs of a front door.
#[derive(Debug, Default)]
pub struct Telemetry {
    vms: Mutex<BTreeMap<VmId, Arc<VmTelemetry>>>,
}

#[derive(Debug)]
struct VmTelemetry {
    id: VmId,
    open: OpenSinks,
    balloon: Arc<BalloonCounts>,
    vsock: Arc<VsockCounts>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    counts: Counts,
    log: Option<Sink>,
    log_config: LoggerConfig,
    metrics: Option<Sink>,
    emits_id: bool,
}

impl Telemetry {
    /// Notes a request to a VM, and how it went.
    pub fn note(&self, id: &VmId, what: &Noted, refused: Option<&str>) {
        if let Some(vm) = self.find(id) {
            vm.note(what, refused);
        }
    }

    /// Begins to keep a VM's, whose devices count in these.
    pub fn admit(&self, id: &VmId, balloon: Arc<BalloonCounts>, vsock: Arc<VsockCounts>) {
        let vm = Arc::new(VmTelemetry {
            id: id.clone(),
            open: OpenSinks::default(),
            balloon,
            vsock,
            state: Mutex::default(),
        });
        self.lock().insert(id.clone(), vm);
    }

    /// Closes a VM's files, for good.
    pub fn dismiss(&self, id: &VmId) {
        self.lock().remove(id);
    }

    /// Carries out `PUT /vms/{id}/logger`.
    ///
    /// # Errors
    /// 400 if the file cannot be opened.
    pub fn set_logger(&self, id: &VmId, config: LoggerConfig) -> Result<(), Fault> {
        let vm = self.of(id)?;
        let open = |path| Sink::open(path, &vm.open);
        let sink = config.log_path.as_deref().map(open).transpose();
        let sink = sink.map_err(|error| Fault::bad_request(format!("log_path: {error}")))?;
        let mut state = vm.lock();
        if let Some(sink) = sink {
            state.log = Some(sink);
        }
        let known = &mut state.log_config;
        known.level = config.level.or(known.level);
        known.show_level = config.show_level.or(known.show_level);
        known.show_log_origin = config.show_log_origin.or(known.show_log_origin);
        known.module = config.module.or_else(|| known.module.take());
        Ok(())
    }

    /// Carries out `PUT /vms/{id}/metrics`. From a thread of an async runtime, whose tasks then write a
    /// line each minute.
    ///
    /// # Errors
    /// 400 if the file cannot be opened, or there is one already, as in Firecracker.
    pub fn set_metrics(&self, id: &VmId, config: &MetricsConfig) -> Result<(), Fault> {
        let vm = self.of(id)?;
        let sink = Sink::open(&config.metrics_path, &vm.open);
        let sink = sink.map_err(|error| Fault::bad_request(format!("metrics_path: {error}")))?;
        {
            let mut state = vm.lock();
            if state.metrics.is_some() {
                let message = format!("vm {id}: metrics_path: was set already");
                return Err(Fault::bad_request(message));
            }
            state.metrics = Some(sink);
            state.emits_id = config.emit_id;
        }
        tokio::runtime::Handle::current().spawn(flush_each_minute(Arc::downgrade(&vm)));
        Ok(())
    }

    /// Carries out the action `FlushMetrics`. Without a file it does nothing, as in Firecracker.
    ///
    /// # Errors
    /// 404 if there is no such VM.
    pub fn flush(&self, id: &VmId) -> Result<(), Fault> {
        self.of(id)?.flush();
        Ok(())
    }

    fn find(&self, id: &VmId) -> Option<Arc<VmTelemetry>> {
        self.lock().get(id).cloned()
    }

    fn of(&self, id: &VmId) -> Result<Arc<VmTelemetry>, Fault> {
        self.find(id)
            .ok_or_else(|| Fault::not_found(format!("vm {id}: no such vm")))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Arc<VmTelemetry>>> {
        // Changed by single inserts and removes: whole after any panic.
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn flush_each_minute(vm: Weak<VmTelemetry>) {
    loop {
        tokio::time::sleep(FLUSH_INTERVAL).await;
        let Some(vm) = vm.upgrade() else {
            return;
        };
        // Which waits for a disk that is slow, if not for long.
        let _ = tokio::task::spawn_blocking(move || vm.flush()).await;
    }
}

impl VmTelemetry {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Counters and files: of use after any panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self) {
        let mut state = self.lock();
        let State {
            counts,
            metrics: Some(metrics),
            emits_id,
            ..
        } = &mut *state
        else {
            return;
        };
        for (field, count) in self.balloon.take() {
            counts.add("balloon", field, count);
        }
        for (field, count) in self.vsock.take() {
            counts.add("vsock", field, count);
        }
        let line = counts.line(emits_id.then_some(&self.id));
        if metrics.write(&line) {
            // What was told is told once: Firecracker's counters begin anew with each line.
            counts.begin_anew();
        }
        counts.add("logger", "missed_metrics_count", metrics.take_lost());
    }

    fn note(&self, what: &Noted, refused: Option<&str>) {
        let mut state = self.lock();
        if let Some((group, name)) = what.counter {
            state.counts.add(group, &format!("{name}_count"), 1);
            if refused.is_some() && group != "get_api_requests" {
                state.counts.add(group, &format!("{name}_fails"), 1);
            }
        }
        if let (Some(name), None) = (what.latency, refused) {
            let us = u64::try_from(what.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
            state.counts.set("latencies_us", name, us);
        }
        let (level, text) = match refused {
            None => (Level::Info, format!("{}: done", what.text)),
            Some(why) => (Level::Error, format!("{}: refused: {why}", what.text)),
        };
        let State {
            counts,
            log: Some(log),
            log_config,
            ..
        } = &mut *state
        else {
            return;
        };
        if level <= log_config.level.unwrap_or_default()
            && log_config
                .module
                .as_ref()
                .is_none_or(|module| ORIGIN.starts_with(module))
        {
            log.write(&log_line(&self.id, level, log_config, &text));
        }
        counts.add("logger", "missed_log_count", log.take_lost());
    }
}

/// The part of the program that writes the lines.
const ORIGIN: &str = "api_server";

/// A line as Firecracker writes it: `TIME [ID:THREAD:LEVEL:ORIGIN] TEXT`.
fn log_line(id: &VmId, level: Level, config: &LoggerConfig, text: &str) -> String {
    let now = jiff::Timestamp::now();
    let mut place = format!("{id}:fc_api");
    if config.show_level == Some(true) {
        place += &format!(":{level:?}");
    }
    if config.show_log_origin == Some(true) {
        place += &format!(":{ORIGIN}");
    }
    format!("{now:.9} [{place}] {text}\n")
}

/// What is noted of a request, taken before it is carried out.
#[derive(Debug)]
pub struct Noted {
    text: String,
    counter: Option<(&'static str, &'static str)>,
    latency: Option<&'static str>,
    begun: Instant,
}

impl Noted {
    /// Of `request`; `None` if it is about no VM.
    pub fn of(request: &Request) -> Option<(VmId, Noted)> {
        let id = request.vm()?.clone();
        let noted = Noted {
            text: counts::text_of(request),
            counter: counts::counter_of(request),
            latency: counts::latency_of(request),
            begun: Instant::now(),
        };
        Some((id, noted))
    }
}
