"""What the documentation shows is true: its Python runs, its options exist, its wire format is the code's."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from torch_qgc.protocol import contract, messages

ROOT = Path(__file__).parent.parent
ROOMS_OF_EVENTS = ("worker", "aggregator", "job")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's code blocks in a language (a regular expression)."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def uses(page: Path, words: str) -> bool:
    return any(re.search(rf"\b({words})\b", block) for block in blocks(page, "python"))


@pytest.fixture
def names(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Names that a page may use without defining them: where it needs one, a job of one worker, in an empty folder."""
    page: Path = request.getfixturevalue("page")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "docs", "qgc": qgc, "torch": torch}
    if not uses(page, "model|state"):
        yield names
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 3))
    names["model"] = model
    names["dataset"] = TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    names["loss_function"] = torch.nn.functional.cross_entropy
    if not uses(page, "QGCState"):
        names["state"] = qgc.QGCState(model)
        model.register_comm_hook(names["state"], qgc.qgc_hook)
        names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
        names["scheduler"] = torch.optim.lr_scheduler.StepLR(names["optimizer"], 10)
    yield names
    for value in list(names.values()):
        if isinstance(value, qgc.QGCState):
            value.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_on_the_page_runs_and_prints_what_the_page_shows(page: Path, names: dict[str, Any]) -> None:
    pattern = r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?"
    for number, (code, shown) in enumerate(re.findall(pattern, page.read_text(), flags=re.DOTALL)):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(textwrap.dedent(code), f"{page.name}, block {number}", "exec"), names)
        if shown:
            assert out.getvalue() == shown


def commands(page: Path) -> Iterator[list[str]]:
    """Command lines of the page that start one of our programs, without line continuations and comments."""
    for block in blocks(page, "(?:bash|console|sh)"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and "=" in words[0]:
                words = words[1:]
            if words and (words[0] in ("qgc", "python", "torchrun") or words[0].endswith("/python")):
                yield words


USED = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("command", sorted({words[1] for _, words in USED if words[0] == "qgc"}))
def test_qgc_has_the_options_that_pages_use(command: str) -> None:
    used = {w.split("=")[0] for _, words in USED if words[:2] == ["qgc", command] for w in words if w.startswith("--")}
    width = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    program = [sys.executable, "-m", "torch_qgc.cli.app", command, "--help"]
    shown = subprocess.run(program, capture_output=True, text=True, env=width, check=True).stdout
    assert used <= set(re.findall(r"--[\w-]+", shown))


def test_scripts_have_the_options_that_pages_use() -> None:
    """Typer's option --deadline-s is a parameter deadline_s: of a script, or of what the scripts share."""
    for page, words in USED:
        scripts = [word for word in words if word.endswith(".py")]
        if not scripts or words[0] == "qgc":
            continue
        script = ROOT / scripts[0]
        assert script.exists(), f"{page}: {script}"
        shared = [script, *script.parent.glob("*.py"), *(ROOT / "examples" / "common").glob("*.py")]
        names = set(re.findall(r"(\w+):", "\n".join(path.read_text() for path in shared)))
        for option in words[words.index(scripts[0]) :]:
            if option.startswith("--"):
                name = option.split("=")[0].removeprefix("--").replace("-", "_")
                assert {name, name.removeprefix("no_")} & names, f"{page}: {' '.join(words)}: {option}"


def test_the_wire_page_names_every_message_and_field() -> None:
    page = (ROOT / "docs" / "wire.md").read_text()
    rows = {
        row.split("|")[1].strip().strip("`"): row.split("|")[2] for row in page.splitlines() if row.startswith("| `")
    }
    tagged = {
        m.__struct_config__.tag: m for union in (messages.FromWorker, messages.FromAggregator) for m in get_args(union)
    }
    assert rows.keys() == tagged.keys()
    for tag, message in tagged.items():
        assert re.findall(r"`(\w+)`", rows[tag]) == [field.encode_name for field in msgspec.structs.fields(message)]
    for field in (*contract.JobSpec.__struct_fields__, *contract.ClosingRule.__struct_fields__):
        assert f"`{field}`" in page
    assert f"or {messages.ABSENT} if the worker was not in" in page
    assert f"Protocol version {messages.PROTOCOL_VERSION}" in page


def test_the_runtime_page_lists_every_event_of_a_trace() -> None:
    source = {
        room: "".join(f.read_text() for f in (ROOT / "torch_qgc" / room).glob("*.py")) for room in ROOMS_OF_EVENTS
    }
    made = {
        room: set(re.findall(r'(?:spans(?:\.mark)?\(|Event\([^,]+, )"(\w+)"', code)) for room, code in source.items()
    }
    made["job"] |= {"left", "lost"}  # handed to Rounds.leave
    page = (ROOT / "docs" / "runtime.md").read_text()
    rows = re.findall(r"^\| (`.*`) \| (worker|aggregator) \|", page, flags=re.MULTILINE)
    listed: dict[str, set[str]] = {"worker": set(), "aggregator": set()}
    for names, end in rows:
        listed[end] |= set(re.findall(r"`(\w+)`", names))
    assert listed == {"worker": made["worker"], "aggregator": made["aggregator"] | made["job"]}


def test_every_page_is_in_the_sites_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    assert set(re.findall(r"(\w+\.md)", navigation)) == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_files_on_the_page_are_there(page: Path) -> None:
    """Pages outlive what they speak of: a module that has moved, a file that was never made."""
    text = page.read_text()
    for path in re.findall(
        r"\b(?:torch_qgc|tests|benchmarks|examples|docs)/[\w./-]+\.(?:py|csv|png|md|toml|cpp|h)\b", text
    ):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"(?<![\w.])torch_qgc(?:\.\w+)+", text):
        assert _stands_for_something(name), name


def _stands_for_something(name: str) -> bool:
    """Tell whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            found: Any = importlib.import_module(".".join(parts[:count]))
            return all((found := getattr(found, part, None)) is not None for part in parts[count:])
    return False
