"""supy argmax check and verify, and the files they read."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from supy.argmax import find_unargmaxable
from supy.argmax.files import read_head
from supy.argmax.picture import draw_margins
from supy.cli import main

WEIGHT = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=np.float32)
BIAS = np.array([0.0, 0.0, 0.0, 0.0, -0.5], dtype=np.float32)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.fixture
def head(tmp_path):
    path = tmp_path / "head.npz"
    np.savez(path, weight=WEIGHT, bias=BIAS, labels=np.array(list("abcde")))
    return path


def test_check_and_verify(head, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["argmax", "check", str(head), "--labels", str(head), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "4\tunargmaxable\te\t" in out and "4 argmaxable, 1 unargmaxable, 0 tied, 0 undecided" in out
    assert main(["argmax", "verify", str(report), str(head)]) == 0
    assert "5 certificates, 0 wrong" in capsys.readouterr().out

    whole = json.loads(report.read_text())
    whole["classes"][4]["dominators"] = [[0, 0.5], [1, 0.5]]
    report.write_text(json.dumps(whole))
    assert main(["argmax", "verify", str(report), str(head)]) == 1
    assert "class 4: residual" in capsys.readouterr().out


@pytest.mark.parametrize("suffix, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_of_the_margins(head, tmp_path, suffix, begins):
    picture = tmp_path / f"margins.{suffix}"
    assert main(["argmax", "check", str(head), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(begins) and len(list(tmp_path.iterdir())) == 2
    if suffix == "svg":  # every verdict of this layer is in the legend
        assert all(f"<!-- {text} -->" in picture.read_text() for text in ("4 argmaxable", "1 unargmaxable"))


@pytest.mark.parametrize("weight", [np.ones((1, 2)), np.zeros((3, 2)), np.array([[1.0], [2.0], [3.0], [3.0]])])
def test_pictures_of_odd_layers(weight, tmp_path):
    draw_margins(tmp_path / "margins.png", find_unargmaxable(weight))
    assert (tmp_path / "margins.png").stat().st_size > 0


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_search(head, tmp_path, monkeypatch, capsys):
    assert "ends in .png, .pdf, .svg" in refused(capsys, head, "--picture", tmp_path / "margins.jpeg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install supy[picture]" in refused(capsys, head, "--picture", tmp_path / "margins.png")


def test_the_bounds_are_part_of_the_report(tmp_path, capsys):
    weight, report = tmp_path / "w.npy", tmp_path / "report.json"
    np.save(weight, np.array([[1.0], [2.0], [3.0]]))
    assert main(["argmax", "check", str(weight), "--nonnegative", "--bound", "5", "--json", str(report)]) == 0
    assert "1 argmaxable, 2 unargmaxable" in capsys.readouterr().out
    assert main(["argmax", "verify", str(report), str(weight)]) == 0
    whole = json.loads(report.read_text())
    whole["options"] = {}
    report.write_text(json.dumps(whole))
    assert main(["argmax", "verify", str(report), str(weight)]) == 1
    whole["options"] = {"tolerance": 1.0}  # a report may not choose how strictly it is checked
    report.write_text(json.dumps(whole))
    assert main(["argmax", "verify", str(report), str(weight)]) == 2


def test_formats(tmp_path):
    weight, bias = torch.from_numpy(WEIGHT), torch.from_numpy(BIAS)
    tensors = {"encoder.weight": torch.zeros(3, 3), "lm_head.weight": weight.bfloat16(), "lm_head.bias": bias}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "model.pt")
    np.save(tmp_path / "w.npy", WEIGHT)
    for name in ("model.safetensors", "model.pt", "."):
        found, found_bias = read_head(tmp_path / name)
        assert (found == WEIGHT).all() and (found_bias == BIAS).all()
    assert read_head(tmp_path / "w.npy")[1] is None
    assert read_head(tmp_path / "model.pt", "encoder.weight")[0].shape == (3, 3)


def refused(capsys, *arguments):
    assert main(["argmax", "check", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_bad_files(head, tmp_path, capsys):
    torch.save({"weight": torch.ones(2, 2), "evil": Evil()}, tmp_path / "evil.pt")
    assert "executable pickles" in refused(capsys, tmp_path / "evil.pt")
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    assert "allow_pickle" in refused(capsys, tmp_path / "evil.npy")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    assert "executable pickles" in refused(capsys, tmp_path / "evil.bin")
    save_file({"weight": torch.ones(20, 20)}, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    assert "cannot be read" in refused(capsys, tmp_path / "cut.safetensors")
    (tmp_path / "cut.npz").write_bytes(head.read_bytes()[:-30])
    assert "cut.npz" in refused(capsys, tmp_path / "cut.npz")
    (tmp_path / "x.txt").write_text("")
    assert "expected .npz" in refused(capsys, tmp_path / "x.txt")
    assert "no such file" in refused(capsys, tmp_path / "none.npz")
    assert "no array is called 'w'" in refused(capsys, head, "--weight", "w")
    np.savez(tmp_path / "two.npz", a=WEIGHT, b=WEIGHT)
    assert "name the output layer's weight" in refused(capsys, tmp_path / "two.npz")
    (tmp_path / "labels.txt").write_text("one\n")
    assert "1 labels, the layer has 5" in refused(capsys, head, "--labels", tmp_path / "labels.txt")
    np.savez(tmp_path / "plain.npz", weight=WEIGHT)
    assert "no array is called 'labels'" in refused(capsys, head, "--labels", tmp_path / "plain.npz")
    for text in ("", '{"format": "supy.argmax/2", "options": {}, "groups": [[1e30]], "classes": []}'):
        (tmp_path / "x.txt").write_text(text)
        assert main(["argmax", "verify", str(tmp_path / "x.txt"), str(head)]) == 2
        assert "not a report" in capsys.readouterr().err


def test_onnx(tmp_path, capsys):
    nodes = [helper.make_node("MatMul", ["x", "first"], ["h"]), helper.make_node("MatMul", ["h", "last"], ["y"]),
             helper.make_node("Add", ["y", "b"], ["z"])]  # fmt: skip
    constants = {"first": np.eye(2, dtype=np.float32), "last": np.ascontiguousarray(WEIGHT.T), "b": BIAS}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, 5])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    weight, bias = read_head(path)
    assert (weight == WEIGHT).all() and (bias == BIAS).all()
    path.write_bytes(path.read_bytes()[:-20])
    assert "model.onnx" in refused(capsys, path)
