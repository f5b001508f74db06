import re

import matplotlib as mpl
import numpy as np
import pytest

from unicl.evaluation.curves import PANELS, Curve, Panel, draw

LOSS = PANELS[0]
ROWS = [{"step": step, "train/loss": 1.0 / step} for step in range(1, 60)]


def test_only_finite_values_of_the_metric_are_taken() -> None:
    rows = [
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": float("nan")},
        {"step": 3, "zero_shot/top1": 0.5},
        {"step": 4, "train/loss": None},
        {"step": 5, "train/loss": 1},
    ]
    curve = Curve.of(rows, "train/loss")
    assert curve.steps.tolist() == [1.0, 5.0]
    assert curve.values.tolist() == [2.0, 1.0]


def test_a_long_run_is_thinned_to_its_means() -> None:
    rows = [{"step": step, "train/loss": float(step % 2)} for step in range(4000)]
    curve = Curve.of(rows, "train/loss")
    assert len(curve.steps) == 400
    np.testing.assert_allclose(curve.values, 0.5)
    assert np.all(np.diff(curve.steps) > 0)


def test_no_data_no_plot() -> None:
    assert draw(LOSS, {"run": [{"step": 1, "zero_shot/top1": 0.5}]}) is None


def test_the_page_gives_the_colours() -> None:
    svg = draw(LOSS, {"run": ROWS, "other": ROWS})
    assert svg is not None
    assert svg.startswith("<svg ")
    assert {"var(--ink)", "var(--first)", "var(--second)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert "#00000" not in svg
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg)


def test_runs_are_named_only_where_there_are_two() -> None:
    assert ">other<" in str(draw(LOSS, {"UniCL": ROWS, "other": ROWS}))
    assert ">UniCL<" not in str(draw(LOSS, {"UniCL": ROWS}))


def test_long_names_of_runs_keep_their_ends() -> None:
    long = "a_name/" + 40 * "x" + "/step-000010"
    assert ">a_name/xxxxx\u2026/step-000010<" in str(draw(LOSS, {long: ROWS, "other": ROWS}))


def test_runs_differ_in_colour_or_in_dashes() -> None:
    svg = str(draw(LOSS, {f"run {number}": ROWS for number in range(9)}))
    assert len(set(re.findall(r"var\(--(?:first|second|third|fourth|fifth|sixth)\)", svg))) == 6
    assert all(f">run {number}<" in svg for number in range(9))
    strokes = re.findall(r"stroke-dasharray: [^;]*; [^\"]*stroke: var\(--first\)", svg)
    assert strokes


def test_names_of_runs_are_escaped() -> None:
    svg = str(draw(LOSS, {"<script>": ROWS, "$x$ & _y_": ROWS}))
    assert "<script" not in svg
    assert "$x$ &amp; _y_" in svg


def test_ids_of_two_panels_differ() -> None:
    ids = [
        re.findall(r'\bid="([^"]+)"', str(draw(panel, {"run": ROWS})))
        for panel in (LOSS, Panel(title="Loss again", metrics={"train/loss": "loss"}))
    ]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    svg = str(draw(LOSS, {"run": ROWS}))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(ids[0])


def test_drawing_is_reproducible_and_leaves_matplotlib_alone() -> None:
    before = dict(mpl.rcParams)
    assert draw(LOSS, {"run": ROWS}) == draw(LOSS, {"run": ROWS})
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_every_panel_draws_one_point(panel: Panel) -> None:
    assert draw(panel, {"run": [{"step": 10, **dict.fromkeys(panel.metrics, 0.25)}]})
