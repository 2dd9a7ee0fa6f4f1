"""NVIDIA's libraries as ONNX Runtime's CUDA provider sees them, without a GPU: what places nodes then runs as it is.

    python tests/cuda_standin.py FOLDER

compiles (gcc) the shared libraries that the installed onnxruntime-gpu asks for, with every function that it imports.
Memory is the processor's, copies are real, and kernels do nothing: numbers that come out mean nothing, but which
provider gets which node, whether a kernel takes its shapes and types, and what is copied from where is decided by ONNX
Runtime's own code. Run it with LD_LIBRARY_PATH=FOLDER.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

_ALLOCATE = "{{ *p = aligned_alloc(256, (n + 511) / 256 * 256); return 0; }}"
_HANDLE = "int {name}(void **p) {{ *p = malloc(64); return 0; }}"
_WORD = 'const char *{name}(int e) {{ return "stand-in"; }}'

# Offsets in cudaDeviceProp of CUDA 13; the device is of capability 9.0 with 8 GiB.
_PROPERTIES = """
int cudaGetDeviceProperties(char *p, int device) {
  memset(p, 0, 1008);
  strcpy(p, "stand-in");
  *(size_t *)(p + 288) = 8ull << 30;
  *(size_t *)(p + 296) = 49152;
  *(int *)(p + 304) = 65536;
  *(int *)(p + 308) = 32;
  *(int *)(p + 320) = 1024;
  for (int i = 324; i < 336; i += 4) *(int *)(p + i) = 1024;
  for (int i = 336; i < 348; i += 4) *(int *)(p + i) = 65535;
  *(int *)(p + 360) = 9;
  for (int i = 384; i < 408; i += 4) *(int *)(p + i) = 100;
  return 0;
}
"""

OWN = {
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "int cudaGetDevice(int *n) { *n = 0; return 0; }",
    "cudaGetDeviceProperties": _PROPERTIES,
    "cudaDeviceGetAttribute": "int cudaDeviceGetAttribute(int *v, int a, int d)"
    " { *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 100 : a == 97 ? 232448 : 1; return 0; }",
    "cudaMalloc": "int cudaMalloc(void **p, size_t n) " + _ALLOCATE.format(),
    "cudaMallocHost": "int cudaMallocHost(void **p, size_t n) " + _ALLOCATE.format(),
    "cudaHostAlloc": "int cudaHostAlloc(void **p, size_t n, unsigned f) " + _ALLOCATE.format(),
    "cudaFree": "int cudaFree(void *p) { free(p); return 0; }",
    "cudaFreeHost": "int cudaFreeHost(void *p) { free(p); return 0; }",
    "cudaMemGetInfo": "int cudaMemGetInfo(size_t *f, size_t *t) { *f = 4ull << 30; *t = 8ull << 30; return 0; }",
    "cudaMemcpy": "int cudaMemcpy(void *d, const void *s, size_t n, int k) { memmove(d, s, n); return 0; }",
    "cudaMemcpyAsync": "int cudaMemcpyAsync(void *d, const void *s, size_t n, int k, void *t)"
    " { memmove(d, s, n); return 0; }",
    "cudaMemset": "int cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return 0; }",
    "cudaMemsetAsync": "int cudaMemsetAsync(void *d, int v, size_t n, void *t) { memset(d, v, n); return 0; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }",
    "cudaStreamIsCapturing": "int cudaStreamIsCapturing(void *s, int *c) { *c = 0; return 0; }",
    "cudaPointerGetAttributes": "int cudaPointerGetAttributes(int *a, const void *p)"
    " { memset(a, 0, 32); a[0] = 2; return 0; }",
    "__cudaRegisterFatBinary": "void **__cudaRegisterFatBinary(void *p) { static void *h[2]; return h; }",
}
for _name in ("cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaEventCreateWithFlags"):
    OWN[_name] = _HANDLE.format(name=_name)
for _name in ("cublasCreate_v2", "cublasLtCreate", "cudaMemPoolCreate"):
    OWN[_name] = _HANDLE.format(name=_name)
for _name in ("cudaGetErrorName", "cudaGetErrorString", "cublasGetStatusName", "cublasGetStatusString"):
    OWN[_name] = _WORD.format(name=_name)
"""Functions that do something; all others return 0."""


def provider() -> Path:
    """The CUDA provider of the installed ONNX Runtime; FileNotFoundError where it is another package's."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    found = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not found.exists():
        raise FileNotFoundError(f"{found}: install onnxruntime-gpu in this environment, and not onnxruntime")
    return found


def build(folder: Path) -> None:
    """Write the libraries that the provider names."""
    folder.mkdir(parents=True, exist_ok=True)
    functions: dict[str, set[str]] = {"libcuda.so.1": {"cuTensorMapEncodeTiled"}, "libcurand.so.10": {"curandCreate"}}
    for word in _output("nm", "-D", "--undefined-only", str(provider())).split():
        name, _, library = word.partition("@")
        if library.startswith("lib"):
            functions.setdefault(library, set()).add(name)
    for library, names in functions.items():
        lines = ["#include <stdlib.h>", "#include <string.h>"]
        lines += [OWN.get(name, f"long {name}() {{ return 0; }}") for name in sorted(names)]
        source, versions = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", "-o", str(folder / library), str(source)]
        if library != "libcuda.so.1":  # the one whose functions have no version
            command.append(f"-Wl,--version-script={versions}")
        subprocess.run([*command, f"-Wl,-soname,{library}"], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]))
