//! Choosing an adapter: by index, by name, or the fastest kind there is.

use std::str::FromStr;

use serde::Serialize;

use super::{DeviceError, Tier};
use crate::geometry::Bytes;

/// How the user names an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AdapterChoice {
    /// Discrete before integrated before virtual before software; ties by index.
    #[default]
    Auto,
    /// Position in `concertina devices`.
    Index(usize),
    /// Part of the adapter's name, in any case.
    Name(String),
}

impl FromStr for AdapterChoice {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match (text, text.parse()) {
            ("auto", _) => Self::Auto,
            (_, Ok(index)) => Self::Index(index),
            _ => Self::Name(text.to_owned()),
        })
    }
}

/// Which adapter to open and how.
#[derive(Clone, Debug, Default)]
pub struct AdapterRequest {
    /// The adapter.
    pub choice: AdapterChoice,
    /// Only this graphics API: `vulkan`, `metal` or `dx12`.
    pub backend: Option<String>,
    /// A lower tier than the adapter could run, for tests and comparisons.
    pub tier: Option<Tier>,
}

/// What `concertina devices` shows about one adapter.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterSummary {
    /// Position among all adapters, usable as `--device INDEX`.
    pub index: usize,
    /// The driver's name for the adapter.
    pub name: String,
    /// `vulkan`, `metal`, `dx12`.
    pub backend: String,
    /// `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    pub kind: String,
    /// Driver and its version.
    pub driver: String,
    /// Best tier that the adapter can run.
    #[serde(serialize_with = "as_text")]
    pub tier: Tier,
    /// Whether the cooperative tier can be asked for.
    pub cooperative: bool,
    /// Smallest and largest subgroup.
    pub subgroup_sizes: (u32, u32),
    /// Largest buffer one binding can show.
    pub max_binding: Bytes,
    /// Largest buffer.
    pub max_buffer: Bytes,
    /// Workgroup memory of one workgroup.
    pub workgroup_memory: Bytes,
    /// Whether device timestamps exist.
    pub timestamps: bool,
}

fn as_text<S: serde::Serializer>(tier: &Tier, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(tier)
}

fn summarize(index: usize, adapter: &wgpu::Adapter) -> AdapterSummary {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let features = adapter.features();
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "cpu",
        wgpu::DeviceType::Other => "other",
    };
    AdapterSummary {
        index,
        name: info.name,
        backend: info.backend.to_str().to_owned(),
        kind: kind.to_owned(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        tier: if features.contains(wgpu::Features::SUBGROUP) { Tier::Subgroup } else { Tier::Portable },
        cooperative: is_cooperative(adapter),
        subgroup_sizes: (info.subgroup_min_size, info.subgroup_max_size),
        max_binding: Bytes(limits.max_storage_buffer_binding_size),
        max_buffer: Bytes(limits.max_buffer_size),
        workgroup_memory: Bytes(u64::from(limits.max_compute_workgroup_storage_size)),
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
    }
}

/// Features of the cooperative tier.
pub(super) const COOPERATIVE_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16);

/// Workgroup memory of its largest kernel, rounded up to what such adapters grant.
const COOPERATIVE_WORKGROUP_MEMORY: u32 = 48 * 1024;

/// Whether the adapter has matrices as the kernels are written: square ones of 16, and four subgroups to 128 lanes.
fn is_cooperative(adapter: &wgpu::Adapter) -> bool {
    use wgpu::CooperativeScalarType::{F16, F32};
    let info = adapter.get_info();
    let size = |m: &wgpu::CooperativeMatrixProperties| (m.m_size, m.n_size, m.k_size) == (16, 16, 16);
    adapter.features().contains(COOPERATIVE_FEATURES | wgpu::Features::SUBGROUP)
        && adapter.limits().max_compute_workgroup_storage_size >= COOPERATIVE_WORKGROUP_MEMORY
        && (info.subgroup_min_size, info.subgroup_max_size) == (32, 32)
        && adapter.cooperative_matrix_properties().iter().any(|m| size(m) && (m.ab_type, m.cr_type) == (F16, F32))
}

fn backends(name: Option<&str>) -> Result<wgpu::Backends, DeviceError> {
    match name {
        None => Ok(wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12),
        Some("vulkan") => Ok(wgpu::Backends::VULKAN),
        Some("metal") => Ok(wgpu::Backends::METAL),
        Some("dx12") => Ok(wgpu::Backends::DX12),
        Some(other) => Err(DeviceError::UnknownAdapter {
            request: format!("backend {other}"),
            available: ["vulkan", "metal", "dx12"].map(str::to_owned).to_vec(),
        }),
    }
}

fn enumerate(backends: wgpu::Backends) -> Vec<(wgpu::Adapter, AdapterSummary)> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    // Validation of indirect calls halves the largest buffer and serves a call that is never made here.
    descriptor.flags = wgpu::InstanceFlags::empty();
    let instance = wgpu::Instance::new(descriptor);
    let adapters = pollster::block_on(instance.enumerate_adapters(backends));
    let summaries: Vec<_> = adapters.iter().enumerate().map(|(i, a)| summarize(i, a)).collect();
    adapters.into_iter().zip(summaries).collect()
}

/// Every adapter of the wanted backend.
///
/// # Errors
/// [`DeviceError::UnknownAdapter`] for a backend that does not exist.
pub fn list_adapters(backend: Option<&str>) -> Result<Vec<AdapterSummary>, DeviceError> {
    Ok(enumerate(backends(backend)?).into_iter().map(|(_, summary)| summary).collect())
}

/// Position of the adapter that `auto` takes: discrete before integrated before virtual before software.
pub fn default_adapter<'a>(summaries: impl Iterator<Item = &'a AdapterSummary>) -> Option<usize> {
    let rank = |kind: &str| ["discrete", "integrated", "virtual", "other", "cpu"].iter().position(|k| *k == kind);
    summaries.enumerate().min_by_key(|(i, s)| (rank(&s.kind), *i)).map(|(i, _)| i)
}

pub(super) fn find(request: &AdapterRequest) -> Result<(wgpu::Adapter, AdapterSummary), DeviceError> {
    let wanted = backends(request.backend.as_deref())?;
    let mut adapters = enumerate(wanted);
    if adapters.is_empty() {
        let backends = request.backend.clone().unwrap_or_else(|| "vulkan, metal, dx12".to_owned());
        return Err(DeviceError::NoAdapter { backends });
    }
    let position = match &request.choice {
        AdapterChoice::Auto => default_adapter(adapters.iter().map(|(_, summary)| summary)),
        AdapterChoice::Index(index) => (*index < adapters.len()).then_some(*index),
        AdapterChoice::Name(name) => {
            let name = name.to_lowercase();
            adapters.iter().position(|(_, s)| s.name.to_lowercase().contains(&name))
        }
    };
    match position {
        Some(position) => Ok(adapters.swap_remove(position)),
        None => Err(DeviceError::UnknownAdapter {
            request: match &request.choice {
                AdapterChoice::Index(index) => index.to_string(),
                AdapterChoice::Name(name) => name.clone(),
                AdapterChoice::Auto => "auto".to_owned(),
            },
            available: adapters.iter().map(|(_, s)| format!("{}: {}", s.index, s.name)).collect(),
        }),
    }
}

pub(super) fn find_noop() -> Result<(wgpu::Adapter, AdapterSummary), DeviceError> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::NOOP;
    descriptor.backend_options.noop.enable = true;
    let instance = wgpu::Instance::new(descriptor);
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::NOOP));
    let adapter = adapters.into_iter().next();
    let adapter = adapter.ok_or_else(|| DeviceError::NoAdapter { backends: "noop".to_owned() })?;
    let summary = summarize(0, &adapter);
    Ok((adapter, summary))
}
