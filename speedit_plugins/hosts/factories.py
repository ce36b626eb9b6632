"""Where each known host makes what draws its timesteps: what the launcher replaces."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Factory:
    """Where a host makes what draws its timesteps.

    Args:
        hosts: for messages.
        module: dotted name, as the host's scripts import it.
        functions: of that module; those that are missing are skipped.
        seam: "B" returns a diffusion object or a flow; "C" takes (name, diffusion) and returns a schedule
            sampler.
    """

    hosts: str
    module: str
    functions: tuple[str, ...]
    seam: str = "B"


FACTORIES = (
    Factory("DiT, fast-DiT, Latte", "diffusion", ("create_diffusion",)),
    Factory("PixArt-alpha", "diffusion.iddpm", ("IDDPM",)),
    Factory("OpenDiT 1.0", "opendit.diffusion", ("create_diffusion",)),
    Factory("OpenDiT 0.0.1", "opendit.models.diffusion", ("create_diffusion",)),
    Factory(
        "Open-Sora-Plan 1.0",
        "opensora.models.diffusion.diffusion",
        ("create_diffusion", "create_diffusion_T"),
    ),
    Factory("SiT", "transport", ("create_transport",)),
    Factory("guided-diffusion", "guided_diffusion.resample", ("create_named_schedule_sampler",), "C"),
    Factory("MDT", "masked_diffusion.resample", ("create_named_schedule_sampler",), "C"),
)
