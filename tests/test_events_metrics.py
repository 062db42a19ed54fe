import json

import pytest

from supy.events import Document, Event, evaluate

SALE = Event.make("sale", [("seller", 0, 2), ("buyer", 5, 7), ("trigger", 3, 5)])
GIFT = Event.make("gift", [("giver", 0, 2), ("trigger", 8, 9)])


def test_by_hand():
    gold = [[SALE, GIFT], [SALE], [GIFT]]
    predicted = [
        [
            SALE,  # correct
            SALE,  # counts once
            Event.make("sale", SALE.arguments[:1]),  # no trigger: arguments count, the event not
            Event.make("gift", [("giver", 0, 3), ("trigger", 8, 9)]),  # one span is off by one
        ],
        [Event.make("gift", SALE.arguments)],  # all spans right, the type wrong
        [],
    ]
    scores = evaluate(gold, predicted)
    # Events: found sale, gift | gift; gold sale, gift | sale | gift.
    assert (scores.event.tp, scores.event.predicted, scores.event.gold) == (1, 3, 4)
    # Arguments: found buyer, seller, giver | buyer, seller; gold 3 | 2 | 1; correct 2.
    assert (scores.argument.tp, scores.argument.predicted, scores.argument.gold) == (2, 5, 6)
    assert scores.argument.precision == 2 / 5 and scores.argument.recall == 2 / 6
    assert scores.argument.f1 == pytest.approx(2 * (2 / 5) * (2 / 6) / (2 / 5 + 2 / 6))
    event, argument = scores.by_type["gift"]
    assert (event.tp, event.predicted, event.gold) == (0, 2, 2)
    assert (argument.tp, argument.predicted, argument.gold) == (0, 3, 2)

    without = evaluate(gold, predicted, require_trigger=False)
    assert (without.event.tp, without.event.predicted, without.event.gold) == (1, 4, 4)
    assert without.argument == scores.argument


def test_order_does_not_matter():
    turned = Event("sale", SALE.arguments[::-1])
    assert evaluate([[turned]], [[SALE]]).event.f1 == 1.0


def test_documents_or_events():
    of_documents = evaluate([Document("x", [SALE])], [Document("x", [GIFT])])
    assert of_documents == evaluate([[SALE]], [[GIFT]])


def test_a_repeated_gold_argument_is_never_matched():
    # As in the published script, which compares sorted lists.
    repeated = Event("sale", (*SALE.arguments, SALE.arguments[0]))
    scores = evaluate([[repeated]], [[SALE]])
    assert scores.event.f1 == 0.0 and scores.argument.f1 == 1.0


@pytest.mark.parametrize(
    "gold, predicted",
    [([], []), ([[]], [[]]), ([[SALE]], [[]]), ([[]], [[SALE]]), ([[Event("sale", ())]], [[]])],
)
def test_nothing_gives_zero(gold, predicted):
    scores = evaluate(gold, predicted)
    for score in (scores.event, scores.argument):
        assert (score.precision, score.recall, score.f1) == (0.0, 0.0, 0.0)
    assert "all" in str(scores)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="predicted has 1 documents, expected 2"):
        evaluate([[], []], [[]])


def test_printed_and_as_dict():
    scores = evaluate([[SALE, GIFT]], [[SALE]])
    assert json.loads(json.dumps(scores.to_dict()))["by_type"]["sale"]["event"] == {
        "precision": 1.0,
        "recall": 1.0,
        "f1": 1.0,
        "tp": 1,
        "predicted": 1,
        "gold": 1,
    }
    lines = str(scores).splitlines()
    assert lines[1] == "all" and lines[2].split() == "event 1.0000 0.5000 0.6667 1 1 2".split()
    assert len({len(line) for line in (lines[0], *lines[2:4])}) == 1
