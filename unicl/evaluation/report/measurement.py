"""How figures were measured, and where that differs from the papers' way."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from html import escape

from unicl.data.image_sets import ZERO_SHOT_SETS
from unicl.data.image_sets.clip_classes import templates
from unicl.evaluation.page import Column, table
from unicl.evaluation.published import (
    NUM_TEST_IMAGES,
    NUM_TRAIN_IMAGES,
    Published,
    reported_part,
)
from unicl.evaluation.report.contents import Run
from unicl.evaluation.results import Result

Values = Mapping[str, str]
"""How sets were treated, by the results' names."""

_NOT_SAID = "not said"
_VALIDATION = "the validation part"
# Of the sets that CLIP probes on, those with a validation part of their own.
_WITH_VALIDATION = ("aircraft", "dtd", "flowers", "voc2007")
# More values than these are a table of their own.
_MOST_VALUES = 2


@dataclass(frozen=True)
class _Aspect:
    """One thing that decides what a figure means."""

    name: str
    ours: Callable[[Result], str]
    """How a result was measured; empty where it has no such thing."""
    theirs: Callable[[Published, str], str] = lambda peer, dataset: _NOT_SAID
    """How a paper did on a set; empty where the paper's protocol says it in words."""


def _recorded(key: str) -> Callable[[Result], str]:
    def ours(result: Result) -> str:
        value = result.protocol.get(key)
        return f"{value:,}" if isinstance(value, int) else str(value or "")

    return ours


def _always(words: str) -> Callable[[Published, str], str]:
    return lambda peer, dataset: words


def _looked_up(numbers: Mapping[str, int]) -> Callable[[Published, str], str]:
    return lambda peer, dataset: f"{numbers[dataset]:,}" if dataset in numbers else _NOT_SAID


def _views(result: Result) -> str:
    protocol = result.protocol
    is_video = "num_clips" in protocol
    return f"{protocol['num_clips']} x {protocol['num_crops']}" if is_video else ""


def _shared_captions(result: Result) -> str:
    number = result.protocol.get("shared_captions")
    return f"{number:,}, right for all their images" if number else ""


def _clip_templates(peer: Published, dataset: str) -> str:
    if peer.task != "zero_shot" or dataset not in ZERO_SHOT_SETS:
        return _NOT_SAID
    return f"{len(templates(dataset)):,}"


def _chosen_on(result: Result) -> str:
    words = _recorded("chosen_on")(result)
    return _VALIDATION if words.endswith("(val)") else words


def _papers_chose_on(peer: Published, dataset: str) -> str:
    """Say what CLIP's appendix A.3 says: a set's validation part, or a share of its train part."""
    return _VALIDATION if dataset in _WITH_VALIDATION else "a share of train"


def _zero_shot_only(words: str) -> Callable[[Published, str], str]:
    return lambda peer, dataset: words if peer.task == "zero_shot" else _NOT_SAID


_ASPECTS = (
    _Aspect(
        "image size",
        lambda result: f"{size} px" if (size := _recorded("image_size")(result)) else "",
        lambda peer, dataset: f"{peer.resolution} px" if peer.resolution else _NOT_SAID,
    ),
    _Aspect(
        "part of the set",
        lambda result: _recorded("split")(result) or "the whole folder",
        lambda peer, dataset: reported_part(dataset, peer.task),
    ),
    _Aspect(
        "images",
        lambda result: "" if result.task == "vqa" else f"{result.num_images:,}",
        _looked_up(NUM_TEST_IMAGES),
    ),
    _Aspect(
        "questions",
        lambda result: f"{result.num_images:,}" if result.task == "vqa" else "",
        _always(""),
    ),
    _Aspect("answers to choose from", _recorded("num_answers"), _always("3,129")),
    _Aspect("candidates looked at again", _recorded("candidates"), _always("")),
    _Aspect("candidates are those of", _recorded("towers"), _always("")),
    _Aspect("beams", _recorded("num_beams"), _always("")),
    _Aspect("frames of a clip", _recorded("num_frames")),
    _Aspect(
        "views of a video, clips x crops", _views, lambda peer, dataset: peer.views or _NOT_SAID
    ),
    _Aspect("images left out", lambda result: result.left_out or "none", _always("none")),
    _Aspect("prompt templates", _recorded("templates"), _zero_shot_only("the set's own")),
    _Aspect("number of prompt templates", _recorded("num_templates"), _clip_templates),
    _Aspect("backbone", _recorded("backbone"), _always("trained in each episode")),
    _Aspect("episodes", _recorded("num_episodes"), _always("600")),
    _Aspect("images trained on", _recorded("num_train"), _looked_up(NUM_TRAIN_IMAGES)),
    _Aspect("regularisation chosen on", _chosen_on, _papers_chose_on),
    _Aspect("fine-tuned from", _recorded("from"), _always("")),
    _Aspect("steps of fine-tuning", _recorded("steps"), _always("")),
    _Aspect("saved probe", _recorded("probe"), _always("")),
    _Aspect(
        "captions that several images share",
        _shared_captions,
        _always("right for their own image only"),
    ),
    _Aspect("precision", _recorded("precision")),
)


def measurement(
    runs: Sequence[Run], results: Sequence[Sequence[Result]], peers: Sequence[Published]
) -> str:
    """Return what differs and the sources in words, and all aspects as a table in a fold.

    Args:
        runs: the runs.
        results: results of one task, for each run.
        peers: the papers' models beside them.
    """
    compared = [each for aspect in _ASPECTS if (each := _compare(aspect, results, peers))]
    warnings = _warnings(compared, runs, peers)
    notes = [
        f"<p>{escape(peer.model)}: {escape(peer.protocol)}. <cite>{escape(peer.source)}</cite>.</p>"
        for peer in peers
    ]
    columns = [
        Column("", words=True),
        *(Column(run.name, run=number, words=True) for number, run in enumerate(runs)),
        *(Column(peer.model, words=True) for peer in peers),
    ]
    rows = [
        [each.name.capitalize(), *map(_joined, each.ours), *map(_joined, each.theirs)]
        for each in compared
    ]
    words = "\n".join([*warnings, *notes])
    return (
        f'<div class="notes">{words}</div>\n'
        f"<details><summary>How it was measured</summary>\n{table(columns, rows)}</details>"
    )


@dataclass(frozen=True)
class _Compared:
    """One aspect of all runs and papers."""

    name: str
    ours: Sequence[Values]
    """For each run."""
    theirs: Sequence[Values]
    """For each paper's model."""
    among_runs: Set[str]
    """Names of results that the runs treated otherwise than each other."""
    from_papers: Set[str]
    """Those that a run treated otherwise than a paper did."""
    unsaid: Set[str]
    """Those of whose sets no paper says how it treated them."""


def _compare(
    aspect: _Aspect, results: Sequence[Sequence[Result]], peers: Sequence[Published]
) -> _Compared | None:
    ours = [{result.name: aspect.ours(result) for result in each} for each in results]
    if not any(value for each in ours for value in each.values()):
        return None
    sets = {result.name: result.dataset for each in results for result in each}
    theirs = [
        {name: aspect.theirs(peer, d) for name, d in sets.items() if d in peer.figures}
        for peer in peers
    ]
    said = {name: {each[name] for each in theirs if name in each} for name in sets}
    known = {name for each in ours for name, value in each.items() if value}
    unsaid = {name for name in known if said[name] == {_NOT_SAID}}
    return _Compared(
        aspect.name, ours, theirs, _differing(ours, ours), _differing(ours, theirs), unsaid
    )


def _differing(some: Sequence[Values], others: Sequence[Values]) -> set[str]:
    """Return the names of what was treated otherwise; what one does not say is no difference."""
    return {
        name
        for each in some
        for other in others
        for name in each.keys() & other.keys()
        if each[name] != other[name] and not {each[name], other[name]} & {"", _NOT_SAID}
    }


def _warnings(
    compared: Sequence[_Compared], runs: Sequence[Run], peers: Sequence[Published]
) -> list[str]:
    """Return a list of what differs from the papers, and one of what differs among the runs."""
    ours, theirs = [run.name for run in runs], [peer.model for peer in peers]
    from_papers = [
        _difference(each.name, each.from_papers, [*ours, *theirs], [*each.ours, *each.theirs])
        for each in compared
        if each.from_papers
    ]
    among_runs = [
        _difference(each.name, each.among_runs, ours, each.ours)
        for each in compared
        if each.among_runs
    ]
    unsaid = [
        _difference(each.name, each.unsaid, ours, each.ours) for each in compared if each.unsaid
    ]
    warnings = []
    if from_papers:
        warnings.append("<p><b>This is not the papers' measurement.</b> It differs in</p>")
        warnings.append(f"<ul>{''.join(from_papers)}</ul>")
    elif peers:
        warnings.append("<p>Measured as in the papers, as far as they say how.</p>")
    if unsaid:
        warnings.append(f"<p>The papers do not say</p>\n<ul>{''.join(unsaid)}</ul>")
    if among_runs:
        warnings.append("<p><b>The runs were not measured alike.</b> They differ in</p>")
        warnings.append(f"<ul>{''.join(among_runs)}</ul>")
    return warnings


def _difference(name: str, sets: Set[str], sides: Sequence[str], values: Sequence[Values]) -> str:
    """Say who did what; of values that are many, only on which sets they differ."""
    here = [{d: value for d, value in each.items() if d in sets} for each in values]
    if max(len(set(each.values())) for each in here) > _MOST_VALUES:
        words = f"on {', '.join(sorted(sets))}"
    else:
        who = defaultdict(list)
        for side, each in zip(sides, here, strict=True):
            if each:
                who[_joined(each)].append(side)
        words = "; ".join(f"{_listed(names)} {value}" for value, names in who.items())
    return f"<li>{escape(name)}: {escape(words)}</li>"


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _joined(values: Values) -> str:
    """Say a value of most sets alone, and others with their sets."""
    sets = defaultdict(list)
    for dataset, value in values.items():
        sets[value or "-"].append(dataset)
    (most, of), *others = sorted(sets.items(), key=lambda item: -len(item[1])) or [("-", [])]
    first = f"{most} ({', '.join(of)})" if others and len(of) == 1 else most
    return "; ".join([first, *(f"{value} ({', '.join(names)})" for value, names in others)])
