"""The precision of products, what counts as out of memory, and what becomes of freed memory."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from arms import make_method, rows_of
from coconut.config.params import load_params
from coconut.devices import (
    build_accelerator,
    evaluation_precision,
    free_memory,
    is_out_of_memory,
    total_memory,
    usable_cores,
)
from coconut.model.feedback import build_feedback
from coconut.training.objective import Objective
from families import build_family
from update_of_ranks import make_views

ROOT = Path(__file__).parents[1]
RUNTIME = dataclasses.replace(load_params(ROOT / "params.yaml").runtime, device="cpu")


def container(folder: Path, cgroup: str, files: dict[str, str]) -> Path:
    """Write the files by which the kernel tells a process the limits of its container."""
    for name, text in {
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/", {"cpu.max": "100000 100000", "memory.max": "2000000", "memory.current": "1500000",
                  "memory.stat": "anon 1\ninactive_file 250000"}),
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000", "a/memory.max": "2000000",
                     "a/memory.current": "1250000", "a/b/memory.max": "max", "a/b/memory.current": "1250000"}),
        ("3:cpu,cpuacct:/x\n4:memory:/x\n0::/", {
            "cpu,cpuacct/x/cpu.cfs_quota_us": "50000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5",
            "memory/x/memory.limit_in_bytes": "2000000", "memory/x/memory.usage_in_bytes": "1250000"}),
        ("1:cpu:/docker/0123\n2:memory:/docker/0123", {
            "cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "2000000", "memory/memory.usage_in_bytes": "1300000",
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50000"}),
    ],
    ids=["version 2", "the group above", "version 1", "a path of the host"],
)  # fmt: skip
def test_the_limits_of_a_container_count(tmp_path: Path, cgroup: str, files: dict[str, str]) -> None:
    system = container(tmp_path, cgroup, files)
    assert (usable_cores(system), free_memory(system), total_memory(system)) == (1, 750_000, 2_000_000)


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/", {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "5"}),
        ("0::/", {"cpu.max": "", "memory.max": "nonsense"}),
        ("1:cpu:/\n2:memory:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
                                 "memory/memory.limit_in_bytes": "9223372036854771712",
                                 "memory/memory.usage_in_bytes": "5"}),
        ("", {}),
    ],
)  # fmt: skip
def test_without_limits_the_machine_counts(tmp_path: Path, cgroup: str, files: dict[str, str]) -> None:
    system = container(tmp_path, cgroup, files)
    assert usable_cores(system) == len(os.sched_getaffinity(0))
    assert total_memory(system) == psutil.virtual_memory().total


def test_tf32_is_on_exactly_where_it_is_asked_for() -> None:
    """An entry in tf32 must not leave it on for the next thing that the process does."""
    found = []
    for precision in ("fp32", "tf32", "fp32", "tf32", "fp32"):
        build_accelerator(RUNTIME, precision)
        found.append(torch.backends.cuda.matmul.allow_tf32)
    assert found == [False, True, False, True, False]


def test_on_a_cpu_tf32_is_fp32_to_the_last_bit() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 64), torch.randn(64, 64)
    products = []
    for precision in ("fp32", "tf32"):
        with build_accelerator(RUNTIME, precision).autocast():
            products.append(left @ right)
    build_accelerator(RUNTIME, "fp32")
    assert torch.equal(*products)


def test_deterministic_algorithms_are_taken_exactly_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found = []
    for is_asked in (False, True, False):
        build_accelerator(dataclasses.replace(RUNTIME, deterministic=is_asked), "fp32")
        found.append((torch.are_deterministic_algorithms_enabled(), "CUBLAS_WORKSPACE_CONFIG" in os.environ))
    assert found == [(False, False), (True, True), (False, True)]


@pytest.mark.parametrize(
    ("capabilities", "asked", "taken"),
    [
        ({"architecture": "x86_64"}, "bf16", "fp32"),
        ({"architecture": "x86_64", "avx512_bf16": False}, "bf16", "fp32"),
        ({"architecture": "x86_64"}, "fp32", "fp32"),
        ({"architecture": "x86_64"}, "tf32", "tf32"),
        ({"architecture": "x86_64", "avx512_bf16": True}, "bf16", "bf16"),
        ({"architecture": "x86_64", "amx_bf16": True}, "bf16", "bf16"),
        ({"architecture": "aarch64"}, "bf16", "bf16"),
    ],
)
def test_evaluation_takes_fp32_where_a_cpu_has_no_instructions_for_bf16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], asked: str, taken: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert evaluation_precision(RUNTIME, asked) == taken


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_nothing_that_an_update_does_lacks_a_deterministic_algorithm(family: str) -> None:
    """As far as a CPU knows: there the mode changes no byte."""
    gradients = []
    for is_asked in (False, True):
        accelerator = build_accelerator(dataclasses.replace(RUNTIME, deterministic=is_asked), "fp32")
        model = build_family(family, 256, tie_word_embeddings=True)
        one = Objective(model, build_feedback("hidden[-1]", model), accelerator, 0, 2, make_method())
        one.accumulate(rows_of(make_views(num_thoughts=2)), dict(model.named_parameters()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    build_accelerator(RUNTIME, "fp32")
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
    ],
)
def test_the_texts_of_drivers_and_libraries_are_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


FREED = """
import ctypes, dataclasses, resource, sys
from pathlib import Path
import torch
from coconut.config.params import load_params
from coconut.devices import build_accelerator

runtime = dataclasses.replace(load_params(Path(sys.argv[1])).runtime, device="cpu")

def num_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        held = [torch.ones(150_000) for _ in range(40)]  # 24 MB, in pieces as an update of the default has them.
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mallopt = ctypes.CDLL(None).mallopt
for option in (-1, -3):  # The marks of a process that has freed no large block yet.
    mallopt(option, 131072)
for threads in (2, 1):
    build_accelerator(dataclasses.replace(runtime, threads=threads), "fp32")
    num_faults()
    print(num_faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("is_users_own", [False, True])
def test_a_single_thread_does_not_wait_for_memory_that_it_had_before(is_users_own: bool) -> None:
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", FREED, str(ROOT / "params.yaml")],
        env=variables | ({names[0]: "131072"} if is_users_own else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    two_threads, one_thread = map(int, done.stdout.split())
    assert two_threads > 50_000, "the kernel clears 24 MB twenty times"
    assert (one_thread < 5_000) != is_users_own, "what the user has set stays"
