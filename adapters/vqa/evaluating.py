"""Measuring answers, captions and re-ranked retrieval: `unicl eval MODEL vqa-... SET`."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.vqa.answers import measure, write_submission
from adapters.vqa.caption_metrics import caption_metrics
from adapters.vqa.data import eval_loader
from adapters.vqa.pretrained import Reader, overridden, reader_of
from adapters.vqa.question_samples import QuestionSamples
from adapters.vqa.questions import QuestionSet, open_question_set
from adapters.vqa.reranking import Candidates, find_candidates, match_scores
from adapters.vqa.speaking import build_speaker
from adapters.vqa.watching import answer_all, caption_all
from unicl.data.atomic import atomic_file
from unicl.data.image_sets import CaptionSet, open_image_set
from unicl.data.image_sets.samples import Numbered
from unicl.data.loader import Loader
from unicl.data.reader import SampleSet
from unicl.distributed import Ranks, joined
from unicl.errors import UniclError, UsageError
from unicl.evaluation.cache import Setting, decoder_of, image_embeddings, texts_embeddings
from unicl.evaluation.embeddings import autocast_of, computing_in, device_of
from unicl.evaluation.page import figure
from unicl.evaluation.protocols import CaptionPairs, recall_figures
from unicl.evaluation.results import SAID, Result, save_result
from unicl.evaluator import Options, require_writable, results_folder, setting_of
from unicl.models import choose_device, load
from unicl.towers.pretrained import Pretrained

logger = logging.getLogger("unicl")

_OBJECTIVES = {"accuracy": "answers", "captions": "captions", "rerank": "pretraining"}
_OVERRIDES = {
    "accuracy": (),
    "captions": ("num_beams", "top_p", "max_words"),
    "rerank": ("candidates", "towers"),
}


def evaluate(
    evaluation: str,
    model: str | Path,
    data: Sequence[str],
    options: Options,
    overrides: Mapping[str, str],
) -> list[Result]:
    """Measure a model by one of the plug-in's evaluations; several ranks share the work.

    Each result is written as soon as it is there; beside it what was answered or said, as the
    servers of VQAv2 and COCO take it. Of a part without published answers that is all.

    Args:
        evaluation: accuracy: VQA's, of answers; captions: CIDEr and BLEU; rerank: retrieval whose
            best candidates are looked at again.
        model: a run of this plug-in.
        data: names of known sets, or folders.
        options: where and how.
        overrides: other ways of using the model, such as {"vqa.num_beams": "5"}.

    Raises:
        UsageError: the model was trained for something else, or there is no such set or split.
        UniclError: the model cannot be loaded, or images cannot be read.
    """
    _refuse(evaluation, data, options, overrides)
    device = choose_device(options.device)
    with joined(device, timeout_seconds=600, alone=True) as ranks:
        # Opened before the model is loaded: a name that is wrong is told at once.
        sets = ranks.together(lambda: [_open(evaluation, name, options) for name in data])
        loaded = ranks.together(lambda: load(model, device=str(device)))
        reader = ranks.together(lambda: _reader(evaluation, loaded, overrides))
        out = results_folder(model) if options.out is None else options.out
        ranks.on_first(lambda: require_writable(out))
        mark = ", ".join(f"{key}={value}" for key, value in sorted(overrides.items()))
        work = _Work(loaded, reader, options, ranks, out, {"mark": mark} if mark else {})
        results = []
        for each in sets:
            with computing_in(device, autocast_of(options.precision)):
                result = getattr(work, evaluation)(each)
            if result is not None:
                results.append(result)
                value = figure(result.headline, result.metrics[result.headline])
                logger.info("%s: %s %s", result.name, result.headline, value)
    return results


def _refuse(
    evaluation: str, data: Sequence[str], options: Options, overrides: Mapping[str, str]
) -> None:
    if options.download:
        raise UsageError("--download fetches no sets of questions or captions; leave it out")
    if options.templates is not None:
        raise UsageError(f"--templates has no effect on vqa-{evaluation}; leave it out")
    if "all" in data or not data:
        raise UsageError(f"the sets of vqa-{evaluation} have no name here; give folders")
    allowed = [f"vqa.{name}" for name in _OVERRIDES[evaluation]]
    for key in overrides:
        if key not in allowed:
            known = f"there are {', '.join(allowed)}" if allowed else "it takes none"
            raise UsageError(f"{key} has no effect on vqa-{evaluation}; {known}")


def _open(evaluation: str, name: str, options: Options) -> QuestionSet | CaptionSet:
    if evaluation == "accuracy":
        return open_question_set(name, split=options.split, root=options.root)
    opened = open_image_set(name, split=options.split, root=options.root, kind="captions")
    assert isinstance(opened, CaptionSet)
    return opened


def _reader(evaluation: str, model: Pretrained, overrides: Mapping[str, str]) -> Reader:
    reader = reader_of(model, _OBJECTIVES[evaluation])
    return replace(reader, config=overridden(reader.config, overrides))


class _Work:
    """One model, and how it is measured."""

    def __init__(
        self,
        model: Pretrained,
        reader: Reader,
        options: Options,
        ranks: Ranks,
        out: Path,
        mark: Mapping[str, str],
    ) -> None:
        self.model, self.reader, self.options = model, reader, options
        self.ranks, self.out, self.mark = ranks, out, mark

    def accuracy(self, questions: QuestionSet) -> Result | None:
        """Answer all questions; measure them where people's answers are published."""
        start = time.perf_counter()
        reader = self.reader
        samples = QuestionSamples(questions)
        said = answer_all(reader.model, self._loader(samples), questions, reader.config.answers)
        _require_some(said, questions)
        self._tell_cut(questions)
        missing = questions.num_questions - len(said)
        if not questions.annotated:
            path = self.out / f"{questions.name.replace('/', '_')}@{questions.split}{SAID}"
            self.ranks.on_first(partial(write_submission, path, list(said), list(said.values())))
            logger.info("%s has no published answers; they are for the server: %s", questions, path)
            return None
        skipped = {**questions.skipped, **({"unreadable image": missing} if missing else {})}
        result = Result(
            task="vqa",
            dataset=questions.name,
            model=self.model.name,
            metrics=measure(said, questions),
            headline="accuracy",
            num_images=questions.num_questions,
            skipped=skipped,
            protocol={**self._protocol(questions.split), "num_answers": len(reader.config.answers)},
            seconds=time.perf_counter() - start,
        )
        self.ranks.on_first(
            lambda: write_submission(self._beside(result), list(said), list(said.values()))
        )
        return result

    def captions(self, images: CaptionSet) -> Result:
        """Say what is in all images, and compare with what people said."""
        start = time.perf_counter()
        config = self.reader.config
        speaker = build_speaker(self.reader.model, self.reader.tokens, config)
        said = caption_all(speaker, self._loader(Numbered(images, texts=False)))
        _require_some(said, images)
        result = Result(
            task="captioning",
            dataset=images.name,
            model=self.model.name,
            metrics=caption_metrics(said, dict(enumerate(images.captions))),
            headline="cider",
            num_images=len(said),
            skipped=_missing(images, len(said)),
            protocol={
                **self._protocol(images.split),
                **{name: getattr(config, name) for name in _OVERRIDES["captions"]},
            },
            seconds=time.perf_counter() - start,
        )
        rows = [
            {"image_id": _image_id(images, row), "caption": caption}
            for row, caption in sorted(said.items())
        ]
        self.ranks.on_first(lambda: _write_json(self._beside(result), rows))
        return result

    def rerank(self, images: CaptionSet) -> Result:
        """Search with two towers, then look at the best again with co-attention."""
        start = time.perf_counter()
        count = self.reader.config.candidates
        towers = self._towers(self.reader.config.towers)
        setting: Setting = setting_of(self.options, self.ranks)
        embedded = image_embeddings(towers, images, setting)
        rows = embedded.rows.tolist()
        asked = CaptionPairs.of(images, rows)
        pictures, right = embedded.embeddings, asked.right
        texts = texts_embeddings(towers, asked.texts, setting)
        found = {
            "i2t": find_candidates(pictures, texts, right, count=count),
            "t2i": find_candidates(texts, pictures, right.flip(1), count=count),
        }
        matches = self._matched(images, rows, asked.texts, found)
        scale = towers.model.scale().item()
        after = {
            side: each.ranks(matches[side] + scale * each.similarities)
            for side, each in found.items()
        }
        before = {side: each.before for side, each in found.items()}
        result = Result(
            task="retrieval_reranked",
            dataset=images.name,
            model=self.model.name,
            metrics={
                **_figures(after, asked),
                **{f"towers_{name}": share for name, share in _figures(before, asked).items()},
            },
            headline="t2i_r1",
            num_images=len(rows),
            skipped={**images.skipped, **embedded.skipped},
            protocol={
                **self._protocol(images.split),
                **asked.about,
                "candidates": count,
                "towers": towers.name,
            },
            seconds=time.perf_counter() - start,
        )
        self.ranks.on_first(lambda: save_result(self.out, result))
        return result

    def _matched(
        self,
        images: CaptionSet,
        rows: Sequence[int],
        texts: tuple[str, ...],
        found: Mapping[str, Candidates],
    ) -> dict[str, Tensor]:
        """Return the scores of all candidates, each pair of image and text looked at once."""
        count = len(texts)
        queries = {side: each.queries[:, None] for side, each in found.items()}
        numbers = {
            "i2t": queries["i2t"] * count + found["i2t"].items,
            "t2i": found["t2i"].items * count + queries["t2i"],
        }
        unique = torch.cat([each.flatten() for each in numbers.values()]).unique()
        place = {row: number for number, row in enumerate(rows)}
        scores = match_scores(
            self.reader.model,
            self._loader(Numbered(images, texts=False)),
            self.reader.tokens,
            texts,
            torch.stack([unique // count, unique % count], 1),
            lambda row: place.get(row, -1),
            batch_size=self.options.batch_size,
        )
        return {side: scores[torch.searchsorted(unique, each)] for side, each in numbers.items()}

    def _towers(self, name: str) -> Pretrained:
        """Return what the candidates are of."""
        if not name:
            return self.model
        return self.ranks.together(lambda: load(name, device=str(device_of(self.model.model))))

    def _loader(self, samples: SampleSet) -> Loader:
        return eval_loader(
            samples,
            self.reader.tokens,
            decode=decoder_of(self.model),
            batch_size=self.options.batch_size,
            num_workers=self.options.num_workers,
            max_skipped_share=None,
            ranks=self.ranks,
        )

    def _tell_cut(self, questions: QuestionSet) -> None:
        tokens = self.reader.tokens
        # Only texts of many letters can be of many tokens.
        long = (q for q in questions.questions if len(q) >= tokens.context_length - 2)
        if cut := sum(not tokens.fits(question) for question in long):
            logger.warning(
                "%s: %d questions are longer than %d tokens; only their beginning is seen",
                *(questions, cut, tokens.context_length),
            )

    def _protocol(self, split: str) -> dict[str, Any]:
        return {
            "split": split,
            "image_size": self.model.image_size,
            "precision": self.options.precision,
            **self.mark,
        }

    def _beside(self, result: Result) -> Path:
        stem = save_result(self.out, result).with_suffix("")
        return stem.with_name(stem.name + SAID)


def _require_some(said: Mapping[int, str], asked: QuestionSet | CaptionSet) -> None:
    if not said:
        raise UniclError(f"no image of {asked.name} can be read, as told above")


def _missing(images: CaptionSet, count: int) -> dict[str, int]:
    missing = images.num_samples - count
    return {**images.skipped, **({"unreadable image": missing} if missing else {})}


def _figures(ranks: Mapping[str, Tensor], asked: CaptionPairs) -> dict[str, float]:
    # A text asks as often as it is somebody's caption.
    texts = ranks["t2i"].repeat_interleave(asked.times)
    return recall_figures({"i2t": ranks["i2t"], "t2i": texts})


def _image_id(images: CaptionSet, row: int) -> int | str:
    """Return the number in an image's file name, as COCO's results have it, or the name."""
    name = Path(images.locate(row)[0]).stem
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else name


def _write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(list(rows)).encode())
