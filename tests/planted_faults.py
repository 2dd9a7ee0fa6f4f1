"""Faults planted in the sources one at a time, each of which the selection of `make test` must catch.

    .venv/bin/python tests/planted_faults.py [NAME ...]        # all, or those named; --list shows them

Works in a copy of the tree. For every fault the test files that are likely to catch it run first, then, if they pass,
the whole selection, up to the first failure. That failure counts if the same test passes without the fault. `--tree`
and `--python` plant the same faults in another checkout with an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "venv", ".nox", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "bundles", "out"
)
SELECTION = ("-m", "not sweep and not gpu")
NO_PART_OF_AN_EXPORT = frozenset({"serve"})
"""Packages whose faults do not change what an export writes: their tests need not make their bundles anew each time."""


@dataclass(frozen=True)
class Patch:
    """One textual change of one source file."""

    file: str
    old: str
    """Stands in the file exactly once."""
    new: str


@dataclass(frozen=True)
class Fault:
    """What can be wrong in one package."""

    package: str
    patch: Patch
    effect: str
    """What a user would meet."""
    likely: tuple[str, ...]
    """Names of test files that should notice, the cheapest first."""
    formerly: tuple[Patch | str, ...] = ()
    """The same fault in older versions of the sources; a path alone where only the file had another name."""
    select: str = ""
    """Of the files that should notice, the tests that do so first, as pytest's `-k` has it; all where empty."""

    def find(self, tree: Path) -> Patch:
        """The patch that applies to `tree`.

        Raises:
            LookupError: none does, or its text stands in the file several times.
        """
        older = (replace(self.patch, file=one) if isinstance(one, str) else one for one in self.formerly)
        for patch in (self.patch, *older):
            file = tree / patch.file
            if file.is_file() and (count := file.read_text(encoding="utf-8").count(patch.old)):
                if count > 1:
                    raise LookupError(f"{patch.file} has {patch.old!r} {count} times")
                return patch
        raise LookupError(f"no {self.patch.old!r} in {self.patch.file}")


FAULTS: dict[str, Fault] = {
    "score-bound-too-small": Fault(
        "checkpoint",
        Patch(
            "doge_deploy/checkpoint/score_range.py",
            "rows.norm(dim=1) * math.sqrt(checkpoint.facts.hidden_size)",
            "rows.norm(dim=1)",
        ),
        "a score that may overflow is exported without a warning",
        ("test_checkpoint.py", "test_legacy_checkpoint.py"),
    ),
    "window-reached-one-token-late": Fault(
        "config",
        Patch(
            "doge_deploy/config/model.py",
            "return visible > self.keep_window_size",
            "return visible > self.keep_window_size + 1",
        ),
        "a bundle one token longer than the window drops no key",
        ("test_config.py", "test_export.py"),
        ("doge_deploy/config.py",),
    ),
    "capabilities-sorted-as-text": Fault(
        "options",
        Patch(
            "doge_deploy/options/build.py",
            'key=lambda text: tuple(map(int, text.split(".")))',
            "key=str",
        ),
        "an engine for 8.9 and 12.0 has another name than one for 12.0 and 8.9",
        ("test_build_options.py",),
        ("doge_deploy/build_options.py",),
    ),
    "score-heads-of-a-legacy-doge": Fault(
        "bundle",
        Patch(
            "doge_deploy/bundle/signature.py",
            'heads = facts.num_score_heads if kind == "score" else facts.num_key_value_heads',
            "heads = facts.num_key_value_heads",
        ),
        "the manifest of a legacy Doge gives its scores too few heads",
        ("test_legacy_export.py",),
        ("doge_deploy/signature.py",),
    ),
    "long-angles-one-token-early": Fault(
        "model",
        Patch(
            "doge_deploy/model/decoder.py",
            "row = (longest > original).to(torch.int64)",
            "row = (longest >= original).to(torch.int64)",
        ),
        "a text of exactly the original length is rotated by longrope's long factors",
        ("test_rope.py", "test_decoder.py", "test_parity.py"),
    ),
    "one-program-too-many": Fault(
        "kernels",
        Patch(
            "doge_deploy/kernels/expressions.py",
            '"cdiv": lambda a, b: -(-a // b)',
            '"cdiv": lambda a, b: a // b + 1',
        ),
        "grids and scratch tensors are one too large where a size divides",
        ("test_specs.py", "test_compile.py", "test_torch_ops.py", "test_attention_kernels.py"),
        ("doge_deploy/plugins/expressions.py",),
    ),
    "tie-at-the-edge-of-the-window": Fault(
        "plugins",
        Patch(
            "plugins/dynamic_mask_attention/select_kernel.py",
            "kept = exists & ((keys > early_key) | ((keys == early_key) & (slots <= early_slot)))",
            "kept = exists & ((keys > early_key) | ((keys == early_key) & (slots < early_slot)))",
        ),
        "a kernel drops the last kept key of a row",
        ("test_attention_kernels.py",),
    ),
    "sliding-window-one-wider": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/functions/dynamic_mask_attention.py",
            "near = Greater (columns, last_hidden)",
            "near = GreaterOrEqual (columns, last_hidden)",
        ),
        "with a sliding window a row sees one key too many",
        ("test_functions.py", "test_parity.py"),
    ),
    "epsilon-of-the-head-norms": Fault(
        "targets/ort",
        Patch(
            "doge_deploy/targets/ort/grouped_query.py",
            "epsilon=query.epsilon, axis=-1",
            "epsilon=2 * query.epsilon, axis=-1",
        ),
        "queries and keys of the fused attention are a millionth too small",
        ("test_ort_lowering.py", "test_window.py"),
    ),
    "zero-of-unpacked-weights": Fault(
        "targets/ort",
        Patch(
            "doge_deploy/targets/ort/long_calls.py",
            "ir.tensor(128, ir.DataType.UINT8)",
            "ir.tensor(129, ir.DataType.UINT8)",
        ),
        "on old processors long prompts are computed with weights that are all a step too low",
        ("test_long_calls.py",),
    ),
    "outgrown-buffers-start-empty": Fault(
        "runtime/ort",
        Patch(
            "doge_deploy/runtime/ort/growing.py",
            "larger[present][:, :, :used] = old[:, :, :used]",
            "larger[present][:, :, : used - 1] = old[:, :, : used - 1]",
        ),
        "each time the buffers of a growing cache are full the newest key is lost",
        ("test_ort_growing.py",),
    ),
    "limit-of-top-k": Fault(
        "targets/trt",
        Patch(
            "doge_deploy/targets/trt/lowering.py",
            "if k is not None and k > TOPK_LIMIT:",
            "if k is not None and k > TOPK_LIMIT + 256:",
        ),
        "a window that TensorRT cannot select ends in an error of the vendor's",
        ("test_lowering.py",),
    ),
    "kernels-of-any-version": Fault(
        "targets/cuda",
        Patch(
            "doge_deploy/targets/cuda/placement.py",
            """if since != entry["since"]:""",
            """if since < entry["since"]:""",
        ),
        "an export does not say that a node falls to the CPU, because the provider knows an older version of it",
        ("test_cuda_lowering.py",),
        select="another_version",
    ),
    "keys-in-use-without-the-call": Fault(
        "targets/cuda",
        Patch(
            "doge_deploy/targets/cuda/attention_lengths.py",
            """return emit("Add", inputs["write_indices"], behind, name="lengths").outputs[0]""",
            """return emit("Add", inputs["write_indices"], one, name="lengths").outputs[0]""",
        ),
        "tokens of a prompt do not see each other on a GPU",
        ("test_cuda_lowering.py",),
        select="to_the_bit",
    ),
    "rows-of-the-first": Fault(
        "runtime/cuda",
        Patch(
            "doge_deploy/runtime/cuda/runner.py",
            "address = cache.address + first * _row_bytes(cache)",
            "address = cache.address",
        ),
        "requests that share a cache on a GPU write into the rows of others",
        ("test_slots.py",),
        select="cuda",
    ),
    "new-key-wins-a-tie": Fault(
        "targets/trt",
        Patch(
            "doge_deploy/targets/trt/bounded/bodies.py",
            "is_better = Greater (new_score, worst)",
            "is_better = GreaterOrEqual (new_score, worst)",
        ),
        "of equal keys an engine that holds the window drops the earliest",
        ("test_bounded.py",),
        select="equal_keys",
    ),
    "old-row-not-written-back": Fault(
        "targets/trt",
        Patch(
            "doge_deploy/targets/trt/bounded/bodies.py",
            "value_row = Where (is_better, new_value, old_value)",
            "value_row = Identity (new_value)",
        ),
        "a token that is not kept destroys the value of the worst that is",
        ("test_bounded.py",),
        select="agrees",
    ),
    "compaction-keeps-a-wrong-key": Fault(
        "targets/trt",
        Patch(
            "doge_deploy/targets/trt/bounded/bodies.py",
            "stays = Greater (count, token_floats)",
            "stays = GreaterOrEqual (count, token_floats)",
        ),
        "a prefill keeps a key that a better one has pushed out",
        ("test_bounded.py",),
        select="agrees",
    ),
    "prefill-copied-to-the-first-row": Fault(
        "runtime/trt",
        Patch(
            "doge_deploy/runtime/trt/bounded.py",
            "self._caches[cache.present], first * size, rows * size)",
            "self._caches[cache.present], 0, rows * size)",
        ),
        "the prompt of one text overwrites that of another",
        ("test_bounded.py", "test_slots.py"),
        select="other_rows or bounded",
    ),
    "widened-weights-pass": Fault(
        "targets/trt",
        Patch(
            "doge_deploy/targets/trt/low_bits.py",
            """if any(read["name"] in changing for read in kernel.inputs):""",
            """if any(read["name"] in changing for read in kernel.inputs + kernel.outputs):""",
        ),
        "an engine that widens its 4-bit weights in every call is called good",
        ("test_low_bits.py",),
    ),
    "inputs-of-products-without-headroom": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/weight_formats/_floats.py",
            "power_of_two(max(largest, SMALLEST_INPUT) * HEADROOM / self.largest)",
            "power_of_two(max(largest, SMALLEST_INPUT) / HEADROOM / self.largest / 8)",
        ),
        "an fp8 engine cuts large activations off",
        ("test_few_bits.py",),
    ),
    "ranges-forget-rows": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/ranges.py",
            "found[weight] = max(found.get(weight, 0.0), float(inputs[0].abs().max()))",
            "found[weight] = float(inputs[0].abs().max())",
        ),
        "scales of activations come from the last piece of the text only",
        ("test_ranges.py",),
    ),
    "errors-added-to-later-blocks": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/weight_formats/_feedback.py",
            "left[:, end:] -= errors @ upper[begin:end, end:]",
            "left[:, end:] += errors @ upper[begin:end, end:]",
        ),
        "4-bit weights in half precision lose more than without a text",
        ("test_feedback.py",),
        select="plain_loop",
    ),
    "worst-scale-of-a-block": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/weight_formats/_feedback.py",
            "best, rows = losses.argmin(0)",
            "best, rows = losses.argmax(0)",
        ),
        "the scale of a block is the worst that was tried",
        ("test_feedback.py",),
        select="plain_loop",
    ),
    "calibrated-scale-with-all-its-bits": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/weight_formats/_grids.py",
            "WIDE_SCALE_BITS = 11",
            "WIDE_SCALE_BITS = 24",
        ),
        "another processor calibrates a large model to other scales, and verify calls the bundle broken",
        ("test_feedback.py",),
        select="few_bits",
    ),
    "calibrated-scale-without-sign": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/weight_formats/_grids.py",
            "torch.where(high > -low, high, low)",
            "torch.where(high > -low, -high, low)",
        ),
        "the largest number of a calibrated block does not get the level more",
        ("test_feedback.py",),
        select="either_sign",
    ),
    "calibrated-bundle-without-its-tokens": Fault(
        "bundle",
        Patch(
            "doge_deploy/bundle/consistency.py",
            "if options.calibrate not in (None, has_tokens):",
            "if options.calibrate not in (None, has_tokens, True):",
        ),
        "verify judges a calibrated bundle by numbers that are chosen without a text",
        ("test_calibrated.py",),
        select="gone",
    ),
    "covariances-forget-rows": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/covariances.py",
            "found = sums[names[0]] + _products(inputs[0]) if names[0] in sums else _products(inputs[0])",
            "found = _products(inputs[0])",
        ),
        "4-bit weights are chosen on the last piece of the text only",
        ("test_feedback.py",),
        select="those_of_transformers",
    ),
    "recording-of-another-text": Fault(
        "verify",
        Patch(
            "doge_deploy/verify/recording/subject.py",
            "if CALIBRATION_TOKENS in manifest.files:",
            "if CALIBRATION_TOKENS in manifest.options.to_json():",
        ),
        "a recording judges a bundle whose 4-bit weights were chosen on another text",
        ("test_feedback.py",),
        select="another_text",
    ),
    "parity-with-rounded-inputs": Fault(
        "verify",
        Patch(
            "doge_deploy/verify/runners.py",
            "def _lowered(model: ir.Model, *, round_inputs: bool = False) -> bytes:",
            "def _lowered(model: ir.Model, *, round_inputs: bool = True) -> bytes:",
        ),
        "verify --lowering calls a good fp8 bundle broken",
        ("test_few_bits.py",),
    ),
    "halves-of-float4-exchanged": Fault(
        "targets/ort",
        Patch(
            "doge_deploy/targets/ort/float4.py",
            "numbers = np.arange(16, dtype=np.uint8)",
            "numbers = np.arange(16, dtype=np.uint8)[::-1].copy()",
        ),
        "ONNX Runtime runs an nvfp4 bundle with other weights than it stores",
        ("test_few_bits.py",),
    ),
    "fp8-for-every-device": Fault(
        "targets/trt",
        Patch(
            "doge_deploy/targets/trt/choices.py",
            "if older := [one for one in asked if first and not at_least(one, first)]:",
            "if older := [one for one in asked if first and not at_least(one, '7.5')]:",
        ),
        "fp8 for compute capability 8.6 ends in an error of the vendor's",
        ("test_build.py",),
        select="devices_that_cannot",
    ),
    "scale-of-no-sign": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/weight_formats/_scales.py",
            "torch.where(nothing, torch.ones_like(best_scale), best_scale)",
            "torch.where(nothing, torch.zeros_like(best_scale), best_scale)",
        ),
        "TensorRT refuses a bundle with a row of zeros",
        ("test_weight_formats.py",),
    ),
    "scale-with-all-its-bits": Fault(
        "graph",
        Patch(
            "doge_deploy/graph/weight_formats/_scales.py",
            "bits = bits or SIGNIFICANT_BITS[dtype] - NUMBER_BITS",
            "bits = bits or SIGNIFICANT_BITS[dtype]",
        ),
        "runtimes that round number times scale have other 4-bit weights than those that do not",
        ("test_weight_formats.py",),
    ),
    "score-judged-in-float32": Fault(
        "pipelines",
        Patch(
            "doge_deploy/pipelines/export.py",
            "check_score_range(checkpoint, dtype)",
            'check_score_range(checkpoint, "float32")',
        ),
        "a score that overflows float16 is exported without a warning",
        ("test_export.py",),
        (
            Patch(
                "doge_deploy/export.py",
                "check_score_range(checkpoint, DTYPES[options.dtype])",
                'check_score_range(checkpoint, "float32")',
            ),
        ),
    ),
    "row-that-ended-gets-a-token": Fault(
        "runtime",
        Patch(
            "doge_deploy/runtime/rows.py",
            "real = np.clip(lengths - start, 0, part.shape[1])",
            "real = np.clip(lengths - start, 1, part.shape[1])",
        ),
        "a short row of a long batch takes padding for tokens",
        ("test_window.py", "test_prefill_chunks.py", "test_pieces.py"),
    ),
    "rms-limit-four-times-too-wide": Fault(
        "verify",
        Patch(
            "doge_deploy/verify/tolerance.py",
            "max(row.factor_rms * noise_rms, floor / 4) * chance",
            "max(row.factor_rms * noise_rms, floor) * chance",
        ),
        "verify passes four times the error where the reference makes hardly any",
        ("test_tolerance.py", "test_noise.py"),
    ),
    "score-cache-in-the-model-dtype": Fault(
        "doctor",
        Patch(
            "doge_deploy/doctor/fit.py",
            'per_slot += facts.num_score_heads * score_numbers * item_bytes("fp32")',
            "per_slot += facts.num_score_heads * score_numbers * item_bytes(dtype)",
        ),
        "doctor takes the cache of a float16 bundle for smaller than it is",
        ("test_fit.py", "test_deployment_options.py"),
        (
            Patch(
                "doge_deploy/doctor/fit.py",
                '(2 * facts.head_dim * ITEM_BYTES[dtype] + ITEM_BYTES["fp32"])',
                "(2 * facts.head_dim * ITEM_BYTES[dtype] + ITEM_BYTES[dtype])",
            ),
        ),
    ),
    "past-beyond-the-workload": Fault(
        "bench",
        Patch(
            "doge_deploy/bench/measure.py",
            "runner.run(input_ids[:, begin : min(begin + FILL_CHUNK, past)])",
            "runner.run(input_ids[:, begin : begin + FILL_CHUNK])",
        ),
        "a decode step is timed at a longer past than the table says",
        ("test_measure.py",),
    ),
    "numbers-that-differ-exit-with-0": Fault(
        "verify",
        Patch("doge_deploy/verify/report.py", "if not self.passed:", "if not self.weights.passed:"),
        "verify ends with exit code 0 although the graph computes something else",
        ("test_teeth.py",),
        (Patch("doge_deploy/cli/verify.py", "if not report.passed:", "if not report.weights.passed:"),),
    ),
    "missing-dependency-ends-as-broken-model": Fault(
        "cli",
        Patch(
            "doge_deploy/cli/endings.py",
            "return error.exit_code, str(error)",
            "return min(error.exit_code, 3), str(error)",
        ),
        "a package that is not installed ends a command with exit code 3",
        ("test_endings.py", "test_main.py"),
        (
            Patch(
                "doge_deploy/cli/main.py",
                "return _fail(str(error), error.exit_code, debug)",
                "return _fail(str(error), min(error.exit_code, 3), debug)",
            ),
        ),
    ),
    # of the server at least one for each line of what it promises (docs/serve.md), whose number the effect begins with
    "stream-loses-its-end": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/chunks.py",
            "return (self.part(choice, text), last) if text else (last,)",
            "return (last,)",
        ),
        "1: what was withheld of a character or of a beginning of a stop text never reaches a stream",
        ("test_behaviour.py",),
        select="TestText",
    ),
    "bytes-of-an-unfinished-character-are-dropped": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/text.py",
            "return self._stop.push(self._detokenizer.flush()) + self._stop.flush()",
            "return self._stop.flush()",
        ),
        "1: a text that ends within a character loses it",
        ("test_behaviour.py",),
        select="TestText",
    ),
    "one-stop-text-is-not-looked-for": Fault(
        "serve",
        Patch("doge_deploy/serve/text.py", "self._looks = bool(stop)", "self._looks = len(stop) > 1"),
        "2: a single stop text ends nothing",
        ("test_behaviour.py",),
        select="TestText",
    ),
    "stop-text-of-a-special-token": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/text.py", "self._detokenizer.special_text(token), self._detokenizer.pending())", '"")'
        ),
        "2: the text of a special token does not end a text as it does in generate",
        ("test_behaviour.py",),
        select="TestText",
    ),
    "slot-of-a-client-that-left": Fault(
        "serve",
        Patch("doge_deploy/serve/http/inbox.py", "engine.cancel(request.id)", "pass"),
        "3: a text goes on for a client that is gone",
        ("test_behaviour.py",),
        select="TestClientsThatLeave",
    ),
    "cancels-a-neighbour": Fault(
        "serve",
        Patch("doge_deploy/serve/scheduler.py", "if request.id == request_id:", "if request.id[:4] == request_id[:4]:"),
        "3: a client that leaves takes another one's text along",
        ("test_behaviour.py",),
        select="TestClientsThatLeave",
    ),
    "usage-for-everybody": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/chunks.py",
            "        if not self._plan.include_usage:\n            return (DONE,)",
            "        if self._plan is None:\n            return (DONE,)",
        ),
        "4: a usage chunk comes though nobody asked",
        ("test_behaviour.py",),
        select="TestEnds",
    ),
    "reason-of-what-was-cut-off": Fault(
        "serve",
        Patch("doge_deploy/serve/request.py", '"stop" if self.text.stopped else "length"', '"stop"'),
        "4: a text that was cut off says that it has ended",
        ("test_behaviour.py",),
        select="TestEnds",
    ),
    "logprobs-after-the-temperature": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/request.py",
            "log_probabilities(row, token, self.logprobs)",
            "log_probabilities(row / np.float32(max(self.sampler.options.temperature, 1.0)), token, self.logprobs)",
        ),
        "5: logprobs depend on the temperature",
        ("test_behaviour.py",),
        select="TestLogprobs",
    ),
    "logprobs-only-with-text": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/chunks.py",
            "            if found.logprobs is not None:\n                return (self",
            "            if found.logprobs is not None and text:\n                return (self",
        ),
        "5: a stream leaves out the logprobs of tokens without text",
        ("test_behaviour.py",),
        select="TestLogprobs",
    ),
    "prefix-one-token-too-long": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/slots.py",
            "                    return place\n",
            "                    return place + 1\n",
        ),
        "6: a prompt is continued from another prompt's token",
        ("test_scheduler.py", "test_behaviour.py"),
        select="",
    ),
    "choices-with-one-seed": Fault(
        "serve",
        Patch("doge_deploy/serve/model.py", "seed=sampling.seed + choice", "seed=sampling.seed"),
        "7: all choices of a request are the same text",
        ("test_behaviour.py",),
        select="TestBatched",
    ),
    "seed-where-there-is-none": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/plans.py",
            '"seed": None if body.seed is None else',
            '"seed": 0 if body.seed is None else',
        ),
        "7: without a seed every text is the same",
        ("test_behaviour.py",),
        select="TestBatched",
    ),
    "room-of-an-answer": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/model.py",
            "room = self.max_length + 1 - prompt_tokens",
            "room = self.max_length - prompt_tokens",
        ),
        "8: an answer ends one token before its row is full",
        ("test_behaviour.py",),
        select="TestLengths",
    ),
    "length-of-a-prompt": Fault(
        "serve",
        Patch("doge_deploy/text/lengths.py", "if tokens > most:", "if tokens > 2 * most:"),
        "8: a prompt that is too long gets past the check",
        ("test_behaviour.py",),
        select="TestLengths",
    ),
    "digits-for-numbers": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/requests.py",
            '_NUMBER = {"allow_inf_nan": False, "strict": True}',
            '_NUMBER = {"allow_inf_nan": False}',
        ),
        "9: a text of digits is taken for a number",
        ("test_behaviour.py",),
        select="TestIllegal",
    ),
    "a-million-findings": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/requests.py",
            "if isinstance(value, list | dict) and len(value) > limit:",
            "if isinstance(value, list | dict) and len(value) > 10**9:",
        ),
        "9: an illegal body of a few megabytes takes seconds to refuse",
        ("test_behaviour.py",),
        select="TestIllegal",
    ),
    "typed-text-becomes-a-special-token": Fault(
        "serve",
        Patch("doge_deploy/serve/http/plans.py", "literal=True", "literal=False"),
        "10: a user can end the turn",
        ("test_behaviour.py",),
        select="TestPrompts",
    ),
    "a-template-that-refuses-is-a-500": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/plans.py",
            'raise ApiError(400, f"messages: {error}", param="messages") from error',
            "raise RuntimeError(str(error)) from error",
        ),
        "11: messages that break the template are answered with a 500",
        ("test_behaviour.py",),
        select="TestPrompts",
    ),
    "no-limit-of-requests": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/scheduler.py",
            "if count > self.queue_requests:",
            "if count > 10 * self.queue_requests:",
        ),
        "12: the queue grows beyond its limit",
        ("test_behaviour.py",),
        select="TestAdmission",
    ),
    "logits-of-other-tokens": Fault(
        "targets",
        Patch(
            "doge_deploy/targets/ort/logit_rows.py",
            'tokens = emit("Sub", column, offsets',
            'tokens = emit("Add", column, offsets',
        ),
        "the logits of a guess are those of tokens behind it",
        ("test_speculation.py",),
        select="one_at_a_time",
    ),
    "guesses-stay": Fault(
        "runtime",
        Patch(
            "doge_deploy/runtime/speculation.py",
            "self._runner.truncate_row(0, tokens)",
            "self._runner.truncate_row(0, tokens + 1)",
        ),
        "a wrong guess stays in the cache",
        ("test_speculation.py",),
        select="same_with_guesses",
    ),
    "prompts-take-all": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/scheduler.py",
            "if somebody_waits else self.limits.alone_tokens",
            "if not somebody_waits else self.limits.alone_tokens",
        ),
        "a long prompt holds up the texts of others",
        ("test_scheduler.py",),
        select="long_prompt",
    ),
    "padding-taken-for-the-last-token": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/scheduler.py",
            "self._fed(piece, row[min(len(piece.ids), len(row)) - 1])",
            "self._fed(piece, row[-1])",
        ),
        "6: of prompts that are fed together the shorter ones go on behind padding",
        ("test_together.py",),
    ),
    "padding-is-free": Fault(
        "serve",
        Patch("doge_deploy/serve/prompts.py", "and tokens <= self._most\n", "and sum(lengths) <= self._most\n"),
        "several prompts delay the texts of others by more than one piece",
        ("test_together.py",),
    ),
    "padding-beyond-the-row": Fault(
        "serve",
        Patch("doge_deploy/serve/prompts.py", "one.kept + width <=", "one.kept + len(one.ids) <="),
        "a prompt that nearly fills its row fails beside a longer one",
        ("test_together.py",),
        select="space_for_padding",
    ),
    "mixed-angles-join": Fault(
        "runtime",
        Patch(
            "doge_deploy/runtime/slots.py",
            "if self.whole_prompts or not self._runner.joins(lengths):",
            "if not self._runner.joins(lengths) and not self.whole_prompts:",
        ),
        "texts beyond the length of their RoPE get each other's angles",
        ("test_slots.py",),
        select="prompts_join",
    ),
    "arrivals-are-not-waited-for": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/arrivals.py",
            "rounds = 0 if comes else rounds + 1",
            "rounds += ROUNDS",
        ),
        "of requests that arrive together the first is computed alone",
        ("test_arrivals.py",),
    ),
    "half-of-a-request-is-queued": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/scheduler.py",
            "        self.limits.check_queue(count, waiting_tokens)\n",
            "        self.waiting.extend(requests)\n        self.limits.check_queue(count, waiting_tokens)\n",
        ),
        "12: texts of a request that was refused are computed",
        ("test_scheduler.py",),
        select="belong_together",
    ),
    "failed-call-is-fed-again": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/scheduler.py",
            "piece.request.fed, piece.request.alone = 0, True",
            "piece.request.alone = True",
        ),
        "6: after a call of several prompts that failed their texts go on behind half of a prompt",
        ("test_together.py",),
        select="from_the_start",
    ),
    "prompts-wait-for-tokens": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/engine.py",
            "next(halves)()",
            "(next(halves)(), next(halves)())",
        ),
        "a prompt that comes while tokens are made waits for the next ones as well",
        ("test_engine.py",),
        select="before_the_next_ones",
    ),
    "memory-of-one-slot": Fault(
        "runtime",
        Patch("doge_deploy/runtime/memory.py", "weights * widened + rows * cache", "weights * widened + cache"),
        "a server with more slots than memory is ended by the system instead of by a line that says so",
        ("test_host.py",),
        select="all_slots",
    ),
    "budget-is-never-used-up": Fault(
        "serve",
        Patch("doge_deploy/serve/scheduler.py", "fed + call.tokens if somebody_waits or", "0 if somebody_waits or"),
        "prompts that wait hold up the texts of others until all are fed",
        ("test_together.py",),
        select="budget",
    ),
    "warm-up-leaves-text": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/start.py", "slots.release(slot)\n\n\ndef make_scheduler", "pass\n\n\ndef make_scheduler"
        ),
        "no slot is free when the first client comes",
        ("test_warm_up.py",),
    ),
    "no-limit-of-tokens": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/scheduler.py",
            "tokens > self.queue_tokens:",
            "tokens > 10 * self.queue_tokens:",
        ),
        "12: the queue holds more tokens than it should",
        ("test_scheduler.py",),
        select="queue",
    ),
    "come-again-in-vain": Fault(
        "serve",
        Patch("doge_deploy/serve/scheduler.py", "waiting = lengths[self.runner.slots :]", "waiting = lengths[:0]"),
        "12: a request that can never be queued is told to come again",
        ("test_connections.py",),
        select="never_be_queued or may_ever_wait",
    ),
    "no-time-to-wait": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/errors.py",
            "if error.status in (429, 503) else None",
            "if error.status == 503 else None",
        ),
        "12: a client is not told when to come again",
        ("test_behaviour.py",),
        select="TestAdmission",
    ),
    "grammar-without-a-trial": Fault(
        "serve",
        Patch("doge_deploy/serve/grammar/desk.py", "self._trial.compile(kind, text)\n", "pass\n"),
        "a grammar may end the server, since no other process compiles it first",
        ("test_grammar.py",),
        select="TestDesk",
    ),
    "nan-ends-the-engine": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/scheduler.py",
            "except Exception as error:  # NaN, or a grammar",
            "except ZeroDivisionError as error:  # NaN, or a grammar",
        ),
        "13: NaN in one row ends every request",
        ("test_scheduler.py", "test_behaviour.py"),
        select="nan",
    ),
    "error-without-an-event": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/chunks.py",
            "return (event(error_body(found.status, found.message, param=found.param, code=found.code)), DONE)",
            "return (DONE,)",
        ),
        "13: a stream that fails looks as one that has ended",
        ("test_behaviour.py",),
        select="TestErrorsWithin",
    ),
    "no-time-to-drain": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/start.py",
            "deadline = perf_counter() + drain_seconds",
            "deadline = perf_counter()",
        ),
        "14: SIGTERM cuts running texts off",
        ("test_serve_command.py",),
        select="sigterm",
    ),
    "takes-work-while-it-drains": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/app.py", "if self._served.draining:\n", "if self._served.draining and not scope:\n"
        ),
        "14: a server that is about to end takes requests",
        ("test_serve_command.py", "test_behaviour.py"),
        select="sigterm or ready",
    ),
    "second-signal-waits": Fault(
        "serve",
        Patch("doge_deploy/serve/start.py", "self.should_exit = self.force_exit = True\n", "pass\n"),
        "14: a second signal does not end the server",
        ("test_serve_command.py",),
        select="second",
    ),
    "everybody-without-a-key": Fault(
        "serve",
        Patch("doge_deploy/serve/http/security.py", 'kind.lower() == b"bearer" and any(found)', "bool(found)"),
        "15: any key will do",
        ("test_behaviour.py",),
        select="TestSecurity",
    ),
    "metrics-without-a-key": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/security.py",
            '"/health", "/ready", "/openapi.json"})',
            '"/health", "/ready", "/openapi.json", "/metrics"})',
        ),
        "15: metrics are shown to everybody",
        ("test_behaviour.py",),
        select="TestSecurity",
    ),
    "prompts-in-the-log": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/app.py",
            "plan = await plan_completion(body,",
            "_log.info(body.prompt); plan = await plan_completion(body,",
        ),
        "15: prompts are in the log",
        ("test_behaviour.py",),
        select="TestSecurity",
    ),
    "name-of-a-histogram": Fault(
        "serve",
        Patch("doge_deploy/serve/http/metrics.py", 'family("time_to_first_token"', 'family("first_token"'),
        "16: dashboards find no time to the first token",
        ("test_behaviour.py",),
        select="TestMetrics",
    ),
    "tokens-are-not-counted": Fault(
        "serve",
        Patch("doge_deploy/serve/scheduler.py", "        self.counters.generated_tokens += 1\n", ""),
        "16: the throughput on a dashboard is zero",
        ("test_behaviour.py",),
        select="TestMetrics",
    ),
    "unread-streams-grow": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/inbox.py",
            "elif waiter.unread > MAX_UNREAD and not waiter.mail.awaited:",
            "elif waiter.unread > 10**9:",
        ),
        "limits: a client that does not read fills the memory",
        ("test_connections.py",),
        select="bounded",
    ),
    "chunks-of-another-choice": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/chunks.py",
            "around = self._around.get(choice.index)",
            "around = next(iter(self._around.values()), None)",
        ),
        "1: what was prepared for the chunks of one choice is sent for all",
        ("test_chunks.py", "test_behaviour.py"),
    ),
    "every-origin": Fault(
        "serve",
        Patch("doge_deploy/serve/http/app.py", "allow_origins=list(cors_origins)", 'allow_origins=["*"]'),
        "15: a page of any origin may use the server where one was named",
        ("test_behaviour.py",),
        select="TestSecurity",
    ),
    "first-token-waits": Fault(
        "serve",
        Patch("doge_deploy/serve/engine.py", "or event.first", ""),
        "a first token is held back for the second one",
        ("test_engine.py",),
        select="first_token",
    ),
    "held-while-a-prompt-is-fed": Fault(
        "serve",
        Patch("doge_deploy/serve/engine.py", "if self._urgent or not next_is_step or", "if self._urgent or"),
        "tokens that were made wait until a piece of another one's prompt is fed",
        ("test_engine.py",),
        select="prompt_that_is_fed",
    ),
    "heads-without-end": Fault(
        "serve",
        Patch("doge_deploy/serve/http/connections.py", "if self._bare > MAX_HEAD_BYTES:", "if self._bare > 10**12:"),
        "limits: the headers of a request, in front of its body or behind it, fill the memory",
        ("test_connections.py",),
        select="head_without_end or around_a_body",
    ),
    "silent-connections": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/connections.py",
            "self._receiving = self.loop.call_later(self.patience.receive_seconds, transport.abort)",
            "self._receiving = None",
        ),
        "limits: a client that says nothing keeps its connection",
        ("test_connections.py",),
        select="not_waited_for",
    ),
    "withholds-what-begins-nothing": Fault(
        "runtime",
        Patch(
            "doge_deploy/runtime/generate.py",
            "if any(stop.startswith(text[-length:]) for stop in self._stop):",
            "if self._stop:",
        ),
        "a text comes late, since more of it is withheld than can be the beginning of a stop text",
        ("test_generate.py", "test_behaviour.py"),
        select="stop or withheld",
    ),
    "logarithms-of-another-base": Fault(
        "runtime",
        Patch("doge_deploy/runtime/logprobs.py", "scores -= np.log(", "scores -= np.log2("),
        "logprobs are no natural logarithms",
        ("test_logprobs.py",),
    ),
    "no-likeliest-is-no-logprobs": Fault(
        "serve",
        Patch("doge_deploy/serve/http/plans.py", "(body.top_logprobs or 0) if", "(body.top_logprobs or None) if"),
        "5: top_logprobs: 0 gives no logprobs at all",
        ("test_behaviour.py",),
        select="top_logprobs_0",
    ),
    "chosen-token-left-out": Fault(
        "serve",
        Patch("doge_deploy/serve/http/logprobs.py", "in (*entry.top, (entry.token, entry.logprob)):", "in entry.top:"),
        "5: top_logprobs of a completion has no entry for an unlikely token that was chosen",
        ("test_top_logprobs.py",),
        select="TestTheChosenToken",
    ),
    "least-likely-of-a-name": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/logprobs.py",
            "found.setdefault(self.texts[token].name_json, logprob)",
            "found[self.texts[token].name_json] = logprob",
        ),
        "5: of tokens with the same name top_logprobs shows the least likely",
        ("test_top_logprobs.py",),
        select="TestNames",
    ),
    "a-refusal-is-an-answer": Fault(
        "serve",
        Patch("doge_deploy/serve/ray/front.py", 'if message["status"] == 503:', 'if message["status"] == 599:'),
        "more than one machine: a replica that takes no work answers for all of them",
        ("test_ray.py",),
        select="TakesNoWork",
    ),
    "unread-answers-of-a-replica-grow": Fault(
        "serve",
        Patch("doge_deploy/serve/ray/replica.py", "            await room.acquire()\n", ""),
        "more than one machine: a client that does not read fills the memory of a replica",
        ("test_ray.py",),
        select="of_a_stream",
    ),
    "nan-in-a-scored-prompt": Fault(
        "serve",
        Patch("doge_deploy/serve/scheduler.py", "            require_finite(row, length)\n", "            pass\n"),
        "13: NaN in a prompt that is only scored is sent as a number",
        ("test_scheduler.py", "test_behaviour.py"),
        select="scored_with_nan",
    ),
    "queue-until-the-first-token": Fault(
        "serve",
        Patch("doge_deploy/serve/http/inbox.py", "event.slot_time - waiter.arrived", "now - waiter.arrived"),
        "16: the time in the queue is the time to the first token",
        ("test_inbox.py",),
        select="time_in_the_queue",
    ),
    "offsets-of-tokens": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/logprobs.py",
            "return len(self.decoder.decode(found.bytes))",
            "return len(found.token)",
        ),
        "5: behind a character of several tokens text_offset points beyond its token",
        ("test_odd_requests.py",),
        select="offsets",
    ),
    "others-wait-for-a-long-text": Fault(
        "text",
        Patch(
            "doge_deploy/text/backend.py",
            "(found,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)",
            "found = backend.encode(text, add_special_tokens=add_special_tokens)",
        ),
        "streams stand still while a long text is encoded",
        ("test_long_texts.py",),
        select="others_run",
    ),
    "unknown-text-is-thought-to-be-long": Fault(
        "text",
        Patch("doge_deploy/text/longest.py", "model.unk_token is not None and not model.fuse_unk", "True"),
        "8: a prompt that fits is refused, where one token stands for a run of unknown characters",
        ("test_longest.py",),
    ),
    "bos-twice": Fault(
        "text",
        Patch(
            "doge_deploy/text/tokenizer.py",
            "return self.ids(self.chat_text(messages), add_special_tokens=False, room=room)",
            "return self.ids(self.chat_text(messages), add_special_tokens=True, room=room)",
        ),
        "a conversation begins with bos twice",
        ("test_behaviour.py",),
        select="bos",
    ),
    "templates-change-what-they-read": Fault(
        "text",
        Patch(
            "doge_deploy/text/template_limits.py",
            "class LimitedEnvironment(ImmutableSandboxedEnvironment):",
            "from jinja2.sandbox import SandboxedEnvironment\n\n\nclass LimitedEnvironment(SandboxedEnvironment):",
        ),
        "a chat template can change the conversation that it was given",
        ("test_templates.py",),
        select="sandbox",
    ),
    "other-machines-without-a-key": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/start.py",
            "if not is_loopback(self.host) and self.api_key_file is None and not self.no_auth:",
            'if self.host == "0.0.0.0" and self.api_key_file is None and not self.no_auth:',
        ),
        "15: on an address of the network everybody is served",
        ("test_serve_command.py",),
        select="other_machines",
    ),
    "ids-as-they-come": Fault(
        "serve",
        Patch(
            "doge_deploy/serve/http/app.py",
            "legal = 0 < len(given) <= 128 and all(33 <= byte < 127 for byte in given)",
            "legal = bool(given)",
        ),
        "15: a client writes what it likes into the log",
        ("test_behaviour.py",),
        select="request_has_an_id",
    ),
    "any-file-of-the-page": Fault(
        "serve",
        Patch("doge_deploy/serve/http/app.py", "if name not in PAGE_PARTS:", "if not (PAGE / name).exists():"),
        "15: a client names the file that is read",
        ("test_behaviour.py",),
        select="no_path",
    ),
    "an-offer-of-http2-takes-the-body": Fault(
        "serve",
        Patch("doge_deploy/serve/http/connections.py", "if self.parser.should_upgrade() and", "if False and"),
        "9: Java's HttpClient is told that its bodies are empty",
        ("test_odd_requests.py",),
        select="a_body_arrives",
    ),
    "requests-behind-one-another-keep-a-slot": Fault(
        "serve",
        Patch("doge_deploy/serve/http/connections.py", "            answered.disconnected = True\n", ""),
        "3: the text of a client that sent two requests and left goes on",
        ("test_odd_requests.py",),
        select="leaves_frees",
    ),
    "lines-that-end-within-a-text": Fault(
        "serve",
        Patch("doge_deploy/serve/http/responses.py", "if not text.isascii():", "if text.isascii():"),
        "1: a client that reads lines by str.splitlines cannot read a stream with U+2028",
        ("test_odd_requests.py", "test_chunks.py"),
        select="no_line",
    ),
    "paths-write-lines-into-the-log": Fault(
        "serve",
        Patch("doge_deploy/serve/http/app.py", '"path": quote(scope["path"])}', '"path": scope["path"]}'),
        "15: a client writes lines into the log",
        ("test_odd_requests.py",),
        select="nobody_writes",
    ),
    "hashes-nobody-looks-at": Fault(
        "bundle",
        Patch(
            "doge_deploy/bundle/file_check.py",
            "self.found += self._large.result()",
            "self._large.result()",
        ),
        "altered weights of a bundle are run",
        ("test_file_check.py",),
    ),
    "runner-before-the-hashes": Fault(
        "runtime",
        Patch("doge_deploy/runtime/backend.py", "    bundle.prove()\n    return runner", "    return runner"),
        "a program computes with weights before they are proved",
        ("test_opening.py",),
        select="hashed",
    ),
    "cache-of-altered-weights": Fault(
        "runtime/ort",
        Patch(
            "doge_deploy/runtime/ort/graph_cache.py",
            "    if session is None:\n        bundle.prove()\n",
            "",
        ),
        "an entry made of altered weights is run once the true ones are back",
        ("test_opening.py",),
        select="entry",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How the selection fared with one fault."""

    caught_by: str | None
    """The first test that failed."""
    seconds: float


class Copy:
    """A copy of a checkout whose tests import its own sources, whatever is installed."""

    def __init__(self, tree: Path, python: Path, folder: Path) -> None:
        self.tree, self.python, self._shared = folder / "tree", python, folder / "made_once"
        shutil.copytree(tree, self.tree, ignore=LEFT_OUT, symlinks=True)
        if (tree.parent / "shared").exists():
            (folder / "shared").symlink_to((tree.parent / "shared").resolve())
        names = folder / "names"
        names.mkdir()
        (names / "doge_plugins").symlink_to(self.tree / "plugins")
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(self.tree), str(names))),
            # a fault may have the size and, to a second, the time of the text that it replaces
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._require_own_sources()

    def _require_own_sources(self) -> None:
        script = "import doge_deploy, doge_plugins; print(doge_deploy.__path__[0]); print(doge_plugins.__path__[0])"
        found = self._run("-c", script).stdout.split()
        foreign = [path for path in found if not Path(path).is_relative_to(self.tree.parent)]
        if foreign or len(found) != 2:
            raise RuntimeError(f"the copy would test other sources: {foreign or 'none found'}")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=self.tree, env=self.environment, capture_output=True, text=True)

    def files(self, names: Sequence[str]) -> list[str]:
        """Paths of the test files of these names."""
        found = [path for name in names for path in sorted((self.tree / "tests").rglob(name))]
        return [str(path.relative_to(self.tree)) for path in found]

    def first_failure(self, *arguments: str) -> str | None:
        """Run pytest; the test that failed first, if one did.

        Raises:
            RuntimeError: pytest itself failed.
        """
        done = self._run("-m", "pytest", "-q", "-x", "-rfE", "-p", "no:cacheprovider", *SELECTION, *arguments)
        if done.returncode in (0, 5):
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
        if failed is None:
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return failed[1]

    def plant(self, fault: Fault, rest: Sequence[str] | None) -> Outcome:
        """Run the selection with the fault in place.

        Args:
            fault: what to plant.
            rest: options of pytest for the whole selection; None leaves it at the files that are likely to notice.

        Raises:
            LookupError: the fault does not apply.
            RuntimeError: what failed fails without the fault too.
        """
        start = time.perf_counter()
        self.environment.pop("DOGE_DEPLOY_TESTS_SHARED", None)
        if fault.package in NO_PART_OF_AN_EXPORT:
            self.environment["DOGE_DEPLOY_TESTS_SHARED"] = str(self._shared)
        patch = fault.find(self.tree)
        place = self.tree / patch.file
        sound = place.read_text(encoding="utf-8")
        place.write_text(sound.replace(patch.old, patch.new), encoding="utf-8")
        try:
            likely = self.files(fault.likely)
            narrow = ("-k", fault.select) if fault.select else ()
            failed = self.first_failure(*likely, *narrow) if likely else None
            if failed is None and rest is not None:
                failed = self.first_failure(*rest)
        finally:
            place.write_text(sound, encoding="utf-8")
        if failed is not None and self.first_failure(failed):
            raise RuntimeError(f"{failed} fails without the fault too")
        return Outcome(failed, time.perf_counter() - start)


def main() -> int:
    """Plant the faults; 0 if each was caught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant; all where none is named")
    parser.add_argument("--package", action="append", choices=sorted({one.package for one in FAULTS.values()}))
    parser.add_argument("--list", action="store_true", help="show the faults")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to plant them in")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the Python of that checkout")
    parser.add_argument("--quick", action="store_true", help="run only the files that are likely to notice")
    parser.add_argument("--workers", default="auto", help="of pytest-xdist; 0 where that is not installed")
    options = parser.parse_args()
    if unknown := set(options.names) - set(FAULTS):
        parser.error(f"no fault {', '.join(sorted(unknown))}; known: {', '.join(FAULTS)}")
    packages = options.package or [fault.package for fault in FAULTS.values()]
    chosen = {name: fault for name in options.names or FAULTS if (fault := FAULTS[name]).package in packages}
    if options.list:
        for name, fault in chosen.items():
            print(f"{fault.package:12} {name}: {fault.effect}")
        return 0
    rest = () if options.workers == "0" else ("-n", options.workers, "--dist", "worksteal")
    print("| package | fault | caught by | seconds |\n| --- | --- | --- | --- |", flush=True)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(options.tree.resolve(), options.python.absolute(), Path(folder).resolve())
        for name, fault in chosen.items():
            try:
                outcome = copy.plant(fault, None if options.quick else rest)
                caught, seconds = outcome.caught_by, f"{outcome.seconds:.0f}"
            except (LookupError, RuntimeError) as error:
                caught, seconds = None, f"not judged: {error}"
            missed += caught is None
            print(f"| {fault.package} | {name} | {caught or 'nothing'} | {seconds} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
