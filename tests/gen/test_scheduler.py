"""What a stock scheduler's configuration may ask for, and what is refused of it."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

import diffusers
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin

from gen.scheduler import ALLOWED, CLASSES, HONOURED, IDLE, NoiseLevels
from peers import apart, network_of, our_run, stock_of


def scheduler_classes() -> list[type]:
    found = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, ConfigMixin)]


def test_every_scheduler_of_diffusers_is_mapped_or_refused_by_name() -> None:
    mapped, refused = set(), set()
    for kind in scheduler_classes():
        try:
            stock = kind()
        except (ImportError, TypeError):  # torchsde is not here; another needs what no file says
            continue
        try:
            levels = NoiseLevels.of(stock, "scheduler")
            assert levels.schedule(levels.sampler, 5).num_steps >= 5
            mapped.add(kind.__name__)
        except ValueError as error:
            assert kind.__name__ in str(error) and "\n" not in str(error)
            refused.add(kind.__name__)
    # as its class default asks for Runge-Kutta steps
    assert mapped == set(CLASSES) - {"PNDMScheduler"}
    assert {"FlowMatchEulerDiscreteScheduler", "TCDScheduler", "EDMEulerScheduler", "PNDMScheduler"} <= refused


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_of_a_class_is_known_to_us(name: str) -> None:
    """What diffusers adds shows here; until then a value other than its default is refused."""
    options = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self"}
    assert options <= HONOURED | IDLE | ALLOWED.keys() | CLASSES[name].allowed.keys()


@pytest.mark.parametrize(
    ("sampler", "config", "message"),
    [
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas=True is not supported; choose from: False, None"),
        ("euler", {"sigma_max": 80.0}, "sigma_max=80.0"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
        ("ddim", {"thresholding": True}, "thresholding=True"),
        ("ddim", {"timestep_spacing": "even"}, "timestep_spacing='even' is not supported; choose from: 'leading'"),
        ("dpmpp_2m", {"use_lu_lambdas": True}, "use_lu_lambdas=True"),
    ],
)
def test_options_that_we_do_not_honour_are_refused(sampler: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        NoiseLevels.of(stock_of(sampler, **config), "scheduler")
    assert "\n" not in str(caught.value)


def test_an_option_that_a_class_has_and_we_have_not_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the next diffusers may have one: taken at its default, refused at any other."""
    monkeypatch.setattr("gen.scheduler.HONOURED", HONOURED - {"lower_order_final"})
    NoiseLevels.of(stock_of("dpmpp_2m"), "scheduler")
    with pytest.raises(ValueError, match="lower_order_final=False is not supported; choose from: True"):
        NoiseLevels.of(stock_of("dpmpp_2m", lower_order_final=False), "scheduler")


def test_an_option_of_no_class_is_refused_and_one_of_another_class_is_left_to_it() -> None:
    stock = EulerDiscreteScheduler.from_config(
        {"_class_name": "EulerDiscreteScheduler", "clip_sample": False, "skip_prk_steps": True}
    )
    assert NoiseLevels.of(stock, "scheduler").sampler == "euler"
    stock = EulerDiscreteScheduler.from_config({"_class_name": "EulerDiscreteScheduler", "timestep_spacng": "trailing"})
    with pytest.raises(ValueError, match="option 'timestep_spacng' is known to no scheduler of diffusers"):
        NoiseLevels.of(stock, "scheduler")


def test_what_a_configuration_does_not_say_is_the_class_default(caplog: pytest.LogCaptureFixture) -> None:
    """A configuration without clip_sample is of a DDIM that clips; Euler's leaves it to the class built of it."""
    euler = {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}
    levels = NoiseLevels.of(EulerDiscreteScheduler.from_config(euler), "scheduler")
    with caplog.at_level(logging.WARNING):
        assert levels.options("ddim")["clip"] == 1.0
    assert "scheduler as ddim: estimates are clipped to 1.0, for clip_sample is not said" in caplog.text
    stock = EulerDiscreteScheduler.from_config(euler | {"clip_sample": False})
    assert NoiseLevels.of(stock, "scheduler").options("ddim")["clip"] == math.inf


def test_clipping_shows() -> None:
    network = network_of("eps", DDIMScheduler().betas)
    for sampler in ("ddim", "ddpm", "lcm"):
        plain, clipped = (our_run(stock_of(sampler, clip_sample=clip), network, 10) for clip in (False, True))
        assert apart(clipped, plain) > 1e-2
