"""Small random networks in the form of DWPose's two ONNX files, as bytes: onnxruntime reads ONNX, and writes none.

Fields by number are those of onnx.proto3 (https://github.com/onnx/onnx, IR version 8).
"""

import struct
from pathlib import Path

import numpy as np


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= 2**64 - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _part(field: int, data: bytes | str) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _attribute(name: str, value) -> bytes:
    if isinstance(value, list):
        return _part(1, name) + b"".join(_number(8, one) for one in value) + _number(20, 7)
    if isinstance(value, float):
        return _part(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, 1)
    return _part(1, name) + _number(3, value) + _number(20, 2)


def node(kind: str, inputs: list[str], output: str, **attributes) -> bytes:
    named = b"".join(_part(5, _attribute(name, value)) for name, value in attributes.items())
    return b"".join(_part(1, name) for name in inputs) + _part(2, output) + _part(4, kind) + named


def _tensor(name: str, array: np.ndarray) -> bytes:
    kinds = {"float32": 1, "int64": 7}
    dims = b"".join(_number(1, side) for side in array.shape)
    return dims + _number(2, kinds[array.dtype.name]) + _part(8, name) + _part(9, array.tobytes())


def _value(name: str, shape: list[int]) -> bytes:
    dims = b"".join(_part(1, _number(1, side)) for side in shape)
    return _part(1, name) + _part(2, _part(1, _number(1, 1) + _part(2, dims)))


def model(nodes: list[bytes], constants: dict[str, np.ndarray], takes: dict[str, list[int]], gives) -> bytes:
    graph = b"".join(_part(1, one) for one in nodes) + _part(2, "tiny")
    graph += b"".join(_part(5, _tensor(name, array)) for name, array in constants.items())
    graph += b"".join(_part(11, _value(*one)) for one in takes.items())
    graph += b"".join(_part(12, _value(*one)) for one in gives.items())
    return _number(1, 8) + _part(7, graph) + _part(8, _part(1, "") + _number(2, 13))


def write_people_net(path: Path, seed: int = 0, *, sides=(640, 640), classes: int = 80) -> None:
    """1 3 640 640 -> 1 8400 85: a convolution of each cell's mean colours."""
    rng = np.random.default_rng(seed)
    nodes, constants, cells = [], {"flat": np.array([1, 5 + classes, -1])}, 0
    for stride in (8, 16, 32):
        weights = rng.normal(0, 0.02, (5 + classes, 3, 1, 1)).astype(np.float32)
        offset = rng.normal(0, 0.3, 5 + classes).astype(np.float32)
        weights[2:4] *= 0.1
        offset[2:4] += 2
        weights[4:], offset[4:6] = weights[4:] * 0.5, -1.0
        constants |= {f"weights{stride}": weights, f"offset{stride}": offset}
        nodes += [
            node("AveragePool", ["images"], f"mean{stride}", kernel_shape=[stride] * 2, strides=[stride] * 2),
            node("Conv", [f"mean{stride}", f"weights{stride}", f"offset{stride}"], f"grid{stride}"),
            node("Reshape", [f"grid{stride}", "flat"], f"cells{stride}"),
        ]
        cells += (sides[0] // stride) * (sides[1] // stride)
    nodes += [
        node("Concat", ["cells8", "cells16", "cells32"], "all", axis=2),
        node("Transpose", ["all"], "rows", perm=[0, 2, 1]),
        node("Slice", ["rows", "zero", "four", "two"], "boxes"),
        node("Slice", ["rows", "four", "end", "two"], "logits"),
        node("Sigmoid", ["logits"], "sure"),
        node("Concat", ["boxes", "sure"], "output", axis=2),
    ]
    constants |= {name: np.array([n]) for name, n in {"zero": 0, "four": 4, "end": 5 + classes, "two": 2}.items()}
    takes, gives = {"images": [1, 3, *sides]}, {"output": [1, cells, 5 + classes]}
    path.write_bytes(model(nodes, constants, takes, gives))


def write_pose_net(path: Path, seed: int = 0, *, points: int = 133) -> None:
    """1 3 384 288 -> 1 133 576 and 1 133 768: convolutions of each column's and each row's mean colours."""
    rng = np.random.default_rng(seed)
    nodes, constants, gives = [], {}, {}
    for name, axis, pixels in (("simcc_x", 2, 288), ("simcc_y", 3, 384)):
        constants[f"{name}_weights"] = rng.normal(0, 0.3, (2 * points, 3, 5)).astype(np.float32)
        constants[f"{name}_halves"] = np.array([1, points, 2, pixels])
        constants[f"{name}_shape"] = np.array([1, points, 2 * pixels])
        nodes += [
            node("ReduceMean", ["input"], f"{name}_mean", axes=[axis], keepdims=0),
            node("Conv", [f"{name}_mean", f"{name}_weights"], f"{name}_bins", pads=[2, 2]),
            node("Reshape", [f"{name}_bins", f"{name}_halves"], f"{name}_two"),
            node("Transpose", [f"{name}_two"], f"{name}_turned", perm=[0, 1, 3, 2]),
            node("Reshape", [f"{name}_turned", f"{name}_shape"], name),
        ]
        gives[name] = [1, points, 2 * pixels]
    path.write_bytes(model(nodes, constants, {"input": [1, 3, 384, 288]}, gives))
