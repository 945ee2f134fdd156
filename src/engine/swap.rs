//! Caches on their way between device and host.
//!
//! ```text
//! out   arena pages ──copy, or move_pages and copy──> read-back (two, in turn) ──> host memory
//! in    host memory ──> upload (two halves, in turn) ──copy, or copy and move_pages──> arena pages
//! ```
//!
//! Pages that lie together are copied together, others are packed first (`engine/chunk.rs`).
//!
//! A step carries at most one chunk in each direction, in the same submission as its rows, on buffers that live as long as the
//! engine. A chunk that left is read while the device computes the next step.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::chunk::{Chunk, Pieces, Run, shortest_run};
use super::host_cache::{HostCache, HostCopies, HostPages};
use super::{Engine, EngineError, Evictions};
use crate::device::Device;
use crate::device::staging::{ReadBack, Uploader};
use crate::disk::PagesFile;
use crate::geometry::Bytes;
use crate::kernels::abi::{MovePagesItem, MovePagesParams};
use crate::kernels::pipeline::{Pipeline, PipelineCache, Slot};
use crate::kernels::{KernelError, Recorder, flat_grid, move_pages};
use crate::pool::PageId;
use crate::pool::device::PoolBuffers;
use crate::schedule::{Caches, Direction, SessionId, StepPlan, Store, Transfer};

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
    /// Each with its bind group.
    pub(super) arenas: Vec<(wgpu::Buffer, wgpu::BindGroup)>,
    /// Bytes from which a run is copied by itself.
    shortest_run: Bytes,
    items: wgpu::Buffer,
    packed: wgpu::Buffer,
    pub(super) upload: Uploader,
    /// Whether a half of it was written for the next submission.
    written: bool,
    pub(super) back: [ReadBack; 2],
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

/// Whose pages leave in a step, and where they lie in staging.
pub(super) type Leaving = Vec<(SessionId, Pieces)>;

/// What a step copies back from the host: whose pages, and their bytes.
type Coming<'a> = Vec<(&'a Transfer, Cow<'a, [u8]>)>;

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
        let arenas = pool.arenas.iter().map(|arena| (arena.clone(), bind(arena))).collect();
        let back = || ReadBack::new(device, "leaving pages", sizes.chunk);
        Ok(Self {
            arenas,
            shortest_run: shortest_run(&device.summary().kind),
            items,
            packed,
            upload: Uploader::new(device, "coming pages", sizes.upload())?,
            written: false,
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
        let (read, failed) = read_coming(&self.caches, of(Direction::In).filter(|t| !self.lost.contains(&t.session)))?;
        let pages = |transfer: &Transfer| (transfer.session, pages_of(caches, transfer));
        let chunk = |moving: Vec<_>| Chunk::new(&moving, self.shortest_run);
        let coming = chunk(read.iter().map(|(transfer, _)| pages(transfer)).collect());
        let leaving = chunk(of(Direction::Out).map(pages).collect());
        let (items, dispatches) = work_lists(&coming, &leaving);
        let items: &[u8] = bytemuck::cast_slice(&items);
        if items.len() as u64 + coming.bytes() > 0 {
            self.upload.scatter(device, &placed(items, &read, &coming))?;
            self.written = true;
        }
        failed.into_iter().for_each(|session| self.lose(session));
        self.record_copies(encoder, items.len() as u64, (&coming, &leaving), &dispatches);
        Ok(leaving.sessions)
    }

    /// `uploaded`: where coming pages begin in the upload.
    fn record_copies(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        uploaded: u64,
        (coming, leaving): (&Chunk, &Chunk),
        dispatches: &[(u16, MovePagesParams)],
    ) {
        let (source, target) = (self.upload.source(), self.back[self.turn].target());
        let arena = |arena: u16| &self.arenas[usize::from(arena)];
        if !dispatches.is_empty() {
            encoder.copy_buffer_to_buffer(source, 0, &self.items, 0, uploaded);
        }
        for Run { arena: to, at, staged, bytes } in &coming.runs {
            encoder.copy_buffer_to_buffer(source, uploaded + staged, &arena(*to).0, *at, *bytes);
        }
        let Range { start, end } = coming.packed_at;
        if start < end {
            encoder.copy_buffer_to_buffer(source, uploaded + start, &self.packed, start, end - start);
        }
        if !dispatches.is_empty() {
            let mut recorder = Recorder::new(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()));
            for (to, params) in dispatches {
                recorder.dispatch(&self.kernel, &arena(*to).1, params, flat_grid(params.n_items));
            }
        }
        for Run { arena: from, at, staged, bytes } in &leaving.runs {
            encoder.copy_buffer_to_buffer(&arena(*from).0, *at, target, *staged, *bytes);
        }
        let Range { start, end } = leaving.packed_at;
        if start < end {
            encoder.copy_buffer_to_buffer(&self.packed, start, target, start, end - start);
        }
    }

    /// After a submission: what was written for it can be written anew when the device is done.
    fn recycle(&mut self, device: &Device) {
        if std::mem::take(&mut self.written) {
            self.upload.recycle(device);
        }
    }

    /// After the submission: asks for what left, and reads what left in the step before while the device computes.
    pub(super) fn submitted(&mut self, device: &Device, left: Leaving) -> Result<(), EngineError> {
        self.recycle(device);
        if left.iter().any(|(_, pieces)| !pieces.is_empty()) {
            self.back[self.turn].request(device);
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
        let keep = |staged: &[u8]| {
            for (session, pieces) in &leaving {
                // A session that ended on its way is not kept.
                let kept = caches.get_mut(session).map(|cache| cache.pages.append(staged, pieces));
                failed.extend(kept.and_then(Result::err).map(|_| *session));
            }
        };
        self.back[from].finish(device, keep)?;
        failed.into_iter().for_each(|session| self.lose(session));
        Ok(())
    }
}

impl Engine<'_> {
    /// Moves pages where a step has no rows. What left in the step before is read while the device copies; nothing waits for these.
    pub(super) fn move_alone(&mut self, plan: &StepPlan, caches: &Caches) -> Result<(), EngineError> {
        let mut encoder = self.device.raw.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let moves = self.record_moves(&mut encoder, plan, caches)?;
        self.device.submit(encoder)?;
        self.moves_submitted(moves)
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
    pub(super) fn moves_submitted(&mut self, left: Leaving) -> Result<(), EngineError> {
        let Some(swap) = &mut self.swap else { return Ok(()) };
        swap.submitted(self.device, left)
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

    /// Waits for what is on its way, in both directions.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn settle(&mut self) -> Result<(), EngineError> {
        let Some(swap) = &mut self.swap else { return Ok(()) };
        swap.drain(self.device)?;
        Ok(self.device.wait()?)
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

    /// Copies runs of pages of at least so many bytes by themselves, whatever the adapter, for tests.
    #[doc(hidden)]
    pub fn set_shortest_run(&mut self, bytes: Bytes) {
        if let Some(swap) = &mut self.swap {
            swap.shortest_run = bytes;
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
            swap.recycle(self.device);
            let back = &swap.back[swap.turn];
            back.request(self.device);
            back.finish(self.device, |staged| {
                left.iter()
                    .flat_map(|(_, pieces)| pieces)
                    .for_each(|piece| pages.extend_from_slice(&staged[piece.clone()]));
            })?;
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

/// What is to be copied back, and whose pages can not be read.
fn read_coming<'a>(
    caches: &'a BTreeMap<SessionId, HostCache>,
    transfers: impl Iterator<Item = &'a Transfer>,
) -> Result<(Coming<'a>, Vec<SessionId>), EngineError> {
    let (mut coming, mut failed) = (Coming::new(), Vec::new());
    for transfer in transfers {
        let length = usize::try_from(transfer.bytes.0).expect("a chunk fits in memory");
        let cache = caches.get(&transfer.session).ok_or_else(|| not_here(transfer.session))?;
        match cache.pages.read(cache.returned, length) {
            Ok(pages) => coming.push((transfer, pages)),
            Err(_) => failed.push(transfer.session),
        }
    }
    Ok((coming, failed))
}

/// Where the bytes of an upload lie: items first, then what comes back, each page where its chunk says.
fn placed<'a>(items: &'a [u8], read: &'a Coming<'_>, coming: &Chunk) -> Vec<(usize, &'a [u8])> {
    let mut all = vec![(0, items)];
    for ((_, pages), (_, staged)) in read.iter().zip(&coming.sessions) {
        let mut rest = &pages[..];
        for piece in staged {
            let (here, after) = rest.split_at(piece.len());
            all.push((items.len() + piece.start, here));
            rest = after;
        }
    }
    all
}

/// The pages of a transfer, in the order of their table.
fn pages_of(caches: &Caches, transfer: &Transfer) -> Vec<(PageId, Bytes)> {
    let all = caches.tables[&transfer.session].page_ids();
    all.skip(transfer.pages.start as usize).take(transfer.pages.len()).collect()
}

/// Items of all pages that are packed, and a dispatch for each arena and direction. What comes back is in its place before what
/// leaves is packed.
fn work_lists(coming: &Chunk, leaving: &Chunk) -> (Vec<MovePagesItem>, Vec<(u16, MovePagesParams)>) {
    let (mut items, mut dispatches) = (Vec::new(), Vec::new());
    for (chunk, leaves) in [(coming, 0), (leaving, 1)] {
        for (arena, list) in &chunk.packed {
            let params = MovePagesParams { items: count(items.len()), n_items: count(list.len()), leaves };
            dispatches.push((*arena, params));
            items.extend(list);
        }
    }
    (items, dispatches)
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("pages of a step are counted in 32 bits")
}

fn not_here(session: SessionId) -> EngineError {
    EngineError::Input(format!("the cache of session {} is not in host memory", session.0))
}
