"""The command line: what it prints, what it saves, and with which status it ends."""

from __future__ import annotations

import builtins
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.keys import door
from typer.testing import CliRunner, Result

from torch_qgc import cli, schemes
from torch_qgc.cli.app import app
from torch_qgc.planner import Plan, make_plan
from torch_qgc.planner.cadence import JobRounds
from torch_qgc.planner.delays import Empirical
from torch_qgc.protocol.contract import MOST_WORKERS
from torch_qgc.protocol.identity import KEY_FILE_VARIABLE, Secret

LATE = [0.05, 0.1, 0.3, 0.4]
GIVEN = ["plan", "--straggle-probs", "0.05,0.1,0.3,0.4"]


def qgc(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "TERM": "dumb"})


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------- plan
def test_plan_prints_a_row_per_worker_and_every_scheme() -> None:
    result = qgc(*GIVEN, "--bits-per-coordinate", "4")
    assert result.exit_code == 0
    plan = make_plan(LATE)
    for k in range(4):
        row = next(line for line in result.stdout.splitlines() if line.startswith(f"│ {k} "))
        assert f" {plan.bits[k]} " in row
        assert f"{plan.shares[k]:.4f}" in row
    for name in ("qgc", "osgc", "sgc", "bgc", "erasurehead", "optimal_decoding", "cyclic_mds", "is_sgd"):
        assert f"│ {name} " in result.stdout


def test_json_holds_the_plan_and_the_residuals() -> None:
    printed = json.loads(qgc(*GIVEN, "--bit-budget", "14", "--json").stdout)
    assert Plan.from_json(json.dumps(printed["plan"])) == make_plan(LATE, bit_budget=14)
    assert printed["residuals"]["qgc"] == pytest.approx(make_plan(LATE, bit_budget=14).residual_bound)
    osgc = schemes.osgc(LATE, bit_budget=14)
    assert printed["residuals"]["osgc"] == pytest.approx(schemes.residual(osgc, variance=2 * osgc.variance + 1))
    assert printed["deadline_s"] is None


@pytest.mark.parametrize(("decoder", "rows"), [("unbiased", {"qgc"}), ("hajek", set())])
def test_large_jobs_are_planned_without_the_other_schemes(tmp_path: Path, decoder: str, rows: set[str]) -> None:
    late = ",".join(f"{p:.4f}" for p in np.linspace(0.01, 0.5, 3000))
    printed = json.loads(qgc("plan", "--straggle-probs", late, "--decoder", decoder, "--json").stdout)
    assert set(printed["residuals"]) == rows
    assert len(printed["plan"]["bits"]) == 3000
    shown = qgc("plan", "--straggle-probs", late, "--decoder", decoder).stdout
    assert "and 2968 more workers" in shown


def test_the_defaults_are_those_of_make_plan() -> None:
    printed = json.loads(qgc(*GIVEN, "--json").stdout)
    assert Plan.from_json(json.dumps(printed["plan"])) == make_plan(LATE)
    bare = json.loads(qgc(*GIVEN, "--second-track", "none", "--noise-ratio", "0", "--json").stdout)
    assert Plan.from_json(json.dumps(bare["plan"])) == make_plan(LATE, second_track=None, noise_ratio=0.0)


def test_out_saves_a_plan_that_reads_back(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = qgc(*GIVEN, "--norm", "l2", "--allow-drop", "--noise-ratio", "0.5", "--out", str(out))
    assert result.exit_code == 0
    assert Plan.from_json(out.read_text()) == make_plan(LATE, norm="l2", allow_drop=True, noise_ratio=0.5)


def test_other_schemes_are_charged_the_same_batch_noise() -> None:
    quiet, noisy = (json.loads(qgc(*GIVEN, "--json", "--noise-ratio", eta).stdout)["residuals"] for eta in ("0", "1"))
    assert all(noisy[name] > quiet[name] for name in quiet)
    osgc = schemes.osgc(LATE)
    assert noisy["osgc"] == pytest.approx(schemes.residual(osgc, variance=2 * osgc.variance + 1))


def test_plot_saves_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert qgc(*GIVEN, "--plot", str(picture)).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused(qgc(*GIVEN, "--plot", str(tmp_path / "plan.doc")), "plan.doc")


def test_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "matplotlib")
    result = qgc(*GIVEN, "--plot", str(tmp_path / "plan.png"))
    assert result.exit_code == 1
    assert "torch_qgc[bench]" in result.stderr


@pytest.mark.parametrize("heading", ["", "a,b,c\n"])
def test_delays_and_a_deadline_give_the_rounds_that_a_job_misses(tmp_path: Path, heading: str) -> None:
    file = tmp_path / "delays.csv"
    file.write_text(heading + "1.0,1.2,0.5\n1.1,2.5,\n1.2,1.3,0.6\n")
    printed = json.loads(qgc("plan", "--delays", str(file), "--deadline-s", "2", "--json").stdout)
    recorded = Empirical(delays_s=[[1.0, 1.2, 0.5], [1.1, 2.5, np.inf], [1.2, 1.3, 0.6]])
    assert printed["plan"]["straggle_probs"] == pytest.approx((1 - JobRounds(recorded).cadence(2.0).rates).tolist())
    assert printed["deadline_s"] == 2.0
    assert printed["speedup"] is None


def test_auto_finds_the_deadline_before_the_stragglers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    delays = 1.0 + rng.exponential(0.05, (200, 4))
    delays[:, 3] += np.where(rng.random(200) < 0.3, 50.0, 0.0)
    file = tmp_path / "delays.csv"
    np.savetxt(file, delays, delimiter=",")
    printed = json.loads(qgc("plan", "--delays", str(file), "--json").stdout)
    assert 1.1 < printed["deadline_s"] < 3.0
    assert printed["plan"]["straggle_probs"][3] > 0.2
    assert printed["speedup"] > 2.0
    assert "times as fast as waiting for all" in qgc("plan", "--delays", str(file)).stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got none"),
        ("1.0,2.0\n1.0\n", "line 2"),
        ("1.0,2.0\n1.0,fast\n", "line 2, column 2"),
        ("1.0,-2.0\n", "line 1, column 2"),
        ("1.0,nan\n", "line 1, column 2"),
    ],
)
def test_bad_delay_files_are_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "delays.csv"
    file.write_text(text)
    refused(qgc("plan", "--delays", str(file)), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--straggle-probs", "0.1,1.5"], "1.5 for worker 1"),
        (["--straggle-probs", "0.1;0.2"], "0.1;0.2"),
        (["--straggle-probs", "1,1"], "every worker is certain to be late"),
        (["--straggle-probs", "0.1,0.2", "--bit-budget", "3"], "budget"),
        (["--straggle-probs", "0.1,0.2", "--bit-budget", "9", "--bits-per-coordinate", "4"], "got both"),
        (["--straggle-probs", "0.1,0.2", "--norm", "l1"], "l1"),
        (["--straggle-probs", "0.1,0.2", "--decoder", "magic"], "magic"),
        ([], "--straggle-probs or --delays"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(arguments: list[str], message: str) -> None:
    refused(qgc("plan", *arguments), message)


def test_a_bad_deadline_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "delays.csv"
    file.write_text("1.0,2.0\n")
    for bad in ("soon", "-1", "nan"):
        refused(qgc("plan", "--delays", str(file), "--deadline-s", bad), "deadline_s")


def test_a_missing_file_is_a_failure(tmp_path: Path) -> None:
    result = qgc("plan", "--delays", str(tmp_path / "none.csv"))
    assert result.exit_code == 1
    assert "none.csv" in result.stderr


# ------------------------------------------------------------------------------------------ aggregator
def test_aggregator_runs_until_it_is_told_to_stop() -> None:
    command = [
        sys.executable,
        "-c",
        "from torch_qgc.cli import main; main()",
        "aggregator",
        "--bind",
        "tcp://127.0.0.1:*",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("torch_qgc aggregator at tcp://127.0.0.1:")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 1  # its job was not finished
    assert "torch_qgc aggregator: " in stderr
    assert "Traceback" not in stderr


def test_aggregator_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_qgc.aggregator import process
    from torch_qgc.protocol.server import Bounds

    seen: list[Any] = []
    monkeypatch.setattr(process, "run", lambda serving: seen.append(serving) or 0)
    options = ["--bind", "tcp://0.0.0.0:7000", "--index", "1", "--count", "3", "--threads", "2"]
    options += ["--max-message-mib", "8", "--no-encrypt", "--trace", "events.jsonl"]
    assert qgc("aggregator", *options).exit_code == 0
    assert seen == [
        process.Serving(
            door=door(1, MOST_WORKERS, encrypt=False),
            bind="tcp://0.0.0.0:7000",
            index=1,
            count=3,
            threads=2,
            bounds=Bounds(message_bytes=8 << 20),
            trace="events.jsonl",
        )
    ]


def test_keygen_makes_a_key_once(tmp_path: Path) -> None:
    path = tmp_path / "job.key"
    assert qgc("keygen", str(path)).exit_code == 0
    made = Secret.load(path)
    refused(qgc("keygen", str(path)), "is not there")
    assert Secret.load(path) == made


def test_an_aggregator_on_its_own_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEY_FILE_VARIABLE)
    refused(qgc("aggregator"), "qgc keygen FILE")
    refused(qgc("aggregator", "--key-file", str(tmp_path / "none")), "cannot be read")


def test_aggregator_refuses_what_cannot_be() -> None:
    assert qgc("aggregator", "--bind", "ipc:///socket").exit_code == 2
    assert qgc("aggregator", "--index", "2", "--count", "2").exit_code == 2
    assert qgc("aggregator", "--threads", "0").exit_code == 2


# ---------------------------------------------------------------------------------------------- doctor
def test_doctor_names_versions_kernels_and_devices() -> None:
    import torch

    from torch_qgc import kernels

    facts = json.loads(qgc("doctor", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert facts["kernels on cpu"] == kernels.report()["cpu"]
    assert (facts["cuda devices"] == "none") == (torch.cuda.device_count() == 0)
    assert facts["kernels on cpu"] in qgc("doctor").stdout


def test_without_typer_the_command_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_qgc.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    hide(monkeypatch, "typer")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == "qgc: expected typer and rich, got no module 'typer': pip install 'torch_qgc[cli]'"


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package look as if it were not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
