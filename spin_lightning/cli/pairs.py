"""``spin-lightning pairs``: the pairs of a game or of ``score``, as rows for other preference trainers.

Shard by shard: no more than one is in memory, however large the game was.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spin_lightning.cli.arguments import Arguments
from spin_lightning.generation.pair_rows import LAYOUTS, Pair, dataset_info, pair_of_record, read_pairs
from spin_lightning.generation.pair_store import PairStore, own_shards
from spin_lightning.models.loading import load_tokenizer
from spin_lightning.runs.files import iteration_folders, read_json, replacing, sha256_of, write_json
from spin_lightning.runs.redaction import redacted
from spin_lightning.runs.settings import versions
from spin_lightning.stages.iteration import iteration_folder
from spin_lightning.terminal import ending_with_its_reader, say
from spin_lightning.types import UserError

#: What may be left out.
DROPS = ("identical", "clipped")
#: Rows of a row group of Parquet.
GROUP = 1000


class Source:
    """Pairs, and what is known of them as a whole.

    Attributes:
        pairs: One by one.
        facts: What made them.
    """

    def __init__(self, pairs: Iterable[Pair], facts: dict[str, Any]) -> None:
        self.pairs, self.facts = pairs, facts


def main(args: list[str]) -> None:
    """Write the rows.

    Args:
        args: Of the command line.

    Raises:
        UserError: There are no pairs, or an option is outside its range.
        StorageError: The file cannot be written.
    """
    options = parse(args)
    source = open_source(Path(options.run).expanduser(), options.iteration, is_text=options.format == "trl_text")
    counts: Counter[str] = Counter()
    rows = _make_rows(source.pairs, options, counts)
    if options.output is None:
        with ending_with_its_reader():
            sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        _write(Path(options.output).expanduser(), rows, options, source, counts)
    _tell(options, counts)


def parse(args: Sequence[str]) -> Namespace:
    """Read the arguments.

    Raises:
        UserError: They are not as they should be.
    """
    options = Arguments("pairs")
    options.add_argument("run")
    options.add_argument("--iteration")
    options.add_argument("--format", choices=[*LAYOUTS], default="trl")
    options.add_argument("--drop", nargs="+", choices=DROPS, default=[])
    options.add_argument("--output")
    found = options.parse_args(args)
    if found.iteration not in (None, "all") and not found.iteration.isdecimal():
        raise UserError(f"--iteration must be a number from 0, or 'all', got {found.iteration!r}.")
    if found.output is not None and not found.output.endswith((".jsonl", ".parquet")):
        raise UserError(f"--output must end with .jsonl or .parquet, got {found.output!r}.")
    return found


# --- where pairs are --------------------------------------------------------------------------------------------------


def open_source(folder: Path, iteration: str | None, is_text: bool = False) -> Source:
    """The pairs of a run.

    Args:
        folder: Of a game, of one of its iterations, or of ``score``.
        iteration: Of a game: which one, or ``all``. None: the last with finished pairs.
        is_text: Whether prompts are wanted as the text that the template wrote.

    Raises:
        UserError: There are none.
    """
    if re.fullmatch(r"iteration_\d+", folder.name) and (folder / "pairs").is_dir():
        folder, iteration = folder.parent, iteration or folder.name.removeprefix("iteration_")
    iterations = iteration_folders(folder)
    stores = {n: place / "pairs" for n, place in iterations.items() if (place / "pairs").is_dir()}
    if stores:
        return _open_game(folder, stores, iteration, is_text)
    path = folder / "pairs.jsonl"
    if path.is_file() and (summary := read_json(folder / "summary.json")) is not None:
        if is_text:
            raise UserError("--format trl_text needs the token ids of a game; score keeps texts. Use --format trl.")
        if iteration is not None:
            raise UserError(f"{folder} is a folder of score, which has no iterations. Leave --iteration out.")
        return Source(_read_lines(path), {"score": {key: summary[key] for key in ("model", "reward", "against")}})
    if (folder / "pairs_manifest.json").is_file():
        raise UserError(f"{folder} is a run of dpo or reward, which keeps token ids alone. Use the data that it read.")
    if any((place / "laws").exists() for place in iterations.values()):
        raise UserError(f"{folder} is a token-level game, which generates nothing: it has no pairs.")
    what = "there is no such folder" if not folder.is_dir() else "it has no iteration_*/pairs and no pairs.jsonl"
    raise UserError(f"no pairs in {str(folder)!r}: {what}. Give the folder of a game (fit, play) or of score.")


def _open_game(folder: Path, found: dict[int, Path], iteration: str | None, is_text: bool) -> Source:
    stores = {number: store for number, path in found.items() if (store := _finished(path)) is not None}
    if not stores:
        raise UserError(f"the pairs in {folder} are unfinished. Continue the run that was making them.")
    if iteration not in (None, "all") and int(iteration) not in stores:
        there = ", ".join(map(str, stores))
        raise UserError(f"{folder} has no finished pairs of iteration {iteration}; it has those of {there}.")
    wanted = [*stores] if iteration == "all" else [max(stores) if iteration is None else int(iteration)]
    made_by = [
        {
            **{key: stores[number].binding.get(key) for key in ("iteration", "opponent_sha256", "sampling", "seed")},
            **{key: stores[number].manifest.get(key) for key in ("opponent", "versions")},
            "pairs_manifest_sha256": stores[number].sha256,
        }
        for number in wanted
    ]
    decode = _load_decoder(folder, stores[wanted[-1]]) if is_text else None
    return Source(chain.from_iterable(_read_store(stores[number], decode) for number in wanted), {"pairs": made_by})


def _finished(path: Path) -> PairStore | None:
    """A table of pairs, if it is finished."""
    if not path.with_name("pairs_manifest.json").is_file():
        return None
    store = PairStore(path)
    return store if store.is_complete and "sampling" in store.binding else None


def _read_store(store: PairStore, decode: Callable[[list[int]], str] | None) -> Iterator[Pair]:
    """The pairs of a table that its own iteration made, without those that a reward does not tell apart."""
    columns = ["iteration", "prompt_id", "answer", "prompt", "chosen", "rejected", "opponent_sha256", "seed"]
    columns += ["prompt_ids", "real_ids", "generated_ids", "real_finish_reason", "generated_finish_reason"]
    kind = store.binding.get("pairs")
    columns += ["real_reward", "generated_reward"] if kind else []
    cap = store.binding["sampling"]["max_new_tokens"]
    for name in own_shards(store, store.binding["iteration"]):
        rows = store.read_shard(name, columns).to_pylist()
        yield from read_pairs(rows, cap, kind != "best_worst", decode)


def _load_decoder(folder: Path, store: PairStore) -> Callable[[list[int]], str]:
    """What makes text of the ids of a game, so that TRL makes the same ids of it."""
    made = [iteration_folder(folder, store.binding["iteration"]) / kind for kind in ("policy", "adapter")]
    opponent = store.manifest["opponent"]
    places = [*made, folder / opponent, Path(opponent).expanduser()]
    tokenizer = load_tokenizer(next((str(place) for place in places if place.is_dir()), opponent))
    begins = tokenizer("").input_ids[:1]  # by itself, so that a text that has it would have it twice

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids[1:] if ids[:1] == begins else ids))

    return decode


def _read_lines(path: Path) -> Iterator[Pair]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield pair_of_record(json.loads(line))


# --- what becomes of them ---------------------------------------------------------------------------------------------


def _make_rows(pairs: Iterable[Pair], options: Namespace, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows of a layout, without what is left out; both are counted."""
    for pair in pairs:
        counts["pairs"] += 1
        if not pair.is_ranked:
            counts["not told apart by the reward"] += 1
        elif "identical" in options.drop and pair.is_identical:
            counts["identical"] += 1
        elif "clipped" in options.drop and pair.is_clipped:
            counts["clipped"] += 1
        elif (row := LAYOUTS[options.format](pair)) is None:
            counts["with turns that LLaMA-Factory does not take"] += 1
        else:
            counts["rows"] += 1
            for what, is_so in (
                ("kept identical", pair.is_identical),
                ("kept clipped", pair.is_clipped),
                ("kept with tools", "tools" in row),
                ("kept without their calls", "seed" in pair.facts and _lacks_calls(pair)),
            ):
                counts[what] += is_so
            yield row


def _lacks_calls(pair: Pair) -> bool:
    """Whether tools were called in the prompt, of which a game's table keeps roles and texts alone."""
    return any(turn["role"] == "tool" for turn in pair.prompt)


def _write(
    path: Path, rows: Iterable[dict[str, Any]], options: Namespace, source: Source, counts: Counter[str]
) -> None:
    """Write the file, and beside it where its rows come from.

    Raises:
        UserError: No row is left, or Parquet cannot hold one.
        StorageError: There is no room, or the folder cannot be written to.
    """
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, rows, has_tools="score" in source.facts)
        else:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not counts["rows"]:
            raise UserError(f"no row is left of {counts['pairs']} pairs: {_left_out(counts) or 'there are none'}.")
    provenance = {
        "file": path.name,
        "sha256": sha256_of(path),
        "rows": counts["rows"],
        "left_out": {name: counts[name] for name in _LEFT_OUT if counts[name]},
        "format": options.format,
        "made_by": versions()["spin_lightning"],
        **source.facts,
    }
    write_json(path.with_name(f"{path.name}.provenance.json"), redacted(provenance))
    if options.format == "llama_factory":
        _register(path, bool(counts["kept with tools"]))


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], has_tools: bool) -> None:
    writer = None
    remaining = iter(rows)
    try:
        while group := list(islice(remaining, GROUP)):
            for turn in (turn for row in group for turn in row.get("prompt", row.get("messages", []))):
                if isinstance(turn, dict) and turn.keys() > {"role", "content"}:
                    others = ", ".join(sorted(turn.keys() - {"role", "content"}))
                    raise UserError(
                        f"a turn has {others}, of another form in each row, which a column of Parquet cannot hold. "
                        "Give --output a name that ends with .jsonl."
                    )
            if writer is None:
                first = {**group[0], **({"tools": ""} if has_tools else {})}
                writer = pq.ParquetWriter(path.absolute(), pa.Table.from_pylist([first]).schema, compression="zstd")
            writer.write_table(pa.Table.from_pylist(group, writer.schema))
    finally:
        if writer is not None:
            writer.close()


def _register(path: Path, has_tools: bool) -> None:
    """Have LLaMA-Factory know the file: in a new ``dataset_info.json`` beside it, or as the entry to add to one."""
    entry, place = {path.stem: dataset_info(path.name, has_tools)}, path.with_name("dataset_info.json")
    known = read_json(place)
    if known is None:
        write_json(place, entry)
    elif known.get(path.stem) != entry[path.stem]:
        say(f"Add this to {place}:\n{json.dumps(entry, indent=2)[2:-2]}", wraps=False)


#: What pairs are left out for, as it is counted.
_LEFT_OUT = ("not told apart by the reward", "identical", "clipped", "with turns that LLaMA-Factory does not take")


def _left_out(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in _LEFT_OUT if counts[name])


def _tell(options: Namespace, counts: Counter[str]) -> None:
    """Say what was written, and what other trainers will make of it."""
    where = sys.stderr if options.output is None else sys.stdout
    left_out = f"; left out: {_left_out(counts)}" if _left_out(counts) else ""
    in_file = f" in {options.output}" if options.output else ""
    say(f"{counts['rows']} row{'s' * (counts['rows'] != 1)}{in_file}{left_out}", file=where)
    kept = {name: counts[f"kept {name}"] for name in ("clipped", "identical", "without their calls")}
    if kept["clipped"]:
        say(
            f"note: rows with a response that was cut: {kept['clipped']}. Other trainers take a cut text for a whole "
            "one, and teach an end where there was none: --drop clipped leaves these rows out",
            file=where,
        )
    if kept["identical"]:
        say(
            f"note: rows whose two responses are the same: {kept['identical']}. --drop identical leaves them out",
            file=where,
        )
    if kept["without their calls"] and options.format != "trl_text":
        say(
            f"note: prompts in which tools answer: {kept['without their calls']}. A game keeps roles and texts: calls "
            "and definitions are not in these rows. --format trl_text has them, as the template wrote them",
            file=where,
        )
