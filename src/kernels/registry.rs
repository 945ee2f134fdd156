//! Every kernel that can be asked for, so that tests cover what the program can reach.

use super::append::Positions;
use super::attention::{CacheShape, Format};
use super::decode::{DecodeSpec, DecodeTuning};
use super::gather::GatherTuning;
use super::latent_decode::LatentDecodeSpec;
use super::matmul::Product;
use super::prefill::{PrefillSpec, PrefillTuning};
use super::product_tuning::{CooperativeRows, ProductTuning};
use super::score::ScoreTuning;
use super::seal::SealSpec;
use super::{
    KernelSpec, append, embed, gather, key_scores, merge_layers, merge_states, moments, move_pages, quest, sample,
    score, select, stream,
};
use crate::compression::hidden::{self, Codec, HiddenCodec};
use crate::device::Tier;
use crate::geometry::{HeadGeometry, PageGeometry};

/// Head widths that tests and `verify` cover.
pub const HEAD_DIMS: [u32; 5] = [64, 80, 96, 128, 256];
/// Query heads per KV head that tests and `verify` cover.
pub const GROUP_SIZES: [u32; 5] = [1, 3, 4, 7, 8];
/// Tokens per page that can be chosen.
pub const PAGE_SIZES: [u32; 4] = [16, 32, 64, 128];
/// The page size of the program where nothing else is said.
pub const DEFAULT_PAGE_SIZE: u32 = 64;

/// Cache shapes over all head widths, group sizes and the given page sizes, on two KV heads.
pub fn cache_shapes(page_sizes: &[u32]) -> Vec<CacheShape> {
    let mut shapes = Vec::new();
    for head_dim in HEAD_DIMS {
        for group_size in GROUP_SIZES {
            for &page_size in page_sizes {
                let heads = HeadGeometry { num_qo_heads: 2 * group_size, num_kv_heads: 2, head_dim };
                shapes.push(CacheShape { heads, page_size });
            }
        }
    }
    shapes
}

/// The codecs of the registry that pages of this shape can have.
pub fn codecs(page: PageGeometry) -> Vec<HiddenCodec> {
    hidden::examples().filter(|codec| codec.check(page).is_ok()).collect()
}

/// Every spec of every kernel, over both tiers.
pub fn all_specs() -> Vec<KernelSpec> {
    let mut specs = vec![
        select::decide(),
        select::select(),
        select::carry(),
        move_pages::kernel(),
        stream::read(),
        stream::copy(),
        embed::kernel(),
    ];
    for tier in [Tier::Portable, Tier::Subgroup] {
        specs.push(sample::kernel(tier));
    }
    for tuning in ProductTuning::candidates() {
        specs.extend(Product::ALL.into_iter().flat_map(|product| product_specs(product, tuning)));
    }
    for tile in CooperativeRows::ALL {
        specs.extend(Product::ALL.map(|product| product.matmul_coop(tile)));
    }
    for tier in [Tier::Portable, Tier::Subgroup] {
        let codec = Codec::default();
        let latent = LatentDecodeSpec { num_qo_heads: 128, width_qk: 576, width_vo: 512, page_size: 64, codec, tier };
        specs.extend([latent.kernel(), merge_states::kernel(&latent.merge_shape())]);
    }
    for shape in cache_shapes(&PAGE_SIZES) {
        specs.extend([merge_states::kernel(&shape), moments::kernel(&shape)]);
        specs.extend([Positions::Applied, Positions::Rotary].map(|positions| append::kernel(&shape, positions)));
        specs.extend([merge_layers::kernel(&shape), quest::page_bounds(&shape), quest::quest(&shape)]);
        for codec in codecs(shape.page()) {
            specs.extend(format_specs(&shape.format(codec)));
        }
    }
    specs
}

/// A product for many rows, and for few, as many to a workgroup as there can be.
fn product_specs(product: Product, tuning: ProductTuning) -> Vec<KernelSpec> {
    let few = tuning.few.forms().flat_map(|form| form.rows(u32::MAX).map(move |rows| product.matvec(rows, form)));
    std::iter::once(product.matmul(tuning.many)).chain(few).collect()
}

/// Prefill as each tier launches it. Page and group sizes are mere numbers in its text, so other launches stand for all sizes
/// with one.
fn prefill_specs(format: &Format) -> Vec<KernelSpec> {
    let shape = format.shape;
    let tunings = if shape.page_size == DEFAULT_PAGE_SIZE && shape.heads.group_size() == 4 {
        PrefillTuning::candidates(format)
    } else {
        [Tier::Portable, Tier::Cooperative].map(PrefillTuning::of_tier).into()
    };
    let mut specs: Vec<_> = tunings.into_iter().map(|tuning| PrefillSpec::new(*format, tuning).kernel()).collect();
    specs.dedup();
    specs
}

/// The kernels that read pages of a format, those that make them, and those of evictions.
pub fn format_specs(format: &Format) -> Vec<KernelSpec> {
    let mut specs = prefill_specs(format);
    specs.push(key_scores::kernel(format));
    // Tiles differ in constants alone, so every one of them is looked at for one shape, and elsewhere the default.
    let (head_dim, group) = (format.shape.heads.head_dim, format.shape.heads.group_size());
    let all = (head_dim, group) == (128, 4) && format.shape.page_size == DEFAULT_PAGE_SIZE;
    let scores = if all { ScoreTuning::candidates() } else { vec![ScoreTuning::default()] };
    specs.extend(scores.into_iter().map(|tuning| score::kernel(format, tuning)));
    let gathers = if all { GatherTuning::candidates() } else { vec![GatherTuning::default()] };
    specs.extend(gathers.into_iter().map(|tuning| gather::kernel(format, tuning)));
    let mut tunings = if all { DecodeTuning::candidates(format) } else { vec![DecodeTuning::General] };
    if !all && format.shape.page_size >= DEFAULT_PAGE_SIZE {
        tunings.push(DecodeTuning::of_kind("gpu", format));
        tunings.dedup();
    }
    for tuning in tunings {
        let spec = |tier| DecodeSpec { format: *format, tier, tuning }.kernel();
        specs.extend([Tier::Portable, Tier::Subgroup].map(spec));
    }
    if all {
        let plain = |tier| DecodeSpec { format: *format, tier, tuning: DecodeTuning::General }.plain();
        specs.extend([Tier::Portable, Tier::Subgroup].map(plain));
    }
    if format.codec.seals() {
        specs.push(SealSpec::new(*format).kernel());
    }
    specs
}
