"""The account of a model: shares, reasons, and what deserves a warning."""

import json

import pytest

from dynamics.runs.account import Account, LeftOut

VECTORS = "vectors (norms, biases)"


def account(*left_out, trained=0):
    return Account({"a": (10, 10), "b": (30, 10)}, trained, left_out)


def test_shares_count_numbers():
    norm = LeftOut("norm", (100,), VECTORS, trains=True)
    assert account(norm, trained=100).share == 400 / 500
    assert account(norm, trained=100).trained_share == 100 / 200
    frozen = LeftOut("norm", (100,), VECTORS)
    assert account(frozen).trained_share is None
    assert account().share == 1
    assert Account({}).share == 1


@pytest.mark.parametrize(
    ("left_out", "trained", "expected"),
    [
        ([LeftOut("v", (400,), VECTORS, trains=True)], 400, 0),
        ([LeftOut("v", (1, 1, 400), VECTORS, trains=True)], 400, 0),
        ([LeftOut("m", (20, 20), "packed", trains=True)], 400, 0.5),
        ([LeftOut("m", (20, 20), "not selected", trains=True, chosen=True)], 400, 0),
        ([LeftOut("m", (20, 20), "packed")], 400, 0),  # of the numbers that train, all are there
        ([LeftOut("m", (20, 20), "packed")], 0, 0.5),  # none trains: of all numbers
        (
            [
                LeftOut("m", (4, 10, 10), "packed", trains=True),
                LeftOut("n", (20, 10), "not selected", trains=True, chosen=True),
            ],
            400,
            0.4,
        ),
    ],
)
def test_what_no_choice_of_the_user_left_out(left_out, trained, expected):
    assert account(*left_out, trained=trained).unchosen_share() == pytest.approx(expected)


def test_a_line_names_shares_and_reasons_the_largest_first():
    made = account(
        LeftOut("norm.weight", (10,), VECTORS, trains=True),
        LeftOut("norm.bias", (10,), VECTORS, trains=True),
        *(LeftOut(f"codes.{i}", (20, 10), "packed bytes") for i in range(3)),
        trained=400,
    )
    assert made.line(names=2) == (
        "2 of 7 tensors, 95.2 % of the numbers that train, 39.2 % of all 1020; left out: "
        "3 packed bytes (codes.0, codes.1, 1 more); 2 vectors (norms, biases)"
    )
    assert account().line() == "2 of 2 tensors, 100.0 % of 400 numbers"


def test_stacks_are_named_because_they_are_read_as_matrices():
    made = Account({"a": (10, 10), "experts.up": (3, 10, 10), "conv": (8, 2, 3)})
    assert made.line(names=1).endswith("numbers; 2 as matrices (experts.up, 1 more)")


def test_what_is_incomplete_is_never_a_hundred_percent():
    made = Account({"a": (10**4, 10**4)}, left_out=(LeftOut("norm", (1,), VECTORS),))
    assert "99.9 % of 100 M numbers" in made.line()


def test_an_account_survives_json():
    made = account(LeftOut("m", (4, 2, 2), "packed", trains=True, chosen=True), trained=7)
    assert Account.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("damaged", [None, 3, [], {}, {"left_out": 3}, {"left_out": [{}]}])
def test_what_is_no_account_is_none(damaged):
    assert Account.from_json(damaged) is None
