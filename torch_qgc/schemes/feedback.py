"""Error feedback around any code: workers add to a gradient what earlier payloads of theirs have lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import PlanError
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats

__all__ = ["ErrorFeedback", "FeedbackMemory", "error_feedback"]


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """A plan whose workers keep what their payloads lost: see `error_feedback`."""

    plan: Plan
    contraction: bool
    acknowledged: bool

    def gain(self) -> Floats:
        """[K] factor a on what the quantizer returns: 1 / (1 + q) makes a Q a contraction for any q."""
        q = self.plan.variance
        return 1.0 / (1.0 + q) if self.contraction else np.ones_like(q)

    def moments(self, variance: Floats | None = None) -> tuple[Floats, Floats]:
        """Return mean and second moment of a Q(m_k) in a long run with a constant h_k, in units of h_k.

        With a = gain, e' = m - a Q(m) after a delivery and, if deliveries are acknowledged, e' = m after a miss:

            rho  = P(miss) + P(delivery) (1 - a)            E m = h / (1 - rho)
            phi  = P(miss) + P(delivery) ((1-a)^2 + a^2 q)  E||m||^2 = ||h||^2 (1 + rho) / ((1 - rho) (1 - phi))

        where P(miss) = p_k if acknowledged, else 0. It diverges if phi >= 1: without contraction if q >= 1.

        Args:
            variance: [K] q; None: the plan's, which the gain is made for in any case.
        Returns:
            E a Q(m) / h = a / (1 - rho), and E||a Q(m)||^2 / ||h||^2, inf if it diverges; both [K].
        """
        a, q = self.gain(), self.plan.variance if variance is None else variance
        kept = self.plan.straggle_probs if self.acknowledged else np.zeros_like(q)
        rho = kept + (1.0 - kept) * (1.0 - a)
        with np.errstate(divide="ignore", invalid="ignore"):
            phi = kept + (1.0 - kept) * ((1.0 - a) ** 2 + a**2 * q)
            mean = np.where(rho < 1.0, a / (1.0 - rho), 0.0)
            energy = np.where(phi < 1.0, (1.0 + rho) / ((1.0 - rho) * (1.0 - phi)), np.inf)
            second = np.where(np.isfinite(q), a**2 * (1.0 + q) * energy, np.inf)
        return mean, second


def error_feedback(plan: Plan, *, contraction: bool = True, acknowledged: bool = False) -> ErrorFeedback:
    """Wrap a plan: worker k sends a Q(m), m = h_k + e, and keeps e' = m - a Q(m).

    F. Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; S. P. Karimireddy et al., "Error feedback
    fixes SignSGD", ICML 2019. What rounding loses of a payload is added to later ones. Over many rounds little
    is lost of a gradient that changes slowly; the error of a single round is not smaller.

    Args:
        plan: any plan whose workers send whole gradients.
        contraction: scale Q by 1 / (1 + q); without it memories grow without bound where q >= 1.
        acknowledged: a worker that was late keeps all of m. It then catches up for missed rounds by itself: use a
            decoder of weights m_k ("uncorrected"), not m_k / (1 - p_k).
    Raises:
        PlanError: a plan for slices or parts of the gradient.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan: expected a Plan, got {type(plan).__name__}; wrap a scheme that sends whole gradients")
    return ErrorFeedback(plan=plan, contraction=contraction, acknowledged=acknowledged)


class FeedbackMemory:
    """What one worker's payloads have lost so far. The caller quantizes:

        m = memory.corrected(h);  payload = Q(m);  send gain * payload;  memory.sent(m, gain * payload, delivered)

    Args:
        scheme: the wrapped plan.
        worker: k.
        shape: of its gradients.
    """

    def __init__(self, scheme: ErrorFeedback, worker: int, shape: tuple[int, ...]) -> None:
        self._acknowledged = scheme.acknowledged
        self.gain = float(scheme.gain()[worker])
        self.error: NDArray[Any] = np.zeros(shape)

    def corrected(self, gradient: NDArray[Any]) -> NDArray[Any]:
        """Return the gradient plus what was lost."""
        return np.asarray(gradient + self.error)

    def sent(self, corrected: NDArray[Any], payload: NDArray[Any], delivered: bool) -> None:
        """Remember what `payload` (gain included) leaves of `corrected`."""
        self.error = corrected.copy() if self._acknowledged and not delivered else corrected - payload
