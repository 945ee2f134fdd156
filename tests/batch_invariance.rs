//! A session's logits do not depend on its company: alone, in a batch of 8, and after others have ended.

mod common;

use std::collections::BTreeMap;

use concertina::compression::Compression;
use concertina::compression::hidden::HiddenCodec;
use concertina::engine::{Engine, EngineConfig, EvictionConfig};
use concertina::schedule::{Backend as _, Caches, PlannedRows, SessionId, StepPlan};

/// Tokens of each session: a prompt, then what is fed in decode, the same whatever the logits say.
struct Script {
    prompt: Vec<u32>,
    decode: Vec<u32>,
}

fn script(session: u32, vocab: u32) -> Script {
    // One session is long enough that decode splits it.
    let n = if session == 3 { 700 } else { 20 + 13 * session as usize };
    let prompt = common::tokens(u64::from(session), n, vocab);
    // Those before it decode for so long that it is not alone, nor first, when its own turn comes.
    let n_decode = if session < 3 { 24 } else { 6 };
    Script { prompt, decode: common::tokens(1000 + u64::from(session), n_decode, vocab) }
}

/// Logits of each session, step by step.
type Logits = BTreeMap<u32, Vec<Vec<f32>>>;

/// Runs the sessions together, prompts in chunks of at most `chunk` rows. Compressions go round the sessions; what evicts does
/// so behind all but the last ten tokens of the prompt.
fn run(
    engine: &mut Engine<'_>,
    caches: &mut Caches,
    compressions: &[Compression],
    sessions: &[u32],
    chunk: usize,
) -> Logits {
    let vocab = engine.geometry().vocab_size;
    let scripts: BTreeMap<u32, Script> = sessions.iter().map(|s| (*s, script(*s, vocab))).collect();
    let mut out = Logits::new();
    for (id, script) in &scripts {
        let n = u32::try_from(script.prompt.len() + script.decode.len()).expect("short");
        let document = u32::try_from(script.prompt.len() - 10).expect("short");
        let compression = &compressions[*id as usize % compressions.len()];
        caches.serves(compression).unwrap_or_else(|e| panic!("{compression}: {e}"));
        caches.admit(SessionId(*id), compression, document, n).expect("all fit");
    }
    let mut at: BTreeMap<u32, usize> = sessions.iter().map(|s| (*s, 0)).collect();
    loop {
        for id in scripts.keys().map(|id| SessionId(*id)).filter(|id| at[&id.0] < fed(&scripts[&id.0])) {
            if caches.is_due(id) {
                engine.evict(id, &[], caches).expect("what is due can be evicted from");
            }
        }
        let mut plan = StepPlan::default();
        let mut left = 64;
        for decode in [true, false] {
            for (id, script) in &scripts {
                let done = at[id];
                let n_prompt = script.prompt.len();
                let tokens: Vec<u32> = if done >= n_prompt {
                    script.decode.get(done - n_prompt).copied().into_iter().collect()
                } else {
                    let n = u32::try_from(chunk.min(left).min(n_prompt - done)).expect("short");
                    let n = caches.cut(SessionId(*id), n) as usize;
                    script.prompt[done..done + n].to_vec()
                };
                if (done >= n_prompt) != decode || tokens.is_empty() {
                    continue;
                }
                left -= tokens.len();
                let last = done + tokens.len() >= n_prompt;
                let first_index = caches.tables[&SessionId(*id)].n_tokens();
                let sample = last.then_some(concertina::kernels::sample::Sampling::GREEDY);
                let (session, observed) = (SessionId(*id), Vec::new());
                plan.segments.push(PlannedRows { session, first_index, tokens, decode, depth: None, observed, sample });
            }
        }
        if plan.segments.is_empty() {
            break;
        }
        caches.grow(&plan).expect("committed");
        for rows in &plan.segments {
            *at.get_mut(&rows.session.0).expect("known") += rows.tokens.len();
        }
        let mut logits = engine.logits(&plan, caches).expect("the step should run").into_iter();
        caches.retire(&plan);
        for rows in plan.segments.iter().filter(|r| r.sample.is_some()) {
            out.entry(rows.session.0).or_default().push(logits.next().expect("a row of logits"));
        }
    }
    for id in scripts.keys() {
        caches.release(SessionId(*id)).expect("the pool agrees");
    }
    out
}

/// Tokens that a session is fed in all.
const fn fed(script: &Script) -> usize {
    script.prompt.len() + script.decode.len()
}

fn full() -> Vec<Compression> {
    vec![Compression::default()]
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn a_session_alone_and_in_a_batch_of_8_gives_the_same_bits_gpu() {
    let weights = common::tiny_model(11);
    let (mut engine, mut caches) = Engine::new(common::device(), &weights, &common::config(64)).expect("64 MiB");
    let together = run(&mut engine, &mut caches, &full(), &[0, 1, 2, 3, 4, 5, 6, 7], 64);
    for session in 0..8 {
        for chunk in [64, 7] {
            let alone = run(&mut engine, &mut caches, &full(), &[session], chunk);
            let n = script(session, weights.geometry.vocab_size).decode.len() + 1;
            assert_eq!(alone[&session].len(), n, "a token after the prompt and after each decode row");
            assert!(
                bits(&alone[&session]) == bits(&together[&session]),
                "session {session} alone, in chunks of {chunk}, differs from the batch"
            );
        }
    }
    assert!(bits(&together[&0]) != bits(&together[&1]), "different sessions should differ");
}

/// Sealed pages are made from the same f16 rows and read by the same rows, however a prompt is cut and whoever is near.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn compressed_sessions_alone_and_among_other_codecs_give_the_same_bits_gpu() {
    let weights = common::tiny_model(11);
    // Session 3, which decode splits, and sessions 0 and 6 are kivi2.
    let codecs: Vec<Compression> =
        ["kivi2", "k:int8,v:rot3", "f16"].map(|codec| codec.parse().expect("a codec")).into();
    let sealing = codecs.iter().map(|c| c.hidden).filter(HiddenCodec::seals).collect();
    let config = EngineConfig { codecs: sealing, page_size: 32, ..common::config(64) };
    let (mut engine, mut caches) = Engine::new(common::device(), &weights, &config).expect("64 MiB");
    let together = run(&mut engine, &mut caches, &codecs, &[0, 1, 2, 3, 4, 5, 6, 7], 64);
    for session in 0..8 {
        // Chunks within a page, of about a page, and of more than a page.
        for chunk in [7, 33, 64] {
            let alone = run(&mut engine, &mut caches, &codecs, &[session], chunk);
            let n = script(session, weights.geometry.vocab_size).decode.len() + 1;
            assert_eq!(alone[&session].len(), n, "a token after the prompt and after each decode row");
            assert!(
                bits(&alone[&session]) == bits(&together[&session]),
                "session {session} ({}) alone, in chunks of {chunk}, differs from the batch",
                codecs[session as usize % codecs.len()]
            );
        }
    }
    let full = run(&mut engine, &mut caches, &full(), &[0, 1, 2, 3, 4, 5, 6, 7], 64);
    for session in 0..8 {
        // Every session fills a page, session 0 while it decodes.
        let sealed = codecs[session as usize % codecs.len()].hidden.seals();
        let same = bits(&full[&session]) == bits(&together[&session]);
        assert_eq!(same, !sealed, "session {session}: codes should show in its logits, and only codes");
    }
}

/// What ranks by keys, or by places alone, keeps the same tokens whatever the chunks and whoever is near; and what is kept
/// is read the same.
#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn sessions_that_are_evicted_from_alone_and_in_company_give_the_same_bits_gpu() {
    let weights = common::tiny_model(11);
    let asked = ["token=streaming:32:every16,hidden=kivi2", "token=keydiff:0.5,hidden=rot3", "token=knorm:0.5", "f16"];
    let asked: Vec<Compression> = asked.map(|text| text.parse().expect("a compression")).into();
    let codecs = asked.iter().map(|c| c.hidden).filter(HiddenCodec::seals).collect();
    let evictions = EvictionConfig::of(&asked, 8);
    let config = EngineConfig { codecs, evictions, page_size: 32, ..common::config(96) };
    let (mut engine, mut caches) = Engine::new(common::device(), &weights, &config).expect("96 MiB");
    let together = run(&mut engine, &mut caches, &asked, &[0, 1, 2, 3, 4, 5, 6, 7], 64);
    for session in 0..8 {
        for chunk in [7, 64] {
            let alone = run(&mut engine, &mut caches, &asked, &[session], chunk);
            assert!(
                bits(&alone[&session]) == bits(&together[&session]),
                "session {session} ({}) alone, in chunks of {chunk}, differs from the batch",
                asked[session as usize % asked.len()]
            );
        }
    }
    let kept = run(&mut engine, &mut caches, &full(), &[0, 1, 2, 3, 4, 5, 6, 7], 64);
    for session in 0..8 {
        let evicted = asked[session as usize % asked.len()] != Compression::default();
        let same = bits(&kept[&session]) == bits(&together[&session]);
        assert_eq!(same, !evicted, "session {session}: what left should show in its logits, and only that");
    }
}

#[test]
#[cfg_attr(feature = "no-gpu-tests", ignore = "needs a GPU adapter; excluded by the feature no-gpu-tests")]
fn the_reference_model_is_batch_invariant_too_gpu() {
    let model = common::model();
    let mut config = common::config(128);
    config.page_size = 64;
    let (mut engine, mut caches) = Engine::new(common::device(), &model.weights, &config).expect("128 MiB suffice");
    let together = run(&mut engine, &mut caches, &full(), &[0, 1, 2, 3, 4, 5, 6, 7], 64);
    let alone = run(&mut engine, &mut caches, &full(), &[5], 64);
    assert!(bits(&alone[&5]) == bits(&together[&5]), "session 5 alone differs from the batch");
}
