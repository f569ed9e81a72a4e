//! Devices of the configuration, plugged into a machine.

use std::collections::BTreeMap;
use std::sync::Arc;

use event_manager::SubscriberId;
use kvm_ioctls::{IoEventAddress, VmFd};

use crate::bus::MmioBus;
use crate::config::{VirtioDevice, VmConfig};
use crate::events::{EventRemote, OnPanic};
use crate::kvm::KvmError;
use crate::machine::{Host, Outside};
use crate::memory::ram::Ram;
use crate::start::{self, StartError};
use crate::state::EndReason;
use crate::virtio::{
    self, Attachment, Balloon, BalloonHandle, Disk, Entropy, Net, NetworkLimits, Slot, Throttle,
    Vsock, attach_block,
};

/// Where devices are plugged in: interrupts and doorbells, memory, registers.
pub(crate) type Sockets<'a> = (&'a VmFd, &'a Ram, &'a mut MmioBus);

/// The device queues of a VM on the event loop; taken off it when dropped.
#[derive(Debug)]
pub(crate) struct Subscribers {
    events: EventRemote,
    ids: Vec<SubscriberId>,
    /// The limits of each network interface, by its id.
    networks: BTreeMap<String, NetworkLimits>,
    balloon: Option<BalloonHandle>,
}

impl Subscribers {
    /// The balloon; `None` if there is none.
    pub(crate) fn balloon(&self) -> Option<&BalloonHandle> {
        self.balloon.as_ref()
    }

    /// Has no vCPU wait for a device any more: they are to end.
    pub(crate) fn close(&self) {
        self.balloon.iter().for_each(BalloonHandle::close);
    }

    /// The limits of a network interface; `None` if there is none of this id.
    pub(crate) fn network_limits(&self, iface_id: &str) -> Option<&NetworkLimits> {
        self.networks.get(iface_id)
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

/// Opens what each device needs of the host and plugs it in, in the order that the command line
/// announces.
///
/// On an error the devices plugged in so far are taken off the event loop again.
pub(crate) fn attach(
    host: &Host,
    config: &VmConfig,
    outside: &Outside,
    sockets: Sockets<'_>,
) -> Result<Subscribers, StartError> {
    let (vm, ram, mmio) = sockets;
    let mut subscribers = Subscribers {
        events: host.events.clone(),
        ids: Vec::new(),
        networks: BTreeMap::new(),
        balloon: None,
    };
    for (index, device) in config.virtio_devices().into_iter().enumerate() {
        let slot = Slot::new(index)?;
        let label = format!("{}/{}", outside.id, device.name());
        let place = (slot, &*label);
        let parts = make(host, place, device, (ram, outside), &mut subscribers)?;
        let id = plug_in(vm, mmio, &host.events, parts, on_panic(outside, label))?;
        subscribers.ids.push(id);
    }
    Ok(subscribers)
}

fn make(
    host: &Host,
    (slot, label): (Slot, &str),
    device: VirtioDevice<'_>,
    (ram, outside): (&Ram, &Outside),
    handles: &mut Subscribers,
) -> Result<Attachment, StartError> {
    let memory = Arc::new(ram.memory().clone());
    let allowance = outside.allowance.clone();
    match device {
        VirtioDevice::Drive(drive) => {
            let disk = Disk::open_locked(drive)?;
            let (parts, closing) =
                attach_block(slot, label, disk, memory, allowance).map_err(StartError::EventFd)?;
            outside.closings.add(closing);
            Ok(parts)
        }
        VirtioDevice::Network(interface) => {
            let tap = start::open_tap(interface)?;
            let device = Net::new(tap, interface, allowance.clone());
            let device = device.map_err(StartError::EventFd)?;
            let networks = &mut handles.networks;
            networks.insert(interface.iface_id.clone(), device.limits());
            virtio::attach(slot, label, device, memory, allowance).map_err(StartError::EventFd)
        }
        VirtioDevice::Entropy(entropy) => {
            let throttle = Throttle::new(entropy.rate_limiter.as_ref());
            let device = Entropy::new(throttle.map_err(StartError::EventFd)?, allowance.clone());
            virtio::attach(slot, label, device, memory, allowance).map_err(StartError::EventFd)
        }
        VirtioDevice::Balloon(balloon) => {
            let counts = outside.balloon_counts.clone();
            let device = Balloon::new(&balloon, &ram.discard(), &host.discards, counts);
            let device = device.map_err(StartError::EventFd)?;
            handles.balloon = Some(device.handle());
            virtio::attach(slot, label, device, memory, allowance).map_err(StartError::EventFd)
        }
        VirtioDevice::Vsock(vsock) => {
            let socket = start::bind_vsock(vsock)?;
            let counts = outside.vsock_counts.clone();
            let device = Vsock::new(socket, vsock.guest_cid, counts, allowance.clone());
            let device = device.map_err(StartError::EventFd)?;
            virtio::attach(slot, label, device, memory, allowance).map_err(StartError::EventFd)
        }
    }
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
