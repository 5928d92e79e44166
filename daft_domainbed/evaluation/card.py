"""One page about one model, in Markdown, from its json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from daft_domainbed.results.robustness import format_radius


def format_card(model: Mapping[str, Any]) -> str:
    """Return a model's card."""
    held_out = {model["environments"][i] for i in model["test_envs"]}
    n = f"at most {model['n_examples']}" if model["n_examples"] else "all"
    lines = [
        f"# {model['algorithm']} on {model['dataset']}, {', '.join(sorted(held_out))} held out",
        "",
        f"`{model['checkpoint']}`, suite {model['suite']}, {n} examples of an environment, seed {model['seed']}. "
        "Accuracies are percentages; radii are in pixel units, of pixels from 0 to 1.",
        "",
        *_list_flags(model["flags"]),
        *_make_accuracy_table(model, held_out),
        *_make_curve_tables(model["curves"]),
        *_list_corruptions(model["corruptions"]),
        *_list_confidence(model),
    ]
    if model["skipped"]:
        lines += [f"Not asked: {'; '.join(model['skipped'])}.", ""]
    return "\n".join(lines)


def make_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a Markdown table's lines, numbers with one decimal, and an empty line."""
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(map(_format, row))} |" for row in rows]
    return [*lines, ""]


def _format(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _list_flags(flags: Sequence[Mapping[str, str]]) -> list[str]:
    if not flags:
        return ["No sign of masked gradients, randomness or outputs that are no logits.", ""]
    lines = ["**The robust accuracies below are not to be believed:**", ""]
    return [*lines, *(f"- `{flag['flag']}`: {flag['detail']}." for flag in flags), ""]


def _make_accuracy_table(model: Mapping[str, Any], held_out: set[str]) -> list[str]:
    """Return a row an environment: clean, the worst class, each attack at the fixed radius."""
    columns: dict[tuple[str, str], str] = {}
    for row in model["attacks"]:
        if not row["name"].startswith("pgd-") or "x" in row["name"]:
            columns[row["name"], row["norm"]] = f"{row['name']}, {row['norm']} {format_radius(row['eps'])}"
    values = {(row["env"], row["name"], row["norm"]): row["accuracy"] for row in model["attacks"]}
    rows = [
        [
            f"{env} (held out)" if env in held_out else env,
            model["clean"][env],
            model["worst_class"][env],
            *(values.get((env, *column)) for column in columns),
        ]
        for env in model["environments"]
    ]
    lines = ["## Accuracy", "", *make_table(["environment", "clean", "worst class", *columns.values()], rows)]
    asked = [row["ran"] for row in model["attacks"] if row["name"] == "autoattack"]
    ran = dict.fromkeys(name for names in asked for name in names)  # an attack is spared where nothing is left
    return lines + ([f"AutoAttack ran {', '.join(ran) or 'nothing, since nothing was left'}.", ""] if asked else [])


def _make_curve_tables(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return accuracy against budget, a table a norm; of two attacks the stronger, which is the exact one."""
    lines = ["## Accuracy against budget", ""]
    for norm in dict.fromkeys(curve["norm"] for curve in curves):
        best = {curve["env"]: curve for curve in curves if curve["norm"] == norm}  # "minimal" comes last
        attack = next(iter(best.values()))["attack"]
        head = [f"{norm}, {attack}", *(format_radius(eps) for eps in next(iter(best.values()))["eps"])]
        lines += make_table(head, [[env, *curve["accuracy"]] for env, curve in best.items()])
    return lines


def _list_corruptions(corruptions: Mapping[str, Any] | None) -> list[str]:
    if corruptions is None:
        return []
    rows = [[name.replace("_", " "), *values] for name, values in corruptions["by_name"].items()]
    return [
        "## Common corruptions of held-out domains",
        "",
        f"Mean {corruptions['mean']:.1f}.",
        "",
        *make_table(["corruption", *(f"severity {k}" for k in range(1, 6))], rows),
    ]


def _list_confidence(model: Mapping[str, Any]) -> list[str]:
    """Return calibration, detection and fidelity."""
    calibration, lines = model["calibration"], []
    if calibration:
        lines += [
            "## Calibration",
            "",
            f"Expected calibration error {calibration['ece']:.4f} ({calibration['n_bins']} bins, all examples at "
            f"once), {calibration['ece_scaled']:.4f} at the temperature {calibration['temperature']:.3f} that fits the "
            "training domains best.",
            "",
        ]
    if model["ood"]:
        rows = [[row["set"], row["score"], f"{row['auroc']:.4f}", f"{row['fpr95']:.4f}"] for row in model["ood"]]
        lines += [
            "## Telling outside images apart",
            "",
            "Own images are those of held-out domains, and are the positive class: FPR95 is the share of outside "
            "images that pass where 95 % of the own ones pass.",
            "",
            *make_table(["set", "score", "AUROC", "FPR95"], rows),
        ]
    if fidelity := model["fidelity"]:
        lines += ["## Fidelity to the teacher", "", _describe_fidelity(fidelity)]
        others = {slot: values for slot, values in fidelity.items() if isinstance(values, dict)}
        lines += [f"{slot}: {_describe_fidelity(values)}" for slot, values in others.items()]
        lines.append("")
    return lines


def _describe_fidelity(values: Mapping[str, Any]) -> str:
    told = (f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
    return f"{values['teacher']}: {', '.join(told)}"
