//! From doorbell to device, on the event loop.

use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::device::lock;
use super::{Allowance, Device, Doorbells, Interrupt, LogLimit, Waker};

/// Serves the queues of one device when their doorbells ring, or the device's own wakers.
///
/// It belongs on one event loop. Dropping it (after the loop let go of it) drops its share of the
/// device.
pub struct QueueWorker<D> {
    device: Arc<Mutex<D>>,
    doorbells: Doorbells,
    interrupt: Arc<Interrupt>,
    label: Arc<str>,
    allowance: Arc<dyn Allowance>,
    log_limit: LogLimit,
}

impl<D> std::fmt::Debug for QueueWorker<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueWorker")
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}

impl<D: Device> QueueWorker<D> {
    pub(super) fn new(
        device: Arc<Mutex<D>>,
        doorbells: Doorbells,
        interrupt: Arc<Interrupt>,
        label: Arc<str>,
        allowance: Arc<dyn Allowance>,
    ) -> Self {
        QueueWorker {
            device,
            doorbells,
            interrupt,
            label,
            allowance,
            log_limit: LogLimit::new(),
        }
    }

    /// Serves queue `index` for one slice.
    pub(super) fn serve(&mut self, index: usize) {
        let Some(doorbell) = self.doorbells.get(index) else {
            return;
        };
        // Silenced before the queue is looked at: a ring after this line is another turn. It may
        // read as empty, then a turn finds nothing to do.
        let _rings = doorbell.read();
        if !self.allowance.is_open() {
            self.allowance.ring_later(&self.doorbells, index);
            return;
        }
        let mut device = lock(&self.device);
        match device.process_queue(index) {
            // Signalled under the lock: a driver that resets the device waits for it, and must not
            // find an interrupt of the time before afterwards.
            Ok(progress) => {
                if progress.interrupt {
                    self.interrupt.signal_used_buffers();
                }
                if progress.starved {
                    self.allowance.ring_later(&self.doorbells, index);
                } else if progress.more {
                    // To the back of the loop, behind the doorbells of the other devices.
                    let _full = doorbell.write(1);
                }
            }
            Err(error) => {
                device.reset();
                self.interrupt.signal_needs_reset();
                let problem = format!("queue {index}: {error}: the device needs a reset");
                self.log_limit.warn(&self.label, &problem);
            }
        }
    }
}

impl<D: Device> MutEventSubscriber for QueueWorker<D> {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        // Lossless: u32 to usize on a 64-bit host.
        self.serve(events.data() as usize);
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (index, doorbell) in (0_u32..).zip(self.doorbells.iter()) {
            let events = Events::with_data(doorbell, index, EventSet::IN);
            if let Err(error) = ops.add(events) {
                log::error!("{}: cannot watch queue {index}: {error}", self.label);
            }
        }
        // The device lives for at least as long as this worker, and so do its descriptors.
        let wakers = lock(&self.device).wakers();
        for Waker { fd, queue } in wakers {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if let Err(error) = ops.add(Events::with_data_raw(fd, queue, events)) {
                log::error!(
                    "{}: cannot watch fd {fd} of queue {queue}: {error}",
                    self.label
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::{Activation, Progress, RingError, Unbounded};
    use event_manager::{EventManager, SubscriberOps};
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    /// Answers each doorbell with the next of its answers.
    #[derive(Default)]
    struct Scripted {
        answers: Vec<Result<Progress, RingError>>,
        served: Vec<usize>,
        resets: u32,
        wakers: Vec<Waker>,
    }

    impl Device for Scripted {
        fn device_type(&self) -> u32 {
            42
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &[16, 16]
        }
        fn read_config(&self, _offset: u64, _bytes: &mut [u8]) {}
        fn activate(&mut self, _activation: Activation) {}
        fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
            self.served.push(index);
            self.answers.pop().unwrap_or(Ok(Progress::default()))
        }
        fn wakers(&self) -> Vec<Waker> {
            self.wakers.clone()
        }
        fn reset(&mut self) {
            self.resets += 1;
        }
    }

    struct Bench {
        device: Arc<Mutex<Scripted>>,
        doorbells: Arc<[EventFd]>,
        interrupt: Arc<Interrupt>,
        events: EventManager<QueueWorker<Scripted>>,
    }

    fn bench(answers: Vec<Result<Progress, RingError>>) -> Bench {
        bench_with(answers, Arc::new(Unbounded))
    }

    fn bench_with(
        answers: Vec<Result<Progress, RingError>>,
        allowance: Arc<dyn Allowance>,
    ) -> Bench {
        let device = Scripted {
            answers,
            ..Scripted::default()
        };
        bench_of(device, allowance)
    }

    fn bench_of(device: Scripted, allowance: Arc<dyn Allowance>) -> Bench {
        let device = Arc::new(Mutex::new(device));
        let doorbells: Arc<[EventFd]> = (0..2)
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        let interrupt = Arc::new(Interrupt::new().unwrap());
        let label = Arc::from("test");
        let worker = QueueWorker::new(
            device.clone(),
            doorbells.clone(),
            interrupt.clone(),
            label,
            allowance,
        );
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(worker);
        Bench {
            device,
            doorbells,
            interrupt,
            events,
        }
    }

    #[test]
    fn a_doorbell_serves_its_own_queue_once() {
        let mut bench = bench(vec![]);
        bench.doorbells[1].write(3).unwrap();
        assert_eq!(bench.events.run_with_timeout(1000), Ok(1));
        assert_eq!(bench.events.run_with_timeout(0), Ok(0));
        assert_eq!(bench.device.lock().unwrap().served, [1]);
        assert_eq!(bench.interrupt.status(), 0);
    }

    #[test]
    fn used_buffers_raise_the_interrupt() {
        let mut bench = bench(vec![Ok(Progress {
            interrupt: true,
            ..Progress::default()
        })]);
        bench.doorbells[0].write(1).unwrap();
        bench.events.run_with_timeout(1000).unwrap();
        assert_eq!(bench.interrupt.status(), 1);
        assert_eq!(bench.interrupt.event().read().unwrap(), 1);
    }

    #[test]
    fn work_left_over_gets_another_turn_without_a_doorbell() {
        let mut bench = bench(vec![Ok(Progress {
            more: true,
            ..Progress::default()
        })]);
        bench.doorbells[0].write(1).unwrap();
        bench.events.run_with_timeout(1000).unwrap();
        assert_eq!(bench.events.run_with_timeout(1000), Ok(1));
        assert_eq!(bench.events.run_with_timeout(0), Ok(0));
        assert_eq!(bench.device.lock().unwrap().served, [0, 0]);
    }

    /// Leave that is given and taken back by the test.
    #[derive(Debug, Default)]
    struct Told {
        open: AtomicBool,
        put_off: AtomicUsize,
    }

    impl Allowance for Told {
        fn is_open(&self) -> bool {
            self.open.load(Ordering::Relaxed)
        }

        fn take(&self, _bytes: u64) -> bool {
            true
        }

        fn page_bytes(&self) -> u64 {
            4096
        }

        fn ring_later(&self, _doorbells: &Doorbells, _queue: usize) {
            self.put_off.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_held_queue_is_put_off_and_keeps_nobody_awake() {
        let told = Arc::new(Told::default());
        let mut bench = bench_with(vec![], told.clone());
        bench.doorbells[0].write(1).unwrap();
        assert_eq!(bench.events.run_with_timeout(1000), Ok(1));
        assert_eq!(bench.events.run_with_timeout(0), Ok(0), "it does not spin");
        assert!(bench.device.lock().unwrap().served.is_empty());
        assert_eq!(told.put_off.load(Ordering::Relaxed), 1);
        told.open.store(true, Ordering::Relaxed);
        bench.doorbells[0].write(1).unwrap();
        bench.events.run_with_timeout(1000).unwrap();
        assert_eq!(bench.device.lock().unwrap().served, [0]);
    }

    #[test]
    fn a_queue_that_lacks_memory_gets_its_turn_when_it_is_told() {
        let told = Arc::new(Told::default());
        told.open.store(true, Ordering::Relaxed);
        let starved = Progress {
            starved: true,
            ..Progress::default()
        };
        let mut bench = bench_with(vec![Ok(starved)], told.clone());
        bench.doorbells[1].write(1).unwrap();
        bench.events.run_with_timeout(1000).unwrap();
        assert_eq!(bench.events.run_with_timeout(0), Ok(0), "it does not spin");
        assert_eq!(told.put_off.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_waker_has_its_queue_served_once_each_time_something_comes() {
        let packets = EventFd::new(EFD_NONBLOCK).unwrap();
        let waker = Waker {
            fd: packets.as_raw_fd(),
            queue: 1,
        };
        let device = Scripted {
            wakers: vec![waker],
            ..Scripted::default()
        };
        let mut bench = bench_of(device, Arc::new(Unbounded));
        for turn in 1..3 {
            packets.write(1).unwrap();
            assert_eq!(bench.events.run_with_timeout(1000), Ok(1));
            // Nobody reads what came.
            assert_eq!(bench.events.run_with_timeout(0), Ok(0), "it does not spin");
            assert_eq!(bench.device.lock().unwrap().served, vec![1; turn]);
        }
    }

    #[test]
    fn a_broken_ring_resets_the_device_and_tells_the_driver() {
        let mut bench = bench(vec![Err(RingError::Head { head: 9, size: 4 })]);
        bench.doorbells[0].write(1).unwrap();
        bench.events.run_with_timeout(1000).unwrap();
        assert_eq!(bench.device.lock().unwrap().resets, 1);
        assert!(bench.interrupt.needs_reset());
        assert_eq!(bench.interrupt.event().read().unwrap(), 1);
    }

    #[test]
    fn a_removed_worker_lets_go_of_the_device() {
        let device = Arc::new(Mutex::new(Scripted::default()));
        let doorbells: Arc<[EventFd]> = Arc::new([EventFd::new(EFD_NONBLOCK).unwrap()]);
        let interrupt = Arc::new(Interrupt::new().unwrap());
        let worker = QueueWorker::new(
            device.clone(),
            doorbells.clone(),
            interrupt,
            Arc::from("test"),
            Arc::new(Unbounded),
        );
        let mut events = EventManager::new().unwrap();
        let id = events.add_subscriber(worker);
        drop(events.remove_subscriber(id).unwrap());
        doorbells[0].write(1).unwrap();
        assert_eq!(events.run_with_timeout(0), Ok(0));
        assert_eq!(Arc::strong_count(&device), 1);
    }
}
