"""Respacing: the timesteps that a shortened process keeps, as in guided-diffusion, DiT and SpeeDiT."""

from collections.abc import Sequence


def space_timesteps(num_timesteps: int, sections: str | Sequence[int]) -> list[int]:
    """Indices that a respaced process keeps, in rising order, in [0, num_timesteps).

    Source: the option timestep_respacing of openai/guided-diffusion.

    Args:
        num_timesteps: T before respacing.
        sections: '' keeps all. 'N,M,...' or a sequence divides [0, T) into equal parts and spreads N, M, ...
            indices over them, including both ends of each part. 'ddimN' uses the integer stride that gives N
            indices.

    Raises:
        ValueError: `sections` is none of these, or a part has fewer timesteps than requested.
    """
    if not sections:
        return list(range(num_timesteps))
    if isinstance(sections, str) and sections.startswith("ddim"):
        return _strided(num_timesteps, sections)
    counts = _counts(sections)
    size, longer = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for number, count in enumerate(counts):
        length = size + (number < longer)
        if count > length:
            raise ValueError(f"timestep_respacing needs at most {length} in part {number}, got {count}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            # Summed, not multiplied, so that ties round as in guided-diffusion.
            position += stride
        start += length
    return kept


def _strided(num_timesteps: int, text: str) -> list[int]:
    for stride in range(1, num_timesteps):
        kept = range(0, num_timesteps, stride)
        if text == f"ddim{len(kept)}":
            return list(kept)
    raise ValueError(f"timestep_respacing 'ddimN' needs an integer stride of {num_timesteps}, got {text!r}")


def _counts(sections: str | Sequence[int]) -> list[int]:
    parts = [part.strip() for part in sections.split(",")] if isinstance(sections, str) else list(sections)
    if not all(isinstance(part, int) or part.isdecimal() for part in parts):
        raise ValueError(f"timestep_respacing needs '', 'N', 'N,M,...' or 'ddimN', got {sections!r}")
    counts = [int(part) for part in parts]
    if min(counts) < 0 or sum(counts) == 0:
        raise ValueError(f"timestep_respacing needs counts >= 0 and one above 0, got {counts}")
    return counts
