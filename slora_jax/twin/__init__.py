"""The twin: the engine's scheduler and page pool against a model of the device's time. No jax."""

from slora_jax.twin.cost import Ceilings, CostModel, StepWork, ideal_cost
from slora_jax.twin.metrics import Record, summarise
from slora_jax.twin.simulator import Simulation, SimulationResult, simulate

__all__ = [
    "Ceilings",
    "CostModel",
    "Record",
    "Simulation",
    "SimulationResult",
    "StepWork",
    "ideal_cost",
    "simulate",
    "summarise",
]
