"""What the C library keeps of freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from doge_deploy.serve import heap

HOLES = """
import ctypes
from doge_deploy.serve.heap import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

# the block that lives on lies behind those that are freed, so that the C library cannot give them back by itself
allocate = ctypes.CDLL(None).malloc
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
release = ctypes.CDLL(None).free
release.argtypes = [ctypes.c_void_p]
before = resident()
blocks = [allocate(100_000) for _ in range(500)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:
    release(block)
freed = resident()
give_back()
print(freed - before, resident() - before)
"""


HEAPS = """
import ctypes, sys, threading
from doge_deploy.serve.heap import share_one_heap

allocate = ctypes.CDLL(None).malloc
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
if sys.argv[1] == "share":
    share_one_heap()
together = threading.Barrier(4)

def work():
    together.wait(30)
    allocate(10_000)
    together.wait(30)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
ctypes.CDLL(None).malloc_stats()
"""


def _heaps(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", HEAPS, how], capture_output=True, text=True, check=True)
    return done.stderr.count("Arena ")


def _glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "malloc_trim")


glibc = pytest.mark.skipif(sys.platform != "linux" or not _glibc(), reason="only glibc keeps and gives back")


@glibc
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 40_000_000, "nothing to give back: the test shows nothing"
    assert left < kept / 4


@glibc
def test_threads_share_one_heap() -> None:
    assert _heaps("each their own") > 1, "threads have none of their own: the test shows nothing"
    assert _heaps("share") == 1


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    heap._function.cache_clear()
    try:
        heap.share_one_heap()
        heap.give_back()
        assert heap._function("malloc_trim") is None
    finally:
        heap._function.cache_clear()
