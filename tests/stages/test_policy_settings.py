"""The settings of a policy are declared once, and every stage has them: on the command line, in Python, in the help."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from spin_lightning import (
    DpoLightningModule,
    PpoLightningModule,
    RewardLightningModule,
    SftLightningModule,
    SpinLightningModule,
)
from spin_lightning.stages.policy import PolicyModule
from spin_lightning.types import UserError

OF_EVERY_STAGE: dict[str, Any] = {
    "lr_schedule": "linear", "warmup_ratio": 0.1, "dropout": False, "gradient_checkpointing": False, "revision": None,
    "attn_implementation": None, "trust_remote_code": False, "on_non_finite": "stop", "optimizer": torch.optim.AdamW,
    "kernels": None, "adapter": None,
}  # fmt: skip
OWN: dict[type[PolicyModule], dict[str, Any]] = {
    SpinLightningModule: {"beta": 1.0, "loss": None, "learning_rate": 5e-7, "opponent": "stored"},
    PpoLightningModule: {
        "beta": 0.05, "advantage": None, "learning_rate": 1e-6, "lr_schedule": "constant", "warmup_ratio": 0.0,
        "clip": 0.2, "value_coef": 0.1, "value_clip": None, "value_scale": 100.0, "critic": None,
        "critic_learning_rate": 1e-5, "critic_warmup": 0, "average": "token", "sampler_cap": None,
    },
    DpoLightningModule: {"beta": 0.1, "loss": None, "learning_rate": 5e-7},
    SftLightningModule: {"learning_rate": 2e-5, "average": "token", "max_updates": None, "kl_to_start": 0.0},
    RewardLightningModule: {"learning_rate": 1e-5, "centring": 0.0},
}  # fmt: skip


class Mine(SpinLightningModule):
    """A user's own stage.

    Args:
        extra: One setting more than its base has.
    """

    def __init__(self, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


OWN[Mine] = {**OWN[SpinLightningModule], "extra": 1}


@pytest.mark.parametrize("kind", OWN)
def test_a_parser_finds_every_setting_with_its_type_default_and_help(kind: type[PolicyModule], model: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    found = vars(parser.get_defaults().model)
    optimizer = found.pop("optimizer")
    expected = {"model_name_or_path": None, **OF_EVERY_STAGE, **OWN[kind]}
    assert found == {name: value for name, value in expected.items() if name != "optimizer"}
    assert "AdamW" in str(optimizer)
    helps = {action.dest.removeprefix("model."): str(action.help) for action in parser._actions}
    assert [name for name in expected if len(helps[name]) < 15] == []
    for wrong in ("warmup_ratio=x", "lr_schedule=square", "dropout=perhaps"):
        with pytest.raises(Exception, match=rf"model\.{wrong.partition('=')[0]}"):
            parser.parse_args([f"--model.model_name_or_path={model}", f"--model.{wrong}"])
    args = [f"--model.model_name_or_path={model}", "--model.warmup_ratio=0.5", "--model.optimizer=torch.optim.SGD"]
    made = parser.instantiate_classes(parser.parse_args([*args, "--model.optimizer.momentum=0.5"])).model
    assert type(made) is kind and made.warmup_ratio == 0.5
    assert made.optimizer([torch.zeros(1, requires_grad=True)]).defaults["momentum"] == 0.5


@pytest.mark.parametrize("kind", OWN)
def test_what_no_stage_takes_is_refused(kind: type[PolicyModule], model: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'warmup'"):
        kind(model_name_or_path=model, warmup=0.1)
    with pytest.raises(UserError, match=r"model\.warmup_ratio must be in \[0, 1\), got 2"):
        kind(model_name_or_path=model, warmup_ratio=2)
