"""Plans as text: canonical JSON, so that two ends can compare a digest."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from scipy import sparse

from torch_qgc.errors import PlanError
from torch_qgc.planner.fields import PlanFields
from torch_qgc.planner.shares import Weights, dense_if_small

__all__ = ["from_json", "to_json"]

Built = TypeVar("Built", bound=PlanFields)

_FORMAT = 3
_MOST_COLUMNS = 1 << 24  # far more than any job has: a plan from the network must not make us allocate without bound


def to_json(plan: PlanFields) -> str:
    """Return a plan as JSON with sorted keys and no blanks; weights as compressed rows, infinity as null."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    entries: Any = sparse.csr_array(fields.pop("weights"))
    entries.sort_indices()
    values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}
    values["variance"] = [v if math.isfinite(v) else None for v in values["variance"]]
    values["weights"] = {
        "columns": int(plan.weights.shape[1]),
        "starts": entries.indptr.tolist(),
        "partitions": entries.indices.tolist(),
        "values": entries.data.tolist(),
    }
    values["format"] = _FORMAT
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str | bytes, build: Callable[..., Built]) -> Built:
    """Build the plan that `to_json` wrote. It may come from the network: whatever is wrong is a PlanError.

    Args:
        build: the plan's type, called with its fields as keywords.
    Raises:
        PlanError: not JSON, not a plan, another format, or a plan that does not hold together.
    """
    known = {field.name for field in dataclasses.fields(PlanFields)}
    try:
        values = json.loads(text)
        version = values.pop("format")
        if version != _FORMAT or set(values) != known:
            raise PlanError(
                f"plan: expected JSON of format {_FORMAT} with fields {sorted(known)}, got format {version} "
                f"with {sorted(values)}; make the plan anew with this version of torch_qgc"
            )
        values["weights"] = _weights(len(values["shares"]), **values["weights"])
        values["variance"] = [math.inf if v is None else v for v in values["variance"]]
        return build(**values)
    except PlanError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PlanError(f"plan: expected JSON written by Plan.to_json, got {error!r}") from error


def _weights(rows: int, *, columns: int, starts: list[int], partitions: list[int], values: list[float]) -> Weights:
    """Return weights from compressed rows. Plans come over the network: nothing may be out of bounds."""
    if not 0 < columns <= _MOST_COLUMNS:
        raise PlanError(f"plan: expected 1 .. {_MOST_COLUMNS} columns of weights, got {columns}; use fewer partitions")
    indices = [np.array(list_, dtype=np.int64) for list_ in (starts, partitions)]
    weights = sparse.csr_array((np.array(values, dtype=np.float64), indices[1], indices[0]), shape=(rows, columns))
    weights.check_format(full_check=True)
    return dense_if_small(weights)
