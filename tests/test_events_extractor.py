"""Training, extracting, saving and loading; what a kill, a damaged folder and a long text do."""

import json
import os
from random import Random
from types import SimpleNamespace

import pytest
import torch
from _killed import whole_and_killed

from supy._checkpoint import save_model
from supy.events import (
    TRIGGER,
    Document,
    EncoderConfig,
    Event,
    EventExtractor,
    EventSchema,
    ModelError,
    TrainingOptions,
    evaluate,
    generate_sample,
)
from supy.events import batches
from supy.events.augment import swap_arguments
from supy.events.batches import bucketed, collate, make_windows
from supy.events.model import GAUEncoder, without_overlaps
from supy.events.tokens import CharTokenizer

TINY = EncoderConfig(width=32, layers=1, value_size=32, key_size=16)
QUICK = TrainingOptions(epochs=2, evaluate_every=2, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained():
    return EventExtractor(encoder=TINY).fit(generate_sample(60), options=QUICK, progress=False)


def weights(extractor):
    return extractor.model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_sixteen_sentences_by_heart():
    # One template a type is enough to overfit: every argument of the training data comes back.
    documents = generate_sample(16, seed=3)
    options = TrainingOptions(
        epochs=60, batch_size=4, learning_rate=4e-3, swap=0.0, evaluate_every=20, average=0.9, bf16=False
    )
    config = EncoderConfig(
        width=64, layers=2, value_size=64, key_size=32, dropout=0.0, outer_dropout=0.0, character_dropout=0.0
    )
    extractor = EventExtractor(encoder=config)
    extractor.fit(documents, documents, options=options, progress=False)
    found = extractor.extract(document.text for document in documents)
    assert evaluate(documents, found).argument.f1 > 0.9


def test_extract_keeps_order_and_text(trained):
    texts = ["b" * 7, "", "a" * 300, "公司收购"]
    assert [document.text for document in trained.extract(texts)] == texts
    assert [d.text for d in trained.extract_each(iter(texts), ahead=1)] == texts


def test_save_and_load_extract_the_same(trained, tmp_path):
    trained.save(tmp_path)
    loaded = EventExtractor.load(tmp_path)
    assert same(weights(loaded), weights(trained))
    texts = [document.text for document in generate_sample(20, seed=9)]
    loaded.bf16 = trained.bf16
    assert loaded.extract(texts) == trained.extract(texts)


def test_saving_again_replaces_the_weights(trained, tmp_path):
    trained.save(tmp_path)
    with torch.no_grad():
        other = EventExtractor.load(tmp_path)
        next(other.model.parameters()).add_(1)
    other.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert same(weights(EventExtractor.load(tmp_path)), weights(other))


def test_a_kill_while_saving_leaves_the_old_model(trained, tmp_path, monkeypatch):
    trained.save(tmp_path)
    before = weights(EventExtractor.load(tmp_path))
    replace, calls = os.replace, []

    def dies(source, target):  # after the new weights, before the configuration that names them
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    tensors = {name: value + 1 for name, value in before.items()}
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path, json.loads((tmp_path / "config.json").read_text()), tensors)
    monkeypatch.undo()
    assert same(weights(EventExtractor.load(tmp_path)), before)


def damage_nothing(folder):
    for file in folder.iterdir():
        file.unlink()


def damage_config(folder):
    (folder / "config.json").write_text('{"format": 1, "labels": [["a"')


def damage_format(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 99}))


def damage_fields(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["labels"]
    (folder / "config.json").write_text(json.dumps(config))


def truncate_weights(folder):
    (weights,) = folder.glob("model-*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])


def flip_a_bit(folder):
    (weights,) = folder.glob("model-*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)


def remove_weights(folder):
    next(folder.glob("model-*.safetensors")).unlink()


@pytest.mark.parametrize(
    "damage, expected",
    [
        (damage_nothing, "config.json: expected a model's configuration, found none"),
        (damage_config, "config.json: not a model's configuration"),
        (damage_format, "format 99, this supy reads"),
        (damage_fields, "not a model of this supy ('labels')"),
        (truncate_weights, "the file is damaged"),
        (flip_a_bit, "the file is damaged"),
        (remove_weights, "cannot read the weights"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(trained, tmp_path, damage, expected):
    trained.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError) as raised:
        EventExtractor.load(tmp_path)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


KILLED = """
import sys, torch
torch.set_num_threads(1)
from supy.events import EncoderConfig, EventExtractor, TrainingOptions, generate_sample
options = TrainingOptions(epochs=6, evaluate_every=3, batch_size=8)
encoder = EncoderConfig(width=32, layers=1, value_size=32, key_size=16)
EventExtractor(encoder=encoder).fit(generate_sample(60), options=options, folder=sys.argv[1], progress=False)
"""


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    whole, killed = whole_and_killed(KILLED, tmp_path)
    assert same(weights(EventExtractor.load(whole)), weights(EventExtractor.load(killed)))
    assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()}


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    documents = generate_sample(40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EventExtractor, "save", stop)  # a run that ends before the model is written
        with pytest.raises(Stop):
            EventExtractor(encoder=TINY).fit(
                documents, options=QUICK, folder=tmp_path, progress=False
            )
    with pytest.raises(ModelError, match="is of another run: training data was '36 documents"):
        EventExtractor(encoder=TINY).fit(
            generate_sample(44), options=QUICK, folder=tmp_path, progress=False
        )
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        EventExtractor(encoder=TINY).fit(documents, options=QUICK, folder=tmp_path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match="epoch 1, step"):
        EventExtractor(encoder=TINY).fit(
            generate_sample(40),
            options=TrainingOptions(epochs=1, learning_rate=1e30, warmup=0.0),
            progress=False,
        )


def test_no_events_is_an_error():
    with pytest.raises(ValueError, match="no document has an event"):
        EventExtractor(encoder=TINY).fit([Document("text")] * 20)


def test_what_cannot_be_represented_is_reported(caplog):
    # A window of eight characters holds neither the long argument nor both ends of the event.
    event = Event.make("sale", [("seller", 0, 12), ("trigger", 15, 17), ("buyer", 30, 32)])
    EventExtractor(encoder=TINY, window=8, overlap=2).fit(
        [Document("x" * 40, [event])] * 3, options=TrainingOptions(epochs=1), progress=False
    )
    messages = [record.getMessage() for record in caplog.records]
    assert any("longer than a window" in message for message in messages)
    assert any("do not fit into one window" in message for message in messages)


def test_windows_cover_long_texts_and_map_back(trained):
    # Spans of a window, shifted by where it begins, are spans of the text: no character is lost.
    text = "甲公司以3亿元收购乙公司。" * 60
    tokenizer = CharTokenizer.from_texts([text], min_count=1)
    cut = make_windows([Document(text)], tokenizer, size=100, overlap=30).windows
    assert {i for window in cut for i in range(*window.characters)} == set(range(len(text)))
    for window in cut:
        start, stop = window.characters
        assert window.document.text == text[start:stop] and len(window.tokens.ids) <= 100


def test_batches_pad_little_and_hold_every_window_once():
    documents = generate_sample(50)
    tokenizer = CharTokenizer.from_texts(d.text for d in documents)
    cut = make_windows(documents, tokenizer, size=512, overlap=0).windows
    batches = bucketed(cut, 8, Random(0))
    assert sorted(w.number for batch in batches for w in batch) == list(range(50))
    ids, lengths = collate(batches[0], tokenizer.PADDING)
    assert ids.shape == (8, lengths.max()) and (ids != 0).sum() == lengths.sum()
    assert bucketed(cut, 8, Random(0)) == batches != bucketed(cut, 8, Random(1))


def test_swapped_arguments_are_those_of_others():
    documents = generate_sample(80)
    words = {
        document.text[start:end]
        for document in documents
        for event in document.events
        for _, start, end in event.arguments
    }
    changed = 0
    for before, after in zip(documents, swap_arguments(documents, 0.8, Random(0)), strict=True):
        changed += before.text != after.text
        for old, new in zip(before.events, after.events, strict=True):
            for (role, start, end), (new_role, new_start, new_end) in zip(
                old.arguments, new.arguments, strict=True
            ):
                assert role == new_role and after.text[new_start:new_end] in words
                if role == TRIGGER:
                    assert after.text[new_start:new_end] == before.text[start:end]
    assert changed > 40
    assert swap_arguments(documents, 0.0, Random(0)) == documents


def test_where_spans_of_one_label_overlap_the_best_stays():
    # Rows (document, label, first, last): nested, chained, of another label, of another document, apart.
    rows = [[0, 0, 0, 3], [0, 0, 2, 5], [0, 0, 5, 6], [0, 1, 0, 3], [0, 0, 8, 8], [1, 0, 2, 5]]
    scores = torch.tensor([2.0, 3.0, 1.0, 0.5, 0.1, 0.2])
    spans, kept = without_overlaps(torch.tensor(rows), scores)
    assert spans.tolist() == [rows[1], rows[3], rows[4], rows[5]] and kept.tolist() == scores[[1, 3, 4, 5]].tolist()


@pytest.mark.parametrize(
    "event_f1, chosen",
    [
        ({-6: 0.10, -4: 0.12, -2: 0.135, 0: 0.10}, -4),  # better by less than the margin
        ({-6: 0.10, -4: 0.12, -2: 0.15, 0: 0.70}, 0),
        ({-6: 0.16, -4: 0.12, -2: 0.12, 0: 0.12}, -6),
    ],
)
def test_thresholds_of_links_move_only_where_it_pays(event_f1, chosen, monkeypatch):
    predictor = batches.Predictor(None, None, 64, 8, False)
    documents = generate_sample(3)
    monkeypatch.setattr(batches.Predictor, "_batches", lambda self, documents, thresholds: [thresholds])
    monkeypatch.setattr(batches.Predictor, "_events", lambda self, count, found, thresholds: thresholds)

    def scores(documents, thresholds):
        return SimpleNamespace(event=SimpleNamespace(f1=event_f1[thresholds[1]]), argument=SimpleNamespace(f1=0.6))

    monkeypatch.setattr(batches, "evaluate", scores)
    assert predictor.tune(documents) == (0.0, chosen)


def test_restoring_counts_the_hidden_characters_only():
    torch.manual_seed(0)
    encoder = GAUEncoder(9, torch.empty(0, dtype=torch.int64), TINY).train()
    ids = torch.randint(2, 9, (3, 40))
    lengths = torch.tensor([40, 20, 5])
    given = encoder.hide(ids)
    hidden = torch.randn(3, 40, 32)
    expected, count = 0.0, 0
    for b, length in enumerate(lengths.tolist()):
        for t in range(length):
            if given[b, t] != ids[b, t]:
                assert given[b, t] == encoder.UNKNOWN
                scores = encoder.restore(hidden[b, t])
                expected = expected - scores.log_softmax(0)[ids[b, t]] / 3 * TINY.restoring
                count += 1
    assert 0 < count < 30
    torch.testing.assert_close(encoder.restoring_loss(hidden, ids, lengths, given), expected)
    assert encoder.restoring_loss(hidden, ids, lengths, ids) == 0
    assert encoder.eval().hide(ids) is ids


def test_published_links_and_a_schema_of_my_own():
    documents = generate_sample(40)
    labels = EventSchema.from_documents(documents).labels
    extractor = EventExtractor(EventSchema([*labels, ("unseen", "trigger")]), encoder=TINY, typed=False)
    extractor.fit(documents, options=TrainingOptions(epochs=1), progress=False)
    assert extractor.model.head_links.biases.out_features == 2
    assert extractor.model.schema.types[-1] == "unseen"


def test_pretrained_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    # Words of several characters, so that tokens are not characters, and [CLS], [SEP] around them.
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "Ann": 4, "sells": 5, "Bob": 6}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    source = tmp_path / "bert"
    transformers.BertModel(config).save_pretrained(source)
    fast.save_pretrained(source)

    event = Event.make("sale", [("seller", 0, 3), ("trigger", 4, 9)])
    documents = [Document("Ann sells to Bob", [event])] * 8
    extractor = EventExtractor(encoder=str(source), window=16, overlap=4)
    options = TrainingOptions(
        epochs=60, batch_size=4, learning_rate=5e-3, swap=0.0, average=0.5, evaluate_every=20, bf16=False
    )
    extractor.fit(documents, documents, options=options, progress=False)
    assert extractor.extract(["Ann sells to Bob"])[0].events == [event]
    extractor.save(tmp_path / "model")
    loaded = EventExtractor.load(tmp_path / "model")
    assert loaded.extract(["Ann sells to Bob"])[0].events == [event]


def test_a_slow_tokenizer_is_refused():
    from supy.events.tokens import PretrainedTokenizer

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is a slow tokenizer, expected a fast one"):
        PretrainedTokenizer(Slow())
