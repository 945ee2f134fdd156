//! The device room: which adapter, what it can do, and how bytes get on and off it.
//!
//! * [`AdapterRequest`] chooses an adapter by index, name or automatically, and [`Device::open`] asks for the
//!   adapter's real limits, because the portable defaults are small.
//! * [`Tier`] is chosen once, when the device is opened: *portable* uses nothing beyond core WGSL and immediates,
//!   *subgroup* replaces workgroup-memory reductions with subgroup operations, *cooperative* multiplies on cooperative matrices,
//!   which an adapter must offer, a user ask for, and a self-test pass. All pass the same tests.
//! * Every allocation goes through [`Device::allocate`], inside an out-of-memory error scope, so that a device that
//!   is full is an error with the numbers.
//! * Bulk bytes travel through persistent mapped buffers ([`staging`]); `Queue::write_buffer` is never used for them,
//!   since it allocates and copies behind our back.
//! * [`timing`] measures with device timestamps where the adapter has them, and says so when it can not.
//! * A device that is lost is an error, [`DeviceError::Lost`], from every submission, wait and map; nothing on it can be used
//!   again, and another one can be opened ([`loss`]).

pub mod loss;
pub mod select;
pub mod staging;
pub mod timing;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::geometry::Bytes;

use loss::Trouble;
pub use select::{AdapterChoice, AdapterRequest, AdapterSummary, default_adapter, list_adapters};

/// What went wrong between the host and the device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The machine offers no adapter of the wanted backends.
    #[error(
        "no GPU adapter found ({backends}){}",
        if backends.contains("vulkan") {
            "; install a Vulkan driver (for a software one on Debian or Ubuntu: apt-get install mesa-vulkan-drivers)"
        } else {
            "; try another --backend, or none"
        }
    )]
    NoAdapter {
        /// The backends that were asked.
        backends: String,
    },
    /// There are adapters, but none fits the request.
    #[error("no adapter matches '{request}'; there {} {}", if available.len() == 1 { "is" } else { "are" }, available.join(", "))]
    UnknownAdapter {
        /// What was asked for.
        request: String,
        /// What there is, with indices.
        available: Vec<String>,
    },
    /// The adapter lacks something that every kernel needs.
    #[error("adapter '{adapter}' lacks {feature}, which every kernel here needs")]
    MissingFeature {
        /// Name of the adapter.
        adapter: String,
        /// Name of the missing feature.
        feature: &'static str,
    },
    /// The adapter lacks something that a tier needs.
    #[error("adapter '{adapter}' can not run the {tier} tier: it lacks {feature}; choose a lower tier, or none")]
    TierMissing {
        /// Name of the adapter.
        adapter: String,
        /// The tier that was asked for.
        tier: Tier,
        /// What is missing.
        feature: &'static str,
    },
    /// The driver refused to open the device.
    #[error("adapter '{adapter}' could not be opened: {reason}")]
    Open {
        /// Name of the adapter.
        adapter: String,
        /// The driver's words.
        reason: String,
    },
    /// An allocation did not fit in device memory.
    #[error("the device could not allocate {bytes} ({}) for {label}", bytes.0)]
    OutOfMemory {
        /// What the buffer was for.
        label: String,
        /// Its size.
        bytes: Bytes,
    },
    /// A buffer is larger than the adapter can hold or bind.
    #[error("{label} needs a buffer of {bytes} ({}), but this adapter's limit is {limit} ({})", bytes.0, limit.0)]
    TooLarge {
        /// What the buffer was for.
        label: String,
        /// Its size.
        bytes: Bytes,
        /// The adapter's limit.
        limit: Bytes,
    },
    /// The device ran out of memory for something besides a buffer.
    #[error("the device ran out of memory: {0}")]
    NoMemory(String),
    /// The device is gone, and everything on it.
    #[error("the device was lost: {0}")]
    Lost(String),
}

/// Which functions the shaders may use. Chosen once, when the device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Core WGSL and immediates only; reductions go through workgroup memory.
    Portable,
    /// Reductions use subgroup operations.
    Subgroup,
    /// Products of many rows, and prefill, are computed on cooperative matrices of f16. Only on request, and only after a
    /// self-test.
    Cooperative,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Portable => "portable",
            Self::Subgroup => "subgroup",
            Self::Cooperative => "cooperative",
        })
    }
}

/// How much checking the driver compiles into a shader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShaderChecks {
    /// Everything wgpu offers. Tests run with it.
    Full,
    /// Bounds checks stay on; loop bounding is off, because it alone costs a factor of 1.7 to 3.4 in decode.
    BoundsOnly,
}

impl ShaderChecks {
    /// [`Self::Full`] where debug assertions are compiled in, [`Self::BoundsOnly`] otherwise.
    pub const fn by_build() -> Self {
        if cfg!(debug_assertions) { Self::Full } else { Self::BoundsOnly }
    }
}

#[expect(unsafe_code, reason = "wgpu's way to admit features that may still have bugs; see the SAFETY comment")]
fn experimental(tier: Tier) -> wgpu::ExperimentalFeatures {
    match tier {
        Tier::Portable | Tier::Subgroup => wgpu::ExperimentalFeatures::disabled(),
        // SAFETY: wgpu asks callers to know that experimental features may be undefined behaviour through its own bugs. Of these
        // cooperative matrices alone are used, in texts of this crate that passed validation, on request of the user, and
        // no kernel with them is compiled for use before `kernels::self_test` has run it against the portable one.
        Tier::Cooperative => unsafe { wgpu::ExperimentalFeatures::enabled() },
    }
}

/// An open device: the one place that holds `wgpu`'s device and queue.
#[derive(Debug)]
pub struct Device {
    pub(crate) raw: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    summary: AdapterSummary,
    tier: Tier,
    checks: ShaderChecks,
    trouble: Trouble,
    buffers_made: AtomicU64,
    /// What was submitted last.
    submitted: Mutex<Option<wgpu::SubmissionIndex>>,
}

impl Device {
    /// Opens the adapter that `request` names, with all of its limits.
    ///
    /// # Errors
    /// [`DeviceError`] when nothing matches or the driver refuses.
    pub fn open(request: &AdapterRequest) -> Result<Self, DeviceError> {
        let (adapter, summary) = select::find(request)?;
        Self::from_adapter(&adapter, summary, request.tier, ShaderChecks::by_build())
    }

    /// Opens a device of the `noop` backend: it validates every call and computes nothing.
    #[doc(hidden)]
    pub fn open_noop() -> Result<Self, DeviceError> {
        let (adapter, summary) = select::find_noop()?;
        Self::from_adapter(&adapter, summary, None, ShaderChecks::Full)
    }

    fn from_adapter(
        adapter: &wgpu::Adapter,
        summary: AdapterSummary,
        tier: Option<Tier>,
        checks: ShaderChecks,
    ) -> Result<Self, DeviceError> {
        let available = adapter.features();
        if !available.contains(wgpu::Features::IMMEDIATES) {
            return Err(DeviceError::MissingFeature { adapter: summary.name, feature: "immediates (push constants)" });
        }
        let tier = tier.unwrap_or(summary.tier);
        let lacks = |feature| Err(DeviceError::TierMissing { adapter: summary.name.clone(), tier, feature });
        if tier >= Tier::Subgroup && summary.tier < Tier::Subgroup {
            return lacks("subgroup operations");
        }
        if tier == Tier::Cooperative && !summary.cooperative {
            return lacks(
                "16 x 16 x 16 cooperative matrices of f16 with f32 sums, 32 lanes to a subgroup and 48 KiB to a workgroup",
            );
        }
        let features = wgpu::Features::IMMEDIATES
            | (available & wgpu::Features::TIMESTAMP_QUERY)
            | match tier {
                Tier::Portable => wgpu::Features::empty(),
                Tier::Subgroup => wgpu::Features::SUBGROUP,
                Tier::Cooperative => wgpu::Features::SUBGROUP | select::COOPERATIVE_FEATURES,
            };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("concertina"),
            required_features: features,
            required_limits: adapter.limits(),
            experimental_features: experimental(tier),
            ..Default::default()
        };
        let (raw, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|e| DeviceError::Open { adapter: summary.name.clone(), reason: e.to_string() })?;
        let trouble = Trouble::of(&raw);
        Ok(Self {
            raw,
            queue,
            summary,
            tier,
            checks,
            trouble,
            buffers_made: AtomicU64::new(0),
            submitted: Mutex::new(None),
        })
    }

    /// The adapter behind this device.
    pub const fn summary(&self) -> &AdapterSummary {
        &self.summary
    }

    /// The feature tier that was chosen.
    pub const fn tier(&self) -> Tier {
        self.tier
    }

    /// How shaders are checked.
    pub const fn checks(&self) -> ShaderChecks {
        self.checks
    }

    /// The device's limits.
    pub fn limits(&self) -> wgpu::Limits {
        self.raw.limits()
    }

    /// Largest buffer that one binding can show to a shader, rounded down to 256 bytes.
    pub fn max_binding(&self) -> Bytes {
        let limits = self.limits();
        Bytes(limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) / 256 * 256)
    }

    /// Buffers made so far.
    pub fn buffers_made(&self) -> u64 {
        self.buffers_made.load(Ordering::Relaxed)
    }

    /// Allocates a buffer; a full device is an error, not a panic.
    ///
    /// # Errors
    /// [`DeviceError::TooLarge`] above the adapter's limits, [`DeviceError::OutOfMemory`] when memory is short,
    /// [`DeviceError::Lost`].
    pub fn allocate(&self, label: &str, bytes: Bytes, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer, DeviceError> {
        let bytes = bytes.align_up(16);
        let limit = if usage.contains(wgpu::BufferUsages::STORAGE) {
            self.max_binding()
        } else {
            Bytes(self.limits().max_buffer_size)
        };
        if bytes > limit {
            return Err(DeviceError::TooLarge { label: label.to_owned(), bytes, limit });
        }
        let out_of_memory = self.raw.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size: bytes.0, usage, mapped_at_creation: false };
        let buffer = self.raw.create_buffer(&descriptor);
        self.buffers_made.fetch_add(1, Ordering::Relaxed);
        match pollster::block_on(out_of_memory.pop()) {
            None => self.check().map(|()| buffer),
            Some(_) => Err(DeviceError::OutOfMemory { label: label.to_owned(), bytes }),
        }
    }

    /// A storage buffer that shaders and copies can use.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    pub fn storage(&self, label: &str, bytes: Bytes) -> Result<wgpu::Buffer, DeviceError> {
        use wgpu::BufferUsages as Usage;
        self.allocate(label, bytes, Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC)
    }
}
