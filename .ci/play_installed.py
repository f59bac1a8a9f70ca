"""Play one iteration with the installed package alone: a config from the wheel, a tiny model, the command line."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import spin_lightning
from spin_lightning.demos.language import Language, save_start, write_rows

package = files("spin_lightning")
assert Path(spin_lightning.__file__).is_relative_to(sys.prefix), spin_lightning.__file__
assert (package / "py.typed").is_file()

folder = Path(tempfile.mkdtemp())
language = Language(length=2)
rows = write_rows(folder / "rows.jsonl", language.rows(language.draw_prompts(20, seed=0), seed=0))
command = [str(Path(sys.prefix) / "bin" / "spin-lightning"), "fit", f"--config={package / 'configs' / 'demo.yaml'}"]
command += [f"--model.model_name_or_path={save_start(language, folder / 'model', seed=0)}", f"--data.train_data={rows}"]
command += [f"--self_play.output_dir={folder / 'run'}", "--self_play.iterations=1", "--data.generator.max_new_tokens=4"]
subprocess.run(command, check=True, cwd=folder)
assert (folder / "run" / "iteration_0" / "policy" / "model.safetensors").is_file()
print("the wheel plays")
