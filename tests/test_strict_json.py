import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speccert.certify import strict_json as strict

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


@given(JSON, st.sampled_from([1, 20, 120]))
def test_what_is_laid_out_is_read_back(value, width):
    text = strict.layout(value, width=width)
    assert strict.parse(text) == value
    assert repr(strict.parse(text)) == repr(json.loads(json.dumps(value)))


def test_single_values_stay_on_one_line():
    text = strict.layout({"numbers": list(range(100)), "rows": [{"a": "x" * 50, "b": "y" * 80}, {"a": 1}]})
    assert text.splitlines()[1] == ' "numbers": ' + json.dumps(list(range(100))) + ","
    assert text.count("\n") == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        ("{'a': 1}", "Expecting property name"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "key 'c' appears twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e400]", "1e400 is too large a number"),
        ("[-1e400]", "-1e400 is too large a number"),
        ("1" * 5000, "4300"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_strict_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        strict.parse(text)


@pytest.mark.parametrize(
    ("reader", "value", "found"),
    [
        (strict.number, 1, 1.0),
        (strict.number, -(2**53), -(2.0**53)),
        (strict.number, -0.5, -0.5),
        (strict.bound, "inf", math.inf),
        (strict.positive, 5e-324, 5e-324),
        (strict.positive, 3, 3.0),
        (strict.lower_bound, "-inf", -math.inf),
        (strict.lower_bound, -2, -2.0),
        (strict.bound, 0, 0.0),
        (strict.bound, 5e-324, 5e-324),
        (strict.count(), 0, 0),
        (strict.count(1), 2**63 - 1, 2**63 - 1),
        (strict.text, "", ""),
        (strict.digest, "sha256:" + "0" * 64, "sha256:" + "0" * 64),
        (strict.nullable(strict.text), None, None),
        (strict.nullable(strict.text), "a", "a"),
        (strict.choice("a", 1), 1, 1),
        (strict.items(strict.number), [], ()),
        (strict.items(strict.items(strict.bound)), [[1, "inf"]], ((1.0, math.inf),)),
        (strict.fields({"a": strict.text, "b": strict.number}), {"b": 1.5, "a": "x"}, {"a": "x", "b": 1.5}),
    ],
)
def test_what_is_right_is_read(reader, value, found):
    result = reader(value, "here")
    assert result == found
    assert type(result) is type(found)


@pytest.mark.parametrize(
    ("reader", "value", "message"),
    [
        (strict.number, 2**53 + 1, "here: expected a number, got 9007199254740993"),
        (strict.number, True, "here: expected a number, got true"),
        (strict.number, "1", 'here: expected a number, got "1"'),
        (strict.number, None, "here: expected a number, got null"),
        (strict.bound, -5e-324, 'here: expected a number >= 0 or "inf", got -5e-324'),
        (strict.bound, "-inf", 'here: expected a number, got "-inf"'),
        (strict.positive, 0.0, "here: expected a number > 0, got 0.0"),
        (strict.positive, -1, "here: expected a number > 0, got -1"),
        (strict.positive, "inf", 'here: expected a number, got "inf"'),
        (strict.positive, True, "here: expected a number, got true"),
        (strict.lower_bound, "inf", 'here: expected a number, got "inf"'),
        (strict.bound, [], r"here: expected a number, got \[\]"),
        (strict.count(), -1, "here: expected an integer >= 0, got -1"),
        (strict.count(1), 0, "here: expected an integer >= 1, got 0"),
        (strict.count(), 2**63, "here: expected an integer >= 0"),
        (strict.count(), 1.0, "here: expected an integer >= 0, got 1.0"),
        (strict.count(), False, "here: expected an integer >= 0, got false"),
        (strict.text, 1, "here: expected a text, got 1"),
        (strict.text, None, "here: expected a text, got null"),
        (strict.digest, "sha256:" + "0" * 63, "here: expected"),
        (strict.digest, "sha256:" + "0" * 64 + "\n", "here: expected"),
        (strict.choice(1), True, "here: expected 1, got true"),
        (strict.choice("a", "b"), "c", 'here: expected "a" or "b", got "c"'),
        (strict.items(strict.text), "ab", 'here: expected a list, got "ab"'),
        (strict.items(strict.text), ["a", 1], r"here\[1\]: expected a text, got 1"),
        (strict.items(strict.text, 2), ["a"], "here: expected a list of at least 2 entries"),
        (strict.fields({"a": strict.text}), [], r"here: expected an object, got \[\]"),
        (strict.fields({"a": strict.text}), {}, "here: missing key 'a'; expected a"),
        (strict.fields({"a": strict.text}), {"a": "", "z": 1}, "here: unknown key 'z'; expected a"),
        (strict.fields({"a": strict.text}), {"a": 1}, "here.a: expected a text, got 1"),
        (strict.text, ["x" * 1000], r"here: expected a text, got \[\"x{38}\.\.\.$"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(reader, value, message):
    with pytest.raises(ValueError, match=message) as raised:
        reader(value, "here")
    assert "\n" not in str(raised.value)


def test_an_integer_too_long_to_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"here: expected an integer >= 0, got a number too large to be written"):
        strict.count()(10**5000, "here")


@pytest.mark.parametrize("value", ["a\nvalid: all", "\x1b[2K", "\ud800", "x" * 10_001])
def test_texts_that_could_steer_a_terminal_are_refused(value):
    with pytest.raises(ValueError, match="printable characters"):
        strict.text(value, "samples.file")
