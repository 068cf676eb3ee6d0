"""A run, as data: frozen, typed, torch-free. Field names, YAML keys and command-line flags are one vocabulary.

Each section is a dataclass; names are unique over all sections, so a YAML file and the command line
are flat. The sentence under a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TrainMode = Literal["normal", "inpaint", "i2v", "ti2v", "control", "control_ref", "control_ref_camera"]
ControlKind = Literal["canny", "depth", "pose", "hed", "mlsd", "camera"]  # those of control/kinds.py


@dataclass(frozen=True)
class Model:
    pretrained_model_name_or_path: str = ""
    """Folder of the downloaded checkpoint, in the released or the diffusers layout."""
    config_path: str | None = None
    """Model yaml of the original tools, in config/: for Wan, file names inside the checkpoint and the schedule."""
    transformer_path: str | None = None
    """Other transformer weights to start from (a .safetensors file or a checkpoint-N folder)."""
    train_mode: TrainMode | None = None
    """What the model is conditioned on beside text. Left out: what the checkpoint was made for."""
    expert: Literal["high", "low", "both"] | None = None
    """Which of the two networks of a Wan2.2-A14B model learns, at its own noise levels: high, low, or both in turns."""
    other_expert_path: str | None = None
    """Weights of the other one, for previews and samples (a file or checkpoint-N folder). Left out: the model's own."""
    other_expert_adapter: str | None = None
    """An adapter of the other one, for previews and samples (a file of any tool, or a checkpoint-N folder)."""
    control_ref_image: Literal["first_frame", "random"] = "first_frame"
    """Which frame is the reference picture: the first (Wan2.1-Fun V1.0 and camera), or one at random (V1.1)."""
    add_full_ref_image_in_self_attention: bool = False
    """Also give the reference picture as tokens of its own (Wan2.1-Fun V1.1 only)."""
    trainable_modules: tuple[str, ...] = (".",)
    """Parts of parameter names that learn; "." is all. A pattern that matches nothing is an error."""
    trainable_modules_low_learning_rate: tuple[str, ...] = ()
    """Parts of parameter names that learn at half the rate."""
    trained_weights: Literal["fp32", "bf16_stochastic"] = "fp32"
    """How trained weights are kept: fp32 master copies, or bf16 with stochastic rounding."""
    encoder_weights: Literal["stored", "fp32", "bf16"] | None = None
    """How VAE and encoders are kept and compute; stored: as their files have it. Left out: as mixed_precision says."""


@dataclass(frozen=True)
class Adapter:
    rank: int = 0
    """Rank of the low-rank adapters (LoRA) that learn while the network itself does not; 0: the network learns."""
    network_alpha: float | None = None
    """The adapters' change is multiplied by network_alpha / rank. Left out: rank, which is by 1."""
    target_name: tuple[str, ...] = ()
    """Linear layers that get an adapter, by whole parts of their names: q, ffn.0, blocks.3. Left out: every linear
    layer of the network's blocks. A name that matches nothing is an error."""
    lora_skip_name: tuple[str, ...] = ()
    """Linear layers that get none, by whole parts of their names."""
    rank_pattern: tuple[str, ...] = ()
    """Another rank for layers by whole parts of their names, as ffn.0=16; the last that matches counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Another network_alpha, in the same way."""
    use_rslora: bool = False
    """Multiply by network_alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Learn the magnitude of each output beside its direction (DoRA, https://arxiv.org/abs/2402.09353)."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that are dropped in training (0 to 1)."""
    lora_init: str = "uniform"
    """How A begins, where B begins at 0: uniform as torch's linear layers do, or gaussian with deviation 1 / rank. With
    pissa both begin as the weight's largest singular directions (https://arxiv.org/abs/2404.02948); with pissa_niter_N
    these are found in N iterations and not in 4."""
    adapter_path: str | None = None
    """An adapter of any tool to begin with (a file, or a checkpoint-N folder)."""
    train_whole: tuple[str, ...] = ()
    """Parts of parameter names that learn in full beside the adapters."""
    lora_plus_ratio: float = 1.0
    """B learns at the learning rate times this (LoRA+, https://arxiv.org/abs/2402.12354, advises 16)."""
    base_weights: Literal["fp8", "int8", "nf4"] | None = None
    """How the linear layers of the frozen network's blocks are kept. Left out: as mixed_precision says."""


@dataclass(frozen=True)
class Data:
    train_data_dir: str = ""
    """Folder that the paths in the metadata are relative to."""
    train_data_meta: str = ""
    """The metadata file: .json, .jsonl or .csv."""
    validation_data_meta: str | None = None
    """A second metadata file, held out of training and used for the held-out loss."""
    held_out_share: float = 0.0
    """Share of the files in train_data_meta held out instead (0 to 0.5), chosen by path, whatever the seed."""
    max_bad_share: float = 0.05
    """Share of entries that may be unusable before the run is refused (0 to 1)."""
    accept_changed_data: bool = False
    """Go on from a checkpoint though entries were added to the data or captions changed since; any other change of the
    data is refused."""
    allow_outside_paths: bool = False
    """Accept metadata paths that leave train_data_dir."""
    decode_check: Literal["ends", "full", "header"] = "ends"
    """What of a clip the scan decodes: ends is its first and last frames, full every frame, header none."""
    text_drop_ratio: float = 0.1
    """Share of samples trained without their caption (0 to 1)."""
    video_repeat: int = 0
    """Times that each video appears in an epoch; 0 and 1 are once."""
    dataloader_num_workers: int = 2
    """Processes that decode clips; 0 decodes in the training process."""


@dataclass(frozen=True)
class Sizes:
    video_sample_n_frames: int = 49
    """Frames of the longest training clip; used as 4k + 1."""
    video_sample_stride: int = 2
    """Take every n-th frame of the file."""
    video_sample_fps: float | None = None
    """Frames per second to resample clips to in time; replaces video_sample_stride."""
    video_sample_size: int = 512
    """Pixels: videos have the area of a square of this side; the smallest, with training_with_video_token_length."""
    image_sample_size: int = 512
    """Pixels: the same for images; the largest side for videos, with training_with_video_token_length."""
    token_sample_size: int = 512
    """Pixels: the token budget of training_with_video_token_length is a clip of video_sample_n_frames at this side."""
    enable_bucket: bool = False
    """Keep each clip's aspect ratio by buckets; otherwise a centre square is cut."""
    random_hw_adapt: bool = False
    """Vary sizes between the smallest and the largest side."""
    training_with_video_token_length: bool = False
    """Vary sizes under the token budget: fewer frames where the picture is larger."""
    random_frame_crop: bool = False
    """Train one clip in ten at a shorter length of 4k + 1 frames."""
    random_ratio_crop: bool = False
    """Crop to a random aspect ratio."""
    fix_sample_size: tuple[int, int] | None = None
    """Pixels: resize everything to this height and width."""
    keep_all_node_same_token_length: bool = False
    """Accepted and always on: all processes compute one shape in a micro-step."""


@dataclass(frozen=True)
class Training:
    train_batch_size: int = 1
    """Samples per process in a micro-step."""
    gradient_accumulation_steps: int = 1
    """Micro-steps per optimizer step."""
    num_train_epochs: int = 100
    """Passes over the data."""
    max_train_steps: int | None = None
    """Optimizer steps after which the run ends, whatever the epoch."""
    seed: int = 42
    """Seed of every random choice."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Precision of the trained network's arithmetic."""
    gradient_checkpointing: bool | Literal["attention_kept", "products_kept"] = False
    """Recompute activations in the backward pass: less memory, about a third more time. With attention_kept, what
    attention gave is kept, and all else recomputed; with products_kept, what linear layers gave is kept too."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math", "flash_4"] = "auto"
    """Kernel of the trained network's attention: one that torch has, or flash_4 of the package flash-attn-4. auto: on a
    GPU the soonest of a trial before the first step, which checkpoints keep."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: torch compiles the network's repeated blocks before the first step, for training alone."""
    low_vram: bool = False
    """VAE and encoders wait in the CPU's memory between uses."""
    vae_mini_batch: int = 0
    """Clips of a batch, and of a cache that is filled, that the VAE and the picture encoder take at once. 0 and 1: each
    alone, so that no bit of it depends on its neighbours; with more, the last bits do."""
    allow_tf32: bool = False
    """Use TF32 for fp32 matrix products and convolutions on NVIDIA GPUs."""
    deterministic: bool = False
    """Only kernels that give the same bits each time, on which an exact resume on a GPU depends; some are slower."""


@dataclass(frozen=True)
class Memory:
    gradient_checkpointing_share: float = 1.0
    """Share of the blocks that gradient_checkpointing recomputes, spread evenly (0 to 1)."""
    offload_activations: bool = False
    """Activations kept for the backward pass wait in the CPU's memory."""
    blocks_to_swap: int = 0
    """How many frozen blocks wait in the CPU's memory; each visits the device to compute, and is recomputed."""
    step_in_backward: bool = False
    """Step each weight within the backward pass, once its gradient is whole; with max_grad_norm that runs twice."""
    vae_tiling: bool = False
    """The VAE encodes and decodes large clips in blended tiles, which changes latents a little at their seams."""
    encode_ahead: bool | None = None
    """Encode the next batch while the network trains on the last. Left out: on a GPU, unless low_vram or attention
    says otherwise."""


@dataclass(frozen=True)
class Parallel:
    engine: Literal["ddp", "zero2", "zero3", "fsdp"] | None = None
    """How processes share the work: ddp copies all to each; the others shard. Left out: as launched, else ddp."""
    keep_gathered: bool = False
    """With fsdp: reshard_after_forward is off: weights stay gathered for the backward pass; faster, more memory."""
    offload: bool = False
    """With zero2, zero3 and fsdp: what is sharded lives in the CPU's memory."""
    context_parallel: int = 1
    """Processes that share each clip's tokens, for clips too long for one device; sides are then larger multiples."""
    rank_timeout_seconds: float = 1800.0
    """Seconds that processes wait for one that is late before all stop; a validation counts as waiting."""


@dataclass(frozen=True)
class Cache:
    cache_folder: str | None = None
    """Folder that `reeltune cache` fills with latents and text embeddings, to train from without VAE and encoders."""
    cache_variants: int = 0
    """Ways of reading each clip (window, size, reference, mask) to draw from; 0: a new one at every use."""


@dataclass(frozen=True)
class Loss:
    loss_type: Literal["flow", "ddpm", "sigma"] | None = None
    """The objective; left out: what the checkpoint was trained with. Another value than that is an error."""
    uniform_sampling: bool = False
    """Draw noise levels uniformly, in equal strata over the batch; otherwise by weighting_scheme."""
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    """Density and weight of noise levels, as in Stable Diffusion 3."""
    logit_mean: float = 0.0
    """Mean of the logit-normal density; at 10 and -10 all levels lie at one end."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal density; over 10 most levels would lie at both ends."""
    mode_scale: float = 1.29
    """Scale of the mode density, which has none beyond -1 and 1.75 (https://arxiv.org/abs/2403.03206)."""
    motion_sub_loss: bool = False
    """Blend in the error of differences between neighbouring latent frames."""
    motion_sub_loss_ratio: float = 0.25
    """Share of that error in the loss (0 to 1)."""
    loss_outlier_threshold: float | None = None
    """Leave elements with a larger absolute error out of the loss (the original tools: 50). Left out: off."""


@dataclass(frozen=True)
class Optimization:
    learning_rate: float = 1e-4
    """Rate after warm-up, by about which a step moves each weight: 1e-5 to 1e-4 is usual, more than 0.01 is told, and
    less than 1 is a must but with use_prodigy, which multiplies its own."""
    low_expert_learning_rate: float | None = None
    """With expert both: the low one's rate after warm-up. Left out: learning_rate."""
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
    ] = "constant"
    """Course of the learning rate (diffusers' names)."""
    lr_warmup_steps: int = 500
    """Optimizer steps of linear warm-up."""
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of polynomial."""
    lr_step_rules: str | None = None
    """Rules of piecewise_constant, as "1:10,0.1:20,0.01:30,0.005"."""
    use_8bit_adam: bool = False
    """AdamW with 8-bit state (bitsandbytes)."""
    use_came: bool = False
    """CAME, which keeps no second moment per weight."""
    use_adafactor: bool = False
    """Adafactor, which keeps no moment per weight; its rate is relative to the size of the weights."""
    use_prodigy: bool = False
    """Prodigy, which finds the rate and multiplies it by learning_rate, to be 1 (https://arxiv.org/abs/2306.06101)."""
    use_muon: bool = False
    """Muon for matrices and AdamW for the rest; steps are of AdamW's size, and so is the rate
    (https://arxiv.org/abs/2502.16982)."""
    adam_beta1: float = 0.9
    """First-moment decay."""
    adam_beta2: float = 0.999
    """Second-moment decay."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay: each step takes its product with learning_rate off each weight, which must be less than
    1; more than 1 is told."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment; gradients are less than 1, and as much beside them would stop all
    learning; more than 0.001 is told."""
    max_grad_norm: float | None = 1.0
    """Clip gradients to this norm, taken over all parameters; none: no clipping."""
    low_expert_max_grad_norm: float | None = None
    """With expert both: the norm to clip the low one's gradients to. Left out: max_grad_norm."""
    initial_grad_norm_ratio: int = 5
    """The clip starts this many times higher and falls to max_grad_norm (only with abnormal_norm_clip_start)."""
    abnormal_norm_clip_start: int | None = None
    """Steps after which gradients over max_grad_norm * initial_grad_norm_ratio are clipped harder. Left out: off."""
    use_ema: bool = False
    """Keep an exponential moving average of the weights."""
    ema_decay: float = 0.9999
    """Most decay of that average per step; it begins at 0 and rises to it as (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class Output:
    output_dir: str = "output_dir"
    """Folder of the run."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Complete checkpoints kept; older ones are deleted after a good save."""
    save_in_background: bool = True
    """Train on while a checkpoint is written, from a copy in the CPU's memory, kept there, if there is room for one."""
    resume_from_checkpoint: str | None = None
    """latest, or the path of a checkpoint-N folder. Nothing there yet: the run starts anew and says so."""
    logging_steps: int = 10
    """Optimizer steps between lines on the console and in the trackers; metrics.jsonl has every step."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "none"], ...] = ("tensorboard",)
    """Trackers beside metrics.jsonl."""
    tracker_project_name: str = "reeltune"
    """Project name in the trackers."""


@dataclass(frozen=True)
class Validation:
    validation_steps: int | None = None
    """Optimizer steps between held-out losses and previews; left out: at the start and at the end."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts to make previews of. Left out: previews of held-out clips."""
    validation_paths: tuple[str, ...] = ()
    """A file for each prompt, as train_mode needs: a control (.npz too), a pose file, or a first picture."""
    validation_control_from: tuple[str, ...] = ()
    """A raw clip or picture for each prompt, from which its control is drawn as control_kind says, in place of
    validation_paths."""
    control_kind: ControlKind | None = None
    """What the controls are: previews are then measured by how far they follow them. Left out: what `reeltune control`
    made them as; not measured where it did not."""
    control_detector: str | None = None
    """Folder or file of the detector's weights, as control_kind needs them."""
    negative_prompt: str = ""
    """What previews are guided away from, in place of the blank caption; needs a guidance_scale other than 1."""
    preview_count: int = 2
    """Held-out clips previewed where there are no prompts; 0 makes none."""
    preview_steps: int = 30
    """Denoising steps of a preview."""
    guidance_scale: float = 6.0
    """Classifier-free guidance of previews; 1 is none. The models' own tools have 3 to 6; more than 20 is told, and
    over 1000 is rounding and nothing else."""
    held_out_levels: int = 4
    """Noise levels at which each held-out clip is measured."""


@dataclass(frozen=True)
class Recipe:
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    sizes: Sizes = field(default_factory=Sizes)
    training: Training = field(default_factory=Training)
    memory: Memory = field(default_factory=Memory)
    parallel: Parallel = field(default_factory=Parallel)
    cache: Cache = field(default_factory=Cache)
    loss: Loss = field(default_factory=Loss)
    optimization: Optimization = field(default_factory=Optimization)
    output: Output = field(default_factory=Output)
    validation: Validation = field(default_factory=Validation)
