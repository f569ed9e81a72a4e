//! Drives of the configuration, as block devices of a machine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::SubscriberId;
use kvm_ioctls::{IoEventAddress, VmFd};

use crate::boot::cmdline::ordered_drives;
use crate::bus::MmioBus;
use crate::config::VmConfig;
use crate::events::{EventRemote, OnPanic};
use crate::id::VmId;
use crate::kvm::KvmError;
use crate::machine::{Host, Outside};
use crate::memory::GuestMemory;
use crate::start::StartError;
use crate::state::EndReason;
use crate::virtio::{Attachment, Closing, Disk, Slot, attach_block};

/// Where devices are plugged in: interrupts and doorbells, memory, registers.
pub(crate) type Sockets<'a> = (&'a VmFd, &'a GuestMemory, &'a mut MmioBus);

/// The device queues of a VM on the event loop; taken off it when dropped.
#[derive(Debug)]
pub(crate) struct Subscribers {
    events: EventRemote,
    ids: Vec<SubscriberId>,
}

/// How long the end of a VM waits for its drives' files to be closed.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// A VM's drives, which are closed once their devices are dropped.
#[derive(Debug, Default)]
pub(crate) struct Closings(Mutex<Vec<Closing>>);

impl Closings {
    fn add(&self, closing: Closing) {
        self.lock().push(closing);
    }

    /// Waits until they are closed, so that their locks are anybody's, but not for storage that does
    /// not answer.
    pub(crate) fn wait(&self, id: &VmId) {
        let deadline = Instant::now() + CLOSE_PATIENCE;
        let closings = std::mem::take(&mut *self.lock());
        let open = closings.iter().filter(|closing| !closing.wait(deadline));
        let count = open.count();
        if count > 0 {
            log::warn!("vm {id}: {count} of its drives stay locked: their storage does not answer");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Closing>> {
        // Changed by single pushes: whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Subscribers {
    fn drop(&mut self) {
        let ids = std::mem::take(&mut self.ids);
        if let Err(error) = self.events.remove(ids) {
            log::error!("cannot take a vm's devices off the event loop: {error}");
        }
    }
}

/// Opens every drive's file and plugs in its device, in the order the command line announces.
///
/// On an error the devices plugged in so far are taken off the event loop again.
pub(crate) fn attach(
    host: &Host,
    config: &VmConfig,
    outside: &Outside,
    sockets: Sockets<'_>,
) -> Result<Subscribers, StartError> {
    let (vm, memory, mmio) = sockets;
    let mut subscribers = Subscribers {
        events: host.events.clone(),
        ids: Vec::new(),
    };
    for (index, drive) in ordered_drives(config).into_iter().enumerate() {
        let slot = Slot::new(index)?;
        let label = format!("{}/{}", outside.id, drive.drive_id);
        let disk = Disk::open_locked(drive)?;
        let allowance = outside.allowance.clone();
        let (device, closing) =
            attach_block(slot, &label, disk, Arc::new(memory.clone()), allowance)
                .map_err(StartError::EventFd)?;
        outside.closings.add(closing);
        let id = plug_in(vm, mmio, &host.events, device, on_panic(outside, label))?;
        subscribers.ids.push(id);
    }
    Ok(subscribers)
}

fn plug_in(
    vm: &VmFd,
    mmio: &mut MmioBus,
    events: &EventRemote,
    device: Attachment,
    on_panic: OnPanic,
) -> Result<SubscriberId, StartError> {
    let Attachment {
        slot,
        registers,
        doorbells,
        irq_event,
        subscriber,
    } = device;
    for doorbell in doorbells {
        let address = IoEventAddress::Mmio(doorbell.address);
        vm.register_ioevent(&doorbell.event, &address, doorbell.queue)
            .map_err(KvmError::of("KVM_IOEVENTFD"))?;
    }
    vm.register_irqfd(&irq_event, slot.irq())
        .map_err(KvmError::of("KVM_IRQFD"))?;
    mmio.insert(slot.base(), slot.size_bytes(), registers)?;
    Ok(events.add(subscriber, on_panic)?)
}

fn on_panic(outside: &Outside, label: String) -> OnPanic {
    let on_end = outside.on_end.clone();
    Box::new(move |text| on_end(EndReason::Error(format!("device {label} panicked: {text}"))))
}
