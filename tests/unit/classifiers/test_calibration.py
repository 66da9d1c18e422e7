import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ctrl_ray.classifiers.calibration import (
    calibration_metrics,
    fit_temperature,
    measure_temperature,
    reliability_bins,
    reliability_diagram,
)
from ctrl_ray.errors import DataError, NonFiniteError
from tests.pictures import heights, line, texts


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_known_temperature_is_recovered(temperature: float) -> None:
    """Labels drawn from softmax(z): the logits T z need the temperature T. The estimate's own error is about 2 %."""
    generator = torch.Generator().manual_seed(3)
    true_logits = 2 * torch.randn(10_000, 4, generator=generator)
    labels = torch.multinomial(torch.softmax(true_logits, 1), 1, generator=generator)[:, 0]
    assert fit_temperature(temperature * true_logits, labels) == pytest.approx(temperature, rel=0.06)


def test_temperature_is_where_the_nll_is_lowest() -> None:
    """Against a grid search that knows nothing of Newton."""
    generator = torch.Generator().manual_seed(4)
    logits, labels = 5 * torch.randn(500, 3, generator=generator), torch.randint(3, (500,), generator=generator)
    logits[torch.arange(500), labels] += 4
    grid = torch.logspace(-1, 1, 1001, dtype=torch.float64)
    nll = torch.stack([-torch.log_softmax(logits.double() / t, 1)[torch.arange(500), labels].mean() for t in grid])
    assert fit_temperature(logits, labels) == pytest.approx(float(grid[nll.argmin()]), rel=5e-3)


def test_temperature_without_an_optimum_stays_bounded() -> None:
    """Where every label is the top one, the NLL falls for ever as T goes to 0; where it never is, as T grows."""
    logits = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert math.exp(-5) <= fit_temperature(logits, torch.tensor([0, 1])) < 0.1
    assert 50 < fit_temperature(logits, torch.tensor([1, 0])) <= math.exp(5)


def _rows(num_right: int, num_wrong: int, margin: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes whose logits differ by `margin` in every row."""
    logits = torch.tensor([[margin, 0.0]]).repeat(num_right + num_wrong, 1)
    return logits, torch.tensor([0] * num_right + [1] * num_wrong)


def test_the_interval_of_a_temperature_in_closed_form() -> None:
    """With one margin, exp(margin / T) is the odds of being right: 90 : 10 at best, and the likelihood of other odds is the
    binomial's."""
    found = measure_temperature(*_rows(90, 10, margin=3.0))
    assert found.best == pytest.approx(3.0 / math.log(9), rel=1e-6)
    assert (found.num_rows, found.num_errors) == (100, 10)
    best = 90 * math.log(0.9) + 10 * math.log(0.1)
    for end in (found.low, found.high):
        right = 1 / (1 + math.exp(-3.0 / end))
        assert best - (90 * math.log(right) + 10 * math.log(1 - right)) == pytest.approx(1.92, abs=1e-3)
    assert found.low < found.best < found.high
    assert found.is_determined and found.value == found.best


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        pytest.param(*_rows(60, 0), id="no errors"),
        pytest.param(*_rows(60, 0, margin=0.02), id="no errors, and logits so small that the interval is short"),
        pytest.param(*_rows(19, 1), id="one error of twenty"),
        pytest.param(*_rows(4, 2), id="few rows"),
        pytest.param(*_rows(50, 50), id="no better than chance"),
        pytest.param(*_rows(10, 90), id="worse than chance"),
        pytest.param(*_rows(900, 100, margin=1e-3), id="beyond the limit"),
    ],
)
def test_a_temperature_that_the_rows_do_not_determine_stays_at_1(logits: torch.Tensor, labels: torch.Tensor) -> None:
    found = measure_temperature(logits, labels)
    assert not found.is_determined and found.value == 1.0
    assert (
        math.exp(-5) <= found.low <= found.best * (1 + 1e-9)
        and found.best <= found.high * (1 + 1e-9) <= math.exp(5) * 1.01
    )


def test_small_logits_may_need_a_low_temperature() -> None:
    """It is the rows that decide, not the size: 0.05 is well determined by 1000 rows of which 100 are wrong."""
    found = measure_temperature(*_rows(900, 100, margin=0.05 * math.log(9)))
    assert found.is_determined and found.value == pytest.approx(0.05, rel=1e-6)


def test_temperature_refuses_what_it_cannot_use() -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        fit_temperature(torch.tensor([[0.0, float("nan")]]), torch.tensor([0]))
    with pytest.raises(DataError, match="no rows"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


def test_figures_by_hand() -> None:
    """Three rows, two classes; confidences 0.9 (right), 0.8 (wrong), 0.6 (right) are alone in their bins of 1/15."""
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    figures = calibration_metrics(probabilities.log(), torch.tensor([0, 0, 0]))
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.6)) / 3)
    assert figures["brier"] == pytest.approx((2 * 0.1**2 + 2 * 0.8**2 + 2 * 0.4**2) / 3)
    assert figures["ece"] == pytest.approx((abs(1 - 0.9) + abs(0 - 0.8) + abs(1 - 0.6)) / 3)


def test_rows_of_a_bin_are_averaged_before_they_are_compared() -> None:
    """Confidences 0.95 (right) and 0.97 (wrong) share the bin (14/15, 1]: ECE |0.5 - 0.96|."""
    probabilities = torch.tensor([[0.95, 0.05], [0.97, 0.03]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    bins = reliability_bins(probabilities.log(), labels)
    assert bins.counts.tolist() == [0] * 14 + [2]
    assert float(bins.confidence[-1]) == pytest.approx(0.96)
    assert float(bins.accuracy[-1]) == pytest.approx(0.5)
    assert calibration_metrics(probabilities.log(), labels)["ece"] == pytest.approx(0.46)


def test_a_certain_row_falls_into_the_last_bin() -> None:
    bins = reliability_bins(torch.tensor([[0.0, float("-inf")]]), torch.tensor([0]))
    assert bins.counts.tolist() == [0] * 14 + [1]


def test_the_diagram_shows_shares_and_rows_by_hand(tmp_path: Path, figures: dict[str, Figure]) -> None:
    """Two of three rows of confidence 0.62 are right and one of 0.9 is; after scaling all four have 0.52."""
    before = torch.tensor([[0.62, 0.38], [0.62, 0.38], [0.38, 0.62], [0.1, 0.9]], dtype=torch.float64).log()
    after = torch.tensor([[0.52, 0.48]] * 2 + [[0.48, 0.52]] * 2, dtype=torch.float64).log()
    path = tmp_path / "reliability.png"
    reliability_diagram(path, before, after, torch.tensor([0, 0, 0, 1]), title="jpeg_size", classes=("low", "high"))
    with Image.open(path) as image:
        assert image.format == "PNG"
    top, scaled, rows, scaled_rows = figures["reliability.png"].axes
    assert heights(top) == pytest.approx([2 / 3, 1.0])  # the bins 9 and 13 of 15, where there are rows
    assert [bar.get_x() + bar.get_width() / 2 for bar in top.patches] == pytest.approx([9.5 / 15, 13.5 / 15])
    np.testing.assert_allclose(line(top, "mean confidence"), [[0.62, 2 / 3], [0.9, 1.0]])
    assert heights(scaled) == pytest.approx([0.75])
    np.testing.assert_allclose(line(scaled, "mean confidence"), [[0.52, 0.75]])
    assert heights(rows) == [0] * 9 + [3] + [0] * 3 + [1, 0] and texts(rows) == ["3", "1"]
    assert heights(scaled_rows) == [0] * 7 + [4] + [0] * 7 and texts(scaled_rows) == ["4"]
    ece = (3 * (2 / 3 - 0.62) + (1 - 0.9)) / 4
    assert top.get_title("left").startswith(f"before scaling: ECE {ece:.4f}, ")
    assert scaled.get_title("left").startswith(f"after scaling: ECE {0.75 - 0.52:.4f}, ")
    assert figures["reliability.png"].get_suptitle() == "jpeg_size, 4 rows, low | high"
