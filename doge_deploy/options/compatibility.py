"""Which options of an export go together, and with which checkpoints."""

from __future__ import annotations

from doge_deploy.config.model import TASKS, DogeFacts
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.options.export import ExportOptions

MAX_POSITIONS = 2**24
"""float32 holds every whole number up to here; angles are computed from positions in float32."""


def resolve_max_length(facts: DogeFacts, asked: int | None) -> int:
    """The number of positions of a bundle: what was asked for, or all that the checkpoint has and whose angles do not
    depend on how a text is cut into calls.
    """
    if asked is not None:
        return asked
    limit = facts.stateless_length
    return facts.max_position_embeddings if limit is None else min(limit, facts.max_position_embeddings)


def check_quantize(options: ExportOptions) -> None:
    """Raises UsageError where weights are to be quantized for a task that this is not offered for."""
    if options.quantize is not None and options.task != "causal-lm":
        raise UsageError(
            f"quantize={options.quantize} with task={options.task}: what rounding costs is judged by the "
            "predictions of a language model; quantize with task=causal-lm only"
        )


def check_facts(facts: DogeFacts, options: ExportOptions, source: str) -> None:
    """Everything about a checkpoint and options that can be known before its weights are read.

    Args:
        facts: of the checkpoint.
        options: what the user chose.
        source: the checkpoint's name, for messages.

    Raises:
        UsageError: the checkpoint has no weights for the task, or an option has no meaning in it.
        UnsupportedModelError: the checkpoint cannot be exported exactly with these options.
    """
    check_task(facts, options, source)
    check_activation(facts, options.dtype)
    check_positions(resolve_max_length(facts, options.max_length))


def check_task(facts: DogeFacts, options: ExportOptions, source: str) -> None:
    """Raises UsageError where the checkpoint has no weights for the task, or an option has no meaning in it."""
    possible = TASKS[facts.architecture]
    if options.task not in possible:
        raise UsageError(
            f"task={options.task}: {source} is a {facts.architecture}; give --task {' or --task '.join(possible)}"
        )
    for name in ("kv_cache", "logits"):
        if options.task != "causal-lm" and name in options.model_fields_set:
            raise UsageError(f"{name}={getattr(options, name)!r}: has no meaning for task={options.task}; leave it out")


def check_activation(facts: DogeFacts, dtype: str) -> None:
    """Raises UnsupportedModelError where transformers itself cannot compute the activation in this dtype.

    Reference: `XIELUActivation` in transformers' activations.py, whose parameters are bfloat16 in a model of any dtype.
    """
    if facts.hidden_act == "xielu" and dtype == "fp16":
        raise UnsupportedModelError(
            "hidden_act='xielu' with dtype=fp16: transformers keeps its weights in bfloat16, so that float16 becomes "
            "float32 there, and fails in the product that follows; dtype must be one of fp32, bf16"
        )


def check_positions(max_length: int) -> None:
    """Raises UnsupportedModelError where a bundle of so many positions would have wrong angles."""
    if max_length > MAX_POSITIONS:
        raise UnsupportedModelError(
            f"max_length={max_length}: positions beyond {MAX_POSITIONS} are no float32 numbers; give --max-length "
            f"{MAX_POSITIONS} or less"
        )
