"""What --help says of a method is what the method takes."""

import pytest
import toys

from refquant import cli
from refquant.commands.info import LOOKS_AT
from refquant.commands.method_options import described, help_text, parse_options
from refquant.errors import RangeError, RefquantError, UnknownNameError
from refquant.quant.calibrate import Calibration
from refquant.quant.methods import METHODS, options_of

OPTIONS = [(name, key) for name in METHODS for key in options_of(name)]
CHOICES = [(name, key) for name, key in OPTIONS if described(name)[key].choices]


@pytest.fixture(scope="module")
def calibration():
    """Of a transformer, which all methods take."""
    return Calibration(toys.tiny_dit(), toys.CALIBRATION)


@pytest.mark.parametrize("name, key", OPTIONS)
def test_every_option_is_explained(name, key):
    option = described(name)[key]
    assert option.text and option.default == options_of(name)[key]
    assert isinstance(option.default, str) == bool(option.choices) or key == "on"
    assert not option.choices or option.default in option.choices
    assert f"\n    {key}" in "\n" + help_text().partition(f"\n  {name}\n")[2]


@pytest.mark.parametrize("name, key", CHOICES)
def test_choices_are_those_of_the_method(name, key, calibration):
    """The method itself refuses others, and lists the same."""
    choices = described(name)[key].choices
    with pytest.raises(RefquantError) as refusal:
        METHODS[name](toys.tiny_session(calibration), **{key: "nonsense"})
    assert all(choice in str(refusal.value) for choice in choices)
    known = str(refusal.value).rpartition("Known: ")[2].removesuffix(".")
    assert sorted(known.split(", ")) == sorted(choices)


@pytest.mark.parametrize("name, key", CHOICES)
def test_what_is_no_choice_is_refused_by_the_name_of_the_option(name, key):
    with pytest.raises(UnknownNameError, match=f"--option '{key}=nonsense': {key} of {name} is one of "):
        parse_options(name, [f"{key}=nonsense"])


def test_options_have_the_type_of_their_defaults():
    assert parse_options("tfmq", ["fsc=temporal", "time_steps=3"]) == {"fsc": "temporal", "time_steps": 3}
    assert parse_options("qdiffusion", ["split=false", "step_iterations=2"]) == {"split": False, "step_iterations": 2}
    assert parse_options("squant", ["sigma=3"]) == {"sigma": 3.0}
    for name, text, words in (("tfmq", "time_steps=few", "a whole number"), ("squant", "sigma=x", "a number"),
                              ("qdit", "search=maybe", "true or false")):  # fmt: skip
        with pytest.raises(RangeError, match=words):
            parse_options(name, [text])
    for text in ("fsc", "colour=red"):
        with pytest.raises(UnknownNameError, match="no such option. It has: fsc=all, ranges=exact"):
            parse_options("tfmq", [text])


def test_the_command_names_the_option(capsys):
    assert cli.main(["quantize", "--method", "tfmq", "--option", "fsc=nonsense"]) == 2
    assert "--option 'fsc=nonsense': fsc of tfmq is one of all, temporal, none" in capsys.readouterr().err


@pytest.mark.parametrize("name", LOOKS_AT)
def test_what_a_method_does_not_look_at_changes_nothing(name, calibration):
    options = {"groups": 2} if name == "tqdit" else {"group": 4} if name in ("qdit", "ditas") else {}
    other = {"sampling": "uniform", "effort": {"iterations": 5, "batch": 2}}
    if "states" not in LOOKS_AT[name]:
        other |= {"states": 2}
    first, second = (METHODS[name](toys.tiny_session(calibration, **own), **options) for own in ({}, other))
    want = second.tensors()
    for key, array in first.tensors().items():
        assert array.tobytes() == want[key].tobytes(), key
