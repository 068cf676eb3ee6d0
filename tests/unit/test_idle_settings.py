"""Settings that change nothing beside others are told."""

import pytest

from reeltune.config.idle import WAITING, idle_notices
from reeltune.config.parse import build, settings

VALUES = {
    "logit_mean": 0.5,
    "logit_std": 2.0,
    "mode_scale": 1.0,
    "motion_sub_loss_ratio": 0.5,
    "lr_warmup_steps": 7,
    "lr_num_cycles": 2,
    "lr_power": 2.0,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-4,
    "initial_grad_norm_ratio": 3,
    "ema_decay": 0.9,
    "video_sample_stride": 3,
}
COUNT = {
    "logit_mean": {"weighting_scheme": "logit_normal"},
    "logit_std": {"weighting_scheme": "logit_normal"},
    "mode_scale": {"weighting_scheme": "mode"},
    "motion_sub_loss_ratio": {"motion_sub_loss": True},
    "lr_warmup_steps": {"lr_scheduler": "linear"},
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_power": {"lr_scheduler": "polynomial"},
    "initial_grad_norm_ratio": {"abnormal_norm_clip_start": 5},
    "ema_decay": {"use_ema": True},
}
IDLE = {
    **{name: {"use_adafactor": True} for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
    "video_sample_stride": {"video_sample_fps": 8.0},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_without_effect_is_told_and_one_with_is_not(name):
    given = {name: VALUES[name]}
    (told,) = idle_notices(build({**given, **IDLE.get(name, {})}))
    assert told.startswith(f"{name} is {VALUES[name]} and ") and f"or leave {name} out" in told
    assert not idle_notices(build({**given, **COUNT.get(name, {})}))
    assert not idle_notices(build({name: settings()[name].default, **IDLE.get(name, {})}))


def test_each_row_is_tried():
    assert {name for one in WAITING for name in one.names} == VALUES.keys()


def test_none_beside_a_tracker_is_told():
    (told,) = idle_notices(build({"report_to": ["none", "tensorboard"]}))
    assert told == "report_to is none tensorboard, of which none changes nothing; leave it out, or all others"
    assert not idle_notices(build({"report_to": ["none"]}))
