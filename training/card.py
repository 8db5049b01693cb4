"""The model card: README.md of a checkpoint folder, generated from its model.json and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

KINDS = {
    "exact": "the exact log-likelihood",
    "bound": "a lower bound on the log-likelihood (so bits/dim is an upper bound)",
    "estimate": "an estimate of the log-likelihood, with a standard error",
    "unnormalised": "an energy: comparable between images, not between models",
}


def card(name: str, about: Mapping[str, Any]) -> str:
    """Markdown. about: model.json, with its metrics."""
    spec, space, data, recipe = about["spec"], about["space"], about["data"], about.get("recipe", {})
    conditions = "class-conditional " if space["labels"] else "captioned " if space["captions"] else ""
    rows = ", a row for each class" if space["labels"] else ", a row for each caption" if space["captions"] else ""
    colours = "grey" if space["channels"] == 1 else "colour"
    sections = [
        f"# {name}",
        f"A {conditions}`{about['family']}` of {space['width']}×{space['height']} {colours} images, "
        f"trained on {data['name']}" + (f" by the recipe `{recipe['name']}`." if "name" in recipe else "."),
        "![samples](samples.png)",
        f"Samples at the default settings, seed 0, none left out{rows}.",
        "## What it was measured to do",
        _metrics(about["metrics"]),
        "`real` is what real images reach under the same measurement, as many, of the same classes. Guidance and low "
        "temperatures can pass it in density and label agreement by keeping to typical images, which costs coverage.",
        "## What a request may set",
        _accepts(spec),
        _likelihood(spec),
        "## How to use it",
        f"```\npython -m service serve\ncurl -s localhost:8000/generate -H 'Accept: image/png' \\\n"
        f"     --json '{json.dumps(_example(name, space))}' > samples.png\n```",
        "## What it learnt from, and how",
        _training(about, data, recipe),
        "## What to be careful about",
        _cautions(about["metrics"], spec),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| | value | better | real | n | on |", "|---|---|---|---|---|---|"]
    for name, m in metrics.items():
        value = f"{m['value']:.4g}" + (f" ± {m['stderr']:.2g}" if "stderr" in m else "")
        notes = ", ".join(str(m[k]) for k in ("kind", "note") if m.get(k))
        on = m["data"] + (f" ({notes})" if notes else "")
        real = f"{m['real']:.4g}" if "real" in m else ""
        real += f" ± {m['real_std']:.2g}" if m.get("real_sets", 0) > 1 else ""
        lines.append(
            f"| {name.replace('_', ' ')} | {value} {m['unit']} | {m['direction']} | {real} | {m['n']} | {on} |"
        )
    return "\n".join(lines)


def _accepts(spec: Mapping[str, Any]) -> str:
    lines = ["| field | default | range |", "|---|---|---|"]
    for field, schema in spec["accepts"].items():
        if "enum" in schema:
            allowed = ", ".join(map(str, schema["enum"]))
        elif "minimum" in schema:
            allowed = f"{schema['minimum']} … {schema['maximum']}"
        elif "anyOf" in schema:
            allowed = ", ".join(f"{i} {name}" for i, name in enumerate(schema["anyOf"][1]["enum"]))
        else:
            allowed = f"text, at most {schema['maxLength']} characters"
        unit = f" ({schema['description']})" if "description" in schema else ""
        lines.append(f"| {field} | {schema.get('default', 'none')} | {allowed}{unit} |")
    return "\n".join(lines)


def _likelihood(spec: Mapping[str, Any]) -> str:
    likelihood = spec["likelihood"]
    if likelihood is None:
        return "It has no likelihood: `/score` refuses it."
    note = f", {likelihood['note']}" if likelihood["note"] else ""
    return f"`/score` returns {KINDS[likelihood['kind']]}; dequantisation: {likelihood['dequantisation']}{note}."


def _example(name: str, space: Mapping[str, Any]) -> dict[str, Any]:
    request: dict[str, Any] = {"model": name, "n": 4, "seed": 7}
    if space["labels"]:
        request["label"] = space["labels"][-1]
    if space["captions"]:
        request["prompt"] = "a red circle"
    return request


def _training(about: Mapping[str, Any], data: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{count:,} {split}" for split, count in data["splits"].items())
    lines = [f"- data: {data['name']} ({splits}), sha256 `{data['sha256'][:16]}…`"]
    if recipe and recipe["steps"] == 0:
        lines.append(f"- learnt from the whole of the training data at once, without gradients; seed {recipe['seed']}")
    elif recipe:
        lines.append(
            f"- {recipe['steps']:,} steps of {recipe['batch_size']} images, "
            f"{recipe['precision']}, seed {recipe['seed']}"
        )
    if "teacher" in about:
        lines.append(f"- teacher: {about['teacher']['name']}, weights sha256 `{about['teacher']['sha256'][:16]}…`")
    lines.append(f"- network and objective: `{json.dumps(about['config'])}`")
    if about.get("revision"):
        lines.append(f"- revision `{about['revision'][:12]}`")
    return "\n".join(lines)


def _cautions(metrics: Mapping[str, Mapping[str, Any]], spec: Mapping[str, Any]) -> str:
    lines = []
    copies = metrics.get("memorised")
    if copies is not None:
        verdict = (
            "more than chance explains: some samples may be copies of training images"
            if copies["p_value"] < 0.01
            else "no more than chance explains"
        )
        lines.append(
            f"- Memorisation: {copies['value']:.1%} of {copies['n']} samples stand out by their nearness to one "
            f"training image, where {copies['real']:.1%} of unseen images do (p = {copies['p_value']:.2g}): {verdict}. "
            "`neighbours.png` shows the eight that stand out most, each left of its nearest training images."
        )
    if spec["likelihood"] is not None:
        lines.append(
            "- A likelihood is no anomaly score: simpler images of another kind can be likelier than the data's own. "
            "Use the calibrated p-value that `/score` gives beside it."
        )
    lines.append(
        "- Fréchet distance, density and coverage are taken in features of a small classifier of this very data set: "
        "compare them between models of this project only, and only at equal n."
    )
    return "\n".join(lines)
