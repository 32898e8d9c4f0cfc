"""Coded optimizers are torch's own, with a second track in Adam's denominator."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch._dynamo.testing import CompileCounterWithBackend

from torch_qgc.ddp.optim import CodedAdam, CodedAdamW, CodedSGD, _unhooked, two_track_adam
from torch_qgc.ddp.state import QGCState
from torch_qgc.errors import ConfigError


class FakeReplica:
    """A replica as far as optimizers can see; the second track is made by `second` from the gradient."""

    def __init__(self, second: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        self.second = second
        self.watched: list[Any] = []
        self.statement = SimpleNamespace(watch=self.watched.append)
        self.plan = SimpleNamespace(second_track=None if second is None else "hajek")
        self.layout = Everything()

    def second_scale(self, parameter: torch.Tensor) -> float | torch.Tensor:
        if self.second is None:
            return 1.0
        gradient = parameter.grad
        assert gradient is not None
        ratio = self.second(gradient) / gradient
        return torch.where(ratio.isfinite(), ratio, 1.0)


class Everything:
    def __contains__(self, parameter: object) -> bool:
        return True


class State(QGCState):
    """A QGCState as far as optimizers can see."""

    def __init__(self, second: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.replica = FakeReplica(second)  # type: ignore[assignment]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (1,), (700,), (4, 3, 2, 2)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    params[3].data = params[3].data.contiguous(memory_format=torch.channels_last)
    return params


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator) + 0.1 * p.detach())
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def second_of(gradient: torch.Tensor) -> torch.Tensor:
    """Some other gradient, contiguous as decoded tracks are."""
    return (0.6 * gradient + 0.1 * gradient.sign()).contiguous()


def naive_two_track_adam(options: dict[str, Any], steps: int = 20) -> torch.Tensor:
    """Song & Choi section V-E with torch's options, in float64 and one parameter at a time."""
    o = dict(
        dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False, decoupled=False),
        **options,
    )
    (b1, b2), sign = o["betas"], -1.0 if o["maximize"] else 1.0
    params = [p.detach().double() for p in parameters()]
    m = [torch.zeros_like(p) for p in params]
    v, largest = copy.deepcopy(m), copy.deepcopy(m)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, steps + 1):
        for i, p in enumerate(params):
            noise = torch.randn(p.shape, generator=generator).double()
            first = noise + 0.1 * p
            g1, g2 = sign * first, sign * second_of(first)
            if o["decoupled"]:
                p *= 1 - o["lr"] * o["weight_decay"]
            else:
                g1, g2 = g1 + o["weight_decay"] * p, g2 + o["weight_decay"] * p
            m[i] = b1 * m[i] + (1 - b1) * g1
            v[i] = b2 * v[i] + (1 - b2) * g2**2
            largest[i] = torch.maximum(largest[i], v[i])
            used = largest[i] if o["amsgrad"] else v[i]
            p -= o["lr"] / (1 - b1**t) * m[i] / ((used / (1 - b2**t)).sqrt() + o["eps"])
    return torch.cat([p.flatten() for p in params])


ADAM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "eps": 1e-3},  # g2 + 0.1 p may cancel: an eps that such a denominator does not feel
    {"amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-3},
    {"maximize": True, "lr": 0.1},
    {"foreach": False, "weight_decay": 0.1, "eps": 1e-3},
    {"foreach": True, "maximize": True, "weight_decay": 0.1, "eps": 1e-3},
    {"fused": True, "amsgrad": True},
    {"lr": torch.tensor(0.01)},
    {"betas": (2**-20, 0.9)},
]
BOTH_ADAMS = pytest.mark.parametrize(
    ("ours", "theirs"), [(CodedAdam, torch.optim.Adam), (CodedAdamW, torch.optim.AdamW)]
)


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
@BOTH_ADAMS
def test_two_tracks_follow_the_paper_under_every_option(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    params = parameters()
    result = train(ours(params, State(second_of), **options), params)
    oracle = {name: value for name, value in options.items() if name not in ("foreach", "fused")}
    oracle["lr"] = float(options.get("lr", 1e-3))
    if ours is CodedAdamW:
        oracle = {"weight_decay": 1e-2, **oracle, "decoupled": True}
    # 20 steps in fp32 against float64; a step is at most about lr, and rounds at 1e-7 of the parameter.
    torch.testing.assert_close(
        result.double(), naive_two_track_adam(oracle), rtol=5e-5, atol=2e-2 * oracle["lr"] ** 1.5
    )


@pytest.mark.parametrize("second", [None, torch.clone], ids=["one track", "two equal tracks"])
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
@BOTH_ADAMS
def test_with_one_track_or_two_equal_ones_coded_adam_is_torchs_bit_for_bit(
    ours: Any, theirs: Any, options: dict[str, Any], second: Any
) -> None:
    mine, reference = parameters(), parameters()
    result = train(ours(mine, State(second), **options), mine)
    assert torch.equal(result, train(theirs(reference, **options), reference))


@pytest.mark.parametrize("options", [{"betas": (0.0, 0.9)}, {"differentiable": True}], ids=str)
def test_one_track_takes_what_torch_takes(options: dict[str, Any]) -> None:
    mine, reference = parameters(), parameters()
    for params in (mine, reference):
        for p in params:
            p.requires_grad_(not options.get("differentiable"))  # torch steps leaves in place only then
    result = train(CodedAdam(mine, State(), **options), mine)
    assert torch.equal(result, train(torch.optim.Adam(reference, **options), reference))


@pytest.mark.parametrize("options", [{"betas": (0.0, 0.9)}, {"differentiable": True}], ids=str)
def test_what_two_tracks_cannot_do_is_refused_with_the_remedy(options: dict[str, Any]) -> None:
    params = parameters()
    with pytest.raises(ConfigError, match=r"betas=\(2\*\*-20, ...\).*second_track=None"):
        train(CodedAdam(params, State(second_of), **options), params)


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}, {"maximize": True}], ids=str)
def test_coded_sgd_is_torchs_bit_for_bit(options: dict[str, Any]) -> None:
    mine, reference = parameters(), parameters()
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, **options)
    result = train(CodedSGD(mine, State(), **options), mine)
    assert torch.equal(result, train(torch.optim.SGD(reference, **options), reference))


def test_a_uniformly_shrunk_second_track_is_a_larger_learning_rate() -> None:
    """g2 = c g1 scales v by c^2: Adam with lr / c and eps / c, bias correction included (docs/planner.md)."""
    mine, reference, c = parameters(), parameters(), 0.5
    result = train(CodedAdam(mine, State(lambda g: c * g), lr=1e-3, eps=1e-4), mine)
    expected = train(torch.optim.Adam(reference, lr=1e-3 / c, eps=1e-4 / c), reference)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6)


def test_the_function_works_on_torchs_own_adam_and_leaves_gradients_and_tracks_alone() -> None:
    mine, reference = parameters(), parameters()
    ours = CodedAdam(mine, State(second_of), lr=0.01)
    plain = torch.optim.Adam(reference, lr=0.01)
    for p, q in zip(mine, reference):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    tracks = {q: torch.full(q.shape, 0.7) for q in reference}
    ours._replica.second = lambda g: torch.full(g.shape, 0.7)  # type: ignore[union-attr]
    gradients = [q.grad for q in reference]
    two_track_adam(plain, tracks)
    ours.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, reference))
    assert all(q.grad is g and torch.equal(g, torch.ones_like(g)) for q, g in zip(reference, gradients))
    assert all(torch.equal(track, torch.full_like(track, 0.7)) for track in tracks.values())


def test_parameters_without_gradient_are_left_alone() -> None:
    params = parameters()
    before = params[1].detach().clone()
    optimizer = CodedAdam([{"params": params[:2]}, {"params": params[2:]}], State(second_of))
    for p in (params[0], params[2]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert set(optimizer.state) == {params[0], params[2]}


MAKERS = [
    (CodedSGD, torch.optim.SGD, {"momentum": 0.9}),
    (CodedAdam, torch.optim.Adam, {}),
    (CodedAdamW, torch.optim.AdamW, {"amsgrad": True}),
]
EACH = pytest.mark.parametrize(("ours", "theirs", "options"), MAKERS)


@EACH
def test_they_are_real_optimizers(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    params, state = parameters(), State(second_of)
    optimizer = ours([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], state, 0.1, **options)
    assert state.replica.watched == [optimizer]
    assert isinstance(optimizer, theirs)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(optimizer, params, steps=2)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.05]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.3})
    assert optimizer.param_groups[-1]["lr"] == 0.3


@EACH
def test_step_hooks_run_once_per_step_and_closures_once(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    theirs(parameters(), lr=0.1)  # makes torch wrap its own class's step in hooks, too
    assert not hasattr(_unhooked(theirs.step), "hooked")
    params = parameters()
    optimizer = ours(params, State(second_of), lr=0.1, **options)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> torch.Tensor:
        calls.append("closure")
        loss = torch.stack([p.square().sum() for p in params]).sum()
        assert loss.requires_grad
        return loss.detach()

    for p in params:
        p.grad = torch.zeros_like(p)
    loss = optimizer.step(closure)
    assert calls == ["pre", "closure", "post"]
    assert float(loss) > 0


@EACH
@pytest.mark.parametrize("second", [None, torch.clone], ids=["one track", "two tracks"])
def test_state_dicts_go_both_ways_between_torchs_optimizer_and_ours(
    ours: Any, theirs: Any, options: dict[str, Any], second: Any
) -> None:
    """Three steps with one, three with the other, back again: as nine with torch's."""
    params, reference = parameters(), parameters()
    expected_optimizer = theirs(reference, lr=0.01, **options)
    for _ in range(3):
        expected = train(expected_optimizer, reference, 3)
    saved: dict[str, Any] = {}
    for make in (ours, theirs, ours):
        arguments = (params, State(second)) if make is ours else (params,)
        optimizer = make(*arguments, lr=0.5, **options)
        if saved:
            optimizer.load_state_dict(saved)
        result = train(optimizer, params, 3) if saved else train(_at(optimizer, 0.01), params, 3)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    assert torch.equal(result, expected)


def _at(optimizer: torch.optim.Optimizer, lr: float) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_are_torchs_optimizers_on_their_own_parameters(
    ours: Any, theirs: Any, options: dict[str, Any], copied: Any
) -> None:
    params, reference = parameters(), parameters()
    optimizer = ours(params, State(torch.clone), lr=0.01, **options)
    train(optimizer, params, 2)
    copy_of = copied(optimizer)
    own = [p for group in copy_of.param_groups for p in group["params"]]
    expected_optimizer = theirs(reference, lr=0.01, **options)
    train(expected_optimizer, reference, 2)
    assert torch.equal(train(copy_of, own, 3), train(expected_optimizer, reference, 3))
    assert copy_of._replica is None
    assert optimizer._replica is not None


@pytest.mark.parametrize(
    ("ours", "theirs", "second", "options"),
    [
        (CodedSGD, torch.optim.SGD, None, {"momentum": 0.9}),
        (CodedAdam, torch.optim.Adam, None, {}),
        (CodedAdamW, torch.optim.AdamW, second_of, {"amsgrad": True}),
    ],
)
def test_the_step_compiles_into_as_many_graphs_as_torchs(
    ours: Any, theirs: Any, second: Any, options: dict[str, Any]
) -> None:
    # In a process of its own: after a compiled step autograd no longer works in forked processes, which tests are.
    run_ranks(compiled_steps, ours, theirs, second, options, ranks=1)


def compiled_steps(rank: int, ours: Any, theirs: Any, second: Any, options: dict[str, Any]) -> None:
    results, graphs = [], []
    for compiled in (ours, theirs, None):
        torch.compiler.reset()
        params, counter = parameters(), CompileCounterWithBackend("aot_eager")
        optimizer = (theirs if compiled is theirs else ours)(
            params, *([] if compiled is theirs else [State(second)]), lr=0.01, **options
        )
        if compiled is not None:
            optimizer.step = torch.compile(optimizer.step, backend=counter)
        results.append(train(optimizer, params, 6))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0
    # Compiled optimizers keep the step count in a tensor and round the bias correction differently.
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", [None, torch.clone], ids=["one track", "two tracks"])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_what_is_not_finite_and_unscales_the_rest(fused: bool, second: Any) -> None:
    mine, reference = parameters(), parameters()
    pairs: list[tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]] = [
        (CodedAdam(mine, State(second), lr=0.01, fused=fused), mine),
        (torch.optim.Adam(reference, lr=0.01, fused=fused), reference),
    ]
    scales = []
    for optimizer, params in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for step in range(6):
            scaler.scale(torch.ones(1))
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 8.0 * (i + step)) if step != 3 else torch.full_like(p, torch.inf)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    if second is None or not fused:
        assert all(torch.equal(p, q) for p, q in zip(mine, reference))
    else:  # torch's fused step unscales inside the kernel, ours before it
        for p, q in zip(mine, reference):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ours", [CodedSGD, CodedAdam, CodedAdamW])
def test_an_optimizer_without_the_state_says_what_is_missing(ours: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected the QGCState as second argument, got 0\.001"):
        ours(parameters(), 1e-3)


def test_clipping_in_the_loop_clips_both_moments() -> None:
    """What Adam squares follows `.grad` as it stands: clipped by 10, both moments are those of a tenth."""
    params, reference = parameters(), parameters()
    ours = CodedAdam(params, State(lambda g: 0.5 * g), lr=0.01, eps=1e-12)
    theirs = CodedAdam(reference, State(lambda g: 0.5 * g), lr=0.01, eps=1e-12)
    for p, q in zip(params, reference):
        p.grad = torch.ones_like(p)
        q.grad = torch.full_like(q, 0.1)
    torch.nn.utils.clip_grad_value_(params, 0.1)
    ours.step()
    theirs.step()
    for p, q in zip(params, reference):
        assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])
        assert torch.equal(p, q)
