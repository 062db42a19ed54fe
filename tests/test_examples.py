"""The example scripts run, on a tiny setting, and what they are made of is right."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load("named_entities")


@pytest.fixture(scope="module")
def poems():
    return load("flash_language_model")


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


TINY = ["--generate", "150", "--width", "32", "--layers", "2"]


def test_flash_language_model_runs(tmp_path):
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "flash_language_model.py", *TINY, "--epochs", "5", "--out", tmp_path],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "training, FLASH" in ran.stderr and "training, Transformer" in ran.stderr
    rows = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines() if line[:5] in ("FLASH", "Trans"))
    figures = [[float(x.replace(",", "")) for x in rows[name].split()[:2]] for name in ("FLASH", "Transformer")]
    (size, perplexity), (other_size, other) = figures
    assert abs(size / other_size - 1) < 0.01
    assert max(perplexity, other) < 60  # less than the 87 characters: both learn
    assert "\n浣溪沙·" in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["characters.json", "config.json", "model.safetensors"]


def test_killed_training_goes_on_as_if_nothing_had_been(poems, tmp_path, monkeypatch):
    torch.manual_seed(0)
    texts = poems.generate(80)
    alphabet = poems.Alphabet(texts)
    config = poems.FlashLMConfig(len(alphabet), 16, 32, 8, num_hidden_layers=1, chunk_size=64)
    monkeypatch.setattr(poems, "SAVE_EVERY", -1)
    monkeypatch.setattr(poems, "BATCH", 4)
    start = poems.FlashLM(config).state_dict()

    def train(folder, settings=None):
        network = poems.FlashLM(config)
        network.load_state_dict(start)
        poems.fit(network, texts, alphabet, 3, 0, "FLASH", folder / "a.safetensors", settings or {"a": 1})
        return network.state_dict()

    whole = train(tmp_path / "whole")

    class Killed(poems.tqdm):
        def update(self):
            super().update()
            if self.n == 4:  # in the second of the passes, before the step is saved
                raise KeyboardInterrupt

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(poems, "tqdm", Killed)
        train(killed)
    steps = []
    monkeypatch.setattr(poems, "cross_entropy", lambda *a, run=poems.cross_entropy: steps.append(0) or run(*a))
    again = train(killed)
    assert len(steps) == 3 * (len(alphabet.pack(texts)[0]) // 4) - 3
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="is of another run"):
        train(killed, {"a": 2})
    (killed / "a.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        train(killed)


def test_flash_language_model_refuses_bad_input_in_one_line(poems, tmp_path, monkeypatch, capsys):
    def error(*arguments):
        monkeypatch.setattr(sys, "argv", ["flash_language_model.py", "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as exit:
            poems.main()
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setenv("SUPY_DATA", str(tmp_path))
    file = tmp_path / "text" / "songci" / "songci.txt"
    assert f"No such file or directory: '{file}'" in error()
    file.parent.mkdir(parents=True)
    file.write_text("a\nb\n\nc\nd", encoding="utf-8")
    assert f"{file}: expected poems with a blank line between them, got 2; get https" in error()
    file.write_bytes(b"\xff")
    assert "codec" in error()
    assert "invalid positive value: '0'" in error("--epochs", "0")


def test_generated_poems_and_their_rows(poems):
    some = poems.generate(100)
    assert some[:30] == poems.generate(30)
    for poem in some:
        title, *lines = poem.split("\n")
        assert [len(line) - 1 for line in lines] == list(poems.TITLES[title.removesuffix("·无名")])
        assert len({next(rhyme for rhyme in poems.RHYMES if line[-2] in rhyme) for line in lines}) == 1
    alphabet = poems.Alphabet(some)
    ids, targets = alphabet.pack(some)
    assert ids.shape == targets.shape and ids.shape[1] == poems.LENGTH
    assert torch.equal(ids.flatten()[1:], targets.flatten()[:-1])
    text = "".join(alphabet.characters[i] if i > 1 else "|" for i in ids.flatten())
    assert "".join(f"|{poem}" for poem in some).startswith(text)
    assert alphabet.encode("龘") == [0]


def test_dead_classes_of_random_rows():
    environment = {name: value for name, value in os.environ.items() if name != "SUPY_DATA"}
    hide = "import sys, runpy; sys.modules['g2pM'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", hide, EXAMPLES / "dead_classes.py"], capture_output=True, text=True,
                         env=environment)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "of 500 classes can never be predicted" in ran.stdout and "in float64: 0 wrong" in ran.stdout


def test_dead_classes_reads_arrays_alone(tmp_path, monkeypatch):
    """A package laid out as g2pM is, with a layer in it and then with something executable."""
    example, package = load("dead_classes"), tmp_path / "g2pM"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    weight, bias = np.eye(3, dtype=np.float32), np.zeros(3, dtype=np.float32)
    state = {"logit_layer.2.weight": weight, "logit_layer.2.bias": bias}
    # The name that NumPy 1 wrote, as in the package.
    written = pickle.dumps(state, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (package / "np_ckpt.pkl").write_bytes(written)
    (package / "class2idx.pkl").write_bytes(pickle.dumps({"b1": 1, "a1": 0, "c1": 2}, protocol=2))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SUPY_DATA", "")
    found = example.g2pm_layer()
    assert (found[0] == weight).all() and (found[1] == bias).all() and found[2] == ["a1", "b1", "c1"]
    (package / "class2idx.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="print is not an array"):
        example.g2pm_layer()
