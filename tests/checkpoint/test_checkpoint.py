"""Finding, opening and reading sound checkpoints; the proof that a score cannot overflow."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from broken_checkpoints import EMBEDDING, HEAD, Tensors, code_and_unknown_key, shard, tensors
from huggingface_hub import errors as hub_errors
from random_doge import SMALL_MOE, random_doge, save_random_doge
from safetensors.torch import load_file

from doge_deploy.checkpoint import (
    BUNDLED_MODELS,
    check_finite,
    check_score_range,
    expected_tensors,
    find_checkpoint,
    open_checkpoint,
)
from doge_deploy.config.model import DogeFacts
from doge_deploy.errors import MissingDependencyError, UnsupportedModelError, UsageError

VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 32},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "moe": SMALL_MOE,
    "moe-biases": {**SMALL_MOE, "mlp_bias": True},
}


@pytest.fixture
def copy(dense_doge: Path, tmp_path: Path) -> Path:
    """A dense checkpoint that a test may change."""
    return Path(shutil.copytree(dense_doge, tmp_path / "copy"))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_expected_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    model = random_doge(**config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes[HEAD]
    facts = DogeFacts.from_config(model.config.to_dict())
    assert expected_tensors(facts) == shapes


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_open_and_read(config: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_random_doge(tmp_path, **config)))
    weights = load_file(tmp_path / "model.safetensors")
    assert checkpoint.tensors.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(checkpoint.read(name), value)
    check_finite(checkpoint)


@pytest.mark.parametrize("model", BUNDLED_MODELS)
def test_bundled_models(model: str) -> None:
    checkpoint = open_checkpoint(model)
    assert checkpoint.source == model
    assert "tokenizer.json" in [path.name for path in checkpoint.companion_files]
    check_finite(checkpoint, dtype="float16")


def test_headers_point_at_the_data(dense_doge: Path) -> None:
    checkpoint = open_checkpoint(str(dense_doge))
    info = checkpoint.tensors["model.norm.weight"]
    data = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    assert (info.dtype, info.shape, info.nbytes) == ("float32", (32,), 128)
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), checkpoint.read(info.name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stored_in_low_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    random_doge().to(dtype).save_pretrained(tmp_path)
    assert open_checkpoint(str(tmp_path)).read(EMBEDDING).dtype == dtype


def test_identity_is_that_of_the_weights(copy: Path) -> None:
    sha256 = open_checkpoint(str(copy)).sha256
    shard(copy)
    sharded = open_checkpoint(str(copy))
    assert sharded.sha256 == sha256
    assert {info.file.name for info in sharded.tensors.values()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert torch.equal(sharded.read(EMBEDDING), load_file(sharded.tensors[EMBEDDING].file)[EMBEDDING])


def test_identity_does_not_change_with_a_tied_head_stored(copy: Path) -> None:
    sha256 = open_checkpoint(str(copy)).sha256
    tensors(lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))(copy)
    checkpoint = open_checkpoint(str(copy))
    assert HEAD not in checkpoint.tensors
    assert checkpoint.sha256 == sha256


def test_identity_changes_with_one_bit(copy: Path) -> None:
    sha256 = open_checkpoint(str(copy)).sha256

    def flip(weights: Tensors) -> None:
        weights["model.norm.weight"].view(torch.int32)[3] ^= 1

    tensors(flip)(copy)
    assert open_checkpoint(str(copy)).sha256 != sha256


def test_identity_is_what_manifests_hold(dense_doge: Path) -> None:
    """Spelled out once more, because the same weights must hash to the same value in every release."""
    digest = hashlib.sha256()
    for name, value in sorted(load_file(dense_doge / "model.safetensors").items()):
        digest.update(f"{name}\0float32\0{','.join(str(size) for size in value.shape)}\0".encode())
        digest.update(value.numpy().tobytes())
    assert open_checkpoint(str(dense_doge)).sha256 == digest.hexdigest()


def test_fewer_layers(dense_doge: Path) -> None:
    checkpoint = open_checkpoint(str(dense_doge), num_layers=1)
    assert checkpoint.facts.num_hidden_layers == checkpoint.config["num_hidden_layers"] == 1
    assert not [name for name in checkpoint.tensors if name.startswith("model.layers.1.")]
    assert checkpoint.tensors.keys() == expected_tensors(checkpoint.facts).keys()


@pytest.mark.parametrize("num_layers", [0, -1, 3])
def test_number_of_layers_outside(num_layers: int, dense_doge: Path) -> None:
    with pytest.raises(UsageError, match=f"num_layers={num_layers}: must be 1 to 2"):
        open_checkpoint(str(dense_doge), num_layers=num_layers)


def test_generation_config_is_read(copy: Path) -> None:
    generation_config = open_checkpoint(str(copy)).generation_config
    assert generation_config is not None
    assert generation_config["eos_token_id"] == 1
    (copy / "generation_config.json").unlink()
    assert open_checkpoint(str(copy)).generation_config is None


def test_code_beside_the_weights_is_left_alone(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = (copy / "config.json").read_text()
    code_and_unknown_key(copy)
    (copy / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "modeling_doge.C"},', 1))
    monkeypatch.chdir(copy)
    check_finite(open_checkpoint(str(copy)))
    assert not (copy / "loaded").exists()


def test_opening_imports_neither_torch_nor_transformers(dense_doge: Path) -> None:
    code = (
        "import sys\n"
        "from doge_deploy.checkpoint import open_checkpoint\n"
        f"open_checkpoint({str(dense_doge)!r}).sha256\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'safetensors'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# where a MODEL is


def test_a_bundled_name_wins_over_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle that a user exported as `doge-tiny` must not be taken for the model in the next export."""
    (tmp_path / "doge-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (find_checkpoint("doge-tiny") / "model.safetensors").exists()
    assert find_checkpoint("./doge-tiny") == Path("doge-tiny")


@pytest.mark.parametrize(
    "model",
    ["no-such-model", "/no/such/model", "a/b/c", "-x/y", "x" * 5000, "~nobody-here/m/n"],
    ids=lambda m: m[:16],
)
def test_no_such_model(model: str) -> None:
    with pytest.raises(UsageError, match=r"no such directory; MODEL must be .* doge-tiny, doge-tiny-moe, or a Hub id"):
        find_checkpoint(model)


def test_an_empty_model() -> None:
    with pytest.raises(UsageError, match="MODEL is empty"):
        find_checkpoint("")


def test_a_file_is_not_a_model(dense_doge: Path) -> None:
    with pytest.raises(UsageError, match="is a file; MODEL must be the directory"):
        find_checkpoint(str(dense_doge / "model.safetensors"))


def test_a_hub_id_is_downloaded_without_code_and_pickles(dense_doge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(repository: str, **arguments: Any) -> str:
        calls.append((repository, arguments))
        return str(dense_doge)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("owner/some-doge")
    assert (checkpoint.path, checkpoint.source) == (dense_doge, "owner/some-doge")
    ((repository, arguments),) = calls
    assert repository == "owner/some-doge"
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            "model.safetensors",
            "config.json",
            "modeling_doge.py",
            "pytorch_model.bin",
            "onnx/config.json",
            "README.md",
        ],
        **arguments,
    )
    assert list(kept) == ["model.safetensors", "config.json"]


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the Hub client without the response that its constructor asks for."""
    return type(kind.__name__, (kind,), {"__init__": lambda self: Exception.__init__(self, "told\nby the Hub")})()


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (
            hub_error(hub_errors.RepositoryNotFoundError),
            UsageError,
            "neither a directory nor a repository on the Hub",
        ),
        (hub_error(hub_errors.GatedRepoError), UnsupportedModelError, "needs access that you lack"),
        (hub_error(hub_errors.LocalEntryNotFoundError), MissingDependencyError, "the Hub did not answer"),
        (
            ConnectionError("no\nnetwork"),
            MissingDependencyError,
            "the Hub did not answer (ConnectionError: no network)",
        ),
    ],
    ids=["absent", "gated", "offline", "no-network"],
)
def test_hub_failures(error: Exception, expected: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(expected) as caught:
        find_checkpoint("owner/some-doge")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_client_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="huggingface_hub"):
        find_checkpoint("owner/some-doge")


# values


def test_progress_counts_all_bytes(moe_doge: Path) -> None:
    checkpoint, done = open_checkpoint(str(moe_doge)), []
    check_finite(checkpoint, done.append)
    assert sum(done) == sum(info.nbytes for info in checkpoint.tensors.values())


def test_values_beyond_the_dtype_of_the_export(copy: Path) -> None:
    tensors(lambda weights: weights["model.norm.weight"].fill_(1e5))(copy)
    checkpoint = open_checkpoint(str(copy))
    check_finite(checkpoint)
    check_finite(checkpoint, dtype="bfloat16")
    with pytest.raises(
        UnsupportedModelError, match=r"model\.norm\.weight has values up to 100000, beyond float16's 65504"
    ):
        check_finite(checkpoint, dtype="float16")


def set_heads(path: Path, layer: int, *, decay: list[float], scale: float = 1.0) -> None:
    """Give the heads of a layer an A, and make its dt_proj larger."""

    def edit(weights: Tensors) -> None:
        weights[f"model.layers.{layer}.self_attn.A"] = torch.tensor(decay)
        weights[f"model.layers.{layer}.self_attn.dt_proj.weight"] *= scale

    tensors(edit)(path)


def test_small_scores_pass(dense_doge: Path) -> None:
    assert check_score_range(open_checkpoint(str(dense_doge)), "float16") == []


def test_possible_overflow_is_a_warning_per_head(copy: Path) -> None:
    set_heads(copy, 1, decay=[-1e6, 3.0], scale=1000.0)
    (warning,) = check_score_range(open_checkpoint(str(copy)), "float16")
    assert warning.startswith("layer 1 head 1: A=3: the score may overflow float16")
    assert "exp(11.09)" in warning


def test_wider_dtypes_hold_more(copy: Path) -> None:
    set_heads(copy, 0, decay=[40.0, 0.0])
    checkpoint = open_checkpoint(str(copy))
    for dtype in ("float32", "bfloat16"):
        assert check_score_range(checkpoint, dtype) == []
    with pytest.raises(
        UnsupportedModelError, match=r"overflows float16, which holds exp\(11.09\), for every input: layer 0"
    ):
        check_score_range(checkpoint, "float16")


def test_certain_overflow_is_refused(copy: Path) -> None:
    set_heads(copy, 1, decay=[1.0, 1000.0], scale=0.0)  # softplus(0) = ln 2 whatever the input
    with pytest.raises(UnsupportedModelError, match=r"layer 1 head 1: A=1000, exponent at least 693\.1"):
        check_score_range(open_checkpoint(str(copy)), "float32")


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_the_bound_holds_and_is_reached(bias: bool, tmp_path: Path) -> None:
    """An input along a row of W_dt W_v diag(g) gives the greatest dt of its head; no other exceeds it."""
    from doge_deploy.checkpoint.score_range import _exponents

    model = random_doge(attention_bias=bias).double()
    layer = model.model.layers[0]
    with torch.no_grad():
        for projection in (layer.self_attn.v_proj, layer.self_attn.dt_proj):
            projection.weight.normal_()
            if bias:
                projection.bias.normal_()
        layer.self_attn.A.fill_(1.5)
        model.float().save_pretrained(tmp_path)
        model.double()
        _, lower, upper = _exponents(open_checkpoint(str(tmp_path)), 0)
        rows = layer.self_attn.dt_proj.weight @ layer.self_attn.v_proj.weight * layer.input_layernorm.weight
        inputs = torch.cat((rows, -rows, torch.randn(500, 32).double()))
        x_hat = inputs / inputs.pow(2).mean(-1, keepdim=True).sqrt()
        dt = layer.self_attn.dt_proj(layer.self_attn.v_proj(x_hat * layer.input_layernorm.weight))
        exponents = 1.5 * torch.nn.functional.softplus(dt)
    slack = 1e-9
    assert bool((exponents <= upper + slack).all())
    assert bool((exponents >= lower - slack).all())
    for head in range(2):
        assert math.isclose(exponents[head, head], upper[head], rel_tol=1e-6)
        assert math.isclose(exponents[2 + head, head], lower[head], rel_tol=1e-6, abs_tol=1e-9)


def test_a_file_that_shrinks_is_said_to_be_truncated(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_random_doge(tmp_path)))
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    with last.file.open("r+b") as file:
        file.truncate(last.offset + 4)
    with pytest.raises(UnsupportedModelError, match=f"truncated: {last.name} lacks its last {last.nbytes - 4} bytes"):
        checkpoint.read(last.name)
    last.file.unlink()
    with pytest.raises(UnsupportedModelError, match=f"{last.name} cannot be read: No such file"):
        checkpoint.read(last.name)
