import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unicl.data.augment import UndecodableImage
from unicl.errors import UniclError, UsageError
from unicl.evaluation.answers import SavedAnswers, SavedExample
from unicl.evaluation.page import figure, flatten, percent, picture, thumbnail
from unicl.evaluation.published import Published
from unicl.evaluation.report import FoundImage, Report, Run, TextQuery, render, write_report
from unicl.evaluation.results import Result

EVIL = "<script>alert('1')</script>\"&"
VOID = {"meta", "img", "path", "use", "br"}


def encoded(kind: str, colour: str = "red") -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(target, kind)
    return target.getvalue()


def zero_shot(model: str, dataset: str, top1: float, *, of: tuple[int, int]) -> Result:
    return Result(
        task="zero_shot",
        dataset=dataset,
        model=model,
        metrics={"top1": top1, "top5": 0.9},
        headline="top1",
        interval=(top1 - 0.0123, top1 + 0.0123),
        num_images=of[0],
        protocol={"num_classes": of[1], "image_size": 48},
    )


def run(name: str, top1: float) -> Run:
    rows: list[dict[str, float]] = [
        {"step": step, "train/loss": 3.0 / step, "train/samples_per_second": 400.0 + step}
        for step in range(1, 4)
    ]
    rows.append({"step": 3, "zero_shot/top1": top1, "zero_shot/top5": 0.9})
    recalls = Result(
        task="retrieval",
        dataset="Tones",
        model=name,
        metrics={"i2t_r1": 0.123, "t2i_r5": 0.456},
        headline="t2i_r5",
        num_images=1200,
    )
    return Run(
        name=name,
        metrics=rows,
        results=[
            zero_shot(name, "Scenes", 0.5, of=(3, 4)),
            zero_shot(name, "Tones", top1, of=(1200, 1900)),
            recalls,
        ],
        settings={"name": name, "trainer": {"steps": 7, "chunk": None, name: name}},
    )


def full(text: str = "grinning face") -> Report:
    image = encoded("PNG")
    saved = SavedAnswers(
        (text, "cat"),
        np.array([[3, 1], [2, 0]]),
        (
            SavedExample(image, text, ((text, 0.97), ("dog", 0.002)), right=True),
            SavedExample(image, "cat", ((text, 0.6), ("cat", 0.3)), right=False),
        ),
    )
    ours = replace(run(f"UniCL {text}", 0.7125), answers={text: saved})
    return Report(
        title=f"Demo {text}",
        summary=text,
        runs=[ours, run(f"CLIP {text}", 0.611)],
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
    for shown in ("71.2%", "61.1%", "12.3%", "45.6%", "0.053%", "1,200", "1,900", "402 samples"):
        assert shown in html
    assert "70.0% to 72.5%" in html
    assert "59.9% to 62.3%" in html


def test_the_headline_is_the_largest_set() -> None:
    cards = render(full()).split("<h2>")[0]
    assert "<b>71.2%</b>" in cards
    assert "CLIP grinning face: 61.1%" in cards
    assert "Scenes" not in cards


def test_the_headline_may_be_of_imagenet_whose_part_is_val() -> None:
    (run, *_) = full().runs
    results = [
        replace(run.results[0], dataset=name, num_images=count, protocol={"split": split})
        for name, count, split in (("caltech101", 6_084, "test"), ("imagenet", 50_000, "val"))
    ]
    assert [result.name for result in results] == ["caltech101", "imagenet"]
    cards = render(replace(full(), runs=[replace(run, results=results)])).split("<h2>")[0]
    assert "50,000 images (imagenet)" in cards


def test_a_headline_says_whose_it_is() -> None:
    ours, other = full().runs
    probe = replace(other.results[0], task="linear_probe", metrics={"top1": 0.345})
    other = replace(other, results=[*other.results, probe])
    cards = render(replace(full(), runs=[ours, other])).split("<h2>")[0].split("<div>")[1:]
    owners = {}
    for card in cards:
        owner, figure, *_ = filter(None, re.split("<[^>]*>", card))
        owners[figure] = owner
    assert owners["71.2%"] == owners["402"] == "UniCL grinning face"
    assert owners["34.5%"] == "CLIP grinning face"
    assert "CLIP grinning face: 402" in cards[-1]
    assert "3 images (Scenes) get their own class" in "".join(cards)
    alone = render(replace(full(), runs=[ours])).split("<h2>")[0]
    assert "UniCL grinning" not in alone


@pytest.mark.parametrize("whole", [True, False])
def test_a_name_stays_beside_its_dot(*, whole: bool) -> None:
    report = Report(title="t", runs=[run("x" * (24 if whole else 25), 0.5)])
    heads = re.findall(r'<th([^>]*)><i class="dot"', render(report))
    assert heads
    assert all(("whole" in head, "long" in head) == (whole, not whole) for head in heads)


def test_one_run_has_one_column() -> None:
    report = full()
    html = render(replace(report, runs=report.runs[:1]))
    assert "61.1%" not in html
    assert "71.2%" in html
    assert "Settings that differ" not in html
    assert "CLIP" not in html


def test_a_set_only_one_run_has() -> None:
    report = full()
    ours, other = report.runs
    html = render(replace(report, runs=[ours, replace(other, results=other.results[:1])]))
    assert "61.1%" not in html
    assert "<td>-</td>" in html


def test_empty_parts_are_left_out() -> None:
    html = render(Report(title="Nothing yet", runs=[Run(name="UniCL")]))
    assert Outline(html).open == []
    assert "<h2>" not in html
    assert "nan" not in html.lower().replace("nano", "")
    assert "Nothing yet" in html


def test_more_runs_than_colours() -> None:
    html = render(Report(title="Many", runs=[run(f"run {number}", 0.5) for number in range(8)]))
    assert Outline(html).open == []
    assert all(f"run {number}" in html for number in range(8))


def test_settings_that_differ() -> None:
    html = render(full("x")).split("Settings that differ")[1]
    differing, everything = html.split("<details>")
    assert "trainer.steps" in everything
    assert "trainer.steps" not in differing
    assert "trainer.UniCL x" in differing


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


def small(image: Image.Image, kind: str, **options: object) -> Image.Image:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return Image.open(io.BytesIO(thumbnail(target.getvalue(), side=160)))


def test_a_plugin_shows_its_own_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    target = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 10, 10)).save(target, "PNG")

    def find_picture(encoded: bytes) -> bytes | None:
        return target.getvalue() if encoded == b"a clip" else None

    monkeypatch.setattr("unicl.evaluation.page.find_picture", find_picture)
    with Image.open(io.BytesIO(thumbnail(b"a clip", side=20))) as shown:
        assert shown.size == (20, 10)
    assert thumbnail(target.getvalue(), side=20) == thumbnail(b"a clip", side=20)
    with pytest.raises(UndecodableImage):
        thumbnail(b"another", side=20)


def test_thumbnails_are_what_the_model_sees() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    photo = Image.new("RGB", (1000, 500), "red")
    photo.paste("blue", (0, 0, 500, 500))
    shown = small(photo, "JPEG", exif=exif)
    assert shown.size == (80, 160)
    above, below = shown.getpixel((40, 20)), shown.getpixel((40, 140))
    assert np.abs(np.array([above, below]) - [[0, 0, 255], [255, 0, 0]]).max() < 12
    # 16-bit grey of which half is light, and what is transparent.
    grey = Image.fromarray(np.full((200, 200), 128 * 257, np.uint16))
    assert small(grey, "PNG").convert("L").getextrema() == pytest.approx((128, 128), abs=1)
    clear = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    assert small(clear, "PNG").convert("L").getextrema() == (255, 255)


def test_tiny_scans_are_enlarged_with_sharp_edges() -> None:
    scan = np.random.default_rng(0).integers(0, 2, (8, 8), np.uint8) * 255
    shown = small(Image.fromarray(scan), "PNG")
    assert shown.size == (80, 80)
    middles = np.asarray(shown.convert("L"))[5::10, 5::10]
    assert np.array_equal(middles > 127, scan > 127)


def test_settings_are_flat_and_in_order() -> None:
    settings = {"b": 1, "a": {"x": None, "y": {"z": (0.8, 1.0)}}}
    assert flatten(settings) == [("b", "1"), ("a.x", "unset"), ("a.y.z", "(0.8, 1.0)")]
    ((_, many),) = flatten({"answers": tuple(map(str, range(3129)))})
    assert many == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... (3,129 in all)"


def test_writing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, replace(full(), credits=["torn \ud800 surrogate \u00e9"]))
    assert "torn ? surrogate \u00e9" in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_failure_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    report = full()
    broken = SavedAnswers(("cat",), None, (SavedExample(b"", "cat", (), right=False),))
    with pytest.raises(UniclError):
        write_report(path, replace(report, runs=[replace(report.runs[0], answers={"a": broken})]))
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        write_report(tmp_path / "absent" / "report.html", full())


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.7134, "71.3%"), (0.00053, "0.053%"), (0.0, "0.0%"), (None, "-"), (float("nan"), "-")],
)
def test_shares_in_percent(share: float | None, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("t2i_r1", 0.7134, "71.3%"),
        ("t2i_median_rank", 2.0, "2.0"),
        ("i2t_mean_rank", 12345.678, "12,345.7"),
    ],
)
def test_ranks_are_no_shares(metric: str, value: float, text: str) -> None:
    assert figure(metric, value) == text


def test_ranks_stand_below_recalls(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"t2i_r1": 43.1, "t2i_median_rank": 2.0}
    paper = Published(
        model="P", task="retrieval", resolution=None, protocol="p", source="s",
        figures={"clips": figures},
    )  # fmt: skip
    monkeypatch.setattr("unicl.evaluation.published.PUBLISHED", (paper,))
    result = Result(
        task="retrieval",
        dataset="clips",
        model="m",
        metrics={"t2i_r1": 0.5, "t2i_r10": 0.75, "t2i_median_rank": 1.5, "i2t_mean_rank": 16.84},
        headline="t2i_r1",
        num_images=1000,
    )
    html = render(Report(title="t", runs=[Run(name="ours", results=[result])]))
    cells = [
        re.findall(r"<td[^>]*>([^<]*)", row)[1:] for row in re.findall("<tr>(.*?)</tr>", html, re.S)
    ]
    assert [row for row in cells if len(row) == 3][:4] == [
        ["text to image, R@1", "50.0%", "43.1%"],
        ["text to image, R@10", "75.0%", "-"],
        ["text to image, median rank", "1.5", "2.0"],
        ["image to text, mean rank", "16.8", "-"],
    ]
