"""Which hyperparameters stand behind the numbers of a table: the draw of each, and the values that tell draws apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from daft_domainbed.results.cells import Row, Table
from daft_domainbed.results.records import Run
from daft_domainbed.results.selection import SELECTION_WORDS
from daft_domainbed.results.sweeps import Sweep
from daft_domainbed.results.tables import Results
from daft_domainbed.results.values import as_dict, as_list


def format_draws(results: Results) -> str:
    """Return a paragraph for each table that was asked for, and before them what another sweep chose."""
    blocks = ["\n".join(["Settings of the students:", *chosen])] if (chosen := list_chosen(results.sweep)) else []
    for table in results.tables:
        if table.is_asked:
            lines = [
                line for row in table.rows if row.role == "student" for line in _list_row(results.sweep, table, row)
            ]
            title = f"{table.dataset}: {SELECTION_WORDS[table.selection].name}, draws behind the numbers"
            blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks) + "\n"


def _list_row(sweep: Sweep, table: Table, row: Row) -> Iterator[str]:
    """Yield a line a held-out domain, then a line for each draw that is not the defaults."""
    seen: dict[tuple[int, int], Run] = {}
    for cell in row.asked:
        draws = []
        for number in cell.numbers:
            key = number.choice.run.key
            seen[key.trial_seed, key.hparams_seed] = number.choice.run
            draws.append(f"{name_draw(key.hparams_seed)} in trial {key.trial_seed}")
        yield f"  {row.label} on {cell.env}: {', '.join(draws) or 'nothing'}"
    settings = {run.setting for run in seen.values()}
    own = [run for run in sweep.runs if (run.key.dataset, run.key.algorithm) == (table.dataset, row.algorithm)]
    varying = list_varying([run for run in own if run.setting in settings])
    for (trial, draw), run in sorted(seen.items()):
        if draw:
            values = {name: run.hparams.get(name) for name in varying}
            yield f"    draw {draw} in trial {trial}: {write_values(values)}"


def name_draw(number: int) -> str:
    """Return what a draw is called.

    Example:
        >>> name_draw(0), name_draw(3)
        ('defaults', 'draw 3')
    """
    return f"draw {number}" if number else "defaults"


def list_varying(runs: Sequence[Run]) -> list[str]:
    """Return the hyperparameters that differ between the draws of an algorithm."""
    names = sorted({name for run in runs for name in run.hparams})
    return [name for name in names if len({repr(run.hparams.get(name)) for run in runs}) > 1]


def write_values(values: Mapping[str, Any]) -> str:
    """Return hyperparameters in a line.

    Example:
        >>> write_values({"lr": 0.00012345678, "batch_size": 16})
        'batch_size 16, lr 0.0001235'
    """
    written = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sorted(values.items())
    )
    return ", ".join(written) or "no value"


def list_chosen(sweep: Sweep) -> list[str]:
    """Return a line for each setting that another sweep chose for this one's students."""
    lines = []
    sources = [as_dict(args.get("chosen")) for args in (sweep.plan.list_args() if sweep.plan else ())]
    for chosen, setting in [(one, as_dict(setting)) for one in sources for setting in as_list(one.get("settings"))]:
        env, number = setting.get("test_env"), setting.get("hparams_seed")
        names = sweep.environments.get(str(setting.get("dataset")), [])
        where = f" on {names[env]}" if isinstance(env, int) and env < len(names) else ""
        draw = f"draw {number} of trial {setting.get('trial_seed')}" if number else "defaults"
        values = write_values(as_dict(setting.get("hparams"))) if number else ""
        lines.append(
            f"  {setting.get('algorithm')}{where}: {draw} in {chosen.get('from')}" + (f" ({values})" if values else "")
        )
    return list(dict.fromkeys(lines))
