//! Caches on their way between device and host.
//!
//! ```text
//! out   arena pages ──move_pages──> packed ──copy──> read-back (two, in turn) ──> host memory
//! in    host memory ──> upload (two halves, in turn) ──copy──> packed ──move_pages──> arena pages
//! ```
//!
//! A step carries at most one chunk in each direction, in the same submission as its rows, on buffers that live as long as the
//! engine. A chunk that left is read while the device computes the next step.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::host_cache::{HostCache, HostCopies, HostPages};
use super::{Engine, EngineError, Evictions};
use crate::device::Device;
use crate::device::staging::{ReadBack, Uploader};
use crate::disk::PagesFile;
use crate::geometry::{Bytes, CELL_BYTES};
use crate::kernels::abi::{MovePagesItem, MovePagesParams};
use crate::kernels::pipeline::{Pipeline, PipelineCache, Slot};
use crate::kernels::{KernelError, Recorder, flat_grid, move_pages};
use crate::pool::PageId;
use crate::pool::device::PoolBuffers;
use crate::schedule::{Caches, Direction, Rates, SessionId, StepPlan, Store, Transfer};

/// Plain copies that are timed.
const PLAIN_COPIES: usize = 8;
/// Bytes of an item.
const ITEM_BYTES: u64 = size_of::<MovePagesItem>() as u64;

/// How large the buffers are.
#[derive(Clone, Copy, Debug)]
pub(super) struct SwapSizes {
    /// Bytes of a chunk.
    pub(super) chunk: Bytes,
    /// Bytes of the smallest page: how many items a chunk has.
    pub(super) smallest_page: Bytes,
}

impl SwapSizes {
    fn items(&self) -> Bytes {
        Bytes(self.chunk.0.div_ceil(self.smallest_page.0).max(1) * ITEM_BYTES)
    }

    fn upload(&self) -> Bytes {
        (self.items() + self.items() + self.chunk).align_up(16)
    }

    /// Bytes that are held for upload and read-back.
    pub(super) fn staging(&self) -> Bytes {
        Bytes(2 * self.upload().0 + 2 * self.chunk.align_up(16).0)
    }

    /// Bytes of the packed pages and their lists.
    pub(super) fn scratch(&self) -> Bytes {
        self.chunk.align_up(16) + self.items() + self.items()
    }
}

/// Kernel, buffers, and the caches that are in host memory.
#[derive(Debug)]
pub(super) struct Swap {
    kernel: Arc<Pipeline>,
    /// One bind group per arena.
    groups: Vec<wgpu::BindGroup>,
    items: wgpu::Buffer,
    packed: wgpu::Buffer,
    upload: Uploader,
    back: [ReadBack; 2],
    /// Which read-back is next.
    turn: usize,
    /// Chunks of the step before, which are still to be read, and from where.
    unread: Option<(usize, Leaving)>,
    caches: BTreeMap<SessionId, HostCache>,
    /// Folder of caches that go to files.
    folder: Option<PathBuf>,
    /// Sessions whose caches could not be kept since the last step.
    lost: Vec<SessionId>,
}

/// Whose chunks leave in a step, in order, and their bytes.
pub(super) type Leaving = Vec<(SessionId, usize)>;

/// Pages of one direction that a step moves.
#[derive(Default)]
struct Moves {
    /// Of each arena.
    lists: BTreeMap<u16, Vec<MovePagesItem>>,
    /// Cells so far.
    cells: u32,
}

impl Moves {
    /// Adds the pages of a transfer; their bytes.
    fn add(&mut self, caches: &Caches, transfer: &Transfer) -> usize {
        let pages = &transfer.pages;
        let all = caches.tables[&transfer.session].page_ids();
        for (PageId { arena, cell }, page) in all.skip(pages.start as usize).take(pages.len()) {
            let n_cells = u32::try_from(page.0 / CELL_BYTES).expect("a page is counted in 32 bits");
            let item = MovePagesItem { page: cell, packed: self.cells, n_cells, pad: 0 };
            self.lists.entry(arena).or_default().push(item);
            self.cells += n_cells;
        }
        usize::try_from(transfer.bytes.0).expect("a chunk fits in memory")
    }

    fn bytes(&self) -> u64 {
        u64::from(self.cells) * CELL_BYTES
    }
}

impl Swap {
    pub(super) fn new(
        device: &Device,
        cache: &mut PipelineCache,
        pool: &PoolBuffers,
        sizes: SwapSizes,
    ) -> Result<Self, KernelError> {
        let kernel = cache.get(device, &move_pages::kernel())?;
        let items = device.storage("lists of moving pages", sizes.items() + sizes.items())?;
        let packed = device.storage("moving pages", sizes.chunk.align_up(16))?;
        let bind = |arena| kernel.bind(device, &[Slot::Whole(&items), Slot::Whole(arena), Slot::Whole(&packed)]);
        let groups = pool.arenas.iter().map(bind).collect();
        let back = || ReadBack::new(device, "leaving pages", sizes.chunk);
        Ok(Self {
            groups,
            items,
            packed,
            upload: Uploader::new(device, "coming pages", sizes.upload())?,
            back: [back()?, back()?],
            kernel,
            turn: 0,
            unread: None,
            caches: BTreeMap::new(),
            folder: None,
            lost: Vec::new(),
        })
    }

    /// Begins to keep a cache that leaves.
    fn begin(&mut self, transfer: &Transfer, all: Bytes) {
        let pages = match (transfer.store, &self.folder) {
            (Store::Host, _) => {
                Ok(HostPages::Memory(Vec::with_capacity(usize::try_from(all.0).expect("a cache fits in memory"))))
            }
            (Store::Disk, Some(folder)) => PagesFile::create(folder).map(HostPages::File),
            (Store::Disk, None) => Err(io::ErrorKind::NotFound.into()),
        };
        match pages {
            Ok(pages) => {
                self.caches.insert(transfer.session, HostCache { pages, slot: Vec::new(), returned: 0, all });
            }
            Err(_) => self.lost.push(transfer.session),
        }
    }

    /// Bytes of its buffers.
    pub(super) fn held_bytes(&self) -> Bytes {
        let back: Bytes = self.back.iter().map(ReadBack::capacity).sum();
        Bytes(self.items.size() + self.packed.size()) + self.upload.total() + back
    }

    /// Uploads what a step moves, and records its copies and dispatches; whose chunks leave. What comes back is in its place
    /// before what leaves is packed, since both pass through one buffer.
    pub(super) fn record(
        &mut self,
        device: &Device,
        encoder: &mut wgpu::CommandEncoder,
        plan: &StepPlan,
        caches: &Caches,
    ) -> Result<Leaving, EngineError> {
        let unread = |id: &SessionId| self.unread.iter().any(|(_, leaving)| leaving.iter().any(|(left, _)| left == id));
        let of = |direction: Direction| plan.transfers.iter().filter(move |t| t.direction == direction);
        // Its last chunk may have left in the step before.
        if of(Direction::In).any(|transfer| unread(&transfer.session)) {
            self.drain(device)?;
        }
        let (mut coming, mut leaving) = (Moves::default(), Moves::default());
        let mut chunks: Vec<Cow<'_, [u8]>> = Vec::new();
        for transfer in of(Direction::In) {
            if self.lost.contains(&transfer.session) {
                continue;
            }
            let length = usize::try_from(transfer.bytes.0).expect("a chunk fits in memory");
            let cache = self.caches.get(&transfer.session).ok_or_else(|| not_here(transfer.session))?;
            match cache.pages.read(cache.returned, length) {
                Ok(chunk) => {
                    chunks.push(Cow::Owned(chunk.into_owned()));
                    coming.add(caches, transfer);
                }
                Err(_) => self.lose(transfer.session),
            }
        }
        let left: Leaving = of(Direction::Out).map(|t| (t.session, leaving.add(caches, t))).collect();
        let mut items: Vec<MovePagesItem> = Vec::new();
        let mut dispatches = Vec::new();
        for (moves, leaves) in [(&coming, 0), (&leaving, 1)] {
            for (arena, list) in &moves.lists {
                let params = MovePagesParams { items: count(items.len()), n_items: count(list.len()), leaves };
                dispatches.push((*arena, params));
                items.extend(list);
            }
        }
        if items.is_empty() {
            return Ok(left);
        }
        let items: &[u8] = bytemuck::cast_slice(&items);
        let all: Vec<&[u8]> = std::iter::once(items).chain(chunks.iter().map(|chunk| &**chunk)).collect();
        self.upload.write(device, &all)?;
        encoder.copy_buffer_to_buffer(self.upload.source(), 0, &self.items, 0, items.len() as u64);
        if coming.bytes() > 0 {
            encoder.copy_buffer_to_buffer(self.upload.source(), items.len() as u64, &self.packed, 0, coming.bytes());
        }
        let mut recorder = Recorder::new(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
        for (arena, params) in &dispatches {
            recorder.dispatch(&self.kernel, &self.groups[usize::from(*arena)], params, flat_grid(params.n_items));
        }
        drop(recorder);
        if leaving.bytes() > 0 {
            encoder.copy_buffer_to_buffer(&self.packed, 0, self.back[self.turn].target(), 0, leaving.bytes());
        }
        Ok(left)
    }

    /// After the submission: asks for what left, and reads what left in the step before while the device computes.
    pub(super) fn submitted(&mut self, device: &Device, left: Leaving, moved: bool) -> Result<(), EngineError> {
        if moved {
            self.upload.recycle();
        }
        if left.iter().any(|(_, bytes)| *bytes > 0) {
            self.back[self.turn].request();
            self.drain(device)?;
            self.unread = Some((self.turn, left));
            self.turn = 1 - self.turn;
        } else {
            self.drain(device)?;
        }
        Ok(())
    }

    /// After a step: what came back is not needed any more if it went well, and what was to leave has not begun to if not.
    pub(super) fn settle(&mut self, plan: &StepPlan, went_well: bool) {
        for Transfer { session, direction, pages, bytes, last, .. } in &plan.transfers {
            match direction {
                Direction::In if went_well && !last => {
                    self.caches.entry(*session).and_modify(|cache| cache.returned += bytes.0);
                }
                Direction::In if went_well => drop(self.caches.remove(session)),
                Direction::Out if !went_well && pages.start == 0 => drop(self.caches.remove(session)),
                _ => {}
            }
        }
    }

    fn lose(&mut self, session: SessionId) {
        self.caches.remove(&session);
        self.lost.push(session);
    }

    /// Drops caches that nobody wants back.
    pub(super) fn forget(&mut self, sessions: &[SessionId]) {
        for session in sessions {
            self.caches.remove(session);
        }
    }

    /// Reads what is still to be read.
    pub(super) fn drain(&mut self, device: &Device) -> Result<(), EngineError> {
        let Some((from, leaving)) = self.unread.take() else { return Ok(()) };
        let caches = &mut self.caches;
        let mut failed = Vec::new();
        let keep = |bytes: &[u8]| {
            let mut at = 0;
            for (session, length) in &leaving {
                // A session that ended on its way is not kept.
                let kept = caches.get_mut(session).map(|cache| cache.pages.append(&bytes[at..at + length]));
                failed.extend(kept.and_then(Result::err).map(|_| *session));
                at += length;
            }
        };
        self.back[from].finish(device, keep)?;
        failed.into_iter().for_each(|session| self.lose(session));
        Ok(())
    }
}

impl Engine<'_> {
    /// Moves pages where a step has no rows; waits for them, since there is nothing else to do.
    pub(super) fn move_alone(&mut self, plan: &StepPlan, caches: &Caches) -> Result<(), EngineError> {
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let moves = self.record_moves(&mut encoder, plan, caches)?;
        self.device.submit(encoder)?;
        self.moves_submitted(plan, moves)?;
        if let Some(swap) = &mut self.swap {
            swap.drain(self.device)?;
        }
        Ok(())
    }

    /// Records the moves of a step.
    pub(super) fn record_moves(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        plan: &StepPlan,
        caches: &Caches,
    ) -> Result<Leaving, EngineError> {
        if plan.transfers.is_empty() {
            return Ok(Leaving::new());
        }
        let swap = self.swap.as_mut().ok_or_else(|| EngineError::Input("this engine does not swap".to_owned()))?;
        for transfer in plan.transfers.iter().filter(|t| t.direction == Direction::Out && t.pages.start == 0) {
            swap.begin(transfer, caches.tables[&transfer.session].held_bytes());
        }
        self.move_slots(plan, caches)?;
        let swap = self.swap.as_mut().expect("this engine swaps");
        swap.record(self.device, encoder, plan, caches)
    }

    /// Moves what slots hold of sessions whose last pages move. They have no rows in this step, so that it can be done before it;
    /// after its submission nothing is to fail but for a lost device.
    fn move_slots(&mut self, plan: &StepPlan, caches: &Caches) -> Result<(), EngineError> {
        for transfer in plan.transfers.iter().filter(|transfer| transfer.last) {
            let Some(slot) = caches.slot(transfer.session) else { continue };
            match transfer.direction {
                Direction::Out => {
                    let read = self.read_slot(slot)?;
                    let swap = self.swap.as_mut().expect("this engine swaps");
                    swap.caches.entry(transfer.session).and_modify(|cache| cache.slot = read);
                }
                Direction::In => self.write_slot(slot, transfer.session)?,
            }
        }
        Ok(())
    }

    /// After the submission of a step: reads what left before.
    pub(super) fn moves_submitted(&mut self, plan: &StepPlan, left: Leaving) -> Result<(), EngineError> {
        let Some(swap) = &mut self.swap else { return Ok(()) };
        let moved = plan.transfers.iter().any(|transfer| !transfer.pages.is_empty());
        swap.submitted(self.device, left, moved)
    }

    /// Time of moving a chunk's bytes through plain mapped copies, out and in: what the link does at best, pages or not. The
    /// fastest of a few.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn plain_copies(&mut self) -> Result<Option<(Bytes, [Duration; 2])>, EngineError> {
        let Some(swap) = &mut self.swap else { return Ok(None) };
        swap.drain(self.device)?;
        let length = swap.packed.size();
        let mut bytes = Vec::new();
        let mut fastest = [Duration::MAX; 2];
        for _ in 0..PLAIN_COPIES {
            let started = Instant::now();
            let back = &swap.back[swap.turn];
            let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(&swap.packed, 0, back.target(), 0, length);
            self.device.submit(encoder)?;
            bytes.clear();
            back.read(self.device, usize::try_from(length).expect("a chunk fits in memory"), &mut bytes)?;
            fastest[0] = fastest[0].min(started.elapsed());
            let started = Instant::now();
            swap.upload.upload(self.device, &bytes, &swap.packed, 0)?;
            self.device.wait()?;
            fastest[1] = fastest[1].min(started.elapsed());
        }
        Ok(Some((Bytes(length), fastest)))
    }

    /// How fast caches move, measured; zero where they do not.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn link_rates(&mut self) -> Result<Rates, EngineError> {
        let Some((bytes, times)) = self.plain_copies()? else { return Ok(Rates::default()) };
        let [out, back] = times.map(|time| bytes.0 as f64 / time.as_secs_f64().max(1e-9));
        Ok(Rates { out, back, prefill: 0.0 })
    }

    /// A session's cache in host memory.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn host_cache(&mut self, session: SessionId) -> Result<Option<&HostCache>, EngineError> {
        let Some(swap) = &mut self.swap else { return Ok(None) };
        swap.drain(self.device)?;
        Ok(swap.caches.get(&session))
    }

    /// Takes the whole caches out of host memory, for an engine that follows this one: after a loss of the device, those of
    /// which nothing was still on it.
    pub fn take_copies(&mut self) -> HostCopies {
        let caches = self.swap.as_mut().map(|swap| std::mem::take(&mut swap.caches)).unwrap_or_default();
        let whole = caches.into_iter().filter(|(_, cache)| cache.pages.bytes() == cache.all);
        HostCopies(whole.map(|(id, cache)| (id, HostCache { returned: 0, ..cache })).collect())
    }

    /// Puts caches into host memory that another engine had there, of the same model and configuration.
    ///
    /// # Panics
    /// When there are some and this engine was made without moving any.
    pub fn keep_copies(&mut self, copies: HostCopies) {
        assert!(self.swap.is_some() || copies.0.is_empty(), "an engine that has copies should swap");
        if let Some(swap) = &mut self.swap {
            swap.caches.extend(copies.0);
        }
    }

    /// Waits for what is on its way to host memory.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn settle(&mut self) -> Result<(), EngineError> {
        match &mut self.swap {
            Some(swap) => swap.drain(self.device),
            None => Ok(()),
        }
    }

    /// Bytes of caches in host memory.
    pub fn host_bytes(&self) -> Bytes {
        let caches = self.swap.iter().flat_map(|swap| swap.caches.values());
        let in_memory = |cache: &HostCache| match &cache.pages {
            HostPages::Memory(pages) => pages.len() as u64 + cache.slot.len() as u64,
            HostPages::File(_) => 0,
        };
        Bytes(caches.map(in_memory).sum())
    }

    /// Lets caches go to files in a folder. What a session is scored into stays in memory meanwhile, which is little.
    pub fn keep_in(&mut self, folder: PathBuf) {
        if let Some(swap) = &mut self.swap {
            swap.folder = Some(folder);
        }
    }

    /// Gives a session that is away its cache, to be copied back when it is wanted.
    ///
    /// # Errors
    /// [`EngineError::Input`] when this engine does not swap.
    pub fn insert_cache(&mut self, session: SessionId, cache: HostCache) -> Result<(), EngineError> {
        let swap = self.swap.as_mut().ok_or_else(|| EngineError::Input("this engine does not swap".to_owned()))?;
        swap.caches.insert(session, cache);
        Ok(())
    }

    /// Sessions whose caches could not be kept, each once.
    pub(super) fn take_lost(&mut self) -> Vec<SessionId> {
        self.swap.as_mut().map(|swap| std::mem::take(&mut swap.lost)).unwrap_or_default()
    }

    /// Reads the cache of a session that is on the device, or on its way to the host: pages in order, and what its slot holds.
    /// It stays as it is.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn read_cache(&mut self, session: SessionId, caches: &Caches) -> Result<(Vec<u8>, Vec<u8>), EngineError> {
        let swap = self.swap.as_mut().ok_or_else(|| EngineError::Input("this engine does not swap".to_owned()))?;
        swap.drain(self.device)?;
        let mut pages = Vec::new();
        let mut from = 0;
        loop {
            let transfer = caches.transfer(session, Direction::Out, from, caches.abilities.swap_bytes);
            let (last, end) = (transfer.last, transfer.pages.end);
            let plan = StepPlan { transfers: vec![transfer], ..StepPlan::default() };
            let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let swap = self.swap.as_mut().expect("this engine swaps");
            let left = swap.record(self.device, &mut encoder, &plan, caches)?;
            self.device.submit(encoder)?;
            let length = left.iter().map(|(_, length)| length).sum();
            if length > 0 {
                swap.upload.recycle();
                swap.back[swap.turn].read(self.device, length, &mut pages)?;
            }
            from = end;
            if last {
                break;
            }
        }
        let slot = caches.slot(session).map(|slot| self.read_slot(slot)).transpose()?;
        Ok((pages, slot.unwrap_or_default()))
    }

    fn read_slot(&self, slot: u32) -> Result<Vec<u8>, EngineError> {
        let mut read = Vec::new();
        let (Some(swap), Some(Evictions { kernels, .. })) = (&self.swap, &self.evictions) else { return Ok(read) };
        // The other read-back has a chunk in it.
        let back = &swap.back[swap.turn];
        for (buffer, at, length) in kernels.slot_parts(slot) {
            for from in (0..length.0).step_by(usize::try_from(back.capacity().0).expect("a chunk fits in memory")) {
                let n = back.capacity().0.min(length.0 - from);
                let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                encoder.copy_buffer_to_buffer(buffer, at + from, back.target(), 0, n);
                self.device.submit(encoder)?;
                back.read(self.device, usize::try_from(n).expect("a chunk fits in memory"), &mut read)?;
            }
        }
        Ok(read)
    }

    fn write_slot(&mut self, slot: u32, session: SessionId) -> Result<(), EngineError> {
        let (Some(swap), Some(Evictions { kernels, .. })) = (&mut self.swap, &self.evictions) else { return Ok(()) };
        let bytes = &swap.caches.get(&session).ok_or_else(|| not_here(session))?.slot[..];
        let mut rest = bytes;
        for (buffer, at, length) in kernels.slot_parts(slot) {
            let length = usize::try_from(length.0).expect("a slot fits in memory");
            let (here, after) = rest.split_at_checked(length).ok_or_else(|| {
                EngineError::Input(format!("{} bytes are too few for what a slot holds", bytes.len()))
            })?;
            swap.upload.upload(self.device, here, buffer, at)?;
            rest = after;
        }
        Ok(())
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("pages of a step are counted in 32 bits")
}

fn not_here(session: SessionId) -> EngineError {
    EngineError::Input(format!("the cache of session {} is not in host memory", session.0))
}
