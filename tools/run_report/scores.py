"""What the phase `test` measured, as HTML: the metrics of the samples, and those of a cascade's stages."""

from collections.abc import Mapping
from typing import Any

from run_report import page as html
from run_report.run import Run
from speedit_plugins.trainer import results


def tested(run: Run) -> str:
    """Tables of the metrics, with their features and the sizes of the sets, and what was compared."""
    found = run.json(results.TEST)
    if found is None:
        return html.paragraph(f"No {results.TEST}: the phase test was not run.", is_quiet=True)
    if "figures" not in found:
        return html.paragraph(
            f"{results.TEST} was written by an older version: run the phase test again.", is_quiet=True
        )
    stages = found.get("stages", {})
    sources = {"samples": f"{found['samples']}{run.metrics_age}"}
    if found["reference"] is not None:
        sources["reference"] = str(found["reference"])
    return _of_samples(run) + (_of_stages(stages) if stages else "") + html.facts(sources)


def _of_samples(run: Run) -> str:
    if not run.test_metrics:
        return html.paragraph(
            f"{results.TEST} has no figures of the samples: the phase test ended before it measured them.",
            is_quiet=True,
        )
    rows = [
        (
            name,
            html.short(metric["value"]),
            str(metric["features"]),
            f"{metric['num_samples']:,}",
            "-" if metric["num_reference"] is None else f"{metric['num_reference']:,}",
        )
        for name, metric in run.test_metrics.items()
    ]
    return html.table(("metric", "value", "features", "samples", "reference"), rows)


def _of_stages(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each set of a cascade's stages, and a column for each metric that one of them has."""
    names = dict.fromkeys(name for stage in stages.values() for name in stage["figures"])
    rows = []
    for title, stage in stages.items():
        given = f"stage {stage['number'] - 1}" if stage["inputs"] == "stage" else stage["inputs"]
        values = {name: html.short(metric["value"]) for name, metric in stage["figures"].items()}
        about = (title, str(stage["number"]), str(stage["image_size"]), given)
        rows.append((*about, *(values.get(name, "-") for name in names)))
    return html.table(("set of a stage", "stage", "pixels", "input", *names), rows)
