"""The report as one HTML file: everything inside, nothing fetched."""

from __future__ import annotations

import math

import jinja2
import yaml

from pruning.costs import cost_named, cost_names
from pruning.report import Plain, charts
from pruning.report.content import Content, score_table, width_table

NBSP = "\N{NO-BREAK SPACE}"
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
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pruning.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "change": change, "duration": duration}
    plain = content.plain
    return environment.get_template("report.html.j2").render(
        report=plain,
        title=f"Pruning report: {plain['config'].get('arch', 'network')}",
        cards=_cards(plain),
        charts=_charts(content),
        gallery=content.gallery,
        accuracy_names=[name for name in _ACCURACY_NAMES if any(name in row for row in plain["accuracy"])],
        names=_ACCURACY_NAMES | _metric_names(content) | _POINT_NAMES,
        localization=_localization(plain),
        speed=_speed(plain),
        config=yaml.safe_dump(plain["config"], sort_keys=True, allow_unicode=True),
    )


def _metric_names(content: Content) -> dict[str, str]:
    """Metric → what it is called within a sentence; its own name where it is not registered here."""
    budgets = [row["metric"] for row in content.plain["budget"]]
    recorded = [metric for record in content.plain["rewrites"] for metric in record["costs"]]
    known = {name: cost_named(name).short for name in cost_names()}
    return {name: name for name in (*budgets, *recorded)} | known


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits, and thousands apart; – for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal."""
    return "–" if share is None else f"{100 * share:.1f}{NBSP}%"


def change(after: float | None, before: float | None) -> str:
    """The difference in percent of what was before."""
    if after is None or not before:
        return "–"
    return f"{100 * (after / before - 1):+.1f}{NBSP}%".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, with the unit."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cards(plain: Plain) -> list[dict[str, str]]:
    """The figures that readers look for first."""
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
    present = {name for row in accuracy for name in row}
    headline = next((name for name in ("map", "map_images") if name in present), "top1")
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
        ratios = [f"{table['ratio']:.2f}×" for table in speeds]
        details = [f"batch {table['batch_size']}: {table['detail']}" for table in speeds]
        cards.append({"name": "speed", "value": " … ".join(ratios), "detail": "; ".join(details)})
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
    }


def _shown_widths(rows: list[Plain]) -> list[Plain]:
    """All layers of a network of ordinary depth; of a very deep one those that changed."""
    return rows if len(rows) <= 80 else [row for row in rows if row["before"] != row["after"]]


def _localization(plain: Plain) -> list[Plain]:
    """Per method: figures of both networks side by side."""
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


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if key == "auc" else f"{100 * value:.1f} %"


def _speed(plain: Plain) -> list[Plain]:
    """Per batch size: rows of both networks, and how much faster the second is."""
    tables = []
    for batch_size in dict.fromkeys(row["batch_size"] for row in plain["speed"]):
        rows = [row for row in plain["speed"] if row["batch_size"] == batch_size]
        ratio = rows[0]["p50"] / rows[1]["p50"] if len(rows) == 2 else None
        detail = " → ".join(f"{1000 * row['p50']:.2f}" for row in rows)
        detail += f" ms a batch, median of {rows[0]['num_batches']}"
        tables.append({"batch_size": batch_size, "rows": rows, "ratio": ratio, "detail": detail})
    return tables
