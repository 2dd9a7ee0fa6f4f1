"""The routed experts in the form that ONNX Runtime's CPU provider runs fastest, as a local function.

The same sum as the body of doge::CDMoE, with

- one TopK for both halves of the router, and the candidate sums x[i] + y[j] and their expert ids as products with a
  constant matrix of zeros and ones: exact, since every such sum has two terms that are not zero;
- rows of the tables read where they are stored, quantized or not;
- `[N, k, C]` numbers for at most `chunk` tokens at a time.

Reference implementation: the body of doge::CDMoE, `doge_deploy.graph.functions.cdmoe`.
Axes: N tokens of the call, C hidden, n keys per half, k experts per token, P candidate pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from doge_deploy.graph.functions.activations import activation_body, weight_inputs
from doge_deploy.graph.functions.cdmoe import EXPERTS
from doge_deploy.graph.functions.text import parse_function
from doge_deploy.graph.schemas import ROUTED_EXPERTS
from doge_deploy.targets.ort.matching import CONTRIB, CONTRIB_VERSION

_HALVES = {
    "reference": """
    halves_shape = Constant <value_ints = [2, -1, KEYS]> ()
    memory_halves = Reshape (router_logits, halves_shape)
    halves = Transpose <perm = [1, 0, 2]> (memory_halves)
""",
    "per-token": """
    halves_shape = Constant <value_ints = [-1, 2, KEYS]> ()
    halves = Reshape (router_logits, halves_shape)
""",
}

_ROUTE = """
    reach = Constant <value_ints = [REACH]> ()
    score, key = TopK <axis = -1, largest = 1, sorted = 1> (halves, reach)
    row_shape = Constant <value_ints = [0, -1]> ()
    scores = Reshape (score, row_shape)
    pair_score = MatMul (scores, pair_of_scores)
    best_count = Constant <value_ints = [TOP]> ()
    best_score, best_pair = TopK <axis = -1, largest = 1, sorted = 1> (pair_score, best_count)
    key_float = Cast <to = 1> (key)
    keys = Reshape (key_float, row_shape)
    pair_expert = MatMul (keys, pair_of_keys)
    expert_float = GatherElements <axis = 1> (pair_expert, best_pair)
    EXPERTS = Cast <to = 7> (expert_float)
    softmax = Softmax <axis = -1> (best_score)
"""

_NORMALISE = """
    last_axis = Constant <value_ints = [-1]> ()
    total = ReduceSum <keepdims = 1> (softmax, last_axis)
    weight = Div (softmax, total)
"""

_MIX = """
    row_axis = Constant <value_ints = [1]> ()
    weight_row = Unsqueeze (weight, row_axis)
    tokens_shape = Constant <value_ints = [-1, 1, HIDDEN]> ()
    tokens = Reshape (hidden, tokens_shape)
    mixed = If (many) <
        then_branch = in_chunks () => (float[N, one, C] joined) {
            chunk = Constant <value_int = CHUNK> ()
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            token_axis = Constant <value_ints = [0]> ()
            count = Shape <start = 0, end = 1> (tokens)
            count_scalar = Squeeze (count)
            starts = Range (zero, count_scalar, chunk)
            chunks = Size (starts)
            always = Constant <value = bool {1}> ()
            none = SequenceEmpty <dtype = 1> ()
            parts = Loop (chunks, always, none) <
                body = part_by_part (int64 number, bool go_on, seq(float[M, one, C]) before)
                    => (bool go_on_out, seq(float[M, one, C]) after) {
                    start = Mul (number, chunk)
                    start_1d = Unsqueeze (start, token_axis)
                    end = Add (start, chunk)
                    end_1d = Unsqueeze (end, token_axis)
                    some_tokens = Slice (tokens, start_1d, end_1d, token_axis)
                    some_experts = Slice (EXPERTS, start_1d, end_1d, token_axis)
                    some_weights = Slice (weight_row, start_1d, end_1d, token_axis)
                    PART
                    after = SequenceInsert (before, some_mixed)
                    go_on_out = Identity (go_on)
                }
            >
            joined = ConcatFromSequence <axis = 0> (parts)
        },
        else_branch = at_once () => (float[N, one, C] whole_mixed) {
            WHOLE
        }
    >
    output = Reshape (mixed, hidden_shape)
"""

_EXPERTS_OF = """
            {down}
            {p}dot = {contrib}.FusedMatMul <transB = 1> ({tokens}, {p}down_rows)
            {activation}
            {p}gate = Mul ({p}activated, {weights})
            {up}
            {p}mixed = MatMul ({p}gate, {p}up_rows)
"""


@dataclass(frozen=True)
class Table:
    """How a function reads an expert table `[E, C]`."""

    inputs: tuple[str, ...]
    """Parts, as suffixes of the names of the function's inputs."""
    bits: int = 0
    """Of quantized numbers; 0 where they are not quantized."""
    block: int = 0
    half: bool = False
    """Stored in float16."""

    def rows(self, name: str, ids: str, target: str) -> str:
        """Nodes that give the rows `ids` `[N, k]` in float32, `[N, k, C]`."""
        parts = [f"{name}_{part}" for part in self.inputs]
        if self.half:
            return f"{target}_half = Gather <axis = 0> ({parts[0]}, {ids})\n{target} = Cast <to = 1> ({target}_half)"
        if not self.bits:
            return f"{target} = Gather <axis = 0> ({parts[0]}, {ids})"
        inputs = ", ".join([parts[0], ids, *parts[1:]])
        attributes = f"bits = {self.bits}, block_size = {self.block}, gather_axis = 0, quantize_axis = 1"
        return f"{target} = {CONTRIB}.GatherBlockQuantized <{attributes}> ({inputs})"


@dataclass(frozen=True)
class Routing:
    """What the attributes of a doge::CDMoE and the shapes of its tables say."""

    mode: str
    """"reference" or "per-token"."""
    keys: int
    """n."""
    top: int
    """k."""
    pairs: tuple[tuple[int, int], ...]
    normalise: bool
    activation: str
    hidden: int


def routed_experts_function(routing: Routing, down: Table, up: Table, *, chunk: int) -> ir.Function:
    """doge::RoutedExperts.

    Inputs: hidden `[B, Q, C]`, router_logits `[B, Q, 2n]`, hidden_shape (that of `hidden`), many (whether N is above
    `chunk`), pair_of_scores and pair_of_keys `[2*reach, P]`, the parts of both tables, weights of the activation. The
    product of the sorted halves `[N, 2*reach]` with a pair matrix has the sum, or the expert id, of every pair.
    Output: `[B, Q, C]`.
    """
    body = _HALVES[routing.mode] + _ROUTE
    body += _NORMALISE if routing.normalise else "    weight = Identity (softmax)\n"
    body += _MIX
    parts = {
        "PART": _experts_of("some_", routing, down, up, "some_tokens", "some_experts", "some_weights"),
        "WHOLE": _experts_of("whole_", routing, down, up, "tokens", EXPERTS, "weight_row"),
        "KEYS": str(routing.keys),
        "REACH": str(max(i for i, _ in routing.pairs) + 1),
        "TOP": str(routing.top),
        "HIDDEN": str(routing.hidden),
        "CHUNK": str(chunk),
        "EXPERTS": EXPERTS,
    }
    for name, text in parts.items():
        body = body.replace(name, text)
    tables = [f"{name}_{part}" for name, table in (("down", down), ("up", up)) for part in table.inputs]
    inputs = ["hidden", "router_logits", "hidden_shape", "many", "pair_of_scores", "pair_of_keys", *tables]
    inputs += weight_inputs(routing.activation)
    return parse_function(ROUTED_EXPERTS, inputs, ["output"], [], body, {CONTRIB: CONTRIB_VERSION})


def _experts_of(prefix: str, routing: Routing, down: Table, up: Table, tokens: str, experts: str, weights: str) -> str:
    """The experts `[n, k]` of `tokens` `[n, 1, C]`, mixed: `[n, 1, C]`."""
    return _EXPERTS_OF.format(
        p=prefix,
        contrib=CONTRIB,
        down=down.rows("down", experts, f"{prefix}down_rows"),
        up=up.rows("up", experts, f"{prefix}up_rows"),
        tokens=tokens,
        weights=weights,
        activation=activation_body(routing.activation, f"{prefix}dot", f"{prefix}activated").strip(),
    )
