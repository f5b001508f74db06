import subprocess
import sys

import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from torch import Tensor
from torch.nn.functional import normalize

from tests.unicl.evaluation.toys import KnowingModel, ToySamples, every_name, tokenize
from unicl.errors import UniclError, UsageError
from unicl.evaluation.embeddings import embed_images
from unicl.evaluation.retrieval import Pairs, Retrieval, rank_metrics, recalls, right_ranks

KS = (1, 5, 10)


def brute_force(queries: Tensor, items: Tensor, pairs: Tensor) -> list[int]:
    """Ranks by every similarity in fp64; ties count against the model."""
    ranks = []
    for query in sorted(set(pairs[:, 0].tolist())):
        right = set(pairs[pairs[:, 0] == query, 1].tolist())
        similarities = (items.double() @ queries[query].double()).tolist()
        best = max(similarities[item] for item in right)
        before = [
            s for item, s in enumerate(similarities) if item not in right and s >= best - 1e-12
        ]
        ranks.append(1 + len(before))
    return ranks


def drawn(num: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(num, width, generator=generator), dim=1)


@pytest.mark.parametrize("num_at_once", [1 << 21, 1000, 1])
@pytest.mark.parametrize(
    ("num_queries", "num_items"), [(40, 60), (60, 40), (30, 4), (1, 1), (50, 700), (300, 64)]
)
def test_ranks_agree_with_brute_force(
    monkeypatch: pytest.MonkeyPatch, num_queries: int, num_items: int, num_at_once: int
) -> None:
    monkeypatch.setattr("unicl.evaluation.retrieval._SIMILARITIES_AT_ONCE", num_at_once)
    monkeypatch.setattr("unicl.evaluation.retrieval._QUERIES_AT_ONCE", 64)
    generator = torch.Generator().manual_seed(num_queries)
    queries, items = drawn(num_queries, 8, 1), drawn(num_items, 8, 2)
    # Several right items per query, several queries per item, queries without any, and duplicates.
    items[num_items // 2 :] = items[: num_items - num_items // 2].clone()
    pairs = (torch.rand(num_queries, num_items, generator=generator) < 0.03).nonzero()
    pairs = torch.cat([pairs, torch.tensor([[0, 0]])]).unique(dim=0)
    shuffled = pairs[torch.randperm(len(pairs), generator=generator)]
    expected = brute_force(queries, items, pairs)
    assert right_ranks(queries, items, shuffled).tolist() == expected


def test_a_query_counts_as_often_as_it_is_asked() -> None:
    queries, items = drawn(20, 8, 1), drawn(200, 8, 2)
    pairs = torch.tensor([[row, 3 * row] for row in range(20) if row != 7])
    times = torch.arange(20) % 4
    asked = torch.arange(20).repeat_interleave(times)
    places = [p for p in range(len(asked)) if asked[p] != 7]
    repeated = torch.tensor([[place, 3 * int(asked[place])] for place in places])
    expected = brute_force(queries[asked], items, repeated)
    assert right_ranks(queries, items, pairs, times).tolist() == expected
    assert max(expected) > 64


def test_metrics_of_ranks() -> None:
    ranks = torch.tensor([1, 2, 7, 100])
    assert rank_metrics(ranks, (1, 5)) == {
        "r1": 0.25, "r5": 0.5, "median_rank": 4.5, "mean_rank": 27.5,
    }  # fmt: skip
    assert recalls(ranks, (1, 10)) == {"r1": 0.25, "r10": 0.75}
    assert rank_metrics(ranks[:3], ())["median_rank"] == 2.0


def test_recalls_agree_with_clip_benchmark() -> None:
    # Five texts per image, as in Flickr30k and COCO; more queries than are searched at one time.
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(500, 32, generator=generator), dim=1)
    image_of = torch.arange(500).repeat_interleave(5)
    noise = torch.randn(2500, 32, generator=generator)
    texts = normalize(images[image_of] + 0.4 * noise, dim=1)
    scores = texts @ images.T
    positive = image_of[:, None] == torch.arange(500)
    pairs = torch.stack([image_of, torch.arange(2500)], dim=1)

    def clip_benchmark(scores: Tensor, positive: Tensor, k: int) -> float:
        found = batchify(recall_at_k, scores, positive, 64, "cpu", k=k)
        return (found > 0).double().mean().item()

    to_image = {f"r{k}": clip_benchmark(scores, positive, k) for k in KS}
    to_text = {f"r{k}": clip_benchmark(scores.T, positive.T, k) for k in KS}
    ranks = right_ranks(texts, images, pairs.flip(1))
    assert recalls(ranks, KS) == pytest.approx(to_image, abs=1e-6)
    assert ranks.tolist() == brute_force(texts, images, pairs.flip(1))
    assert recalls(right_ranks(images, texts, pairs), KS) == pytest.approx(to_text, abs=1e-6)
    assert 0.1 < to_image["r1"] < to_text["r1"] < to_text["r10"] < 1


@pytest.mark.parametrize("num", [30, 300])
def test_a_collapsed_model_ranks_last(num: int) -> None:
    same = normalize(torch.ones(num, 24), dim=1)
    pairs = torch.arange(num)[:, None].expand(-1, 2)
    assert right_ranks(same, same, pairs).tolist() == [num] * num


def test_ties_count_as_lost_only_up_to_their_number() -> None:
    # Item 0 is right and ties with items 1 and 2; item 3 is far.
    items = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    queries = torch.tensor([[1.0, 0.0]])
    assert right_ranks(queries, items, torch.tensor([[0, 0]])).tolist() == [3]


@pytest.mark.parametrize("num_right", [3, 100])
def test_several_right_items_tied_at_the_top_are_found(num_right: int) -> None:
    items = normalize(torch.tensor([[1.0, 0.0]] * num_right + [[0.0, 1.0]] * 20), dim=1)
    pairs = torch.tensor([[0, item] for item in range(num_right)])
    assert right_ranks(torch.tensor([[1.0, 0.0]]), items, pairs).tolist() == [1]


def test_pairs_of_a_set() -> None:
    samples = ToySamples(
        [(0, "cat", 0), (0, "a  cat", 0), (0, "cat", 1), (1, "a cat", 0), (2, "", 0)]
    )
    found = Pairs.of(embed_images(KnowingModel(), samples))
    assert found.image_rows.tolist() == [0, 2, 3, 4]
    assert found.texts == ("cat", "a  cat")  # "a cat" is the same text
    assert sorted(found.pairs.tolist()) == [[0, 0], [0, 1], [1, 0], [2, 1]]


def test_metrics_of_a_model_that_knows_all_names() -> None:
    metrics = Retrieval(every_name(), tokenize)(KnowingModel())
    assert metrics == {
        f"retrieval/{direction}_r{k}": 1.0 for direction in ("i2t", "t2i") for k in KS
    }


def test_directions_are_measured_apart() -> None:
    # One image of "cat" is taken for "dog": it brings up a wrong text, and ties with the real dog.
    samples = ToySamples([(0, "cat", 0), (2, "cat", 0), (1, "dog", 0), (4, "tree", 0)])
    model = KnowingModel(mistakes={2: 1})
    metrics = Retrieval(samples, tokenize, ks=(1, 2), prefix="shots")(model)
    assert metrics == {
        "shots/i2t_r1": 0.75,
        "shots/i2t_r2": 1.0,
        "shots/t2i_r1": pytest.approx(2 / 3),
        "shots/t2i_r2": 1.0,
    }


def test_any_text_of_an_image_is_right() -> None:
    # The image of "cat" comes first with a text that the model cannot connect with it.
    samples = ToySamples([(0, "moon", 0), (0, "cat", 0), (1, "dog", 0), (4, "tree", 0)])
    metrics = Retrieval(samples, tokenize, ks=(1,))(KnowingModel())
    assert metrics["retrieval/i2t_r1"] == 1.0
    assert metrics["retrieval/t2i_r1"] < 1.0


def test_images_without_text_are_searched_but_do_not_ask() -> None:
    samples = ToySamples([(0, "cat", 0), (0, "", 1), (1, "dog", 0)])
    metrics = Retrieval(samples, tokenize, ks=(1,))(KnowingModel())
    assert metrics == {"retrieval/i2t_r1": 1.0, "retrieval/t2i_r1": 0.5}


def test_a_set_without_any_text_is_an_error() -> None:
    with pytest.raises(UniclError, match="no image of the evaluation set has a text"):
        Retrieval(ToySamples([(0, "", 0)]), tokenize)(KnowingModel())


@pytest.mark.parametrize("ks", [(), (0, 5)])
def test_impossible_k(ks: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="recall at k"):
        Retrieval(every_name(), tokenize, ks=ks)


def test_search_finds_images_best_first() -> None:
    model = KnowingModel()
    evaluator = Retrieval(every_name(), tokenize)
    (tree, apple) = evaluator.search(model, ["tree", "red  apple"], k=3)
    assert {hit.key for hit in tree[:2]} == {"key4", "key10"}
    assert [hit.right for hit in tree] == [True, True, False]
    assert [hit.text for hit in apple[:2]] == ["red apple"] * 2
    assert apple[0].right  # equal after normalisation
    assert tree[0].similarity == pytest.approx(1.0, abs=1e-5)
    assert tree[0].similarity >= tree[2].similarity


def test_search_shows_an_image_once_and_no_more_than_there_are() -> None:
    samples = ToySamples([(0, "cat", 0), (0, "a cat", 0), (1, "dog", 0)])
    embedded = embed_images(KnowingModel(), samples)
    (hits,) = Retrieval(samples, tokenize).search(KnowingModel(), ["a cat"], 10, embedded)
    assert len(hits) == 2
    assert {hit.key: hit.right for hit in hits} == {"key0": True, "key2": False}


def test_faiss_is_imported_late_and_takes_no_more_threads_than_torch() -> None:
    code = """
import sys, torch
import unicl.evaluation.retrieval as retrieval
assert "faiss" not in sys.modules
torch.set_num_threads(1)
points = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
pairs = torch.arange(50)[:, None].expand(-1, 2)
assert retrieval.right_ranks(points, points, pairs).tolist() == [1] * 50
import faiss
assert faiss.omp_get_max_threads() == 1
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_near_ties_are_settled_as_in_fp64() -> None:
    """Items that differ by less than fp32's rounding, on either side of the right one."""
    generator = torch.Generator().manual_seed(0)
    queries = normalize(torch.randn(200, 512, generator=generator), dim=1)
    nudges = 3e-8 * torch.randn(200, 512, generator=generator)
    items = torch.cat([queries, normalize(queries + nudges, dim=1)])
    pairs = torch.stack([torch.arange(200), torch.arange(200)], dim=1)
    ranks = right_ranks(queries, items, pairs)
    assert ranks.tolist() == brute_force(queries, items, pairs)
    fp32 = (queries @ items.T >= (queries @ items.T).diagonal()[:, None]).sum(dim=1)
    assert (fp32 != ranks).any()


def test_near_ties_far_down_the_list_are_settled_as_in_fp64() -> None:
    """The same where a hundred items are nearer, so that none of these is listed."""
    queries = drawn(20, 512, 0)
    items = normalize(queries + 0.1 * drawn(20, 512, 1), dim=1)
    twins = normalize(items + 3e-8 * drawn(20, 512, 2) * 512**0.5, dim=1)
    items = torch.cat([items, twins, *[normalize(queries + 0.01 * drawn(20, 512, 3 + n), dim=1)
        for n in range(100)]])  # fmt: skip
    pairs = torch.arange(20)[:, None].expand(-1, 2)
    ranks = right_ranks(queries, items, pairs)
    assert ranks.tolist() == brute_force(queries, items, pairs)
    assert set(ranks.tolist()) == {101, 102}
