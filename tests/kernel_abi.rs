//! Without a GPU: what the host writes is what the shaders read, and files that stand in for each other look alike.
//!
//! naga reflects the joined text of every kernel; the structs of immediate data have to equal the tables of
//! `concertina::kernels::abi` in name, fields and offsets. Files of one kind (page codecs, lane reductions) have to
//! export the same functions with the same signatures, because a kernel is linked with any one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use concertina::compression::hidden::Side;
use concertina::geometry::HeadGeometry;
use concertina::kernels::abi::{
    AppendItem, AppendParams, AttentionParams, CarryItem, CarryParams, DecideItem, DecideParams, DecodeItem,
    EmbedParams, GatherItem, GatherParams, Immediates, KeyScoreItem, KeyScoreParams, MatmulParams, MergeItem,
    MergeLayersItem, MergeLayersParams, MergeParams, MomentItem, MomentParams, MovePagesItem, MovePagesParams,
    PageBoundsItem, PageBoundsParams, PrefillItem, QuestItem, QuestParams, SampleItem, SampleParams, ScoreItem,
    ScoreParams, SealItem, SealParams, SelectItem, SelectList, SelectParams, StreamParams, VEC4_WORDS,
};
use concertina::kernels::attention::CacheShape;
use concertina::kernels::registry::{all_specs, codecs, format_specs};
use concertina::kernels::{KernelSpec, Part, link};
use rayon::prelude::*;

/// A struct as either side declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layout {
    name: String,
    fields: Vec<(String, usize)>,
    bytes: usize,
}

fn host<T: Immediates>() -> Layout {
    let fields = T::FIELDS.iter().map(|(name, offset)| ((*name).to_owned(), *offset)).collect();
    Layout { name: T::NAME.to_owned(), fields, bytes: T::BYTES as usize }
}

fn host_layouts() -> BTreeMap<String, Layout> {
    let all = [
        host::<AppendParams>(),
        host::<AttentionParams>(),
        host::<CarryParams>(),
        host::<MovePagesParams>(),
        host::<DecideParams>(),
        host::<EmbedParams>(),
        host::<GatherParams>(),
        host::<KeyScoreParams>(),
        host::<MatmulParams>(),
        host::<MergeParams>(),
        host::<MomentParams>(),
        host::<MergeLayersParams>(),
        host::<PageBoundsParams>(),
        host::<QuestParams>(),
        host::<SampleParams>(),
        host::<ScoreParams>(),
        host::<SealParams>(),
        host::<StreamParams>(),
        host::<SelectParams>(),
    ];
    all.into_iter().map(|layout| (layout.name.clone(), layout)).collect()
}

/// The struct of the `immediate` variable; `None` when there is none.
fn shader_layout(module: &naga::Module) -> Result<Option<Layout>, String> {
    let mut variables = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::Immediate);
    let Some((_, variable)) = variables.next() else { return Ok(None) };
    if variables.next().is_some() {
        return Err("more than one variable of immediate data".to_owned());
    }
    let ty = &module.types[variable.ty];
    let name = ty.name.clone().ok_or("the type of the immediate data has no name")?;
    let naga::TypeInner::Struct { members, span } = &ty.inner else { return Err(format!("{name} is not a struct")) };
    let mut fields = Vec::new();
    for member in members {
        let field = member.name.clone().unwrap_or_default();
        // The host's structs hold nothing wider, so that no padding rule of either language applies.
        if !matches!(module.types[member.ty].inner, naga::TypeInner::Scalar(scalar) if scalar.width == 4) {
            return Err(format!("{name}.{field} is not a 32-bit scalar"));
        }
        fields.push((field, member.offset as usize));
    }
    Ok(Some(Layout { name, fields, bytes: *span as usize }))
}

/// The first difference between what the host writes and what a shader reads.
fn compare(host: &Layout, shader: &Layout) -> Result<(), String> {
    if host.name != shader.name {
        return Err(format!("the host writes {}, the shader reads {}", host.name, shader.name));
    }
    for at in 0..host.fields.len().max(shader.fields.len()) {
        let (expected, found) = (host.fields.get(at), shader.fields.get(at));
        if expected != found {
            return Err(format!("{}, field {at}: the host has {expected:?}, the shader {found:?}", host.name));
        }
    }
    if host.bytes != shader.bytes {
        return Err(format!("{}: {} bytes on the host, {} in the shader", host.name, host.bytes, shader.bytes));
    }
    Ok(())
}

#[test]
fn immediate_data_are_the_same_on_both_sides() {
    let hosts = host_layouts();
    let read = |spec: &KernelSpec| {
        let (module, _) = link(spec).validate().unwrap_or_else(|e| panic!("{} {:?}: {e}", spec.name, spec.constants));
        let shader = shader_layout(&module).unwrap_or_else(|e| panic!("{}: {e}", spec.name));
        let shader = shader.unwrap_or_else(|| panic!("{} reads no immediate data", spec.name));
        let host = hosts.get(&shader.name).unwrap_or_else(|| panic!("{}: no struct {} here", spec.name, shader.name));
        compare(host, &shader).unwrap_or_else(|e| panic!("{}: {e}", spec.name));
        assert_eq!(spec.immediate_bytes as usize, shader.bytes, "{}: bytes of immediate data", spec.name);
        shader.name
    };
    // One of each text: constants decide how much is computed, not what a struct is. `kernel_matrix` counts the bytes of all.
    let text = |spec: &KernelSpec| {
        let parts: Vec<_> = spec.parts.iter().map(|part| format!("{} {:?}", part.module.name, part.side)).collect();
        (spec.name, parts)
    };
    let specs: BTreeMap<_, _> = all_specs().into_iter().map(|spec| (text(&spec), spec)).collect();
    assert!(specs.len() > 50, "every kernel, and those of formats over many codecs, not {}", specs.len());
    let seen: BTreeSet<_> = specs.par_iter().map(|(_, spec)| read(spec)).collect();
    let known: BTreeSet<_> = hosts.keys().cloned().collect();
    assert_eq!(seen, known, "every struct of the host should be read by some kernel");
}

#[test]
fn work_items_are_whole_rows_of_the_step_buffer() {
    for (name, found, expected) in [
        ("DecodeItem", size_of::<DecodeItem>(), 32),
        ("PrefillItem", size_of::<PrefillItem>(), 48),
        ("MergeItem", size_of::<MergeItem>(), 16),
        ("AppendItem", size_of::<AppendItem>(), 32),
        ("SealItem", size_of::<SealItem>(), 32),
        ("ScoreItem", size_of::<ScoreItem>(), 48),
        ("KeyScoreItem", size_of::<KeyScoreItem>(), 32),
        ("DecideItem", size_of::<DecideItem>(), 32),
        ("SelectItem", size_of::<SelectItem>(), 32),
        ("SelectList", size_of::<SelectList>(), 16),
        ("CarryItem", size_of::<CarryItem>(), 16),
        ("GatherItem", size_of::<GatherItem>(), 48),
        ("MomentItem", size_of::<MomentItem>(), 16),
        ("MergeLayersItem", size_of::<MergeLayersItem>(), 32),
        ("MovePagesItem", size_of::<MovePagesItem>(), 16),
        ("PageBoundsItem", size_of::<PageBoundsItem>(), 32),
        ("QuestItem", size_of::<QuestItem>(), 48),
        ("SampleItem", size_of::<SampleItem>(), 32),
    ] {
        assert_eq!(found, expected, "bytes of {name}");
        assert_eq!(found % (4 * VEC4_WORDS), 0, "{name} should be whole vec4<u32>");
    }
}

/// How a shader reads its work list: rows of an item, and those of them that it looks at. `None` where it has no list.
fn item_rows(text: &str) -> Result<Option<(usize, BTreeSet<usize>)>, String> {
    let (mut strides, mut rows) = (BTreeSet::new(), BTreeSet::new());
    for read in text.split("step[par.items + ").skip(1) {
        let index = read.split(']').next().unwrap_or_default();
        // `item`, `item * 3u` or `item * 3u + 2u`.
        let number = |text: &str| text.trim().trim_end_matches('u').parse::<usize>().map_err(|_| index.to_owned());
        let (item, row) = index.split_once(" + ").map_or((index, Ok(0)), |(item, row)| (item, number(row)));
        strides.insert(item.split_once(" * ").map_or(Ok(1), |(_, stride)| number(stride))?);
        rows.insert(row?);
    }
    match strides.pop_first() {
        Some(stride) if strides.is_empty() => Ok(Some((stride, rows))),
        Some(stride) => Err(format!("items of {stride} rows, and of {strides:?}")),
        None => Ok(None),
    }
}

#[test]
fn shaders_read_items_as_long_as_they_are_written() {
    let sizes = BTreeMap::from([
        ("append.wgsl", size_of::<AppendItem>()),
        ("carry.wgsl", size_of::<CarryItem>()),
        ("decide.wgsl", size_of::<DecideItem>()),
        ("decode.wgsl", size_of::<DecodeItem>()),
        ("decode_tiled.wgsl", size_of::<DecodeItem>()),
        ("gather.wgsl", size_of::<GatherItem>()),
        ("key_scores.wgsl", size_of::<KeyScoreItem>()),
        ("merge_states.wgsl", size_of::<MergeItem>()),
        ("moments.wgsl", size_of::<MomentItem>()),
        ("merge_layers.wgsl", size_of::<MergeLayersItem>()),
        ("move_pages.wgsl", size_of::<MovePagesItem>()),
        ("page_bounds.wgsl", size_of::<PageBoundsItem>()),
        ("quest.wgsl", size_of::<QuestItem>()),
        ("prefill_tile.wgsl", size_of::<PrefillItem>()),
        ("sample.wgsl", size_of::<SampleItem>()),
        ("score.wgsl", size_of::<ScoreItem>()),
        ("score_general.wgsl", size_of::<ScoreItem>()),
        ("seal.wgsl", size_of::<SealItem>()),
        ("select.wgsl", size_of::<SelectItem>()),
    ]);
    let mut seen = BTreeSet::new();
    for (name, text) in ["attention", "cache", "evict", "model"].iter().flat_map(|folder| wgsl_files(folder, "")) {
        let Some((stride, rows)) = item_rows(&text).unwrap_or_else(|e| panic!("{name}: {e}")) else { continue };
        let size = sizes.get(name.as_str()).unwrap_or_else(|| panic!("{name} reads items that are not named here"));
        assert_eq!(stride * 4 * VEC4_WORDS, *size, "{name}: bytes of an item");
        assert!(rows.iter().all(|row| *row < stride), "{name} reads rows {rows:?} of an item of {stride}");
        seen.insert(name);
    }
    assert_eq!(seen.len(), sizes.len(), "every list should be read by some shader: {seen:?}");
}

#[test]
fn items_of_another_length_are_noticed() {
    let rows = |text: &str| item_rows(text);
    assert_eq!(rows("let a = tables[item];"), Ok(None), "no list");
    assert_eq!(rows("step[par.items + item]"), Ok(Some((1, BTreeSet::from([0])))), "one row");
    let three = "step[par.items + i * 3u]; step[par.items + i * 3u + 2u]";
    assert_eq!(rows(three), Ok(Some((3, BTreeSet::from([0, 2])))), "three rows");
    assert!(rows("step[par.items + i * 3u]; step[par.items + i * 2u + 1u]").is_err(), "two lengths");
    assert!(rows("step[par.items + i * n]").is_err(), "a length that is no number");
}

fn parse(wgsl: &str) -> naga::Module {
    naga::front::wgsl::parse_str(wgsl).unwrap_or_else(|e| panic!("{}", e.emit_to_string(wgsl)))
}

#[test]
fn a_difference_in_immediate_data_is_noticed() {
    let host = host::<MergeParams>();
    let shader = |text: &str| {
        let module = parse(&format!("{text}\nvar<immediate> params: MergeParams;"));
        shader_layout(&module).map(|layout| layout.expect("there are immediate data"))
    };
    let good = "struct MergeParams { items: u32, n_items: u32, o_stride: u32 }";
    assert_eq!(compare(&host, &shader(good).expect("scalars")), Ok(()), "the same struct should pass");
    for (wrong, bad) in [
        ("a renamed field", "struct MergeParams { items: u32, count: u32, o_stride: u32 }"),
        ("swapped fields", "struct MergeParams { n_items: u32, items: u32, o_stride: u32 }"),
        ("a missing field", "struct MergeParams { items: u32, n_items: u32 }"),
        ("an additional field", "struct MergeParams { items: u32, n_items: u32, o_stride: u32, more: u32 }"),
        ("a moved field", "struct MergeParams { items: u32, @align(16) n_items: u32, o_stride: u32 }"),
    ] {
        let difference = shader(bad).and_then(|shader| compare(&host, &shader));
        assert!(difference.is_err(), "{wrong} should be noticed");
    }
    let vector = shader("struct MergeParams { items: vec3<u32> }");
    assert!(vector.is_err(), "a field that is no scalar should be noticed");
    let renamed = Layout { name: "OtherParams".to_owned(), ..host.clone() };
    assert!(compare(&host, &renamed).is_err(), "another struct should be noticed");
    assert_eq!(shader_layout(&parse("fn f() {}")), Ok(None), "no immediate data is not an error here");
}

fn type_name(module: &naga::Module, ty: naga::Handle<naga::Type>) -> String {
    let ty = &module.types[ty];
    ty.name.clone().unwrap_or_else(|| format!("{:?}", ty.inner))
}

/// `name(types) -> type` of every function whose name begins with `prefix`.
fn signatures(module: &naga::Module, prefix: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for (_, function) in module.functions.iter() {
        let Some(name) = function.name.as_deref().filter(|name| name.starts_with(prefix)) else { continue };
        let arguments: Vec<_> = function.arguments.iter().map(|a| type_name(module, a.ty)).collect();
        let mut signature = format!("{name}({})", arguments.join(", "));
        if let Some(result) = &function.result {
            let _ = write!(signature, " -> {}", type_name(module, result.ty));
        }
        all.insert(signature);
    }
    all
}

/// Checks that all files export one and the same set of functions; which file differs, and in what.
fn same_exports(files: &[(String, BTreeSet<String>)]) -> Result<(), String> {
    let Some(((first, expected), rest)) = files.split_first() else { return Err("there are no files".to_owned()) };
    if expected.is_empty() {
        return Err(format!("{first} exports nothing"));
    }
    for (name, found) in rest {
        if let Some(missing) = expected.difference(found).next() {
            return Err(format!("{name} lacks {missing}, which {first} has"));
        }
        if let Some(additional) = found.difference(expected).next() {
            return Err(format!("{name} has {additional}, which {first} lacks"));
        }
    }
    Ok(())
}

/// Text of the WGSL files of one folder whose names begin with `start`, by name.
fn wgsl_files(folder: &str, start: &str) -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders").join(folder);
    let entries = std::fs::read_dir(&path).unwrap_or_else(|e| panic!("shaders/{folder}: {e}"));
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.unwrap_or_else(|e| panic!("shaders/{folder}: {e}"));
        let name = entry.file_name().into_string().expect("shader names are plain text");
        if name.starts_with(start) && name.ends_with(".wgsl") {
            files.push((name, std::fs::read_to_string(entry.path()).expect("shaders are text")));
        }
    }
    files.sort();
    files
}

/// Constants that a prelude gives; their values do not matter for signatures.
const PRELUDE: &str = "const HEAD_DIM = 64u; const GROUP_SIZE = 4u; const PAGE_SIZE = 16u; const NUM_KV_HEADS = 2u;
const WORKGROUP_SIZE = 64u;\n";

/// Whether a file in the codecs' folder is one: the others help them, and define no function of the set.
fn is_codec(text: &str) -> bool {
    text.lines().any(|line| line.trim_start().starts_with("fn codec_"))
}

/// A kernel that seals pages whose keys are of a codec's file.
fn sealing_kernel(file: &str) -> Option<KernelSpec> {
    let heads = HeadGeometry { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 128 };
    let specs = codecs(shape.page()).into_iter().flat_map(|codec| format_specs(&shape.format(codec)));
    let joins = |spec: &KernelSpec| {
        let of_keys = |part: &Part| part.module.name == format!("codec/{file}") && part.side == Some(Side::Key);
        spec.name == "seal" && spec.parts.iter().any(of_keys)
    };
    specs.into_iter().find(joins)
}

/// The functions of one side's codec, under the names that its file gives them.
fn of_side(module: &naga::Module, prefix: &str, camel: &str) -> BTreeSet<String> {
    let found = signatures(module, prefix);
    found.iter().map(|s| s.replace(prefix, "codec_").replace(camel, "Codec")).collect()
}

#[test]
fn all_page_codecs_export_the_same_functions() {
    let mut files = Vec::new();
    for (name, _) in wgsl_files("codec", "").into_iter().filter(|(_, text)| is_codec(text)) {
        let spec = sealing_kernel(&name).unwrap_or_else(|| panic!("no kernel seals pages with {name}"));
        let (module, _) = link(&spec).validate().unwrap_or_else(|e| panic!("{name}: {e}"));
        files.push((name, of_side(&module, "key_codec_", "KeyCodec")));
    }
    assert!(files.len() >= 6, "f16, f32, fp8, int8, kivi and rot are codecs, not only {files:?}");
    same_exports(&files).unwrap_or_else(|e| panic!("{e}"));
    println!("{} codecs export {:#?}", files.len(), files[0].1);
}

/// Kernels join a codec's file for each side; each copy has the whole set, under names of its own.
#[test]
fn both_sides_of_a_page_have_every_function_of_their_codec() {
    let heads = HeadGeometry { num_qo_heads: 8, num_kv_heads: 2, head_dim: 64 };
    let shape = CacheShape { heads, page_size: 128 };
    for codec in codecs(shape.page()) {
        for spec in &format_specs(&shape.format(codec)) {
            let (module, _) = link(spec).validate().unwrap_or_else(|e| panic!("{} of {codec}: {e}", spec.name));
            let keys = of_side(&module, "key_codec_", "KeyCodec");
            let values = of_side(&module, "value_codec_", "ValueCodec");
            assert!(!keys.is_empty(), "{} of {codec} reads keys", spec.name);
            assert_eq!(keys, values, "{} of {codec}: keys and values", spec.name);
            assert!(signatures(&module, "codec_").is_empty(), "{} of {codec}: a function of no side", spec.name);
        }
    }
}

#[test]
fn a_helper_is_told_from_a_codec() {
    assert!(is_codec("// text\nfn codec_a() {}\n"), "a function of the set");
    assert!(!is_codec("// fn codec_a() {}\nfn affine_a() { codec_a(); }\n"), "a comment, and a call");
    let helpers: Vec<_> = wgsl_files("codec", "").into_iter().filter(|(_, text)| !is_codec(text)).collect();
    assert!(helpers.iter().any(|(name, _)| name == "affine.wgsl"), "affine.wgsl helps codecs");
    assert!(sealing_kernel("no such file.wgsl").is_none(), "a file that no kernel joins");
}

#[test]
fn both_lane_reductions_export_the_same_functions() {
    let files: Vec<_> = wgsl_files("common", "lanes_")
        .into_iter()
        .map(|(name, text)| (name, signatures(&parse(&format!("{PRELUDE}{text}")), "lanes_")))
        .collect();
    assert_eq!(files.len(), 2, "one file per tier");
    same_exports(&files).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn both_kinds_of_rows_of_a_product_export_the_same_functions() {
    let product = include_str!("../shaders/model/product.wgsl");
    let flags = "const ACCUMULATE = false; const ACTIVATE = false;";
    let files: Vec<_> = wgsl_files("model", "rows_")
        .into_iter()
        .map(|(name, text)| {
            let module = parse(&format!("{flags}\n{product}\n{text}"));
            let mut exports = signatures(&module, "row_");
            exports.extend(signatures(&module, "gain"));
            (name, exports)
        })
        .collect();
    assert_eq!(files.len(), 2, "plain rows and normed ones");
    same_exports(&files).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_difference_in_exports_is_noticed() {
    let exports = |name: &str, text: &str| (name.to_owned(), signatures(&parse(text), "codec_"));
    let good = exports("good", "fn codec_a(x: u32) -> f32 { return f32(x); } fn helper() {}");
    assert_eq!(same_exports(&[good.clone(), good.clone()]), Ok(()), "equal files should pass");
    for (wrong, text) in [
        ("another argument", "fn codec_a(x: i32) -> f32 { return f32(x); }"),
        ("another result", "fn codec_a(x: u32) -> u32 { return x; }"),
        ("no result", "fn codec_a(x: u32) {}"),
        ("another name", "fn codec_b(x: u32) -> f32 { return f32(x); }"),
        ("an additional function", "fn codec_a(x: u32) -> f32 { return f32(x); } fn codec_c() {}"),
        ("nothing", "fn helper() {}"),
    ] {
        assert!(same_exports(&[good.clone(), exports("bad", text)]).is_err(), "{wrong} should be noticed");
    }
    assert!(same_exports(&[]).is_err(), "an empty folder should be noticed");
}
