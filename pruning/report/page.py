"""Rendering of the report as one self-contained HTML file."""

from __future__ import annotations

import jinja2
import yaml

from image_classification.plain_data import Plain
from pruning.costs import cost_named, cost_names
from pruning.report import charts
from pruning.report.content import Content
from pruning.report.rewrite_tables import score_table, width_table
from pruning.report.verdict import headline_of, verdict
from pruning.report.wording import NBSP, change, counted, date, duration, number, percent

_ACCURACY_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP",
    "f1": "F1",
    "map_images": "mAP over images",
    "f1_images": "F1 over images",
    "loss": "loss",
}
_POINT_NAMES = {
    "point": "pointing game",
    "point_15px": "pointing game, 15 px",
    "auc": "pixel AUC",
    "energy": "energy inside",
}


def render(content: Content) -> str:
    """Render the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pruning.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, percent, change, duration, date, counted)
    environment.filters |= {each.__name__: each for each in filters}
    plain = content.plain
    return environment.get_template("report.html.j2").render(
        report=plain,
        title=f"Pruning report: {plain['config'].get('arch', 'network')}",
        verdict=verdict(plain),
        cards=_cards(plain),
        charts=_charts(content),
        gallery=content.gallery,
        accuracy_names=[name for name in _ACCURACY_NAMES if any(name in row for row in plain["accuracy"])],
        names=_ACCURACY_NAMES | _metric_names(content) | _POINT_NAMES,
        localization=_localization(plain),
        speed=_speed(plain),
        classes=_classes(plain),
        said=_said,
        config=yaml.safe_dump(plain["config"], sort_keys=True, allow_unicode=True),
    )


def _metric_names(content: Content) -> dict[str, str]:
    """Return metric → its name within a sentence; the metric itself if it is not registered here."""
    budgets = [row["metric"] for row in content.plain["budget"]]
    recorded = [metric for record in content.plain["rewrites"] for metric in record["costs"]]
    known = {name: cost_named(name).short for name in cost_names()}
    return {name: name for name in (*budgets, *recorded)} | known


def _cards(plain: Plain) -> list[dict[str, str]]:
    """Return the figures that readers look for first."""
    cards = []
    costs = {row["metric"]: row for row in plain["costs"]}
    for metric in ("macs", "params"):
        row = costs[metric]
        amounts = [
            number(value / row["divisor"]) for value in (row["before"], row["after"]) if value is not None
        ]
        cards.append(
            {
                "name": cost_named(metric).short,
                "value": change(row["after"], row["before"]) if row["before"] else amounts[-1],
                "detail": f"{' → '.join(amounts)} {row['unit']}",
            }
        )
    accuracy = plain["accuracy"]
    headline = headline_of(accuracy)
    values = [(row["when"], row[headline]) for row in accuracy if headline in row]
    if values:
        detail = ", ".join(f"{value:.1f} {when}" for when, value in values[:-1])
        cards.append(
            {
                "name": _ACCURACY_NAMES[headline] + " now",
                "value": f"{values[-1][1]:.1f} %",
                "detail": detail or values[-1][0],
            }
        )
    points = _localization(plain)
    if points and points[0]["figures"]:
        first = points[0]["figures"][0]
        cards.append(
            {
                "name": f"{first['name']}, {points[0]['method']}",
                "value": first["after"],
                "detail": f"{first['before']} before pruning",
            }
        )
    speeds = [row for row in _speed(plain) if row["ratio"] is not None]
    if speeds:
        ratios = sorted({f"{table['ratio']:.2f}" for table in speeds}, key=float)
        value = "–".join(dict.fromkeys((ratios[0], ratios[-1]))) + "×"
        details = [f"batch {table['batch_size']}: {table['detail']}" for table in speeds]
        cards.append({"name": "speed", "value": value, "detail": "; ".join(details)})
    return cards


def _charts(content: Content) -> dict[str, dict[str, str] | None]:
    plain = content.plain
    targets = {row["metric"]: row["asked"] for row in plain["budget"]}
    records = plain["rewrites"]
    numbers = [record["number"] for record in records]
    groups, shares = width_table(records)
    scored, values = score_table(records, content.course)
    return {
        "trajectory": charts.trajectory(content.course, targets),
        "widths": charts.widths(_shown_widths(plain["widths"])),
        "rewrites": charts.rewrites(shares, groups, numbers),
        "scores": charts.scores(values, scored, numbers),
        "sensitivity": charts.sensitivity(plain["sensitivity"]) if plain["sensitivity"] else None,
    }


def _shown_widths(rows: list[Plain]) -> list[Plain]:
    """Return all layers of a network of ordinary depth; for a very deep one, only those that changed."""
    return rows if len(rows) <= 80 else [row for row in rows if row["before"] != row["after"]]


def _localization(plain: Plain) -> list[Plain]:
    """Return, per method, the figures of both networks side by side."""
    found = plain["explanations"]
    if not found or "localization" not in found:
        return []
    tables = []
    for method in found["methods"]:
        rows = {row["network"]: row for row in found["localization"] if row["method"] == method}
        figures = [
            {
                "name": name,
                "before": _figure(key, rows["original"][key]),
                "after": _figure(key, rows["pruned"][key]),
            }
            for key, name in _POINT_NAMES.items()
        ]
        counts = f"{rows['original']['predicted']:,} and {rows['pruned']['predicted']:,} of {rows['pruned']['pairs']:,}"
        tables.append({"method": method, "figures": figures, "counts": counts})
    return tables


def _classes(plain: Plain) -> list[Plain]:
    """Return rows of classes with the difference in points, the largest first."""
    rows = plain["predictions"]["classes"] if plain["predictions"] else []
    changes = sorted(rows, key=lambda row: -abs(row["after"] - row["before"]))
    return [
        {**row, "difference": f"{100 * (row['after'] - row['before']):+.1f}".replace("-", "−")}
        for row in changes
    ]


def _said(answer: Plain) -> str:
    """Format a network's prediction for an image."""
    sure = f"{100 * answer['probability']:.0f} %".replace(" ", NBSP)
    return f"{answer['name']} {sure}{NBSP}{'✓' if answer['right'] else '✗'}"


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if key == "auc" else f"{100 * value:.1f} %"


def _speed(plain: Plain) -> list[Plain]:
    """Return, per batch size, the rows of both networks and the speed-up of the second."""
    tables = []
    for batch_size in dict.fromkeys(row["batch_size"] for row in plain["speed"]):
        rows = [row for row in plain["speed"] if row["batch_size"] == batch_size]
        ratio = rows[0]["p50"] / rows[1]["p50"] if len(rows) == 2 else None
        detail = " → ".join(number(1000 * row["p50"]) for row in rows) + " ms"
        tables.append({"batch_size": batch_size, "rows": rows, "ratio": ratio, "detail": detail})
    return tables
