//! The figures of the paper (arXiv:2405.08944), recomputed: every one that was worked out by hand, from the theory; and the tables
//! of docs/framework.md, which are exactly what comes out here.
//!
//! `CONCERTINA_WRITE_DOCS=1 cargo test --test framework` writes the tables anew.

use std::fmt::Write as _;
use std::path::PathBuf;

use concertina::compression::Compression;
use concertina::geometry::Bytes;
use concertina::theory::challenges::{Challenges, Scene, challenges};
use concertina::theory::model::{Decoder, Parameters};
use concertina::theory::predict::kv_bytes;
use concertina::theory::presets::{ModelPreset, Presets};
use concertina::theory::step::Machine;

/// The running example's model: Yi-34B-200K, its parameters as the paper has them, 34e9 of two bytes, all of them multiplied with
/// every row.
fn example() -> Decoder {
    let yi = preset("yi-34b").decoder;
    let parameters = Parameters { layers: 34_000_000_000, ..Parameters::default() };
    Decoder { parameters, weights: Bytes(68_000_000_000), ..yi }
}

fn preset(name: &str) -> ModelPreset {
    Presets::built_in().model(name).unwrap_or_else(|error| panic!("{error}")).clone()
}

/// An A100 with 80 GB at its peak, and a link of which 20 GB/s are achieved.
const A100: Machine = Machine { flops: 312e12, bandwidth: 2e12, link: 20e9, parallel: None };

const CONTEXTS: [(u32, &str); 6] =
    [(4_000, "4K"), (50_000, "50K"), (100_000, "100K"), (200_000, "200K"), (1_000_000, "1M"), (10_000_000, "10M")];

fn figures(model: &Decoder, machine: &Machine, context_tokens: u32) -> Challenges {
    let memory_bytes = Bytes(12_000_000_000);
    let scene = Scene { context_tokens, memory_bytes, page_tokens: None, chunk_rows: None, batch: 1 };
    challenges(model, machine, &Compression::default(), &scene).expect("a full cache fits every model")
}

fn gib(bytes: Bytes) -> f64 {
    bytes.0 as f64 / f64::from(1 << 30)
}

/// A quantity: what the paper prints, what was recomputed by hand, and what the theory says.
struct Row {
    quantity: &'static str,
    unit: &'static str,
    paper: &'static str,
    recomputed: f64,
    ours: f64,
}

fn row(quantity: &'static str, unit: &'static str, paper: &'static str, recomputed: f64, ours: f64) -> Row {
    Row { quantity, unit, paper, recomputed, ours }
}

/// Users of 4K, 50K and so on that so many GPUs of 80 GB hold beside weights of 68 GB, not rounded.
fn users(gpus: u64, context: u32) -> f64 {
    let left = gpus as f64 * 80e9 - 68e9;
    left / kv_bytes(&example().geometry, &Compression::default(), u64::from(context)).0 as f64
}

fn running_example() -> Vec<Row> {
    let model = example();
    let at = |context| figures(&model, &A100, context);
    let kv = |context| gib(at(context).cache.held_bytes);
    let prefill = |context| at(context).prefill.seconds;
    let screen = |context| 250.0 * at(context).decode.seconds;
    let switch = |context| at(context).switch_s.expect("a link");
    let again = |context| at(context).recompute_ratio.expect("a link");
    // 48 layers of 4,096 channels, which is the shape of Yi-9B, give what is printed for prefill.
    let mut smaller = model.clone();
    smaller.geometry.num_layers = 48;
    smaller.geometry.heads.num_qo_heads = 32;
    let smaller = |context| figures(&smaller, &A100, context).prefill.seconds;
    vec![
        row("KV cache of a token", "KiB", "", 240.0, at(1).cache.held_bytes.0 as f64 / 1024.0),
        row("KV cache of 4K", "GiB", "0.91 (read)", 0.916, kv(4_000)),
        row("KV cache of 50K", "GiB", "11", 11.44, kv(50_000)),
        row("KV cache of 100K", "GiB", "22.8 (read)", 22.89, kv(100_000)),
        row("1M over 4K", "times", "", 250.0, kv(1_000_000) / kv(4_000)),
        row("users of 4K, one GPU", "", "about 20", 12.2, users(1, 4_000)),
        row("users of 50K, one GPU", "", "1", 0.98, users(1, 50_000)),
        row("users of 4K, two GPUs", "", "about 100", 93.6, users(2, 4_000)),
        row("users of 100K, two GPUs", "", "5", 3.7, users(2, 100_000)),
        row("prefill of 4K", "s", "0.89", 0.916, prefill(4_000)),
        row("prefill of 50K", "s", "14.1", 17.79, prefill(50_000)),
        row("prefill of 4K with 48 x 4,096", "s", "0.89", 0.892, smaller(4_000)),
        row("prefill of 50K with 48 x 4,096", "s", "14.1", 14.05, smaller(50_000)),
        row("decode of 250 tokens at 4K", "s", "8.5", 8.62, screen(4_000)),
        row("decode of 250 tokens at 50K", "s", "9.8", 10.04, screen(50_000)),
        row("switch of 4K", "s", "0.1", 0.098, switch(4_000)),
        row("switch of 50K", "s", "1.1", 1.23, switch(50_000)),
        row("switch of 100K", "s", "", 2.46, switch(100_000)),
        row("critical intensity", "FLOP/byte", "156", 156.0, A100.flops / A100.bandwidth),
        row("intensity of attention over the cache", "FLOP/byte", "", 7.0, at(50_000).attention_intensity),
        row("prefill over coming back, 4K", "times", "", 18.6, again(4_000)),
        row("prefill over coming back, 50K", "times", "", 29.0, again(50_000)),
        row("prefill over coming back, 100K", "times", "", 40.0, again(100_000)),
        row("prefill over coming back, 1M", "times", "", 242.0, again(1_000_000)),
    ]
}

/// A number with three digits, or as many as it has before the point.
fn digits(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

#[test]
fn every_recomputed_figure_of_the_running_example_comes_out() {
    for Row { quantity, recomputed, ours, .. } in running_example() {
        // By hand to two or three digits.
        assert!((ours / recomputed - 1.0).abs() < 0.015, "{quantity}: {ours}, by hand {recomputed}");
    }
    let wrong = 24.7; // Prefill of 50K if every row saw every token.
    let prefill = figures(&example(), &A100, 50_000).prefill.seconds;
    assert!((prefill / wrong - 1.0).abs() > 0.2, "a causal prompt costs half of that: {prefill}");
}

#[test]
fn attention_is_as_much_of_a_prompt_as_was_recomputed() {
    for ((context, name), percent) in CONTEXTS.into_iter().zip([4.8, 38.7, 55.8, 71.7, 92.7]) {
        let prefill = figures(&example(), &A100, context).prefill;
        let part = 100.0 * prefill.attention_s / prefill.seconds;
        assert!((part - percent).abs() < 0.06, "{name}: {part} %, by hand {percent} %");
    }
}

#[test]
fn users_of_one_to_eight_gpus_are_those_that_were_recomputed() {
    let by_hand = [
        (4_000, [12.2, 93.6, 256.0, 582.0]),
        (50_000, [0.98, 7.5, 20.5, 46.6]),
        (100_000, [0.49, 3.7, 10.3, 23.3]),
        (200_000, [0.24, 1.9, 5.1, 11.6]),
        (1_000_000, [0.05, 0.37, 1.03, 2.3]),
    ];
    for (context, expected) in by_hand {
        for (gpus, expected) in [1, 2, 4, 8].into_iter().zip(expected) {
            let found = users(gpus, context);
            assert!(
                (found - expected).abs() < 0.02 * expected + 0.006,
                "{context} on {gpus}: {found}, by hand {expected}"
            );
        }
    }
}

/// GPUs as the paper's comparison has them, with a link of 20 GB/s behind `PCIe` 4 and 50 GB/s behind `PCIe` 5.
const GPUS: [(&str, f64, f64, f64, f64); 4] = [
    ("RTX 4090", 165e12, 1.008e12, 20e9, 24e9),
    ("A100 80 GB", 312e12, 2e12, 20e9, 80e9),
    ("H100", 989e12, 3.35e12, 50e9, 80e9),
    ("H200", 989e12, 4.8e12, 50e9, 141e9),
];

#[test]
fn four_gpus_come_out_as_they_were_recomputed() {
    let by_hand = [
        ([1.73, 33.6, 93.2], [17.1, 19.9, 23.0], [0.10, 1.23, 2.46], 164.0),
        ([0.92, 17.8, 49.4], [8.62, 10.0, 11.6], [0.10, 1.23, 2.46], 156.0),
        ([0.29, 5.61, 15.6], [5.15, 5.99, 6.91], [0.04, 0.49, 0.98], 295.0),
        ([0.29, 5.61, 15.6], [3.59, 4.18, 4.82], [0.04, 0.49, 0.98], 206.0),
    ];
    let model = example();
    for ((name, flops, bandwidth, link, _), (prefill, decode, switch, intensity)) in GPUS.into_iter().zip(by_hand) {
        let machine = Machine { flops, bandwidth, link, parallel: None };
        assert!((flops / bandwidth - intensity).abs() < 1.0, "{name}: critical intensity {}", flops / bandwidth);
        for (at, (context, _)) in CONTEXTS.into_iter().take(3).enumerate() {
            let found = figures(&model, &machine, context);
            let all = [
                (found.prefill.seconds, prefill[at], "prefill"),
                (250.0 * found.decode.seconds, decode[at], "decode"),
                (found.switch_s.expect("a link"), switch[at], "switch"),
            ];
            for (found, expected, what) in all {
                assert!(
                    (found - expected).abs() <= 0.01 * expected + 0.005,
                    "{name}, {what} of {context}: {found}, by hand {expected}"
                );
            }
        }
    }
}

/// Where reading a session's cache takes as long as reading the weights, in tokens.
fn balance(model: &Decoder) -> f64 {
    let read = model.parameters.total() * 2;
    read as f64 / model.token_bytes().0 as f64
}

/// Models, KV cache of a token in KiB, and where reading it takes as long as reading the weights, as recomputed.
const MODELS: [(&str, f64, Option<f64>); 9] = [
    ("yi-34b", 240.0, Some(280e3)),
    ("yi-6b", 64.0, Some(183e3)),
    ("llama-2-7b", 512.0, Some(26e3)),
    ("llama-3-8b", 128.0, Some(122e3)),
    ("llama-3-70b", 320.0, Some(431e3)),
    ("command-r", 1280.0, Some(53e3)),
    ("command-r-plus", 256.0, Some(793e3)),
    ("mixtral-8x7b", 128.0, Some(713e3)),
    ("deepseek-v2", 67.5, None),
];

#[test]
fn models_come_out_as_they_were_recomputed() {
    for (name, kib, tokens) in MODELS {
        let model = preset(name).decoder;
        assert_eq!(model.token_bytes().0 as f64 / 1024.0, kib, "{name}: KiB of cache per token");
        let found = balance(&model);
        if let Some(expected) = tokens {
            assert!((found / expected - 1.0).abs() < 0.03, "{name}: {found} tokens, by hand {expected}");
        }
    }
}

fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut text = format!("| {} |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

/// The tables of the page, by name.
fn tables() -> Vec<(&'static str, String)> {
    let model = example();
    let example = running_example().into_iter().map(|row| {
        let unit = if row.unit.is_empty() { String::new() } else { format!(", {}", row.unit) };
        vec![format!("{}{unit}", row.quantity), row.paper.to_owned(), digits(row.recomputed), digits(row.ours)]
    });
    let users = CONTEXTS.into_iter().map(|(context, name)| {
        let kv = kv_bytes(&model.geometry, &Compression::default(), u64::from(context));
        let sizes = [name.to_owned(), format!("{} / {}", digits(kv.0 as f64 / 1e9), digits(gib(kv)))];
        sizes.into_iter().chain([1, 2, 4, 8].map(|gpus| digits(users(gpus, context)))).collect()
    });
    let shares = CONTEXTS.into_iter().map(|(context, name)| {
        let prefill = figures(&model, &A100, context).prefill;
        vec![
            name.to_owned(),
            digits(prefill.seconds),
            format!("{:.1} %", 100.0 * prefill.attention_s / prefill.seconds),
        ]
    });
    let hardware = GPUS.into_iter().map(|(name, flops, bandwidth, link, memory)| {
        let machine = Machine { flops, bandwidth, link, parallel: None };
        let of = |figure: &dyn Fn(&Challenges) -> f64| {
            let three =
                CONTEXTS.into_iter().take(3).map(|(context, _)| digits(figure(&figures(&model, &machine, context))));
            three.collect::<Vec<_>>().join(" / ")
        };
        let users = CONTEXTS.into_iter().take(3).map(|(context, _)| {
            let kv = kv_bytes(&model.geometry, &Compression::default(), u64::from(context));
            digits((memory - 68e9) / kv.0 as f64)
        });
        let users = if memory < 68e9 { "weights do not fit".to_owned() } else { users.collect::<Vec<_>>().join(" / ") };
        vec![
            name.to_owned(),
            digits(flops / bandwidth),
            of(&|c| c.prefill.seconds),
            of(&|c| 250.0 * c.decode.seconds),
            of(&|c| c.switch_s.unwrap_or_default()),
            users,
        ]
    });
    let models = MODELS.into_iter().map(|(name, ..)| {
        let preset = preset(name);
        let decoder = &preset.decoder;
        let token = decoder.token_bytes();
        let of = |tokens: u64| digits(gib(Bytes(token.0 * tokens)));
        let sizes = [4_000, 50_000, 100_000, 1_000_000].map(of).join(" / ");
        let balance = format!("{:.0}K", balance(decoder) / 1e3);
        vec![preset.model.clone(), format!("{} KiB", token.0 as f64 / 1024.0), sizes, balance]
    });
    vec![
        ("example", table(&["quantity", "paper", "recomputed", "concertina"], example)),
        ("users", table(&["context", "KV cache, GB / GiB", "1 GPU", "2", "4", "8"], users)),
        ("shares", table(&["context", "prefill, s", "of this attention"], shares)),
        (
            "hardware",
            table(&["GPU", "critical intensity", "prefill, s", "decode of 250, s", "switch, s", "users"], hardware),
        ),
        ("models", table(&["model", "a token", "4K / 50K / 100K / 1M, GiB", "cache read = weights read at"], models)),
    ]
}

/// The page with every table as it comes out.
fn with_tables(page: &str) -> String {
    let mut text = page.to_owned();
    for (name, table) in tables() {
        let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
        let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("docs/framework.md should have {begin}"));
        let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("docs/framework.md should have {end}"));
        text = format!("{before}{begin}{table}{end}{after}");
    }
    text
}

#[test]
fn the_page_says_what_comes_out() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/framework.md");
    let page = std::fs::read_to_string(&path).expect("docs/framework.md");
    let expected = with_tables(&page);
    if std::env::var_os("CONCERTINA_WRITE_DOCS").is_some() {
        std::fs::write(&path, &expected).expect("writable");
        return;
    }
    assert!(page == expected, "docs/framework.md is out of date: CONCERTINA_WRITE_DOCS=1 cargo test --test framework");
    let wrong = page.replacen("| 17.8 |", "| 14.1 |", 1);
    assert!(wrong != page && with_tables(&wrong) != wrong, "another figure would be noticed");
}
