import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from unicl.errors import UniclError, UsageError
from unicl.evaluation.page import flatten, picture
from unicl.evaluation.report import (
    FoundImage,
    Outcome,
    Prediction,
    Report,
    Split,
    TextQuery,
    render,
    write_report,
)

EVIL = "<script>alert('1')</script>\"&"
VOID = {"meta", "img", "path", "use", "br"}


def encoded(kind: str, colour: str = "red") -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(target, kind)
    return target.getvalue()


def outcome(name: str, top1: float) -> Outcome:
    rows: list[dict[str, float]] = [
        {"step": step, "train/loss": 3.0 / step, "train/samples_per_second": 400.0 + step}
        for step in range(1, 4)
    ]
    rows.append({"step": 3, "zero_shot/top1": top1, "zero_shot/top5": 0.9})
    return Outcome(
        name=name,
        metrics=rows,
        splits=[
            Split(name="Tones", top1=top1, top5=0.9, num_images=1200, num_classes=1900),
            Split(name="Scenes", top1=0.5, top5=0.6, num_images=3, num_classes=4),
        ],
        retrieval={"retrieval/i2t_r1": 0.123, "retrieval/t2i_r5": 0.456},
    )


def full(text: str = "grinning face") -> Report:
    image = encoded("PNG")
    return Report(
        title=f"Demo {text}",
        summary=text,
        run=replace(outcome("UniCL", 0.7125), name=f"UniCL {text}"),
        comparison=replace(outcome("CLIP", 0.611), name=f"CLIP {text}"),
        right=[Prediction(image=image, truth=text, guesses=[(text, 0.97), ("dog", 0.002)])],
        wrong=[Prediction(image=image, truth="cat", guesses=[(text, 0.6), ("cat", 0.3)])],
        queries=[
            TextQuery(
                text=text,
                images=[
                    FoundImage(image=image, text=text, right=True),
                    FoundImage(image=image, text="dog", right=False),
                ],
            )
        ],
        facts={text: text},
        settings={"name": text, "trainer": {"steps": 7, "chunk": None, text: text}},
        credits=[text],
    )


class Outline(HTMLParser):
    """Checks that tags close in order, and collects attributes that could load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "data", "srcset")
        self.links += [value or "" for name, value in attrs if name in names]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    html = render(full())
    outline = Outline(html)
    assert outline.open == []
    assert not {"script", "link", "iframe"} & set(outline.tags)
    assert all(link.startswith(("data:image/", "#")) for link in outline.links)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_ids_are_unique() -> None:
    ids = re.findall(r'\bid="([^"]+)"', render(full()))
    assert len(ids) == len(set(ids)) > 10


def test_every_text_is_escaped() -> None:
    html = render(full(EVIL))
    assert Outline(html).open == []
    assert "<script" not in html
    assert html.count("alert(&#x27;1&#x27;)") > 15


def test_figures_of_both_runs() -> None:
    html = render(full())
    for figure in ("71.2%", "61.1%", "12.3%", "45.6%", "0.053%", "1,200", "1,900", "402 samples"):
        assert figure in html
    assert html.count('class="second"') > 4


def test_without_a_comparison_there_is_one_column() -> None:
    html = render(replace(full(), comparison=None))
    assert 'class="second"' not in html
    assert "61.1%" not in html
    assert "71.2%" in html


def test_a_split_only_one_run_has() -> None:
    report = full()
    assert report.comparison is not None
    fewer = replace(report.comparison, splits=report.comparison.splits[1:], retrieval={})
    html = render(replace(report, comparison=fewer))
    assert "61.1%" not in html
    assert '<td class="second">-</td>' in html


def test_empty_parts_are_left_out() -> None:
    html = render(Report(title="Nothing yet", run=Outcome(name="UniCL")))
    assert Outline(html).open == []
    assert "<h2>" not in html
    assert "nan" not in html.lower().replace("nano", "")
    assert "Nothing yet" in html


def test_the_right_guess_is_marked_where_it_stands() -> None:
    html = render(full())
    cards = html.split('<div class="card">')[1:]
    assert cards[0].index('class="guess right"') < cards[0].index('class="guess"')
    assert cards[1].index('class="guess"') < cards[1].index('class="guess right"')
    assert "97%" in cards[0]
    assert "&lt;1%" in cards[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_images_keep_their_bytes(kind: str) -> None:
    image = encoded(kind)
    tag = picture(image, "a cat")
    found = re.search(r'src="data:image/(\w+);base64,([^"]+)"', tag)
    assert found is not None
    assert found[1] == kind.lower()
    assert base64.b64decode(found[2]) == image


def test_bytes_that_are_no_image_are_an_error() -> None:
    with pytest.raises(UniclError, match="image of 'a cat' cannot be read"):
        picture(b"<svg onload=alert(1)>", "a cat")


def test_settings_are_flat_and_in_order() -> None:
    settings = {"b": 1, "a": {"x": None, "y": {"z": (0.8, 1.0)}}}
    assert flatten(settings) == [("b", "1"), ("a.x", "unset"), ("a.y.z", "(0.8, 1.0)")]


def test_writing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, replace(full(), credits=["torn \ud800 surrogate \u00e9"]))
    assert "torn ? surrogate \u00e9" in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_failure_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    broken = Prediction(image=b"", truth="cat", guesses=[])
    with pytest.raises(UniclError):
        write_report(path, replace(full(), wrong=[broken]))
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        write_report(tmp_path / "absent" / "report.html", full())
