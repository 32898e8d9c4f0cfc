"""The paper's experiments: every figure at a tiny size, the rules behind the verdicts, and the published report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import typer  # noqa: E402
from common import digits as mnist  # noqa: E402
from detection import rendering  # noqa: E402
from language import text as sources  # noqa: E402
from paper import allocators, checks, claims, config, contestants, convergence, detectors, report, run, tables  # noqa: E402

from torch_qgc.errors import ConfigError  # noqa: E402

STEPS = 2


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Put noise in the place of what would be downloaded, and a few words in that of the standard library."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, size=(200, 28, 28), dtype=np.uint8)
    labels = np.tile(np.arange(10), 20).astype(np.uint8)
    folder = tmp_path_factory.mktemp("coco")
    photos = [rng.integers(0, 90, size=(200, 400, 3), dtype=np.uint8)]
    for split in ("train", "val"):
        drawn = rendering.digit_pictures(photos, images, labels, split=split, count=24, rng=rng)
        rendering.write_coco(folder, split, drawn, [str(digit) for digit in range(10)])
    convergence.load_task.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "EXAMINED", 3)
        patch.setattr(mnist, "load", lambda data_dir: (images, labels))
        patch.setattr(rendering, "digits", lambda data_dir: folder)
        patch.setattr(sources, "documents", lambda source, data_dir: ["def f(x):\n    return x\n" * 30] * 40)
        yield
    convergence.load_task.cache_clear()


def tiny(*, steps: int = STEPS, runs: int = 1) -> config.Experiments:
    """Every panel with few contestants, one budget and few rounds of few samples."""
    whole = config.experiments("small", runs=runs, steps=steps)
    panels = []
    for panel in whole.panels:
        if panel.key in ("2b", "2d", "2e", "2f", "3a", "3d"):
            continue  # as 2a and 2c, with other numbers
        odd = [name for name in panel.contestants if name in ("ef_osgc", "qgc_one_track", "cyclic_mds")]
        few = ("sgd", "osgc", "qgc", *odd) if panel.workload == "main" else ("sgd", "qgc")
        panels.append(dataclasses.replace(panel, contestants=few, bits=panel.bits[-1:]))
    workloads = {k: dataclasses.replace(w, batch_size=2, workers=2) for k, w in whole.workloads.items()}
    allocation = config.Allocation(workers=(3,), bits=(2, 3), draws=1)
    return dataclasses.replace(whole, panels=tuple(panels), workloads=workloads, allocation=allocation)


# ------------------------------------------------------------------------------------------------ config
@pytest.mark.parametrize("scale", config.SCALES)
def test_every_scale_names_tasks_workloads_and_contestants_that_exist(scale: str) -> None:
    from paper.tasks import TASKS

    experiments = config.experiments(scale)
    assert {w.task for w in experiments.workloads.values()} <= TASKS.keys()
    for panel in experiments.panels:
        assert panel.workload in experiments.workloads
        for name in panel.contestants:
            assert contestants.label(name)
    assert {"2a", "2b", "2c", "2d", "2e", "2f", "3a", "3b", "3c", "3d", "3e", "4"} <= {
        p.key for p in experiments.panels
    }


@pytest.mark.parametrize("panel", config.PANELS, ids=lambda panel: panel.key)
def test_every_contestant_of_a_panel_has_a_plan_within_the_budget(panel: config.Panel) -> None:
    late = panel.cluster.delays(0).straggle_probability(panel.cluster.deadline_s)
    for name in panel.contestants:
        for bits in panel.bits if name != contestants.IDEAL else ():
            made: Any = contestants.contestant(name).plan(late, panel, "l2", bits, 0)
            plan = getattr(made, "plan", made)
            assert plan.num_workers == panel.cluster.workers
            assert plan.spent_bits <= bits * plan.num_workers
            assert plan.norm == "l2"


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="scale: expected one of small, paper"):
        config.experiments("huge")
    with pytest.raises(ConfigError, match="runs"):
        config.experiments("small", runs=0)
    with pytest.raises(ConfigError, match="2 bits or more"):
        config.Panel(key="x", title="x", contestants=("sgd",), bits=(1.0,))
    with pytest.raises(ConfigError, match="deadline"):
        config.Cluster(deadline_s=1.0)
    with pytest.raises(ConfigError, match="expected a panel"):
        config.experiments("small").panel("9z")
    with pytest.raises(ConfigError, match="contestants"):
        contestants.label("nobody")


def test_the_stated_chance_to_be_late_is_the_delays_own() -> None:
    cluster = config.Cluster(workers=1000)
    late = cluster.delays(3).straggle_probability(cluster.deadline_s)
    # 4 standard errors of the mean over 1000 workers.
    assert abs(late.mean() - cluster.mean_straggle_probability) < 4 * late.std() / np.sqrt(1000)


# --------------------------------------------------------------------------------------------- every figure
def test_every_figure_is_run_drawn_and_reported_and_nothing_is_run_twice(offline: Any, tmp_path: Path) -> None:
    experiments = tiny()
    tables.write(tmp_path / "paper_allocators.csv", allocators.FIELDS, allocators.rows(experiments.allocation))
    found = convergence.jobs(experiments, [panel.key for panel in experiments.panels])
    done = list(convergence.execute(found, tmp_path, tmp_path, processes=1))
    assert done == found
    assert all(convergence.result(job, tmp_path) for job in found)
    other = dataclasses.replace(found[0], workload=dataclasses.replace(found[0].workload, lr_sgd=0.123))
    assert convergence.result(other, tmp_path) is None

    run.write_all(experiments, tmp_path)
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "paper.md").read_text()
    assert f"pictures/{report.PICTURE}" in text
    assert all(claim.text in text for claim in claims.CLAIMS)
    read = report.read(tmp_path)
    assert {row["panel"] for row in read.schemes.rows} == {panel.key for panel in experiments.panels}
    assert len(read.schemes.rows) == len(found)  # one run of each
    assert {row["part"] for row in read.bits} == {0.25, 0.5, 1.0}
    assert all(row["total_bits"] > 0 for row in read.bits)
    assert len(read.detections) == sum(job.panel.key == "4" for job in found)


def test_a_run_that_is_not_complete_is_left_out(offline: Any, tmp_path: Path) -> None:
    experiments = tiny(steps=1, runs=2)
    found = convergence.jobs(experiments, ["3e"])
    assert [job.run for job in found] == sorted(job.run for job in found)
    list(convergence.execute(found[:-1], tmp_path, tmp_path, processes=1))
    kept = convergence.collect(found, tmp_path)
    assert {job.run for job, _ in kept} == {0}
    assert len(kept) == len(found) / 2


def test_a_job_is_a_function_of_its_settings(offline: Any, tmp_path: Path) -> None:
    job = convergence.jobs(tiny(), ["2a"])[1]
    records = []
    for name in ("a", "b"):
        list(convergence.execute([job], tmp_path / name, tmp_path, processes=1))
        torch.manual_seed(99)
        records.append(convergence.result(job, tmp_path / name))
    assert records[0] == records[1]


def test_an_unknown_figure_ends_with_status_2(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(run.main)
    ended = CliRunner().invoke(app, ["--figure", "7z", "--out", str(tmp_path)])
    assert ended.exit_code == 2
    assert "7z" in ended.output


# ------------------------------------------------------------------------------------------------ Fig. 1, 4
def test_no_allocator_beats_the_dynamic_program() -> None:
    rows = list(allocators.rows(config.Allocation(workers=(4,), bits=(2, 3, 5), draws=2)))
    assert {row["method"] for row in rows} == set(allocators.METHODS)
    for row in rows:
        assert row["draws"] == 2
        assert row["worst"] >= row["excess"] >= -1e-12
        if row["method"] in ("exact", "dp"):
            assert row["worst"] == pytest.approx(0.0, abs=1e-12)
            assert row["stuck"] == 0.0


def test_an_allocator_is_stuck_where_it_is_clearly_above_the_optimum() -> None:
    row = allocators.thinned(("paper_whole", 4, 3, "greedy"), [1.0, 2.2, 3.0], [1.0, 2.0, 3.0])
    assert (row["draws"], row["residual"], row["excess"]) == (3, 2.2, 0.0)
    assert (row["worst"], row["stuck"]) == (pytest.approx(0.1), pytest.approx(1 / 3))


def test_average_precision_is_the_area_under_the_running_maximum_of_precision() -> None:
    # By hand: hits at ranks 1, 3; precision 1 and 2/3; two of four objects.
    assert detectors.average_precision([0.9, 0.8, 0.7], [True, False, True], 4) == pytest.approx((1 + 2 / 3) / 4)
    # A later, higher precision counts for earlier hits: ranks 2, 3 have 1/2 and 2/3, both count 2/3.
    assert detectors.average_precision([0.9, 0.8, 0.7], [False, True, True], 2) == pytest.approx(2 / 3)
    assert detectors.average_precision([], [], 3) == 0.0


# ------------------------------------------------------------------------------------------- the verdicts
def rows_of(panel: str, losses: dict[tuple[str, str], Sequence[float]], *, bits: float = 2.5) -> list[dict[str, Any]]:
    """Rows of paper_runs.csv with these final losses, by scheme and quantizer ("": SGD)."""
    return [
        {
            "panel": panel,
            "bits": bits if quantizer else 0.0,
            "quantizer": quantizer,
            "scheme": scheme,
            "run": r,
            "initial_loss": 2.0,
            "mean_loss": loss,
            "final_loss": loss,
        }
        for (scheme, quantizer), values in losses.items()
        for r, loss in enumerate(values)
    ]


def schemes_of(rows: list[dict[str, Any]]) -> tables.Schemes:
    return tables.Schemes(tables.summarize(rows, lambda row, runs: 0.5))


def verdict_on(text: str, rows: list[dict[str, Any]], quantizer: str = "l2") -> str:
    (claim,) = [claim for claim in claims.CLAIMS if claim.text == text]
    verdicts = claims.judge(checks.Tables(schemes=schemes_of(rows)), [claim])
    return next(str(v) for v in verdicts if v.quantizer == quantizer)


def test_lower_means_that_the_interval_of_paired_differences_leaves_out_zero() -> None:
    noise = np.array([0.3, -0.2, 0.1, 0.4])
    higher = 1.1 + noise + [0.01, -0.01, 0, 0]
    # Runs differ by far more than schemes do, but all alike: pairs tell.
    assert tables.against(1.0 + noise, higher) == "below"
    assert tables.against(higher, 1.0 + noise) == "above"
    assert tables.against(1.0 + noise, 1.1 + noise[::-1]) == "level"
    assert tables.against(np.array([1.0]), np.array([2.0])) == ""


def test_the_interval_over_the_ideal_is_students() -> None:
    losses = {("sgd", ""): [1.0, 1.0, 1.0], ("sgc", "l2"): [1.1, 1.2, 1.3]}
    row = schemes_of(rows_of("2a", losses)).of("2a", "sgc", 2.5, "l2")
    reach = 4.302653 * 0.1 / 3**0.5  # t of two degrees of freedom at 97.5 %
    assert [row["over_low"], row["over_ideal"], row["over_high"]] == pytest.approx([1.2 - reach, 1.2, 1.2 + reach])
    assert (row["runs"], row["lowest"], row["highest"]) == (3, pytest.approx(1.1), pytest.approx(1.3))


def test_a_diverged_run_counts_as_the_cap_and_is_marked() -> None:
    found = schemes_of(rows_of("2a", {("sgd", ""): [0.5], ("sgc", "l2"): [float("nan")], ("od", "l2"): [1e9]}))
    for scheme in ("sgc", "od"):
        row = found.of("2a", scheme, 2.5, "l2")
        assert (row["final_loss"], row["cut"]) == (tables.CAP * 2.0, 1)
    assert found.of("2a", "sgd", 2.5, "l2")["cut"] == 0


def test_losses_are_compared_at_the_bits_that_ours_has_sent() -> None:
    curves = {
        "qgc": ([0.0, 4.0, 8.0], [2.0, 1.0, 0.5]),
        "sgc": ([0.0, 16.0], [2.0, 0.0]),
        "od": ([0.0, 8.0], [2.0, np.nan]),
    }
    points = [
        {"quantizer": "l2", "scheme": scheme, "total_bits": bits, "loss": loss}
        for scheme, curve in curves.items()
        for bits, loss in zip(*curve)
    ]
    found = {(row["scheme"], row["part"]): (row["total_bits"], row["loss"]) for row in tables.at_equal_bits(points)}
    assert {scheme for scheme, _ in found} == {"qgc", "sgc"}  # what diverges has no loss to compare
    assert found["qgc", 0.25] == (2.0, 1.5)
    assert found["sgc", 0.25] == (2.0, 1.75)
    assert found["sgc", 1.0] == (8.0, 1.0)


@pytest.mark.parametrize(
    ("others", "expected"),
    [((1.0, 1.0), "holds"), ((1.0, 0.5), "in part (50%)"), ((0.4, 0.3), "does not hold")],
)
def test_a_claim_holds_in_part_or_not_at_all(others: tuple[float, float], expected: str) -> None:
    wiggle = np.array([0.01, -0.01, 0.02])
    losses = {("sgd", ""): [0.5] * 3, ("qgc", "l2"): (0.5 + wiggle).tolist()}
    losses |= {(name, "l2"): (other + wiggle * 0.9).tolist() for name, other in zip(("sgc", "od"), others)}
    assert verdict_on("with a ResNet ours stays below all baselines", rows_of("3b", losses)) == expected


def test_nothing_is_claimed_of_what_was_not_run_or_only_once() -> None:
    text = "with a ResNet ours stays below all baselines"
    assert verdict_on(text, []) == "not run"
    once = {("sgd", ""): [0.5], ("qgc", "l2"): [0.5], ("sgc", "l2"): [0.9]}
    assert verdict_on(text, rows_of("3b", once)) == "too few runs"


def test_tables_survive_writing_and_reading(tmp_path: Path) -> None:
    row = {"panel": "4", "bits": 2.5, "quantizer": "", "scheme": "sgd", "run": 0, "ap50": float("nan")}
    row |= {"found": 0.25, "false": 1.0, "top_score": 1e-7}
    tables.write(tmp_path / "t.csv", tables.DETECTION_FIELDS, [row])
    (read,) = tables.read(tmp_path / "t.csv")
    assert np.isnan(read.pop("ap50"))
    assert read == {name: value for name, value in row.items() if name != "ap50"}
    with pytest.raises(ConfigError, match="run the experiments first"):
        tables.read(tmp_path / "absent.csv")


# --------------------------------------------------------------------------------------------- published
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


def test_the_published_report_is_what_the_published_tables_say() -> None:
    text = report.markdown(config.experiments("small"), report.read(RESULTS))
    assert (DOCS / "paper.md").read_text() == text
    assert [path.name for path in (DOCS / "pictures").glob("paper_*")] == [report.PICTURE]


def test_totals_are_those_of_the_table_above_them() -> None:
    text = (DOCS / "paper.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 3]
    verdicts = [row for row in rows if row[0] != "| figure"]
    assert len(verdicts) == len(claims.CLAIMS)
    for column, name in ((2, "L2 scale"), (3, "max norm")):
        (told,) = [line for line in text.splitlines() if line.startswith(f"With the {name}, the verdicts")]
        for word in ("holds", "in part", "does not hold", "too few runs"):
            count = sum(row[column].removesuffix(" |").startswith(word) for row in verdicts)
            assert f" {word} {count}" in told


def test_the_published_tables_stay_small() -> None:
    # One line per scheme, not per run or step: a rerun is a diff that can be read.
    assert sum(len(path.read_text().splitlines()) for path in RESULTS.glob("paper_*.csv")) < 1500
