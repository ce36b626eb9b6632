import pytest
import torch

from speedit_plugins.registry import ENCODERS, build
from speedit_plugins.trainer.inputs import BatchEncoder, decoded
from speedit_plugins.trainer.models.pretrained.autoencoder import Pixels

SHAPES = {"Voxels": ("voxels", (2, 1, 4, 4, 4)), "Points": ("points", (2, 3, 9))}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_pass_as_they_are_and_wrong_ranks_are_named(name: str) -> None:
    key, size = SHAPES[name]
    encoder, shapes = build(ENCODERS, {"type": name}), torch.randn(size)
    assert (encoder.layout, encoder.channels, encoder.downsample) == (key, size[1], 1)
    for found in (encoder.encode(shapes), encoder.decode(shapes), encoder.posterior(shapes)[0]):
        assert torch.equal(found, shapes)
    assert encoder.posterior(shapes)[1].abs().max() == 0
    wanted = r"\(B, 1, D, H, W\)" if name == "Voxels" else r"\(B, 3, N\)"
    for wrong in (shapes[0], shapes[:, :0]):
        with pytest.raises(ValueError, match=rf"{name} got shapes of shape \(.*\), wanted {wanted}"):
            encoder.encode(wrong)
    with pytest.raises(ValueError, match=f"{name} needs channels >= ., .*got 0"):
        build(ENCODERS, {"type": name, "channels": 0})
    assert encoder.fingerprint() != build(ENCODERS, {"type": name, "channels": 7}).fingerprint()


def test_the_layout_decides_what_five_axes_mean() -> None:
    values = torch.randn(2, 1, 3, 4, 4)
    voxels, pixels = build(ENCODERS, {"type": "Voxels"}), Pixels(1)
    assert torch.equal(decoded(voxels, values), values)
    # Frame by frame: the encoder of images takes four axes.
    assert torch.equal(decoded(pixels, values), values)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    inputs = BatchEncoder(voxels, torch.device("cpu"), is_labelled=False).encode(
        {"voxels": values}, generators
    )
    assert torch.equal(inputs.latents, values)
    wanted = [torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert torch.equal(inputs.noise, torch.stack(wanted))
