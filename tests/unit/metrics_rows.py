"""A sound row of each kind, as a run writes them into metrics.jsonl."""

STEP = {"kind": "step", "step": 1, "loss": 0.5, "grad_norm": 1.0, "lr": 1e-4, "samples": 2, "shape": [5, 16, 32]}
TIMES = {"step_s": 1.0, "data_s": 0.1, "encode_s": 0.2, "forward_backward_s": 0.6, "optimizer_s": 0.1, "tokens": 3}
BAND = {"level": 0.5, "loss": 1.0, "loss_start": 1.1}
VALIDATION = {"kind": "validation", "step": 1, "start_step": 0, "loss": 1.0, "loss_start": 1.1, "difference": -0.1}
OBEDIENCE = {"kind": "obedience", "measure": "edges", "unit": "", "rises": True, "score": 0.5, "score_start": 0.1}
SCORES = {"score": 0.5, "score_start": 0.1, "truth": 0.9}
METRICS = [
    STEP | TIMES,
    VALIDATION | {"band95": [-0.2, 0.1], "per_band": [BAND, BAND], "n": 2},
    VALIDATION | OBEDIENCE | {"band95": [-0.2, 0.1], "truth": 0.9, "n": 1, "previews": [SCORES]},
    {"kind": "save", "step": 1, "path": "checkpoint-1", "bytes": 5, "seconds": 0.1, "blocked_seconds": 0.1},
    {"kind": "notice", "step": 1, "text": "a", "warning": True},
]
