"""How fast is a zero-shot classifier of ImageNet's 1,000 classes with CLIP's 80 templates made?"""

from collections.abc import Callable

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from benchmarks.harness import Ratio, Timing, compare, ratio
from benchmarks.record import Bar, Result
from unicl.data.prompts import TEMPLATES
from unicl.evaluation.zero_shot import class_embeddings
from unicl.towers.text import from_open_clip, tokenize
from unicl.towers.two_tower import TwoTower


def measure(*, quick: bool) -> Result:
    """Make the classifier with open_clip's function and with ours, from equal weights, in fp32.

    All classes with a narrow tower, and a part of them with CLIP's own, which would take the peer
    most of an hour on two cores; each class costs the same.
    """
    num_layers = 1 if quick else 12
    cases = {  # classes, width, rounds
        "1,000 classes, width 64": (10 if quick else 1000, 64, 1),
        "20 classes, width 512": (2 if quick else 20, 512, 1 if quick else 3),
    }
    rows, gains, facts = [], {}, {}
    for name, (num_classes, width, rounds) in cases.items():
        timings, difference = _measure(num_classes, width, num_layers, rounds)
        gains[name] = ratio(timings["open_clip"], timings["unicl"])
        facts[f"largest difference, {name}"] = difference
        prompts = num_classes * len(TEMPLATES["clip"])
        rows += [
            {
                "case": name,
                "classifier": side,
                "prompts_per_second": prompts / t.median,
                "seconds": t.median,
            }
            for side, t in timings.items()
        ]
    return Result(
        bars=[_bar(name, gain) for name, gain in gains.items()],
        tables={"Zero-shot classifier, 80 templates": rows},
        facts={**facts, "dtype": "float32"},
    )


def _bar(name: str, gain: Ratio) -> Bar:
    return Bar(
        f"zero-shot classifier, {name} x 80 templates, prompts/s over open_clip's",
        gain.median,
        5.0,
        "x",
        "at least",
        (gain.low, gain.high),
    )


def _measure(
    num_classes: int, width: int, num_layers: int, repeats: int
) -> tuple[dict[str, Timing], float]:
    torch.manual_seed(0)
    peer = CLIP(
        512,
        CLIPVisionCfg(layers=1, width=64, image_size=32, patch_size=32),
        CLIPTextCfg(layers=num_layers, width=width, heads=width // 64),
    ).eval()
    own = TwoTower(nn.Identity(), from_open_clip(peer.state_dict())).eval()
    # Every k-th class, so that a part of them has names as long as all of them.
    names = open_clip.IMAGENET_CLASSNAMES[:: 1000 // num_classes][:num_classes]
    found: dict[str, Tensor] = {}

    def by_peer() -> None:
        found["open_clip"] = open_clip.build_zero_shot_classifier(
            peer,
            tokenizer=open_clip.tokenizer.tokenize,
            classnames=names,
            templates=[_filler(template) for template in TEMPLATES["clip"]],
        ).T

    def by_us() -> None:
        found["unicl"] = class_embeddings(own, names, TEMPLATES["clip"], tokenize)

    timings = compare({"unicl": by_us, "open_clip": by_peer}, repeats=repeats, warm_up=0)
    return timings, float((found["unicl"] - found["open_clip"]).abs().max())


def _filler(template: str) -> Callable[[str], str]:
    return template.format
