//! Where guests come from: Debian packages, fetched, verified and cached, and the initramfs made
//! from them.
//!
//! ```no_run
//! use image::{DEFAULT_SUITE, Flavour, Options, default_image};
//! let guest = default_image(DEFAULT_SUITE, Flavour::Cloud, &Options::default())?;
//! println!("{} {}", guest.kernel.display(), guest.initrd.display());
//! # Ok::<(), image::Error>(())
//! ```
//!
//! What it does, in the order to read it: [`guest`] is the entry and the cache of built small images;
//! [`mirror`] finds a mirror ([`apt`], [`proxy`]: the host's settings, [`host`]); [`repository`] loads a
//! suite's index over [`http`], checked by [`openpgp`] and [`release`]; [`deb`] opens packages ([`ar`]),
//! `unpack` writes them to disk; [`initramfs`] puts together what boots ([`kmod`], [`cpio`],
//! `init.sh`).
//!
//! Whole systems on disks: [`mod@reference`] is how they are named, [`build`] makes them of what [`mod@resolve`] chooses
//! (by [`relation`]s), laid out by `rootfs`; [`store`] is where they stay.
//!
//! What it does not: it runs nothing of what it fetches on the host (maintainer scripts run in a guest, for which [`Machine`] stands), and
//! never writes outside its cache, its store and the directory given to [`unpack_deb`].
//!
//! Everything from the network or from a package file is taken for hostile until its signature or hash
//! is checked, and malformed after that all the same: sizes are bounded, arithmetic is checked.

#![forbid(unsafe_code)]

pub mod apt;
pub mod ar;
pub mod build;
pub mod cache;
pub mod cpio;
pub mod deb;
pub mod deb822;
mod error;
pub mod guest;
pub mod host;
pub mod http;
pub mod initramfs;
pub mod kmod;
pub mod mirror;
pub mod names;
pub mod openpgp;
pub mod proxy;
pub mod reference;
pub mod relation;
pub mod release;
pub mod repository;
pub mod resolve;
mod rootfs;
pub mod store;
mod unpack;

pub use build::{BuildGuest, Machine, Pulled, boot_files, pull};
pub use deb::unpack_deb;
pub use error::{Error, Result};
pub use guest::{
    DEFAULT_SUITE, Flavour, GuestImage, Options, PROMPT, default_image, fetch_closure, fetch_packages, prune_cache,
};
pub use host::Host;
pub use http::Progress;
pub use initramfs::agent_archive;
pub use reference::Reference;
pub use store::{Image, ImageStore};
