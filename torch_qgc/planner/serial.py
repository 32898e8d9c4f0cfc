"""Plans as text: canonical JSON, so that two ends can compare a digest."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from torch_qgc.errors import PlanError
from torch_qgc.planner.code import dense_if_small

if TYPE_CHECKING:
    from torch_qgc.planner.plan import Plan

__all__ = ["from_json", "to_json"]

_FORMAT = 1


def to_json(plan: Plan) -> str:
    """Return a plan as JSON with sorted keys and no blanks; weights as compressed rows, infinity as null."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    entries: Any = sparse.csr_array(fields.pop("weights"))
    entries.sort_indices()
    values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}
    values["variance"] = [v if math.isfinite(v) else None for v in values["variance"]]
    values["weights"] = {
        "num_partitions": plan.num_partitions,
        "starts": entries.indptr.tolist(),
        "partitions": entries.indices.tolist(),
        "values": entries.data.tolist(),
    }
    values["format"] = _FORMAT
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str | bytes) -> dict[str, Any]:
    """Return the fields of the plan that `to_json` wrote.

    Raises:
        PlanError: not JSON, not a plan, or another format.
    """
    from torch_qgc.planner.plan import Plan

    known = {field.name for field in dataclasses.fields(Plan)}
    try:
        values = json.loads(text)
        version = values.pop("format")
        if version != _FORMAT or set(values) != known:
            raise PlanError(
                f"plan: expected JSON of format {_FORMAT} with fields {sorted(known)}, got format {version} "
                f"with {sorted(values)}; make the plan anew with this version of torch_qgc"
            )
        entries = values.pop("weights")
        weights = sparse.csr_array(
            (entries["values"], entries["partitions"], entries["starts"]),
            shape=(len(values["shares"]), entries["num_partitions"]),
        )
        values["weights"] = dense_if_small(weights)
        values["variance"] = [math.inf if v is None else v for v in values["variance"]]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"plan: expected JSON written by Plan.to_json, got {error!r}") from error
    return dict(values)
