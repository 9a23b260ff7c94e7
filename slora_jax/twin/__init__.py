"""The twin: the engine's scheduler and page pool against a model of the device's time. No jax."""

from slora_jax.twin.calibrate import Calibration, calibrate, fit_cost
from slora_jax.twin.cost import Ceilings, CostModel, StepWork, ideal_cost, step_work
from slora_jax.twin.metrics import Record, summarise
from slora_jax.twin.simulator import Simulation, SimulationResult, simulate
from slora_jax.twin.steps import StepLog

__all__ = [
    "Calibration",
    "Ceilings",
    "CostModel",
    "Record",
    "Simulation",
    "SimulationResult",
    "StepLog",
    "StepWork",
    "calibrate",
    "fit_cost",
    "ideal_cost",
    "simulate",
    "step_work",
    "summarise",
]
