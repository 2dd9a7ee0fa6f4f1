"""What a container leaves of a machine: CPU quotas and memory limits of both versions of control groups."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from doge_deploy.bundle.opening import open_bundle
from doge_deploy.devices import host
from doge_deploy.devices.host import available_cpus, available_memory, cpu_quota, usable_threads
from doge_deploy.errors import MissingDependencyError
from doge_deploy.runtime.memory import check_memory, check_slots, least_bytes

MB = 1 << 20


def pretend(root: Path, files: dict[str, str]) -> Path:
    """A root folder with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"

QUOTAS: dict[str, tuple[dict[str, str], float | None]] = {
    "no-control-groups": ({}, None),
    "v2-no-limit": ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "max 100000"}, None),
    "v2-container": ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "150000 100000"}, 1.5),
    "v2-host": ({"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/cpu.max": "50000 100000"}, 0.5),
    "v2-parent-is-tighter": (
        {"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "200000 100000"},
        2.0,
    ),
    "v2-path-of-the-host": ({"proc/self/cgroup": "0::/../../pod", f"{V2}/cpu.max": "300000 100000"}, 3.0),
    "v1-container": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123\n0::/",
            f"{V1}/cpu.cfs_quota_us": "250000",
            f"{V1}/cpu.cfs_period_us": "100000",
        },
        2.5,
    ),
    "v1-no-limit": (
        {"proc/self/cgroup": "4:cpu,cpuacct:/", f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"},
        None,
    ),
    "v1-own-group": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/job",
            f"{V1}/job/cpu.cfs_quota_us": "100000",
            f"{V1}/job/cpu.cfs_period_us": "50000",
            f"{V1}/cpu.cfs_quota_us": "-1",
            f"{V1}/cpu.cfs_period_us": "50000",
        },
        2.0,
    ),
    "nonsense": ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "many 0"}, None),
    "no-period": ({"proc/self/cgroup": "0::/", f"{V2}/cpu.max": "100 0"}, None),
}


@pytest.mark.parametrize(("files", "quota"), QUOTAS.values(), ids=QUOTAS.keys())
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(pretend(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "cpus"), [("max", 8), ("50000", 1), ("100000", 1), ("150000", 2), ("9900000", 8)])
def test_a_quota_counts_as_so_many_cpus(tmp_path: Path, quota: str, cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_affine_cpus", lambda: set(range(8)))
    root = pretend(tmp_path, {"proc/self/cgroup": "0::/", f"{V2}/cpu.max": f"{quota} 100000"})
    assert available_cpus(root) == cpus
    assert usable_threads(None, root) == cpus
    assert [usable_threads(asked, root) for asked in (1, 512)] == [1, cpus]


def test_a_thread_for_each_core_and_not_for_each_of_its_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)
    }
    root = pretend(tmp_path, topology)
    for allowed, threads in ((range(8), 4), ((0, 4, 1), 2), ((3,), 1)):
        monkeypatch.setattr(host, "_affine_cpus", lambda allowed=allowed: set(allowed))
        assert usable_threads(None, root) == threads
        assert usable_threads(8, root) == len(allowed), "who asks gets one a CPU"


MEMORY: dict[str, tuple[dict[str, str], int | None]] = {
    "nothing": ({}, None),
    "machine": ({"proc/meminfo": "MemAvailable:  2048 kB"}, 2 * MB),
    "v2-container": (
        {
            "proc/meminfo": "MemAvailable:  1048576 kB",
            "proc/self/cgroup": "0::/",
            f"{V2}/memory.max": str(100 * MB),
            f"{V2}/memory.current": str(70 * MB),
            f"{V2}/memory.stat": f"anon 1\ninactive_file {20 * MB}",
        },
        50 * MB,
    ),
    "v2-no-limit": (
        {
            "proc/meminfo": "MemAvailable:  2048 kB",
            "proc/self/cgroup": "0::/",
            f"{V2}/memory.max": "max",
            f"{V2}/memory.current": "1",
        },
        2 * MB,
    ),
    "v2-over-its-limit": (
        {"proc/self/cgroup": "0::/", f"{V2}/memory.max": "10", f"{V2}/memory.current": "11"},
        0,
    ),
    "v1-container": (
        {
            "proc/meminfo": "MemAvailable:  1048576 kB",
            "proc/self/cgroup": "9:memory:/docker/0123",
            f"{V2}/memory/memory.limit_in_bytes": str(64 * MB),
            f"{V2}/memory/memory.usage_in_bytes": str(60 * MB),
            f"{V2}/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {8 * MB}",
        },
        12 * MB,
    ),
    "v1-no-limit": (
        {
            "proc/meminfo": "MemAvailable:  2048 kB",
            "proc/self/cgroup": "9:memory:/",
            f"{V2}/memory/memory.limit_in_bytes": str(2**63 - 4096),
            f"{V2}/memory/memory.usage_in_bytes": "5",
        },
        2 * MB,
    ),
}


@pytest.mark.parametrize(("files", "left"), MEMORY.values(), ids=MEMORY.keys())
def test_available_memory(tmp_path: Path, files: dict[str, str], left: int | None) -> None:
    assert available_memory(pretend(tmp_path, files)) == left


def test_this_machine_has_an_answer() -> None:
    assert available_cpus() >= 1
    assert os.name != "posix" or not Path("/proc/meminfo").exists() or (available_memory() or 0) > 0


def test_a_bundle_that_does_not_fit_is_said_before_it_is_loaded(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    layout = bundle.layout("static")
    least = least_bytes(bundle, layout)
    cache = least - (tiny_bundle / "weights.safetensors").stat().st_size
    facts = bundle.manifest.facts
    slot = facts.num_key_value_heads * (2 * facts.head_dim + 1) * 4
    assert cache == facts.num_hidden_layers * bundle.manifest.max_length * slot
    root = pretend(tmp_path, {"proc/meminfo": f"MemAvailable:  {least // 1024 - 1} kB"})
    with pytest.raises(MissingDependencyError, match=r"at least 3\.\d MB of memory, .* 3\.\d MB left"):
        check_memory(bundle, layout, root)
    check_memory(bundle, layout, pretend(tmp_path, {"proc/meminfo": f"MemAvailable:  {least // 1024 + 1} kB"}))


def test_a_server_takes_the_memory_of_all_slots_of_all_its_bundles(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    layout = bundle.layout("static")
    one, eight = least_bytes(bundle, layout), least_bytes(bundle, layout, 8)
    assert eight - one == 7 * (one - (tiny_bundle / "weights.safetensors").stat().st_size)
    for count in (1, 2):
        enough = pretend(tmp_path, {"proc/meminfo": f"MemAvailable:  {count * eight // 1024 + 1} kB"})
        check_slots([bundle] * count, 8, enough)
        less = pretend(tmp_path, {"proc/meminfo": f"MemAvailable:  {count * eight // 1024 - 1} kB"})
        numbers = rf"--slots 8 takes at least .* \({count * one / 1e6:.1f} MB with --slots 1\), .* left: "
        with pytest.raises(MissingDependencyError, match=f"{numbers}give fewer slots, free some"):
            check_slots([bundle] * count, 8, less)
        none = pretend(tmp_path, {"proc/meminfo": f"MemAvailable:  {count * one // 1024 - 1} kB"})
        with pytest.raises(MissingDependencyError, match=f"{numbers}free some"):
            check_slots([bundle] * count, 8, none)


def test_serve_says_it_before_anything_is_loaded(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from doge_deploy.cli.main import run_command
    from doge_deploy.runtime import memory
    from doge_deploy.serve import start

    bundle = open_bundle(tiny_bundle)
    left = least_bytes(bundle, bundle.layout("static"), 3)
    monkeypatch.setattr(memory, "available_memory", lambda root: left)
    monkeypatch.setattr(start, "open_slots", lambda *_, **__: pytest.fail("a bundle was opened"))
    assert run_command(["serve", str(tiny_bundle), "--slots", "4"]) == 4
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "--slots 4 takes at least" in error and f"{left / 1e6:.1f} MB left" in error


def test_generate_says_it_with_exit_code_4(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from doge_deploy.cli.main import run_command
    from doge_deploy.runtime import memory

    monkeypatch.setattr(memory, "available_memory", lambda root: 1_000_000)
    assert run_command(["generate", str(tiny_bundle), "--prompt", "x"]) == 4
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "has 1.0 MB left" in error


@pytest.mark.parametrize(
    ("options", "allowed", "duration"),
    [((), None, "50"), (("--spin", "0"), "0", None), (("--spin", "700"), None, "700")],
    ids=["default", "asleep-at-once", "longer"],
)
def test_threads_spin_for_a_bounded_time(
    tiny_bundle: Path,
    options: tuple[str, ...],
    allowed: str | None,
    duration: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    from doge_deploy.cli.main import run_command

    given: list[dict[str, str]] = []
    session = onnxruntime.InferenceSession

    def watched(model: Any, options: Any, **more: Any) -> Any:
        entries = {}
        for name in ("allow_spinning", "spin_duration_us"):
            with contextlib.suppress(Exception):  # ONNX Runtime's way to say that an entry is not there
                entries[name] = options.get_session_config_entry(f"session.intra_op.{name}")
        given.append(entries)
        return session(model, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    assert run_command(["generate", str(tiny_bundle), "--prompt", "x", "--max-new-tokens", "2", *options]) == 0
    assert [(one.get("allow_spinning"), one.get("spin_duration_us")) for one in given] == [(allowed, duration)]


@pytest.mark.parametrize("threads", [512, 100_000])
def test_threads_beyond_the_cpus_are_capped_with_a_note(
    tiny_bundle: Path, threads: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    from doge_deploy.cli.main import run_command

    given: list[int] = []
    session = onnxruntime.InferenceSession

    def watched(model: Any, options: Any, **more: Any) -> Any:
        given.append(options.intra_op_num_threads)
        return session(model, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    command = ["generate", str(tiny_bundle), "--prompt", "x", "--max-new-tokens", "2", "--threads", str(threads)]
    assert run_command(command) == 0
    assert given == [available_cpus()]
    assert f"note: --threads {threads}: CPUs that this process may use: {available_cpus()};" in capfd.readouterr().err
    assert run_command([*command, "--quiet"]) == 0
    assert capfd.readouterr().err == ""
