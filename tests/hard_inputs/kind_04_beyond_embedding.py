"""Tokenizers that know tokens which the model has no embedding for."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hard_inputs.frame import Case, Outcome, command, demo_copy, refused, right, wrong

KIND = "4 ids beyond the embedding"


@functools.cache
def bundle_with(count: int) -> tuple[Path, str]:
    """An exported doge-tiny whose tokenizer knows `count` tokens more than the model; what export said.

    An export takes seconds, and is the same for every prompt.
    """

    def add(document: Any) -> None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        document["added_tokens"] += [{"id": 1024 + i, "content": f"<tool{i}>", **flags} for i in range(count)]

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ended = command("export", demo_copy(folder, tokenizer=add), "-o", folder / "bundle")
    assert ended.code == 0, ended.errors
    return folder / "bundle", ended.errors


def warned(count: int, names: Sequence[str], folder: Path) -> Outcome:
    """Export warns, and the warning is kept in the manifest."""
    from doge_deploy.bundle.opening import open_bundle

    bundle, said = bundle_with(count)
    kept = " ".join(open_bundle(bundle).manifest.warnings)
    missing = [name for name in (*names, "1024") if name not in kept or name not in said]
    if not names:
        return wrong(kept) if "beyond" in kept else right()
    return wrong(f"{missing} not in {kept!r} and {said!r}") if missing else right(kept)


def prompted(arguments: Sequence[str], stdin: bytes, taken: bool, folder: Path) -> Outcome:
    bundle, _ = bundle_with(2)
    ended = command("generate", bundle, *arguments, "--greedy", "--max-new-tokens", 2, stdin=stdin)
    if taken:
        return right() if ended.code == 0 else wrong(ended.errors)
    return ended.refusal(2, "'<tool1>'", "1025", "vocab_size is 1024")


def from_python(folder: Path) -> Outcome:
    import doge_deploy

    bundle, _ = bundle_with(2)
    with doge_deploy.load(bundle) as model:
        try:
            model.generate([{"role": "user", "content": "<tool0>"}])
        except doge_deploy.UsageError as error:
            return refused(str(error)) if "<tool0>" in str(error) else wrong(str(error))
    return wrong("taken")


def cases() -> list[Case]:
    prompts: dict[str, tuple[Sequence[str], bytes, bool]] = {
        "in a prompt": (["--prompt", "use <tool1> now"], b"", False),
        "in a prompt from a pipe": (["--prompt", "-"], b"<tool1>", False),
        "in a message": (["--chat", "--prompt", "<tool1>"], b"", False),
        "in a system message": (["--chat", "--system", "<tool1>", "--prompt", "hi"], b"", False),
        "in the second turn": (["--chat"], b"hi\n<tool1>\n", False),
        "not in the prompt": (["--prompt", "use < tool1 >"], b"", True),
    }
    return [
        Case("none", functools.partial(warned, 0, ())),
        Case("one", functools.partial(warned, 1, ("'<tool0>' (1024)",))),
        Case("many", functools.partial(warned, 12, ("'<tool4>' (1028)", "7 more"))),
        *(Case(name, functools.partial(prompted, *prompt)) for name, prompt in prompts.items()),
        Case("from Python", from_python),
    ]
