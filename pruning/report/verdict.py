"""The report's summary: what was requested, what was reached, what is unknown, and which file to deploy."""

from __future__ import annotations

from image_classification.plain_data import Plain
from pruning.costs import cost_named, cost_names
from pruning.report.wording import change, counted, interval, number, percent

#: Key of a figure → its name; the first one present in a run is the headline.
HEADLINES = {"map": "mAP", "map_images": "mAP over images", "top1": "top-1"}
#: Load per core above which something else was running: the measurement alone keeps at most all cores busy.
_BUSY = 1.5


def headline_of(accuracy: list[Plain]) -> str:
    """Return the figure by which a run is assessed."""
    present = {name for row in accuracy for name in row}
    return next((name for name in HEADLINES if name in present), "top1")


def verdict(plain: Plain) -> Plain:
    """Compose the summary.

    Returns:
        `lead`, a sentence; `lines`, pairs of a subject and a statement; `path` and `code` of the network to deploy.
    """
    lines = [
        ("Accuracy", _accuracy(plain)),
        ("Same answers", _agreement(plain)),
        *((f"Latency, batch {row['batch']}", row["text"]) for row in _latency(plain)),
        ("Busy machine", _other_work(plain)),
    ]
    path = plain["network"]
    return {
        "lead": _lead(plain),
        "lines": [(name, text) for name, text in lines if text],
        "path": path,
        "code": f'from pruning import load_pruned\n\nmodel = load_pruned("{path}").eval()',
    }


def _lead(plain: Plain) -> str:
    config = plain["config"]
    where = f"{config.get('arch', 'The network')} on {config.get('data') or 'its data'}"
    words = {name: cost_named(name).short for name in cost_names()}
    asked = [
        f"{percent(row['reached'])} of the {words.get(row['metric'], row['metric'])} "
        f"(budget: {percent(row['asked'])})"
        for row in plain["budget"]
    ]
    if asked:
        return f"{where} keeps {' and '.join(asked)}."
    macs = next(row for row in plain["costs"] if row["metric"] == "macs")
    if macs["before"] is None or macs["before"] == macs["after"]:
        return f"{where}: no channels were removed."
    return f"{where}: {change(macs['after'], macs['before'])} MACs."


def _accuracy(plain: Plain) -> str:
    """Describe the last figure with its interval, the one before pruning, and whether the two are comparable."""
    key = headline_of(plain["accuracy"])
    rows = [row for row in plain["accuracy"] if key in row]
    if not rows:
        return ""
    last, first = rows[-1], rows[0]
    text = f"{last[key]:.1f} % {HEADLINES[key]} {last['when']}"
    count = plain["num_validation"]
    if key == "top1" and count:
        low, high = interval(last[key] / 100, count)
        text += f" (95 % interval {100 * low:.1f} … {100 * high:.1f} % over {count:,} images)"
    if first is last:
        return f"{text}."
    text += f"; {first[key]:.1f} % {first['when']}."
    if first["epochs"] is not None and first["epochs"] == last["epochs"]:
        return f"{text} Both networks were trained for {counted(last['epochs'], 'epoch')}."
    if first["epochs"] is None or last["epochs"] is None:
        return f"{text} Whether both were trained as long is not known."
    return (
        f"{text} They were trained for {last['epochs']} and {counted(first['epochs'], 'epoch')}: without "
        "an unpruned network trained as long, this is not what pruning costs."
    )


def _agreement(plain: Plain) -> str:
    found = plain["predictions"]
    if not found:
        return ""
    low, high = interval(found["agreement"], found["num_images"])
    return (
        f"Both networks name the same class for {percent(found['agreement'])} of {found['num_images']:,} validation "
        f"images (95 % interval {100 * low:.1f} … {100 * high:.1f} %)."
    )


def _latency(plain: Plain) -> list[Plain]:
    rows = []
    for batch in dict.fromkeys(row["batch_size"] for row in plain["speed"]):
        found = [row for row in plain["speed"] if row["batch_size"] == batch]
        middle = " → ".join(number(1000 * row["p50"]) for row in found)
        slow = " → ".join(number(1000 * row["p95"]) for row in found)
        times = f"{found[0]['p50'] / found[1]['p50']:.2f}× as fast: " if len(found) == 2 else ""
        text = f"{times}{middle} ms, median of {found[0]['num_batches']} batches; 95th percentile {slow} ms."
        rows.append({"batch": batch, "text": text})
    return rows


def _other_work(plain: Plain) -> str:
    """Return a warning if the machine was busy while latencies were measured; otherwise an empty string."""
    load = max((row["load"] or 0.0 for row in plain["speed"]), default=0.0)
    if load < _BUSY:
        return ""
    return f"{load:.1f} processes per core while latencies were measured; measure them again on an idle one."
