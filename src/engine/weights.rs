//! Weights on the device: each matrix in cells, each norm as it is.

use half::f16;

use crate::device::staging::Uploader;
use crate::device::{Device, DeviceError};
use crate::geometry::Bytes;
use crate::kernels::matmul::{pack, pack_pairs};
use crate::weights::{Matrix, Weights};

/// One matrix on the device.
#[derive(Debug)]
pub(super) struct DeviceMatrix {
    pub(super) buffer: wgpu::Buffer,
    pub(super) rows: u32,
    pub(super) cols: u32,
}

/// One layer on the device.
#[derive(Debug)]
pub(super) struct DeviceLayer {
    pub(super) attention_norm: wgpu::Buffer,
    pub(super) qkv: DeviceMatrix,
    pub(super) attention_output: DeviceMatrix,
    pub(super) ffn_norm: wgpu::Buffer,
    /// Rows of gate and up in turn.
    pub(super) gate_up: DeviceMatrix,
    pub(super) down: DeviceMatrix,
}

/// All weights on the device.
#[derive(Debug)]
pub(super) struct DeviceWeights {
    pub(super) embedding: DeviceMatrix,
    pub(super) layers: Vec<DeviceLayer>,
    pub(super) output_norm: wgpu::Buffer,
    /// `None` when the embedding serves.
    pub(super) output: Option<DeviceMatrix>,
    pub(super) bytes: Bytes,
}

struct Upload<'d> {
    device: &'d Device,
    uploader: Uploader,
    packed: Vec<f16>,
    bytes: Bytes,
}

impl Upload<'_> {
    fn vector(&mut self, values: &[f32]) -> Result<wgpu::Buffer, DeviceError> {
        let buffer = self.device.storage("norm", Bytes(size_of_val(values) as u64))?;
        self.uploader.upload(self.device, bytemuck::cast_slice(values), &buffer, 0)?;
        self.bytes += Bytes(buffer.size());
        Ok(buffer)
    }

    fn matrix(&mut self, label: &str, matrix: &Matrix) -> Result<DeviceMatrix, DeviceError> {
        self.packed(label, matrix, pack)
    }

    fn packed(
        &mut self,
        label: &str,
        matrix: &Matrix,
        pack: fn(&Matrix, &mut Vec<f16>),
    ) -> Result<DeviceMatrix, DeviceError> {
        self.packed.clear();
        pack(matrix, &mut self.packed);
        let buffer = self.device.storage(label, Bytes(size_of_val(&self.packed[..]) as u64))?;
        self.uploader.upload(self.device, bytemuck::cast_slice(&self.packed), &buffer, 0)?;
        self.bytes += Bytes(buffer.size());
        Ok(DeviceMatrix { buffer, rows: matrix.rows, cols: matrix.cols })
    }
}

impl DeviceWeights {
    /// Uploads everything through a staging buffer of its own, which is gone afterwards.
    pub(super) fn upload(device: &Device, weights: &Weights) -> Result<Self, DeviceError> {
        let uploader = Uploader::new(device, "weights staging", Bytes::mib(8))?;
        let mut up = Upload { device, uploader, packed: Vec::new(), bytes: Bytes::ZERO };
        let embedding = up.matrix("embedding", &weights.embedding)?;
        let mut layers = Vec::with_capacity(weights.layers.len());
        for layer in &weights.layers {
            layers.push(DeviceLayer {
                attention_norm: up.vector(&layer.attention_norm)?,
                qkv: up.matrix("qkv weights", &layer.qkv)?,
                attention_output: up.matrix("attention output weights", &layer.attention_output)?,
                ffn_norm: up.vector(&layer.ffn_norm)?,
                gate_up: up.packed("gate and up weights", &layer.gate_up, pack_pairs)?,
                down: up.matrix("down weights", &layer.down)?,
            });
        }
        let output_norm = up.vector(&weights.output_norm)?;
        let output = weights.output.as_ref().map(|m| up.matrix("output weights", m)).transpose()?;
        device.wait()?;
        Ok(Self { embedding, layers, output_norm, output, bytes: up.bytes })
    }

    /// Bytes that a step reads.
    pub(super) fn step_bytes(&self) -> Bytes {
        let rows_alone = if self.output.is_some() { self.embedding.buffer.size() } else { 0 };
        Bytes(self.bytes.0 - rows_alone)
    }

    pub(super) fn output_matrix(&self) -> &DeviceMatrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }
}
