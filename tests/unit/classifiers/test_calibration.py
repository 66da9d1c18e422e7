import math

import pytest
import torch

from ctrl_ray.classifiers.calibration import (
    calibration_metrics,
    fit_temperature,
    reliability_bins,
    reliability_diagram,
)
from ctrl_ray.errors import DataError, NonFiniteError


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


def test_diagram_is_a_picture(tmp_path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 4, generator=generator)
    labels = torch.multinomial(torch.softmax(logits / 3, 1), 1, generator=generator)[:, 0]
    path = tmp_path / "reliability.png"
    reliability_diagram(path, torch.log_softmax(logits, 1), torch.log_softmax(logits / 3, 1), labels, title="jpeg_size")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
