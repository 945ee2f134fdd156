//! Output rows and their log-sum-exp: poisoned before a run, compared after it.

use super::Checked;
use crate::device::staging::{Uploader, download};
use crate::device::{Device, DeviceError};
use crate::geometry::{Bytes, HeadGeometry, WORD_BYTES};
use crate::reference::compare::{Tolerance, nmse};

/// Bytes that are written at once.
const STAGING: Bytes = Bytes::mib(4);

/// What attention writes for some rows.
#[derive(Debug)]
pub(super) struct Outputs {
    heads: HeadGeometry,
    rows: usize,
    /// `[rows][num_qo_heads][head_dim]` f32.
    pub(super) o: wgpu::Buffer,
    /// `[rows][num_qo_heads]` f32, base 2.
    pub(super) lse: wgpu::Buffer,
}

/// What the reference says of the query heads of one KV head in one row.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    pub(super) row: usize,
    pub(super) kv_head: usize,
    /// `[group_size][head_dim]`.
    pub(super) o: Vec<f64>,
    /// Magnitude that an output's bound multiplies, likewise.
    pub(super) absolute: Vec<f64>,
    /// `[group_size]`.
    pub(super) lse: Vec<f64>,
    pub(super) tolerance: Tolerance,
}

impl Outputs {
    pub(super) fn new(device: &Device, heads: HeadGeometry, rows: usize) -> Result<Self, DeviceError> {
        let bytes = |width: u32| Bytes(rows as u64 * u64::from(width) * WORD_BYTES);
        let o = device.storage("attention output", bytes(heads.q_width()))?;
        let lse = device.storage("log-sum-exp", bytes(heads.num_qo_heads))?;
        Ok(Self { heads, rows, o, lse })
    }

    /// Makes every number a NaN.
    pub(super) fn poison(&self, device: &Device) -> Result<(), DeviceError> {
        poison(device, &[&self.o, &self.lse])
    }

    /// Looks at every number, and compares those that the reference knows.
    pub(super) fn check(&self, device: &Device, expected: &[Expected]) -> Result<Checked, DeviceError> {
        // Buffers end in padding, which nobody writes.
        let floats = |buffer, width: u32| -> Result<Vec<f32>, DeviceError> {
            let bytes = self.rows * width as usize * size_of::<f32>();
            Ok(bytemuck::pod_collect_to_vec(&download(device, buffer, 0, bytes)?))
        };
        let (o, lse) = (floats(&self.o, self.heads.q_width())?, floats(&self.lse, self.heads.num_qo_heads)?);
        let missing = o.iter().chain(&lse).filter(|x| !x.is_finite()).count();
        let (width, group) = (self.heads.head_dim as usize, self.heads.group_size() as usize);
        let n_heads = self.heads.num_qo_heads as usize;
        let mut worst = 0.0_f64;
        let (mut got, mut reference) = (Vec::new(), Vec::new());
        for e in expected {
            let first = e.row * n_heads + e.kv_head * group;
            let (o, lse) = (&o[first * width..(first + group) * width], &lse[first..first + group]);
            let ones: Vec<f64> = e.lse.iter().map(|x| x.abs().max(1.0)).collect();
            worst = worst.max(e.tolerance.worst(o, &e.o, &e.absolute)).max(e.tolerance.worst(lse, &e.lse, &ones));
            got.extend_from_slice(o);
            reference.extend_from_slice(&e.o);
        }
        let nmse = nmse(&got, &reference);
        Ok(Checked { compared: got.len(), missing, error_over_bound: worst, nmse })
    }
}

/// Makes every number of some buffers a NaN.
pub(super) fn poison(device: &Device, buffers: &[&wgpu::Buffer]) -> Result<(), DeviceError> {
    let mut uploader = Uploader::new(device, "poison", STAGING)?;
    for buffer in buffers {
        let nans = vec![0xFF; usize::try_from(buffer.size()).expect("a buffer fits in the address space")];
        uploader.upload(device, &nans, buffer, 0)?;
    }
    Ok(())
}

/// A buffer with these numbers in it.
pub(super) fn filled<T: bytemuck::Pod>(
    device: &Device,
    label: &str,
    numbers: &[T],
) -> Result<wgpu::Buffer, DeviceError> {
    let bytes: &[u8] = bytemuck::cast_slice(numbers);
    let buffer = device.storage(label, Bytes(bytes.len() as u64).align_up(16))?;
    Uploader::new(device, label, STAGING)?.upload(device, bytes, &buffer, 0)?;
    Ok(buffer)
}
