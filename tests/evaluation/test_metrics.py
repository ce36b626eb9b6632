import pytest

from speedit_plugins.trainer.evaluation.metrics import MetricValue, line_of


@pytest.mark.parametrize(
    ("num_samples", "num_reference", "is_few"),
    [(640, 640, False), (639, 640, True), (640, 639, True), (640, None, False), (639, None, True)],
)
def test_the_smaller_set_decides_whether_a_bias_is_announced(
    num_samples: int, num_reference: int | None, is_few: bool
) -> None:
    # Ten images per dimension are a common minimum.
    metric = MetricValue("fid", 1.0, "pixels@8", num_samples, num_reference, True, {"feature_dim": 64})
    assert ("few for 64 dimensions: biased upwards" in line_of(metric)) == is_few
