"""Writes docs/recipe.md from the fields of a Recipe: python scripts/recipe_page.py docs/recipe.md"""

import sys
from pathlib import Path

from reeltune.config.parse import Setting, expected, sentences, settings
from reeltune.config.ranges import range_of
from reeltune.config.rules import shown

HEAD = """\
# All settings

Written by `make docs` from `src/reeltune/config/recipe.py`; change it there.

A recipe is a flat YAML file of these names; [recipes](../recipes) has one for each released variant. Each name is also
a flag of `reeltune train`, `check`, `plan`, `cache` and `sample`, and a flag wins over the file: `--learning_rate 1e-5`
or `--learning_rate=1e-5`. A switch may stand alone: `--low_vram`. A list takes several values:
`--trainable_modules attn ref_conv`. Where a value may be `none`, that word clears it.

All settings are checked before any file of the run is opened, and every problem is listed at once. A run writes its
settings into its folder as `recipe.yaml`, which starts the same run again.
"""


def page() -> str:
    lines = [HEAD]
    section = ""
    for name, setting in settings().items():
        if setting.section != section:
            section = setting.section
            lines += ["", f"## {section}", "", "| name | what | default | values |", "|---|---|---|---|"]
        cells = (f"`{name}`", sentences()[name], default(setting), values(setting))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def default(setting: Setting) -> str:
    return "" if setting.default == "" else f"`{shown(setting.default)}`"


def values(setting: Setting) -> str:
    return "; ".join(filter(None, (expected(setting), range_of(setting.name))))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
