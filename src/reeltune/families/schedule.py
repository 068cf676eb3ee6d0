"""The noise schedule that a checkpoint's own scheduler_config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reeltune.core.errors import refuse
from reeltune.diffusion.objective import Ddpm, Flow, Objective
from reeltune.families import configs

DDPM = ("DDIMScheduler", "DDPMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
DDPM_VALUES = {
    "prediction_type": ("epsilon", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear"),
    "trained_betas": (None,),
}
FLOW = "FlowMatchEulerDiscreteScheduler"
MOST_STEPS, MOST_SHIFT = 100_000, 1000  # a hundred times the released ones
TYPES = {
    "num_train_timesteps": int,
    "shift": float,
    "use_dynamic_shifting": bool,
    "prediction_type": str,
    "beta_schedule": str,
    "beta_start": float,
    "beta_end": float,
    "rescale_betas_zero_snr": bool,
}


def read(folder: Path, *, shift: float = 1.0) -> Objective:
    """The objective that a checkpoint's schedule says. shift: of a flow schedule whose file names none.

    A shift that depends on the size, and CogVideoX's snr_shift_scale, are of sampling; training does not apply them
    (measured on the reference, 2026-11). Raises UserError for a file that is not there, or a schedule not known.
    """
    said = configs.read_config(folder, "scheduler_config.json")
    steps = checked(said, str(folder / "scheduler_config.json")).get("num_train_timesteps", 1000)
    if said.get("_class_name") == FLOW:
        return Flow(shift=1.0 if said.get("use_dynamic_shifting") else float(said.get("shift", shift)), steps=steps)
    known = {"_class_name": (FLOW, *DDPM), **DDPM_VALUES}
    refuse(
        str(folder / "scheduler_config.json"),
        [
            f"{name} is {said.get(name)!r}; known are {', '.join(map(str, values))}"
            for name, values in known.items()
            if (name in said or name == "_class_name") and said.get(name) not in values
        ],
    )
    return Ddpm(
        prediction_type=said.get("prediction_type", "epsilon"),
        beta_start=said.get("beta_start", 0.0001),  # these three left out: what diffusers' classes take
        beta_end=said.get("beta_end", 0.02),
        beta_schedule=said.get("beta_schedule", "linear"),
        rescale_betas_zero_snr=said.get("rescale_betas_zero_snr", False),
        steps=steps,
    )


def checked(said: dict[str, Any], where: str) -> dict[str, Any]:
    """A schedule's values as they are. Raises UserError for those of another type, and for numbers that are no
    schedule's."""
    configs.check_types(said, TYPES, where)
    steps, shift = said.get("num_train_timesteps", 1000), said.get("shift", 1.0)
    start, end = said.get("beta_start", 0.0001), said.get("beta_end", 0.02)
    problems = []
    if not 1 <= steps <= MOST_STEPS:
        problems.append(f"num_train_timesteps is {steps}; expected 1 to {MOST_STEPS}")
    if not 0 < shift <= MOST_SHIFT:
        problems.append(f"shift is {shift:g}; expected more than 0, and at most {MOST_SHIFT}")
    if not 0 < start <= end < 1:
        problems.append(f"beta_start and beta_end are {start:g} and {end:g}; expected 0 < start <= end < 1")
    refuse(where, problems)
    return said
