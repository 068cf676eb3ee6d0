"""Numbers far beyond the usual are told, and usual ones are not."""

import pytest

from reeltune.config.parse import build
from reeltune.config.unlikely import unlikely_notices

PRODIGY = {"use_prodigy": True, "learning_rate": 1}


@pytest.mark.parametrize(
    ("usual", "slip", "words"),
    [
        ({"guidance_scale": 20}, {"guidance_scale": 75}, "guidance_scale is 75; the models' own tools have 3 to 6"),
        ({"learning_rate": 0.01}, {"learning_rate": 0.1}, "learning_rate is 0.1, by about which each step moves each"),
        (
            {"expert": "both", "low_expert_learning_rate": 1e-4},
            {"expert": "both", "low_expert_learning_rate": 0.02},
            "low_expert_learning_rate is 0.02, by about which",
        ),
        (
            {"rank": 8, "lora_plus_ratio": 16},
            {"rank": 8, "lora_plus_ratio": 1600},
            "learning_rate is 0.0001, times lora_plus_ratio 1600, by about which",
        ),
        ({"adam_weight_decay": 1}, {"adam_weight_decay": 30}, "adam_weight_decay is 30, of which"),
        ({"adam_epsilon": 1e-3}, {"adam_epsilon": 0.1}, "adam_epsilon is 0.1, beside which"),
        (
            {"rank": 16, "network_alpha": 32, **PRODIGY},
            {"rank": 16, "network_alpha": 3200, **PRODIGY},
            "rank is 16, which multiplies what adapters change by 200",
        ),
        (
            {"rank": 16, "network_alpha": 160, "use_rslora": True},
            {"rank": 16, "network_alpha": 3200, "use_rslora": True},
            "what adapters change by 800",
        ),
    ],
)
def test_what_is_far_beyond_the_usual_is_told(usual, slip, words):
    assert unlikely_notices(build(usual)) == []
    (told,) = unlikely_notices(build(slip))
    assert words in told and told.endswith("; see whether it is meant")
