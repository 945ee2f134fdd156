"""Tests of what is read and joined here: `python3 -m unittest discover benches/peers`.

Those of torch_peers.py need PyTorch, but no GPU, and are named as skipped where it is not installed.
"""

import importlib.util
import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import compare
import figures
import llama_cpp

PERF = """Backend 1/2: CUDA0
  FLASH_ATTN_EXT(hsk=128,hsv=128,nh=8,nr23=[4,1],kv=4096,nb=1,mask=1,sinks=0,prec=f32,type_K=f16,type_V=f16,permute=[0,1,2,3]):\
             16384 runs -    61.25 us/run -  67.11 MFLOP/run - \x1b[1;34m  1.10 TFLOPS\x1b[0m
  FLASH_ATTN_EXT(hsk=64,hsv=64,nh=8,nr23=[8,1],kv=7680,nb=4,mask=1,sinks=0,prec=f32,type_KV=q8_0,permute=[0,1,2,3]):\
              8192 runs -   130.00 us/run - 503.32 MFLOP/run - \x1b[1;34m  3.87 TFLOPS\x1b[0m
  FLASH_ATTN_EXT(hsk=576,hsv=512,nh=1,nr23=[16,1],kv=4096,nb=1,mask=1,sinks=0,prec=f32,type_KV=f16): not supported
"""

BENCH = """[
  {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "type_k": "f16", "type_v": "f16", "samples_ns": [1000000]},
  {"n_prompt": 0, "n_gen": 64, "n_depth": 1024, "type_k": "f16", "type_v": "f16", "backends": "CUDA",
   "samples_ns": [64000000, 65000000, 128000000]}
]"""


def our(case, seconds, candidate="chosen"):
    return {"case": case, "candidate": candidate, "measured": {"seconds": {"median": seconds}, "of_read": 0.5}}


def peer(case, seconds, name="p"):
    return {"case": case, "peer": name, "seconds": figures.spread([seconds])}


class Figures(unittest.TestCase):
    def test_ranks_are_nearest(self):
        spread = figures.spread([float(i) for i in range(30, 0, -1)])
        self.assertEqual(spread, {"median": 15.0, "p10": 3.0, "p90": 27.0, "n": 30})
        with self.assertRaises(ValueError):
            figures.spread([])

    def test_three_digits(self):
        self.assertEqual([figures.number(x) for x in (1234.5, 12.34, 0.01234, None)], ["1234", "12.3", "0.0123", "-"])


class Llama(unittest.TestCase):
    def test_attention_of_one_token_has_our_name(self):
        first, second = llama_cpp.attention_rows(PERF)
        self.assertEqual(first["case"], "decode/1x4k/g4-d128/f16")
        self.assertEqual(first["bytes"], 8 * 4096 * 128 * 2 * 2)
        self.assertAlmostEqual(first["seconds"]["median"], 61.25e-6)
        self.assertTrue(second["case"].startswith("FLASH_ATTN_EXT("), "four rows are not decode")

    def test_generation_is_seconds_of_a_token(self):
        (row,) = llama_cpp.step_rows(BENCH)
        self.assertEqual((row["case"], row["peer"]), ("step/1x1k/full", "llama.cpp CUDA"))
        self.assertAlmostEqual(row["seconds"]["median"], 65e6 * 1e-9 / 64)

    def test_what_holds_no_figure_is_an_error(self):
        for read, text in ((llama_cpp.attention_rows, "0/0"), (llama_cpp.step_rows, "[]"), (llama_cpp.step_rows, "x")):
            with self.assertRaises(SystemExit):
                read(text)


class Compare(unittest.TestCase):
    def test_the_fastest_candidate_meets_every_peer(self):
        best = compare.ours([{"rows": [our("a/f16", 2.0), our("a/f16", 1.0, "other"), {"case": "b", "wrong": "x"}]}])
        found = compare.peers([{"rows": [peer("a/f16", 4.0, "slow"), peer("a/f16", 3.0), {"case": "c", "failed": "x"}]}])
        rows = compare.join(best, found)
        self.assertEqual([(r["candidate"], r["peer"], r["speed_up"]) for r in rows], [("other", "p", 3.0), ("other", "slow", 4.0)])
        self.assertEqual([r["best_peer"] for r in rows], [True, False])

    def test_a_codec_that_no_peer_has_is_set_beside_f16(self):
        rows = compare.join(compare.ours([{"rows": [our("a/kivi4", 1.0)]}]), compare.peers([{"rows": [peer("a/f16", 2.0)]}]))
        self.assertEqual([(r["peer"], r["speed_up"]) for r in rows], [("p (f16)", 2.0)])
        other = compare.peers([{"rows": [peer("b/f16", 2.0)]}])
        self.assertEqual(compare.join(compare.ours([{"rows": [our("a/kivi4", 1.0)]}]), other), [], "another shape")

    def test_other_devices_are_refused(self):
        ours, same, others = {"device": {"adapter": {"name": "A"}}}, {"device": "A"}, {"device": "B"}
        compare.refuse_other_devices([ours, same, {"device": ""}])
        with self.assertRaises(SystemExit):
            compare.refuse_other_devices([ours, others])


@unittest.skipUnless(importlib.util.find_spec("torch"), "PyTorch is not installed")
class Torch(unittest.TestCase):
    def setUp(self):
        import torch
        import torch_peers

        self.torch, self.peers = torch, torch_peers

    def inputs(self):
        yield self.peers.Decode(2, 300, "cpu", 3_000_000), lambda q, k, v: self.attention(q, k, v, False)
        yield self.peers.Prefill(96, "cpu", 3_000_000), lambda q, k, v: self.attention(q, k, v, True)
        yield self.peers.Product(3, 64, 40, "cpu", 30_000), self.torch.nn.functional.linear
        yield self.peers.Ceiling(True, "cpu", 1 << 16), None
        yield self.peers.Ceiling(False, "cpu", 1 << 16), None

    def attention(self, q, k, v, causal):
        sdpa = self.torch.nn.functional.scaled_dot_product_attention
        return sdpa(q, k, v, is_causal=causal, enable_gqa=True)

    def test_right_results_pass_and_others_do_not(self):
        for inputs, function in self.inputs():
            with self.subTest(type(inputs).__name__):
                out = inputs.run(function, 1)
                self.assertLess(inputs.check(out, 1), self.peers.NMSE_LIMIT)
                with self.assertRaises(AssertionError):
                    inputs.check(out * 1.02, 1)

    def test_heads_as_rows_are_the_same(self):
        decode = self.peers.Decode(2, 300, "cpu", 0)
        _, _, rows = self.peers.sdpa_of_rows(self.torch.nn.attention.SDPBackend.FLASH_ATTENTION)
        decode.check(decode.run(rows, 0), 0)

    def test_copies_are_cold(self):
        self.assertEqual(len(self.peers.Decode(2, 300, "cpu", 3_000_000).caches), 2)
        self.assertEqual(len(self.peers.Product(3, 64, 40, "cpu", 30_000).w), 6)

    def test_a_case_that_fails_says_why(self):
        def refuses(*_):
            raise RuntimeError("no kernel\nmore")

        import contextlib

        product = self.peers.Product(3, 64, 40, "cpu", 0)
        row = self.peers.figure(None, "matvec/3x64x40", product, ("p", contextlib.nullcontext, refuses))
        self.assertEqual(row["failed"], "RuntimeError: no kernel")
        wrong = self.peers.figure(None, "x", product, ("p", contextlib.nullcontext, lambda x, w: x @ w.T * 2))
        self.assertIn("wrong", wrong)


if __name__ == "__main__":
    unittest.main()
