"""Metrics of spectra against closed forms and against their definitions on small matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.fim import spectrum
from calibration.fim.attention import AttentionFisher, causal_softmax, fisher
from calibration.fim.scores import category, compression_potential, efficiency_score


def random_psd(size: int, rank: int, seed: int) -> Tensor:
    root = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT


def values(spectra: Tensor, **options: float) -> dict[str, float]:
    return {name: float(value) for name, value in spectrum.metrics(spectra, **options).items()}


@pytest.mark.parametrize("size", [1, 7, 16, 40])
def test_an_even_spectrum(size):
    found = values(torch.full((size,), 0.25))
    assert found["trace"] == pytest.approx(size / 4)
    assert found["cond"] == 1
    assert found["df"] == pytest.approx(size)
    assert found["energy_r8"] == pytest.approx(min(8, size) / size)
    assert found["energy_r16"] == pytest.approx(min(16, size) / size)
    assert found["effective_rank"] == math.ceil(0.9 * size)


def test_one_direction():
    found = values(torch.tensor([0.5] + [0.0] * 19))
    expected = {"trace": 0.5, "eigmax": 0.5, "cond": 1, "energy_r8": 1, "effective_rank": 1, "df": 1}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_halving_spectrum():
    found = values(torch.tensor([0.5**i for i in range(60)], dtype=torch.float64))
    assert found["energy_r8"] == pytest.approx(1 - 0.5**8)
    assert found["effective_rank"] == 4
    # (2)^2 / (1 / (1 - 1/4))
    assert found["df"] == pytest.approx(3)
    # The smallest of at least 1e-8 is 2^-26.
    assert found["cond"] == pytest.approx(2**26)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
def test_metrics_are_those_of_the_matrix(size, rank, seed):
    matrix = random_psd(size, rank, seed)
    eigenvalues = spectrum.eigenvalues(matrix)
    found, expected = values(eigenvalues), torch.linalg.eigvalsh(matrix)
    assert found["trace"] == pytest.approx(float(matrix.trace()))
    assert found["eigmax"] == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)))
    assert found["df"] == pytest.approx(float(matrix.trace() ** 2 / matrix.square().sum()))
    positive = expected[expected >= spectrum.POSITIVE]
    assert found["cond"] == pytest.approx(float(positive.max() / positive.min()), rel=1e-3)
    assert int(found["effective_rank"]) == next(
        k for k in range(1, size + 1) if expected.flip(0)[:k].sum() >= 0.9 * expected.sum() * (1 - 1e-9)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=30).filter(any),
    st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]),
)
def test_rank_for_holds_the_share_and_one_less_does_not(numbers, share):
    ordered = torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)
    rank = int(spectrum.rank_for(ordered, share))
    assert ordered[:rank].sum() >= share * ordered.sum() * (1 - 1e-9)
    assert ordered[: rank - 1].sum() < share * ordered.sum()


def test_variances_in_few_dimensions():
    found = spectrum.variance_metrics(torch.tensor([1.0] * 8 + [1e-6] * 56))
    assert {name: float(v) for name, v in found.items()} == pytest.approx(
        {"df": 8, "k90": 8, "k95": 8, "k99": 8, "compression": 8}, rel=1e-3
    )


class TestAttention:
    @pytest.mark.parametrize("tokens", [1, 2, 9, 33])
    def test_uniform_attention_in_closed_form(self, tokens):
        # diag(1/n) - 11^T/n^2 has n - 1 eigenvalues 1/n: a centring matrix over n.
        matrix = fisher(torch.full((1, tokens), 1 / tokens, dtype=torch.float64))
        assert float(matrix.trace()) == pytest.approx(1 - 1 / tokens)
        found = spectrum.eigenvalues(matrix)
        torch.testing.assert_close(found[:-1], torch.full((tokens - 1,), 1 / tokens, dtype=torch.float64))
        assert float(found[-1]) == pytest.approx(0, abs=1e-12)

    def test_two_tokens_in_closed_form(self):
        matrix = fisher(torch.tensor([[0.8, 0.2]], dtype=torch.float64))
        assert float(spectrum.eigenvalues(matrix)[0]) == pytest.approx(2 * 0.8 * 0.2)

    def test_settled_attention_has_no_information(self):
        assert fisher(torch.eye(5, dtype=torch.float64)).abs().max() == 0

    def test_a_query_attends_to_no_later_token(self):
        probabilities = causal_softmax(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
        assert probabilities.triu(1).abs().max() == 0
        torch.testing.assert_close(probabilities.sum(1), torch.ones(6, dtype=torch.float64))

    def test_the_stream_is_the_mean_over_all_queries(self):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(3, 4, 10, 8, generator=generator)
        key = torch.randn(3, 2, 10, 8, generator=generator)
        measured = AttentionFisher()
        for window in range(3):
            measured.add(7, query[window, None], key[window, None], 0.3)
            measured.queries += 10
        total = torch.zeros(4, 10, 10, dtype=torch.float64)
        for window in range(3):
            for head in range(4):
                for position in range(10):
                    logits = (query[window, head, position] @ key[window, head // 2].mT)[: position + 1] * 0.3
                    p = torch.nn.functional.pad(logits.double().softmax(0), (0, 9 - position))
                    total[head] += torch.diag(p) - torch.outer(p, p)
        torch.testing.assert_close(measured.sums[7], total, rtol=1e-5, atol=1e-7)
        expected = torch.linalg.eigvalsh(total / 30).flip(-1)
        torch.testing.assert_close(measured.spectra()[7], expected, rtol=1e-4, atol=1e-7)


class TestScores:
    @pytest.mark.parametrize(
        ("cond", "energy", "score"), [(1e3, 1, 0), (1e5, 0.5, 25), (1e7, 0.9, 90), (1e9, 1, 100), (10, 1, 0)]
    )
    def test_potential(self, cond, energy, score):
        assert compression_potential(cond, energy) == pytest.approx(score)

    def test_unknown_metrics_have_no_potential(self):
        assert math.isnan(compression_potential(math.nan, 0.5))

    def test_efficiency(self):
        assert efficiency_score(0.25) == 75

    @pytest.mark.parametrize(
        ("head", "name"),
        [
            ({"trace": 0.96, "cond": 1e8, "energy_r8": 1.0}, "critical"),
            ({"trace": 0.95, "cond": 1e8, "energy_r8": 1.0}, "high_potential"),
            ({"trace": 0.3, "cond": 1e8, "energy_r8": 0.6}, "moderate"),
            ({"trace": 0.3}, "moderate"),
        ],
    )
    def test_category(self, head, name):
        assert category(head) == name
