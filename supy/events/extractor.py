"""The extractor: trains, extracts, saves and loads."""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random

import torch

from supy._checkpoint import Checkpoint, ModelError, load_model, save_model
from supy.events.batches import THRESHOLDS, Predictor, make_windows
from supy.events.data import Document
from supy.events.labels import encode
from supy.events.metrics import evaluate
from supy.events.model import EncoderConfig, EventModel, GAUEncoder, PretrainedEncoder
from supy.events.schema import EventSchema
from supy.events.tokens import CharTokenizer, PretrainedTokenizer
from supy.events.training import TrainingOptions, train

log = logging.getLogger(__name__)

FORMAT = 2


class EventExtractor:
    """Finds events in texts: GPLinker (kexue.fm post 8926) over an encoder of your choice.

    Args:
        schema: event types and roles; default: those of the documents given to `fit`.
        encoder: an :class:`EncoderConfig`, for a small character-level encoder trained from scratch, or the name or folder
            of a Hugging Face model with a fast tokenizer (needs ``pip install supy[hf]``).
        typed: links know the event type. False is the published method, whose links mix overlapping events of
            different types.
        window, overlap: longer texts are cut into windows of so many tokens, with so many in common.
        device: where the model runs; default CUDA where there is one, else the CPU.

    >>> from supy.events import EncoderConfig, EventExtractor, TrainingOptions, generate_sample
    >>> extractor = EventExtractor(encoder=EncoderConfig(width=32, layers=1, value_size=32, key_size=16))
    >>> extractor = extractor.fit(generate_sample(40), options=TrainingOptions(epochs=1), progress=False)
    >>> extractor.extract(["A sentence without an event."])[0].text
    'A sentence without an event.'
    """

    def __init__(
        self,
        schema: EventSchema | None = None,
        *,
        encoder: EncoderConfig | str = EncoderConfig(),
        typed: bool = True,
        window: int = 512,
        overlap: int = 128,
        device: torch.device | str | None = None,
    ):
        if not 0 <= overlap < window:
            raise ValueError(
                f"supy.events.EventExtractor: overlap is {overlap}, expected 0 to window - 1 = {window - 1}"
            )
        self.schema = schema
        self.encoder = encoder
        self.typed = typed
        self.window, self.overlap = window, overlap
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.thresholds = THRESHOLDS
        self.bf16 = False
        self.model: EventModel | None = None
        self.tokenizer: CharTokenizer | PretrainedTokenizer | None = None

    def fit(
        self,
        documents: Sequence[Document],
        dev: Sequence[Document] | None = None,
        *,
        options: TrainingOptions = TrainingOptions(),
        folder: Path | str | None = None,
        progress: bool = True,
    ) -> EventExtractor:
        """Trains on ``documents`` and keeps the weights that score best on ``dev``.

        dev: default a tenth of the documents, which are then not trained on. folder: keeps a checkpoint after each epoch,
        from which the same call goes on if the run was killed, and at the end the model, as `save` does.
        """
        if not any(document.events for document in documents):
            raise ValueError("supy.events.fit: no document has an event, expected at least one")
        if dev is None:
            documents, dev = _hold_out(documents, options.seed)
        schema = self.schema or EventSchema.from_documents(documents)
        torch.manual_seed(options.seed)
        if isinstance(self.encoder, EncoderConfig):
            texts = [document.text for document in documents]
            self.tokenizer = CharTokenizer.from_texts(texts)
            encoder = GAUEncoder(len(self.tokenizer), self.tokenizer.pairs(texts), self.encoder)
        else:
            encoder, self.tokenizer = _pretrained(self.encoder)
        self.model = EventModel(encoder, schema, typed=self.typed).to(self.device)
        self.bf16 = options.use_bf16(self.device)
        self._report(documents)
        checkpoint = None
        if folder is not None:
            crc = zlib.crc32(json.dumps([asdict(d) for d in documents], ensure_ascii=False).encode())
            data = {"training data": f"{len(documents)} documents, crc {crc:08x}"}
            settings = {**data, **self._config(), "training options": asdict(options)}
            checkpoint = Checkpoint(folder, json.loads(json.dumps(settings)))
        self.model = train(
            self.model,
            documents,
            lambda model: evaluate(dev, self._predictor(model)(dev)),
            self.tokenizer,
            options,
            size=self.window,
            overlap=self.overlap,
            checkpoint=checkpoint,
            progress=progress,
        )
        self.thresholds = self._predictor(self.model).tune(dev)
        if folder is not None:
            self.save(folder)
            checkpoint.remove()
        return self

    def extract(self, texts: Iterable[str]) -> list[Document]:
        """A document with its events for each text."""
        return list(self.extract_each(texts))

    def extract_each(self, texts: Iterable[str], *, ahead: int = 128) -> Iterator[Document]:
        """`extract` for a stream of any length, in its order; ``ahead`` texts are read at a time."""
        predict = self._predictor(self._require_model())
        texts = iter(texts)
        while chunk := [Document(text) for text in islice(texts, ahead)]:
            undecoded: list[tuple[int, str]] = []
            found = predict(chunk, self.thresholds, undecoded)
            for number, kind in undecoded:
                log.warning("too many arguments of %s to decode in: %.40s", kind, chunk[number].text)
            for document, events in zip(chunk, found, strict=True):
                yield Document(document.text, events)

    def save(self, folder: Path | str) -> None:
        """Writes the model as safetensors and JSON; a folder that held a model holds it until the new one is whole."""
        self._require_model()
        folder = Path(folder)
        if isinstance(self.tokenizer, PretrainedTokenizer):
            self.tokenizer.save(folder / "encoder")
            self.model.encoder.model.config.save_pretrained(folder / "encoder")
        save_model(folder, self._config(), self.model.state_dict())

    @classmethod
    def load(
        cls, folder: Path | str, *, device: torch.device | str | None = None
    ) -> EventExtractor:
        """Reads what `save` wrote; :class:`supy.events.ModelError` names what is missing or damaged."""
        folder = Path(folder)
        config, tensors = load_model(folder)
        try:
            if config["format"] != FORMAT:
                raise ValueError(f"format {config['format']}, this supy reads {FORMAT}")
            encoder = config["encoder"]
            extractor = cls(
                EventSchema(config["labels"]),
                encoder=EncoderConfig(**encoder) if isinstance(encoder, dict) else encoder,
                typed=config["typed"],
                window=config["window"],
                overlap=config["overlap"],
                device=device,
            )
            extractor.thresholds = tuple(config["thresholds"])
            extractor.bf16 = config["bf16"]
            if isinstance(encoder, dict):
                extractor.tokenizer = CharTokenizer(config["characters"])
                network = GAUEncoder(
                    len(extractor.tokenizer), tensors["encoder.pairs"], extractor.encoder
                )
            else:
                network, extractor.tokenizer = _pretrained(encoder, folder / "encoder")
            model = EventModel(network, extractor.schema, typed=extractor.typed)
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{folder}: not a model of this supy ({reason})") from error
        extractor.model = model.to(extractor.device).eval()
        return extractor

    def _predictor(self, model: EventModel) -> Predictor:
        return Predictor(model, self.tokenizer, self.window, self.overlap, self.bf16)

    def _require_model(self) -> EventModel:
        if self.model is None:
            raise RuntimeError("supy.events.EventExtractor: no model yet; call fit or load first")
        return self.model

    def _config(self) -> dict:
        characters = isinstance(self.tokenizer, CharTokenizer)
        return {
            "format": FORMAT,
            "labels": [list(label) for label in self.model.schema.labels],
            "encoder": asdict(self.encoder) if characters else self.encoder,
            "typed": self.typed,
            "window": self.window,
            "overlap": self.overlap,
            "thresholds": list(self.thresholds),
            "bf16": self.bf16,
            "characters": self.tokenizer.characters if characters else None,
        }

    def _report(self, documents: Sequence[Document]) -> None:
        """One warning that counts what the labels cannot express."""
        cut = make_windows(documents, self.tokenizer, size=self.window, overlap=self.overlap)
        labels = encode(
            [window.document for window in cut.windows],
            self.model.schema,
            [window.tokens.offsets for window in cut.windows],
        )
        reasons = Counter(dropped.reason for dropped in labels.dropped)
        if cut.lost_arguments:
            reasons["longer than a window"] = cut.lost_arguments
        if reasons:
            parts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            log.warning("arguments that cannot be represented, and are not learned: %s", parts)
        if cut.split_events:
            log.warning("%d events do not fit into one window", cut.split_events)


def _hold_out(documents: Sequence[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Nine tenths to train, one to evaluate; documents of one text stay together."""
    texts = sorted({document.text for document in documents})
    Random(seed).shuffle(texts)
    held = set(texts[: max(1, len(texts) // 10)])
    return (
        [document for document in documents if document.text not in held] or list(documents),
        [document for document in documents if document.text in held],
    )


def _pretrained(
    name: str, saved: Path | None = None
) -> tuple[PretrainedEncoder, PretrainedTokenizer]:
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError:
        raise ImportError(
            f"supy.events: encoder {name!r} needs Hugging Face transformers: pip install supy[hf]"
        ) from None
    source = saved or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
        if saved:  # the weights are in the model's own file
            model = AutoModel.from_config(AutoConfig.from_pretrained(saved))
        else:
            model = AutoModel.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"supy.events: cannot load the encoder {str(source)!r}: {reason}") from error
    return PretrainedEncoder(model), PretrainedTokenizer(tokenizer)
