//! Compiling a [`KernelSpec`] for a device, once.

use std::collections::HashMap;
use std::sync::Arc;

use super::tuning::Tuning;
use super::{Access, KernelSpec, link, self_test};
use crate::device::{Device, DeviceError, ShaderChecks};

/// Why a kernel can not run on a device.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The driver or wgpu refused the shader.
    #[error("kernel {kernel} does not compile on this device: {reason}")]
    Compile {
        /// Name of the kernel.
        kernel: &'static str,
        /// wgpu's words.
        reason: String,
    },
    /// The adapter offers too little.
    #[error("kernel {kernel} needs {needed} {what}; this adapter allows {limit}")]
    Limit {
        /// Name of the kernel.
        kernel: &'static str,
        /// What there is too little of.
        what: &'static str,
        /// How much the kernel needs.
        needed: u64,
        /// How much there is.
        limit: u64,
    },
    /// Cooperative matrices compute wrongly.
    #[error(
        "the self-test of cooperative matrices failed in {kernel}: {reason}; choose another tier than 'cooperative'"
    )]
    SelfTest {
        /// Name of the kernel.
        kernel: &'static str,
        /// What differed.
        reason: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A compiled kernel with its layout.
#[derive(Debug)]
pub struct Pipeline {
    pub(crate) raw: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    name: &'static str,
    bindings: usize,
    immediate_bytes: u32,
}

/// A buffer, or a range of one, for a binding.
#[derive(Clone, Copy, Debug)]
pub enum Slot<'a> {
    /// The whole buffer.
    Whole(&'a wgpu::Buffer),
    /// `length` bytes from `offset`.
    Range(&'a wgpu::Buffer, u64, u64),
}

impl<'a> From<&'a wgpu::Buffer> for Slot<'a> {
    fn from(buffer: &'a wgpu::Buffer) -> Self {
        Self::Whole(buffer)
    }
}

impl Pipeline {
    /// Links and compiles `spec`.
    ///
    /// # Errors
    /// [`KernelError::Compile`] with wgpu's message, [`KernelError::Limit`].
    pub fn new(device: &Device, spec: &KernelSpec) -> Result<Self, KernelError> {
        let limits = device.limits();
        let allowed = u64::from(limits.max_storage_buffers_per_shader_stage);
        if spec.bindings.len() as u64 > allowed {
            let needed = spec.bindings.len() as u64;
            return Err(KernelError::Limit { kernel: spec.name, what: "storage bindings", needed, limit: allowed });
        }
        let linked = link(spec);
        let scope = device.raw.push_error_scope(wgpu::ErrorFilter::Validation);
        let entries: Vec<_> =
            (0_u32..).zip(spec.bindings).map(|(binding, (_, access))| entry(binding, *access)).collect();
        let layout = device
            .raw
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(spec.name), entries: &entries });
        let pipeline_layout = device.raw.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(spec.name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: spec.immediate_bytes,
        });
        let module = shader_module(device, spec.name, &linked.wgsl);
        let raw = device.raw.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(spec.name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                // Every kernel writes workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        if let Some(error) = pollster::block_on(scope.pop()) {
            // On a device that is gone nothing compiles.
            device.wait()?;
            return Err(KernelError::Compile { kernel: spec.name, reason: error.to_string() });
        }
        let immediate_bytes = spec.immediate_bytes;
        Ok(Self { raw, layout, name: spec.name, bindings: spec.bindings.len(), immediate_bytes })
    }

    /// The kernel's name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Bytes of immediate data that a dispatch must set.
    pub const fn immediate_bytes(&self) -> u32 {
        self.immediate_bytes
    }

    /// Binds buffers in the order of the spec's bindings.
    ///
    /// # Panics
    /// When the number of slots is not the number of bindings.
    pub fn bind(&self, device: &Device, slots: &[Slot<'_>]) -> wgpu::BindGroup {
        assert_eq!(slots.len(), self.bindings, "kernel {} should get {} bindings", self.name, self.bindings);
        let entries: Vec<_> = (0_u32..)
            .zip(slots)
            .map(|(binding, slot)| {
                let resource = match *slot {
                    Slot::Whole(buffer) => buffer.as_entire_binding(),
                    Slot::Range(buffer, offset, length) => wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer,
                        offset,
                        size: wgpu::BufferSize::new(length),
                    }),
                };
                wgpu::BindGroupEntry { binding, resource }
            })
            .collect();
        device.raw.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(self.name),
            layout: &self.layout,
            entries: &entries,
        })
    }
}

fn entry(binding: u32, access: Access) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: access == Access::Read },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    }
}

fn shader_module(device: &Device, label: &str, wgsl: &str) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor { label: Some(label), source: wgpu::ShaderSource::Wgsl(wgsl.into()) };
    match device.checks() {
        ShaderChecks::Full => device.raw.create_shader_module(descriptor),
        ShaderChecks::BoundsOnly => {
            let mut checks = wgpu::ShaderRuntimeChecks::checked();
            checks.force_loop_bounding = false;
            checks.int_div_checks = false;
            trusted_module(&device.raw, descriptor, checks)
        }
    }
}

#[expect(unsafe_code, reason = "the one place where shader checks are relaxed; see the SAFETY comment")]
fn trusted_module(
    device: &wgpu::Device,
    descriptor: wgpu::ShaderModuleDescriptor<'_>,
    checks: wgpu::ShaderRuntimeChecks,
) -> wgpu::ShaderModule {
    // SAFETY: only texts compiled into this crate come here. Every loop in them moves one variable in fixed steps to a
    // bound that does not change inside the loop, so none is infinite; every integer divisor is a constant of the
    // prelude and not zero. Bounds checks stay on. The same texts run fully checked in the tests.
    unsafe { device.create_shader_module_trusted(descriptor, checks) }
}

/// Pipelines by spec: compiled at first use, shared afterwards; and how kernels are to be launched.
#[derive(Debug, Default)]
pub struct PipelineCache {
    tuning: Arc<Tuning>,
    /// Whether cooperative matrices have passed their self-test.
    self_tested: bool,
    pipelines: HashMap<KernelSpec, Arc<Pipeline>>,
}

impl PipelineCache {
    /// An empty cache of kernels that are launched as `tuning` says.
    pub fn new(tuning: impl Into<Arc<Tuning>>) -> Self {
        Self { tuning: tuning.into(), ..Self::default() }
    }

    /// An empty cache that compiles what the self-test is about to judge.
    pub(super) fn for_self_test() -> Self {
        Self { self_tested: true, ..Self::default() }
    }

    /// Launches kernels as `tuning` says from now on; what is compiled stays.
    pub fn tune(&mut self, tuning: impl Into<Arc<Tuning>>) {
        self.tuning = tuning.into();
    }

    /// How kernels are launched.
    pub fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    /// The pipeline of `spec`.
    ///
    /// # Errors
    /// As [`Pipeline::new`].
    pub fn get(&mut self, device: &Device, spec: &KernelSpec) -> Result<Arc<Pipeline>, KernelError> {
        if let Some(pipeline) = self.pipelines.get(spec) {
            return Ok(Arc::clone(pipeline));
        }
        if spec.is_cooperative() && !self.self_tested {
            self_test::run(device)?;
            self.self_tested = true;
        }
        let pipeline = Arc::new(Pipeline::new(device, spec)?);
        self.pipelines.insert(spec.clone(), Arc::clone(&pipeline));
        Ok(pipeline)
    }
}
