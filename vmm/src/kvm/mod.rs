//! KVM: a VM with its interrupt controllers, and vCPUs that can be stopped at any moment.

pub(crate) mod cpuid;
#[expect(unsafe_code, reason = "an ioctl for which kvm-ioctls has no function")]
pub(crate) mod dirty_log;
pub(crate) mod exit;
pub(crate) mod gate;
pub(crate) mod registers;
#[expect(
    unsafe_code,
    reason = "reads and writes the page that KVM shares with a vCPU"
)]
pub(crate) mod run_page;
pub(crate) mod vcpu;
#[expect(unsafe_code, reason = "hands guest memory to KVM by its host address")]
pub(crate) mod vm;

/// A KVM call that failed, and which.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {error}")]
pub struct KvmError {
    call: &'static str,
    #[source]
    error: kvm_ioctls::Error,
}

impl KvmError {
    /// For `map_err`: names the call.
    pub(crate) fn of(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
        move |error| KvmError { call, error }
    }

    /// The system's answer, without the call's name.
    pub(crate) fn to_os_error(&self) -> std::io::Error {
        std::io::Error::from_raw_os_error(self.error.errno())
    }
}
