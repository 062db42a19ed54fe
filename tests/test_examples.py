"""The example scripts run, on a tiny setting, and what they are made of is right."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("named_entities", EXAMPLES / "named_entities.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_named_entities_runs():
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "named_entities.py", "--generate", "300", "--epochs", "4"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    rows = {line[:18].strip(): line.split()[-2:] for line in ran.stdout.splitlines() if "%" in line}
    with_rotary, without = (
        [float(score.rstrip("%")) for score in rows[name]] for name in ("rotary positions", "no positions")
    )
    # Tiny as it is: it learns, and sees the effect.
    assert min(with_rotary) > 50
    assert all(a > b + 5 for a, b in zip(with_rotary, without))
    assert "[PER " in ran.stdout and "training, no positions" in ran.stderr


def test_named_entities_refuses_bad_input_in_one_line(script, tmp_path, monkeypatch, capsys):
    def error(*arguments):
        monkeypatch.setattr(sys, "argv", ["named_entities.py", *arguments])
        with pytest.raises(SystemExit) as exit:
            script.main()
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()

    monkeypatch.setenv("SUPY_DATA", str(tmp_path))
    train = tmp_path / "ner" / "uner_zh" / "train.iob2"
    (line,) = error()
    assert f"No such file or directory: '{train}'" in line

    train.parent.mkdir(parents=True)
    for bad in ("2 word I-PER", "2\tword\tI-PER", "2\tword", "2\tword\tPER"):
        train.write_text(f"1\tword\tO\n{bad}\n")
        (line,) = error()
        assert f"{train}:2: expected number, word, and O, B-TYPE or I-TYPE, got {bad!r}; get https" in line
    train.write_bytes(b"\xff")
    (line,) = error()
    assert "codec" in line
    assert "invalid positive value: '0'" in error("--epochs", "0")[-1]


def test_generated_entities_nest_and_repeat(script):
    sentences = script.generate(200)
    assert sentences[:50] == script.generate(50)
    assert len({sentence.text for sentence in sentences}) == 200
    nested = 0
    for text, entities in sentences:
        for type, first, last in entities:
            assert 0 <= first < last < len(text)
            assert type != "PER" or (text[first] in script.GRAMMAR["surname"] and text[last] in script.GRAMMAR["given"])
            for _, a, b in entities:
                inside, around, apart = a <= first and last <= b, first <= a and b <= last, b < first or last < a
                assert inside or around or apart
                nested += inside and not around
    assert nested > 200


def test_words_are_joined(script, tmp_path):
    file = tmp_path / "a.iob2"
    file.write_text(
        "# text = 周伟在北京大学\n1\t周伟\tB-PER\t-\n2\t在\tO\t-\n3\t北京\tB-ORG\t-\n4\t大学\tI-ORG\t-\n\n\n"
        "1\t北京\tB-LOC\n2\t上海\tB-LOC",
        encoding="utf-8",
    )
    one, two = script.read_iob2(file)
    assert one == ("周伟在北京大学", {("PER", 0, 1), ("ORG", 3, 6)})
    assert two == ("北京上海", {("LOC", 0, 1), ("LOC", 2, 3)})


def test_nested_entities_are_marked(script):
    sentence = script.Sentence("北安大学周伟", frozenset({("ORG", 0, 3), ("LOC", 0, 1), ("PER", 4, 5)}))
    assert script.mark(sentence) == "[ORG [LOC 北安]大学][PER 周伟]"
