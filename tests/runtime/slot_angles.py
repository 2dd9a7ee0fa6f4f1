"""What a step of slots costs where their RoPE changes with length:  python tests/runtime/slot_angles.py

A model of the 20M size whose RoPE was made for 256 tokens, in slots of 512, one thread. Prints the time of a step of 1
to 8 slots with texts below that length, and with texts beyond it that all differ in length; the rounds are interleaved.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_doge import DYNAMIC, save_random_doge

from doge_deploy.api import export
from doge_deploy.runtime.slots import SlotRunner, open_slots

SIZE = {
    "vocab_size": 32768,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "keep_window_size": 2048,
    "rope_parameters": DYNAMIC,
}
ROUNDS, STEPS = 15, 3


def filled(runner: SlotRunner, lengths: list[int]) -> list[int]:
    slots = [runner.acquire() for _ in lengths]
    for slot, length in zip(slots, lengths, strict=True):
        runner.prefill(slot, np.arange(length))
    return slots


def step_ms(runner: SlotRunner, lengths: list[int]) -> float:
    slots = filled(runner, lengths)
    runner.decode(slots, [5] * len(slots)).numpy()
    start = perf_counter()
    for _ in range(STEPS):
        runner.decode(slots, [5] * len(slots)).numpy()
    spent = (perf_counter() - start) / STEPS * 1000
    for slot in slots:
        runner.release(slot)
    return spent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_random_doge(Path(folder, "checkpoint"), **SIZE)
        exported = export(checkpoint, Path(folder, "bundle"), max_length=512, kv_cache=["static"])
        runner = open_slots(exported, 8, threads=1)
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(ROUNDS):
            for count in (1, 2, 4, 8):
                for name, first in (("below", 200), ("beyond", 300)):
                    spent = step_ms(runner, [first + 2 * index for index in range(count)])
                    times.setdefault((name, count), []).append(spent)
        for count in (1, 2, 4, 8):
            below, beyond = (statistics.median(times[name, count]) for name in ("below", "beyond"))
            ratios = np.array(times["beyond", count]) / np.array(times["below", count])
            low, high = np.quantile(ratios, [0.1, 0.9])
            print(
                f"{count} slots: {below:.2f} ms below, {beyond:.2f} ms beyond, "
                f"{np.median(ratios):.2f} times ({low:.2f} to {high:.2f})"
            )


if __name__ == "__main__":
    main()
