//! Samepage: vmm.
