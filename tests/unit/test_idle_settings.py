"""Settings that change nothing beside others are told."""

import pytest

from reeltune.config.idle import WAITING, idle_notices
from reeltune.config.parse import build, settings
from reeltune.config.rules import shown
from reeltune.core.types import Record
from reeltune.data.plan import Plan
from reeltune.data.records import Records
from reeltune.data.shapes import SizeRules

# setting -> (a value of it, settings beside which it counts, and others beside which it does not)
TRIED = {
    "logit_mean": (0.5, {"weighting_scheme": "logit_normal"}, [{}]),
    "logit_std": (2.0, {"weighting_scheme": "logit_normal"}, [{}]),
    "mode_scale": (1.0, {"weighting_scheme": "mode"}, [{}]),
    "motion_sub_loss_ratio": (0.5, {"motion_sub_loss": True}, [{}]),
    "lr_warmup_steps": (7, {"lr_scheduler": "linear"}, [{}]),
    "lr_num_cycles": (2, {"lr_scheduler": "cosine_with_restarts"}, [{}]),
    "lr_power": (2.0, {"lr_scheduler": "polynomial"}, [{}]),
    "adam_beta1": (0.5, {}, [{"use_adafactor": True}]),
    "adam_beta2": (0.5, {}, [{"use_adafactor": True}]),
    "adam_epsilon": (1e-4, {}, [{"use_adafactor": True}]),
    "initial_grad_norm_ratio": (3, {"abnormal_norm_clip_start": 5}, [{}]),
    "ema_decay": (0.9, {"use_ema": True}, [{}]),
    "video_sample_stride": (3, {}, [{"video_sample_fps": 8.0}]),
    "video_sample_size": (256, {}, [{"fix_sample_size": [480, 832]}]),
    "image_sample_size": (640, {}, [{"fix_sample_size": [480, 832]}]),
    "token_sample_size": (
        640,
        {"random_hw_adapt": True, "training_with_video_token_length": True},
        [{}, {"random_hw_adapt": True}, {"fix_sample_size": [480, 832]}],
    ),
    "training_with_video_token_length": (
        True,
        {"random_hw_adapt": True},
        [{}, {"fix_sample_size": [480, 832]}],
    ),
    "random_hw_adapt": (True, {}, [{"fix_sample_size": [480, 832]}]),
    "enable_bucket": (True, {}, [{"fix_sample_size": [480, 832]}]),
    "random_frame_crop": (True, {}, [{"video_sample_n_frames": 1}]),
    "accept_changed_data": (True, {"resume_from_checkpoint": "latest"}, [{}]),
    "tracker_project_name": ("mine", {"report_to": ["tensorboard", "wandb"]}, [{}, {"report_to": ["none"]}]),
    "validation_steps": (5, {"held_out_share": 0.1}, [{}]),
    "held_out_levels": (5, {"validation_data_meta": "a.json"}, [{}, {"validation_prompts": ["a"]}]),
    "preview_count": (1, {}, [{"validation_prompts": ["a"]}]),
    "preview_steps": (9, {"validation_prompts": ["a"]}, [{}, {"preview_count": 0}]),
    "guidance_scale": (3.0, {"held_out_share": 0.1}, [{}, {"held_out_share": 0.1, "preview_count": 0}]),
    "negative_prompt": ("bad", {"validation_data_meta": "a.json"}, [{}]),
    "control_kind": ("canny", {"validation_prompts": ["a"], "preview_count": 2}, [{}]),
    "control_detector": ("a.pth", {"validation_prompts": ["a"]}, [{}]),
}


@pytest.mark.parametrize("name", TRIED)
def test_a_setting_without_effect_is_told_and_one_with_is_not(name):
    value, counts, idle = TRIED[name]
    for others in idle:
        told = [line for line in idle_notices(build({name: value, **others})) if f"or leave {name} out" in line]
        assert len(told) == 1 and told[0].startswith(f"{name} is {shown(value)} and ") and " it changes " in told[0]
    assert not idle_notices(build({name: value, **counts}))
    assert not idle_notices(build({name: settings()[name].default, **counts}))


def test_each_row_is_tried():
    assert {name for one in WAITING for name in one.names} == TRIED.keys()


def test_settings_that_want_the_same_are_told_in_a_line():
    (told,) = idle_notices(build({"adam_beta1": 0.5, "adam_epsilon": 1e-4, "use_adafactor": True}))
    assert told == (
        "adam_beta1 is 0.5 and adam_epsilon is 0.0001 and use_adafactor is true, beside which they change nothing; set "
        "use_adafactor to false, or leave adam_beta1 and adam_epsilon out"
    )


def test_all_that_a_setting_wants_is_told_at_once():
    (told,) = idle_notices(build({"token_sample_size": 640}))
    assert told == (
        "token_sample_size is 640 and training_with_video_token_length is false and random_hw_adapt is false, beside "
        "which it changes nothing; set training_with_video_token_length to true and random_hw_adapt to true, or leave "
        "token_sample_size out"
    )
    (told,) = idle_notices(build({"validation_steps": 5}))
    assert "set validation_prompts to prompts or validation_data_meta to a list or held_out_share to 0.05, or" in told


@pytest.mark.parametrize("name", ["token_sample_size", "enable_bucket", "random_hw_adapt", "image_sample_size"])
def test_sizes_without_effect_change_no_plan(name):
    """And what counts changes it."""
    value, counts, idle = TRIED[name]
    records = Records.of(Record(i, f"{i}.mp4", "", "video", 60, 8.0, 300 + 40 * i, 700) for i in range(20))

    def plan(others):
        rules = SizeRules(**{"video_sample_size": 384, "image_sample_size": 640, **others})
        return [tuple(draw.shape) for group in Plan(records, rules, group=1, seed=1) for draw in group]

    default = settings()[name].default
    for others in idle:
        assert plan({name: value, **others}) == plan({name: default, **others})
    more = {"training_with_video_token_length": True, "random_hw_adapt": True}
    assert plan({**more, **counts, name: value}) != plan({**more, **counts, name: default})


def test_none_beside_a_tracker_is_told():
    (told,) = idle_notices(build({"report_to": ["none", "tensorboard"]}))
    assert told == "report_to is none tensorboard, of which none changes nothing; leave it out, or all others"
    assert not idle_notices(build({"report_to": ["none"]}))
