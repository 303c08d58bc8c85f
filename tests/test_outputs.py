"""Outputs: tuple, dictionary, attributes and pytree at once, as transformers' are."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import transformers.modeling_outputs as theirs
from torch import Tensor
from torch.nn.parallel import scatter_gather
from torch.utils import _pytree as pytree

from bitfast import outputs as ours
from tests.model_pairs import CLASSES, assert_close, our_model, pair

MODULES = pytest.mark.parametrize("module", [ours, theirs], ids=["bitfast", "transformers"])
KINDS: dict[str, list[str]] = {
    "BaseModelOutputWithPoolingAndNoAttention": [
        "last_hidden_state",
        "pooler_output",
        "hidden_states",
    ],
    "ImageClassifierOutputWithNoAttention": ["loss", "logits", "hidden_states"],
    "BackboneOutput": ["feature_maps", "hidden_states", "attentions"],
}
VALUES = [torch.arange(4.0), torch.arange(6.0).view(2, 3), (torch.zeros(2), torch.ones(3))]
PRESENT = [(0,), (1,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def make(module: Any, kind: str, present: tuple[int, ...] = (0, 1, 2)) -> Any:
    fields = KINDS[kind]
    return getattr(module, kind)(**{fields[i]: VALUES[i] for i in present})


def same(a: Any, b: Any) -> bool:
    """Compare structures of tensors, in which == would compare elements."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- one behaviour after the other, on ours and on theirs ---------------------------------------

BEHAVIOURS: dict[str, Any] = {
    "names": lambda o: list(o),
    "keys": lambda o: list(o.keys()),
    "values": lambda o: list(o.values()),
    "items": lambda o: [list(item) for item in o.items()],
    "length": len,
    "truth": bool,
    "to_tuple": lambda o: o.to_tuple(),
    "first": lambda o: o[0],
    "last": lambda o: o[-1],
    "slice": lambda o: o[1:],
    "everything": lambda o: o[:],
    "backwards": lambda o: o[::-1],
    "beyond": lambda o: o[3],
    "by a name that is there": lambda o: o[next(iter(o))],
    "by a name that is not": lambda o: o["no_such_thing"],
    "attribute that is not": lambda o: o.no_such_thing,
    "get": lambda o: o.get(list(o)[-1]),
    "get with a default": lambda o: o.get("no_such_thing", 7),
    "contains": lambda o: [name in o for name in (*o.__dataclass_fields__, "no_such_thing")],
    "attributes": lambda o: [getattr(o, name) for name in o.__dataclass_fields__],
    "unpacked as keywords": lambda o: list(dict(**o)),
    "as a dictionary": lambda o: list(dict(o).values()),
    "reversed": lambda o: list(reversed(o)),
    "equals itself": lambda o: o == o,
    "is an OrderedDict": lambda o: isinstance(o, OrderedDict),
    "leaves": lambda o: pytree.tree_leaves(o),
    "mapped": lambda o: pytree.tree_map(lambda t: t + 1, o).to_tuple(),
    "mapped names": lambda o: list(pytree.tree_map(lambda t: t + 1, o)),
    "pickled": lambda o: pickle.loads(pickle.dumps(o)).to_tuple(),
    "pickled names": lambda o: list(pickle.loads(pickle.dumps(o))),
    "copied": lambda o: copy.copy(o).to_tuple(),
    "copied deeply": lambda o: copy.deepcopy(o).to_tuple(),
    "copied by its method": lambda o: list(o.copy()),
    "built from a dictionary": lambda o: type(o)(dict(o)).to_tuple(),
    "built from pairs": lambda o: type(o)(list(o.items())).to_tuple(),
    "built from an iterator": lambda o: type(o)((k, v) for k, v in o.items()).to_tuple(),
    "delete": lambda o: o.__delitem__(next(iter(o))),
    "pop": lambda o: o.pop(next(iter(o))),
    "update": lambda o: o.update({"loss": 1}),
    "setdefault": lambda o: o.setdefault("loss", 1),
    "hash": hash,
}


@pytest.mark.parametrize("present", PRESENT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaves_like_transformers(behaviour, kind, present):
    results = []
    for module in (ours, theirs):
        try:
            results.append(BEHAVIOURS[behaviour](make(module, kind, present)))
        except Exception as error:
            results.append(error)
    actual, expected = results
    if isinstance(expected, Exception):
        # Every refusal is one here too; where transformers raises a bare Exception, ours is a TypeError.
        assert isinstance(actual, type(expected)), actual
    else:
        assert same(actual, expected), (actual, expected)


CHANGES: dict[str, Any] = {
    "attribute that is there": lambda o, name: setattr(o, name, torch.ones(1)),
    "attribute that is there to None": lambda o, name: setattr(o, name, None),
    "absent field": lambda o, name: setattr(o, "hidden_states", (torch.ones(1),)),
    "new attribute": lambda o, name: setattr(o, "extra", 3),
    "item that is there": lambda o, name: o.__setitem__(name, torch.ones(1)),
    "new item": lambda o, name: o.__setitem__("extra", 3),
    "popitem": lambda o, name: o.popitem(),
    "move to the end": lambda o, name: o.move_to_end(name),
}


@pytest.mark.parametrize("duplicate", [None, copy.copy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_like_transformers(change, kind, duplicate):
    results = []
    for module in (ours, theirs):
        output = make(module, kind, (0, 1))
        try:
            CHANGES[change](output, KINDS[kind][0])
            output = output if duplicate is None else duplicate(output)
            fields = [*KINDS[kind], "extra"]
            results.append(
                (list(output), output.to_tuple(), [getattr(output, f, "-") for f in fields])
            )
        except Exception as error:
            results.append(type(error))
    assert same(*results), results


def test_absent_fields_of_one_built_from_pairs_are_none():
    # transformers leaves the iterator itself in the first field.
    output = ours.ImageClassifierOutputWithNoAttention((k, v) for k, v in [("logits", VALUES[1])])
    assert output.loss is None
    assert list(output) == ["logits"]
    assert output.logits is VALUES[1]


@pytest.mark.parametrize("kind", KINDS)
def test_shows_its_entries(kind):
    text = repr(make(ours, kind, (0, 1)))
    assert text.startswith(f"{kind}({KINDS[kind][0]}=")
    assert text == repr(make(theirs, kind, (0, 1)))


# ---- pytrees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", PRESENT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_a_pytree_with_named_children(kind, present):
    output = make(ours, kind, present)
    leaves, form = pytree.tree_flatten(output)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, form)
    assert type(again) is type(output)
    assert same(again.to_tuple(), output.to_tuple())
    paths = [path for path, _ in pytree.tree_flatten_with_path(output)[0]]
    expected = [f"['{KINDS[kind][i]}']" for i in present]
    assert list(dict.fromkeys(pytree.keystr(path[:1]) for path in paths)) == expected
    for path, leaf in pytree.tree_flatten_with_path(output)[0]:
        value = output
        for key in path:
            value = key.get(value)
        assert value is leaf
    restored = pytree.treespec_loads(pytree.treespec_dumps(form))
    assert restored == form


def test_trees_of_different_entries_differ():
    kind = "ImageClassifierOutputWithNoAttention"
    forms = {str(pytree.tree_structure(make(ours, kind, present))) for present in PRESENT}
    assert len(forms) == len(PRESENT)


@MODULES
@pytest.mark.parametrize("kind", KINDS)
def test_data_parallel_gathers(kind, module, monkeypatch):
    # The copies between GPUs are replaced, the function that rebuilds the outputs is torch's own.
    monkeypatch.setattr(
        scatter_gather.Gather, "apply", lambda device, dim, *tensors: torch.cat(tensors, dim)
    )
    whole = scatter_gather.gather([make(module, kind), make(module, kind)], "cpu")
    assert type(whole) is getattr(module, kind)
    assert list(whole) == KINDS[kind]
    doubled = pytree.tree_map(lambda tensor: torch.cat([tensor, tensor]), VALUES)
    assert same(list(whole.to_tuple()), doubled)


# ---- what the models return ---------------------------------------------------------------------


@pytest.mark.parametrize("hidden_states", [None, True, False])
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("return_dict", [None, True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_arguments_and_configuration_choose_the_form(name, return_dict, configured, hidden_states):
    # The configuration says the opposite in one half of the cases.
    pairs = pair(name, output_hidden_states=configured, return_dict=configured)
    model, their_twin = (model.double() for model in pairs)
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    arguments = {"output_hidden_states": hidden_states, "return_dict": return_dict}
    with torch.no_grad():
        actual, expected = model(images, **arguments), their_twin(images, **arguments)
    assert isinstance(actual, tuple) == isinstance(expected, tuple)
    if isinstance(expected, tuple):
        assert isinstance(actual, tuple)
        assert len(actual) == len(expected)
    else:
        assert type(actual).__name__ == type(expected).__name__
        assert list(actual) == list(expected)
    assert_close(actual, expected)
    asked = configured if hidden_states is None else hidden_states
    if not isinstance(actual, tuple):
        assert (actual.hidden_states is not None) == asked
        assert not asked or isinstance(actual.hidden_states, tuple)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_loss_comes_first(return_dict):
    model, their_twin = (model.double() for model in pair("BitForImageClassification"))
    images, labels = torch.randn(2, 3, 33, 47, dtype=torch.float64), torch.tensor([1, 4])
    arguments = {"labels": labels, "output_hidden_states": True, "return_dict": return_dict}
    actual, expected = model(images, **arguments), their_twin(images, **arguments)
    assert_close(actual, expected)
    assert actual[0].shape == ()
    assert actual[1].shape == (2, 5)


def test_torchscript_configurations_return_tuples():
    model, their_twin = (model.double() for model in pair("BitModel", torchscript=True))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert isinstance(model(images), tuple)
    assert_close(model(images), their_twin(images))


@pytest.mark.parametrize("name", CLASSES)
def test_names_indices_and_attributes_name_the_same_tensors(name):
    output = our_model(name)(torch.randn(1, 3, 32, 32), output_hidden_states=True)
    for index, key in enumerate(output):
        assert output[key] is output[index] is getattr(output, key) is output.to_tuple()[index]
    assert output[:1] == output.to_tuple()[:1]
