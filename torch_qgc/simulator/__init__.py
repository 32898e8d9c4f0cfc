"""Training under a scheme in one process: real plans, the real codec and the job's own rules on a virtual clock.

    traces = simulate(model, loss, dataset, {"ours": plan}, delays=delays, deadline_s=2.0, steps=500, lr=0.1)

docs/simulator.md says what is simulated and what is not.
"""

from torch_qgc.simulator.experiment import IDEAL, Experiment
from torch_qgc.simulator.machines import Change, Machines
from torch_qgc.simulator.noise import noise_ratio
from torch_qgc.simulator.simulate import run_experiment, simulate
from torch_qgc.simulator.task import Task
from torch_qgc.simulator.trace import Trace, load_traces, save_traces

__all__ = [
    "IDEAL",
    "Change",
    "Experiment",
    "Machines",
    "Task",
    "Trace",
    "load_traces",
    "noise_ratio",
    "run_experiment",
    "save_traces",
    "simulate",
]
