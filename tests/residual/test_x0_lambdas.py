import torch

from attnres import residual

from .loop import DIM, assert_formula, layers_of, randomised, run


def test_reads_are_the_formula():
    res = randomised(residual.build("x0_lambdas", DIM, 5))

    def written_out(embedding, layers):
        x, inputs = embedding, []
        for (a, b), layer in zip(res.lambdas, layers, strict=True):
            x = a * x + b * embedding
            inputs.append(x)
            x = x + layer(x)
        return [*inputs, x]

    assert_formula(res, written_out, 5)


def test_scalars_move_by_less_than_bfloat16_can_hold():
    res = residual.build("x0_lambdas", DIM, 1)
    with torch.no_grad():
        res.lambdas[0] = torch.tensor([1.001, 0.001])
    x = torch.full((DIM,), 1.0, dtype=torch.bfloat16)
    embedding = torch.full((DIM,), 256.0, dtype=torch.bfloat16)
    h, _ = res.read(res.start(embedding)._replace(unread=x), 0)
    torch.testing.assert_close(h, torch.full_like(h, 1.001 + 0.256))


def test_starts_as_the_plain_sum_with_two_scalars_a_layer():
    res = residual.build("x0_lambdas", DIM, 5)
    assert {name: tuple(p.shape) for name, p in res.named_parameters()} == {"lambdas": (5, 2)}
    embedding = torch.randn(3, DIM, dtype=torch.float64)
    want = run(residual.build("prenorm", DIM, 5), embedding, layers_of(5))
    assert all(torch.equal(a, b) for a, b in zip(run(res, embedding, layers_of(5)), want, strict=True))
