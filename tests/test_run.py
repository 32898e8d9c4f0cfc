"""`qgc run`: real processes that are started, fail, come back, are told to end, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.ranks import PATIENCE_S
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from torch_qgc.cli.app import app
from torch_qgc.cli.guard import remaining
from torch_qgc.cli.launcher import Job
from torch_qgc.cli.lines import Lines
from torch_qgc.cli.workers import environment_of
from torch_qgc.errors import ConfigError
from torch_qgc.protocol.identity import KEY_FILE_VARIABLE, Secret

# Every script begins with this: what it says is written to files, one for each worker.
HEAD = """
import os, pathlib, signal, subprocess, sys, time
worker, restarts = int(os.environ["QGC_WORKER"]), int(os.environ["QGC_RESTARTS"])
folder = pathlib.Path(__file__).parent
def say(name, text=""):
    with open(folder / f"{name}-{worker}", "a") as file:
        file.write(f"{text}\\n")
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.02)
say("started", restarts)
"""


class Running:
    """A job that `qgc run` has started, in a folder for it and its temporary files.

    Args:
        folder: that holds the script.
        script: what it does after HEAD.
        options: of `qgc run`.
    """

    def __init__(self, folder: Path, script: str, *options: str) -> None:
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        (folder / "train.py").write_text(HEAD + script)
        environment = {name: value for name, value in os.environ.items() if name != KEY_FILE_VARIABLE}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from torch_qgc.cli import main; main()", "run", *options, str(folder / "train.py")],
            env={**environment, "TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return the status and what was printed."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err

    def said(self, name: str, worker: int) -> list[str]:
        """Return what a worker has said."""
        path = self.folder / f"{name}-{worker}"
        return path.read_text().split() if path.exists() else []

    def family(self) -> set[int]:
        """Return the numbers of all processes that it has now, itself left out."""
        found, more = set(), [self.process.pid]
        while more:
            with contextlib.suppress(OSError):
                parent = more.pop()
                children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
                more += map(int, children)
                found |= set(map(int, children))
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start jobs, each of which is ended with the test."""
    jobs: list[Running] = []

    def started(script: str, *options: str, folder: Path = tmp_path) -> Running:
        jobs.append(Running(folder, script, *options))
        return jobs[-1]

    yield started
    for job in jobs:
        job.process.kill()
        job.process.communicate()


def wait_until(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def nothing_is_left(job: Running, family: set[int]) -> None:
    wait_until(lambda: not any(map(alive, family)) and not list(job.temporary.iterdir()))


# --- restarts -----------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_started_again_and_the_others_are_not(start: Callable[..., Running]) -> None:
    job = start(
        """
print("to stdout", flush=True)
print("to stderr", file=sys.stderr)
if worker == 1 and restarts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
say("back" if restarts else "first")
wait_for("back-1")
""",
        "--workers=3",
        "--restart-delay-s=0",
    )
    status, out, err = job.end()
    assert status == 0, err
    assert [job.said("started", k) for k in range(3)] == [["0"], ["0", "1"], ["0"]]
    assert sorted(out.splitlines()) == [f"[{k}] to stdout" for k in (0, 1, 1, 2)]
    told = "qgc: worker 1 was ended by SIGKILL, and is started again in 0 s (1 of 3)"
    assert sorted(err.splitlines()) == [*(f"[{k}] to stderr" for k in (0, 1, 1, 2)), told]
    assert not list(job.temporary.iterdir())


def test_a_worker_that_fails_too_often_is_given_up_and_the_others_go_on(start: Callable[..., Running]) -> None:
    job = start(
        """
if worker == 0:
    print("the last words have no end", end="")
    sys.exit(3)
wait_for("started-0")
while (folder / "started-0").read_text() != "0\\n1\\n":
    time.sleep(0.02)
""",
        "--workers=2",
        "--max-restarts=1",
        "--restart-delay-s=0",
    )
    status, out, err = job.end()
    assert status == 1
    assert "qgc: worker 0 has ended with exit status 3, and is given up" in err
    assert "worker 1" not in err
    assert out == "[0] the last words have no end\n" * 2
    assert job.said("started", 1) == ["0"]


# --- ends ---------------------------------------------------------------------------------------------------

STUBBORN = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
def note(signum, frame):
    say("signal", signum)
    if worker == 0:
        sys.exit(0)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
say("ready")
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_and_nothing_is_left(start: Callable[..., Running], signum: signal.Signals) -> None:
    """Worker 0 obeys, worker 1 does not; both have a child that knows of nothing."""
    job = start(STUBBORN, "--workers=2", "--grace-s=0.5")
    wait_until(lambda: all((job.folder / f"ready-{k}").exists() for k in (0, 1)))
    family = job.family()
    assert len(family) == 6  # two workers with a child each, the aggregator, the guard
    job.process.send_signal(signum)
    status, _, err = job.end()
    assert status == 128 + signum
    assert "started again" not in err
    assert [job.said("signal", k) for k in (0, 1)] == [[str(int(signum))]] * 2
    nothing_is_left(job, family)


def test_nothing_is_left_when_it_is_killed_itself(start: Callable[..., Running]) -> None:
    job = start(STUBBORN, "--workers=2")
    wait_until(lambda: all((job.folder / f"ready-{k}").exists() for k in (0, 1)))
    family = job.family()
    assert len(list(job.temporary.iterdir())) == 1  # with the key
    job.process.kill()
    nothing_is_left(job, family | {job.process.pid})
    assert [job.said("signal", k) for k in (0, 1)] == [[], []]


def test_nobody_is_started_again_when_the_aggregator_has_ended(start: Callable[..., Running]) -> None:
    job = start(
        """
say("ready")
wait_for("end")
sys.exit(1)
""",
        "--workers=2",
        "--restart-delay-s=1000",
    )
    wait_until(lambda: all((job.folder / f"ready-{k}").exists() for k in (0, 1)))
    aggregators = [p for p in job.family() if b"aggregator" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(aggregators) == 1
    os.kill(aggregators[0], signal.SIGKILL)
    (job.folder / "end").touch()
    status, _, err = job.end()
    assert status == 1
    assert "the job has ended" in err or "given up" in err  # whichever was seen first
    assert [job.said("started", k) for k in (0, 1)] == [["0"], ["0"]]


# --- training -----------------------------------------------------------------------------------------------

# As under torchrun: it does not know that it has a process group of its own.
TRAIN = """
import torch, torch.distributed as dist
import torch_qgc as qgc
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(12, 1))
state = qgc.QGCState(model, deadline_s={deadline_s}, verify_every=10, limits=qgc.Limits(chunk_numel=512))
model.register_comm_hook(state, qgc.qgc_hook)
optimizer = qgc.CodedSGD(model.parameters(), state, lr=0.01)
x = torch.randn(state.workers * 4 * 30, 12, generator=torch.Generator().manual_seed(1))
for batch, in state.loader(torch.utils.data.TensorDataset(x), batch_size=4):
    if worker == 1 and not restarts and state.step == 8:
        {at_step_8}
    if restarts:
        say("back")
    if {others_wait} and worker != 1 and state.step == 15:
        wait_for("back-1")
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
state.close()
say("end", f"{{state.step}},{{state.replica.layout.parameter_digest()}},{{state.rank}},{{dist.get_world_size()}}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "shown"),
    [
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", "by SIGKILL", id="killed"),
        pytest.param("raise ValueError('its own')", "exit status 1", id="an error"),
    ],
)
def test_a_worker_comes_back_into_the_job_and_all_end_equal(
    start: Callable[..., Running], end: str, shown: str
) -> None:
    script = TRAIN.format(deadline_s=0.2, at_step_8=end, others_wait=True)
    job = start(script, "--workers=3", "--restart-delay-s=0")
    status, _, err = job.end()
    assert status == 0, err
    assert shown in err
    ends = [job.said("end", k) for k in range(3)]
    steps, digests, numbers, sizes = zip(*(end.split(",") for [end] in ends))
    assert (steps, numbers, sizes) == (("30",) * 3, ("0", "1", "2"), ("1",) * 3)
    assert len(set(digests)) == 1
    assert [job.said("started", k) for k in range(3)] == [["0"], ["0", "1"], ["0"]]


# Worker 0 writes checkpoints; whoever starts loads the newest, and workers kill themselves where they are told to.
CHECKPOINTED = """
import torch, torch.distributed as dist
import torch_qgc as qgc
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(12, 1))
limits = qgc.Limits(chunk_numel=512, log_steps={log_steps})
state = qgc.QGCState(model, deadline_s={deadline_s}, verify_every=10, limits=limits)
model.register_comm_hook(state, qgc.qgc_hook)
optimizer = qgc.CodedAdam(model.parameters(), state, lr=0.01)
x = torch.randn(state.workers * 4 * {per_epoch}, 12, generator=torch.Generator().manual_seed(1))
loader = state.loader(torch.utils.data.TensorDataset(x), batch_size=4)
parts = {{"model": model.module, "optimizer": optimizer, "state": state}}
path = folder / "checkpoint.pt"
if path.exists():
    found = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(found[name])
    say("loaded", state.step)
while loader.sampler.epoch < {epochs}:
    epoch = loader.sampler.epoch
    for batch, in loader:
        if not restarts and {kills}.get(worker) == state.step:
            os.kill(os.getpid(), signal.SIGKILL)
        if restarts:
            say("back", state.step)
        for killed in {kills}:
            if worker not in {kills} and state.step == {waits_at}:
                wait_for(f"back-{{killed}}")
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if worker == 0 and state.step % 10 == 0:
            torch.save({{name: part.state_dict() for name, part in parts.items()}}, folder / "half.pt")
            os.replace(folder / "half.pt", path)
    met = [epoch, state.step]
    told = state.all_gather(met)
    assert all(each == met for each in told.values()), (told, met)
report = state.report()
state.close()
say("end", f"{{state.step}},{{state.replica.layout.parameter_digest()}},{{report.computed_steps}}")
"""


@pytest.mark.parametrize(
    ("workers", "kills", "deadline_s", "steps"),
    [
        pytest.param(2, {1: 12}, 0.2, (2, 10), id="one"),
        pytest.param(2, {1: 12}, None, (2, 10), id="one of those that wait for all", marks=pytest.mark.slow),
        pytest.param(3, {1: 25, 2: 40}, 0.2, (3, 20), id="two", marks=pytest.mark.slow),
    ],
)
def test_a_worker_comes_back_from_the_newest_checkpoint_and_all_end_equal(
    start: Callable[..., Running], workers: int, kills: dict[int, int], deadline_s: float | None, steps: tuple[int, int]
) -> None:
    """The log does not reach back to the job's beginning."""
    epochs, per_epoch = steps
    script = CHECKPOINTED.format(
        deadline_s=deadline_s,
        kills=kills,
        epochs=epochs,
        per_epoch=per_epoch,
        waits_at=epochs * per_epoch - 3,
        log_steps=12 if epochs == 2 else 40,
    )
    job = start(script, f"--workers={workers}", "--restart-delay-s=0")
    status, _, err = job.end()
    assert status == 0, err
    ends = [job.said("end", k)[0].split(",") for k in range(workers)]
    assert {end[0] for end in ends} == {str(epochs * per_epoch)}
    assert len({end[1] for end in ends}) == 1
    for killed, step in kills.items():
        assert job.said("started", killed) == ["0", "1"]
        [loaded] = map(int, job.said("loaded", killed))
        assert loaded >= step // 10 * 10
        if deadline_s is None:  # then what is made thin is what had closed without it, and nothing else
            assert int(ends[killed][2]) < epochs * per_epoch - loaded


@pytest.mark.slow
def test_two_of_them_make_one_job(start: Callable[..., Running], tmp_path: Path) -> None:
    """As on two machines, of which the first runs the aggregator."""
    key, there = tmp_path / "job.key", tmp_path / "there"
    Secret.make().save(key)
    there.mkdir()
    script = TRAIN.format(deadline_s=None, at_step_8="pass", others_wait=False)
    both = ("--workers=2", f"--key-file={key}")
    here = start(script, *both, "--local-workers=1", "--bind=tcp://127.0.0.1:*")
    assert here.process.stderr is not None
    told = here.process.stderr.readline()
    assert told.startswith("qgc: aggregators listen: --endpoints tcp://127.0.0.1:")
    other = start(script, *both, "--first-worker=1", f"--endpoints={told.split()[-1]}", folder=there)
    assert [job.end()[0] for job in (here, other)] == [0, 0]
    [first], [second] = here.said("end", 0), other.said("end", 1)
    assert first.split(",")[:3] == [*second.split(",")[:2], "0"]


# --- parts --------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=20)))
def test_lines_do_not_depend_on_how_they_are_read(parts: list[bytes]) -> None:
    lines = Lines(b"> ")
    found = b"".join(map(lines.feed, parts)) + lines.end()
    whole = b"".join(parts).split(b"\n")
    whole = whole if whole[-1] else whole[:-1]
    assert found == b"".join(b"> " + line.rstrip(b"\r").split(b"\r")[-1] + b"\n" for line in whole)


def test_a_line_without_an_end_does_not_grow_for_ever() -> None:
    lines = Lines(b"")
    assert sum(len(lines.feed(b"x" * 1000)) for _ in range(1000)) > 900_000


def test_a_guard_ends_those_that_have_not_left() -> None:
    assert remaining(["+5\n", "+6\n", "-5\n", "+7\n", "-9\n"]) == {6, 7}


def test_a_worker_has_a_process_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "an outer job")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment_of(6, workers=8, here=range(4, 8), endpoints=["tcp://a:1"], key_file="/key", restarts=2)
    expected = {
        "QGC_WORKER": "6",
        "QGC_WORKERS": "8",
        "QGC_ENDPOINTS": "tcp://a:1",
        "QGC_KEY_FILE": "/key",
        "QGC_RESTARTS": "2",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
        "OMP_NUM_THREADS": "3",
    }
    assert expected.items() <= found.items()
    assert "TORCHELASTIC_RUN_ID" not in found
    monkeypatch.delenv("OMP_NUM_THREADS")
    alone = environment_of(0, workers=1, here=range(1), endpoints=[], key_file="/key", restarts=0)
    assert "OMP_NUM_THREADS" not in alone  # a single worker may take all cores


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"here": range(2, 5)}, "--workers is the number of all workers"),
        ({"here": range(2)}, "--bind tcp://ADDRESS:PORT"),
        ({"here": range(2), "bind": "tcp://10.0.0.1:5555"}, "--key-file"),
        ({"here": range(2), "endpoints": ("tcp://10.0.0.1:5555",)}, "qgc keygen FILE"),
        ({"here": range(4), "bind": "tcp://127.0.0.1:*", "endpoints": ("tcp://a:1",)}, "got both"),
    ],
)
def test_what_cannot_be_started_is_refused_with_the_remedy(options: dict[str, object], remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Job(command=["true"], workers=4, **options)  # type: ignore[arg-type]
    assert remedy in str(caught.value)


def test_bad_input_ends_with_2_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    for arguments in (["/no/script.py"], ["--bind", "ipc:///socket", str(tmp_path / "train.py")]):
        result = CliRunner().invoke(app, ["run", *arguments])
        assert result.exit_code == 2, result.output
