//! The hidden dimension: how one page of K and V becomes bytes.
//!
//! Keys and values choose separately; each is a [`Codec`], a transform of a head's channels followed by a quantiser:
//!
//! | written | transform | quantiser | file |
//! |---|---|---|---|
//! | `f16`, `f32` | none | none | [`float16`], [`float32`] |
//! | `fp8`, `int8` | none | 8 bits | [`fp8`], [`int8`] |
//! | `kivi4`, `kivi2` (`kivi4:64` for groups of 64) | none | keys per channel, values per token | [`kivi`] |
//! | `rot4`, `rot3`, `rot2` | Hadamard rotation | codebook of a Gaussian, one scale per token | [`rot`] |
//! | `mean+rot4`, `mean+rot3`, `mean+rot2` | the same, and a page's mean is taken out of keys | the same | [`rot`] |
//! | `think:0.6`, `think:0.6+int8` | keys lose channels | the one that follows | [`think`] |
//! | `lowrank:32`, `lowrank:32+int8` | projection to latents | the one that follows | [`lowrank`] |
//!
//! `hidden=kivi4` is for both, `hidden=k:kivi2,v:rot4` for each; a side left out is f16. The functions here are the
//! definition: [`Codec::encode`] says which bits a sealed page has, on every device, and [`Codec::decode`] what
//! attention reads in them. The shaders of the same names follow them bit by bit.

pub mod affine;
pub mod float16;
pub mod float32;
pub mod fp8;
pub mod int8;
pub mod kivi;
pub mod lowrank;
mod parse;
pub mod plane;
pub mod rot;
pub mod think;

use crate::geometry::{Bytes, PageGeometry, WORD_BYTES};
pub use parse::{Entry, REGISTRY, examples};

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Keys: read by lanes that own tokens.
    Key,
    /// Values: read by lanes that own channels.
    Value,
}

/// The matrix that a quantiser encodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideShape {
    /// Keys or values.
    pub side: Side,
    /// Tokens: rows.
    pub page_size: u32,
    /// Channels, or latents: columns, a multiple of 8.
    pub width: u32,
}

impl SideShape {
    /// Index of a value in `[page_size][width]`.
    pub const fn index(&self, token: u32, channel: u32) -> usize {
        (token * self.width + channel) as usize
    }

    /// `[page_size][width]` values from a function of token and channel.
    fn fill(&self, value: impl Fn(u32, u32) -> f32) -> Vec<f32> {
        (0..self.page_size).flat_map(|t| (0..self.width).map(move |c| (t, c))).map(|(t, c)| value(t, c)).collect()
    }
}

/// How a matrix of numbers becomes words. Implementations are the definition that shaders follow.
pub trait Quantize {
    /// Words, before the side is padded to whole cells.
    fn words(&self, shape: SideShape) -> u32;

    /// Writes `[page_size][width]` values into `out`, which is zero.
    fn encode(&self, shape: SideShape, values: &[f32], out: &mut [u32]);

    /// Reads `[page_size][width]` values.
    fn decode(&self, shape: SideShape, words: &[u32]) -> Vec<f32>;
}

/// What is done to a head's channels before they are quantised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transform {
    /// Nothing.
    #[default]
    None,
    /// Hadamard rotation.
    Rotation,
    /// Hadamard rotation of keys, of which each page's mean is taken out.
    CentredRotation,
    /// Keys lose channels; this many of 1000 stay.
    Pruning {
        /// Channels that stay, of 1000.
        keep_permille: u32,
    },
    /// Projection to latents.
    LowRank {
        /// Latents.
        rank: u32,
    },
}

/// How numbers become codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Quantizer {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    #[default]
    F16,
    /// e4m3.
    Fp8,
    /// 8 bits per token.
    Int8,
    /// KIVI.
    Kivi {
        /// Bits of a code.
        bits: u32,
        /// Tokens of a group of keys, channels of a group of values.
        group: u32,
    },
    /// Gaussian with one scale per token, for rotated channels.
    Gaussian {
        /// Bits of a code.
        bits: u32,
    },
}

impl Quantizer {
    /// Its definition.
    fn definition(&self) -> Box<dyn Quantize> {
        match *self {
            Self::F32 => Box::new(float32::Float32),
            Self::F16 => Box::new(float16::Float16),
            Self::Fp8 => Box::new(fp8::Fp8),
            Self::Int8 => Box::new(int8::Int8),
            Self::Kivi { bits, group } => Box::new(kivi::Kivi { bits, group }),
            Self::Gaussian { bits } => Box::new(rot::Gaussian { bits }),
        }
    }
}

/// How one side of a page becomes bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Codec {
    /// What happens to the channels first.
    pub transform: Transform,
    /// What happens to the numbers then.
    pub quantizer: Quantizer,
}

/// What a (layer, KV head) brings to its codecs, from the model's weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadParameters {
    /// Basis of keys before rotary positions, `[head_dim][head_dim]`, best column first: for [`lowrank`].
    pub key_basis: Vec<half::f16>,
    /// Basis of values, likewise.
    pub value_basis: Vec<half::f16>,
    /// Base of the rotary frequencies: for [`lowrank`].
    pub rope_theta: f32,
}

/// Where a page stands: what its codes depend on besides its numbers.
#[derive(Clone, Copy, Debug)]
pub struct PageContext<'a> {
    /// Of its (layer, KV head).
    pub parameters: &'a HeadParameters,
    /// Position of its first token.
    pub first_position: u32,
    /// Positions of all its tokens where they are not consecutive.
    pub kept: Option<&'a [u32]>,
}

impl<'a> PageContext<'a> {
    /// A page of consecutive tokens.
    pub const fn at(parameters: &'a HeadParameters, first_position: u32) -> Self {
        Self { parameters, first_position, kept: None }
    }

    /// A page of tokens that an eviction kept: their positions, `page_size` of them.
    ///
    /// # Panics
    /// When there is none.
    pub const fn kept(parameters: &'a HeadParameters, positions: &'a [u32]) -> Self {
        Self { parameters, first_position: positions[0], kept: Some(positions) }
    }

    /// Positions of the page's tokens.
    fn positions(self) -> impl Iterator<Item = u32> + 'a {
        let consecutive = self.kept.is_none().then_some(self.first_position..);
        self.kept.into_iter().flatten().copied().chain(consecutive.into_iter().flatten())
    }
}

impl Codec {
    /// Channels, or latents, of one token.
    pub const fn width(&self, head_dim: u32) -> u32 {
        match self.transform {
            Transform::None | Transform::Rotation | Transform::CentredRotation => head_dim,
            Transform::Pruning { keep_permille } => think::kept(head_dim, keep_permille),
            Transform::LowRank { rank } => rank,
        }
    }

    /// The matrix that the quantiser sees.
    pub const fn shape(&self, side: Side, page: PageGeometry) -> SideShape {
        SideShape { side, page_size: page.page_size, width: self.width(page.head_dim) }
    }

    /// Words of codes, scales and minima; what the transform keeps of a page follows: the mask of [`think`], or the mean of
    /// [`rot`].
    pub fn quantizer_words(&self, side: Side, page: PageGeometry) -> u32 {
        self.quantizer.definition().words(self.shape(side, page)).next_multiple_of(4)
    }

    /// Words of one side of a page: a multiple of 4.
    pub fn words(&self, side: Side, page: PageGeometry) -> u32 {
        let mask = match self.transform {
            Transform::Pruning { .. } => think::mask_words(self.width(page.head_dim)),
            Transform::CentredRotation => page.head_dim / 2,
            // Positions: latents are turned when they are read.
            Transform::LowRank { .. } if side == Side::Key => page.page_size,
            _ => 0,
        };
        self.quantizer_words(side, page) + mask
    }

    /// The words of a side whose tokens are `values`, `[page_size][head_dim]`, each exact in f16.
    ///
    /// # Panics
    /// When `values` is not one page.
    pub fn encode(&self, side: Side, page: PageGeometry, context: PageContext<'_>, values: &[f32]) -> Vec<u32> {
        assert_eq!(values.len() as u64, page.elements(), "a sealed page is full");
        let (width, shape) = (page.head_dim as usize, self.shape(side, page));
        let mut out = vec![0; self.words(side, page) as usize];
        let (codes, mask) = out.split_at_mut(self.quantizer_words(side, page) as usize);
        let parameters = context.parameters;
        let transformed: Vec<f32> = match self.transform {
            Transform::None => values.to_vec(),
            Transform::Rotation => {
                let mut rows = values.to_vec();
                rows.chunks_exact_mut(width).for_each(rot::rotate);
                rows
            }
            Transform::CentredRotation => {
                let mut rows = values.to_vec();
                rows.chunks_exact_mut(width).for_each(rot::rotate);
                let mean = rot::page_mean(&rows, page.head_dim, context.first_position);
                bytemuck::cast_slice_mut(mask).copy_from_slice(&mean);
                for row in rows.chunks_exact_mut(width) {
                    row.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean.to_f32());
                }
                rows
            }
            Transform::Pruning { .. } => {
                let channels = think::choose(values, page.head_dim, shape.width);
                think::write_mask(&channels, mask);
                think::gather(values, page.head_dim, &channels)
            }
            Transform::LowRank { rank } => {
                if side == Side::Key {
                    mask.iter_mut().zip(context.positions()).for_each(|(word, position)| *word = position);
                }
                context
                    .positions()
                    .zip(values.chunks_exact(width))
                    .flat_map(|(position, row)| match side {
                        Side::Key => {
                            let angles = lowrank::angles(position, page.head_dim, parameters.rope_theta);
                            let before = lowrank::turn_back(row, &angles);
                            lowrank::project(&before, &parameters.key_basis, rank)
                        }
                        Side::Value => lowrank::project(row, &parameters.value_basis, rank),
                    })
                    // What follows sees f16, as it does without a projection. Devices disagree about the sign of a NaN.
                    .map(|z| if z.is_finite() { half::f16::from_f32(z).to_f32() } else { f32::NAN })
                    .collect()
            }
        };
        self.quantizer.definition().encode(shape, &transformed, codes);
        out
    }

    /// What attention reads in a side: `[page_size][head_dim]`.
    pub fn decode(&self, side: Side, page: PageGeometry, context: PageContext<'_>, words: &[u32]) -> Vec<f32> {
        let shape = self.shape(side, page);
        let (codes, mask) = words.split_at(self.quantizer_words(side, page) as usize);
        let mut rows = self.quantizer.definition().decode(shape, codes);
        match self.transform {
            Transform::None => rows,
            Transform::Rotation => {
                rows.chunks_exact_mut(page.head_dim as usize).for_each(rot::rotate_back);
                rows
            }
            Transform::CentredRotation => {
                let mean: &[half::f16] = bytemuck::cast_slice(mask);
                for row in rows.chunks_exact_mut(page.head_dim as usize) {
                    row.iter_mut().zip(mean).for_each(|(x, mean)| *x += mean.to_f32());
                    rot::rotate_back(row);
                }
                rows
            }
            Transform::Pruning { .. } => think::scatter(&rows, page.head_dim, &think::read_mask(mask, shape.width)),
            Transform::LowRank { .. } => {
                let parameters = context.parameters;
                let lifted = rows.chunks_exact(shape.width as usize).enumerate().flat_map(|(token, z)| match side {
                    Side::Key => {
                        let angles = lowrank::angles(mask[token], page.head_dim, parameters.rope_theta);
                        lowrank::turn(&lowrank::lift(z, &parameters.key_basis, page.head_dim), &angles)
                    }
                    Side::Value => lowrank::lift(z, &parameters.value_basis, page.head_dim),
                });
                #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is what is wanted")]
                lifted.map(|x| x as f32).collect()
            }
        }
    }
}

/// How a page becomes bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HiddenCodec {
    /// Keys.
    pub k: Codec,
    /// Values.
    pub v: Codec,
    /// Whether pages hold directions that two layers have in common, and each layer's lengths: what the layer dimension makes
    /// of merged layers, never written in a compression.
    pub paired: bool,
}

impl HiddenCodec {
    /// What open pages hold.
    pub const F16: Self = Self {
        k: Codec { transform: Transform::None, quantizer: Quantizer::F16 },
        v: Codec { transform: Transform::None, quantizer: Quantizer::F16 },
        paired: false,
    };

    /// The same codec over directions of two layers.
    #[must_use]
    pub const fn for_pairs(self) -> Self {
        Self { paired: true, ..self }
    }

    /// Words of lengths behind the sides of a page, where it has any: of each token's key, then value, in the lower and the
    /// upper layer, f16.
    pub const fn length_words(&self, page: PageGeometry) -> u32 {
        if self.paired { 2 * page.page_size } else { 0 }
    }

    /// Words of keys and values, before any lengths.
    pub fn side_words(&self, page: PageGeometry) -> u32 {
        self.k.words(Side::Key, page) + self.v.words(Side::Value, page)
    }

    /// Whether full pages are encoded; those of f16 stay as they are.
    pub fn seals(&self) -> bool {
        *self != Self::F16
    }

    /// The codec of a side.
    pub const fn side(&self, side: Side) -> Codec {
        match side {
            Side::Key => self.k,
            Side::Value => self.v,
        }
    }

    /// Bytes of one page.
    pub fn page_bytes(&self, page: PageGeometry) -> Bytes {
        Bytes(u64::from(self.side_words(page) + self.length_words(page)) * WORD_BYTES)
    }

    /// Bits per value of a page, everything in it included.
    pub fn effective_bits(&self, page: PageGeometry) -> f64 {
        (self.page_bytes(page).0 * 8) as f64 / (2 * page.elements()) as f64
    }

    /// Whether pages of this shape can be encoded.
    ///
    /// # Errors
    /// A sentence with the numbers.
    pub fn check(&self, page: PageGeometry) -> Result<(), String> {
        let PageGeometry { page_size, head_dim } = page;
        for codec in [self.k, self.v] {
            if let Quantizer::Kivi { group, .. } = codec.quantizer
                && page_size % group != 0
            {
                return Err(format!(
                    "hidden={self}: pages of {page_size} tokens do not hold whole groups of {group}; \
                     use --page-size {group} or smaller groups"
                ));
            }
            if let Transform::LowRank { rank } = codec.transform
                && rank > head_dim
            {
                return Err(format!("hidden={self}: a head of {head_dim} channels has no rank of {rank}"));
            }
        }
        Ok(())
    }

    /// Encodes a page from its K and V, each `[page_size][head_dim]` and exact in f16.
    pub fn encode(&self, page: PageGeometry, context: PageContext<'_>, k: &[f32], v: &[f32]) -> Vec<u32> {
        let mut words = self.k.encode(Side::Key, page, context, k);
        words.extend(self.v.encode(Side::Value, page, context, v));
        words
    }

    /// The K and V that attention reads in a page, each `[page_size][head_dim]`; of merged layers, their directions.
    pub fn decode(&self, page: PageGeometry, context: PageContext<'_>, words: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let (k, v) = words[..self.side_words(page) as usize].split_at(self.k.words(Side::Key, page) as usize);
        (self.k.decode(Side::Key, page, context, k), self.v.decode(Side::Value, page, context, v))
    }
}
