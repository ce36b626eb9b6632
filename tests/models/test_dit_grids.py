"""The transformer on other sides than its own, as the batches of a bucketed dataset have them."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers.positions import sincos_positions


@pytest.fixture(params=[{}, {"norm": "rms", "qk_norm": True, "rope": True}], ids=["plain", "rotary"])
def model(request: pytest.FixtureRequest) -> DiT:
    model = DiT(8, 2, hidden_size=48, depth=2, num_heads=4, num_classes=10, **request.param)
    # Nothing hides behind an initial zero, and the stored positions are not the sines.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, height, width), torch.tensor([0, 999]), torch.tensor([3, 10])


def test_positions_of_another_grid_span_the_range_of_the_square_one() -> None:
    square, finer = sincos_positions(16, 4)[0], sincos_positions(16, 4, shape=(8, 2))[0]
    assert torch.equal(sincos_positions(16, 4, shape=(4, 4))[0], square)
    assert finer.shape == (16, 16)
    for token in range(16):
        row, column = divmod(token, 2)
        # Eight rows in the range of four lie half as far apart, two columns twice as far.
        for axis, place in enumerate((column * 2, row / 2)):
            for i in range(4):
                angle = place * 10_000 ** (-i / 4)
                # Rounding of a value in [-1, 1] to float32.
                assert_close(finer[token, 8 * axis + i].item(), math.sin(angle), atol=6e-8, rtol=0)
                assert_close(finer[token, 8 * axis + 4 + i].item(), math.cos(angle), atol=6e-8, rtol=0)
        # Where the places coincide, so does the code: every second row with a place of the square grid.
        if row % 2 == 0:
            assert torch.equal(finer[token], square[row // 2 * 4 + column * 2])


def test_other_sides_leave_the_state_and_the_own_size_as_they_are(model: DiT) -> None:
    own, names = inputs(8, 8), list(model.state_dict())
    before = model(*own)
    with torch.inference_mode():
        model(*inputs(4, 10))
    assert list(model.state_dict()) == names
    # The own size goes on with the stored positions.
    assert torch.equal(model(*own), before)


def test_a_table_made_in_inference_serves_training_and_another_type(model: DiT) -> None:
    x, timestep, label = inputs(4, 10)
    with torch.inference_mode():
        wanted = model(x, timestep, label)
    output = model(x, timestep, label)
    assert torch.equal(output, wanted)
    output.sum().backward()
    gradient = model.x_embedder.proj.weight.grad
    assert gradient is not None
    assert gradient.any()
    half = model.bfloat16()(x.bfloat16(), timestep, label)
    assert half.dtype == torch.bfloat16
    # bf16 rounds by 2^-9; ten times that for the depth of the network.
    assert (half - wanted).norm() < 10 * 2**-9 * wanted.norm()


def test_a_new_grid_compiles_nothing_once_the_sides_are_symbols(model: DiT) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend=counter)
    with torch.no_grad():
        for sides in ((8, 8), (12, 6), (6, 12), (4, 16), (16, 4), (10, 6), (6, 10)):
            x = inputs(*sides)
            # The graphs run as they are; with traced sizes a sum may be split otherwise.
            assert_close(compiled(*x), model(*x), atol=1e-5, rtol=0)
        seen = counter.frame_count
        for sides in ((4, 10), (10, 4), (14, 6)):
            compiled(*inputs(*sides))
    assert counter.frame_count == seen
    torch._dynamo.reset()
