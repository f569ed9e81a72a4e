"""Boots a Linux guest with a balloon by the client `Api` of the package firecracker-python, pauses and resumes it.

usage: drive_vm.py SOCKET VMLINUX INITRAMFS BOOT_ARGS
"""

import os
import sys

from firecracker.api import Api, Resource
from firecracker.exceptions import APIError

socket, vmlinux, initramfs, boot_args = sys.argv[1:]
api = Api(socket)
assert api.describe.get().json()["state"] == "Not started"
assert api.version.get().json()["firecracker_version"]

api.machine_config.put(vcpu_count=1, mem_size_mib=128)
api.machine_config.patch(mem_size_mib=160)
try:
    api.boot.put(kernel_image_path="/nowhere/vmlinux")
    sys.exit("a kernel that is not there was taken")
except APIError as error:
    assert "/nowhere/vmlinux" in str(error), error
api.boot.put(kernel_image_path=vmlinux, initrd_path=initramfs, boot_args=boot_args)
balloon, statistics = Resource(api, "/balloon"), Resource(api, "/balloon/statistics")
balloon.put(amount_mib=8, deflate_on_oom=True, stats_polling_interval_s=1)
api.vsock.put(guest_cid=3, uds_path=f"{socket}.vsock")
api.actions.put(action_type="InstanceStart")
assert api.describe.get().json()["state"] == "Running"

balloon.patch(amount_mib=16)
statistics.patch(stats_polling_interval_s=2)
set_up = balloon.get().json()
assert (set_up["amount_mib"], set_up["stats_polling_interval_s"]) == (16, 2), set_up
assert statistics.get().json()["target_mib"] == 16
for refused in (lambda: balloon.patch(amount_mib=161), lambda: statistics.patch(stats_polling_interval_s=0)):
    try:
        refused()
        sys.exit("more than the guest's memory, or an end of statistics, was taken")
    except APIError as error:
        assert "balloon." in str(error), error

api.vm.patch(state="Paused")
assert api.describe.get().json()["state"] == "Paused"
api.vm.patch(state="Resumed")
assert api.describe.get().json()["state"] == "Running"
config = api.vm_config.get().json()
assert config["machine-config"]["mem_size_mib"] == 160, config
assert config["vsock"] == {"guest_cid": 3, "uds_path": f"{socket}.vsock"}, config
assert os.path.exists(f"{socket}.vsock")
api.close()
