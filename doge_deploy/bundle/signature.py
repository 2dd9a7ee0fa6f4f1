"""Every input and output of an exported graph: the contract between the trace and all later packages.

Axes: B `batch_size`, Q `sequence_length`, P `past_sequence_length`, K `past_sequence_length + sequence_length`,
L `max_length` (a number, fixed at export).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from doge_deploy.config.model import DogeFacts

BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = f"{PAST} + {SEQUENCE}"
SEEN = "total_sequence_length"
"""All tokens so far, where a sliding cache holds fewer."""
PRESENT = "present_sequence_length"
"""Slots of a sliding cache after the call: P + Q, at most `sliding_window - 1`."""
PAST_ROPE = "past_rope_length"
PRESENT_ROPE = "present_rope_length"
"""The memory of RoPE type `dynamic` beyond its original length: tokens of the longest text so far, 0 for none."""

LOGIT_OFFSETS, LOGIT_ROWS = "logit_offsets", "logit_rows"
"""An input of a lowered graph that may be left out, and its axis: for which tokens of each row there are logits, as
distances from its last one."""

BEST_TOKENS, BEST_LOGITS = "best_tokens", "best_logits"
"""Outputs of a lowered graph: for each place that has logits the lowest of its likeliest tokens, and the logit of that
token, infinite where one is not a number."""

LAYOUTS = ("static", "growing")
"""Cache layouts, the default first."""

UNCACHED = "uncached"
"""The one layout of tasks other than causal-lm: a whole text in one call."""

CACHE_KINDS = {"growing": ("key", "value"), "static": ("key", "value", "score")}
"""What a layout keeps per layer, in graph order."""


@dataclass(frozen=True)
class GraphTensor:
    """One graph input or output: `dtype` is an ONNX element type in NumPy's spelling, an axis a name or a size."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one layout's graph, in order."""

    layout: str
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]

    def past(self) -> Iterator[tuple[GraphTensor, GraphTensor]]:
        """Each cache input with the output that replaces it on the next call."""
        present = {spec.name: spec for spec in self.outputs}
        for spec in self.inputs:
            if spec.name.startswith("past_key_values."):
                yield spec, present[present_name(spec.name)]

    @property
    def remembers_rope(self) -> bool:
        """Whether `past_rope_length` is an input, whose next value is the output `present_rope_length`."""
        return any(spec.name == PAST_ROPE for spec in self.inputs)

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
        }


def past_name(layer: int | str, kind: str) -> str:
    return f"past_key_values.{layer}.{kind}"


def present_name(past: str) -> str:
    """`past_key_values.3.key` -> `present.3.key`."""
    return past.replace("past_key_values.", "present.", 1)


def uncached_signature(facts: DogeFacts, task: str, *, dtype: str, max_length: int) -> Signature:
    """The signature of a graph for "features" or "sequence-classification".

    Without a padding token transformers classifies one text at a time: B is 1 there.
    """
    classifies = task == "sequence-classification"
    batch: str | int = 1 if classifies and facts.pad_token_id is None else BATCH
    inputs = [
        GraphTensor("input_ids", "int64", (batch, SEQUENCE)),
        GraphTensor("attention_mask", "int64", (batch, SEQUENCE)),
    ]
    if classifies:
        assert facts.num_labels is not None
        outputs = [GraphTensor("logits", dtype, (batch, facts.num_labels))]
    else:
        outputs = [GraphTensor("last_hidden_state", dtype, (batch, SEQUENCE, facts.hidden_size))]
    if facts.rope_remembers(max_length):
        inputs.append(GraphTensor(PAST_ROPE, "int64", (1,)))
        outputs.append(GraphTensor(PRESENT_ROPE, "int64", (1,)))
    return Signature(UNCACHED, tuple(inputs), tuple(outputs))


SHARES_BUFFERS = "doge_deploy.shares_buffers"
"""In the metadata of a lowered growing graph: past and present may be the same buffers, with more slots than tokens,
which are then counted by `attention_mask`.
"""

SEQUENCE_LENGTHS = "sequence_lengths"
SLOT_INDICES = "slot_indices"
SLOTS = "num_slots"


def windowed(signature: Signature) -> Signature:
    """The static signature of a graph whose runner drops keys that left the window.

    The buffers have any number of slots, and `slot_indices` `[B]` is each row's next one; `write_indices` is then only
    the next position.
    """

    def any_slots(spec: GraphTensor) -> GraphTensor:
        if not spec.name.startswith(("past_key_values.", "present.")):
            return spec
        return replace(spec, shape=(*spec.shape[:2], SLOTS, *spec.shape[3:]))

    inputs = []
    for spec in signature.inputs:
        inputs.append(any_slots(spec))
        if spec.name == "write_indices":
            inputs.append(GraphTensor(SLOT_INDICES, "int64", (BATCH,)))
    return Signature(signature.layout, tuple(inputs), tuple(any_slots(spec) for spec in signature.outputs))


CACHE_ROWS = "batch_size * key_heads"
RANK = "rank"
"""What a bounded cache keeps in the place of scores: the score, and the position of its token plus 1 (0: an empty
slot)."""


def bounded(signature: Signature, window: int, *, decode: bool) -> Signature:
    """The static signature of a graph whose cache has `window` slots, in which tokens lie in any order.

    Each key head of each row is a row of the cache. `write_indices` is the next position.

    Args:
        signature: of the static layout, with one score per key head.
        window: slots.
        decode: of the graph for calls of one token; else of that for more, which is always told how many are real.
    """

    def any_order(spec: GraphTensor) -> GraphTensor:
        if not spec.name.startswith(("past_key_values.", "present.")):
            shape = tuple(1 if decode and axis == SEQUENCE else axis for axis in spec.shape)
            return replace(spec, shape=shape)
        stem, _, kind = spec.name.rpartition(".")
        if kind == "score":
            return replace(spec, name=f"{stem}.{RANK}", shape=(CACHE_ROWS, 1, window, 2))
        return replace(spec, shape=(CACHE_ROWS, 1, window, spec.shape[3]))

    inputs = [any_order(spec) for spec in signature.inputs]
    names = [spec.name for spec in inputs]
    if not decode and SEQUENCE_LENGTHS not in names:
        inputs.insert(1 + names.index("write_indices"), GraphTensor(SEQUENCE_LENGTHS, "int64", (BATCH,)))
    return Signature(signature.layout, tuple(inputs), tuple(any_order(spec) for spec in signature.outputs))


def with_logit_rows(signature: Signature) -> Signature:
    """The same with logits of several tokens of a row, `LOGIT_OFFSETS` before its last one; `[0]` where not given."""
    outputs = tuple(
        replace(spec, shape=(BATCH, LOGIT_ROWS, spec.shape[2])) if spec.name == "logits" else spec
        for spec in signature.outputs
    )
    offsets = GraphTensor(LOGIT_OFFSETS, "int64", (LOGIT_ROWS,))
    return Signature(signature.layout, (*signature.inputs, offsets), outputs)


def with_best_tokens(signature: Signature) -> Signature:
    """The same with the likeliest token of each place that has logits."""
    logits = next(spec for spec in signature.outputs if spec.name == "logits")
    tokens = GraphTensor(BEST_TOKENS, "int64", logits.shape[:-1])
    best = GraphTensor(BEST_LOGITS, logits.dtype, logits.shape[:-1])
    return Signature(signature.layout, signature.inputs, (*signature.outputs, tokens, best))


def make_signature(facts: DogeFacts, layout: str, *, dtype: str, max_length: int, last_logits: bool) -> Signature:
    """The signature of a graph.

    Args:
        facts: the checkpoint, its `num_hidden_layers` the number that is exported.
        layout: "growing" or "static".
        dtype: NumPy's name of the model's dtype: "float32", "float16" or "bfloat16". Scores are float32 in all of them.
        max_length: slots per row of a static cache.
        last_logits: logits of one token per row.
    """
    past_axis: str | int = max_length if layout == "static" else PAST
    sliding = facts.sliding_window is not None
    present_axis: str | int = max_length if layout == "static" else PRESENT if sliding else TOTAL
    ids = [GraphTensor("input_ids", "int64", (BATCH, SEQUENCE))]
    if layout == "growing":
        ids.append(GraphTensor("attention_mask", "int64", (BATCH, SEEN if sliding else TOTAL)))
        ids.append(GraphTensor("position_ids", "int64", (BATCH, SEQUENCE)))
    else:
        ids.append(GraphTensor("write_indices", "int64", (BATCH,)))
        if last_logits:
            ids.append(GraphTensor(SEQUENCE_LENGTHS, "int64", (BATCH,)))
    memory = facts.rope_remembers(max_length)
    if memory:
        ids.append(GraphTensor(PAST_ROPE, "int64", (1,)))
    past, present = [], []
    for layer in range(facts.num_hidden_layers):
        for kind in CACHE_KINDS[layout]:
            name, width = past_name(layer, kind), 1 if kind == "score" else facts.head_dim
            kind_dtype = "float32" if kind == "score" else dtype
            heads = facts.num_score_heads if kind == "score" else facts.num_key_value_heads
            past.append(GraphTensor(name, kind_dtype, (BATCH, heads, past_axis, width)))
            present.append(GraphTensor(present_name(name), kind_dtype, (BATCH, heads, present_axis, width)))
    logits = GraphTensor("logits", dtype, (BATCH, 1 if last_logits else SEQUENCE, facts.vocab_size))
    if memory:
        present.append(GraphTensor(PRESENT_ROPE, "int64", (1,)))
    return Signature(layout, (*ids, *past), (logits, *present))
