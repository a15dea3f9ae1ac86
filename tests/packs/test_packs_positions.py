"""Positions: every selection survives, real ones are small, and what no writer wrote is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers_cases import for_every
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PackDamaged
from pipeline.packs import LayerShape, decode_positions, encode_positions
from pipeline.packs import columns as columns_module
from pipeline.packs.coder import Decoder, Encoder
from pipeline.packs.columns import Rows, block_bounds, code_columns, ranks_of_first, runs
from pipeline.packs.positions import CODED, PLAIN, _coded
from pipeline.packs.tracks import CONCENTRATION, DISCOUNT

Layers = tuple[list[np.ndarray], list[LayerShape]]


def per_row(
    rows: int, columns: int, top_k: int, rng: np.random.Generator, skew: float = 1.5
) -> np.ndarray:
    """`top_k` indices in every row; some columns are chosen by many rows."""
    odds = (1 + np.arange(columns)) ** -skew
    score_OI = rng.random((rows, columns)) ** (1 / odds[rng.permutation(columns)])
    chosen_OK = np.argsort(-score_OI, axis=1)[:, :top_k]
    return np.sort((np.arange(rows)[:, None] * columns + chosen_OK).ravel())


def by_layer(rows: int, columns: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices anywhere; some rows keep many, most none."""
    odds_OI = np.outer((1 + np.arange(rows)) ** -1.0, (1 + np.arange(columns)) ** -1.0)
    return np.sort(np.argsort(-(rng.random((rows, columns)) ** (1 / odds_OI)).ravel())[:count])


def layers_of(*indices_and_shapes: tuple[np.ndarray, int, int]) -> Layers:
    indices = [each for each, _, _ in indices_and_shapes]
    return indices, [
        LayerShape(rows, columns, len(each)) for each, rows, columns in indices_and_shapes
    ]


def assert_survives(layers: Layers) -> bytes:
    data = encode_positions(*layers)
    for indices, decoded in zip(layers[0], decode_positions(data, layers[1]), strict=True):
        np.testing.assert_array_equal(indices, decoded, strict=True)
    return data


# --- round trips ----------------------------------------------------------------------------------


@for_every("top_k", [1, 2, 3, 5, 16, 63, 64])
def test_any_k_of_every_neuron_survives(top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    assert_survives(
        layers_of(
            (per_row(192, 64, top_k, rng), 192, 64),
            (per_row(65, 70, top_k, rng), 65, 70),
            (per_row(1, 64, top_k, rng), 1, 64),
        )
    )


@for_every("count", [1, 7, 300, 4095, 4096])
def test_selections_by_layer_survive(count: int) -> None:
    rng = np.random.default_rng(count)
    assert_survives(
        layers_of(
            (by_layer(128, 32, count, rng), 128, 32), (by_layer(1, 4096, count, rng), 1, 4096)
        )
    )


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_indices_survive(data: st.DataObject) -> None:
    layers = []
    for _ in range(data.draw(st.integers(1, 3))):
        rows, columns = (
            data.draw(st.integers(1, 140)),
            data.draw(st.sampled_from([1, 2, 3, 31, 300, 70_000])),
        )
        indices = data.draw(
            st.lists(st.integers(0, rows * columns - 1), min_size=1, max_size=90, unique=True)
        )
        layers.append((np.array(sorted(indices)), rows, columns))
    assert_survives(layers_of(*layers))


@for_every("columns", [1, 2, 255, 256, 257])
def test_a_whole_weight_survives(columns: int) -> None:
    assert_survives(layers_of((np.arange(3 * columns), 3, columns)))


def test_the_smaller_form_is_kept_and_both_can_be_read() -> None:
    rng = np.random.default_rng(0)
    skewed = layers_of((per_row(768, 192, 1, rng, skew=2.0), 768, 192))
    assert assert_survives(skewed)[:1] == CODED
    scattered = layers_of((np.arange(512) * 4096 + rng.permutation(4096)[:512], 512, 4096))
    assert assert_survives(scattered)[:1] == PLAIN
    assert len(encode_positions(*scattered)) <= 1 + len(_coded(*scattered))


# --- size -----------------------------------------------------------------------------------------


def slow_bits(indices: np.ndarray, columns: int) -> float:
    """Code length of one row-by-row selection of K = 1 in one track, value by value, as the model's
    definition has it.
    """
    seen: dict[int, int] = {}
    bits, chosen = 0.0, (indices % columns).tolist()
    for start, stop in itertools.pairwise(block_bounds(len(chosen), 0)):
        total = CONCENTRATION + 16 * start
        known = dict(seen)
        for column in chosen[start:stop]:
            if column in known:
                bits -= np.log2((16 * known[column] - DISCOUNT) / total)
            else:
                bits += np.log2(columns) - np.log2((CONCENTRATION + DISCOUNT * len(known)) / total)
            seen[column] = seen.get(column, 0) + 1
    return bits


@pytest.mark.parametrize("skew", [0.5, 1.5, 3.0])
def test_the_coded_size_is_the_models_code_length(skew: float) -> None:
    indices = per_row(
        50, 192, 1, np.random.default_rng(1), skew
    )  # fewer rows than two segments: one track
    coded = _coded(*layers_of((indices, 50, 192)))
    assert len(coded) == pytest.approx(slow_bits(indices, 192) / 8, abs=4)


def test_heads_that_choose_alike_are_cheaper_than_one_model_of_all() -> None:
    rng = np.random.default_rng(3)
    heads = [per_row(64, 192, 1, rng, skew=3.0) + head * 64 * 192 for head in range(6)]
    mixed = np.concatenate(heads)
    shuffled = np.sort(rng.permutation(384) * 192 + mixed % 192)
    assert len(encode_positions(*layers_of((mixed, 384, 192)))) < 0.95 * len(
        encode_positions(*layers_of((shuffled, 384, 192)))
    )


def test_the_order_within_a_row_costs_nothing() -> None:
    """64 of 64 columns have one set, but 64! orders."""
    assert len(_coded(*layers_of((np.arange(300 * 64), 300, 64)))) < 300 * 64 * 6 / 8 / 8


# --- what no writer wrote -------------------------------------------------------------------------

SHAPES = [LayerShape(4, 6, 3), LayerShape(2, 9, 2)]
INDICES = [np.array([0, 7, 23]), np.array([8, 9])]


@for_every(
    ("indices", "message"),
    [
        ([0, 7, 24], "indices 0 to 24, the weight has 24"),
        ([-1, 7, 8], "indices -1"),
        ([0, 7, 7], "index 7 follows 7"),
        ([7, 0, 8], "index 0 follows 7"),
        ([0, 7], r"expected int64 \[3\], found int64 \[2\]"),
        ([0.0, 1.0, 2.0], "expected int64"),
    ],
)
def test_indices_out_of_range_or_order_are_not_written(indices: list[int], message: str) -> None:
    with pytest.raises(PackDamaged, match=f"layer 0: {message}"):
        encode_positions([np.array(indices), INDICES[1]], SHAPES)


@for_every("data", [b"", b"\2", b"\1", b"\0", b"\0" * 3, b"\0" * 300])
def test_other_bytes_are_damage(data: bytes) -> None:
    with pytest.raises(PackDamaged):
        decode_positions(data, SHAPES)


def test_random_bytes_are_refused_or_read_as_indices() -> None:
    rng = np.random.default_rng(5)
    for _ in range(500):
        data = rng.choice([PLAIN, CODED]) + rng.bytes(int(rng.integers(0, 40)))
        try:
            decoded = decode_positions(data, SHAPES)
        except PackDamaged:
            continue
        assert_survives((decoded, SHAPES))


def test_every_truncation_of_plain_positions_is_damage() -> None:
    scattered, shapes = layers_of(
        (np.arange(64) * 4096 + np.random.default_rng(1).permutation(4096)[:64], 64, 4096)
    )
    data = encode_positions(scattered, shapes)
    assert data[:1] == PLAIN
    for size in range(len(data)):
        with pytest.raises(PackDamaged):
            decode_positions(data[:size], shapes)


@for_every(
    "shapes",
    [
        [],
        [LayerShape(4, 6, 0)],
        [LayerShape(4, 6, 25)],
        [LayerShape(1, 1 << 23, 1)],
        [LayerShape(1 << 22, 1, 1), LayerShape(1, 1, 1)],
    ],
)
def test_shapes_that_no_layer_has_are_damage(shapes: list[LayerShape]) -> None:
    with pytest.raises(PackDamaged):
        decode_positions(b"\1" + bytes(50), shapes)


@pytest.mark.parametrize(
    ("limit", "message"), [("max_work", "odds"), ("max_cells", "column models")]
)
def test_work_and_memory_out_of_proportion_are_refused_and_not_written(
    limit: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = layers_of((per_row(768, 192, 1, np.random.default_rng(0), skew=1.0), 768, 192))
    coded = encode_positions(*layers)
    assert coded[:1] == CODED
    monkeypatch.setattr(columns_module, limit, lambda values: 100)
    with pytest.raises(PackDamaged, match=message):
        decode_positions(coded, layers[1])
    assert encode_positions(*layers)[:1] == PLAIN


# --- helpers --------------------------------------------------------------------------------------


@settings(max_examples=40, derandomize=True, deadline=None)
@given(rows=st.integers(0, 5000), segment=st.sampled_from([0, 32, 64]))
def test_blocks_cover_all_rows_once_and_never_cross_segments(rows: int, segment: int) -> None:
    bounds = block_bounds(rows, segment)
    assert (bounds[0], bounds[-1]) == (0, rows)
    assert all(start < stop for start, stop in itertools.pairwise(bounds))
    assert all(edge in bounds for edge in (range(0, rows, segment) if segment else []))


def test_runs_and_ranks() -> None:
    assert runs(np.array([3, 10, 7]), np.array([2, 0, 3])).tolist() == [3, 4, 7, 8, 9]
    assert runs(np.array([], int), np.array([], int)).tolist() == []
    assert ranks_of_first(np.array([0, 0, 0, 2, 2, 2]), np.array([5, 9, 5, 9, 4, 9])).tolist() == [
        1,
        2,
        1,
        1,
        2,
        1,
    ]


# --- the coder ------------------------------------------------------------------------------------


def random_symbols(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [1, A] and symbols; often one symbol is all but certain, or the only one."""
    rng = np.random.default_rng(seed)
    count, alphabet = int(rng.integers(0, 40)), int(rng.integers(1, 50))
    weights_TA = rng.integers(1, 1000, (1, alphabet))
    if rng.random() < 0.3:
        weights_TA[0, 0] = 10**8
    symbols_R = rng.integers(0, alphabet, count)
    return weights_TA, symbols_R * (rng.random() >= 0.5)


@pytest.mark.parametrize(
    "first", [0, 876]
)  # 876: the last word that would be rounded up does not exist
def test_any_symbols_survive_the_coder_and_bytes_after_them_are_noticed(first: int) -> None:
    for seed in range(first, first + 200):
        weights_TA, symbols_R = random_symbols(seed)
        encoder, table_R = Encoder(), np.zeros(len(symbols_R), np.int64)
        encoder.categorical(weights_TA, table_R, symbols_R)
        data = encoder.to_bytes()
        for surplus in (
            b"",
            b"\0",
            bytes(64) + b"surplus",
        ):  # zeros are what a decoder takes missing bytes for
            decoder = Decoder(data + surplus)
            np.testing.assert_array_equal(decoder.categorical(weights_TA, table_R, None), symbols_R)
            if surplus:
                with pytest.raises(PackDamaged, match="bytes are left"):
                    decoder.check_end()
            else:
                decoder.check_end()


def test_bytes_after_coded_positions_are_refused() -> None:
    rng = np.random.default_rng(0)
    layers = layers_of((per_row(192, 64, 1, rng), 192, 64))
    data = assert_survives(layers)
    assert data[:1] == CODED
    for surplus in (b"\0", bytes(range(1, 30))):
        with pytest.raises(PackDamaged, match="bytes are left"):
            decode_positions(data + surplus, layers[1])


# --- the example of docs/pack-format.md -----------------------------------------------------------


class _Recorder:
    """A coder that notes the bits of every symbol."""

    def __init__(self) -> None:
        self.bits: list[float] = []

    def uniform(self, sizes_R: np.ndarray, symbols_R: np.ndarray | None) -> np.ndarray:
        raise AssertionError("the example names columns by odds")

    def categorical(
        self, weights_TA: np.ndarray, table_R: np.ndarray, symbols_R: np.ndarray | None
    ) -> np.ndarray:
        assert symbols_R is not None
        for table, symbol in zip(table_R, symbols_R, strict=True):
            self.bits.append(float(np.log2(weights_TA[table].sum() / weights_TA[table, symbol])))
        return symbols_R


def test_the_example_of_the_documentation_costs_what_it_says() -> None:
    columns, recorder = np.array([2, 2, 0, 2]), _Recorder()
    one_each, zeros = np.ones(4, np.int64), np.zeros(4, np.int64)
    rows = Rows(zeros, np.arange(4), one_each, np.array([0]), np.array([4]), np.array([0]))
    code_columns(recorder, rows, columns)
    expected = [0, 2, np.log2(36 / 11), np.log2(52 / 25), np.log2(3), np.log2(68 / 27)]
    np.testing.assert_allclose(recorder.bits, expected, atol=1e-3)
    assert round(sum(recorder.bits), 1) == 7.7
