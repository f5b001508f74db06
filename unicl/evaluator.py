"""`unicl eval`: a model and sets by their names, a protocol; figures beside the papers'."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unicl.config import Medium, Skill, evaluation_names, find_holder, split_evaluation
from unicl.data.atomic import atomic_file, write_error
from unicl.data.hash_table import normalise
from unicl.data.image_sets import (
    KNOWN_SETS,
    LINEAR_PROBE_SETS,
    ZERO_SHOT_SETS,
    CaptionSet,
    ClassificationSet,
    MissingSetError,
    open_image_set,
)
from unicl.data.prompts import TEMPLATES
from unicl.distributed import Ranks, find_launch, joined
from unicl.errors import UniclError, UsageError
from unicl.evaluation import protocols
from unicl.evaluation.answers import save_answers
from unicl.evaluation.cache import Setting
from unicl.evaluation.embeddings import autocast_of
from unicl.evaluation.linear_probe import LinearProbe
from unicl.evaluation.page import figure
from unicl.evaluation.published import Published, is_rank, published
from unicl.evaluation.results import Result, save_result, to_csv
from unicl.models import choose_device, load_for
from unicl.towers.pretrained import Pretrained

logger = logging.getLogger("unicl")

TASKS = ("zero-shot", "linear-probe", "few-shot", "retrieval")
"""Protocols that leave the model as it is."""

# Names of classes that a warning has room for.
_SHOWN = 5
_PAPERS_SETS = {
    "zero-shot": ZERO_SHOT_SETS,
    "linear-probe": LINEAR_PROBE_SETS,
    "retrieval": ("flickr30k", "coco"),
}


def default_cache() -> Path:
    """Return where embeddings are remembered: $UNICL_CACHE, or unicl in the user's cache folder."""
    if own := os.environ.get("UNICL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unicl"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where sets and results lie, and how the work is done."""

    root: Path = Path("data")
    """Known sets lie in `root/NAME`."""
    download: bool = False
    """Fetch known sets that are not there."""
    split: str = "test"
    """Part of each set that is asked about."""
    out: Path | None = None
    """Folder of the results; unset is `evaluation` in the run's folder, or below runs/."""
    cache: Path | None = None
    """Folder of what was embedded before; unset remembers nothing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "fp32"
    """Type of the towers' arithmetic: fp32, bf16 or fp16."""
    batch_size: int = 256
    """Images (of videos: frames) or texts per forward pass and rank."""
    num_workers: int = 2
    """Processes that read and decode images."""
    templates: str | None = None
    """Name of a prompt ensemble; unset takes each set's own."""
    probe: Path | None = None
    """Linear probe: a saved one to test; unset fits one on the set's train part."""
    shots: tuple[int, ...] = (5, 20, 50)
    """Few-shot: images to learn from per class."""
    num_episodes: int = 600
    """Few-shot: how often for each number of shots."""
    seed: int = 0
    """Few-shot: decides the episodes."""

    @property
    def ensemble(self) -> tuple[str, ...] | None:
        """The prompt ensemble that `templates` names; None is each set's own."""
        return None if self.templates is None else TEMPLATES[self.templates]


def evaluate(
    model: str | Path,
    task: str,
    data: Sequence[str],
    options: Options | None = None,
    overrides: Mapping[str, str] | None = None,
) -> list[Result]:
    """Evaluate a model by one of the paper's protocols; several ranks share the work.

    Each result is written as soon as it is there, in CLIP_benchmark's schema.

    Args:
        model: what `unicl.models.load` takes.
        task: zero-shot, linear-probe, few-shot or retrieval; those of a plug-in have its name
            before, such as video-retrieval.
        data: names of known sets, or folders; `all` is the paper's sets, as far as they are there.
        options: where and how.
        overrides: keys of a plug-in's section, such as {"video.num_clips": "4"}.

    Example: `evaluate("open_clip:ViT-B-32/openai", "zero-shot", ["cifar10", "photos/"])`.

    Raises:
        UsageError: there is no such task, set or split, or the sets are of the other kind.
        UniclError: the model cannot be loaded, or images cannot be read.
    """
    options = Options() if options is None else options
    if isinstance(data, str):  # to Python a list of letters
        raise UsageError(f"data must be a list, got one str: put {data!r} in brackets")
    plugin, protocol = split_evaluation(task)
    if protocol not in (TASKS if plugin is None else plugin.evaluations) and task != "fine-tune":
        known = ", ".join((*TASKS, *evaluation_names()))
        raise UsageError(f"there is no task {task!r}: choose from {known}, or fine-tune")
    check(options)
    if isinstance(plugin, Skill):
        of_skill: list[Result] = plugin.evaluate(protocol, model, data, options, overrides or {})
        return of_skill
    if protocol == "fine-tune":
        raise UsageError(f"{task} trains first: call unicl.fine_tuning.fine_tune")
    medium = plugin if isinstance(plugin, Medium) else None
    if overrides and medium is None:
        raise UsageError(f"--{next(iter(overrides))} is a key of a plug-in's tasks only")
    device = choose_device(options.device)
    with joined(device, timeout_seconds=600, alone=True) as ranks:
        # Opened before the model is loaded: a name that is wrong is told at once.
        work = ranks.together(lambda: _open_all(protocol, data, options, medium))
        probe = ranks.together(lambda: _open_probe(protocol, options))
        loaded = ranks.together(
            lambda: load_for(medium, model, device=str(device), overrides=overrides)
        )
        setting = setting_of(options, ranks)
        out = results_folder(model) if options.out is None else options.out
        # Asked now, for embedding a set may take hours.
        ranks.on_first(lambda: require_writable(out))
        results = []
        for parts in work:
            result, keep = _run(protocol, loaded, parts, probe, setting, options)
            results.append(result)
            ranks.on_first(partial(_save, out, result, keep))
            logger.info("%s: %s %s", result.name, result.headline, _headline(result))
    return results


def require_writable(folder: Path) -> None:
    """Make a folder of results, or say at once that it cannot be written to.

    Raises:
        UniclError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise write_error(folder, error) from error


def _save(out: Path, result: Result, keep: Callable[[Path], None]) -> None:
    keep(save_result(out, result).with_suffix(""))


def setting_of(options: Options, ranks: Ranks) -> Setting:
    """Return how options and ranks want embeddings made."""
    return Setting(
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        autocast=autocast_of(options.precision),
        ranks=ranks,
        cache=options.cache,
    )


def results_folder(model: str | Path) -> Path:
    """Return where a model's results go: into its run, or below runs/ for one that is no folder."""
    path = Path(model)
    if not path.is_dir():
        return Path("runs") / re.sub(r"[^A-Za-z0-9._-]+", "_", str(model)) / "evaluation"
    if path.parent.name == "checkpoints" and not (path / "recipe.toml").is_file():
        return path.parent.parent / f"evaluation-{path.name}"
    return path / "evaluation"


def show(results: Sequence[Result], *, csv: Path | None = None) -> None:
    """Print results beside what the papers report, and write them as a table if asked to."""
    if not results:  # a plug-in's work may end in files for a server
        return
    table = Table()
    table.add_column("set", overflow="fold")
    table.add_column("metric", no_wrap=True)
    table.add_column(" or ".join(dict.fromkeys(r.noun for r in results)), justify="right")
    peers = list(dict.fromkeys(p.model for r in results for p in published(r.task, r.dataset)))
    for name in ("", "95% interval", *peers):
        table.add_column(name or escape(results[0].model), justify="right", overflow="fold")
    for result in results:
        beside = {p.model: p for p in published(result.task, result.dataset)}
        for number, metric in enumerate(result.shown):
            interval = result.interval_of(metric)
            table.add_row(
                "" if number else escape(result.name),
                metric,
                "" if number else f"{result.num_images:,}",
                figure(metric, result.metrics[metric]),
                " to ".join(figure(metric, end) for end in interval or ()),
                *(_beside(beside.get(peer), result.dataset, metric) for peer in peers),
            )
    console = Console()
    console.print(table)
    for result in results:
        if result.left_out:
            text = f"{result.name}: {result.noun} left out: {result.left_out}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if csv is not None:
        with atomic_file(csv) as file:
            file.write(to_csv(results).encode())


def _beside(peer: Published | None, dataset: str, metric: str) -> str:
    printed = peer.figures[dataset].get(metric) if peer is not None else None
    return "" if printed is None else f"{printed:.1f}{'' if is_rank(metric) else '%'}"


def _headline(result: Result) -> str:
    return figure(result.headline, result.metrics[result.headline])


def check(options: Options) -> None:
    """Refuse what cannot be done, before anything is.

    Raises:
        UsageError: a setting is unknown or out of range, or several ranks would download.
    """
    launch = find_launch()
    if options.download and launch is not None and launch.size > 1:
        raise UsageError(f"--download is for one process, not {launch.size}: fetch the sets first")
    autocast_of(options.precision)
    if options.templates is not None and options.templates not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UsageError(f"there are no templates {options.templates!r}: choose from {known}")
    for name in ("batch_size", "num_episodes"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be positive, got {getattr(options, name)}")
    if options.num_workers < 0:
        raise UsageError(f"num_workers must not be negative, got {options.num_workers}")
    if not options.shots or min(options.shots) < 1:
        raise UsageError(f"shots must be positive numbers, got {options.shots}")


def warn_of_classes(images: ClassificationSet | CaptionSet, *, by_name: bool) -> None:
    """Say which classes of a set have no image in any part, or, if it matters, an equal name.

    Told of one part, it is told of all.
    """
    if not isinstance(images, ClassificationSet):
        return
    if empty := images.empty_classes:
        logger.warning(
            "%s has no image of %d of its %d classes (%s); their names can still be guessed",
            *(images.name, len(empty), len(images.class_names), _some(empty)),
        )
    # What the papers measure with is what it is: ImageNet has two pairs of equal names.
    if not by_name or images.targets.ndim > 1 or images.name in KNOWN_SETS:
        return
    # CLIP's tokens know no capitals.
    names = Counter(normalise(name).lower() for name in images.class_names)
    if equal := [name for name, count in names.items() if count > 1]:
        logger.warning(
            "%s names %d of its %d classes like one before (%s); their images can never be right: "
            "give each class a name of its own, in classnames.txt or before it is prepared",
            *(images.name, names.total() - len(names), len(images.class_names), _some(equal)),
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


@dataclass(frozen=True)
class _Parts:
    """A set's part that is asked about, and those that a probe is fitted on."""

    test: ClassificationSet | CaptionSet
    train: ClassificationSet | None = None
    validation: ClassificationSet | None = None


def _open_all(
    task: str, data: Sequence[str], options: Options, medium: Medium | None
) -> list[_Parts]:
    """Open every set before anything is computed; of the papers' sets those that are there."""
    if not data:
        raise UsageError("name at least one set: a known one, a folder, or all")
    opened = []
    for name in data:
        if name != "all":
            opened.append(_open(task, name, options, medium))
            continue
        if medium is not None or task not in _PAPERS_SETS:
            raise UsageError(f"the sets of {task} have no name here; give folders")
        opened += _open_papers(task, options)
    return opened


def _open_papers(task: str, options: Options) -> list[_Parts]:
    there, missing = [], []
    for name in _PAPERS_SETS[task]:
        try:
            there.append(_open(task, name, options))
        except MissingSetError:
            missing.append(name)
        except UniclError as error:
            logger.warning("left out: %s", error)
    download = "" if options.download else "try --download, "
    lacks = (
        f"{options.root} lacks {', '.join(missing)}; name another --root, {download}or ask for one "
        "alone to see what it needs"
    )
    if missing and not there:
        raise UsageError(f"none of the sets of {task} is there: {lacks}")
    if not there:
        raise UsageError(f"none of the sets of {task} can be opened")  # why was told of each
    if missing:
        logger.warning("left out: %s", lacks)
    return there


def _open(task: str, name: str, options: Options, medium: Medium | None = None) -> _Parts:
    def part(split: str) -> Any:
        kind: Literal["captions", "classes"] = "captions" if task == "retrieval" else "classes"
        if medium is not None:
            return medium.open_set(name, split=split, root=options.root, kind=kind)
        try:
            return open_image_set(
                name, split=split, root=options.root, download=options.download, kind=kind
            )
        except UsageError as error:
            holder = find_holder(name)
            if holder is None or task not in holder.evaluations:
                raise
            raise UsageError(f"{error}; for what it holds there is {holder.name}-{task}") from error

    test = part(options.split)
    warn_of_classes(test, by_name=task == "zero-shot")
    if task != "linear-probe" or options.probe is not None:
        return _Parts(test)
    if options.split == "train":
        raise UsageError("a linear probe is fitted on train; test it on another --split")
    if "train" not in test.splits:
        has = f"only {', '.join(test.splits)}" if test.splits else "no parts"
        raise UsageError(f"a linear probe is fitted on a train split; {name} has {has}")
    validation = part("val") if "val" in test.splits and test.split != "val" else None
    return _Parts(test, part("train"), validation)


def _open_probe(task: str, options: Options) -> LinearProbe | None:
    if task != "linear-probe" or options.probe is None:
        return None
    return LinearProbe.load(options.probe)


def _run(
    task: str,
    model: Pretrained,
    parts: _Parts,
    probe: LinearProbe | None,
    setting: Setting,
    options: Options,
) -> tuple[Result, Callable[[Path], None]]:
    """Measure, and return what else there is to be written beside the result."""
    test = parts.test
    if isinstance(test, CaptionSet):
        return protocols.retrieval(model, test, setting), _keep_nothing
    if task == "few-shot":
        result = protocols.few_shot(
            model,
            test,
            setting,
            shots=options.shots,
            num_episodes=options.num_episodes,
            seed=options.seed,
        )
        return result, _keep_nothing
    if task == "recognition":
        result, seen = protocols.recognition(model, test, setting)
        return result, partial(save_answers, seen, test)
    if task == "zero-shot":
        result, answers = protocols.zero_shot(model, test, setting, templates=options.ensemble)
        named = {"templates": options.templates or "the set's own"}
        result = replace(result, protocol={**result.protocol, **named})
        return result, partial(save_answers, answers, test) if answers else _keep_nothing
    if probe is not None and options.probe is not None:
        result = protocols.ask_probe(probe, model, test, setting)
        named = {"probe": options.probe.name}
        return replace(result, protocol={**result.protocol, **named}), _keep_nothing
    assert parts.train is not None
    result, found = protocols.linear_probe(model, parts.train, parts.validation, test, setting)
    return result, partial(_save_probe, found.probe)


def _keep_nothing(stem: Path) -> None:
    pass


def _save_probe(probe: LinearProbe, stem: Path) -> None:
    probe.save(stem.with_name(f"{stem.name}.safetensors"))
