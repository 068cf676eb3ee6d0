"""Made once by the process that all forks come from: what a process's first run makes and its later ones find."""

from PIL import Image

from reeltune.families.easyanimate import keys as easyanimate
from reeltune.families.wan_fun import keys as wan

Image.init()  # imports what reads each format
easyanimate.from_released({}, {})  # as the others, compiles the patterns of its names
easyanimate.to_released({}, {})
for renamed in (
    *(wan.from_released, wan.to_released, wan.vae_from_released),
    *(wan.text_from_released, wan.image_from_released),
):
    renamed({})
