"""How predictions of fleets are scored against measurements."""

from testbed.bench.plan_score import score


def test_fleets_and_pairs_are_counted() -> None:
    exact, close, slow, wrong = (100.0, 100.0), (104.0, 103.0), (210.0, 200.0), (90.0, 150.0)
    found = score([exact, close, slow, wrong])
    assert (found.fleets, found.within_20) == (4, 3)  # 90 is 40 % below 150
    # exact and close differ by 3 %, which does not count; wrong was predicted to be the fastest of all
    assert (found.pairs, found.right) == (5, 3)
    assert (found.all_pairs, found.all_right) == (6, 4)


def test_scores_at_the_limits() -> None:
    assert score([(80.0, 100.0), (120.0, 100.0), (120.1, 100.0)]).within_20 == 2
    assert score([(1.0, 100.0), (2.0, 105.0)]).pairs == 1
    assert score([(5.0, 5.0)]).all_pairs == 0
