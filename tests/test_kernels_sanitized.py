"""The C++ codec's tests once more, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torch_qgc.kernels import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("codec") / "_codec.so"
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wno-psabi"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = Path(native.__file__).with_name("codec.cpp")
    subprocess.run(["g++", *flags, *sanitizers, "-o", library, sources], check=True)
    return library


def run_under_sanitizers(library: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizers' runtime loaded first, so that torch's own buffers are watched as well."""
    runtime = " ".join(
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")  # the runtime looks for the latter's exceptions at its start
    )
    preamble = (
        f"from pathlib import Path\nfrom torch_qgc.kernels import native\nnative._PATH = Path({str(library)!r})\n"
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", preamble + script]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_codecs_tests_are_clean(sanitized: Path) -> None:
    tests = str(Path(__file__).with_name("test_kernels_native.py"))
    deselected = "not without_the_library and not other_sources and not fork"
    arguments = [tests, "-p", "no:cacheprovider", "-x", "-k", deselected]
    result = run_under_sanitizers(sanitized, f"import pytest\nraise SystemExit(pytest.main({arguments!r}))")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert re.search(r"[1-9]\d* passed", result.stdout)


def test_the_sanitizer_would_notice_a_buffer_that_is_too_small(sanitized: Path) -> None:
    script = (
        "import torch\n"
        "from torch_qgc.kernels import ops, Encoded\n"
        "statistics = torch.zeros(2, dtype=torch.float64)\n"
        "short = Encoded(torch.empty(259, dtype=torch.uint8), 512, 4, statistics)\n"
        "ops.Native().encode(torch.ones(512), (1, 2), False, 0, short)\n"
    )
    result = run_under_sanitizers(sanitized, script)
    assert result.returncode == 99
    assert "ERROR: AddressSanitizer" in result.stderr
