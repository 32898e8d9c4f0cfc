"""Gradient codes of the literature, each as a plan, and one function that compares them: docs/planner.md."""

from torch_qgc.schemes.blocks import BlockPlan, block_coordinate
from torch_qgc.schemes.designed import osgc, qgc
from torch_qgc.schemes.error import RoundError, Scheme, residual, round_error
from torch_qgc.schemes.exact import cyclic, cyclic_mds, fractional_repetition, ye_abbe
from torch_qgc.schemes.feedback import ErrorFeedback, FeedbackMemory, error_feedback
from torch_qgc.schemes.graphs import expander, optimal_decoding
from torch_qgc.schemes.parts import PartPlan
from torch_qgc.schemes.replication import bgc, erasurehead, is_sgd, one_bit_sgc, sgc

__all__ = [
    "BlockPlan",
    "ErrorFeedback",
    "FeedbackMemory",
    "PartPlan",
    "RoundError",
    "Scheme",
    "bgc",
    "block_coordinate",
    "cyclic",
    "cyclic_mds",
    "erasurehead",
    "error_feedback",
    "expander",
    "fractional_repetition",
    "is_sgd",
    "one_bit_sgc",
    "optimal_decoding",
    "osgc",
    "qgc",
    "residual",
    "round_error",
    "sgc",
    "ye_abbe",
]
