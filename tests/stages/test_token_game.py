"""Games of token-level self-play: nothing is generated, and all else of a game is as ever."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from games import Do, DoLast, Game, Stopped, read, weight_bits, without_seconds
from helpers import QUIET, args_of, load
from lightning import Trainer
from several import thorough, together
from test_resume import stop_at
from test_several_processes import assert_close

from spin_lightning import (
    ContinuousGenerator,
    DpoLightningModule,
    ExportPolicy,
    LoraAdapter,
    NumberMatch,
    RowDataModule,
    SftLightningModule,
    ShowAnswers,
    SpinLightningModule,
    TokenSpinLoss,
    UserError,
)
from spin_lightning.cli import plan
from spin_lightning.cli.commands import main
from spin_lightning.models.batches import collate_laws
from spin_lightning.stages.law_table import LawStore

LN2 = math.log(2)


def game_of(model: str, rows: str, folder: Path, *, loss: dict[str, Any] | None = None, **settings: Any) -> Game:
    module = {"loss": TokenSpinLoss(**{"top_k": 8, **(loss or {})}), "beta": 2.0, **settings.pop("module", {})}
    data = {"generator": ContinuousGenerator(max_new_tokens=5), **settings.pop("data", {})}
    return Game(model, rows, folder, module=module, data=data, **settings)


@pytest.fixture(scope="module")
def played(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Game, Path]:
    folder = tmp_path_factory.mktemp("played") / "run"
    return game_of(model, rows, folder, callbacks=[ShowAnswers()]).play(), folder


def test_each_iteration_starts_at_ln_2_a_token_and_learns(played: tuple[Game, Path]) -> None:
    _, folder = played
    summaries = read(folder / "game.json")["iterations"]
    assert [summary["first_loss"] for summary in summaries] == pytest.approx([LN2] * 2, abs=1e-6)
    assert summaries[1]["last_loss"] < 0.6
    assert summaries[1]["val_nll"] < summaries[0]["val_nll"] < read(folder / "start.json")["val/nll"]
    metrics = summaries[0]["epoch_metrics"]
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/real"] - metrics["rewards/generated"], abs=1e-6)
    assert metrics["rewards/real"] > 0 > metrics["rewards/generated"] and 0.5 < metrics["rewards/accuracies"] < 1
    assert summaries[0]["pairs"]["responses"] == 8
    card = (folder / "iteration_1" / "policy" / "README.md").read_text()
    assert "# Policy after iteration 1 of token-level self-play" in card


def test_what_is_kept_is_what_plain_rows_of_the_opponent_say(played: tuple[Game, Path], model: str) -> None:
    game, folder = played
    reference = load(model)
    rows = LawStore(folder / "iteration_0" / "laws").read().to_pylist()
    assert len(rows) == len(game.data.prompts)
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["real_ids"]])
        whole = reference(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        values, top = whole.topk(8)
        (batch,) = collate_laws([row], 1000)
        torch.testing.assert_close(batch.opponent.real, whole.gather(1, ids[:, len(row["prompt_ids"]) :].T)[:, 0])
        assert torch.equal(batch.opponent.laws.ids, top)
        torch.testing.assert_close(batch.opponent.laws.log_probs, values)
        torch.testing.assert_close(batch.opponent.laws.rest.exp(), 1 - values.exp().sum(1), atol=1e-5, rtol=0)


def test_its_first_update_is_that_of_sft_by_tokens_at_a_beta_of_2(model: str, rows: str, tmp_path: Path) -> None:
    """Beta over 2 is 1, and the mean is over tokens in both."""
    plain = {"learning_rate": 0.1, "optimizer": torch.optim.SGD, "warmup_ratio": 0.0}
    data = {"batch_size": 8, "val_fraction": 0.2}
    one = {"play": {"iterations": 1, "epochs": 1}, "data": data}
    game = game_of(model, rows, tmp_path / "game", module=plain, **one).play()
    sft = SftLightningModule(model, **plain)
    rows_of = RowDataModule(rows, max_response_tokens=5, **data)
    callbacks = [ExportPolicy(str(tmp_path / "sft"))]
    Trainer(max_epochs=1, enable_checkpointing=False, callbacks=callbacks, **QUIET).fit(sft, rows_of)
    start = load(model).state_dict()
    for (name, weight), (_, other) in zip(
        game.module.policy.state_dict().items(), sft.policy.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=0)
        assert name.endswith("norm.weight") or not torch.allclose(weight, start[name], atol=1e-5, rtol=0)


def test_accumulated_batches_and_passes_of_any_size_train_like_one_batch(model: str, rows: str, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {"data": {"batch_size": 8}},
        {"data": {"batch_size": 4}, "trainer": {"accumulate_grad_batches": 2}},
        {"data": {"batch_size": 8, "micro_batch_tokens": 40}},
    ]
    games = [
        game_of(
            model, rows, tmp_path / str(n), loss={"temperature": [3.0, 1.0]},
            **{**each, "trainer": {"precision": "64-true", **each.get("trainer", {})}},
        ).play()
        for n, each in enumerate(settings)
    ]  # fmt: skip
    for game in games[1:]:
        for name, weight in games[0].module.policy.state_dict().items():
            torch.testing.assert_close(game.module.policy.state_dict()[name], weight, atol=1e-6, rtol=0)


# --- a game that is stopped -------------------------------------------------------------------------------------------


def assert_same(game: Game, whole: Game, folder: Path, other: Path) -> None:
    assert game.weights == whole.weights
    for name in ("game.json", "start.json"):
        assert without_seconds(read(folder / name)) == without_seconds(read(other / name))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_game_stopped_anywhere_continues_bit_for_bit(adapter: bool, model: str, rows: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"module": {"adapter": LoraAdapter(r=4)}} if adapter else {}
    whole = game_of(model, rows, tmp_path / "whole", **settings).play()
    for number in (6,) if adapter else (1, 4):
        stop = DoLast(on_train_batch_end=lambda trainer, *_, n=number: stop_at(trainer, n))
        folder = tmp_path / str(number)
        with pytest.raises(Stopped):
            game_of(model, rows, folder, last=[stop], **settings).play()
        game = game_of(model, rows, folder, **settings).play()
        assert game.recorder.losses == {n: whole.recorder.losses[n] for n in game.recorder.losses}
        assert_same(game, whole, folder, tmp_path / "whole")


def test_a_stop_while_the_opponent_scores_costs_one_shard(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spin_lightning.stages import law_table

    settings: dict[str, Any] = {"play": {"shard_size": 3}, "every_n_steps": None}
    whole = game_of(model, rows, tmp_path / "whole", **settings).play()
    scored: list[int] = []
    real = law_table.top_says

    def watched(policy: Any, batch: Any, k: int) -> Any:
        if len(scored) == limit:
            raise Stopped
        scored.append(len(batch))
        return real(policy, batch, k)

    monkeypatch.setattr(law_table, "top_says", watched)
    for limit in (1, 4):  # of shards of 3, 3 and 2 responses; in the second iteration, too
        scored.clear()
        folder = tmp_path / str(limit)
        with pytest.raises(Stopped):
            game_of(model, rows, folder, **settings).play()
        limit = 1000
        game = game_of(model, rows, folder, **settings).play()
        assert len(scored) == 6, "no shard is scored twice"
        assert_same(game, whole, folder, tmp_path / "whole")


def test_a_table_of_another_top_k_or_of_other_weights_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    stop = DoLast(on_train_batch_end=lambda trainer, *_: stop_at(trainer, 1))
    with pytest.raises(Stopped):
        game_of(model, rows, tmp_path, last=[stop]).play()
    shutil.copytree(tmp_path, tmp_path / "copy")
    with pytest.raises(UserError, match="made with other settings than this run has now; what differs: top_k"):
        game_of(model, rows, tmp_path / "copy", loss={"top_k": 9}, allow_changes=["model.loss"]).play()
    path = tmp_path / "iteration_0" / "laws_manifest.json"
    path.write_text(json.dumps({**read(path), "opponent": "another"}))
    with pytest.raises(UserError, match=r"the next-token laws in .* are not those that iteration 0 began with"):
        game_of(model, rows, tmp_path).play()


def test_the_gate_stops_a_game_whose_policy_is_not_the_opponent(model: str, rows: str, tmp_path: Path) -> None:
    def move(trainer: Any, module: Any, *_: Any) -> None:
        with torch.no_grad():
            module.policy.model.layers[0].mlp.up_proj.weight.add_(0.5)

    with pytest.raises(UserError, match=r"iteration 0 does not start where it should.*must be 0\.693147"):
        game_of(model, rows, tmp_path, callbacks=[Do(on_generation_end=move)]).play()


def test_stages_one_by_one_are_the_game(
    played: tuple[Game, Path], model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spin_lightning.cli.play import find_next

    for iteration in (0, 1):
        for stage in ("generate", "train"):
            assert find_next(tmp_path) == (iteration, stage)
            game = game_of(model, rows, tmp_path, play={"stage": stage}).play()
    assert game.weights == played[0].weights


def play_it(model: str, rows: str, folder: Path, strategy: str = "") -> None:
    trainer = {"precision": "64-true", **({"devices": 2, "strategy": strategy} if strategy else {})}
    data = {"batch_size": 5, "micro_batch_tokens": 60}
    game = game_of(model, rows, folder, trainer=trainer, data=data, play={"shard_size": 3}).play()
    (folder / f"weights_{game.trainer.global_rank}").write_bytes(weight_bits(game.module.gather_policy()))


@thorough
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_play_the_game_of_one(strategy: str, model: str, rows: str, tmp_path: Path) -> None:
    play_it(model, rows, tmp_path / "one")
    ended = together(tmp_path, play_it, model, rows, tmp_path / "two", strategy)
    assert ended.codes == [0, 0], ended.printed
    one, two = (load(tmp_path / name / "iteration_1" / "policy", torch.float64).state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-12, rtol=0)
    assert (tmp_path / "two" / "weights_0").read_bytes() == (tmp_path / "two" / "weights_1").read_bytes()
    for iteration in (0, 1):
        names = [tmp_path / name / f"iteration_{iteration}" / "summary.json" for name in ("two", "one")]
        assert_close(*(without_seconds(read(path)) for path in names), 1e-6)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_that_mean_nothing_here_are_named(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"generator": ContinuousGenerator(max_new_tokens=5, temperature=0.7), "answers_per_prompt": 2, "history": 0}
    game_of(model, rows, tmp_path, data=data, trainer={"fast_dev_run": True, "max_epochs": -1}).play()
    printed = capsys.readouterr().out
    assert (
        "note: TokenSpinLoss generates nothing, so data.generator, data.answers_per_prompt, data.history are not used; "
        "of the generator its max_new_tokens alone, which caps the real responses." in printed.replace("\n", " ")
    )


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_other_precisions_pass_the_gate_and_no_generator_has_to_be_ready(
    precision: str, model: str, rows: str, tmp_path: Path
) -> None:
    class Absent(ContinuousGenerator):
        def check_ready(self) -> None:
            raise UserError("no engine is here")

    settings: dict[str, Any] = {"trainer": {"precision": precision}, "play": {"iterations": 1, "epochs": 1}}
    game_of(model, rows, tmp_path, data={"generator": Absent(max_new_tokens=5)}, **settings).play()
    summary = read(tmp_path / "iteration_0" / "summary.json")
    assert summary["first_loss"] == pytest.approx(LN2, abs=0.01) and summary["updates"] == 2


def test_what_cannot_be_combined_is_refused(model: str, rows: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"TokenSpinLoss compares with laws .* model.opponent must be stored, got 'resident'"
    ):
        SpinLightningModule(model, loss=TokenSpinLoss(), opponent="resident")
    with pytest.raises(UserError, match=r"model\.loss must be a PairLoss, got TokenSpinLoss"):
        DpoLightningModule(model, loss=TokenSpinLoss())  # type: ignore[arg-type]
    play = {"pairs": "best_worst", "reward": NumberMatch()}
    with pytest.raises(
        UserError, match=r"TokenSpinLoss compares tokens, so there are no responses that self_play.reward"
    ):
        game_of(model, rows, tmp_path, play=play).play()


def test_the_command_line_plays_checks_and_plans(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.loss=TokenSpinLoss", "--model.loss.temperature=.inf", "--model.loss.top_k=4"]
    few = ["--self_play.iterations=1", "--self_play.epochs=1", "--trainer.accelerator=cpu"]
    main(args_of("fit", model, rows, tmp_path, *flags, *few))
    (played,) = read(tmp_path / "game.json")["iterations"]
    assert played["first_loss"] == pytest.approx(LN2, abs=1e-6)
    told = plan.make_plan(plan.Options(), args_of("fit", model, rows, tmp_path / "plan", *flags, *few)[1:])
    assert told["updates"]["per_iteration"] == [played["updates"]]
    main(args_of("check", model, rows, tmp_path / "check", *flags))
    main(["validate", f"--model.model_name_or_path={model}", f"--data.train_data={rows}", "--trainer.accelerator=cpu"])
