"""Facts about the stream: what each state trains, validates and scores on (acceptance checks 11, 19)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app_progressive import MegabatchStream
from app_progressive.stream import REPLAYS
from app_progressive.tests.nets import facts

KNOWN = facts("replay")


def rows(ranges: list[list[int]]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])


@pytest.mark.parametrize("case", KNOWN["replay"], ids=lambda c: f"{c['meta_batch_size']}-{c['replay']}")
def test_indices_are_the_authors(case: dict[str, Any]) -> None:  # 11
    stream = MegabatchStream(50_000, case["S"], case["meta_batch_size"], replay=case["replay"])
    mode = "newest" if case["snip_no_replay"] else "first"
    for known in case["states"]:
        train, val = stream.state(known["state"])
        assert torch.equal(train, rows(known["train"])) and torch.equal(val, rows(known["val"]))
        assert torch.equal(stream.score_idx(known["state"], 0.2, mode), rows(known["snip"]))


def test_a_buffer_has_the_authors_sizes_and_only_grows() -> None:  # 11
    for case in KNOWN["buffer"]:
        stream = MegabatchStream(
            50_000, case["S"], case["meta_batch_size"], replay="buffer", buffer=(case["k"], case["l"])
        )
        before = torch.zeros(0, dtype=torch.int64)
        for known in case["states"]:
            train, val = stream.state(known["state"])
            assert (len(train), len(val)) == (known["train_size"], known["val_size"])
            buffered = train[: -stream.n_train]
            assert torch.equal(buffered[: len(before)], before)
            before = buffered


@pytest.mark.parametrize(("size", "parts"), [(63, (56, 7)), (756, (680, 76)), (5000, (4500, 500)), (50, (45, 5))])
def test_a_megabatch_is_split_nine_to_one(size: int, parts: tuple[int, int]) -> None:  # 11
    stream = MegabatchStream(10 * size, 10, size)
    assert (stream.n_train, stream.n_val) == parts
    train, val = stream.state(10)
    assert torch.equal(torch.cat([train, val]), torch.arange(10 * size))  # the last state covers the pool


@given(st.sampled_from(REPLAYS), st.integers(1, 9), st.integers(4, 30), st.integers(0, 5))
def test_training_and_validation_never_overlap_and_depend_on_the_state_alone(
    replay: str, states: int, size: int, seed: int
) -> None:  # 11
    options: dict[str, Any] = {"replay": replay, "seed": seed, "buffer": (1, 1)}
    stream, again = (MegabatchStream(300, states, size, **options) for _ in range(2))
    for t in range(states, 0, -1):
        train, val = stream.state(t)
        assert not set(train.tolist()) & set(val.tolist())
        assert all(torch.equal(a, b) for a, b in zip(again.state(t), (train, val), strict=True))
    ends = [set(torch.cat(stream.state(t)).tolist()) for t in range(1, states + 1)]
    if replay == "full":
        assert all(a < b for a, b in pairwise(ends)) and len(ends[-1]) == states * size


def test_scoring_draws_from_all_that_was_seen_without_repetition() -> None:  # 11
    stream = MegabatchStream(4000, 8, 50, seed=3, replay="full")
    newest, hits = set(stream.state(4)[0][-45:].tolist()), 0
    for t in range(1, 9):
        drawn = stream.score_idx(t)
        assert len(drawn) == len(set(drawn.tolist())) == 10 and set(drawn.tolist()) <= set(stream.state(t)[0].tolist())
        assert torch.equal(stream.score_idx(t, mode="first"), stream.state(1)[0][:10])
    for seed in range(40):
        other = MegabatchStream(4000, 8, 50, seed=seed)
        newest = set(other.state(4)[0][-45:].tolist())
        hits += len(newest & set(other.score_idx(4).tolist()))
    assert 60 < hits < 140  # a quarter of 400


def test_a_buffered_state_scores_on_distinct_examples() -> None:
    for seed in range(10):
        stream = MegabatchStream(60, 3, 20, replay="buffer", buffer=(18, 2), seed=seed)
        assert len(stream.state(3)[0].unique()) < len(stream.state(3)[0])
        drawn = stream.score_idx(3, 0.9)
        assert len(drawn.unique()) == len(drawn) == 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": "some"}, "replay must be one of full, none, one, buffer, got 'some'"),
        ({"n_states": 0}, "n_states must be at least 1, got 0"),
        ({"size": 26}, r"size must be in \[1, n_pool / n_states = 25\], got 26"),
        ({"size": 1}, "size must leave an example to train and one to validate on, got 1"),
        ({"val_fraction": 0.0}, r"val_fraction must be in \(0, 1\), got 0"),
        ({"replay": "buffer"}, r"buffer must be within the parts of a megabatch, \(18, 2\), got \(182, 182\)"),
        ({"buffer": (-1, 0)}, "buffer must be within"),
    ],
)
def test_impossible_streams_are_refused(options: dict[str, Any], message: str) -> None:  # 19
    with pytest.raises(ValueError, match=message):
        MegabatchStream(**{"n_pool": 100, "n_states": 4, "size": 20, **options})


def test_impossible_questions_are_refused() -> None:  # 19
    stream = MegabatchStream(100, 4, 20)
    for state in (0, 5):
        with pytest.raises(ValueError, match=rf"state must be in \[1, 4\], got {state}"):
            stream.state(state)
    for q in (-0.1, 0.04, 0.95):
        with pytest.raises(ValueError, match=f"q must give 1 to 18 of 20 examples, got {q}"):
            stream.score_idx(1, q)
    with pytest.raises(ValueError, match="mode must be one of union, newest, first, got 'last'"):
        stream.score_idx(1, mode="last")
