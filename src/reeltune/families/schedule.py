"""The noise schedule that a checkpoint's own scheduler_config.json names."""

from __future__ import annotations

from pathlib import Path

from reeltune.core.errors import refuse
from reeltune.diffusion.objective import Ddpm, Flow, Objective
from reeltune.families import weights

DDPM = ("DDIMScheduler", "DDPMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
DDPM_VALUES = {
    "prediction_type": ("epsilon", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear"),
    "trained_betas": (None,),
}
FLOW = "FlowMatchEulerDiscreteScheduler"


def read(folder: Path, *, shift: float = 1.0) -> Objective:
    """shift: of a flow schedule whose file names none.

    A shift that depends on the size, and CogVideoX's snr_shift_scale, are of sampling; training does not apply them
    (measured on the reference, 2026-11). Raises UserError for a file that is not there, or a schedule not known.
    """
    said = weights.read_config(folder, "scheduler_config.json")
    steps = int(said.get("num_train_timesteps", 1000))
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
