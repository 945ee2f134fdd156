//! What sessions did over time, as a trace that Perfetto and Chrome open: a track for each session, and counters of bytes.
//!
//! The format is Chrome's trace events in JSON: complete events (`X`) with microseconds of the schedule's clock, counters
//! (`C`), and names of tracks (`M`).

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::schedule::{Phase, Place, Scheduler, Session, SessionId, Store};

/// Collects a trace, step by step.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    events: Vec<Value>,
    /// What each session does, and since when.
    open: BTreeMap<SessionId, (&'static str, Duration)>,
}

/// What a session does, in one word or two; nothing once it is over.
const fn state(session: &Session, waits: bool) -> Option<&'static str> {
    Some(match (session.phase, session.place) {
        (Phase::Finished(_), _) => return None,
        (_, Place::Leaving(_)) => "swap out",
        (_, Place::Coming(_)) => "swap in",
        (Phase::Thinking(_), Place::Host) => "thinks, on host",
        (Phase::Thinking(_), Place::Nowhere) => "thinks, dropped",
        (Phase::Thinking(_), Place::Device) => "thinks",
        (_, Place::Host) => "waits, on host",
        (_, Place::Nowhere) => "waits",
        (_, Place::Device) if waits => "waits, on device",
        (Phase::Prefill(_) | Phase::Waiting, Place::Device) => "prefill",
        (Phase::Decode, Place::Device) => "decode",
    })
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

impl Trace {
    /// Names the track of a session.
    pub fn name(&mut self, session: SessionId, name: &str) {
        let args = json!({ "name": name });
        self.events.push(json!({ "name": "thread_name", "ph": "M", "pid": 1, "tid": session.0, "args": args }));
    }

    /// Hears of everything after a step.
    pub fn step(&mut self, scheduler: &Scheduler) {
        let now = scheduler.now();
        let waiting: std::collections::BTreeSet<SessionId> = scheduler.waiting().collect();
        for (id, session) in scheduler.sessions() {
            self.enter(id, state(session, waiting.contains(&id)), now);
        }
        let pool = scheduler.report();
        let bytes = json!({
            "pages": pool.pages_in_use_bytes.0,
            "shared": pool.shared_bytes.0,
            "promised": pool.committed_bytes.0,
            "host": scheduler.away_bytes(Store::Host).0.0,
        });
        self.events.push(json!({ "name": "bytes", "ph": "C", "pid": 1, "ts": micros(now), "args": bytes }));
        let sessions = json!({ "on device": scheduler.n_admitted(), "waiting": waiting.len() });
        self.events.push(json!({ "name": "sessions", "ph": "C", "pid": 1, "ts": micros(now), "args": sessions }));
    }

    fn enter(&mut self, id: SessionId, state: Option<&'static str>, now: Duration) {
        let before = self.open.get(&id).copied();
        if before.map(|(state, _)| state) == state {
            return;
        }
        if let Some((name, since)) = before {
            let length = micros(now.saturating_sub(since));
            self.events
                .push(json!({ "name": name, "ph": "X", "pid": 1, "tid": id.0, "ts": micros(since), "dur": length }));
        }
        match state {
            Some(state) => self.open.insert(id, (state, now)),
            None => self.open.remove(&id),
        };
    }

    /// The file: what is still under way ends now.
    pub fn json(mut self, now: Duration) -> String {
        let open: Vec<SessionId> = self.open.keys().copied().collect();
        open.into_iter().for_each(|id| self.enter(id, None, now));
        json!({ "traceEvents": self.events, "displayTimeUnit": "ms" }).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_become_spans_that_follow_each_other() {
        let mut trace = Trace::default();
        let at = Duration::from_millis;
        trace.name(SessionId(3), "a.txt");
        trace.enter(SessionId(3), Some("prefill"), at(0));
        trace.enter(SessionId(3), Some("prefill"), at(2));
        trace.enter(SessionId(3), Some("decode"), at(5));
        let text = trace.json(at(9));
        let file: Value = serde_json::from_str(&text).expect("JSON");
        let events = file["traceEvents"].as_array().expect("a list");
        let spans: Vec<_> =
            events.iter().filter(|e| e["ph"] == "X").map(|e| (&e["name"], &e["ts"], &e["dur"])).collect();
        assert_eq!(spans.len(), 2, "{text}");
        assert_eq!(spans[0], (&json!("prefill"), &json!(0.0), &json!(5000.0)), "until it decodes");
        assert_eq!(spans[1], (&json!("decode"), &json!(5000.0), &json!(4000.0)), "until the end");
        assert_eq!(events[0]["args"]["name"], "a.txt", "a track has a name");
    }
}
