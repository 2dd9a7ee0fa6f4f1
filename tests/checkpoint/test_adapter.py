"""A LoRA adapter is merged to the bit as peft merges it, and refused by name where it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bundles import NoProgress
from peft import LoraConfig, PeftModel, get_peft_model
from random_doge import SMALL_MOE, save_random_doge
from safetensors.torch import load_file, save_file

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.checkpoint import open_checkpoint
from doge_deploy.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from doge_deploy.cli.main import run_command
from doge_deploy.errors import UnsupportedModelError, UsageError
from doge_deploy.options.export import ExportOptions
from doge_deploy.pipelines.export import export
from doge_deploy.verify.run import verify

UNTIED = {"tie_word_embeddings": False}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # config of the base beyond a small dense one, settings of the adapter
    "attention": ({}, {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8}),
    "one-layer-of-two": ({}, {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers-by-pattern": ({}, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    "regex": ({}, {"target_modules": r"model\.layers\.\d+\.(mlp\.up|self_attn\.dt)_proj", "r": 2}),
    "all-linear": ({}, {"target_modules": "all-linear", "r": 2, "lora_alpha": 3}),
    "all-linear-untied": (UNTIED, {"target_modules": "all-linear", "r": 2}),
    "excluded": ({}, {"target_modules": "all-linear", "exclude_modules": ["dt_proj", "model.layers.0.mlp.up_proj"]}),
    "rank-stabilised": ({}, {"target_modules": ATTENTION, "r": 3, "lora_alpha": 5, "use_rslora": True}),
    "rank-and-alpha-patterns": (
        {},
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 7, "up_proj": 1},
        },
    ),
    "fan-in-fan-out": ({}, {"target_modules": ATTENTION, "fan_in_fan_out": True}),
    "biases": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "biases-of-adapted-modules": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias-in-the-pair": ({"attention_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True}),
    "head-saved": (UNTIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding-saved-of-a-tied-base": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both-saved-of-a-tied-base": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding": (UNTIED, {"target_modules": ["embed_tokens", "v_proj"], "r": 3}),
    "head": (UNTIED, {"target_modules": ["lm_head"], "r": 3}),
    "experts": (SMALL_MOE, {"target_modules": ["router_gate", "down_embed", "up_embed", "gate_proj"], "r": 2}),
    "classifier": (
        {"architecture": "DogeForSequenceClassification", "num_labels": 3},
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "decoder-alone": ({"architecture": "DogeModel"}, {"target_modules": ["q_proj", "down_proj"]}),
    "gaussian-start": ({}, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


def base(path: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Path, str]:
    """A checkpoint of a case, and the class it was saved from."""
    config = dict(config)
    architecture = config.pop("architecture", "DogeForCausalLM")
    save_random_doge(path, **config)
    if architecture != "DogeForCausalLM" or dtype != torch.float32:
        torch.manual_seed(1)
        model = getattr(transformers, architecture).from_pretrained(path, dtype=dtype)
        shutil.rmtree(path)
        model.save_pretrained(path)
    return path, architecture


def train(path: Path, architecture: str, output: Path, dtype: torch.dtype | None = None, **settings: Any) -> Path:
    """An adapter with random numbers in every part, as peft saves it."""
    model = getattr(transformers, architecture).from_pretrained(path, dtype="auto")
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(output)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(output / ADAPTER_WEIGHTS).items()}
        save_file(tensors, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return output


def merged_by_peft(path: Path, architecture: str, adapter: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Every tensor after `merge_and_unload`, and whether embedding and head are still one."""
    model = getattr(transformers, architecture).from_pretrained(path, dtype="auto")
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.state_dict(), bool(merged.config.tie_word_embeddings)


def assert_merged_alike(path: Path, architecture: str, adapter: Path) -> None:
    expected, tied = merged_by_peft(path, architecture, adapter)
    checkpoint = open_checkpoint(str(path), adapter=str(adapter))
    assert checkpoint.facts.tie_word_embeddings == tied
    prefix = "model." if architecture == "DogeModel" else ""
    names = {prefix + name for name in expected if not (tied and name == "lm_head.weight")}
    assert checkpoint.tensors.keys() == names
    changed = 0
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        assert torch.equal(tensor, expected[name.removeprefix(prefix)]), name
        assert tensor.dtype == expected[name.removeprefix(prefix)].dtype
        unmerged = open_checkpoint(str(path))
        changed += name not in unmerged.tensors or not torch.equal(tensor, unmerged.read(name))
    assert changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "settings"), CASES.values(), ids=CASES.keys())
def test_merged_to_the_bit_as_peft_merges(tmp_path: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    path, architecture = base(tmp_path / "base", config)
    assert_merged_alike(path, architecture, train(path, architecture, tmp_path / "adapter", **settings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_rounded_as_peft_rounds(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    path, architecture = base(tmp_path / "base", UNTIED, dtype)
    settings = {"target_modules": ["embed_tokens", *ATTENTION], "modules_to_save": ["lm_head"]}
    assert_merged_alike(path, architecture, train(path, architecture, tmp_path / "adapter", stored, **settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter; not to be written into."""
    folder = tmp_path_factory.mktemp("lora")
    path, architecture = base(folder / "base", {})
    return path, train(path, architecture, folder / "adapter", target_modules=ATTENTION, r=4)


def config_of(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / ADAPTER_CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def tensors_of(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / ADAPTER_WEIGHTS)
        edit(tensors)
        save_file(tensors, path / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    return change


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another-kind": (config_of(peft_type="IA3"), "peft_type='IA3': must be 'LORA'"),
    "prompt": (config_of(peft_type="PROMPT_TUNING"), "peft_type='PROMPT_TUNING'"),
    "dora": (config_of(use_dora=True), "DoRA is not merged here"),
    "pissa": (config_of(init_lora_weights="pissa_niter_16"), "the base was changed before training"),
    "olora": (config_of(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "parameters": (config_of(target_parameters=["self_attn.A"]), "target_parameters=['self_attn.A']: not merged here"),
    "tokens": (config_of(trainable_token_indices=[1, 2]), "trainable_token_indices=[1, 2]: not merged here"),
    "replicated-layers": (config_of(layer_replication=[[0, 2], [1, 2]]), "layer_replication="),
    "of-the-future": (config_of(use_hyper=True), "use_hyper=True: not merged here"),
    "no-targets": (config_of(target_modules=None), "target_modules is missing"),
    "rank-of-text": (config_of(r="4"), "r='4': must be a whole number"),
    "other-rank": (config_of(r=5), "q_proj: A [4, 32] and B [32, 4], must be [5, 32] and [32, 5]"),
    "broken-pattern": (config_of(rank_pattern={"(": 2}), "'(' is no regular expression"),
    "target-without-pair": (config_of(target_modules=[*ATTENTION, "up_proj"]), "mlp.up_proj is a target, but no pair"),
    "pair-without-target": (config_of(target_modules=["q_proj"]), "k_proj has a pair, but is no target"),
    "half-a-pair": (
        tensors_of(lambda t: t.pop(f"{PREFIX}.lora_A.weight")),
        "q_proj has .lora_B.weight: must",
    ),
    "a-stranger": (
        tensors_of(lambda t: t.update({"value_head.weight": torch.ones(2)})),
        "value_head.weight is no",
    ),
    "other-shape": (
        tensors_of(lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(5)})),
        "model.norm.weight is [5], the base's is [32]",
    ),
    "other-dtype": (
        tensors_of(lambda t: t.update({f"{PREFIX}.lora_A.weight": t[f"{PREFIX}.lora_A.weight"].double()})),
        "lora_A.weight is F64",
    ),
    "a-pickle": (lambda path: (path / ADAPTER_WEIGHTS).rename(path / "adapter_model.bin"), "a pickle, which is never"),
    "no-weights": (lambda path: (path / ADAPTER_WEIGHTS).unlink(), f"no {ADAPTER_WEIGHTS}"),
    "truncated": (
        lambda path: (path / ADAPTER_WEIGHTS).write_bytes((path / ADAPTER_WEIGHTS).read_bytes()[:-4]),
        "truncated",
    ),
}


@pytest.mark.parametrize(("damage", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(
    trained: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    adapter = Path(shutil.copytree(trained[1], tmp_path / "adapter"))
    damage(adapter)
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint(str(trained[0]), adapter=str(adapter))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_pair_on_a_tied_embedding_is_refused(tmp_path: Path, module: str) -> None:
    path, architecture = base(tmp_path / "base", {})
    adapter = train(path, architecture, tmp_path / "adapter", target_modules=[module])
    with pytest.raises(UnsupportedModelError, match=r"embedding is its head too|is stored, but is no module to save"):
        open_checkpoint(str(path), adapter=str(adapter))


def test_a_folder_with_an_adapter_alone_names_the_base(trained: tuple[Path, Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"and no model: give its base, .*base, as MODEL"):
        open_checkpoint(str(trained[1]))


def test_not_an_adapter(trained: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        open_checkpoint(str(trained[0]), adapter=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"has no adapter_config\.json"):
        open_checkpoint(str(trained[0]), adapter=str(trained[0]))


def test_an_adapter_beside_the_weights_is_named_and_not_merged(trained: tuple[Path, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(trained[0], tmp_path / "both"))
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(trained[1] / name, path / name)
    export(str(path), tmp_path / "b", ExportOptions(), force=False, progress=NoProgress())
    (warning,) = open_bundle(tmp_path / "b").manifest.warnings
    assert "which is not merged" in warning
    # transformers with peft would load the adapter too: the reference must not
    assert verify(tmp_path / "b", reference=str(path), greedy_steps=2).passed


def test_an_export_is_verified_with_the_merged_model(
    trained: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, adapter = (str(each) for each in trained)
    bundle = tmp_path / "b"
    assert run_command(["export", path, "-o", str(bundle), "--adapter", adapter]) == 0
    entry = open_bundle(bundle).manifest.checkpoint
    merged = open_checkpoint(path, adapter=adapter)
    assert merged.adapter is not None
    assert entry["adapter"] == {"sha256": merged.adapter.sha256, "source": None}
    assert entry["sha256"] == open_checkpoint(path).sha256 == merged.sha256
    command = ["verify", str(bundle), "--reference", path, "--greedy-steps", "2"]
    assert run_command([*command, "--adapter", adapter]) == 0
    capfd.readouterr()
    assert run_command(command) == 2
    assert "name it with --adapter" in capfd.readouterr().err
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config_of(lora_alpha=9)(other)
    assert run_command([*command, "--adapter", str(other)]) == 3
    assert "is not the adapter of" in capfd.readouterr().err


def test_a_bundle_without_an_adapter_takes_none(
    trained: tuple[Path, Path], tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["verify", str(tiny_bundle), "--adapter", str(trained[1])]) == 2
    assert "no adapter was merged into" in capfd.readouterr().err


def test_a_merge_that_is_wrong_is_found(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """verify compares with the merged tensors: a bundle of the base alone, called merged, fails."""
    path, adapter = trained
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    export(str(path), plain, ExportOptions(), force=False, progress=NoProgress())
    export(str(path), merged, ExportOptions(), force=False, progress=NoProgress(), adapter=str(adapter))
    shutil.copy(plain / "weights.safetensors", merged / "weights.safetensors")
    manifest = json.loads((merged / "manifest.json").read_text())
    manifest["files"]["weights.safetensors"] = json.loads((plain / "manifest.json").read_text())["files"][
        "weights.safetensors"
    ]
    (merged / "manifest.json").write_text(json.dumps(manifest))
    report = verify(merged, reference=str(path), adapter=str(adapter), greedy_steps=2)
    assert "weights" in report.failed_cases and len(report.failed_cases) > 1


def test_peft_is_the_version_that_was_read() -> None:
    assert peft.__version__.startswith("0.21.")
