//! Samepage: api.
