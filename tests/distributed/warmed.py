"""Made once by the process that all forks come from: what a process's first run makes and its later ones find."""

from contextlib import suppress

import numpy as np
from PIL import Image

from reeltune.distributed.zero import Zero
from reeltune.families.easyanimate import keys as easyanimate
from reeltune.families.wan_fun import keys as wan

SMALL = 1e5  # elements; https://www.deepspeed.ai/docs/config-json/, stage3_param_persistence_threshold
Image.init()  # imports what reads each format
np.unique([0])  # imports masked arrays
easyanimate.from_released({}, {})  # as the others, compiles the patterns of its names
easyanimate.to_released({}, {})
for renamed in (
    *(wan.from_released, wan.to_released, wan.vae_from_released),
    *(wan.text_from_released, wan.image_from_released),
):
    renamed({})


def keep_small_weights(self, net, optimizer, config, start=Zero.__init__):
    """ZeRO-3 lets none go that is smaller than a threshold, 1e5; but after each module it looks through all later ones
    for what is used again, a fifth of a step of HunyuanVideo's many (measured, 2026-11-27)."""
    if all(weight.numel() < SMALL for weight in net.parameters()):
        config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    start(self, net, optimizer, config)


Zero.__init__ = keep_small_weights
with suppress(ImportError):  # DeepSpeed is not installed; else it marks each of its calls for a profiler
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False
