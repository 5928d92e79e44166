"""A page about a model that is given away: what it is, its numbers and where they come from, what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from daft_domainbed.arguments import MOVABLE, name_dataset
from daft_domainbed.export.source import Source
from daft_domainbed.methods import PLAIN
from daft_domainbed.results.report import write_command
from daft_domainbed.runtime.layout import list_teachers, read_records


def format_card(source: Source, checks: Mapping[str, float]) -> str:
    """Return the card in Markdown.

    Args:
        source: The model's.
        checks: By file, the largest difference of logits from the model's own.
    """
    records = read_records(source.path.parent)
    args = source.content["args"]
    algorithm, dataset = args.get("algorithm", PLAIN), name_dataset(str(args.get("dataset")))
    first = records[0] if records else {}
    environments = list(first.get("environments") or [])
    held_out = [_name(environments, env) for env in args.get("test_envs") or []]
    lines = [
        f"# {algorithm} on {dataset}",
        "",
        f"An image classifier, trained by DomainBed's protocol with {' and '.join(held_out) or 'no domain'} held out.",
        "",
        "## Use",
        "",
        "```python",
        "from daft_domainbed import load_model",
        "",
        'model = load_model(".")  # this folder',
        'model.predict(["a.png"])[0].probabilities',
        "```",
        "",
        f"It takes pixels from 0 to 1, {' x '.join(map(str, source.input_shape))}, and normalises them itself. "
        + _list_classes(source),
        "",
        *_list_numbers(source, records, environments),
        *_list_origin(source, first),
        "## Intended use, and limits",
        "",
        f"For images like those of {dataset}, and for research on what changes when the domain does. The number of a "
        "held-out domain is what to expect of a new domain at best: nothing is known of others. The model always names "
        "one of its classes, also for an image that shows none of them, and its probabilities are not calibrated. It "
        "was not examined for harm to people; do not let it decide about them.",
        "",
        "## Files",
        "",
        *(
            f"- `{name}`: largest difference of logits from the model {_format_check(value)}"
            for name, value in checks.items()
        ),
        "- `config.json`: what the input is, and what the model is built of",
        "",
    ]
    return "\n".join(lines)


def _name(environments: list[str], env: int) -> str:
    return environments[env] if env < len(environments) else f"domain {env}"


def _format_check(value: float) -> str:
    return "not known" if value != value else f"{value:.2g}"


def _list_classes(source: Source) -> str:
    n = source.content["model_num_classes"]
    names = source.class_names
    if names is None:
        return f"Its {n} classes have no names in the checkpoint."
    return f"Its {n} classes: {', '.join(names[:50])}{', ...' if n > 50 else ''}."


def _list_numbers(source: Source, records: list[dict[str, Any]], environments: list[str]) -> list[str]:
    """Return the accuracies of the record that was written with the checkpoint."""
    step = source.content.get("step")
    own = next((record for record in records if record.get("step") == step), None)
    lines = ["## Numbers", ""]
    if own is None:
        return [*lines, "No record lies beside the checkpoint.", ""]
    held_out = source.content["args"].get("test_envs") or []
    lines += ["Accuracy in percent, on what was trained on (in) and on what was put aside (out); one run.", ""]
    lines += ["| domain | in | out |", "| --- | ---: | ---: |"]
    for env in range(len(environments)):
        name = f"{environments[env]} (held out: neither was trained on)" if env in held_out else environments[env]
        values = (own.get(f"env{env}_{part}_acc") for part in ("in", "out"))
        cells = (f"{100 * value:.1f}" if isinstance(value, float) else "-" for value in values)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Checkpoint of step {step}; training-domain validation chooses without the held-out domain.", ""]
    return lines


def _list_origin(source: Source, first: Mapping[str, Any]) -> list[str]:
    args = {name: value for name, value in source.content["args"].items() if name not in MOVABLE}
    args["dataset"] = name_dataset(str(args.get("dataset")))
    lines = ["## Where it comes from", "", "```sh", write_command(args), "```", ""]
    machine = first.get("machine") or {}
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("commit", "torch", "python", "cpu", "gpu") if name in machine
    )
    lines += [f"{first['started']}; {versions}.", ""] if "started" in first else []
    for prefix, facts in list_teachers(first).items():
        lines += [
            f"Its {prefix.replace('_', ' ')}: {facts.get('algorithm')}, SHA-256 {str(facts.get('sha256'))[:16]}.",
            "",
        ]
    return [*lines, f"Data: {args['dataset']}, whose own licence counts for what is made of it.", ""]
