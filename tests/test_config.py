import pytest

from compact_fast import CompactConfig
from compact_fast.config import MODES


def test_defaults_are_the_methods():
    c = CompactConfig()
    assert (c.beta_mi, c.beta_consensus, c.beta_difficulty, c.tau) == (1.0, 1.0, 0.5, 1.0)
    assert (c.consistency_weight, c.pair_floor, c.z_floor) == (0.1, 1e-4, 0.0)
    assert (c.consensus, c.filter_below, c.consistency, c.mi) == ("graph", 0.8, "answer", "logit")


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_sets_fields_and_any_field_overrides_it(mode):
    for name, value in MODES[mode].items():
        assert getattr(CompactConfig(mode=mode), name) == value
    assert CompactConfig(mode=mode, consensus="none").consensus == "none"
    assert CompactConfig(mode=mode, filter_below=0.3).filter_below == 0.3


def test_baselines_are_not_filtered_unless_asked():
    assert CompactConfig(weighting="uniform").filter_below == 0
    assert CompactConfig(weighting="consensus").filter_below == 0.8
    assert CompactConfig(weighting="uniform", filter_below=0.8).filter_below == 0.8


def test_single_score_baselines_keep_only_their_beta():
    assert CompactConfig(weighting="mi", beta_mi=2.0).betas == (2.0, 0.0, 0.0)
    assert CompactConfig(weighting="difficulty").betas == (0.0, 0.0, 0.5)
    assert CompactConfig(weighting="best").betas == (1.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "papers"),
        ("weighting", "unifrom"),
        ("weighting", [0.0, 0.0]),
        ("weighting", [1.0, -1.0]),
        ("weighting", [float("nan")]),
        ("mi", "logits"),
        ("consensus", "votes"),
        ("consistency", "some"),
        ("tau", 0.0),
        ("tau", float("inf")),
        ("beta_mi", float("nan")),
        ("z_floor", -1.0),
        ("filter_below", 1.5),
        ("consistency_weight", -0.1),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field}=") as caught:
        CompactConfig(**{field: value})
    assert repr(value) in str(caught.value)
