"""Which tensor goes where. Pure names; what happens in a session is in test_partial_restore."""

import pytest

from tf_h5_callback.restoring.restore import Pair, Restore, rnn_names_of_tensorflow_1_2

FILE = ["a/w:0", "a/b:0", "c/w:0", "global_step:0"]
GRAPH = ["x/w:0", "x/b:0", "y/w:0", "global_step:0"]


def pairs(assignment_map, in_file=FILE, in_graph=GRAPH):
    found = Restore(assignment_map=assignment_map).pairs(in_file, in_graph)
    assert all(isinstance(pair, Pair) for pair in found)
    return [tuple(pair) for pair in found]


def test_without_a_map_names_are_equal():
    assert pairs(None, ["a:0", "b:0"], ["b:0", "c:0"]) == [
        ("a:0", None),
        ("b:0", "b:0"),
        (None, "c:0"),
    ]


def test_with_and_without_output_numbers():
    assert pairs(None, ["w", "table-keys"], ["w:0", "table-keys"]) == [
        ("table-keys", "table-keys"),
        ("w", "w:0"),
    ]


@pytest.mark.parametrize("colon", ["", ":0"])
def test_single_names(colon):
    assert pairs({"a/w" + colon: "y/w" + colon}) == [("a/w:0", "y/w:0")]


def test_names_that_do_not_exist_are_still_pairs():
    assert pairs({"nothing": "x/w"}) == [("nothing", "x/w:0")]
    assert pairs({"a/w": "nothing"}) == [("a/w:0", "nothing")]


def test_scopes():
    assert pairs({"a/": "x/"}) == [("a/b:0", "x/b:0"), ("a/w:0", "x/w:0")]
    assert pairs({"c/": "x/"}) == [("c/b:0", "x/b:0"), ("c/w:0", "x/w:0")]


def test_the_root_is_a_scope():
    assert pairs({"/": "new/"}, ["a/w:0", "b:0"], ["new/a/w:0", "new/b:0", "other:0"]) == [
        ("a/w:0", "new/a/w:0"),
        ("b:0", "new/b:0"),
    ]
    assert pairs({"old/": "/"}, ["old/w:0"], ["w:0"]) == [("old/w:0", "w:0")]


def test_a_list_of_pairs_can_use_a_tensor_twice():
    assert pairs([("a/w", "x/w"), ("a/w", "y/w")]) == [("a/w:0", "x/w:0"), ("a/w:0", "y/w:0")]


def test_a_callable():
    def rename(name):
        return None if name.startswith("c/") else name.replace("a/", "x/")

    assert pairs(rename) == [
        ("global_step:0", "global_step:0"),
        ("a/b:0", "x/b:0"),
        ("a/w:0", "x/w:0"),
        (None, "y/w:0"),
    ]


@pytest.mark.parametrize("row", [("a/", "x"), ("a", "x/")])
def test_a_scope_and_a_name(row):
    with pytest.raises(ValueError, match="either both are scopes"):
        pairs([row])


def test_a_scope_without_variables():
    assert pairs({"a/": "nowhere/"}) == [(None, "nowhere/")]


@pytest.mark.parametrize(
    "old, new",
    [
        ("rnn/basic_lstm_cell/weights:0", "rnn/basic_lstm_cell/kernel:0"),
        ("rnn/gru_cell/gates/biases:0", "rnn/gru_cell/gates/bias:0"),
        ("rnn/basic_lstm_cell/weights/Adam_1:0", "rnn/basic_lstm_cell/kernel/Adam_1:0"),
        ("rnn/cell/biases", "rnn/cell/bias"),
        ("weights:0", "weights:0"),
        ("dense/my_weights:0", "dense/my_weights:0"),
        ("global_step:0", "global_step:0"),
    ],
)
def test_rnn_names(old, new):
    assert rnn_names_of_tensorflow_1_2(old) == new
