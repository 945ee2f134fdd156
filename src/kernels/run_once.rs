//! One dispatch of one kernel over operands given as bytes: for checking kernels one by one.

use super::{KernelError, KernelSpec, PipelineCache, Recorder, Slot};
use crate::device::Device;
use crate::device::staging::{Uploader, download};
use crate::geometry::Bytes;

/// Uploads `operands` in binding order, dispatches once, and returns the contents of every binding.
///
/// # Errors
/// [`KernelError`].
///
/// # Panics
/// When the operands are not one per binding.
pub fn run_once<I: bytemuck::Pod>(
    device: &Device,
    cache: &mut PipelineCache,
    spec: &KernelSpec,
    operands: &[&[u8]],
    immediates: &I,
    grid: [u32; 3],
) -> Result<Vec<Vec<u8>>, KernelError> {
    let pipeline = cache.get(device, spec)?;
    let mut uploader = Uploader::new(device, "staging", Bytes::mib(1))?;
    let mut buffers = Vec::with_capacity(operands.len());
    for bytes in operands {
        let buffer = device.storage("operand", Bytes(bytes.len() as u64))?;
        uploader.upload(device, bytes, &buffer, 0)?;
        buffers.push(buffer);
    }
    let slots: Vec<_> = buffers.iter().map(Slot::Whole).collect();
    let group = pipeline.bind(device, &slots);
    let mut encoder = device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let mut recorder = Recorder::new(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
    recorder.dispatch(&pipeline, &group, immediates, grid);
    drop(recorder);
    device.submit(encoder)?;
    let read = |(buffer, bytes): (&wgpu::Buffer, &&[u8])| download(device, buffer, 0, bytes.len());
    Ok(buffers.iter().zip(operands).map(read).collect::<Result<_, _>>()?)
}
