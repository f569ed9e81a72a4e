//! What a pageload guest writes into its pages.
#![no_std]
