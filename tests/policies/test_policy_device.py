"""Drawing on a device: the CPU does not wait for it, and nothing is copied."""

from typing import Any

import pytest
import torch
from policy_cases import build, every_policy, teach
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.registry import POLICIES

LINEAR = NoiseSchedule.linear()


class RefusesSynchronisation(TorchDispatchMode):
    """Fails on operators that make the CPU wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.lstrip("_")
        assert name not in [wait.lstrip("_") for wait in self.WAITS], f"{func} waits for the device"
        masks = args[1] if name == "index" else []
        assert not any(m is not None and m.dtype == torch.bool for m in masks), (
            "a mask index counts on the host"
        )
        copies_here = name == "to_copy" and (kwargs or {}).get("device") == torch.device("cpu")
        assert not copies_here, f"{func} copies to the CPU"
        return func(*args, **(kwargs or {}))


def test_the_synchronisation_check_sees_synchronisations() -> None:
    for waits in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: int(x)):
        with pytest.raises(AssertionError), RefusesSynchronisation():
            waits(torch.ones(1))


def test_draw_does_not_wait_for_the_device() -> None:
    for policy in every_policy(LINEAR):
        policy.draw(8)
        with RefusesSynchronisation():
            policy.draw(8, generator=torch.Generator())


def test_draw_needs_no_values_on_the_host() -> None:
    # Tensors on the meta device have no values, so code that reads one raises.
    for policy in every_policy(LINEAR):
        draw = policy.draw(8, device="meta")
        assert (draw.index.device.type, draw.index.shape) == ("meta", (8,))


@pytest.mark.gpu
def test_draw_on_cuda_does_not_synchronise() -> None:
    for policy in every_policy(LINEAR):
        policy.draw(8, device="cuda")
        source = torch.Generator("cuda").manual_seed(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            draw = policy.draw(256, device="cuda", generator=source)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert draw.index.is_cuda
        assert ((draw.index >= 0) & (draw.index < 1000)).all()
        assert_close(draw.weight.cpu(), policy.weight.float()[draw.index.cpu()], atol=0, rtol=0)


@pytest.mark.gpu
def test_a_state_loaded_onto_a_device_still_learns() -> None:
    policy = build_policy("loss_second_moment", NoiseSchedule.cosine(5))
    teach(policy, torch.arange(1.0, 6.0))
    state = policy.state_dict()
    state["density"] = {key: value.cuda() for key, value in state["density"].items()}
    other = build_policy("loss_second_moment", NoiseSchedule.cosine(5))
    other.load_state_dict(state)
    other.update(torch.tensor([0], device="cuda"), torch.tensor([1.0], device="cuda"))
    assert other.density.device.type == "cpu"


@pytest.mark.parametrize("name", sorted(POLICIES.module_dict))
def test_tables_are_built_on_the_cpu_whatever_the_default_device_is(name: str) -> None:
    expected = build(name, NoiseSchedule.linear(1000))
    with torch.device("meta"):
        for schedule in (
            NoiseSchedule.scaled_linear(),
            NoiseSchedule.cosine(),
            NoiseSchedule.rectified_flow(),
        ):
            assert not schedule.alpha.is_meta
        policy = build(name, NoiseSchedule.linear(1000))
        assert torch.equal(policy.density, expected.density)
        assert torch.equal(policy.weight, expected.weight)
