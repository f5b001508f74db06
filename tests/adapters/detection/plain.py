"""ATSS in plain loops of Python's floats, written from its description: what tests compare with."""

import math
import statistics

Box = tuple[float, float, float, float]


def overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def assign(levels: list[list[Box]], boxes: list[Box]) -> tuple[list[int], float]:
    """Return each anchor's box, and how near the closest call was to going the other way."""
    anchors = [anchor for level in levels for anchor in level]
    best: dict[int, tuple[float, int]] = {}
    closest = math.inf
    for number, box in enumerate(boxes):
        candidates, first = [], 0
        for level in levels:
            far = [
                (math.dist(middle(anchor), middle(box)) ** 2, first + place)
                for place, anchor in enumerate(level)
            ]
            # What differs by rounding only is equally far.
            far = sorted((round(distance, 6), place) for distance, place in far)
            candidates += [place for _, place in far[:9]]
            first += len(level)
        overlaps = [overlap(anchors[place], box) for place in candidates]
        deviation = statistics.stdev(overlaps) if len(overlaps) > 1 else 0.0
        least = statistics.fmean(overlaps) + deviation
        for place, share in zip(candidates, overlaps, strict=True):
            x, y = middle(anchors[place])
            margin = min(x - box[0], y - box[1], box[2] - x, box[3] - y)
            if margin > 0:
                closest = min(closest, abs(share - least))
            if share >= least and margin > 0.01:
                if place in best:
                    closest = min(closest, abs(share - best[place][0]) or math.inf)
                if place not in best or share > best[place][0]:
                    best[place] = (share, number)
    return [best[place][1] if place in best else -1 for place in range(len(anchors))], closest


def decode(deltas: Box, anchor: Box) -> Box:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = middle(anchor)
    x, y = x + deltas[0] / 10 * width, y + deltas[1] / 10 * height
    width *= math.exp(min(deltas[2] / 5, math.log(62.5)))
    height *= math.exp(min(deltas[3] / 5, math.log(62.5)))
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def focal(logit: float, target: bool) -> float:
    right = sigmoid(logit) if target else 1 - sigmoid(logit)
    return -(0.25 if target else 0.75) * (1 - right) ** 2 * math.log(right)


def giou(one: Box, other: Box) -> float:
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    share = overlap(one, other)
    union = sum(areas) / (1 + share)
    hull = (max(one[2], other[2]) - min(one[0], other[0])) * (
        max(one[3], other[3]) - min(one[1], other[1])
    )
    return share - (hull - union) / hull


def centerness(anchor: Box, box: Box) -> float:
    x, y = middle(anchor)
    left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
    horizontal = min(left, right) / max(left, right)
    vertical = min(top, bottom) / max(top, bottom)
    return math.sqrt(horizontal * vertical)


def losses(logits, deltas, centers, levels, boxes, labels, owners, judged=None) -> dict[str, float]:
    """Return the losses of nested lists: logits[n][a][k], deltas[n][a], centers[n][a]."""
    anchors = [anchor for level in levels for anchor in level]
    classes = shapes = central = weight = 0.0
    positives = 0
    for image in range(len(logits)):
        own = [number for number, owner in enumerate(owners) if owner == image]
        chosen, _ = assign(levels, [boxes[number] for number in own])
        for place, choice in enumerate(chosen):
            number = own[choice] if choice >= 0 else -1
            for column, logit in enumerate(logits[image][place]):
                target = number >= 0 and labels[number] == column
                if target or judged is None or judged[image][column]:
                    classes += focal(logit, target)
            if number < 0:
                continue
            positives += 1
            goal = centerness(anchors[place], boxes[number])
            weight += goal
            guess = decode(deltas[image][place], anchors[place])
            shapes += (1 - giou(guess, boxes[number])) * goal
            said = sigmoid(centers[image][place])
            central -= goal * math.log(said) + (1 - goal) * math.log(1 - said)
    return {
        "classes": classes / max(positives, 1),
        "boxes": 2 * shapes / weight if positives else 0.0,
        "centerness": central / max(positives, 1),
    }


def suppress(
    boxes: list[Box], scores: list[float], labels: list[int], limit: float, most: int
) -> list[int]:
    """Return the numbers of the best boxes that overlap no better one of their class too much."""
    kept: list[int] = []
    for number in sorted(range(len(boxes)), key=lambda number: -scores[number]):
        if all(
            labels[number] != labels[better] or overlap(boxes[number], boxes[better]) <= limit
            for better in kept
        ):
            kept.append(number)
    return kept[:most]


def detections(
    scores, deltas, centers, levels, height, width, *, threshold, per_level, limit, most
) -> list[tuple[Box, float, int]]:
    found, first = [], 0
    for level in levels:
        own = []
        for place, anchor in enumerate(level, start=first):
            for label, score in enumerate(scores[place]):
                if score > threshold:
                    own.append((score * sigmoid(centers[place]), place, label, anchor))
        own = sorted(own, key=lambda item: -item[0])[:per_level]
        for score, place, label, anchor in own:
            x1, y1, x2, y2 = decode(deltas[place], anchor)
            box = (
                *(min(max(x1, 0.0), width), min(max(y1, 0.0), height)),
                *(min(max(x2, 0.0), width), min(max(y2, 0.0), height)),
            )
            if box[2] > box[0] and box[3] > box[1]:
                found.append((box, math.sqrt(score), label))
        first += len(level)
    kept = suppress(*map(list, zip(*found, strict=True)), limit, most) if found else []
    return [found[number] for number in kept]
