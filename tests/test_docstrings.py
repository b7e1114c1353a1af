"""The docstrings of the public API: their length, and what each of them lists."""

import inspect
import re

import pytest

import adamax_jax

LONGEST = 75
HEADINGS = ("Args", "Returns", "Raises", "Warns", "Examples", "References")
CLASSES = [x for x in map(vars(adamax_jax).get, adamax_jax.__all__) if type(x) is type]
METHODS = ["Diagnosis.worst", "Diagnosis.plot", "Diagnosis.to_string"]
FUNCTIONS = [name for name in adamax_jax.__all__ if name[0].islower()]


def get(name):
    found = adamax_jax
    for part in name.split("."):
        found = getattr(found, part)
    return found


def sections(text):
    """The lines under each heading of a docstring in Google's style."""
    parts = re.split(r"^(\w+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def listed(section):
    return re.findall(r"^  (\w+):", section, re.MULTILINE)


@pytest.mark.parametrize("name", [*adamax_jax.__all__, *METHODS])
def test_docstrings_are_short(name):
    lines = inspect.getdoc(get(name)).splitlines()
    assert len(lines) <= LONGEST
    assert lines[0].endswith(".")
    assert lines[1:2] in ([], [""])


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_docstrings_list_all_arguments(name):
    parts = sections(inspect.getdoc(get(name)))
    parameters = [p for p in inspect.signature(get(name)).parameters if p != "self"]
    assert listed(parts.get("Args", "")) == parameters
    assert [x for x in HEADINGS if x in parts] == list(parts)
    assert "Returns" in parts


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_say_what_is_raised_and_give_an_example(name):
    parts = sections(inspect.getdoc(get(name)))
    assert {"ValueError", "TypeError"} <= {*listed(parts["Raises"])}
    assert ">>>" in parts["Examples"]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_docstrings_list_all_fields(kind):
    fields = getattr(kind, "_fields", None) or [*kind.__dataclass_fields__]
    assert listed(sections(inspect.getdoc(kind))["Attributes"]) == [*fields]
