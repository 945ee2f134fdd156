//! The caches of admitted sessions: their page tables, and when each is next compressed.
//!
//! ```text
//! a codec alone      one table; pages are sealed as they fill
//! an eviction        a table in f16 holds the document; when its last token is cached, the eviction fills a second table,
//!                    in the session's codec, and the first returns to the pool
//! every N tokens     whenever N tokens have come since: a third table stands ready, and the two take turns
//! ```
//!
//! All tables are committed at admission, so that an eviction never finds the pool empty; until it happens a session holds the
//! bytes of its whole document, and from then on those of what stayed.

use std::collections::BTreeMap;

use super::selection::{Abilities, Merging, Observed, Selection};
use super::{Request, SessionId, StepPlan};
use crate::compression::Compression;
use crate::compression::head::{HeadPattern, ListPattern};
use crate::compression::hidden::HiddenCodec;
use crate::compression::keep::{Domain, KeepShape, domains};
use crate::compression::layer::{LayerPolicy, Sharing};
use crate::compression::token::{Allocation, Rows, Rule, Score, TokenPolicy};
use crate::geometry::Bytes;
use crate::pool::page_table::{Capacity, Layers, PageTable, Quest, TableRanges, TableShape, Window};
use crate::pool::{PagePool, PoolError};

/// Tokens that a repetition adds to a document at once: a prompt, and a chunk.
pub const REPEAT_ROOM: u32 = 320;

/// What is still to happen to a session's cache.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) compression: Compression,
    /// Length of the tail at which the next eviction is due.
    pub(super) due: u32,
    pub(super) slot: Option<u32>,
    /// Tables of coming evictions.
    pub(super) targets: Vec<PageTable>,
}

/// The pool and the page tables of admitted sessions.
#[derive(Clone, Debug)]
pub struct Caches {
    /// Page accounting.
    pub pool: PagePool,
    /// Table entries.
    pub ranges: TableRanges,
    /// Pages that prompt rows pass through while they are sealed.
    pub window: Window,
    /// Shape of a session's table without compression.
    pub full: TableShape,
    /// What the backend can do.
    pub abilities: Abilities,
    /// Tables of admitted sessions.
    pub tables: BTreeMap<SessionId, PageTable>,
    pub(super) plans: BTreeMap<SessionId, Plan>,
    /// Who holds which slot.
    pub(super) slots: Vec<Option<SessionId>>,
    /// Slots whose scores must be zero before the next step.
    fresh: Vec<u32>,
    evicted_tokens: u64,
}

/// Tables that a session needs, with their shapes.
pub(super) struct Needs {
    pub(super) first: (TableShape, Capacity),
    pub(super) targets: Vec<(TableShape, Capacity)>,
    pub(super) layers: Layers,
    source_layers: Layers,
}

impl Caches {
    /// No session yet.
    ///
    /// # Panics
    /// When the tables do not hold the window's entries.
    pub fn new(pool: PagePool, full: TableShape, window: Window, abilities: Abilities) -> Self {
        let entries = u32::try_from(pool.tables().0 / 4).expect("table entries are counted in 32 bits");
        let mut ranges = TableRanges::new(entries);
        if window.entries() > 0 {
            assert_eq!(ranges.reserve(window.entries()), Some(0), "the window's entries should come first");
        }
        let slots = vec![None; abilities.slots.unwrap_or(0) as usize];
        let (tables, plans) = (BTreeMap::new(), BTreeMap::new());
        Self { pool, ranges, window, full, abilities, tables, plans, slots, fresh: Vec::new(), evicted_tokens: 0 }
    }

    /// Shape of a session's table in its codec, where decode rows may choose pages of `n_tokens` tokens.
    fn shape_of(&self, compression: &Compression, n_tokens: u32) -> Result<TableShape, String> {
        let quest = match compression.token {
            TokenPolicy::Quest { budget, dense_layers } => {
                let pages = budget.tokens(n_tokens).div_ceil(self.full.page.page_size);
                Some(Quest { pages, dense_layers })
            }
            _ => None,
        };
        Ok(TableShape { quest, ..self.shape(compression)? })
    }

    /// Shape of a session's table in its codec.
    ///
    /// # Errors
    /// A sentence when the compression is for another model.
    pub fn shape(&self, compression: &Compression) -> Result<TableShape, String> {
        let owners = compression.layer.owners(self.full.num_layers)?;
        let own = owners.iter().zip(0..).filter(|(owner, layer)| **owner == *layer).count();
        let num_layers = u32::try_from(own).expect("layers are counted in 32 bits");
        Ok(TableShape { codec: compression.hidden, num_layers, ..self.full })
    }

    pub(super) fn layers(&self, compression: &Compression) -> Result<Layers, String> {
        Ok(Layers::new(&compression.layer.owners(self.full.num_layers)?))
    }

    /// The first layer that prompt tokens do not reach.
    ///
    /// # Panics
    /// For a compression that [`Self::serves`] refuses.
    pub fn skip_from(&self, compression: &Compression) -> Option<u32> {
        compression.layer.skip_from(self.full.num_layers).expect("a compression that is served is for this model")
    }

    /// Whether a cache of this compression is evicted from at all.
    pub fn evicts(compression: &Compression) -> bool {
        let merges = matches!(compression.layer.share, Sharing::Merge { .. });
        compression.token.eviction().is_some() || compression.head != HeadPattern::Full || merges
    }

    /// The codecs whose kernels caches of this compression need, f16 pages of single layers aside.
    pub fn codecs_of(compression: &Compression) -> Vec<HiddenCodec> {
        let codec = compression.hidden;
        let merged = matches!(compression.layer.share, Sharing::Merge { .. }).then(|| codec.for_pairs());
        [codec].into_iter().filter(HiddenCodec::seals).chain(merged).collect()
    }

    fn merging(&self, compression: &Compression) -> Result<Option<Merging>, String> {
        let Sharing::Merge { retain_permille, .. } = compression.layer.share else { return Ok(None) };
        let pairs = compression.layer.merged_pairs(self.full.num_layers)?;
        Ok(Some(Merging { pairs, retain_permille }))
    }

    /// Whether this backend can carry out a compression.
    ///
    /// # Errors
    /// A sentence with the reason.
    pub fn serves(&self, compression: &Compression) -> Result<(), String> {
        let missing = |codec: &HiddenCodec| !self.abilities.codecs.contains(codec);
        if let Some(codec) = Self::codecs_of(compression).into_iter().find(missing) {
            let served: Vec<_> =
                [HiddenCodec::F16].iter().chain(&self.abilities.codecs).map(ToString::to_string).collect();
            return Err(format!("no kernels were made for hidden={codec}; this run serves {}", served.join(", ")));
        }
        if Self::evicts(compression) && self.abilities.slots.is_none() {
            return Err(format!("{} evicts, and this engine was made without evictions", compression.short()));
        }
        if matches!(compression.token, TokenPolicy::Quest { .. }) && !self.abilities.chooses {
            return Err(format!("{} chooses pages, and this engine was made without that", compression.short()));
        }
        if compression.layer != LayerPolicy::default() && self.abilities.slots.is_none() {
            // Their layers are planned one by one, as those of ragged lists are, and take as many work items.
            return Err(format!(
                "{} plans layer by layer, and this engine was made without evictions",
                compression.short()
            ));
        }
        if Self::observes(compression) && self.abilities.slots == Some(0) {
            return Err(format!(
                "{} scores tokens, and this engine was made without slots for that",
                compression.short()
            ));
        }
        self.layers(compression)?;
        self.merging(compression)?;
        self.patterns(compression)?;
        compression.layer.skip_from(self.full.num_layers)?;
        Ok(())
    }

    /// The head pattern of every list of the session's table.
    fn patterns(&self, compression: &Compression) -> Result<Vec<ListPattern>, String> {
        let (layers, heads) = (self.full.num_layers, self.full.num_kv_heads);
        let all = compression.head.lists(self.abilities.head_scores.as_deref(), layers, heads)?;
        let owners = compression.layer.owners(layers)?;
        let own = (0..layers).filter(|layer| owners[*layer as usize] == *layer);
        Ok(own
            .flat_map(|layer| all[(layer * heads) as usize..((layer + 1) * heads) as usize].iter().copied())
            .collect())
    }

    /// What an eviction of lists of up to `n_tokens` tokens keeps.
    ///
    /// # Errors
    /// A sentence when the budget has no room for what always stays.
    pub fn domains(&self, compression: &Compression, n_tokens: u32) -> Result<Vec<Domain>, String> {
        let shape = self.shape(compression)?;
        let keep = KeepShape { num_layers: shape.num_layers, num_kv_heads: shape.num_kv_heads };
        domains(&compression.token, keep, &self.patterns(compression)?, n_tokens)
    }

    /// Pages that an eviction of `n_tokens` tokens per list can leave, and room for `tail_tokens` after it.
    ///
    /// # Errors
    /// As [`Self::domains`].
    pub fn capacity(&self, compression: &Compression, n_tokens: u32, tail_tokens: u32) -> Result<Capacity, String> {
        let size = self.full.page.page_size;
        let mut capacity = Capacity::tokens(tail_tokens);
        let domains = self.domains(compression, n_tokens)?;
        if let Some(Merging { pairs, .. }) = self.merging(compression)? {
            let most =
                |list: u32| domains.iter().find(|d| d.lists.contains(&list)).map_or(0, |d| d.total.min(n_tokens));
            for (lower, upper) in pairs {
                for head in 0..self.full.num_kv_heads {
                    let tokens = [lower, upper].map(|layer| most(layer * self.full.num_kv_heads + head));
                    let pages = tokens[0].min(tokens[1]).div_ceil(size);
                    capacity.merged_pages += pages;
                    capacity.merged_pages_of_list = capacity.merged_pages_of_list.max(pages);
                }
            }
        }
        for domain in domains {
            let lists = u32::try_from(domain.lists.len()).expect("lists are counted in 32 bits");
            let most = domain.total.min(n_tokens).div_ceil(size);
            // Lists that share a total leave a page each partly used.
            let pages = if lists == 1 { most } else { (domain.total / size + lists).min(lists * most) };
            capacity.kept_pages += pages;
            capacity.kept_pages_of_list = capacity.kept_pages_of_list.max(most);
        }
        Ok(capacity)
    }

    /// The same for evictions that follow each other, of lists of any lengths: those that compete may have become as long as
    /// all of them together.
    pub(super) fn capacity_of_turns(&self, compression: &Compression, every: u32) -> Result<Capacity, String> {
        let mut capacity = self.capacity(compression, u32::MAX, every)?;
        let allocation = compression.token.eviction().map(|eviction| eviction.rule(u32::MAX).allocation);
        if matches!(allocation, Some(Allocation::Pyramid { .. })) {
            // Over short lists it is flatter, and then others leave a page partly used.
            let domains = self.domains(compression, u32::MAX)?;
            let tokens: u64 = domains.iter().map(|domain| u64::from(domain.total)).sum();
            let pages = tokens / u64::from(self.full.page.page_size) + domains.len() as u64;
            capacity.kept_pages = u32::try_from(pages).unwrap_or(u32::MAX);
        }
        Ok(capacity)
    }

    pub(super) fn needs(&self, compression: &Compression, document: u32, max_tokens: u32) -> Result<Needs, String> {
        let (shape, layers) = (self.shape_of(compression, max_tokens)?, self.layers(compression)?);
        if !Self::evicts(compression) {
            let first = (shape, Capacity::tokens(max_tokens));
            return Ok(Needs { first, targets: Vec::new(), source_layers: layers.clone(), layers });
        }
        let source = TableShape { codec: HiddenCodec::F16, ..shape };
        let rest = max_tokens.saturating_sub(document);
        let mut targets = match Self::turns(compression, document, max_tokens) {
            // Both of the tables that take turns hold what stays of a document, and of what stayed and N more.
            Some(every) => vec![(shape, self.capacity_of_turns(compression, every)?); 2],
            None => vec![(shape, self.capacity(compression, document, rest)?)],
        };
        let turns = compression.token.eviction().is_some_and(|eviction| eviction.every.is_some());
        targets.iter_mut().for_each(|(_, capacity)| capacity.turns = turns);
        // A repetition stands behind the document for a while.
        let repeats = compression.token.eviction().is_some_and(|e| e.rule(u32::MAX).score == Score::Reconstruction);
        let first = (source, Capacity::tokens(document + if repeats { REPEAT_ROOM } else { 0 }));
        Ok(Needs { first, targets, source_layers: layers.clone(), layers })
    }

    /// Pages that a session commits at most, by their sizes.
    ///
    /// # Errors
    /// As [`Self::domains`].
    pub fn pages_needed(&self, request: &Request) -> Result<Vec<(Bytes, u32)>, String> {
        let needs = self.needs(&request.compression, request.document_tokens(), request.cache_tokens())?;
        let mut pages = Vec::new();
        for (shape, capacity) in std::iter::once(&needs.first).chain(&needs.targets) {
            let (open, sealed) = shape.pages_of_list(capacity.tail_tokens);
            // Saturating: no pool has so many pages.
            let all = |per_list: u32| shape.num_lists().saturating_mul(per_list);
            pages.push((shape.open_page(), all(open + shape.bounds_of_list(capacity.tail_tokens))));
            pages.push((shape.sealed_page(), all(sealed).saturating_add(capacity.kept_pages)));
            pages.extend((capacity.merged_pages > 0).then(|| (shape.merged_page(), capacity.merged_pages)));
        }
        Ok(pages)
    }

    /// Bytes of pages that a session can need at most.
    ///
    /// # Errors
    /// As [`Self::domains`].
    pub fn needed(&self, request: &Request) -> Result<Bytes, String> {
        Ok(Bytes(self.pages_needed(request)?.iter().map(|(page, n)| page.0 * u64::from(*n)).sum()))
    }

    /// Whether a session of this compression holds a slot while its rows are observed.
    pub fn observes(compression: &Compression) -> bool {
        let Some(eviction) = compression.token.eviction() else { return false };
        !matches!(eviction.rule(u32::MAX).score, Score::None)
    }

    /// Admits a session: commits the pages of all its tables, and takes a slot where its rows are observed.
    ///
    /// # Errors
    /// [`PoolError`]; nothing is held then.
    ///
    /// # Panics
    /// For a compression that [`Self::serves`] refuses.
    pub fn admit(
        &mut self,
        id: SessionId,
        compression: &Compression,
        document: u32,
        max_tokens: u32,
    ) -> Result<(), PoolError> {
        // A list of no tokens would keep nothing, for good.
        let document = document.clamp(1, max_tokens.max(1));
        let needs = self.needs(compression, document, max_tokens);
        let Needs { first, targets, layers, source_layers } = needs.expect("a session that is served has its tables");
        let slot = if Self::observes(compression) { Some(self.free_slot()?) } else { None };
        let (pool, ranges) = (&mut self.pool, &mut self.ranges);
        let table = PageTable::admit(pool, ranges, first.0, &source_layers, first.1)?;
        let mut ready: Vec<PageTable> = Vec::new();
        for (shape, capacity) in targets {
            match PageTable::admit(pool, ranges, shape, &layers, capacity) {
                Ok(target) => ready.push(target),
                Err(error) => {
                    for held in std::iter::once(table).chain(ready) {
                        held.release(pool, ranges)?;
                    }
                    return Err(error);
                }
            }
        }
        if !ready.is_empty() {
            self.plan(id, Plan { compression: compression.clone(), due: document, slot, targets: ready });
        }
        self.tables.insert(id, table);
        Ok(())
    }

    /// Notes what is to happen to a cache; its slot begins at zero.
    pub(super) fn plan(&mut self, id: SessionId, plan: Plan) {
        if let Some(slot) = plan.slot {
            self.slots[slot as usize] = Some(id);
            self.fresh.push(slot);
        }
        self.plans.insert(id, plan);
    }

    /// A slot that nobody holds.
    pub(super) fn free_slot(&self) -> Result<u32, PoolError> {
        let free = self.slots.iter().position(Option::is_none);
        let slot = free.ok_or(PoolError::SlotsTaken(self.abilities.slots.unwrap_or(0)))?;
        Ok(u32::try_from(slot).expect("slots are few"))
    }

    /// Slots whose scores begin at zero; they count as cleared from now on.
    pub fn take_fresh(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.fresh)
    }

    /// How many of `n` rows a session's next step may hold.
    pub fn cut(&self, id: SessionId, n: u32) -> u32 {
        let table = &self.tables[&id];
        let until = self.plans.get(&id).map_or(u32::MAX, |plan| plan.due - table.tail());
        table.cut(n.min(until))
    }

    /// Whether a session is evicted from before its next rows.
    pub fn is_due(&self, id: SessionId) -> bool {
        self.plans.get(&id).is_some_and(|plan| self.tables[&id].tail() >= plan.due)
    }

    /// What an eviction will want of `n` coming rows of a session.
    pub fn observed(&self, id: SessionId, n: u32) -> Option<Observed> {
        let plan = self.plans.get(&id)?;
        let (table, slot) = (&self.tables[&id], plan.slot?);
        let score = plan.compression.token.eviction()?.rule(u32::MAX).score;
        let first = table.n_tokens();
        Observed::of(&score, slot, first, first + plan.due - table.tail(), n)
    }

    /// Makes slots begin at zero, for observations outside a schedule.
    pub fn begin_slots(&mut self, slots: impl Iterator<Item = u32>) {
        self.fresh.extend(slots);
    }

    /// Slots that begin at zero in the next step.
    pub(super) fn fresh(&self) -> Vec<u32> {
        self.fresh.clone()
    }

    /// Nobody has a slot any more.
    pub(super) fn forget_fresh(&mut self) {
        self.fresh.clear();
    }

    /// What an eviction of a cache of `n_tokens` tokens per list keeps, whose policy has observed into `slot`.
    ///
    /// # Errors
    /// As [`Self::domains`].
    pub fn selection_of(&self, compression: &Compression, n_tokens: u32, slot: u32) -> Result<Selection, String> {
        let eviction = compression.token.eviction();
        let rule = eviction.map(|eviction| eviction.rule(eviction.kept(n_tokens)));
        Ok(Selection {
            domains: self.domains(compression, n_tokens)?,
            rule: rule.filter(|rule| rule.score != Score::None),
            slot,
            carries: false,
            rerotates: eviction.is_some_and(|eviction| eviction.rerotate),
            merge: self.merging(compression)?,
        })
    }

    /// A table for what an eviction keeps of `n_tokens` tokens per list, and `tail_tokens` more.
    ///
    /// # Errors
    /// [`PoolError`] when it does not fit.
    ///
    /// # Panics
    /// For a compression that [`Self::serves`] or [`Self::domains`] refuses.
    pub fn admit_target(
        &mut self,
        compression: &Compression,
        n_tokens: u32,
        tail_tokens: u32,
    ) -> Result<PageTable, PoolError> {
        let served = "a compression that is served has its table";
        let (shape, layers) = (self.shape(compression).expect(served), self.layers(compression).expect(served));
        let capacity = self.capacity(compression, n_tokens, tail_tokens).expect(served);
        PageTable::admit(&mut self.pool, &mut self.ranges, shape, &layers, capacity)
    }

    /// Tokens of the longest list of a session.
    pub(super) fn longest_list(&self, id: SessionId) -> u32 {
        let (table, heads) = (&self.tables[&id], self.full.num_kv_heads);
        let lists = (0..self.full.num_layers).flat_map(|layer| (0..heads).map(move |head| (layer, head)));
        lists.map(|(layer, head)| table.n_held(layer, head)).max().unwrap_or(0)
    }

    /// What the eviction of a session that is due keeps.
    ///
    /// # Panics
    /// When none is due.
    pub fn selection(&self, id: SessionId) -> Selection {
        let plan = self.plans.get(&id).expect("an eviction that is due has a plan");
        let n_tokens = self.longest_list(id);
        let selection = self.selection_of(&plan.compression, n_tokens, plan.slot.unwrap_or(0));
        let selection = selection.expect("what was admitted has its domains");
        let sums = matches!(selection.rule, Some(Rule { score: Score::Attention { rows: Rows::All, .. }, .. }));
        let again = plan.compression.token.eviction().is_some_and(|eviction| eviction.every.is_some());
        Selection { carries: sums && again, ..selection }
    }

    /// Takes the table that the eviction fills.
    ///
    /// # Panics
    /// When none is due.
    pub fn take_target(&mut self, id: SessionId) -> PageTable {
        self.plans.get_mut(&id).expect("an eviction that is due has a plan").targets.remove(0)
    }

    /// Ends an eviction: the filled table takes over, the bytes of the old one return.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    ///
    /// # Panics
    /// When no eviction was due.
    pub fn swap(&mut self, id: SessionId, target: PageTable) -> Result<(), PoolError> {
        let (shape, layers, capacity) = (*target.shape(), target.layers().clone(), target.admitted());
        let before = self.tables.insert(id, target).expect("an admitted session has a table");
        let took_turns = before.admitted() == capacity && *before.shape() == shape;
        self.evicted_tokens += before.held_tokens() - self.tables[&id].held_tokens();
        before.release(&mut self.pool, &mut self.ranges)?;
        let plan = self.plans.get_mut(&id).expect("an eviction that was due has a plan");
        if took_turns {
            // What has just returned is what is committed again.
            plan.targets.push(PageTable::admit(&mut self.pool, &mut self.ranges, shape, &layers, capacity)?);
        }
        match plan.compression.token.eviction().and_then(|eviction| eviction.every) {
            Some(every) if !plan.targets.is_empty() => {
                plan.due = every;
                // A later eviction may keep more than this one did: its table is made of what this table returns.
                let filled = self.tables.get_mut(&id).expect("it was swapped in");
                filled.commit_rest(&mut self.pool)?;
                let sums = plan.compression.token.eviction().map(|eviction| eviction.rule(u32::MAX).score);
                // Sums over all rows go on; those of a few rows begin anew.
                if matches!(sums, Some(Score::Attention { rows: Rows::Last(_), .. })) {
                    self.fresh.extend(plan.slot);
                }
            }
            _ => self.drop_plan(id)?,
        }
        Ok(())
    }

    fn drop_plan(&mut self, id: SessionId) -> Result<(), PoolError> {
        let Some(plan) = self.plans.remove(&id) else { return Ok(()) };
        for target in plan.targets {
            target.release(&mut self.pool, &mut self.ranges)?;
        }
        if let Some(slot) = plan.slot {
            self.slots[slot as usize] = None;
            // Whoever takes it next may bring what it holds along.
            self.fresh.retain(|fresh| *fresh != slot);
        }
        Ok(())
    }

    /// Ends a session's cache: everything returns.
    ///
    /// # Errors
    /// [`PoolError`] when the pool disagrees, which would be a defect.
    pub fn release(&mut self, id: SessionId) -> Result<(), PoolError> {
        self.drop_plan(id)?;
        match self.tables.remove(&id) {
            Some(table) => table.release(&mut self.pool, &mut self.ranges),
            None => Ok(()),
        }
    }

    /// Tokens that evictions have removed so far, over all lists. Bytes are another count: a page returns when all of its
    /// tokens are gone.
    pub const fn evicted_tokens(&self) -> u64 {
        self.evicted_tokens
    }

    /// Makes room for the rows of a step.
    ///
    /// # Errors
    /// [`PoolError`] beyond what was admitted.
    pub fn grow(&mut self, plan: &StepPlan) -> Result<(), PoolError> {
        self.window.clear();
        for (session, n_rows) in plan.rows_of_sessions() {
            let table = self.tables.get_mut(&session).expect("an admitted session has a table");
            table.grow(&mut self.pool, &mut self.window, n_rows)?;
        }
        Ok(())
    }

    /// Ends a step: what it sealed has no open form any more.
    pub fn retire(&mut self, plan: &StepPlan) {
        for rows in &plan.segments {
            self.tables.get_mut(&rows.session).expect("an admitted session has a table").retire();
        }
    }
}
