//! What a Vulkan driver's compiler makes of our kernels: registers, spills, instructions, workgroup memory.
//!
//! Nothing is run, so the card need not exist: Mesa's driver for AMD cards, which comes in the same package as the software
//! adapter that tests use, compiles for any of them. A kernel whose registers spill is named at the end, and the exit code is 1.
//!
//! ```text
//! cargo run --release --example compiled_kernels -- kivi4 4 128 decode        # CODEC [GROUP_SIZE [HEAD_DIM [PART OF A NAME]]]
//! RADV_FORCE_FAMILY=navi21 VK_ICD_FILENAMES=/usr/share/vulkan/icd.d/radeon_icd.x86_64.json \
//!   cargo run --release --example compiled_kernels -- kivi4                   # for a Radeon RX 6800, without one
//! ```
//!
//! Drivers give statistics under names of their own (`VK_KHR_pipeline_executable_properties`). Registers limit how many workgroups run
//! at once; a loop's instructions are counted once, however often it runs.

use std::collections::HashSet;
use std::ffi::CStr;
use std::process::ExitCode;

use ash::vk;
use concertina::compression::hidden::HiddenCodec;
use concertina::device::Tier;
use concertina::geometry::HeadGeometry;
use concertina::kernels::append::Positions;
use concertina::kernels::attention::{CacheShape, Format};
use concertina::kernels::decode::{DecodeSpec, DecodeTuning};
use concertina::kernels::gather::GatherTuning;
use concertina::kernels::matmul::Product;
use concertina::kernels::prefill::{PrefillSpec, PrefillTuning};
use concertina::kernels::product_tuning::ProductTuning;
use concertina::kernels::score::ScoreTuning;
use concertina::kernels::seal::SealSpec;
use concertina::kernels::{
    KernelSpec, append, gather, key_scores, link, merge_states, registry, sample, score, select,
};
use naga::back::spv;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<ExitCode, Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |i: usize, otherwise: &str| arguments.get(i).map_or(otherwise, String::as_str).to_owned();
    let codec: HiddenCodec = argument(0, "kivi4").parse()?;
    let (group, head_dim): (u32, u32) = (argument(1, "4").parse()?, argument(2, "128").parse()?);
    let heads = HeadGeometry { num_qo_heads: 8 * group, num_kv_heads: 8, head_dim };
    heads.check()?;
    let shape = CacheShape { heads, page_size: registry::DEFAULT_PAGE_SIZE };
    codec.check(shape.page())?;
    let wanted = argument(3, "");
    let compiler = Compiler::new()?;
    println!("{}", compiler.name);
    let (mut seen, mut spilled) = (HashSet::new(), Vec::new());
    for (name, spec) in kernels(&shape.format(codec)) {
        // Several launches of products share a text, and few compilers know cooperative matrices.
        if !name.contains(&wanted) || spec.is_cooperative() || !seen.insert(spec.clone()) {
            continue;
        }
        let statistics = compiler.statistics(&spirv(&spec)?)?;
        let words: Vec<String> = statistics.iter().map(|(name, value)| format!("{name} {value}")).collect();
        println!("{name}: {}", words.join(", "));
        if statistics.iter().any(|(name, value)| is_spill(name) && *value > 0) {
            spilled.push(name);
        }
    }
    if spilled.is_empty() {
        println!("no kernel spills registers");
        return Ok(ExitCode::SUCCESS);
    }
    println!("registers spill in: {}", spilled.join(", "));
    Ok(ExitCode::FAILURE)
}

/// Whether a statistic counts what did not stay in registers, as drivers of AMD, Intel and NVIDIA name it. Scalar registers of
/// AMD cards spill into vector registers, which costs little.
fn is_spill(name: &str) -> bool {
    let name = name.to_lowercase();
    ["spilled vgprs", "scratch", "spill count", "local memory"].iter().any(|part| name.contains(part))
}

/// Every kernel of a format, and products, under the names of their launches.
fn kernels(format: &Format) -> Vec<(String, KernelSpec)> {
    let mut kernels = Vec::new();
    for tuning in DecodeTuning::candidates(format) {
        let spec = DecodeSpec { format: *format, tier: Tier::Subgroup, tuning };
        kernels.push((format!("decode {tuning}"), spec.kernel()));
    }
    for tuning in PrefillTuning::candidates(format) {
        kernels.push((format!("prefill {tuning}"), PrefillSpec::new(*format, tuning).kernel()));
    }
    for tuning in ScoreTuning::candidates() {
        kernels.push((format!("score {tuning}"), score::kernel(format, tuning)));
    }
    for tuning in GatherTuning::candidates() {
        kernels.push((format!("gather {tuning}"), gather::kernel(format, tuning)));
    }
    for tuning in ProductTuning::candidates() {
        let (product, name) = (Product::ALL[0], tuning.to_string());
        let (few, many) = name.split_once(',').unwrap_or((&name, &name));
        kernels.push((format!("matmul {many}"), product.matmul(tuning.many)));
        let of_rows = |rows| (format!("matvec of {rows} rows {few}"), product.matvec(rows, tuning.few));
        kernels.extend(tuning.few.rows(16).map(of_rows));
    }
    if format.codec.seals() {
        kernels.push(("seal".into(), SealSpec::new(*format).kernel()));
    }
    kernels.extend([
        ("key_scores".into(), key_scores::kernel(format)),
        ("append".into(), append::kernel(&format.shape, Positions::Rotary)),
        ("merge_states".into(), merge_states::kernel(&format.shape)),
        ("select".into(), select::select()),
        ("sample".into(), sample::kernel(Tier::Subgroup)),
    ]);
    kernels
}

/// SPIR-V as wgpu makes it for a release build: indices of arrays are clamped, loops are not bounded.
fn spirv(spec: &KernelSpec) -> Result<Vec<u32>, Error> {
    let (module, info) = link(spec).validate()?;
    let options = spv::Options {
        lang_version: (1, 6),
        bounds_check_policies: naga::proc::BoundsCheckPolicies {
            index: naga::proc::BoundsCheckPolicy::Restrict,
            ..Default::default()
        },
        force_loop_bounding: false,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        flags: spv::WriterFlags::empty(),
        ..Default::default()
    };
    let entry = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
    Ok(spv::write_vec(&module, &info, &options, Some(&entry))?)
}

/// A Vulkan device that only compiles.
struct Compiler {
    name: String,
    device: ash::Device,
    statistics: ash::khr::pipeline_executable_properties::Device,
    layout: vk::PipelineLayout,
    // Dropped after what came from it.
    _instance: ash::Instance,
    _entry: ash::Entry,
}

#[expect(unsafe_code, reason = "Vulkan without wgpu, which does not ask drivers for statistics")]
impl Compiler {
    /// The first device that gives statistics.
    fn new() -> Result<Self, Error> {
        // SAFETY: the library stays loaded as long as `_entry`, which outlives all that came from it; every structure handed over
        // lives until its call returns, and handles are of the objects that made them.
        unsafe {
            let entry = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let instance =
                entry.create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None)?;
            let extension = ash::khr::pipeline_executable_properties::NAME;
            let gives = |physical: &vk::PhysicalDevice| {
                instance.enumerate_device_extension_properties(*physical).is_ok_and(|extensions| {
                    extensions.iter().any(|e| e.extension_name_as_c_str().is_ok_and(|name| name == extension))
                })
            };
            let physical = instance.enumerate_physical_devices()?.into_iter().find(gives);
            let physical = physical.ok_or(
                "no Vulkan device here gives statistics of what it compiles. Mesa's driver for AMD cards does, without a card: set \
                 RADV_FORCE_FAMILY=navi21, and VK_ICD_FILENAMES to its radeon_icd file (package mesa-vulkan-drivers)",
            )?;
            let properties = instance.get_physical_device_properties(physical);
            let name = properties.device_name_as_c_str()?.to_string_lossy().into_owned();
            let mut executables =
                vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
            // What kernels use; a driver without one of them refuses the device.
            let mut eleven = vk::PhysicalDeviceVulkan11Features::default().storage_buffer16_bit_access(true);
            let mut twelve = vk::PhysicalDeviceVulkan12Features::default()
                .shader_int8(true)
                .shader_float16(true)
                .vulkan_memory_model(true)
                .vulkan_memory_model_device_scope(true);
            let mut thirteen = vk::PhysicalDeviceVulkan13Features::default()
                .shader_integer_dot_product(true)
                .subgroup_size_control(true)
                .maintenance4(true);
            let features = vk::PhysicalDeviceFeatures::default().robust_buffer_access(true);
            let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
            let extensions = [extension.as_ptr()];
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_extension_names(&extensions)
                .enabled_features(&features)
                .push_next(&mut executables)
                .push_next(&mut eleven)
                .push_next(&mut twelve)
                .push_next(&mut thirteen);
            let device = instance.create_device(physical, &info, None)?;
            let statistics = ash::khr::pipeline_executable_properties::Device::new(&instance, &device);
            let layout = Self::layout(&device)?;
            Ok(Self { name, device, statistics, layout, _instance: instance, _entry: entry })
        }
    }

    /// As many storage buffers and immediates as any kernel has.
    unsafe fn layout(device: &ash::Device) -> Result<vk::PipelineLayout, vk::Result> {
        let binding = |i| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(i)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let bindings: Vec<_> = (0..12).map(binding).collect();
        let immediates =
            [vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).offset(0).size(128)];
        // SAFETY: the device is alive, and what is handed over lives until the calls return.
        unsafe {
            let set = device.create_descriptor_set_layout(
                &vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings),
                None,
            )?;
            let info = vk::PipelineLayoutCreateInfo::default()
                .set_layouts(std::slice::from_ref(&set))
                .push_constant_ranges(&immediates);
            device.create_pipeline_layout(&info, None)
        }
    }

    /// Compiles, and asks what came of it: names and whole numbers.
    fn statistics(&self, words: &[u32]) -> Result<Vec<(String, u64)>, Error> {
        // SAFETY: as in `new`; the words are SPIR-V of a module that naga validated.
        unsafe {
            let module = self.device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(words), None)?;
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .flags(vk::PipelineShaderStageCreateFlags::ALLOW_VARYING_SUBGROUP_SIZE)
                .module(module)
                .name(c"main");
            let info = vk::ComputePipelineCreateInfo::default()
                .flags(vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR)
                .layout(self.layout)
                .stage(stage);
            let pipelines = self.device.create_compute_pipelines(vk::PipelineCache::null(), &[info], None);
            let pipeline = pipelines.map_err(|(_, error)| error)?[0];
            let executable = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline).executable_index(0);
            let found = self.statistics.get_pipeline_executable_statistics(&executable)?;
            self.device.destroy_pipeline(pipeline, None);
            self.device.destroy_shader_module(module, None);
            let number = |s: &vk::PipelineExecutableStatisticKHR<'_>| match s.format {
                vk::PipelineExecutableStatisticFormatKHR::UINT64 => Some(s.value.u64),
                vk::PipelineExecutableStatisticFormatKHR::INT64 => u64::try_from(s.value.i64).ok(),
                _ => None,
            };
            let name = |s: &vk::PipelineExecutableStatisticKHR<'_>| {
                CStr::from_ptr(s.name.as_ptr()).to_string_lossy().into_owned()
            };
            let named = found.iter().filter_map(|s| Some((name(s), number(s)?)));
            Ok(named.filter(|(name, _)| !name.to_lowercase().contains("hash")).collect())
        }
    }
}
