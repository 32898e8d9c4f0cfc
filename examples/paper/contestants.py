"""Who takes part: every scheme by the name the config uses, its label, and how its plan is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from paper.config import Panel, Quantizer
from torch_qgc import schemes
from torch_qgc.errors import ConfigError
from torch_qgc.schemes import Scheme

IDEAL = "sgd"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A scheme with its parameters.

    Fields:
        label: what figures and tables call it.
        make: of torch_qgc.schemes.
        options: keywords for it.
        designed: planned for the quantizer at hand, and told its noise.
        noise_aware: told the batch noise, too.
        two_track: takes the panel's `alpha` in training with Adam.
        feedback: None, or keywords of `schemes.error_feedback`.
    """

    label: str
    make: Callable[..., Scheme]
    options: dict[str, Any]
    designed: bool = False
    noise_aware: bool = False
    two_track: bool = True
    feedback: dict[str, bool] | None = None

    def plan(self, straggle_probs: ArrayLike, panel: Panel, quantizer: Quantizer, bits: float, seed: int) -> Scheme:
        """Return the scheme for these workers at `bits` per coordinate and worker on average."""
        options: dict[str, Any] = {"norm": quantizer, **self.options}
        if self.designed:
            # The paper plans with its bound D / (4 L^2); with our quantizer, and with batch noise, we plan with what
            # gradients usually show.
            options.setdefault("variance", "paper" if quantizer == "l2" and not self.noise_aware else "typical")
            if self.noise_aware:
                options.setdefault("noise_ratio", panel.noise_ratio)
            if panel.optimizer == "adam" and self.two_track:
                options.setdefault("second_track", "ridge")
                options["second_track_alpha"] = panel.alpha
        made = self.make(straggle_probs, bits_per_coordinate=bits, seed=seed, **options)
        return made if self.feedback is None else schemes.error_feedback(made, **self.feedback)


def _plain(label: str, make: Callable[..., Scheme], **options: Any) -> Contestant:
    return Contestant(label=label, make=make, options=options)


def _ours(label: str, **changes: Any) -> Contestant:
    fields = {name: changes.pop(name) for name in ("noise_aware", "two_track") if name in changes}
    return Contestant(label=label, make=schemes.qgc, options=changes, designed=True, **fields)


_CODES = {
    # Decoders as in docs/planner.md; where the paper leaves one open, the scheme's own authors' choice.
    "is_sgd": _plain("IS-SGD", schemes.is_sgd),
    "bgc": _plain("BGC", schemes.bgc),
    "erasurehead": _plain("EHD", schemes.erasurehead),
    "sgc": _plain("SGC", schemes.sgc),
    "one_bit_sgc": _plain("1-bit SGC", schemes.one_bit_sgc),
    "od": _plain("OD", schemes.optimal_decoding),
    "osgc": _plain("OSGC", schemes.osgc),
    "fractional_repetition": _plain("exact GC, groups", schemes.fractional_repetition),
    "cyclic_mds": _plain("exact GC, cyclic MDS", schemes.cyclic_mds),
}
_OURS = {
    "qgc": _ours("proposed"),
    "qgc_noise": _ours("proposed, noise-aware", noise_aware=True),
    # What simulator.noise_ratio says of the MLP at 8 samples after 30 rounds of SGD; 5 after 10 rounds, 22 after 99.
    "qgc_noise_9": _ours("proposed, noise-aware, eta = 9", noise_aware=True, noise_ratio=9.0),
    "qgc_equal_bits": _ours("proposed, equal bits", allocator="equal"),
    "qgc_one_track": _ours("proposed, one track", two_track=False),
    "qgc_lmmse": _ours("proposed, second track by LMMSE", second_track="lmmse"),
}


def _with_feedback(name: str, contraction: bool) -> Contestant:
    plain = _CODES[name]
    label = f"EF-{plain.label}" + (", scaled" if contraction else "")
    return Contestant(label=label, make=plain.make, options=plain.options, feedback={"contraction": contraction})


#: ef_: what is lost is added to the next gradient as it is; efc_: the quantizer is scaled to be a contraction first.
CONTESTANTS: dict[str, Contestant] = {
    **_CODES,
    **_OURS,
    **{f"ef_{name}": _with_feedback(name, contraction=False) for name in _CODES},
    **{f"efc_{name}": _with_feedback(name, contraction=True) for name in _CODES},
}


def label(name: str) -> str:
    """Return what figures and tables call a contestant."""
    return "ideal" if name == IDEAL else contestant(name).label


def contestant(name: str) -> Contestant:
    """Return a contestant by name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in CONTESTANTS:
        raise ConfigError(f"contestants: expected {IDEAL!r} or one of {', '.join(CONTESTANTS)}, got {name!r}")
    return CONTESTANTS[name]
