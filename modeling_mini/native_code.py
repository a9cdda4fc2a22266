"""
Compiles C++ source into a library that ctypes calls, and keeps it on disk for later processes.

`VECTORS` is the beginning that all such sources share.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

SECONDS = 30  # a compiler that needs more for an empty file hangs
# inductor turns these off, because it writes its own loops with vectors.
FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast")

VECTORS = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

// `aligned`: they may begin at any float. The compiler splits a vector that is wider than its registers.
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(2 * WIDTH), aligned(4), may_alias));
typedef float Quarter __attribute__((vector_size(WIDTH), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static Vector load(const float *from) { return *(const Vector *)from; }
static void store(float *to, Vector value) { *(Vector *)to = value; }

static float sum_of(Vector value) {
    const Half *halves = (const Half *)&value;
    Half half = halves[0] + halves[1];
    const Quarter *quarters = (const Quarter *)&half;
    Quarter quarter = quarters[0] + quarters[1];
    float sum = 0;
    for (int i = 0; i < WIDTH / 4; i++) sum += quarter[i];
    return sum;
}

// exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2, where a polynomial of degree 7 is exact in float32.
static Vector exp_of(Vector x) {
    x = x < -87.0f ? Vector{} - 87.0f : x;
    x = x > 88.0f ? Vector{} + 88.0f : x;
    const Vector shifted = x * 1.44269504f + 12582912.0f; // adding 1.5 * 2^23 rounds
    const Vector n = shifted - 12582912.0f;
    const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f; // ln(2) in two parts
    Vector power = r / 5040.0f + 1 / 720.0f;
    power = power * r + 1 / 120.0f;
    power = power * r + 1 / 24.0f;
    power = power * r + 1 / 6.0f;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
    return power * (Vector)exponent;
}
"""


def load_library(name: str, source: str) -> ctypes.CDLL:
    """
    The compiled source: from the file of an earlier process, or compiled now.

    Args:
        name: the folder of its file, in the cache.

    Raises:
        RuntimeError: if there is no compiler, or it fails.
        OSError: if what was compiled cannot be loaded.
    """
    return kept_library(name, source) or compile_library(name, source)


def kept_library(name: str, source: str) -> ctypes.CDLL | None:
    """The library as an earlier process compiled it; `None` if there is no file, or it is damaged."""
    pattern = library_path(name, source, "*")
    for path in pattern.parent.glob(pattern.name):
        with contextlib.suppress(OSError):
            if path == library_path(name, source, checksum(path.read_bytes())):
                return ctypes.CDLL(str(path))
    return None


def compile_library(name: str, source: str) -> ctypes.CDLL:
    """Compiles the source, and keeps the library in a file if it can be written. Raises as `load_library`."""
    from torch._inductor.codecache import CppCodeCache  # takes seconds to import

    check_compiler()
    library = CppCodeCache.load(source, extra_flags=FLAGS)
    content = Path(library._name).read_bytes()
    path = library_path(name, source, checksum(content))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder, path.name)
            written.write_bytes(content)
            os.replace(written, path)
    return library


def check_compiler() -> None:
    """
    Raises RuntimeError if torch's C++ compiler does not answer: torch would wait for it for ever. About a compiler that
    is missing or fails, torch's own error says more.
    """
    from torch._inductor import config

    compiler = config.cpp.cxx if isinstance(config.cpp.cxx, str) else config.cpp.cxx[-1]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        # Up to a library, because the assembler and the linker can hang too.
        command = [compiler, "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", f"{folder}/empty.so"]
        try:
            # No pipes: processes that the compiler started could hold them open after it was killed.
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the C++ compiler {compiler!r} gave no answer in {SECONDS} seconds.") from None


def library_path(name: str, source: str, content: str) -> Path:
    """The file of a library. Its name has a hash of all that it depends on, and the checksum of the file."""
    parts = [source, FLAGS, torch.__version__, platform.machine(), sorted(torch.cpu.get_capabilities().items())]
    # As `files_mini.cache_folder` has it, which does not travel with a checkpoint.
    folder = os.environ.get("MINI_CACHE") or Path.home() / ".cache" / "mini"
    return Path(folder, name, f"{checksum(repr(parts).encode())}-{content}.so")


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
