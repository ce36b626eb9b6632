"""The Python block of an integration's README, run on a host's object: does it draw t and weigh as it says?

The block runs as it is printed. The factory that it calls gives the host's own object.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from conformance import points
from conformance.flow import NUM_DRAWS, FlowSeam
from conformance.schedule_sampler import SamplerSeam
from conformance.seam import Seam, trained
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule

INTEGRATIONS = Path(__file__).parents[2] / "integrations"
# A host of conformance.hosts -> its page, where the page's block makes an object with a policy.
PAGES = {
    "DiT": "dit",
    "fast-DiT": "fast_dit",
    "Latte": "latte",
    "OpenDiT 0.0.1": "opendit",
    "OpenDiT 1.0.0": "opendit",
    "PixArt-alpha": "pixart_alpha",
    "PixArt-sigma": "pixart_sigma",
    "HunyuanDiT": "hunyuan_dit",
    "Open-Sora-Plan 1.0.0": "open_sora_plan",
    "DiT-3D": "dit_3d",
    "guided-diffusion": "guided_diffusion",
    "MDT": "mdt",
    "SiT": "sit",
    "LightningDiT": "lightning_dit",
    "Lumina-Image 2.0": "lumina_image",
    "RAE": "rae",
    "REPA": "repa",
    "REG": "reg",
    "REPA-E": "repa_e",
    "VideoSys 2.0": "video_sys",
    "imagen-pytorch": "imagen_pytorch",
}
_FACTORIES = (
    *("create_diffusion", "create_transport", "IDDPM", "GaussianDiffusion", "RFLOW", "Imagen"),
    "SILoss",
)


def block_of(page: str) -> str:
    """The only Python block of a page."""
    text = (INTEGRATIONS / page / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return str(block)


@dataclass(frozen=True)
class Documented:
    """A seam whose object gets its policy from the block of a page. All else is the seam's."""

    seam: Seam
    page: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.seam, name)

    @property
    def policy_name(self) -> str:
        """The policy that the block names."""
        (name,) = re.findall(r'policy(?:_sampler\(diffusion, |=)"(\w+)"', block_of(self.page))
        return str(name)

    @property
    def policies(self) -> tuple[str, ...]:
        """The policy whose weights are checked."""
        return (self.policy_name,)

    def attached(self, policy: Any, generator: torch.Generator | None = None) -> Any:
        """The host's object after the block ran, with a generator for its draws."""
        assert policy == self.policy_name, f"the block has {self.policy_name}"
        host = self.seam.make()
        names: dict[str, Any] = {"diffusion": host, "self": SimpleNamespace(), "options": {}, "unets": []}
        names |= {"transport_params": {}, "time_dist_shift": 1.0}
        names |= {name: lambda *_, **__: host for name in _FACTORIES}
        names["SiT_models"] = {"model": lambda *_, **__: host}
        exec(block_of(self.page), names | {"args": _Options(), "config": _Options()}, names)
        if isinstance(self.seam, SamplerSeam):
            host.sampler = names["schedule_sampler"]
            host.sampler._stream = DrawStream(generator)
        for attachment in getattr(attachment_of(host), "parts", [attachment_of(host)]):
            attachment.stream = DrawStream(generator)
        return host


class _Options:
    """Options of a script: whichever is asked for."""

    def __getattr__(self, name: str) -> str:
        return name


def check(seam: Seam, page: str) -> list[int]:
    """Points 1 and 2 for the block of a page: the model sees the drawn t, and the loss is weighed.

    Raises:
        AssertionError: one of them does not hold.
    """
    documented: Any = Documented(seam, page)
    if isinstance(seam, FlowSeam):
        _sees_the_law(documented)
    else:
        step = trained(documented, documented.policy_name)
        assert len(step.model.seen) == seam.num_losses, "the model was not called"
        assert all(seam.sees(step.host, step.draw, t) for t in step.model.seen), "the model saw another t"
    points.loss_is_weighted(documented)
    return [1, 2]


def _sees_the_law(documented: Any) -> None:
    """The t that the model sees follow the policy, as the host draws uniformly."""
    policy = build_policy(documented.policy_name, NoiseSchedule.rectified_flow(1000), "flow")
    host = documented.attached(documented.policy_name)
    tables = attachment_of(host).policy
    model = documented.model(host)
    documented.call(host, model, documented.many(NUM_DRAWS))
    time = documented.time_of(model.seen[-1]).float()
    density = policy.density.view(10, -1).sum(1)
    shares = torch.bincount((time * 10).long().clamp(max=9), minlength=10) / NUM_DRAWS
    # 4 sigma of a binomial frequency.
    assert bool(((shares - density).abs() < 4 * (density * (1 - density) / NUM_DRAWS).sqrt()).all())
    # Half a bin apart.
    assert torch.allclose(tables.weight, policy.weight, atol=1e-3), "another policy's weights"
