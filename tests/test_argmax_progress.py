"""Searches that are interrupted, killed and started from an earlier report."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from _killed import whole_and_killed
from supy.argmax import Monitor, find_unargmaxable, search, verify
from supy.cli import main

SCRIPT = """
import sys
import numpy as np
import torch
from supy.argmax import find_unargmaxable, search

torch.set_num_threads(1)  # it has to be killed before it is done
search._SAVE = 0.0
weight = np.random.default_rng(0).normal(size=(2500, 10)) * np.linspace(0.5, 1, 2500)[:, None]
weight[:100] = weight[2400:]
report = find_unargmaxable(weight, checkpoint=sys.argv[1])
with open(sys.argv[1] + "/proofs", "w") as file:
    for k in range(0, 2500, 7):
        print(report.verdicts[k], report.claim(k), file=file)
"""


def test_a_killed_search_goes_on_to_the_same_proofs(tmp_path):
    proofs = [(folder / "proofs").read_text() for folder in whole_and_killed(SCRIPT, tmp_path)]
    assert proofs[0] == proofs[1]
    assert all(verdict in proofs[0] for verdict in ("argmaxable", "unargmaxable", "tied"))


@pytest.fixture
def weight():
    return np.random.default_rng(0).normal(size=(1500, 5))


def claims(report):
    return [repr(report.claim(k)) for k in range(len(report))]


def test_an_interrupted_search_goes_on(weight, tmp_path, monkeypatch):
    calls, separate = [], search._separate

    def interrupt(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return separate(*arguments)

    monkeypatch.setattr(search, "_separate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_unargmaxable(weight, checkpoint=tmp_path)
    decided = sum(calls[:2])
    calls[:] = [0, 0, 0]
    report = find_unargmaxable(weight, checkpoint=tmp_path)
    done, left = sum(calls), 1500 - decided
    assert 0 < done <= left  # those before the interruption were not decided again
    assert claims(report) == claims(find_unargmaxable(weight))
    calls[:] = [0, 0, 0]
    assert claims(find_unargmaxable(weight, checkpoint=tmp_path)) == claims(report) and sum(calls) == 0


def test_a_checkpoint_of_another_search_is_refused(weight, tmp_path):
    find_unargmaxable(weight, checkpoint=tmp_path)
    for other in (dict(weight=weight + 1e-9), dict(weight=weight, bound=1.0), dict(weight=weight, tolerance=1e-11)):
        with pytest.raises(ValueError, match="is of another run"):
            find_unargmaxable(**other, checkpoint=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        find_unargmaxable(weight, checkpoint=tmp_path)
    path.write_bytes(whole.replace(b"easy/kind", b"easy/kin_"))
    with pytest.raises(ValueError, match="not the state of a search"):
        find_unargmaxable(weight, checkpoint=tmp_path)


def test_the_command_goes_on_and_cleans_up(weight, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "w.npy", weight)
    arguments = ["argmax", "check", str(tmp_path / "w.npy"), "--json", str(tmp_path / "report.json")]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(search, "_separate", interrupt)
        assert main(arguments) == 130
    assert (tmp_path / "report.json.partial" / "checkpoint.safetensors").exists()
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "w.npy"]
    assert main(["argmax", "verify", str(tmp_path / "report.json"), str(tmp_path / "w.npy")]) == 0
    assert "0 wrong" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"nonnegative": True}])
def test_an_earlier_report_changes_no_verdict_and_saves_work(weight, options, monkeypatch):
    generator = np.random.default_rng(1)
    bias = 0.1 * generator.normal(size=1500) if options else None
    report = find_unargmaxable(weight, bias, **options)
    later = weight + 1e-4 * generator.normal(size=weight.shape)
    expected = find_unargmaxable(later, bias, **options)
    tried, separate = [], search._separate
    monkeypatch.setattr(search, "_separate", lambda *a: tried.extend(a[1].tolist()) or separate(*a))
    again = find_unargmaxable(later, bias, previous=report, **options)
    assert again.verdicts == expected.verdicts and verify(later, bias, again, **options) == []
    alive = set(again.classes("argmaxable"))
    assert len(alive & set(tried)) < 0.2 * len(alive)  # the inputs with which they won before were enough
    with pytest.raises(ValueError, match="previous is the report of a layer of another shape"):
        find_unargmaxable(later[1:], previous=report)


def test_a_monitor_begins_with_what_it_knows(monkeypatch):
    layer = torch.nn.Linear(4, 300)
    monitor = Monitor(layer)
    monitor()
    with torch.no_grad():
        layer.weight += 1e-5 * torch.randn(300, 4)
    seen = []

    def find(*arguments, **options):
        seen.append(options)
        return find_unargmaxable(*arguments, **options)

    monkeypatch.setattr("supy.argmax.prevention.find_unargmaxable", find)
    report = monitor.report
    monitor()
    assert seen == [{"previous": report}] and len(monitor.history) == 2
