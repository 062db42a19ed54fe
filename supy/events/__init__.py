"""Event extraction: data formats, training, extraction and scores."""

from supy._checkpoint import ModelError
from supy.events.data import (
    Argument,
    DataError,
    Document,
    Event,
    data_folder,
    event_to_json,
    read_duee,
    read_fewfc,
    write_fewfc,
)
from supy.events.decode import decode, decode_batch
from supy.events.extractor import EventExtractor
from supy.events.extractor import EventExtractor
from supy.events.labels import (
    Dropped,
    EventLabels,
    WindowedDocument,
    encode,
    merge_windows,
    split_document,
    split_windows,
)
from supy.events.metrics import Score, Scores, evaluate
from supy.events.model import EncoderConfig
from supy.events.model import EncoderConfig, EventModel
from supy.events.sample import generate_sample
from supy.events.schema import TRIGGER, EventSchema
from supy.events.training import TrainingOptions
from supy.events.training import TrainingOptions

__all__ = [
    "TRIGGER",
    "Argument",
    "DataError",
    "Document",
    "Dropped",
    "EncoderConfig",
    "EncoderConfig",
    "Event",
    "EventExtractor",
    "EventExtractor",
    "EventLabels",
    "EventModel",
    "EventSchema",
    "ModelError",
    "ModelError",
    "Score",
    "Scores",
    "TrainingOptions",
    "TrainingOptions",
    "WindowedDocument",
    "data_folder",
    "decode",
    "decode_batch",
    "encode",
    "evaluate",
    "event_to_json",
    "generate_sample",
    "merge_windows",
    "read_duee",
    "read_fewfc",
    "split_document",
    "split_windows",
    "write_fewfc",
]
