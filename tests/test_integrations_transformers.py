"""Hugging Face's Trainer on real processes, one rank late by an event: its own loop, thin batches, equal replicas."""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import aggregators, run_ranks

import torch_qgc as qgc

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from torch_qgc.integrations.transformers import QGCCallback, make_coded_inside  # noqa: E402

RANKS, LATE, LATE_AT = 3, 1, 4
BATCH, LENGTH = 4, 8


def as_under_torchrun(rank: int) -> None:
    """Let accelerate find its processes started, and be quiet."""
    ranks = str(dist.get_world_size())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    transformers.logging.set_verbosity_error()


def language_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2))


def texts(samples: int) -> list[dict[str, torch.Tensor]]:
    """Counting modulo 32, from random numbers on; some end in padding."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for start in torch.randint(32, (samples,), generator=generator):
        ids = (start + torch.arange(LENGTH)) % 32
        labels = ids.clone()
        labels[LENGTH - int(start) % 3 :] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


class Watch(TrainerCallback):
    """Note what every rank must agree on after each step; on the late rank, wait until others have closed two steps."""

    def __init__(self, rank: int, coded: QGCCallback, trainer: Trainer) -> None:
        self.rank, self.coded, self.trainer = rank, coded, trainer
        self.agreed: list[Any] = []
        self.sizes: list[int] = []
        step = trainer.training_step

        def noting(model: Any, inputs: Any, *args: Any) -> Any:
            self.sizes.append(len(inputs["input_ids"]))
            return step(model, inputs, *args)

        trainer.training_step = noting

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        replica = self.coded.state.replica
        if self.rank == LATE and replica.step == LATE_AT:
            give_up = time.monotonic() + 20
            while not replica.joined()[0].closed(LATE_AT + 2) and time.monotonic() < give_up:
                time.sleep(0.02)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lr = self.trainer.optimizer.param_groups[0]["lr"]
        self.agreed.append((state.global_step, lr, self.coded.state.replica.layout.parameter_digest()))


def trainer_for(rank: int, folder: str, *, model: Any = None, **options: Any) -> Trainer:
    as_under_torchrun(rank)
    arguments = {
        "output_dir": folder,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "average_tokens_across_devices": False,
        "logging_steps": 7,
        "save_strategy": "no",
        "seed": 3,
    }
    return Trainer(
        model or language_model(),
        TrainingArguments(**{**arguments, **options}),
        train_dataset=texts(8 * BATCH * RANKS),
        eval_dataset=texts(20),
    )


def job(rank: int, endpoint: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    coded_options = {"deadline_s": options.pop("deadline_s", 0.1), "late": options.pop("late", "fold")}
    callbacks = [EarlyStoppingCallback(options.pop("patience"))] if "patience" in options else []
    calls = options.pop("calls", 1)
    trainer = trainer_for(rank, folder, **options)
    coded = QGCCallback(trainer, network=qgc.Network(endpoints=(endpoint,)), verify_every=4, **coded_options)
    trainer.add_callback(coded)
    for callback in callbacks:
        trainer.add_callback(callback)
    watch = Watch(rank, coded, trainer)
    trainer.add_callback(watch)
    for _ in range(calls):
        trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    coded.close()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "agreed": (watch.agreed, evaluated, logged, trainer.state.global_step),
        "sizes": watch.sizes,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "report": coded.state.report(),
        "step": coded.state.step,
    }


# Name: options, and the steps that all have made.
CASES: dict[str, Any] = {
    "as it comes": ({}, 16),
    "accumulating, an epoch that does not divide": (
        {"gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "num_train_epochs": 4},
        12,
    ),
    "evaluating, saving, the best model at the end": (
        {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 7, "save_steps": 7, "max_steps": 12}
        | {"load_best_model_at_end": True, "save_total_limit": 1},
        12,
    ),
    "stopping early": (
        {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 7, "save_steps": 7, "patience": 1}
        | {"metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True}
        | {"num_train_epochs": 4},
        14,
    ),
    "dropping what is late, another optimizer": ({"late": "drop", "optim": "adagrad"}, 16),
    "two calls of train": ({"calls": 2, "max_steps": 8}, 16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_late_rank_makes_thin_steps_and_ends_as_all_do(case: str, tmp_path: Path) -> None:
    options, steps = CASES[case]
    with aggregators(1) as endpoints:
        ranks = run_ranks(job, endpoints[0], str(tmp_path), options, ranks=RANKS, timeout_s=90)
    for found in ranks:
        assert found["agreed"] == ranks[0]["agreed"]
        assert found["step"] == steps
        assert len(found["agreed"][0]) == steps
        assert found["optimizer"] == ("Adagrad" if "optim" in options else "CodedAdamW")
        assert not found["report"].rejections
    assert ranks[LATE]["report"].thin_steps >= 1
    assert set(ranks[LATE]["sizes"]) == {2, BATCH}
    assert ranks[0]["agreed"][2][-1] < 3.4  # a model that has learnt nothing: log 32 = 3.47


def resumed_job(rank: int, first: str, second: str, folder: str) -> Any:
    found = []
    for endpoint, resumed in ((first, None), (second, f"{folder}/checkpoint-5")):
        trainer = trainer_for(rank, folder, max_steps=8, save_strategy="steps", save_steps=5)
        coded = QGCCallback(trainer, network=qgc.Network(endpoints=(endpoint,)), deadline_s=None)
        trainer.add_callback(coded)
        trainer.train(resume_from_checkpoint=resumed)
        coded.close()
        found.append((coded.state.step, coded.state.report().steps, coded.state.replica.layout.parameter_digest()))
    return found


def test_a_resumed_trainer_makes_the_very_steps_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    with aggregators(2) as endpoints:
        ranks = run_ranks(resumed_job, *endpoints, str(tmp_path), ranks=2, timeout_s=90)
    assert ranks[0] == ranks[1]
    (step, made, whole), (resumed_step, resumed_made, resumed) = ranks[0]
    assert (step, made, resumed_step, resumed_made) == (8, 8, 8, 3)
    assert whole == resumed


def refused_job(rank: int, folder: str) -> dict[str, str]:
    said = {}
    for name, options in {
        "unused": {"ddp_find_unused_parameters": None},
        "tokens seen": {"include_num_input_tokens_seen": "all"},
        "compiled": {"torch_compile": True},
    }.items():
        try:
            QGCCallback(trainer_for(rank, folder, **options), deadline_s=0.1)
        except qgc.ConfigError as error:
            said[name] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_for(rank, folder, average_tokens_across_devices=True)
        QGCCallback(trainer, deadline_s=0.1)
    said["tokens"] = " ".join(str(w.message) for w in caught)
    said["off"] = str(trainer.args.average_tokens_across_devices)
    kept = trainer_for(rank, folder, average_tokens_across_devices=True)
    QGCCallback(kept, deadline_s=None)
    said["kept"] = str(kept.args.average_tokens_across_devices)
    return said


def test_what_would_wait_in_each_step_is_refused_or_switched_off(tmp_path: Path) -> None:
    for said in run_ranks(refused_job, str(tmp_path), ranks=2):
        assert "ddp_find_unused_parameters=False" in said["unused"]
        assert "leave it out, or deadline_s=None" in said["tokens seen"]
        assert "torch_compile" in said["compiled"]
        assert "average_tokens_across_devices" in said["tokens"]
        assert (said["off"], said["kept"]) == ("False", "True")


def scaled_job(rank: int, endpoint: str) -> dict[str, Any]:
    """accelerate swaps the optimizer's step to and fro where there is a scaler; the coded step has to stay in place."""
    as_under_torchrun(rank)
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    state = qgc.attach(model, network=qgc.Network(endpoints=(endpoint,)))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = AcceleratedOptimizer(inner, scaler=state.scaler)
    make_coded_inside(optimizer, state)
    coded, found = [], []
    plain = qgc.CodedAdamW._second_tracks

    def noting(self: Any) -> Any:
        coded.append(state.step)
        return plain(self)

    qgc.CodedAdamW._second_tracks = noting
    for step in range(4):
        loss = model(torch.ones(2, 4)).square().sum() * (torch.inf if step == 2 else 1.0)
        state.scaler.scale(loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(optimizer.step_was_skipped)
    state.close()
    return {"class": type(inner).__name__, "coded": coded, "skipped": found}


def test_a_coded_optimizer_inside_of_accelerates_wrapper_keeps_its_step_and_notices_overflows() -> None:
    with aggregators(1) as endpoints:
        ranks = run_ranks(scaled_job, endpoints[0], ranks=2)
    for found in ranks:
        assert found == {"class": "CodedAdamW", "coded": [1, 2, 4], "skipped": [False, False, True, False]}


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_qgc.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"torch_qgc\[transformers\]"):
        importlib.import_module("torch_qgc.integrations.transformers")
