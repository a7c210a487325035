"""Section 14: centroids, matching, references, calibration, and the file that production reads."""

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta

import lct_dino3 as lct


def draw_embeddings(
    per_class: int, num_classes: int, seed: int = 0, spread: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, 16))
    labels = np.repeat(np.arange(num_classes), per_class)
    values = centres[labels] + spread * rng.normal(size=(len(labels), 16))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32), labels


def make_embedded(per_class: int, seed: int, num_classes: int = 4, spread: float = 0.5) -> lct.Embedded:
    values, labels = draw_embeddings(per_class, num_classes, seed, spread)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return lct.Embedded(np.arange(len(labels)), np.zeros(len(labels), np.uint8), labels[shuffled], values[shuffled])


def make_records(num: int, num_classes: int = 4) -> lct.Records:
    zeros = np.zeros(num, np.int32)
    names = tuple(f"class {i}" for i in range(num_classes))
    return lct.Records(
        Path(), names, np.array([f"p/{i}.jpg" for i in range(num)], dtype=lct.STRINGS), zeros, zeros, zeros
    )


def test_centroids_are_unit_means_and_an_empty_class_matches_nothing() -> None:
    values, labels = draw_embeddings(10, 3)
    centroids = lct.class_centroids(values, labels, 4)
    expected = values[labels == 1].mean(axis=0)
    np.testing.assert_allclose(centroids[1], expected / np.linalg.norm(expected), atol=1e-6)
    assert centroids.dtype == np.float32 and (centroids[3] == 0).all()
    scores = lct.Matcher(centroids, np.arange(4), np.ones(4, int)).score(-values)
    assert scores.argmax(axis=1).max() < 3 and (scores[:, 3] == -1).all(), "also for queries that are like no class"


@pytest.mark.parametrize("k", [1, 3, 100])
def test_the_matcher_equals_a_loop(k: int, patch_used: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of classes of few, of many and of no references, in one piece and in several."""
    sizes = np.array([7, 900, 2, 0, 40, 1, 32, 0, 4])
    labels = np.repeat(np.arange(9), sizes)
    values, _ = draw_embeddings(len(labels), 1, spread=3.0)
    queries, _ = draw_embeddings(50, 1, seed=1, spread=3.0)
    counts = np.array([k, 1, k, k, k, k, 2, 1, k])
    matcher = lct.Matcher(values, labels, counts)
    scores = matcher.score(queries)
    assert scores.shape == (50, 9) and scores.dtype == np.float32
    for row, query in enumerate(queries):
        for label in np.flatnonzero(sizes):
            best = np.sort(values[labels == label] @ query)[::-1][: counts[label]].mean()
            assert scores[row, label] == pytest.approx(best, abs=1e-5)
    assert (scores[:, sizes == 0] == -1).all()
    assert matcher.score(queries[:0]).shape == (0, 9)
    blocks = []
    forward = lct.Matcher.forward
    patch_used(lct, "MATCHER_CHUNK", 13 * len(values))
    monkeypatch.setattr(lct.Matcher, "forward", lambda self, block: blocks.append(len(block)) or forward(self, block))
    np.testing.assert_allclose(matcher.score(queries), scores, atol=1e-6)
    assert blocks == [13, 13, 13, 11]


def test_the_matcher_of_one_class_of_very_many_references_pads_no_other_to_its_size() -> None:
    sizes = np.array([20_000, *[1] * 20_000])
    labels = np.repeat(np.arange(len(sizes)), sizes)
    matcher = lct.Matcher(np.ones((len(labels), 1), np.float32), labels, np.full(len(sizes), 3))
    cells = sum(buffer.numel() for buffer in matcher.buffers())
    assert cells < 2 * len(labels), "a single table would have 400 million"
    assert (matcher.score(np.ones((1, 1), np.float32)) == 1).all()


def test_the_matcher_of_one_vector_a_class_is_a_plain_product() -> None:
    values, labels = draw_embeddings(1, 5)
    queries, _ = draw_embeddings(3, 5, seed=1)
    scores = lct.Matcher(values, labels, np.ones(5, int)).score(queries)
    np.testing.assert_allclose(scores, queries @ values.T, atol=1e-6)


@pytest.mark.parametrize("per_class", [1, 4])
def test_an_enrolled_class_gets_its_offset_and_half_its_lead_over_those_of_the_training(per_class: int) -> None:
    values, labels = draw_embeddings(per_class, 5, spread=3.0)
    queries, _ = draw_embeddings(40, 1, seed=1, spread=3.0)
    counts = np.full(5, min(per_class, 2))
    plain = lct.Matcher(values, labels, counts).score(queries)
    is_enrolled, offsets = np.array([0, 1, 0, 0, 1], bool), np.float32([0, 0.1, 0, 0, -0.05])
    treated = lct.Matcher(values, labels, counts).adjust_enrolled(is_enrolled, offsets).score(queries)
    for before, after in zip(plain, treated, strict=True):
        np.testing.assert_allclose(after[~is_enrolled], before[~is_enrolled], atol=1e-6)
        moved = before + offsets
        lead = moved[is_enrolled] - before[~is_enrolled].max()
        np.testing.assert_allclose(after[is_enrolled], moved[is_enrolled] + lead / 2, atol=1e-6)
        assert after.argmax() == moved.argmax(), "the lead changes no answer"
    for everyone in (np.zeros(5, bool), np.ones(5, bool)):  # nobody to lead
        scores = lct.Matcher(values, labels, counts).adjust_enrolled(everyone, offsets).score(queries)
        assert np.array_equal(scores, plain)


def test_the_spread_of_a_class_is_one_minus_the_mean_cosine_of_its_pairs() -> None:
    values, labels = draw_embeddings(6, 4, spread=2.0)
    values, labels = values[:20], np.where(labels[:20] == 3, 4, labels[:20])  # two of class 4, none of 3
    spreads = lct.class_spreads(np.concatenate([values, values[:1]]), np.append(labels, 5), 6)
    for label in (0, 1, 2, 4):
        of_class = values[labels == label]
        pairs = (of_class @ of_class.T)[np.triu_indices(len(of_class), 1)]
        assert spreads[label] == pytest.approx(1 - pairs.mean(), abs=1e-6)
    assert np.isnan(spreads[[3, 5]]).all(), "no class, and no pair"


def test_the_offset_of_few_crops_leans_on_the_spread_of_val() -> None:
    """One crop has no spread, many have their own; galleries that know of none give no offset."""
    vectors, _ = draw_embeddings(30, 1, spread=3.0)
    for count in (1, 5, 30):
        stacks = lct.Embedded(np.arange(count), np.zeros(count), np.zeros(count, int), vectors[:count])
        spread = lct.class_spreads(stacks.values, stacks.labels, 1)[0] if count > 1 else 0.0
        expected = ((count - 1) * spread + 2 * 0.5) / (count + 1)
        assert lct.enrolment_offsets((0.3, 0.5), stacks, 1)[0] == pytest.approx((expected - 0.3) / 4, abs=1e-6)
        assert lct.enrolment_offsets((0.0, 0.0), stacks, 1).tolist() == [0]
    val = make_embedded(1, 1)  # no class of it has a spread
    gallery = lct.build_gallery(make_records(36), make_embedded(9, 0), val, lct.Config())
    assert lct.calibrate(gallery, val, lct.Config(), None, {}, torch.float32).spreads == (0.0, 0.0)


def test_references_cover_the_views_of_a_class_and_not_its_outlier() -> None:
    rng = np.random.default_rng(0)
    views = np.eye(8)[:3].repeat(20, axis=0) + 0.05 * rng.normal(size=(60, 8))
    outlier = -np.ones((1, 8))
    values = np.concatenate([views, outlier])
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    chosen = lct.choose_references(values, 4)
    assert {int(i) // 20 for i in chosen if i < 60} == {0, 1, 2}
    assert np.array_equal(chosen, lct.choose_references(values, 4))
    assert np.array_equal(lct.choose_references(values, 100), np.arange(61))


def test_references_of_identical_pictures_are_still_distinct() -> None:
    assert len(set(lct.choose_references(np.tile(np.float32([1, 0]), (9, 1)), 4).tolist())) == 4


def test_gallery_takes_its_references_by_class_and_its_centroids_from_all() -> None:
    references, val = make_embedded(20, 1), make_embedded(20, 2)
    full = lct.build_gallery(make_records(80), references, val, lct.Config())
    small = lct.build_gallery(make_records(80), references, val, lct.Config(max_refs_per_class=5))
    assert len(full.stack_labels) == 80 and np.bincount(small.stack_labels).tolist() == [5, 5, 5, 5]
    assert (np.diff(small.stack_labels) >= 0).all()
    np.testing.assert_array_equal(full.centroids, small.centroids)
    for path, label, value in zip(small.stack_paths, small.stack_labels, small.stacks, strict=True):
        row = int(path.removeprefix("p/").removesuffix(".jpg"))
        assert references.labels[row] == label
        np.testing.assert_array_equal(references.values[row], value)


def test_the_matcher_that_wins_on_val_is_taken() -> None:
    rng = np.random.default_rng(0)
    ring = lambda n: np.stack([np.cos(a := rng.uniform(0, 2 * np.pi, n)), np.sin(a), np.zeros(n)], 1)  # noqa: E731

    def part(n: int) -> lct.Embedded:  # class 0 all around the equator: its mean is nowhere; class 1 at the pole
        values = np.concatenate([ring(n), np.tile([[0.3, 0.0, 0.95]], (n, 1))]).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        return lct.Embedded(np.arange(2 * n), np.zeros(2 * n, np.uint8), np.repeat([0, 1], n), values)

    gallery = lct.build_gallery(make_records(80, 2), part(40), part(40), lct.Config())
    assert gallery.matcher == "knn"
    easy = lct.build_gallery(
        make_records(80), make_embedded(20, 1, spread=0.1), make_embedded(20, 2, spread=0.1), lct.Config()
    )
    assert easy.matcher == "centroid", "a tie goes to the simpler"
    hard = (make_records(80), make_embedded(20, 1, spread=2.0), make_embedded(20, 2, spread=2.0))
    both = [lct.build_gallery(*hard, lct.Config(matcher=matcher)) for matcher in ("centroid", "knn")]
    counts, expected = (gallery.knn_counts.tolist() for gallery in both)
    assert counts == expected != [1] * 4, "k is chosen even where centroids match: its accuracy is given beside theirs"


def test_a_gallery_with_enrolled_classes_answers_by_centroids_as_they_were_calibrated(tmp_path: Path) -> None:
    references, val = make_embedded(20, 0, spread=2.0), make_embedded(10, 1, spread=2.0)
    knn = lct.build_gallery(make_records(80), references, val, lct.Config(matcher="knn"))
    evidence = (val, lct.Config(target_precision=0.8), None, {}, torch.float32)
    plain = lct.calibrate(dataclasses.replace(knn, matcher="centroid"), *evidence)
    by_centroid = {name: getattr(plain, name) for name in lct.CALIBRATED}
    lct.save_gallery(
        tmp_path / "prototypes.npz", dataclasses.replace(lct.calibrate(knn, *evidence), by_centroid=by_centroid), {}
    )
    gallery, _ = lct.load_gallery(tmp_path / "prototypes.npz")
    assert gallery.matcher == "knn" and not np.array_equal(gallery.thresholds, plain.thresholds)
    added = make_embedded(5, 2).take(np.arange(5))._replace(rows=np.arange(5), labels=np.zeros(5, int))
    more = lct.enrol(gallery, added, [gallery.class_names[0]], ["x"] * 5)
    assert more.matcher == "knn" and more.by_centroid == gallery.by_centroid, "no new class"
    names = gallery.class_names[1:]
    for known, place in ((gallery, slice(None)), (lct.remove_class(gallery, gallery.class_names[0]), slice(1, None))):
        grown = lct.enrol(known, added, ["new"], ["x"] * 5)
        assert grown.matcher == "centroid" and grown.by_centroid == {} and set(names) < set(grown.class_names)
        expected = plain.thresholds[place]
        np.testing.assert_array_equal(grown.thresholds, np.append(expected, expected.max()))
        assert np.array_equal(grown.is_pooled, np.append(plain.is_pooled[place], True))
        for name in ("temperature", "val_thresholds"):
            assert getattr(grown, name) == pytest.approx(getattr(plain, name))
        np.testing.assert_array_equal(grown.log_odds, np.tile(plain.log_odds[0], (len(grown.class_names), 1)))
        lct.save_gallery(tmp_path / "grown.npz", grown, {})
        assert lct.load_gallery(tmp_path / "grown.npz")[0].matcher == "centroid"


def test_what_is_answered_stands_beside_the_truth(patch_used: Callable) -> None:
    """However many scores are made at a time."""
    gallery = lct.build_gallery(make_records(80), make_embedded(20, 0), make_embedded(10, 1), lct.Config())
    queries = make_embedded(5, 2, spread=2.0)
    scores = gallery.scores(queries.values).astype(np.float64)
    labels = np.stack([scores.argmax(axis=1), queries.labels, np.argsort(-scores, axis=1)[:, 1]], axis=1)
    for size in (lct.RETRIEVAL_CHUNK, 4 * 3):
        patch_used(lct, "RETRIEVAL_CHUNK", size)
        judged, of_judged = gallery.judge(queries.values, queries.labels)
        assert np.array_equal(judged, labels) and (labels[:, 0] != labels[:, 1]).any()
        np.testing.assert_allclose(of_judged, np.take_along_axis(scores, labels, axis=1), rtol=1e-5)


def test_objects_of_no_class_decide_between_matchers_that_are_right_equally_often() -> None:
    rng = np.random.default_rng(0)

    def arc(n: int, sign: float) -> np.ndarray:  # two classes, each at both ends of an arc, and nothing in its middle
        angle = np.concatenate([rng.normal(0.6, 0.02, n), rng.normal(-0.6, 0.02, n)])
        return np.stack([sign * np.cos(angle), np.sin(angle), np.zeros(2 * n)], 1).astype(np.float32)

    def part(n: int) -> lct.Embedded:
        values = np.concatenate([arc(n, 1.0), arc(n, -1.0)])
        return lct.Embedded(np.arange(4 * n), np.zeros(4 * n, np.uint8), np.repeat([0, 1], 2 * n), values)

    references, val, records = part(20), part(20), make_records(80, 2)
    middle = np.tile(np.float32([[1, 0, 0], [-1, 0, 0]]), (5, 1))  # objects of no class lie where the centroids are
    config = lct.Config(prototypes_per_class="1")
    assert lct.build_gallery(records, references, val, config).matcher == "centroid"
    assert lct.build_gallery(records, references, val, config, middle).matcher == "knn"


def draw_two_sides(num: int, seed: int) -> lct.Embedded:
    """Four classes of two sides each, whose mean is nearer to another class than to either side."""
    rng = np.random.default_rng(seed)
    sides = np.eye(16)[[0, 1, 2, 3, 4, 5, 6, 7]]
    own = np.tile(np.arange(8), num)
    values = sides[own] + 0.4 * sides[(own + 3) % 8] + 0.15 * rng.normal(size=(len(own), 16))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return lct.Embedded(np.arange(len(own)), np.zeros(len(own), np.uint8), own % 4, values)


def test_several_prototypes_a_class_are_taken_where_val_says_so() -> None:
    references, val = draw_two_sides(20, 1), draw_two_sides(20, 2)
    records = make_records(160)
    many = lct.build_gallery(records, references, val, lct.Config(prototypes_per_class="2"))
    assert np.bincount(many.prototype_labels).tolist() == [2, 2, 2, 2]
    np.testing.assert_allclose(np.linalg.norm(many.prototypes, axis=1), 1, atol=1e-5)
    scores = dataclasses.replace(many, matcher="prototypes").scores(val.values)
    cosine = val.values @ many.prototypes.T
    np.testing.assert_allclose(scores, np.maximum(cosine[:, ::2], cosine[:, 1::2]), atol=1e-6)
    assert (scores.argmax(axis=1) == val.labels).mean() > 0.95
    one = lct.build_gallery(records, references, val, lct.Config(prototypes_per_class="1"))
    np.testing.assert_array_equal(one.prototypes, one.centroids)
    assert one.matcher in ("centroid", "knn")
    auto = lct.build_gallery(make_records(80), make_embedded(20, 1), make_embedded(20, 2), lct.Config())
    np.testing.assert_array_equal(auto.prototypes, auto.centroids)  # classes in one piece


def test_auto_splits_classes_only_if_that_is_no_accident() -> None:
    references, val = draw_two_sides(20, 1), draw_two_sides(20, 2)
    plain = lct.build_gallery(make_records(160), references, val, lct.Config(prototypes_per_class="1"))
    plain = dataclasses.replace(plain, matcher="centroid")
    rng = np.random.default_rng(0)
    plain = dataclasses.replace(plain, centroids=np.roll(plain.centroids, 1, axis=0))  # always wrong
    assert lct.try_several_prototypes(plain, references, val).matcher == "prototypes"
    few = val.take(rng.permutation(len(val.rows))[:4])  # four wins of four do not prove it
    assert lct.try_several_prototypes(plain, references, few).matcher == "centroid"
    twice = lct.concatenate_embedded([few, few])  # nor do they in two views each
    assert lct.try_several_prototypes(plain, references, twice).matcher == "centroid"


def test_where_no_class_has_several_prototypes_any_more_centroids_match() -> None:
    """Whether that class is taken out, or does not split with the crops it has got."""
    references, val = draw_two_sides(20, 1), draw_two_sides(20, 2)
    config = lct.Config(prototypes_per_class="2", max_refs_per_class=2)
    gallery = lct.build_gallery(make_records(160), references, val, config)
    first = gallery.prototypes[gallery.prototype_labels == 0]
    gallery = lct.take_prototypes(gallery, [first, *gallery.centroids[1:, None]])
    added = references.take(np.flatnonzero(references.labels == 0)[:1])._replace(rows=np.zeros(1, int))
    smaller, grown = lct.remove_class(gallery, "class 0"), lct.enrol(gallery, added, ["class 0"], ["/new.jpg"])
    assert [each.matcher for each in (gallery, smaller, grown)] == ["prototypes", "centroid", "centroid"]
    np.testing.assert_array_equal(smaller.prototypes, smaller.centroids)


def test_a_single_picture_that_is_far_off_gets_no_prototype() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([np.eye(8)[[0, 1]].repeat(15, axis=0) + 0.05 * rng.normal(size=(30, 8)), -np.ones((1, 8))])
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    centroid = lct.class_centroids(values, np.zeros(31, int), 1)[0]
    means = lct.mean_of_clusters(values, 3, centroid)
    assert len(means) == 2 and (means @ values[-1]).max() < 0
    assert np.array_equal(lct.mean_of_clusters(values[:5], 3, centroid), centroid[None]), "too few to split"


def test_threshold_is_the_least_score_with_the_target_precision() -> None:
    rng = np.random.default_rng(3)
    best = rng.uniform(0, 1, 400)
    is_right = rng.uniform(0, 1, 400) < best
    thresholds, is_pooled = lct.fit_thresholds(np.zeros(400, int), lct.Answers(best, is_right), 0.85, 2, torch.float32)

    def promised(score: float) -> float:  # by the binomial bound at 60 %
        num_right, num_answers = is_right[best >= score].sum(), (best >= score).sum()
        return 1 - beta.ppf(0.6, num_answers - num_right + 1, num_right)

    assert promised(thresholds[1] - 1e-6) >= 0.85
    assert all(promised(score) < 0.85 for score in best[best < thresholds[1] - 1e-6])
    assert is_pooled.tolist() == [False, True]


def test_two_errors_do_not_silence_a_class_while_all_classes_together_are_right() -> None:
    scores = np.concatenate([np.linspace(0.9, 0.5, 35), np.linspace(0.95, 0.5, 300)]).astype(np.float32)
    answers, is_right = np.repeat([0, 1], (35, 300)), np.ones(335, bool)
    is_right[[20, 21]] = False  # 33 of 35 are less than 95 %, and the 20 before them are the only ones without an error
    alone = lct.precision_threshold(lct.Answers(scores[:35], is_right[:35]), 0.95)
    assert (scores[:35] >= alone).sum() == 20
    thresholds, is_pooled = lct.fit_thresholds(answers, lct.Answers(scores, is_right), 0.95, 2, torch.float32)
    assert (scores[:35] >= thresholds[0]).all() and not is_pooled.any()
    is_right[:35] = np.arange(35) % 3 == 0  # a class that is wrong that often keeps being told from the others
    assert (
        scores[:35] >= lct.fit_thresholds(answers, lct.Answers(scores, is_right), 0.95, 2, torch.float32)[0][0]
    ).mean() < 0.3


def test_a_class_that_is_never_right_answers_unknown() -> None:
    scores = np.linspace(0.2, 0.9, 30).astype(np.float32)
    thresholds, _ = lct.fit_thresholds(
        np.zeros(30, int), lct.Answers(scores, np.zeros(30, bool)), 0.95, 2, torch.float32
    )
    assert thresholds[0] > scores.max()


def test_temperature_makes_the_probabilities_honest() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5))
    probabilities = np.exp(lct.log_softmax(logits))
    labels = np.array([rng.choice(5, p=row / row.sum()) for row in probabilities])
    assert lct.fit_temperature(0.1 * logits, labels) == pytest.approx(0.1, rel=0.1)


def test_probabilities_are_those_of_objects_of_which_one_in_five_is_unknown() -> None:
    """Whatever the numbers of val crops and strangers are, by the true posterior of scores that are drawn."""
    rng = np.random.default_rng(0)
    right, wrong, strangers = (rng.normal(mean, 0.1, count) for mean, count in ((0.7, 2700), (0.5, 300), (0.5, 700)))
    known = np.concatenate([right, wrong])
    gallery = lct.build_gallery(make_records(80), make_embedded(20, 0), make_embedded(10, 1), lct.Config())
    log_odds = lct.fit_log_odds(lct.Answers(known, np.arange(3000) < 2700, strangers, 0.2))
    gallery = dataclasses.replace(gallery, log_odds=np.array([(0, 0), log_odds, (9, 9), (9, 9), (9, 9)]))
    scores = np.linspace(0.3, 0.9, 13)
    of_right, of_wrong = (np.exp(-((scores - mean) ** 2) / 0.02) for mean in (0.7, 0.5))
    expected = 0.72 * of_right / (0.72 * of_right + 0.28 * of_wrong)
    np.testing.assert_allclose(gallery.probability(np.ones(13, int), scores.astype(np.float32)), expected, atol=0.03)


def test_probabilities_where_all_or_none_are_right() -> None:
    few = np.array([0.8, 0.7], np.float32)
    for is_right, expected in (([True, True], 0.75), ([False, False], 0.25)):
        slope, intercept = lct.fit_log_odds(lct.Answers(few, np.array(is_right)))
        assert slope == 0 and 1 / (1 + np.exp(-intercept)) == pytest.approx(expected)
    slope, _ = lct.fit_log_odds(lct.Answers(few, np.array([True, True]), np.array([0.9, 0.95], np.float32), 0.2))
    assert slope == 0, "strangers that score higher than known objects make no probability that falls"


def test_where_no_image_was_taken_for_an_enrolled_class_nothing_is_known() -> None:
    """Else the threshold of no answers, which all scores pass, would be that of a new class."""
    gallery = lct.build_gallery(make_records(80), make_embedded(20, 0), make_embedded(10, 1), lct.Config())
    figures = {"target_precision": 0.95}
    enrolled = {"1": {"scores": [], "is_right": [], "figures": figures}}
    enrolled["5"] = {"scores": [0.5, 0.4], "is_right": [True, False], "figures": figures}
    enrolled["20"] = enrolled["5"] | {"scores": [0.7, 0.6]}
    unseen = {"strangers": [-1.0, 0.0], "enrolled": enrolled}
    gallery = lct.calibrate(gallery, make_embedded(10, 1), lct.Config(), None, unseen, torch.float32)
    assert set(gallery.enrolment) == {"5", "20"}
    for num_crops, measured in ((1, "5"), (19, "5"), (20, "20"), (99, "20")):
        assert lct.find_enrolment_figures(gallery, num_crops) is gallery.enrolment[measured], num_crops


def test_a_class_of_few_test_images_is_named_whatever_their_views() -> None:
    train, images = make_embedded(9, 0), make_embedded(lct.FEW_IMAGES, 1)
    gallery = lct.build_gallery(make_records(36), train, images, lct.Config())
    gallery = lct.calibrate(gallery, images, lct.Config(), None, {}, torch.float32)
    fewer = images.take(np.arange(1, 4 * lct.FEW_IMAGES))
    both_views = lct.concatenate_embedded([fewer, fewer._replace(views=fewer.views + np.uint8(1))])
    assert lct.measure_gallery(gallery, both_views, images.rows)["few"] == [gallery.class_names[images.labels[0]]]


def test_evaluate_prints_accuracy_and_f1_of_each_matcher() -> None:
    train, val = make_embedded(9, 0), make_embedded(9, 1)
    gallery = lct.calibrate(
        lct.build_gallery(make_records(36), train, val, lct.Config()), val, lct.Config(), None, {}, torch.float32
    )
    figures = lct.measure_gallery(gallery, val._replace(labels=np.maximum(val.labels, 1)), val.rows)
    for line, closed in zip(lct.format_measures(figures).splitlines(), figures["closed"].values(), strict=False):
        accuracy, f1 = (lct.format_figure(closed[name]) for name in ("acc", "f1_macro"))
        assert line.endswith(f": acc {accuracy}, macro F1 {f1}") and accuracy != f1


def test_where_all_answers_are_right_or_wrong_the_f1_is_no_surer_than_the_accuracy() -> None:
    train, val = make_embedded(9, 0, spread=0.01), make_embedded(9, 1, spread=0.01)
    gallery = lct.calibrate(
        lct.build_gallery(make_records(36), train, val, lct.Config()), val, lct.Config(), None, {}, torch.float32
    )
    for labels, value in ((val.labels, 1.0), ((val.labels + 1) % 4, 0.0)):
        for figures in lct.measure_gallery(gallery, val._replace(labels=labels), val.rows)["closed"].values():
            low, high = figures["f1_macro"]["interval"]
            assert figures["f1_macro"]["value"] == value and high - low == pytest.approx(3.84 / (36 + 3.84), abs=1e-3)


def test_the_last_class_but_one_is_not_removed() -> None:
    gallery = lct.build_gallery(make_records(18, 2), make_embedded(9, 0, 2), make_embedded(9, 1, 2), lct.Config())
    with pytest.raises(lct.UserError, match="would leave one class only"):
        lct.remove_class(gallery, "class 0")


def test_a_class_taken_out_is_scored_by_the_others() -> None:
    gallery = lct.build_gallery(make_records(80), make_embedded(20, 0), make_embedded(10, 1), lct.Config())
    val = make_embedded(10, 1)
    scores = gallery.scores(val.values)
    scores[np.arange(len(scores)), val.labels] = -1
    answers, best = lct.answer_without_class(gallery.scores, val)
    np.testing.assert_array_equal(best, scores.max(axis=1))
    np.testing.assert_array_equal(answers, scores.argmax(axis=1))


def test_file_has_format_3_and_needs_no_pickle(tmp_path: Path) -> None:
    val = make_embedded(20, 2)
    gallery = lct.build_gallery(make_records(80), make_embedded(20, 1), val, lct.Config(max_refs_per_class=7))
    gallery = lct.calibrate(gallery, val, lct.Config(), None, {}, torch.float32)
    lct.save_gallery(tmp_path / "prototypes.npz", gallery, {"model_id": "m", "mean": (0.5, 0.5, 0.5), "emb_dim": 16})
    with np.load(tmp_path / "prototypes.npz", allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    assert set(content) == {
        "feature_mean",
        "feature_projection",
        "feature_weight",
        "centroids",
        "prototypes",
        "prototype_labels",
        "stacks",
        "stack_labels",
        "stack_paths",
        "stack_views",
        "id2cls",
        "cls2id",
        "thresholds",
        "is_enrolled",
        "offsets",
        "log_odds",
        "knn_counts",
        "matcher",
        "meta",
    }
    assert content["centroids"].shape == (4, 16) and content["centroids"].dtype == np.float32
    assert content["stacks"].shape == (28, 16) and content["stack_labels"].dtype == np.int64
    np.testing.assert_allclose(np.linalg.norm(content["stacks"], axis=1), 1, atol=1e-5)
    assert json.loads(str(content["cls2id"])) == {name: i for i, name in enumerate(content["id2cls"].tolist())}
    assert content["thresholds"].shape == (4,) and str(content["matcher"]) in ("centroid", "knn")
    meta = json.loads(str(content["meta"]))
    assert meta["format"] == 3 and meta["mean"] == [0.5, 0.5, 0.5] and meta["temperature"] > 0


def spoil(arrays: dict[str, np.ndarray], fault: str) -> None:
    name = fault.split()[0]
    if fault.endswith("is missing"):
        del arrays[name]
    elif fault.endswith("is of float64"):
        arrays[name] = arrays[name].astype(np.float64)
    elif fault.endswith("is too short"):
        arrays[name] = arrays[name][:-1]
    elif fault.endswith("is flat"):
        arrays[name] = arrays[name][:, 0].copy()
    elif fault.endswith("is narrow"):
        arrays[name] = np.ascontiguousarray(arrays[name][:, :-1])
    elif fault.endswith("is out of order"):
        arrays[name] = arrays[name][::-1].copy()
    elif fault.endswith("is out of range"):
        arrays[name] = arrays[name] + 1
    elif fault.endswith("is empty"):
        arrays[name] = np.array("{}")
    else:
        arrays[name] = np.array("nearest")


@pytest.mark.parametrize(
    "fault",
    [
        "thresholds is missing",
        "meta is missing",
        "centroids is of float64",
        "stack_labels is of float64",
        "thresholds is too short",
        "stack_paths is too short",
        "prototypes is flat",
        "stacks is narrow",
        "stack_labels is out of order",
        "prototype_labels is out of range",
        "matcher is another",
        "meta is empty",
    ],
)
def test_a_sound_file_of_arrays_that_do_not_belong_together_is_refused_in_one_sentence(
    tmp_path: Path, fault: str
) -> None:
    gallery = lct.build_gallery(make_records(80), make_embedded(20, 1), make_embedded(20, 2), lct.Config())
    path = tmp_path / "prototypes.npz"
    lct.save_gallery(path, gallery, {"model_id": "m"})
    lct.load_gallery(path)
    with np.load(path) as file:
        arrays = dict(file)
    spoil(arrays, fault)
    np.savez(path, **arrays)
    with pytest.raises(lct.UserError) as caught:
        lct.load_gallery(path)
    assert fault.split()[0] in caught.value.what and "\n" not in caught.value.what


def test_what_the_meta_of_a_gallery_lacks_is_named(tmp_path: Path) -> None:
    gallery = lct.build_gallery(make_records(80), make_embedded(20, 1), make_embedded(20, 2), lct.Config())
    path = tmp_path / "prototypes.npz"
    lct.save_gallery(path, gallery, {"model_id": "m"})
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    needed = meta.keys() - {"model_id", "unknown_share"}  # an older script did not write the latter
    for key in needed:
        lacking = {name: value for name, value in meta.items() if name != key}
        np.savez(path, **arrays | {"meta": np.array(json.dumps(lacking))})
        with pytest.raises(lct.UserError, match=f"it has no {key} in its meta"):
            lct.load_gallery(path)
    assert "pooled_thresholds" in needed
    del meta["unknown_share"]
    np.savez(path, **arrays | {"meta": np.array(json.dumps(meta))})
    assert lct.load_gallery(path)[0].unknown_share == 0.2


def test_every_flipped_bit_of_the_file_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    val = make_embedded(2, 2)
    gallery = lct.build_gallery(make_records(80), make_embedded(2, 1), val, lct.Config())
    gallery = lct.calibrate(gallery, val, lct.Config(), None, {}, torch.float32)
    path = tmp_path / "prototypes.npz"
    lct.save_gallery(path, gallery, {"model_id": "m"})
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    num_refused = 0
    for position in rng.choice(len(data), 150, replace=False).tolist():
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            again, _ = lct.load_gallery(path)
        except lct.UserError:
            num_refused += 1
            continue
        names = {field.name for field in dataclasses.fields(gallery)} - {"fusion"}
        pairs = [(getattr(again, name), getattr(gallery, name)) for name in names]
        pairs += zip(again.arrays().values(), gallery.arrays().values(), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs), position
    assert num_refused > 100


def test_a_small_class_is_scored_by_its_share_of_the_nearest_references() -> None:
    sizes = np.array([100, 50, 50, 5, 1, 0, 50])
    assert lct.count_nearest(sizes, 50, 5).tolist() == [5, 5, 5, 1, 1, 1, 5]
    assert lct.count_nearest(sizes, 50, 10).tolist() == [10, 10, 10, 1, 1, 1, 10]
    assert lct.count_nearest(np.array([20, 30, 60]), 60, 10).tolist() == [4, 5, 10]
    assert lct.count_nearest(sizes, 50, 1).tolist() == [1] * 7


def test_very_many_classes_need_no_memory_for_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for the square of the classes: the gallery of 1,500 is built, calibrated, measured, listed and searched for doubles."""
    num_classes = 1500
    monkeypatch.setattr(lct, "MAX_SPLIT_CLASSES", 1000)
    lct.build_gallery(make_records(80), make_embedded(20, 0), make_embedded(10, 1), lct.Config())  # imports
    train, val = (make_embedded(2, seed, num_classes, 0.1) for seed in (0, 1))
    monkeypatch.setattr(lct, "RETRIEVAL_CHUNK", 100_000)
    monkeypatch.setattr(lct, "MATCHER_CHUNK", 100_000)
    monkeypatch.setattr(lct, "MAX_SCORE_ENTRIES", 30_000)
    monkeypatch.setattr(lct, "BOOTSTRAP_DRAWS", 2)
    tracemalloc.start()
    gallery = lct.build_gallery(make_records(2 * num_classes, num_classes), train, val, lct.Config())
    gallery = lct.calibrate(gallery, val, lct.Config(), None, {}, torch.float32)
    figures = lct.measure_gallery(gallery, val, val.rows)
    loss, macro, _ = lct.classify(lambda own: own @ gallery.centroids.T, val.values, val.labels, gallery.class_names)
    matched = lct.recall_at_1(train.values, train.labels, val)
    judged, scores = gallery.judge(val.values, val.labels)
    lct.find_collisions(gallery, ["class 5"])
    table = lct.format_gallery(gallery)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9e6  # all scores have 18 MB, in float32
    assert table.count("\n") >= num_classes and len(scores) == 2 * num_classes
    accuracy = float((judged[:, 0] == val.labels).mean())
    assert figures["closed"][gallery.matcher]["acc"]["value"] == pytest.approx(accuracy)
    assert macro["auc_macro"] is None and loss > 0 and matched >= accuracy > 0.3


def test_features_are_projected_half_way_to_equal_spread_within_classes() -> None:
    """Where all axes are kept, the projection times itself is the inverse root of the covariance within classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 300)
    spread = np.diag([0.5, 0.7, 1, 1.5, 3, 1, 1, 1]) + 0.2
    values = (rng.normal(size=(20, 8)) * 4)[labels] + rng.normal(size=(6000, 8)) @ spread
    features = lct.Embedded(np.arange(6000), np.zeros(6000, np.uint8), labels, values.astype(np.float32))
    mean, projection = lct.fit_projection(features)
    np.testing.assert_allclose(mean, values.mean(axis=0), atol=1e-5)
    inside = values - np.stack([values[labels == label].mean(axis=0) for label in labels])
    covariance = inside.T @ inside / len(inside)  # hardly shrunk: 6,000 crops
    inverse_root = projection.astype(float) @ projection.T
    np.testing.assert_allclose(inverse_root @ covariance @ inverse_root, np.eye(8), atol=0.05)


def test_cosines_of_fused_vectors_are_weighted_means() -> None:
    rng = np.random.default_rng(0)
    features, embeddings = (rng.normal(size=(6, width)).astype(np.float32) for width in (5, 3))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    mean, projection = (rng.normal(size=shape).astype(np.float32) for shape in ((5,), (5, 4)))
    fused = lct.Fusion(mean, projection, 0.3)(torch.from_numpy(features), torch.from_numpy(embeddings)).numpy()
    projected = (features - mean) @ projection
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    expected = 0.7 * embeddings @ embeddings.T + 0.3 * projected @ projected.T
    np.testing.assert_allclose(fused @ fused.T, expected, atol=1e-6)


def test_single_references_leave_the_embedding_alone() -> None:
    """One crop a class shows nothing of the spread within classes."""
    one = lct.Embedded(np.arange(4), np.zeros(4, np.uint8), np.arange(4), np.eye(4, dtype=np.float32))
    assert lct.choose_fusion({"train": one, "val": one}, {"train": one, "val": one}, 4).weight == 0
