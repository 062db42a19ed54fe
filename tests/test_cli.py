"""The command: it works end to end, and bad input is one line on stderr, exit code 2 and nothing half-written."""

import json
import subprocess
import sys

import pytest
import torch

from supy.cli import main
from supy.events import (
    EncoderConfig,
    EventExtractor,
    EventSchema,
    TrainingOptions,
    generate_sample,
    write_fewfc,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.json"
    write_fewfc(path, generate_sample(40))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    encoder = EncoderConfig(width=32, layers=1, value_size=32, key_size=16)
    EventExtractor(encoder=encoder).fit(
        generate_sample(40), options=TrainingOptions(epochs=1), folder=folder, progress=False
    )
    return folder


def run(capsys, *argv):
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_train_then_evaluate_then_extract(tmp_path, data, capsys):
    folder = tmp_path / "model"
    code, out, _ = run(capsys, "events", "train", "--train", data, "--dev", data, "--out", folder, "--epochs", 1)
    assert code == 0 and f"model written to {folder}" in out
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]

    code, out, _ = run(capsys, "events", "evaluate", "--model", folder, "--data", data, "--json")
    assert code == 0 and {"event", "argument", "by_type"} == json.loads(out).keys()
    code, out, _ = run(capsys, "events", "evaluate", "--model", folder, "--data", data)
    assert code == 0 and "precision" in out

    code, out, _ = run(capsys, "events", "extract", "--model", folder, data)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [r["text"] for r in records] == [d.text for d in generate_sample(40)]
    assert all({"id", "text", "events"} == r.keys() for r in records)


def test_extract_reads_stdin_and_writes_as_it_goes(model):
    command = [sys.executable, "-m", "supy", "events", "extract", "--model", str(model)]
    text = "甲公司收购乙公司。\n\n第二行。\n".encode()
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["甲公司收购乙公司。", "第二行。"]


def test_extract_leaves_out_bad_lines_and_says_which(tmp_path, model, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"text": "one", "id": 7}\n{"text": "tru\n\xff\xfe\n{"text": 3}\n[]\n{"content": "two"}\n'
    )
    code, out, err = run(capsys, "events", "extract", "--model", model, path)
    assert code == 2
    records = [json.loads(line) for line in out.splitlines()]
    assert [(r.get("id"), r["text"]) for r in records] == [(7, "one"), (None, "two")]
    lines = err.splitlines()
    for number, line in zip((2, 3, 4, 5), lines, strict=False):
        assert line.startswith(f"supy: {path}:{number}: expected")
    assert lines[-1] == "supy: 4 bad lines were left out"


RECORD = '{"content": "Ann sells", "events": [{"type": "sale", "mentions": [%s]}]}\n'
GOOD = RECORD % '{"role": "seller", "word": "Ann", "span": [0, 3]}'
BAD = {
    "truncated": (GOOD[:40], "expected a JSON object"),
    "not UTF-8": ("\udcff\n", "expected UTF-8, got byte 0xff"),
    "offsets outside": (RECORD % '{"role": "seller", "word": "Ann", "span": [0, 99]}', "inside the text of 9"),
    "unknown type": (GOOD.replace('"sale"', '"gift"'), "event type 'gift' is not one of sale"),
    "unknown role": (GOOD.replace('"seller"', '"thief"'), "role 'thief' of event type 'sale'"),
    "empty": ("", "expected one JSON object a line, found none"),
}


@pytest.mark.parametrize("content, expected", BAD.values(), ids=BAD)
def test_bad_training_data(tmp_path, capsys, content, expected):
    path, schema = tmp_path / "bad.json", tmp_path / "schema.json"
    path.write_bytes((GOOD if content else "").encode() + content.encode("utf-8", "surrogateescape"))
    schema.write_text(EventSchema([("sale", "seller")]).to_json(), encoding="utf-8")
    out = tmp_path / "model"
    code, _, err = run(capsys, "events", "train", "--train", path, "--schema", schema, "--out", out)
    assert code == 2 and not out.exists()
    (line,) = err.splitlines()
    assert line.startswith(f"supy: error: {path}:") and expected in line


def test_missing_files(tmp_path, data, capsys):
    for argv in (
        ("train", "--train", tmp_path / "none.json", "--out", tmp_path / "out"),
        ("evaluate", "--model", tmp_path / "none", "--data", data),
        ("extract", "--model", tmp_path / "none"),
    ):
        code, out, err = run(capsys, "events", *argv)
        assert code == 2 and not out and len(err.splitlines()) == 1 and "none" in err


def test_an_encoder_that_is_not_there(tmp_path, data, capsys):
    folder = tmp_path / "no-such-model"
    folder.mkdir()
    code, _, err = run(
        capsys, "events", "train", "--train", data, "--out", tmp_path / "out", "--encoder", folder
    )
    assert code == 2 and len(err.splitlines()) == 1 and "no-such-model" in err


def test_wrong_arguments_exit_with_2(capsys):
    for argv in ([], ["events"], ["events", "train"], ["events", "train", "--epochs", "0"], ["nonsense"]):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == 2


def test_help_everywhere(capsys):
    for argv in ([], ["events"], ["events", "train"], ["events", "extract"], ["events", "evaluate"], ["info"]):
        with pytest.raises(SystemExit) as exit:
            main([*argv, "--help"])
        assert exit.value.code == 0 and "usage: supy" in capsys.readouterr().out


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and "rotary" in out
