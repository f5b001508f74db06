import pytest

from benchmarks import NAMES
from benchmarks.harness import ROOT
from benchmarks.record import RESULTS, Bar, Result, save
from benchmarks.table import END, START, render, write_table
from unicl.errors import UsageError


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    result = Result([Bar("memory", 300.0, 256, "MiB", "at most")])
    save("loss", "?", result, quick=False, folder=folder)
    result = Result([Bar("speed", 1.5, 1.3, "x", "at least", (1.4, 1.6))])
    save("step", "?", result, quick=False, folder=folder)
    return folder


def test_every_benchmark_has_a_row_measured_or_not(results):
    table = render(results)
    assert "| memory | at most 256 MiB | 300 MiB | **no** | `python -m benchmarks loss` |" in table
    assert "| at least 1.3x | 1.5x (1.4 to 1.6) | yes | `python -m benchmarks step` |" in table
    assert table.count("not measured yet") == len(NAMES) - 2


def test_measurements_of_one_place_share_a_line(results):
    assert render(results).splitlines()[-1].startswith("loss, step: ")


def test_a_figure_without_a_bar_is_neither_reached_nor_missed(results):
    result = Result([Bar("loader", 2.0, None, "x", "at least")])
    save("loader", "?", result, quick=False, folder=results)
    assert "| loader | none | 2x |  | `python -m benchmarks loader` |" in render(results)


def test_a_busy_machine_is_named(results):
    assert "not quiet" not in render(results)
    save("cli", "?", Result(), quick=False, folder=results, other_load=0.4)
    assert "not quiet" in render(results)


def test_only_what_lies_between_the_markers_is_replaced(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    write_table(readme, results)
    text = readme.read_text()
    assert text.startswith(f"before\n{START}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    write_table(readme, results)
    assert readme.read_text() == text


def test_a_readme_without_a_place_is_refused(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    with pytest.raises(UsageError, match="has no place for the table"):
        write_table(readme, results)
    assert readme.read_text() == "no markers\n"


def test_the_readme_shows_what_was_measured(tmp_path):
    own = ROOT / "benchmarks" / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(own.read_text())
    write_table(copy, RESULTS)
    assert copy.read_text() == own.read_text(), "run `python -m benchmarks table`"
