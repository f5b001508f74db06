"""CIDEr and BLEU of captions, by pycocoevalcap (Chen et al. 2015).

COCO's tools cut captions into words by a Java program. What it does to sentences of captions is
done here instead, so that nothing but Python is needed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from unicl.errors import UsageError

# What COCO's tools leave out. They mean to leave out brackets, too, but look for them in capitals.
_PUNCTUATION = frozenset(("'", '"', "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_BRACKETS = {
    bracket: f"-{name}-"
    for bracket, name in zip("()[]{}", ("lrb", "rrb", "lsb", "rsb", "lcb", "rcb"), strict=True)
}
_CLITIC = re.compile(r"(?<=\w)('(?:s|m|d|re|ve|ll)|n't)(?![\w'])")
# Words that the Penn Treebank writes as two.
_PARTED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(lem|gim)(me)\b")
_TOKEN = re.compile(
    r"n't|'(?:s|m|d|re|ve|ll)(?![\w'])"  # clitics, parted before
    r"|[#@]?\d+(?:[.,:/-]\d+)+|(?:[a-z]\.){2,}|(?:st|mr|mrs|ms|dr|jr|sr|vs)\."
    r"|'n'"  # 1,000  3.5  4:30  1/2  u.s.  mr.  rock 'n' roll
    r"|\w+(?:[-/'&]\w+)*"  # t-shirt  and/or  o'clock
    r"|\.\.\.|--|[^\w\s]"
)


def words(caption: str) -> list[str]:
    """Return the words of a caption as COCO's metrics count them: lower case, no punctuation."""
    text = caption.lower().replace("\u2019", "'")
    text = _CLITIC.sub(r" \1", text)
    text = _PARTED.sub(lambda found: " ".join(part for part in found.groups() if part), text)
    found = (word for word in _TOKEN.findall(text) if word not in _PUNCTUATION)
    return [_BRACKETS.get(word, word) for word in found]


def caption_metrics(
    said: Mapping[int, str], references: Mapping[int, Sequence[str]]
) -> dict[str, float]:
    """Return CIDEr, and BLEU of one to four words.

    Args:
        said: A caption per image.
        references: People's captions of the same images.

    Returns:
        `cider`, of which 1 is what is usually printed as 100, and `bleu1` to `bleu4`.

    Raises:
        UsageError: pycocoevalcap is not installed.
    """
    library = _import_pycocoevalcap()
    truth = {image: [" ".join(words(each)) for each in references[image]] for image in said}
    guesses = {image: [" ".join(words(caption))] for image, caption in said.items()}
    cider, _ = library["Cider"]().compute_score(truth, guesses)
    bleu, _ = library["Bleu"](4).compute_score(truth, guesses, verbose=0)
    found = {"cider": cider, **{f"bleu{n}": each for n, each in enumerate(bleu, 1)}}
    # The library adds a little to every count, so that none is 0.
    return {name: round(float(value), 6) for name, value in found.items()}


def _import_pycocoevalcap() -> dict[str, Any]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise UsageError(
            'captions are measured by pycocoevalcap: pip install "unicl[vqa]"'
        ) from error
    return {"Bleu": Bleu, "Cider": Cider}
