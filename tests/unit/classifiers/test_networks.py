import io

import numpy as np
import pytest
import torch

from ctrl_ray.classifiers.networks import BlockSpectrum, HashedText, SmallCNN, cosine_basis
from ctrl_ray.offline.shapes import draw_dataset


def _perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """No layer at zero, so that every gradient counts."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def test_basis_is_orthonormal_and_starts_with_the_mean() -> None:
    flat = cosine_basis().reshape(64, 64).double()
    torch.testing.assert_close(flat @ flat.T, torch.eye(64, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(flat[0], torch.full((64,), 1 / 8, dtype=torch.float64), atol=1e-7, rtol=0)


def test_bits_of_a_known_block() -> None:
    """A flat luma block of +0.25 has the DC coefficient 8 * 0.25 and no other: ½ log2(1 + (2 / step)²) bits."""
    spectrum = BlockSpectrum(4)
    found = spectrum.bits(torch.full((1, 1, 8, 8), 0.25), spectrum.log_step[:1])[0, :, 0, 0].detach()
    assert float(found[0]) == pytest.approx(0.5 * np.log2(1 + (2 / (4 / 255)) ** 2), rel=1e-5)
    assert float(found[1:].abs().max()) < 1e-6


def test_bits_follow_the_jpeg_size() -> None:
    """Before any training, the total of the bits ranks drawn images nearly as the JPEG encoder does."""
    images = [image for image, _ in draw_dataset(60, seed=9)]
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        sizes.append(buffer.tell())
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    spectrum = BlockSpectrum(4)
    ycbcr = torch.nn.functional.conv2d(pixels, spectrum.ycbcr)
    with torch.no_grad():
        bits = spectrum.bits(ycbcr[:, :1] - 0.5, spectrum.log_step[:1]).sum((1, 2, 3))
        bits += spectrum.bits(torch.nn.functional.avg_pool2d(ycbcr[:, 1:], 2), spectrum.log_step[1:]).sum((1, 2, 3))
    ranks = [np.argsort(np.argsort(values)) for values in (bits.numpy(), sizes)]
    assert np.corrcoef(ranks)[0, 1] > 0.9


@pytest.mark.parametrize("prompt_conditional", [False, True])
def test_gradient_at_the_image_agrees_with_finite_differences(prompt_conditional: bool) -> None:
    """float64, central differences along random directions; relative tolerance 1e-6."""
    torch.manual_seed(0)
    network = _perturbed(SmallCNN(3, width=8, depth=1, block_width=8, prompt_conditional=prompt_conditional)).double()
    prompts = ["a red circle", "a blue cross"] if prompt_conditional else None
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64, requires_grad=True)

    def value(at: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(network(at, prompts), dim=1)[[0, 1], [2, 0]].sum()

    (gradient,) = torch.autograd.grad(value(images), images)
    for _ in range(5):
        direction, step = torch.randn_like(images), 1e-6
        difference = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-6)


def test_answer_does_not_depend_on_the_rest_of_the_batch() -> None:
    network = _perturbed(SmallCNN(4)).eval()
    images = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images)[2:3], network(images[2:3]), atol=1e-5, rtol=1e-5)


def test_sides_that_are_no_multiple_of_a_block_are_taken() -> None:
    """Repeating the edge by hand up to 16 x 32 gives the same spectrum."""
    spectrum = BlockSpectrum(8)
    images = torch.rand(1, 3, 11, 30)
    by_hand = torch.cat([images, images[:, :, -1:].expand(-1, -1, 5, -1)], dim=2)
    by_hand = torch.cat([by_hand, by_hand[..., -1:].expand(-1, -1, -1, 2)], dim=3)
    torch.testing.assert_close(spectrum(images), spectrum(by_hand))


def test_hashed_text_is_stable_and_tells_prompts_apart() -> None:
    text = HashedText(8)
    assert text.buckets("A red  circle") == text.buckets("a red circle")
    assert set(text.buckets("red circle")) != set(text.buckets("circle red"))
    assert len(text.buckets("ab")) == 3  # the word, "<ab" and "ab>"
    shared = set(text.buckets("circle")) & set(text.buckets("circles"))
    assert len(shared) >= 5  # a word never seen shares its letter triples
    features = text(["a red circle", "", "a blue cross"])
    torch.testing.assert_close(features[0], text.table.weight[text.buckets("a red circle")].mean(0))
    torch.testing.assert_close(features[1], text.table.weight[text.buckets("")].mean(0))


@pytest.mark.full
def test_a_prompt_conditional_network_learns_a_label_that_needs_image_and_prompt() -> None:
    """y = (image is bright) xor (prompt says night): from either alone accuracy is 1/2."""
    torch.manual_seed(1)
    network = SmallCNN(2, width=8, depth=1, block_width=8, prompt_conditional=True)
    generator = torch.Generator().manual_seed(2)

    def draw(num: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        bright, night = torch.randint(2, (2, num), generator=generator)
        images = (0.25 + 0.5 * bright[:, None, None, None]) + 0.1 * torch.randn(num, 3, 16, 16, generator=generator)
        prompts = [f"a {'night' if dark else 'day'} view {i % 7}" for i, dark in enumerate(night.tolist())]
        return images.clamp(0, 1), prompts, bright ^ night

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(40):
        images, prompts, labels = draw(48)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images, prompts), labels).backward()
        optimizer.step()
    images, prompts, labels = draw(256)
    with torch.no_grad():
        assert float((network(images, prompts).argmax(1) == labels).float().mean()) > 0.97
