"""Recurrent layers that run as one operator: input and hidden state make gates, all of the same hidden channels."""

from __future__ import annotations

import math

import numpy as np

from pruning.engine.labeller import Labeller, along, origins
from pruning.engine.labels import Value
from pruning.engine.operators.register import arguments, operator
from pruning.engine.traces import Operation, Ref


@operator("mkldnn_rnn_layer")
def lstm_level(run: Labeller, operation: Operation) -> list[Value]:
    """One level and direction of an LSTM; tensors (T, N, C), weights (4H, C) and (4H, H), vectors (4H,)."""
    named = arguments(operation)
    weights = [named["weight0"], named["weight1"]]
    vectors = [named["weight2"], named["weight3"]] if named["has_biases"] else []
    hidden = _hidden(run, operation, named["input"], weights, vectors, [named["hx_"], named["cx_"]])
    values = []
    for out in operation.outputs[:3]:
        shape = () if out is None else run.info(out).shape
        values.append(Value(shape, (along(hidden, len(shape) - 1, len(shape)),)))
    return [*values, *(Value(run.info(out).shape) for out in operation.outputs[3:] if out is not None)]


def _hidden(
    run: Labeller,
    operation: Operation,
    signal: Ref,
    weights: list[Ref],
    vectors: list[Ref],
    states: list[Ref],
) -> np.ndarray:
    """Unite what meets in a recurrent level.

    Returns:
        (H,) labels of the hidden channels.
    """
    x = run.at(signal)
    last = len(x.shape) - 1
    where = f"{run.describe(operation)} reads channels that cannot be removed"
    run.freeze_value(x, f"{run.describe(operation)} runs along it", tuple(range(last)))
    from_input, from_hidden = (run.at(weight) for weight in weights)
    columns = run.collapse(from_input, 1)
    width = from_hidden.shape[1]
    incoming = run.collapse(x, last)
    run.table.unite(incoming, columns, where)
    rows = run.collapse(from_input, 0)
    for ref in (weights[1], *vectors):
        run.table.unite(rows, run.collapse(run.at(ref), 0), where)
    hidden = run.table.unite_along(rows.reshape(-1, width), (0,)).reshape(-1)
    run.table.unite(hidden, run.collapse(from_hidden, 1), where)
    for ref in states:
        state = run.at(ref)
        if state.is_solid(len(state.shape) - 1):
            run.table.unite(hidden, run.collapse(state, len(state.shape) - 1), where)
    positions = math.prod(x.shape[:-1])
    for consumed, weight in ((incoming, weights[0]), (hidden, weights[1])):
        made_of = next(origins(run.trace, weight.value), None)
        run.note_consumed(operation, consumed)
        run.note_layer(operation, positions, (rows, consumed), rows, consumed, made_of, positions)
    return hidden
