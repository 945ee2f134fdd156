//! Putting dispatches into a compute pass.

use super::Pipeline;

/// A compute pass with a count of its dispatches.
#[derive(Debug)]
pub struct Recorder<'p> {
    pass: wgpu::ComputePass<'p>,
    dispatches: u32,
}

impl<'p> Recorder<'p> {
    /// Records into `pass`.
    pub const fn new(pass: wgpu::ComputePass<'p>) -> Self {
        Self { pass, dispatches: 0 }
    }

    /// One dispatch; an empty grid records nothing.
    ///
    /// # Panics
    /// When `immediates` is not as long as the kernel's immediate data.
    pub fn dispatch<I: bytemuck::Pod>(
        &mut self,
        pipeline: &Pipeline,
        bindings: &wgpu::BindGroup,
        immediates: &I,
        grid: [u32; 3],
    ) {
        if grid.contains(&0) {
            return;
        }
        let bytes = bytemuck::bytes_of(immediates);
        assert_eq!(
            bytes.len(),
            pipeline.immediate_bytes() as usize,
            "kernel {} should get its immediate data whole",
            pipeline.name()
        );
        self.pass.set_pipeline(&pipeline.raw);
        self.pass.set_bind_group(0, bindings, &[]);
        self.pass.set_immediates(0, bytes);
        self.pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        self.dispatches += 1;
    }

    /// Dispatches so far.
    pub const fn dispatches(&self) -> u32 {
        self.dispatches
    }
}
