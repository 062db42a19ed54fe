"""examples/very_deep.py: its data, its verdicts, and that a run that was killed goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from test_examples import EXAMPLES, load

TINY = ["--steps", "6", "--batch", "4", "--width", "16", "--generate"]


@pytest.fixture(scope="module")
def script():
    return load("very_deep")


def command(*arguments):
    return [sys.executable, EXAMPLES / "very_deep.py", *TINY, *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on_with_the_next_cell(tmp_path):
    """Killed for good in its second cell; the first is not trained again, and the child does not outlive its parent."""
    arguments = command("--depths", 2, "--residuals", "deepnorm", "rezero", "--out", tmp_path)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "deepnorm-2.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
    before = first.read_bytes(), first.stat().st_mtime_ns

    ran = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, encoding="utf-8")
    assert ran.returncode == 0, ran.stderr
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert "[1/2]" not in ran.stderr and "[2/2] ReZero, 2 layers" in ran.stderr
    whole = json.loads((tmp_path / "very_deep.json").read_text())
    assert [(c["layers"], c["residual"]) for c in whole["cells"]] == [(2, "deepnorm"), (2, "rezero")]
    for cell in whole["cells"]:
        assert len(cell["losses"]) == 6 and all(1 < loss < 5 for loss in cell["losses"])  # guessing: 2.30
        assert cell["step_seconds"] > 0 and (cell["peak_bytes"] or 1e9) > 1e8
    assert (tmp_path / "very_deep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len([line for line in ran.stdout.splitlines() if line.startswith("|")]) == 3
    assert not list(tmp_path.glob(".*"))


def test_the_same_cell_twice_is_the_same(script):
    data, options = script.load("generated"), script.Options("generated", 16, 4, 4, 1e-3, None, 0)
    kept, again, computed = (
        script.train("admin", 4, data, options._replace(segment=segment), "")["losses"] for segment in (None, None, 2)
    )
    assert kept == again
    assert computed == kept  # a layer computed again has the same bits


def test_verdicts(script):
    guessing = math.log(script.CLASSES)

    def of(*runs, steps=100):
        return script.verdict([loss for count, loss in runs for _ in range(count)], steps)

    assert of() is None
    assert of((19, 0.1)) is None
    assert of((20, 0.49 * guessing)) == "trained"
    assert of((40, guessing), (20, 0.51 * guessing)) is None
    assert of((80, guessing), (20, 0.51 * guessing)) == "slow"
    assert of((10, 1.0), (1, math.nan)) == "diverged"
    assert of((10, 1.0), (1, math.inf)) == "diverged"
    assert of((49, guessing)) is None  # not before the half
    assert of((50, guessing)) == "diverged"
    assert of((50, 0.98 * guessing)) is None
    assert of((50, 0.98 * guessing), (50, 2 * guessing)) == "diverged"
    assert of((3, guessing), steps=3) == "diverged"


def test_a_loss_that_is_not_finite_is_saved_as_none(script):
    data, options = script.load("generated"), script.Options("generated", 16, 4, 50, 1e18, None, 0)
    result = script.train("rezero", 8, data, options, "")
    assert result["verdict"] == "diverged" and result["losses"][-1] is None
    json.loads(script.to_json(options, [result]), parse_constant=pytest.fail)
    assert "diverged" in script.table([result])
    assert script.picture([result])


def test_generated_sentences(script):
    rows = script.generate(200)
    assert rows[:40] == script.generate(40)
    assert {label for _, label in rows} == set(range(script.CLASSES))
    assert all(0 < len(words) <= script.LENGTH for words, _ in rows)
    data = script.load("generated")
    assert data.train[0].shape == (1000, script.LENGTH) and data.train[0].max() == data.words - 1


def test_clinc_is_read(script, tmp_path):
    file = tmp_path / "data_full.json"
    train = [[f"Say word{i} " + "on " * 20, f"intent{i}"] for i in range(15)]
    file.write_text(json.dumps({"train": train, "test": [["say hello", "intent3"], ["say", "intent14"]]}))
    parts = script.read(file)
    assert [label for _, label in parts["train"]] == list(range(10))
    assert parts["train"][3][0] == ["say", "word3"] + ["on"] * 8
    assert parts["test"] == [(["say", "hello"], 3)]  # the 15th intent is left out
    data = script.load(str(file))
    say, on = data.train[0][0, [0, 2]].tolist()
    assert min(say, on) > script.RARE and data.test[0].tolist() == [[say, script.RARE] + [script.PADDING] * 8]


def test_bad_input_gets_one_line(script, tmp_path, monkeypatch, capsys):
    def error(*arguments):
        monkeypatch.setattr(sys, "argv", ["very_deep.py", "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as exit:
            script.main()
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()

    assert "0 is not a positive number" in error("--depths", "0")[-1]
    assert "--width is 24, expected a multiple of 16" in error("--width", "24")[-1]
    assert "--rate is nan" in error("--rate", "nan")[-1]
    assert "invalid choice: 'x'" in error("--residuals", "x")[-1]
    monkeypatch.setenv("SUPY_DATA", str(tmp_path))
    file = tmp_path / "classification" / "clinc150" / "data_full.json"
    (line,) = error()
    assert f"No such file or directory: '{file}'" in line
    file.parent.mkdir(parents=True)
    for bad in ("[", "[]", '{"train": []}', '{"train": [[1]], "test": []}', "9" * 5000):
        file.write_text(bad)
        (line,) = error()
        assert f"{file}: expected" in line
    file.write_text('{"train": [["a", "b"]], "test": []}')
    assert f"{file}: expected at least 10 intents, got 1; get http" in error()[0]

    saved = tmp_path / "out" / "post-1.json"
    saved.parent.mkdir()
    for content, message in (("{", "damaged"), ("[]", "damaged"), ('{"options": 1, "losses": []}', "other options")):
        saved.write_text(content)
        (line,) = error("--generate", "--depths", "1", "--residuals", "post")
        assert f"{saved} is" in line and message in line
