"""The batch script of a SLURM job."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from spin_lightning.cli.chain_file import Chain, read_chain
from spin_lightning.cli.commands import main
from spin_lightning.cli.slurm import make_script

ASKED = ["--nodes", "2", "--gpus-per-node=3", "--partition", "gpu", "--"]


@pytest.mark.parametrize("word", ["fit", "play", "sft", "dpo"])
def test_bash_reads_the_script(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["slurm", *ASKED, word, "--config", "my run.yaml"])
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for line in (
        "nodes=2",
        "gpus-per-node=3",
        "ntasks-per-node=3",
        "time=24:00:00",
        "partition=gpu",
        "signal=USR1@300",
    ):
        assert f"\n#SBATCH --{line}\n" in script
    assert f"-m spin_lightning {word} " in script
    assert "--config 'my run.yaml' --trainer.num_nodes=2 --trainer.devices=3\n" in script


@pytest.mark.parametrize(("code", "is_queued"), [(0, False), (2, False), (143, True)])
def test_the_job_is_queued_again_when_its_time_was_over(code: int, is_queued: bool, tmp_path: Path) -> None:
    """Run for real, with programs in the place of srun and scontrol that write down how they were called."""
    for name, ends in (("srun", code), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/called\nexit {ends}\n')
        program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    script = make_script([*ASKED, "fit", "--config", "run.yaml"])
    assert subprocess.run(["bash"], input=script, text=True, env=environment).returncode == code
    called = (tmp_path / "called").read_text().splitlines()
    assert called == [
        "srun --kill-on-bad-exit=1 python -m spin_lightning fit --config run.yaml --trainer.num_nodes=2 "
        "--trainer.devices=3",
        *(["scontrol requeue 7"] if is_queued else []),
    ]


def test_a_chain_starts_each_of_its_stages_on_all_gpus(tmp_path: Path) -> None:
    """Run for real, with programs in the place of srun and python, and read again as the chain would."""
    line = tmp_path / "line.yaml"
    line.write_text("output_dir: runs/line\nstages: [sft: {}, score: {name: rated}, fit: {}]\n")
    for name in ("srun", "python"):
        (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "{name}" "$@" > {tmp_path}/called\n')
        (tmp_path / name).chmod(0o755)
    script = make_script([*ASKED, "chain", str(line), "--output_dir", "runs/other"])
    subprocess.run(["bash"], input=script, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    called = (tmp_path / "called").read_text().splitlines()
    assert called[:4] == ["python", "-m", "spin_lightning", "chain"]  # once, beside what srun starts
    chain = _read(called[4:], tmp_path)
    program = str(tmp_path / "srun")
    assert [step.launcher for step in chain.steps] == [
        (program, "--kill-on-bad-exit=1", "python"),
        (program, "--kill-on-bad-exit=1", "--nodes=1", "--ntasks=1", "python"),
        (program, "--kill-on-bad-exit=1", "python"),
    ]
    on_all = (("trainer.num_nodes", "2"), ("trainer.devices", "3"))
    assert [step.flags for step in chain.steps] == [on_all, (), on_all] and chain.output_dir == Path("runs/other")


def _read(args: Sequence[str], folder: Path) -> Chain:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return read_chain(args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "what the job runs must follow `--`, one of fit, sft, "),
        (["--", "lab"], "got 'lab'"),
        (["--", "fit"], "fit needs its settings: spin-lightning slurm -- fit --config run.yaml"),
        (["--time", "1h", "--", "fit", "--config=run.yaml"], "got '1h'"),
        (["--nodes", "0", "--", "fit", "--config=run.yaml"], "--nodes must be a whole number, at least 1, got '0'"),
        (["--gpus-per-node=x", "--", "fit", "--config=run.yaml"], "--gpus-per-node must be a whole number"),
        (["--time", "--", "fit", "--config=run.yaml"], "--time needs a value, got ''"),
        (["2", "--", "fit", "--config=run.yaml"], "an option of the job must look like --partition gpu, got '2'"),
        (["--signal=TERM@9", "--", "fit", "--config=run.yaml"], "--signal is the script's own"),
        (["--", "chain"], "chain needs its file"),
        (["--", "chain", "a.yaml", "--sft.trainer.devices=2"], "--sft.trainer.devices follows from --nodes"),
        (["--", "play", "--launcher=torchrun"], "--launcher follows from --nodes and --gpus-per-node"),
    ],
)
def test_what_no_script_can_be_made_of_is_refused(
    args: list[str], words: str, refusal: Callable[[Sequence[str]], str]
) -> None:
    assert words in refusal(["slurm", *args])
